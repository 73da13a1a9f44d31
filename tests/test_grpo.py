import math

import pytest
import torch
from torch.testing import assert_close

from vgpo.advantages import check_rewards, group_relative, group_stats
from vgpo.flow import ode_sample, shifted_sigmas
from vgpo.rollout import rollout
from vgpo.sde import FlowCPS, FlowSDE
from vgpo.toy import GaussianMixture, ToyPolicy, toy_kl, toy_loss, train_toy

MIXTURE = GaussianMixture.ring()
TARGETS = MIXTURE.means[::2]


def reward(x, prompt):
    return (-(x - TARGETS[prompt]).norm(dim=1)).exp()


def grpo(rewards, group):
    return group_relative(rewards[:, -1], group)[:, None].expand_as(rewards)


def test_golden_values_of_two_interleaved_groups():
    "One success of four: mean 1/4, std sqrt(3)/4, so sqrt(3) and -1/sqrt(3); equal rewards: 0."
    rewards, group = torch.tensor([1.0, 0.3, 0.0, 0.3, 0.0, 0.0]), torch.tensor([7, 9, 7, 9, 7, 7])
    low = -1 / math.sqrt(3)
    assert_close(group_relative(rewards, group, eps=0), torch.tensor([3**0.5, math.nan, low, math.nan, low, low]),
                 equal_nan=True)  # fmt: skip
    assert not group_relative(rewards, group)[group == 9].any()


def test_group_stats_equals_a_loop_for_rewards_of_every_step():
    torch.manual_seed(0)
    values, group = torch.randn(40, 10), torch.randint(0, 5, (40,)) * 2**40  # ids far beyond float32
    center, spread = group_stats(values, group)
    assert center.dtype == torch.float64 and center.shape == spread.shape == (40, 10)
    for g in group.unique():
        member = values[group == g].double()
        assert_close(center[group == g], member.mean(0).expand_as(member))
        assert_close(spread[group == g], member.std(0, correction=0).expand_as(member))


@pytest.mark.parametrize("level", [0.1, 0.7, 23.41])
@pytest.mark.parametrize("size", [3, 7, 24])
def test_equal_rewards_have_exactly_no_spread(level, size):
    group = torch.zeros(size, dtype=torch.int64)
    assert group_stats(torch.full((size,), level), group)[1].max() == 0
    assert not group_relative(torch.full((size,), level), group).any()


def test_invariances():
    "Advantages sum to 0 in a group, ignore the reward's unit, and follow a permutation of the batch."
    torch.manual_seed(0)
    rewards, group, order = torch.rand(64, dtype=torch.float64), torch.arange(64) % 4, torch.randperm(64)
    advantages = group_relative(rewards, group, eps=1e-12)
    assert_close(torch.stack([advantages[group == g].sum() for g in range(4)]), torch.zeros(4, dtype=torch.float64))
    assert_close(group_relative(100 * rewards + 23, group, eps=1e-12), advantages)
    assert_close(group_relative(rewards[order], group[order], eps=1e-12), advantages[order])


def test_the_batchs_std_keeps_the_groups_relative_sizes():
    rewards, group = torch.tensor([0.0, 2.0, 5.0, 5.2]), torch.tensor([0, 0, 1, 1])
    spread = rewards.double().std(correction=0).item()
    expected = torch.tensor([-1.0, 1.0, -0.1, 0.1]) / (spread + 1e-4)
    assert_close(group_relative(rewards, group, scale_rewards="batch"), expected)


@pytest.mark.parametrize(
    ("rewards", "group", "message"),
    [
        (torch.zeros(3), torch.zeros(4, dtype=torch.int64), r"rewards has shape \(3,\) but group has \(4,\)"),
        (torch.zeros(3), torch.zeros(3), "integers"),
        (torch.tensor([0.0, math.nan, math.inf]), torch.zeros(3, dtype=torch.int64), r"rows \[1, 2\]"),
        (torch.tensor(0.0), torch.zeros(1, dtype=torch.int64), "one id per row"),
    ],
)
def test_bad_input_is_named(rewards, group, message):
    with pytest.raises(ValueError, match=message):
        group_relative(rewards, group)


def test_more_bad_input_is_named():
    rewards = torch.zeros(3, 2)
    rewards[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"values has NaN or infinity in rows \[2\]"):
        check_rewards("values", rewards, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="'group' or 'batch', got 'global'"):
        group_relative(torch.zeros(2), torch.zeros(2, dtype=torch.int64), scale_rewards="global")


def test_untrained_policy_is_its_mixture():
    x, prompt = torch.randn(8, 2), torch.arange(8) % 4
    policy = ToyPolicy(MIXTURE, 4)
    assert torch.equal(policy(x, torch.tensor(0.5), prompt), MIXTURE.velocity(x, torch.tensor(0.5)))
    path = rollout(MIXTURE.velocity, x, shifted_sigmas(3), FlowSDE(), group=prompt)
    assert toy_kl(policy, path) == 0
    with torch.no_grad():
        policy.correction[-1].bias += torch.tensor([0.3, -0.4])
    assert_close(toy_kl(policy, path).item(), (0.3**2 + 0.4**2) / 2)


@pytest.mark.parametrize("sampler", [FlowSDE(0.7), FlowSDE(0.2)])
def test_loss_of_a_fresh_rollout_is_minus_the_mean_advantage(sampler):
    torch.manual_seed(0)
    policy, prompt = ToyPolicy(MIXTURE, 4), torch.arange(4).repeat_interleave(8)
    path = rollout(lambda x, s: policy(x, s, prompt), torch.randn(32, 2), shifted_sigmas(5), sampler, group=prompt)
    advantages = torch.randn(32, 5)
    loss, stats = toy_loss(policy, path, advantages, sampler, 0.2)
    assert_close(loss, -advantages.mean())
    assert stats["ratio/abs_dev_mean"] == 0


def trained(seed, epochs=40, **options):
    torch.manual_seed(seed)
    policy = ToyPolicy(MIXTURE, 4)
    return policy, train_toy(policy, reward, grpo, epochs=epochs, lr=5e-3, seed=seed, **options)


def hits(policy):
    prompt = torch.arange(4).repeat_interleave(200)
    noise = torch.randn(800, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = ode_sample(lambda x, s: policy(x, s, prompt), noise, shifted_sigmas(20))
    return (torch.cdist(x, MIXTURE.means).argmin(1) == 2 * prompt).float().mean().item()


def test_grpo_teaches_the_prompt_reproducibly():
    policy, history = trained(0)
    again, same = trained(0)
    assert history == same and all(map(torch.equal, policy.parameters(), again.parameters()))
    assert history[0].keys() == {"reward", "advantage", "reward_std", "frac_reward_zero_std"}
    assert hits(ToyPolicy(MIXTURE, 4)) < 0.2 < 0.9 < hits(policy)


def test_without_signal_nothing_moves():
    torch.manual_seed(0)
    policy = ToyPolicy(MIXTURE, 4)
    before = [p.detach().clone() for p in policy.parameters()]
    history = train_toy(policy, lambda x, prompt: torch.full((len(x),), 0.7), grpo, epochs=2)
    assert all(map(torch.equal, before, policy.parameters()))
    assert [epoch["frac_reward_zero_std"] for epoch in history] == [1, 1]


def test_a_strong_kl_holds_the_policy_at_its_mixture():
    assert hits(trained(0, epochs=25, kl_beta=1.0)[0]) < 0.25


def test_a_deterministic_step_cannot_be_trained():
    with pytest.raises(ValueError, match="does every step of this sampler have noise"):
        trained(0, epochs=1, sampler=FlowCPS(0.7))
