"The projection critic: the reward of the image minus a forecast made before the step, against regressions and the exact gradient."

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from vgpo.credit.critic import ProjectionCritic, fitted_slopes
from vgpo.credit.grpo import GRPO


def table(samples=24, steps=6, groups=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    group = (torch.arange(samples) % groups)[torch.randperm(samples, generator=generator)]
    return torch.rand(samples, steps + 1, dtype=torch.float64, generator=generator), group


@pytest.mark.parametrize("scale", ["batch", "group"])
def test_it_is_what_a_regression_on_the_prompts_and_the_forecast_leaves(scale):
    "Least squares with a column per prompt and one for the forecast: slopes and residuals are the same."
    rewards, group = table()
    found = ProjectionCritic(6, scale, 1e9)(rewards, group)
    prompts = (group[:, None] == torch.arange(4)).double().numpy()
    R = rewards[:, -1].numpy()
    spread = np.full(24, R.std())
    if scale == "group":
        spread = np.array([R[(group == g).numpy()].std() for g in group.tolist()])
    for j in range(6):
        columns = np.column_stack([prompts, rewards[:, j].numpy()]) if j else prompts  # nothing is scored before step 0
        rest = R - columns @ np.linalg.lstsq(columns, R, rcond=None)[0]
        np.testing.assert_allclose(found[:, j].numpy(), rest / (spread + 1e-4), atol=1e-12)


def test_slopes_without_spread_are_zero():
    target = torch.tensor([1.0, -1.0, 2.0, -2.0])
    features = torch.stack([target, torch.zeros(4), 1e-8 * target, -0.5 * target], 1)
    assert fitted_slopes(target, features).tolist() == [1, 0, 0, -2]


def test_with_one_scored_state_it_is_grpo():
    rewards, group = table()
    assert_close(ProjectionCritic(1)(rewards, group), GRPO("batch")(rewards, group))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_a_step_is_not_paid_for_what_it_led_to(count):
    "Whatever a step and those after it change in the estimates, but for the image, leaves the forecasts for it alone."
    rewards, group = table()
    critic, other = ProjectionCritic(count), rewards.clone()
    states = critic.scored_states(6)
    for j in range(6):
        other = rewards.clone()
        other[:, j + 1 : -1] = torch.rand(24, 5 - j, dtype=torch.float64)
        assert torch.equal(critic.forecasts(other)[:, j], critic.forecasts(rewards)[:, j])
        assert torch.equal(critic(other, group)[:, j], critic(rewards, group)[:, j])
        before = [state for state in states if state <= j]
        expected = rewards[:, before[-1]] if before else torch.zeros(24, dtype=torch.float64)
        assert torch.equal(critic.forecasts(rewards)[:, j], expected)


def test_groups_that_agree():
    "By the group's standard deviation they are left out; by the batch's their forecasts still count, and sum to zero."
    rewards, group = table()
    rewards[group == 0, -1] = 1.0
    assert not ProjectionCritic(6, "group")(rewards, group)[group == 0].any()
    found = ProjectionCritic(6, "batch")(rewards, group)[group == 0]
    assert found[:, 1:].any() and not found[:, 0].any()
    assert_close(found.sum(0), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    assert not ProjectionCritic(6)(torch.full((24, 7), 0.4), group).any()


def test_a_chain_whose_gradient_is_known():
    """Two Gaussian steps, x1 = a + z1 and R = clip(x1 + b + z2) with a forecast of x1: the expected gradient with respect
    to b, E[A z2], is GRPO's, and its variance is smaller by what the forecast explains.
    """
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(20000, 16, 2, dtype=torch.float64, generator=generator)
    R = 3 * z[..., 0] + z[..., 1]  # the first step decides nine tenths of the variance
    rewards = torch.stack([torch.zeros_like(R), 2 * z[..., 0], R], -1).flatten(0, 1)
    group = torch.arange(20000).repeat_interleave(16)
    gradients = {}
    for name, credit in (("GRPO", GRPO("batch", 1e9)), ("critic", ProjectionCritic(2, "batch", 1e9))):
        advantages = credit(rewards, group).unflatten(0, (20000, 16)) * (10**0.5 + 1e-4)  # in units of R
        gradients[name] = (advantages * z).mean(1)  # (groups, steps)
    true = torch.tensor([3.0, 1.0], dtype=torch.float64) * 15 / 16  # a group's own mean takes its sixteenth
    for name, found in gradients.items():
        error = found.std(0) / 20000**0.5
        assert ((found.mean(0) - true).abs() < 5 * error + 0.01).all(), name
    noise = {name: found.var(0) for name, found in gradients.items()}
    assert_close(noise["critic"][0], noise["GRPO"][0])
    # A sum of 16 products: var(A z2) is 9 + 2 without the critic and 2 with it, but for terms of 1/16
    assert noise["GRPO"][1] / noise["critic"][1] == pytest.approx(11 / 2, rel=0.1)


def test_bad_input():
    group = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="NaN or infinity"):
        ProjectionCritic(1)(torch.tensor([[0.1, float("nan")]]).expand(4, 2), group)
    with pytest.raises(
        ValueError, match="credit.num_scored_steps is 10; it must lie in 1 to rollout.num_inference_steps, 4"
    ):
        ProjectionCritic()(torch.rand(4, 5), group)


# The centred anchor


@pytest.mark.parametrize("scale", ["batch", "group"])
def test_the_anchor_joins_what_the_regression_explains(scale):
    "Least squares of reward and anchor together on prompts and forecast; the prompts' own part of the anchor is put back."
    rewards, group = table()
    found = ProjectionCritic(6, scale, 1e9, 0.7)(rewards, group)
    R = rewards[:, -1]
    others = torch.stack([R[group != g].mean() for g in group])
    own = torch.stack([R[group == g].mean() for g in group])
    spread = R.std(correction=0) if scale == "batch" else torch.stack([R[group == g].std(correction=0) for g in group])
    plain = ProjectionCritic(6, scale, 1e9)(rewards, group)
    assert_close(found, 1.7 * plain + (0.7 * (own - others) / (spread + 1e-4))[:, None])
    assert_close(found[:, 0], (R - own + 0.7 * (R - others)) / (spread + 1e-4))


def test_the_anchor_by_hand():
    "Unanimous groups, three solved and one not: k (1 - 2/3) and k (0 - 1) over the epoch's std, the root of 3 over 4."
    rewards, group = torch.rand(16, 5, dtype=torch.float64), torch.arange(16) // 4
    rewards[:, -1] = (group > 0).double()
    found = ProjectionCritic(4, anchor_weight=0.3)(rewards, group)
    assert_close(found[4:], torch.full((12, 4), 0.1 / (3**0.5 / 4 + 1e-4), dtype=torch.float64))
    assert_close(found[:4], torch.full((4, 4), -0.3 / (3**0.5 / 4 + 1e-4), dtype=torch.float64))
    assert not ProjectionCritic(4, "group", anchor_weight=0.3)(rewards, group).any()  # nothing to divide by
    assert not ProjectionCritic(4)(rewards, group).any()


def test_many_prompts_and_a_large_anchor_are_a_critic_of_batch_means():
    "k = M - 1 with M groups of one size: R over the batch's mean in step 0, where nothing was foreseen, times M."
    rewards, group = table()
    found = ProjectionCritic(6, anchor_weight=3, advantage_clip=1e9)(rewards, group)
    R = rewards[:, -1]
    assert_close(found[:, 0], 4 * (R - R.mean()) / (R.std(correction=0) + 1e-4))


def test_the_anchor_needs_other_prompts():
    with pytest.raises(ValueError, match="there is only one: raise rollout.prompts_per_epoch, or do without"):
        ProjectionCritic(4, anchor_weight=0.1)(torch.rand(4, 5), torch.zeros(4, dtype=torch.int64))
