import json
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from vgpo.flow import ode_sample
from vgpo.prompts import TASK_WEIGHTS, WORLDS, epoch_prompts, generator, load_prompts, sample_noise


@pytest.mark.parametrize("world", WORLDS)
def test_worlds_are_seeded_and_their_splits_disjoint(world):
    train, test = load_prompts(world, "train"), load_prompts(world, "test")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert len(train) == len(test) == 3000
    assert load_prompts(world, "train") == train
    for count in (1, 500, 528, 4001):
        rows = load_prompts(world, "test", count)
        assert len(rows) == count and rows[:500] == test[: min(count, 500)]
    unique = load_prompts(world, "test", unique=True)
    assert len({row["prompt"] for row in unique}) == len(unique) < 3000


def test_worlds_are_the_same_in_every_process():
    "Nothing may depend on Python's randomised hashes."
    code = "from vgpo.prompts import *; print([load_prompts(w, s, 40) for w in WORLDS for s in ('train', 'test')])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_held_out_words_never_occur_in_training():
    words = [{row["target"] for row in load_prompts("tiny-words", split)} for split in ("train", "test")]
    assert words[0] and words[1] and not words[0] & words[1]


def test_the_held_out_scenes_have_equal_shares_of_tasks():
    tags = [row["tag"] for row in load_prompts("tiny-scenes", "test", 528)]
    assert {tag: tags.count(tag) for tag in TASK_WEIGHTS} == dict.fromkeys(TASK_WEIGHTS, 88)


def test_text_files(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\n  ein Bär \nfirst\u2028second\na cat".encode())
    prompts = [row["prompt"] for row in load_prompts(str(file), "train")]
    assert prompts == ["a cat", "ein Bär", "first\u2028second", "a cat"]
    assert load_prompts(str(file), "test", count=2) == [{"prompt": "a cat"}, {"prompt": "ein Bär"}]
    assert len(load_prompts(str(file), "test", unique=True)) == 3


def test_jsonl_files_keep_what_the_judge_needs(tmp_path):
    rows = [
        {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "two benches"},
        {"prompt": "line\u2028separator"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert load_prompts(str(file), "train") == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b'{"prompt": "a cat"}\n\n{"prompt": }\n',
            r"bad.jsonl, line 3: not valid JSON \(Expecting value at column 12\)",
        ),
        (b'{"prompt": "a cat"}\n["a dog"]\n', "bad.jsonl, line 2: a row is an object with a non-empty string"),
        (b'{"text": "a cat"}\n', "bad.jsonl, line 1: a row is an object"),
        (b'{"prompt": 3}\n', "bad.jsonl, line 1: a row is an object"),
        (b'{"prompt": " "}\n', "bad.jsonl, line 1: a row is an object"),
        (b" \n\n", "bad.jsonl holds no prompt; write one a line"),
        (b"b\xe4r\n", r"bad.jsonl is not UTF-8 \(.* at byte 1\); convert it"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(str(tmp_path / "bad.jsonl"), "train")
    assert "\n" not in str(caught.value)


def test_bad_sources(tmp_path):
    for source in ("tiny-scene", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="does not exist; give a file or one of tiny-scenes, tiny-words"):
            load_prompts(source, "train")
    with pytest.raises(ValueError, match="split is 'val'; it must be 'train' or 'test'"):
        load_prompts("tiny-scenes", "val")


def test_epoch_prompts_are_a_function_of_seed_and_epoch():
    picks = {(s, e): epoch_prompts(50, 8, s, e) for s in range(4) for e in range(25)}
    assert all(len(set(pick)) == 8 and set(pick) <= set(range(50)) for pick in picks.values())
    assert len({tuple(pick) for pick in picks.values()}) == 100
    assert epoch_prompts(50, 8, 3, 7) == picks[3, 7]
    assert sorted(epoch_prompts(5, 5, 0, 0)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="sampling.groups is 6, but there are only 5 prompts"):
        epoch_prompts(5, 6, 0, 0)


def test_noise_is_a_function_of_its_key_alone():
    wanted = sample_noise((3, 4), 1, 23, 4, 5)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(sample_noise((3, 4), 1, 23, 4, 5), wanted)
    assert torch.equal(torch.get_rng_state(), state)
    others = [(12, 3, 4, 5), (1, 2, 34, 5), (1, 23, 45, 0), (1, 23, 5, 4), (2, 23, 4, 5), (1, "evaluation", 4, 5)]
    assert not any(torch.equal(sample_noise((3, 4), *key), wanted) for key in others)


def test_noise_is_pinned():
    "Runs of the past stay repeatable only if these numbers never change."
    assert generator("noise", 0, 0, 0, 0).initial_seed() == 0xC75D3716838242
    wanted = torch.tensor([-0.2331, -2.0637, -1.7135])
    assert_close(sample_noise((3,), 0, 0, 0, 0), wanted, atol=1e-4, rtol=0)


def test_images_do_not_depend_on_the_batch_size(policy):
    prompts = ["a photo of two red circles", "a photo of a blue cross", 'a red sign that says "CAT"']
    noise = torch.stack([sample_noise(policy.latent_shape, 0, 0, i, 0) for i in range(3)])

    def draw(rows):
        condition = policy.encode([prompts[i] for i in rows])
        with torch.no_grad():
            return ode_sample(lambda x, sigma: policy.velocity(x, sigma, condition), noise[rows], policy.sigmas(5))

    together = draw([0, 1, 2])
    assert_close(torch.cat([draw([0]), draw([1]), draw([2])]), together, atol=1e-5, rtol=0)
    assert_close(draw([2, 0]), together[[2, 0]], atol=1e-5, rtol=0)
