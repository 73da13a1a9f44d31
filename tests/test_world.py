"""The tiny world's prompts, splits and images. The shipped model was pretrained on exactly these: they are frozen."""

import hashlib
import random
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from vgpo.rewards import geneval
from vgpo.rewards.ocr import target_text
from vgpo.world import scenes, words
from vgpo.world.scenes import all_scenes, check_drawable, place, render_scene, split_scenes, stands
from vgpo.world.words import WORDS, random_word, render_word, sign, split_words


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def rows_of(part):
    return [row for rows in part.values() for row in rows]


def prompts_of(part):
    return {row["prompt"] for row in rows_of(part)}


def test_golden_rows_and_splits():
    """Pure Python, so exact everywhere: a changed hash means that the shipped model no longer fits its world."""
    assert digest(all_scenes()) == "a7abd97cdfbb1b48"
    assert digest(split_scenes()) == "4ddc2094f636bbd9" and digest(split_scenes(1)) == "bbd3d5558f9a0acb"
    assert digest(split_words()) == "ed34087eb5d66300" and digest(split_words(1)) == "9083ca853cee0657"
    rng = random.Random(0)
    assert digest([random_word(rng, {"CAT"}) for _ in range(1000)]) == "a8fcd8469345e53b"


def test_golden_pictures():
    """Means of images, with a tolerance for other versions of Pillow and FreeType; and where the rng stands after."""
    rng = random.Random(5)
    images = [render_scene(row, rng) for row in rows_of(split_scenes()[1])[::4]]
    assert rng.random() == pytest.approx(0.7657512068440075) and np.mean(images) == pytest.approx(49.719, abs=0.3)
    images = [render_word(sign(word, color), rng) for word, color in zip(WORDS, [*scenes.COLORS] * 40, strict=False)]
    assert rng.random() == pytest.approx(0.08214232108479302) and np.mean(images) == pytest.approx(93.589, abs=0.5)


def test_wordings_are_those_of_geneval():
    tags = all_scenes()
    assert tuple(tags) == geneval.TAGS == scenes.TAGS and geneval.RELATIONS == scenes.RELATIONS
    prompts = {tag: {row["prompt"] for row in rows} for tag, rows in tags.items()}
    assert "a photo of a cross" in prompts["single_object"]
    assert "a photo of a circle and a square" in prompts["two_object"]
    assert {"a photo of two red circles", "a photo of four cyan crosses"} <= prompts["counting"]
    assert "a photo of a blue triangle" in prompts["colors"]
    assert "a photo of a green square left of a blue triangle" in prompts["position"]
    assert "a photo of a red circle and a blue square" in prompts["color_attr"]
    for row in rows_of(tags):
        geneval.check_row(row)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_splits_are_disjoint_complete_and_cover_every_tag(seed):
    train, test = split_scenes(seed)
    assert not prompts_of(train) & prompts_of(test)
    assert prompts_of(train) | prompts_of(test) == prompts_of(all_scenes())
    assert all(len(test[tag]) == max(1, round(0.25 * len(rows))) for tag, rows in all_scenes().items())
    known, held_out = split_words(seed)
    assert not set(known) & set(held_out) and sorted(known + held_out) == sorted(WORDS) and len(held_out) == 52


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 1.5])
def test_a_split_needs_both_parts(held_out):
    for split in (split_scenes, split_words):
        with pytest.raises(ValueError, match=f"held_out must lie between 0 and 1, got {held_out}"):
            split(held_out=held_out)


def test_extreme_splits_keep_a_row_on_either_side():
    for held_out in (0.01, 0.99):
        assert all(len(rows) >= 1 for part in split_scenes(held_out=held_out) for rows in part.values())


@pytest.mark.parametrize("relation", scenes.RELATIONS)
def test_placed_objects_stand_in_exactly_one_relation_by_genevals_rule(relation):
    def box(spot):
        x, y, r = spot
        return x - r, y - r, x + r, y + r

    rng = random.Random(relation)
    for _ in range(100):
        target, subject = place(rng, 2, relation)
        assert geneval.relations(box(subject), box(target)) == {relation}


