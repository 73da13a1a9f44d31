"A run opened again, and the program that evaluates it."

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vgpo.config import Config, save_config
from vgpo.evaluate import (
    EvaluateOptions,
    cluster_of,
    device_option,
    main,
    prompt_rows,
    reward_class,
    reward_makers,
    reward_specs,
    settings_of,
    this_process,
)
from vgpo.evaluation.folder import EvaluationFolder
from vgpo.evaluation.images import EvaluationConfig, generate_images
from vgpo.evaluation.scores import evaluate
from vgpo.noise import sample_noise
from vgpo.open_run import load_run, open_policy, read_model, read_run, run_folder
from vgpo.policies.base import load_policy
from vgpo.policies.loading import ModelConfig
from vgpo.prompts.files import load_prompts
from vgpo.rewards.base import make_reward, options_of, reward_classes
from vgpo.world.detector import GenEvalShapes

CIRCLES = ["a photo of a red circle"] * 2


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_policy(ModelConfig(path=str(tiny_folder)))


def noise(policy):
    return torch.stack([sample_noise(policy.latent_shape, 0, 0, i, 0) for i in range(2)])


def test_a_run_comes_back_as_the_policy_that_was_saved(trained, model):
    folder, saved = trained
    policy, config = load_run(folder)
    images = [generate_images(p, CIRCLES, noise(model), 3).astype(int) for p in (saved, policy, model)]
    assert np.abs(images[0] - images[1]).max() <= 1 < np.abs(images[0] - images[2]).max()
    assert config.seed == 4 and not policy.parameters()


def test_a_run_whose_weights_were_all_trained_comes_back(tiny_folder, tmp_path, model):
    config = Config(model=ModelConfig(path=str(tiny_folder), lora_rank=0))
    saved = load_policy(config.model)
    saved.make_trainable(config.model)
    with torch.no_grad():
        for p in saved.parameters():
            p.mul_(1.1)
    saved.save(tmp_path / "transformer")
    save_config(config, tmp_path / "config.yaml")
    assert read_run(tmp_path)[1] == tmp_path / "transformer"
    images = [generate_images(p, CIRCLES, noise(model), 3).astype(int) for p in (saved, load_run(tmp_path)[0], model)]
    assert np.abs(images[0] - images[1]).max() <= 1 < np.abs(images[0] - images[2]).max()


def test_program_evaluates_a_run_with_its_own_settings(trained, capsys):
    folder, _ = trained
    main([str(folder)])
    found, out = json.loads((folder / "evaluation.json").read_text()), capsys.readouterr().out
    tasks = found["metrics"]["GenEvalShapes"]["strict"]["by_task"]
    assert (found["images"], found["settings"]["num_inference_steps"], found["settings"]["seed"]) == (12, 4, 0)
    assert len(tasks) == 6 and all(task in out for task in tasks) and "12 images of " in out


def test_program_gives_the_figures_of_an_evaluation_in_memory(trained):
    "The same images, scores and errors as before and after training."
    policy, config = load_run(trained[0])
    rows = load_prompts("tiny-scenes", "test", 12)
    summary = evaluate(policy, {"reward": GenEvalShapes()}, rows, config.evaluation).summary["reward"]
    main([str(trained[0])])
    found = json.loads((trained[0] / "evaluation.json").read_text())["metrics"]["GenEvalShapes"]
    assert {key: found[key] for key in summary} == json.loads(json.dumps(summary)) and "strict" in summary


def test_program_evaluates_a_model_and_options_override(tiny_folder, tmp_path, capsys):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "result"
    prompts.write_text("a photo of a red circle\na photo of a blue cross\n")
    main([str(tiny_folder), "--prompts", str(prompts), "--reward", "tiny_rewards:brightness",
          "--num_inference_steps", "2", "--guidance_scale", "2", "--seed", "9", "--output", str(output)])  # fmt: skip
    found = json.loads((output / "results.json").read_text())
    settings = found["settings"]
    assert (found["images"], settings["num_inference_steps"], settings["guidance_scale"], settings["seed"]) == (
        2,
        2,
        2.0,
        9,
    )
    assert "strict" not in found["metrics"]["tiny_rewards:brightness"] and "| all " in capsys.readouterr().out
    assert settings["cluster"] == "prompt" and found["libraries"]["torch"] and found["commit"] is None


