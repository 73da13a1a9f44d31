"The training program: exact ratios, independence of how the work is cut, exact resume, and what goes wrong."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vgpo.train as program
from vgpo.advantages import group_relative, value_anchored
from vgpo.runs.checkpoint import newest_whole
from vgpo.config import AdvantageConfig, parse_config
from vgpo.rewards.base import RewardError
from vgpo.rollout import replay
from vgpo.runs.session import Run, checkpoint, restore, start
from vgpo.train import credit, fill_columns, learning_rate, main, sample, scored_columns, train, train_epoch, update
from vgpo.values import discounted_values

SMALL = [
    *("--sampling.groups=2", "--sampling.group_size=4", "--sampling.steps=4", "--sampling.sde_steps=3"),
    *("--values.reward_steps=4", "--sampling.batch_size=4", "--evaluation.images=6", "--evaluation.steps=4"),
    *("--reward.name=tiny_rewards:brightness", "--checkpoint_every=1", "--samples_every=100", "--optim.lr=1e-3"),
    *("--optim.updates=2", "--optim.decay=false", "--optim.clip_range=1e-3", "--optim.ema_decay=0.9"),
]


@pytest.fixture
def options(tiny_folder, tmp_path):
    "Command-line options of a small, fast run."
    return [*SMALL, f"--model.path={tiny_folder}", f"--output={tmp_path}", "--epochs=4"]


def make_run(options, *more):
    "A new Run, with the folder that `start` makes."
    return start([*options, *more])


def weights(run):
    "All trained weights as one vector."
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


def test_the_ratio_is_exactly_one_before_the_first_update(options):
    run = make_run(options)
    for batch in sample(run):
        for j in range(run.config.sampling.sde_steps):
            step = replay(lambda x, s, b=batch: run.policy.velocity(x, s, b.condition), batch.path, j, run.sampler)
            assert torch.equal(step.log_prob(batch.path.latents[:, j + 1]), batch.path.log_probs[:, j])


def test_a_wrong_ratio_stops_the_run(options, monkeypatch):
    run = make_run(options)
    batches = list(sample(run))
    for batch in batches:
        batch.path.log_probs += 1e-6
        batch.advantages = torch.ones(len(batch.rows), 4)
    with pytest.raises(program.TrainingError, match=r"mean \|ratio - 1\| is .* above 0.0"):
        update(run, batches)


def test_samples_are_a_function_of_seed_epoch_prompt_and_k(options):
    def latents(*more):
        run = make_run(options, *more)
        found = {}
        for batch in sample(run):
            for row, path, prompt in zip(batch.rows, batch.path.latents, batch.path.group.tolist(), strict=True):
                found.setdefault((prompt, row["prompt"]), []).append(path)
        return {key: torch.stack(paths) for key, paths in found.items()}

    whole, small = latents("--sampling.batch_size=8"), latents("--sampling.batch_size=1")
    assert whole.keys() == small.keys()
    for key in whole:
        torch.testing.assert_close(whole[key], small[key], atol=1e-4, rtol=0)
        assert torch.equal(whole[key][:, 0], small[key][:, 0])
    other = latents("--seed=1")
    assert all(not torch.equal(whole[key][0, 0], other[key][0, 0]) for key in whole.keys() & other.keys())


@pytest.mark.parametrize("kind", ["vgpo", "grpo"])
def test_micro_batching_does_not_change_the_update(options, kind):
    def trained(batch_size):
        run = make_run(options, f"--sampling.batch_size={batch_size}", f"--advantage.kind={kind}")
        begin = weights(run)
        train_epoch(run)
        return weights(run) - begin

    whole, small = trained(8), trained(1)
    assert whole.abs().max() > 1e-4
    # Adam divides by the gradient's size, so a weight whose gradient is rounding noise may move either way
    assert torch.nn.functional.cosine_similarity(whole, small, dim=0) > 0.999


def test_training_changes_the_lora_alone_and_raises_the_reward(options):
    run = make_run(options, "--epochs=12", "--optim.lr=5e-3", "--sampling.group_size=8", "--optim.clip_range=0.1")
    frozen = {n: p.clone() for n, p in run.policy.pipe.transformer.named_parameters() if not p.requires_grad}
    before = program.evaluate_run(run).summary["score"]
    train(run)
    after = program.evaluate_run(run).summary["score"]
    assert after > 1.2 * before  # many times the spread between samples
    now = dict(run.policy.pipe.transformer.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in frozen.items())


