import json
import os
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vgpo.config import EvaluationConfig, ModelConfig
from vgpo.evaluate import evaluate, make_policy
from vgpo.evaluation.scores import (
    ON_DEVICE,
    Exam,
    complete_scores,
    cut_off,
    draw,
    hold,
    judge,
    open_folder,
    read_image,
    read_scores,
    reward_makers,
    settings_of,
)
from vgpo.prompts.files import load_prompts
from vgpo.evaluation.compare import main
from vgpo.rewards.base import REWARDS, RewardError, Scores, imported, make_reward

ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


class Bright:
    "A reward with a verdict; it counts the pictures that it saw."

    name, scale, version = "bright", "none", "1"

    def __init__(self):
        self.seen = 0

    def __call__(self, images, prompts, metadata):
        self.seen += len(images)
        raw = torch.tensor(images.reshape(len(images), -1).mean(1) / 255, dtype=torch.float32)
        return Scores(raw, raw, raw > 0.5, [{"prompt": prompt} for prompt in prompts])


def rows(count):
    return load_prompts("tiny-scenes", "test", unique=True)[:count]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return make_policy(ModelConfig(path=str(tiny_folder)))


@pytest.fixture
def one_thread():
    "Digits may depend on the number of threads, and the processes of these tests have one."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def take(exam, policy, makers=None, state=ALONE):
    "Hold an exam with a policy at hand; returns the settings."
    settings = settings_of(exam, "tiny-scenes", ModelConfig(path="tiny"))
    hold(exam, settings, lambda: policy, makers or {"bright": Bright}, state)
    return settings


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 40])
def test_every_item_is_of_exactly_one_process(processes):
    exam = Exam(Path(), [{}] * 11, 3, batch_size=4, processes=processes)
    shares = [replace(exam, rank=rank).batches() for rank in range(processes)]
    assert sorted(item for share in shares for batch in share for item in batch) == exam.items()
    assert len(exam.items()) == len(set(exam.items())) == 33


def test_first_sample_is_the_small_exam_and_the_others_differ(model, tmp_path):
    exam = Exam(tmp_path, rows(3), steps=3)
    take(exam, model)
    small = evaluate(model, Bright(), rows(3), EvaluationConfig(steps=3))
    assert np.array_equal([read_image(exam.image(item)) for item in exam.items()], small.images)
    assert complete_scores(exam, "bright")["raw"] == small.scores.raw.tolist()
    more = Exam(tmp_path / "more", rows(3), 2, steps=3)
    take(more, model)
    for i in range(3):
        first, second = (read_image(more.image((i, k))).astype(int) for k in (0, 1))
        assert np.abs(first - small.images[i]).max() <= 1 < np.abs(first - second).max()


def test_what_is_there_is_not_made_again(model, tmp_path):
    exam, bright = Exam(tmp_path, rows(4), 2, steps=2, batch_size=3), Bright()
    take(exam, model, {"bright": lambda: bright})
    times = {item: exam.image(item).stat().st_mtime_ns for item in exam.items()}
    exam.image((1, 1)).unlink()
    take(exam, model, {"bright": lambda: pytest.fail("the reward is not needed")})
    assert [i for i in times if exam.image(i).stat().st_mtime_ns != times[i]] == [(1, 1)] and bright.seen == 8
    take(exam, None, {"jpeg": lambda: make_reward("jpeg")})  # another judge needs no policy
    assert len(complete_scores(exam, "jpeg")["raw"]) == 8 and "strict" not in complete_scores(exam, "jpeg")


def test_a_torn_line_is_scored_again(model, tmp_path):
    exam = Exam(tmp_path, rows(4), 2, steps=2, batch_size=3)
    take(exam, model)
    own = exam.scores("bright") / "00000.jsonl"
    whole, content = read_scores(exam, "bright"), own.read_bytes()
    for cut in (0, 10, content.index(b"\n"), content.index(b"\n") + 1, len(content) - 1):
        own.write_bytes(content[:cut])
        for rank in (1, 0):
            judge(replace(exam, rank=rank, processes=2), "bright", Bright)
        assert read_scores(exam, "bright") == whole
        (exam.scores("bright") / "00001.jsonl").unlink(missing_ok=True)
    own.write_bytes(b"no end of line")
    cut_off(own)
    assert own.read_bytes() == b""


