"""The shape detector: against what was drawn, against IoU by hand, and on images that it should not accept."""

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from vgpo.rewards.base import make_reward
from vgpo.rewards.geneval import accuracy_by_task
from vgpo.world.detector import (
    GenEvalShapes,
    ShapeDetector,
    color_table,
    components,
    name_colors,
    sample_masks,
    sample_shapes,
    similarity,
    templates,
)
from vgpo.world.scenes import COLORS, SHAPES, TAGS, all_scenes, draw_shape, render_scene


@pytest.fixture(scope="module")
def detector():
    return ShapeDetector()


@pytest.fixture(scope="module")
def truth():
    rng, scenes = random.Random(11), all_scenes()
    rows = [row for tag in TAGS for row in rng.choices(scenes[tag], k=100)]
    return np.stack([render_scene(row, rng) for row in rows]), rows


def accuracy(detector, images, rows):
    reward = GenEvalShapes()
    reward.detector = detector
    return accuracy_by_task(reward(images, [row["prompt"] for row in rows], rows).strict, rows)


def paint(*shapes, ground=40):
    """An image of shapes (shape, colour, x, y, half-width), drawn as the world draws."""
    image = Image.new("RGB", (128, 128), (ground,) * 3)
    for shape, color, x, y, r in shapes:
        draw_shape(ImageDraw.Draw(image), shape, COLORS[color], 4 * x, 4 * y, 4 * r)
    return np.asarray(image.resize((32, 32), Image.BOX))


def test_strict_accuracy_on_rendered_truth_is_at_least_97_percent_for_each_task(detector, truth):
    result = accuracy(detector, *truth)
    assert set(result) == {*TAGS, "overall"}
    assert min(result.values()) >= 0.97, result


def test_the_registered_reward_uses_this_detector_and_is_perfect_on_truth(truth):
    images, rows = truth
    scores = make_reward("GenEvalShapes")(images[::20], [row["prompt"] for row in rows[::20]], rows[::20])
    assert scores.strict.all() and (scores.scaled == 1).all()


def test_a_reward_that_always_agrees_would_be_caught(detector, truth):
    """Images of other prompts of the same task are (nearly) all scores wrong."""
    images, rows = truth
    result = accuracy(detector, np.roll(images, 1, axis=0), rows)
    assert result["counting"] < 0.1 and result["position"] < 0.1 and result["color_attr"] < 0.1


def test_slight_blur_and_grain_are_forgiven(detector, truth):
    images, rows = truth
    soft = ndimage.gaussian_filter(images.astype(float), (0, 0.7, 0.7, 0))
    grain = np.random.default_rng(0).normal(0, 8, images.shape)
    for changed in (soft, images + grain):
        result = accuracy(detector, changed.clip(0, 255).round().astype(np.uint8), rows)
        assert min(result.values()) >= 0.93, result


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_shape_is_found_with_its_class_colour_and_box(detector, shape, color):
    (found,) = detector(paint((shape, color, 14, 18, 6))[None])
    assert [(d.label, d.color) for d in found] == [(shape, color)]
    assert 0.7 < found[0].score <= 1
    np.testing.assert_allclose(found[0].box, (8, 12, 20, 24), atol=2)


def test_boxes_end_one_past_the_last_pixel(detector):
    image = np.full((1, 32, 32, 3), 40, np.uint8)
    image[0, 10:18, 3:11] = COLORS["red"]
    (d,) = detector(image)[0]
    assert d.label == "square" and d.color == "red" and d.box == (3, 10, 11, 18) and d.score > 0.9


def test_touching_shapes_of_two_colours_are_two_and_of_one_colour_none(detector):
    def pair(a, b):
        return paint(("square", a, 11, 16, 5), ("square", b, 21, 16, 5))[None]

    assert sorted(d.color for d in detector(pair("red", "blue"))[0] if d.score > 0.6) == ["blue", "red"]
    (merged,) = detector(pair("red", "red"))[0]
    assert merged.score < 0.6


@pytest.mark.parametrize("shape", SHAPES)
def test_halves_fall_below_the_threshold(detector, shape):
    image = paint((shape, "green", 16, 16, 6))
    upper_half = [] if shape == "triangle" else [np.s_[16:]]  # the upper half of a triangle is a triangle
    for cut in (np.s_[:, 16:], np.s_[:16], *upper_half):
        half = image.copy()
        half[cut] = 40
        assert all(d.score < 0.6 for d in detector(half[None])[0])


def test_dust_and_grey_things_are_nothing(detector):
    image = np.full((1, 32, 32, 3), 30, np.uint8)
    image[0, 5:8, 5:8] = COLORS["red"]  # 9 pixels
    image[0, 15:25, 15:25] = 255
    image[0, 15:25, 2:12] = (120, 90, 90)  # saturation 30 of red's 200
    assert detector(image) == [[]]
    image[0, 5:9, 5:8] = COLORS["red"]  # 12 pixels
    assert len(detector(image)[0]) == 1


