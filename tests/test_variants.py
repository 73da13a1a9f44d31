"Variants of the method: windows, the guarded ratio, KLs, several judges, and every combination of them in the trainer."

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import SMALL
from torch.testing import assert_close

from vgpo.advantages import group_relative, group_stats, value_anchored
from vgpo.config import (
    AdvantageConfig,
    Config,
    RewardConfig,
    SamplingConfig,
    check_config,
    parse_config,
    save_config,
    window_starts,
)
from vgpo.flow import shifted_sigmas
from vgpo.losses import clipped_surrogate
from vgpo.rewards.base import CombinedReward, FunctionReward, RewardError, Scores, configured_reward, score
from vgpo.rollout import column, replay, rollout
from vgpo.runs.session import start
from vgpo.sde import DanceSDE, FlowCPS, FlowSDE
from vgpo.toy import GaussianMixture
from vgpo.train import credit, sample, train_epoch
from vgpo.values import discounted_values, temporal_weights
from vgpo.variants import KLS, RATIOS, decoupled, decoupled_credit, draw_window, window_mask
from vgpo.world.pretrain import make_autoencoder, make_pipeline

SAMPLERS = {"flow-sde": FlowSDE(0.7), "dance-sde": DanceSDE(0.4), "flow-cps": FlowCPS(0.7)}
SIGMAS = shifted_sigmas(6).double()
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def windows(**options):
    return SamplingConfig(**{"steps": 10, "sde_steps": 3} | options)


# Windows


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({}, [0]),
        ({"window_start": 5}, [0]),  # the option of another kind
        ({"window": "fixed", "window_start": 7}, [7]),
        ({"window": "random"}, [0, 1, 2, 3, 4, 5, 6]),
        ({"window": "random", "window_start": 1, "window_stop": 5, "window_stride": 2}, [1, 2]),
        ({"window": "random", "window_stop": 3}, [0]),
        ({"window": "sliding"}, [0, 1, 2, 3, 4, 5, 6]),
        ({"window": "sliding", "window_stride": 4}, [0, 4, 6]),  # the last place is never left out
        ({"window": "sliding", "window_stride": 3, "window_stop": 10, "window_start": 1}, [1, 4, 7]),
    ],
)
def test_places_of_a_window(options, starts):
    assert window_starts(windows(**options)) == starts


def test_no_allowed_window_is_empty_or_leaves_the_steps():
    allowed = 0
    for kind, steps, size, first, stop, stride in itertools.product(
        ["leading", "fixed", "random", "sliding"], [2, 5], [1, 2, 4, 5], [0, 1, 4], [None, 1, 3, 5], [1, 3]
    ):
        s = SamplingConfig(
            steps=steps, sde_steps=size, window=kind, window_start=first, window_stop=stop, window_stride=stride,
            window_per="group", window_every=1,
        )  # fmt: skip
        try:
            check_config(replace(Config(), sampling=s, values=replace(Config().values, reward_steps=1)))
        except ValueError:
            continue
        allowed += 1
        for epoch in range(8):
            mask = window_mask(draw_window(s, 0, epoch, [0, 1, 2]), size, 3, steps)
            assert mask.shape == (3, steps) and (mask.sum(1) == size).all()
            edges = mask.int().diff(dim=1).ne(0).sum(1)
            assert (edges <= 2).all()  # consecutive
    assert allowed > 50


def test_a_sliding_window_moves_and_returns():
    s = windows(window="sliding", window_stride=2, window_every=3, window_stop=8)
    starts = [draw_window(s, 0, epoch, [0]) for epoch in range(15)]
    assert starts == [0] * 3 + [2] * 3 + [4] * 3 + [5] * 3 + [0] * 3


