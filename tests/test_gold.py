"The gold metrics, against loops, closed forms and images whose content is known."

import math
import random

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from vgpo.evaluation.gold import (
    balance,
    diversity,
    edges,
    gold_metrics,
    gold_per_image,
    image_features,
    kernel_distance,
    palette,
    renderings,
    sharpness,
    utility,
)
from vgpo.prompts.files import load_prompts
from vgpo.rewards.base import Scores
from vgpo.world.detector import GenEvalShapes
from vgpo.world.scenes import COLORS

ROWS = load_prompts("tiny-scenes", "test", 48)


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def test_sharpness_and_edges_are_their_formulas():
    for image in noise(2).astype(int):
        jumps = [
            abs(int(image[y, x, c]) - int(image[y - 1, x, c]))
            for y in range(1, 32)
            for x in range(32)
            for c in range(3)
        ]
        jumps += [
            abs(int(image[y, x, c]) - int(image[y, x - 1, c]))
            for y in range(32)
            for x in range(1, 32)
            for c in range(3)
        ]
        one = image[None].astype(np.uint8)
        assert edges(one)[0] == pytest.approx(np.mean(jumps))
        ratio = sum(jump**2 for jump in jumps) / (image.max() - image.min()) / sum(jumps)
        assert sharpness(one)[0] == pytest.approx(ratio)


def test_a_step_is_perfectly_sharp_and_every_blur_takes_some():
    step = np.zeros((1, 32, 32, 3), np.uint8)
    step[:, :, 16:] = 200
    assert sharpness(step)[0] == 1 and sharpness(step[:, :, :16])[0] == 0
    images = renderings(ROWS).astype(float)
    blurred = [gaussian_filter(images, (0, s, s, 0)).round().astype(np.uint8) for s in (0, 0.5, 1, 2)]
    assert (np.diff([sharpness(x) for x in blurred], axis=0) < 0).all()


def test_palette_and_balance_by_pixels():
    for image in (renderings(ROWS[:3]) // 2 + noise(3) // 2).astype(int):
        marks, places = [], []
        for y in range(32):
            for x in range(32):
                pixel = image[y, x]
                if max(pixel) - min(pixel) > 85:
                    gaps = [
                        math.sqrt(sum((a - b) ** 2 for a, b in zip(pixel, color, strict=True)) / 3)
                        for color in COLORS.values()
                    ]
                    marks.append(max(0, 1 - min(gaps) / 64))
                    places.append((y - 15.5, x - 15.5))
        one = image[None].astype(np.uint8)
        assert palette(one)[0] == pytest.approx(np.mean(marks))
        assert balance(one)[0] == pytest.approx(1 - math.hypot(*np.mean(places, 0)) / 16)


def test_utility_is_in_its_range_and_empty_images_have_none_but_what_is_not_asked():
    images = renderings(ROWS)
    assert (utility(images, ROWS) > 0.7).all() and (utility(images, ROWS) <= 1).all()
    assert (utility(np.full_like(images, 40), ROWS) == 0).all()
    assert (utility(noise(len(ROWS)), ROWS) < 0.6).all()


def test_objects_beyond_the_prompt_are_counted_by_class(monkeypatch):
    def found(*_):
        details = [{"found": {"circle": 3, "cross": 1}}, {"found": {}}, {"found": {"square": 2, "circle": 1}}]
        scores = np.zeros(3, np.float32)
        return Scores(torch.tensor(scores), torch.tensor(scores), details=details)

    monkeypatch.setattr(GenEvalShapes, "__call__", found)
    rows = [{"prompt": "p", "include": [{"class": "circle", "count": 2}, {"class": "square", "count": 1}]}] * 3
    assert gold_per_image(noise(3), rows)["unasked"].tolist() == [2, 0, 1]


def test_diversity_is_a_mean_over_prompts_and_of_pairs():
    images = noise(5)
    gaps = [np.sqrt((((images[i] - images[j].astype(float)) / 255) ** 2).mean()) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert diversity(images, ["a", "a", "a", "b", "c"]) == pytest.approx(np.mean(gaps))
    pair = np.concatenate([images[:3], images[3:4], images[3:4]])
    assert diversity(pair, ["a", "a", "a", "b", "b"]) == pytest.approx(np.mean(gaps) / 2)
    assert math.isnan(diversity(images, list("abcde")))


def test_gold_metrics_are_reproducible_and_refuse_what_is_no_scene():
    images = renderings(ROWS, seed=3)
    assert gold_metrics(images, ROWS) == gold_metrics(images, ROWS)
    assert (renderings(ROWS, 3) == images).all() and (renderings(ROWS, 4) != images).any()
    words = load_prompts("tiny-words", "test", 2)
    with pytest.raises(ValueError, match="tag"):
        gold_metrics(images[:2], words)
    with pytest.raises(ValueError, match="images"):
        gold_metrics(images[:3], ROWS)
    order = random.Random(0).sample(range(len(ROWS)), len(ROWS))
    assert (utility(images[order], [ROWS[i] for i in order]) == utility(images, ROWS)[order]).all()


def test_the_kernel_distance_is_0_for_one_distribution_and_that_of_two_means_for_two():
    "Of Gaussians with means 0 and m in D dimensions, the kernel's linear part alone contributes 3 |m|^2 / D."
    torch.manual_seed(0)
    first, second = torch.randn(2, 800, 4, 4)
    distance, stderr = kernel_distance(first, second)
    assert abs(distance) < 4 * stderr
    distance, stderr = kernel_distance(first, second + 0.5)
    assert distance - 3 * 0.25 > 4 * stderr


def test_the_kernel_distance_is_the_unbiased_sum_over_pairs():
    x, y = torch.randn(2, 6, 3, dtype=torch.float64)

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    by_hand = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) - 2 * kernel(x[i], y[j]) for i, j in pairs) / 30
    distance, stderr = kernel_distance(x, y, blocks=1)
    assert distance == pytest.approx(by_hand) and math.isnan(stderr)
    assert math.isnan(kernel_distance(x[:1], y[:1], blocks=1)[0])
    halves = [kernel_distance(x[part], y[part], blocks=1)[0] for part in (slice(0, 3), slice(3, 6))]
    found = kernel_distance(x, y, blocks=2)
    assert found == pytest.approx((np.mean(halves), np.std(halves, ddof=1) / math.sqrt(2)))
    with pytest.raises(ValueError, match="sets of 6 and 5 features"):
        kernel_distance(x, y[:5])


def test_the_kernel_distance_sees_a_blur_and_not_which_image_belongs_to_which_prompt():
    reference = image_features(renderings(ROWS, 0))
    assert ((reference.square().mean(1) - 1).abs() < 1e-5).all()
    fresh = [kernel_distance(image_features(renderings(ROWS, seed)), reference, blocks=4)[0] for seed in range(1, 9)]
    assert abs(np.mean(fresh)) < 4 * np.std(fresh, ddof=1) / math.sqrt(8)
    second = renderings(ROWS, 1)
    blurred = gaussian_filter(second.astype(float), (0, 1.5, 1.5, 0)).round().astype(np.uint8)
    worse, _ = kernel_distance(image_features(blurred), reference, blocks=4)
    assert worse > 10 * max(map(abs, fresh))
    exchanged, _ = kernel_distance(image_features(np.roll(second, 24, 0)), reference, blocks=4)
    assert abs(exchanged) < worse / 10
