"JPEG compressibility, and the page that tells of rewards: its table is complete and its example works."

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vgpo.rewards.base import REWARDS, make_reward, score
from vgpo.rewards.own import JPEG

PAGE = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()


def noisy(levels, size=64):
    "Grey pictures with noise of growing strength."
    noise = np.random.default_rng(0).normal(size=(size, size, 3))
    return np.stack([(128 + level * noise).clip(0, 255).astype(np.uint8) for level in levels])


def judge(reward, images):
    return score(reward, images, ["x"] * len(images), [{}] * len(images))


@pytest.mark.parametrize("quality", [None, 1, 50, 100])
def test_the_score_is_the_size_of_the_file(tmp_path, quality):
    images = noisy([0, 10, 60])
    judged = judge(make_reward("jpeg", **({} if quality is None else {"quality": quality})), images)
    for image, raw, details in zip(images, judged.raw, judged.details, strict=True):
        Image.fromarray(image).save(tmp_path / "picture.jpeg", quality=quality or 95)
        size = (tmp_path / "picture.jpeg").stat().st_size
        assert details == {"bytes": size}
        assert raw.item() == pytest.approx(-(size / 1000) / 500, rel=1e-6)
    torch.testing.assert_close(judged.scaled, 1 + judged.raw)
    assert judged.strict is None


def test_smoother_is_better_and_each_picture_counts_for_itself():
    reward, images = JPEG(), noisy([0, 2, 10, 40, 120])
    judged = judge(reward, images)
    assert (judged.scaled.diff() < 0).all()
    order = [3, 0, 4, 1, 2]
    assert torch.equal(judge(reward, images[order]).raw, judged.raw[order])
    wide = noisy([5], 32)[:, :, :8]  # pictures need not be square, nor multiples of 8
    assert judge(reward, wide[:, :13]).raw < 0


def test_large_files_get_zero_and_no_less():
    noise = np.random.default_rng(0).integers(0, 256, (1, 800, 800, 3)).astype(np.uint8)
    judged = judge(JPEG(), noise)
    assert judged.raw < -1 and judged.scaled == 0


def test_sizes_depend_on_quality_and_codec_which_are_on_record():
    images = noisy([20])
    low, high = JPEG(quality=30), JPEG(quality=95)
    assert judge(low, images).raw > judge(high, images).raw
    assert re.fullmatch(r"pillow [\d.]+, libjpeg [\d.]+, quality 30", low.version) and low.version != high.version


@pytest.mark.parametrize("quality", [0, 101, -1, 95.0, "high", None])
def test_bad_quality(quality):
    with pytest.raises(ValueError, match=re.escape(f"quality must be a whole number from 1 to 100, got {quality!r}")):
        JPEG(quality)


def test_the_page_lists_every_reward_once():
    table = PAGE.partition("## Built in")[2].partition("###")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, re.M)) == sorted(REWARDS)
    for link in re.findall(r"\]\(\.\./(nbs/[\w.]+)\)", PAGE):
        assert (Path(__file__).parent.parent / link).is_file()


def test_the_scales_on_the_page_are_those_of_the_classes():
    from vgpo.rewards.clip import Aesthetic, CLIPScore, HPSv2, PickScore

    for made in (CLIPScore, PickScore, Aesthetic, HPSv2, JPEG):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{made.name}` |"))
        assert made.scale.removesuffix(" to [0, 1]") in row
        for name in (getattr(made, "published", ""), getattr(made, "published_processor", "")):
            assert name.removesuffix("/HPS_v2.1_compressed.pt") in row or "the rest as `pickscore`" in row


def test_the_example_on_the_page_is_a_reward_of_about_ten_lines(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    assert len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    images = np.concatenate([noisy([0, 60]), noisy([60])])
    images[2, :, 32:] = images[2, :, 31::-1]  # blank; noise; noise beside its mirror image
    judged = judge(make_reward("my_rewards:likeness", contrast=10), images)
    assert judged.scaled[0] == 0 and judged.scaled[2] == pytest.approx(1, abs=1e-6)
    assert abs(judged.scaled[1] - 0.5) < 3 / np.sqrt(64 * 32 * 3)  # a correlation of 6144 pairs, halved
    negative = images[2].astype(int)
    negative[:, 32:] = 255 - negative[:, 32:]
    assert judge(make_reward("my_rewards:likeness"), negative[None].astype(np.uint8)).scaled < 0.01
    name, option = re.search(r"--reward.name (\S+) --reward.options.(\w+) 10", PAGE).groups()
    assert (name, option) == ("my_rewards:likeness", "contrast")
