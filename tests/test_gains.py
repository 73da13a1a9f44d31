"Gains: what a step added to the reward of the clean estimate, against loops and hand-made cases."

import pytest
import torch
from torch.testing import assert_close

from vgpo.credit.gains import Gains, turning_gains
from vgpo.credit.grpo import GRPO


def test_every_state_is_scored_the_noise_too():
    assert Gains().scored_states(4) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("normalize", ["group", "step"])
def test_written_out_in_loops(normalize):
    r = torch.rand(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([5, 2, 5, 5, 2, 7, 7, 2, 5])
    found = Gains(normalize)(r, group)
    for i in range(9):
        for j in range(4):
            steps = range(4) if normalize == "group" else [j]
            pool = [(r[m, s + 1] - r[m, s]).item() for m in range(9) if group[m] == group[i] for s in steps]
            mean = sum(pool) / len(pool)
            std = (sum((g - mean) ** 2 for g in pool) / len(pool)) ** 0.5
            assert found[i, j].item() == pytest.approx((r[i, j + 1] - r[i, j] - mean).item() / (std + 1e-4), abs=1e-9)


def test_by_hand():
    "One group, one image gains 0.4 in its first step, all else stays: mean 0.1, standard deviation 0.1 times the root of 3."
    r = torch.tensor([[0.2, 0.6, 0.6], [0.5, 0.5, 0.5]], dtype=torch.float64)
    group = torch.zeros(2, dtype=torch.int64)
    together = torch.tensor([[3.0, -1.0], [-1.0, -1.0]], dtype=torch.float64) * 0.1 / (0.1 * 3**0.5 + 1e-4)
    assert_close(Gains()(r, group), together)
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64) * 0.2 / (0.2 + 1e-4)
    assert_close(Gains("step")(r, group), apart)


def test_without_gains_but_the_last_it_is_grpo_in_the_last_step():
    final = torch.rand(8, generator=torch.Generator().manual_seed(1))
    rewards, group = torch.cat([torch.full((8, 3), 0.5), final[:, None]], 1), torch.arange(2).repeat_interleave(4)
    found = Gains("step")(rewards, group)
    assert_close(found[:, -1:], GRPO()(rewards, group)[:, -1:])
    assert not found[:, :-1].any()


def test_a_constant_and_a_scale_of_the_reward_hardly_matter():
    rewards, group = torch.rand(8, 6, dtype=torch.float64), torch.arange(2).repeat_interleave(4)
    assert_close(Gains()(0.1 * rewards + 0.7, group), Gains()(rewards, group), rtol=1e-2, atol=0)


def test_equal_rewards_give_no_advantage_and_bad_ones_an_error():
    group = torch.zeros(4, dtype=torch.int64)
    assert not Gains()(torch.full((4, 6), 0.3), group).any()
    with pytest.raises(ValueError, match="NaN or infinity"):
        Gains()(torch.tensor([[0.1, float("nan")]]).expand(4, 2), group)
    with pytest.raises(ValueError, match="Gains.normalize is 'batch'; it must be one of 'group', 'step'"):
        Gains("batch")


# Turning points


@pytest.mark.parametrize(
    ("rewards", "gains"),
    [
        (
            [0.2, 0.1, 0.4, 0.3, 0.6],
            [-0.1, 0.5, -0.1, 0.3],
        ),  # up in the end: it turns up twice, the last time at the end
        ([0.5, 0.6, 0.3, 0.4, 0.2], [0.1, -0.4, 0.1, -0.2]),  # down in the end
        ([0.3, 0.5, 0.4, 0.2, 0.4], [0.2, -0.1, -0.2, 0.2]),  # up: its turn down does not count, the one up does
        ([0.2, 0.3, 0.5, 0.6, 0.9], [0.1, 0.2, 0.1, 0.3]),  # no turn
        ([0.3, 0.2, 0.2, 0.5, 0.5], [-0.1, 0.0, 0.3, 0.0]),  # a pause has no sign
        ([0.5, 0.2, 0.8, 0.3, 0.5], [-0.3, 0.6, -0.5, 0.2]),  # no trend, no turning point
    ],
)
def test_turning_points_by_hand(rewards, gains):
    assert_close(turning_gains(torch.tensor([rewards])), torch.tensor([gains]))


@pytest.mark.parametrize("normalize", ["group", "step"])
def test_turning_points_written_out_in_loops(normalize):
    r = torch.rand(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    group, gains, turned = torch.arange(12) % 3, [], 0
    for row in r.tolist():
        now = [row[j + 1] - row[j] for j in range(7)]
        for j in range(1, 7):
            flips = (row[j + 1] - row[j]) * (row[j] - row[j - 1]) < 0
            if flips and (row[j + 1] - row[j]) * (row[-1] - row[0]) > 0:
                now[j], turned = row[-1] - row[j], turned + 1
        gains.append(now)
    gains = torch.tensor(gains, dtype=torch.float64)
    assert 12 < turned < 72
    found = Gains(normalize, turning_points=True)(r, group)
    for i in range(12):
        for j in range(7):
            pool = gains[group == group[i]] if normalize == "group" else gains[group == group[i], j]
            assert_close(found[i, j], (gains[i, j] - pool.mean()) / (pool.std(correction=0) + 1e-4))
    assert_close(Gains(normalize)(r, group), Gains(normalize, turning_points=False)(r, group))
