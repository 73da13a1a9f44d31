import json
import math

import numpy as np
import pytest
import torch

from vgpo.config import EvaluationConfig, ModelConfig
from vgpo.evaluate import Result, evaluate, generate_images, load_run, main, make_policy, mean_over_tasks, summarise
from vgpo.prompts import sample_noise
from vgpo.rewards.base import Scores, make_reward

ROWS = [{"prompt": f"a photo of a {color} circle", "tag": tag} for color, tag in zip(
    ("red", "green", "blue", "red", "green"), "aabbb", strict=True)]  # fmt: skip


def brightness(images, prompts, metadata):
    return images.reshape(len(images), -1).mean(1) / 255


@pytest.fixture(scope="module")
def model(tiny_folder):
    return make_policy(ModelConfig(path=str(tiny_folder)))


@pytest.fixture(scope="module")
def reward():
    return make_reward(f"{__name__}:brightness")


def test_mean_over_tasks_golden():
    mean, stderr, tasks = mean_over_tasks([1, 0, 0, 0, 1, 1], list("aaaabb"))
    assert (mean, stderr) == (5 / 8, 1 / 8) and tasks["a"] == (1 / 4, 1 / 4, 4) and tasks["b"] == (1.0, 0.0, 2)
    with pytest.raises(ValueError, match="no values"):
        mean_over_tasks([], [])


def test_standard_error_is_that_of_repeated_exams():
    "Variance of 2,000 means against the mean of the 2,000 squared errors; relative error of the former sqrt(2/2000)."
    rng, tags = np.random.default_rng(0), ["a"] * 20 + ["b"] * 60
    truth = np.repeat([0.3, 0.8], [20, 60])
    exams = np.array([mean_over_tasks(rng.random(80) < truth, tags)[:2] for _ in range(2000)])
    assert abs((exams[:, 1] ** 2).mean() / exams[:, 0].var(ddof=1) - 1) < 4 * math.sqrt(2 / 2000)
    assert abs(exams[:, 0].mean() - 0.55) < 4 * exams[:, 0].std() / math.sqrt(2000)


def test_summary_counts_tasks_not_images():
    values = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    summary = summarise(Scores(values, values / 2, values > 0), ROWS)
    assert summary["strict"] == 0.75 and summary["score"] == 0.375 and summary["images"] == 5
    assert summary["by_task"] == {"a": 0.5, "b": 1.0} and summary["score_by_task"] == {"a": 0.25, "b": 0.5}
    assert "strict" not in summarise(Scores(values, values), [{"prompt": "x"}] * 5)


def test_change_is_paired():
    "Two images of one task swap: each column has an error, and the change one of its own."

    def result(strict, rows=ROWS[:2]):
        values = torch.tensor(strict).float()
        return Result(None, Scores(values, values, values > 0), {}, rows)

    assert result([1, 0]).change_from(result([1, 0]))["strict"] == {"change": 0.0, "stderr": 0.0}
    assert result([1, 1]).change_from(result([0, 0]))["a"] == {"change": 1.0, "stderr": 0.0}
    assert result([1, 0]).change_from(result([0, 1]))["score"] == {"change": 0.0, "stderr": 1.0}
    with pytest.raises(ValueError, match="different rows"):
        result([1, 0]).change_from(result([1, 0], ROWS[2:4]))


def test_images_depend_on_seed_and_row_alone(model, reward):
    config = EvaluationConfig(steps=3)
    whole = evaluate(model, reward, ROWS, config, seed=1, batch_size=64)
    parts = evaluate(model, reward, ROWS, config, seed=1, batch_size=2)
    fewer = evaluate(model, reward, ROWS[:3], config, seed=1)
    other = evaluate(model, reward, ROWS, config, seed=2)
    assert np.abs(whole.images.astype(int) - parts.images.astype(int)).max() <= 1
    assert np.abs(whole.images[:3].astype(int) - fewer.images.astype(int)).max() <= 1
    assert all((a != b).any() for a, b in zip(whole.images, other.images, strict=True))
    assert whole.summary["score"] == pytest.approx(
        np.mean([brightness(whole.images[i], 0, 0).mean() for i in (slice(0, 2), slice(2, 5))]), abs=1e-6)  # fmt: skip


def test_bad_requests_are_named(model, reward):
    with pytest.raises(ValueError, match="2 prompts but 1 noises"):
        generate_images(model, ["a", "b"], torch.zeros(1, *model.latent_shape))
    with pytest.raises(ValueError, match="no row to evaluate"):
        evaluate(model, reward, [], EvaluationConfig())


def test_a_run_comes_back_as_the_policy_that_was_saved(trained, model):
    folder, saved = trained
    policy, config = load_run(folder)
    noise = torch.stack([sample_noise(model.latent_shape, 0, 0, i, 0) for i in range(2)])
    images = [generate_images(p, ["a photo of a red circle"] * 2, noise, 3).astype(int) for p in (saved, policy, model)]
    assert np.abs(images[0] - images[1]).max() <= 1 < np.abs(images[0] - images[2]).max()
    assert config.seed == 4 and not policy.parameters()


def test_program_evaluates_a_run_with_its_own_settings(trained, capsys):
    folder, _ = trained
    main([str(folder)])
    found, out = json.loads((folder / "evaluation.json").read_text()), capsys.readouterr().out
    assert (found["images"], found["steps"], found["seed"], found["reward"]) == (12, 4, 0, "geneval-shapes")
    assert len(found["by_task"]) == 6 and all(task in out for task in found["by_task"]) and "12 images" in out


def test_program_evaluates_a_model_and_options_override(tiny_folder, tmp_path, capsys):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "result.json"
    prompts.write_text("a photo of a red circle\na photo of a blue cross\n")
    main([str(tiny_folder), "--prompts", str(prompts), "--reward", f"{__name__}:brightness", "--steps", "2",
          "--guidance_scale", "2", "--seed", "9", "--output", str(output)])  # fmt: skip
    found = json.loads(output.read_text())
    assert (found["images"], found["steps"], found["guidance_scale"], found["seed"]) == (2, 2, 2.0, 9)
    assert "strict" not in found and "mean over tasks" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["--images", "0"], "--images is 0; it must be at least 1"),
    (["--steps", "-1"], "--steps is -1"),
    (["--prompts", "absent.txt"], "absent.txt does not exist"),
    (["--reward", "nonsense"], "unknown reward 'nonsense'"),
    (["--recipe", "nonsense"], "there is no recipe 'nonsense'"),
])  # fmt: skip
def test_bad_command_lines_end_in_one_line(tiny_folder, words, message):
    with pytest.raises(SystemExit) as stop:
        main([str(tiny_folder), *words])
    text = str(stop.value)
    assert text.startswith("error: ") and message in text and "\n" not in text


def test_folders_that_are_neither_run_nor_model(tmp_path, trained):
    with pytest.raises(SystemExit, match="^error: .*holds no pipeline"):
        main([str(tmp_path)])
    (tmp_path / "config.yaml").write_text((trained[0] / "config.yaml").read_text())
    with pytest.raises(SystemExit, match="^error: .*has no lora yet; finish it with --resume"):
        main([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="is not a run"):
        load_run(tmp_path / "absent")
