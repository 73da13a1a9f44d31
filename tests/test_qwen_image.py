"""What is particular to Qwen-Image; the ladder that all families share is in test_families.py."""

import numpy as np
import pytest
import torch
from tiny_pipelines import SIGMA, UNEVEN, changed_by_company, check_adapters, tiny_qwen_image
from torch.testing import assert_close

from vgpo.flow import interpolate, shifted_sigmas
from vgpo.policies.loading import ModelConfig
from vgpo.policies.lora import used_layers
from vgpo.policies.qwen_image import QwenImagePolicy, decode_frame, keep_length


@pytest.fixture(scope="module")
def pipe():
    return tiny_qwen_image()


@pytest.fixture(scope="module")
def policy(pipe):
    "Without adapters; not to be changed."
    return QwenImagePolicy(pipe, ModelConfig(resolution=32))


@pytest.fixture
def noise():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_prompts_do_not_notice_their_company(policy, noise):
    embeds = policy.encode(UNEVEN)
    lengths = embeds.mask.sum(1).tolist()
    assert lengths[2] == 5 < lengths[0] < lengths[1] == embeds.text.shape[1]  # five tokens of template, at least
    told, untold = changed_by_company(policy, noise)
    assert told.max() < 1e-5
    assert (untold > 1e-5).tolist() == [True, False, True]  # without a mask, padding is read; the longest has none


def test_guided_velocities_do_not_notice_their_company(policy, noise):
    with torch.no_grad():
        together = policy.velocity(noise, SIGMA, policy.encode(UNEVEN), 4.0)
        alone = policy.velocity(noise[1:2], SIGMA, policy.encode(UNEVEN[1:2]), 4.0)
    assert_close(together[1:2], alone, atol=1e-5, rtol=0)


def test_the_network_is_told_of_padding_only_where_there_is_some(policy, noise):
    seen = []
    hook = policy.network.register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        with torch.no_grad():
            policy.velocity(noise[:2], SIGMA, policy.encode(["CAT", "CAT"]))
            policy.velocity(noise[:2], SIGMA, policy.encode(UNEVEN[:2]))
    finally:
        hook.remove()
    (_, _, none, sigma, shapes), (_, _, mask, _, _) = seen
    assert none is None and mask.dtype == torch.bool and not mask.all()
    assert torch.equal(sigma, SIGMA.expand(2)) and shapes == [[(1, 4, 4)]] * 2


def tokens(latents):
    "Tokens (B, h/2, w/2, 4C) cut out one by one."
    rows = [[latents[:, :, i : i + 2, j : j + 2].flatten(1) for j in range(0, 8, 2)] for i in range(0, 8, 2)]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


@pytest.mark.parametrize("scale", [1.5, 7.0])
def test_guidance_turns_tokens_and_keeps_their_length(policy, noise, scale):
    conditional, unconditional = noise, torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    plain = tokens(unconditional + scale * (conditional - unconditional))
    length, wanted = (t.square().sum(-1, keepdim=True).sqrt() for t in (plain, tokens(conditional)))
    assert_close(tokens(policy.guide(conditional, unconditional, scale)), plain * wanted / length)
    assert_close(keep_length(3 * noise, noise), noise)


def test_the_gradient_of_guidance(noise):
    policy = QwenImagePolicy(tiny_qwen_image(), ModelConfig(resolution=32))
    policy.add_lora(rank=2, alpha=4)
    for p in policy.parameters():
        p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(len(p)))
    embeds = policy.encode(UNEVEN)

    def gradient(f):
        found = torch.autograd.grad(f, policy.parameters(), retain_graph=True)
        return torch.cat([g.flatten() for g in found])

    conditional = policy.predict(noise, SIGMA, embeds)
    empty = policy.predict(noise, SIGMA, policy.encode([""]).expand(3))
    v, u = tokens(conditional), tokens(empty)

    def guided(u):
        plain = u + 4 * (v - u)
        return plain * v.norm(dim=-1, keepdim=True) / plain.norm(dim=-1, keepdim=True)

    constant, through = (gradient((f * tokens(noise)).sum()) for f in (guided(u.detach()), guided(u)))
    ours = gradient((policy.velocity(noise, SIGMA, embeds, 4.0) * noise).sum())
    assert_close(ours, constant, rtol=1e-3, atol=1e-4 * float(constant.abs().max()))
    assert (ours - through).abs().max() > 1e-2 * constant.abs().max()


