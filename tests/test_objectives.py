"Objectives: ratios, KLs, their gradients, and the loss of one step of a MicroBatch."

import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from plug_classes import plug_classes
from torch.testing import assert_close

import vgpo.objectives
from vgpo.flow import shifted_sigmas
from vgpo.objectives.base import Objective
from vgpo.objectives.clipped import KLS, ClippedSurrogate, PolicyGradient, noise_weights
from vgpo.objectives.flow_dppo import FlowDPPO
from vgpo.objectives.grpo_guard import GRPOGuard
from vgpo.rollout import column, replay, rollout
from vgpo.sde import DanceSDE, FlowCPS, FlowSDE, Sampler
from vgpo.toy import GaussianMixture
from vgpo.trainer import MicroBatch

SIGMAS, MIXTURE = shifted_sigmas(6).double(), GaussianMixture.ring()
SAMPLERS = [kind(0.5) for kind in plug_classes(Sampler)]
OBJECTIVES = plug_classes(Objective, vgpo.objectives)
EVERY = torch.tensor([4, 3, 2, 1, 0, 0, 1, 2])  # a step of its own for each sample
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
each_objective = pytest.mark.parametrize("kind", OBJECTIVES, ids=lambda kind: kind.__name__)
GRADIENTS = [kind for kind in OBJECTIVES if issubclass(kind, PolicyGradient)]
CLIPPED = [kind for kind in OBJECTIVES if issubclass(kind, ClippedSurrogate)]
each_gradient = pytest.mark.parametrize("kind", GRADIENTS)  # follows the log-probability of what a step did
each_ratio = pytest.mark.parametrize("kind", CLIPPED)


@pytest.fixture
def path_noise():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, 2, generator=generator, dtype=torch.float64) for shape in ((8,), (8, 6))]


def two_policies(sampler, theta, path_noise, dtype=torch.float64):
    "A path of the mixture's velocity, and a function that replays step j with theta times another field added."
    noise, step_noise = (n.to(dtype) for n in path_noise)
    path = rollout(MIXTURE.velocity, noise, SIGMAS.to(dtype), sampler, step_noise, sde_steps=5, keep_means=True)

    def moved(j, theta=theta):
        return replay(lambda x, s: MIXTURE.velocity(x, s) + theta * (x.sin() + 0.3), path, j, sampler)

    return path, step_noise, moved


# Ratios and KLs


@each_sampler
def test_the_guarded_exponent_is_the_published_one(sampler, path_noise):
    path, z, moved = two_policies(sampler, 0.2, path_noise)
    for j in range(5):
        step, old = moved(j), moved(j, 0.0)
        exponent, zero, stats = GRPOGuard().log_probs(step, path, j)
        log_prob, old_log_prob, _ = ClippedSurrogate().log_probs(step, path, j)
        bias = (step.mean - old.mean).square().mean(1) / (2 * step.std.flatten() ** 2)
        assert_close(exponent - zero, (log_prob - old_log_prob + bias) * step.std.flatten())  # arXiv:2510.22319
        assert_close(exponent, (z[:, j] * (step.mean - old.mean)).mean(1))
        assert_close(stats["ratio_bias"], old.kl(step).mean())
    every = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])  # a step of its own for each row
    alone = [GRPOGuard().log_probs(moved(j), path, j)[0][i] for i, j in enumerate(every.tolist())]
    assert_close(GRPOGuard().log_probs(moved(every), path, every)[0], torch.stack(alone))


@each_sampler
def test_the_guard_centres_the_exponent(sampler, path_noise):
    "For noise z and -z, plain log-ratios add up to minus twice the bias, guarded exponents to 0."
    noise, half = path_noise[0][:4], path_noise[1][:4]
    _, _, moved = two_policies(sampler, 0.2, (noise, half))
    path, _, _ = two_policies(sampler, 0.0, (noise, half))
    step, old = moved(0), moved(0, 0.0)
    plain, guard = [], []
    for z in (half[:, 0], -half[:, 0]):
        x_next = old.sample(z)
        path.latents[:, 1], path.log_probs[:, 0] = x_next, old.log_prob(x_next)
        plain.append(torch.sub(*ClippedSurrogate().log_probs(step, path, 0)[:2]))
        guard.append(GRPOGuard().log_probs(step, path, 0)[0])
    assert_close(sum(plain), -2 * old.kl(step))
    assert_close(sum(guard), torch.zeros(4, dtype=torch.float64))
    assert (guard[0] != 0).all()


