"""The one-file example and the library are two derivations of one method: they must agree, formula by formula."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from vgpo.advantages import value_anchored
from vgpo.flow import ode_sample, predict_clean
from vgpo.losses import clipped_surrogate
from vgpo.sde import FlowSDE
from vgpo.values import discounted_values

EXAMPLE = Path(__file__).parents[1] / "examples" / "vgpo_in_one_file.py"
ROWS = [{"prompt": "a photo of a red circle"}, {"prompt": "a photo of two blue squares"}]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("vgpo_in_one_file", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # importing it does not train
    return module


@pytest.fixture(scope="module")
def pipe(example):
    return example.load_pipeline()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_the_example_is_short_and_uses_the_tiny_world_alone():
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 120
    imported = {line for line in lines if line.startswith(("import vgpo", "from vgpo"))}
    assert imported == {"import vgpo", "from vgpo.world.detector import GenEvalShapes",
                        "from vgpo.world.scenes import split_scenes"}  # fmt: skip


@pytest.mark.parametrize("j", range(9))
def test_the_gaussians_of_the_steps_agree(example, pipe, generator, j):
    x, v, noise = torch.randn(3, 6, 8, 4, 4, generator=generator, dtype=torch.float64)
    sigmas = example.schedule(pipe, 10).double()
    mean, std = example.flow_sde_step(x, v, sigmas, j)
    step = FlowSDE(0.7).transition(x, v, sigmas[j], sigmas[j + 1], sigmas[1])
    assert_close(mean, step.mean, rtol=1e-12, atol=1e-12)
    assert_close(std, step.std, rtol=1e-12, atol=1e-12)
    x_next = mean + std * noise
    assert_close(example.log_density(x_next, mean, std), step.log_prob(x_next), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rewards", ["random", "a group that agrees", "a path without rewards"])
def test_values_and_advantages_agree(example, generator, rewards):
    table = torch.rand(16 * 8, 10, generator=generator, dtype=torch.float64)
    if rewards == "a group that agrees":
        table[3::16] = 0.7  # all images of prompt 3
    if rewards == "a path without rewards":
        table[5] = 0.0
    values = example.cumulative_values(table)
    assert_close(values, discounted_values(table, gamma=0.9), rtol=1e-12, atol=1e-12)
    theirs = value_anchored(values, torch.arange(16).repeat(8), anchor=0.05, anchor_steps=5).clamp(-5, 5)
    ours = example.dual_advantages(values)
    assert_close(ours, theirs, rtol=0, atol=1e-7)  # the library rounds k to float32
    if rewards == "a group that agrees":  # only the absolute term is left, in the first five steps
        assert (ours[3::16, :5] > 0).all() and abs(ours[3::16, 5:]).max() < 1e-9


def test_losses_and_their_gradients_agree(example, generator):
    old, noise, advantages = torch.randn(3, 64, generator=generator)
    ours, theirs = ((old + 2e-3 * noise).requires_grad_() for _ in range(2))
    loss, clip_frac = example.clipped_loss(ours, old, advantages)
    expected, stats = clipped_surrogate(theirs, old, advantages, clip_range=1e-3)
    loss.backward(), expected.backward()
    assert torch.equal(loss, expected) and torch.equal(ours.grad, theirs.grad)
    assert torch.equal(clip_frac, stats["clip_ratio"]) and 0 < clip_frac < 1


def test_a_rollout_is_made_of_the_librarys_steps(example, pipe, generator):
    text, pooled = example.encode(pipe, ROWS)
    sigmas, noise = example.schedule(pipe, 10), example.draw_noise(pipe, 2, generator)
    states, log_probs, clean = example.rollout(pipe, noise, sigmas, text, pooled)
    assert torch.equal(states[:, 0], noise) and torch.equal(clean[:, 9], states[:, 10])
    for j in range(10):
        x, sigma = states[:, j], sigmas[j]
        with torch.no_grad():
            v = pipe.transformer(x, text, pooled, (1000 * sigma).expand(2), return_dict=False)[0]
        if j > 0:
            assert_close(clean[:, j - 1], predict_clean(x, v, sigma), rtol=1e-6, atol=1e-6)
        if j < 9:
            step = FlowSDE(0.7).transition(x, v, sigma, sigmas[j + 1], sigmas[1])
            assert_close(log_probs[:, j], step.log_prob(states[:, j + 1]), rtol=1e-6, atol=1e-6)
        else:
            assert_close(states[:, 10], x + (sigmas[10] - sigma) * v, rtol=1e-6, atol=1e-6)


def test_a_step_counts_the_reward_of_the_next_scored_one(example, pipe, generator):
    latents = torch.randn(2, 10, 8, 8, 8, generator=generator)
    decoded = example.decode(pipe, latents[:, 1::2].flatten(0, 1))

    def reward(images, prompts, rows):
        assert (images == decoded).all() and prompts == [ROWS[0]["prompt"]] * 5 + [ROWS[1]["prompt"]] * 5
        return type("Scores", (), {"scaled": torch.arange(10) / 10})

    table = example.step_rewards(pipe, reward, latents, ROWS)
    assert_close(table, torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [5, 5, 6, 6, 7, 7, 8, 8, 9, 9]]) / 10.0,
                 check_dtype=False)  # fmt: skip


def test_an_evaluation_draws_what_the_pipeline_draws(example, pipe):
    tasks, seen = [ROWS, ROWS[::-1]], {}

    def reward(images, prompts, rows):
        seen.update(prompts=prompts)
        return type("Scores", (), {"strict": torch.tensor([True, False, False, False])})

    images, right = example.evaluate(pipe, reward, tasks)
    noise = example.draw_noise(pipe, 4, torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(seen["prompts"], num_inference_steps=20, guidance_scale=1.0, max_sequence_length=0, latents=noise,
                 output_type="np").images  # fmt: skip
    assert abs(images.reshape(drawn.shape) - 255 * drawn).max() <= 1
    text, pooled = example.encode(pipe, [row for task in tasks for row in task])
    latents = ode_sample(lambda x, s: example.velocity(pipe, x, s, text, pooled), noise, example.schedule(pipe, 20))
    assert abs(images.reshape(drawn.shape).astype(int) - example.decode(pipe, latents)).max() <= 1
    assert right.tolist() == [[1, 0], [0, 0]]


def test_the_standard_error_is_that_of_a_mean_over_tasks(example):
    values = np.random.default_rng(0).integers(0, 2, (2000, 6, 30)).astype(float)  # 2000 evaluations of fair coins
    means, errors = zip(*map(example.mean_over_tasks, values), strict=True)
    # the spread of 2000 means is known to 1 / sqrt(2 * 2000), 1.6 %; five times that is allowed
    assert abs(np.std(means) / np.sqrt(np.mean(np.square(errors))) - 1) < 0.08


@pytest.mark.parametrize("ema_decay", [0.0, 1.0])
def test_the_program_trains_and_evaluates_the_average(example, monkeypatch, tmp_path, capsys, ema_decay):
    small = {"PROMPTS": 3, "GROUP": 4, "UPDATES": 2, "EVALUATION_STEPS": 4, "EMA_DECAY": ema_decay}
    for name, value in small.items():
        monkeypatch.setattr(example, name, value)
    file = tmp_path / "grid.png"
    before, after = example.main(["--epochs", "1", "--images", "12", "--seed", "3", "--out", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["before", "after", "change"]
    assert lines[0].startswith(f"before {before:.3f} ± ") and lines[1].startswith(f"after  {after:.3f} ± ")
    grid = np.asarray(Image.open(file))  # 6 tasks, of each 2 images before and 2 after
    assert grid.shape == (6 * 96, 4 * 96, 3)
    moved = (grid[:, : 2 * 96] != grid[:, 2 * 96 :]).any()
    assert moved == (ema_decay == 0)  # an average that keeps everything stays where training began


@pytest.mark.parametrize("images", ["13", "6"])
def test_a_number_of_images_that_does_not_fit_the_tasks_is_refused(example, capsys, images):
    with pytest.raises(SystemExit):
        example.main(["--images", images])
    assert "--images must be a multiple of 6 and at least 12" in capsys.readouterr().err