def test_random_windows_are_functions_of_seed_epoch_and_prompt():
    s, group = windows(window="random"), windows(window="random", window_per="group")
    epochs = [draw_window(s, 0, epoch, [5, 6]) for epoch in range(50)]
    assert epochs == [draw_window(s, 0, epoch, [9]) for epoch in range(50)] and set(epochs) == set(range(7))
    assert epochs != [draw_window(s, 1, epoch, [5, 6]) for epoch in range(50)]
    one, other = draw_window(group, 0, 3, [5, 6, 7, 5]), draw_window(group, 0, 3, [7, 7, 5])
    assert one[0] == one[3] == other[2] and one[2] == other[0] == other[1]  # wherever a prompt's samples are
    starts = draw_window(group, 0, 0, range(7000))
    counts = torch.bincount(starts, minlength=7)
    assert (counts - 1000).abs().max() < 5 * (1000 * 6 / 7) ** 0.5  # five standard errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sde_steps": 11}, "sampling.sde_steps is 11; it must lie in 1 to sampling.steps, 10"),
        (
            {"window": "fixed", "window_start": 8},
            "sampling.window_start is 8; with sampling.sde_steps, 3, the window must end by sampling.steps, 10: lower",
        ),
        ({"window": "random", "window_stop": 11}, "sampling.window_stop is 11; it must lie in 1 to sampling.steps, 10"),
        (
            {"window": "random", "window_start": 5, "window_stop": 7},
            "sampling.sde_steps is 3; a random window must fit between sampling.window_start, 5, and "
            "sampling.window_stop, 7: lower sde_steps, or leave more room",
        ),
        ({"window": "sliding", "sde_steps": 10}, "sampling.sde_steps is 10; a sliding window must fit between"),
        (
            {"sampler": "flow-cps", "sde_steps": 10},
            "sampling.sde_steps is 10; flow-cps draws no noise in the last step, 9, so the window must end before it",
        ),
        (
            {"sampler": "flow-cps", "window": "fixed", "window_start": 7},
            "sampling.sde_steps is 3; flow-cps draws no noise in the last step",
        ),
        (
            {"sampler": "flow-cps", "noise_level": 1.2},
            "sampling.noise_level is 1.2; with flow-cps it must lie in (0, 1]",
        ),
    ],
)
def test_windows_that_cannot_be(options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_config(replace(Config(), sampling=windows(**options)))


@pytest.fixture
def path_noise():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, 2, generator=generator, dtype=torch.float64) for shape in ((8,), (8, 6))]


@each_sampler
def test_a_sample_does_not_feel_its_neighbours_windows(sampler, path_noise):
    velocity, starts = GaussianMixture.ring().velocity, torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    mixed = rollout(velocity, path_noise[0], SIGMAS, sampler, path_noise[1], sde_steps=window_mask(starts, 2, 8, 6))
    for begin in range(4):
        rows, mask = starts == begin, window_mask(begin, 2, 8, 6)
        alone = rollout(velocity, path_noise[0], SIGMAS, sampler, path_noise[1], sde_steps=mask)
        assert torch.equal(mixed.latents[rows], alone.latents[rows])
        assert torch.equal(mixed.log_probs[rows], alone.log_probs[rows])
        assert torch.equal(alone.log_probs != 0, mask)
        for j in (j for j in range(6) if not begin <= j < begin + 2):  # outside, Euler
            x = alone.latents[:, j]
            assert_close(alone.latents[:, j + 1], x + (SIGMAS[j + 1] - SIGMAS[j]) * velocity(x, SIGMAS[j]))
    for i in range(2):  # and the replay of each row's own step is what was sampled
        step = replay(velocity, mixed, starts + i, sampler)
        assert torch.equal(step.log_prob(column(mixed.latents, starts + i + 1)), column(mixed.log_probs, starts + i))


@pytest.mark.parametrize(
    "mask",
    [torch.ones(8, 5, dtype=torch.bool), torch.ones(8, 6), torch.arange(8)[:, None].expand(8, 6) > 0],
    ids=["another number of steps", "not bool", "a row without noise"],
)
def test_a_mask_must_give_every_sample_a_noisy_step(mask, path_noise):
    with pytest.raises(ValueError, match=r"sde_steps must be bool \(8, 6\) with a noisy step in every row, got "):
        rollout(GaussianMixture.ring().velocity, path_noise[0], SIGMAS, FlowSDE(), sde_steps=mask)


