"""The credit study: who learns how much, from which credit? Its parts are run one by one and go on where they stopped.

    python benchmarks/study.py base tune main      # the parts in turn, a process for each of --jobs cores
    python benchmarks/study.py main --only tiny-geneval critic
    python benchmarks/study.py --list              # the parts, and how many of their runs are done

A part is a list of runs: a task (a recipe), a method (options of `vgpo.train`), a seed, a number of epochs. What a run
found is one line of `benchmarks/study/PART.jsonl`, and a run with a line there is not repeated; nbs/lab reads them.
Weights are left in runs/study. Seconds are those of the processor, of training alone, with one thread: they hardly
depend on what else the machine does.

The protocol. Models are trained with guidance 2 and judged with it: what it gives alone is no merit of a method. Every
method is tuned alike: two learning rates, half as many epochs, one seed that is used nowhere else, scored on *training*
prompts of tiny-geneval (part `tune`); variants take the rate of their method, and all tasks the same rate. All methods
see the same prompts and equally many images per epoch. Held-out prompts are drawn by the ODE in 10 steps with guidance
1, 2 and 3: a method's score is its best of these, as the base model's is. Seeds are 0 to 4. Part `main` trains for 24
epochs on tiny-geneval and for 12 on the other tasks.

Part `unguided` trains without guidance, for twice as many epochs, and is judged in the same way. Part `variants`
changes one thing of VGPO at a time, `kl` adds a KL penalty, and `steps` trains with another number of steps and draws
held-out images in 10, 20 and 40. Part `collapse` starts where most groups agree, with a reward of 0 or 1 and guidance
3, and varies the anchor; all of it at the rate of VGPO.
Part `values` measures what states are worth, before and after training.
Part `fast` spends about 300 seconds on DiffusionNFT without guidance, with fewer steps, with fewer of them trained, and
with all weights trained in place of a LoRA at several rates, and scores it on training prompts. Part `long` trains all
weights for as long, and for longer, judged like `main`.
"""

import json
import os
import platform
import subprocess
import sys
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vgpo.config import parse_config
from vgpo.continuations import continued_rewards
from vgpo.distributed import init_accelerator
from vgpo.evaluation.gold import diversity, edges, gold_metrics, kernel_distance, kl_per_step, sharpness
from vgpo.evaluation.images import EvaluationConfig
from vgpo.evaluation.scores import Evaluation, evaluate_in_memory
from vgpo.noise import epoch_prompts, sample_noise
from vgpo.plan import make_plan
from vgpo.policies.loading import quiet
from vgpo.prompts.files import load_prompts
from vgpo.rewards.base import score
from vgpo.rollout import rollout
from vgpo.runs.session import build_trainer
from vgpo.sde import FlowSDE

