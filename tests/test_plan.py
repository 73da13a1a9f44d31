"Plans against real runs of the tiny model: parameters, FLOPs, bytes and work; and a plan for every full-scale recipe."

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_sd3
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import vgpo.costs
import vgpo.plan
from vgpo.batches import solve_batches
from vgpo.bench import PHASES
from vgpo.config import RECIPES, parse_config
from vgpo.costs import FORMULAS, costs_of, metered, size_of, storages
from vgpo.distributed import init_accelerator
from vgpo.objectives.grpo_guard import GRPOGuard
from vgpo.plan import (
    CARDS,
    SHARDS,
    Card,
    count_parameters,
    epoch_work,
    exchanged_bytes,
    gathered_bytes,
    main,
    make_plan,
    resident_bytes,
    reward_bytes,
    shard_table,
    trajectory_bytes,
    working_bytes,
)
from vgpo.policies.base import load_policy, meta_policy
from vgpo.policies.loading import ModelConfig, load_pipeline, networks, part_from_config, read_configs
from vgpo.policies.sd3 import SD3Policy
from vgpo.runs.session import build_trainer

FULL = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("tiny"))
SMALL = [
    *("--rollout.prompts_per_epoch=3", "--rollout.group_size=4", "--rollout.num_inference_steps=4"),
    *("--rollout.micro_batch_size=4", "--window.size=3", "--optim.num_minibatches=2"),
    *("--reward=tiny_rewards:brightness", "--prompts.train=tiny-scenes"),
]


@pytest.fixture
def options(tiny_folder):
    "The command line of a small run with the random tiny model, but for its credit estimator."
    return [*SMALL, f"--model.path={tiny_folder}"]


VGPO = ["--credit=VGPO", "--credit.num_scored_steps=3", "--credit.anchor_steps=3"]


def trainer_of(words):
    "The Trainer of a command line."
    config = parse_config(words)
    return build_trainer(config, init_accelerator(config.rollout.reward_timeout))


def test_a_run_checks_the_processes_that_it_really_has(options, monkeypatch):
    assert trainer_of(options + VGPO).micro_batches.share == 6
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 4)
    with pytest.raises(ValueError, match="2 minibatches on 4 processes do not divide into 8 equal parts"):
        trainer_of(options + VGPO)


PUBLISHED = {  # millions of parameters, and GB of the file at two bytes a number, as on the hub
    ("stabilityai/stable-diffusion-3.5-medium", "transformer"): (2_243_171_520, 4.94),
    ("stabilityai/stable-diffusion-3.5-medium", "text_encoder"): (123_650_304, 0.25),
    ("stabilityai/stable-diffusion-3.5-medium", "text_encoder_2"): (694_659_840, 1.39),
    ("stabilityai/stable-diffusion-3.5-medium", "text_encoder_3"): (4_762_310_656, 9.52),
    ("stabilityai/stable-diffusion-3.5-medium", "vae"): (83_819_683, 0.17),
    ("stabilityai/stable-diffusion-3.5-large", "transformer"): (8_056_627_520, 16.29),
    ("black-forest-labs/FLUX.1-dev", "transformer"): (11_901_408_320, 23.80),
    ("Qwen/Qwen-Image", "transformer"): (20_430_401_088, 40.86),
    ("Qwen/Qwen-Image", "text_encoder"): (8_292_166_656, 16.58),
    ("Qwen/Qwen-Image", "vae"): (126_892_531, 0.25),
    ("Tongyi-MAI/Z-Image", "transformer"): (6_154_908_736, 12.31),
    ("Tongyi-MAI/Z-Image", "text_encoder"): (4_022_468_096, 8.04),
}


@pytest.mark.parametrize("model, part", PUBLISHED)
def test_configurations_reproduce_the_published_models(model, part):
    network = part_from_config(read_configs(model)[part], torch.bfloat16)
    count, gigabytes = PUBLISHED[model, part]
    assert sum(p.numel() for p in network.parameters()) == count
    assert round(size_of(network.state_dict(keep_vars=True).values()) / 1e9, 2) == gigabytes
    assert {p.device.type for p in network.parameters()} == {"meta"}


