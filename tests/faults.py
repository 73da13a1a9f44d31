"""The training program with faults in it, in processes of its own: what tests/test_faults.py and tests/stress.py share.

A fault is (moment, n, what): at the n-th call of the function that the moment stands for, `what` happens. The processes
are forked from one that has imported everything, so that each costs the time of its epochs and not that of its imports;
`python tests/faults.py FAULTS OPTIONS` is the same program for a launcher, FAULTS being a JSON list.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from pkgutil import iter_modules

import vgpo

MOMENTS = {
    "load": ("vgpo.runs.session", "load_policy"),
    "config": ("vgpo.train", "save_config"),  # the folder is made, config.yaml is not
    "before": ("vgpo.evaluation.scores", "save_file"),  # the evaluation before training is made, but not kept yet
    "rollout": ("vgpo.trainer", "Trainer.rollout"),
    "reward": ("tiny_rewards", "brightness"),  # its first call scores the held-out images before training
    "update": ("vgpo.trainer", "Trainer.backward"),
    "loss": ("vgpo.objectives.clipped", "ClippedSurrogate.loss"),
    "log": ("vgpo.runs.session", "Session.save"),  # its epochs are logged, but not saved yet
    "save": ("vgpo.runs.checkpoint", "save_file"),
    "report": ("vgpo.runs.session", "write_report"),
}
OPTIONS = [
    *("--rollout.prompts_per_epoch=2", "--rollout.group_size=2", "--rollout.num_inference_steps=3", "--window.size=2"),
    *("--credit.num_scored_steps=2", "--rollout.micro_batch_size=2", "--evaluation.num_samples=2"),
    *("--evaluation.num_inference_steps=1", "--reward=tiny_rewards:brightness", "--log_images_every=100"),
    *("--save_every=2", "--epochs=5", "--optim.num_minibatches=2", "--optim.lr=1e-3", "--optim.lr_scheduler=constant"),
    *("--objective.clip_range=1e-3", "--optim.ema_decay=0.9", "--optim.max_nonfinite_updates=2"),
    *("--model.lora_rank=4", "--name=run"),
]  # epoch e makes rollouts 2e + 1 and 2e + 2, and terms 4e + 1 to 4e + 4 of its updates, in each process
PRELOAD = [
    *("vgpo.train", "matplotlib.pyplot", "torch.utils.tensorboard", "docstring_parser", "onnxruntime"),
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    *(f"vgpo.{package}.{module.name}" for package in ("rewards", "credit", "objectives", "prompts")
      for module in iter_modules([str(Path(vgpo.__file__).parent / package)])),
]  # fmt: skip
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


# --- faults ---


def sending(number):
    "What sends this process a signal; if it survives, it goes on. A tensor file that is being written is half written."

    def what(real, *args, **kwargs):
        if real.__name__ == "save_file":
            real(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    return what


def raising(real, *args, **kwargs):
    raise RuntimeError("the reward is out")


def hanging(real, *args, **kwargs):
    time.sleep(1000)


def nan_score(real, *args, **kwargs):
    return real(*args, **kwargs) * float("nan")


def short(real, *args, **kwargs):
    return real(*args, **kwargs)[1:]


def outside(real, *args, **kwargs):
    return real(*args, **kwargs) + 1


def nan_loss(real, *args, **kwargs):
    loss, stats = real(*args, **kwargs)
    return loss * float("nan"), stats


def full_disk(real, *args, **kwargs):
    "From now on, writing to a file beyond its first 20 kB fails."
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
    return real(*args, **kwargs)


WHAT = {f.__name__: f for f in (raising, hanging, nan_score, short, outside, nan_loss, full_disk)}
WHAT |= {name: sending(getattr(signal, name)) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")}


def prepare(moment, n, what):
    "Let `what` happen at the n-th call of a moment's function."
    module, (*owner, name) = importlib.import_module(MOMENTS[moment][0]), MOMENTS[moment][1].split(".")
    where, calls = getattr(module, owner[0]) if owner else module, 0
    real = getattr(where, name)

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        return WHAT[what](real, *args, **kwargs) if calls == n else real(*args, **kwargs)

    call.__name__ = name
    setattr(where, name, call)


# --- processes ---


def program(faults, argv):
    "The training program with faults."
    import torch
    from tqdm import tqdm

    from vgpo.train import main

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is shared with other processes, and dies with them
    for fault in faults:
        prepare(*fault)
    main(argv)


def child(said, environment, faults, argv):
    "A process of the training program, which says everything to a file."
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= environment
    code = 0
    try:
        program(faults, argv)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        print(e.code if code == 1 else "", flush=True)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.exit(code)


def free_port():
    "A port that nobody listens at."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(argv, said, *faults, processes=1, faulty=-1):
    "Start the program in so many processes, as srun does; process number `faulty`, the last one, has the faults."
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(processes):
        own = faults if rank == faulty % processes else ()
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        started.append(context.Process(target=child, args=(str(said), environment, own, argv), daemon=True))
        started[-1].start()
    return started


def ended(processes, seconds):
    "The exit codes of processes, which must end within so many seconds."
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    if late:
        raise TimeoutError(f"{len(late)} of {len(processes)} processes did not end within {seconds} s")
    return [process.exitcode for process in processes]


class Driven:
    "A run of the program `OPTIONS` in `folder`/run, driven through faults."

    def __init__(self, model, folder, *more, processes=1):
        self.options = [*OPTIONS, f"--model.path={model}", f"--output_dir={folder}", *more]
        self.folder, self.said, self.processes = folder / "run", folder / "said.txt", processes
        folder.mkdir(parents=True, exist_ok=True)

    def launched(self, argv, *faults, **how):
        "The processes of the program with these arguments, just started; what was said before is forgotten."
        self.said.unlink(missing_ok=True)
        return launch(argv, self.said, *faults, processes=self.processes, **how)

    def start(self, *faults, **how):
        "Begin the run; the exit codes and the text of `drive`."
        return self.drive(self.options, *faults, **how)

    def resume(self, *faults, more=(), **how):
        "Go on with the run; the exit codes and the text of `drive`."
        return self.drive(["--resume", str(self.folder), *more], *faults, **how)

    def drive(self, argv, *faults, seconds=300, **how):
        "The exit code, a list of them for several processes, and what was said but for the progress bar."
        codes = ended(self.launched(argv, *faults, **how), seconds)
        return codes[0] if self.processes == 1 else codes, self.text()

    def text(self):
        "What was said, without the progress bar."
        said = self.said.read_text() if self.said.exists() else ""
        lines = re.sub(r"epochs: +\d+%[^\]]*\]", "\n", said.replace("\r", "\n")).splitlines()
        return "\n".join(line for line in lines if line.strip())

    def again(self, epoch):
        "The line that says how to go on."
        return f"go on from epoch {epoch} with: python -m vgpo.train --resume {self.folder}"

    def saved(self):
        "The epochs whose checkpoints are there, the newest last, whole or not."
        return sorted(int(path.name[6:]) for path in (self.folder / "checkpoints").glob("epoch-*[0-9]"))

    def logged(self):
        "How many epochs are logged."
        log = self.folder / "metrics.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def newest(self):
        "The folder of the newest checkpoint, whole or not."
        return self.folder / "checkpoints" / f"epoch-{self.saved()[-1]:05d}"

    def outcome(self):
        "All that two runs must have in common, to the last bit: {name: digest or values}."
        from safetensors.torch import load_file

        state = json.loads((self.newest() / "state.json").read_text())
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        result = {key: state[key] for key in ("epoch", "updates", "ema_steps")}
        result["skipped"] = state["callbacks"]["SkipNonFinite"]["total"]
        for key in ("epoch", "reward", "raw", "reward_by_step", "grad_norm", "approx_kl"):
            result[f"{key} in metrics.jsonl"] = [row[key] for row in rows]
        for path in (self.folder / "lora" / "pytorch_lora_weights.safetensors", self.newest() / "state.safetensors"):
            for name, tensor in load_file(path).items():
                result[f"{name} in {path.name}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        return result


def differences(one, other):
    "The names of what differs between two outcomes."
    return [key for key in one.keys() | other.keys() if key not in one or key not in other or one[key] != other[key]]


# --- damage to a checkpoint ---


def cut(path):
    os.truncate(path / "state.safetensors", (path / "state.safetensors").stat().st_size // 2)


def flip(path):
    data = bytearray((path / "state.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.safetensors").write_bytes(data)


def edit(path):
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"updates": ', '"updates": 1'))


def lose(path):
    (path / "state.json").unlink()


def lose_sums(path):
    (path / "SHA256SUMS").unlink()


def lose_lora(path):
    shutil.rmtree(path / "lora")


DAMAGE = {  # what a run says of it
    cut: "state.safetensors is not what was written",
    flip: "state.safetensors is not what was written",
    edit: "state.json is not what was written",
    lose: "state.json is missing",
    lose_sums: "SHA256SUMS cannot be read: FileNotFoundError",
    lose_lora: "lora/pytorch_lora_weights.safetensors is missing",
}

if __name__ == "__main__":
    program(json.loads(sys.argv[1]) if os.environ.get("RANK") == "1" else [], sys.argv[2:])
