"Windows: where the noise goes, and what is trained."

import itertools
import re

import pytest
import torch
from plug_classes import plug_classes
from torch.testing import assert_close

from vgpo.credit.one_step import OneStep
from vgpo.flow import shifted_sigmas
from vgpo.rollout import column, replay, rollout
from vgpo.sde import FlowSDE, Sampler
from vgpo.toy import GaussianMixture
from vgpo.windows import Leading, Random, Window

SIGMAS = shifted_sigmas(6).double()
each_sampler = pytest.mark.parametrize("sampler", [kind(0.5) for kind in plug_classes(Sampler)], ids=repr)


def window_mask(start, size, count, steps):
    "Bool (count, steps): the `size` steps from `start`, an integer or one for each row (count,)."
    start = torch.as_tensor(start).expand(count)[:, None]
    return (torch.arange(steps) >= start) & (torch.arange(steps) < start + size)


@pytest.mark.parametrize(
    ("window", "places"),
    [
        (Leading(3), {0}),
        (Random(3), {0, 1, 2, 3, 4, 5, 6}),
        (Random(3, start=1, stop=5), {1, 2}),
        (Random(3, stop=3), {0}),
        (Random(3, stop=10, start=7), {7}),
        (Random(3, per="group"), {0, 1, 2, 3, 4, 5, 6}),
        (OneStep(), set(range(9))),
        (OneStep(stop=10), set(range(10))),
    ],
    ids=repr,
)
def test_places_of_a_window(window, places):
    masks = [window.mask(10, 0, epoch, [5, 6]) for epoch in range(200)]
    assert {int(start) for mask in masks for start in mask.int().argmax(1)} == places


def test_no_window_that_passes_its_check_is_empty_or_leaves_the_steps():
    passed = 0
    for kind, steps, size, first, stop, per in itertools.product(
        plug_classes(Window), [2, 5], [1, 2, 4, 5], [0, 1, 4], [None, 1, 3, 5], ["epoch", "group"]
    ):
        window = kind(size, first, stop, per) if issubclass(kind, Random) else kind(size)
        try:
            window.check(steps)
        except ValueError:
            continue
        passed += 1
        for epoch in range(8):
            mask = window.mask(steps, 0, epoch, [0, 1, 2])
            assert mask.shape == (3, steps) and mask.dtype == torch.bool and (mask.sum(1) == size).all()
            assert (mask.int().diff(dim=1).ne(0).sum(1) <= 2).all()  # consecutive
            assert not mask[:, window.last_step(steps) + 1 :].any()
    assert passed > 50


def test_random_windows_are_functions_of_seed_epoch_and_prompt():
    def starts(window, *key):
        return window.mask(10, *key).int().argmax(1).tolist()

    window, group = Random(3), Random(3, per="group")
    epochs = [starts(window, 0, epoch, [5, 6]) for epoch in range(50)]
    assert all(one == other for one, other in epochs) and {one for one, _ in epochs} == set(range(7))
    assert epochs == [2 * starts(window, 0, epoch, [9]) for epoch in range(50)]
    assert epochs != [starts(window, 1, epoch, [5, 6]) for epoch in range(50)]
    one, other = starts(group, 0, 3, [5, 6, 7, 5]), starts(group, 0, 3, [7, 7, 5])
    assert one[0] == one[3] == other[2] and one[2] == other[0] == other[1]  # wherever a prompt's samples are
    counts = torch.bincount(torch.tensor(starts(group, 0, 0, range(7000))), minlength=7)
    assert (counts - 1000).abs().max() < 5 * (1000 * 6 / 7) ** 0.5  # five standard errors


def test_random_windows_are_pinned():
    "Runs of the past stay repeatable only if these places never change."
    assert [Random(3).first_step(10, 0, epoch, [0]) for epoch in range(12)] == [1, 2, 5, 4, 2, 5, 1, 0, 1, 3, 6, 1]
    starts = Random(2, stop=5, per="group").first_step(10, 3, 7, range(12))
    assert starts.tolist() == [3, 2, 2, 2, 2, 1, 2, 3, 3, 2, 2, 0]


def test_one_step_is_a_random_window_of_one_per_group_from_a_shared_start():
    assert (OneStep().size, OneStep().per, OneStep().shared_start) == (1, "group", True)
    assert not Leading().shared_start and not Random().shared_start and Random(shared_start=True).shared_start
    prompts = [4, 4, 9, 4, 9, 30]
    found = OneStep(stop=6).first_step(10, 1, 2, prompts)
    assert torch.equal(found, Random(1, stop=6, per="group").first_step(10, 1, 2, prompts))
    assert found[0] == found[1] == found[3] and found[2] == found[4]


def test_up_to_the_window_a_group_with_a_shared_start_is_one_path():
    group = torch.arange(40).repeat_interleave(5)
    window, generator = OneStep(stop=6), torch.Generator().manual_seed(0)
    start = torch.randn(40, 2, generator=generator, dtype=torch.float64).repeat_interleave(5, 0)
    mask = window.mask(6, 0, 0, group.tolist())
    path = rollout(GaussianMixture.ring().velocity, start, SIGMAS, FlowSDE(0.7), generator=generator, sde_steps=mask)
    states = path.latents.unflatten(0, (40, 5))
    equal = (states == states[:, :1]).all(-1).all(1)
    place = window.first_step(6, 0, 0, range(40))
    assert torch.equal(equal, torch.arange(7) <= place[:, None]) and len(place.unique()) == 6


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Leading(11), "window.size is 11; it must lie in 1 to rollout.num_inference_steps, 10"),
        (Random(11), "window.size is 11; it must lie in 1 to rollout.num_inference_steps, 10"),
        (Random(3, stop=11), "window.stop is 11; it must lie in 1 to rollout.num_inference_steps, 10"),
        (
            Random(3, start=5, stop=7),
            "window.size is 3; the window must fit between window.start, 5, and window.stop, 7: lower size, or leave "
            "more room",
        ),
        (Random(10), "window.size is 10; the window must fit between window.start, 0, and window.stop, 9"),
        (Random(3, start=8), "window.size is 3; the window must fit between window.start, 8, and window.stop, 9"),
    ],
    ids=repr,
)
def test_windows_that_do_not_fit(window, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        window.check(10)


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
