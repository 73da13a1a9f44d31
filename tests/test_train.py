"The training program: what a run leaves behind, exact resume, what ends it, and what it says of that."

import json
import os

import pytest
import torch
from safetensors.torch import load_file

import vgpo.train as program
from vgpo.config import parse_config
from vgpo.rewards.base import RewardError, make_reward
from vgpo.runs.callbacks import RatioCheck, SkipNonFinite, TrainingError
from vgpo.runs.checkpoint import newest_valid
from vgpo.runs.session import Session
from vgpo.train import begin, main

SMALL = [
    *("--rollout.prompts_per_epoch=2", "--rollout.group_size=4", "--rollout.num_inference_steps=4", "--window.size=3"),
    *("--credit.num_scored_steps=4", "--rollout.micro_batch_size=4", "--evaluation.num_samples=6"),
    *("--evaluation.num_inference_steps=4", "--reward=tiny_rewards:brightness", "--save_every=1"),
    *("--log_images_every=100", "--optim.lr=1e-3", "--optim.num_minibatches=2", "--optim.lr_scheduler=constant"),
    *("--objective.clip_range=1e-3", "--optim.ema_decay=0.9"),
]


@pytest.fixture
def options(tiny_folder, tmp_path):
    "Command-line options of a small, fast run."
    return [*SMALL, f"--model.path={tiny_folder}", f"--output_dir={tmp_path}", "--epochs=4"]


def weights(session):
    "All trained weights as one vector."
    return torch.cat([p.detach().flatten() for p in session.trainer.policy.parameters()])


def newest(session):
    return newest_valid(session.folder / "checkpoints")


def again(session):
    "Another Session in the folder of one, at its newest checkpoint."
    other = Session(session.config, session.folder, session.accelerator)
    other.restore(newest(other))
    return other


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def spoil(session, monkeypatch, value=float("nan")):
    "Multiply the losses of a Session's objective."
    real = session.trainer.objective.loss

    def loss(*arguments):
        loss, stats = real(*arguments)
        return loss * value, stats

    monkeypatch.setattr(session.trainer.objective, "loss", loss)


# --- checks ---


def test_a_wrong_ratio_stops_the_run(options, monkeypatch):
    session = begin(options)
    rollout = session.trainer.rollout

    def shifted(*arguments):
        batch = rollout(*arguments)
        batch.path.log_probs += 1e-6
        return batch

    monkeypatch.setattr(session.trainer, "rollout", shifted)
    with pytest.raises(SystemExit) as end:
        program.see_through(session)
    assert str(end.value).startswith("error: before the first update the mean |ratio - 1| is ")
    assert str(end.value).endswith("above 0.0: rollout and update do not compute the same velocity")


def test_a_ratio_that_is_not_finite_is_skipped_and_the_next_one_checked(options):
    trainer, check = begin(options).trainer, RatioCheck()
    check.before_step(trainer, {"ratio/abs_dev_mean": float("nan")})
    with pytest.raises(TrainingError, match="do not compute the same velocity"):
        check.before_step(trainer, {"ratio/abs_dev_mean": 0.1})
    check.before_step(trainer, {"ratio/abs_dev_mean": 0.0})
    check.before_step(trainer, {"ratio/abs_dev_mean": 0.1})  # after the first update it may differ
    resumed = RatioCheck()
    resumed.load_state(check.state())
    resumed.before_step(trainer, {"ratio/abs_dev_mean": 0.1})


def test_with_another_guidance_in_the_update_the_first_ratio_may_differ(options):
    session = begin([*options, "--objective.guidance_scale=2"])
    assert session.trainer.train_epoch()["ratio/abs_dev_mean"] > 0


def test_a_non_finite_update_is_skipped_and_counted_and_several_end_the_run(options, monkeypatch):
    session = begin([*options, "--optim.max_nonfinite_updates=3"])
    (check,) = (c for c in session.trainer.callbacks if isinstance(c, SkipNonFinite))
    before = weights(session)
    with monkeypatch.context() as patch:
        spoil(session, patch)
        metrics = session.trainer.train_epoch()  # two updates
        assert metrics["nonfinite_updates"] == 2 and torch.equal(weights(session), before)
        session.save()
        (resumed,) = (c for c in again(session).trainer.callbacks if isinstance(c, SkipNonFinite))
        assert (resumed.in_row, resumed.total) == (2, 2)
        with pytest.raises(TrainingError, match="3 updates in a row had a non-finite loss or gradient; lower"):
            session.trainer.train_epoch()
    check.in_row = 2
    session.trainer.train_epoch()
    assert check.in_row == 0 and not torch.equal(weights(session), before)


