"""One ladder for all families: what the policy computes is what plain diffusers computes with the same random model."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from vgpo.flow import ode_sample
from vgpo.losses import clipped_surrogate
from vgpo.policies.base import load_policy, policy_classes
from vgpo.policies.embeds import PromptEmbeds
from vgpo.policies.loading import ModelConfig
from vgpo.rollout import replay, rollout
from vgpo.sde import FlowSDE

PROMPTS = ["a photo of two red circles", 'a blue sign that says "CAT"']
STEPS = 5


@dataclass
class Family:
    "A family, and how plain diffusers is asked for the same things."

    make: Callable  # -> a pipeline with random weights
    embed: Callable  # (pipe, prompts, length) -> the PromptEmbeds of prompts that the pipeline gives its transformer
    guided: Callable  # guidance_scale -> arguments of the pipeline's call
    length: int = 12  # max_sequence_length
    resolution: int = 16
    options: dict = field(default_factory=dict)  # of ModelConfig
    call: dict = field(default_factory=dict)  # arguments of every call of the pipeline
    pack: Callable = lambda latents: latents  # latents (B, C, h, w) as the pipeline takes and returns them


def embed_sd3(pipe, prompts, length):
    text, _, pooled, _ = pipe.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return PromptEmbeds(text, pooled)


def embed_flux(pipe, prompts, length):
    return PromptEmbeds(*pipe.encode_prompt(prompts, None, max_sequence_length=length)[:2])


def pack_flux(x):
    from diffusers import FluxPipeline

    return FluxPipeline._pack_latents(x, *x.shape)


def true_guidance(scale):
    "As FluxPipeline wants to be told: guidance against the empty prompt."
    return {"true_cfg_scale": scale, **({"negative_prompt": [""] * len(PROMPTS)} if scale > 1 else {})}


def embed_qwen_image(pipe, prompts, length):
    text, mask = pipe.encode_prompt(prompts, max_sequence_length=length)
    return PromptEmbeds(text, mask=mask.bool())


def embed_z_image(pipe, prompts, length):
    texts, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    masks = [torch.ones(len(text), dtype=torch.bool) for text in texts]
    return PromptEmbeds(pad_sequence(texts, batch_first=True), mask=pad_sequence(masks, batch_first=True))


FAMILIES = {
    "sd3": Family(  # with T5, and with the second attention of SD3.5 medium; test_policy.py has one without either
        lambda: tiny.tiny_sd3(dual_attention_layers=(0, 1)), embed_sd3, lambda scale: {"guidance_scale": scale}),
    "flux": Family(
        tiny.tiny_flux, embed_flux, true_guidance, pack=pack_flux,
        options={"distilled_guidance_scale": 2.0}, call={"guidance_scale": 2.0}),
    "qwen-image": Family(  # packs its latents as FLUX does
        tiny.tiny_qwen_image, embed_qwen_image, true_guidance, pack=pack_flux, length=30, resolution=32),
    "z-image": Family(  # counts guidance from 0
        tiny.tiny_z_image, embed_z_image, lambda scale: {"guidance_scale": scale - 1}, length=30),
}  # fmt: skip


@dataclass
class Pair:
    "A policy and an untouched pipeline with the same weights."

    family: Family
    folder: str
    plain: object
    policy: object
    noise: torch.Tensor

    def draw(self, policy=None, guidance_scale=1.0, steps=STEPS):
        "Latents of the deterministic sampler."
        policy = policy or self.policy
        embeds = policy.encode(PROMPTS)
        with torch.no_grad():
            return ode_sample(
                lambda x, sigma: policy.velocity(x, sigma, embeds, guidance_scale), self.noise, policy.sigmas(steps)
            )

    def draw_plain(self, guidance_scale=1.0, steps=STEPS, output_type="latent", **more):
        "What the pipeline draws from the same noise."
        f = self.family
        return self.plain(
            prompt=list(PROMPTS), latents=f.pack(self.noise), num_inference_steps=steps, output_type=output_type,
            height=f.resolution, width=f.resolution, max_sequence_length=f.length,
            **f.call, **f.guided(guidance_scale), **more).images  # fmt: skip


def load(family, folder, **options):
    options = {"resolution": family.resolution, "max_sequence_length": family.length, **family.options, **options}
    return load_policy(ModelConfig(str(folder), **options))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    "A family's Pair; nothing may train its policy."
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    plain = family.make()
    plain.save_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    policy = load(family, folder)
    noise = torch.randn(len(PROMPTS), *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return Pair(family, folder, plain, policy, noise)


@pytest.fixture
def trainable(pair):
    "The same Pair with a policy of its own, with a LoRA."
    policy = load(pair.family, pair.folder)
    policy.add_lora(rank=4, alpha=16)
    return replace(pair, policy=policy)


def perturb(policy, size=0.05):
    g = torch.Generator().manual_seed(1)
    for p in policy.parameters():
        p.data.add_(size * torch.randn(p.shape, generator=g))


def test_the_class_is_chosen_by_the_pipeline(pair):
    assert type(pair.policy) is policy_classes()[type(pair.plain).__name__]


def test_every_family_climbs_the_ladder():
    assert {type(family.make()).__name__ for family in FAMILIES.values()} == set(policy_classes())


def test_example_embeds_are_as_long_as_the_longest_prompt(pair):
    longest = pair.policy.encode(["red " * 100])
    example = pair.policy.example_embeds(3)
    assert [t is not None for t in example] == [t is not None for t in longest]
    assert example.text.shape == (3, *longest.text.shape[1:]) and not example.text.any()
    assert example.pooled is None or example.pooled.shape == (3, *longest.pooled.shape[1:])
    with torch.no_grad():
        x = torch.randn(3, *pair.policy.latent_shape)
        assert pair.policy.velocity(x, torch.tensor(0.7), example).isfinite().all()
        assert all(states.isfinite().all() for states in pair.policy.encode_example())


def test_prompts(pair):
    with torch.no_grad():
        theirs = pair.family.embed(pair.plain, list(PROMPTS), pair.family.length)
    ours = pair.policy.encode(PROMPTS)
    for a, b in zip(tuple(ours), tuple(theirs), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, atol=1e-4, rtol=0)
    assert (ours.text[0] - ours.text[1]).abs().max() > 0.1  # prompts differ, or the ladder proves nothing


def test_schedule(pair):
    pair.draw_plain()
    assert torch.equal(pair.policy.sigmas(STEPS), pair.plain.scheduler.sigmas.float())


def recorded(pair, guidance_scale):
    "The (states, velocity) that the pipeline hands its scheduler at each step, as (B, C, h, w)."
    steps, step = [], type(pair.plain.scheduler).step

    def spy(velocity, t, x, **options):
        steps.append((velocity, x))
        return step(pair.plain.scheduler, velocity, t, x, **options)

    pair.plain.scheduler.step = spy
    try:
        pair.draw_plain(guidance_scale)
    finally:
        del pair.plain.scheduler.step
    return steps


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_velocities_and_steps(pair, guidance_scale):
    steps, pack = recorded(pair, guidance_scale), pair.family.pack
    x, sigmas, embeds = pair.noise, pair.policy.sigmas(STEPS), pair.policy.encode(PROMPTS)
    assert len(steps) == STEPS
    for j, (theirs, state) in enumerate(steps):
        with torch.no_grad():
            ours = pair.policy.velocity(x, sigmas[j], embeds, guidance_scale)
        assert ours.dtype == torch.float32 and ours.shape == x.shape and ours.std() > 0.1
        assert_close(pack(x), state, atol=1e-4, rtol=0)
        assert_close(pack(ours), theirs, atol=1e-4, rtol=0)
        x = x + (sigmas[j + 1] - sigmas[j]) * ours


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_whole_image(pair, guidance_scale):
    ours = pair.draw(guidance_scale=guidance_scale)
    assert (ours - pair.draw(guidance_scale=2.0)).abs().max() > 1e-3  # guidance does something
    assert_close(pair.family.pack(ours), pair.draw_plain(guidance_scale), atol=1e-4, rtol=0)
    theirs = np.stack([np.asarray(image) for image in pair.draw_plain(guidance_scale, output_type="pil")])
    decoded = pair.policy.decode(ours)
    assert decoded.dtype == np.uint8 and decoded.shape == theirs.shape and decoded.std() > 1
    assert np.abs(theirs.astype(int) - decoded).max() <= 1  # a value between two integers may round either way
    assert np.abs(pair.policy.decode(ours, batch_size=1).astype(int) - decoded).max() <= 1  # convolutions round


def test_the_prompt_and_the_level_matter(pair):
    embeds, sigma = pair.policy.encode(PROMPTS), torch.tensor(0.7)
    with torch.no_grad():
        v = pair.policy.velocity(pair.noise, sigma, embeds)
        assert (pair.policy.velocity(pair.noise, sigma, embeds[[1, 0]]) - v).abs().max() > 1e-3
        assert (pair.policy.velocity(pair.noise, torch.tensor(0.4), embeds) - v).abs().max() > 1e-3


def first_ratios(policy, noise, guidance_scale=1.0):
    "The Trajectory of a rollout, and log-probabilities (B, 3) of its steps replayed, with gradients."
    z = torch.randn(len(noise), STEPS, *noise.shape[1:], generator=torch.Generator().manual_seed(2))
    embeds, sampler = policy.encode(PROMPTS), FlowSDE(0.7)

    def velocity(x, sigma):
        return policy.velocity(x, sigma, embeds, guidance_scale)

    path = rollout(velocity, noise, policy.sigmas(STEPS), sampler, z, sde_steps=3)
    replays = [replay(velocity, path, j, sampler).log_prob(path.latents[:, j + 1]) for j in range(3)]
    return path, torch.stack(replays, 1)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_ratio_is_one_before_the_first_update(trainable, guidance_scale):
    path, log_probs = first_ratios(trainable.policy, trainable.noise, guidance_scale)
    assert log_probs.requires_grad and path.log_probs[:, :3].all()
    assert torch.equal(log_probs, path.log_probs[:, :3])


def weights(pipe):
    return {
        f"{part}.{name}": p.detach().clone()
        for part, module in pipe.components.items() if isinstance(module, torch.nn.Module)
        for name, p in module.named_parameters()
    }  # fmt: skip


def test_one_training_step_moves_the_lora_and_nothing_else(pair, trainable):
    policy, noise, sigma = trainable.policy, trainable.noise, torch.tensor(0.7)
    bare = pair.policy.velocity(noise, sigma, pair.policy.encode(PROMPTS))
    assert torch.equal(policy.velocity(noise, sigma, policy.encode(PROMPTS)), bare)
    before = weights(policy.pipe)
    optimizer = torch.optim.SGD(policy.parameters(), lr=10.0)
    path, log_probs = first_ratios(policy, noise)
    advantages = torch.tensor([[1.0] * 3, [-1.0] * 3])
    clipped_surrogate(log_probs, path.log_probs[:, :3], advantages, 0.1)[0].mean().backward()
    optimizer.step()
    after = weights(policy.pipe)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all(".lora_B." in name for name in moved)  # A has no gradient while B is zero
    assert len(moved) >= 0.9 * len(policy.parameters()) / 2
    with torch.no_grad():
        assert (policy.velocity(noise, sigma, policy.encode(PROMPTS)) - bare).abs().max() > 1e-5
        with policy.reference():
            assert torch.equal(policy.velocity(noise, sigma, policy.encode(PROMPTS)), bare)


def test_all_weights_learn_and_there_is_a_way_back(pair):
    policy, sigma = load(pair.family, pair.folder), torch.tensor(0.7)
    policy.full_finetune()
    start = policy.velocity(pair.noise, sigma, policy.encode(PROMPTS))
    start.square().mean().backward()
    frozen = {name for name, p in policy.network.named_parameters() if not p.requires_grad}
    assert all(name.startswith(policy.unused_parameters()) for name in frozen)
    assert all(p.grad is not None for p in policy.parameters())  # one without stops distributed training
    perturb(policy)
    with torch.no_grad():
        assert (policy.velocity(pair.noise, sigma, policy.encode(PROMPTS)) - start).abs().max() > 1e-3
        with policy.reference():
            assert torch.equal(policy.velocity(pair.noise, sigma, policy.encode(PROMPTS)), start)


def test_plain_diffusers_draws_with_the_saved_lora(trainable, tmp_path):
    bare = trainable.draw_plain()
    perturb(trainable.policy, 0.1)
    trainable.policy.save(tmp_path)
    trainable.plain.load_lora_weights(tmp_path)
    try:
        theirs = trainable.draw_plain()
    finally:
        trainable.plain.unload_lora_weights()
    assert (theirs - bare).abs().max() > 1e-2
    assert_close(trainable.family.pack(trainable.draw()), theirs, atol=1e-4, rtol=0)
    again = load(trainable.family, trainable.folder)
    again.load(tmp_path)
    assert not again.parameters()
    assert_close(trainable.draw(again), trainable.draw(), atol=1e-5, rtol=0)


def test_half_precision_stays_inside(pair):
    policy = load(pair.family, pair.folder, dtype="bfloat16")
    policy.add_lora(rank=4, alpha=8)
    path, log_probs = first_ratios(policy, pair.noise)
    assert policy.dtype == torch.bfloat16 and {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {path.latents.dtype, path.log_probs.dtype, path.clean.dtype, log_probs.dtype} == {torch.float32}
    assert torch.equal(log_probs, path.log_probs[:, :3])


def test_wrong_resolutions(pair):
    with pytest.raises(ValueError, match="model.resolution is 3; for this model it must be a multiple of"):
        load(pair.family, pair.folder, resolution=3)
