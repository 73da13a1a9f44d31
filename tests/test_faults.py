"Every row of docs/faults.md on real processes: what is said, what is lost, and that a resumed run ends as if unbroken."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import stress
import yaml
from faults import DAMAGE, Driven, differences, ended


@pytest.fixture(scope="module")
def unbroken(tiny_folder, tmp_path_factory):
    "The outcome of a run to which nothing happened."
    run = Driven(tiny_folder, tmp_path_factory.mktemp("unbroken"))
    code, said = run.start()
    assert code == 0 and "report in" in said
    assert run.saved() == [4, 5]
    return run.outcome()


@pytest.fixture(scope="module")
def unbroken_pair(tiny_folder, tmp_path_factory):
    "The same of a run of two processes."
    run = Driven(tiny_folder, tmp_path_factory.mktemp("pair"), processes=2)
    assert run.start()[0] == [0, 0]
    return run.outcome()


@pytest.fixture(scope="module")
def killed(tiny_folder, tmp_path_factory):
    "A run with checkpoints of epochs 2 and 4, killed in the rollout of its last epoch."
    run = Driven(tiny_folder, tmp_path_factory.mktemp("killed"))
    assert run.start(("rollout", 10, "SIGKILL"))[0] == -9
    assert run.saved() == [2, 4]
    return run


@pytest.fixture
def run(tiny_folder, tmp_path):
    "A run that has not begun."
    return Driven(tiny_folder, tmp_path)


@pytest.fixture
def copy(killed, run):
    "A copy of the killed run."
    shutil.copytree(killed.folder, run.folder)
    return run


def contents(folder):
    "All files below a folder with their contents, but for the note of who held it last."
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".holder"}


def goes_on(run, outcome, code=0):
    "Resume a run, which must end like the unbroken one; what it says."
    found, said = run.resume()
    assert found == code, said
    assert differences(run.outcome(), outcome) == []
    return said


# --- killed ---


@pytest.mark.parametrize(
    "fault, logged, saved",
    [
        (("rollout", 8, "SIGKILL"), 3, [2]),  # in epoch 3, so one epoch after the checkpoint is repeated
        (("update", 15, "SIGKILL"), 3, [2]),
        (("log", 2, "SIGKILL"), 4, [2]),  # epochs 2 and 3 are logged but not saved
        (("save", 2, "SIGKILL"), 4, [2]),
        (("report", 1, "SIGKILL"), 5, [4, 5]),
        (("before", 1, "SIGKILL"), 0, []),  # half an evaluation is kept, and made again
    ],
)
def test_killed(run, unbroken, fault, logged, saved):
    code, said = run.start(fault)
    assert code == -9 and "go on" not in said
    assert run.logged() == logged and run.saved() == saved
    halves = [path.name for path in (run.folder / "checkpoints").glob("*.new")]
    assert halves == (["epoch-00004.new"] if fault[0] == "save" else [])
    if fault[0] == "log":
        with open(run.folder / "metrics.jsonl", "a") as log:
            log.write('{"epoch": 4, "rew')  # or killed a moment later, in the middle of a line
    goes_on(run, unbroken)
    assert not list((run.folder / "checkpoints").glob("*.new"))


def test_killed_before_the_first_checkpoint(run, unbroken):
    assert run.start(("rollout", 4, "SIGKILL"))[0] == -9
    assert run.logged() == 1 and run.saved() == []
    goes_on(run, unbroken)


def test_resumed_before_the_first_checkpoint_it_is_still_the_same_run(run, unbroken):
    assert run.start(("rollout", 1, "SIGKILL"))[0] == -9
    code, said = run.resume(more=("--seed=7", "--log_images_every=50"))
    assert code == 1 and "seed: 0 -> 7" in said and "log_images_every" not in said
    goes_on(run, unbroken)


@pytest.mark.parametrize("log", ["", '{"epoch": 0, "rew', '{"epoch": 1}\n{"epoch": 3}\n'])
def test_the_log_is_damaged(copy, unbroken, log):
    (copy.folder / "metrics.jsonl").write_text(log)
    goes_on(copy, unbroken)


