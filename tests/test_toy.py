import math

import pytest
import torch
from scipy.stats import ks_2samp
from torch.testing import assert_close

from vgpo.flow import interpolate, ode_sample, predict_clean, shifted_sigmas
from vgpo.toy import GaussianMixture, ks_threshold, sliced_ks


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def lopsided():
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]])
    return GaussianMixture(means, std=0.4, weights=torch.tensor([1.0, 2.0, 5.0]))


def log_density(mixture, x, sigma):
    "log p_sigma(x) up to a constant, written out in float64 from the definition."
    variance = (1 - sigma) ** 2 * mixture.std**2 + sigma**2
    distance = (x[:, None] - (1 - sigma) * mixture.means.double()).square().sum(-1)
    return (mixture.weights.double().log() - distance / (2 * variance)).logsumexp(1)


@pytest.mark.parametrize("sigma", [0.95, 0.5, 0.05])
def test_velocity_is_the_score_in_other_clothes(lopsided, generator, sigma):
    x = 2 * torch.randn(100, 2, generator=generator, dtype=torch.float64)
    score = torch.autograd.functional.jacobian(lambda x: log_density(lopsided, x, sigma).sum(), x)
    assert_close(lopsided.velocity(x, sigma), -(x + sigma * score) / (1 - sigma))


def test_velocity_solves_the_regression_that_defines_it(lopsided, generator):
    # least squares: the residual u - v is uncorrelated with every function of the state, within 5 standard errors
    n, sigma = 200_000, 0.5
    x0, noise = lopsided.sample(n, generator), torch.randn(n, 2, generator=generator)
    x = interpolate(x0, noise, sigma)
    for scale in (1.0, 1.02):  # the exact velocity, and one that is 2 % off
        residual = noise - x0 - scale * lopsided.velocity(x, sigma)
        terms = torch.cat([residual * f for f in (1, x[:, :1], x[:, 1:], x.sin(), x.square())], 1)
        worst = (terms.mean(0) / (terms.std(0) / math.sqrt(n))).abs().max()
        assert (worst < 5) == (scale == 1.0)


def test_velocity_at_the_ends_of_the_path(lopsided, generator):
    x = torch.randn(5, 2, generator=generator)
    mean = (lopsided.weights[:, None] * lopsided.means).sum(0) / lopsided.weights.sum()
    assert_close(lopsided.velocity(x, 1.0), x - mean)
    assert_close(predict_clean(x, lopsided.velocity(x, 0.0), 0.0), x)


def test_a_batch_may_mix_noise_levels_and_use_float64(lopsided, generator):
    x, sigma = torch.randn(4, 2, generator=generator).double(), torch.tensor([1.0, 0.6, 0.2, 0.0])
    alone = torch.cat([lopsided.velocity(x[i : i + 1], sigma[i]) for i in range(4)])
    assert_close(lopsided.velocity(x, sigma), alone)
    assert_close(lopsided.posterior(x, sigma).sum(1), torch.ones(4, dtype=torch.float64))


def test_weights_need_not_be_normalised(lopsided, generator):
    other = GaussianMixture(lopsided.means, lopsided.std, lopsided.weights / 8)
    x = torch.randn(50, 2, generator=generator)
    assert_close(other.velocity(x, 0.4), lopsided.velocity(x, 0.4))


def test_sample_has_the_weights_and_the_spread(lopsided, generator):
    n = 50_000
    points = lopsided.sample(n, generator)
    nearest = torch.cdist(points, lopsided.means).min(1)
    share = nearest.indices.bincount() / n
    expected = lopsided.weights / 8
    # clusters are at least sqrt(10) = 7.9 std apart, so misfits (below 1e-4) hide inside 5 standard errors
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()
    assert abs((nearest.values.square().mean() / 2).sqrt() - 0.4) < 5 * 0.4 / math.sqrt(4 * n)


def test_ode_reproduces_the_mixture_and_ten_steps_do_not(generator):
    mixture, n = GaussianMixture.ring(), 10_000
    noise, truth = torch.randn(n, 2, generator=generator), mixture.sample(n, generator)
    assert sliced_ks(truth, ode_sample(mixture.velocity, noise, shifted_sigmas(100, 1.0))) < ks_threshold(n)
    assert sliced_ks(truth, ode_sample(mixture.velocity, noise, shifted_sigmas(10))) > ks_threshold(n)


def test_sliced_ks_along_one_line_is_scipys_statistic(generator):
    a, b = torch.randn(500, 2, generator=generator), 1.1 * torch.randn(500, 2, generator=generator)
    for seen in (a, a.double()):
        assert sliced_ks(seen, b.to(seen), directions=1) == pytest.approx(ks_2samp(a[:, 0], b[:, 0]).statistic)
    assert sliced_ks(a, a + 100) == 1.0
    assert sliced_ks(a, b, 16) >= sliced_ks(a, b, 1)


def test_ks_threshold_golden_and_small_samples():
    assert ks_threshold(20_000) == pytest.approx(math.sqrt(math.log(32_000) / 20_000))
    with pytest.raises(ValueError, match="n must be at least 458"):
        ks_threshold(457)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(means=torch.zeros(4)), r"means must have shape \(K, 2\)"),
        (dict(means=torch.zeros(0, 2)), r"means must have shape \(K, 2\)"),
        (dict(means=torch.zeros(2, 2), std=0), "std must be positive"),
        (dict(means=torch.zeros(2, 2), weights=torch.ones(3)), "weights must be 2 positive numbers"),
        (dict(means=torch.zeros(2, 2), weights=torch.tensor([1.0, 0.0])), "weights must be 2 positive numbers"),
    ],
)
def test_bad_mixtures(bad, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**bad)


def test_clouds_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match=r"must both have shape \(n, 2\)"):
        sliced_ks(torch.zeros(5, 2), torch.zeros(6, 2))
