"Noise and prompts of an epoch as functions of a few integers."

import pytest
import torch
from torch.testing import assert_close

from vgpo.flow import ode_sample
from vgpo.noise import epoch_prompts, generator, sample_noise


def test_epoch_prompts_are_a_function_of_seed_and_epoch():
    picks = {(s, e): epoch_prompts(50, 8, s, e) for s in range(4) for e in range(25)}
    assert all(len(set(pick)) == 8 and set(pick) <= set(range(50)) for pick in picks.values())
    assert len({tuple(pick) for pick in picks.values()}) == 100
    assert epoch_prompts(50, 8, 3, 7) == picks[3, 7]
    assert sorted(epoch_prompts(5, 5, 0, 0)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="rollout.prompts_per_epoch is 6, but there are only 5 prompts"):
        epoch_prompts(5, 6, 0, 0)


def test_every_prompt_gets_its_turn():
    picks = torch.tensor([epoch_prompts(40, 8, 0, epoch) for epoch in range(1000)])
    counts = torch.bincount(picks.flatten(), minlength=40)
    assert (counts - 200).abs().max() < 4.5 * (1000 * 0.2 * 0.8) ** 0.5  # two-sided, 40 prompts: p < 3e-4


def test_noise_is_a_function_of_its_key_alone():
    wanted = sample_noise((3, 4), 1, 23, 4, 5)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(sample_noise((3, 4), 1, 23, 4, 5), wanted)
    assert torch.equal(torch.get_rng_state(), state)
    others = [(12, 3, 4, 5), (1, 2, 34, 5), (1, 23, 45, 0), (1, 23, 5, 4), (2, 23, 4, 5), (1, "evaluation", 4, 5)]
    assert not any(torch.equal(sample_noise((3, 4), *key), wanted) for key in others)


def test_noise_is_pinned():
    "Runs of the past stay repeatable only if these numbers never change."
    assert generator("noise", 0, 0, 0, 0).initial_seed() == 0xC75D3716838242
    wanted = torch.tensor([-0.2331, -2.0637, -1.7135])
    assert_close(sample_noise((3,), 0, 0, 0, 0), wanted, atol=1e-4, rtol=0)
    assert epoch_prompts(1000, 4, 0, 0) == [884, 81, 13, 599]


def test_images_do_not_depend_on_the_batch_size(policy):
    prompts = ["a photo of two red circles", "a photo of a blue cross", 'a red sign that says "CAT"']
    noise = torch.stack([sample_noise(policy.latent_shape, 0, 0, i, 0) for i in range(3)])

    def draw(rows):
        embeds = policy.encode([prompts[i] for i in rows])
        with torch.no_grad():
            return ode_sample(lambda x, sigma: policy.velocity(x, sigma, embeds), noise[rows], policy.sigmas(5))

    together = draw([0, 1, 2])
    assert_close(torch.cat([draw([0]), draw([1]), draw([2])]), together, atol=1e-5, rtol=0)
    assert_close(draw([2, 0]), together[[2, 0]], atol=1e-5, rtol=0)
