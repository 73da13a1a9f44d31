"When a run ends early, and what its report warns of: numbers on both sides of every limit."

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vgpo.evaluation.scores import Evaluation
from vgpo.objectives.clipped import ClippedSurrogate
from vgpo.rewards.base import Scores
from vgpo.runs.early_stopping import EarlyStopping, flat_warning, patience_reason, reason_to_stop, spread_warning

NAN = float("nan")


def evaluations(scores, error=0.125):
    return [{"epoch": 5 * i, "eval/reward": s, "eval/reward_stderr": error} for i, s in enumerate(scores)]


def measured(epoch, reward, second, errors=(0.125, 0.0625)):
    return {"epoch": epoch, "eval/reward_change": reward, "eval/reward_stderr": errors[0],
            "eval/validation_reward_change": second, "eval/validation_reward_stderr": errors[1]}  # fmt: skip


def warnings(rows, **options):
    "What a report warns of whose metrics are `rows`."
    return EarlyStopping(**options).warnings(rows)


def test_defaults_stop_nothing_and_ask_for_no_extra_work():
    stopping = EarlyStopping()
    assert (stopping.patience, stopping.validation_reward, ClippedSurrogate().target_kl) == (0, None, 0)
    rows = [row | {"kl": 1e9, "frac_reward_zero_std": 0.5} for row in evaluations([0.9, 0.1, 0.1, 0.1])]
    assert reason_to_stop(rows) is None and warnings(rows[:1]) == []


@pytest.mark.parametrize("kl, stops", [(0.25, False), (0.2501, True), (math.inf, True), (NAN, False), (None, False)])
def test_the_budget_ends_a_run_above_it_and_not_at_it(kl, stops):
    reason = reason_to_stop([{"epoch": 6, "kl": 0.1}, {"epoch": 7, "kl": kl}], target_kl=0.25)
    assert bool(reason) == stops
    if stops:
        assert f"{kl:.3g} in epoch 7, above objective.target_kl, 0.25" in reason


def test_the_budget_is_about_the_last_epoch_so_a_raised_one_lets_a_run_go_on():
    rows = [{"epoch": 0, "kl": 0.5}]
    assert reason_to_stop(rows, target_kl=0.25) and not reason_to_stop(rows, target_kl=1)
    assert reason_to_stop([], target_kl=0.25) is None
    assert reason_to_stop([{"epoch": 0}], target_kl=0.25) is None


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
    assert bool(reason_to_stop(evaluations(scores), patience=2)) == ends


def test_patience_names_the_evidence_and_counts_evaluations_not_epochs():
    rows = []
    for row in evaluations([0.5, 0.25, 0.375]):
        rows += [row, {"epoch": row["epoch"] + 1, "eval/reward": None}, {"epoch": 99}]
    assert patience_reason(rows, 3) is None and patience_reason([], 3) is None
    reason = patience_reason(rows, 2)
    assert "in 2 evaluations: 0.500 at epoch 0, since then at most 0.375 ± 0.125 (early_stopping.patience 2)" in reason


@pytest.mark.parametrize("key", ["eval/reward", "eval/reward_stderr"])
@pytest.mark.parametrize("value", [None, NAN])
def test_an_evaluation_without_a_number_neither_counts_nor_moves_the_mark(key, value):
    rows = evaluations([0.5, 0.9, 0.5])
    rows[1][key] = value
    assert patience_reason(rows, 2) is None and patience_reason([*rows, *evaluations([0.5])], 2)


@pytest.mark.parametrize("reward, second, warns", [
    (0.5, -0.25, True),
    (0.375, -0.25, False),  # the reward rose by exactly three errors
    (0.376, -0.1875, False),  # the second one fell by exactly three errors
    (0.376, -0.1876, True),
    (0.5, 0.25, False),
    (-0.5, -0.25, False),
    (NAN, -0.25, False),
    (0.5, None, False),
])  # fmt: skip
def test_hacking_needs_both_halves(reward, second, warns):
    assert len(warnings([measured(0, reward, second)], validation_reward="JPEG")) == warns


def test_hacking_is_told_with_its_numbers_and_since_when():
    rows = [measured(0, 0.5, -0.25), measured(5, 0, 0), measured(10, 0.5, -0.5), {"epoch": 11}, measured(15, 0.75, -1)]
    (text,) = warnings([*rows, measured(20, NAN, -1)], validation_reward="JPEG")
    for part in (
        "+0.750 ± 0.125",
        "validation reward by -1.000 ± 0.062",
        "at epoch 15",
        "3 standard errors",
        "from epoch 10 on",
    ):
        assert part in text
    assert warnings([*rows, measured(20, 0.75, 0)], validation_reward="JPEG") == []  # it came back
    assert warnings(rows) == []  # there is no second reward any more
    assert warnings(rows, validation_reward="JPEG", validation_drop=16) == []
    assert (
        len(warnings([measured(0, 0.5, -0.001, (0.0, 0.0))], validation_reward="JPEG")) == 1
    )  # all images fell by as much


