"""How far apart do the results of one run lie that is cut in different ways?

    python tests/equivalence.py                    the table of docs/scaling-out.md, about seven minutes
    python tests/equivalence.py "4 processes"      one of its rows

Each way to cut the run is launched on the CPU as a user launches it, `accelerate launch … -m vgpo.train`, but with this
file in the place of `vgpo.train`: it notes what is drawn, judged and credited, and leaves the rest to the program.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np

import vgpo.train as program
from vgpo.runs.checkpoint import newest_whole, read_checkpoint
from vgpo.runs.session import state_tensors

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(HERE.parent / "launch" / "cpu.yaml")]
FAR = 2**40  # added to the prompts' numbers in gathered statistics: there float32 tells no two of them apart
SMALL = [  # the recipe tiny-geneval, but smaller; four processes cannot take its groups whole
    *("--sampling.groups=2", "--sampling.group_size=6", "--sampling.steps=4", "--sampling.sde_steps=3", "--epochs=3"),
    *("--values.reward_steps=4", "--sampling.batch_size=1", "--optim.updates=3", "--optim.lr=3e-4", "--name=run"),
    *("--optim.decay=false", "--optim.clip_range=0.1", "--evaluation.images=5", "--evaluation.steps=2"),
    *("--checkpoint_every=1", "--keep_checkpoints=9"),
]
BRIGHT, FAST = ["--reward.name=tiny_rewards:brightness"], ["--optim.lr=3e-3"]
EIGHT = ["--sampling.group_size=4", "--optim.updates=1"]  # images an update
WHOLE = ["--model.lora_rank=0", "--optim.lr=1e-4"]
CUTS = {  # label: (what is unlike SMALL, processes, how it is cut); compared with one process in passes of one image
    "2 processes": ([], 2, []),
    "4 processes": ([], 4, []),
    "passes of 4 images": ([], 1, ["--sampling.batch_size=4"]),
    "gradient checkpointing": ([], 1, ["--model.gradient_checkpointing=true"]),
    "8 x 1 images an update, in a pass of 8": (EIGHT, 1, ["--sampling.batch_size=8"]),
    "`fsdp: shard_grad_op`, 2 processes": ([], 2, ["--model.fsdp=shard_grad_op"]),
    "`fsdp: full_shard`, 2 processes": ([], 2, ["--model.fsdp=full_shard"]),
    "`fsdp: full_shard`, 4 processes": ([], 4, ["--model.fsdp=full_shard"]),
    "all weights trained: 2 processes": (WHOLE, 2, []),
    "all weights trained: `fsdp: shard_grad_op`": (WHOLE, 2, ["--model.fsdp=shard_grad_op"]),
    "all weights trained: `fsdp: full_shard`": (WHOLE, 2, ["--model.fsdp=full_shard"]),
    "continuous reward: 2 processes": (BRIGHT, 2, []),
    "continuous reward: passes of 4 images": (BRIGHT, 1, ["--sampling.batch_size=4"]),
    "10 x the learning rate: 2 processes": (FAST, 2, []),
    "10 x the learning rate: passes of 4 images": (FAST, 1, ["--sampling.batch_size=4"]),
}


@contextmanager
def recorded(folder):
    "Within this context `vgpo.train` notes in `folder`, epoch by epoch, what it draws, judges and credits."
    keys, noise, images = [], [], []
    names = ("sample_noise", "roll", "judge", "update", "evaluate_before")
    own = {name: getattr(program, name) for name in names}
    Path(folder).mkdir(parents=True, exist_ok=True)

    def save(name, run, **arrays):
        np.savez(Path(folder) / f"{name}-{run.accelerator.process_index}.npz", **arrays)

    def sample_noise(*key):
        noise.append(own["sample_noise"](*key))
        return noise[-1]

    def roll(run, update, pairs):
        batch = own["roll"](run, update, pairs)
        batch.path.group += FAR
        keys.extend(pairs)
        return batch

    def judge(run, batches):
        batches, final = own["judge"](run, batches)
        images[:] = final[0]
        return batches, final

    def update(run, batches):
        def column(get):
            return np.concatenate([get(batch) for batch in batches])

        save(
            f"epoch-{run.epoch}", run, key=keys, noise=np.stack(noise), start=column(lambda b: b.path.latents[:, 0]),
            prompt=column(lambda b: [row["prompt"] for row in b.rows]), group=column(lambda b: b.path.group),
            images=np.stack(images), rewards=column(lambda b: b.rewards), advantages=column(lambda b: b.advantages),
            weights=vector(state_tensors(run)),
        )  # fmt: skip
        keys.clear(), noise.clear()
        return own["update"](run, batches)

    def evaluate_before(run):
        result = own["evaluate_before"](run)
        prompts = [row["prompt"] for row in result.rows]
        save("exam", run, images=result.images, scaled=result.scores.scaled, prompt=prompts)
        return result

    with mock.patch.multiple(program, **{f.__name__: f for f in (sample_noise, roll, judge, update, evaluate_before)}):
        yield


def launch(processes, words, record=None):
    "Start so many processes of `vgpo.train`, recorded in the folder `record` if one is given; a Popen."
    what = [__file__, "--record", str(record)] if record else ["-m", "vgpo.train"]
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, "--num_processes", str(processes), *what, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def vector(tensors):
    "The weights in the tensors of a checkpoint as one vector."
    weights = [t.numpy().ravel() for name, t in sorted(tensors.items()) if name.startswith("weight.")]
    return np.concatenate(weights or [np.zeros(0)])  # a run's are in its first process


def final_weights(run):
    "The weights that a run ended with, from its folder."
    return vector(read_checkpoint(newest_whole(Path(run) / "checkpoints"))[0])


def epochs(record):
    "What was recorded of each epoch, by name: a row for each image, in the order of (prompt, k)."
    result = []
    while files := sorted(Path(record).glob(f"epoch-{len(result)}-*.npz")):
        parts = [dict(np.load(file)) for file in files]
        weights = [part.pop("weights") for part in parts]
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        rows["process"] = np.repeat(range(len(parts)), [len(part["key"]) for part in parts])
        order = np.lexsort(rows["key"].T[::-1])
        result.append({name: values[order] for name, values in rows.items()} | {"weights": weights[0]})
    return result


def differences(one, other):
    "How far two folders with a record and a run in it are apart, and how far the run in the first moved its weights."
    pairs = list(zip(epochs(one / "record"), epochs(other / "record"), strict=True))

    def largest(name):
        return max(abs(a[name].astype(float) - b[name]).max() for a, b in pairs)

    final = final_weights(one / "run")
    apart, moved = abs(final - final_weights(other / "run")), final - pairs[0][0]["weights"]
    return {
        "same": all(np.array_equal(a[name], b[name]) for a, b in pairs for name in ("key", "prompt", "noise", "start")),
        "levels": int(largest("images")), "unlike": sum((a["images"] != b["images"]).sum() for a, b in pairs),
        "values": sum(a["images"].size for a, _ in pairs), "rewards": largest("rewards"),
        "advantages": largest("advantages"), "weights": apart.max(), "beyond": (apart > 1e-6).mean(),
        "moved": (moved**2).mean() ** 0.5,
    }  # fmt: skip


def main(labels):
    "Print the table, or the rows with these labels."
    print(
        "| cut | prompts and noise | image values that differ | rewards | advantages | weights | beyond 1e-6 | moved |"
    )
    print("|---" * 8 + "|", flush=True)
    with TemporaryDirectory() as folder:
        for label in labels or CUTS:
            kind, processes, how = CUTS[label]
            one, other = Path(folder) / "-".join(["one", *kind]), Path(folder) / label
            for path, count, words in ((one, 1, kind), (other, processes, [*kind, *how])):
                if not path.exists():
                    said = launch(count, [*SMALL, *words, f"--output={path}"], path / "record").communicate()[0]
                    if not (path / "run" / "report.md").exists():
                        sys.exit(said)
            d = differences(one, other)
            unlike = f"{d['unlike']} of {d['values']}, by {d['levels']}" if d["unlike"] else "none"
            shown = " | ".join(f"{d[key]:.1e}" for key in ("rewards", "advantages", "weights", "beyond", "moved"))
            print(f"| {label} | {'the same' if d['same'] else 'DIFFERENT'} | {unlike} | {shown} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        with recorded(sys.argv[2]):
            program.main(sys.argv[3:])
    else:
        main(sys.argv[1:])