ROOT = Path(__file__).parents[1]
FOUND, RUNS = ROOT / "benchmarks" / "study", ROOT / "runs" / "study"
TASKS = ("tiny-geneval", "tiny-ocr", "tiny-pickscore")
EPOCHS, SEEDS = 24, range(5)
TUNING_EPOCHS, TUNING_SEED, RATES, VALIDATION = 12, 1000, (1e-3, 3e-3), 264
GUIDANCE, STEPS, HELD_OUT, BY_SDE = (1.0, 2.0, 3.0), 10, 528, 256  # after training: images by the ODE, and by the SDE
QUICK, EVERY = 132, 6  # images of evaluations on the way, and epochs between them, or more in a long run
COMMON = ["--rollout.guidance_scale=2", "--objective.guidance_scale=2", "--model.compile=true"]
UNGUIDED = ["--rollout.guidance_scale=1", "--objective.guidance_scale=1"]
SCORED = "--credit.num_scored_steps=10"
METHODS = {  # name -> options; the first is the baseline
    "GRPO": ["--credit=GRPO"],
    "VGPO": ["--credit=VGPO", SCORED],
    "TCRM only": ["--credit=VGPO", SCORED, "--credit.anchor_weight=0"],
    "ADAE only": ["--credit=VGPO", "--credit.num_scored_steps=1", "--credit.gamma=0", "--credit.temporal_weights=none"],
    "gains": ["--credit=Gains"],
    "critic": ["--credit=ProjectionCritic", SCORED],
    "critic, anchored": ["--credit=ProjectionCritic", SCORED, "--credit.anchor_weight=0.5"],
    "one step": [
        *("--credit=GRPO", "--credit.scale_rewards=batch", "--window=OneStep", "--window.size=1"),
        *("--window.shared_start=true", "--objective.step_weights=noise"),
    ],  # size and start are said here, as a recipe's window of another class leaves its own
    "NFT": ["--credit=GRPO", "--objective=NFT"],
}
TUNED_AS = {"TCRM only": "VGPO", "ADAE only": "VGPO", "critic, anchored": "critic"}
VARIANTS = {  # of VGPO: what nbs/lab/96_unknowns measures on the toy
    "weights per group": ["--credit.temporal_weights=group"],
    "no weights": ["--credit.temporal_weights=none"],
    "schedule alone": ["--credit.num_scored_steps=1", "--credit.anchor_weight=0"],  # weights without a clean estimate
    "5 scored": ["--credit.num_scored_steps=5"],
    "gamma 0.8": ["--credit.gamma=0.8"],
    "gamma 1": ["--credit.gamma=1"],
    "k 0.5": ["--credit.anchor_weight=0.5"],
    "k 0.5, centred": ["--credit.anchor_weight=0.5", "--credit.anchor_baseline=others"],
    "k 0.5, of the group": ["--credit.anchor_weight=0.5", "--credit.anchor_value=group"],
}
EASY = [
    *("--prompts.train=easy_scenes:scenes", "--prompts.test=easy_scenes:scenes", "--reward=easy_scenes:right"),
    *("--rollout.guidance_scale=3", "--objective.guidance_scale=3"),
]
SOME = ["--window=Random", "--window.per=group"]  # some of the noise levels, in each group others
SHORT = [*SOME, "--rollout.num_inference_steps=6", "--window.size=3"]
WHOLE = [*SHORT, "--model.lora_rank=0"]
FAST = {  # of DiffusionNFT: epochs that take about as long, learning rate (None: the tuned one), and options
    "10 steps, 9 trained": (30, None, []),
    "10 steps, 3 trained": (68, None, [*SOME, "--window.size=3"]),
    "6 steps, 3 trained": (80, None, SHORT),
    "6 steps, 3 trained, all weights": (80, 3e-4, WHOLE),
    "6 steps, 3 trained, all weights, rate 0.0001": (80, 1e-4, WHOLE),
    "6 steps, 3 trained, all weights, rate 0.001": (80, 1e-3, WHOLE),
}
LONG = (80, 320)  # epochs
ANCHORS = {"raw": ((0, 0.05, 0.2, 0.5, 1), []), "centred": ((0.2, 1), ["--credit.anchor_baseline=others"])}


# What is run


def cell(part, task, method, seed, epochs=EPOCHS, options=(), lr=None):
    "One run, as plain data."
    words = [*METHODS.get(method, ()), *COMMON, *options]
    return {"part": part, "task": task, "method": method, "seed": seed, "epochs": epochs, "lr": lr, "options": words}


def key(run):
    "The name of a run, also of its folder."
    parts = (run[name] for name in ("part", "task", "method", "seed", "lr"))
    return "-".join(str(part) for part in parts if part is not None).replace(" ", "_").replace(",", "")


def lines(part):
    "What a part has found so far."
    file = FOUND / f"{part}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def tuned(method):
    "The learning rate at which a method scored best on training prompts; ValueError if it has not been tuned."
    method = TUNED_AS.get(method, method)
    found = {line["lr"]: best(line)["scaled"] for line in lines("tune") if line["method"] == method}
    if len(found) < len(RATES):
        raise ValueError(f"{method} is not tuned yet: run the part `tune` first")
    return max(found, key=found.get)


def best(line, quantity="scaled"):
    "The evaluation of a run, or of the base model, at the guidance that is best for it."
    return max(line["guidance"].values(), key=lambda found: found[quantity])


def tune():
    "Each method that is no variant of another, with each learning rate."
    methods = [method for method in METHODS if method not in TUNED_AS]
    return [cell("tune", TASKS[0], m, TUNING_SEED, TUNING_EPOCHS, lr=lr) for lr in RATES for m in methods]


