"docs/metrics.md defines every number that a run or an evaluation writes down, and no other option or metric."

import json
import re
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plug_classes import plug_classes

import vgpo.objectives
from vgpo.config import Config, option_names
from vgpo.credit.vgpo import VGPO
from vgpo.evaluate import main as evaluate
from vgpo.flow import shifted_sigmas
from vgpo.objectives.base import Objective
from vgpo.objectives.clipped import ClippedSurrogate
from vgpo.objectives.grpo_guard import GRPOGuard
from vgpo.rollout import rollout
from vgpo.sde import FlowSDE
from vgpo.toy import GaussianMixture
from vgpo.train import main as train
from vgpo.trainer import MicroBatch
from vgpo.windows import Random

PAGE = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
SMALL = ["--epochs=1", "--rollout.prompts_per_epoch=2", "--rollout.group_size=2", "--rollout.num_inference_steps=3",
         "--window.size=2", "--credit.num_scored_steps=2", "--evaluation.num_samples=4",
         "--evaluation.num_inference_steps=2", "--evaluation.eval_every=1", "--model.lora_rank=2"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    "A short run with a KL and a second reward, of a reward with a verdict, by GRPO-Guard."
    folder = tmp_path_factory.mktemp("runs")
    train([*SMALL, f"--model.path={tiny_folder}", f"--output_dir={folder}", "--objective", "GRPOGuard",
           "--objective.beta=0.1", "--early_stopping.validation_reward=JPEG"])  # fmt: skip
    return next(folder.iterdir())


def statistics_of(objective):
    "The names of what the loss of an objective says of itself, with a KL; a run of each would take minutes."
    noise, sampler = torch.randn(4, 4, 2), FlowSDE(0.7)
    policy = SimpleNamespace(
        velocity=lambda x, sigma, embeds, guidance_scale: GaussianMixture.ring().velocity(x, sigma)
    )
    policy.reference = nullcontext
    path = rollout(
        GaussianMixture.ring().velocity, noise[:, 0], shifted_sigmas(3), sampler, noise[:, 1:], keep_means=True
    )
    batch = MicroBatch(0, [], None, path, torch.ones(4, 3, dtype=bool), noise[:, 1:], advantages=torch.randn(4, 3))
    loss = objective(beta=0.1)
    batch.old_velocities = loss.old_velocities(policy, batch)
    return {*loss.loss(policy, batch, 1, sampler)[1]}


def test_every_metric_of_a_run_is_defined_and_every_definition_is_of_a_metric(run):
    logged = {key for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert statistics_of(GRPOGuard) <= logged  # what the run had
    logged = logged.union(*map(statistics_of, plug_classes(Objective, vgpo.objectives)))
    defined = {name for line in PAGE.partition("# What an evaluation finds")[0].splitlines() if line.startswith("| `")
               for name in re.findall(r"`([^`]+)`", line.split("|")[1])}  # fmt: skip
    assert defined - logged == {"reward/NAME", "raw/NAME"} and not logged - defined


def test_every_entry_of_results_is_defined(run, tmp_path):
    evaluate([str(run), "--num_samples=2", "--output", str(tmp_path / "e")])
    parts = PAGE.partition("## `results.json` of an evaluation")
    for part, path in ((parts[0], run / "results.json"), (parts[2], tmp_path / "e" / "results.json")):
        found = json.loads(path.read_text())
        assert all(f"`{key}`" in part for key in found), path
    settings = json.loads((tmp_path / "e" / "settings.json").read_text())
    settings = {word for word in settings if not word.startswith("model.")} | {"model"}  # of its parts
    words = {"model", "trained", "prompts", "rows", "rows_sha256", "cluster", "images_per_prompt", "guidance_scale",
             "num_inference_steps", "seed"}  # fmt: skip
    assert words < set(settings) and all(f"`{word}`" in parts[2] for word in words)
    assert {field.name for field in fields(Config().model)} > set(settings) - words  # the model's options


def test_every_option_that_the_page_names_is_there():
    sections = {"credit": VGPO, "objective": ClippedSurrogate, "window": Random}
    sections |= {f.name: f.type for f in fields(Config) if is_dataclass(f.type)}
    known = {f"{name}.{f.name}" for name, section in sections.items() for f in fields(section)} | set(option_names())
    named = set(re.findall(rf"\b((?:{'|'.join(sections)})\.(?!jsonl?\b)[a-z_]+)", PAGE))
    parts = {f"model.{part}" for part in ("transformer", "text_encoder", "vae", "scheduler")}  # of results.json
    assert named and named <= known | parts, named - known - parts