def test_pixels_undo_the_normalisation_of_each_channel(pipe):
    picture = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        latent = pipe.vae.encode(picture[:, :, None]).latent_dist.mean[:, :, 0]
        normal = torch.stack([(latent[:, c] - m) / s for c, (m, s) in enumerate(
            zip(pipe.vae.config.latents_mean, pipe.vae.config.latents_std, strict=True))], 1)  # fmt: skip
        wanted = pipe.vae.decode(latent[:, :, None]).sample[:, :, 0]
        assert_close(decode_frame(pipe.vae, normal), wanted, atol=1e-5, rtol=0)
        assert (decode_frame(pipe.vae, latent) - wanted).abs().max() > 0.01


def schedule(steps, mu, terminal):
    u = 1 - np.arange(steps) / steps
    s = shifted_sigmas(steps, np.exp(mu))[:-1].double().numpy()
    assert np.allclose(s, np.exp(mu) / (np.exp(mu) + 1 / u - 1))
    return torch.tensor([*(1 - (1 - s) * (1 - terminal) / (1 - s[-1])), 0.0], dtype=torch.float32)


@pytest.mark.parametrize(("resolution", "image_tokens"), [(16, 4), (32, 16), (64, 64)])
def test_the_schedule_depends_on_the_resolution(pipe, resolution, image_tokens):
    policy = QwenImagePolicy(pipe, ModelConfig(resolution=resolution))
    assert policy.latent_shape == (4, resolution // 4, resolution // 4) and policy.image_tokens == image_tokens
    mu = 0.5 + 0.4 * (image_tokens - 4) / 60
    for steps in (2, 7, 30):
        assert_close(policy.sigmas(steps), schedule(steps, mu, 0.02), atol=1e-6, rtol=0)


def test_one_step(policy):
    with pytest.raises(ValueError, match="ends at a fixed level.*at least 2 steps"):
        policy.sigmas(1)
    free = tiny_qwen_image()  # as distilled variants have it
    free.scheduler = type(free.scheduler).from_config(free.scheduler.config, shift_terminal=None)
    assert_close(QwenImagePolicy(free, ModelConfig(resolution=32)).sigmas(1), torch.tensor([1.0, 0.0]))


def test_latents_and_tiny_vaes(pipe):
    assert QwenImagePolicy(pipe).latent_shape == (4, 128, 128)  # what the pipeline draws if it is not told a size
    with pytest.raises(ValueError, match="resolution is 20; .* multiple of 8"):
        QwenImagePolicy(pipe, ModelConfig(resolution=20))
    policy = QwenImagePolicy(pipe, ModelConfig(resolution=32))
    with pytest.raises(ValueError, match="no AutoencoderTiny.*leave model.tiny_vae unset"):
        policy.add_tiny_vae(pipe.vae)
    assert policy.decode_steps(torch.randn(1, 2, 4, 8, 8)).shape == (2, 32, 32, 3)


def test_long_prompts_are_cut_as_the_pipeline_cuts_them(pipe):
    policy = QwenImagePolicy(pipe, ModelConfig(resolution=32, max_sequence_length=10))
    with torch.no_grad():
        text, mask = pipe.encode_prompt(UNEVEN, max_sequence_length=10)
    embeds = policy.encode(UNEVEN)
    assert embeds.text.shape == (3, 10, 32) and torch.equal(embeds.mask, mask.bool())
    assert_close(embeds.text, text, atol=1e-5, rtol=0)


def test_every_adapter_learns(noise):
    policy = QwenImagePolicy(tiny_qwen_image(), ModelConfig(resolution=32))
    check_adapters(policy, interpolate(torch.zeros_like(noise), noise, SIGMA), 12 + 8)  # the last block lacks four


def test_nothing_depends_on_what_is_not_trained(noise):
    policy = QwenImagePolicy(tiny_qwen_image(), ModelConfig(resolution=32))
    policy.full_finetune()
    velocity, frozen = policy.velocity(noise, SIGMA, policy.encode(UNEVEN)), []
    for name, p in policy.network.named_parameters():
        if not p.requires_grad:
            frozen.append(name)
            p.data.normal_()
    assert torch.equal(policy.velocity(noise, SIGMA, policy.encode(UNEVEN)), velocity)
    assert len(frozen) == 9 and all(name.startswith("transformer_blocks.1.") for name in frozen)


def test_targets_are_named_in_full(policy):
    unused = policy.unused_parameters()
    names = used_layers(policy.network, ("attn.to_q", "txt_mlp.net.2", "proj_out"), unused)
    assert names == [
        "transformer_blocks.0.attn.to_q", "transformer_blocks.0.txt_mlp.net.2", "transformer_blocks.1.attn.to_q",
        "proj_out"]  # fmt: skip
    with pytest.raises(ValueError, match="'attn.to_k_typo'"):
        policy.add_lora(targets=("attn.to_q", "attn.to_k_typo"))