def test_killed_before_there_is_a_recipe(run, unbroken):
    assert run.start(("config", 1, "SIGKILL"))[0] == -9
    code, said = run.resume()
    assert code == 1 and said == f"error: {run.folder} is not a run: it has no config.yaml"
    assert run.start(("rollout", 1, "SIGKILL"))[0] == -9  # begun anew, it takes the next name
    run.folder = run.folder.with_name("run-2")
    goes_on(run, unbroken)


# --- asked to stop ---


@pytest.mark.parametrize(
    "fault, saved",
    [
        (("rollout", 7, "SIGTERM"), [2, 3]),  # epoch 3 is dropped
        (("update", 15, "SIGINT"), [2, 4]),  # epoch 3 is finished
        (("save", 1, "SIGTERM"), [2]),
        (("reward", 1, "SIGINT"), [0]),  # in the evaluation before training
        (("rollout", 7, "SIGHUP"), [2, 3]),
        (("update", 15, "SIGHUP"), [2, 4]),
        (("save", 1, "SIGHUP"), [2]),
    ],
)
def test_asked_to_stop(run, unbroken, fault, saved):
    code, said = run.start(fault)
    assert code == 75 and "stopping: " in said
    assert said.splitlines()[-1] == f"stopped; {run.again(saved[-1])}"
    assert run.saved() == saved and run.logged() == saved[-1]
    goes_on(run, unbroken)


def test_asked_to_stop_while_the_model_is_loaded(run, unbroken):
    assert run.start(("load", 1, "SIGTERM")) == (75, "stopped before training began; start it again as you did")
    assert not run.folder.exists()
    assert run.start(("rollout", 3, "SIGKILL"))[0] == -9
    assert run.resume(("load", 1, "SIGINT"))[0] == 75
    goes_on(run, unbroken)


def test_asked_to_stop_with_its_terminal_gone(run, unbroken, tmp_path):
    "As by Ctrl-C in `python -m vgpo.train … | tee log`, which ends tee as well."
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vgpo.train", *run.options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while run.logged() < 1:
            assert process.poll() is None
            time.sleep(0.02)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
    assert run.saved()[-1] == run.logged()
    goes_on(run, unbroken)


