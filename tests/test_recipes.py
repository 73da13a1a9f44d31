"The recipes: what they hold is what they say it comes from, and they run on the processes they were made for."

import re
from functools import lru_cache
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from vgpo.config import RECIPES, parse_config, value_of
from vgpo.flow import shifted_sigmas
from vgpo.plan import config_batches
from vgpo.rewards.base import REWARDS

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


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_a_config_with_its_own_name_and_a_known_reward(name):
    config = recipe(name)
    assert config.name == name
    assert set(config.reward.parts or [config.reward.name]) <= set(REWARDS)
    if name.startswith("sd35-ocr"):  # pictures are more than one line of text
        assert config.reward.options["mode"] == "full"


@pytest.mark.parametrize("name", FULL)
def test_every_value_of_a_full_scale_recipe_says_where_it_comes_from(name):
    given = (RECIPES / f"{name}.yaml").read_text()
    free = ("name:", "samples_every:", "checkpoint_every:", "kind:", "test:", "options:", "guidance_scale: 1.0  #")
    lines = [line.strip() for line in given.splitlines() if line.strip() and not line.startswith("#")]
    silent = [line for line in lines if not line.endswith(":") and not line.startswith(free)]
    silent = [line for line in silent if not re.search(r"  # (\[[PFO]\]|a generator, .*\[F\])", line)]
    assert not silent


# Flow-GRPO's public configuration for SD3.5-M (general_ocr_sd3 and its like), typed in independently of the recipes
FLOW_GRPO = {
    "model.path": "stabilityai/stable-diffusion-3.5-medium",
    **{"model.resolution": 512, "model.max_sequence_length": 128, "model.lora_rank": 32, "model.lora_alpha": 64},
    **{"sampling.steps": 10, "sampling.sde_steps": 9, "sampling.guidance_scale": 4.5, "sampling.noise_level": 0.7},
    **{"sampling.groups": 48, "sampling.group_size": 24, "sampling.batch_size": 9, "sampling.sampler": "flow-sde"},
    **{"optim.lr": 3e-4, "optim.betas": (0.9, 0.999), "optim.weight_decay": 1e-4, "optim.updates": 2},
    **{"optim.guidance_scale": 4.5, "optim.clip_range": 1e-4, "optim.max_grad_norm": 1.0, "advantage.clip": 5.0},
    **{"evaluation.steps": 40, "evaluation.guidance_scale": 4.5, "evaluation.every": 60},
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_have_flow_grpos_values(name):
    config = recipe(name)
    assert {option: value_of(config, option) for option in FLOW_GRPO} == FLOW_GRPO
    assert config.optim.ema_decay == pytest.approx(0.9 ** (1 / 8), abs=1e-3)  # 0.9 every eighth update
    sigmas = shifted_sigmas(10, shift=3.0)
    mean_step = (sigmas[:9] - sigmas[1:10]).mean().item()
    beta = 0.01 if "pickscore" in name else 0.04  # of a KL without 1 / step length
    assert config.optim.kl_weight == pytest.approx(beta * mean_step, rel=0.02)
    assert config.evaluation.images == {"geneval": 2212, "ocr": 1018, "pickscore": 2048}[config.reward.name]


@pytest.mark.parametrize("task", ["geneval", "ocr", "pickscore"])
def test_the_twins_differ_in_nothing_but_the_method(task):
    ours, theirs = recipe(f"sd35-{task}"), recipe(f"sd35-{task}-grpo")
    assert (ours.advantage.kind, theirs.advantage.kind) == ("vgpo", "grpo")
    assert (ours.advantage.std, theirs.advantage.std) == ("group", "global")
    assert ours.values.reward_steps == ours.sampling.steps and ours.advantage.anchor_steps == 5  # the paper's
    for part in ("model", "prompts", "reward", "sampling", "optim", "evaluation"):
        assert getattr(ours, part) == getattr(theirs, part)


def test_flux_has_flow_grpos_values():
    flux = {
        **{"model.lora_rank": 64, "model.lora_alpha": 128, "model.embedded_guidance": 3.5, "sampling.steps": 6},
        **{"sampling.noise_level": 0.9, "sampling.batch_size": 3, "sampling.groups": 48, "sampling.group_size": 24},
        **{
            "sampling.guidance_scale": 1.0,
            "optim.guidance_scale": 1.0,
            "optim.kl_weight": 0.0,
            "model.resolution": 512,
        },
        **{"evaluation.steps": 28, "evaluation.every": 30, "optim.clip_range": 1e-4, "model.dtype": "bfloat16"},
    }
    config = recipe("flux-pickscore")
    assert {option: value_of(config, option) for option in flux} == flux


def test_recipes_divide_on_the_processes_they_were_made_for():
    for name in PAPER + ["flux-pickscore"]:
        for processes in (1, 2, 4, 8, 16, 32):
            assert config_batches(recipe(name), processes).share * 2 * processes == 1152
    assert config_batches(recipe("sd35-ocr"), 32).sizes == [9, 9]  # as in Flow-GRPO on 32 GPUs: two batches an update
    for name in ("sd35-ocr-24gb", "sd35-ocr-80gb"):
        config = recipe(name)
        assert set(config_batches(config).sizes) == {config.sampling.batch_size}


@pytest.mark.parametrize("name, processes", [("8gpu", 8), ("nodes", 32)])
def test_accelerate_reads_its_configurations_and_leaves_the_dtype_to_the_recipe(name, processes):
    file = ROOT / "launch" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.num_processes == processes == 8 * config.num_machines
    assert config.mixed_precision == "no" and not config.use_cpu and str(config.distributed_type.value) == "MULTI_GPU"
    assert set(yaml.safe_load(file.read_text())) <= set(vars(config))
    command = re.search(rf"--config_file (launch/{name}\.yaml)", file.read_text())
    assert command and (ROOT / command[1]).is_file()