@each_ratio
@each_sampler
def test_before_the_first_update_the_ratio_is_1_to_the_last_bit(sampler, kind, path_noise):
    path, _, moved = two_policies(sampler, 0.0, path_noise, torch.float32)
    for j in (0, 2, 4, EVERY):
        new, old, _ = kind().log_probs(moved(j), path, j)
        assert torch.equal((new - old).exp(), torch.ones(8))


@each_gradient
@each_sampler
def test_before_the_first_update_the_loss_is_minus_the_mean_advantage(sampler, kind, path_noise):
    path, _, moved = two_policies(sampler, 0.0, path_noise, torch.float32)
    advantages = torch.linspace(-1, 2, 8)
    for j in (0, 2, 4, EVERY):
        loss, stats = kind().surrogate(moved(j), path, j, advantages)
        assert torch.equal(loss, -advantages.mean()) and not any(stats.values())


def gradient(function, x=0.15, h=1e-5):
    "The derivative of a scalar function of a number, by autograd and by central differences."
    theta = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(function(theta), theta)
    with torch.no_grad():
        return exact, (function(theta + h) - function(theta - h)) / (2 * h)


@each_gradient
@each_sampler
def test_gradient_of_the_surrogate_by_finite_differences(sampler, kind, path_noise):
    path, _, moved = two_policies(sampler, 0.0, path_noise)
    advantages = torch.linspace(-1, 1, 8, dtype=torch.float64)
    objective = kind(max_kl=10.0) if kind is FlowDPPO else kind(clip_range=10.0)

    def loss(theta):
        return objective.surrogate(moved(2, theta), path, 2, advantages)[0]

    exact, numeric = gradient(loss)
    assert_close(exact, numeric, rtol=1e-6, atol=1e-9)
    assert exact.abs() > 1e-4


@each_sampler
def test_a_mask_and_a_clip_that_catch_nothing_are_the_same(sampler, path_noise):
    path, _, moved = two_policies(sampler, 0.0, path_noise)
    advantages = torch.linspace(-1, 1, 8, dtype=torch.float64)
    losses = [
        objective.surrogate(moved(j, 0.3), path, j, advantages)[0]
        for objective in (FlowDPPO(max_kl=10.0), ClippedSurrogate(clip_range=10.0))
        for j in (0, 3, EVERY)
    ]
    assert_close(losses[:3], losses[3:], rtol=0, atol=0)


@pytest.mark.parametrize("j", [0, 3, None], ids=["0", "3", "each its own"])
@each_sampler
def test_the_mask_image_by_image(sampler, j, path_noise):
    "In a loop, with PyTorch's own normal distributions: who is left out, the loss and the statistics."
    path, _, moved = two_policies(sampler, 0.0, path_noise)
    j = EVERY if j is None else j
    advantages = torch.tensor([1, -1, 2, -2, 1, -1, 0, 3], dtype=torch.float64)
    rows, step, normal = [], moved(j, 0.4), torch.distributions.Normal
    for i, column_of in enumerate(EVERY.tolist() if j is EVERY else [j] * 8):
        std = step.std.expand_as(step.mean)[i, 0]
        new, old = normal(step.mean[i], std), normal(path.means[i, column_of], std)
        action = path.latents[i, column_of + 1]
        ratio = (new.log_prob(action).mean() - old.log_prob(action).mean()).exp()
        rows.append((torch.distributions.kl_divergence(new, old).mean(), ratio, advantages[i]))
    middle = sorted(float(kl) for kl, *_ in rows)[3] * 1.0001  # four are nearer, four further
    kept = [
        ratio * a for kl, ratio, a in rows if not (kl > middle and ((ratio > 1 and a > 0) or (ratio < 1 and a < 0)))
    ]
    loss, stats = FlowDPPO(max_kl=middle).surrogate(step, path, j, advantages)
    assert 4 < len(kept) < 8
    assert_close(loss, -sum(kept) / 8)
    assert stats["masked"] == (8 - len(kept)) / 8
    assert_close(stats["kl_old"], sum(kl for kl, *_ in rows) / 8)
    assert_close(stats["ratio/abs_dev_mean"], sum(abs(ratio - 1) for _, ratio, _ in rows) / 8)


