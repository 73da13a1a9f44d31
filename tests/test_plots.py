import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vgpo.plots import (
    before_after,
    describe,
    image_grid,
    results_table,
    trailing_mean,
    training_curves,
    wrap_caption,
    write_report,
)
from vgpo.rewards.base import Scores

LONG = "a photo of a green square left of a blue triangle\n0.75"


def pictures(n, value=0):
    return np.stack([np.full((4, 4, 3), (value + i) % 256, dtype=np.uint8) for i in range(n)])


def scores(values, strict=None):
    values = torch.tensor(values)
    return Scores(values, values, None if strict is None else torch.tensor(strict), [{}] * len(values))


def shown(axis):
    return int(axis.images[0].get_array()[0, 0, 0])


@pytest.mark.parametrize("width", [0.5, 1.1, 3.0])
def test_wrapping_loses_no_word_and_keeps_given_breaks(width):
    text = wrap_caption(LONG, width)
    assert text.split() == LONG.split() and text.endswith("\n0.75")
    assert wrap_caption("\n0.5", width) == "\n0.5"


@pytest.mark.parametrize("columns", [3, 8])
def test_long_captions_touch_no_other_caption_and_no_picture(columns):
    figure = image_grid(pictures(16), [LONG] * 16, columns=columns, title="a title")
    figure.draw_without_rendering()
    boxes = [axis.title.get_window_extent() for axis in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(a.overlaps(axis.get_window_extent()) for i, a in enumerate(boxes)
                   for j, axis in enumerate(figure.axes) if j != i)  # fmt: skip


def test_grid_refuses_lists_of_another_length():
    with pytest.raises(ValueError, match="3 images but 2 captions"):
        image_grid(pictures(3), ["a", "b"])
    with pytest.raises(ValueError, match="3 images but 4 marks"):
        image_grid(pictures(3), marks=[True] * 4)
    with pytest.raises(ValueError, match="no image"):
        image_grid([])


def test_frames_tell_right_from_wrong():
    axes = image_grid(pictures(2), marks=[True, False]).axes
    green, red = (axis.spines["left"].get_edgecolor() for axis in axes)
    assert green[1] > green[0] and red[0] > red[1]


def test_trailing_mean_never_uses_the_future():
    values = np.arange(20.0)
    assert trailing_mean(values, 4).tolist() == [values[max(0, i - 3) : i + 1].mean() for i in range(20)]
    assert (trailing_mean(values[:7], 4) == trailing_mean(values, 4)[:7]).all()


def test_curves_have_labels_and_survive_what_was_not_logged():
    metrics = [{"epoch": e, "reward": e / 10, "strict": None} for e in range(5)]
    axes = training_curves(metrics).axes
    assert all(axis.get_xlabel() == "epoch" and axis.get_ylabel() and axis.get_title() for axis in axes)
    assert axes[0].lines[0].get_ydata().tolist() == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert not axes[1].lines and axes[1].texts[0].get_text() == "not logged"


@pytest.mark.parametrize("count", [5, 8, 20])
def test_before_stands_above_after_for_every_prompt(count):
    n, prompts = 20, [f"prompt {i}" for i in range(20)]
    values = [i / 100 for i in range(n)]
    figure = before_after(pictures(n), pictures(n, 100), prompts, count, (scores(values), scores(values)), columns=8)
    columns = min(8, count)
    above, below = [], []
    for i, axis in enumerate(figure.axes):
        if axis.images and shown(axis) < 255:
            (below if i // columns % 2 else above).append((shown(axis), axis.get_title()))
    assert len(above) == count and [value + 100 for value, _ in above] == [value for value, _ in below]
    assert all(title.replace("\n", " ") == f"prompt {i} {i / 100:.2f}" for i, title in above)
    assert [axis.get_ylabel() for axis in figure.axes[::columns]][:2] == ["before", "after"]


SUMMARY = {"score": 0.5, "strict": 0.25, "stderr": 0.02, "images": 20, "by_task": {"colors": 0.5, "counting": 0.0}}


def test_table_has_a_row_a_task_and_errors_where_they_are_known():
    after = SUMMARY | {"strict": 0.5, "by_task": {"colors": 0.75, "counting": 0.25}}
    text = results_table(SUMMARY, after, {"strict": {"stderr": 0.03}})
    assert "| strict accuracy | 0.250 | 0.500 | +0.250 ± 0.030 |" in text
    assert "| strict, counting | 0.000 | 0.250 | +0.250 |" in text
    assert describe(SUMMARY) == "strict 0.250 ± 0.020, score 0.500" and describe({"score": 0.5}) == "score 0.500"


@pytest.mark.parametrize("judged", [True, False])
def test_report_names_its_pictures_and_its_numbers(tmp_path, judged):
    summary = SUMMARY if judged else {"score": 0.5, "images": 20}
    result = SimpleNamespace(
        images=pictures(20), scores=scores([0.5] * 20, [True] * 20 if judged else None), summary=summary,
        change_from=lambda other: {"score": {"change": 0.0, "stderr": 0.0}})  # fmt: skip
    config = SimpleNamespace(
        name="trial", seed=3, advantage=SimpleNamespace(kind="vgpo"),
        evaluation=SimpleNamespace(steps=20, guidance_scale=1.0),
        sampling=SimpleNamespace(groups=2, group_size=4))  # fmt: skip
    metrics = [{"epoch": 0, "reward": 0.5}]
    write_report(tmp_path, config, result, result, metrics, 12.34, [f"prompt {i}" for i in range(20)])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# trial, vgpo, seed 3") and "| 0.500 | 0.500 | +0.000 ± 0.000 |" in text
    for name in ("before_after.png", "curves.png"):
        assert f"]({name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seconds"] == 12.3 and results["after"] == summary
