"""The credit study: who learns how much, from which credit? Its parts are run one by one; each goes on where it stopped.

    python benchmarks/study.py tune main           # the parts in turn, a process for each of --jobs cores
    python benchmarks/study.py main --only tiny-geneval critic
    python benchmarks/study.py --list              # the parts, and how many of their runs are done

A part is a list of runs: a task (a recipe), a method (options of `vgpo.train`), a seed, a number of epochs. What a run
found is one line of `benchmarks/study/PART.jsonl`, and a run with a line there is not repeated; nbs/lab reads them.
Weights are left in runs/study. Seconds are those of the processor, of training alone, with one thread: they hardly
depend on what else the machine does.

The protocol. Models are trained with guidance 2 and judged with it: what guidance alone gives is no merit of a method.
Every method is tuned alike: two learning rates, half as many epochs, one seed that is used nowhere else, scored on
*training* prompts of tiny-geneval (part `tune`); variants take the rate of their method, and all tasks the same rate. All
methods see the same prompts and equally many images per epoch. Held-out prompts are drawn by the ODE in 10 steps with
guidance 1, 2 and 3: a method's score is its best of these, as the base model's is. Seeds are 0 to 4.

Part `unguided` trains without guidance, for as many seconds as the others; it is judged in the same way.
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
GUIDANCE, STEPS, HELD_OUT = (1.0, 2.0, 3.0), 10, 528  # of evaluations after training
QUICK, EVERY = 132, 6  # images of evaluations on the way, and epochs between them
EPOCHS, SEEDS = 24, range(5)
TUNING_EPOCHS, TUNING_SEED, RATES, VALIDATION = 12, 1000, (1e-3, 3e-3), 264
COMMON = ["--rollout.guidance_scale=2", "--objective.guidance_scale=2", "--model.compile=true"]
SCORED = "--credit.num_scored_steps=10"
METHODS = {  # name -> options; the first is the baseline
    "GRPO": ["--credit=GRPO"],
    "VGPO": ["--credit=VGPO", SCORED],
    "TCRM only": ["--credit=VGPO", SCORED, "--credit.anchor_weight=0"],
    "ADAE only": ["--credit=VGPO", "--credit.num_scored_steps=1", "--credit.gamma=0", "--credit.temporal_weights=none"],
    "gains": ["--credit=Gains"],
    "critic": ["--credit=ProjectionCritic", SCORED],
    "critic, anchored": ["--credit=ProjectionCritic", SCORED, "--credit.anchor_weight=0.5"],
    "one step": ["--credit=GRPO", "--window=OneStep", "--objective.step_weights=noise"],
    "NFT": ["--credit=GRPO", "--objective=NFT"],
}
TUNED_AS = {"TCRM only": "VGPO", "ADAE only": "VGPO", "critic, anchored": "critic"}
UNGUIDED = ("GRPO", "VGPO", "critic", "NFT")


def cell(part, task, method, seed, epochs=EPOCHS, options=(), validate=False, lr=None):
    "One run of the study, as plain data; `validate` scores training prompts instead of the held-out ones."
    return {
        "part": part,
        "task": task,
        "method": method,
        "seed": seed,
        "epochs": epochs,
        "validate": validate,
        "options": [*METHODS.get(method, ()), *COMMON, *options],
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
    method = TUNED_AS.get(method, method)
    found = {line["lr"]: line["guidance"]["2.0"]["scaled"] for line in lines("tune") if line["method"] == method}
    if len(found) < len(RATES):
        raise ValueError(f"{method} is not tuned yet: run the part `tune` first")
    return max(found, key=found.get)


def best(line, quantity="scaled"):
    "The evaluation of a run, or of the base model, at the guidance that is best for it."
    return max(line["guidance"].values(), key=lambda found: found[quantity])


def unguided(task, method, seed):
    "A run without guidance, with twice the epochs."
    options = ["--rollout.guidance_scale=1", "--objective.guidance_scale=1"]
    return cell("unguided", task, method, seed, 2 * EPOCHS, options, lr=tuned(method))


PARTS = {
    "base": lambda: [cell("base", task, "base", 0, 0) for task in TASKS],
    "tune": lambda: [
        cell("tune", TASKS[0], method, TUNING_SEED, TUNING_EPOCHS, validate=True, lr=lr)
        for lr in RATES
        for method in METHODS
        if method not in TUNED_AS
    ],
    "main": lambda: [
        cell("main", task, method, seed, lr=tuned(method)) for task in TASKS for seed in SEEDS for method in METHODS
    ],
    "unguided": lambda: [unguided(TASKS[0], method, seed) for seed in SEEDS[:3] for method in UNGUIDED],
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
    rows, levels = load_prompts(config.prompts.test, "test")[:HELD_OUT], GUIDANCE
    if run["validate"]:
        rows, levels = validation_rows(load_prompts(config.prompts.train, "train")), (2.0,)
    trainer = build_trainer(config, init_accelerator(600.0), test=rows)
    scored = make_plan(config).work["score"]

    def evaluate(count, guidance):
        settings = EvaluationConfig(num_samples=count, num_inference_steps=STEPS, guidance_scale=guidance)
        with trainer.averaged():
            found = evaluate_in_memory(trainer.policy, {"reward": trainer.reward}, rows[:count], settings)
        return figures(found) | (
            {"gold": gold(found.images, found.rows)} if count == HELD_OUT and not run["validate"] else {}
        )

    seconds, curve = 0.0, []
    while True:
        if trainer.epoch % EVERY == 0 and not run["validate"]:
            quick = {
                k: v for k, v in evaluate(QUICK, config.rollout.guidance_scale).items() if k in ("scaled", "strict")
            }
            spent = {"epoch": trainer.epoch, "seconds": round(seconds, 2), "scored": trainer.epoch * scored}
            curve.append(spent | quick)
        if trainer.epoch == run["epochs"]:
            break
        began = time.process_time()
        metrics = trainer.train_epoch()
        seconds += time.process_time() - began
        progress(trainer.epoch)
        if trainer.epoch % EVERY == 0:
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
    guidance = {str(g): evaluate(len(rows), g) for g in levels}
    by_sde = {} if run["validate"] else {"sde": sde(trainer, rows)}
    versions = {"torch": torch.__version__, "python": platform.python_version(), "processor": processor()}
    return run | {"seconds": round(seconds, 2), "guidance": guidance, "curve": curve, "versions": versions} | by_sde


def gold(images, rows):
    "Gold metrics of images, those that the task's rows allow."
    from vgpo.evaluation.gold import diversity, edges, gold_metrics, sharpness

    scenes = "include" in rows[0]
    found = (
        gold_metrics(images, rows) if scenes else {"sharpness": sharpness(images).mean(), "edges": edges(images).mean()}
    )
    if not scenes:
        found["diversity"] = diversity(images, [row["prompt"] for row in rows])
    return {name: round(float(value), 5) for name, value in found.items()}


def sde(trainer, rows, count=256, size=64):
    """What the sampler of training draws of held-out prompts, beside what the ODE draws from the same noise.

    Figures of both, gold metrics of the first, the distance of the two sets of images, and the KL of each step to the
    model before training, per latent dimension.
    """
    import numpy as np
    import torch

    from vgpo.evaluation.gold import kernel_distance, kl_per_step
    from vgpo.evaluation.scores import Evaluation
    from vgpo.noise import sample_noise
    from vgpo.rewards.base import score
    from vgpo.rollout import rollout
    from vgpo.sde import FlowSDE

    shape, policy = (trainer.num_steps + 1, *trainer.policy.latent_shape), trainer.policy
    images, kl, found = {"sde": [], "ode": []}, [], {}
    with trainer.averaged(), torch.no_grad():
        for i in range(0, count, size):
            prompts = [row["prompt"] for row in rows[i : i + size]]
            noise = torch.stack([sample_noise(shape, 0, "evaluation", i + k, 0) for k in range(size)])
            embeds = policy.encode(prompts)
            for name, sampler in (("sde", FlowSDE(0.7)), ("ode", FlowSDE(0.0))):
                velocity = lambda x, sigma: policy.velocity(x, sigma, embeds)  # noqa: B023, E731
                path = rollout(velocity, noise[:, 0], trainer.sigmas, sampler, noise[:, 1:])
                images[name].append(policy.decode(path.latents[:, -1]))
                if name == "sde" and i == 0:
                    kl = [round(k, 9) for k in kl_per_step(policy, path, embeds, sampler).tolist()]
    for name, parts in images.items():
        images[name] = np.concatenate(parts)
        scores = score(trainer.reward, images[name], [row["prompt"] for row in rows[:count]], rows[:count], None)
        found[name] = figures(Evaluation(rows[:count], {"reward": scores}, images[name], []))
        found[name]["gold"] = gold(images[name], rows[:count])
    distance, stderr = kernel_distance(images["sde"], images["ode"])
    return found | {"distance": round(distance, 6), "distance_stderr": round(stderr, 6), "kl": kl}


def validation_rows(rows):
    "Training rows, equally many of each task."
    by_task = {}
    for row in rows:
        by_task.setdefault(row.get("tag"), []).append(row)
    return [row for found in by_task.values() for row in found[: VALIDATION // len(by_task)]]


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
            if not own.list:
                sys.exit(f"error: {e}")
            print(f"{part}: {e}")
            continue
        if own.only:
            runs = [run for run in runs if {str(run[k]) for k in ("task", "method", "seed")} >= {*own.only}]
        print(f"{part}: {len(done)} runs are done, {len(runs)} are to do", flush=True)
        if not own.list:
            with ThreadPoolExecutor(own.jobs) as pool:
                list(pool.map(run_alone, runs))


if __name__ == "__main__":
    main()