def test_an_image_that_is_left_out_has_no_gradient(path_noise):
    path, _, moved = two_policies(FlowSDE(0.7), 0.0, path_noise)
    step = moved(2, 0.4)
    step.mean.requires_grad_()
    advantages = torch.ones(8, dtype=torch.float64)
    loss, stats = FlowDPPO(max_kl=1e-9).surrogate(step, path, 2, advantages)
    (grad,) = torch.autograd.grad(loss, step.mean)
    further = step.log_prob(path.latents[:, 3]) > path.log_probs[:, 2]
    assert torch.equal(grad.abs().sum(1) == 0, further) and 0 < further.sum() < 8
    assert stats["masked"] == further.double().mean()


@pytest.mark.parametrize("kl_type", KLS)
@each_sampler
def test_gradient_of_the_kl_by_finite_differences(sampler, kl_type, path_noise):
    _, _, moved = two_policies(sampler, 0.0, path_noise)
    exact, numeric = gradient(lambda theta: KLS[kl_type](moved(3, theta), moved(3, 0.0)).mean())
    assert_close(exact, numeric, rtol=1e-6, atol=1e-9)
    assert exact > 1e-3


def test_the_velocity_kl_weighs_all_steps_alike(path_noise):
    path, _, moved = two_policies(FlowSDE(0.7), 0.2, path_noise)
    for j in range(5):
        field = 0.2 * (path.latents[:, j].sin() + 0.3)
        assert_close(KLS["velocity"](moved(j), moved(j, 0.0)), field.square().mean(1))


@pytest.mark.parametrize("kind", [kind for kind in GRADIENTS if kind.needs_means])
def test_what_needs_the_means_says_so(kind, path_noise):
    path, _, moved = two_policies(FlowSDE(0.7), 0.0, path_noise)
    path.means = None
    with pytest.raises(ValueError, match=f"{kind.__name__} needs the means of the rollout: pass keep_means=True"):
        kind().surrogate(moved(0), path, 0, torch.ones(8, dtype=torch.float64))
    assert GRPOGuard.needs_means and FlowDPPO.needs_means and not ClippedSurrogate.needs_means


# The loss of a step


class Policy:
    "The mixture's velocity plus `theta` times a field, steeper with guidance; the reference has theta = 0.1."

    def __init__(self, theta):
        self.theta, self.reference_passes = torch.tensor(theta, requires_grad=True), 0

    def velocity(self, x, sigma, embeds, guidance_scale=1.0):
        return MIXTURE.velocity(x, sigma) + guidance_scale * self.theta * (x.sin() + embeds)

    @contextmanager
    def reference(self):
        mine, self.theta = self.theta, torch.tensor(0.1)
        self.reference_passes += 1
        try:
            yield
        finally:
            self.theta = mine


def step_of(kind, sampler, path_noise, j=2, theta=0.2, **options):
    "Loss, gradient and statistics of step j, and policy and batch, in float32 as in a run."
    policy, noise = Policy(theta), [n.float() for n in path_noise]
    old = partial(Policy(0.0).velocity, embeds=0.3)
    path = rollout(old, noise[0], SIGMAS.float(), sampler, noise[1], sde_steps=5, keep_means=True)
    batch = MicroBatch(0, [], 0.3, path, torch.ones(8, 6, dtype=bool), noise=noise[1])
    batch.advantages = torch.linspace(-2, 1, 48).reshape(8, 6).sin()
    path.log_probs, path.latents, path.means = (t.detach() for t in (path.log_probs, path.latents, path.means))
    with torch.no_grad():
        batch.old_velocities = kind(**options).old_velocities(Policy(0.0), batch)
    loss, stats = kind(**options).loss(policy, batch, j, sampler)
    (grad,) = torch.autograd.grad(loss, policy.theta, retain_graph=True)
    return loss, grad, stats, policy, batch


