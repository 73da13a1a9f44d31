"JPEG compressibility: the size of the file, its scale, and its quality."

import re

import numpy as np
import pytest
import torch
from PIL import Image

from vgpo.rewards.base import make_reward, score
from vgpo.rewards.own import JPEG


def noisy(levels, size=64):
    "Grey images with noise of growing strength."
    noise = np.random.default_rng(0).normal(size=(size, size, 3))
    return np.stack([(128 + level * noise).clip(0, 255).astype(np.uint8) for level in levels])


def scores_of(reward, images):
    return score(reward, images, ["x"] * len(images), [{}] * len(images))


@pytest.mark.parametrize("quality", [None, 1, 50, 100])
def test_the_score_is_the_size_of_the_file(tmp_path, quality):
    images = noisy([0, 10, 60])
    scores = scores_of(make_reward("JPEG", **({} if quality is None else {"quality": quality})), images)
    for image, raw, details in zip(images, scores.raw, scores.details, strict=True):
        Image.fromarray(image).save(tmp_path / "image.jpeg", quality=quality or 95)
        size = (tmp_path / "image.jpeg").stat().st_size
        assert details == {"bytes": size}
        assert raw.item() == pytest.approx(-(size / 1000) / 500, rel=1e-6)
    torch.testing.assert_close(scores.scaled, 1 + scores.raw)
    assert scores.strict is None


def test_smoother_is_better_and_each_picture_counts_for_itself():
    reward, images = JPEG(), noisy([0, 2, 10, 40, 120])
    scores = scores_of(reward, images)
    assert (scores.scaled.diff() < 0).all()
    order = [3, 0, 4, 1, 2]
    assert torch.equal(scores_of(reward, images[order]).raw, scores.raw[order])
    wide = noisy([5], 32)[:, :, :8]  # images need not be square, nor multiples of 8
    assert scores_of(reward, wide[:, :13]).raw < 0


def test_large_files_get_zero_and_no_less():
    noise = np.random.default_rng(0).integers(0, 256, (1, 800, 800, 3)).astype(np.uint8)
    scores = scores_of(JPEG(), noise)
    assert scores.raw < -1 and scores.scaled == 0


def test_sizes_depend_on_quality_and_codec_which_are_on_record():
    images = noisy([20])
    low, high = JPEG(quality=30), JPEG(quality=95)
    assert scores_of(low, images).raw > scores_of(high, images).raw
    assert re.fullmatch(r"pillow [\d.]+, libjpeg [\d.]+, quality 30", low.version) and low.version != high.version


@pytest.mark.parametrize("quality", [0, 101, -1, 95.5, "high", None])
def test_bad_quality(quality):
    with pytest.raises(ValueError, match=re.escape(f"JPEG.quality is {quality!r}; it must be")):
        JPEG(quality)
