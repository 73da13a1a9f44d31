import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vgpo.plots import (
    before_after,
    describe,
    evenly_spaced,
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
    assert [axis.get_frame_on() for axis in image_grid(pictures(2), marks=[False, None]).axes] == [True, False]


def test_a_title_stays_within_its_figure():
    figure = image_grid(pictures(2), title="a rather long title " * 8)
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_trailing_mean_never_uses_the_future():
    values = np.arange(20.0)
    assert trailing_mean(values, 4).tolist() == [values[max(0, i - 3) : i + 1].mean() for i in range(20)]
    assert (trailing_mean(values[:7], 4) == trailing_mean(values, 4)[:7]).all()


def test_curves_have_labels_and_survive_what_was_not_logged():
    metrics = [{"epoch": e, "reward": e / 10, "strict": None} for e in range(5)]
    axes = training_curves(metrics).axes
    assert all(axis.get_xlabel() == "epoch" and axis.get_ylabel() and axis.get_title() for axis in axes)
    assert axes[0].lines[0].get_ydata().tolist() == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert not axes[1].lines and axes[1].texts[0].get_text() == "not logged" and axes[0].get_legend() is None


def test_held_out_evaluations_stand_beside_the_reward():
    metrics = [{"epoch": e, "reward": 0.5} | ({"heldout_quality": e / 8} if e % 4 == 0 else {}) for e in range(9)]
    axis = training_curves(metrics).axes[0]
    assert axis.lines[2].get_xdata().tolist() == [0, 4, 8] and axis.lines[2].get_ydata().tolist() == [0, 0.5, 1]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["heldout_quality"]


def test_the_sheet_has_as_many_of_each_task_evenly_spaced():
    tags = ["a", "b", "c"] * 30 + ["a"]
    assert evenly_spaced(tags, 9) == [0, 45, 90, 1, 43, 88, 2, 44, 89]
    assert evenly_spaced(["all"] * 528, 2) == [0, 527] and evenly_spaced(["x"], 24) == [0]
    assert evenly_spaced(list("aaaab"), 8) == [0, 1, 2, 3, 4]  # a task with a single row is shown once
    assert len(evenly_spaced([str(i) for i in range(30)], 24)) == 30  # at least one of each


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
    assert not any(axis.get_frame_on() for axis in figure.axes)  # no verdict, no frame
    assert [axis.get_ylabel() for axis in figure.axes[::columns]][:2] == ["before", "after"]


def test_the_sheet_says_its_rule_and_counts_what_it_shows():
    strict = [[True] + [False] * 11, [True] * 6 + [False] * 6]
    both = tuple(scores([0.5] * 12, s) for s in strict)
    tags = ["a", "b"] * 6
    figure = before_after(pictures(12), pictures(12), ["p"] * 12, 6, both, tags=tags, note="the whole exam: 0.5")
    title = figure._suptitle.get_text().replace("\n", " ")
    assert title.startswith("6 of 12 held-out prompts, evenly spaced within each task")
    assert "right (green): 1 before, 4 after" in title and title.endswith("the whole exam: 0.5")
    assert [shown(axis) for axis in figure.axes[:6]] == [0, 4, 10, 1, 5, 11]
    right = scores([0.5] * 5, [True] * 5)
    figure = before_after(pictures(5), pictures(5), ["p"] * 5, scores=(right, right), columns=3)
    assert [axis.get_frame_on() for axis in figure.axes] == [True] * 6 + [True, True, False] * 2


SUMMARY = {"score": 0.5, "strict": 0.25, "stderr": 0.02, "images": 20, "by_task": {"colors": 0.5, "counting": 0.0}}


def test_table_has_a_row_a_task_and_errors_where_they_are_known():
    after = SUMMARY | {"strict": 0.5, "by_task": {"colors": 0.75, "counting": 0.25}}
    text = results_table(SUMMARY, after, {"strict": {"stderr": 0.03}})
    assert "| strict accuracy | 0.250 | 0.500 | +0.250 ± 0.030 |" in text
    assert "| strict, counting | 0.000 | 0.250 | +0.250 |" in text
    judged = [SUMMARY | {"quality": value} for value in (0.5, 0.25)]
    assert "| quality (second judge) | 0.500 | 0.250 | -0.250 ± 0.100 |" in results_table(
        *judged, {"quality": {"stderr": 0.1}}
    )
    assert describe(SUMMARY) == "strict 0.250 ± 0.020, score 0.500" and describe({"score": 0.5}) == "score 0.500"


def write_trial(folder, judged=True, lora_rank=8, **more):
    "A report of twenty grey pictures, before and after; returns its text and its results."
    summary = SUMMARY if judged else {"score": 0.5, "images": 20}
    result = SimpleNamespace(
        images=pictures(20), scores=scores([0.5] * 20, [True] * 20 if judged else None), summary=summary,
        rows=[{"prompt": f"prompt {i}", "tag": "ab"[i % 2]} for i in range(20)],
        change_from=lambda other: {"score": {"change": 0.0, "stderr": 0.0}})  # fmt: skip
    config = SimpleNamespace(
        name="trial", seed=3, advantage=SimpleNamespace(kind="vgpo"), model=SimpleNamespace(lora_rank=lora_rank),
        evaluation=SimpleNamespace(steps=20, guidance_scale=1.0),
        sampling=SimpleNamespace(groups=2, group_size=4))  # fmt: skip
    metrics = [{"epoch": 0, "reward": 0.5}]
    write_report(folder, config, result, result, metrics, 12.34, [row["prompt"] for row in result.rows], **more)
    return (folder / "report.md").read_text(encoding="utf-8"), json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("judged", [True, False])
def test_report_names_its_pictures_and_its_numbers(tmp_path, judged):
    text, results = write_trial(tmp_path, judged)
    assert text.startswith("# trial, vgpo, seed 3\n\n1 epochs") and "| 0.500 | 0.500 | +0.000 ± 0.000 |" in text
    for name in ("before_after.png", "curves.png"):
        assert f"]({name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert results["seconds"] == 12.3 and results["after"] == (SUMMARY if judged else {"score": 0.5, "images": 20})
    assert results["warnings"] == [] and "arning" not in text


@pytest.mark.parametrize("lora_rank, folder, other", [(8, "lora", "transformer"), (0, "transformer", "lora")])
def test_report_says_where_the_weights_are(tmp_path, lora_rank, folder, other):
    text = write_trial(tmp_path, lora_rank=lora_rank)[0]
    assert f"in `{folder}/`" in text and f"`{other}/`" not in text


def test_report_begins_with_its_warnings(tmp_path):
    text, results = write_trial(tmp_path, warnings=["quality fell", "no spread"])
    assert text.startswith("# trial, vgpo, seed 3\n\n## Warnings\n\n- quality fell\n- no spread\n\n## Results\n\n1 ep")
    assert results["warnings"] == ["quality fell", "no spread"]