def launch(arguments, tmp_path):
    "The program in a process of its own."
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vgpo.train", *arguments]
    return subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])  # and test_faults.py
def test_an_interrupted_run_ends_like_an_unbroken_one(options, tmp_path, how):
    options = [*options, "--epochs=6", "--evaluation.images=6"]
    whole = launch([*options, "--name=whole"], tmp_path)
    assert whole.wait() == 0, whole.stdout.read().decode()
    broken = launch([*options, "--name=broken"], tmp_path)
    log = tmp_path / "broken" / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert broken.poll() is None, broken.stdout.read().decode()
        time.sleep(0.01)
    broken.send_signal(how)
    message = broken.communicate()[0].decode()
    assert broken.returncode == (-signal.SIGKILL if how == signal.SIGKILL else program.RESUMABLE)
    assert len(log.read_text().splitlines()) < 6
    if how != signal.SIGKILL:
        assert "--resume" in message.splitlines()[-1]
    resumed = launch(["--resume", str(tmp_path / "broken")], tmp_path)
    assert resumed.wait() == 0, resumed.stdout.read().decode()
    for name in ("lora/pytorch_lora_weights.safetensors", "checkpoints/epoch-00006/state.safetensors"):
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "broken" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    rewards = [[json.loads(x)["reward"] for x in (tmp_path / n / "metrics.jsonl").open()] for n in ("whole", "broken")]
    assert rewards[0] == rewards[1]


def test_restore_brings_everything_back(options):
    run = make_run(options)
    train_epoch(run)
    run.epoch = 1
    checkpoint(run)
    again = Run(run.config, run.folder)
    restore(again, newest_whole(again.folder / "checkpoints"))
    assert torch.equal(weights(run), weights(again))
    assert again.epoch == 1 and again.updates == run.config.optim.updates
    run.epoch = again.epoch
    train_epoch(run)
    train_epoch(again)
    assert torch.equal(weights(run), weights(again))


def test_a_non_finite_update_is_skipped_and_counted_and_several_end_the_run(options, monkeypatch):
    run = make_run(options, "--optim.max_skipped=3")
    surrogate = program.clipped_surrogate

    def poisoned(*arguments):
        loss, stats = surrogate(*arguments)
        return loss * float("nan"), stats

    monkeypatch.setattr(program, "clipped_surrogate", poisoned)
    begin = weights(run)
    metrics = train_epoch(run)  # two updates
    assert metrics["skipped"] == 2 and torch.equal(weights(run), begin)
    with pytest.raises(program.TrainingError, match="3 updates in a row had a non-finite loss or gradient; lower"):
        train_epoch(run)
    monkeypatch.setattr(program, "clipped_surrogate", surrogate)
    run.skipped_in_row = 2
    train_epoch(run)
    assert run.skipped_in_row == 0 and not torch.equal(weights(run), begin)


@pytest.mark.parametrize("every", [0, 1])  # with 1, the held-out evaluation calls the reward first
@pytest.mark.parametrize("name, message", [("broken", "the judge is out"), ("not_a_number", "row 1, prompt")])
def test_a_failing_reward_keeps_what_was_learned(options, name, message, every):
    run = make_run(options, f"--evaluation.every={every}")
    train_epoch(run)
    run.epoch, good, learned = 1, run.reward, weights(run)
    run.reward = program_reward(name)
    with pytest.raises(RewardError, match=message):
        train(run)
    again = Run(run.config, run.folder)
    restore(again, newest_whole(again.folder / "checkpoints"))
    assert again.epoch == 1 and torch.equal(weights(again), learned)
    again.reward = good
    train(again)
    assert again.epoch == 4


