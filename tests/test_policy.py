import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch.testing import assert_close

from vgpo.flow import ode_sample
from vgpo.policy import Condition, SD3Policy, latent_size, load_pipeline
from vgpo.rollout import replay, rollout
from vgpo.sde import FlowSDE

PROMPTS = ["a photo of two red circles", 'a blue sign that says "CAT"']
SIGMA = torch.tensor(0.7)


@pytest.fixture(scope="module")
def plain(tiny_folder):
    "What a user without vgpo has."
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def noise():
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def draw(policy, noise, guidance_scale=1.0, steps=20):
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        return ode_sample(
            lambda x, sigma: policy.velocity(x, sigma, condition, guidance_scale), noise, policy.sigmas(steps)
        )


def draw_plain(pipe, noise, guidance_scale=1.0, **options):
    return pipe(
        PROMPTS,
        latents=noise,
        num_inference_steps=20,
        guidance_scale=guidance_scale,
        max_sequence_length=0,
        **options,
    ).images


def perturb(policy, size=0.05):
    g = torch.Generator().manual_seed(1)
    for p in policy.parameters():
        p.data.add_(size * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("guidance_scale", [0.5, 1.0, 4.5])
def test_the_deterministic_sampler_is_the_pipeline(policy, plain, noise, guidance_scale):
    ours = draw(policy, noise, guidance_scale)
    theirs = draw_plain(plain, noise, guidance_scale, output_type="latent")
    assert theirs.std() > 0.1
    assert_close(ours, theirs, atol=1e-4, rtol=0)
    saved = np.stack([np.asarray(image) for image in draw_plain(plain, noise, guidance_scale)])
    decoded = policy.decode(ours)
    assert decoded.dtype == np.uint8 and decoded.shape == (2, 32, 32, 3)
    assert np.abs(saved.astype(int) - decoded).max() <= 1


@pytest.mark.parametrize("length", [0, 5])
def test_prompts_and_one_velocity_are_the_pipelines(tiny_folder, plain, noise, length):
    policy = SD3Policy(load_pipeline(str(tiny_folder)), max_sequence_length=length)
    with torch.no_grad():
        text, _, pooled, _ = plain.encode_prompt(PROMPTS, PROMPTS, PROMPTS, max_sequence_length=length)
        velocity = plain.transformer(noise, text, pooled, torch.full((2,), 700.0), return_dict=False)[0]
        condition = policy.encode(PROMPTS)
        assert condition.text.shape == (2, 13 + length, 128)
        assert_close(condition.text, text, atol=1e-4, rtol=0)
        assert_close(condition.pooled, pooled, atol=1e-4, rtol=0)
        assert_close(policy.velocity(noise, SIGMA, condition), velocity, atol=1e-4, rtol=0)


def test_the_schedule_is_the_schedulers(policy):
    bend = lambda u: 3 * u / (1 + 2 * u)  # noqa: E731  the tiny world's shift is 3
    for steps in (2, 10, 40):
        wanted = torch.cat([bend(torch.linspace(1, bend(1 / 1000), steps)), torch.zeros(1)])
        assert_close(policy.sigmas(steps), wanted, atol=1e-6, rtol=0)
        assert policy.sigmas(steps).dtype == torch.float32


def test_each_prompt_is_encoded_once_and_forgotten_in_order(policy):
    calls = []
    policy.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    condition = policy.encode(["a", "b", "a"])
    assert len(calls) == 2 and torch.equal(condition.text[0], condition.text[2])
    policy.cache_size = 2
    policy.encode(["a"])  # now b is the one that was not used for longest
    policy.encode(["c"])
    assert len(calls) == 3 and list(policy.cache) == ["a", "c"]
    assert policy.encode(["d", "e", "f"]).text.shape[0] == 3  # more than the cache holds
    assert list(policy.cache) == ["e", "f"]


def test_condition_rows():
    condition = Condition(torch.arange(6.0).reshape(3, 2, 1), torch.arange(3.0).reshape(3, 1))
    assert condition[1:].pooled.tolist() == [[1.0], [2.0]] and condition[1:].text.shape == (2, 2, 1)
    assert condition[:1].expand(4).text.shape == (4, 2, 1)


def test_lora_starts_as_the_identity_and_is_all_that_learns(policy, noise):
    condition = policy.encode(PROMPTS)
    before = policy.velocity(noise, SIGMA, condition)
    rng = torch.get_rng_state()
    policy.add_lora(rank=4, alpha=8)
    assert torch.equal(rng, torch.get_rng_state())
    velocity = policy.velocity(noise, SIGMA, condition)
    assert torch.equal(velocity, before)
    velocity.square().mean().backward()
    learning = {name for name, p in policy.network.named_parameters() if p.grad is not None}
    assert learning and all(".lora_A." in name or ".lora_B." in name for name in learning)
    assert len(learning) == len(policy.parameters())
    perturb(policy)
    with torch.no_grad():
        assert (policy.velocity(noise, SIGMA, condition) - before).abs().max() > 1e-2
        with policy.reference():
            assert torch.equal(policy.velocity(noise, SIGMA, condition), before)
        assert (policy.velocity(noise, SIGMA, condition) - before).abs().max() > 1e-2  # and on again


def test_adapters_come_back_on_after_an_error(policy, noise):
    policy.add_lora(rank=4, alpha=8)
    perturb(policy)
    trained = policy.velocity(noise, SIGMA, policy.encode(PROMPTS)).detach()
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(policy.velocity(noise, SIGMA, policy.encode(PROMPTS)), trained)


def test_the_seed_decides_the_adapters(tiny_folder):
    def adapters(seed):
        policy = SD3Policy(load_pipeline(str(tiny_folder)), max_sequence_length=0)
        policy.add_lora(rank=4, alpha=8, seed=seed)
        return torch.cat([p.flatten() for p in policy.parameters()])

    assert torch.equal(adapters(0), adapters(0)) and not torch.equal(adapters(0), adapters(1))


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 16), (8, 2)])
def test_a_saved_lora_draws_the_same_in_plain_diffusers(policy, plain, noise, tmp_path, rank, alpha):
    policy.add_lora(rank=rank, alpha=alpha)
    perturb(policy)
    policy.save(tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]
    bare = draw_plain(plain, noise, output_type="latent")
    plain.load_lora_weights(tmp_path)
    try:
        theirs = draw_plain(plain, noise, output_type="latent")
    finally:
        plain.unload_lora_weights()
    assert (theirs - bare).abs().max() > 1e-2
    assert_close(draw(policy, noise), theirs, atol=1e-4, rtol=0)


