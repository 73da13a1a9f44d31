"""How far apart do the results of one run lie that is cut in different ways?

    python tests/equivalence.py                    the table of docs/scaling-out.md, about seven minutes
    python tests/equivalence.py "4 processes"      one of its rows

Each way to cut the run is launched on the CPU as a user launches it, `accelerate launch … -m vgpo.train`, but with this
file in the place of `vgpo.train`: it notes what is drawn, scored and credited, and leaves the rest to the program.
"""

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np

import vgpo.train as program
import vgpo.trainer
from vgpo.runs.checkpoint import newest_valid, read_checkpoint, trainer_state
from vgpo.runs.session import Session
from vgpo.trainer import Trainer

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(HERE.parent / "launch" / "cpu.yaml")]
FAR = 2**40  # added to the prompts' numbers in gathered statistics: there float32 tells no two of them apart
SMALL = [  # the recipe tiny-geneval, but smaller; four processes cannot take its groups whole
    *("--rollout.prompts_per_epoch=2", "--rollout.group_size=6", "--rollout.num_inference_steps=4", "--window.size=3"),
    *("--epochs=3", "--credit.num_scored_steps=4", "--rollout.micro_batch_size=1", "--optim.num_minibatches=3"),
    *("--optim.lr=3e-4", "--optim.lr_scheduler=constant", "--objective.clip_range=0.1", "--evaluation.num_samples=5"),
    *("--evaluation.num_inference_steps=2", "--save_every=1", "--save_total_limit=9", "--name=run"),
]
BRIGHT, FAST = ["--reward=tiny_rewards:brightness"], ["--optim.lr=3e-3"]
EIGHT = ["--rollout.group_size=4", "--optim.num_minibatches=1"]  # images per update
WHOLE = ["--model.lora_rank=0", "--optim.lr=1e-4"]
# label: (what is unlike SMALL, processes, how it is cut); compared with one process in micro-batches of one image
CUTS = {
    "2 processes": ([], 2, []),
    "4 processes": ([], 4, []),
    "micro-batches of 4 images": ([], 1, ["--rollout.micro_batch_size=4"]),
    "gradient checkpointing": ([], 1, ["--model.gradient_checkpointing=true"]),
    "8 x 1 images per update, in a micro-batch of 8": (EIGHT, 1, ["--rollout.micro_batch_size=8"]),
    "`fsdp: shard_grad_op`, 2 processes": ([], 2, ["--model.fsdp=shard_grad_op"]),
    "`fsdp: full_shard`, 2 processes": ([], 2, ["--model.fsdp=full_shard"]),
    "`fsdp: full_shard`, 4 processes": ([], 4, ["--model.fsdp=full_shard"]),
    "all weights trained: 2 processes": (WHOLE, 2, []),
    "all weights trained: `fsdp: shard_grad_op`": (WHOLE, 2, ["--model.fsdp=shard_grad_op"]),
    "all weights trained: `fsdp: full_shard`": (WHOLE, 2, ["--model.fsdp=full_shard"]),
    "continuous reward: 2 processes": (BRIGHT, 2, []),
    "continuous reward: micro-batches of 4 images": (BRIGHT, 1, ["--rollout.micro_batch_size=4"]),
    "10 x the learning rate: 2 processes": (FAST, 2, []),
    "10 x the learning rate: micro-batches of 4 images": (FAST, 1, ["--rollout.micro_batch_size=4"]),
}


@contextmanager
def recorded(folder):
    "Within this context the trainer notes in `folder`, epoch by epoch, what it draws, scores and credits."
    keys, noise, folder = [], [], Path(folder)
    own = {"rollout": Trainer.rollout, "compute_advantages": Trainer.compute_advantages}
    sample_noise, evaluate_before = vgpo.trainer.sample_noise, Session.evaluate_before
    folder.mkdir(parents=True, exist_ok=True)

    def save(name, accelerator, **arrays):
        np.savez(folder / f"{name}-{accelerator.process_index}.npz", **arrays)

    def noted_noise(*key):
        noise.append(sample_noise(*key))
        return noise[-1]

    def rollout(trainer, minibatch, pairs):
        batch = own["rollout"](trainer, minibatch, pairs)
        batch.path.group += FAR
        keys.extend(pairs)
        return batch

    def compute_advantages(trainer):
        result = own["compute_advantages"](trainer)

        def column(get):
            return np.concatenate([get(batch) for batch in trainer.batches])

        save(
            f"epoch-{trainer.epoch}", trainer.accelerator, key=keys, noise=np.stack(noise),
            start=column(lambda b: b.path.latents[:, 0]), prompt=column(lambda b: [row["prompt"] for row in b.rows]),
            group=column(lambda b: b.path.group), images=column(lambda b: b.images),
            rewards=column(lambda b: b.rewards), advantages=column(lambda b: b.advantages),
            weights=vector(trainer_state(trainer)[0]),
        )  # fmt: skip
        keys.clear(), noise.clear()
        return result

    def noted_evaluation(session):
        result = evaluate_before(session)
        prompts, scores = [row["prompt"] for row in result.rows], result.scores["reward"].scaled
        save("evaluation", session.accelerator, images=result.images, scaled=scores, prompt=prompts)
        return result

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(vgpo.trainer, "sample_noise", noted_noise))
        stack.enter_context(mock.patch.object(Session, "evaluate_before", noted_evaluation))
        stack.enter_context(mock.patch.multiple(Trainer, rollout=rollout, compute_advantages=compute_advantages))
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
    return vector(read_checkpoint(newest_valid(Path(run) / "checkpoints"))[0])


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
                    said = launch(count, [*SMALL, *words, f"--output_dir={path}"], path / "record").communicate()[0]
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
