"""The table of the README: a recipe trained with several seeds, one process after the other.

    python benchmarks/seeds.py --recipe tiny-ocr
    python benchmarks/seeds.py --seeds 0 1 --credit GRPO --output runs/grpo

A run that has its results is not repeated, and one that was begun is resumed. What is not an option of this program
goes to `vgpo.train`; give such a table an `--output` of its own, as finished runs are kept whatever their options were.

One run is an anecdote: its seed draws the prompts of every epoch, the noise of every trajectory and the first weights
of the adapters, and early luck compounds. The ± of a line is the paired standard error of that run's evaluation and
says nothing about it. How sure can one be after S seeds? If the changes are normal with unknown mean and spread s, the
95 % interval of their mean is ± t s / sqrt(S) with Student's t: 8.98, 2.48, 1.24 and 0.72 times s for two, three, five
and ten seeds. So two seeds say almost nothing, three say "it works" if the effect is several times its spread, and
telling two good methods apart takes ten. With three, the range below the table is more honest than a deviation.
"""

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from statistics import mean


def command(recipe, seed, folder, more=()):
    "What `vgpo.train` is called with: a new run, or the rest of the one begun in `folder`; ValueError if it is no run."
    if (folder / "config.yaml").is_file():
        return ["--resume", str(folder)]
    if folder.exists():
        raise ValueError(f"{folder} is no run; remove it and call again")
    return ["--recipe", recipe, f"--seed={seed}", f"--output_dir={folder.parent}", f"--name={folder.name}", *more]


def table(results):
    "A Markdown table of {seed: results.json}: held-out accuracy before and after, and the range of the change."
    lines = ["| seed | before | after | change | seconds |", "|---|---|---|---|---|"]
    for seed, r in results.items():
        before, after, change = (r[key]["reward"]["strict"] for key in ("before", "after", "change"))
        cells = f"{before['mean']:.3f} | {after['mean']:.3f} | {change['mean']:+.3f} ± {change['stderr']:.3f}"
        lines.append(f"| {seed} | {cells} | {r['seconds']:.0f} |")
    changes = [r["change"]["reward"]["strict"]["mean"] for r in results.values()]
    return "\n".join([*lines, f"\nchange {mean(changes):+.3f}, from {min(changes):+.3f} to {max(changes):+.3f}"])


def main(argv=None):
    "Train once for each seed and print the table."
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("--recipe", default="tiny-geneval", help="what to train (default: tiny-geneval)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", default="runs/seeds", help="folder of the runs (default: runs/seeds)")
    own, more = parser.parse_known_args(argv)
    results = {}
    for seed in own.seeds:
        folder = Path(own.output) / f"{Path(own.recipe).stem}-{seed}"
        if not (folder / "results.json").is_file():
            try:
                words = command(own.recipe, seed, folder, more)
            except ValueError as error:
                sys.exit(f"error: {error}")
            subprocess.run([sys.executable, "-m", "vgpo.train", *words], check=True)
        results[seed] = json.loads((folder / "results.json").read_text())
    images = results[own.seeds[0]]["images"]
    print(f"{own.recipe}: held-out accuracy, {images} images\n\n{table(results)}")


if __name__ == "__main__":
    main()