def test_stands_is_a_cone_of_sixty_degrees():
    assert stands((-10, 5.7, 1), (0, 0, 1), "left of") and not stands((-10, 5.9, 1), (0, 0, 1), "left of")
    assert not stands((10, 0, 1), (0, 0, 1), "left of") and stands((0, 10, 1), (0, 0, 1), "below")


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_placed_objects_are_inside_and_apart(n):
    rng = random.Random(n)
    for _ in range(100):
        spots = place(rng, n)
        assert len(spots) == n
        for i, (x, y, r) in enumerate(spots):
            assert r + 1 <= min(x, y) and max(x, y) <= scenes.SIZE - 1 - r
            assert all(max(abs(x - a), abs(y - b)) >= r + q + 1 for a, b, q in spots[:i])


def test_pictures_hold_what_the_row_counts():
    rng = random.Random(0)
    for row in rng.sample(rows_of(all_scenes()), 200):
        image = render_scene(row, rng)
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        saturation = np.ptp(image.astype(int), axis=-1)
        assert ndimage.label(saturation > 100)[1] == sum(c["count"] for c in row["include"]), row["prompt"]
        for color in {c["color"] for c in row["include"] if "color" in c}:
            assert (np.abs(image.astype(int) - scenes.COLORS[color]).sum(-1) == 0).sum() > 8


def test_pictures_are_functions_of_row_and_seed():
    scene = all_scenes()["position"][0]
    for render, row in ((render_scene, scene), (render_word, sign("CAT", "red"))):
        a, b, c = (render(row, random.Random(seed)) for seed in (1, 1, 2))
        assert (a == b).all() and (a != c).any()


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"class": "star", "count": 1}, "cannot draw 'a photo of it': unknown class 'star', known are circle, square"),
        ({"class": "cross", "count": 1, "color": "pink"}, "unknown color 'pink', known are red, green"),
        ({"class": "cross", "count": 5}, "a scene has 1 to 4 objects, got 5"),
    ],
)
def test_scenes_that_cannot_be_drawn(clause, message):
    with pytest.raises(ValueError, match=message):
        render_scene({"include": [clause], "prompt": "a photo of it"}, random.Random(0))


def test_drawable_and_unknown_shapes():
    for row in rows_of(all_scenes()):
        check_drawable(row)
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        scenes.draw_shape(None, "star", (0, 0, 0), 0, 0, 1)


@pytest.mark.parametrize(
    ("word", "color", "message"),
    [
        ("CAT", "pink", "unknown color 'pink', known are red"),
        ("HOUSE", "red", "1 to 4 letters, not 5"),
        ("", "red", "1 to 4 letters, not 0"),
    ],
)
def test_signs_that_cannot_be_drawn(word, color, message):
    with pytest.raises(ValueError, match=message):
        render_word(sign(word, color), random.Random(0))


def test_signs_name_their_target():
    for word in WORDS:
        row = sign(word, "cyan")
        assert target_text(row["prompt"], {}) == target_text("", row) == word
    assert all(2 <= len(w) <= 4 and w.isascii() and w.isalpha() and w.isupper() for w in WORDS)


def test_random_words_avoid_the_held_out_and_have_two_to_four_letters():
    held_out = set(split_words()[1])
    rng = random.Random(0)
    drawn = [random_word(rng, held_out) for _ in range(20_000)]
    assert not held_out & set(drawn) and set(split_words()[0]) & set(drawn)
    lengths = Counter(map(len, drawn))
    assert set(lengths) == {2, 3, 4}
    assert all(abs(n - 20_000 / 3) < 4 * (20_000 * 2 / 9) ** 0.5 for n in lengths.values())  # four standard deviations


def test_every_font_ships_with_matplotlib_and_is_used():
    assert all(words.font(name, 44).getbbox("W")[2] > 0 for name in words.FONTS)
    assert {random.Random(seed).choice(list(words.FONTS)) for seed in range(50)} == set(words.FONTS)
