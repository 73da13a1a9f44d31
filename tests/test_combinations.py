"Every sampler, window, objective and credit estimator with every other one, in the trainer."

from functools import partial
from itertools import product

import pytest
import torch
from plug_classes import plug_classes
from tiny_rewards import brightness, power
from torch.testing import assert_close

import vgpo.credit
import vgpo.objectives
from vgpo.batches import OptimConfig, RolloutConfig
from vgpo.callback import Callback
from vgpo.credit.base import Credit
from vgpo.credit.gdpo import GDPO
from vgpo.credit.grpo import GRPO
from vgpo.credit.one_step import OneStep
from vgpo.credit.vgpo import VGPO
from vgpo.flow import ode_sample
from vgpo.noise import sample_noise
from vgpo.objectives.awm import AWM, VGRPO
from vgpo.objectives.base import Objective
from vgpo.objectives.clipped import KLS, ClippedSurrogate, PolicyGradient
from vgpo.objectives.flow_dppo import FlowDPPO
from vgpo.objectives.grpo_guard import GRPOGuard
from vgpo.objectives.matching import Matching
from vgpo.policies.base import load_policy
from vgpo.policies.loading import ModelConfig
from vgpo.rewards.base import Reward, Scores
from vgpo.rollout import column
from vgpo.sde import FlowSDE, Sampler
from vgpo.trainer import Trainer
from vgpo.windows import Leading, Random, Window
from vgpo.world.pretrain import make_autoencoder, make_pipeline

SAMPLERS = plug_classes(Sampler)
WINDOWS = [kind(2) for kind in plug_classes(Window)] + [Random(2, per="group"), Leading(2, shared_start=True)]
OBJECTIVES, ESTIMATORS = plug_classes(Objective, vgpo.objectives), plug_classes(Credit, vgpo.credit)
GRADIENTS = [kind for kind in OBJECTIVES if issubclass(kind, PolicyGradient)]
MATCHINGS = [kind for kind in OBJECTIVES if issubclass(kind, Matching)]
ROWS = [{"prompt": f"a photo of a {color} circle"} for color in ("red", "blue", "green", "white")]


class Brightness(Reward):
    name = scale = version = "brightness"

    def __call__(self, images, prompts, metadata):
        raw = torch.as_tensor(brightness(images, prompts, metadata), dtype=torch.float32)
        return Scores(raw, raw, details=[{} for _ in prompts])


class Two(Reward):
    "Brightness and a power of it, kept apart too."

    name = scale = version = "two"
    weights = {"brightness": 0.75, "power": 0.25}

    def __call__(self, images, prompts, metadata):
        raw = [torch.as_tensor(f(images, prompts, metadata), dtype=torch.float32) for f in (brightness, power)]
        parts = {name: Scores(r, r) for name, r in zip(self.weights, raw, strict=True)}
        total = sum(w * r for w, r in zip(self.weights.values(), raw, strict=True))
        return Scores(total, total, details=[{} for _ in prompts], parts=parts)


class Record(Callback):
    "Keeps the statistics of every update."

    def __init__(self):
        self.stats = []

    def before_step(self, trainer, stats):
        self.stats.append(dict(stats))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    "A pipeline of one narrow layer with random weights: the trainer's logic does not depend on the network's size."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    pipe = make_pipeline(make_autoencoder(channels=8), width=64, layers=1)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    pipe.save_pretrained(folder)
    model = ModelConfig(path=str(folder))
    policy = load_policy(model)
    policy.precompute([row["prompt"] for row in ROWS])
    policy.make_trainable(model, seed=0)
    return policy, [p.detach().clone() for p in policy.parameters()]


def trained(
    policy,
    epochs=1,
    reward=None,
    micro_batch_size=8,
    prompts_per_epoch=2,
    num_minibatches=2,
    guidance_scale=1.0,
    **plugs,
):
    "How far a short run's weights moved, its statistics by update, its metrics by epoch, and the trainer."
    policy, begin = policy
    for p, value in zip(policy.parameters(), begin, strict=True):
        p.data.copy_(value)
    rollout = RolloutConfig(num_inference_steps=4, prompts_per_epoch=prompts_per_epoch, group_size=4,
                            micro_batch_size=micro_batch_size, guidance_scale=guidance_scale)  # fmt: skip
    record, plugs = Record(), {"sampler": FlowSDE(), "credit": GRPO(), "window": Leading(2)} | plugs
    plugs = {"objective": ClippedSurrogate(clip_range=1e-3)} | plugs
    reward, optim = reward or (Two() if plugs["credit"].separate else Brightness()), OptimConfig(lr=1e-3)
    optim.num_minibatches = num_minibatches
    trainer = Trainer(policy, reward, ROWS, rollout=rollout, optim=optim, callbacks=[record], **plugs)
    metrics = [trainer.train_epoch() for _ in range(epochs)]
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(policy.parameters(), begin, strict=True)])
    return moved, record.stats, metrics, trainer


