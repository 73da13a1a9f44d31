import pytest

from vgpo.bench import PHASES, bench_table, main, make_run, measure, network_seconds, timed_epoch
from vgpo.config import Config, OptimConfig, SamplingConfig


@pytest.fixture(scope="module")
def recipe(tiny_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(f"""model: {{path: "{tiny_folder}"}}
sampling: {{groups: 2, group_size: 4, batch_size: 2, steps: 3, sde_steps: 2}}
values: {{reward_steps: 3}}
evaluation: {{images: 6}}
""")
    return path


@pytest.mark.parametrize(("sampling", "optim", "expected"), [
    ({}, {}, (20.0, 54.0)),
    ({"guidance_scale": 4.0}, {}, (40.0, 54.0)),
    ({}, {"guidance_scale": 4.0}, (20.0, 72.0)),
    ({}, {"kl_weight": 0.1}, (20.0, 72.0)),
])  # fmt: skip
def test_network_seconds_counts_every_call_of_the_network(sampling, optim, expected):
    config = Config(sampling=SamplingConfig(steps=10, sde_steps=9, **sampling), optim=OptimConfig(**optim))
    assert tuple(network_seconds(config, 1.0, 2).values()) == expected


def test_table_shows_methods_and_ratios():
    rows = {"grpo": dict.fromkeys([*PHASES, "epoch"], 2.0), "vgpo": dict.fromkeys([*PHASES, "epoch"], 3.0)}
    lines = {
        line[:16].strip(): line[16:].split()
        for line in bench_table(rows, {"sample": 2.0, "update": 1.5}, 12).split("\n")
    }
    assert lines["grpo"] == ["2.000"] * 5 + ["6.0"] and lines["vgpo/grpo"] == ["1.50"] * 5
    assert lines["vgpo / network"] == ["1.50", "2.00"]


def test_methods_take_turns_on_the_same_number_of_epochs(recipe, tmp_path, monkeypatch):
    runs, turns = {kind: make_run(str(recipe), kind, tmp_path / kind) for kind in ("grpo", "vgpo")}, []

    def spy(run):
        turns.append(run.config.advantage.kind)
        return timed_epoch(run)

    monkeypatch.setattr("vgpo.bench.timed_epoch", spy)
    medians, forward, batches = measure(runs, 2)
    assert turns == ["grpo", "vgpo"] * 3 and [run.epoch for run in runs.values()] == [3, 3]
    assert batches == 4 and forward > 0  # 8 images in batches of 2
    for row in medians.values():
        assert all(row[key] > 0 for key in (*PHASES, "epoch"))


def test_program_prints_the_table(recipe, capsys):
    main(["--recipe", str(recipe), "--epochs", "1"])
    out = capsys.readouterr().out
    assert "epochs of 8 images in 4 batches, 3 steps of which 2 are trained" in out and "vgpo / network" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--recipe", "absent"], "there is no recipe 'absent'"),
    ],
)
def test_bad_command_lines_end_in_one_line(words, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main(words)
