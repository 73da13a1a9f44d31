"The OCR reward: the rule, the target, and a real engine on rendered signs."

import random

import numpy as np
import pytest
import torch
from rapidocr import RapidOCR

from vgpo.rewards.base import RewardError, make_reward, score
from vgpo.rewards.ocr import OCR, RECOGNISE, levenshtein, target_text, text_score
from vgpo.world.scenes import COLORS
from vgpo.world.words import WORDS, render_word, sign


def signs(n, seed=0):
    "Rows and images of n signs."
    rng = random.Random(seed)
    rows = [sign(rng.choice(WORDS), rng.choice(list(COLORS))) for _ in range(n)]
    return rows, np.stack([render_word(row, rng) for row in rows])


@pytest.fixture(scope="module")
def reward():
    return make_reward("OCR", threads=2)


@pytest.mark.parametrize(
    ("a", "b", "d"), [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)]
)
def test_edit_distance(a, b, d):
    assert levenshtein(a, b) == levenshtein(b, a) == d


@pytest.mark.parametrize(
    ("read", "target", "r"),
    [
        ("MOON", "MOON", 1.0),
        ("m o\no n", "Moon", 1.0),  # case and white space do not count
        ("THE MOON INN", "MOON", 1.0),  # part of what was read
        ("MON", "MOON", 0.75),
        ("MOONS", "MOOD", 0.5),
        ("", "MOON", 0.0),
        ("WXYZWXYZ", "AB", 0.0),  # never below 0
        ("CAFE", "CAFÉ", 0.75),
    ],
)
def test_the_rule(read, target, r):
    assert text_score(read, target) == pytest.approx(r)


def test_where_the_target_comes_from():
    assert target_text('a sign that says "GO ON" and "NO"', {}) == "GO ON"
    assert target_text("a sign that says \u201cGO ON\u201d", {"tag": "words"}) == "GO ON"
    assert target_text('a "red" sign', {"target": "STOP"}) == "STOP"
    for prompt, metadata in [
        ("a sign that says 'STOP'", {}),
        ("a sign", {}),
        ('a "" sign', {}),
        ("a sign", {"target": " "}),
    ]:
        with pytest.raises(ValueError, match="no OCR target for prompt .* sign.*give its row a 'target'"):
            target_text(prompt, metadata)
    with pytest.raises(ValueError, match="target is empty"):
        text_score("STOP", " ")


def test_reads_the_signs_of_the_tiny_world(reward):
    rows, images = signs(100)
    scores = score(reward, images, [r["prompt"] for r in rows], rows)
    # the engine reads 97 of 100 or more; 3 standard errors (of 100 signs) below that
    assert scores.strict.float().mean() >= 0.97 - 3 * (0.97 * 0.03 / 100) ** 0.5
    for r, s, d, row in zip(scores.raw, scores.strict, scores.details, rows, strict=True):
        assert d["target"] == row["target"] and r.item() == pytest.approx(text_score(d["read"], row["target"]))
        assert s == (d["read"].lower().replace(" ", "") == row["target"].lower())
    assert torch.equal(scores.raw, scores.scaled)
    # the same images against the targets of other rows
    other = [rows[(i + 1) % 100] for i in range(100)]
    assert score(reward, images, [r["prompt"] for r in other], other).raw.mean() < 0.3


def test_what_is_read_depends_on_the_picture_alone(reward):
    _, images = signs(21)
    texts = reward.read(images)
    engine = RapidOCR(params={"Rec.rec_img_shape": [3, 48, 48], "Global.log_level": "error"})
    alone = [engine(p[..., ::-1].copy(), **RECOGNISE).txts[0] for p in images]  # the plain call of the library
    assert texts == alone
    assert OCR(threads=3, batch_size=4).read(images) == texts
    assert reward.read(images[:1]) == texts[:1]  # fewer images than threads


@pytest.mark.parametrize("mode", ["recognise", "full"])
def test_a_blank_image_is_scored_not_an_error(mode):
    scores = score(OCR(1, mode=mode), np.zeros((1, 32, 32, 3), np.uint8), ['"STOP"'], [{}])
    assert scores.raw.item() == 0 and not scores.strict.item() and scores.details == [{"read": "", "target": "STOP"}]


def test_a_row_without_target_stops_the_batch(reward):
    _, images = signs(2)
    with pytest.raises(RewardError, match="'OCR' failed on 2 images .*no OCR target for prompt 'a sign'"):
        score(reward, images, ['"STOP"', "a sign"], [{}, {}])


def test_options_and_version(reward):
    assert reward.version.startswith("rapidocr 3.") and reward.version.endswith("_rec_small.onnx")
    for options, message in [
        ({"mode": "guess"}, "OCR.mode is 'guess'; it must be one of 'recognise', 'full'"),
        ({"threads": 0}, "OCR.threads is 0; it must be a number v with v>0"),
        ({"width": 0}, "OCR.width is 0; it must be a number v with v>0"),
    ]:
        with pytest.raises(ValueError, match=message):
            OCR(**options)


def test_the_recorded_weights_are_the_ones_that_are_loaded(reward):
    reward.read(np.zeros((1, 32, 32, 3), np.uint8))
    loaded = reward.engines[0].text_rec.session.session._model_path
    assert loaded.endswith(reward.version.split(", ")[-1])
