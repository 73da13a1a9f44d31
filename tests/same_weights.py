"""Do small runs of this checkout end with the same weights, bit for bit, as those of another commit?

    python tests/same_weights.py 42492ab           compares this checkout with that commit, in about eight minutes
    python tests/same_weights.py 42492ab geneval   only the runs whose names have `geneval` in them

Each run of RUNS is trained for three epochs here and there, on the CPU, by one process or two, and once more with an
interruption; then every tensor of its LoRA is compared. A change of structure must change none.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[1]
SMALL = {
    "epochs": 3, "save_every": 1, "evaluation.num_samples": 12, "evaluation.num_inference_steps": 4,
    "rollout.group_size": 4, "rollout.micro_batch_size": 4, "optim.num_minibatches": 2}  # fmt: skip
GENEVAL = {"recipe": "tiny-geneval", "rollout.prompts_per_epoch": 4}
OCR = {"recipe": "tiny-ocr", "rollout.prompts_per_epoch": 2}
TWO = {
    "reward": "{class_path: Combined, init_args: {rewards: {shapes: GenEvalShapes, small: JPEG}, "
    "weights: {shapes: 1.0, small: 0.5}}}"
}
RUNS = {  # name: options
    "geneval-vgpo": GENEVAL,
    "geneval-grpo": GENEVAL | {"credit": "GRPO"},
    "ocr-vgpo": OCR,
    "ocr-grpo": OCR | {"credit": "GRPO"},
    "cps": GENEVAL | {
        "sampler": "FlowCPS", "window.size": 5, "objective.beta": 0.1, "objective.kl_type": "velocity"},
    "window": GENEVAL | {
        "sampler": "DanceSDE", "sampler.noise_level": 0.7, "window": "Random",
        "window.size": 3, "window.per": "group"},
    "guard": GENEVAL | {
        "objective": "GRPOGuard", "objective.clip_range": 1e-3, "objective.beta": 0.1, "rollout.guidance_scale": 2,
        "objective.guidance_scale": 2},
    "gdpo-vgpo": GENEVAL | TWO | {"credit": "DecoupledVGPO", "credit.num_scored_steps": 5},
    "gdpo-grpo": GENEVAL | TWO | {"credit": "GDPO"},
    "all-weights": GENEVAL | {"model.lora_rank": 0, "optim.lr": 1e-4, "credit.scale_rewards": "batch"},
    "sum": GENEVAL | TWO | {"optim.lr_scheduler": "constant", "optim.lr_warmup_steps": 3},
    "target-kl": GENEVAL | {"objective.target_kl": 5, "evaluation.eval_every": 1},
}  # fmt: skip
PAIRS = ("geneval-vgpo", "geneval-grpo", "ocr-vgpo", "ocr-grpo")  # also by two processes, and interrupted

# What the options were called before credit and objectives were plugs: {now: (option then, {value now: value then})}
OLD = {
    "save_every": "checkpoint_every", "evaluation.num_samples": "evaluation.images", "output_dir": "output",
    "evaluation.num_inference_steps": "evaluation.steps", "evaluation.eval_every": "evaluation.every",
    "rollout.group_size": "sampling.group_size", "rollout.micro_batch_size": "sampling.batch_size",
    "rollout.prompts_per_epoch": "sampling.groups", "rollout.guidance_scale": "sampling.guidance_scale",
    "optim.num_minibatches": "optim.updates", "optim.lr_warmup_steps": "optim.warmup",
    "window.size": "sampling.sde_steps",
    "window.per": "sampling.window_per", "sampler.noise_level": "sampling.noise_level",
    "objective.clip_range": "optim.clip_range", "objective.beta": "optim.kl_weight", "objective.kl_type": "optim.kl",
    "objective.guidance_scale": "optim.guidance_scale", "objective.target_kl": "guard.kl_budget",
    "credit.num_scored_steps": "values.reward_steps",
}  # fmt: skip
OLD_VALUES = {
    ("credit", "GRPO"): "--advantage.kind=grpo", ("sampler", "FlowCPS"): "--sampling.sampler=flow-cps",
    ("sampler", "DanceSDE"): "--sampling.sampler=dance-sde", ("window", "Random"): "--sampling.window=random",
    ("objective", "GRPOGuard"): "--optim.ratio=guard", ("credit", "DecoupledVGPO"): "--advantage.combine=gdpo",
    ("credit", "GDPO"): "--advantage.kind=grpo --advantage.combine=gdpo",
    ("credit.scale_rewards", "batch"): "--advantage.std=global",
    ("optim.lr_scheduler", "constant"): "--optim.decay=false", ("reward", TWO["reward"]):
    "--reward.parts={geneval-shapes:\u00a01.0,\u00a0jpeg:\u00a00.5}",
}  # fmt: skip


def words(options, checkout):
    "The command line of options, in the words of the checkout."
    if not (checkout / "vgpo" / "variants.py").is_file():
        return [f"--{option}={value}" for option, value in options.items()]
    found = []
    for option, value in options.items():
        said = OLD_VALUES.get((option, value), f"--{OLD.get(option, option)}={value}")
        found += [word.replace("\u00a0", " ") for word in said.split(" ")]
    return found


def train(checkout, argv, processes=1):
    "Run the training program of a checkout to its end."
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    launch = [] if processes == 1 else [
        "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml",
        "--num_processes", str(processes)]  # fmt: skip
    done = subprocess.run([sys.executable, *launch, "-m", "vgpo.train", *argv], cwd=checkout, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        sys.exit(f"{checkout.name}: {' '.join(argv)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def weights(folder):
    "All tensors of the weights that a run has saved."
    (path,) = (folder / ("lora" if (folder / "lora").is_dir() else "transformer")).glob("*.safetensors")
    return load_file(path)


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def run(checkout, folder, name, processes=1, resumed=False):
    "The weights of one of RUNS, trained in a folder."
    label = f"{name}-{processes}-{'resumed' if resumed else 'unbroken'}"
    output = {"output_dir": folder, "name": label}
    argv = words(SMALL | RUNS[name] | output, checkout)
    train(checkout, argv, processes)
    if resumed:  # forget the last epoch, and train it again
        shutil.rmtree(folder / label / "checkpoints" / "epoch-00003")
        train(checkout, ["--resume", str(folder / label)], processes)
    return weights(folder / label)


def main(commit, part=""):
    ways = [(name, processes, False) for name in RUNS for processes in ((1, 2) if name in PAIRS else (1,))]
    ways = [way for way in ways + [(name, 1, True) for name in PAIRS] if part in way[0]]
    with TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(other), commit], cwd=HERE, check=True, capture_output=True
        )
        try:
            results = []
            for name, processes, resumed in ways:
                here, there = (run(c, Path(folder) / c.name, name, processes, resumed) for c in (HERE, other))
                results.append(same(here, there))
                how = f"{processes} process{'es' * (processes > 1)}{', resumed' * resumed}"
                print(f"{name:<16}{how:<24}{'the same' if results[-1] else 'OTHER WEIGHTS'}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=HERE, check=True)
    sys.exit(not all(results))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
