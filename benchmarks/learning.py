"""How fast GRPO and VGPO learn: held-out reward against seconds, updates and images scored.

    python benchmarks/learning.py --output runs/learning
    python benchmarks/learning.py --output runs/learning --recipe tiny-ocr --seeds 0 --epochs 40 --every 4

Both methods train with the same recipe and seeds, one run after the other; which goes first alternates. A run that is
complete in the output folder is not repeated, one that was broken off goes on from its last checkpoint. All other
options are those of a run. Seconds are those of the run's median epoch, without held-out evaluations, times the epochs.
"""

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.figure import Figure
from seeds import command

from vgpo.bench import PHASES
from vgpo.config import parse_config
from vgpo.plan import make_plan

METHODS = {"GRPO": "tab:orange", "VGPO": "tab:blue"}
AXES = {"seconds": "seconds of training", "updates": "updates", "scored": "images scored"}


def train(own, credit, seed, more):
    "The folder of a finished run of one method and seed, which is trained if it is not there yet."
    folder = Path(own.output) / f"{Path(own.recipe).stem}-{credit}-{seed}"
    if (folder / "results.json").is_file():
        print(f"{folder} is complete", flush=True)
        return folder
    words = [f"--credit={credit}", f"--evaluation.eval_every={own.every}", *more]
    words += [f"--epochs={own.epochs}"] if own.epochs else []
    print(f"{folder} starts", flush=True)
    done = subprocess.run([sys.executable, "-m", "vgpo.train", *command(own.recipe, seed, folder, words)])
    if done.returncode:
        sys.exit(f"error: {folder} ended with code {done.returncode}; call again to go on from its last checkpoint")
    return folder


def curve(folder):
    "Rows {epoch, seconds, updates, scored, reward, accuracy} of a run: what was spent before each held-out evaluation."
    config = parse_config(["--recipe", str(folder / "config.yaml")])
    scored, rows = make_plan(config).work["score"], []
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    second = median(sum(metrics[f"time/{phase}"] for phase in PHASES) for metrics in log)  # of an epoch
    after = json.loads((folder / "results.json").read_text())["after"]["reward"]
    end = {"eval/reward": after["scaled"]["mean"], "eval/accuracy": after.get("strict", {}).get("mean")}
    for epoch, metrics in enumerate([*log, end]):
        if "eval/reward" in metrics:
            updates = epoch * config.optim.num_minibatches
            spent = {"seconds": epoch * second, "updates": updates, "scored": epoch * scored}
            marks = {key: float(metrics.get(f"eval/{key}") or "nan") for key in ("reward", "accuracy")}
            rows.append({"epoch": epoch, **spent, **marks})
    return rows


def mean_curve(curves):
    "The mean of the curves of several seeds, as {column: array}."
    return {key: np.mean([[row[key] for row in rows] for rows in curves], axis=0) for key in curves[0][0]}


def spent_to_reach(target, mean):
    "{axis: what was spent when the mean curve first reached the target}, between evaluations in proportion."
    i = int(np.argmax(mean["reward"] >= target))
    if i == 0:
        return {axis: mean[axis][0] for axis in AXES}
    low, high = mean["reward"][i - 1 : i + 1]
    return {a: mean[a][i - 1] + (target - low) / (high - low) * (mean[a][i] - mean[a][i - 1]) for a in AXES}


def table(means):
    "Markdown lines: a row per evaluation, then what each method spent until it reached the reward that both reach."
    lines = ["| epoch | updates | "
             + " | ".join(f"{k} {c}" for k in means for c in ("s", "scored", "reward", "accuracy")) + " |",
             "|---" * (2 + 4 * len(means)) + "|"]  # fmt: skip
    first = next(iter(means.values()))
    for i, epoch in enumerate(first["epoch"]):
        cells = [f"{m['seconds'][i]:.0f} | {m['scored'][i]:.0f} | {m['reward'][i]:.4f} | {m['accuracy'][i]:.4f}"
                 for m in means.values()]  # fmt: skip
        lines.append(f"| {epoch:.0f} | {first['updates'][i]:.0f} | " + " | ".join(cells) + " |")
    target = min(m["reward"].max() for m in means.values())
    lines.append(f"\nspent until the mean held-out reward was {target:.4f}, the best that both reach:")
    for credit, mean in means.items():
        spent = spent_to_reach(target, mean)
        lines.append(f"{credit}: " + ", ".join(f"{spent[axis]:.0f} {label}" for axis, label in AXES.items()))
    return "\n".join(lines)


def draw(curves, title, file):
    "The figure: held-out reward against each axis, thin lines by seed, thick ones their mean."
    figure = Figure(figsize=(9, 3), layout="constrained")
    for ax, (axis, label) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        for credit, runs in curves.items():
            for rows in runs:
                ax.plot([r[axis] for r in rows], [r["reward"] for r in rows], color=METHODS[credit], alpha=0.3, lw=1)
            mean = mean_curve(runs)
            ax.plot(mean[axis], mean["reward"], color=METHODS[credit], label=f"{credit}, mean of {len(runs)}")
        ax.set_xlabel(label)
    figure.axes[0].set_ylabel("held-out reward")
    figure.axes[0].legend(loc="lower right")
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=110)


def main(argv=None):
    "The program."
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", default="runs/learning", help="folder of the runs")
    parser.add_argument("--recipe", default="tiny-geneval")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=5, help="epochs from one held-out evaluation to the next")
    parser.add_argument("--figure", default="learning.png", help="docs/learning.png renews the one that is shown there")
    own, more = parser.parse_known_args(argv)
    curves = {credit: [] for credit in METHODS}
    try:
        for i, seed in enumerate(own.seeds):
            for credit in list(METHODS)[:: -1 if i % 2 else 1]:
                curves[credit].append(curve(train(own, credit, seed, more)))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{own.recipe}, seeds {own.seeds}\n\n{table({credit: mean_curve(runs) for credit, runs in curves.items()})}")
    draw(curves, f"{own.recipe}: held-out reward of {len(own.seeds)} seeds", own.figure)
    print(f"figure: {own.figure}")


if __name__ == "__main__":
    main()