def test_damage_is_named_with_its_remedy(model, tmp_path):
    exam = Exam(tmp_path, rows(2), 2, steps=2)
    take(exam, model)
    own = exam.scores("bright") / "00000.jsonl"
    lines = own.read_text().splitlines(keepends=True)
    for bad, message in (
        ("{}\n", "line 2: not a score; delete the line"), ("\n", "line 2: not a score"), ("\x80\n", "line 2: not"),
        (lines[0], "line 2: is the second of its image"), (lines[1].replace("0.", "NaN, 0."), "line 2: not a score"),
        (lines[1].replace('"prompt": 0', '"prompt": 9'), "line 2: is of no image of this evaluation"),
    ):  # fmt: skip
        own.write_text("".join([lines[0], bad, *lines[2:]]))
        with pytest.raises(ValueError, match=message) as error:
            take(exam, model)
        assert str(own) in str(error.value) and "run the same command again" in str(error.value)
    own.write_text("".join(lines[:3]))
    with pytest.raises(ValueError, match="lacks 1 of 4, the first being the score by bright of 00001-1"):
        complete_scores(exam, "bright")
    exam.image((1, 1)).write_bytes(exam.image((1, 1)).read_bytes()[:100])
    with pytest.raises(ValueError, match="00001-1.png is damaged .*delete it and run the same command again"):
        take(exam, model)
    exam.image((1, 1)).unlink()
    with pytest.raises(ValueError, match="the first being the image of 00001-1"):
        complete_scores(exam, "bright")
    take(exam, model)
    assert len(complete_scores(exam, "bright")["raw"]) == 4