def test_t5_keeps_float32_where_the_library_does_so_in_float16():
    small = {"_class_name": "T5EncoderModel", "d_model": 8, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    part = part_from_config(small | {"vocab_size": 10, "feed_forward_proj": "gated-gelu"}, torch.float16)
    kept = {name for name, p in part.named_parameters() if p.dtype == torch.float32}
    assert kept == {"encoder.block.0.layer.1.DenseReluDense.wo.weight"}


def real_policy(folder, dtype=torch.float32, checkpointing=False):
    "The tiny model with a LoRA, real, with gradients in place."
    policy = SD3Policy(load_pipeline(str(folder), dtype))
    policy.add_lora(rank=32, alpha=64)
    if checkpointing:
        policy.network.enable_gradient_checkpointing()
    return with_gradients(policy)


def with_gradients(policy):
    "A policy whose gradients are already there."
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    return policy


def passes(policy, batch=6, guidance=1.0, reference=False):
    "A function that computes what is trained in one step: a velocity, or its distance from the reference's."
    x = torch.zeros(batch, *policy.latent_shape, device=policy.device)
    condition = policy.example_embeds(batch)
    policy.empty = condition[:1]

    def forward():
        velocity = policy.velocity(x, torch.tensor(0.5), condition, guidance)
        if not reference:
            return velocity
        with torch.no_grad(), policy.reference():
            before = policy.velocity(x, torch.tensor(0.5), condition, guidance)
        return velocity - before

    return forward


def test_parameters_are_those_of_the_real_model(tiny_folder):
    real, meta = real_policy(tiny_folder), meta_policy(ModelConfig(path=str(tiny_folder)))
    for name, part in networks(real.pipe).items():
        there = meta.pipe.components[name].state_dict()
        assert {k: (t.shape, t.dtype) for k, t in part.state_dict().items()} == {
            k: (t.shape, t.dtype) for k, t in there.items()
        }
    assert [(p.shape, p.dtype) for p in real.parameters()] == [(p.shape, p.dtype) for p in meta.parameters()]
    assert meta.latent_shape == real.latent_shape
    shapes = [[t.shape for t in c if t is not None] for c in (meta.example_embeds(2), real.encode(["a", "a red ball"]))]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flops_and_bytes_are_those_of_real_tensors(tiny_folder, dtype, checkpointing):
    real = real_policy(tiny_folder, getattr(torch, dtype), checkpointing)
    model = ModelConfig(path=str(tiny_folder), dtype=dtype, gradient_checkpointing=checkpointing)
    meta = with_gradients(meta_policy(model))
    ours, truth = (metered(passes(policy), backward=True) for policy in (meta, real))
    assert ours.flops == truth.flops
    assert ours.kept == pytest.approx(truth.kept, rel=0 if dtype == "float32" else 0.01)
    assert ours.peak == pytest.approx(truth.peak, rel=0.02)
    assert ours.peak > ours.kept > 6 * 4 * math.prod(real.latent_shape)


def test_flops_are_those_of_the_public_counter(tiny_folder):
    real = real_policy(tiny_folder)
    attention = {op: formula.__wrapped__ for op, formula in FORMULAS.items() if op not in flop_registry}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        passes(real)().square().mean().backward()
    config = parse_config(["--model.path", str(tiny_folder), "--rollout.micro_batch_size", "6"])
    assert costs_of(config)[1].train.flops == counter.get_total_flops()


def test_flops_of_attention_and_of_a_product_by_hand():
    q = torch.zeros(2, 3, 50, 8, device="meta", requires_grad=True)
    cost = metered(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert cost.flops == 2 * 2 * (2 * 3 * 50 * 50 * 8)  # two products of L x L x D, two FLOPs a multiply-add
    a, b = torch.zeros(7, 11, device="meta"), torch.zeros(11, 13, device="meta")
    assert metered(lambda: a @ b) == vgpo.costs.Cost(2 * 7 * 11 * 13, 0 + 7 * 13 * 4, 7 * 13 * 4)


def test_kept_bytes_are_what_autograd_saves(tiny_folder):
    real = real_policy(tiny_folder)
    weights, saved = set(storages([*real.network.parameters(), *real.network.buffers()])), {}

    def keep(t):
        saved.update({key: s for key, s in storages(t).items() if key not in weights})
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = passes(real)()
    by_hooks = sum(s.nbytes() for s in saved.values())
    assert by_hooks == pytest.approx(metered(passes(real)).kept, abs=2 * result.nbytes + 1000)


def test_guidance_and_kl_are_made_of_the_parts_that_are_counted(options, tiny_folder):
    config = parse_config(
        [*options, *VGPO, "--rollout.micro_batch_size=6", "--objective.guidance_scale=2", "--objective.beta=0.1"]
    )
    policy, costs = costs_of(config)
    whole = metered(passes(real_policy(tiny_folder), guidance=2.0, reference=True), backward=True)
    assert whole.flops == costs.train.flops + costs.forward.flops + 2 * costs.reference.flops  # both with guidance
    assert costs.reference.flops < costs.forward.flops  # without adapters
    assert working_bytes(config, policy, costs)["update"] == pytest.approx(whole.peak, rel=0.02)


VARIANTS = {
    "vgpo": VGPO,
    "grpo": ["--credit=GRPO"],
    "guided with kl": [*VGPO, "--rollout.guidance_scale=2", "--objective.guidance_scale=2", "--objective.beta=0.1"],
    "unguided update": [*VGPO, "--rollout.guidance_scale=2"],
    "better projections": [*VGPO, "--credit.projection_steps=4", "--rollout.guidance_scale=2"],
    "better projections of every state": ["--credit=Gains", "--credit.projection_steps=2"],
    "finished images": ["--credit=GRPO", "--objective=NFT"],
    "finished images, guided, with kl": [
        *("--credit=GRPO", "--objective=VGRPO", "--objective.beta=0.1", "--objective.guidance_scale=2"),
        *("--rollout.guidance_scale=2", "--window=Random", "--window.size=2", "--window.per=group"),
    ],
    "means kept": [*VGPO, "--objective=FlowDPPO"],
    "drafts, checkpointing": [*VGPO, "--model.tiny_vae={}/vae", "--model.gradient_checkpointing=true"],
}


def counted_epoch(trainer, monkeypatch):
    "What really happens in an epoch of a trainer: images through the network, decoded, scored; and what is kept."
    seen = {"network": 0, "backward": 0, "decode": 0, "draft": 0, "score": 0}
    policy, reward = trainer.policy, trainer.reward

    def passed(module, given, output):
        seen["network"] += len(output[0])
        if output[0].requires_grad:
            output[0].register_hook(lambda g: seen.__setitem__("backward", seen["backward"] + len(g)))

    policy.network.register_forward_hook(passed)
    pixels, scored = policy.pixels, type(reward).__call__

    def decoded(vae, latents):
        seen["decode" if vae is policy.pipe.vae else "draft"] += len(latents)
        return pixels(vae, latents)

    def counted(self, images, prompts, metadata):
        seen["score"] += len(images)
        return scored(self, images, prompts, metadata)

    monkeypatch.setattr(policy, "pixels", decoded)
    monkeypatch.setattr(type(reward), "__call__", counted)
    trainer.train_epoch()
    tensors = [
        (
            b.path.latents,
            b.path.clean,
            b.path.first_clean,
            b.path.log_probs,
            b.path.means,
            b.noise,
            b.old_velocities,
            *b.embeds,
        )
        for b in trainer.batches
    ]
    return seen, size_of(t for batch in tensors for t in batch if t is not None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_work_of_a_real_epoch(options, tiny_folder, monkeypatch, variant):
    words = [*options, *(word.format(tiny_folder) for word in VARIANTS[variant])]
    trainer, plan = trainer_of(words), make_plan(parse_config(words))
    seen, kept = counted_epoch(trainer, monkeypatch)
    work = plan.work
    assert seen["network"] == work["rollout"] + work["train"] + work["guide"] + work["reference"]
    assert seen["backward"] == work["train"]
    assert {k: seen[k] for k in ("decode", "draft", "score")} == {k: work[k] for k in ("decode", "draft", "score")}
    assert plan.trajectories == kept

    trained, moments = trainer.policy.parameters(), trainer.optimizer.state.values()
    real = {
        "trained weights": size_of(trained),
        "gradients": size_of(p.grad for p in trained),
        "AdamW's moments": size_of(m[key] for m in moments for key in ("exp_avg", "exp_avg_sq")),
        "average (EMA)": size_of(trainer.ema.shadow_params),
        "autoencoder": sum(
            size_of([*m.parameters(), *m.buffers()]) for m in (trainer.policy.pipe.vae, trainer.policy.tiny_vae) if m
        ),
    }
    assert {part: plan.resident[part] for part in real} == real
    network = trainer.policy.pipe.transformer
    assert plan.resident["transformer, frozen"] == size_of([*network.parameters(), *network.buffers()]) - size_of(
        trained
    )


def test_the_work_by_hand(options):
    guided = ["--rollout.guidance_scale=2", "--objective.guidance_scale=2", "--objective.beta=0.1"]
    work = make_plan(parse_config([*options, *VGPO, *guided])).work
    passes = {"rollout": 12 * 4 * 2, "train": 12 * 3, "guide": 12 * 3, "reference": 12 * 3 * 2}
    assert work == passes | {"decode": 36, "draft": 0, "score": 36, "encode": 3}
    better = make_plan(parse_config([*options, *VGPO, *guided, "--credit.projection_steps=5"])).work
    assert better == work | {"rollout": 12 * (4 + 2 * 4) * 2}  # two states besides the last, four more steps each
    config = parse_config([*options, "--credit=GRPO"])
    config.reward = {"class_path": "Combined", "init_args": {"rewards": {"a": "JPEG", "b": "OCR"}, "weights": {}}}
    assert epoch_work(config, solve_batches(3, 4, 2, 4))["score"] == 24


def test_all_weights_cost_twenty_bytes_each_and_a_copy(tiny_folder):
    model = ModelConfig(path=str(tiny_folder), lora_rank=0, dtype="bfloat16")
    policy = meta_policy(model)
    count = sum(p.numel() for p in policy.network.parameters())
    parts = resident_bytes(policy, model, processes=2)
    trained = ("trained weights", "gradients", "AdamW's moments", "average (EMA)")
    assert sum(parts[part] for part in trained) == 20 * count
    assert parts["copies to compute with"] == 2 * count  # autocast's
    assert parts["transformer, frozen"] == 4 * sum(b.numel() for b in policy.network.buffers())  # nothing else
    single = ModelConfig(path=str(tiny_folder), lora_rank=0)
    assert resident_bytes(meta_policy(single), single)["copies to compute with"] == 0  # they compute themselves


def test_the_tiny_vae_is_not_trained(tiny_folder):
    for rank in (4, 0):
        model = ModelConfig(path=str(tiny_folder), lora_rank=rank, tiny_vae=str(tiny_folder / "vae"))
        policy = meta_policy(model)
        counts = count_parameters(policy)
        assert counts["tiny VAE"][0] == 0 < counts["tiny VAE"][1] == counts["vae"][1]
        trained = {part: n for part, (n, _) in counts.items() if n}
        assert trained == {"transformer": sum(p.numel() for p in policy.parameters())}


def test_weights_that_nothing_depends_on_are_not_trained():
    model = ModelConfig(path="Qwen/Qwen-Image", lora_rank=0, dtype="bfloat16")
    policy = meta_policy(model)
    assert not any(p.requires_grad for p in policy.network.transformer_blocks[-1].txt_mlp.parameters())
    assert all(p.requires_grad for p in policy.network.transformer_blocks[-2].parameters())


@pytest.fixture
def eight_processes():
    "Eight processes, of which only this one is real: what the others would send never comes."
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    torch.distributed.destroy_process_group()


def tracked(policy, steps=2):
    "{kind: bytes} after the last step's forward and backward passes and at the fullest moment, by PyTorch's tracker."
    optimizer, x = torch.optim.AdamW(policy.parameters()), torch.randn(1, *policy.latent_shape)
    condition, found = policy.encode(["a"]), []
    tracker = FSDPMemTracker(policy.network, optimizer)
    with tracker:
        for _ in range(steps):
            tracker.reset_mod_stats()
            velocity = policy.velocity(x, torch.tensor(0.5), condition)
            found = [tracker.get_tracker_snapshot("current")]
            velocity.square().mean().backward()
            found.append(tracker.get_tracker_snapshot("current"))
            optimizer.step()
            optimizer.zero_grad()
    found.append(tracker.get_tracker_snapshot("peak"))
    return [{str(kind).split(".")[-1]: n for kind, n in snapshot[torch.device("cpu")].items()} for snapshot in found]


@pytest.mark.parametrize("shard", ["shard_grad_op", "full_shard"])
@pytest.mark.parametrize("rank", [8, 0])
def test_what_a_process_holds_of_a_network_that_is_cut(eight_processes, tmp_path, rank, shard):
    pipe = tiny_sd3(num_layers=5, num_attention_heads=4, attention_head_dim=32, caption_projection_dim=128)
    pipe.save_pretrained(tmp_path)
    settings = dict(dtype="bfloat16", lora_rank=rank, resolution=16, max_sequence_length=4, fsdp=shard)
    model = ModelConfig(path=str(tmp_path), **settings)
    real, meta = load_policy(model), meta_policy(model)
    real.make_trainable(model, 0)
    real.shard(shard)
    forward, backward, peak = tracked(real)

    plan, tensors = resident_bytes(meta, model, processes=8), len(real.parameters())
    width = 2 if rank else 4  # all that is cut is float32 if all weights are trained
    frozen = plan["transformer, frozen"] - width * sum(b.numel() for b in meta.network.buffers())
    assert backward["SHARDED_PARAM"] == plan["trained weights"] + frozen * (shard == "full_shard")
    assert backward["SHARDED_GRAD"] == plan["gradients"] == plan["trained weights"]
    assert backward["OPT"] == plan["AdamW's moments"] + 4 * tensors  # and the number of steps, for each tensor
    autocast = 0 if rank else 2 * sum(p.numel() for p in meta.parameters())  # counted as activations there
    assert forward["UNSHARDED_PARAM"] == plan["copies to compute with"] - autocast
    gathered, exchanged = peak["UNSHARDED_PARAM"] + peak["ALL_GATHER"], peak["REDUCE_SCATTER"] + peak["SHARDED_GRAD"]
    if shard == "full_shard" and rank:
        assert gathered == gathered_bytes(meta.network)
    elif shard == "full_shard":  # at the fullest moment gradients are being cut
        assert 0 < exchanged <= exchanged_bytes(meta.network) and gathered <= gathered_bytes(meta.network)


def test_what_cutting_saves(options, tiny_folder):
    table = shard_table(
        parse_config([*options, *VGPO, "--model.dtype", "bfloat16", "--rollout.micro_batch_size", "1"]), 2
    )
    lora, whole = ([table[kind, shard] for shard in SHARDS] for kind in ("LoRA", "all weights"))
    assert whole[0] > whole[1] > whole[2] and lora[0] > lora[2] and whole[0] > lora[0]
    one = [make_plan(parse_config([*options, *VGPO, "--model.fsdp", shard])) for shard in SHARDS]
    assert one[0].phases == one[1].phases == one[2].phases and not one[0].sharded  # one process has nothing to cut
    two = [make_plan(parse_config([*options, *VGPO, "--model.fsdp", shard]), 2) for shard in SHARDS]
    assert [max(plan.phases.values()) for plan in two] == list(two[0].sharded.values()) == list(two[2].sharded.values())
    assert two[2].working["rollout"] - two[1].working["rollout"] == gathered_bytes(
        meta_policy(two[2].config.model).network
    )


def test_guard_keeps_the_means_too(options, tiny_folder):
    config = parse_config(options + VGPO)
    policy, batches = costs_of(config)[0], solve_batches(3, 4, 2, 4)
    guarded = replace(config, objective=GRPOGuard())
    more = trajectory_bytes(guarded, policy, batches) - trajectory_bytes(config, policy, batches)
    assert more == 12 * 4 * 4 * math.prod(policy.latent_shape)


def test_seconds_are_flops_over_what_the_card_does():
    card = Card("a card", 80, half=100, single=10)
    assert card.seconds(35e12, "bfloat16", 0.35) == pytest.approx(1)
    assert card.seconds(35e12, "float32", 0.5) == pytest.approx(7)


def test_networks_of_rewards_on_the_gpu_are_counted():
    def on(name, **options):
        return {"class_path": name, "init_args": options}

    assert reward_bytes(on("PickScore", device="cuda")) == pytest.approx(4 * 986_109_441, rel=1e-6)
    assert reward_bytes(on("PickScore", device="cuda", dtype="float16")) == pytest.approx(2 * 986_109_441, rel=1e-3)
    assert reward_bytes(on("PickScore")) == reward_bytes("PickScore") == reward_bytes("OCR") == reward_bytes("a:b") == 0
    parts = {"taste": "PickScore", "match": on("vgpo.rewards.clip.CLIPScore", device="cuda:0")}
    several = on("Combined", rewards=parts, weights={"taste": 1, "match": 1})
    assert reward_bytes(several) == pytest.approx(4 * 427_616_513, rel=1e-5)
    assert reward_bytes(on("ImageReward", device="cuda")) == pytest.approx(4 * 446e6, rel=0.01)


@pytest.mark.parametrize("recipe", FULL)
def test_every_full_scale_recipe_has_a_plan(recipe):
    config = parse_config(["--recipe", recipe])
    plan = make_plan(config, processes=8)
    assert plan.parameters["transformer"][0] > 1e7 and plan.parameters["vae"][0] == 0
    assert all(count > 0 for kind, count in plan.work.items() if kind in ("rollout", "train", "decode", "score"))
    assert plan.fits(CARDS["80"]) and all(s > 0 for p, s in plan.seconds(CARDS["80"]).items() if p != "score")
    kept, rest = costs_of(config)[1].train.kept, sum(plan.resident.values()) + plan.trajectories
    assert max(plan.phases.values()) <= rest + max(plan.working.values())
    assert plan.phases["update"] >= kept
    for card in ("24", "80"):
        if recipe.endswith(f"-{card}gb"):
            assert make_plan(config).fits(CARDS[card])


@pytest.mark.parametrize("task", ["geneval", "ocr", "pickscore"])
def test_vgpo_costs_decodes_and_scores_more_than_grpo_and_nothing_else(task):
    ours, theirs = (make_plan(parse_config(["--recipe", f"sd35-{task}{end}"])) for end in ("", "-grpo"))
    differing = {kind for kind in ours.work if ours.work[kind] != theirs.work[kind]}
    assert differing == {"decode", "score"} and ours.work["decode"] == 10 * theirs.work["decode"]
    assert ours.phases == theirs.phases and ours.flops == theirs.flops


def test_the_program_prints_a_plan_and_starts_nothing(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*options, *VGPO, "--card", "24", "--processes", "2", "--score_seconds", "2"])
    out = capsys.readouterr().out
    assert "12 images per epoch, 6 in each of 2 processes" in out
    assert out.count("at most, by model.fsdp      off ") == 1
    assert "RTX 4090" in out and "A100" not in out and "yes" in out
    assert f"{36 / 2 * 2:.1f}" in out.split("RTX 4090")[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--processes", "5"], "2 minibatches on 5 processes do not divide"),
        (["--processes", "0"], "--processes is 0; it must be above 0"),
        (["--card", "12"], "invalid choice: '12'"),
        (
            ["--model.path", "some/model"],
            "some/model has no configuration here; give a folder.* or one of .*3.5-medium",
        ),
        (["--model.path", "nowhere"], "nowhere holds no pipeline"),
        (["--rollout.group_sise", "5"], "did you mean rollout.group_size"),
        (["--model.resolution", "7"], "model.resolution is 7"),
        (["--model.tiny_vae", "no/such"], "no/such has no configuration here"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why_in_one_line(options, arguments, message):
    with pytest.raises(SystemExit, match=message) as e:
        main([*options, *VGPO, *arguments])
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


def test_models_with_the_same_settings_are_counted_once():
    vgpo.costs.count_costs.cache_clear()
    for recipe in ("tiny-geneval", "tiny-ocr"):
        costs_of(parse_config(["--recipe", recipe]))
    assert vgpo.costs.count_costs.cache_info().misses == 1
    assert json.dumps(asdict(parse_config(["--recipe", "tiny-ocr"]).model))


FEW_STEPS = """base: tiny-geneval
rollout: {num_inference_steps: 3}
window: {class_path: Leading, init_args: {size: 2}}
credit: {class_path: VGPO, init_args: {num_scored_steps: 2, anchor_steps: 2}}
"""


def test_the_benchmark_runs_on_a_cpu(tmp_path):
    root = Path(__file__).parents[1]
    recipe = tmp_path / "small.yaml"
    recipe.write_text(FEW_STEPS)
    command = [sys.executable, "benchmarks/sd35.py", "--recipe", str(recipe), "--epochs", "1", "--groups", "2"]
    command += ["--group_size", "2", "--tiny_vae", "vgpo/world/tiny/vae", "--output", str(tmp_path / "found.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert set(found) == {"GRPO", "VGPO", "VGPO, tiny VAE"}
    for method in found.values():
        parts = [method["seconds"][phase] for phase in PHASES]
        assert min(parts) > 0 and sum(parts) <= method["seconds"]["epoch"]
    assert "GFLOP/s" in done.stdout and done.stdout.splitlines()[2].split()[-1] == "1.000"
