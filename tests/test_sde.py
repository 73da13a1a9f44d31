import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from plug_classes import plug_classes
from torch.distributions import Independent, Normal, kl_divergence
from torch.testing import assert_close

from vgpo.flow import ode_sample, shifted_sigmas
from vgpo.sde import DanceSDE, FlowCPS, FlowSDE, Sampler, Transition, sde_step
from vgpo.toy import GaussianMixture, ks_threshold, sliced_ks
from vgpo.windows import Leading, Random

SAMPLERS = plug_classes(Sampler)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def states(generator):
    return torch.randn(2, 6, 4, 3, 2, generator=generator, dtype=torch.float64).unbind()  # x, velocity


def diffusers_sigmas(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def walk(sampler, velocity, x, sigmas, generator):
    "All states of a stochastic walk."
    path = [x]
    for sigma, sigma_next in pairwise(sigmas):
        step = sampler.transition(path[-1], velocity(path[-1], sigma), sigma, sigma_next, sigmas[1])
        path.append(step.sample(torch.randn(x.shape, generator=generator, dtype=x.dtype)))
    return path


def test_log_prob_and_kl_are_those_of_torch_distributions_per_dimension(states, generator):
    mean, other = states
    std, std2 = (0.1 + torch.rand(2, 6, 1, 1, 1, generator=generator, dtype=torch.float64)).unbind()
    ours = Transition(mean, std), Transition(other, std2)
    theirs = [Independent(Normal(t.mean, t.std.expand_as(mean)), 3) for t in ours]
    x_next = ours[0].sample(torch.randn(mean.shape, generator=generator, dtype=torch.float64))
    assert_close(ours[1].log_prob(x_next), theirs[1].log_prob(x_next) / 24)
    assert_close(ours[0].kl(ours[1]), kl_divergence(*theirs) / 24)


def test_kl_is_the_mean_log_ratio(generator):
    # two derivations: the closed form, and E[log p - log q] over draws of p, within 5 standard errors
    p = Transition(torch.zeros(200_000, 3), torch.tensor(0.5))
    q = Transition(torch.full((200_000, 3), 0.2), torch.tensor(0.6))
    x = p.sample(torch.randn(200_000, 3, generator=generator))
    log_ratio = p.log_prob(x) - q.log_prob(x)
    assert abs(log_ratio.mean() - p.kl(q)[0]) < 5 * log_ratio.std() / math.sqrt(200_000)


def test_ratio_of_the_same_step_is_exactly_one_in_float32(generator):
    x, velocity = torch.randn(2, 8, 4, 4, 4, generator=generator)
    sigmas = shifted_sigmas(10)
    for sampler in (FlowSDE(), DanceSDE()):
        for sigma, sigma_next in pairwise(sigmas):
            step = sampler.transition(x, velocity, sigma, sigma_next, sigmas[1])
            x_next = step.sample(torch.randn(x.shape, generator=generator))
            again = sampler.transition(x, velocity, sigma, sigma_next, sigmas[1])
            assert ((again.log_prob(x_next) - step.log_prob(x_next)).exp() == 1).all()


def test_gradient_of_log_prob_reaches_the_velocity(states):
    x, velocity = states
    velocity = velocity.clone().requires_grad_()
    step = FlowSDE().transition(x, velocity, 0.5, 0.4, 0.9)
    step.log_prob(x).sum().backward()
    # chain rule by hand: d mu / d v = -(1 + eta^2 / 2) dt for Flow-SDE
    expected = (x - step.mean) / step.std**2 * -(1 + 0.7**2 / 2) * 0.1 / 24
    assert_close(velocity.grad, expected.detach())


def test_flow_sde_golden_first_middle_and_last_step():
    one = torch.ones(1, 1, dtype=torch.float64)
    golden = {  # sigma, sigma_next: mean and std of x = 1, v = -0.5 by hand, noise level 0.7, second sigma 0.9
        (1.0, 0.9): (1 - 0.245 + 0.05, 0.7),
        (0.5, 0.4): (1 - 0.049 + 0.05 * 1.245, 0.7 * math.sqrt(0.1)),
        (0.1, 0.0): (1 - 0.49 / 0.9 * 0.05 + 0.05 * 1.245, 0.7 * math.sqrt(0.1 / 0.9) * math.sqrt(0.1)),
    }
    for (sigma, sigma_next), (mean, std) in golden.items():
        step = FlowSDE(0.7).transition(one, -0.5 * one, sigma, sigma_next, 0.9)
        assert_close(step.mean.item(), mean), assert_close(step.std.item(), std)


def test_flow_and_dance_are_one_family(states):
    # a Dance step is written afresh, the way DanceGRPO does: Euler, and half the squared kick times the score
    x, velocity = states
    for sigma, sigma_next in pairwise(shifted_sigmas(10).double()[1:].tolist()):
        g, dt = 0.7 * math.sqrt(sigma / (1 - sigma)), sigma - sigma_next
        score = -(x - (1 - sigma) * (x - sigma * velocity)) / sigma**2
        expected = x - dt * velocity + 0.5 * g**2 * score * dt
        for sampler in (FlowSDE(0.7), DanceSDE(g)):
            step = sampler.transition(x, velocity, sigma, sigma_next, 0.99)
            assert_close(step.mean, expected), assert_close(step.std.item(), g * math.sqrt(dt))


def test_cps_golden_and_agreement_with_the_sde_step(states):
    x, velocity = states
    clean, noise = x - 0.5 * velocity, x + 0.5 * velocity
    step = FlowCPS(0.5).transition(x, velocity, 0.5, 0.4, None)
    half = math.sqrt(0.5)  # cos and sin of 45 degrees
    assert_close(step.mean, 0.6 * clean + 0.4 * half * noise), assert_close(step.std.item(), 0.4 * half)
    assert_close(FlowCPS(1.0).transition(x, velocity, 0.5, 0.4, None).mean, 0.6 * clean)

    def gap(dt, g=0.5, sigma=0.6):  # the CPS whose kick is g sqrt(dt) is the SDE step up to dt^2
        level = 2 / math.pi * math.asin(g * math.sqrt(dt) / (sigma - dt))
        s, s_next = torch.tensor(sigma).double(), torch.tensor(sigma - dt).double()
        cps = FlowCPS(level).transition(x, velocity, s, s_next, None)
        return (cps.mean - sde_step(x, velocity, s, s_next, g).mean).abs().max()

    assert 3.8 < gap(0.004) / gap(0.002) < 4.2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_level_zero_is_euler(sampler, generator):
    mixture, x = GaussianMixture.ring(), torch.randn(20, 2, generator=generator, dtype=torch.float64)
    end = walk(sampler(0), mixture.velocity, x, shifted_sigmas(10).double(), generator)[-1]
    assert_close(end, ode_sample(mixture.velocity, x, shifted_sigmas(10).double()))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sigmas", [shifted_sigmas(1), shifted_sigmas(10), diffusers_sigmas(1), diffusers_sigmas(40)])
def test_every_step_is_finite_in_float32(sampler, sigmas, generator):
    x, velocity = torch.randn(2, 4, 16, 8, 8, generator=generator)
    for sigma, sigma_next in pairwise(sigmas):
        step = sampler().transition(x, velocity, sigma, sigma_next, sigmas[1])
        assert step.mean.isfinite().all() and step.std.isfinite().all()
        if sampler is FlowCPS and sigma_next == 0:
            assert step.std == 0
        else:
            assert step.log_prob(x).isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [2, 10])