def test_other_settings_are_refused_and_named(model, tmp_path):
    exam = Exam(tmp_path / "exam", rows(2), steps=2)
    settings = settings_of(exam, "tiny-scenes", ModelConfig(path="tiny"))
    open_folder(exam, settings | {"seed": 5}, ALONE)  # no image yet, so nothing is spoilt by another beginning
    take(exam, model)
    for key, value in {"steps": 3, "seed": 1, "guidance_scale": 2.0, "trained": "lora", "dtype": "bfloat16"}.items():
        with pytest.raises(ValueError, match=f"{key} is {settings[key]} there and {value} here; give another --output"):
            open_folder(exam, settings | {key: value}, ALONE)
    newer = Bright()
    newer.version = "2"
    (exam.scores("bright") / "00000.jsonl").unlink()
    with pytest.raises(ValueError, match="bright has scores of another reward: version is 1 there and 2 here; delete"):
        take(exam, model, {"bright": lambda: newer})
    (tmp_path / "file").write_text("x")
    for folder, message in ((tmp_path, "not empty and holds no evaluation"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=message):
            open_folder(Exam(folder, rows(2)), settings, ALONE)


def test_settings_follow_contents_not_names(tmp_path, trained):
    exam, prompts = Exam(tmp_path, rows(2)), [dict(row) for row in rows(2)]
    model, lora = ModelConfig(path="tiny"), trained[0] / "lora"
    one = settings_of(exam, "a/tiny-scenes", model, lora)
    assert one == settings_of(replace(exam, rows=prompts), "b/tiny-scenes", model, lora) and one["cluster"] == "prompt"
    prompts[1]["tag"] = "other"
    assert one["rows_sha256"] != settings_of(replace(exam, rows=prompts), "a/tiny-scenes", model)["rows_sha256"]
    copy = tmp_path / "lora"
    copy.mkdir()
    content = bytearray((lora / "pytorch_lora_weights.safetensors").read_bytes())
    for change in (0, 1):
        content[-1] ^= change
        (copy / "pytorch_lora_weights.safetensors").write_bytes(content)
        same = settings_of(exam, "tiny-scenes", model, copy)["trained"] == one["trained"]
        assert same is not bool(change)


def test_rewards_are_loaded_in_turn_and_tried_before_the_drawing(model, tmp_path):
    alive, drawn = weakref.WeakSet(), []

    def maker(name):
        def make():
            assert not alive, f"{name} is loaded beside {[r.name for r in alive]}"
            reward = Bright()
            reward.name = name
            alive.add(reward)
            drawn.append(len(list((tmp_path / "images").iterdir())))
            return reward

        return make

    exam = Exam(tmp_path, rows(2), steps=2)
    take(exam, model, {name: maker(name) for name in ("a", "b", "c")})
    assert drawn == [0, 0, 0, 2, 2, 2]
    take(exam, model, {"d": maker("d")})
    assert len(drawn) == 7  # a single one stays


def test_prompts_that_a_reward_refuses_are_found_before_the_drawing(tmp_path):
    exam = Exam(tmp_path, [{"prompt": "a photo of a cat"}])
    makers = reward_makers(["geneval-shapes"], {})
    with pytest.raises(ValueError, match="prompt row 1: .*unknown tag None"):
        hold(exam, settings_of(exam, "x.txt", ModelConfig(path="tiny")), lambda: pytest.fail("drawn"), makers, ALONE)


def test_a_failing_reward_loses_nothing(model, tmp_path):
    exam, bright = Exam(tmp_path, rows(3), 2, steps=2, batch_size=2), Bright()

    def fails(images, prompts, metadata):
        if bright.seen == 4:
            raise RuntimeError("the judge is out")
        return bright(images, prompts, metadata)

    fails.name, fails.scale, fails.version = bright.name, bright.scale, bright.version
    with pytest.raises(RewardError, match="the judge is out"):
        take(exam, model, {"bright": lambda: fails})
    assert len(read_scores(exam, "bright")) == 4 and len(list((tmp_path / "images").iterdir())) == 6
    take(exam, None)
    assert len(complete_scores(exam, "bright")["raw"]) == 6


def test_reward_options_and_device():
    makers = reward_makers(
        ["jpeg", "pickscore", "clipscore"], {"jpeg": {"quality": 50}, "clipscore": {"device": "x"}}, "cuda"
    )
    assert makers["jpeg"]().version.endswith("quality 50") and makers["jpeg"].keywords == {"quality": 50}
    assert makers["pickscore"].keywords == {"device": "cuda"} and makers["clipscore"].keywords == {"device": "x"}
    labelled = reward_makers(["jpeg@low", "pickscore@two"], {"jpeg@low": {"quality": 5}}, "cuda")  # as in reward.parts
    assert labelled["jpeg@low"]().version.endswith("quality 5")
    assert labelled["pickscore@two"].keywords == {"device": "cuda"}
    with pytest.raises(ValueError, match="--reward_options has ocr, which --rewards has not"):
        reward_makers(["jpeg"], {"ocr": {}})
    for name in REWARDS:  # the list is right: who says `device`, by itself or by the class whose options it passes on
        made = imported(REWARDS[name])
        parts = made.__mro__[:-1] if isinstance(made, type) else [made]
        takes = any("device" in signature(part).parameters for part in parts) or name == "geneval"
        assert takes == (name in ON_DEVICE), name


def test_text_encoders_may_be_freed(tiny_folder, model, tmp_path):
    "A policy that drops its encoders has to know all prompts at the first batch."
    free = make_policy(ModelConfig(path=str(tiny_folder), precompute_text_embeds=True))
    for name, policy in (("free", free), ("kept", model)):
        (tmp_path / name / "images").mkdir(parents=True)
        draw(Exam(tmp_path / name, rows(4), steps=2, batch_size=2), lambda policy=policy: policy)
    names = [path.name for path in (tmp_path / "kept" / "images").iterdir()]
    for name in names:
        assert (tmp_path / "free/images" / name).read_bytes() == (tmp_path / "kept/images" / name).read_bytes()
    assert free.pipe.text_encoder is None and len(names) == 4


def launch(words, rank=0, processes=1, port=0):
    "The program in a process of its own, as accelerate launch would start it on CPUs."
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    if processes > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "vgpo.evaluate", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_and_continued_by_two_processes_it_ends_like_an_unbroken_one(tiny_folder, tmp_path, one_thread, capsys):
    words = [str(tiny_folder), "--images=24", "--images_per_prompt=3", "--batch_size=2", "--steps=12",
             "--rewards", "geneval-shapes", "tiny_rewards:brightness", "--output"]  # fmt: skip
    main([*words, str(tmp_path / "whole")])
    folder = tmp_path / "broken"
    killed = launch([*words, str(folder)])
    while len(list(folder.glob("images/*.png"))) < 4:
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    assert 4 <= len(list(folder.glob("images/*.png"))) < 24
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [launch([*words, str(folder)], rank, 2, port) for rank in (0, 1)]
    texts = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert capsys.readouterr().out in texts[0] and "mean over tasks" not in texts[1]
    for path in (tmp_path / "whole" / "images").iterdir():
        assert (folder / "images" / path.name).read_bytes() == path.read_bytes()
    for name in ("results.json", "table.md", "prompts.jsonl", "settings.json"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
    shares = [len(path.read_text().splitlines()) for path in sorted(folder.glob("scores/geneval-shapes/*.jsonl"))]
    assert shares == [12, 12] and json.loads((folder / "results.json").read_text())["images"] == 24
