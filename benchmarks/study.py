"""The credit study: who learns how much, from which credit. Parts are run one by one, and each goes on where it stopped.

    python benchmarks/study.py tune main           # the parts in turn, a process for each of --jobs cores
    python benchmarks/study.py main --only tiny-geneval critic
    python benchmarks/study.py --list              # the parts, and how many of their runs are done

A part is a list of runs: a task (a recipe), a method (options of `vgpo.train`), a seed, a number of epochs. What a run
found is one line of `benchmarks/study/PART.jsonl`, and a run with a line there is not repeated; nbs/lab reads these files.
Weights are left in runs/study. Seconds are those of the processor, of training alone, with one thread: they hardly
depend on what else the machine does.

The protocol, fixed before the first run. Every method is tuned alike: three learning rates, half as many epochs, one seed
that is used nowhere else, scored on *training* prompts (part `tune`, tiny-geneval); its best rate is used for all tasks. All methods
see the same prompts and as many images per epoch. Held-out prompts are drawn by the ODE in 10 steps, without guidance and
with guidance 2 and 3: a method's score is its best of these, as the base model's is.
"""

import json
import os
import platform
import subprocess
import sys
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOUND, RUNS = ROOT / "benchmarks" / "study", ROOT / "runs" / "study"
TASKS = ("tiny-geneval", "tiny-ocr", "tiny-pickscore")
GUIDANCE, STEPS, HELD_OUT, QUICK = (1.0, 2.0, 3.0), 10, 528, 132  # of evaluations; QUICK images on the way
VALIDATION, VALIDATION_GUIDANCE = 264, (1.0, 2.0)
EPOCHS, SEEDS = 30, range(5)
TUNING_EPOCHS, TUNING_SEED, RATES = 15, 1000, (3e-4, 1e-3, 3e-3)
ALL_SCORED = "--credit.num_scored_steps=10"
METHODS = {  # name -> options; the first is the baseline
    "GRPO": ["--credit=GRPO"],
    "VGPO": ["--credit=VGPO", ALL_SCORED],
    "TCRM only": ["--credit=VGPO", ALL_SCORED, "--credit.anchor_weight=0"],
    "ADAE only": ["--credit=VGPO", "--credit.num_scored_steps=1", "--credit.gamma=0", "--credit.temporal_weights=none"],
    "gains": ["--credit=Gains"],
    "critic": ["--credit=ProjectionCritic", ALL_SCORED],
    "critic, anchored": ["--credit=ProjectionCritic", ALL_SCORED, "--credit.anchor_weight=0.5"],
    "one step": ["--credit=GRPO", "--window=OneStep", "--objective.step_weights=noise"],
    "NFT": ["--credit=GRPO", "--objective=NFT"],
}


def cell(part, task, method, seed, epochs=EPOCHS, options=(), validate=False, lr=None):
    "One run of the study, as plain data; `validate` scores training prompts instead of the held-out ones."
    return {
        "part": part,
        "task": task,
        "method": method,
        "seed": seed,
        "epochs": epochs,
        "validate": validate,
        "options": [*METHODS.get(method, ()), *options],
        "lr": lr,
    }


def key(run):
    return "-".join(str(run[k]) for k in ("part", "task", "method", "seed", "lr") if run[k] is not None).replace(
        " ", "_"
    )


def lines(part):
    "What a part has found so far."
    file = FOUND / f"{part}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def tuned(method):
    "The learning rate at which a method scored best on training prompts; ValueError if it has not been tuned."
    found = {line["lr"]: best(line)["scaled"] for line in lines("tune") if line["method"] == method}
    if len(found) < len(RATES):
        raise ValueError(f"{method} is not tuned yet: run the part `tune` first")
    return max(found, key=found.get)


def best(line, quantity="scaled"):
    "The evaluation of a run, or of the base model, at the guidance that is best for it."
    return max(line["guidance"].values(), key=lambda found: found[quantity])


PARTS = {
    "base": lambda: [cell("base", task, "base", 0, 0) for task in TASKS],
    "tune": lambda: [
        cell("tune", TASKS[0], method, TUNING_SEED, TUNING_EPOCHS, validate=True, lr=lr)
        for method in METHODS
        for lr in RATES
    ],
    "main": lambda: [
        cell("main", task, method, seed, lr=tuned(method)) for task in TASKS for seed in SEEDS for method in METHODS
    ],
}


def figures(evaluation):
    "The means of an Evaluation, over tasks and by task."
    found = {}
    for quantity in ("scaled", "strict", "raw"):
        if quantity in evaluation.summary["reward"]:
            part = evaluation.summary["reward"][quantity]
            found |= {quantity: round(part["mean"], 5), f"{quantity}_stderr": round(part["stderr"], 5)}
            found[f"{quantity}_by_task"] = {task: round(figure["mean"], 4) for task, figure in part["by_task"].items()}
    return found


