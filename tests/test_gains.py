"Gains: what a step added to the reward of the clean estimate, against loops and hand-made cases."

import pytest
import torch
from torch.testing import assert_close

from vgpo.credit.gains import Gains
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
