"""How an epoch grows with its work, and what that means for 8 and 64 GPUs.

    python benchmarks/scaling.py            groups, group size, steps, resolution, processes; about five minutes
    python benchmarks/scaling.py --quick    the smallest sizes only, to see that it runs
    python benchmarks/scaling.py --paper    no measurement: the price of TCRM and several GPUs, from a recipe's plan

Each point is a VGPO run of a random tiny model in processes of its own, with one thread each. One thing at a time is
changed from the base point. The prediction takes the base point's seconds, phase by phase, times the growth of what
`vgpo.plan` counts: FLOPs of the network and of the decoder, images scored; over the processes.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from diffusers import SD3Transformer2DModel
from matplotlib.figure import Figure

from vgpo.bench import PHASES, make_trainer, timed_epoch
from vgpo.config import parse_config
from vgpo.plan import CARDS, make_plan
from vgpo.policies.loading import quiet
from vgpo.world.pretrain import make_autoencoder, make_pipeline

BASE = {"groups": 4, "group_size": 8, "steps": 6, "resolution": 32, "processes": 1}
AXES = {
    "groups": (2, 4, 8, 16),
    "group_size": (4, 8, 16, 32),
    "steps": (3, 6, 12, 24),
    "resolution": (32, 48, 64, 96),
    "processes": (1, 2),
}
QUICK = BASE | {"groups": 2, "group_size": 4, "steps": 3}
QUICK_AXES = {"groups": (2, 4), "resolution": (32, 64), "processes": (1, 2)}


def options(point, model):
    "The options of a run at a point, but for the processes."
    values = {
        "model.path": model, "model.resolution": point["resolution"], "reward": "JPEG", "optim.num_minibatches": 1,
        "rollout.prompts_per_epoch": point["groups"], "rollout.group_size": point["group_size"],
        "rollout.num_inference_steps": point["steps"], "rollout.micro_batch_size": 16,
        "window.size": point["steps"] - 1, "credit.num_scored_steps": point["steps"],
        "credit.anchor_steps": min(5, point["steps"]),
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def save_model(folder, pixels):
    "Save a random pipeline of the tiny world's shape that can draw images of up to so many pixels per side."
    pipe = make_pipeline(make_autoencoder())
    config = dict(pipe.transformer.config) | {"pos_embed_max_size": pixels // 8}
    pipe.transformer = SD3Transformer2DModel.from_config(config)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    pipe.save_pretrained(folder)


def work(file, epochs, words):
    "In a process of its own: time epochs and write their medians, from the first process, to a file."
    _, trainer = make_trainer("tiny-geneval", "VGPO", words)
    rows = [timed_epoch(trainer) for _ in range(epochs + 1)][1:]
    if trainer.accelerator.is_main_process:
        Path(file).write_text(json.dumps({key: median(row[key] for row in rows) for key in rows[0]}))
    trainer.accelerator.end_training()


def measure(point, model, epochs):
    "Seconds by phase at a point; CalledProcessError if its processes fail."
    count, environment = point["processes"], os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    with TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        command = [sys.executable, *launcher, __file__, "--worker", str(file), "--epochs", str(epochs)]
        subprocess.run([*command, *options(point, model)], env=environment, check=True)
        return json.loads(file.read_text())


def counted(point, model):
    "{phase: work of one process} that the plan counts at a point."
    plan = make_plan(parse_config(options(point, model)), point["processes"])
    network, units = {"rollout": ("rollout",), "decode": ("decode", "draft"), "update": ("train",)}, plan.work
    flops = {phase: sum(units[kind] * plan.flops[kind] for kind in kinds) for phase, kinds in network.items()}
    return {phase: n / point["processes"] for phase, n in (flops | {"score": units["score"]}).items()}


def predicted(seconds, base, work):
    "Seconds of an epoch: those of the base point by phase, times the growth of their work, and what is in no phase."
    outside = seconds["epoch"] - sum(seconds[phase] for phase in PHASES)
    return outside + sum(seconds[phase] * work[phase] / base[phase] for phase in PHASES)


def run_points(base, axes, epochs):
    """({axis: [(value, seconds by phase, predicted seconds)]}, seconds of the base point).

    Each row is printed as it is measured, as one of a Markdown table.
    """
    print("| axis | value | " + " | ".join(PHASES) + " | epoch | over base | predicted |\n" + "|---" * 9 + "|")
    with TemporaryDirectory() as model:
        save_model(model, max(axes.get("resolution", [base["resolution"]])))
        start, work, found = measure(base, model, epochs), counted(base, model), {}
        for axis, values in axes.items():
            for value in values:
                point = base | {axis: value}
                seconds = start if point == base else measure(point, model, epochs)
                guess = predicted(start, work, counted(point, model))
                found.setdefault(axis, []).append((value, seconds, guess))
                cells = [*(f"{seconds[key]:.3f}" for key in (*PHASES, "epoch"))]
                cells += [f"{seconds['epoch'] / start['epoch']:.2f}", f"{guess / start['epoch']:.2f}"]
                print(f"| {axis} | {value} | " + " | ".join(cells) + " |", flush=True)
    return found, start["epoch"]


def draw(found, start, file):
    "The figure: a panel per axis, the epoch over that of the base point, as measured and as predicted."
    figure, ticks = Figure(figsize=(2 * len(found), 2.8), layout="constrained"), [0.25, 0.5, 1, 2, 4, 8]
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for ax, (axis, rows) in zip(panels, found.items(), strict=True):
        values, seconds, guesses = zip(*rows, strict=True)
        ax.plot(values, [s["epoch"] / start for s in seconds], "o-", color="tab:blue", label="measured")
        ax.plot(values, [g / start for g in guesses], "--", color="tab:orange", label="from the plan's counts")
        ax.set(xscale="log", yscale="log", xticks=values, xticklabels=values, xlabel=axis.replace("_", " "))
        ax.set(yticks=ticks, yticklabels=ticks)
        ax.minorticks_off()
    panels[0].set_ylabel("epoch / base point")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(file, dpi=110)


def ring_seconds(size, processes, bandwidth, latency=20e-6):
    "Seconds of a ring all-reduce of `size` bytes: 2 (n - 1) messages of size / n, at `bandwidth` bytes per second."
    return 2 * (processes - 1) * (size / processes / bandwidth + latency)


def expected_maximum(n):
    "Mean of the largest of n standard normal numbers: the integral of x d(Phi(x)^n)."
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    return 10 - torch.trapezoid(torch.special.ndtr(x) ** n, x).item()


def price(own):
    "Markdown lines: a recipe's epoch on one GPU by phase, as GRPO and as VGPO; and with the reward beside the rollout."
    draft, five = [f"--model.tiny_vae={own.tiny_vae}"], ["--credit.num_scored_steps=5"]
    methods = {"GRPO": ["--credit=GRPO"], "VGPO": [], "VGPO, tiny VAE": draft, "VGPO, 5 steps": five}
    methods["VGPO, 5 steps, tiny VAE"] = draft + five
    lines, first = (
        ["| method | " + " | ".join(PHASES) + " | epoch | / GRPO | overlapped | / GRPO |", "|---" * 9 + "|"],
        {},
    )
    for name, words in methods.items():
        plan = make_plan(parse_config(["--recipe", own.recipe, *words]))
        s = plan.seconds(CARDS[own.card], own.utilisation, own.score_seconds)
        beside = max(s["rollout"] + s["decode"], s["score"]) + s["update"]
        first = first or {"epoch": sum(s.values()), "beside": beside}
        cells = [f"{s[phase]:.0f}" for phase in PHASES]
        cells += [f"{sum(s.values()):.0f}", f"{sum(s.values()) / first['epoch']:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {beside:.0f} | {beside / first['beside']:.3f} |")
    return lines


def growth(own):
    "Markdown lines: seconds of a recipe's epoch by number of GPUs, with gradients on the wire and waiting for rewards."
    config, head = parse_config(["--recipe", own.recipe]), [f"all-reduce at {b:g} GB/s" for b in own.bandwidth]
    head = ["GPUs", "network and decoder", "reward", "waiting", *head, "epoch", "efficiency"]
    lines, first = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"], None
    for n in own.gpus:
        plan = make_plan(config, n)
        seconds = plan.seconds(CARDS[own.card], own.utilisation, own.score_seconds)
        calls = len(plan.batches.sizes) * plan.batches.num_minibatches  # of the reward, by one process
        waiting = seconds["score"] * own.spread / calls**0.5 * expected_maximum(n)
        gradients, updates = plan.resident["gradients"], plan.batches.num_minibatches
        sent = [updates * ring_seconds(gradients, n, b * 1e9) for b in own.bandwidth]
        epoch = sum(seconds.values()) + waiting + max(sent)
        first = first or epoch * n
        cells = [sum(seconds.values()) - seconds["score"], seconds["score"], waiting, *sent, epoch]
        lines.append(f"| {n} | " + " | ".join(f"{c:.4g}" for c in cells) + f" | {first / n / epoch:.1%} |")
    return lines


def paper(own):
    "The extrapolation, as text."
    plan = make_plan(parse_config(["--recipe", own.recipe]))
    return "\n".join([
        f"{own.recipe} on {CARDS[own.card].name}, seconds per epoch of {plan.batches.images} images; by FLOPs at "
        f"{own.utilisation:.0%} of the peak, {own.score_seconds:g} s per image for the reward\n", *price(own),
        f"\nseveral GPUs: {plan.resident['gradients'] / 1e6:.1f} MB of gradients, {plan.batches.num_minibatches} "
        f"updates per epoch; calls of the reward vary by {own.spread:.0%}; the epoch is that with the slowest wire\n",
        *growth(own),
    ])  # fmt: skip


def make_parser():
    "The command line."
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--epochs", type=int, default=3, help="epochs that count, after one that does not")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, one epoch")
    parser.add_argument("--figure", default="scaling.png", help="docs/scaling.png renews the one that is shown there")
    parser.add_argument("--worker", help="internal: the file that a process of a point writes")
    parser.add_argument("--paper", action="store_true", help="print the extrapolation instead")
    parser.add_argument("--recipe", default="sd35-geneval", help="of --paper, as are the following")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of the card's peak that is reached")
    parser.add_argument("--bandwidth", type=float, nargs="+", default=[25, 1.25], help="GB/s of the slowest wire")
    parser.add_argument("--tiny_vae", default="madebyollin/taesd3", help="the tiny VAE")
    parser.add_argument("--score_seconds", type=float, default=0.02, help="of the reward, for an image")
    parser.add_argument("--spread", type=float, default=0.3, help="std over mean of the seconds of one reward call")
    return parser


def main(argv=None):
    "The program."
    parser = make_parser()
    own, words = parser.parse_known_args(argv)
    if words and not own.worker:
        parser.error(f"there is no option {words[0]}")
    quiet()
    if own.worker:
        return work(own.worker, own.epochs, words)
    if own.paper:
        return print(paper(own))
    base, axes, epochs = (QUICK, QUICK_AXES, 1) if own.quick else (BASE, AXES, own.epochs)
    draw(*run_points(base, axes, epochs), own.figure)
    print(f"\nbase point: {base}, one thread per process, medians of {epochs} epochs; figure: {own.figure}")


if __name__ == "__main__":
    main()
