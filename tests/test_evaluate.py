import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vgpo.config import EvaluationConfig, ModelConfig
from vgpo.evaluate import (
    Result,
    evaluate,
    generate_images,
    load_run,
    main,
    make_policy,
    mean_over_tasks,
    open_policy,
    read_model,
    squared_error,
    summarise,
)
from vgpo.noise import sample_noise
from vgpo.prompts.files import load_prompts
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


def test_clusters_golden():
    "Two prompts of two images, right and wrong: the error is that of two numbers, 1 and 0, and not of four."
    values = np.array([1.0, 1.0, 0.0, 0.0])
    assert squared_error(values, ["p", "p", "q", "q"]) == 1 / 4 and squared_error(values) == 1 / 12
    assert squared_error(values, [3, 5, 7, 9]) == pytest.approx(squared_error(values))
    assert squared_error(values, [1] * 4) == 0.25 and squared_error(values, [1] * 4, 1.0) == 1.0
    # sizes 3 and 1, mean 3/4: sums of deviations are 3/4 and -3/4, so 2/1 * 2 * 9/16 / 16
    assert squared_error(np.array([1.0, 1.0, 1.0, 0.0]), [0, 0, 0, 1]) == pytest.approx(9 / 64)
    by_task = mean_over_tasks([1, 1, 0, 0, 1, 1], list("aaaabb"), clusters=[0, 0, 1, 1, 2, 3])
    assert by_task[1] == pytest.approx(0.25) and by_task[2]["b"] == (1.0, 0.0, 2)


def test_clustered_error_is_that_of_repeated_exams():
    "Prompts with success probabilities of their own, Beta(1, 1), so correlation 1/3, and 2 or 4 images: 2,000 exams."
    rng, prompt = np.random.default_rng(0), np.repeat(np.arange(30), np.tile([2, 4], 15))
    exams = []
    for _ in range(2000):
        values = (rng.random(90) < rng.random(30)[prompt]).astype(float)
        exams.append((values.mean(), squared_error(values, prompt), squared_error(values)))
    mean, clustered, plain = np.array(exams).T
    assert abs(clustered.mean() / mean.var(ddof=1) - 1) < 4 * math.sqrt(2 / 2000)
    assert mean.var(ddof=1) / plain.mean() > 1.5  # images counted as strangers: too small an error


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
    tasks = found["metrics"]["geneval-shapes"]["strict"]["by_task"]
    assert (found["images"], found["settings"]["steps"], found["settings"]["seed"]) == (12, 4, 0)
    assert len(tasks) == 6 and all(task in out for task in tasks) and "12 images of " in out


def test_program_gives_the_figures_of_the_exam_in_memory(trained):
    "The small exam of a run: the same images, scores and errors as before and after training."
    policy, config = load_run(trained[0])
    rows = load_prompts("tiny-scenes", "test", 12)
    summary = evaluate(policy, make_reward("geneval-shapes"), rows, config.evaluation).summary
    main([str(trained[0])])
    found = json.loads((trained[0] / "evaluation.json").read_text())["metrics"]["geneval-shapes"]
    assert found["scaled"]["mean"] == summary["score"] and found["scaled"]["stderr"] == summary["score_stderr"]
    assert found["strict"]["mean"] == summary["strict"] and found["strict"]["stderr"] == summary["stderr"]
    assert {task: part["mean"] for task, part in found["strict"]["by_task"].items()} == summary["by_task"]


def test_program_evaluates_a_model_and_options_override(tiny_folder, tmp_path, capsys):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "result"
    prompts.write_text("a photo of a red circle\na photo of a blue cross\n")
    main([str(tiny_folder), "--prompts", str(prompts), "--reward", f"{__name__}:brightness", "--steps", "2",
          "--guidance_scale", "2", "--seed", "9", "--output", str(output)])  # fmt: skip
    found = json.loads((output / "results.json").read_text())
    settings = found["settings"]
    assert (found["images"], settings["steps"], settings["guidance_scale"], settings["seed"]) == (2, 2, 2.0, 9)
    assert "strict" not in found["metrics"][f"{__name__}:brightness"] and "| all " in capsys.readouterr().out


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


def test_lora_on_a_base_model_is_the_run(trained, tiny_folder):
    folder, saved = trained
    config, weights = read_model(str(tiny_folder), lora=str(folder / "lora"))
    policy = open_policy(config, weights)
    noise = torch.stack([sample_noise(saved.latent_shape, 0, 0, i, 0) for i in range(2)])
    ours, theirs = (
        generate_images(p, ["a photo of a red circle"] * 2, noise, 3) for p in (policy, load_run(folder)[0])
    )
    assert np.array_equal(ours, theirs) and not policy.parameters()
    with pytest.raises(ValueError, match="is a run and has weights of its own; give --lora with a base model only"):
        read_model(str(folder), lora=str(folder / "lora"))
    with pytest.raises(FileNotFoundError, match="--lora .*absent is no folder with a .safetensors file"):
        read_model("tiny", lora=str(folder / "absent"))


@pytest.mark.parametrize("damage", ["other names", "other shapes", "no tensors"])
def test_weights_that_do_not_fit_are_refused(trained, tiny_folder, tmp_path, damage):
    "A LoRA of another model must not leave the base model as it is, which diffusers does with a warning."
    path = trained[0] / "lora" / "pytorch_lora_weights.safetensors"
    tensors = load_file(path)
    if damage == "other names":
        tensors = {f"unet.{name.partition('.')[2]}": value for name, value in tensors.items()}
    if damage == "other shapes":
        tensors = {name: torch.cat([value, value], 1).contiguous() for name, value in tensors.items()}
    save_file(tensors, tmp_path / path.name)
    if damage == "no tensors":
        (tmp_path / path.name).write_bytes(b"not safetensors")
    with pytest.raises(OSError, match="do not fit the model; give the base model that they were trained on") as error:
        open_policy(*read_model(str(tiny_folder), lora=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_model_that_is_nowhere(monkeypatch):
    def fails(*_):
        raise OSError("cannot load\nanything")

    monkeypatch.setattr("vgpo.evaluate.make_policy", fails)
    with pytest.raises(OSError, match=r"some/model is not a folder, not `tiny`, and .* the hub \(cannot load\)"):
        open_policy(*read_model("some/model"))
