"""A tiny pipeline with random weights, built once for all tests that need a real diffusers model."""

import os
import shutil
from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, browser
from hypothesis import settings

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for each other's
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

settings.register_profile(
    "same", derandomize=True
)  # the same examples at each run, so that CI fails for a change alone
settings.register_profile("explore")  # others at each run: --hypothesis-profile=explore
settings.load_profile("same")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    "The folder (a Path) of a saved StableDiffusion3Pipeline of the tiny world's shape, its weights random."
    import torch

    from vgpo.world.pretrain import make_autoencoder, make_pipeline

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    pipe = make_pipeline(make_autoencoder())
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)  # a velocity that depends on the prompt
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_copy(tiny_folder, tmp_path):
    "A copy of that folder, to be changed."
    return shutil.copytree(tiny_folder, tmp_path / "tiny")


@pytest.fixture
def policy(tiny_folder):
    "An SD3Policy of the random pipeline, without adapters."
    from vgpo.policies.loading import load_pipeline
    from vgpo.policies.sd3 import SD3Policy

    return SD3Policy(load_pipeline(str(tiny_folder)))


@pytest.fixture(scope="session")
def trained(tiny_folder, tmp_path_factory):
    "A run's folder whose LoRA is random and large, and the policy that was saved there."
    import torch

    from vgpo.config import Config, save_config
    from vgpo.evaluation.images import EvaluationConfig
    from vgpo.policies.base import load_policy
    from vgpo.policies.loading import ModelConfig

    model = ModelConfig(path=str(tiny_folder), lora_rank=4, lora_alpha=8)
    folder, policy = tmp_path_factory.mktemp("run"), load_policy(model)
    policy.add_lora(rank=4, alpha=8)
    generator = torch.Generator().manual_seed(0)
    for p in policy.parameters():
        p.data.normal_(std=0.2, generator=generator)
    policy.save(folder / "lora")
    config = Config(seed=4, model=model, evaluation=EvaluationConfig(num_samples=12, num_inference_steps=4))
    save_config(config, folder / "config.yaml")
    return folder, policy


@pytest.fixture
def recipe(tmp_path):
    "Writes a recipe and returns the command line that reads it."

    def write(text, name="mine"):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return ["--recipe", str(tmp_path / f"{name}.yaml")]

    return write


@pytest.fixture
def one_thread():
    "As many threads as a program with OMP_NUM_THREADS=1 has: digits may depend on their number."
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def script(monkeypatch):
    "Imports a script of benchmarks/ by its name."
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return __import__


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    "A window of a headless Chromium; the test is skipped where there is none."
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