def test_no_reference_and_nothing_to_save_without_lora(policy, noise, tmp_path):
    with policy.reference():  # nothing is trained: the model is its own reference
        policy.velocity(noise, SIGMA, policy.encode(PROMPTS))
    with pytest.raises(ValueError, match="no LoRA.*add_lora"):
        policy.save(tmp_path)
    policy.full_finetune()
    assert len(policy.parameters()) == len(list(policy.network.parameters()))
    with pytest.raises(ValueError, match="no LoRA.*add_lora"), policy.reference():
        pass


def test_guidance_is_a_constant_for_the_gradient(policy, noise):
    policy.add_lora(rank=4, alpha=8)
    perturb(policy)

    def gradient(velocity):
        return torch.cat([g.flatten() for g in torch.autograd.grad(velocity.mul(noise).sum(), policy.parameters())])

    condition, empty = policy.encode(PROMPTS), policy.encode([""]).expand(2)
    conditional, unconditional = (policy.predict(noise, SIGMA, c) for c in (condition, empty))
    guided = policy.velocity(noise, SIGMA, condition, 3.0)
    assert_close(guided, unconditional + 3 * (conditional - unconditional))
    ours, g_c, g_u = gradient(guided), gradient(conditional), gradient(unconditional)
    scale = g_c.abs().max().item()
    assert_close(ours, 3 * g_c, rtol=1e-3, atol=1e-4 * scale)
    assert (ours - (3 * g_c - 2 * g_u)).abs().max() > 1e-2 * scale  # which it would be with both branches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_the_first_ratio(tiny_folder, dtype):
    policy = SD3Policy(load_pipeline(str(tiny_folder), dtype), max_sequence_length=0)
    policy.add_lora(rank=4, alpha=8)
    assert policy.pipe.transformer.dtype == dtype and {p.dtype for p in policy.parameters()} == {torch.float32}
    noise, sampler = torch.randn(2, 5, 8, 8, 8, generator=torch.Generator().manual_seed(0)), FlowSDE(0.7)
    condition = policy.encode(PROMPTS)

    def velocity(x, sigma):
        return policy.velocity(x, sigma, condition)

    path = rollout(velocity, noise[:, 0], policy.sigmas(4), sampler, noise[:, 1:], sde_steps=3)
    assert {path.latents.dtype, path.log_probs.dtype, path.clean.dtype} == {torch.float32}
    for j in range(3):
        log_prob = replay(velocity, path, j, sampler).log_prob(path.latents[:, j + 1])
        assert log_prob.requires_grad and torch.equal(log_prob, path.log_probs[:, j])


