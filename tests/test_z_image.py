"""What is particular to Z-Image; the ladder that all families share is in test_families.py."""

import numpy as np
import pytest
import torch
from tiny_pipelines import SIGMA, UNEVEN, changed_by_company, check_adapters, tiny_z_image
from torch.testing import assert_close

from vgpo.flow import ode_sample, shifted_sigmas
from vgpo.policies.loading import ModelConfig
from vgpo.policies.z_image import ZImagePolicy


@pytest.fixture(scope="module")
def pipe():
    return tiny_z_image()


@pytest.fixture(scope="module")
def policy(pipe):
    "Without adapters; not to be changed."
    return ZImagePolicy(pipe, ModelConfig(resolution=32))


@pytest.fixture
def noise():
    return torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_network_sees_time_reversed_and_answers_with_the_sign_reversed(policy, noise):
    seen = []
    hook = policy.network.register_forward_hook(lambda module, args, output: seen.append((*args, *output)))
    sigmas, embeds = torch.tensor([0.9, 0.5, 0.2]), policy.encode(UNEVEN)
    try:
        with torch.no_grad():
            velocity = policy.velocity(noise, sigmas, embeds)
    finally:
        hook.remove()
    ((images, time, captions, output),) = seen
    assert_close(time, torch.tensor([0.1, 0.5, 0.8]))
    assert_close(torch.stack(images)[:, :, 0], noise)
    assert_close(torch.stack(output)[:, :, 0], -velocity)
    assert [len(c) for c in captions] == embeds.mask.sum(1).tolist()


def test_without_guidance_the_image_is_the_pipelines_digit_for_digit(pipe, policy, noise):
    with torch.no_grad():
        embeds = policy.encode(UNEVEN)
        ours = ode_sample(lambda x, sigma: policy.velocity(x, sigma, embeds), noise, policy.sigmas(6))
    captions = [text[mask] for text, mask in zip(embeds.text, embeds.mask, strict=True)]
    theirs = pipe(
        prompt_embeds=captions, latents=noise, height=32, width=32, num_inference_steps=6, guidance_scale=0.0,
        output_type="latent").images  # fmt: skip
    assert_close(ours, theirs, atol=1e-6, rtol=0)  # 1 - sigma for (1000 - 1000 sigma) / 1000 would cost 6e-5


def test_prompts_do_not_notice_their_company(policy, noise):
    lengths = policy.encode(UNEVEN).mask.sum(1).tolist()
    assert lengths[2] < lengths[0] < 32 < lengths[1] < 64  # padded to 32 and 64 tokens by the network
    told, untold = changed_by_company(policy, noise)
    assert told.max() < 5e-5
    assert (untold > 5e-5).tolist() == [True, False, True]  # handed on, the padding would be read


@pytest.mark.parametrize("guidance_scale", [1.5, 5.0])
def test_guidance_counts_from_one(pipe, policy, noise, guidance_scale):
    embeds, empty = policy.encode(UNEVEN), policy.encode([""]).expand(3)
    with torch.no_grad():
        v, u = policy.predict(noise, SIGMA, embeds), policy.predict(noise, SIGMA, empty)
        ours = policy.velocity(noise, SIGMA, embeds, guidance_scale)
    assert_close(ours, v + (guidance_scale - 1) * (v - u), atol=1e-5, rtol=0)  # as the pipeline writes it
    plain = pipe(
        list(UNEVEN), negative_prompt=[""] * 3, latents=noise, height=32, width=32, num_inference_steps=1,
        guidance_scale=guidance_scale - 1, output_type="latent").images  # fmt: skip
    with torch.no_grad():
        first = policy.velocity(noise, torch.tensor(1.0), embeds, guidance_scale)
    assert_close(noise - first, plain, atol=1e-4, rtol=0)


def test_the_schedule_is_that_of_notebook_01(pipe):
    for resolution in (16, 32):
        policy = ZImagePolicy(pipe, ModelConfig(resolution=resolution))
        for steps in (1, 8, 9, 50):
            assert_close(policy.sigmas(steps), shifted_sigmas(steps, 3.0), atol=1e-6, rtol=0)


def test_prompts_are_left_alone(pipe, policy):
    mine = list(UNEVEN)
    policy.encode(mine)
    assert mine == UNEVEN  # the pipeline, given a list, writes its templates into it
    with torch.no_grad():
        pipe.encode_prompt(mine, do_classifier_free_guidance=False)
    assert mine[0] == "<|im_start|>user\nCAT<|im_end|>\n<|im_start|>assistant\n"


def test_long_prompts_are_cut_as_the_pipeline_cuts_them(pipe):
    policy = ZImagePolicy(pipe, ModelConfig(resolution=32, max_sequence_length=10))
    with torch.no_grad():
        texts, _ = pipe.encode_prompt(list(UNEVEN), do_classifier_free_guidance=False, max_sequence_length=10)
    embeds = policy.encode(UNEVEN)
    assert embeds.mask.sum(1).tolist() == [len(text) for text in texts] and embeds.text.shape[1] == 10
    for row, mask, text in zip(embeds.text, embeds.mask, texts, strict=True):
        assert_close(row[mask], text, atol=1e-5, rtol=0)


def test_latents(pipe):
    assert ZImagePolicy(pipe).latent_shape == (4, 512, 512)  # 1024 pixels, as the pipeline draws if it is not told
    assert ZImagePolicy(pipe, ModelConfig(resolution=256)).latent_shape == (4, 128, 128)
    for wrong in (30, 260):  # the network has positions for 64 tokens a side
        with pytest.raises(ValueError, match=f"resolution is {wrong}; .* multiple of 4 up to 256"):
            ZImagePolicy(pipe, ModelConfig(resolution=wrong))


def test_every_adapter_learns(noise):
    policy = ZImagePolicy(tiny_z_image(), ModelConfig(resolution=32))
    check_adapters(policy, noise, 4 * 4)  # four projections in each of two blocks and two refiners


def test_a_tiny_vae_decodes_what_comes_before_the_last_step(pipe):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    policy, clean = ZImagePolicy(pipe, ModelConfig(resolution=32)), torch.randn(2, 3, 4, 16, 16)
    policy.add_tiny_vae(tiny)
    images = policy.decode_steps(clean)
    assert images.shape == (6, 32, 32, 3)
    assert np.abs(images[[2, 5]].astype(int) - policy.decode(clean[:, -1])).max() <= 1
    assert np.abs(images[[0, 3]].astype(int) - policy.decode(clean[:, 0])).mean() > 5
