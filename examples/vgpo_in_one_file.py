"""VGPO in one file: Value-Anchored Group Policy Optimization (arXiv:2512.12387) on a tiny text-to-image model.

What it is. A Stable Diffusion 3 pipeline of 4 million parameters draws coloured shapes from prompts in GenEval's six
tasks, and often draws them wrong. This file improves it by online reinforcement learning. It reads straight down: the
settings, the formulas, what the pipeline is asked for, and `main`, which is Algorithm 1 of the paper. Of the vgpo
library it uses only the tiny world: the model's folder, the prompts, and the detector that scores images. Everything
else is written out here, from the method and from diffusers' documentation, so that the file also checks the library.

What it prints. The held-out strict accuracy (GenEval's official rule, the mean over the six tasks of the accuracy
within each) before and after training, and the change, each with its standard error. The library's own result is 0.434
before and about 0.65 after. `--out grid.png` also saves images from before and after side by side.

How long it takes. About seven minutes on one CPU core; nothing is downloaded.

    python examples/vgpo_in_one_file.py --seed 0 --out grid.png

Marks at the formulas: [P] the paper states it, [R] we reconstructed it, [O] our own choice. The paper's full text was
not at hand, only its abstract and public reviews. Shapes: B images in a batch, T steps, G images per prompt, P prompts,
and latents of C channels and h x w cells. Step j counts from 0, the noisiest; the paper's t counts the other way.
"""

import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging, make_image_grid
from peft import LoraConfig
from tqdm import tqdm

import vgpo
from vgpo.world.detector import GenEvalShapes
from vgpo.world.scenes import split_scenes

# Sampling: P * G = 128 images per epoch, each with its path of T + 1 states.
PROMPTS, GROUP, STEPS = 16, 8, 10  # P, G, T
TRAINED = 9  # leading steps that draw noise and are trained; the last one follows the ODE
NOISE_LEVEL = 0.7  # of the Flow-SDE sampler
TASKS = {"position": 4, "counting": 4, "color_attr": 3, "two_object": 2, "colors": 1, "single_object": 1}  # weights
EVALUATION_STEPS = 20  # of the deterministic sampler

# Credit: temporal cumulative rewards (TCRM) and the adaptive dual advantage (ADAE).
SCORED_EVERY = 2  # the clean estimate of every second step is scored, the last step's among them
GAMMA = 0.9  # discount of the rewards along a path
ANCHOR, ANCHOR_STEPS = 0.05, 5  # weight k of the absolute term, and the leading steps in which it acts
MAX_ADVANTAGE = 5.0  # advantages are clamped to plus or minus this

# Optimization: AdamW on a LoRA, with a learning rate that falls to 0 along a cosine.
UPDATES, LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 4, 3e-3, 1e-4, 1.0  # UPDATES: minibatches per epoch
CLIP_RANGE = 1e-3  # of the ratio; small, because log-probabilities are means over the latent's dimensions
EMA_DECAY = 0.95  # of the average of the trained weights, which is what is evaluated
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LORA = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=[f"attn.{x}" for x in LAYERS])


# ---- The formulas. The path is x = (1 - sigma) x0 + sigma noise, and the velocity is v = noise - x0. [P]


def flow_sde_step(x, v, sigmas, j):
    """Mean (B, C, h, w) and standard deviation (a scalar) of the Gaussian from which step j draws the next state.

    Adding the drift -g^2/2 score and the noise g dw to the ODE dx = v dsigma keeps its marginals; the score is the
    gradient of the log-density of x. On the straight path the noise in x is x + (1 - sigma) v, and the score is minus
    that noise divided by sigma. Flow-GRPO, whose sampler this is, takes g^2 = level^2 sigma / (1 - sigma), with the
    schedule's second sigma in the denominator where sigma is 1.
    """
    sigma, dt = sigmas[j], sigmas[j] - sigmas[j + 1]
    g2 = NOISE_LEVEL**2 * sigma / (1 - (sigmas[1] if sigma == 1 else sigma))
    score = -(x + (1 - sigma) * v) / sigma  # (B, C, h, w)
    return x - dt * (v - g2 / 2 * score), (g2 * dt).sqrt()


def log_density(x_next, mean, std):
    "The Gaussian's log-density at x_next, as a mean over the latent's dimensions: (B, C, h, w) -> (B,)."
    return torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).mean(1)


def cumulative_values(rewards):
    "TCRM [P, Eq. 10]: Q_j = R_j + gamma Q_{j+1}, the discounted rewards from step j to the end, (B, T) -> (B, T)."
    values = rewards.clone()
    for j in reversed(range(rewards.shape[1] - 1)): values[:, j] += GAMMA * values[:, j + 1]
    return values