def test_a_checkpoint_is_named_only_where_there_is_one(options, monkeypatch):
    session = begin([*options, "--optim.max_nonfinite_updates=1"])
    spoil(session, monkeypatch)
    with pytest.raises(SystemExit, match="resume from the last checkpoint, if there is one$"):
        program.see_through(session)
    assert newest(session) is None
    again = begin([*options, "--optim.max_nonfinite_updates=1"])
    again.before = again.evaluate_before()
    again.trainer.train_epoch()
    again.save()
    spoil(again, monkeypatch)
    with pytest.raises(SystemExit) as end:
        program.see_through(again)
    first, second = str(end.value).splitlines()
    assert first.startswith("error: 1 updates in a row had a non-finite loss or gradient; lower optim.lr")
    assert second == f"go on from epoch 1 with: python -m vgpo.train --resume {again.folder}"


# --- resuming ---


def test_restore_brings_everything_back(options):
    session = begin([*options, "--optim.lr_scheduler=cosine"])
    session.trainer.train_epoch()
    session.save()
    other = again(session)
    assert torch.equal(weights(session), weights(other)) and other.saved == 1
    assert other.trainer.epoch == 1 and other.trainer.scheduler.last_epoch == session.config.optim.num_minibatches
    assert other.trainer.ema.optimization_step == session.trainer.ema.optimization_step == 2
    assert other.log.rows == session.log.rows and other.clock.trained_s == session.clock.trained_s > 0
    one, two = session.trainer.train_epoch(), other.trainer.train_epoch()
    assert torch.equal(weights(session), weights(other)) and one["lr"] == two["lr"] < 1e-3
    with session.trainer.averaged(), other.trainer.averaged():
        assert torch.equal(weights(session), weights(other))