@pytest.mark.parametrize("j", [0, 2, EVERY], ids=["0", "2", "each its own"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("kl_type", ["gaussian", "velocity"])
@each_gradient
@each_sampler
def test_the_loss_is_its_formula_to_the_last_bit(sampler, kind, kl_type, beta, j, path_noise):
    options = {"beta": beta, "kl_type": kl_type, "guidance_scale": 1.5}
    options |= {"max_kl": 0.01} if kind is FlowDPPO else {"clip_range": 0.01}
    loss, grad, stats, policy, batch = step_of(kind, sampler, path_noise, j, **options)
    path, rows = batch.path, torch.arange(8)
    velocity = partial(policy.velocity, embeds=0.3, guidance_scale=1.5)
    x, x_next, level = path.latents[rows, j], path.latents[rows, torch.as_tensor(j) + 1], path.sigmas
    levels = (level[j], level[j + 1], level[1])
    v = velocity(x, level[j])
    step = sampler.transition(x, v, *levels)
    if kind is not GRPOGuard:
        log_ratio = step.log_prob(x_next) - path.log_probs[rows, j]
    else:
        old = path.means[rows, j]
        log_ratio = ((x_next - old) / step.std * (step.mean - old)).flatten(1).mean(1)
    ratio, a = log_ratio.exp(), batch.advantages[rows, j]
    if kind is FlowDPPO:
        far = ((step.mean - path.means[rows, j]) / step.std).square().mean(1) / 2 > 0.01
        expected = -(ratio * a * ~(far & (torch.sign(ratio - 1) == a.sign()))).mean()
    else:
        expected = -torch.minimum(ratio * a, ratio.clamp(0.99, 1.01) * a).mean()
    with torch.no_grad(), policy.reference():
        v_ref = velocity(x, level[j])
        reference = sampler.transition(x, v_ref, *levels)
    kl = (v - v_ref).square().flatten(1).mean(1).mean() if kl_type == "velocity" else step.kl(reference).mean()
    if beta:
        expected = expected + beta * kl
        assert torch.equal(stats["kl"], kl)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, torch.autograd.grad(expected, policy.theta)[0]) and grad != 0


@each_gradient
@each_sampler
def test_steps_are_weighed_by_their_noise(sampler, kind, path_noise):
    "Weights against the sampler's own steps, one by one; surrogate and gradient are so many times as large, a KL is not."
    levels = SIGMAS.float()
    x = torch.zeros(1, 2)
    std = torch.cat([sampler.transition(x, x, *levels[j : j + 2], levels[1]).std.reshape(1) for j in range(6)])
    weights = noise_weights(sampler, levels)
    assert_close(weights, 6 * std / std.sum())
    for j in (0, 3):
        plain, weighed = (step_of(kind, sampler, path_noise, j, step_weights=w)[:2] for w in ("none", "noise"))
        assert_close(weighed[0], plain[0] * weights[j])
        assert_close(weighed[1], plain[1] * weights[j])
        with_kl = [step_of(kind, sampler, path_noise, j, step_weights="noise", beta=beta) for beta in (0.0, 0.5)]
        assert_close(with_kl[1][0], with_kl[0][0] + 0.5 * with_kl[1][2]["kl"])
    mixed, _, _, policy, batch = step_of(kind, sampler, path_noise, EVERY, step_weights="noise")
    batch.advantages = batch.advantages * weights
    assert_close(kind().loss(policy, batch, EVERY, sampler)[0], mixed)


def test_weights_are_those_of_the_published_formula():
    "Flow-SDE: g sqrt(length of the step), arXiv:2508.04324; DanceSDE's g is the same everywhere."
    length, level = -SIGMAS.diff(), SIGMAS[:-1].clone()
    level[0] = SIGMAS[1]
    expected = (SIGMAS[:-1] / (1 - level) * length).sqrt()
    assert_close(noise_weights(FlowSDE(0.3), SIGMAS), expected / expected.mean())
    assert_close(noise_weights(DanceSDE(0.3), SIGMAS), length.sqrt() / length.sqrt().mean())
    assert noise_weights(FlowCPS(), SIGMAS)[-1] == 0  # its last step draws none


@each_gradient
def test_the_reference_is_asked_only_where_it_is_needed(kind, path_noise):
    for options, wanted in (({}, 0), ({"beta": 0.1}, 1), ({"target_kl": 0.1}, 1), ({"beta": 0.1, "target_kl": 1}, 1)):
        loss, _, stats, policy, _ = step_of(kind, FlowSDE(0.7), path_noise, **options)
        assert policy.reference_passes == wanted == int(kind(**options).uses_reference)
        assert ("kl" in stats) == bool(wanted)
    plain = step_of(kind, FlowSDE(0.7), path_noise)[0]
    assert torch.equal(step_of(kind, FlowSDE(0.7), path_noise, target_kl=1.0)[0], plain)  # it ends a run, no more
    assert step_of(kind, FlowSDE(0.7), path_noise, beta=1.0)[0] > plain


@each_objective
def test_the_protocol(kind, path_noise):
    objective = kind()
    for name in ("needs_means", "uses_reference", "samples_ode"):
        assert isinstance(getattr(objective, name), bool)
    loss, grad, stats, _, _ = step_of(kind, FlowSDE(0.7), path_noise)
    assert loss.ndim == 0 and loss.isfinite() and grad != 0
    assert all(value.ndim == 0 and value.isfinite() for value in stats.values())


@each_gradient
def test_statistics(kind, path_noise):
    moved, same = (step_of(kind, FlowSDE(0.7), path_noise, theta=theta)[2] for theta in (0.2, 0.0))
    names = {"ratio/abs_dev_mean"} | ({"masked", "kl_old"} if kind is FlowDPPO else {"clip_ratio", "approx_kl"})
    names |= {"ratio_bias"} if kind is GRPOGuard else set()
    assert moved.keys() == same.keys() == names
    assert not any(same.values()) and moved["ratio/abs_dev_mean"] > 0


@each_objective
@pytest.mark.parametrize(
    "options",
    [
        {"clip_range": 0},
        {"clip_range": math.nan},
        {"max_kl": 0},
        {"beta": -1},
        {"guidance_scale": 0.9},
        {"target_kl": -1},
        {"kl_type": "l2"},
        {"step_weights": "sigma"},
        {"mix": 0},
        {"max_advantage": 0},
        {"error_of": "noise"},
    ],
    ids=repr,
)
def test_options_out_of_range(kind, options):
    (name,) = options
    if not hasattr(kind, name):
        with pytest.raises(TypeError, match=name):
            kind(**options)
        return
    with pytest.raises(ValueError, match=f"{kind.__name__}.{name} is "):
        kind(**options)


def test_columns_and_per_sample_steps_agree(path_noise):
    "Samples with steps of their own get what they get alone."
    loss, _, _, _, batch = step_of(ClippedSurrogate, FlowSDE(0.7), path_noise, EVERY, clip_range=10.0)
    policy, parts = Policy(0.2), []
    for i, j in enumerate(EVERY.tolist()):
        step = replay(partial(policy.velocity, embeds=0.3), batch.path, j, FlowSDE(0.7))
        ratio = (step.log_prob(batch.path.latents[:, j + 1]) - batch.path.log_probs[:, j]).exp()
        parts.append(ratio[i] * column(batch.advantages, j)[i])
    assert_close(loss, -torch.stack(parts).mean())