def dual_advantages(values):
    """ADAE: advantages (B, T) of values (B, T), which must not be negative. Row k * P + p is image k of prompt p.

    omega is the value over its mean along the path [P, Eq. 11; per path R], 1 where that mean is 0 [O]. The absolute
    term k Q is added to the group-relative one, and remains where all images of a prompt score the same [P; form R].
    """
    mean = values.mean(1, keepdim=True)  # (B, 1)
    omega = torch.where(mean > 0, values / mean, 1.0)  # (B, T)
    grouped = values.unflatten(0, (GROUP, -1))  # (B, T) -> (G, P, T)
    spread = grouped.std(0, correction=0) + 1e-4  # (P, T); the small number is Flow-GRPO's
    relative = ((grouped - grouped.mean(0)) / spread).flatten(0, 1)  # (G, P, T) -> (B, T)
    absolute = ANCHOR * values * (torch.arange(values.shape[1]) < ANCHOR_STEPS)  # (B, T), 0 in the later steps
    return (omega * (relative + absolute)).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)


def clipped_loss(log_prob, old_log_prob, advantages):
    "PPO's clipped surrogate, to be minimised, and the share of ratios outside of the range; all arguments are (B,)."
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    return -torch.min(ratio * advantages, clipped * advantages).mean(), (ratio != clipped).float().mean()


def mean_over_tasks(values):
    "The mean over tasks of values (tasks, n), and its standard error."
    return values.mean(), math.sqrt((values.var(1, ddof=1) / values.shape[1]).sum()) / len(values)


# ---- What the pipeline is asked for.


def load_pipeline():
    "The tiny pipeline, frozen; it has no third text encoder (T5)."
    logging.disable_progress_bar()
    folder = Path(vgpo.__file__).parent / "world" / "tiny"
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.transformer.requires_grad_(False)
    pipe.vae.to(memory_format=torch.channels_last)  # its convolutions are about twice as fast on a CPU this way
    return pipe


def schedule(pipe, steps):
    "The noise levels (T + 1,) of the pipeline's own scheduler, falling from 1 to 0."
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.sigmas


@torch.no_grad()
def encode(pipe, rows):
    "The text embeddings (B, L, D) and pooled embeddings (B, D) of B prompt rows; no tokens of T5."
    prompts = [row["prompt"] for row in rows]
    text, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=0)
    return text, pooled


def draw_noise(pipe, count, generator=None):
    "Standard normal latents (count, C, h, w)."
    config = pipe.transformer.config
    return torch.randn(count, config.in_channels, config.sample_size, config.sample_size, generator=generator)


def velocity(pipe, x, sigma, text, pooled):
    "The network's velocity (B, C, h, w) at states x (B, C, h, w) of one noise level; guidance 1, which is none."
    timestep = (sigma * pipe.scheduler.config.num_train_timesteps).expand(len(x))  # () -> (B,)
    return pipe.transformer(x, text, pooled, timestep, return_dict=False)[0]


@torch.no_grad()
def decode(pipe, latents):
    "Images (B, H, W, 3) uint8 of latents (B, C, h, w)."
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    images = pipe.image_processor.postprocess(pixels, output_type="np")  # (B, 3, H, W), -1 to 1 -> (B, H, W, 3), 0 to 1
    return (images * 255).round().astype(np.uint8)


@torch.no_grad()
def rollout(pipe, x, sigmas, text, pooled):
    """Sample paths from noise x (B, C, h, w), and keep what training needs.

    Returns states (B, T + 1, C, h, w), log-probabilities of the noisy steps (B, TRAINED), and the clean estimates
    (B, T, C, h, w) at the states that the steps led to [P, Eq. 9]. The velocity at such a state is computed anyway
    for the next step, so the estimates cost no forward pass of the network [O].
    """
    states, log_probs, clean = [x], [], []
    for j in range(len(sigmas) - 1):
        v = velocity(pipe, x, sigmas[j], text, pooled)
        if j > 0: clean.append(x - sigmas[j] * v)  # where step j - 1 led to
        if j < TRAINED:
            mean, std = flow_sde_step(x, v, sigmas, j)
            x = mean + std * torch.randn_like(x)
            log_probs.append(log_density(x, mean, std))
        else: x = x + (sigmas[j + 1] - sigmas[j]) * v  # Euler's step of the ODE
        states.append(x)
    clean.append(x)  # at sigma = 0 the estimate is the sample itself
    return torch.stack(states, 1), torch.stack(log_probs, 1), torch.stack(clean, 1)  # n times (B, ...) -> (B, n, ...)


def step_rewards(pipe, reward, clean, rows):
    "Rewards (B, T) of clean estimates (B, T, C, h, w); a step that is not scored counts what the next scored one got."
    scored = clean[:, SCORED_EVERY - 1 :: SCORED_EVERY]  # (B, T, C, h, w) -> (B, S, C, h, w)
    images = decode(pipe, scored.flatten(0, 1))  # (B, S, C, h, w) -> (B * S, H, W, 3)
    repeated = [row for row in rows for _ in range(scored.shape[1])]  # B * S rows
    soft = reward(images, [row["prompt"] for row in repeated], repeated).scaled.double()  # (B * S,), in [0, 1]
    return soft.reshape(len(rows), -1).repeat_interleave(SCORED_EVERY, 1)  # (B * S,) -> (B, S) -> (B, T)


