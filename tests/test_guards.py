import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vgpo.evaluate import Result, summarise
from vgpo.runs.early_stopping import (
    GuardConfig,
    heldout_metrics,
    patience_reason,
    reason_to_stop,
    report_warnings,
)
from vgpo.rewards.base import Scores

NAN = float("nan")
QUALITY = GuardConfig(quality="jpeg")


def exams(scores, error=0.125):
    return [{"epoch": 5 * i, "heldout_score": s, "heldout_score_stderr": error} for i, s in enumerate(scores)]


def judged(epoch, score, quality, errors=(0.125, 0.0625)):
    return {"epoch": epoch, "heldout_score_change": score, "heldout_score_stderr": errors[0],
            "heldout_quality_change": quality, "heldout_quality_stderr": errors[1]}  # fmt: skip


def test_defaults_stop_nothing_and_ask_for_no_extra_work():
    guard = GuardConfig()
    assert (guard.patience, guard.kl_budget, guard.quality, guard.quality_options) == (0, 0, None, {})
    rows = [row | {"kl": 1e9, "zero_std": 0.5} for row in exams([0.9, 0.1, 0.1, 0.1])]
    assert reason_to_stop(rows, guard) is None and report_warnings(rows[:1], guard) == []


@pytest.mark.parametrize("kl, stops", [(0.25, False), (0.2501, True), (math.inf, True), (NAN, False), (None, False)])
def test_the_budget_ends_a_run_above_it_and_not_at_it(kl, stops):
    reason = reason_to_stop([{"epoch": 6, "kl": 0.1}, {"epoch": 7, "kl": kl}], GuardConfig(kl_budget=0.25))
    assert bool(reason) == stops
    if stops:
        assert f"{kl:.3g} in epoch 7, above guard.kl_budget, 0.25" in reason


def test_the_budget_is_about_the_last_epoch_so_a_raised_one_lets_a_run_go_on():
    rows = [{"epoch": 0, "kl": 0.5}]
    assert reason_to_stop(rows, GuardConfig(kl_budget=0.25)) and not reason_to_stop(rows, GuardConfig(kl_budget=1))
    assert reason_to_stop([], GuardConfig(kl_budget=0.25)) is None
    assert reason_to_stop([{"epoch": 0}], GuardConfig(kl_budget=0.25)) is None


@pytest.mark.parametrize("scores, ends", [
    ([0.5], False),
    ([0.5, 0.5], False),
    ([0.5, 0.5, 0.5], True),
    ([0.5, 0.5, 0.625], True),  # a rise by exactly one error is none
    ([0.5, 0.5, 0.626], False),
    ([0.5, 0.625, 0.75], False),  # two half rises add up
    ([0.5, 0.75, 0.5, 0.5], True),  # after a rise the count begins anew
    ([0.5, 0.5, 0.75, 0.5], False),
    ([0.5, 0.1, 0.3], True),  # a recovery from a fall is not a rise
])  # fmt: skip
def test_patience_of_two(scores, ends):
    assert bool(reason_to_stop(exams(scores), GuardConfig(patience=2))) == ends


def test_patience_names_the_evidence_and_counts_evaluations_not_epochs():
    rows = []
    for row in exams([0.5, 0.25, 0.375]):
        rows += [row, {"epoch": row["epoch"] + 1, "heldout_score": None}, {"epoch": 99}]
    assert patience_reason(rows, 3) is None and patience_reason([], 3) is None
    reason = patience_reason(rows, 2)
    assert "in 2 evaluations: 0.500 at epoch 0, since then at most 0.375 ± 0.125 (guard.patience 2)" in reason


@pytest.mark.parametrize("key", ["heldout_score", "heldout_score_stderr"])
@pytest.mark.parametrize("value", [None, NAN])
def test_an_evaluation_without_a_number_neither_counts_nor_moves_the_mark(key, value):
    rows = exams([0.5, 0.9, 0.5])
    rows[1][key] = value
    assert patience_reason(rows, 2) is None and patience_reason([*rows, *exams([0.5])], 2)


@pytest.mark.parametrize("score, quality, warns", [
    (0.5, -0.25, True),
    (0.375, -0.25, False),  # the score rose by exactly three errors
    (0.376, -0.1875, False),  # the quality fell by exactly three errors
    (0.376, -0.1876, True),
    (0.5, 0.25, False),
    (-0.5, -0.25, False),
    (NAN, -0.25, False),
    (0.5, None, False),
])  # fmt: skip
def test_hacking_needs_both_halves(score, quality, warns):
    assert len(report_warnings([judged(0, score, quality)], QUALITY)) == warns


