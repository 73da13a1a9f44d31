"A pipeline's scheduler is refused by name, or every image is that of plain diffusers with it."

import json

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
from test_families import FAMILIES, Pair, load
from torch.testing import assert_close

from vgpo.policies.base import load_policy, meta_policy
from vgpo.policies.loading import ModelConfig

ACCEPTED = [
    {"shift": 1.0},
    {"shift": 0.4},
    {"shift": 11.0},
    {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64},
    {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 3.0},
    {"use_karras_sigmas": True, "shift": 2.0},
    {"use_exponential_sigmas": True, "shift": 3.0},
    {"use_beta_sigmas": True},
    {"shift_terminal": 0.1, "shift": 1.5},
    {"use_dynamic_shifting": True, "shift_terminal": 0.02, "use_karras_sigmas": True},
]
REFUSED = [
    ({"stochastic_sampling": True}, "has stochastic_sampling, .*set it to false"),
    ({"invert_sigmas": True}, "has invert_sigmas, .*set it to false"),
    ({"shift": 0.0}, "do not fall from 1 to 0 but are .*take the model's own"),
    ({"shift": -2.0}, "do not fall from 1 to 0"),
    ({"shift": float("nan")}, "do not fall from 1 to 0"),
    ({"shift": 1e12}, "do not fall from 1 to 0"),
    ({"shift_terminal": 1.5}, "do not fall from 1 to 0"),
    ({"use_dynamic_shifting": True, "base_shift": None}, "gives no schedule .*take the model's own"),
]
OTHERS = """DPMSolverMultistepScheduler EulerDiscreteScheduler EulerAncestralDiscreteScheduler DDIMScheduler
    DDPMScheduler FlowMatchHeunDiscreteScheduler FlowMatchLCMScheduler UniPCMultistepScheduler LCMScheduler""".split()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    "A family's Pair, whose scheduler may be exchanged; nothing may train its policy."
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("pipeline")
    plain = family.make()
    plain.save_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    policy = load(family, folder)
    noise = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return Pair(family, folder, plain, policy, noise)


@pytest.fixture
def with_scheduler(pair, monkeypatch):
    "A function: the policy that is loaded if the pipeline has another scheduler."

    def load_with(scheduler):
        pair.policy.pipe.scheduler = scheduler
        monkeypatch.setattr("vgpo.policies.base.load_pipeline", lambda *_: pair.policy.pipe)
        return load(pair.family, pair.folder)

    return load_with


@pytest.mark.parametrize("config", ACCEPTED, ids=str)
def test_what_is_accepted_draws_what_plain_diffusers_draws(pair, with_scheduler, config):
    policy, pair.plain.scheduler = with_scheduler(Euler(**config)), Euler(**config)
    assert_close(pair.family.pack(pair.draw(policy)), pair.draw_plain(), atol=1e-5, rtol=0)
    levels = policy.sigmas(3)
    assert abs(levels[0] - 1) < 1e-6 and levels[-1] == 0 and (levels.diff() < 0).all()


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=str)
def test_steps_that_are_not_eulers_from_noise_to_image_are_refused(with_scheduler, config, message):
    with pytest.raises(ValueError, match=message) as error:
        with_scheduler(Euler(**config))
    assert "\n" not in str(error.value) and "scheduler_config.json" in str(error.value)


@pytest.mark.parametrize("name", OTHERS)
def test_other_schedulers_are_refused_by_name(with_scheduler, name):
    with pytest.raises(ValueError, match=f"is a {name}, and only a FlowMatchEulerDiscreteScheduler can be trained"):
        with_scheduler(getattr(diffusers, name)())


@pytest.mark.parametrize("steps", [500, 2000])
def test_another_unit_of_time(pair, with_scheduler, steps):
    "Some pipelines divide by 1000 whatever the scheduler's configuration says; the others follow it, and so do we."
    scheduler = Euler(num_train_timesteps=steps, shift=3.0)
    if pair.policy.timestep_divisor:
        with pytest.raises(ValueError, match=f"has num_train_timesteps {steps}; this pipeline needs 1000"):
            with_scheduler(scheduler)
    else:
        policy, pair.plain.scheduler = with_scheduler(scheduler), scheduler
        assert_close(pair.family.pack(pair.draw(policy)), pair.draw_plain(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OTHERS[:3])
@pytest.mark.parametrize("where", ["both", "model_index.json", "scheduler_config.json"])
def test_a_folder_with_another_scheduler(tiny_copy, name, where):
    "With weights and without, and wherever it stands that it is another one."
    index, own = tiny_copy / "model_index.json", tiny_copy / "scheduler" / "scheduler_config.json"
    if where != "scheduler_config.json":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", name]}))
    if where != "model_index.json":
        getattr(diffusers, name)().save_config(tiny_copy / "scheduler")
    assert name in index.read_text() + own.read_text()
    for load_one in (load_policy, meta_policy):
        with pytest.raises((ValueError, OSError), match=name) as error:
            load_one(ModelConfig(str(tiny_copy)))
        assert "\n" not in str(error.value)