@torch.no_grad()
def evaluate(pipe, reward, tasks):
    "Images (tasks, n, H, W, 3), one for each row of tasks, lists of length n, and which of them are right (tasks, n)."
    rows, sigmas = [row for task in tasks for row in task], schedule(pipe, EVALUATION_STEPS)
    text, pooled = encode(pipe, rows)
    x = draw_noise(pipe, len(rows), torch.Generator().manual_seed(0))  # the same before and after, and for any --seed
    for j in range(len(sigmas) - 1): x = x + (sigmas[j + 1] - sigmas[j]) * velocity(pipe, x, sigmas[j], text, pooled)
    images = decode(pipe, x)  # (N, C, h, w) -> (N, H, W, 3)
    right = reward(images, [row["prompt"] for row in rows], rows).strict.double().numpy()  # (N,), GenEval's rule
    return images.reshape(len(tasks), -1, *images.shape[1:]), right.reshape(len(tasks), -1)  # N -> tasks, n


# ---- Algorithm 1.


def main(argv=None):
    "Evaluate, train, evaluate; returns the strict accuracies before and after."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=55, help="rounds of sampling and updating")
    parser.add_argument("--images", type=int, default=528, help="held-out images, a multiple of 6 and at least 12")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, noise and adapters")
    parser.add_argument("--out", help="PNG file for images from before and after training")
    options = parser.parse_args(argv)
    if options.images % 6 or options.images < 12: parser.error("--images must be a multiple of 6 and at least 12")

    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    pipe, reward = load_pipeline(), GenEvalShapes()
    pipe.transformer.add_adapter(LORA)  # its output starts at 0, so the velocity is still that of the frozen model
    weights = [p for p in pipe.transformer.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, options.epochs * UPDATES))

    train, held_out = split_scenes()  # task -> prompt rows; no prompt is in both
    tasks = [[rows[i % len(rows)] for i in range(options.images // 6)] for rows in held_out.values()]
    images_before, before = evaluate(pipe, reward, tasks)
    print("before {:.3f} ± {:.3f}".format(*mean_over_tasks(before)), flush=True)

    started, sigmas = time.perf_counter(), schedule(pipe, STEPS)
    progress = tqdm(range(options.epochs), desc="epochs")
    for _ in progress:
        # Sample G paths for each of P prompts.
        drawn = rng.choices(list(TASKS), TASKS.values(), k=PROMPTS)
        rows = [rng.choice(train[task]) for task in drawn] * GROUP  # row k * P + p is image k of prompt p
        text, pooled = encode(pipe, rows)  # (B, L, D), (B, D)
        states, old_log_probs, clean = rollout(pipe, draw_noise(pipe, len(rows)), sigmas, text, pooled)

        # Score the clean estimates, add the rewards up to values, and turn the values into advantages.
        rewards = step_rewards(pipe, reward, clean, rows)  # (B, T)
        advantages = dual_advantages(cumulative_values(rewards)).float()  # (B, T)

        # Update on minibatches, each of which holds G / UPDATES images of every prompt.
        outside = 0.0
        for part in torch.arange(len(rows)).chunk(UPDATES):  # (B,) -> UPDATES times (B / UPDATES,)
            for j in range(TRAINED):
                v = velocity(pipe, states[part, j], sigmas[j], text[part], pooled[part])
                log_prob = log_density(states[part, j + 1], *flow_sde_step(states[part, j], v, sigmas, j))
                loss, clip_frac = clipped_loss(log_prob, old_log_probs[part, j], advantages[part, j])
                (loss / TRAINED).backward()  # the gradients of the steps add up to that of their mean
                outside += clip_frac.item() / TRAINED / UPDATES
            torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            for mean, weight in zip(average, weights, strict=True): mean.lerp_(weight.detach(), 1 - EMA_DECAY)
        progress.set_postfix(reward=f"{rewards[:, -1].mean():.3f}", clip_frac=f"{outside:.2f}")

    seconds = time.perf_counter() - started
    for weight, mean in zip(weights, average, strict=True): weight.data.copy_(mean)
    images_after, after = evaluate(pipe, reward, tasks)
    print("after  {:.3f} ± {:.3f}".format(*mean_over_tasks(after)))
    print("change {:+.3f} ± {:.3f}".format(*mean_over_tasks(after - before)), end=" ")  # of the same prompts and noise
    print(f"(seed {options.seed}, {options.epochs} epochs, {seconds:.0f} s of training)")
    if options.out:  # one line per task: up to four images from before training, then the same ones from after
        shown = np.concatenate([images_before[:, :4], images_after[:, :4]], 1)  # (tasks, 4 + 4, H, W, 3)
        tiles = pipe.image_processor.numpy_to_pil(shown.reshape(-1, *shown.shape[2:]) / 255)
        make_image_grid(tiles, shown.shape[0], shown.shape[1], resize=96).save(options.out)
    return before.mean(), after.mean()


if __name__ == "__main__":
    main()