@pytest.mark.parametrize(("words", "message"), [
    (["--num_samples", "0"], "--num_samples is 0; it must be at least 1"),
    (["--num_inference_steps", "-1"], "--num_inference_steps is -1"),
    (["--guidance_scale", "0.5"], "--guidance_scale is 0.5; it must be at least 1"),
    (["--guidance_scale", "nan"], "guidance_scale"),
    (["--prompts", "absent.txt"], "absent.txt does not exist"),
    (["--reward", "nonsense"], "unknown reward 'nonsense'"),
    (["--recipe", "nonsense"], "there is no recipe 'nonsense'"),
    (["--steps", "3"], "there is no option steps; --help lists all of them"),
    (["--num_samples", "many"], "num_samples"),
    (["another"], "'another' belongs to no option; options begin with --"),
])  # fmt: skip
def test_bad_command_lines_end_in_one_line(tiny_folder, words, message):
    with pytest.raises(SystemExit) as stop:
        main([str(tiny_folder), *words])
    text = str(stop.value)
    assert text.startswith("error: ") and message in text and "\n" not in text


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, field in EvaluateOptions.__dataclass_fields__.items():
        assert f"--{name}" in text or name == "model", name
        assert field.type is not None
    assert "images of each prompt; above 1, a prompt that comes twice counts once" in text and "default: 1" in text


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
    policy = open_policy(*read_model(str(tiny_folder), lora=str(folder / "lora")))
    ours, theirs = (generate_images(p, CIRCLES, noise(saved), 3) for p in (policy, load_run(folder)[0]))
    assert np.array_equal(ours, theirs) and not policy.parameters()
    with pytest.raises(ValueError, match="is a run and has weights of its own; give --lora with a base model only"):
        read_model(str(folder), lora=str(folder / "lora"))
    with pytest.raises(FileNotFoundError, match="absent is neither a .safetensors file nor a folder with one"):
        read_model("tiny", lora=str(folder / "absent"))


