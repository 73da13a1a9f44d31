"""What an epoch of a full-scale recipe costs on this machine: seconds, memory by phase, the price of TCRM.

    python benchmarks/sd35.py                            SD3.5-M at 512 pixels, random weights, no download; for a GPU
    python benchmarks/sd35.py --recipe tiny-geneval --draft vgpo/world/tiny/vae       the same on a CPU, in seconds
    python benchmarks/sd35.py --recipe flux-pickscore --draft madebyollin/taef1

GRPO, VGPO, and VGPO with a draft decoder train in turn, with the recipe's own model, sampler and optimizer, on epochs
of `--groups` x `--group_size` images. Weights are random, which changes neither time nor memory; text embeddings are
random too, so the text encoders are absent, as with `model.free_text_encoders`. The judge is free (mean brightness)
unless `--judge` names a reward. All other options are those of a run, such as `--sampling.batch_size 8`. Beside each
measurement stands what `python -m vgpo.train --plan` says.
"""

import json
import sys
import tempfile
from argparse import ArgumentParser
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

import vgpo.runs.session
import vgpo.train
from vgpo.bench import PHASES, now
from vgpo.config import parse_config
from vgpo.plan import make_plan
from vgpo.policies.base import policy_classes
from vgpo.policies.loading import part_from_config, pipeline_from_configs, quiet, read_configs, reduce_vae_memory


def brightness(images, prompts, metadata):
    "A judge that costs nothing."
    return images.reshape(len(images), -1).mean(1) / 255


def peak_bytes(device):
    "Bytes that tensors took at once, at most, since `reset`; 0 where nobody counts them."
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def peak_clock(run, phase):
    "The trainer's clock, with the phase's peak memory besides."
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    with vgpo.runs.session.clock(run, phase):
        yield
    run.peaks[phase] = max(run.peaks.get(phase, 0), peak_bytes(run.device))


def random_policy(model, device="cpu"):
    "The policy of a ModelConfig with random weights and random text embeddings, made on the device."
    dtype = getattr(torch, model.dtype)
    pipe = pipeline_from_configs(model.path, dtype, device, without=("tokenizer", "text_encoder"))
    for name, p in pipe.transformer.named_parameters():
        if name.startswith("proj_out"):
            p.data.mul_(0.1)  # small velocities, so that nothing overflows
    cls = policy_classes()[type(pipe).__name__]

    def encode_one(policy, prompt):
        return policy.example_embeds(1).map(lambda t: torch.randn(t.shape).to(t.dtype))

    policy = type(f"Random{cls.__name__}", (cls,), {"encode_one": encode_one})(pipe, model, device)
    reduce_vae_memory(pipe, model.vae_tiling, model.vae_slicing)
    if model.tiny_vae:
        policy.add_tiny_vae(part_from_config(read_configs(model.tiny_vae)["vae"], dtype, device))
    return policy


def method_config(own, options, kind, draft):
    "The Config of one of the methods."
    words = ["--recipe", own.recipe, "--prompts.train", "tiny-scenes", "--prompts.test", "tiny-scenes"]
    words += ["--reward.name", own.judge, "--evaluation.images", "1", "--samples_every", "1000000"]
    words += ["--sampling.groups", str(own.groups), "--sampling.group_size", str(own.group_size), *options]
    config = parse_config([*words, "--advantage.kind", kind], "benchmarks/sd35.py")
    config.model.tiny_vae, config.model.embedding_cache, config.model.precompute_text_embeds = draft, None, True
    if own.judge == "sd35:brightness":
        config.reward.options = {}
    return config


def measure(config, epochs):
    "Medians over epochs, after one that does not count: seconds by phase and in all, and peak bytes by phase."
    with tempfile.TemporaryDirectory() as folder, patch.object(vgpo.runs.session, "make_policy", random_policy):
        (Path(folder) / "samples").mkdir()
        run, rows = vgpo.runs.session.Run(config, folder), []
        run.peaks = {}
        with patch.object(vgpo.train, "clock", peak_clock):
            for _ in range(epochs + 1):
                started = now(run.device)
                vgpo.train.train_epoch(run)
                rows.append(run.seconds | {"epoch": now(run.device) - started})
                run.epoch += 1
    return {key: median(row[key] for row in rows[1:]) for key in rows[0]}, run.peaks


def compare(config, seconds, peaks):
    "Lines of one method: measured and planned GiB by phase, and the FLOP/s that were reached."
    plan, lines = make_plan(config), []
    work = {"sample": ("sample",), "decode": ("decode", "draft"), "update": ("train", "beside", "reference")}
    for phase, kinds in work.items():
        flops = sum(plan.work[kind] * plan.flops[kind] for kind in kinds)
        planned = plan.phases[phase] / 2**30
        found = f"{peaks[phase] / 2**30:8.2f} GiB measured, {planned:8.2f} planned" if peaks[phase] else " " * 30
        speed = f"{flops / seconds[phase] / 1e9:12,.1f} GFLOP/s of {flops / 1e9:14,.1f} GFLOPs"
        lines.append(f"    {phase:<8}{found}{speed}")
    return lines


def main(argv=None):
    "The program."
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--recipe", default="sd35-ocr-80gb")
    parser.add_argument(
        "--draft", default="madebyollin/taesd3", help="the draft decoder of the third method; '' for none"
    )
    parser.add_argument("--judge", default="sd35:brightness", help="a reward's name")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each method that count")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=16)
    parser.add_argument("--output", help="a .json file for the numbers")
    own, options = parser.parse_known_args(argv)
    quiet()
    sys.path.insert(0, str(Path(__file__).parent))  # for the judge above
    methods = {"grpo": ("grpo", None), "vgpo": ("vgpo", None)} | (
        {"vgpo, drafts": ("vgpo", own.draft)} if own.draft else {}
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{own.recipe} on {gpu}, PyTorch {torch.__version__}: {own.groups} x {own.group_size} images an epoch, "
          f"medians of {own.epochs} epochs")  # fmt: skip
    print(f"{'seconds':<16}" + "".join(f"{key:>10}" for key in (*PHASES, "epoch")) + f"{'/ grpo':>10}")
    results, notes = {}, []
    for name, (kind, draft) in methods.items():
        config = method_config(own, options, kind, draft)
        seconds, peaks = measure(config, own.epochs)
        results[name] = {"seconds": seconds, "peak_bytes": peaks}
        price = seconds["epoch"] / results["grpo"]["seconds"]["epoch"]
        print(f"{name:<16}" + "".join(f"{seconds[key]:>10.3f}" for key in (*PHASES, "epoch")) + f"{price:>10.3f}")
        notes += [f"  {name}", *compare(config, seconds, peaks)]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print("\n".join(["memory and speed by phase", *notes]))
    if own.output:
        Path(own.output).write_text(json.dumps({"device": gpu, "recipe": own.recipe, "results": results}, indent=1))


if __name__ == "__main__":
    main()
