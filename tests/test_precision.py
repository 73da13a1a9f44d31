"What half precision does to ratio and gradient, and what options save, on the random pipeline."

import math

import pytest
import torch
from tiny_pipelines import tiny_sd3
from torch.testing import assert_close

from vgpo.losses import RATIO_TOLERANCE
from vgpo.objectives.awm import VGRPO
from vgpo.objectives.nft import NFT
from vgpo.policies.base import load_policy
from vgpo.policies.loading import ModelConfig, networks
from vgpo.policies.sd3 import SD3Policy
from vgpo.rollout import replay, rollout
from vgpo.sde import FlowSDE
from vgpo.trainer import MicroBatch

PROMPTS = ["a photo of two red circles", 'a blue sign that says "CAT"']
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOISE = torch.randn(2, 5, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def with_lora(policy):
    "The policy with a LoRA, as if trained a little."
    policy.add_lora(rank=4, alpha=8)
    g = torch.Generator().manual_seed(1)
    for p in policy.parameters():
        p.data.add_(0.02 * torch.randn(p.shape, generator=g))
    return policy


def trained(folder, dtype):
    return with_lora(load_policy(ModelConfig(str(folder), dtype=dtype)))


@pytest.fixture(scope="module")
def policies(tiny_folder):
    return {name: trained(tiny_folder, name) for name in DTYPES}


def velocity_of(policy):
    embeds = policy.encode(PROMPTS)
    return lambda x, sigma: policy.velocity(x, sigma, embeds)


def ratio_error(sampled_by, replayed_by, noise, sigmas, sampler, steps):
    "Mean |ratio - 1| of each of the first steps, between two velocity functions before any update."
    path = rollout(sampled_by, noise[:, 0], sigmas, sampler, noise[:, 1:], sde_steps=steps)
    log_probs = [replay(replayed_by, path, j, sampler).log_prob(path.latents[:, j + 1]) for j in range(steps)]
    return ((torch.stack(log_probs, 1).detach() - path.log_probs[:, :steps]).exp() - 1).abs().mean(0)


def error(policies, a, b):
    sigmas = policies["float32"].sigmas(4)
    return ratio_error(velocity_of(policies[a]), velocity_of(policies[b]), NOISE, sigmas, FlowSDE(0.7), 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_batches_keep_the_ratio(policies, dtype):
    assert error(policies, dtype, dtype).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trainers_tolerance_is_below_mistakes_at_the_size_of_sd35(dtype):
    "The larger the latents, the smaller a mistake looks: its error is averaged over their dimensions."
    pipe = tiny_sd3(sample_size=64, in_channels=16, out_channels=16, pos_embed_max_size=32, num_layers=2)
    policy = with_lora(SD3Policy(pipe.to(DTYPES[dtype]), ModelConfig(max_sequence_length=4)))
    z = torch.randn(1, 11, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    embeds = policy.encode(PROMPTS[:1])

    def velocity(x, sigma):
        return policy.velocity(x, sigma, embeds)

    def forgetful(x, sigma):
        with policy.reference():
            return velocity(x, sigma)

    def rounded(x, sigma):
        return velocity(x, (1000 * sigma).round() / 1000)

    for mistake in (forgetful, rounded):
        found = ratio_error(velocity, mistake, z, policy.sigmas(10), FlowSDE(0.7), 9).mean()
        assert RATIO_TOLERANCE[getattr(torch, dtype)] < found < 1e-4


def test_mixed_precision_breaks_it_and_more_so_at_narrow_steps(policies):
    coarse, fine = error(policies, "float32", "bfloat16"), error(policies, "float32", "float16")
    assert (
        coarse.mean() > 3 * fine.mean() and (coarse > fine).all() and (fine > 0).all()
    )  # three bits more: a factor of eight
    assert coarse[-1] > 3 * coarse[0]


def test_the_ratio_error_is_that_of_the_formula():
    "With a mean that is off by delta = -kappa * e, log ratio = mean(z * delta / s - delta² / 2s²)."
    sampler, sigmas, e = FlowSDE(0.7), torch.tensor([1.0, 0.8, 0.5, 0.0]), 0.05
    found = ratio_error(lambda x, s: 0 * x, lambda x, s: 0 * x + e, NOISE[:, :4], sigmas, sampler, 2)
    for j in range(2):
        step = sampler.transition(torch.zeros(1, 1), torch.ones(1, 1), sigmas[j], sigmas[j + 1], sigmas[1])
        delta = step.mean.item() * e / step.std.item()
        log_ratio = NOISE[:, j + 1].flatten(1).mean(1) * delta - delta**2 / 2
        assert_close(found[j], (log_ratio.exp() - 1).abs().mean(), rtol=1e-2, atol=1e-6)


def gradient(policy, factor):
    for p in policy.parameters():
        p.grad = None
    velocity = policy.velocity(NOISE[:, 0], torch.tensor(0.7), policy.encode(PROMPTS))
    (velocity * NOISE[:, 1]).mean().mul(factor).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()]) / factor


@pytest.mark.parametrize("factor", [1.0, 2.0**-18])
def test_gradients_survive_half_precision(policies, factor):
    exact = gradient(policies["float32"], 1.0)
    for name, cosine in (("float16", 0.9999), ("bfloat16", 0.99)):
        found = gradient(policies[name], factor)
        assert found.dtype == torch.float32
        assert torch.cosine_similarity(found, exact, 0) > cosine
        assert abs(found.norm() / exact.norm() - 1) < 0.05


def test_without_the_scale_they_do_not(policies, tiny_folder):
    assert policies["float16"].grad_scale == 128 * math.prod(policies["float16"].latent_shape)
    policy = load_policy(ModelConfig(str(tiny_folder), dtype="float16"))
    policy.grad_scale = 1.0
    with_lora(policy)
    assert torch.cosine_similarity(gradient(policy, 2.0**-18), gradient(policies["float32"], 1.0), 0) < 0.5


def of_finished_images(policy, objective, step):
    "Gradient and statistics of one noise level of two images that the policy itself drew, before an update."
    embeds, sigmas = policy.encode(PROMPTS), policy.sigmas(4)
    path = rollout(lambda x, sigma: policy.velocity(x, sigma, embeds), NOISE[:, 0], sigmas, FlowSDE(0.0), NOISE[:, 1:])
    batch = MicroBatch(0, [], embeds, path, torch.ones(2, 4, dtype=bool), NOISE[:, 1:])
    batch.advantages = torch.tensor([[2.0], [-1.0]]).expand(2, 4)
    with torch.no_grad():
        batch.old_velocities = objective.old_velocities(policy, batch)
    for p in policy.parameters():
        p.grad = None
    loss, stats = objective.loss(policy, batch, step, None)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), stats