def main_runs():
    "Every method on every task; all of them with one seed before the next seed begins."
    epochs = dict.fromkeys(TASKS, EPOCHS // 2) | {TASKS[0]: EPOCHS}
    return [cell("main", t, m, seed, epochs[t], lr=tuned(m)) for seed in SEEDS for t in TASKS for m in METHODS]


def unguided():
    "Some methods, trained without guidance."
    methods = ("GRPO", "VGPO", "critic", "NFT")
    return [cell("unguided", TASKS[0], m, seed, 2 * EPOCHS, UNGUIDED, tuned(m)) for seed in SEEDS[:3] for m in methods]


def variants():
    "VGPO with one thing changed."
    lr = tuned("VGPO")
    return [
        cell("variants", TASKS[0], name, seed, options=METHODS["VGPO"] + words, lr=lr)
        for seed in SEEDS[:3]
        for name, words in VARIANTS.items()
    ]


def kl():
    "Some methods with a KL penalty."
    pairs = [(m, beta) for m in ("GRPO", "VGPO", "critic") for beta in (0.1, 1.0)]
    return [
        cell("kl", TASKS[0], f"{m}, beta {beta:g}", s, options=[*METHODS[m], f"--objective.beta={beta}"], lr=tuned(m))
        for s in SEEDS[:3]
        for m, beta in pairs
    ]


def steps():
    "Some methods that are trained with another number of steps than ten, all of them scored."
    found = []
    for seed in SEEDS[:3]:
        for number in (5, 20):
            for m in ("GRPO", "VGPO", "critic"):
                words = [f"--rollout.num_inference_steps={number}", f"--window.size={number - 1}"]
                words += [f"--credit.num_scored_steps={number}"] if m != "GRPO" else []
                found.append(
                    cell("steps", TASKS[0], f"{m}, {number} steps", seed, options=METHODS[m] + words, lr=tuned(m))
                )
    return found


def collapse():
    "VGPO with anchors of all weights, and GRPO, where most groups agree."
    runs = {"GRPO": METHODS["GRPO"]}
    for kind, (weights, words) in ANCHORS.items():
        runs |= {f"{kind}, k {k:g}": [*METHODS["VGPO"], f"--credit.anchor_weight={k}", *words] for k in weights}
    return [
        cell("collapse", TASKS[0], name, seed, EPOCHS // 2, [*words, *EASY], tuned("VGPO"))
        for seed in SEEDS[:3]
        for name, words in runs.items()
    ]


def fast():
    "DiffusionNFT in ways that differ in the price of an epoch or in what they train, with equally many seconds."
    return [
        cell("fast", TASKS[0], name, TUNING_SEED, epochs, [*METHODS["NFT"], *UNGUIDED, *words], lr or tuned("NFT"))
        for name, (epochs, lr, words) in FAST.items()
    ]


def long():
    "DiffusionNFT of all weights for as long, and for longer."
    _, lr, words = FAST["6 steps, 3 trained, all weights"]
    words = [*METHODS["NFT"], *UNGUIDED, *words]
    return [cell("long", TASKS[0], f"NFT, {n} epochs", s, n, words, lr) for n in LONG for s in SEEDS[:3]]


PARTS = {
    "base": lambda: [cell("base", task, "base", 0, 0) for task in TASKS],
    "tune": tune,
    "main": main_runs,
    "unguided": unguided,
    "variants": variants,
    "kl": kl,
    "steps": steps,
    "collapse": collapse,
    "fast": fast,
    "long": long,
    "values": lambda: [cell("values", TASKS[0], m, 0, epochs) for m, epochs in (("base", 0), ("VGPO", EPOCHS))],
}


# What is measured


def figures(evaluation):
    "The means of an Evaluation, over tasks and by task."
    found = {}
    for quantity, part in evaluation.summary["reward"].items():
        found |= {quantity: round(part["mean"], 5), f"{quantity}_stderr": part["stderr"] and round(part["stderr"], 5)}
        found[f"{quantity}_by_task"] = {task: round(figure["mean"], 4) for task, figure in part["by_task"].items()}
    return found


def gold(images, rows):
    "Gold metrics of images, those that the rows of the task allow."
    if "include" in rows[0]:
        found = gold_metrics(images, rows)
    else:
        found = {"sharpness": sharpness(images).mean(), "edges": edges(images).mean()}
        found["diversity"] = diversity(images, [row["prompt"] for row in rows])
    return {
        name: round(float(value), 5) for name, value in found.items() if np.isfinite(value)
    }  # no pairs: no diversity


def evaluate(trainer, rows, guidance, num_steps=STEPS):
    "Figures and gold metrics of the averaged weights, by the ODE."
    settings = EvaluationConfig(num_samples=len(rows), num_inference_steps=num_steps, guidance_scale=guidance)
    with trainer.averaged():
        found = evaluate_in_memory(trainer.policy, {"reward": trainer.reward}, rows, settings)
    return figures(found) | {"gold": gold(found.images, rows)}


def both_samplers(trainer, rows, size=64):
    """What the SDE draws of held-out prompts, beside what the ODE draws from the same noise, with the averaged weights.

    Figures and gold metrics of both, the distance of the two sets of latents, and the KL of each step of the SDE to the
    model before training, per latent dimension.
    """
    policy, latents, kl = trainer.policy, {"sde": [], "ode": []}, []
    shape, guidance = (trainer.num_steps + 1, *policy.latent_shape), trainer.config.guidance_scale
    with trainer.averaged(), torch.no_grad():
        for i in range(0, len(rows), size):
            part = rows[i : i + size]
            noise = torch.stack([sample_noise(shape, 0, "evaluation", i + k, 0) for k in range(len(part))])
            embeds = policy.encode([row["prompt"] for row in part])
            velocity = partial(policy.velocity, embeds=embeds, guidance_scale=guidance)
            for name, sampler in (("sde", FlowSDE(0.7)), ("ode", FlowSDE(0.0))):
                path = rollout(velocity, noise[:, 0], trainer.sigmas, sampler, noise[:, 1:])
                latents[name].append(path.latents[:, -1])
                if name == "sde":
                    kl.append(kl_per_step(policy, path, embeds, sampler, guidance))
    found, latents = {}, {name: torch.cat(parts) for name, parts in latents.items()}
    for name, finished in latents.items():
        drawn = policy.decode(finished, size)
        scores = score(trainer.reward, drawn, [row["prompt"] for row in rows], rows, None)
        found[name] = figures(Evaluation(rows, {"reward": scores}, drawn, [])) | {"gold": gold(drawn, rows)}
    distance, stderr = kernel_distance(latents["sde"], latents["ode"].flip(0))  # no pair shares its noise
    kl = [round(k, 9) for k in torch.stack(kl).mean(0).tolist()]
    return found | {"distance": round(distance, 6), "distance_stderr": round(stderr, 6), "kl": kl}


def state_values(trainer, prompts=16, per_prompt=4, states=(0, 2, 4, 6, 8), count=16):
    """Rewards of all states of some training images, and the values of some states by `count` continuations from each.

    That is everything that an estimator of credit sees, and what it would have to know.
    """
    chosen = epoch_prompts(len(trainer.rows), prompts, 77, 0)
    trainer.states, generator = list(range(trainer.num_steps + 1)), torch.Generator().manual_seed(0)
    with trainer.averaged(), torch.no_grad():
        batch = trainer.rollout(0, [(prompt, k) for prompt in chosen for k in range(per_prompt)])
        trainer.score(batch, trainer.decode(batch))
        found = torch.stack([continued_rewards(trainer, batch, state, count, generator) for state in states], 1)
    tables = {"rewards": batch.rewards, "value": found.mean(-1), "stderr": found.std(-1) / count**0.5}
    tables = {name: [[round(x, 4) for x in row] for row in table.tolist()] for name, table in tables.items()}
    tags = [row.get("tag") for row in batch.rows]
    return {"group": batch.path.group.tolist(), "tags": tags, "states": list(states), "count": count} | tables


def validation_rows(rows):
    "Training rows, equally many of each task."
    by_task = {}
    for row in rows:
        by_task.setdefault(row.get("tag"), []).append(row)
    return [row for found in by_task.values() for row in found[: VALIDATION // len(by_task)]]


def fit(trainer, quick, scored):
    "Train to the end; the seconds that it took, and what was found on the way."
    seconds, curve, every = 0.0, [], max(EVERY, trainer.epochs // 20)
    while True:
        if trainer.epoch % every == 0 and quick:
            found = evaluate(trainer, quick, GUIDANCE[1])
            spent = {"epoch": trainer.epoch, "seconds": round(seconds, 2), "scored": trainer.epoch * scored}
            curve.append(spent | {name: found[name] for name in ("scaled", "strict") if name in found})
        if trainer.epoch == trainer.epochs:
            return round(seconds, 2), curve
        began = time.process_time()
        metrics = trainer.train_epoch()
        seconds += time.process_time() - began
        if trainer.epoch % every == 0:
            kept = {k: round(v, 5) for k, v in metrics.items() if isinstance(v, float) and not k.startswith("time/")}
            curve.append({"epoch": trainer.epoch, "train": kept})


def train(run):
    "Train and evaluate one run; its line."
    quiet()
    torch.set_num_threads(1)
    words = ["--recipe", run["task"], f"--seed={run['seed']}", f"--epochs={run['epochs']}", *run["options"]]
    config = parse_config([*words, *([f"--optim.lr={run['lr']}"] if run["lr"] else [])])
    tuning = run["part"] in ("tune", "fast")
    rows = load_prompts(config.prompts.test, "test")[:HELD_OUT]
    if tuning:
        rows = validation_rows(load_prompts(config.prompts.train, "train"))
    trainer = build_trainer(config, init_accelerator(600.0), test=rows)
    seconds, curve = fit(
        trainer, [] if tuning or run["part"] == "values" else rows[:QUICK], make_plan(config).work["score"]
    )
    if run["epochs"]:
        with trainer.averaged():
            trainer.policy.save(RUNS / key(run))
    versions = {"torch": torch.__version__, "python": platform.python_version(), "processor": processor()}
    line = run | {"seconds": seconds, "curve": curve, "versions": versions}
    if run["part"] == "values":
        return line | {"values": state_values(trainer)}
    if run["part"] == "steps":
        line["steps"] = {str(n): evaluate(trainer, rows, 2.0, n) for n in (10, 20, 40)}
    line["guidance"] = {
        str(g): evaluate(trainer, rows, g) for g in (GUIDANCE[1:2] if run["part"] == "tune" else GUIDANCE)
    }
    return line if tuning else line | {"samplers": both_samplers(trainer, rows[:BY_SDE])}


def processor():
    "The name of the processor, where the system tells it."
    info = Path("/proc/cpuinfo")
    text = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in text if "model name" in line), platform.processor())


# The program


def run_alone(run):
    "Train one run in a process of its own, with one thread, and add its line to those of its part."
    own = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--run", json.dumps(run)]
    done = subprocess.run(command, env=own, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{key(run)} ended with code {done.returncode}", flush=True)
        return False
    line = done.stdout.splitlines()[-1]
    FOUND.mkdir(exist_ok=True)
    with open(FOUND / f"{run['part']}.jsonl", "a") as file:
        file.write(line + "\n")
    found = json.loads(line)
    shown = [f"{g}: {f.get('strict', f['raw']):.3f} / {f['scaled']:.3f}" for g, f in found.get("guidance", {}).items()]
    print(f"{key(run)}  {', '.join(shown)}  {found['seconds']:.0f} s", flush=True)
    return True


def main(argv=None):
    "The program."
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="runs with these tasks, methods, seeds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once (default: one per core)")
    parser.add_argument("--list", action="store_true", help="say what is done, and do nothing")
    parser.add_argument("--run", help="one run, as JSON: what this program calls itself with")
    own = parser.parse_args(argv)
    if own.run:
        return print(json.dumps(train(json.loads(own.run))))
    unknown = [part for part in own.parts if part not in PARTS]
    if unknown or not (own.parts or own.list):
        parser.error(f"give parts out of {', '.join(PARTS)}" + (f", not {', '.join(unknown)}" if unknown else ""))
    for part in own.parts or PARTS:
        done = {key(line) for line in lines(part)}
        try:
            runs = [run for run in PARTS[part]() if key(run) not in done]
        except ValueError as e:
            print(f"{part}: {e}")
            continue
        runs = [run for run in runs if {str(run[k]) for k in ("task", "method", "seed")} >= {*own.only}]
        print(f"{part}: {len(done)} runs are done, {len(runs)} are to do", flush=True)
        if not own.list:
            with ThreadPoolExecutor(own.jobs) as pool:
                if not all(list(pool.map(run_alone, runs))):
                    sys.exit(f"error: some runs of {part} failed; call again to repeat them")


if __name__ == "__main__":
    main()