def test_hacking_is_told_with_its_numbers_and_since_when():
    rows = [judged(0, 0.5, -0.25), judged(5, 0, 0), judged(10, 0.5, -0.5), {"epoch": 11}, judged(15, 0.75, -1)]
    (text,) = report_warnings([*rows, judged(20, NAN, -1)], QUALITY)
    for part in ("+0.750 ± 0.125", "(jpeg) by -1.000 ± 0.062", "at epoch 15", "3 standard errors", "from epoch 10 on"):
        assert part in text
    assert report_warnings([*rows, judged(20, 0.75, 0)], QUALITY) == []  # quality came back
    assert report_warnings(rows, GuardConfig()) == []
    assert report_warnings(rows, GuardConfig(quality="jpeg", quality_drop=16)) == []
    assert len(report_warnings([judged(0, 0.5, -0.001, (0.0, 0.0))], QUALITY)) == 1  # all images fell by as much


@pytest.mark.parametrize("values, warns", [
    ([0.5] * 5, False),
    ([0.5] * 4 + [0.51], True),
    ([1.0] * 4, False),  # too few epochs
    ([1.0] * 5 + [0.0] * 4 + [1.0], False),  # the last five only
    ([None, NAN] + [0.75] * 5, True),
    ([0.75] * 4 + [None], False),
])  # fmt: skip
def test_spread_over_the_last_five_epochs(values, warns):
    rows = [{"epoch": i, "zero_std": v} for i, v in enumerate(values)]
    texts = report_warnings([*rows, {"epoch": len(rows), "heldout_score": 0.5}], GuardConfig())
    assert len(texts) == warns and all("guard.zero_std 0.5" in text for text in texts)
    assert report_warnings(rows, GuardConfig(zero_std=1)) == []


def test_a_run_ends_in_the_same_epoch_wherever_it_was_interrupted():
    draw, ends = np.random.default_rng(0), set()
    guard = GuardConfig(patience=2, kl_budget=0.95)
    for _ in range(50):
        rows = exams(draw.normal(size=30).cumsum() / 10) if draw.random() < 0.5 else [{"epoch": i} for i in range(30)]
        rows = [row | {"kl": float(draw.random())} for row in rows]

        def end(interrupted):
            seen = json.loads(json.dumps(rows[:interrupted]))  # noqa: B023
            while len(seen) < 30 and not reason_to_stop(seen, guard):
                seen.append(rows[len(seen)])  # noqa: B023
            return len(seen)

        ends.add(end(0))
        assert {end(k) for k in range(end(0) + 1)} == {end(0)}
    assert len(ends) > 5


@pytest.mark.parametrize("scores, warns", [([], False), ([0.5], False), ([0.5, 0.75, 0.625], False),
                                           ([0.5, 0.75, 0.5625], True), ([0.75, 0.5, 0.875], False)])  # fmt: skip
def test_a_report_says_where_the_best_weights_are_if_it_has_not_ended_there(scores, warns):
    told = report_warnings(exams(scores), GuardConfig())
    assert bool(told) == warns
    if warns:
        assert "0.562 ± 0.125, but was 0.750 at epoch 5" in told[0] and told[0].endswith("best/epoch-00005")
    assert report_warnings(exams([0.75, 0.5]), GuardConfig())[0].endswith("0.750 before training")


def test_heldout_metrics_of_a_result_carry_the_paired_error():
    torch.manual_seed(0)
    rows = [{"prompt": str(i), "tag": "ab"[i % 2]} for i in range(40)]
    first, last = (torch.rand(40) for _ in range(2))
    before, after = (
        Result(np.zeros((40, 2, 2, 3), np.uint8), s, summarise(s, rows), rows)
        for s in (Scores(v, v, v > 0.5, [{}] * 40) for v in (first, last))
    )
    metrics = heldout_metrics(after.summary, after.change_from(before))
    difference = (last - first).double()
    halves = [difference[i::2] for i in (0, 1)]
    assert metrics.keys() == {"heldout_score", "heldout_strict", "heldout_score_change", "heldout_score_stderr"}
    assert metrics["heldout_score_change"] == pytest.approx(difference.mean().item())
    assert metrics["heldout_score_stderr"] == pytest.approx((sum(h.var() / 20 for h in halves) ** 0.5 / 2).item())
    assert metrics["heldout_strict"] == after.summary["strict"]


def test_heldout_metrics_hold_the_second_judge_as_the_warning_reads_it():
    change = {"score": {"change": 0.5, "stderr": 0.1}, "quality": {"change": -0.5, "stderr": 0.1}, "task": {}}
    row = {"epoch": 3} | heldout_metrics({"score": 0.75, "quality": 0.25, "images": 8}, change)
    assert row["heldout_quality"] == 0.25 and "heldout_strict" not in row
    assert len(report_warnings([row], QUALITY)) == 1
    assert report_warnings([row], SimpleNamespace(quality=None, zero_std=0.5)) == []