def test_a_lost_connection_stops_a_run_but_for_nohup(run, unbroken, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vgpo.train", *run.options]

    def hang_up(*before):
        "Send SIGHUP to the program once it has logged an epoch; its exit code."
        with subprocess.Popen([*before, *command], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as process:  # fmt: skip
            while run.logged() < 1:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGHUP)
            return process.wait(120)

    assert hang_up() == 75 and run.saved()[-1] == run.logged() < 5
    goes_on(run, unbroken)
    shutil.rmtree(run.folder)
    assert hang_up("nohup") == 0  # it ignores the signal, and so does the program
    assert differences(run.outcome(), unbroken) == []


def test_asked_to_stop_when_all_is_trained(run, unbroken):
    code, said = run.start(("report", 1, "SIGTERM"))
    assert code == 0 and "report in" in said
    assert differences(run.outcome(), unbroken) == []


# --- the disk ---


@pytest.mark.parametrize("fault, saved", [(("save", 2, "full_disk"), [2]), (("report", 1, "full_disk"), [4, 5])])
def test_the_disk_is_full(run, unbroken, fault, saved):
    code, said = run.start(fault)
    assert code == 1, said
    last = said.splitlines()[-1]
    assert last.startswith("error: ") and "File too large" in last
    assert last.endswith(f"; make room, then {run.again(saved[-1])}")
    assert run.saved() == saved and not list((run.folder / "checkpoints").glob("*.new"))
    goes_on(run, unbroken)


@pytest.mark.parametrize("damage", [faults.cut, faults.flip, faults.lose])  # the others: test_checkpoint.py, stress.py
def test_the_newest_checkpoint_is_damaged(copy, unbroken, damage):
    path = copy.newest()
    damage(path)
    aside = path.with_name("epoch-00004.damaged")
    aside.mkdir()
    (aside / "state.json").write_text("set aside an earlier time")
    said = goes_on(copy, unbroken)
    assert (
        f"checkpoint {path} is damaged ({DAMAGE[damage]}) and was set aside; "
        "going on from epoch-00002, the newest that is whole"
    ) in said
    assert aside.is_dir() and path.is_dir()  # the one that was damaged, and the one that was written anew


def test_all_checkpoints_are_damaged(copy):
    for path in (copy.folder / "checkpoints").iterdir():
        faults.flip(path)
    before = contents(copy.folder)
    code, said = copy.resume()
    assert code == 1 and len(said.splitlines()) == 1
    assert said.startswith(
        f"error: checkpoint {copy.newest()} is damaged (state.safetensors is not what was written); "
    )
    assert said.endswith("; none is left that is whole: start the run anew, without --resume")
    assert contents(copy.folder) == before


# --- the reward, and the numbers ---


@pytest.mark.parametrize(
    "what, message",
    [
        ("raising", "failed on 4 images (first prompt '{prompt}'): RuntimeError: the reward is out"),
        ("hanging", "failed on 4 images (first prompt '{prompt}'): TimeoutError: no answer within 3.0 s: "),
        (
            "nan_score",
            "gave row 0, prompt '{prompt}', the raw score nan: raise an error where there",
        ),
        ("short", "returned raw scores of shape (3,) for 4 images: return one number per image"),
        ("outside", "gave row 0, prompt '{prompt}', the scaled score 1.0"),
    ],
)
def test_the_reward_fails(run, unbroken, what, message):
    run.options += ["--rollout.reward_timeout=3"]
    code, said = run.start(("reward", 9, what))
    assert code == 1, said
    error, again = said.splitlines()[-2:]
    start, _, rest = message.partition("{prompt}")
    assert error.startswith(f"error: reward 'tiny_rewards:brightness' {start}") and rest in error
    assert again == run.again(3) and run.saved() == [2, 3] and run.logged() == 3
    if what in ("raising", "hanging"):  # all five leave the same behind
        goes_on(run, unbroken)


def test_the_loss_is_not_finite(run, unbroken):
    code, said = run.start(("loss", 13, "nan_loss"), ("loss", 15, "nan_loss"))
    error, again = said.splitlines()[-2:]
    assert code == 1 and error.startswith(
        "error: 2 updates in a row had a non-finite loss or gradient; lower optim.lr, "
    )
    assert "or raise objective.clip_range, and start again, or resume from the last checkpoint" in error
    assert run.saved() == [2] and again == run.again(2)
    goes_on(run, unbroken)


def test_a_single_update_is_skipped_and_counted(run):
    code, said = run.start(("loss", 13, "nan_loss"))
    assert code == 0, said
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["nonfinite_updates"] for row in rows] == [0, 0, 0, 1, 1]
    assert run.outcome()["skipped"] == 1


# --- two processes ---


@pytest.fixture
def pair(tiny_folder, tmp_path):
    "A run of two processes that has not begun; the last one has the faults."
    return Driven(tiny_folder, tmp_path, processes=2)


def goes_on_together(pair, outcome):
    "Resume a run of two processes, which must end like the unbroken one."
    codes, said = pair.resume()
    assert codes == [0, 0], said
    assert differences(pair.outcome(), outcome) == []


def test_one_of_two_dies(pair, unbroken_pair):
    codes, said = pair.start(("rollout", 7, "SIGKILL"))  # and the other one ends in a bounded time
    assert codes == [1, -9] and "Connection closed by peer" in said, said
    assert pair.saved() == [2]
    goes_on_together(pair, unbroken_pair)


def test_the_reward_fails_in_one_of_two(pair, unbroken_pair):
    codes, said = pair.start(("reward", 9, "raising"))
    assert codes == [1, 1] and said.count("the reward is out") == 1, said
    assert pair.saved() == [2, 3] and pair.again(3) in said
    goes_on_together(pair, unbroken_pair)


