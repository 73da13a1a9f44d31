"""The timing program, and the scripts of benchmarks/ that draw the figures of docs/performance.md."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch

from vgpo import bench
from vgpo.bench import PHASES, CountSyncs, bench_table, main, make_trainer, measure, network_seconds, timed_epoch
from vgpo.config import parse_config, save_config

VAE = str(Path(__file__).parents[1] / "vgpo" / "world" / "tiny" / "vae")
SMALL = """base: tiny-geneval
rollout: {prompts_per_epoch: 2, group_size: 4, micro_batch_size: 2, num_inference_steps: 3}
window: {class_path: Leading, init_args: {size: 2}}
credit: {class_path: VGPO, init_args: {num_scored_steps: 3, anchor_steps: 2}}
"""


@pytest.fixture(scope="module")
def recipe(tiny_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(f'{SMALL}model: {{path: "{tiny_folder}"}}\n')
    return path


@pytest.mark.parametrize(("options", "expected"), [
    ([], (20.0, 54.0)),
    (["--rollout.guidance_scale=4"], (40.0, 54.0)),
    (["--objective.guidance_scale=4"], (20.0, 72.0)),
    (["--objective.beta=0.1"], (20.0, 72.0)),
    (["--objective.beta=0.1", "--objective.guidance_scale=4"], (20.0, 108.0)),
    (["--credit=GRPO", "--objective=NFT"], (38.0, 54.0)),
    (["--credit=GRPO", "--objective=AWM", "--objective.guidance_scale=4", "--objective.beta=0.1"], (56.0, 108.0)),
])  # fmt: skip
def test_network_seconds_counts_every_call_of_the_network(options, expected):
    config = parse_config(["--rollout.num_inference_steps=10", "--window.size=9", *options])
    assert tuple(network_seconds(config, 1.0, 2).values()) == expected


@pytest.mark.parametrize("objective", [[], ["--credit=GRPO", "--objective=VGRPO"]])
@pytest.mark.parametrize("options", [[], ["--objective.guidance_scale=4", "--objective.beta=0.1"]])
def test_the_formula_counts_the_passes_that_an_epoch_makes(recipe, monkeypatch, objective, options):
    "A pass with gradient counts three times; `predict` alone calls the network."
    config, trainer = make_trainer(str(recipe), "VGPO", [*objective, *options, "--rollout.guidance_scale=2"])
    predict, passes = trainer.policy.predict, []

    def spy(*args):
        passes.append(3 if torch.is_grad_enabled() else 1)
        return predict(*args)

    monkeypatch.setattr(trainer.policy, "predict", spy)
    timed_epoch(trainer)
    expected = network_seconds(config, 1, 4)
    assert sum(passes) == expected["rollout"] + expected["update"]


def test_table_shows_methods_their_price_and_ratios():
    rows = {name: dict.fromkeys(PHASES, s) | {"epoch": 4 * s} for name, s in (("GRPO", 2.0), ("VGPO", 3.0))}
    rows["VGPO"]["decode"] = 4.0
    networks = {"GRPO": {"rollout": 2.0, "update": 1.5}, "VGPO": {"rollout": 1.0, "update": 1.5}}
    table = bench_table(rows, networks, 12)
    lines = {line[:32].strip(): line[32:].split() for line in table.split("\n")}
    assert lines["GRPO"] == ["2.000"] * 4 + ["8.000", "1.5"]
    assert lines["VGPO / GRPO"] == ["1.50", "2.00", "1.50", "1.50", "1.50"]
    assert lines["more, of its epoch"] == ["+12.5%", "+25.0%", "+12.5%", "+12.5%", "+50.0%"]
    assert lines["network alone"] == ["2.000", "1.500"] and lines["GRPO / network"] == ["1.00", "1.33"]
    assert lines["VGPO / network"] == ["3.00", "2.00"]  # over its own


def test_methods_take_turns_on_the_same_number_of_epochs(recipe, monkeypatch):
    trainers, turns = {credit: make_trainer(str(recipe), credit)[1] for credit in ("GRPO", "VGPO")}, []

    def spy(trainer):
        turns.append(type(trainer.credit).__name__)
        return timed_epoch(trainer)

    monkeypatch.setattr("vgpo.bench.timed_epoch", spy)
    found = measure(trainers, 2)
    assert turns == ["GRPO", "VGPO"] * 3 and [trainer.epoch for trainer in trainers.values()] == [3, 3]
    assert found.batches == 4 and found.forward > 0  # 8 images in batches of 2
    for row in found.medians.values():
        assert all(row[key] > 0 for key in (*PHASES, "epoch"))
    assert len(found.memory) == 3 and min(found.memory) > 100  # PyTorch alone takes more


def test_resident_memory_grows_with_what_is_kept():
    before = bench.resident()
    kept = torch.ones(64 * 2**20 // 4)
    assert 50 < bench.resident() - before < 100, len(kept)  # 64 MiB, and what else the process does


def test_program_prints_the_table_with_another_option_beside_it(recipe, capsys):
    other = "credit=GRPO objective=NFT"
    main(["--recipe", str(recipe), "--epochs", "1", "--also", "window.size=1", other, "--optim.num_minibatches=1"])
    out = capsys.readouterr().out
    assert f"{other} / GRPO" in out and f"{other} / network" in out
    assert "epochs of 8 images in 4 micro-batches" in out and "VGPO / network" in out and "window.size=1 / GRPO" in out
    assert "MiB after the first epoch of each" in out and "waited for the GPU" not in out


def test_waits_for_a_gpu_are_counted_by_phase(recipe, monkeypatch):
    trainer, modes, watch = make_trainer(str(recipe), "VGPO")[1], [], CountSyncs()
    rollout = trainer.rollout
    trainer.callbacks.append(watch)

    def waiting(*args):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another thing", stacklevel=1)
        return rollout(*args)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(trainer, "rollout", waiting)
    trainer.train_epoch()
    assert watch.counts == {"rollout": 12, "decode": 0, "score": 0, "update": 0}  # four micro-batches
    assert modes == ["warn", "default"]


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
    script("scaling").main(["--paper", "--recipe", "tiny-geneval", "--tiny_vae", VAE, "--gpus", "1", "4"])
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


FINISHED = ["--epochs=3", "--rollout.prompts_per_epoch=2", "--rollout.group_size=4", "--rollout.num_inference_steps=4"]
FINISHED += ["--window.size=3", "--optim.num_minibatches=2"]


def finished_run(folder, credit, rewards):
    "What a run leaves that learning.py reads: evaluated every second epoch of an odd number, and at the end."
    folder.mkdir()
    words = ["--credit", credit, *(["--credit.num_scored_steps=3"] if credit == "VGPO" else [])]
    save_config(parse_config([*words, *FINISHED]), folder / "config.yaml")
    rows = [{f"time/{phase}": s for phase in PHASES} for s in (1.0, 9.0, 1.0)]  # the second was disturbed
    rows[0]["eval/reward"], rows[2]["eval/reward"] = rewards[:2]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(
        json.dumps({"after": {"reward": {"scaled": {"mean": rewards[2]}, "strict": {"mean": 0.5}}}})
    )


def test_learning_reads_what_was_spent_before_each_evaluation(script, tmp_path, capsys, monkeypatch):
    learning = script("learning")
    finished_run(tmp_path / "tiny-geneval-GRPO-7", "GRPO", (0.2, 0.3, 0.4))
    finished_run(tmp_path / "tiny-geneval-VGPO-7", "VGPO", (0.2, 0.6, 0.8))
    monkeypatch.setattr(learning.subprocess, "run", None)  # finished runs are not repeated
    learning.main(["--output", str(tmp_path), "--seeds", "7", "--figure", str(tmp_path / "figure.png")])
    out = capsys.readouterr().out
    assert "| 2 | 4 | 8 | 16 | 0.3000 | nan | 8 | 48 | 0.6000 | nan |" in out  # seconds, images, reward, accuracy
    assert "| 3 | 6 | 12 | 24 | 0.4000 | 0.5000 | 12 | 72 | 0.8000 | 0.5000 |" in out
    assert "until the mean held-out reward was 0.4000" in out
    assert "GRPO: 12 seconds of training, 6 updates, 24 images scored" in out
    assert "VGPO: 4 seconds of training, 2 updates, 24 images scored" in out  # half of the way to epoch 2
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_learning_alternates_and_names_the_run_that_failed(script, tmp_path, monkeypatch):
    learning, calls = script("learning"), []

    def train(command):
        words = dict(word.removeprefix("--").split("=") for word in command if "=" in word)
        calls.append(words)
        finished_run(tmp_path / words["name"], words["credit"], (0.1, 0.2, 0.3))
        return learning.subprocess.CompletedProcess(command, 75 if len(calls) == 4 else 0)

    monkeypatch.setattr(learning.subprocess, "run", train)
    with pytest.raises(SystemExit, match="tiny-geneval-GRPO-1 ended with code 75; call again"):
        learning.main(
            ["--output", str(tmp_path), "--seeds", "0", "1", "--epochs", "3", "--rollout.prompts_per_epoch=2"]
        )
    methods = [(words["credit"], words["seed"]) for words in calls]
    assert methods == [("GRPO", "0"), ("VGPO", "0"), ("VGPO", "1"), ("GRPO", "1")]
    assert {(w["epochs"], w["evaluation.eval_every"], w["rollout.prompts_per_epoch"]) for w in calls} == {
        ("3", "5", "2")
    }