def test_a_window_with_a_step_without_noise_is_refused_by_the_sampler(sampler, steps):
    one, sigmas = torch.ones(1, 1), shifted_sigmas(steps)
    noisy = [bool(sampler().transition(one, one, *pair, sigmas[1]).std > 0) for pair in pairwise(sigmas)]
    for size in range(1, steps + 1):
        for window in (Leading(size), Random(size, stop=max(size, steps - 1)), Random(size, stop=steps, per="group")):
            reach = torch.stack([window.mask(steps, 0, epoch, [0])[0] for epoch in range(200)]).any(0)
            if reach[~torch.tensor(noisy)].any():
                with pytest.raises(ValueError, match=f"{sampler.__name__} .* lower window.size"):
                    sampler().check(window, steps)
            else:
                sampler().check(window, steps)


@pytest.mark.parametrize("start", [1.0, 1.0 - 6e-8, 1.0 + 1.2e-7])
def test_flow_sde_survives_a_scheduler_that_misses_one_by_a_rounding_error(start):
    x = torch.ones(1, 2)
    exact = FlowSDE().transition(x, x, 1.0, 0.9, 0.9)
    step = FlowSDE().transition(x, x, torch.tensor(start), 0.9, 0.9)
    assert_close(step.mean, exact.mean), assert_close(step.std, exact.std)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_may_mix_noise_levels(sampler, states):
    x, velocity = states
    now, after = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1]), torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1, 0.0])
    batch = sampler().transition(x, velocity, now, after, 0.9)
    for i in range(6):
        alone = sampler().transition(x[i : i + 1], velocity[i : i + 1], now[i], after[i], 0.9)
        assert_close(batch.mean[i : i + 1], alone.mean), assert_close(batch.std[i].flatten(), alone.std.flatten())