@pytest.mark.parametrize("values, warns", [
    ([0.5] * 5, False),
    ([0.5] * 4 + [0.51], True),
    ([1.0] * 4, False),  # too few epochs
    ([1.0] * 5 + [0.0] * 4 + [1.0], False),  # the last five only
    ([None, NAN] + [0.75] * 5, True),
    ([0.75] * 4 + [None], False),
])  # fmt: skip
def test_spread_over_the_last_five_epochs(values, warns):
    rows = [{"epoch": i, "frac_reward_zero_std": v} for i, v in enumerate(values)]
    texts = warnings([*rows, {"epoch": len(rows), "eval/reward": 0.5}])
    assert len(texts) == warns and all("no spread" in text and "% of the groups" in text for text in texts)
    assert spread_warning(rows, limit=1) is None


def test_a_run_ends_in_the_same_epoch_wherever_it_was_interrupted():
    draw, ends = np.random.default_rng(0), set()
    limits = {"patience": 2, "target_kl": 0.95}
    for _ in range(50):
        rows = (
            evaluations(draw.normal(size=30).cumsum() / 10)
            if draw.random() < 0.5
            else [{"epoch": i} for i in range(30)]
        )
        rows = [row | {"kl": float(draw.random())} for row in rows]

        def end(interrupted):
            seen = json.loads(json.dumps(rows[:interrupted]))  # noqa: B023
            while len(seen) < 30 and not reason_to_stop(seen, **limits):
                seen.append(rows[len(seen)])  # noqa: B023
            return len(seen)

        ends.add(end(0))
        assert {end(k) for k in range(end(0) + 1)} == {end(0)}
    assert len(ends) > 5


@pytest.mark.parametrize("scores, warns", [([], False), ([0.5], False), ([0.5, 0.75, 0.625], False),
                                           ([0.5, 0.75, 0.5625], True), ([0.75, 0.5, 0.875], False)])  # fmt: skip
def test_a_report_says_where_the_best_weights_are_if_it_has_not_ended_there(scores, warns):
    told = warnings(evaluations(scores))
    assert bool(told) == warns
    if warns:
        assert "0.562 ± 0.125, but was 0.750 at epoch 5" in told[0] and told[0].endswith("best/epoch-00005")
    assert warnings(evaluations([0.75, 0.5]))[0].endswith("0.750 before training")


def evaluation(first, second, rows):
    "An Evaluation of 40 images whose rewards are these."
    scores = {"reward": Scores(first, first, first > 0.5), "validation": Scores(second, second)}
    return Evaluation(rows, scores, np.zeros((40, 2, 2, 3), np.uint8), list(range(40)))


def test_metrics_of_an_evaluation_carry_the_paired_error_and_are_what_a_warning_reads():
    torch.manual_seed(0)
    rows = [{"prompt": str(i), "tag": "ab"[i % 2]} for i in range(40)]
    first, last, better, worse = (torch.rand(40) for _ in range(4))
    before, after = evaluation(first, better, rows), evaluation(last, worse - 1, rows)
    metrics = after.metrics(before)
    difference = (last - first).double()
    halves = [difference[i::2] for i in (0, 1)]
    assert metrics.keys() == {"eval/reward", "eval/accuracy", "eval/reward_change", "eval/reward_stderr",
                              "eval/validation_reward", "eval/validation_reward_change",
                              "eval/validation_reward_stderr"}  # fmt: skip
    assert metrics["eval/reward_change"] == pytest.approx(difference.mean().item())
    assert metrics["eval/reward_stderr"] == pytest.approx((sum(h.var() / 20 for h in halves) ** 0.5 / 2).item())
    assert metrics["eval/accuracy"] == pytest.approx((last > 0.5).float().mean().item())
    row = {"epoch": 3} | metrics | {"eval/reward_change": 9.0}
    assert len(warnings([row], validation_reward="JPEG")) == 1 and warnings([row]) == []
    assert before.metrics().keys() == {"eval/reward", "eval/accuracy", "eval/validation_reward"}


def test_it_looks_before_training_and_after_every_epoch():
    "So a resumed run that has come to its limit does not train another epoch."
    trainer, rows = (
        SimpleNamespace(stopped=None, accelerator=SimpleNamespace(is_main_process=True, num_processes=1)),
        [],
    )
    stopping = EarlyStopping(patience=2)
    stopping.attach(rows, ClippedSurrogate(target_kl=0.5))
    stopping.before_fit(trainer)
    assert trainer.stopped is None
    rows.append({"epoch": 0, "kl": 0.6})
    stopping.after_epoch(trainer)
    assert "above objective.target_kl, 0.5" in trainer.stopped
    stopping.attach(rows, ClippedSurrogate(target_kl=0.7))
    stopping.before_fit(trainer)
    assert trainer.stopped is None
    rows += evaluations([0.5, 0.5, 0.5])
    stopping.before_fit(trainer)
    assert "early_stopping.patience 2" in trainer.stopped


def test_steps_whose_rewards_are_alike_are_named_and_a_single_score_is_not():
    def rows(*rewards):
        return [{"epoch": epoch, "reward_by_step": list(rewards)} for epoch in range(7)]

    assert "in epochs 2 to 6 the mean rewards of all scored steps lie within 0.010" in flat_warning(
        rows(0.5, 0.505, 0.51)
    )
    assert flat_warning(rows(0.5, 0.505, 0.52)) is None  # as far as the limit
    assert flat_warning(rows(0.5, 0.5, 0.5)) is None  # what GRPO logs
    assert flat_warning(rows(0.5, 0.51)[:4]) is None and flat_warning([{"epoch": 0}]) is None
