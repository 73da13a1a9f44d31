"Objectives that learn from finished images: each against its formula in loops, its gradient, and what it pulls to."

import math
from contextlib import contextmanager

import pytest
import torch
from plug_classes import plug_classes
from torch.testing import assert_close

import vgpo.objectives
from vgpo.flow import ode_sample, shifted_sigmas
from vgpo.objectives.awm import AWM, VGRPO
from vgpo.objectives.base import Objective
from vgpo.objectives.matching import Matching
from vgpo.objectives.nft import NFT
from vgpo.rollout import rollout
from vgpo.sde import FlowSDE
from vgpo.toy import GaussianMixture
from vgpo.trainer import MicroBatch

KINDS = [kind for kind in plug_classes(Objective, vgpo.objectives) if issubclass(kind, Matching)]
OBJECTIVES = [
    NFT(),
    NFT(normalize=False),
    NFT(mix=0.3, max_advantage=1.0),
    AWM(),
    AWM(error_of="clean"),
    VGRPO(),
    VGRPO(error_of="clean"),
]
STEPS, COUNT = 5, 8
EVERY = torch.tensor([4, 3, 2, 1, 0, 0, 1, 2])  # a level of its own for each sample
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
each_step = pytest.mark.parametrize("step", [0, 3, EVERY], ids=["0", "3", "each its own"])


class Policy:
    "The mixture's velocity plus `theta` times a field, steeper with guidance; before training, theta is 0.1."

    mixture = GaussianMixture.ring()

    def __init__(self, theta=0.0):
        self.theta, self.reference_passes = torch.tensor(theta, dtype=torch.float64, requires_grad=True), 0

    def velocity(self, x, sigma, embeds, guidance_scale=1.0):
        return self.mixture.velocity(x, sigma) + guidance_scale * self.theta * (x.sin() + embeds)

    @contextmanager
    def reference(self):
        mine, self.theta = self.theta, torch.tensor(0.1, dtype=torch.float64)
        self.reference_passes += 1
        try:
            yield
        finally:
            self.theta = mine