@pytest.mark.parametrize(("damage", "message"), [
    ("other names", "is unknown .*looks like a LoRA of a UNet"),
    ("other shapes", r"is \(.*\), not \(.*; give the base model that it was trained on"),
    ("no tensors", "the file is damaged .*; copy it again"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(trained, tiny_folder, tmp_path, damage, message):
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
    with pytest.raises(ValueError, match=message) as error:
        open_policy(*read_model(str(tiny_folder), lora=str(tmp_path)))
    assert "\n" not in str(error.value) and path.name in str(error.value)


def test_a_part_of_a_run_is_the_run(trained, tiny_folder, tmp_path):
    "Its weights, a checkpoint, its best ones: with the settings of the run, and the weights that were named."
    run = shutil.copytree(trained[0], tmp_path / "run")
    for part in ("checkpoints/epoch-00003", "best/epoch-00002"):
        shutil.copytree(run / "lora", run / part / "lora")
    for path in (run, run / "lora", run / "checkpoints" / "epoch-00003", run / "best" / "epoch-00002" / "lora"):
        config, weights = read_model(str(path))
        assert config.seed == 4 and weights.name == "lora" and weights.is_relative_to(path)
        assert run_folder(path) == run and not open_policy(config, weights).parameters()
    (run / "checkpoints" / "epoch-00004").mkdir()
    with pytest.raises(FileNotFoundError, match=f"epoch-00004 has no lora; give the run, {run}"):
        read_model(str(run / "checkpoints" / "epoch-00004"))
    with pytest.raises(SystemExit, match="^error: .* holds weights and is no whole model; give .* and --lora"):
        main([str(shutil.copytree(run / "lora", tmp_path / "alone"))])
    inside = shutil.copytree(tiny_folder, run / "checkpoints" / "pipeline")  # a model is a model, wherever it lies
    assert read_model(str(inside))[0].model.path == str(inside)


def test_model_that_is_nowhere(monkeypatch):
    def fails(*_, **__):
        raise OSError("cannot load\nanything")

    monkeypatch.setattr("vgpo.policies.loading.diffusers.DiffusionPipeline.load_config", fails)
    with pytest.raises(
        SystemExit, match=r"^error: cannot load the pipeline some/model, .*: cannot load anything"
    ) as stop:
        main(["some/model", "--num_samples=2"])
    assert "\n" not in str(stop.value)
    with pytest.raises(SystemExit, match="^error: nothing-like-it holds no pipeline"):
        main(["nothing-like-it"])


def test_settings_follow_contents_not_names(tmp_path, trained):
    rows = load_prompts("tiny-scenes", "test", unique=True)[:2]
    model, lora, config = ModelConfig(path="tiny"), trained[0] / "lora", EvaluationConfig()

    def settings(rows, source, weights=lora):
        return settings_of(EvaluationFolder(tmp_path, rows), source, model, config, weights=weights)

    one, changed = settings(rows, "a/tiny-scenes"), [dict(row) for row in rows]
    assert one == settings(changed, "b/tiny-scenes") and one["cluster"] == "prompt"
    changed[1]["tag"] = "other"
    assert one["rows_sha256"] != settings(changed, "a/tiny-scenes")["rows_sha256"]
    copy = tmp_path / "lora"
    copy.mkdir()
    content = bytearray((lora / "pytorch_lora_weights.safetensors").read_bytes())
    for change in (0, 1):
        content[-1] ^= change
        (copy / "pytorch_lora_weights.safetensors").write_bytes(content)
        same = settings(rows, "tiny-scenes", copy)["trained"] == one["trained"]
        assert same is not bool(change)


def test_settings_have_all_that_images_depend_on(tmp_path):
    f = EvaluationFolder(tmp_path, load_prompts("tiny-scenes", "test", 2))

    def settings(seed=0, config=None, **model):
        return settings_of(f, "tiny-scenes", ModelConfig(**model), config or EvaluationConfig(), seed)

    first = settings()
    for other in (settings(seed=1), settings(config=EvaluationConfig(guidance_scale=2)), settings(resolution=32),
                  settings(config=EvaluationConfig(num_inference_steps=3)), settings(dtype="bfloat16"),
                  settings(max_sequence_length=0), settings(vae_tiling=True),
                  settings(distilled_guidance_scale=1)):  # fmt: skip
        assert sum(first[key] != other[key] for key in first) == 1
    assert settings(lora_rank=3, vae_slicing=True, compile=True, precompute_text_embeds=True) == first
    assert first["cluster"] == cluster_of("tiny-words") == "image" != cluster_of("geneval")


def test_rows_of_an_evaluation(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a\nb\na\nc\n")
    assert [row["prompt"] for row in prompt_rows(str(file), 100, 1)] == ["a", "b", "a", "c"]
    assert [row["prompt"] for row in prompt_rows(str(file), 8, 4)] == ["a", "b"]
    assert [row["prompt"] for row in prompt_rows(str(file), 2000, 4)] == ["a", "b", "c"]
    official = prompt_rows("geneval", 2212, 4)
    assert len(official) == 553 and len({row["tag"] for row in official}) == 6
    assert prompt_rows("tiny-scenes", 528, 1) == load_prompts("tiny-scenes", "test", 528)


def test_reward_options_and_device():
    specs = reward_specs("JPEG", ["JPEG", "PickScore", "CLIPScore"])
    makers = reward_makers(specs, {"JPEG": {"quality": 50}, "CLIPScore": {"device": "x"}}, "cuda")
    assert makers["JPEG"]().version.endswith("quality 50") and makers["JPEG"].keywords == {"quality": 50}
    assert makers["PickScore"].keywords == {"device": "cuda"} and makers["CLIPScore"].keywords == {"device": "x"}
    with pytest.raises(ValueError, match="--reward_options has OCR, which --rewards has not"):
        reward_makers(specs, {"OCR": {}})


@pytest.mark.parametrize("name", reward_classes())
def test_every_reward_with_a_device_gets_it_and_no_other(name):
    takes = "device" in options_of(name)
    assert device_option(name, "cuda") == ({"device": "cuda"} if takes else {})
    path = f"{reward_class(name).__module__}.{name}"
    assert reward_class(path) is reward_class({"class_path": path}) is reward_classes()[name]
    assert device_option({"class_path": path, "init_args": {"device": "cuda:3"}}, "cuda") == {}


def test_rewards_of_a_run(tmp_path):
    "A run's own rewards have the options that they had; the parts of a combined one are asked one by one."
    assert reward_specs("tiny_rewards:power") == {"tiny_rewards:power": "tiny_rewards:power"}
    jpeg = {"class_path": "vgpo.rewards.own.JPEG", "init_args": {"quality": 5}}
    assert reward_specs(jpeg) == {"JPEG": jpeg} and reward_specs(jpeg, ["OCR", "JPEG"]) == {"OCR": "OCR", "JPEG": jpeg}
    parts = {"small": jpeg, "bright": "tiny_rewards:brightness"}
    both = {
        "class_path": "vgpo.rewards.base.Combined",
        "init_args": {"rewards": parts, "weights": {"small": 1, "bright": 1}},
    }
    assert reward_specs(both) == parts and reward_specs(both, ["small"]) == {"small": jpeg}
    makers = reward_makers(reward_specs(both), {"small": {"quality": 7}}, "cuda")
    assert makers["small"]().quality == 7 and makers["bright"]().name == "tiny_rewards:brightness"
    assert isinstance(make_reward(both).rewards["small"], reward_classes()["JPEG"])


def test_several_processes_need_a_folder(monkeypatch):
    monkeypatch.setattr("vgpo.evaluate.PartialState", lambda **_: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="2 processes need --output FOLDER"):
        this_process(None)
    assert this_process("folder").num_processes == 2
