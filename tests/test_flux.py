"FLUX beside the shared ladder of test_families: packing, ids, the schedule's shift, the two guidances, LoRA targets."

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from tiny_pipelines import tiny_flux
from torch.testing import assert_close

from vgpo.policies.base import load_policy
from vgpo.policies.flux import FluxPolicy, image_ids, pack, unpack
from vgpo.policies.loading import ModelConfig, load_pipeline

PROMPTS = ["a photo of two red circles", 'a blue sign that says "CAT"']
SIGMA = torch.tensor(0.7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_flux().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(
        ModelConfig(path=str(folder), resolution=16, max_sequence_length=12, distilled_guidance_scale=2.0)
    )


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_packing_is_the_pipelines(noise):
    wide = torch.randn(3, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    for x in (noise, wide):
        assert torch.equal(pack(x), FluxPipeline._pack_latents(x, *x.shape))
        assert torch.equal(unpack(pack(x), x.shape[-1]), x)
        pixels = 8 * x.shape[-1]
        assert torch.equal(unpack(pack(x), x.shape[-1]), FluxPipeline._unpack_latents(pack(x), pixels, pixels, 8))
    assert pack(torch.arange(16.0).reshape(1, 1, 4, 4))[0].tolist()[1] == [2, 3, 6, 7]
    assert torch.equal(image_ids(5), FluxPipeline._prepare_latent_image_ids(1, 5, 5, "cpu", torch.float32))


@pytest.mark.parametrize(("pixels", "shift"), [(256, math.exp(0.5)), (1024, math.exp(1.15))])
def test_the_shift_of_flux_1_dev(pixels, shift):
    pipe = tiny_flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # as published
    policy = FluxPolicy(
        pipe, ModelConfig(resolution=pixels // 8)
    )  # an autoencoder that makes 2 pixels of a latent, not 16
    policy.image_tokens = (pixels // 16) ** 2
    u = torch.linspace(1, 1 / 20, 20)
    wanted = torch.cat([shift * u / (1 + (shift - 1) * u), torch.zeros(1)])
    assert_close(policy.sigmas(20), wanted, atol=1e-6, rtol=0)
    assert policy.sigmas(20).dtype == torch.float32


def test_the_schedule_depends_on_the_resolution(folder, policy):
    large = load_policy(ModelConfig(path=str(folder), resolution=32))
    assert (policy.image_tokens, large.image_tokens) == (16, 64) and large.latent_shape == (4, 16, 16)
    assert (large.sigmas(4)[1:4] > policy.sigmas(4)[1:4]).all()
    assert FluxPolicy(load_pipeline(folder), ModelConfig()).latent_shape == (4, 128, 128)  # the pipeline's default


def test_a_fixed_shift_stays_fixed():
    pipe = tiny_flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # FLUX.1-schnell's
    assert_close(
        FluxPolicy(pipe, ModelConfig(resolution=16)).sigmas(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]), atol=1e-6, rtol=0
    )


def test_distilled_guidance_scale_is_told_to_the_network(folder, policy, noise):
    heard = []
    hook = policy.network.register_forward_pre_hook(lambda _, a, k: heard.append(k["guidance"]), with_kwargs=True)
    with torch.no_grad():
        v = policy.velocity(noise, SIGMA, policy.encode(PROMPTS))
        assert len(heard) == 1  # one forward pass: this is not classifier-free guidance
        policy.velocity(noise, SIGMA, policy.encode(PROMPTS), guidance_scale=3.0)
    hook.remove()
    assert [g.tolist() for g in heard] == [[2.0, 2.0]] * 3
    other = load_policy(ModelConfig(path=str(folder), resolution=16, max_sequence_length=12))
    assert other.distilled_guidance_scale == 3.5
    with torch.no_grad():
        assert (other.velocity(noise, SIGMA, other.encode(PROMPTS)) - v).abs().max() > 1e-3


def test_a_model_without_distilled_guidance_scale_is_told_nothing(noise):
    pipe = tiny_flux(guidance_embeds=False)
    a, b = (
        FluxPolicy(pipe, ModelConfig(resolution=16, max_sequence_length=12, distilled_guidance_scale=g))
        for g in (1.0, 9.0)
    )
    with torch.no_grad():
        v = a.velocity(noise, SIGMA, a.encode(PROMPTS))
        assert torch.equal(v, b.velocity(noise, SIGMA, b.encode(PROMPTS)))
        text, pooled, ids = pipe.encode_prompt(PROMPTS, None, max_sequence_length=12)
        tokens = pipe.transformer(
            pack(noise), text, pooled, SIGMA.expand(2), image_ids(4), ids, return_dict=False
        )[0]  # fmt: skip
    assert_close(v, unpack(tokens, 8), atol=1e-4, rtol=0)


def test_numbers_of_tokens(folder):
    assert FluxPolicy(tiny_flux()).max_sequence_length == 512
    for wrong in (0, 513):
        with pytest.raises(ValueError, match=f"model.max_sequence_length is {wrong}; .* must lie in 1 to 512"):
            load_policy(ModelConfig(path=str(folder), max_sequence_length=wrong))


def test_targets():
    policy = FluxPolicy(tiny_flux(), ModelConfig(resolution=16))
    policy.add_lora(rank=2)
    adapted = {name.split(".lora_")[0] for name, _ in policy.network.named_parameters() if ".lora_" in name}
    assert len(adapted) == 2 * 12 + 2 * 3  # double-stream blocks: 8 projections, 4 feed-forward layers; single: q, k, v
    assert "transformer_blocks.0.ff_context.net.2" in adapted and "single_transformer_blocks.1.attn.to_q" in adapted
    assert not any("proj_mlp" in name or "norm" in name or name == "proj_out" for name in adapted)


def test_text_encoders_are_freed(folder, policy, noise):
    freed = load_policy(ModelConfig(
        path=str(folder), resolution=16, max_sequence_length=12, distilled_guidance_scale=2.0,
        precompute_text_embeds=True))  # fmt: skip
    freed.precompute(PROMPTS)
    assert freed.pipe.text_encoder is None and freed.pipe.text_encoder_2 is None
    with torch.no_grad():
        v, w = (p.velocity(noise, SIGMA, p.encode(PROMPTS), 3.0) for p in (freed, policy))
    assert torch.equal(v, w)
