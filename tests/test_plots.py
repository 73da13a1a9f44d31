"Grids whose captions can be read, curves with axes, and a sheet that says its rule."

import numpy as np
import pytest
import torch

from vgpo.plots import before_after, evenly_spaced, image_grid, trailing_mean, training_curves, wrap_caption
from vgpo.rewards.base import Scores

ODD = ["a price of $$5", "$x", r"\frac{1}{0} of a^_{ cat", "100% \\n %s %(x)s", "back\\slash$", "{0} <b>&amp;"]
LONG = "a photo of a green square left of a blue triangle\n0.75"


def images(n, value=0):
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
def test_long_captions_touch_no_other_caption_and_no_image(columns):
    figure = image_grid(images(16), [LONG] * 16, columns=columns, title="a title")
    figure.draw_without_rendering()
    boxes = [axis.title.get_window_extent() for axis in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(a.overlaps(axis.get_window_extent()) for i, a in enumerate(boxes)
                   for j, axis in enumerate(figure.axes) if j != i)  # fmt: skip


def test_text_is_text_wherever_it_stands():
    "Nothing of a prompt is read as a formula or a format, and nothing of it is lost."
    n = len(ODD)
    figure = image_grid(images(n), ODD, columns=3, size=3, title=ODD[0], row_labels=ODD[:2])
    sheet = before_after(images(n), images(n), ODD, note=ODD[2], scores=(scores([0.5] * n),) * 2)
    for made in (figure, sheet):
        made.draw_without_rendering()
    assert [axis.get_title() for axis in figure.axes] == ODD and figure._suptitle.get_text() == ODD[0]
    assert [axis.get_ylabel() for axis in figure.axes[::3]] == ODD[:2]
    assert [axis.get_title().replace("\n", " ") for axis in sheet.axes[:n]] == [f"{prompt} 0.50" for prompt in ODD]
    assert ODD[2] in sheet._suptitle.get_text()


def test_grid_refuses_lists_of_another_length():
    with pytest.raises(ValueError, match="3 images but 2 captions"):
        image_grid(images(3), ["a", "b"])
    with pytest.raises(ValueError, match="3 images but 4 marks"):
        image_grid(images(3), marks=[True] * 4)
    with pytest.raises(ValueError, match="no image"):
        image_grid([])


def test_frames_tell_right_from_wrong():
    axes = image_grid(images(2), marks=[True, False]).axes
    green, red = (axis.spines["left"].get_edgecolor() for axis in axes)
    assert green[1] > green[0] and red[0] > red[1]
    assert [axis.get_frame_on() for axis in image_grid(images(2), marks=[False, None]).axes] == [True, False]


def test_a_title_stays_within_its_figure():
    figure = image_grid(images(2), title="a rather long title " * 8)
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_trailing_mean_never_uses_the_future():
    values = np.arange(20.0)
    assert trailing_mean(values, 4).tolist() == [values[max(0, i - 3) : i + 1].mean() for i in range(20)]
    assert (trailing_mean(values[:7], 4) == trailing_mean(values, 4)[:7]).all()


def test_curves_have_labels_and_survive_what_was_not_logged():
    metrics = [{"epoch": e, "reward": e / 10, "accuracy": None} for e in range(5)]
    axes = training_curves(metrics).axes
    assert all(axis.get_xlabel() == "epoch" and axis.get_ylabel() and axis.get_title() for axis in axes)
    assert axes[0].lines[0].get_ydata().tolist() == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert not axes[1].lines and axes[1].texts[0].get_text() == "not logged" and axes[0].get_legend() is None


def test_held_out_evaluations_stand_beside_the_reward():
    metrics = [
        {"epoch": e, "reward": 0.5} | ({"eval/validation_reward": e / 8} if e % 4 == 0 else {}) for e in range(9)
    ]
    axis = training_curves(metrics).axes[0]
    assert axis.lines[2].get_xdata().tolist() == [0, 4, 8] and axis.lines[2].get_ydata().tolist() == [0, 0.5, 1]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["eval/validation_reward"]


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
    figure = before_after(images(n), images(n, 100), prompts, count, (scores(values), scores(values)), columns=8)
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
    figure = before_after(images(12), images(12), ["p"] * 12, 6, both, tags=tags, note="all images: 0.5")
    title = figure._suptitle.get_text().replace("\n", " ")
    assert title.startswith("6 of 12 held-out prompts, evenly spaced within each task")
    assert "right (green): 1 before, 4 after" in title and title.endswith("all images: 0.5")
    assert [shown(axis) for axis in figure.axes[:6]] == [0, 4, 10, 1, 5, 11]
    right = scores([0.5] * 5, [True] * 5)
    figure = before_after(images(5), images(5), ["p"] * 5, scores=(right, right), columns=3)
    assert [axis.get_frame_on() for axis in figure.axes] == [True] * 6 + [True, True, False] * 2


def test_a_sheet_of_images_that_were_picked_before_says_of_how_many():
    verdicts = scores([0.5] * 4, [True, False, True, True])
    figure = before_after(images(4), images(4, 9), list("abcd"), scores=(verdicts, verdicts), pick=range(4), total=528)
    title = figure._suptitle.get_text()
    assert title.startswith("4 of 528 held-out prompts") and "right (green): 3 before, 3 after" in title.replace(
        "\n", " "
    )
    assert [shown(axis) for axis in figure.axes[:4]] == [0, 1, 2, 3]
