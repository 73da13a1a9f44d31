"""What an epoch of a full-scale recipe costs on this machine: seconds, memory by phase, the price of TCRM.

    python benchmarks/sd35.py                            SD3.5-M at 512 pixels, random weights, no download; for a GPU
    python benchmarks/sd35.py --recipe tiny-geneval --tiny_vae vgpo/world/tiny/vae       the same on a CPU, in seconds
    python benchmarks/sd35.py --recipe flux-pickscore --tiny_vae madebyollin/taef1

GRPO, VGPO, and VGPO with a tiny VAE train in turn, with the recipe's own model, sampler and optimizer, on epochs
of `--groups` x `--group_size` images. Weights are random, which changes neither time nor memory; text embeddings are
random too, so the text encoders are absent, as with `model.precompute_text_embeds`. The reward is free (mean
brightness) unless `--reward` names one. All other options are those of a run, such as `--rollout.micro_batch_size 8`.
Beside each measurement stands what `python -m vgpo.plan` says.
"""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path
from statistics import median

import torch

from vgpo.bench import PHASES, timed_epoch
from vgpo.callback import Callback
from vgpo.config import parse_config
from vgpo.distributed import init_accelerator
from vgpo.plan import PHASE_WORK, make_plan
from vgpo.policies.base import policy_classes
from vgpo.policies.loading import part_from_config, pipeline_from_configs, quiet, read_configs, reduce_vae_memory
from vgpo.prompts.files import load_prompts
from vgpo.rewards.base import make_reward
from vgpo.runs.callbacks import Clock
from vgpo.trainer import Trainer


def brightness(images, prompts, metadata):
    "A reward that costs nothing."
    return images.reshape(len(images), -1).mean(1) / 255


class Peaks(Callback):
    "Bytes that tensors took at once, at most, in each phase, in `bytes`; 0 where nobody counts them."

    def __init__(self):
        self.bytes = {}

    def before_phase(self, trainer, phase):
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)

    def after_phase(self, trainer, phase):
        peak = torch.cuda.max_memory_allocated(trainer.device) if trainer.device.type == "cuda" else 0
        self.bytes[phase] = max(self.bytes.get(phase, 0), peak)


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


def method_config(own, options, credit, draft):
    "The Config of one of the methods."
    words = ["--recipe", own.recipe, "--prompts.train", "tiny-scenes", "--reward", own.reward, "--credit", credit]
    words += ["--rollout.prompts_per_epoch", str(own.groups), "--rollout.group_size", str(own.group_size), *options]
    config = parse_config(words)
    config.model.tiny_vae, config.model.embedding_cache, config.model.precompute_text_embeds = draft, None, True
    return config


def measure(config, epochs):
    "Medians over epochs, after one that does not count: seconds by phase and in all, and peak bytes by phase."
    c, accelerator, peaks = config, init_accelerator(config.rollout.reward_timeout), Peaks()
    policy = random_policy(c.model, accelerator.device)
    policy.make_trainable(c.model, c.seed)
    trainer = Trainer(policy, make_reward(c.reward), load_prompts(c.prompts.train, "train"), sampler=c.sampler,
                      credit=c.credit, objective=c.objective, window=c.window, rollout=c.rollout, optim=c.optim,
                      accelerator=accelerator, callbacks=[Clock(), peaks])  # fmt: skip
    rows = [timed_epoch(trainer) for _ in range(epochs + 1)][1:]
    return {key: median(row[key] for row in rows) for key in rows[0]}, peaks.bytes


def compare(config, seconds, peaks):
    "Lines of one method: measured and planned GiB by phase, and the FLOP/s that were reached."
    plan, lines = make_plan(config), []
    for phase, kinds in PHASE_WORK.items():
        flops = sum(plan.work[kind] * plan.flops[kind] for kind in kinds if kind != "encode")
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
        "--tiny_vae", default="madebyollin/taesd3", help="the tiny VAE of the third method; '' for none"
    )
    parser.add_argument("--reward", default="sd35:brightness", help="a reward's name")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each method that count")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=16)
    parser.add_argument("--output", help="a .json file for the numbers")
    own, options = parser.parse_known_args(argv)
    quiet()
    sys.path.insert(0, str(Path(__file__).parent))  # for the reward above
    methods = {"GRPO": ("GRPO", None), "VGPO": ("VGPO", None)}
    if own.tiny_vae:
        methods["VGPO, tiny VAE"] = ("VGPO", own.tiny_vae)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{own.recipe} on {gpu}, PyTorch {torch.__version__}: {own.groups} x {own.group_size} images per epoch, "
          f"medians of {own.epochs} epochs")  # fmt: skip
    print(f"{'seconds':<16}" + "".join(f"{key:>10}" for key in (*PHASES, "epoch")) + f"{'/ GRPO':>10}")
    results, notes = {}, []
    for name, (credit, draft) in methods.items():
        config = method_config(own, options, credit, draft)
        seconds, peaks = measure(config, own.epochs)
        results[name] = {"seconds": seconds, "peak_bytes": peaks}
        price = seconds["epoch"] / results["GRPO"]["seconds"]["epoch"]
        print(f"{name:<16}" + "".join(f"{seconds[key]:>10.3f}" for key in (*PHASES, "epoch")) + f"{price:>10.3f}")
        notes += [f"  {name}", *compare(config, seconds, peaks)]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print("\n".join(["memory and speed by phase", *notes]))
    if own.output:
        Path(own.output).write_text(json.dumps({"device": gpu, "recipe": own.recipe, "results": results}, indent=1))


if __name__ == "__main__":
    main()
