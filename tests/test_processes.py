"The same run, however it is cut: processes, micro-batches, gradient checkpointing, and resuming with other numbers."

import json
import os
import signal
import subprocess
import time
from fractions import Fraction
from math import sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from equivalence import EIGHT, FAR, SMALL, WHOLE, differences, epochs, final_weights, launch, recorded

from vgpo.advantages import group_relative, group_stats, value_anchored
from vgpo.prompts.files import load_prompts
from vgpo.runs.callbacks import StopWhenAsked
from vgpo.runs.checkpoint import checkpoints, read_checkpoint
from vgpo.train import main, stoppable


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    "A function that makes a recorded run, once, and returns its folder, with the run and the record in it."
    root = tmp_path_factory.mktemp("cuts")

    def make(processes, *words):
        folder = root / f"{processes}{''.join(words)}"
        words = [*SMALL, *words, f"--output_dir={folder}"]
        if not folder.exists() and processes == 1:
            with recorded(folder / "record"):
                main(words)
        elif not folder.exists():
            started = launch(processes, words, folder / "record")
            said = started.communicate()[0]
            assert started.returncode == 0, said
            assert f"{12 // processes} in each of {processes} processes" in said and said.count("held-out ") == 1, said
        return folder

    return make


@pytest.fixture(scope="session")
def one(made):
    "The run in one process, in micro-batches of one image."
    return made(1)


def test_processes_do_together_what_one_does(one, made):
    many = made(4)
    assert [folder.name for folder in many.iterdir() if folder.name != "record"] == ["run"]
    check(one, many)
    kept = [json.loads((folder / "run" / "inspect" / "epoch-00000.json").read_text()) for folder in (one, many)]
    assert kept[0]["of"] == kept[1]["of"] == 12 and kept[0]["prompts"] == kept[1]["prompts"]
    for name in ("rewards", "advantages"):  # in another order, and rounded for `vgpo inspect`
        mine, theirs = (sorted(zip(found["group"], found[name], strict=True)) for found in kept)
        assert [group for group, _ in mine] == [group for group, _ in theirs]
        assert np.allclose([row for _, row in mine], [row for _, row in theirs], atol=2e-4), name


def test_processes_that_divide_all_weights_among_them_do_what_one_does(made):
    check(made(1, *WHOLE, "--epochs=1"), made(2, *WHOLE, "--epochs=1", "--model.fsdp=full_shard"))


def test_processes_learn_from_finished_images_what_one_does(made):
    words = ["--credit=GRPO", "--objective=NFT", "--epochs=1"]
    check(made(1, *words), made(2, *words))


def test_a_micro_batch_of_eight_and_checkpointing_do_what_eight_of_one_do(made):
    check(made(1, *EIGHT), made(1, *EIGHT, "--rollout.micro_batch_size=8", "--model.gradient_checkpointing=true"))


def check(one, other):
    """Assert that two runs are the same, up to rounding.

    AdamW's first update moves a weight by lr g / (|g| + 1e-8), so where the gradient g is near 0, its rounding error d
    counts lr d / 1e-8. Here lr is 3e-4 and |g| mostly 1e-5, so that 1e-5 allows an error of some 3e-5 |g|.
    """
    found = differences(one, other)
    assert found["same"]
    assert found["levels"] <= 1 and found["unlike"] < 1e-4 * found["values"]  # a value that lay between two levels
    assert found["rewards"] <= 1e-6 and found["advantages"] <= 1e-5
    assert found["weights"] <= 1e-5 and found["moved"] > 1e-4, found


def credited(rewards, gamma=0.9, anchor=0.05, anchor_steps=5, eps=1e-4):
    "VGPO's advantages of one group's rewards (B, T), in float64 and from the paper's equations one by one."
    values = np.zeros_like(rewards)
    for j in reversed(range(rewards.shape[1])):
        values[:, j] = rewards[:, j] + (gamma * values[:, j + 1] if j + 1 < rewards.shape[1] else 0)
    mean = values.mean(1, keepdims=True)
    weights = np.divide(values, mean, out=np.ones_like(values), where=mean > 0)
    absolute = anchor * (np.arange(values.shape[1]) < anchor_steps) * values
    return (weights * ((values - values.mean(0)) / (values.std(0) + eps) + absolute)).clip(-5, 5)