def test_checkpointing_leaves_the_gradient(policy, noise):
    policy.add_lora(rank=4, alpha=8)
    perturb(policy)
    entered = []
    policy.network.transformer_blocks[0].register_forward_pre_hook(lambda *_: entered.append(1))

    def gradients():
        entered.clear()
        policy.network.zero_grad()
        policy.velocity(noise, SIGMA, policy.encode(PROMPTS)).square().mean().backward()
        return [p.grad.clone() for p in policy.parameters()]

    kept = gradients()
    assert len(entered) == 1
    policy.network.enable_gradient_checkpointing()
    for a, b in zip(gradients(), kept, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert len(entered) == 2  # the block was computed again


def test_resolutions(tiny_folder):
    pipe = load_pipeline(str(tiny_folder))
    assert latent_size(pipe) == latent_size(pipe, 32) == 8 and latent_size(pipe, 16) == 4
    assert SD3Policy(pipe, resolution=16).latent_shape == (8, 4, 4)
    for wrong in (30, 40, 0, -8):
        with pytest.raises(ValueError, match=f"model.resolution is {wrong}; .* multiple of 8 up to 32"):
            latent_size(pipe, wrong)


def test_what_is_no_pipeline(tiny_folder, tmp_path):
    for wrong in (tmp_path, tmp_path / "nowhere", "a mistyped name"):
        with pytest.raises(FileNotFoundError, match="holds no pipeline.*check model.path"):
            load_pipeline(str(wrong))


@pytest.mark.parametrize("part", ["model_index.json", "transformer/config.json", "transformer", "text_encoder"])
def test_damaged_pipelines(tiny_folder, tmp_path, part):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    if (folder / part).is_dir():
        (weights,) = (folder / part).glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        (folder / part).write_text((folder / part).read_text()[:40])
    with pytest.raises(OSError, match="cannot load the pipeline .*, check model.path") as caught:
        load_pipeline(str(folder))
    assert "\n" not in str(caught.value)


def test_the_saved_pipeline_is_plain(tiny_folder):
    parts = {n: p for n, p in json.loads((tiny_folder / "model_index.json").read_text()).items() if isinstance(p, list)}
    assert {library for library, _ in parts.values()} <= {"diffusers", "transformers", None}
    files = {p.suffix for p in Path(tiny_folder).rglob("*") if p.is_file()}
    assert files <= {".json", ".safetensors", ".txt"}  # nothing unpickles
