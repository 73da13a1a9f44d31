import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from vgpo.flow import interpolate, match_dims, ode_sample, predict_clean, shifted_sigmas


def test_path_and_clean_estimate_invert_each_other_per_sample():
    x0, noise = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.0, 0.3, 1.0])
    x = interpolate(x0, noise, sigma)
    assert_close(x[1], 0.7 * x0[1] + 0.3 * noise[1])
    assert_close(predict_clean(x, noise - x0, sigma), x0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sigma_takes_dtype_and_trailing_axes_of_x(dtype):
    x = torch.zeros(4, 2, 3, dtype=dtype)
    assert match_dims(torch.rand(4), x).shape == (4, 1, 1)
    assert match_dims(torch.rand(1), x).shape == (1, 1, 1)
    assert match_dims(0.5, x).shape == () and match_dims(0.5, x).dtype == dtype


def test_sigma_of_another_length_is_refused_where_broadcasting_would_accept_it():
    with pytest.raises(ValueError, match="sigma holds 3 values for a batch of 1"):
        interpolate(torch.zeros(1, 2), torch.zeros(1, 2), torch.rand(3))


def test_golden_schedule():
    golden = [1.0, 27 / 28, 12 / 13, 7 / 8, 9 / 11, 3 / 4, 2 / 3, 9 / 16, 3 / 7, 1 / 4, 0.0]
    assert_close(shifted_sigmas(10), torch.tensor(golden))
    assert shifted_sigmas(10).dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 2, 10, 40])
def test_schedule_ends_are_exact_and_it_falls_strictly(steps):
    for shift in torch.linspace(0.05, 12, 400).tolist():
        sigmas = shifted_sigmas(steps, shift)
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all(), shift


@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0])
def test_schedule_is_the_one_a_diffusers_scheduler_makes_of_even_levels(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 12 for i in range(12)])
    assert_close(scheduler.sigmas, shifted_sigmas(12, shift))


@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_bad_num_steps(steps):
    with pytest.raises(ValueError, match=f"num_steps must be a whole number of at least 1, got {steps}"):
        shifted_sigmas(steps)


@pytest.mark.parametrize("shift", [0, -1.0, math.inf, math.nan])
def test_bad_shift(shift):
    with pytest.raises(ValueError, match=f"shift must be positive and finite, got {shift}"):
        shifted_sigmas(10, shift)


@pytest.mark.parametrize("sigmas", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0]])
def test_bad_sigmas(sigmas):
    with pytest.raises(ValueError, match="strictly falling noise levels"):
        ode_sample(lambda x, sigma: x, torch.zeros(1, 2), torch.tensor(sigmas))


def test_euler_matches_the_diffusers_scheduler_step_by_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    start = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))

    def velocity(x, sigma):
        return torch.sin(x) + sigma

    x = start
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        x = scheduler.step(velocity(x, sigma), t, x).prev_sample
    assert_close(ode_sample(velocity, start, scheduler.sigmas), x)


def test_euler_is_exact_on_straight_paths_and_of_order_one_on_a_gaussian():
    start = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert_close(ode_sample(lambda x, s: (x - target) / s, start, [1.0, 0.0]), target.expand(50, 3))

    def velocity(x, s, std=0.5):  # closed form for data N(0, std^2), whose flow ends at std * start
        return (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2) * x

    def error(steps):
        return (ode_sample(velocity, start, shifted_sigmas(steps)) - 0.5 * start).abs().max()

    assert 1.95 < error(200) / error(400) < 2.05


def test_ode_sample_keeps_no_graph():
    weight = torch.ones(2, requires_grad=True)
    assert not ode_sample(lambda x, s: x * weight, torch.ones(1, 2), [1.0, 0.0]).requires_grad
