"The credit study: what it would run, and one run of it, small."

import json

import pytest

from vgpo.config import parse_config
from vgpo.credit.grpo import GRPO
from vgpo.credit.one_step import OneStep
from vgpo.evaluation.gold import renderings


@pytest.fixture
def study(monkeypatch, tmp_path, script):
    "The script, which finds and leaves its results in a folder of its own."
    study = script("study")
    monkeypatch.setattr(study, "FOUND", tmp_path / "found")
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    return study


def tuning_lines(study, scores):
    "Lines of the part `tune` with these scores by learning rate, for all methods."
    methods = [method for method in study.METHODS if method not in study.TUNED_AS]
    return [{"method": m, "lr": lr, "guidance": {"2.0": {"scaled": s}}} for m in methods for lr, s in scores.items()]


def write(study, part, lines):
    study.FOUND.mkdir(exist_ok=True)
    (study.FOUND / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_run_has_a_name_of_its_own_and_options_that_exist(study):
    write(study, "tune", tuning_lines(study, {1e-3: 0.5, 3e-3: 0.6}))
    runs = [run for part in study.PARTS.values() for run in part()]
    assert len({study.key(run) for run in runs}) == len(runs) > 100
    for run in {json.dumps(run["options"]): run for run in runs}.values():
        parse_config(["--recipe=tiny-geneval", *run["options"]])


def test_one_step_is_one_step_whatever_the_recipes_window_says(study):
    for task in study.TASKS:
        config = parse_config([f"--recipe={task}", *study.COMMON, *study.METHODS["one step"]])
        assert config.window == OneStep() and config.objective.step_weights == "noise"
        assert config.credit == GRPO(scale_rewards="batch")


def test_a_method_takes_its_best_rate_and_a_variant_that_of_its_method(study):
    with pytest.raises(ValueError, match="GRPO is not tuned yet: run the part `tune` first"):
        study.tuned("GRPO")
    write(study, "tune", tuning_lines(study, {1e-3: 0.5, 3e-3: 0.6}) + tuning_lines(study, {1e-3: 0.7})[1:2])
    assert study.tuned("GRPO") == 3e-3
    assert study.tuned("VGPO") == study.tuned("TCRM only") == 1e-3


def test_the_score_is_the_best_over_guidance(study):
    line = {"guidance": {"1.0": {"scaled": 0.4, "strict": 0.5}, "2.0": {"scaled": 0.6, "strict": 0.3}}}
    assert study.best(line)["scaled"] == 0.6 and study.best(line, "strict")["strict"] == 0.5


def test_a_run_that_is_done_is_not_repeated_and_one_that_failed_is(study, monkeypatch, capsys):
    asked = []

    def run_alone(run):
        asked.append(study.key(run))
        return run["method"] != "VGPO"

    monkeypatch.setattr(study, "run_alone", run_alone)
    first = study.tune()[0]
    write(study, "tune", [first])
    with pytest.raises(SystemExit, match="some runs of tune failed; call again to repeat them"):
        study.main(["tune", "--jobs", "1"])
    assert len(asked) == len(study.tune()) - 1 and study.key(first) not in asked
    study.main(["tune", "--only", "NFT", "--list"])
    assert "tune: 1 runs are done, 2 are to do" in capsys.readouterr().out


SMALL = [
    *("--rollout.num_inference_steps=2", "--window.size=1", "--rollout.prompts_per_epoch=2", "--rollout.group_size=2"),
    *("--rollout.micro_batch_size=2", "--optim.num_minibatches=1", "--model.compile=false"),
]


@pytest.mark.parametrize(
    "task, easy", [("tiny-geneval", False), ("tiny-geneval", True), ("tiny-ocr", False), ("tiny-pickscore", False)]
)
def test_a_small_run(study, monkeypatch, task, easy):
    for name, value in {
        "HELD_OUT": 16,
        "BY_SDE": 16,
        "QUICK": 2,
        "EVERY": 1,
        "STEPS": 2,
        "GUIDANCE": (1.0, 2.0),
    }.items():
        monkeypatch.setattr(study, name, value)
    run = study.cell("main", task, "GRPO", 0, 1, [*SMALL, *(study.EASY if easy else [])], lr=1e-3)
    line = json.loads(json.dumps(study.train(run)))  # what is printed can be read again
    assert line.items() >= run.items() and line["seconds"] > 0
    before, during, after = line["curve"]
    assert (before["scored"], after["scored"]) == (0, 4) and during["train"]["reward"] >= 0
    assert set(line["guidance"]) == {"1.0", "2.0"}
    assert all(0 <= found["scaled"] <= 1 and 0 < found["gold"]["sharpness"] <= 1 for found in line["guidance"].values())
    assert len(line["samplers"]["kl"]) == 2 and (study.RUNS / study.key(run)).is_dir()


def test_values_of_states(study):
    run = study.cell("values", "tiny-geneval", "GRPO", 0, 0, SMALL)
    trainer = study.build_trainer(
        parse_config(["--recipe=tiny-geneval", *run["options"]]), study.init_accelerator(600.0)
    )
    found = study.state_values(trainer, prompts=2, per_prompt=2, states=(0, 1), count=2)
    assert len(found["group"]) == len(found["value"]) == 4 and len(found["rewards"][0]) == 3
    assert all(0 <= value <= 1 for row in found["value"] for value in row)


def test_easy_scenes_are_right_or_wrong(script):
    easy = script("easy_scenes")
    rows = easy.scenes("test", 40)
    assert {row["tag"] for row in rows} == set(easy.EASY) and len(rows) == 40
    images, prompts = renderings(rows), [row["prompt"] for row in rows]
    assert easy.right(images, prompts, rows).tolist() == [1.0] * 40
    assert easy.right(images[::-1].copy(), prompts, rows).mean() < 0.3
