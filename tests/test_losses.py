import math

import pytest
import torch
from torch.testing import assert_close

from vgpo.flow import shifted_sigmas
from vgpo.losses import clipped_surrogate, velocity_kl
from vgpo.sde import DanceSDE, FlowSDE, Transition


def parts(ratio, advantage, clip_range=0.2):
    "Loss, stats and gradient with respect to log_prob, for lists of ratios and advantages."
    log_prob = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    advantages = torch.as_tensor(advantage, dtype=torch.float64)
    loss, stats = clipped_surrogate(log_prob, torch.zeros_like(log_prob), advantages, clip_range)
    return loss, stats, torch.autograd.grad(loss, log_prob)[0]


def test_golden_values():
    "Worked out by hand: -(1.2 + 1.1 - 0.8 - 1.3) / 4."
    loss, stats, _ = parts([1.5, 1.1, 0.5, 1.3], [1.0, 1.0, -1.0, -1.0])
    assert_close(loss.item(), -0.05)
    assert_close(stats["ratio/abs_dev_mean"].item(), (0.5 + 0.1 + 0.5 + 0.3) / 4)
    assert stats["clip_ratio"] == 0.75
    assert_close(stats["approx_kl"].item(), sum(r - 1 - math.log(r) for r in (1.5, 1.1, 0.5, 1.3)) / 4)


def test_gradient_stops_only_on_the_side_of_too_much_of_a_good_thing():
    ratio, advantage = [0.5, 0.9, 1.1, 1.5] * 2, [2.0] * 4 + [-2.0] * 4
    alive = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1])
    _, _, grad = parts(ratio, advantage)
    assert_close(grad, -alive * torch.tensor(ratio, dtype=torch.float64) * torch.tensor(advantage) / 8)


@pytest.mark.parametrize("clip_range", [1e-5, 0.2])
def test_gradient_at_ratio_1_is_reinforce_bit_for_bit(clip_range):
    torch.manual_seed(0)
    mean, x, advantages = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5), torch.randn(8)
    log_prob = Transition(mean, torch.tensor(0.3)).log_prob(x)
    loss, stats = clipped_surrogate(log_prob, log_prob.detach(), advantages, clip_range)
    (grad,) = torch.autograd.grad(loss, mean, retain_graph=True)
    assert torch.equal(grad, torch.autograd.grad(-(log_prob * advantages).mean(), mean)[0])
    assert not any(stats.values())


def test_never_above_the_unclipped_surrogate():
    torch.manual_seed(0)
    log_prob, advantages = 0.5 * torch.randn(1000), torch.randn(1000)
    loss, _ = clipped_surrogate(log_prob, torch.zeros(1000), advantages, 0.2)
    assert -loss <= (log_prob.exp() * advantages).mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.zeros(4)}, r"advantages has shape \(4,\) but log_prob has \(4, 3\)"),
        ({"old_log_prob": torch.zeros(4, 1)}, r"old_log_prob has shape \(4, 1\)"),
        ({"old_log_prob": torch.zeros(4, 3, requires_grad=True)}, "detach"),
        ({"advantages": torch.zeros(4, 3, requires_grad=True)}, "detach"),
        *[({"clip_range": bad}, "clip_range must be positive and finite") for bad in (0, -0.1, math.inf, math.nan)],
    ],
)
def test_bad_input_is_named(change, message):
    good = {name: torch.zeros(4, 3) for name in ("log_prob", "old_log_prob", "advantages")}
    with pytest.raises(ValueError, match=message):
        clipped_surrogate(**{**good, "clip_range": 0.2, **change})


def test_velocity_kl_is_the_transitions_kl_up_to_the_derived_weight():
    torch.manual_seed(0)
    x, velocity, reference = torch.randn(3, 4, 3, 2, 2, dtype=torch.float64)
    sigmas = shifted_sigmas(10).double()
    flow, dance = FlowSDE(0.7), DanceSDE(0.3)
    for sigma, sigma_next in zip(sigmas[1:-1], sigmas[2:], strict=True):
        level, dt = (sigma, sigma_next, sigmas[1]), sigma - sigma_next
        weights = {
            flow: dt * (1 - sigma) / (2 * 0.49 * sigma) * (1 + 0.49 / 2) ** 2,
            dance: dt / (2 * 0.09) * (1 + 0.09 * (1 - sigma) / (2 * sigma)) ** 2,
        }
        for sampler, weight in weights.items():
            kl = sampler.transition(x, velocity, *level).kl(sampler.transition(x, reference, *level))
            assert_close(kl, weight * velocity_kl(velocity, reference))


def test_velocity_kl_carries_the_gradient_of_a_mean_square():
    velocity, reference = torch.randn(2, 3, 4, requires_grad=True), torch.zeros(2, 3, 4)
    (grad,) = torch.autograd.grad(velocity_kl(velocity, reference).sum(), velocity)
    assert_close(grad, 2 * velocity.detach() / 12)
    with pytest.raises(ValueError, match=r"velocity has shape \(2, 3, 4\) but reference has \(2, 3, 1\)"):
        velocity_kl(velocity, reference[..., :1])
