import pytest
import torch
from torch.testing import assert_close

from vgpo.flow import interpolate, predict_clean
from vgpo.toy import GaussianMixture
from vgpo.values import discounted_values, temporal_weights


def by_loop(rewards, gamma):
    values = rewards.clone()
    for j in reversed(range(rewards.shape[1] - 1)):
        values[:, j] += gamma * values[:, j + 1]
    return values


def test_golden_values_and_weights():
    "Q = 1 + 0/2 + 2/4, 0 + 2/2, 2, whose mean is 1.5."
    values = discounted_values(torch.tensor([[1.0, 0.0, 2.0]]), 0.5)
    assert_close(values, torch.tensor([[1.5, 1.0, 2.0]]))
    assert_close(temporal_weights(values), torch.tensor([[1.0, 2 / 3, 4 / 3]]))


@pytest.mark.parametrize("gamma", [0, 0.3, 0.9, 1])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_values_equal_the_recursion(gamma, steps):
    rewards = torch.rand(6, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    assert_close(discounted_values(rewards, gamma), by_loop(rewards, gamma), rtol=0, atol=1e-14)


def test_limits_of_gamma():
    rewards = torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(discounted_values(rewards, 0), rewards)
    assert_close(discounted_values(rewards, 1.0), rewards.flip(1).cumsum(1).flip(1))


def test_an_action_is_not_credited_with_the_past():
    "Raising the reward of step 3 raises the values of steps 0 to 3 by powers of gamma and no later one."
    rewards = torch.zeros(1, 6, dtype=torch.float64)
    rewards[0, 3] = 1
    expected = torch.tensor([[0.729, 0.81, 0.9, 1, 0, 0]], dtype=torch.float64)
    assert_close(discounted_values(rewards, 0.9), expected)


def test_counts_and_low_precision():
    "Strict 0/1 rewards come as integers or booleans; bfloat16 rewards are summed in float64 and rounded once."
    strict = torch.tensor([[0, 1, 1]])
    expected = torch.tensor([[0.9 + 0.81, 1.9, 1.0]])
    assert_close(discounted_values(strict, 0.9), expected)
    assert_close(discounted_values(strict.bool(), 0.9), expected)
    assert_close(temporal_weights(strict), torch.tensor([[0.0, 1.5, 1.5]]))
    rewards = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(discounted_values(rewards, 0.99), by_loop(rewards.double(), 0.99).bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_are_rejected_and_located(value):
    rewards = torch.rand(5, 4)
    rewards[3, 2] = value
    with pytest.raises(ValueError, match=r"rewards has NaN or infinity in rows \[3\].*reward function"):
        discounted_values(rewards, 0.9)
    with pytest.raises(ValueError, match=r"values has NaN or infinity in rows \[3\].*reward function"):
        temporal_weights(rewards)


@pytest.mark.parametrize("gamma", [-0.1, 1.01, float("nan")])
def test_gamma_outside_its_range_is_rejected(gamma):
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got"):
        discounted_values(torch.rand(2, 3), gamma)


def test_shapes_are_rejected():
    with pytest.raises(ValueError, match=r"rewards must be \(B, T\), got shape \(3,\)"):
        discounted_values(torch.rand(3), 0.9)
    with pytest.raises(ValueError, match=r"values must be \(B, T\), got shape \(2, 3, 4\)"):
        temporal_weights(torch.rand(2, 3, 4))


def test_negative_values_are_rejected_with_row_and_remedy():
    with pytest.raises(ValueError, match=r"row 1 of values has -0\.25: give the reward a scale into \[0, 1\]"):
        temporal_weights(torch.tensor([[0.5, 0.5], [0.5, -0.25]]))


def test_weights_average_to_one_and_stay_in_their_range():
    values = torch.rand(100, 10, generator=torch.Generator().manual_seed(0)) ** 20  # most of them close to zero
    weights = temporal_weights(values)
    assert_close(weights.mean(1), torch.ones(100))
    assert weights.min() >= 0 and weights.max() <= 10
    only = torch.zeros(1, 10)
    only[0, 4] = 0.3
    assert_close(temporal_weights(only), 10 * (only > 0).float())  # the bound is attained


@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1e30])
def test_weights_do_not_depend_on_the_unit(scale):
    values = torch.rand(5, 10, generator=torch.Generator().manual_seed(0)) + 0.1
    assert_close(temporal_weights(values * scale), temporal_weights(values), rtol=1e-4, atol=1e-5)


def test_a_trajectory_without_reward_weighs_all_steps_alike():
    values = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.3]])
    assert_close(temporal_weights(values), torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0]]))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_weights_of_equal_rewards_are_a_fixed_schedule(gamma):
    "Q_j is proportional to (1 - gamma^(T - j)), whatever the reward."
    steps = 8
    powers = 1 - gamma ** torch.arange(steps, 0, -1, dtype=torch.float64)
    for reward in (1e-6, 0.3, 1.0):
        weights = temporal_weights(discounted_values(torch.full((1, steps), reward, dtype=torch.float64), gamma))
        assert_close(weights[0], powers / powers.mean())


@pytest.mark.parametrize("sigma", [0.9, 0.6, 0.3])
def test_clean_estimates_have_the_mean_of_the_data_and_too_little_spread(sigma):
    "Tower rule on a lopsided mixture: same mean; the missing variance is the mean squared error (total variance)."
    generator = torch.Generator().manual_seed(0)
    ring = GaussianMixture.ring()
    mixture = GaussianMixture(ring.means, ring.std, torch.tensor([0.5, 0.2, 0.1, 0.05, 0.05, 0.04, 0.03, 0.03]))
    x0 = mixture.sample(20_000, generator)
    x = interpolate(x0, torch.randn(x0.shape, generator=generator), sigma)
    clean = predict_clean(x, mixture.velocity(x, sigma), sigma)
    error = clean - x0
    assert (error.mean(0).abs() < 4 * error.std(0) / len(x0) ** 0.5).all()
    orthogonal = (error * clean).sum(-1)  # the error of a conditional mean is uncorrelated with it
    assert orthogonal.mean().abs() < 4 * orthogonal.std() / len(x0) ** 0.5
    assert clean.var(0).sum() < x0.var(0).sum()
