"Credit: the rewards of states, and what GRPO and VGPO make of them."

import re

import pytest
import torch
from plug_classes import plug_classes
from torch.testing import assert_close

import vgpo.credit
from vgpo.advantages import group_relative, group_stats, value_anchored
from vgpo.credit.base import Credit, fill_states, spaced_states
from vgpo.credit.grpo import GRPO
from vgpo.credit.vgpo import VGPO
from vgpo.values import discounted_values, temporal_weights

ESTIMATORS = plug_classes(Credit, vgpo.credit)
each_estimator = pytest.mark.parametrize("kind", ESTIMATORS, ids=lambda kind: kind.__name__)


def table(samples=24, steps=10, groups=3, parts=None, dtype=torch.float32, seed=0):
    "Rewards (samples, steps + 1[, parts]) of all states, and group ids in a mixed order."
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, steps + 1) if parts is None else (samples, steps + 1, parts)
    group = (torch.arange(samples) % groups)[torch.randperm(samples, generator=generator)]
    return torch.rand(shape, generator=generator, dtype=dtype), group


def advantages(estimator, rewards, group):
    "What an estimator makes of rewards (N, T+1), as those of two equal ones where it wants several apart."
    if not estimator.separate:
        return estimator(rewards, group)
    return estimator(rewards[..., None].expand(*rewards.shape, 2), group, [0.5, 0.5])


# States


@pytest.mark.parametrize(
    ("num_steps", "count", "states"),
    [
        (10, 1, [10]),
        (10, 2, [5, 10]),
        (10, 3, [3, 7, 10]),
        (10, 5, [2, 4, 6, 8, 10]),
        (4, 4, [1, 2, 3, 4]),
        (1, 1, [1]),
    ],
)
def test_spaced_states(num_steps, count, states):
    assert spaced_states(num_steps, count) == states


def test_spaced_states_are_as_many_as_asked_for_and_evenly_spaced():
    for num_steps in range(1, 51):
        for count in range(1, num_steps + 1):
            states = spaced_states(num_steps, count)
            assert len(states) == count and states[-1] == num_steps and states[0] >= 1
            gaps = torch.tensor([0, *states]).diff()
            assert (gaps - num_steps / count).abs().max() <= 1


def test_an_unscored_state_counts_what_the_next_scored_one_got():
    rewards = torch.rand(5, 3)
    filled = fill_states(rewards, [2, 3, 6], 6)
    assert torch.equal(filled, rewards[:, [0, 0, 0, 1, 2, 2, 2]])
    assert torch.equal(fill_states(filled, list(range(7)), 6), filled)
    gains = filled.diff(dim=1)  # what happened between two scored states is the gain of the step after the first
    assert torch.equal(gains[:, [0, 1, 4, 5]], torch.zeros(5, 4))
    assert_close(gains.sum(1), rewards[:, -1] - rewards[:, 0])


# Every estimator


@each_estimator
def test_the_protocol(kind):
    estimator = kind()
    states = estimator.scored_states(10)
    assert states == sorted(set(states)) and states[-1] == 10 and states[0] >= 0
    rewards, group = table()
    found = advantages(estimator, rewards, group)
    assert found.shape == (24, 10) and found.dtype == torch.float32 and found.isfinite().all() and found.any()
    assert not found.requires_grad


@each_estimator
def test_advantages_are_clamped(kind):
    rewards, group = table()
    rewards[3] = 1000.0
    free = advantages(kind(advantage_clip=1e9), rewards, group)
    assert free.abs().max() > 0.5
    assert_close(advantages(kind(advantage_clip=0.5), rewards, group), free.clamp(-0.5, 0.5))
    assert kind().advantage_clip == 5


@each_estimator
def test_the_order_of_the_batch_does_not_matter(kind):
    rewards, group = table(dtype=torch.float64)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    found = advantages(kind(), rewards, group)
    assert_close(advantages(kind(), rewards[order], group[order]), found[order])
    assert_close(advantages(kind(), rewards, 1_000_003 * group - 5), found)