def program_reward(name):
    from vgpo.rewards.base import make_reward

    return make_reward(f"tiny_rewards:{name}")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--recipe", "nonsense"], "no recipe 'nonsense'.*tiny-geneval"),
        (["--reward.name", "beauty"], "unknown reward 'beauty'"),
        (["--prompts.train", "missing.txt"], "prompt file missing.txt does not exist"),
        (["--model.path", "vgpo_no_such_folder"], "vgpo_no_such_folder"),
        (["--sampling.groups", "9999", "--optim.updates", "1"], "sampling.groups is 9999, but there are 3000"),
        (["--optim.updates", "3"], "optim.updates is 3; it must divide the 8 images"),
        (["--values.gamma", "1.5"], "values.gamma is 1.5"),
        (["--resume", "nowhere"], "--resume"),
    ],
)
def test_bad_options_end_in_one_line(options, more, message):
    with pytest.raises(SystemExit, match=message) as error:
        main([*options, *more])
    assert "\n" not in str(error.value)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(SystemExit, match="is not a run: it has no config.yaml"):
        main(["--resume", str(tmp_path)])


def test_the_program_leaves_a_complete_run(options, tmp_path):
    main([*options, "--epochs=2", "--samples_every=1", "--evaluation.every=1"])
    run = tmp_path / "tiny-geneval"
    results = json.loads((run / "results.json").read_text())
    assert results["epochs"] == 2 and 0 <= results["before"]["score"] <= 1
    for name in ("config.yaml", "before_after.png", "curves.png", "samples/epoch-0001.png", "report.md"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").rglob("events*")) or list(run.rglob("events*"))
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward", "group_std", "zero_std", "ratio_dev", "clip_frac", "grad_norm", "heldout_score"} <= row.keys()
    assert parse_config(["--recipe", str(run / "config.yaml")]).epochs == 2


def test_guards_end_a_run_and_the_report_says_why(options, tmp_path):
    guards = ["--guard.kl_budget=1e-15", "--guard.quality=tiny_rewards:power", "--evaluation.every=1"]
    main([*options, *guards, "--name=guarded"])
    run = tmp_path / "guarded"
    assert "the run ended after 1 of 4 epochs: the KL to the model before" in (run / "report.md").read_text()
    results = json.loads((run / "results.json").read_text())
    assert results["epochs"] == 1 and 0 <= results["after"]["quality"] <= 1
    row = json.loads((run / "metrics.jsonl").read_text())
    assert row["kl"] > 0 and row["heldout_quality_change"] == 0  # before its first update nothing has changed
    assert "tiny_rewards:power" in (run / "versions.json").read_text()
    main(["--resume", str(run), "--guard.kl_budget=0"])
    results = json.loads((run / "results.json").read_text())
    assert results["epochs"] == 4 and not any("ended after" in text for text in results["warnings"])


def test_the_weights_of_the_highest_held_out_score_are_kept(options, monkeypatch):
    held_out, evaluate = [0.5, 0.75, 0.625, 0.75, 0.875], program.evaluate_run  # before epochs 0 to 3, and in the end

    def evaluated(run):
        result = evaluate(run)
        result.summary["score"] = held_out[run.epoch]
        return result

    monkeypatch.setattr(program, "evaluate_run", evaluated)
    run = make_run(options, "--evaluation.every=1", "--keep_checkpoints=9")
    run.before = evaluated(run)
    train(run)

    def best_is(epoch, folder):
        "Whether the best weights are those of this epoch, as they are in the folder."
        (best,) = (run.folder / "best").iterdir()
        one, other = (load_file(path / "lora" / "pytorch_lora_weights.safetensors") for path in (best, folder))
        return best.name == epoch and all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())

    assert best_is("epoch-00001", run.folder / "checkpoints/epoch-00001")
    assert not best_is("epoch-00001", run.folder / "checkpoints/epoch-00002")
    program.finish(run)
    assert best_is("epoch-00004", run.folder)


def test_pictures_that_are_not_finite_end_the_run_with_its_state(options, monkeypatch, capsys):
    run = make_run(options)
    train_epoch(run)
    run.epoch = 1
    real, calls = run.policy.pixels, []

    def pixels(*args):
        calls.append(0)
        return real(*args) * (float("nan") if len(calls) > 8 else 1)  # the evaluation before training takes 2 of them

    monkeypatch.setattr(run.policy, "pixels", pixels)
    with pytest.raises(SystemExit) as end:
        program.run_all(run)
    assert str(end.value).startswith("error: a picture has values that are not finite")
    assert (
        "go on from epoch 1 with" in str(end.value) and newest_whole(run.folder / "checkpoints").name == "epoch-00001"
    )


