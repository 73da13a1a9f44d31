import pytest
import torch
from torch.testing import assert_close

from vgpo.advantages import group_relative, value_anchored
from vgpo.flow import ode_sample, shifted_sigmas
from vgpo.rollout import clean_at, rollout
from vgpo.sde import FlowSDE
from vgpo.toy import GaussianMixture, ToyPolicy, ks_threshold, sliced_ks, toy_loss, train_toy
from vgpo.values import discounted_values

MIXTURE = GaussianMixture.ring()
TARGETS = MIXTURE.means[::2]


def reward(x, prompt):
    return (-(x - TARGETS[prompt]).norm(dim=-1)).exp()


def grpo(rewards, group):
    return group_relative(rewards[:, -1], group)[:, None].expand_as(rewards)


def vgpo(rewards, group, gamma=0.9, k=0.05):
    return value_anchored(discounted_values(rewards, gamma), group, anchor=k)


def policy(seed=0):
    torch.manual_seed(seed)
    return ToyPolicy(MIXTURE, 4)


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def trained(advantage, reward=reward, **options):
    model = policy()
    history = train_toy(model, reward, advantage, **{"epochs": 3, **options})
    return weights(model), history


def test_vgpo_improves_a_reward():
    "40 epochs with KL: the training reward rises, and the ODE's with 40 steps far beyond its error."
    model = policy()
    history = train_toy(model, reward, vgpo, epochs=40, kl_beta=0.01)
    assert history[-1]["reward"] > history[0]["reward"] + 0.2
    prompt = torch.arange(4).repeat_interleave(500)
    noise = torch.randn(len(prompt), 2, generator=torch.Generator().manual_seed(1))
    before, after = (
        reward(ode_sample(lambda x, s, m=m: m(x, s, prompt), noise, shifted_sigmas(40)), prompt)
        for m in (policy(), model)
    )
    gain = after - before
    assert gain.mean() > 0.15 and gain.mean() > 4 * gain.std() / len(gain) ** 0.5


def test_training_is_reproducible():
    assert torch.equal(trained(vgpo)[0], trained(vgpo)[0])
    assert not torch.equal(trained(vgpo)[0], trained(vgpo, seed=1)[0])


def test_grpo_is_vgpo_with_a_constant_reward_over_time_and_no_anchor():
    "Bit for bit: one trainer, and the method is nothing but the advantage."
    as_vgpo = trained(lambda r, g: value_anchored(r[:, -1:].expand_as(r), g, anchor=0))[0]
    assert torch.equal(as_vgpo, trained(grpo)[0])
    assert not torch.equal(trained(vgpo)[0], trained(grpo)[0])


@pytest.mark.parametrize(
    "level, advantage, moves",
    [(1.0, grpo, False), (1.0, lambda r, g: vgpo(r, g, k=0), False), (1.0, vgpo, True), (0.0, vgpo, False)],
    ids=["GRPO", "TCRM", "VGPO", "VGPO where all failed"],
)
def test_equal_rewards_teach_nothing_unless_anchored(level, advantage, moves):
    moved = trained(advantage, lambda x, prompt: torch.full((len(x),), level))[0] - weights(policy())
    assert bool(moved.any()) == moves


def test_first_update_is_reinforce_with_the_given_advantages():
    "At ratio 1 the loss is -mean A and its gradient that of -mean(A log pi), for weighted, anchored advantages too."
    model, prompt, generator = policy(), torch.arange(4).repeat_interleave(8), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.correction[-1].weight, std=0.1)
    sigmas, sampler = shifted_sigmas(6), FlowSDE(0.7)
    noise = torch.randn(len(prompt), 2, generator=generator)
    path = rollout(lambda x, s: model(x, s, prompt), noise, sigmas, sampler, group=prompt, generator=generator)
    advantages = vgpo(torch.stack([reward(x, prompt) for x in path.clean.unbind(1)], 1), prompt)
    loss, stats = toy_loss(model, path, advantages, sampler, clip_range=0.2)
    assert_close(loss, -advantages.mean())
    assert stats["ratio/abs_dev_mean"] == 0 and stats["clip_ratio"] == 0
    loss.backward()
    expected = 0
    for j in range(6):
        x, after = path.latents[:, j], path.latents[:, j + 1]
        step = sampler.transition(x, model(x, sigmas[j], prompt), sigmas[j], sigmas[j + 1], sigmas[1])
        log_prob = torch.distributions.Normal(step.mean, step.std).log_prob(after).mean(1)
        expected = expected - (advantages[:, j] * log_prob).mean() / 6
    for found, gradient in zip(model.parameters(), torch.autograd.grad(expected, model.parameters()), strict=True):
        assert_close(found.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x, p: torch.where(x[:, 0] > 1, float("nan"), 0.5), "NaN or infinity in rows"),
        (lambda x, p: -(x - TARGETS[p]).norm(dim=-1), r"give the reward a scale into \[0, 1\]"),
    ],
    ids=["NaN", "negative"],
)
def test_a_reward_outside_its_domain_stops_training(bad, message):
    with pytest.raises(ValueError, match=message):
        trained(vgpo, bad)


def test_gains_to_the_end_are_the_final_reward_minus_that_of_the_state_before():
    "On real trajectories: what TCRM's sum makes of gains is a baseline of the state, so the goal stays the final reward."
    group = torch.zeros(8, dtype=torch.int64)
    path = rollout(MIXTURE.velocity, torch.randn(8, 2), shifted_sigmas(10), FlowSDE(0.7), group=group)
    rewards = torch.stack([reward(x, group) for x in clean_at(path, range(11)).unbind(1)], 1)
    assert_close(discounted_values(rewards.diff(dim=1), 1), rewards[:, -1:] - rewards[:, :-1])


def test_sde_and_ode_agree_until_a_reward_has_trained_the_velocity():
    "The score is in the velocity only while that is a conditional expectation."

    @torch.no_grad()
    def distance(model, n=1000):
        prompt, sigmas, generator = (
            torch.zeros(n, dtype=torch.int64),
            shifted_sigmas(100),
            torch.Generator().manual_seed(0),
        )
        noise = torch.randn(2, n, 2, generator=generator)
        ode = ode_sample(lambda x, s: model(x, s, prompt), noise[0], sigmas)
        sde = rollout(lambda x, s: model(x, s, prompt), noise[1], sigmas, FlowSDE(0.7), generator=generator)
        return sliced_ks(ode, sde.latents[:, -1])

    model = policy()
    assert distance(model) < ks_threshold(1000)
    train_toy(model, reward, grpo, epochs=40, lr=5e-3)
    assert distance(model) > 2 * ks_threshold(1000)