# Ratios and KLs


def two_policies(sampler, theta, path_noise, dtype=torch.float64):
    "A path of the mixture's velocity, and a function that replays step j with theta times another field added."
    mixture, (noise, step_noise) = GaussianMixture.ring(), (n.to(dtype) for n in path_noise)
    sigmas = SIGMAS.to(dtype)
    path = rollout(mixture.velocity, noise, sigmas, sampler, step_noise, sde_steps=5, keep_means=True)

    def moved(j, theta=theta):
        return replay(lambda x, s: mixture.velocity(x, s) + theta * (x.sin() + 0.3), path, j, sampler)

    return path, step_noise, moved


@each_sampler
def test_the_guarded_exponent_is_the_published_one(sampler, path_noise):
    path, z, moved = two_policies(sampler, 0.2, path_noise)
    for j in range(5):
        step, old = moved(j), moved(j, 0.0)
        exponent, zero, stats = RATIOS["guard"](step, path, j)
        log_prob, old_log_prob, _ = RATIOS["plain"](step, path, j)
        bias = (step.mean - old.mean).square().mean(1) / (2 * step.std.flatten() ** 2)
        assert_close(exponent - zero, (log_prob - old_log_prob + bias) * step.std.flatten())  # arXiv:2510.22319
        assert_close(exponent, (z[:, j] * (step.mean - old.mean)).mean(1))
        assert_close(stats["ratio_bias"], old.kl(step).mean())
    every = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])  # a step of its own for each row
    alone = [RATIOS["guard"](moved(j), path, j)[0][i] for i, j in enumerate(every.tolist())]
    assert_close(RATIOS["guard"](moved(every), path, every)[0], torch.stack(alone))


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
        plain.append(torch.sub(*RATIOS["plain"](step, path, 0)[:2]))
        guard.append(RATIOS["guard"](step, path, 0)[0])
    assert_close(sum(plain), -2 * old.kl(step))
    assert_close(sum(guard), torch.zeros(4, dtype=torch.float64))
    assert (guard[0] != 0).all()


@pytest.mark.parametrize("kind", RATIOS)
@each_sampler
def test_before_the_first_update_the_ratio_is_1_to_the_last_bit(sampler, kind, path_noise):
    path, _, moved = two_policies(sampler, 0.0, path_noise, torch.float32)
    for j in (0, 2, 4, torch.tensor([4, 3, 2, 1, 0, 0, 1, 2])):
        new, old, _ = RATIOS[kind](moved(j), path, j)
        assert torch.equal((new - old).exp(), torch.ones(8))


def gradient(function, x=0.15, h=1e-5):
    "The derivative of a scalar function of a number, by autograd and by central differences."
    theta = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(function(theta), theta)
    with torch.no_grad():
        return exact, (function(theta + h) - function(theta - h)) / (2 * h)


@pytest.mark.parametrize("kind", RATIOS)
@each_sampler
def test_gradient_of_the_surrogate_by_finite_differences(sampler, kind, path_noise):
    path, _, moved = two_policies(sampler, 0.0, path_noise)
    advantages = torch.linspace(-1, 1, 8, dtype=torch.float64)

    def loss(theta):
        new, old, _ = RATIOS[kind](moved(2, theta), path, 2)
        return clipped_surrogate(new, old, advantages, 10.0)[0]

    exact, numeric = gradient(loss)
    assert_close(exact, numeric, rtol=1e-6, atol=1e-9)
    assert exact.abs() > 1e-4


@pytest.mark.parametrize("kind", KLS)
@each_sampler
def test_gradient_of_the_kl_by_finite_differences(sampler, kind, path_noise):
    _, _, moved = two_policies(sampler, 0.0, path_noise)
    exact, numeric = gradient(lambda theta: KLS[kind](moved(3, theta), moved(3, 0.0)).mean())
    assert_close(exact, numeric, rtol=1e-6, atol=1e-9)
    assert exact > 1e-3


