"A mean over tasks, its error by image and by prompt, and how both are printed."

import json
import math

import numpy as np
import pytest

from vgpo.evaluation.scores import prompt_clusters
from vgpo.evaluation.statistics import (
    interval,
    interval_cell,
    mean_over_tasks,
    metrics_table,
    summarize,
    table_cell,
    variance_of_mean,
)


def test_mean_over_tasks_golden():
    mean, stderr, tasks = mean_over_tasks([1, 0, 0, 0, 1, 1], list("aaaabb"))
    assert (mean, stderr) == (5 / 8, 1 / 8) and tasks["a"] == (1 / 4, 1 / 4, 4) and tasks["b"] == (1.0, 0.0, 2)
    with pytest.raises(ValueError, match="no values"):
        mean_over_tasks([], [])


def test_clusters_golden():
    "Two prompts of two images, right and wrong: the error is that of two numbers, 1 and 0, and not of four."
    values = np.array([1.0, 1.0, 0.0, 0.0])
    assert variance_of_mean(values, ["p", "p", "q", "q"]) == 1 / 4 and variance_of_mean(values) == 1 / 12
    assert variance_of_mean(values, [3, 5, 7, 9]) == pytest.approx(variance_of_mean(values))
    assert variance_of_mean(values, [1] * 4) == 0.25 and variance_of_mean(values, [1] * 4, 1.0) == 1.0
    # sizes 3 and 1, mean 3/4: sums of deviations are 3/4 and -3/4, so 2/1 * 2 * 9/16 / 16
    assert variance_of_mean(np.array([1.0, 1.0, 1.0, 0.0]), [0, 0, 0, 1]) == pytest.approx(9 / 64)
    by_task = mean_over_tasks([1, 1, 0, 0, 1, 1], list("aaaabb"), clusters=[0, 0, 1, 1, 2, 3])
    assert by_task[1] == pytest.approx(0.25) and by_task[2]["b"] == (1.0, 0.0, 2)


def test_clustered_error_is_that_of_repeated_evaluations():
    "Prompts with success probabilities of their own, Beta(1, 1), so correlation 1/3, and 2 or 4 images: 2,000 times."
    rng, prompt = np.random.default_rng(0), np.repeat(np.arange(30), np.tile([2, 4], 15))
    repeats = []
    for _ in range(2000):
        values = (rng.random(90) < rng.random(30)[prompt]).astype(float)
        repeats.append((values.mean(), variance_of_mean(values, prompt), variance_of_mean(values)))
    mean, clustered, plain = np.array(repeats).T
    assert abs(clustered.mean() / mean.var(ddof=1) - 1) < 4 * math.sqrt(2 / 2000)
    assert mean.var(ddof=1) / plain.mean() > 1.5  # images counted as unrelated: too small an error


def test_standard_error_is_that_of_repeated_evaluations():
    "Variance of 2,000 means against the mean of the 2,000 squared errors; relative error of the former sqrt(2/2000)."
    rng, tags = np.random.default_rng(0), ["a"] * 20 + ["b"] * 60
    truth = np.repeat([0.3, 0.8], [20, 60])
    repeats = np.array([mean_over_tasks(rng.random(80) < truth, tags)[:2] for _ in range(2000)])
    assert abs((repeats[:, 1] ** 2).mean() / repeats[:, 0].var(ddof=1) - 1) < 4 * math.sqrt(2 / 2000)
    assert abs(repeats[:, 0].mean() - 0.55) < 4 * repeats[:, 0].std() / math.sqrt(2000)


def test_geneval_is_a_mean_over_six_tags_with_errors_by_prompt():
    "Six tags of 2 to 7 prompts, four images each: figures by hand from the means of prompts."
    rng = np.random.default_rng(0)
    sizes = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "f": 7}
    rows = [{"prompt": f"{tag}{i}", "tag": tag} for tag, n in sizes.items() for i in range(n)]
    verdicts = rng.random((len(rows), 4)) < rng.random((len(rows), 1))
    images = [row for row in rows for _ in range(4)]
    clusters = prompt_clusters([row["prompt"] for row in images])
    found = summarize({"strict": verdicts.reshape(-1)}, [row["tag"] for row in images], clusters)["strict"]
    parts = {tag: verdicts[[row["tag"] == tag for row in rows]].mean(1) for tag in sizes}
    assert found["mean"] == pytest.approx(np.mean([part.mean() for part in parts.values()]))
    variance = sum(part.var(ddof=1) / len(part) for part in parts.values()) / 36
    assert found["stderr"] == pytest.approx(math.sqrt(variance))
    assert found["ci95"] == pytest.approx([found["mean"] - 1.96 * variance**0.5, found["mean"] + 1.96 * variance**0.5])
    assert found["by_task"]["c"]["images"] == 16 and found["mean"] != pytest.approx(verdicts.mean(), abs=1e-3)


def test_interval_respects_bounds_and_unknown_errors():
    found = summarize({"raw": [22.0, 24.0], "scaled": [0.9, 1.0], "strict": [True, True]}, ["x", "x"], [0, 0])
    assert found["raw"]["stderr"] is None and found["raw"]["ci95"] is None
    assert found["scaled"]["stderr"] == 0.5 and found["scaled"]["ci95"] == [0, 1]
    change = summarize({"strict": [1.0]}, ["x"], [0], {"strict": (-1, 1)})["strict"]
    assert change["stderr"] == 1 and change["ci95"] == [pytest.approx(-0.96), 1]
    assert interval(0.5, math.inf, 0, 1) == {"mean": 0.5, "stderr": None, "ci95": None}
    json.dumps(found, allow_nan=False)


def test_clusters_are_prompts_by_text():
    assert prompt_clusters(["x", "x", "y", "y", "x", "x"]) == [0, 0, 1, 1, 0, 0]


def test_what_is_printed():
    assert table_cell(None) == "–"
    assert table_cell({"mean": 0.5, "stderr": None}) == "0.500" and table_cell({"mean": 1, "stderr": 0}) == "1.000 ± 0"
    small = {"mean": -0.0021, "stderr": 0.00023, "ci95": [-0.00255, -0.00165]}
    assert table_cell(small) == "-0.00210 ± 0.00023" and interval_cell(small, "+") == "-0.00255 to -0.00165"
    text = metrics_table(
        {"m": summarize({"raw": [1, 2, 3, 4], "strict": [1, 0, 0, 0]}, list("aabb"))}, "+"
    ).splitlines()
    assert [line.split(" | ")[1].strip() for line in text[2:]] == ["a", "b", "mean over tasks"]
    assert text[4].startswith("| m      | mean over tasks | +2.500 ± 0.354 | +0.250 ± 0.250 |")
    assert len(set(map(len, text))) == 1
    assert "| all " in metrics_table({"m": summarize({"raw": [1, 2]}, ["all", "all"])})