def test_empty_pictures_and_no_pictures(detector):
    assert detector(np.zeros((3, 32, 32, 3), np.uint8)) == [[], [], []]
    assert detector(np.zeros((0, 32, 32, 3), np.uint8)) == []


def test_a_verdict_does_not_depend_on_the_batch(detector, truth):
    images = truth[0][::25]
    for together, image in zip(detector(images), images, strict=True):
        alone = detector(image[None])[0]
        assert [(d.label, d.color, d.box) for d in together] == [(d.label, d.color, d.box) for d in alone]
        np.testing.assert_allclose([d.score for d in together], [d.score for d in alone], rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (np.zeros((2, 32, 32, 3)), r"float64 \(2, 32, 32, 3\)"),
        (np.zeros((32, 32, 3), np.uint8), r"uint8 \(32, 32, 3\)"),
        (np.zeros((2, 3, 32, 32), np.uint8), r"uint8 \(2, 3, 32, 32\)"),
        ([[0]], "list"),
    ],
)
def test_bad_images(detector, images, got):
    with pytest.raises(ValueError, match=rf"images must be a uint8 numpy array \(B, H, W, 3\), got {got}"):
        detector(images)


@pytest.mark.parametrize("coverage", [0, 1, -1, 2])
def test_bad_coverage(coverage):
    with pytest.raises(ValueError, match=f"coverage must lie between 0 and 1, got {coverage}"):
        ShapeDetector(coverage=coverage)


@pytest.mark.parametrize("coverage", [0.5, 0.7, 0.9])
def test_saturation_is_coverage(coverage):
    """p = a C + (1 - a) g has saturation a * sat(C): just above `coverage` it is coloured, just below it is not."""
    table = color_table(coverage)
    for i, rgb in enumerate(COLORS.values(), start=1):
        for share, name in ((coverage - 0.05, 0), (coverage + 0.05, i)):
            for gray in (15, 60):
                pixel = (share * np.array(rgb) + (1 - share) * gray).round().astype(np.uint8)
                assert name_colors(pixel.reshape(1, 1, 1, 3), table).item() == name


def test_components_agree_with_one_scipy_call_for_each_picture_and_colour():
    colors = np.random.default_rng(0).choice(7, p=[0.4, 0.3, 0.1, 0.05, 0.05, 0.05, 0.05], size=(5, 20, 24))
    labels, planes, parts = components(colors.astype(np.uint8), min_area=3)
    expected = []
    for b, image in enumerate(colors):
        for c in range(1, 7):
            regions, _ = ndimage.label(image == c)
            for i, (y, x) in enumerate(ndimage.find_objects(regions), start=1):
                if (regions == i).sum() >= 3:
                    expected.append((6 * b + c - 1, y.start, x.start, y.stop, x.stop))
    assert [(planes[p], *box) for p, _, *box in parts.tolist()] == expected and len(expected) > 50
    for p, label, y0, x0, y1, x1 in parts.tolist():
        b, c = divmod(planes[p], 6)
        assert (colors[b][labels[p] == label] == c + 1).all() and (labels[p] == label)[y0:y1, x0:x1].sum() >= 3


def test_masks_at_their_own_size_come_back_and_are_upsampled_bilinearly():
    colors = np.zeros((1, 32, 32), np.uint8)
    mask = np.hypot(*np.mgrid[-4.5:5, -4.5:5]) < 4.9
    colors[0, 7:17, 20:30] = 3 * mask
    labels, _, parts = components(colors)
    assert (sample_masks(labels, parts, 10).reshape(10, 10) == mask).all()
    image = Image.fromarray(mask.astype(np.float32))  # Pillow's bilinear filter enlarges the same way
    np.testing.assert_allclose(
        sample_masks(labels, parts, 20).reshape(20, 20), image.resize((20, 20), Image.BILINEAR), atol=1e-6
    )


def test_similarity_is_iou_for_sets_and_at_most_one_for_shades():
    rng = np.random.default_rng(0)
    a, b = rng.random((30, 64)) < 0.6, rng.random((8, 64)) < 0.4
    iou = (a[:, None] & b).sum(-1) / (a[:, None] | b).sum(-1)
    np.testing.assert_allclose(similarity(a.astype(float), b.astype(float)), iou)
    shades = rng.random((30, 64))
    s = similarity(shades, shades)
    np.testing.assert_allclose(s.diagonal(), 1)
    assert 0 <= s.min() and (s - np.eye(30)).max() < 1


def test_templates_are_closest_to_their_own_shape():
    bank = templates()
    assert bank.shape == (2 * len(SHAPES), 100) and 0 <= bank.min() and bank.max() <= 1
    for i, shape in enumerate(SHAPES):
        labels, _, parts = components(name_colors(sample_shapes(shape, 50, seed=5), color_table()))
        best = similarity(sample_masks(labels, parts), bank).argmax(1) // 2
        assert len(parts) == 50 and (best == i).mean() >= 0.98
