import pytest
import torch
from torch.testing import assert_close

from vgpo.advantages import group_relative, held_values, others_mean, step_weights, value_anchored
from vgpo.values import discounted_values, temporal_weights


def quotient(values, group, k, anchor_steps):
    "The paper's form, one group and one step at a time: omega ((1 + alpha) Q - mean) / std, alpha = k std or 0."
    out, weights = torch.empty_like(values), values / values.mean(1, keepdim=True)
    for g in group.unique():
        for j in range(values.shape[1]):
            q = values[group == g, j]
            std = (q - q.mean()).square().mean().sqrt()
            alpha = k * std if j < anchor_steps else 0.0
            out[group == g, j] = ((1 + alpha) * q - q.mean()) / std
    return weights * out


def batch(samples=24, steps=6, groups=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(samples, steps, generator=generator, dtype=dtype)
    group = (torch.arange(samples) % groups)[torch.randperm(samples, generator=generator)]
    return values, group


def test_golden():
    "Two samples, two steps: z = ∓1 and ±1; omega = (1/2, 3/2) and (3/2, 1/2); k = 0.1 in the first step only."
    values = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    found = value_anchored(values, torch.tensor([5, 5]), anchor=0.1, anchor_steps=1, eps=0)
    assert_close(found, torch.tensor([[0.5 * -0.9, 1.5], [1.5 * 1.3, -0.5]]))


@pytest.mark.parametrize("k", [0.0, 0.05, 3.0])
@pytest.mark.parametrize("anchor_steps", [0, 2, 6, 100])
def test_equals_the_papers_quotient_where_that_is_defined(k, anchor_steps):
    values, group = batch()
    found = value_anchored(values, group, anchor=k, anchor_steps=anchor_steps, eps=0)
    assert_close(found, quotient(values, group, k, anchor_steps))


def test_anchor_adds_weighted_values_to_the_first_steps_only():
    values, group = batch()
    added = value_anchored(values, group, anchor=0.7, anchor_steps=4) - value_anchored(values, group, anchor=0)
    assert_close(added[:, :4], (0.7 * temporal_weights(values) * values)[:, :4])
    assert not added[:, 4:].any()


def test_is_grpo_for_values_that_do_not_change_and_no_anchor():
    values, group = batch(dtype=torch.float32)
    final = values[:, -1]
    found = value_anchored(final[:, None].expand_as(values), group, anchor=0)
    assert_close(found, group_relative(final, group)[:, None].expand_as(values))


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5, 1e-6, 1e-7, 1e-9, 0.0])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_limit_of_vanishing_spread_in_float32(spread, eps):
    "Relative terms cancel in a group, so its mean advantage is k times its mean value, however small the spread."
    z = torch.randn(16, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = (3 + spread * z).float()
    found = value_anchored(values, torch.zeros(16, dtype=torch.int64), anchor=0.05, eps=eps)
    assert_close(found.double().mean(), 0.05 * values.double().mean(), rtol=1e-5, atol=0)
    if spread == 0:
        assert_close(found, torch.full_like(found, 0.15))


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1.0])
def test_group_of_equal_rewards(reward):
    "Without anchor nothing; with it omega k Q, alike for all samples; nothing at all where all samples failed."
    values, group = discounted_values(torch.full((24, 10), reward), 0.9), torch.arange(24) // 12
    assert not value_anchored(values, group, anchor=0).any()
    found = value_anchored(values, group, anchor=0.05, anchor_steps=5)
    assert_close(found[:, :5], (0.05 * temporal_weights(values) * values)[:, :5])
    assert not found[:, 5:].any() and (found == found[:1]).all()
    assert found.any() == (reward > 0)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_scaling_the_reward_is_scaling_k(scale):
    values, group = batch()
    assert_close(value_anchored(scale * values, group, 0.05, eps=0), value_anchored(values, group, scale * 0.05, eps=0))


def test_groups_are_independent_and_order_does_not_matter():
    values, group = batch()
    found, order = value_anchored(values, group), torch.randperm(len(group), generator=torch.Generator().manual_seed(1))
    assert_close(value_anchored(values[order], group[order]), found[order])
    one = group == 1
    assert_close(value_anchored(values[one], group[one]), found[one])
    assert_close(value_anchored(values, group * 1_000_003 - 5), found)


def test_weights_leave_the_sign_of_each_relative_advantage():
    values, group = batch()
    plain = torch.stack([group_relative(values[:, j], group) for j in range(values.shape[1])], 1)
    assert torch.equal(value_anchored(values, group, anchor=0).sign(), plain.sign())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_the_dtype(dtype):
    values, group = batch()
    assert value_anchored(values.to(dtype), group).dtype == dtype


# What the paper leaves open