def train(run, progress=lambda epoch: None):
    "Train and evaluate one run; its line."
    import torch

    from vgpo.config import parse_config
    from vgpo.distributed import init_accelerator
    from vgpo.evaluation.images import EvaluationConfig
    from vgpo.evaluation.scores import evaluate_in_memory
    from vgpo.plan import make_plan
    from vgpo.policies.loading import quiet
    from vgpo.prompts.files import load_prompts
    from vgpo.runs.session import build_trainer

    quiet()
    torch.set_num_threads(1)
    rate = [f"--optim.lr={run['lr']}"] if run["lr"] else []
    config = parse_config(
        ["--recipe", run["task"], f"--seed={run['seed']}", f"--epochs={run['epochs']}", *rate, *run["options"]]
    )
    split, source = ("train", config.prompts.train) if run["validate"] else ("test", config.prompts.test)
    count, levels = (VALIDATION, VALIDATION_GUIDANCE) if run["validate"] else (HELD_OUT, GUIDANCE)
    rows = load_prompts(source, split, unique=run["validate"])[:count]
    trainer = build_trainer(config, init_accelerator(600.0), test=rows)
    scored = make_plan(config).work["score"]

    def evaluate(count, guidance):
        settings = EvaluationConfig(num_samples=count, num_inference_steps=STEPS, guidance_scale=guidance)
        with trainer.averaged():
            return figures(evaluate_in_memory(trainer.policy, {"reward": trainer.reward}, rows[:count], settings))

    seconds, curve = 0.0, []
    while True:
        if trainer.epoch % 5 == 0 and not run["validate"]:
            quick = {k: v for k, v in evaluate(QUICK, 1.0).items() if k in ("scaled", "strict")}
            spent = {"epoch": trainer.epoch, "seconds": round(seconds, 2), "scored": trainer.epoch * scored}
            curve.append(spent | quick)
        if trainer.epoch == run["epochs"]:
            break
        began = time.process_time()
        metrics = trainer.train_epoch()
        seconds += time.process_time() - began
        progress(trainer.epoch)
        if trainer.epoch % 5 == 0:
            kept = (
                "reward",
                "reward_std",
                "frac_reward_zero_std",
                "advantage/abs_mean",
                "grad_norm",
                "clip_ratio",
                "kl",
            )
            curve.append({"epoch": trainer.epoch, "train": {k: round(metrics[k], 5) for k in kept if k in metrics}})
    folder = RUNS / key(run)
    if run["epochs"]:
        with trainer.averaged():
            trainer.policy.save(folder)
    guidance = {str(g): evaluate(count, g) for g in levels}
    versions = {"torch": torch.__version__, "python": platform.python_version(), "processor": processor()}
    return run | {"seconds": round(seconds, 2), "guidance": guidance, "curve": curve, "versions": versions}


def processor():
    "The name of the processor, where the system tells it."
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor()


def run_alone(run):
    "Train one run in a process of its own, with one thread, and add its line to those of its part."
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, __file__, "--run", json.dumps(run)],
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        return print(f"{key(run)} ended with code {done.returncode}", flush=True)
    line = done.stdout.splitlines()[-1]
    FOUND.mkdir(exist_ok=True)
    with open(FOUND / f"{run['part']}.jsonl", "a") as file:
        file.write(line + "\n")
    found = json.loads(line)
    shown = "  ".join(f"{g}: {f.get('strict', f['raw']):.3f}/{f['scaled']:.3f}" for g, f in found["guidance"].items())
    print(f"{key(run)}  {shown}  {found['seconds']:.0f} s", flush=True)


def main(argv=None):
    "The program."
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help=", ".join(PARTS))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="runs whose task, method or seed is among these"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes at once (default: the number of cores)"
    )
    parser.add_argument("--list", action="store_true", help="say what is done, and do nothing")
    parser.add_argument("--run", help="one run, as JSON: what this program calls itself with")
    own = parser.parse_args(argv)
    if own.run:
        return print(json.dumps(train(json.loads(own.run))))
    for part in own.parts or (PARTS if own.list else []):
        done = {key(line) for line in lines(part)}
        try:
            runs = [run for run in PARTS[part]() if key(run) not in done]
        except ValueError as e:
            sys.exit(f"error: {e}")
        if own.only:
            runs = [run for run in runs if {str(run[k]) for k in ("task", "method", "seed")} >= {*own.only}]
        print(f"{part}: {len(done)} runs are done, {len(runs)} are to do", flush=True)
        if not own.list:
            with ThreadPoolExecutor(own.jobs) as pool:
                list(pool.map(run_alone, runs))


if __name__ == "__main__":
    main()
