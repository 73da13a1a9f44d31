"""The timing program, and the scripts of benchmarks/ that draw the figures of docs/performance.md."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch

import vgpo.train
from vgpo import bench
from vgpo.bench import PHASES, bench_table, count_syncs, main, make_run, measure, network_seconds, timed_epoch
from vgpo.config import Config, OptimConfig, SamplingConfig, save_config

VAE = str(Path(__file__).parents[1] / "vgpo" / "world" / "tiny" / "vae")
SMALL = "sampling: {groups: 2, group_size: 4, batch_size: 2, steps: 3, sde_steps: 2}\nvalues: {reward_steps: 3}\n"


@pytest.fixture(scope="module")
def recipe(tiny_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(f'model: {{path: "{tiny_folder}"}}\n{SMALL}evaluation: {{images: 6}}\n')
    return path


@pytest.fixture
def script(monkeypatch):
    "Imports a script of benchmarks/ by its name."
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return __import__


@pytest.mark.parametrize(("sampling", "optim", "expected"), [
    ({}, {}, (20.0, 54.0)),
    ({"guidance_scale": 4.0}, {}, (40.0, 54.0)),
    ({}, {"guidance_scale": 4.0}, (20.0, 72.0)),
    ({}, {"kl_weight": 0.1}, (20.0, 72.0)),
    ({}, {"kl_weight": 0.1, "guidance_scale": 4.0}, (20.0, 108.0)),
])  # fmt: skip
def test_network_seconds_counts_every_call_of_the_network(sampling, optim, expected):
    config = Config(sampling=SamplingConfig(steps=10, sde_steps=9, **sampling), optim=OptimConfig(**optim))
    assert tuple(network_seconds(config, 1.0, 2).values()) == expected


@pytest.mark.parametrize("options", [[], ["--optim.guidance_scale=4", "--optim.kl_weight=0.1"]])
def test_the_formula_counts_the_passes_that_a_run_makes(recipe, tmp_path, monkeypatch, options):
    "A pass with gradient counts three times; `predict` alone calls the network."
    run, passes = make_run(str(recipe), "vgpo", tmp_path / "run", [*options, "--sampling.guidance_scale=2"]), []
    predict = run.policy.predict

    def spy(*args):
        passes.append(3 if torch.is_grad_enabled() else 1)
        return predict(*args)

    monkeypatch.setattr(run.policy, "predict", spy)
    timed_epoch(run)
    expected = network_seconds(run.config, 1, 4)
    assert sum(passes) == expected["sample"] + expected["update"]


def test_table_shows_methods_their_price_and_ratios():
    rows = {name: dict.fromkeys(PHASES, s) | {"epoch": 4 * s} for name, s in (("grpo", 2.0), ("vgpo", 3.0))}
    rows["vgpo"]["decode"] = 4.0
    table = bench_table(rows, {"sample": 2.0, "update": 1.5}, 12)
    lines = {line[:32].strip(): line[32:].split() for line in table.split("\n")}
    assert lines["grpo"] == ["2.000"] * 4 + ["8.000", "1.5"]
    assert lines["vgpo / grpo"] == ["1.50", "2.00", "1.50", "1.50", "1.50"]
    assert lines["more, of its epoch"] == ["+12.5%", "+25.0%", "+12.5%", "+12.5%", "+50.0%"]
    assert lines["network alone"] == ["2.000", "1.500"] and lines["vgpo / network"] == ["1.50", "2.00"]


def test_methods_take_turns_on_the_same_number_of_epochs(recipe, tmp_path, monkeypatch):
    runs, turns = {kind: make_run(str(recipe), kind, tmp_path / kind) for kind in ("grpo", "vgpo")}, []

    def spy(run):
        turns.append(run.config.advantage.kind)
        return timed_epoch(run)

    monkeypatch.setattr("vgpo.bench.timed_epoch", spy)
    found = measure(runs, 2)
    assert turns == ["grpo", "vgpo"] * 3 and [run.epoch for run in runs.values()] == [3, 3]
    assert found.batches == 4 and found.forward > 0  # 8 images in batches of 2
    for row in found.medians.values():
        assert all(row[key] > 0 for key in (*PHASES, "epoch"))
    assert len(found.memory) == 3 and min(found.memory) > 100  # PyTorch alone takes more


def test_resident_memory_grows_with_what_is_kept():
    before = bench.resident()
    kept = torch.ones(64 * 2**20 // 4)
    assert 50 < bench.resident() - before < 100, len(kept)  # 64 MiB, and what else the process does


def test_program_prints_the_table_with_another_option_beside_it(recipe, capsys):
    main(["--recipe", str(recipe), "--epochs", "1", "--also", "sampling.steps=4", "--optim.updates", "1"])
    out = capsys.readouterr().out
    assert "epochs of 8 images in 4 batches" in out and "vgpo / network" in out and "sampling.steps=4 / grpo" in out
    assert "MiB after the first epoch of each" in out and "waited for the GPU" not in out


def test_waits_for_a_gpu_are_counted_by_phase(recipe, tmp_path, monkeypatch):
    run, modes, roll = make_run(str(recipe), "vgpo", tmp_path / "run"), [], vgpo.train.roll

    def waiting(*args):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another thing", stacklevel=1)
        return roll(*args)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(vgpo.train, "roll", waiting)
    assert count_syncs(run) == {"sample": 12, "decode": 0, "score": 0, "update": 0}  # four batches
    assert modes == ["warn", "default"] and run.epoch == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--recipe", "absent"], "there is no recipe 'absent'"),
        (["--also", "model.compiled=true"], "there is no option model.compiled; did you mean model.compile"),
    ],
)
def test_bad_command_lines_end_in_one_line(words, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main(words)


def test_scaling_predicts_from_the_plan(script, tiny_folder):
    "Images, steps and processes are linear in the counts; what is outside of the phases stays as it is."
    scaling = script("scaling")
    model, base = str(tiny_folder), scaling.QUICK
    work, seconds = scaling.counted(base, model), dict.fromkeys(PHASES, 1.0) | {"epoch": 5.0}

    def guess(**change):
        return scaling.predicted(seconds, work, scaling.counted(base | change, model))

    assert guess() == 5 and guess(groups=4) == guess(group_size=8) == 9 and guess(processes=2) == 3
    sample, decode, score, update = 2, 2, 2, 5 / 2  # steps, and the trained ones, which are one less
    assert guess(steps=6) == 1 + sample + decode + score + update


def test_scaling_formulas(script):
    scaling = script("scaling")
    for n, known in ((1, 0), (2, 1 / math.sqrt(math.pi)), (3, 3 / (2 * math.sqrt(math.pi)))):
        assert scaling.expected_maximum(n) == pytest.approx(known, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(20_000, 64, generator=generator).max(1).values
    assert scaling.expected_maximum(64) == pytest.approx(drawn.mean().item(), abs=5 * drawn.std().item() / 20_000**0.5)
    assert scaling.ring_seconds(1e9, 1, 1e9) == 0
    assert scaling.ring_seconds(1e9, 4, 1e9, latency=0) == 1.5  # 2 (n - 1) / n of the bytes


def test_scaling_extrapolates_a_recipe(script, capsys):
    script("scaling").main(["--paper", "--recipe", "tiny-geneval", "--draft", VAE, "--gpus", "1", "4"])
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    prices = {row[0]: [float(cell) for cell in row[1:]] for row in rows[1:6]}
    assert prices["GRPO"][5] == prices["GRPO"][7] == 1 < prices["VGPO"][5]
    assert prices["VGPO"][2] == pytest.approx(128 * 5 * 0.02, abs=0.5) and rows[-1][-1].endswith("%")


def test_scaling_runs_its_points(script, tmp_path, monkeypatch, capsys):
    "Two processes learn in a launcher of their own; times are not compared, as tests share the machine."
    scaling = script("scaling")
    monkeypatch.setattr(scaling, "QUICK_AXES", {"processes": (1, 2)})
    scaling.main(["--quick", "--figure", str(tmp_path / "figure.png")])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| processes")]
    assert len(rows) == 2 and rows[0].endswith("| 1.00 | 1.00 |") and (tmp_path / "figure.png").stat().st_size > 1000


def finished_run(folder, kind, scores):
    "What a run leaves that learning.py reads: evaluated every second epoch of an odd number, and at the end."
    folder.mkdir()
    config = Config(epochs=3, sampling=SamplingConfig(groups=2, group_size=4, steps=4, sde_steps=3))
    config.advantage.kind, config.values.reward_steps, config.optim.updates = kind, 3, 2
    save_config(config, folder / "config.yaml")
    rows = [{f"{phase}_s": s for phase in PHASES} for s in (1.0, 9.0, 1.0)]  # the second was disturbed
    rows[0]["heldout_score"], rows[2]["heldout_score"] = scores[:2]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps({"after": {"score": scores[2], "strict": 0.5}}))


def test_learning_reads_what_was_spent_before_each_evaluation(script, tmp_path, capsys, monkeypatch):
    learning = script("learning")
    finished_run(tmp_path / "tiny-geneval-grpo-7", "grpo", (0.2, 0.3, 0.4))
    finished_run(tmp_path / "tiny-geneval-vgpo-7", "vgpo", (0.2, 0.6, 0.8))
    monkeypatch.setattr(learning.subprocess, "run", None)  # finished runs are not repeated
    learning.main(["--output", str(tmp_path), "--seeds", "7", "--figure", str(tmp_path / "figure.png")])
    out = capsys.readouterr().out
    assert "| 2 | 4 | 8 | 16 | 0.3000 | nan | 8 | 48 | 0.6000 | nan |" in out  # seconds, pictures, score, strict
    assert "| 3 | 6 | 12 | 24 | 0.4000 | 0.5000 | 12 | 72 | 0.8000 | 0.5000 |" in out
    assert "until the mean held-out score was 0.4000" in out
    assert "grpo: 12 seconds of training, 6 updates, 24 pictures scored" in out
    assert "vgpo: 4 seconds of training, 2 updates, 24 pictures scored" in out  # half of the way to epoch 2
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_learning_alternates_and_names_the_run_that_failed(script, tmp_path, monkeypatch):
    learning, calls = script("learning"), []

    def train(command):
        words = dict(word.removeprefix("--").split("=") for word in command if "=" in word)
        calls.append(words)
        finished_run(tmp_path / words["name"], words["advantage.kind"], (0.1, 0.2, 0.3))
        return learning.subprocess.CompletedProcess(command, 75 if len(calls) == 4 else 0)

    monkeypatch.setattr(learning.subprocess, "run", train)
    with pytest.raises(SystemExit, match="tiny-geneval-grpo-1 ended with code 75; call again"):
        learning.main(["--output", str(tmp_path), "--seeds", "0", "1", "--epochs", "3", "--sampling.groups=2"])
    kinds = [(words["advantage.kind"], words["seed"]) for words in calls]
    assert kinds == [("grpo", "0"), ("vgpo", "0"), ("vgpo", "1"), ("grpo", "1")]
    assert {(w["epochs"], w["evaluation.every"], w["sampling.groups"]) for w in calls} == {("3", "5", "2")}