def test_every_objective_is_of_one_of_two_kinds():
    assert sorted(map(repr, GRADIENTS + MATCHINGS)) == sorted(map(repr, OBJECTIVES))


@pytest.mark.parametrize("objective", GRADIENTS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_combination_trains_and_begins_with_ratio_1(policy, sampler, objective):
    for window, kl_type in product(WINDOWS, KLS):
        options = {} if objective is FlowDPPO else {"clip_range": 1e-3}
        plug = objective(beta=0.1, kl_type=kl_type, step_weights="noise", **options)
        moved, (first, second), (metrics,), _ = trained(policy, sampler=sampler(0.7), objective=plug, window=window)
        assert first["ratio/abs_dev_mean"] == 0 < second["ratio/abs_dev_mean"] < 0.2, window
        assert first["kl"] == 0 < second["kl"] < 1 and metrics["grad_norm"] > 0
        assert ("ratio_bias" in metrics) == (objective is GRPOGuard) and ("masked" in metrics) == (
            objective is FlowDPPO
        )
        assert moved.abs().max() > 1e-5 and moved.isfinite().all()


# Objectives that learn from finished images


@pytest.mark.parametrize("objective", MATCHINGS)
def test_learning_from_finished_images_begins_with_the_velocity_that_drew_them(policy, objective):
    for window in (window for window in WINDOWS if not window.shared_start):
        moved, stats, _, trainer = trained(policy, epochs=2, objective=objective(beta=0.1), window=window)
        first, second, third, fourth = stats  # two minibatches in each of two epochs
        assert first["drift"] == third["drift"] == 0 < min(second["drift"], fourth["drift"]), window
        assert first["kl"] == 0 < second["kl"] < 1 and 0 < third["kl"] < 1
        assert first.get("ratio/abs_dev_mean", 0) == 0 < first["grad_norm"]
        assert moved.abs().max() > 1e-5 and moved.isfinite().all()
        for batch in trainer.batches:
            assert batch.noise.shape == batch.old_velocities.shape == batch.path.clean.shape
            assert torch.equal(batch.old_velocities.flatten(2).abs().sum(2) > 0, batch.noisy)


def test_the_sampler_says_nothing_where_rollouts_follow_the_ode(policy):
    "Images, weights and all statistics are the same, and the images are those that the ODE draws."
    found = [trained(policy, epochs=2, sampler=kind(0.5), objective=AWM()) for kind in SAMPLERS]
    for moved, stats, *_ in found[1:]:
        assert torch.equal(moved, found[0][0]) and stats == found[0][1]
    *_, trainer = trained(policy, objective=AWM())
    for p, value in zip(policy[0].parameters(), policy[1], strict=True):
        p.data.copy_(value)
    for batch in trainer.batches:
        with torch.no_grad():
            velocity = partial(policy[0].velocity, embeds=batch.embeds)
            assert_close(batch.path.latents[:, -1], ode_sample(velocity, batch.path.latents[:, 0], trainer.sigmas))
        assert not batch.path.log_probs.any()


def test_the_window_says_nothing_of_the_images(policy):
    "Which levels are trained does not change what is drawn."
    finals = []
    for window in (Leading(1), Leading(4), Random(2, per="group")):
        *_, trainer = trained(policy, objective=AWM(), window=window)
        finals.append(torch.cat([batch.path.latents[:, -1] for batch in trainer.batches]))
    assert torch.equal(finals[0], finals[1]) and torch.equal(finals[0], finals[2])


@pytest.mark.parametrize("window", [Leading(3), Random(2, per="group")], ids=repr)
def test_micro_batches_do_not_change_the_old_velocities(policy, window):
    found = []
    for size in (8, 2, 1):
        *_, trainer = trained(policy, objective=VGRPO(), window=window, micro_batch_size=size)
        found.append([torch.cat([getattr(b, name) for b in trainer.batches]) for name in ("noise", "old_velocities")])
    for noise, old in found[1:]:
        assert torch.equal(noise, found[0][0])
        assert_close(old, found[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", MATCHINGS)
def test_micro_batches_do_not_change_what_finished_images_teach(policy, objective):
    whole, small = (trained(policy, objective=objective(), micro_batch_size=size)[0] for size in (8, 1))
    assert whole.abs().max() > 1e-4
    assert torch.nn.functional.cosine_similarity(whole, small, dim=0) > 0.999


@pytest.mark.parametrize("objective", MATCHINGS)
def test_guidance_while_sampling_and_training(policy, objective):
    "The old velocity has the guidance of the loss, so nothing has drifted at first, whatever that of the rollout is."
    for rollout, training in ((1.0, 2.0), (2.0, 1.0), (2.0, 2.0)):
        moved, (first, second), *_ = trained(
            policy, objective=objective(guidance_scale=training), guidance_scale=rollout
        )
        assert first["drift"] == 0 < second["drift"] and moved.abs().max() > 1e-5


def test_several_rewards_teach_by_finished_images(policy):
    "Their sum, or each normalised by itself."
    together, apart = (trained(policy, objective=AWM(), credit=credit, reward=Two())[0] for credit in (GRPO(), GDPO()))
    alone = trained(policy, objective=AWM(), reward=Brightness())[0]
    assert min(moved.abs().max() for moved in (together, apart)) > 1e-5
    assert not torch.equal(together, apart) and not torch.equal(together, alone)


def test_advantages_are_the_same_at_all_levels(policy):
    *_, trainer = trained(policy, objective=AWM(), window=Leading(4))
    for batch in trainer.batches:
        assert torch.equal(batch.advantages, batch.advantages[:, :1].expand(-1, 4)) and batch.advantages.any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_trains(policy, estimator):
    credit = estimator(num_scored_steps=3) if hasattr(estimator, "num_scored_steps") else estimator()
    moved, _, (metrics,), trainer = trained(policy, credit=credit)
    assert moved.abs().max() > 1e-5 and 0 < metrics["reward"] < 1 and metrics["advantage/abs_mean"] > 0
    assert all(batch.advantages.shape == (len(batch.rows), 4) for batch in trainer.batches)
    assert all(batch.rewards.shape == (len(batch.rows), 5) for batch in trainer.batches)


def test_one_place_for_the_window_is_the_leading_window_bit_for_bit(policy):
    "Also where each sample has a window of its own and sigma is (B,)."
    moved = trained(policy, epochs=2, window=Leading(3))[0]
    assert moved.abs().max() > 1e-4
    for window in (Random(3, stop=3), Random(3, stop=3, per="group")):
        assert torch.equal(trained(policy, epochs=2, window=window)[0], moved)


def test_micro_batches_do_not_change_the_update_of_windows_per_group(policy):
    whole, small = (trained(policy, window=Random(2, per="group"), micro_batch_size=size)[0] for size in (8, 1))
    assert whole.abs().max() > 1e-4
    assert torch.nn.functional.cosine_similarity(whole, small, dim=0) > 0.999


def test_samples_of_a_group_share_a_window(policy):
    *_, trainer = trained(policy, window=Random(1, per="group"), prompts_per_epoch=4, num_minibatches=1)
    noisy = torch.cat([batch.noisy for batch in trainer.batches])
    group = torch.cat([batch.path.group for batch in trainer.batches])
    by_group = [noisy[group == g].unique(dim=0) for g in group.unique()]
    assert all(len(mask) == 1 for mask in by_group) and len(torch.cat(by_group).unique(dim=0)) > 1
    for batch in trainer.batches:
        assert torch.equal(batch.path.log_probs != 0, batch.noisy)
        (step,) = batch.trained_steps()
        assert column(batch.noisy, step).all()


@pytest.mark.parametrize("credit", [GRPO(), VGPO(num_scored_steps=4)], ids=repr)
def test_a_reward_of_several_is_what_their_sum_is(policy, credit):
    class Sum(Two):
        def __call__(self, images, prompts, metadata):
            scores = super().__call__(images, prompts, metadata)
            return Scores(scores.raw, scores.scaled, details=scores.details)

    assert torch.equal(*(trained(policy, credit=credit, reward=reward)[0] for reward in (Two(), Sum())))


@pytest.mark.parametrize("window", [OneStep(), Leading(2, shared_start=True), Random(1, 1, per="group")], ids=repr)
def test_a_shared_start_is_that_of_the_groups_first_image(policy, window):
    *_, trainer = trained(policy, window=window, prompts_per_epoch=4, num_minibatches=1)
    group = torch.cat([batch.path.group for batch in trainer.batches])
    latents = torch.cat([batch.path.latents for batch in trainer.batches])
    first = window.mask(4, 0, 0, group.tolist()).int().argmax(1)
    for g in group.unique():
        begin = sample_noise((5, *policy[0].latent_shape), 0, 0, int(g), 0)[0]
        same = (latents[group == g, 0] == begin).flatten(1).all(1)
        assert same.all() if window.shared_start else same.tolist().count(True) == 1
        if window.shared_start:  # one path up to the window, but for what the rest of a micro-batch rounds
            mine, place = latents[group == g], int(first[group == g][0])
            assert_close(mine[:, : place + 1], mine[:1, : place + 1].expand_as(mine[:, : place + 1]), atol=1e-4, rtol=0)
            assert (mine[1:, place + 1] - mine[:1, place + 1]).flatten(1).abs().amax(1).min() > 1e-2


def test_a_shared_start_does_not_depend_on_micro_batches(policy):
    whole, small = (trained(policy, window=OneStep(), micro_batch_size=size)[0] for size in (8, 1))
    assert whole.abs().max() > 1e-4
    assert torch.nn.functional.cosine_similarity(whole, small, dim=0) > 0.999
