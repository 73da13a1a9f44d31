import os
import shutil
from pathlib import Path

import pytest
import torch

import vgpo.checkpoint
from vgpo.checkpoint import load_checkpoint, save_checkpoint


class Killed(BaseException):
    "Stands for a kill: no `except Exception` catches it."


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    "These tests kill a process, not the power: what is written stays written, so nobody has to wait for the disk."
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def save_epoch(folder, epoch):
    save_checkpoint(folder, {"weight": torch.full((2,), float(epoch))}, {"epoch": epoch})


def epoch_of(folder):
    "The epoch of the checkpoint in a folder; tensors and state must be of the same one."
    tensors, state = load_checkpoint(folder)
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

    save_file, write_text = vgpo.checkpoint.save_file, Path.write_text
    with monkeypatch.context() as patch:
        patch.setattr(vgpo.checkpoint, "save_file", guard(save_file))
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


def between_the_renames(folder):
    save_epoch(folder, 1)
    shutil.copytree(folder, folder.with_name("last.new"))
    folder.rename(folder.with_name("last.old"))


def half_a_new_one(folder):
    save_epoch(folder, 1)
    folder.with_name("last.new").mkdir()
    (folder.with_name("last.new") / "state.json").write_text("{")


def before_the_old_one_went(folder):
    save_epoch(folder, 1)
    shutil.copytree(folder, folder.with_name("last.old"))


@pytest.mark.parametrize("start", [clean_start, between_the_renames, half_a_new_one, before_the_old_one_went])
def test_a_kill_leaves_the_old_one_or_the_new_one(monkeypatch, tmp_path, start):
    found = []
    for n in range(1, 100):
        folder = tmp_path / str(n) / "last"
        start(folder)
        killed = kill_at(monkeypatch, n, lambda folder=folder: save_epoch(folder, 2))
        found.append(epoch_of(folder))
        save_epoch(folder, 3)  # and the run that comes back can save
        assert epoch_of(folder) == 3 and [p.name for p in folder.parent.iterdir()] == ["last"]
        if not killed:
            break
    assert n > 8 and found[0] == 1 and found[-1] == 2 and found == sorted(found)


def test_two_kills_in_a_row(monkeypatch, tmp_path):
    "Every pair of deaths, of a save and of the save that follows it."
    pairs = 0
    for first in range(1, 14):
        for second in range(1, 15):
            folder = tmp_path / f"{first}-{second}" / "last"
            save_epoch(folder, 1)
            kill_at(monkeypatch, first, lambda folder=folder: save_epoch(folder, 2))
            kept = epoch_of(folder)
            kill_at(monkeypatch, second, lambda folder=folder: save_epoch(folder, 3))
            assert epoch_of(folder) in (kept, 3)
            pairs += 1
    assert pairs == 13 * 14


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
    save_checkpoint(tmp_path / "deep" / "last", tensors, state)
    loaded, same = load_checkpoint(str(tmp_path / "deep" / "last"))
    assert same == state and set(loaded) == set(tensors)
    for key, value in tensors.items():
        torch.testing.assert_close(loaded[key], value.detach(), rtol=0, atol=0, equal_nan=True)
    files = {p.name for p in (tmp_path / "deep" / "last").iterdir()}
    assert files == {"state.safetensors", "state.json"}  # nothing pickles


def test_what_cannot_be_saved_leaves_the_old_one(tmp_path):
    save_epoch(tmp_path / "last", 1)
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(tmp_path / "last", {"weight": torch.zeros(2)}, {"epoch": object()})
    assert epoch_of(tmp_path / "last") == 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def garbage(path):
    path.write_bytes(b"\xff\xfe garbage")


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("change", [cut, garbage, Path.unlink])
def test_damage_is_named(tmp_path, name, change):
    save_epoch(tmp_path / "last", 1)
    change(tmp_path / "last" / name)
    with pytest.raises(ValueError, match=r"checkpoint .*last is damaged \(.*\); start the run anew") as caught:
        load_checkpoint(tmp_path / "last")
    assert "\n" not in str(caught.value)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in .*nowhere; start the run anew"):
        load_checkpoint(tmp_path / "nowhere")