def test_the_velocity_kl_weighs_all_steps_alike(path_noise):
    path, _, moved = two_policies(FlowSDE(0.7), 0.2, path_noise)
    for j in range(5):
        field = 0.2 * (path.latents[:, j].sin() + 0.3)
        assert_close(KLS["velocity"](moved(j), moved(j, 0.0)), field.square().mean(1))


def test_the_guard_needs_the_means(path_noise):
    path, _, moved = two_policies(FlowSDE(0.7), 0.0, path_noise)
    path.means = None
    with pytest.raises(ValueError, match="the guarded ratio needs the means of the rollout: pass keep_means=True"):
        RATIOS["guard"](moved(0), path, 0)


# Advantages


def test_global_std_under_vgpo():
    values, group = torch.rand(12, 4, dtype=torch.float64), torch.arange(12) % 3
    relative = (values - group_stats(values, group)[0]) / (values.std(0, correction=0) + 1e-4)
    anchor = 0.3 * values * (torch.arange(4) < 2)
    expected = temporal_weights(values) * (relative + anchor)
    assert_close(value_anchored(values, group, anchor=0.3, anchor_steps=2, std="global"), expected)
    constant = values[:, :1].expand(12, 4)  # nothing changes over time and no anchor: GRPO with the same std
    grpo = group_relative(values[:, 0], group, std="global")
    assert_close(value_anchored(constant, group, anchor=0, std="global")[:, 3], grpo)
    config = AdvantageConfig(std="global", anchor=0.3, anchor_steps=2)
    assert_close(credit(values, group, 0.0, config), expected.clamp(-5, 5))
    with pytest.raises(ValueError, match="std must be 'group' or 'global', got 'batch'"):
        value_anchored(values, group, std="batch")


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
    equal = torch.cat([rewards[:, :1], torch.full((12, 1), 0.7)], 1)  # a judge without an opinion does not count
    assert_close(decoupled(equal, group, [1, 1], eps=1e-9), decoupled(rewards[:, :1], group, [1], eps=1e-9))


def test_decoupled_credit_for_grpo_and_vgpo():
    rewards, group, weights = torch.rand(12, 5, 2, dtype=torch.float64), torch.arange(12) % 3, [0.75, 0.25]
    grpo = credit(rewards, group, 0.9, AdvantageConfig(kind="grpo", combine="gdpo"), weights)
    assert_close(grpo, decoupled(rewards[:, -1], group, weights)[:, None].expand(12, 5))
    config = AdvantageConfig(combine="gdpo", anchor=0.2, anchor_steps=3, clip=1e9)
    total = discounted_values(rewards @ torch.tensor(weights, dtype=torch.float64), 0.9)
    for j in range(5):
        values = torch.stack([discounted_values(rewards[..., m], 0.9)[:, j] for m in range(2)], 1)
        relative = decoupled(values, group, weights)
        expected = temporal_weights(total)[:, j] * (relative + 0.2 * (j < 3) * total[:, j])
        assert_close(decoupled_credit(rewards, weights, group, 0.9, config)[:, j], expected)


@pytest.mark.parametrize(
    ("values", "group", "weights", "message"),
    [
        (torch.rand(4, 2), torch.zeros(4, dtype=torch.int64), [1.0], r"weights has shape \(1,\) for 2 judges"),
        (torch.rand(4, 2), torch.zeros(4), [1.0, 1.0], "group must hold integers"),
        (torch.full((4, 2), torch.nan), torch.zeros(4, dtype=torch.int64), [1.0, 1.0], "values has NaN or infinity"),
    ],
)
def test_gdpo_refuses(values, group, weights, message):
    with pytest.raises(ValueError, match=message):
        decoupled(values, group, weights)


# Several rewards


class Verdict(FunctionReward):
    "Brightness over 128, with a verdict."

    def __call__(self, images, prompts, metadata):
        scores = super().__call__(images, prompts, metadata)
        return replace(scores, raw=10 * scores.raw, strict=scores.raw > 0.5, details=[{"seen": True}] * len(prompts))


def brightness(images, prompts, metadata):
    return images.reshape(len(images), -1).mean(1) / 255