@pytest.mark.parametrize("sampler", [FlowSDE(0.7), DanceSDE(0.7)])
def test_marginals_of_the_sde_are_those_of_the_ode_at_several_sigmas(sampler, generator):
    mixture, n, steps = GaussianMixture.ring(), 10_000, 100
    sigmas = shifted_sigmas(steps, 1.0)
    noise = torch.randn(2, n, 2, generator=generator)
    ode = walk(DanceSDE(0), mixture.velocity, noise[0], sigmas, generator)
    sde = walk(sampler, mixture.velocity, noise[1], sigmas, generator)
    for j in (20, 40, 60, 80, 100):
        assert sliced_ks(ode[j], sde[j]) < ks_threshold(n), sigmas[j]


def test_the_marginal_test_can_fail(generator):
    # the same kicks without the pull of the score
    mixture, n, sigmas = GaussianMixture.ring(), 10_000, shifted_sigmas(100, 1.0)
    x = torch.randn(n, 2, generator=generator)
    for sigma, sigma_next in pairwise(sigmas):
        dt = sigma - sigma_next
        x = x - dt * mixture.velocity(x, sigma) + 0.7 * dt.sqrt() * torch.randn(n, 2, generator=generator)
    assert sliced_ks(x, mixture.sample(n, generator)) > ks_threshold(n)


@pytest.mark.parametrize("steps", [10, 1000])
def test_first_flow_sde_step_inflates_unit_variance_to_one_plus_eta4_over_4(steps):
    one, sigmas = torch.ones(1, 1, dtype=torch.float64), shifted_sigmas(steps).double()
    step = FlowSDE(0.7).transition(one, 0 * one, sigmas[0], sigmas[1], sigmas[1])
    assert_close(step.mean.item() ** 2 + step.std.item() ** 2, 1 + 0.7**4 / 4)


@pytest.mark.parametrize("make", [lambda: FlowSDE(-0.1), lambda: DanceSDE(math.inf), lambda: FlowSDE(math.nan)])
def test_bad_noise_levels(make):
    with pytest.raises(ValueError, match="noise_level must be finite and between 0 and inf"):
        make()


@pytest.mark.parametrize("level", [-0.01, 1.01, math.nan])
def test_bad_cps_noise_levels(level):
    with pytest.raises(ValueError, match="noise_level must be finite and between 0 and 1, got"):
        FlowCPS(level)


def test_a_deterministic_step_has_no_density_and_spoils_no_other_sample(states):
    x, velocity = states
    after = torch.tensor([0.0, 0.05, 0.05, 0.05, 0.05, 0.05])  # the first sample's last step is deterministic
    step = FlowCPS().transition(x, velocity, 0.1, after, None)
    noisy = DanceSDE().transition(x, velocity, 0.1, after, None)
    assert_close(step.sample(torch.randn_like(x))[0], (x - 0.1 * velocity)[0])
    for answer in (step.log_prob(x), step.log_prob(step.mean), step.kl(noisy), noisy.kl(step), step.kl(step)):
        assert answer.isfinite().tolist() == [False] + 5 * [True]