@pytest.mark.parametrize("kind", [kind for kind in ESTIMATORS if hasattr(kind, "scale_rewards")])
def test_scale_rewards(kind):
    "One group spreads ten times as much as the other: by its own std it counts as much, by the batch's ten times."
    z = torch.randn(8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rewards = (0.5 + torch.cat([0.01 * z, 0.1 * z])).expand(16, 11)
    group = torch.arange(16) // 8
    for scale_rewards, factor in (("group", 1), ("batch", 10)):
        options = {"anchor_weight": 0} if hasattr(kind, "anchor_weight") else {}
        found = advantages(kind(scale_rewards=scale_rewards, **options), rewards, group)
        assert_close(found[8:], factor * found[:8], rtol=0.02, atol=1e-3)


@each_estimator
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rewards_that_are_no_numbers_are_refused(kind, value):
    rewards, group = table()
    rewards[2] = value
    with pytest.raises(ValueError, match="NaN or infinity in rows"):
        advantages(kind(), rewards, group)
    with pytest.raises(ValueError, match="group must hold integers"):
        advantages(kind(), table()[0], group.float())


# GRPO


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_grpo_is_the_formula_to_the_last_bit(scale_rewards):
    rewards, group = table(steps=4)
    found = GRPO(scale_rewards=scale_rewards)(rewards, group)
    center, spread = group_stats(rewards[:, -1], group, scale_rewards)
    expected = ((rewards[:, -1] - center) / (spread + 1e-4)).to(rewards.dtype)
    assert torch.equal(found, expected[:, None].expand(24, 4).clamp(-5, 5))
    for g in range(3):  # and in a loop
        last = rewards[group == g, -1].double()
        std = (last if scale_rewards == "group" else rewards[:, -1].double()).std(correction=0)
        assert_close(found[group == g, 2], ((last - last.mean()) / (std + 1e-4)).float())


def test_grpo_looks_at_the_finished_image_alone():
    rewards, group = table()
    other = rewards.clone()
    other[:, :-1] = torch.rand(24, 10)
    assert torch.equal(GRPO()(rewards, group), GRPO()(other, group))
    assert GRPO().scored_states(10) == [10] and GRPO().scored_states(1) == [1]


# VGPO


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
@pytest.mark.parametrize(("gamma", "weight", "steps"), [(0.9, 0.05, 5), (0.0, 0.0, 0), (1.0, 3.0, 10), (0.5, 0.3, 2)])
def test_vgpo_is_the_formula(gamma, weight, steps, scale_rewards):
    rewards, group = table(dtype=torch.float64)
    estimator = VGPO(gamma, 10, weight, steps, scale_rewards)
    expected = torch.empty(24, 10, dtype=torch.float64)
    q = torch.stack([sum(gamma ** (i - j) * rewards[:, i + 1] for i in range(j, 10)) for j in range(10)], 1)
    for i in range(24):
        for j in range(10):
            mine = q[group == group[i], j]
            std = (mine if scale_rewards == "group" else q[:, j]).std(correction=0)
            relative = (q[i, j] - mine.mean()) / (std + 1e-4)
            expected[i, j] = q[i, j] / q[i].mean() * (relative + (weight * q[i, j] if j < steps else 0))
    assert_close(estimator(rewards, group), expected.clamp(-5, 5))


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_vgpo_is_its_functions_to_the_last_bit(scale_rewards):
    rewards, group = table()
    values = discounted_values(rewards[:, 1:], 0.9)
    expected = value_anchored(values, group, 0.05, 5, scale_rewards=scale_rewards).clamp(-5, 5)
    assert torch.equal(VGPO(scale_rewards=scale_rewards)(rewards, group), expected)


@pytest.mark.parametrize("weights", ["trajectory", "group", "none"])
@pytest.mark.parametrize("value", ["image", "group"])
@pytest.mark.parametrize("baseline", ["none", "others"])
def test_vgpos_open_points_are_options(weights, value, baseline):
    rewards, group = table(dtype=torch.float64)
    q = torch.stack([sum(0.5 ** (i - j) * rewards[:, i + 1] for i in range(j, 10)) for j in range(10)], 1)
    expected = torch.empty(24, 10, dtype=torch.float64)
    for i in range(24):
        own, others = q[group == group[i]], q[group != group[i]]
        for j in range(10):
            omega = {"trajectory": q[i, j] / q[i].mean(), "group": own[:, j].mean() / own.mean(), "none": 1.0}[weights]
            held = q[i, j] if value == "image" else own[:, j].mean()
            if baseline == "others":
                held = held - others[:, j].mean()
            relative = (q[i, j] - own[:, j].mean()) / (own[:, j].std(correction=0) + 1e-4)
            expected[i, j] = omega * (relative + (0.7 * held if j < 6 else 0))
    options = {"temporal_weights": weights, "anchor_value": value, "anchor_baseline": baseline}
    assert_close(VGPO(0.5, anchor_weight=0.7, anchor_steps=6, **options)(rewards, group), expected.clamp(-5, 5))


def test_the_reward_of_the_noise_is_nobodys_merit():
    rewards, group = table()
    other = rewards.clone()
    other[:, 0] = 1 - other[:, 0]
    assert torch.equal(VGPO()(rewards, group), VGPO()(other, group))


def test_vgpo_contains_grpo():
    rewards, group = table(dtype=torch.float64)
    flat = rewards[:, -1:].expand(24, 11)
    for scale_rewards in ("group", "batch"):
        found = VGPO(gamma=0, anchor_weight=0, scale_rewards=scale_rewards)(flat, group)
        assert_close(found, GRPO(scale_rewards)(flat, group))


def test_the_batchs_std_under_vgpo():
    values, group = torch.rand(12, 4, dtype=torch.float64), torch.arange(12) % 3
    relative = (values - group_stats(values, group)[0]) / (values.std(0, correction=0) + 1e-4)
    expected = temporal_weights(values) * (relative + 0.3 * values * (torch.arange(4) < 2))
    assert_close(value_anchored(values, group, anchor=0.3, anchor_steps=2, scale_rewards="batch"), expected)
    constant = values[:, :1].expand(12, 4)  # nothing changes over time and no anchor: GRPO with the same std
    grpo = group_relative(values[:, 0], group, scale_rewards="batch")
    assert_close(value_anchored(constant, group, anchor=0, scale_rewards="batch")[:, 3], grpo)
    with pytest.raises(ValueError, match="scale_rewards must be 'group' or 'batch', got 'global'"):
        value_anchored(values, group, scale_rewards="global")


def test_more_scored_steps_than_there_are():
    assert VGPO(num_scored_steps=3).scored_states(10) == [3, 7, 10]
    message = "credit.num_scored_steps is 11; it must lie in 1 to rollout.num_inference_steps, 10"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        VGPO(num_scored_steps=11).scored_states(10)


WRONG = {
    "gamma": [1.01, -0.1, float("nan")], "num_scored_steps": [0, 2.5], "anchor_weight": [-0.1], "anchor_steps": [-1],
    "scale_rewards": ["global"], "advantage_clip": [0, float("nan")], "temporal_weights": ["step"],
    "anchor_value": ["both"], "anchor_baseline": ["own"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(kind, name, value) for kind in ESTIMATORS for name in WRONG if hasattr(kind, name) for value in WRONG[name]],
)
def test_options_out_of_range(kind, name, value):
    with pytest.raises(ValueError, match=f"^{kind.__name__}.{name} is {value!r}; it must be"):
        kind(**{name: value})