PAIRS, TWO = torch.tensor([[1.0, 3.0], [3.0, 1.0], [0.0, 4.0], [0.0, 0.0]]), torch.tensor([5, 5, 2, 2])


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        # The relative terms are (∓1, ±1) and (0, ±1); k = 0.1 in the first step only, where Q is 1, 3, 0, 0
        ({}, [[0.5 * -0.9, 1.5], [1.5 * 1.3, -0.5], [0, 2], [0, -1]]),
        ({"weights": "none"}, [[-0.9, 1], [1.3, -1], [0, 1], [0, -1]]),
        ({"weights": "group"}, [[-0.9, 1], [1.3, -1], [0, 2], [0, -2]]),  # mean values (2, 2) and (0, 2)
        ({"anchor_value": "group"}, [[0.5 * -0.8, 1.5], [1.5 * 1.2, -0.5], [0, 2], [0, -1]]),
        ({"weights": "none", "anchor_baseline": "others"}, [[-0.9, 1], [1.3, -1], [-0.2, 1], [-0.2, -1]]),
        (
            {"weights": "none", "anchor_value": "group", "anchor_baseline": "others"},
            [[-0.8, 1], [1.2, -1], [-0.2, 1], [-0.2, -1]],
        ),
    ],
    ids=str,
)
def test_readings_by_hand(readings, expected):
    found = value_anchored(PAIRS, TWO, anchor=0.1, anchor_steps=1, eps=0, **readings)
    assert_close(found, torch.tensor(expected))


def test_the_mean_of_the_others_is_that_of_their_images():
    values, group = torch.rand(9, 3), torch.tensor([7, 1, 1, 7, 7, 7, 3, 3, 3])
    expected = torch.stack([values[group != g].double().mean(0) for g in group])
    assert_close(others_mean(values, group), expected)
    with pytest.raises(ValueError, match="there is only one: raise rollout.prompts_per_epoch, or do without"):
        others_mean(values, torch.zeros(9, dtype=torch.int64))


def test_a_baseline_of_the_others_does_not_depend_on_the_image():
    values, group = batch()
    other = values.clone()
    other[group == 1] = torch.rand(int((group == 1).sum()), 6, dtype=torch.float64)
    assert_close(others_mean(values, group)[group == 1], others_mean(other, group)[group == 1])
    assert_close(
        held_values(values, group, anchor_baseline="others")[group == 1],
        (values - values[group != 1].mean(0))[group == 1],
    )


def test_unanimous_groups_keep_a_centred_anchor():
    "Three prompts solved and one that fails: k (1 - 2/3) and k (0 - 1), in the first steps alone."
    rewards, group = torch.ones(16, 4), torch.arange(16) // 4
    rewards[:4] = 0
    found = value_anchored(rewards, group, anchor=0.3, anchor_steps=2, weights="none", anchor_baseline="others")
    assert_close(found[4:, :2], torch.full((12, 2), 0.1))
    assert_close(found[:4, :2], torch.full((4, 2), -0.3))
    assert not found[:, 2:].any()


def test_relative_terms_sum_to_zero_with_one_weight_per_group():
    values, group = batch()
    for weights, largest in (("trajectory", 0.1), ("group", 1e-12), ("none", 1e-12)):
        found = value_anchored(values, group, anchor=0, weights=weights)
        sums = torch.stack([found[group == g].sum(0) for g in range(3)])
        assert (sums.abs().max() > largest) == (weights == "trajectory")
    omega = step_weights(values, group, "group")
    assert_close(omega.mean(1), torch.ones(24, dtype=torch.float64))
    assert_close(omega[group == 2], temporal_weights(values[group == 2].mean(0, keepdim=True)).expand(8, 6))


def test_without_weights_values_may_be_negative():
    values, group = batch()
    found = value_anchored(values - 1, group, anchor=0, weights="none")
    assert_close(found, value_anchored(values, group, anchor=0, weights="none"))
    with pytest.raises(ValueError, match="give the reward a scale into"):
        value_anchored(values - 1, group, anchor=0, weights="group")


def with_value(value):
    values = torch.rand(6, 4)
    values[2, 1] = value
    return values


IDS = torch.arange(6) // 3


@pytest.mark.parametrize(
    "values, group, options, message",
    [
        (with_value(float("nan")), IDS, {}, r"values has NaN or infinity in rows \[2\]"),
        (with_value(float("inf")), IDS, {}, r"values has NaN or infinity in rows \[2\]"),
        (with_value(-0.5), IDS, {}, r"row 2 of values has -0\.5: give the reward a scale into \[0, 1\]"),
        (torch.rand(6), IDS, {}, r"values must be \(B, T\), got shape \(6,\)"),
        (torch.rand(5, 4), IDS, {}, r"has shape \(5, 4\) but group has"),
        (torch.rand(6, 4), IDS.float(), {}, "group must hold integers"),
        (torch.rand(6, 4), IDS, {"anchor": -0.1}, "anchor must be finite and not negative, got -0.1"),
        (torch.rand(6, 4), IDS, {"anchor": float("nan")}, "anchor must be finite and not negative, got nan"),
        (torch.rand(6, 4), IDS, {"anchor_steps": -1}, "anchor_steps must not be negative, got -1"),
        (torch.rand(6), IDS, {"weights": "none"}, r"values must be \(B, T\), got shape \(6,\)"),
        (torch.rand(6, 4), IDS, {"weights": "step"}, "weights must be 'trajectory', 'group' or 'none', got 'step'"),
        (torch.rand(6, 4), IDS, {"anchor_value": "both"}, "anchor_value must be 'image' or 'group', got 'both'"),
        (torch.rand(6, 4), IDS, {"anchor_baseline": "own"}, "anchor_baseline must be 'none' or 'others', got 'own'"),
        (
            torch.rand(6, 4),
            0 * IDS,
            {"anchor_baseline": "others"},
            "a centred anchor compares with the epoch.s other prompts",
        ),
    ],
)
def test_bad_input(values, group, options, message):
    with pytest.raises(ValueError, match=message):
        value_anchored(values, group, **options)
