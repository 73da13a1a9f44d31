import math

import pytest
import torch
from plug_classes import plug_classes
from torch import nn
from torch.testing import assert_close

from vgpo.flow import ode_sample, predict_clean, shifted_sigmas
from vgpo.rollout import clean_at, project, replay, rollout
from vgpo.sde import DanceSDE, FlowCPS, FlowSDE, Sampler
from vgpo.toy import GaussianMixture

MIXTURE, SIGMAS = GaussianMixture.ring(), shifted_sigmas(6)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def noise(generator):
    return torch.randn(32, 2, generator=generator)


def test_one_network_call_a_step_at_the_schedules_sigmas(noise, generator):
    seen = []

    def velocity(x, sigma):
        seen.append(sigma.item())
        return MIXTURE.velocity(x, sigma)

    rollout(velocity, noise, SIGMAS, FlowSDE(), generator=generator)
    assert seen == SIGMAS[:-1].tolist()


@pytest.mark.parametrize("sampler", plug_classes(Sampler))
def test_columns_belong_to_steps(sampler, noise, generator):
    path = rollout(MIXTURE.velocity, noise, SIGMAS, sampler(), generator=generator)
    assert path.latents.shape == (32, 7, 2) and path.log_probs.shape == (32, 6) and path.clean.shape == (32, 6, 2)
    assert torch.equal(path.latents[:, 0], noise)
    for j in range(6):
        x = path.latents[:, j + 1]
        assert_close(path.clean[:, j], predict_clean(x, MIXTURE.velocity(x, SIGMAS[j + 1]), SIGMAS[j + 1]))
    assert path.log_probs.isfinite().all()
    assert path.group.dtype == torch.int64


@pytest.mark.parametrize("states", [range(7), [6], [0], [2, 6, 0, 6]])
def test_clean_estimates_of_states_count_from_the_noise(states, noise, generator):
    path = rollout(MIXTURE.velocity, noise, SIGMAS, FlowSDE(), generator=generator)
    found = clean_at(path, states)
    assert found.shape == (32, len(states), 2)
    for column, s in zip(found.unbind(1), states, strict=True):
        x = path.latents[:, s]
        assert_close(column, predict_clean(x, MIXTURE.velocity(x, SIGMAS[s]), SIGMAS[s]))
    assert torch.equal(clean_at(path, range(1, 7)), path.clean)
    assert torch.equal(clean_at(path, [6])[:, 0], path.latents[:, -1])


def test_last_step_of_cps_is_deterministic_and_has_log_prob_0(noise, generator):
    path = rollout(MIXTURE.velocity, noise, SIGMAS, FlowCPS(0.7), generator=generator)
    assert not path.log_probs[:, -1].any() and path.log_probs[:, :-1].all()
    assert_close(path.latents[:, -1], path.clean[:, -2])  # it goes straight to the clean estimate


def test_noise_level_0_is_the_ode(noise):
    path = rollout(MIXTURE.velocity, noise, SIGMAS, FlowSDE(0.0))
    assert_close(path.latents[:, -1], ode_sample(MIXTURE.velocity, noise, SIGMAS))
    assert not path.log_probs.any()


def test_sde_steps_are_noisy_first_and_euler_after(noise, generator):
    step_noise = torch.randn(32, 6, 2, generator=generator)
    full = rollout(MIXTURE.velocity, noise, SIGMAS, FlowSDE(), step_noise)
    part = rollout(MIXTURE.velocity, noise, SIGMAS, FlowSDE(), step_noise, sde_steps=4)
    assert torch.equal(part.latents[:, :5], full.latents[:, :5])
    assert torch.equal(part.log_probs[:, :4], full.log_probs[:, :4]) and not part.log_probs[:, 4:].any()
    assert_close(part.latents[:, -1], ode_sample(MIXTURE.velocity, part.latents[:, 4], SIGMAS[4:]))


def test_step_noise_makes_a_sample_independent_of_its_batch(noise, generator):
    step_noise = torch.randn(32, 6, 2, generator=generator)
    whole = rollout(MIXTURE.velocity, noise, SIGMAS, FlowSDE(), step_noise)
    part = rollout(MIXTURE.velocity, noise[8:12], SIGMAS, FlowSDE(), step_noise[8:12])
    assert_close(part.latents, whole.latents[8:12])


@pytest.mark.parametrize("shape", [(2,), (4, 3, 3)])
def test_ratio_is_exactly_1_and_replay_carries_a_gradient(shape, generator):
    torch.manual_seed(0)
    net = nn.Linear(math.prod(shape), math.prod(shape))
    path = rollout(lambda x, s: net(x.flatten(1)).reshape(x.shape), torch.randn(16, *shape, generator=generator),
                   SIGMAS, FlowSDE(), generator=generator)  # fmt: skip
    for j in range(6):
        step = replay(lambda x, s: net(x.flatten(1)).reshape(x.shape), path, j, FlowSDE())
        log_prob = step.log_prob(path.latents[:, j + 1])
        assert torch.equal((log_prob - path.log_probs[:, j]).exp(), torch.ones(16))
        assert torch.autograd.grad(log_prob.mean(), net.weight)[0].norm() > 0
    assert not path.latents.requires_grad and not path.log_probs.requires_grad


