"The recipes: what they hold is what they say it comes from, and they run on the processes they were made for."

import re
from functools import lru_cache
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from vgpo.batches import solve_batches
from vgpo.config import RECIPES, as_data, parse_config
from vgpo.credit.grpo import GRPO
from vgpo.credit.vgpo import VGPO
from vgpo.flow import shifted_sigmas
from vgpo.rewards.base import reward_classes
from vgpo.runs.resume import leaves
from vgpo.sde import FlowSDE

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
FULL = [name for name in NAMES if not name.startswith("tiny")]
PAPER = [f"sd35-{task}{end}" for task in ("geneval", "ocr", "pickscore") for end in ("", "-grpo")]
ROOT = Path(__file__).parents[1]


@lru_cache
def recipe(name):
    "The Config of a recipe."
    return parse_config(["--recipe", name])


def test_the_recipes_are_there():
    assert {*PAPER, "sd35-ocr-24gb", "sd35-ocr-80gb", "flux-pickscore", "tiny-geneval", "tiny-ocr"} <= set(NAMES)


def values(name):
    "{option: value} of a recipe, plugs by the names of their classes."
    found = leaves(as_data(recipe(name)))
    plugs = {option[: -len(".class_path")]: value for option, value in found.items() if option.endswith(".class_path")}
    return {option.replace(".init_args", ""): value for option, value in found.items()} | {
        option: path.rpartition(".")[2] for option, path in plugs.items()
    }


def batches(name, processes=1):
    c = recipe(name)
    rollout = c.rollout
    return solve_batches(
        rollout.prompts_per_epoch, rollout.group_size, c.optim.num_minibatches, rollout.micro_batch_size, processes
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_a_config_with_its_own_name_and_a_known_reward(name):
    config = recipe(name)
    assert config.name == name
    assert values(name)["reward"] in reward_classes()
    if name.startswith("sd35-ocr"):  # images are more than one line of text
        assert config.reward["init_args"]["mode"] == "full"


@pytest.mark.parametrize("name", FULL)
def test_every_value_of_a_full_scale_recipe_says_where_it_comes_from(name):
    given = (RECIPES / f"{name}.yaml").read_text()
    free = (
        "base:",
        "name:",
        "log_images_every:",
        "save_every:",
        "test:",
        "init_args:",
        "class_path: VGPO",
        "class_path: GRPO",
    )
    free += ("class_path: Leading", "class_path: FlowSDE", "class_path: ClippedSurrogate")
    lines = [line.strip() for line in given.splitlines() if line.strip() and not line.startswith("#")]
    silent = [line for line in lines if not line.endswith(":") and not line.startswith(free)]
    silent = [line for line in silent if not re.search(r"  # (\[[PFO]\]|a generator, .*\[F\])", line)]
    assert not silent


# Flow-GRPO's public configuration for SD3.5-M (general_ocr_sd3 and its like), typed in independently of the recipes
FLOW_GRPO = {
    "model.path": "stabilityai/stable-diffusion-3.5-medium",
    **{"model.resolution": 512, "model.max_sequence_length": 128, "model.lora_rank": 32, "model.lora_alpha": 64},
    **{"rollout.num_inference_steps": 10, "rollout.guidance_scale": 4.5, "rollout.prompts_per_epoch": 48},
    **{"rollout.group_size": 24, "rollout.micro_batch_size": 9, "sampler": "FlowSDE", "sampler.noise_level": 0.7},
    **{
        "window": "Leading",
        "window.size": 9,
        "optim.lr": 3e-4,
        "optim.betas": [0.9, 0.999],
        "optim.weight_decay": 1e-4,
    },
    **{"optim.lr_scheduler": "constant", "optim.num_minibatches": 2, "optim.max_grad_norm": 1.0},
    **{"objective": "ClippedSurrogate", "objective.guidance_scale": 4.5, "objective.clip_range": 1e-4},
    **{"credit.advantage_clip": 5.0, "evaluation.num_inference_steps": 40, "evaluation.guidance_scale": 4.5},
    "evaluation.eval_every": 60,
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_have_flow_grpos_values(name):
    config, found = recipe(name), values(name)
    assert {option: found[option] for option in FLOW_GRPO} == FLOW_GRPO
    assert config.optim.ema_decay == pytest.approx(0.9 ** (1 / 8), abs=1e-3)  # 0.9 every eighth update
    sigmas = shifted_sigmas(10, shift=3.0)
    mean_step = (sigmas[:9] - sigmas[1:10]).mean().item()
    beta = 0.01 if "pickscore" in name else 0.04  # of a KL without 1 / step length
    assert config.objective.beta == pytest.approx(beta * mean_step, rel=0.02) and config.objective.kl_type == "gaussian"
    assert config.evaluation.num_samples == {"GenEval": 2212, "OCR": 1018, "PickScore": 2048}[found["reward"]]


@pytest.mark.parametrize("task", ["geneval", "ocr", "pickscore"])
def test_the_twins_differ_in_nothing_but_the_method(task):
    ours, theirs = recipe(f"sd35-{task}"), recipe(f"sd35-{task}-grpo")
    assert ours.credit == VGPO(num_scored_steps=10, anchor_steps=5)  # the paper's: every step is scored
    assert theirs.credit == GRPO(scale_rewards="batch")
    ours, theirs = (as_data(config) for config in (ours, theirs))
    for data in (ours, theirs):
        del data["credit"], data["name"]
    assert ours == theirs


def test_flux_has_flow_grpos_values():
    flux = {
        **{
            "model.lora_rank": 64,
            "model.lora_alpha": 128,
            "model.distilled_guidance_scale": 3.5,
            "model.resolution": 512,
        },
        **{"rollout.num_inference_steps": 6, "rollout.micro_batch_size": 3, "rollout.prompts_per_epoch": 48},
        **{"rollout.group_size": 24, "rollout.guidance_scale": 1.0, "sampler.noise_level": 0.9, "window.size": 5},
        **{
            "objective.guidance_scale": 1.0,
            "objective.beta": 0.0,
            "objective.clip_range": 1e-4,
            "model.dtype": "bfloat16",
        },
        **{"evaluation.num_inference_steps": 28, "evaluation.guidance_scale": 1.0, "evaluation.eval_every": 30},
    }
    found = values("flux-pickscore")
    assert {option: found[option] for option in flux} == flux
    assert recipe("flux-pickscore").sampler == FlowSDE(0.9)


def test_recipes_divide_on_the_processes_they_were_made_for():
    for name in PAPER + ["flux-pickscore"]:
        for processes in (1, 2, 4, 8, 16, 32):
            assert batches(name, processes).share * 2 * processes == 1152
    assert batches("sd35-ocr", 32).sizes == [9, 9]  # as in Flow-GRPO on 32 GPUs: two micro-batches per update
    for name in ("sd35-ocr-24gb", "sd35-ocr-80gb"):
        assert set(batches(name).sizes) == {recipe(name).rollout.micro_batch_size}


@pytest.mark.parametrize("name, processes", [("8gpu", 8), ("nodes", 32)])
def test_accelerate_reads_its_configurations_and_leaves_the_dtype_to_the_recipe(name, processes):
    file = ROOT / "launch" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.num_processes == processes == 8 * config.num_machines
    assert config.mixed_precision == "no" and not config.use_cpu and str(config.distributed_type.value) == "MULTI_GPU"
    assert set(yaml.safe_load(file.read_text())) <= set(vars(config))
    command = re.search(rf"--config_file (launch/{name}\.yaml)", file.read_text())
    assert command and (ROOT / command[1]).is_file()