def batch_of(objective, dtype=torch.float64, noisy=None):
    "A MicroBatch that the weights theta = 0 drew, as the trainer makes it."
    noise = torch.randn(COUNT, STEPS + 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    old, sigmas = Policy(), shifted_sigmas(STEPS).to(dtype)
    path = rollout(lambda x, s: old.velocity(x, s, 0.3).detach(), noise[:, 0], sigmas, FlowSDE(0.0), noise[:, 1:])
    noisy = torch.ones(COUNT, STEPS, dtype=bool) if noisy is None else noisy
    batch = MicroBatch(0, [], 0.3, path, noisy, noise=noise[:, 1:])
    batch.advantages = torch.linspace(-3, 3, COUNT * STEPS, dtype=torch.float64).reshape(STEPS, COUNT).T.to(dtype)
    with torch.no_grad():
        batch.old_velocities = objective.old_velocities(old, batch)
    return batch


def numbers(values):
    return values.detach().tolist()


def by_hand(objective, policy, batch, step):
    "The loss without KL, in plain Python, image by image and number by number."
    total = 0.0
    for i in range(COUNT):
        j = int(step[i]) if isinstance(step, torch.Tensor) else step
        sigma, a = float(batch.path.sigmas[j]), float(batch.advantages[i, j])
        image, noise = numbers(batch.path.latents[i, STEPS]), numbers(batch.noise[i, j])
        x = [(1 - sigma) * p + sigma * e for p, e in zip(image, noise, strict=True)]
        u = [e - p for p, e in zip(image, noise, strict=True)]
        at = torch.tensor([x], dtype=torch.float64)
        v, old = (
            numbers(p.velocity(at, torch.tensor(sigma), 0.3, objective.guidance_scale)[0]) for p in (policy, Policy())
        )

        def distance(one, other, scale=1.0):
            return sum((scale * (p - q)) ** 2 for p, q in zip(one, other, strict=True)) / 2

        if isinstance(objective, NFT):
            good = min(max(0.5 + a / (2 * objective.max_advantage), 0), 1)
            for share, sign in ((good, 1), (1 - good, -1)):
                side = [o + sign * objective.mix * (p - o) for p, o in zip(v, old, strict=True)]
                size = sum(abs(sigma * (p - q)) for p, q in zip(side, u, strict=True)) / 2
                total += share * distance(side, u, sigma) / (size if objective.normalize else 1) / objective.mix
            continue
        scale = sigma if objective.error_of == "clean" else 1.0
        if isinstance(objective, VGRPO):
            ratio = math.exp(distance(old, u, scale) - distance(v, u, scale))
            clipped = min(max(ratio, 1 - objective.clip_range), 1 + objective.clip_range)
            total -= min(ratio * a, clipped * a)
        else:
            total += a * distance(v, u, scale)
    return total / COUNT


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@each_step
@each_objective
def test_the_loss_number_by_number(objective, step, guidance_scale):
    objective = type(objective)(**vars(objective) | {"guidance_scale": guidance_scale})
    policy, batch = Policy(0.2), batch_of(objective)
    loss, stats = objective.loss(policy, batch, step, None)
    assert_close(loss.item(), by_hand(objective, policy, batch, step), rtol=1e-9, atol=1e-12)
    x, sigma, _ = objective.noised(batch, step)
    moved = guidance_scale * 0.2 * (x.sin() + 0.3)
    assert_close(stats["drift"], moved.square().mean().detach())
    assert not stats["drift"].requires_grad and policy.reference_passes == 0 and "kl" not in stats


@pytest.mark.parametrize("theta", [0.0, 0.2])
@pytest.mark.parametrize("step", [1, EVERY], ids=["1", "each its own"])
@each_objective
def test_gradient_by_finite_differences(objective, step, theta):
    "NFT's own weights count as constants: their gradient is that of the sum with the weights at theta."
    policy, batch = Policy(theta), batch_of(objective)
    loss, _ = objective.loss(policy, batch, step, None)
    (exact,) = torch.autograd.grad(loss, policy.theta)
    sides, h = [], 1e-5
    for sign in (1, -1):
        if getattr(objective, "normalize", False):
            moved = Weighted(**vars(objective))
            moved.at = Policy(theta), batch, step
        else:
            moved = objective
        sides.append(moved.loss(Policy(theta + sign * h), batch, step, None)[0].detach())
    assert_close(exact, (sides[0] - sides[1]) / (2 * h), rtol=1e-6, atol=1e-9)
    assert exact.abs() > 1e-4


class Weighted(NFT):
    "NFT whose errors are divided by their mean sizes at other weights than they are taken."

    def fit(self, velocity, old, target, advantages, sigma):
        policy, batch, step = self.at
        x, _, _ = self.noised(batch, step)
        there = policy.velocity(x, sigma, batch.embeds, self.guidance_scale).detach()
        self.sizes = [
            (sigma.reshape(-1, 1) * (old + sign * self.mix * (there - old) - target)).abs().mean(1) for sign in (1, -1)
        ]
        return super().fit(velocity, old, target, advantages, sigma)

    def size(self, velocity, target, sigma):
        return (sigma.reshape(-1, 1) * (velocity - target)).square().mean(1) / self.sizes.pop(0)


# What they have in common


@each_step
def test_the_images_are_those_of_the_ode_and_are_noised_again(step):
    batch = batch_of(AWM())
    x, sigma, target = AWM().noised(batch, step)
    old = Policy()
    finished = ode_sample(lambda x, s: old.velocity(x, s, 0.3).detach(), batch.path.latents[:, 0], batch.path.sigmas)
    assert_close(batch.path.latents[:, -1], finished)
    for i in range(COUNT):
        j = int(step[i]) if isinstance(step, torch.Tensor) else step
        level = batch.path.sigmas[j]
        assert_close(x[i], (1 - level) * finished[i] + level * batch.noise[i, j])
        assert_close(target[i], batch.noise[i, j] - finished[i])
    assert torch.equal(sigma, batch.path.sigmas[step])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_objective
def test_before_the_first_update_nothing_has_drifted(objective, dtype):
    batch = batch_of(objective, dtype)
    for step in (0, 2, EVERY):
        policy = Policy()
        policy.theta = policy.theta.detach().to(dtype).requires_grad_()
        loss, stats = objective.loss(policy, batch, step, None)
        assert stats["drift"] == 0 and all(value.isfinite() for value in stats.values())
        assert torch.autograd.grad(loss, policy.theta)[0] != 0
        if isinstance(objective, VGRPO):
            assert stats["ratio/abs_dev_mean"] == stats["clip_ratio"] == stats["approx_kl"] == 0


def test_old_velocities_are_computed_where_they_are_trained():
    noisy = torch.zeros(COUNT, STEPS, dtype=bool)
    for i, first in enumerate([0, 1, 2, 3, 0, 1, 2, 3]):
        noisy[i, first : first + 2] = True
    batch, objective = batch_of(AWM(), noisy=noisy), AWM(guidance_scale=2.0)
    policy = Policy(0.5)
    old = objective.old_velocities(policy, batch)
    assert torch.equal(old.abs().sum(2) > 0, noisy)
    for i, j in noisy.nonzero().tolist():
        sigma = batch.path.sigmas[j]
        x = (1 - sigma) * batch.path.latents[i, -1] + sigma * batch.noise[i, j]
        assert_close(old[i, j], policy.velocity(x[None], sigma, 0.3, 2.0)[0])
    assert Objective().old_velocities(policy, batch) is None


@each_objective
def test_statistics(objective):
    batch, names = batch_of(objective), {"drift"}
    names |= {"good"} if isinstance(objective, NFT) else set()
    names |= {"ratio/abs_dev_mean", "clip_ratio", "approx_kl"} if isinstance(objective, VGRPO) else set()
    _, stats = objective.loss(Policy(0.2), batch, 2, None)
    assert stats.keys() == names and all(value.ndim == 0 and not value.requires_grad for value in stats.values())


@pytest.mark.parametrize("kind", KINDS)
def test_beta_pulls_towards_the_model_before_training(kind):
    for beta, wanted in ((0.0, 0), (0.5, 1)):
        objective, policy = kind(beta=beta), Policy(0.4)
        batch = batch_of(objective)
        loss, stats = objective.loss(policy, batch, 2, None)
        assert policy.reference_passes == wanted == int(objective.uses_reference)
    plain = kind().loss(policy, batch, 2, None)[0]
    x, _, _ = objective.noised(batch, 2)
    kl = (0.3 * (x.sin() + 0.3)).square().mean()
    assert_close(stats["kl"], kl)
    assert_close(loss, plain + 0.5 * kl)
    batch.advantages.zero_()  # then nothing else speaks, but for NFT's pull to the weights that drew the images
    objective = kind(beta=1e3)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(objective.loss(policy, batch, 2, None)[0], policy.theta)
        policy.theta.data -= 2e-4 * gradient
    assert policy.theta.item() == pytest.approx(0.1, abs=1e-3)


# What they are beside each other


@pytest.mark.parametrize("error_of", ["velocity", "clean"])
@each_step
def test_awm_and_vgrpo_follow_the_same_gradient_before_an_update(error_of, step):
    gradients = []
    for kind in (AWM, VGRPO):
        policy, objective = Policy(), kind(error_of=error_of)
        loss, _ = objective.loss(policy, batch_of(objective), step, None)
        gradients += torch.autograd.grad(loss, policy.theta)
    assert_close(*gradients)


@pytest.mark.parametrize("mix", [0.1, 1.0, 3.0])
@each_step
def test_nft_begins_with_the_gradient_of_weighted_matching(mix, step):
    "Whatever mix is, over max_advantage; with normalised errors, of errors over their mean size."
    plain, objective = Policy(), AWM(error_of="clean")
    loss, _ = objective.loss(plain, batch_of(objective), step, None)
    (expected,) = torch.autograd.grad(loss, plain.theta)
    for normalize in (False, True):
        policy, objective = Policy(), NFT(mix=mix, normalize=normalize)
        batch = batch_of(objective)
        if normalize:
            x, sigma, target = objective.noised(batch, step)
            off = sigma.reshape(-1, 1) * (Policy().velocity(x, sigma, 0.3) - target)
            rows = torch.arange(COUNT)
            batch.advantages[rows, step] = batch.advantages[rows, step] * off.abs().mean(1).detach() / 2
            expected = expected / 2
        loss, _ = objective.loss(policy, batch, step, None)
        assert_close(torch.autograd.grad(loss, policy.theta)[0], expected / objective.max_advantage)


@pytest.mark.parametrize("mix", [0.25, 1.0])
def test_nft_is_smallest_where_equation_3_says(mix):
    "Also where an advantage is beyond the largest: the share of good is then 0 or 1."
    generator = torch.Generator().manual_seed(1)
    old, target = torch.randn(2, 200, 3, generator=generator, dtype=torch.float64)
    advantages = 3 * torch.randn(200, generator=generator, dtype=torch.float64)
    objective = NFT(mix=mix, max_advantage=2.0, normalize=False)
    good = (0.5 + advantages / 4).clamp(0, 1)
    assert ((good == 0) | (good == 1)).any()
    best = ((2 * good - 1)[:, None] * (target - old)).mean(0) / mix

    def loss(delta):
        found, stats = objective.fit(old + delta, old, target, advantages, torch.tensor(0.6))
        assert_close(stats["good"], good.mean())
        return found

    delta = best.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(delta), delta)
    assert_close(gradient, torch.zeros(3, dtype=torch.float64))
    for other in 0.1 * torch.randn(20, 3, generator=generator, dtype=torch.float64):
        gap = 0.36 * mix * other.square().mean()  # the square b |delta - delta*|^2, of errors that sigma^2 weighs
        assert_close(loss(best + other) - loss(best), gap)


