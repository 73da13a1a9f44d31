"""`make stress`: faults at random moments, for as long as you like, and a table of what became of them.

Runs of one and of two processes are killed, stopped, starved of disk and damaged at moments that a seeded generator
draws, resumed until they are finished, and compared with an unbroken run to the last bit. The exit code is 1 if
anything was lost: an epoch that a checkpoint held, a run that cannot go on or ends otherwise, a process that hangs, an
exit code that does not say what happened.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}

from faults import DAMAGE, Driven, differences, ended  # noqa: E402

EPOCHS, EVERY = 6, 2  # of a run, and of its checkpoints
AIMED = {  # moment: its calls in an epoch, those besides, and what may happen there
    "rollout": (2, 0, ("SIGKILL", "SIGTERM", "SIGINT", "full_disk")),
    "update": (4, 0, ("SIGKILL", "SIGTERM", "SIGINT", "full_disk")),
    "save": (1 / EVERY, 0, ("SIGKILL", "SIGTERM", "full_disk")),
    "log": (1 / EVERY, 0, ("SIGKILL",)),
    "report": (0, 1, ("SIGKILL", "SIGTERM", "full_disk")),
    "config": (0, 1, ("SIGKILL",)),
    "before": (0, 1, ("SIGKILL", "SIGTERM")),
    "reward": (2, 2, ("raising", "nan_score", "short", "outside")),
}
TRAINING = "images per epoch"  # what a program says when it has met the others and made or restored its run


class Lost(Exception):
    "Something that must not happen."


def whole_epochs(run):
    "The epochs of a run's whole checkpoints; a run that was stopped at once has one of epoch 0."
    from vgpo.runs.checkpoint import checkpoints, defect

    return [int(path.name[6:]) for path in checkpoints(run.folder / "checkpoints") if not defect(path)]


def whole(run):
    "The epoch of a run's newest whole checkpoint, 0 if there is none."
    return max(whole_epochs(run), default=0)


def arguments(run):
    "The command line that begins a run, or goes on with it."
    if (run.folder / "config.yaml").exists():
        return ["--resume", str(run.folder)]
    shutil.rmtree(run.folder, ignore_errors=True)  # killed before it was a run: its name is given back
    return run.options


def exit_codes(run, processes):
    "The exit codes of processes, which must end; one that waits, at the start, for another that is dead is killed."
    deadline = time.monotonic() + 300
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
        if any(p.exitcode for p in processes) and TRAINING not in run.text():
            deadline = min(deadline, time.monotonic() + 20)
    waiting = [p for p in processes if p.is_alive()]
    if waiting and TRAINING not in run.text():
        for p in waiting:
            p.kill()  # as a launcher does
    return ended(processes, 1)


def aimed(run, rng):
    "A fault at a call of a function: (its name, exit codes)."
    left = {key: int(each * (EPOCHS - whole(run)) + besides) for key, (each, besides, _) in AIMED.items()}
    moment = rng.choice([key for key in AIMED if left[key]])
    what = rng.choice(AIMED[moment][-1])
    fault = (moment, rng.randint(1, left[moment]), what)
    faulty = (
        0 if moment in ("save", "report", "config", "before") else rng.randrange(run.processes)
    )  # only the first one writes
    name = f"{what} in {moment}" if what.startswith("SIG") else what
    return name, exit_codes(run, run.launched(arguments(run), fault, faulty=faulty))


def at_any_time(run, rng, seconds):
    "A signal to one process, at any time: (its name, exit codes)."
    number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    processes = run.launched(arguments(run))
    rng.choice(processes).join(rng.uniform(0, seconds))
    victim = rng.choice(processes)
    if victim.is_alive():
        os.kill(victim.pid, number)
    return f"{number.name} at any time", exit_codes(run, processes)


def damaged(run, rng):
    "Damage to the newest of two checkpoints: (its name, exit codes)."
    change = rng.choice(list(DAMAGE))
    change(run.newest())
    return "damaged checkpoint", [0] * run.processes


def strike(run, rng, seconds):
    "One fault of any kind, and what must hold after it: (its name, whether it struck, epochs to repeat)."
    before, logged = whole(run), run.logged()
    can_damage = len(run.saved()) > 1 and whole(run) == run.saved()[-1]
    kind = rng.choice(["aimed", "any", "damaged"] if can_damage else ["aimed", "any"])
    if kind == "damaged":
        name, codes = damaged(run, rng)
        if not whole_epochs(run):
            raise Lost(f"{name}: no checkpoint is whole")
        return name, True, before - whole(run)
    name, codes = aimed(run, rng) if kind == "aimed" else at_any_time(run, rng, seconds)
    check(run, name, codes, before, logged)
    return name, any(codes), max(0, run.logged() - whole(run)) if any(codes) else 0


def check(run, name, codes, before, logged):
    "Raise Lost unless a run's exit codes and its checkpoints are as docs/faults.md says."
    idle = run.logged() <= max(before, logged) or (run.folder / "report.md").exists()  # before training, or after it
    said = f"{name}: exit codes {codes}, {run.logged()} epochs logged (before: {logged}), {whole(run)} saved ({before})"
    if whole(run) < before or run.logged() - whole(run) > max(EVERY, logged - before):
        raise Lost(said)
    stopped = 75 in codes and "stopped before training began" not in run.text()  # then there was nothing to save
    if (stopped or name in AIMED["reward"][-1] and any(codes)) and run.logged() != whole(run):
        raise Lost(said)
    if name.startswith(("SIGTERM", "SIGINT")) and set(codes) not in ({0}, {75}) and not idle:
        raise Lost(f"{said}: {run.text()[-600:]}")


def finish(run, truth):
    "Let a run go on to its end without a fault, and compare it with the unbroken one."
    codes = exit_codes(run, run.launched(arguments(run)))
    if any(codes):
        raise Lost(f"it did not go on: exit codes {codes}: {run.text()[-600:]}")
    if wrong := differences(run.outcome(), truth):
        raise Lost(f"{len(wrong)} of {len(truth)} outcomes differ from the unbroken run's: {wrong[:3]}")


def tiny_model(folder):
    "A pipeline of the tiny world's shape with random weights."
    import torch

    from vgpo.policies.loading import quiet
    from vgpo.world.pretrain import make_autoencoder, make_pipeline

    quiet()
    torch.manual_seed(0)
    pipe = make_pipeline(make_autoencoder())
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    pipe.save_pretrained(folder)
    return folder


def unbroken(model, folder, processes):
    "The outcome of a run without faults, and the seconds that it took."
    run, begin = Driven(model, folder, f"--epochs={EPOCHS}", processes=processes), time.monotonic()
    codes = run.start()[0]
    if codes not in (0, [0, 0]):
        raise SystemExit(f"error: a run without faults ended with {codes}: {run.text()}")
    return run.outcome(), time.monotonic() - begin


def one_run(run, rng, truth, seconds, table):
    "A run with up to six faults in a row, entered into the table and said as they happen."
    name = "no fault"
    print(f"{run.processes} process(es):", end="", flush=True)
    try:
        for _ in range(rng.randint(1, 6)):
            name, struck, repeated = strike(run, rng, seconds)
            if not struck:
                break  # it came to its end before
            print(f" {name},", end="", flush=True)
            table["survived", name] += 1
            table["repeated", name] += repeated
        finish(run, truth)
    except (Lost, TimeoutError) as e:
        table["lost", name] += 1
        print(f"LOST in {run.folder}, after {name}: {e}", flush=True)
    else:
        print(" and it ended like the unbroken run", flush=True)
        shutil.rmtree(run.folder.parent)


def show(table, runs, begin):
    "The table, and its sum."
    print(f"\n{'fault':<24}{'survived':>10}{'epochs repeated':>17}{'lost':>6}")
    for name in sorted({name for _, name in table}):
        print(f"{name:<24}{table['survived', name]:>10}{table['repeated', name]:>17}{table['lost', name]:>6}")
    survived, lost = (sum(n for (key, _), n in table.items() if key == k) for k in ("survived", "lost"))
    print(f"{survived} faults in {runs} runs in {(time.monotonic() - begin) / 60:.1f} minutes, {lost} with a loss")
    return lost


def main(argv=None):
    "The program."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="begin no run after so many minutes")
    parser.add_argument("--runs", type=int, default=10**9, help="end after so many runs")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the faults and their moments")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of the runs, in turn")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    print(f"seed {options.seed}", flush=True)
    rng, folder, table, runs = random.Random(options.seed), Path(tempfile.mkdtemp()), Counter(), 0
    model, begin = tiny_model(folder / "model"), time.monotonic()
    truth = {n: unbroken(model, folder / f"unbroken-{n}", n) for n in options.processes}
    while runs < options.runs and time.monotonic() - begin < 60 * options.minutes:
        processes = options.processes[runs % len(options.processes)]
        runs += 1
        run = Driven(model, folder / f"{runs}", f"--epochs={EPOCHS}", processes=processes)
        one_run(run, rng, *truth[processes], table)
    lost = show(table, runs, begin)
    if not lost:
        shutil.rmtree(folder)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
