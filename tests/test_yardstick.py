"""The yardstick of credit: values, true advantages and true gradients against formulas, sampling and differences of rewards;
and what is read from gradients that are known.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from vgpo.advantages import group_stats
from vgpo.credit.base import Credit
from vgpo.credit.gdpo import GDPO
from vgpo.credit.grpo import GRPO
from vgpo.rollout import rollout
from vgpo.sde import DanceSDE, FlowCPS, FlowSDE
from vgpo.toy import GaussianMixture
from vgpo.yardstick import (
    Groups,
    Plane,
    along_bumps,
    average_over,
    bumps,
    credit_table,
    draw_groups,
    expected_next,
    gauge,
    group_gradients,
    measure_credit,
    read,
    state_values,
    true_gradient,
)

RING = GaussianMixture.ring()


def near(x):
    "0/1: within 0.75 of the first cluster's centre."
    return ((x - RING.means[0].to(x)).norm(dim=-1) < 0.75).float()


def close(x):
    "Smooth: by the distance to that centre."
    return (-(x - RING.means[0].to(x)).norm(dim=-1)).exp()


def value_at(plane, values, j, x):
    return expected_next(plane, values[j + 1], j, plane.transition(j, x))


@dataclass
class Unscaled(Credit):
    "The reward minus the group's mean."

    def scored_states(self, num_steps):
        return [num_steps]

    def __call__(self, rewards, group):
        final = rewards[:, -1:]
        return (final - group_stats(final, group)[0]).to(rewards).expand(-1, rewards.shape[1] - 1)


@pytest.fixture(scope="module")
def small():
    "Five steps on a coarse grid: the noise is wider, so it is enough."
    return Plane(RING.velocity, close, num_steps=5, cells=60)


@pytest.fixture(scope="module")
def values(small):
    return state_values(small)


@pytest.fixture(scope="module")
def truth(small, values):
    return true_gradient(small, values)


# --- values ---


def test_the_average_over_a_gaussian_of_a_polynomial():
    axis = torch.linspace(-5, 5, 101, dtype=torch.float64)
    table = axis[:, None] ** 2 + 3 * axis[:, None] * axis - axis
    mean, variance = torch.tensor([[0.31, -0.52], [1.0, 0.77]], dtype=torch.float64), 0.04
    x, y = mean.T
    assert_close(average_over(table, mean, variance, axis), x**2 + variance + 3 * x * y - y, atol=1e-9, rtol=0)


@pytest.mark.parametrize("sampler", [FlowSDE(0.7), FlowSDE(1.0), DanceSDE(1.0)])
@pytest.mark.parametrize("kind", ["linear", "bell"])
def test_one_cluster_has_a_formula(sampler, kind):
    "All steps are linear with round noise, so the image is Gaussian given any state."
    c = torch.tensor([0.8, -0.3], dtype=torch.float64)
    reward = {"linear": lambda x: x @ c.to(x), "bell": lambda x: (-(x - c.to(x)).square().sum(-1) / 2).exp()}[kind]
    cluster = GaussianMixture(torch.tensor([[0.5, -0.5]]), std=0.6)
    plane = Plane(cluster.velocity, reward, sampler, half_width=6, cells=120)
    values, x = state_values(plane), torch.tensor([[0.3, 1.1], [-1.2, 0.4]], dtype=torch.float64)
    for start in (0, 4, 9):
        mean, variance = x, 0.0
        for j in range(start, 10):
            origin, step = plane.transition(j, 0 * x).mean, plane.transition(j, x)
            slope = ((step.mean - origin) / x)[0, 0]
            mean, variance = origin + slope * mean, slope**2 * variance + step.std**2
        if kind == "linear":
            exact = mean @ c
        else:
            exact = (-(mean - c).square().sum(1) / (2 * (1 + variance))).exp() / (1 + variance)
        assert_close(value_at(plane, values, start, x), exact, atol=2e-5, rtol=0)


@pytest.mark.parametrize("reward", [near, close])
def test_values_against_sampled_images(reward):
    plane, images = Plane(RING.velocity, reward), 20_000
    values = state_values(plane)
    torch.manual_seed(0)
    for j in (0, 5, 9):
        x = torch.tensor([[1.0, 0.2], [0.1, -0.3], [2.0, 1.0]])
        ends = rollout(plane.velocity, x.repeat_interleave(images, 0), plane.sigmas[j:], plane.sampler).latents[:, -1]
        found, value = plane.reward(ends).view(3, -1).double(), value_at(plane, values, j, x.double())
        assert ((found.mean(1) - value).abs() < 4.5 * ((found.var(1) + 1 / images) / images).sqrt()).all()


@pytest.mark.parametrize("edge", [0.0, 0.025, 0.05])
def test_an_edge_between_the_points_of_the_grid(edge):
    "A 0/1 reward with a straight edge: before the last step its value is a normal distribution function."
    plane = Plane(RING.velocity, lambda x: (x[:, 0] > edge).float())
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None].expand(-1, 2)
    step = plane.transition(9, x)
    exact = torch.special.ndtr((step.mean[:, 0] - edge) / step.std)
    # With rewards at the points instead of means over cells it would be off by up to 0.1, by where the edge lies in a cell
    assert (value_at(plane, state_values(plane), 9, x) - exact).abs().max() < 1.2e-3


def test_the_mean_value_stays_on_the_way(small, values):
    "The distribution of the states is carried forwards by the same sums that carry values backwards."
    density, means = (-small.grid.square().sum(1) / 2).softmax(0), []
    for j in range(5):
        means.append((density * values[j].flatten()).sum())
        table = values[j + 1].clone().requires_grad_()
        step = expected_next(small, table, j, small.transition(j, small.grid))
        (density,) = torch.autograd.grad(step, table, density.flatten())
        density = density.flatten()
        assert_close(density.sum(), torch.tensor(1.0, dtype=torch.float64))
        assert (density >= 0).all()
    means.append((density * values[5].flatten()).sum())
    assert_close(torch.stack(means), means[0].expand(6), atol=1e-9, rtol=0)


# --- gradients ---


def test_the_true_gradient_is_the_slope_of_the_expected_reward(small, values, truth):
    "By quadrature, with the velocity of one step shifted: every bump and coordinate of one step, a few of others."
    start = (-small.grid.square().sum(1) / 2).softmax(0)

    def expected_reward(shifted, move):
        table = values[-1]
        for j in reversed(range(5)):
            step = small.transition(j, small.grid, move if j == shifted else 0.0)
            table = expected_next(small, table, j, step).view(60, 60)
        return (start * table.flatten()).sum()

    shapes, found, expected = bumps(small.grid), [], []
    for j, k, c in [(0, 12, 0), (2, 13, 0), (2, 18, 1), (3, 7, 1), (4, 14, 0)]:
        move = torch.zeros(len(small.grid), 2, dtype=torch.float64)
        move[:, c] = 1e-3 * shapes[:, k]
        found.append((expected_reward(j, move) - expected_reward(j, -move)) / 2e-3)
        expected.append(truth[j, k, c])
    assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=1e-8)


def test_the_true_gradient_is_the_slope_of_sampled_rewards(small, truth):
    "The same noises with a step's velocity moved forwards and backwards along it: no value, no log-density."
    images, epsilon = 100_000, 0.05
    for j in (1, 3, 4):
        along = truth[j] / truth[j].norm()

        def rewards(by, j=j, along=along):
            def velocity(x, sigma):
                move = bumps(x) @ (by * along).to(x) if sigma == small.sigmas[j] else 0.0
                return small.velocity(x, sigma) + move

            torch.manual_seed(j)
            path = rollout(velocity, torch.randn(images, 2), small.sigmas, small.sampler)
            return small.reward(path.latents[:, -1]).double()

        slope = (rewards(epsilon) - rewards(-epsilon)) / (2 * epsilon)
        assert abs(slope.mean() - truth[j].norm()) < 4.5 * slope.std() / images**0.5 + 1e-3 * truth[j].norm()


@pytest.mark.parametrize("sampler", [FlowSDE(0.7), DanceSDE(1.0)])
def test_scores_are_gradients_of_the_log_density(sampler):
    plane = Plane(RING.velocity, close, sampler)
    torch.manual_seed(0)
    x, x_next = torch.randn(2, 3, 2, dtype=torch.float64)
    for j in (0, 5, 9):

        def log_density(shift, j=j):
            return 2 * plane.transition(j, x, bumps(x) @ shift.view(25, 2)).log_prob(x_next)  # a sum of two dimensions

        exact = torch.autograd.functional.jacobian(log_density, torch.zeros(50, dtype=torch.float64))
        assert_close(along_bumps(plane, j, x, x_next), exact)


# --- groups ---


@pytest.fixture(scope="module")
def drawn(small):
    return draw_groups(small, 960, seed=3)


def test_true_advantages_add_up(drawn):
    "To the reward minus the noise's value; each has mean 0 and is uncorrelated with the others and with the noise's value."
    earned = drawn.values.diff(dim=1)
    assert_close(earned.sum(1), drawn.rewards[:, -1] - drawn.values[:, 0])
    assert torch.equal(drawn.values[:, -1], drawn.rewards[:, -1]) and (drawn.ratios == 1).all()
    parts = torch.cat([drawn.values[:, :1] - drawn.values[:, 0].mean(), earned], 1).double()
    assert (parts.mean(0).abs() < 4.5 * parts.std(0) / len(parts) ** 0.5).all()
    correlation = torch.corrcoef(parts.T) - torch.eye(6)
    assert correlation.abs().max() < 5 / len(parts) ** 0.5


def test_true_advantages_have_the_true_gradient(drawn):
    earned = drawn.values.diff(dim=1)
    along = earned * (drawn.scores * drawn.truth / drawn.truth.square().sum(1, keepdim=True)).sum(-1)
    assert ((along.mean(0) - 1).abs() < 4.5 * along.std(0) / len(along) ** 0.5).all()


def test_sizes_that_are_known(drawn):
    "A group's own mean takes a sixteenth; the epoch's standard deviation divides; the direction is that of the truth."
    found = gauge({"unscaled": Unscaled(), "GRPO": GRPO("batch", 1e9)}, drawn)
    std = drawn.rewards[:, -1].std().item()
    for name, size, slack in (("unscaled", 15 / 16, 0), ("GRPO", 15 / 16 / std, 0.01)):
        value, error = found[name].size
        assert ((value - size).abs() < 4.5 * error + slack * size).all(), name
        way, error = found[name].direction
        assert ((way - 1).abs() < 4.5 * error + 0.01)[~way.isnan()].all(), name
        assert not way[-1].isnan()
    assert found["true advantage"].snr[0, -1] > 2 * found["GRPO"].snr[0, -1]


def test_old_images_of_the_same_policy_are_its_own(small):
    own, old = draw_groups(small, 6, seed=1), draw_groups(small, 6, seed=1, behaviour=small)
    for name in ("rewards", "values", "scores", "ratios", "truth"):
        assert torch.equal(getattr(own, name), getattr(old, name))


def test_old_images_point_at_the_new_policys_gradient(small):
    "With the full ratio and the true advantage, up to what the old policy's values and states differ from the new one's."
    moved = Plane(lambda x, sigma: small.velocity(x, sigma) - 0.05, small.reward, num_steps=5, cells=60)
    groups = draw_groups(moved, 480, behaviour=small)
    assert not torch.equal(groups.ratios, torch.ones_like(groups.ratios))
    weights = groups.ratios.double().square()  # of densities; the library's own are means over two dimensions
    assert ((weights.mean(0) - 1).abs() < 4.5 * weights.std(0) / len(weights) ** 0.5).all()
    full = Groups(groups.rewards, groups.values, groups.scores, weights.float(), groups.truth, 16)
    reading = gauge({}, full, clip_range=math.inf)["true advantage"]
    assert reading.direction[0, -1] > 0.99 and reading.size[0, -1] == pytest.approx(1, abs=0.1)


def test_the_clip_silences_what_has_been_followed():
    "One group of two, one step: ratios 1.3 and 0.7, with advantages of both signs."
    groups = Groups(*torch.zeros(2, 2, 2), torch.ones(2, 1, 50), torch.tensor([[1.3], [0.7]]), torch.zeros(1, 50), 2)
    for advantages, expected in (([1.0, 1.0], 0.7), ([-1.0, -1.0], -1.3), ([1.0, -1.0], 0.0), ([-1.0, 1.0], -0.6)):
        found = group_gradients(torch.tensor(advantages)[:, None], groups)
        assert_close(found, torch.full((1, 1, 50), expected / 2))
    assert_close(group_gradients(torch.ones(2, 1), groups, math.inf), torch.ones(1, 1, 50))


# --- readings ---


def test_gradients_that_are_known_are_read():
    "Mean and noise of two steps are given; so are direction, size and signal to noise, within their own standard errors."
    torch.manual_seed(0)
    mean, std = torch.tensor([[0.3, 0.0, 0.4], [0.0, 0.1, 0.0]]), torch.tensor([[1.0], [0.5]])
    found = read(mean + std * torch.randn(4800, 2, 3), torch.tensor([[1.0, 0, 0], [0, 0.2, 0]]), 48, scored=7)
    expected = {"direction": [0.6, 1, 0.32 / (0.26 * 1.04) ** 0.5], "size": [0.3, 0.5, 0.32 / 1.04],
                "snr": [0.25 / 3, 0.01 / 0.75, 0.26 / 3.75]}  # fmt: skip
    for name, exact in expected.items():
        value, error = getattr(found, name)
        assert ((value - torch.tensor(exact)).abs() < 4.5 * error).all() and (error > 0).all(), name
    assert found.scored == 7


def test_standard_errors_are_those_of_repetitions():
    torch.manual_seed(1)
    truth = torch.tensor([[1.0, 0.0, 0.0]])
    runs = [read(torch.tensor([[0.3, 0.0, 0.4]]) + torch.randn(960, 1, 3), truth, 48) for _ in range(200)]
    for name in ("direction", "size", "snr"):
        values = torch.stack([getattr(run, name)[:, 0] for run in runs])
        assert values[:, 1].mean() == pytest.approx(values[:, 0].std().item(), rel=0.2), name
    snr = torch.stack([run.snr[0, 0] for run in runs])
    assert abs(snr.mean() - 0.25 / 3) < 4.5 * snr.std() / 200**0.5  # no bias: noise has a length, and is not counted


def test_noise_alone_has_no_direction():
    torch.manual_seed(2)
    truth = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = read(torch.randn(960, 2, 3), truth, 48)
    assert found.direction.isnan().all() and (found.snr[0].abs() < 4.5 * found.snr[1]).all()
    assert read(torch.zeros(960, 2, 3), truth, 48).direction.isnan().all()


def test_units_weigh_steps(drawn):
    units = torch.tensor([0, 0, 0, 2.0, 0])
    one, other = (gauge({}, drawn, units=u)["true advantage"] for u in (None, units))
    for name in ("direction", "snr"):
        assert_close(getattr(other, name)[:, -1], getattr(one, name)[:, 3])


def test_an_estimator_of_ones_own_in_one_call(small):
    found = measure_credit({"mine": Unscaled(), "GRPO": GRPO()}, small, groups=144, seed=5)
    assert list(found) == ["true advantage", "mine", "GRPO"] and found["mine"].scored == 1
    assert found["mine"].snr.shape == (2, 6)
    lines = credit_table(found).splitlines()
    assert len(lines) == 4 and lines[2].startswith("mine") and "–" in lines[1]


# --- what is refused ---


def test_bad_worlds_and_numbers(small, drawn):
    with pytest.raises(ValueError, match="noise of step 9 has std 0.0289, and cells are 0.1 wide: raise cells"):
        Plane(RING.velocity, near, FlowSDE(0.1))
    with pytest.raises(ValueError, match="noise of step 9 has std 0,"):
        Plane(RING.velocity, near, FlowCPS(0.7))
    narrow = Plane(RING.velocity, near, num_steps=5, half_width=1.5, cells=40)
    with pytest.raises(ValueError, match="lie at the border of the grid: raise half_width"):
        true_gradient(narrow, state_values(narrow))
    with pytest.raises(ValueError, match="num_steps is 5, and 10 in behaviour"):
        draw_groups(small, 3, behaviour=Plane(RING.velocity, close))
    with pytest.raises(ValueError, match="960 groups are not three or more whole epochs of 50"):
        gauge({}, drawn, prompts_per_epoch=50)
    with pytest.raises(ValueError, match="not three or more"):
        gauge({}, drawn, prompts_per_epoch=480)
    with pytest.raises(ValueError, match="GDPO wants several rewards"):
        gauge({"GDPO": GDPO()}, drawn)


def test_an_estimator_sees_only_the_states_that_it_wants_scored(drawn):
    "The others hold what the next scored one got, as in training."

    @dataclass
    class Second(Credit):
        "Pays each step the reward of the state after it, and has states 2 and the last scored."

        def scored_states(self, num_steps):
            return [2, num_steps]

        def __call__(self, rewards, group):
            assert_close(rewards[:, :3], rewards[:, 2:3].expand(-1, 3), rtol=0, atol=0)
            assert_close(rewards[:, 3:], rewards[:, -1:].expand(-1, rewards.shape[1] - 3), rtol=0, atol=0)
            return rewards[:, 1:]

    size = len(drawn.rewards) // drawn.size // 3
    assert gauge({"second": Second()}, drawn, prompts_per_epoch=size)["second"].scored == 2