@pytest.mark.parametrize("advantage", [3.0, -3.0])
def test_weighted_matching_has_no_bottom_for_bad_images_and_the_others_have(advantage):
    old, target = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    a = torch.tensor([advantage], dtype=torch.float64)
    losses = {}
    for objective in (AWM(), VGRPO(), NFT()):
        line = [objective.fit(old + d, old, target, a, torch.tensor(0.5))[0].item() for d in (0.0, 1e2, -1e2, -1e4)]
        losses[type(objective)] = line
    assert (losses[AWM][3] < losses[AWM][2] < losses[AWM][0]) == (advantage < 0)
    assert min(losses[VGRPO]) >= -abs(advantage) * 1.01 and min(losses[NFT]) > 0
    assert min(losses[NFT][1:]) > losses[NFT][0]


def test_a_clipped_image_has_no_gradient():
    generator = torch.Generator().manual_seed(2)
    old, target = torch.randn(2, 64, 6, generator=generator, dtype=torch.float64)
    advantages = torch.randn(64, generator=generator, dtype=torch.float64)
    velocity = (old + 0.1 * torch.randn(old.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    objective = VGRPO(clip_range=0.01)
    loss, stats = objective.fit(velocity, old, target, advantages, torch.tensor(0.5))
    (gradient,) = torch.autograd.grad(loss, velocity)
    ratio = ((old - target).square().mean(1) - (velocity - target).square().mean(1)).exp().detach()
    let_go = ((ratio > 1.01) & (advantages > 0)) | ((ratio < 0.99) & (advantages < 0))
    assert 0 < let_go.sum() < 64 and torch.equal(gradient.abs().sum(1) == 0, let_go)
    assert stats["clip_ratio"] == ((ratio - 1).abs() > 0.01).float().mean()
