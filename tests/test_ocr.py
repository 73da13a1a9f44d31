"The OCR reward: the rule, the target, and a real engine on rendered signs."

import random
import unicodedata

import numpy as np
import pytest
import torch
from rapidocr import RapidOCR

from vgpo.prompts.files import check_rows
from vgpo.prompts.ocr import ocr_rows
from vgpo.rewards.base import RewardError, make_reward, score
from vgpo.rewards.ocr import OCR, RECOGNISE, levenshtein, normalize, target_text, text_score
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


# one text to a reader of an image, two to a computer
SAME = {
    "composed and not": ("\u00c5NGSTR\u00d6M", "a\u030angstro\u0308m"),
    "two accents, in either order": ("\u1ec7", "e\u0302\u0323"),
    "a sign of its own for a letter": ("\u212bngstr\u00f6m", "\u00e5ngstr\u00f6m"),
    "Korean syllables and their parts": ("\ud55c\uae00", "\u1112\u1161\u11ab\u1100\u1173\u11af"),
    "full-width letters": ("\uff33\uff21\uff2c\uff25\uff1a\u3000\uff15\uff10\uff05", "Sale: 50%"),
    "half-width kana": ("\uff76\uff9e", "\u30ac"),
    "ligatures": ("o\ufb03ce \ufb02oor", "Office Floor"),
    "digraphs": ("\u01c6ungla", "d\u017eungla"),
    "a sharp s in capitals": ("GROSSE STRASSE", "gro\u00dfe Stra\u00dfe"),
    "Greek at the end of a word": ("\u039f\u0394\u039f\u03a3 \u0391\u0392", "\u03bf\u03b4\u03bf\u03c2 \u03b1\u03b2"),
    "Greek without its space": ("\u039f\u0394\u039f\u03a3\u0391\u0392", "\u03bf\u03b4\u03bf\u03c2 \u03b1\u03b2"),
    "a soft hyphen": ("week\u00adend", "WEEKEND"),
    "zero-width characters": ("a\u200bb\u200cc\u200dd\u2060e\ufeff", "abcde"),
    "spaces of all widths": ("1\u00a0000\u202f000\u2009km", "1000000km"),
    "marks of direction": ("\u202aOPEN\u202c\u200e", "open"),
    "variation selectors": ("\u2764\ufe0f", "\u2764"),
    "curly quotes": ("Joe\u2019s \u201cBar\u201d", 'JOE\'S "BAR"'),
    "dashes": ("9\u20135 \u2014 \u22121 \u2011", "9-5 - -1 -"),
    "an ellipsis": ("wait\u2026", "wait..."),
}


@pytest.mark.parametrize(("a", "b"), SAME.values(), ids=SAME)
def test_unicode_forms_of_one_text_are_one_text(a, b):
    assert text_score(a, b) == text_score(b, a) == 1 and normalize(a) == normalize(b)
    # and it is no matter where: as one letter among others that are wrong
    assert text_score(f"x{a}", f"y{b}") == text_score(f"x{b}", f"y{b}") < 1


@pytest.mark.parametrize(
    ("read", "target", "distance"),
    [("CAFE", "cafe\u0301", 1), ("resume", "r\u00e9sum\u00e9", 2), ("HOTEL", "H\u00d4TEL", 1), ("o", "\u00f8", 1)],
)
def test_an_accent_is_part_of_its_letter(read, target, distance):
    length = len(normalize(target))
    assert text_score(read, target) == pytest.approx(1 - distance / length) and length == len(read)


def test_normalizing_twice_is_normalizing_once_for_every_character():
    characters = [c for c in map(chr, range(0x110000)) if c.isprintable()]
    assert len(characters) > 100_000 and all(normalize(normalize(c)) == normalize(c) for c in characters)
    rng = random.Random(0)
    for text in ("".join(rng.choices(characters[:8000], k=5)) for _ in range(5000)):
        assert normalize(normalize(text)) == normalize(text), ascii(text)
        assert normalize(unicodedata.normalize("NFD", text)) == normalize(unicodedata.normalize("NFC", text)), ascii(
            text
        )


@pytest.mark.parametrize(
    "target",
    [
        "\u200b",
        "\u00ad \u00a0",
        "\ufeff",
        "\u0301\u0323",
        "\u202e\u202c",
        "\ufe0f",
        "\u2800",
        "\u3164",
        "\x00\x1b",
        "\ud800",
    ],
)
def test_a_target_of_which_nothing_is_visible_is_refused_when_rows_are_read(reward, target):
    for row in ({"prompt": "a sign", "target": target}, {"prompt": f'a sign that says "{target}"'}):
        with pytest.raises(ValueError, match="no OCR target for prompt .a sign.*give its row a 'target'"):
            check_rows([row], reward)


@pytest.mark.parametrize("target", ["7", "24/7", "?!", "\u20ac5", "\u4e2d", "\u05d0", "\u0e01", "\u00e9", "e\u0301"])
def test_a_short_target_that_can_be_seen_is_taken(reward, target):
    check_rows([{"prompt": "a sign", "target": target}], reward)
    assert text_score(target, target) == 1


def test_new_texts_are_not_those_that_are_excluded_in_another_form():
    row = ocr_rows("train", 1)[0]
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in row["target"])
    assert wide != row["target"] and ocr_rows("train", 1, exclude=[{"prompt": "", "target": wide}])[0] != row


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