def test_score_function_gradient_of_a_denoising_path_is_unbiased(generator):
    "Affine velocity with an offset theta: the mean of x0 follows without sampling, and so does the true gradient."
    world, sigmas, sampler, goal = GaussianMixture(torch.zeros(1, 2), 0.5), shifted_sigmas(4), DanceSDE(0.5), 1.0
    theta, mean = torch.tensor([0.3, -0.2], requires_grad=True), torch.zeros(1, 2)
    for j in range(4):
        velocity = world.velocity(mean, sigmas[j]) + theta
        mean = sampler.transition(mean, velocity, sigmas[j], sigmas[j + 1], sigmas[1]).mean
    (truth,) = torch.autograd.grad(-(mean - goal).square().sum(), theta)

    n = 20_000
    start = torch.randn(n, 2, generator=generator)
    path = rollout(lambda x, s: world.velocity(x, s) + theta.detach(), start, sigmas, sampler, generator=generator)
    reward = -(path.latents[:, -1] - goal).square().sum(1)
    each = theta.detach().expand(n, 2).clone().requires_grad_()  # one theta per sample
    steps = [replay(lambda x, s: world.velocity(x, s) + each, path, j, sampler) for j in range(4)]
    log_prob = 2 * sum(step.log_prob(path.latents[:, j + 1]) for j, step in enumerate(steps))
    (samples,) = torch.autograd.grad(((reward - reward.mean()) * log_prob).sum(), each)
    error = samples.std(0) / n**0.5
    assert ((samples.mean(0) - truth).abs() < 4 * error).all()
    assert (error < 0.1 * truth.abs()).all()  # the test has the power to notice a tenth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": SIGMAS.flip(0)}, "reversed"),
        ({"sigmas": torch.tensor([1.0, 0.5, 0.5, 0.0])}, "fall at every step"),
        ({"sigmas": torch.tensor([1.0])}, "at least one step"),
        ({"step_noise": torch.zeros(32, 5, 2)}, r"\(32, 6, 2\), got \(32, 5, 2\)"),
        ({"group": torch.zeros(32)}, "32 integers"),
        ({"group": torch.zeros(31, dtype=torch.int64)}, "32 integers"),
        ({"sde_steps": 0}, "1 to 6"),
        ({"sde_steps": 7}, "1 to 6"),
    ],
)
def test_bad_input_is_named(change, message, noise):
    with pytest.raises(ValueError, match=message):
        rollout(MIXTURE.velocity, noise, **{"sigmas": SIGMAS, "sampler": FlowSDE(), **change})


# Projections by several steps


def test_one_projection_step_is_the_clean_estimate_to_the_last_bit(noise, generator):
    path = rollout(MIXTURE.velocity, noise, SIGMAS, FlowSDE(), generator=generator)
    assert project(None, path, range(7), 1) is path  # and calls nothing


@pytest.mark.parametrize("states", [[0, 3, 6], [2], [6], range(7)])
def test_projections_are_eulers_steps_evenly_spaced(states, noise, generator):
    path, called = rollout(MIXTURE.velocity, noise, SIGMAS, FlowSDE(), generator=generator), []

    def velocity(x, sigma):
        called.append(float(sigma))
        return MIXTURE.velocity(x, sigma)

    better = project(velocity, path, states, 4)
    assert len(called) == 3 * len([s for s in states if s < 6])  # the first velocity is the rollout's
    for s in range(7):
        x, sigma = path.latents[:, s], SIGMAS[s].item()
        steps = 4 if s in states else 1
        for i in range(steps):
            x = x - sigma / steps * MIXTURE.velocity(x, torch.tensor(sigma * (1 - i / steps)))
        assert_close(clean_at(better, [s])[:, 0], x if s < 6 else path.latents[:, 6], atol=1e-5, rtol=1e-4)
    assert better.latents is path.latents and better.log_probs is path.log_probs


def test_more_projection_steps_come_closer_to_the_end_of_the_ode(generator):
    noise = torch.randn(32, 2, generator=generator, dtype=torch.float64)
    path = rollout(MIXTURE.velocity, noise, SIGMAS.double(), FlowSDE(), generator=generator)
    for s in range(6):
        end = ode_sample(MIXTURE.velocity, path.latents[:, s], SIGMAS[s].double() * torch.linspace(1, 0, 2001).double())
        gaps = [
            (clean_at(project(MIXTURE.velocity, path, [s], n), [s])[:, 0] - end).norm(dim=1).mean().item()
            for n in (1, 4, 16, 64, 256)
        ]
        assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.05 * gaps[0] + 1e-3
