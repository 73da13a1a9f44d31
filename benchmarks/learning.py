"""How fast GRPO and VGPO learn: held-out score against seconds, updates and pictures scored.

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
from vgpo.plan import config_batches, epoch_work

METHODS = {"grpo": "tab:orange", "vgpo": "tab:blue"}
AXES = {"seconds": "seconds of training", "updates": "updates", "scored": "pictures scored"}


def train(own, kind, seed, more):
    "The folder of a finished run of one method and seed, which is trained if it is not there yet."
    folder = Path(own.output) / f"{Path(own.recipe).stem}-{kind}-{seed}"
    if (folder / "results.json").is_file():
        print(f"{folder} is complete", flush=True)
        return folder
    words = [f"--advantage.kind={kind}", f"--evaluation.every={own.every}", *more]
    words += [f"--epochs={own.epochs}"] if own.epochs else []
    print(f"{folder} starts", flush=True)
    done = subprocess.run([sys.executable, "-m", "vgpo.train", *command(own.recipe, seed, folder, words)])
    if done.returncode:
        sys.exit(f"error: {folder} ended with code {done.returncode}; call again to go on from its last checkpoint")
    return folder


def curve(folder):
    "Rows {epoch, seconds, updates, scored, score, strict} of a run: what was spent before each held-out evaluation."
    config = parse_config(["--recipe", str(folder / "config.yaml")])
    scored, rows = epoch_work(config, config_batches(config))["score"], []
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    second = median(sum(metrics[f"{phase}_s"] for phase in PHASES) for metrics in log)  # of an epoch
    after = json.loads((folder / "results.json").read_text())["after"]
    end = {f"heldout_{key}": after[key] for key in ("score", "strict") if key in after}
    for epoch, metrics in enumerate([*log, end]):
        if "heldout_score" in metrics:
            spent = {"seconds": epoch * second, "updates": epoch * config.optim.updates, "scored": epoch * scored}
            marks = {key: metrics.get(f"heldout_{key}", float("nan")) for key in ("score", "strict")}
            rows.append({"epoch": epoch, **spent, **marks})
    return rows


def mean_curve(curves):
    "The mean of the curves of several seeds, as {column: array}."
    return {key: np.mean([[row[key] for row in rows] for rows in curves], axis=0) for key in curves[0][0]}


def spent_to_reach(target, mean):
    "{axis: what was spent when the mean curve first reached the target}, between evaluations in proportion."
    i = int(np.argmax(mean["score"] >= target))
    if i == 0:
        return {axis: mean[axis][0] for axis in AXES}
    low, high = mean["score"][i - 1 : i + 1]
    return {a: mean[a][i - 1] + (target - low) / (high - low) * (mean[a][i] - mean[a][i - 1]) for a in AXES}


def table(means):
    "Markdown lines: a row an evaluation, then what each method spent until it reached the score that both reach."
    lines = ["| epoch | updates | " + " | ".join(f"{k} {c}" for k in means for c in ("s", "scored", "score", "strict"))
             + " |", "|---" * (2 + 4 * len(means)) + "|"]  # fmt: skip
    first = next(iter(means.values()))
    for i, epoch in enumerate(first["epoch"]):
        cells = [f"{m['seconds'][i]:.0f} | {m['scored'][i]:.0f} | {m['score'][i]:.4f} | {m['strict'][i]:.4f}"
                 for m in means.values()]  # fmt: skip
        lines.append(f"| {epoch:.0f} | {first['updates'][i]:.0f} | " + " | ".join(cells) + " |")
    target = min(m["score"].max() for m in means.values())
    lines.append(f"\nspent until the mean held-out score was {target:.4f}, the best that both reach:")
    for kind, mean in means.items():
        spent = spent_to_reach(target, mean)
        lines.append(f"{kind}: " + ", ".join(f"{spent[axis]:.0f} {label}" for axis, label in AXES.items()))
    return "\n".join(lines)


def draw(curves, title, file):
    "The figure: held-out score against each axis, thin lines by seed, thick ones their mean."
    figure = Figure(figsize=(9, 3), layout="constrained")
    for ax, (axis, label) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        for kind, runs in curves.items():
            for rows in runs:
                ax.plot([r[axis] for r in rows], [r["score"] for r in rows], color=METHODS[kind], alpha=0.3, lw=1)
            mean = mean_curve(runs)
            ax.plot(mean[axis], mean["score"], color=METHODS[kind], label=f"{kind}, mean of {len(runs)}")
        ax.set_xlabel(label)
    figure.axes[0].set_ylabel("held-out score")
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
    curves = {kind: [] for kind in METHODS}
    try:
        for i, seed in enumerate(own.seeds):
            for kind in list(METHODS)[:: -1 if i % 2 else 1]:
                curves[kind].append(curve(train(own, kind, seed, more)))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{own.recipe}, seeds {own.seeds}\n\n{table({kind: mean_curve(runs) for kind, runs in curves.items()})}")
    draw(curves, f"{own.recipe}: held-out score of {len(own.seeds)} seeds", own.figure)
    print(f"figure: {own.figure}")


if __name__ == "__main__":
    main()