@pytest.mark.parametrize("objective", [NFT(), NFT(guidance_scale=3.0), VGRPO(beta=0.1)], ids=repr)
def test_finished_images_teach_in_half_precision_what_they_teach_otherwise(policies, objective):
    "The old velocity is that of the update to the last bit, also where each image has a level of its own."
    for step in (0, 3, torch.tensor([3, 1])):
        exact, _ = of_finished_images(policies["float32"], objective, step)
        for name, cosine in (("float32", 1 - 1e-6), ("float16", 0.999), ("bfloat16", 0.95)):
            found, stats = of_finished_images(policies[name], objective, step)
            assert stats["drift"] == 0 and found.dtype == torch.float32
            assert torch.cosine_similarity(found, exact, 0) > cosine
            assert abs(found.norm() / exact.norm() - 1) < 0.1


def test_checkpointed_gradients_are_those_of_finished_images(policies, tiny_folder):
    policy = trained(tiny_folder, "float32")
    policy.network.enable_gradient_checkpointing()
    expected, _ = of_finished_images(policies["float32"], NFT(), 2)
    found, stats = of_finished_images(policy, NFT(), 2)
    assert_close(found, expected)
    assert stats["drift"] == 0


def network_bytes(pipe):
    "{network: (bytes of frozen parameters, bytes of trained parameters)} of a pipeline."

    def size(part, trained):
        return sum(p.nbytes for p in part.parameters() if p.requires_grad == trained)

    return {name: (size(part, False), size(part, True)) for name, part in networks(pipe).items()}


def test_bytes(tiny_folder):
    policy = load_policy(ModelConfig(str(tiny_folder), dtype="bfloat16"))
    count = sum(p.numel() for p in policy.network.parameters())
    policy.add_lora(rank=4)
    adapters = sum(p.numel() for p in policy.parameters())
    sizes = network_bytes(policy.pipe)
    assert set(sizes) == {"vae", "text_encoder", "text_encoder_2", "transformer"}
    assert sizes["transformer"] == (2 * count, 4 * adapters) and sizes["vae"][1] == 0
