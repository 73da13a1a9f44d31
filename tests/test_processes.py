"Two processes learn together what one learns alone, in one folder."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONS = [
    *("--sampling.groups=2", "--sampling.group_size=4", "--sampling.steps=3", "--sampling.sde_steps=2", "--epochs=1"),
    *("--values.reward_steps=2", "--sampling.batch_size=1", "--evaluation.images=1", "--evaluation.steps=1"),
    *("--reward.name=tiny_rewards:brightness", "--optim.updates=2", "--optim.clip_range=0.1", "--name=run"),
]


def train(processes, folder, *more):
    "A run with so many processes on the CPU: its exit code and what it said."
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if processes == 1:
        command = [sys.executable]
    command += ["-m", "vgpo.train", *OPTIONS, f"--output={folder}", *more]
    done = subprocess.run(command, env=environment | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_two_processes_learn_what_one_learns(tiny_folder, tmp_path):
    metrics = {}
    for processes in (1, 2):
        code, said = train(processes, tmp_path / str(processes), f"--model.path={tiny_folder}")
        assert code == 0, said
        assert f"{8 // processes} in each of {processes} process" in said and said.count("held-out score") == 1
        assert [folder.name for folder in (tmp_path / str(processes)).iterdir()] == ["run"]
        metrics[processes] = json.loads((tmp_path / str(processes) / "run" / "metrics.jsonl").read_text())
    for key in ("reward", "raw", "group_std", "zero_std", "advantage", "grad_norm"):
        assert metrics[2][key] == pytest.approx(metrics[1][key], rel=1e-3, abs=1e-5), key
