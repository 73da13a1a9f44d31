"Several rewards, each normalised by itself before they are summed."

import pytest
import torch
from torch.testing import assert_close

from vgpo.advantages import anchored, group_relative
from vgpo.credit.gdpo import GDPO, DecoupledVGPO, decoupled
from vgpo.credit.grpo import GRPO
from vgpo.credit.vgpo import VGPO
from vgpo.values import discounted_values, temporal_weights


def published_gdpo(rewards, weights, size, eps):
    "GDPO as its authors' code has it: rows of one group side by side, sample standard deviations."
    parts = []
    for r in rewards.unbind(1):
        mean, std = (f(r.view(-1, size), dim=1).repeat_interleave(size) for f in (torch.mean, torch.std))
        parts.append((r - mean) / (std + eps))
    total = (torch.stack(parts, 1) * weights).sum(1)
    return (total - total.mean()) / (total.std() + eps)


def test_gdpo_is_the_published_formula():
    generator, size, count = torch.Generator().manual_seed(0), 4, 20
    rewards = torch.rand(count, 3, generator=generator, dtype=torch.float64) ** 2
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    # theirs divides by sample standard deviations: that of the groups cancels, that of the batch does not
    theirs = published_gdpo(rewards, weights, size, 0.0) * (count / (count - 1)) ** 0.5
    shuffle = torch.randperm(count, generator=generator)
    ours = decoupled(rewards[shuffle], (torch.arange(count) // size)[shuffle], weights, eps=0)
    assert_close(ours, theirs[shuffle])
    assert_close(ours.std(correction=0).item(), 1.0)


def test_gdpo_tells_apart_what_the_sum_confuses():
    "The two-rollout example of the GDPO paper: (0, 1) and (0, 2) of two binary rewards."
    rewards = torch.tensor([[0, 0], [0, 1], [0, 0], [1, 1]]).float()
    group, weights = torch.tensor([0, 0, 1, 1]), [0.5, 0.5]
    summed = group_relative(rewards.mean(1), group)
    assert_close(summed[:2], summed[2:], rtol=1e-3, atol=0)
    apart = decoupled(rewards, group, weights)
    assert_close(apart[2:], 2 * apart[:2], rtol=1e-3, atol=0)


def test_gdpo_knows_no_units_and_no_copies():
    rewards, group = torch.rand(12, 2, dtype=torch.float64), torch.arange(12) % 3
    base = decoupled(rewards, group, [1, 1], eps=1e-9)
    scaled = rewards * torch.tensor([100.0, 1.0]) + torch.tensor([0.0, 7.0])
    assert_close(decoupled(scaled, group, [1, 1], eps=1e-9), base)
    assert_close(decoupled(rewards, group, [5, 5], eps=1e-9), base)
    assert_close(decoupled(rewards[:, [0, 0, 1]], group, [0.5, 0.5, 1], eps=1e-9), base)
    equal = torch.cat([rewards[:, :1], torch.full((12, 1), 0.7)], 1)  # a reward without an opinion does not count
    assert_close(decoupled(equal, group, [1, 1], eps=1e-9), decoupled(rewards[:, :1], group, [1], eps=1e-9))


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_the_estimators(scale_rewards):
    rewards, group, weights = torch.rand(12, 6, 2, dtype=torch.float64), torch.arange(12) % 3, [0.75, 0.25]
    grpo = GDPO(scale_rewards=scale_rewards)(rewards, group, weights)
    expected = decoupled(rewards[:, -1], group, weights, scale_rewards=scale_rewards)
    assert torch.equal(grpo, expected[:, None].expand(12, 5).clamp(-5, 5))
    estimator = DecoupledVGPO(0.9, 5, 0.2, 3, scale_rewards, advantage_clip=1e9)
    found = estimator(rewards, group, weights)
    total = discounted_values(rewards[:, 1:] @ torch.tensor(weights, dtype=torch.float64), 0.9)
    for j in range(5):
        values = torch.stack([discounted_values(rewards[:, 1:, m], 0.9)[:, j] for m in range(2)], 1)
        relative = decoupled(values, group, weights, scale_rewards=scale_rewards)
        expected = temporal_weights(total)[:, j] * (relative + 0.2 * (j < 3) * total[:, j])
        assert_close(found[:, j], expected)


def test_decoupled_vgpo_to_the_last_bit():
    rewards, group, weights = torch.rand(12, 6, 3), torch.arange(12) % 3, [0.5, 0.3, 0.2]
    values = torch.stack([discounted_values(r, 0.9) for r in rewards[:, 1:].unbind(-1)], -1)
    expected = anchored(decoupled(values, group, weights), values @ torch.tensor(weights), group, 0.05, 5).clamp(-5, 5)
    assert torch.equal(DecoupledVGPO(num_scored_steps=5)(rewards, group, weights), expected)


def test_decoupled_vgpo_has_vgpos_options():
    "Of one reward alone it is VGPO but for the normalisation over the batch; the absolute term is the same to rounding."
    rewards, group = torch.rand(12, 6, 2, dtype=torch.float64), torch.arange(12) % 3
    options = {"temporal_weights": "none", "anchor_value": "group", "anchor_baseline": "others", "num_scored_steps": 5}
    found = [DecoupledVGPO(anchor_weight=k, **options)(rewards, group, [0.5, 0.5]) for k in (0, 0.3)]
    joint = [VGPO(anchor_weight=k, **options)(rewards.mean(-1), group) for k in (0, 0.3)]
    assert (found[1] - found[0]).abs().max() > 0.01
    assert_close(found[1] - found[0], joint[1] - joint[0])


def test_they_score_what_their_joint_counterparts_score():
    assert GDPO().scored_states(10) == GRPO().scored_states(10)
    assert DecoupledVGPO(num_scored_steps=4).scored_states(10) == VGPO(num_scored_steps=4).scored_states(10)
    assert GDPO.separate and DecoupledVGPO.separate and not GRPO.separate and not VGPO.separate


@pytest.mark.parametrize(
    ("values", "group", "weights", "message"),
    [
        (torch.rand(4, 2), torch.zeros(4, dtype=torch.int64), [1.0], r"weights has shape \(1,\) for 2 rewards"),
        (torch.rand(4, 2), torch.zeros(4), [1.0, 1.0], "group must hold integers"),
        (torch.full((4, 2), torch.nan), torch.zeros(4, dtype=torch.int64), [1.0, 1.0], "values has NaN or infinity"),
    ],
)
def test_gdpo_refuses(values, group, weights, message):
    with pytest.raises(ValueError, match=message):
        decoupled(values, group, weights)