def test_one_of_two_is_asked_to_stop(pair, unbroken_pair):
    codes, said = pair.start(("update", 15, "SIGTERM"))  # the other one finds out when epoch 3 is finished
    assert codes == [75, 75], said
    assert pair.saved() == [2, 4] and f"stopped; {pair.again(4)}" in said
    goes_on_together(pair, unbroken_pair)


def test_under_torchrun(pair, unbroken_pair):
    "Real processes of a real launcher: one is asked to stop, then one is killed, then all goes well."
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}

    def torchrun(fault, *argv):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", faults.__file__]
        done = subprocess.run(
            [*command, json.dumps([fault]), *argv], env=environment, capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    code, said = torchrun(("rollout", 7, "SIGTERM"), *pair.options)
    assert code == 1 and "exitcode  : 75" in said and f"stopped; {pair.again(3)}" in said
    assert pair.saved() == [2, 3]
    code, said = torchrun(("update", 2, "SIGKILL"), "--resume", str(pair.folder))
    assert code == 1 and "exitcode  : -9" in said
    assert pair.saved() == [2, 3]
    goes_on_together(pair, unbroken_pair)


# --- who may go on, and with which recipe ---


def test_two_on_one_folder(run, unbroken):
    first = run.launched(run.options, ("rollout", 4, "hanging"))
    try:
        deadline = time.monotonic() + 60
        while run.logged() < 1:
            assert first[0].is_alive() and time.monotonic() < deadline, run.text()
            time.sleep(0.05)
        code, said = run.resume()
        assert code == 1 and f"error: {run.folder} is in use by process {first[0].pid} on " in said
        assert said.endswith("; wait for it, or stop it")
    finally:
        first[0].kill()
    assert ended(first, 10) == [-9]
    goes_on(run, unbroken)  # the lock of the dead is no lock


def test_two_start_with_one_name(tiny_folder, tmp_path, unbroken):
    one, other = Driven(tiny_folder, tmp_path), Driven(tiny_folder, tmp_path)
    other.said = tmp_path / "other.txt"
    assert ended([*one.launched(one.options), *other.launched(other.options)], 120) == [0, 0]
    other.folder = tmp_path / "run-2"
    assert differences(one.outcome(), unbroken) == differences(other.outcome(), unbroken) == []


def test_resumed_with_another_recipe(copy):
    before = contents(copy.folder)
    code, said = copy.resume(more=["--optim.lr=0.01", "--rollout.group_size=4", "--save_every=1"])
    assert code == 1 and said == (
        "error: the recipe is not that of the checkpoint: rollout.group_size: 2 -> 4; optim.lr: 0.001 -> 0.01; "
        "put it back to resume, or start another run, without --resume"
    )
    recipe = yaml.safe_load((copy.folder / "config.yaml").read_text())
    recipe["seed"] = 7
    (copy.folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    code, said = copy.resume()
    assert code == 1 and "seed: 0 -> 7; put it back" in said
    (copy.folder / "config.yaml").write_bytes(before[copy.folder / "config.yaml"])
    assert contents(copy.folder) == before


def test_resumed_with_harmless_changes(copy, unbroken):
    code, said = copy.resume(("rollout", 1, "SIGKILL"), more=["--save_every=1", "--rollout.reward_timeout=50"])
    assert code == -9
    assert "changed: save_every: 2 -> 1" in said and "changed: rollout.reward_timeout: 600.0 -> 50.0" in said
    assert yaml.safe_load((copy.folder / "config.yaml").read_text())["save_every"] == 1
    goes_on(copy, unbroken)


# --- at random ---


def test_stress_notices_a_loss(killed, monkeypatch):
    "A checkpoint that went back, and a stop that left an epoch unsaved."
    with pytest.raises(stress.Lost, match="4 saved"):
        stress.check(killed, "SIGKILL in update", [-9], before=5, logged=5)
    monkeypatch.setattr(killed, "logged", lambda: 3)
    with pytest.raises(stress.Lost, match="exit codes .75., 3 epochs logged"):
        stress.check(killed, "SIGTERM at any time", [75], before=2, logged=2)
