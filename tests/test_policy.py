import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from tiny_pipelines import tiny_sd3
from torch.testing import assert_close

from vgpo.config import parse_config
from vgpo.evaluation.images import generate_images
from vgpo.flow import ode_sample
from vgpo.open_run import load_run
from vgpo.policies.base import load_policy, meta_policy
from vgpo.policies.embeds import EmbeddingCache, PromptEmbeds, PromptEncoder, collate
from vgpo.policies.loading import LatentSpec, ModelConfig, latent_side, load_pipeline, networks, pipeline_errors
from vgpo.policies.sd3 import SD3Policy
from vgpo.rollout import replay, rollout
from vgpo.runs.session import Session, needed_prompts
from vgpo.sde import FlowSDE
from vgpo.train import start
from vgpo.world.pretrain import make_autoencoder

PROMPTS = ["a photo of two red circles", 'a blue sign that says "CAT"']
SIGMA = torch.tensor(0.7)
STEPS = 6  # of whole images


@pytest.fixture(scope="module")
def plain(tiny_folder):
    "What a user without vgpo has."
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def noise():
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def draw(policy, noise, guidance_scale=1.0, steps=STEPS):
    embeds = policy.encode(PROMPTS)
    with torch.no_grad():
        return ode_sample(
            lambda x, sigma: policy.velocity(x, sigma, embeds, guidance_scale), noise, policy.sigmas(steps)
        )


def draw_plain(pipe, noise, guidance_scale=1.0, **options):
    return pipe(
        PROMPTS,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        max_sequence_length=0,
        **options,
    ).images


