"""Runs that go wrong on purpose, each beside the same run with the remedy: the tables of docs/trouble.md.

    python benchmarks/trouble.py                     # what is not in benchmarks/trouble.jsonl yet, then all tables
    python benchmarks/trouble.py --only "KL too strong"

A run is small: recipe tiny-geneval with 64 images per epoch, twelve epochs, one seed, about a minute of one core.
Held-out rewards are those of 132 images, before and after, so that a change has a standard error of about 0.03: the
tables show what a symptom looks like, and do not compare methods.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch

from vgpo.config import parse_config
from vgpo.distributed import init_accelerator
from vgpo.evaluation.gold import gold_metrics
from vgpo.evaluation.images import EvaluationConfig
from vgpo.evaluation.scores import evaluate_in_memory
from vgpo.policies.loading import quiet
from vgpo.prompts.files import load_prompts
from vgpo.runs.session import build_trainer

FOUND = Path(__file__).with_suffix(".jsonl")
SMALL = [
    *("--recipe=tiny-geneval", "--rollout.prompts_per_epoch=8", "--rollout.group_size=8", "--credit=GRPO"),
    *("--optim.lr_scheduler=constant", "--epochs=12", "--evaluation.num_inference_steps=10"),
]
EASY = [f"--prompts.{split}=easy_scenes:scenes" for split in ("train", "test")] + ["--rollout.guidance_scale=3"]
HELD_OUT, LAST = 132, 3  # held-out images; epochs at the end whose mean is shown
RUNS = {  # name -> options beside SMALL
    "healthy": [],
    "rate too low": ["--optim.lr=1e-5"],
    "rate too high": ["--optim.lr=3e-2"],
    "clip range too narrow": ["--objective.clip_range=1e-6"],
    "KL too strong": ["--objective.beta=100"],
    "8 images per epoch": [
        "--rollout.prompts_per_epoch=2",
        "--rollout.group_size=4",
        "--optim.num_minibatches=1",
        "--epochs=96",
    ],
    "groups agree": [*EASY, "--reward=easy_scenes:right", "--objective.guidance_scale=3"],
    "groups agree, soft reward": [*EASY, "--objective.guidance_scale=3"],
    "a rule with a gap": ["--reward.closed=false", "--epochs=36"],
    "the gap closed": ["--epochs=36"],
}
METRICS = ("reward", "reward_std", "frac_reward_zero_std", "clip_ratio", "ratio/abs_dev_mean", "kl", "grad_norm")
GOLD = ("unasked", "diversity")


def held_out(trainer, rows):
    "Reward and gold metrics of held-out images, drawn as in training, without noise."
    settings = EvaluationConfig(len(rows), trainer.num_steps, guidance_scale=trainer.config.guidance_scale)
    with trainer.averaged():
        found = evaluate_in_memory(trainer.policy, {"reward": trainer.reward}, rows, settings)
    gold = gold_metrics(found.images, rows)
    return {"reward": found.summary["reward"]["scaled"]["mean"]} | {name: gold[name] for name in GOLD}


def train(name):
    "What a run logs in its first and last epochs, and what it draws before and after."
    quiet()
    torch.set_num_threads(1)
    config = parse_config([*SMALL, *RUNS[name]])
    rows = load_prompts(config.prompts.test, "test")[:HELD_OUT]
    trainer = build_trainer(config, init_accelerator(600.0), test=rows)
    line, log = {"name": name, "options": RUNS[name], "before": held_out(trainer, rows)}, []
    while trainer.epoch < trainer.epochs:
        log.append(trainer.train_epoch())
    for when, part in (("first", log[:LAST]), ("last", log[-LAST:])):
        line[when] = {m: float(np.mean([metrics[m] for metrics in part])) for m in METRICS if m in part[0]}
    return line | {"after": held_out(trainer, rows)}


def lines():
    "What was found so far, by name."
    found = FOUND.read_text().splitlines() if FOUND.is_file() else []
    return {line["name"]: line for line in map(json.loads, found)}


def row(line):
    "A line of a table: the run, its metrics of the last epochs, and what it drew before and after."
    last = [f"{line['last'][m]:.2g}" if m in line["last"] else "" for m in METRICS]
    drawn = [f"{line['before'][m]:.2f} → {line['after'][m]:.2f}" for m in ("reward", *GOLD)]
    return "| " + " | ".join([line["name"], *last, *drawn]) + " |"


def table(found):
    "A Markdown table of lines."
    head = ["run", *(f"`{m}`" for m in METRICS), "held-out reward", *GOLD]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *map(row, found)])


def main(argv=None):
    "Make the runs that are missing, one process each, and print a table."
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--run", help="one run: what this program calls itself with")
    own = parser.parse_args(argv)
    if own.run:
        return print(json.dumps(train(own.run)))
    for name in own.only:
        if name not in lines():
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--run", name]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            with open(FOUND, "a") as file:
                file.write(done.stdout.splitlines()[-1] + "\n")
    print(table(lines().values()))


if __name__ == "__main__":
    main()
