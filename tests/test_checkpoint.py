import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import vgpo.runs.checkpoint
from vgpo.files import atomic_write, put_folder
from vgpo.runs.checkpoint import checkpoints, newest_valid, read_checkpoint, replace_folder, save_checkpoint


class Killed(BaseException):
    "Stands for a kill: no `except Exception` catches it."


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    "These tests kill a process, not the power: what is written stays written, so nobody has to wait for the disk."
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def save_epoch(folder, epoch, **more):
    return save_checkpoint(folder, {"weight": torch.full((2,), float(epoch))}, {"epoch": epoch}, **more)


def epoch_of(folder):
    "The epoch of the checkpoint that is found in a folder; tensors and state must be of the same one."
    tensors, state = read_checkpoint(newest_valid(folder))
    assert torch.equal(tensors["weight"], torch.full((2,), float(state["epoch"])))
    return state["epoch"]


def kill_at(monkeypatch, n, action):
    "Whether `action` is killed at the n-th call that changes the disk; files may be left half-written."
    calls = 0

    def guard(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == n:
                if real is save_file:
                    Path(args[1]).write_bytes(b"half")
                if real is write_text:
                    write_text(args[0], args[1][:5])
                raise Killed
            return real(*args, **kwargs)

        return call

    save_file, write_text = vgpo.runs.checkpoint.save_file, Path.write_text
    with monkeypatch.context() as patch:
        patch.setattr(vgpo.runs.checkpoint, "save_file", guard(save_file))
        for where, name in (
            (Path, "mkdir"),
            (Path, "write_text"),
            (Path, "rename"),
            (os, "fsync"),
            (shutil, "rmtree"),
        ):
            patch.setattr(where, name, guard(getattr(where, name)))
        try:
            action()
        except Killed:
            return True
    return False


def clean_start(folder):
    save_epoch(folder, 1)


def half_a_new_one(folder):
    save_epoch(folder, 1)
    (folder / "epoch-00002.new").mkdir()
    (folder / "epoch-00002.new" / "state.json").write_text("{")


def the_same_epoch_before(folder):
    save_epoch(folder, 1)
    save_epoch(folder, 2)


@pytest.mark.parametrize("start", [clean_start, half_a_new_one, the_same_epoch_before])
def test_a_kill_leaves_the_old_one_or_the_new_one(monkeypatch, tmp_path, start):
    found = []
    for n in range(1, 100):
        folder = tmp_path / str(n)
        start(folder)
        killed = kill_at(monkeypatch, n, lambda folder=folder: save_epoch(folder, 2))
        found.append(epoch_of(folder))
        save_epoch(folder, 3, keep=1)  # and the run that comes back can save
        assert epoch_of(folder) == 3 and [p.name for p in folder.iterdir()] == ["epoch-00003"]
        if not killed:
            break
    assert n > 8 and found[-1] == 2 and set(found) <= {1, 2}
    if start is not the_same_epoch_before:
        assert found[0] == 1 and found == sorted(found)


def test_two_kills_in_a_row(monkeypatch, tmp_path):
    "Every pair of deaths, of a save and of the save that follows it, with a single checkpoint kept."
    pairs = 0
    for first in range(1, 13):
        for second in range(1, 14):
            folder = tmp_path / f"{first}-{second}"
            save_epoch(folder, 1)
            kill_at(monkeypatch, first, lambda folder=folder: save_epoch(folder, 2, keep=1))
            kept = epoch_of(folder)
            kill_at(monkeypatch, second, lambda folder=folder: save_epoch(folder, 3, keep=1))
            assert epoch_of(folder) in (kept, 3)
            pairs += 1
    assert pairs == 12 * 13


def test_a_kill_leaves_one_of_the_best(monkeypatch, tmp_path):
    for n in range(1, 100):
        folder = tmp_path / str(n)

        def replaced(epoch, folder=folder):
            (folder / "new").mkdir(parents=True, exist_ok=True)
            (folder / "new" / "weights").write_text(f"those of epoch {epoch}")
            replace_folder(folder / "new", folder / f"epoch-{epoch}")

        replaced(1)
        killed = kill_at(monkeypatch, n, lambda: replaced(2))
        found = {path.name[6:]: (path / "weights").read_text() for path in folder.glob("epoch-*")}
        assert found and all(text == f"those of epoch {epoch}" for epoch, text in found.items())
        replaced(3)
        assert [path.name for path in folder.iterdir()] == ["epoch-3"]
        if not killed:
            break
    assert n > 5 and list(found) == ["2"]


def test_the_newest_are_kept(tmp_path):
    for epoch in (1, 3, 20, 100000):
        save_epoch(tmp_path, epoch, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["epoch-100000", "epoch-00020", "epoch-00003"]


def test_round_trip_to_the_last_bit(tmp_path):
    base = torch.randn(6, 4)
    tensors = {
        "weight": base.t(),  # not contiguous
        "half": base.to(torch.bfloat16),
        "step": torch.tensor(3.0),
        "count": torch.tensor([2**40]),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "trained": base.clone().requires_grad_(),
    }
    state = {"epoch": 2, "seconds": 1 / 3, "name": "σ", "none": None, "list": [1, 2.5]}
    path = save_checkpoint(tmp_path / "deep" / "run", tensors, state, also=lambda p: (p / "more").write_text("x"))
    assert path == newest_valid(tmp_path / "deep" / "run")
    loaded, same = read_checkpoint(path)
    assert same == state and set(loaded) == set(tensors)
    for key, value in tensors.items():
        torch.testing.assert_close(loaded[key], value.detach(), rtol=0, atol=0, equal_nan=True)
    assert {p.name for p in path.iterdir()} == {"state.safetensors", "state.json", "more", "SHA256SUMS"}


def test_sha256sum_agrees(tmp_path):
    path = save_epoch(tmp_path, 1, also=lambda p: (p / "lora").mkdir() or (p / "lora" / "w").write_bytes(b"123"))
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("there is no sha256sum here")
    check = subprocess.run([tool, "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
    assert check.returncode == 0 and check.stdout.count(": OK") == 3


def test_what_cannot_be_saved_leaves_the_old_one(tmp_path):
    save_epoch(tmp_path, 1)
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(tmp_path, {"weight": torch.zeros(2)}, {"epoch": 2, "odd": object()})
    assert epoch_of(tmp_path) == 1 and [p.name for p in tmp_path.iterdir()] == ["epoch-00001"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def garbage(path):
    path.write_bytes(b"\xff\xfe garbage")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "SHA256SUMS", "lora.bin"])
@pytest.mark.parametrize("change", [cut, garbage, flip, Path.unlink])
def test_the_one_before_a_damaged_one_is_used_and_the_damage_named(tmp_path, name, change):
    def more(path):
        (path / "lora.bin").write_bytes(b"0123456789")

    for epoch in (1, 2, 3):
        save_epoch(tmp_path, epoch, keep=3, also=more)
    for epoch in (2, 3):
        change(tmp_path / f"epoch-{epoch:05d}" / name)
    says = r"epoch-0000[23] is damaged \(.*\) and was set aside; .* epoch-00001"
    with pytest.warns(UserWarning, match=says) as caught:
        assert epoch_of(tmp_path) == 1
    assert len(caught) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-00001", "epoch-00002.damaged", "epoch-00003.damaged"]
    save_epoch(tmp_path, 2)  # the run comes by again
    assert epoch_of(tmp_path) == 2


def test_a_file_that_cannot_be_read_counts_as_damaged(tmp_path):
    save_epoch(tmp_path, 1)
    path = save_epoch(tmp_path, 2) / "state.safetensors"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # reading it is an I/O error, as of a bad sector
    with pytest.warns(UserWarning, match="state.safetensors cannot be read: Input/output error"):
        assert epoch_of(tmp_path) == 1


def test_nothing_whole_is_an_error_and_nothing_at_all_is_a_beginning(tmp_path):
    assert newest_valid(tmp_path) is None and newest_valid(tmp_path / "nowhere") is None
    for epoch in (1, 2):
        flip(save_epoch(tmp_path, epoch) / "state.json")
    with pytest.raises(ValueError, match="none is left that is whole: start the run anew") as caught:
        newest_valid(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(checkpoints(tmp_path)) == 2  # nobody touched them


def test_text_is_replaced_whole(monkeypatch, tmp_path):
    path = tmp_path / "log"
    atomic_write(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        atomic_write(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("n", range(1, 12))
def test_a_folder_that_is_put_is_never_half_there(n, tmp_path, monkeypatch):
    def write(text):
        (tmp_path / "fresh").mkdir(exist_ok=True)
        for name in "ab":
            (tmp_path / "fresh" / name).write_text(text)

    write("old")
    put_folder(tmp_path / "fresh", tmp_path / "final")
    write("new")
    kill_at(monkeypatch, n, lambda: put_folder(tmp_path / "fresh", tmp_path / "final"))
    whole = [{(folder / name).read_text() for name in "ab"} for folder in tmp_path.iterdir() if folder.name != "fresh"]
    assert whole and all(texts in ({"old"}, {"new"}) for texts in whole)  # and never a folder of both
    write("newer")
    put_folder(tmp_path / "fresh", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"] and (tmp_path / "final" / "a").read_text() == "newer"