def test_a_ratio_that_is_not_finite_is_skipped_and_the_next_one_checked(options):
    run = make_run(options)
    program.check_ratio(run, float("nan"))
    with pytest.raises(program.TrainingError, match="do not compute the same velocity"):
        program.check_ratio(run, 0.1)
    program.check_ratio(run, 0.0)
    program.check_ratio(run, 0.1)  # after the first update it may differ


def test_statistics_do_not_depend_on_the_size_of_passes(options):
    "Shares of 4 in passes of 4, or of 3 and 1: means over samples, not over passes."
    more = ["--guard.kl_budget=1e9", "--advantage.clip=1.0"]
    one, other = (train_epoch(make_run(options, *more, f"--sampling.batch_size={size}")) for size in (4, 3))
    for key in ("loss", "kl", "approx_kl", "clip_frac"):
        assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-9), key
    assert one["approx_kl"] > 0


def test_other_prompts_than_before_are_refused(options, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red circle\na photo of a blue square\n")
    main([*options, f"--prompts.train={prompts}", "--epochs=1"])
    prompts.write_text("a photo of a red circle\na photo of a green square\n")
    with pytest.raises(SystemExit, match="error: prompts.train no longer gives the prompts of the checkpoint"):
        main(["--resume", str(tmp_path / "tiny-geneval"), "--epochs=2"])


def test_a_terminal_that_is_gone_does_not_end_a_run():
    reading, writing = os.pipe()
    stream = program.Lasting(os.fdopen(writing, "w"))
    stream.write("heard\n")
    os.close(reading)
    for _ in range(3):
        stream.write("not heard\n")
        stream.flush()
    assert stream.isatty() is False and stream.stream.fileno() == writing


def test_scoring_in_a_thread_changes_nothing(options):
    def trained(*more):
        run = make_run(options, *more)
        metrics = train_epoch(run)
        return weights(run), metrics["reward_by_step"]

    (plain, rewards), (overlapped, same) = trained(), trained("--reward.overlap=true")
    assert torch.equal(plain, overlapped) and rewards == same


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_a_failing_reward_is_noticed_in_a_thread_too(options, monkeypatch, overlap):
    run, real, rolled = make_run(options, f"--reward.overlap={overlap}", "--sampling.batch_size=1"), program.roll, []

    def roll(*args):
        rolled.append(0)
        return real(*args)

    monkeypatch.setattr(program, "roll", roll)
    run.reward = program_reward("broken")
    with pytest.raises(RewardError, match="the judge is out"):
        train_epoch(run)
    assert len(rolled) < 4  # of 8: nobody goes on for long


def test_credit_is_grpo_or_vgpo():
    rewards = torch.rand(6, 4)
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    grpo = credit(rewards, group, 0.9, AdvantageConfig(kind="grpo"))
    torch.testing.assert_close(grpo, group_relative(rewards[:, -1], group)[:, None].expand(6, 4))
    vgpo = credit(rewards, group, 0.9, AdvantageConfig(kind="vgpo", anchor=0.3, anchor_steps=2, clip=0.5))
    expected = value_anchored(discounted_values(rewards, 0.9), group, anchor=0.3, anchor_steps=2).clamp(-0.5, 0.5)
    torch.testing.assert_close(vgpo, expected)


@pytest.mark.parametrize("steps", [4, 10])
def test_scored_columns_end_with_the_last_step_and_fill_forwards(steps):
    for count in range(1, steps + 1):
        columns = scored_columns(steps, count)
        assert len(columns) == count and columns[-1] == steps - 1 and columns == sorted(set(columns))
        filled = fill_columns(torch.tensor([columns]), columns, steps)[0].tolist()
        assert filled == [min(c for c in columns if c >= j) for j in range(steps)]


def test_learning_rate_warms_up_and_decays(options):
    optim = parse_config(["--optim.lr=1.0", "--optim.warmup=4", "--optim.decay=true"]).optim
    rates = [learning_rate(optim, u, 20) for u in range(21)]
    assert rates[0] == pytest.approx(0.25) and max(rates) <= 1 and rates[20] == pytest.approx(0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