@pytest.mark.parametrize("processes", [1, 4])
def test_statistics_are_those_of_whole_groups_wherever_their_images_are(made, processes):
    "Prompts are numbered from 2^40 here: as float32 numbers all ids would be one, and all images one group."
    for rows in epochs(made(processes)):
        groups = [rows["group"] == prompt for prompt in np.unique(rows["group"])]
        assert len(groups) == 2 and all(mine.sum() == 6 for mine in groups)
        assert np.array_equal(rows["group"], rows["key"][:, 0] + FAR) and len(np.unique(np.float32(rows["group"]))) == 1
        for mine in groups:
            assert len(np.unique(rows["process"][mine])) == min(processes, 2)  # half of a group in each of two
            expected = credited(rows["rewards"][mine].astype(float))
            np.testing.assert_allclose(rows["advantages"][mine], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rewards", [[0.999999, 0.9999995] * 8, [0.999999] + [0.9999995] * 15, [1 - 2**-24] * 23 + [1.0]]
)
def test_statistics_of_nearly_equal_rewards_are_exact(rewards):
    values, far = torch.tensor(rewards), 2**60  # and beyond what float64 tells apart
    exact = [Fraction(v) for v in values.tolist()]
    mean = sum(exact) / len(exact)
    std = sqrt(sum((v - mean) ** 2 for v in exact) / len(exact))
    group = torch.tensor([far + 1] * len(rewards) + [far] * 3)  # the others are of another group
    center, spread = group_stats(torch.cat([values, torch.tensor([0.0, 0.5, 0.5])]), group)
    assert center[0].item() == pytest.approx(float(mean), rel=1e-15)
    assert spread[0].item() == pytest.approx(std, rel=1e-8)
    relative = group_relative(values, group[: len(rewards)], eps=0)
    anchored = value_anchored(values[:, None].expand(-1, 3).contiguous(), group[: len(rewards)], anchor=0, eps=0)
    expected = torch.tensor([float(v - mean) / std for v in exact])
    torch.testing.assert_close(relative, expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(anchored, expected[:, None].expand(-1, 3), atol=0, rtol=1e-6)


@pytest.mark.parametrize("count", [3, 7, 16, 24])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.9999999])
def test_equal_rewards_have_no_spread_at_all(count, reward):
    group = torch.zeros(count, dtype=torch.int64)
    assert not group_stats(torch.full((count,), reward), group)[1].any()
    assert not group_relative(torch.full((count,), reward), group).any()


def test_the_held_out_rows_are_shared_out_and_put_together_again(one, made):
    prompts = [row["prompt"] for row in load_prompts("tiny-scenes", "test", 5)]
    expected = np.load(one / "record" / "evaluation-0.npz")
    results = [np.load(file) for file in (made(4) / "record").glob("evaluation-*.npz")]
    assert len(results) == 4
    for found in results:  # every process knows the whole result
        assert found["prompt"].tolist() == prompts
        assert abs(found["images"].astype(int) - expected["images"]).max() <= 1
        np.testing.assert_allclose(found["scaled"], expected["scaled"], atol=1e-6)


def test_a_run_goes_on_with_another_number_of_processes(one, tmp_path, capsys):
    "Two processes, whose launcher is told to stop; then one; then two that divide the gradients."
    folder = tmp_path / "run"
    started = launch(2, [*SMALL, f"--output_dir={tmp_path}"])
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert started.poll() is None, started.stdout.read()
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    said = started.communicate()[0]
    assert started.returncode == 1  # accelerate's own: it says 1 whatever the processes say
    assert "stopped; go on from epoch" in said and "RuntimeError" not in said, said
    assert 1 <= int(checkpoints(folder / "checkpoints")[0].name[6:]) <= 2

    main(["--resume", str(folder), "--epochs=2"])
    assert "changed: epochs: 3 -> 2" in capsys.readouterr().out
    last = launch(2, ["--resume", str(folder), "--epochs=3", "--model.fsdp=shard_grad_op"])
    said = last.communicate()[0]
    assert last.returncode == 0, said
    assert "6 in each of 2 processes" in said
    assert "changed: epochs: 2 -> 3" in said and "changed: model.fsdp: off -> shard_grad_op" in said

    states = [read_checkpoint(path / "checkpoints" / "epoch-00003")[1] for path in (one / "run", folder)]
    for state in states:
        del state["callbacks"]["Clock"], state["recipe"]["output_dir"], state["recipe"]["model"]["fsdp"]
    assert states[0] == states[1] and states[0]["updates"] == 9
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (one / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for row, expected in zip(rows, whole, strict=True):
        for key in ("reward", "accuracy", "reward_std", "frac_reward_zero_std", "advantage/abs_mean", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    assert abs(final_weights(folder) - final_weights(one / "run")).max() <= 1e-5


def test_the_slurm_script_starts_resumes_and_requeues(tmp_path):
    "With a srun that only says what each task would run, and what the run's exit code would be."
    for name, body in {"scontrol": 'echo "$@" >> calls; echo node1', "srun": 'echo "$@" >> calls; exit $CODE'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def submit(code):
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "CODE": str(code)}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        words = ["bash", Path(__file__).parent.parent / "launch" / "slurm.sh", "--recipe", "tiny-geneval"]
        done = subprocess.run(words, cwd=tmp_path, env=os.environ | job | {"PATH": path})
        said = (tmp_path / "calls").read_text()
        (tmp_path / "calls").unlink()
        return done.returncode, said

    code, said = submit(75)
    assert code == 75 and said.endswith("vgpo --recipe tiny-geneval --output_dir=runs --name=slurm-7\nrequeue 7\n")
    (tmp_path / "runs" / "slurm-7").mkdir(parents=True)
    (tmp_path / "runs" / "slurm-7" / "config.yaml").touch()
    code, said = submit(0)
    assert code == 0 and said.endswith("vgpo --resume runs/slurm-7\n")
    code, said = submit(1)
    assert code == 1 and "requeue" not in said


def test_a_second_sigterm_does_not_abort_the_stop_but_ctrl_c_does():
    "A scheduler and a launcher may send one each, while the checkpoint is being written."
    session = SimpleNamespace(stop=StopWhenAsked(), main=True)
    with stoppable(session):
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert session.stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