def test_other_prompts_than_before_are_refused(options, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red circle\na photo of a blue square\n")
    main([*options, f"--prompts.train={prompts}", "--epochs=1"])
    prompts.write_text("a photo of a red circle\na photo of a green square\n")
    with pytest.raises(SystemExit, match="error: prompts.train no longer gives the prompts of the checkpoint"):
        main(["--resume", str(tmp_path / "tiny-geneval"), "--epochs=2"])


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(SystemExit, match="is not a run: it has no config.yaml"):
        main(["--resume", str(tmp_path)])


def test_a_run_that_has_more_epochs_is_not_resumed_with_fewer(options, tmp_path):
    main([*options, "--epochs=2"])
    with pytest.raises(SystemExit, match="has 2 epochs already; give --epochs 2 or more"):
        main(["--resume", str(tmp_path / "tiny-geneval"), "--epochs=1"])


# --- what ends a run ---


@pytest.mark.parametrize("every", [0, 1])  # with 1, the held-out evaluation calls the reward first
@pytest.mark.parametrize("name, message", [("broken", "the reward is out"), ("not_a_number", "row 1, prompt")])
def test_a_failing_reward_keeps_what_was_learned(options, name, message, every):
    session = begin([*options, f"--evaluation.eval_every={every}"])
    session.before = session.evaluate_before()
    session.trainer.train_epoch()
    learned, good = weights(session), session.trainer.reward
    session.trainer.reward = session.rewards["reward"] = make_reward(f"tiny_rewards:{name}")
    with pytest.raises(RewardError, match=message):
        session.run()
    other = again(session)
    assert other.trainer.epoch == 1 and torch.equal(weights(other), learned)
    assert type(other.trainer.reward) is type(good)
    other.run()
    assert other.trainer.epoch == 4 and [row["epoch"] for row in rows(other.folder)] == [0, 1, 2, 3]


def test_images_that_are_not_finite_end_the_run_with_its_state(options, monkeypatch):
    session = begin(options)
    session.before = session.evaluate_before()
    session.trainer.train_epoch()
    monkeypatch.setattr(
        session.trainer.policy, "pixels", lambda *args, real=session.trainer.policy.pixels: real(*args) * float("nan")
    )
    with pytest.raises(SystemExit) as end:
        program.see_through(session)
    assert str(end.value).startswith("error: ") and "not finite" in str(end.value).splitlines()[0]
    assert "go on from epoch 1 with" in str(end.value) and newest(session).name == "epoch-00001"


@pytest.mark.parametrize("moment", ["rollout", "begin"])
def test_a_full_accelerator_names_the_remedies(options, monkeypatch, moment):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    session = begin(options)
    if moment == "rollout":
        monkeypatch.setattr(session.trainer, "rollout", full)
        with pytest.raises(SystemExit) as end:
            program.see_through(session)
        assert str(end.value).endswith(
            f"; then go on from epoch 0 with: python -m vgpo.train --resume {session.folder}"
        )
    else:
        monkeypatch.setattr("vgpo.runs.session.load_policy", full)
        with pytest.raises(SystemExit) as end:
            main(options)
    for option in ("rollout.micro_batch_size", "model.gradient_checkpointing", "model.fsdp"):
        assert option in str(end.value)  # and test_resume.py holds that a resumed run may change each of them


@pytest.mark.parametrize(
    "more, message",
    [
        (["--recipe", "nonsense"], "no recipe 'nonsense'.*tiny-geneval"),
        (["--reward", "beauty"], "beauty"),
        (["--prompts.train", "missing.txt"], "prompt file missing.txt does not exist"),
        (["--model.path", "vgpo_no_such_folder"], "vgpo_no_such_folder"),
        (["--rollout.prompts_per_epoch", "9999", "--optim.num_minibatches", "1"],
         "rollout.prompts_per_epoch is 9999, but there are 3000"),
        (["--optim.num_minibatches", "3"], "optim.num_minibatches is 3; it must divide the 8 images"),
        (["--credit.gamma", "1.5"], "credit.*gamma"),
        (["--resume", "nowhere"], "--resume"),
    ],
)  # fmt: skip
def test_bad_options_end_in_one_line(options, tmp_path, more, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as error:
        main([*options, *more])
    assert "\n" not in str(error.value)
    assert not any(path.is_dir() for path in tmp_path.iterdir())  # and no empty folder is left behind


# --- what a run leaves ---


def test_the_program_leaves_a_complete_run(options, tmp_path):
    main([*options, "--epochs=2", "--log_images_every=1", "--evaluation.eval_every=1"])
    run = tmp_path / "tiny-geneval"
    results = json.loads((run / "results.json").read_text())
    assert results["epochs"] == 2
    for name in (
        "config.yaml",
        "before_after.png",
        "curves.png",
        "samples/epoch-0001.png",
        "report.md",
        "versions.json",
    ):
        assert (run / name).stat().st_size > 0
    assert list(run.rglob("events*"))
    row = rows(run)[-1]
    assert {"reward", "reward_std", "frac_reward_zero_std", "ratio/abs_dev_mean", "clip_ratio", "grad_norm",
            "eval/reward", "raw", "samples_per_second", "time/rollout", "time/update", "nonfinite_updates",
            "lr"} <= row.keys()  # fmt: skip
    assert 0 <= row["eval/reward"] <= 1 and len(row["reward_by_step"]) == 4
    assert parse_config(["--recipe", str(run / "config.yaml")]).epochs == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["epoch-00001", "epoch-00002"]


def test_limits_end_a_run_and_the_report_says_why(options, tmp_path):
    second = "--early_stopping.validation_reward=tiny_rewards:power"
    main([*options, "--objective.target_kl=1e-15", second, "--evaluation.eval_every=1", "--name=guarded"])
    run = tmp_path / "guarded"
    assert "the run ended after 1 of 4 epochs: the KL to the model before" in (run / "report.md").read_text()
    assert json.loads((run / "results.json").read_text())["epochs"] == 1
    (row,) = rows(run)
    assert row["kl"] > 0 and row["eval/validation_reward_change"] == 0  # before its first update nothing has changed
    assert "tiny_rewards:power" in (run / "versions.json").read_text()
    main(["--resume", str(run), "--objective.target_kl=0"])
    results = json.loads((run / "results.json").read_text())
    assert results["epochs"] == 4 and not any("ended after" in text for text in results["warnings"])


def test_the_weights_of_the_highest_held_out_reward_are_kept(options, monkeypatch):
    held_out, evaluate = [0.5, 0.75, 0.625, 0.75, 0.875], Session.evaluate  # before epochs 0 to 3, and in the end

    def evaluated(session):
        result = evaluate(session)
        result.summary["reward"]["scaled"]["mean"] = held_out[session.trainer.epoch]
        return result

    monkeypatch.setattr(Session, "evaluate", evaluated)
    session = begin([*options, "--evaluation.eval_every=1", "--save_total_limit=9"])

    def best_is(epoch, folder):
        "Whether the best weights are those of this epoch, as they are in the folder."
        (best,) = (session.folder / "best").iterdir()
        one, other = (load_file(path / "lora" / "pytorch_lora_weights.safetensors") for path in (best, folder))
        return best.name == epoch and all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())

    session.before = session.evaluate_before()
    session.before.summary["reward"]["scaled"]["mean"] = 0.5
    session.trainer.fit()
    assert best_is("epoch-00001", session.folder / "checkpoints/epoch-00001")
    assert not best_is("epoch-00001", session.folder / "checkpoints/epoch-00002")
    session.run()
    assert best_is("epoch-00004", session.folder)


def test_a_terminal_that_is_gone_does_not_end_a_run():
    reading, writing = os.pipe()
    stream = program.BrokenPipeSafe(os.fdopen(writing, "w"))
    stream.write("heard\n")
    os.close(reading)
    for _ in range(3):
        stream.write("not heard\n")
        stream.flush()
    assert stream.isatty() is False and stream.stream.fileno() == writing