def perturb(policy, size=0.05):
    g = torch.Generator().manual_seed(1)
    for p in policy.parameters():
        p.data.add_(size * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("guidance_scale", [0.5, 4.5])
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
    policy = SD3Policy(load_pipeline(tiny_folder), ModelConfig(max_sequence_length=length))
    with torch.no_grad():
        text, _, pooled, _ = plain.encode_prompt(PROMPTS, PROMPTS, PROMPTS, max_sequence_length=length)
        velocity = plain.transformer(noise, text, pooled, torch.full((2,), 700.0), return_dict=False)[0]
        embeds = policy.encode(PROMPTS)
        assert embeds.text.shape == (2, 13 + length, 128)
        assert_close(embeds.text, text, atol=1e-4, rtol=0)
        assert_close(embeds.pooled, pooled, atol=1e-4, rtol=0)
        assert_close(policy.velocity(noise, SIGMA, embeds), velocity, atol=1e-4, rtol=0)


def test_the_schedule_is_the_schedulers(policy):
    bend = lambda u: 3 * u / (1 + 2 * u)  # noqa: E731  the tiny world's shift is 3
    for steps in (2, 10, 40):
        wanted = torch.cat([bend(torch.linspace(1, bend(1 / 1000), steps)), torch.zeros(1)])
        assert_close(policy.sigmas(steps), wanted, atol=1e-6, rtol=0)
        assert policy.sigmas(steps).dtype == torch.float32


def test_each_prompt_is_encoded_once_and_forgotten_in_order(policy):
    calls = []
    policy.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    embeds = policy.encode(["a", "b", "a"])
    assert len(calls) == 2 and torch.equal(embeds.text[0], embeds.text[2])
    encoded = []
    encoder = PromptEncoder(lambda prompt: encoded.append(prompt) or PromptEmbeds(torch.rand(1, 2, 3)), cache_size=2)
    for prompts in (["a", "b", "a"], ["a"], ["c"], ["a", "c"]):  # when c comes, b was not used for longest
        encoder(prompts)
    assert encoded == ["a", "b", "c"]
    assert encoder(["d", "e", "f"]).text.shape[0] == 3  # more than the cache holds
    encoder(["e", "f"])
    assert encoded == ["a", "b", "c", "d", "e", "f"]


def test_rows_of_embeds():
    embeds = PromptEmbeds(torch.arange(6.0).reshape(3, 2, 1), torch.arange(3.0).reshape(3, 1))
    assert embeds[1:].pooled.tolist() == [[1.0], [2.0]] and embeds[1:].text.shape == (2, 2, 1)
    assert embeds[:1].expand(4).text.shape == (4, 2, 1) and embeds.mask is None
    masked = PromptEmbeds(torch.ones(2, 3, 1), mask=torch.tensor([[True, True, False], [True] * 3]))
    assert masked[1:].pooled is None and masked[[1]].mask.tolist() == [[True] * 3]
    half = masked.expand(2).to(torch.bfloat16)
    assert half.text.dtype == torch.bfloat16 and half.mask.dtype == torch.bool


def test_texts_of_different_lengths_are_padded_at_the_end():
    short, long = (PromptEmbeds(torch.ones(1, n, 2), mask=torch.ones(1, n, dtype=torch.bool)) for n in (2, 4))
    both = collate([short, long])
    assert both.text.sum((1, 2)).tolist() == [4, 8] and both.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert not both.text[0, 2:].any() and collate([short, short]).text.shape == (2, 2, 2)
    assert collate([long, long]).mask is None and collate([short]).mask is None  # which nobody needs
    already = PromptEmbeds(torch.ones(1, 4, 2), mask=torch.tensor([[True, True, True, False]]))
    assert torch.equal(collate([already, long]).mask, torch.cat([already.mask, long.mask]))
    with pytest.raises(ValueError, match="texts of different lengths need a mask"):
        collate([PromptEmbeds(torch.ones(1, 2, 2)), long])


def test_lora_starts_as_the_identity_and_is_all_that_learns(policy, noise):
    embeds = policy.encode(PROMPTS)
    before = policy.velocity(noise, SIGMA, embeds)
    rng = torch.get_rng_state()
    policy.add_lora(rank=4, alpha=8)
    assert torch.equal(rng, torch.get_rng_state())
    velocity = policy.velocity(noise, SIGMA, embeds)
    assert torch.equal(velocity, before)
    velocity.square().mean().backward()
    learning = {name for name, p in policy.network.named_parameters() if p.grad is not None}
    assert learning and all(".lora_A." in name or ".lora_B." in name for name in learning)
    assert len(learning) == len(policy.parameters())
    perturb(policy)
    with torch.no_grad():
        assert (policy.velocity(noise, SIGMA, embeds) - before).abs().max() > 1e-2
        with policy.reference():
            assert torch.equal(policy.velocity(noise, SIGMA, embeds), before)
        assert (policy.velocity(noise, SIGMA, embeds) - before).abs().max() > 1e-2  # and on again


def test_adapters_come_back_on_after_an_error(policy, noise):
    policy.add_lora(rank=4, alpha=8)
    perturb(policy)
    trained = policy.velocity(noise, SIGMA, policy.encode(PROMPTS)).detach()
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(policy.velocity(noise, SIGMA, policy.encode(PROMPTS)), trained)


def test_the_seed_decides_the_adapters(tiny_folder):
    def adapters(seed):
        policy = SD3Policy(load_pipeline(tiny_folder))
        policy.add_lora(rank=4, alpha=8, seed=seed)
        return torch.cat([p.flatten() for p in policy.parameters()])

    assert torch.equal(adapters(0), adapters(0)) and not torch.equal(adapters(0), adapters(1))


@pytest.mark.parametrize(("rank", "alpha"), [(4, 16), (8, 2)])
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


SAVE = """
import sys, torch
from vgpo.policies.base import load_policy
from vgpo.policies.loading import ModelConfig
policy = load_policy(ModelConfig(sys.argv[1]))
policy.add_lora(rank=2, alpha=4, targets=["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj"])
for i in range(4): policy.save(f"{sys.argv[2]}/{i}")
"""


def test_equal_loras_are_equal_files_whatever_the_hash_seed(tiny_folder, tmp_path):
    "The writer's own order of the metadata changes from call to call, so one pair of files might agree by luck."
    for seed in ("0", "1"):
        command = [sys.executable, "-c", SAVE, str(tiny_folder), str(tmp_path / seed)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": seed})
    files = [file.read_bytes() for file in tmp_path.rglob("*.safetensors")]
    assert len(files) == 8 and len(set(files)) == 1
    with safe_open(next(tmp_path.rglob("*.safetensors")), "pt") as f:  # still a valid file, with all its metadata
        metadata = json.loads(f.metadata()["lora_adapter_metadata"])
        assert f.metadata()["format"] == "pt" and metadata["transformer.lora_alpha"] == 4 and len(list(f.keys())) > 8


def test_no_reference_and_nothing_to_save_without_lora(policy, noise, tmp_path):
    with policy.reference():  # nothing is trained: the model is its own reference
        policy.velocity(noise, SIGMA, policy.encode(PROMPTS))
    with pytest.raises(ValueError, match="no LoRA.*add_lora"):
        policy.save(tmp_path)


def test_guidance_is_a_constant_for_the_gradient(policy, noise):
    policy.add_lora(rank=4, alpha=8)
    perturb(policy)

    def gradient(velocity):
        return torch.cat([g.flatten() for g in torch.autograd.grad(velocity.mul(noise).sum(), policy.parameters())])

    embeds, empty = policy.encode(PROMPTS), policy.encode([""]).expand(2)
    conditional, unconditional = (policy.predict(noise, SIGMA, c) for c in (embeds, empty))
    guided = policy.velocity(noise, SIGMA, embeds, 3.0)
    assert_close(guided, unconditional + 3 * (conditional - unconditional))
    ours, g_c, g_u = gradient(guided), gradient(conditional), gradient(unconditional)
    scale = g_c.abs().max().item()
    assert_close(ours, 3 * g_c, rtol=1e-3, atol=1e-4 * scale)
    assert (ours - (3 * g_c - 2 * g_u)).abs().max() > 1e-2 * scale  # which it would be with both branches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_the_first_ratio(tiny_folder, dtype):
    policy = SD3Policy(load_pipeline(tiny_folder, dtype))
    policy.add_lora(rank=4, alpha=8)
    assert policy.pipe.transformer.dtype == dtype and {p.dtype for p in policy.parameters()} == {torch.float32}
    noise, sampler = torch.randn(2, 5, 8, 8, 8, generator=torch.Generator().manual_seed(0)), FlowSDE(0.7)
    embeds = policy.encode(PROMPTS)

    def velocity(x, sigma):
        return policy.velocity(x, sigma, embeds)

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
    pipe = load_pipeline(tiny_folder)
    assert SD3Policy(pipe).latent_spec() == LatentSpec(channels=8, patch=2, side=8, largest=8)
    assert SD3Policy(pipe).latent_shape == SD3Policy(pipe, ModelConfig(resolution=32)).latent_shape == (8, 8, 8)
    assert (
        SD3Policy(pipe, ModelConfig(resolution=16)).latent_shape == (8, 4, 4)
        and SD3Policy(pipe, ModelConfig(resolution=16)).image_tokens == 4
    )
    for wrong in (30, 40):
        with pytest.raises(ValueError, match=f"model.resolution is {wrong}; .* multiple of 8 up to 32"):
            SD3Policy(pipe, ModelConfig(resolution=wrong))
    for wrong in (0, -8):
        with pytest.raises(ValueError, match=f"resolution is {wrong}; it must be a number v with v>0"):
            ModelConfig(resolution=wrong)
    unbounded = LatentSpec(channels=16, patch=2, side=128)
    assert latent_side(unbounded, 8) == 128 and latent_side(unbounded, 8, 4096) == 512
    with pytest.raises(ValueError, match="model.resolution is 0; .* multiple of 16 from 16"):
        latent_side(unbounded, 8, 0)


def refused(kind, status):
    "An error of the hub's client, as for an answer with that status."
    from httpx import Request, Response

    return kind("no access", response=Response(status, request=Request("GET", "https://huggingface.co")))


HUB_ERRORS = {
    "gated": (refused(GatedRepoError, 403), "gated: accept its licence at https://huggingface.co/some/model, .*login"),
    "unknown": (refused(RepositoryNotFoundError, 401), "no such model, or it is private: check the name some/model"),
    "not cached": (LocalEntryNotFoundError("not on the disk"), "not in the cache here, and the hub is out of reach"),
    "offline": (OfflineModeIsEnabled("offline"), "check the network and HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize("error", HUB_ERRORS)
def test_errors_of_the_hub_say_what_to_do(tiny_folder, monkeypatch, error):
    raised, message = HUB_ERRORS[error]

    def download(*_, **options):
        raise raised

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", download)
    for load, option in (
        (lambda: load_policy(ModelConfig("some/model")), "model.path"),
        (lambda: load_policy(ModelConfig(str(tiny_folder), tiny_vae="some/model")), "model.tiny_vae"),
    ):
        with pytest.raises(OSError, match=f"^cannot load the pipeline some/model, check {option}: .*{message}") as e:
            load()
        assert "\n" not in str(e.value) and "model_index.json" not in str(e.value)


def test_hub_hints_are_for_errors_of_the_hub(tiny_folder, monkeypatch):
    with pytest.raises(OSError, match="check model.path: the disk is on fire"), pipeline_errors("some/model"):
        raise OSError("the disk\nis on fire")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the real client, told not to ask anybody
    with pytest.raises(OSError, match="some/model, check model.path: it is not in the cache here"):
        load_policy(ModelConfig("some/model"))


def test_what_is_no_pipeline(tiny_folder, tmp_path):
    for wrong in (tmp_path, tmp_path / "nowhere", "a mistyped name"):
        with pytest.raises(FileNotFoundError, match="holds no pipeline.*check model.path"):
            load_pipeline(str(wrong))


def test_a_pipeline_of_another_kind(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(
        ValueError,
        match="is a StableDiffusionPipeline; model.path must be one of FluxPipeline, QwenImagePipeline, Stable",
    ):
        load_policy(ModelConfig(str(tmp_path)))


def test_pickled_weights_are_not_read(tiny_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    torch.save(load_pipeline(tiny_folder).transformer.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="cannot load the pipeline"):
        load_pipeline(str(folder))


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


# What is trained


def test_targets_that_no_layer_has(policy):
    with pytest.raises(ValueError, match="model.lora_targets has 'attn.to_w', but no layer's name ends in it"):
        policy.add_lora(targets=["attn.to_q", "attn.to_w"])


def test_the_second_attention_is_adapted_when_asked_for():
    def adapted(targets):
        policy = SD3Policy(tiny_sd3(dual_attention_layers=(0,)))
        policy.add_lora(rank=2, targets=targets)
        return {name.split(".lora_")[0] for name, _ in policy.network.named_parameters() if ".lora_" in name}

    default, more = adapted(None), adapted([*SD3Policy.targets, "attn2.to_q"])
    assert len(default) == 3 * 8 - 1 and not any("attn2" in name for name in default)  # the last block returns no text
    assert more - default == {"transformer_blocks.0.attn2.to_q"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights(tiny_folder, plain, noise, tmp_path, dtype):
    policy = load_policy(ModelConfig(str(tiny_folder), dtype=dtype))
    embeds = policy.encode(PROMPTS)
    before = policy.velocity(noise, SIGMA, embeds)
    policy.full_finetune()
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert len(policy.parameters()) == len(list(policy.network.parameters()))
    velocity = policy.velocity(noise, SIGMA, embeds)
    # float32 weights that hold half-precision values, under autocast: the same up to rounding, and exact in float32
    assert_close(velocity, before, atol=0 if dtype == "float32" else 0.05 * before.std().item(), rtol=0)
    velocity.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.parameters())
    perturb(policy, 0.01)
    with torch.no_grad():
        trained = policy.velocity(noise, SIGMA, embeds)
        with policy.reference():
            assert torch.equal(policy.velocity(noise, SIGMA, embeds), velocity)
        assert torch.equal(policy.velocity(noise, SIGMA, embeds), trained) and (trained - velocity).abs().max() > 0.05
    policy.save(tmp_path / "full")
    again = load_policy(ModelConfig(str(tiny_folder), dtype=dtype))
    again.load(tmp_path / "full")
    assert not again.parameters()
    assert torch.equal(again.velocity(noise, SIGMA, embeds), trained)
    if dtype == "float32":
        theirs = StableDiffusion3Pipeline.from_pretrained(
            tiny_folder, transformer=type(policy.network).from_pretrained(tmp_path / "full"),
            text_encoder_3=None, tokenizer_3=None)  # fmt: skip
        theirs.set_progress_bar_config(disable=True)
        assert_close(draw(policy, noise), draw_plain(theirs, noise, output_type="latent"), atol=1e-4, rtol=0)


def test_the_weights_come_back_after_an_error(policy):
    policy.full_finetune()
    perturb(policy)
    trained = [p.clone() for p in policy.parameters()]
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(trained, policy.parameters(), strict=True))


# Memory


def count_encodings(policy):
    calls = []
    policy.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_embeddings_on_the_disk(tiny_folder, tmp_path):
    first = load_policy(ModelConfig(str(tiny_folder), embedding_cache=str(tmp_path)))
    wanted, calls = first.encode(PROMPTS), count_encodings(first)
    assert len(list(tmp_path.iterdir())) == 2 and {f.suffix for f in tmp_path.iterdir()} == {".safetensors"}
    assert first.encode(PROMPTS) and not calls
    second = load_policy(ModelConfig(str(tiny_folder), embedding_cache=str(tmp_path)))
    second.encoder.remember(1)
    calls = count_encodings(second)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(tuple(second.encode(PROMPTS))[:2], tuple(wanted)[:2], strict=True))
    assert not calls
    for changed in ({"max_sequence_length": 4}, {"dtype": "bfloat16"}):
        other = load_policy(ModelConfig(str(tiny_folder), embedding_cache=str(tmp_path), **changed))
        calls = count_encodings(other)
        other.encode(PROMPTS[:1])
        assert len(calls) == 1, changed


def test_a_damaged_file_of_the_disk_cache_is_named(tmp_path):
    cache = EmbeddingCache(tmp_path / "new", "model", None)
    assert cache.get("a") is None
    embeds = PromptEmbeds(torch.rand(1, 2, 3), mask=torch.tensor([[True, False]]))
    cache.put("a", embeds)
    found = cache.get("a")
    assert torch.equal(found.text, embeds.text) and found.pooled is None and torch.equal(found.mask, embeds.mask)
    assert [f.name for f in (tmp_path / "new").iterdir()] == [cache.file("a").name]
    cache.file("a").write_bytes(b"half a file")
    with pytest.raises(OSError, match=f"{cache.file('a').name} is damaged .*; delete it"):
        cache.get("a")


@pytest.mark.parametrize("cached", [False, True])
def test_freed_text_encoders(tiny_folder, noise, tmp_path, cached):
    kept, folder = load_policy(ModelConfig(str(tiny_folder))), str(tmp_path) if cached else None
    policy = load_policy(ModelConfig(str(tiny_folder), precompute_text_embeds=True, embedding_cache=folder))
    policy.encoder.remember(1)
    assert policy.pipe.text_encoder is not None
    policy.precompute(PROMPTS)
    assert policy.pipe.text_encoder is None and policy.pipe.text_encoder_2 is None
    assert not any("text_encoder" in name for name, part in policy.pipe.components.items() if part is not None)
    assert_close(draw(policy, noise, 3.0), draw(kept, noise, 3.0), atol=0, rtol=0)  # guidance needs the empty prompt
    with pytest.raises(ValueError, match="'new' was not encoded before the text encoders were freed.*announce it"):
        policy.encode(["new"])
    policy.precompute(["new"])  # too late, and nothing happens


def test_the_prompts_that_a_run_needs():
    config = parse_config(
        ["--epochs", "3", "--rollout.prompts_per_epoch", "2", "--seed", "5", "--optim.num_minibatches", "1"]
    )
    rows, test = [{"prompt": f"p{i}"} for i in range(50)], [{"prompt": "held out"}, {"prompt": "p1"}]
    from vgpo.noise import epoch_prompts

    wanted = {f"p{i}" for epoch in range(3) for i in epoch_prompts(50, 2, 5, epoch)} | {"held out", "p1", ""}
    prompts = needed_prompts(config, rows, test)
    assert set(prompts) == wanted and len(prompts) == len(wanted)


def test_the_tiny_vae_decodes_what_comes_before_the_last_step(tiny_folder, policy, tmp_path):
    torch.manual_seed(1)
    make_autoencoder().save_pretrained(tmp_path)
    previewing = load_policy(ModelConfig(str(tiny_folder), tiny_vae=str(tmp_path)))
    assert not any(p.requires_grad for p in previewing.tiny_vae.parameters()) and not previewing.tiny_vae.training
    clean = torch.randn(2, 3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    full, mixed = (p.decode_steps(clean, 4).reshape(2, 3, 32, 32, 3) for p in (policy, previewing))
    assert np.array_equal(full.reshape(-1, 32, 32, 3), policy.decode(clean.flatten(0, 1)))
    assert np.array_equal(mixed[:, -1], full[:, -1]) and not np.array_equal(mixed[:, 0], full[:, 0])
    assert np.array_equal(previewing.decode_steps(clean[:, -1:], 4), policy.decode(clean[:, -1]))
    previewing.pipe.vae = previewing.tiny_vae  # made for the latents as they are: its config says scale 1 and shift 0
    assert np.array_equal(mixed[:, :-1].reshape(-1, 32, 32, 3), previewing.decode(clean[:, :-1].flatten(0, 1)))


def test_a_tiny_vae_for_other_latents(tiny_folder, tmp_path):
    make_autoencoder(latent_channels=4).save_pretrained(tmp_path / "taesd")
    with pytest.raises(
        ValueError, match="model.tiny_vae decodes latents of 4 channels to 4 pixels per side; this model's have 8"
    ):
        load_policy(ModelConfig(str(tiny_folder), tiny_vae=str(tmp_path / "taesd")))
    with pytest.raises(OSError, match="check model.tiny_vae"):
        load_policy(ModelConfig(str(tiny_folder), tiny_vae=str(tmp_path / "nothing")))


def test_slices_and_tiles(tmp_path):
    tiny_sd3().save_pretrained(tmp_path)
    settings = dict(resolution=24, max_sequence_length=4)
    full, sliced, tiled = (load_policy(ModelConfig(str(tmp_path), **settings, **more))
                            for more in ({}, {"vae_slicing": True}, {"vae_tiling": True}))  # fmt: skip
    latents, shapes = torch.randn(3, *full.latent_shape, generator=torch.Generator().manual_seed(0)), []
    for policy in (full, sliced, tiled):
        policy.pipe.vae.decoder.register_forward_pre_hook(lambda _, x: shapes.append(tuple(x[0].shape)))
    images = full.decode(latents)
    assert shapes == [(3, 4, 12, 12)] and images.shape == (3, 24, 24, 3)
    assert np.array_equal(full.decode(latents, batch_size=2), images) and shapes[1:] == [
        (2, 4, 12, 12),
        (1, 4, 12, 12),
    ]
    shapes.clear()
    assert np.abs(sliced.decode(latents).astype(int) - images).max() <= 1 and shapes == [(1, 4, 12, 12)] * 3
    shapes.clear()
    in_tiles = tiled.decode(latents)
    assert in_tiles.shape == images.shape and all(shape[-1] <= 8 for shape in shapes) and len(shapes) > 1


def test_an_autoencoder_that_cannot_be_tiled(tiny_folder):
    with pytest.raises(ValueError, match="model.vae_tiling is true, but .*; set it to false"):
        load_policy(ModelConfig(str(tiny_folder), vae_tiling=True))


def test_one_code_path_with_and_without_weights(tiny_folder, tmp_path):
    "On the meta device a policy has the shapes of the real one, and is refused for the same reasons."
    make_autoencoder().save_pretrained(tmp_path / "good")
    make_autoencoder(latent_channels=4).save_pretrained(tmp_path / "wrong")
    for rank in (4, 0):
        model = ModelConfig(str(tiny_folder), resolution=16, lora_rank=rank, tiny_vae=str(tmp_path / "good"))
        real, meta = load_policy(model), meta_policy(model)
        real.make_trainable(model)
        assert real.latent_shape == meta.latent_shape and len(real.tiny_vae.state_dict()) == len(
            meta.tiny_vae.state_dict()
        )
        assert [p.shape for p in real.parameters()] == [p.shape for p in meta.parameters()]
        assert all(p.is_meta for part in networks(meta.pipe).values() for p in part.parameters())
    for wrong, message in (
        ({"resolution": 30}, "model.resolution is 30"),
        ({"max_sequence_length": 513}, "model.max_sequence_length is 513"),
        ({"vae_tiling": True}, "model.vae_tiling is true"),
        ({"tiny_vae": str(tmp_path / "wrong")}, "model.tiny_vae decodes latents of 4 channels"),
        ({"lora_targets": ["attn.to_w"]}, "model.lora_targets has 'attn.to_w'"),
    ):
        model = ModelConfig(str(tiny_folder), **wrong)
        for load in (lambda m: load_policy(m).make_trainable(m), meta_policy):
            with pytest.raises(ValueError, match=message):
                load(model)


def test_sharding_needs_a_dtype_that_needs_no_scale():
    with pytest.raises(ValueError, match="model.fsdp is full_shard, .*: change model.dtype, or set model.fsdp to off"):
        ModelConfig(dtype="float16", fsdp="full_shard")


def test_numbers_of_tokens(tiny_folder):
    with pytest.raises(ValueError, match="model.max_sequence_length is 513; .* must lie in 0 to 512"):
        load_policy(ModelConfig(str(tiny_folder), max_sequence_length=513))
    assert SD3Policy(tiny_sd3()).max_sequence_length == 256  # with T5
    assert load_policy(ModelConfig(str(tiny_folder))).max_sequence_length == 0


# Runs


SMALL = [
    *("--rollout.prompts_per_epoch=2", "--rollout.group_size=2", "--rollout.num_inference_steps=3"),
    *("--rollout.micro_batch_size=2", "--window.size=2", "--credit.num_scored_steps=3", "--credit.anchor_steps=2"),
    *("--evaluation.num_samples=2", "--evaluation.num_inference_steps=2", "--reward=tiny_rewards:brightness"),
    *("--log_images_every=100", "--optim.lr=1e-3", "--optim.num_minibatches=2", "--epochs=1", "--save_every=1"),
    *("--rollout.guidance_scale=2", "--objective.guidance_scale=2"),
]


@pytest.fixture
def no_figures(monkeypatch):
    "Runs without their figures, which take longer than these runs."
    monkeypatch.setattr("vgpo.runs.callbacks.SaveImages.after_epoch", lambda *_: None)
    monkeypatch.setattr(Session, "report", lambda *_: None)


def test_memory_options_do_not_change_a_run(tiny_folder, tmp_path, no_figures):
    options = [*SMALL, f"--model.path={tiny_folder}", f"--output_dir={tmp_path}"]
    saving = [*options, "--model.precompute_text_embeds=true", f"--model.embedding_cache={tmp_path / 'cache'}"]
    measured = []
    for arguments in (options, saving, saving):
        session = start(arguments)
        metrics = session.trainer.train_epoch()
        measured.append({k: v for k, v in metrics.items() if not k.startswith(("time/", "samples_per_second"))})
    assert measured[0] == measured[1] == measured[2] and session.trainer.policy.pipe.text_encoder is None
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == len(needed_prompts(session.config, session.trainer.rows, session.test))


def test_a_run_of_all_weights(tiny_folder, tmp_path, no_figures):
    options = [*SMALL, f"--model.path={tiny_folder}", f"--output_dir={tmp_path}", "--model.lora_rank=0"]
    session = start(options)
    session.run()
    folder, trainer = session.folder, session.trainer
    assert (folder / "transformer").is_dir() and not (folder / "lora").exists()
    policy, _ = load_run(folder)
    with trainer.averaged():
        trained = [p.detach().clone() for p in trainer.policy.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(policy.network.parameters(), trained, strict=True))
    assert not policy.parameters() and any(
        not torch.equal(a, b) for a, b in zip(trained, trainer.policy.reference_weights, strict=True)
    )
    session.lock.release()
    resumed = start(["--resume", str(folder)])
    assert np.array_equal(resumed.evaluate_before().images, session.before.images)
    with pytest.raises(ValueError, match="with model.lora_rank 0 there is no second set of weights"):
        parse_config([*options, "--objective.beta=0.1"])


def test_evaluation_with_freed_encoders(tiny_folder, noise):
    policy = load_policy(ModelConfig(str(tiny_folder), precompute_text_embeds=True))
    images = generate_images(policy, PROMPTS, noise, num_inference_steps=2)
    assert policy.pipe.text_encoder is None
    assert np.array_equal(
        images, generate_images(load_policy(ModelConfig(str(tiny_folder))), PROMPTS, noise, num_inference_steps=2)
    )