def darkness(images, prompts, metadata):
    return 1 - brightness(images, prompts, metadata)


IMAGES = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 51, 204, 255)])
ROWS = ["a"] * 4, [{}] * 4


def test_combined_reward():
    parts = {"dark": FunctionReward(darkness), "bright": Verdict(brightness), "also": Verdict(darkness)}
    both = CombinedReward(parts, {"dark": 1, "bright": 3, "also": 0})
    scores = score(both, IMAGES, *ROWS)
    bright = torch.tensor([0, 0.2, 0.8, 1])
    assert_close(scores.scaled, 0.25 * (1 - bright) + 0.75 * bright)
    assert torch.equal(scores.raw, scores.scaled) and list(scores.parts) == ["dark", "bright", "also"]
    assert_close(scores.parts["bright"].raw, 10 * bright)  # in its own unit
    assert scores.strict.tolist() == [False, False, True, True]  # of the first part that has a verdict
    assert scores.details[0] == {"dark": {}, "bright": {"seen": True}, "also": {"seen": True}}
    assert both.name == "0.25 dark + 0.75 bright + 0 also" and both.version.startswith("dark: darkness; bright: ")
    assert not any("\n" in line for line in (both.name, both.scale, both.version))


def test_a_combination_of_perfect_scores_is_not_above_1():
    ones = {str(i): FunctionReward(lambda images, *_: np.ones(len(images))) for i in range(3)}
    for weights in ((0.1, 0.2, 0.7), (1, 1, 1), (3, 1e-9, 2.2)):
        scores = score(CombinedReward(ones, dict(zip("012", weights, strict=True))), IMAGES, *ROWS)
        assert_close(scores.scaled, torch.ones(4))


def test_a_failing_part_is_named():
    parts = {"good": FunctionReward(darkness), "bad": FunctionReward(lambda *_: [2.0] * 4, "bad")}
    with pytest.raises(RewardError, match=r"reward '0.5 good \+ 0.5 bad' failed .* reward 'bad' gave row 0"):
        score(CombinedReward(parts, {"good": 1, "bad": 1}), IMAGES, *ROWS)


def test_configured_reward():
    one = configured_reward(RewardConfig("tiny_rewards:brightness"))
    assert_close(score(one, IMAGES, *ROWS).scaled, torch.tensor([0, 0.2, 0.8, 1]))
    parts = {"tiny_rewards:brightness": 2, "tiny_rewards:power": 6}
    two = configured_reward(RewardConfig(parts=parts, part_options={"tiny_rewards:power": {"exponent": 2}}))
    assert_close(score(two, IMAGES, *ROWS).scaled, torch.tensor([0, 0.05 + 0.03, 0.2 + 0.48, 1]))


@pytest.mark.parametrize(
    ("reward", "advantage", "message"),
    [
        ({"parts": {"ocr": -1.0}}, {}, "reward.parts is {'ocr': -1.0}; weights must not be negative, and one of them"),
        ({"parts": {"ocr": 0.0}}, {}, "reward.parts is {'ocr': 0.0}; weights must not be negative"),
        ({"parts": {"ocr": float("nan")}}, {}, "reward.parts is {'ocr': nan}; weights must not be negative"),
        (
            {"parts": {"ocr": 1.0}, "options": {"device": "cpu"}},
            {},
            "reward.options is for reward.name alone; beside reward.parts, give reward.part_options",
        ),
        (
            {"parts": {"ocr": 1.0}, "part_options": {"ocd": {}}},
            {},
            "reward.part_options has ocd, which reward.parts has not",
        ),
        (
            {"parts": {"ocr": 1.0}},
            {"combine": "gdpo"},
            "advantage.combine is gdpo; it needs two rewards or more in reward.parts; else leave it at sum",
        ),
    ],
)
def test_parts_that_cannot_be(reward, advantage, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_config(replace(Config(), reward=RewardConfig(**reward), advantage=AdvantageConfig(**advantage)))


def test_a_recipe_with_all_of_it_is_read_and_survives_saving(tmp_path):
    (tmp_path / "mine.yaml").write_text("""
sampling: {sampler: flow-cps, sde_steps: 2, window: random, window_per: group, window_stop: 5}
optim: {ratio: guard, clip_range: 1.0e-4, kl: velocity, kl_weight: 0.01}
reward: {parts: {geneval-shapes: 3, "my_rewards:brightness": 0.1}, part_options: {geneval-shapes: {strict: true}}}
advantage: {combine: gdpo, std: global}
""")
    config = parse_config(["--recipe", str(tmp_path / "mine.yaml")])
    assert config.reward.parts == {"geneval-shapes": 3, "my_rewards:brightness": 0.1}
    assert (config.sampling.window, config.optim.ratio, config.optim.kl) == ("random", "guard", "velocity")
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--recipe", str(tmp_path / "config.yaml")]) == config


# In the trainer

TINY = ["--sampling.group_size=2", "--sampling.batch_size=2", "--evaluation.images=1"]
WINDOWS = {
    "leading": [],
    "fixed": ["--sampling.window=fixed", "--sampling.window_start=1"],
    "random": ["--sampling.window=random"],
    "random per group": ["--sampling.window=random", "--sampling.window_per=group"],
    "sliding": ["--sampling.window=sliding", "--sampling.window_every=1"],
}


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    "A pipeline of one narrow layer with random weights: the trainer's logic does not depend on the network's size."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    pipe = make_pipeline(make_autoencoder(channels=8), width=64, layers=1)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    pipe.save_pretrained(folder)
    return folder


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


def trained(small_folder, tmp_path, *more, epochs=1):
    "The weights of a short run, how far they moved, and its metrics."
    run = start([*SMALL, f"--model.path={small_folder}", f"--output={tmp_path}", *more])
    begin = weights(run)
    metrics = [train_epoch(run) for run.epoch in range(1, epochs + 1)]  # no grid of samples
    return weights(run), weights(run) - begin, metrics


@pytest.fixture(scope="module")
def shared_run(small_folder, tmp_path_factory):
    "A run whose options a test may replace; loading its model takes longer than training it for an epoch."
    run = start([*SMALL, *TINY, f"--model.path={small_folder}", f"--output={tmp_path_factory.mktemp('shared')}"])
    return run, [p.detach().clone() for p in run.policy.parameters()]


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_combination_trains_and_begins_with_ratio_1(shared_run, sampler, ratio, kl):
    run, begin = shared_run
    run.sampler = SAMPLERS[sampler]
    for window, words in WINDOWS.items():
        options = dict(word.removeprefix("--sampling.").split("=") for word in words)
        options = {key: int(value) if value.isdigit() else value for key, value in options.items()}
        sampling = replace(Config().sampling, steps=4, sde_steps=2, groups=2, group_size=2, batch_size=2, **options)
        optim = replace(run.config.optim, ratio=ratio, kl=kl, kl_weight=0.1, lr=1e-3, updates=2, clip_range=1e-3)
        run.config = check_config(replace(run.config, sampling=replace(sampling, sampler=sampler), optim=optim))
        run.optimizer.state.clear()
        for p, value in zip(run.policy.parameters(), begin, strict=True):
            p.data.copy_(value)
        run.epoch, run.ratio_checked = 1, False  # epoch 0 would draw a sample grid, which takes longer than all else
        metrics = train_epoch(run)  # it raises TrainingError unless the first ratio is exactly 1
        assert run.ratio_checked and 0 < metrics["ratio_dev"] < 0.1, window  # and the second update's is not
        assert 0 < metrics["kl"] < 1 and metrics["grad_norm"] > 0
        assert ("ratio_bias" in metrics) == (ratio == "guard") and ("window_start" in metrics) == (
            window not in ("leading", "fixed")
        )
        assert (weights(run) - torch.cat([p.flatten() for p in begin])).abs().max() > 1e-5


def test_one_place_for_the_window_is_the_leading_window_bit_for_bit(small_folder, tmp_path):
    "However it is written, also where each sample has a window of its own and sigma is (B,)."
    whole, moved, _ = trained(small_folder, tmp_path, "--sampling.window_stop=3", epochs=2)
    assert moved.abs().max() > 1e-4
    for words in (["fixed"], ["sliding"], ["random"], ["random", "--sampling.window_per=group"]):
        same = trained(
            small_folder, tmp_path, "--sampling.window_stop=3", f"--sampling.window={words[0]}", *words[1:], epochs=2
        )
        assert torch.equal(same[0], whole)


def test_micro_batches_do_not_change_the_update_of_windows_per_group(small_folder, tmp_path):
    def moved(size):
        words = [*WINDOWS["random per group"], "--sampling.sde_steps=2", f"--sampling.batch_size={size}"]
        return trained(small_folder, tmp_path, *words)[1]

    whole, small = moved(8), moved(1)
    assert whole.abs().max() > 1e-4
    assert torch.nn.functional.cosine_similarity(whole, small, dim=0) > 0.999


def test_samples_of_a_group_share_a_window(small_folder, tmp_path):
    words = [*WINDOWS["random per group"], "--sampling.sde_steps=1", "--sampling.groups=6", "--optim.updates=1"]
    run = start([*SMALL, f"--model.path={small_folder}", f"--output={tmp_path}", *words])
    batches = list(sample(run))
    starts = torch.cat([b.start for b in batches]), torch.cat([b.path.group for b in batches])
    by_group = [starts[0][starts[1] == g].unique() for g in starts[1].unique()]
    assert all(len(s) == 1 for s in by_group) and len(torch.cat(by_group).unique()) > 1
    for batch in batches:
        assert torch.equal(batch.path.log_probs != 0, window_mask(batch.start, 1, len(batch.rows), 4))


@pytest.mark.parametrize("kind", ["vgpo", "grpo"])
def test_one_part_is_one_reward_bit_for_bit(small_folder, tmp_path, kind):
    one = trained(small_folder, tmp_path, f"--advantage.kind={kind}", epochs=2)
    part = trained(
        small_folder, tmp_path, f"--advantage.kind={kind}", '--reward.parts={"tiny_rewards:brightness": 3}', epochs=2
    )
    assert torch.equal(one[0], part[0])
    assert part[2][1]["reward"] == one[2][1]["reward"]
    assert part[2][1]["reward/tiny_rewards:brightness"] == pytest.approx(one[2][1]["reward"], rel=1e-6)


@pytest.mark.parametrize("combine", ["sum", "gdpo"])
@pytest.mark.parametrize("kind", ["vgpo", "grpo"])
def test_two_rewards_train_and_are_logged(small_folder, tmp_path, kind, combine):
    parts = {"tiny_rewards:brightness": 3, "tiny_rewards:power": 1}
    words = [f"--advantage.kind={kind}", f"--advantage.combine={combine}", f"--reward.parts={json.dumps(parts)}"]
    _, moved, (metrics,) = trained(small_folder, tmp_path, *words)
    assert moved.abs().max() > 1e-4
    scaled = [metrics[f"reward/{name}"] for name in parts]
    assert metrics["reward"] == pytest.approx(0.75 * scaled[0] + 0.25 * scaled[1], rel=1e-5)
    assert metrics["raw/tiny_rewards:power"] == pytest.approx(scaled[1])
    (log,) = tmp_path.rglob("metrics.jsonl")
    assert json.loads(log.read_text()) == metrics


def test_the_glossary_has_every_metric(small_folder, tmp_path):
    words = [*WINDOWS["sliding"], "--sampling.sde_steps=2", "--optim.ratio=guard", "--optim.kl_weight=0.1"]
    words += ["--evaluation.every=1", '--reward.parts={"tiny_rewards:power": 1}']
    metrics = trained(small_folder, tmp_path, *words)[2][0]
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert not [key for key in metrics if f"`{key.split('/')[0]}`" not in text and f"`{key.split('/')[0]}/" not in text]
    assert isinstance(Scores(torch.ones(1), torch.ones(1)).parts, dict)
