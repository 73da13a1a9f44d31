"The trainer alone: exact ratios, noise with an address, independence of how the work is cut, what callbacks may do."

from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_rewards import brightness, broken

from vgpo.batches import OptimConfig, RolloutConfig
from vgpo.callback import Callback, SkipStep
from vgpo.credit.grpo import GRPO
from vgpo.credit.vgpo import VGPO
from vgpo.evaluation.images import EvaluationConfig
from vgpo.evaluation.scores import evaluate
from vgpo.objectives.clipped import ClippedSurrogate
from vgpo.policies.base import load_policy
from vgpo.policies.loading import ModelConfig
from vgpo.prompts.files import load_prompts
from vgpo.rewards.base import RewardError, make_reward
from vgpo.rollout import column, replay
from vgpo.sde import FlowCPS, FlowSDE
from vgpo.trainer import Trainer
from vgpo.windows import Leading

ROWS = load_prompts("tiny-scenes", "train", 20)
ROLLOUT = RolloutConfig(num_inference_steps=4, prompts_per_epoch=2, group_size=4, micro_batch_size=4)
OPTIM = OptimConfig(lr=1e-3, num_minibatches=2, ema_decay=0.9)


@pytest.fixture
def make(tiny_folder):
    "A function that makes a trainer; it takes what is to be other than usual."

    def trainer(reward=brightness, lr=1e-3, epochs=4, seed=0, callbacks=(), clip_range=1e-3, target_kl=0.0, **others):
        optim = replace(OPTIM, lr=lr, **{k: others.pop(k) for k in ("lr_scheduler", "lr_warmup_steps") if k in others})
        plugs = {"sampler": FlowSDE(), "credit": VGPO(num_scored_steps=4), "window": Leading(3)}
        plugs |= {k: others.pop(k) for k in plugs.keys() & others.keys()}
        policy, model = load_policy(ModelConfig(path=str(tiny_folder))), ModelConfig(path=str(tiny_folder))
        policy.make_trainable(model, seed)
        objective = ClippedSurrogate(clip_range=clip_range, target_kl=target_kl)
        return Trainer(
            policy, make_reward(f"tiny_rewards:{reward.__name__}"), ROWS, objective=objective, optim=optim, seed=seed,
            rollout=replace(ROLLOUT, **others), epochs=epochs, callbacks=callbacks, **plugs)  # fmt: skip

    return trainer


class Record(Callback):
    "Writes down what happens."

    def __init__(self):
        self.events, self.stats = [], []

    def before_epoch(self, trainer):
        self.events.append("before_epoch")

    def before_micro_batch(self, trainer):
        self.events.append("before_micro_batch")

    def before_phase(self, trainer, phase):
        self.events.append(f"{phase} begins")

    def after_phase(self, trainer, phase):
        self.events.append(f"{phase} ends")

    def after_rollout(self, trainer):
        self.events.append("after_rollout")
        assert all(batch.advantages.shape == (len(batch.rows), 4) for batch in trainer.batches)

    def before_step(self, trainer, stats):
        self.events.append("before_step")
        self.stats.append(dict(stats))

    def after_epoch(self, trainer):
        self.events.append("after_epoch")


def weights(trainer):
    "All trained weights as one vector."
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


# --- the rollout ---


def test_the_ratio_is_exactly_one_before_the_first_update(make):
    trainer = make()
    for batch in trainer.sample():
        velocity = partial(trainer.policy.velocity, embeds=batch.embeds)
        assert batch.trained_steps() == [0, 1, 2]
        for j in batch.trained_steps():
            step = replay(velocity, batch.path, j, trainer.sampler)
            assert torch.equal(step.log_prob(batch.path.latents[:, j + 1]), batch.path.log_probs[:, j])


def test_samples_are_a_function_of_seed_epoch_prompt_and_k(make):
    def latents(epoch=0, **how):
        trainer, found = make(**how), {}
        trainer.epoch = epoch
        for (_, pairs), batch in zip(trainer.shares(), trainer.sample(), strict=True):
            assert batch.path.group.tolist() == [prompt for prompt, _ in pairs]
            assert [row["prompt"] for row in batch.rows] == [ROWS[prompt]["prompt"] for prompt, _ in pairs]
            found |= dict(zip(pairs, batch.path.latents, strict=True))
        return found

    whole, small = latents(micro_batch_size=8), latents(micro_batch_size=1)
    assert whole.keys() == small.keys() and len(whole) == 8
    for key in whole:
        torch.testing.assert_close(whole[key], small[key], atol=1e-4, rtol=0)
        assert torch.equal(whole[key][0], small[key][0])
    starts = torch.stack([path[0].flatten() for path in whole.values()])
    assert len(starts.unique(dim=0)) == 8  # no two samples begin alike
    for other in (latents(seed=1), latents(epoch=1)):
        assert all(not torch.equal(whole[key][0], other[key][0]) for key in whole.keys() & other.keys())


def test_an_epoch_has_whole_groups_of_different_prompts(make):
    pairs = [pair for _, share in make(prompts_per_epoch=3, group_size=4).shares() for pair in share]
    prompts = {prompt for prompt, _ in pairs}
    assert len(prompts) == 3 and sorted(pairs) == [(prompt, k) for prompt in sorted(prompts) for k in range(4)]


def test_rewards_are_those_of_the_clean_estimates_by_state(make):
    trainer = make(credit=VGPO(num_scored_steps=2))
    assert trainer.states == [2, 4]
    for batch in trainer.sample():
        with torch.no_grad():
            velocity = trainer.policy.velocity(batch.path.latents[:, 2], trainer.sigmas[2], batch.embeds)
            clean = batch.path.latents[:, 2] - trainer.sigmas[2] * velocity
        images = trainer.policy.decode_steps(torch.stack([clean, batch.path.latents[:, 4]], 1))
        expected = torch.as_tensor(brightness(images, None, None), dtype=torch.float32).reshape(-1, 2)
        torch.testing.assert_close(batch.rewards[:, [2, 4]], expected, atol=1e-5, rtol=0)
        assert torch.equal(batch.rewards[:, 0], batch.rewards[:, 2]) and torch.equal(
            batch.rewards[:, 3], batch.rewards[:, 4]
        )
        assert torch.equal(batch.scores.scaled, batch.rewards[:, -1]) and batch.images.shape == (4, 32, 32, 3)


def test_scoring_in_a_thread_changes_nothing(make):
    def trained(async_scoring):
        trainer = make(async_scoring=async_scoring)
        metrics = trainer.train_epoch()
        return weights(trainer), metrics["reward_by_step"]

    (plain, rewards), (overlapped, same) = trained(False), trained(True)
    assert torch.equal(plain, overlapped) and rewards == same


@pytest.mark.parametrize("async_scoring", [True, False])
def test_a_failing_reward_is_noticed_soon(make, monkeypatch, async_scoring):
    trainer, record = make(broken, async_scoring=async_scoring, micro_batch_size=1), Record()
    trainer.callbacks.append(record)
    before = weights(trainer)
    with pytest.raises(RewardError, match="the reward is out"):
        trainer.train_epoch()
    assert record.events.count("rollout ends") < 4  # of 8: nobody goes on for long
    assert trainer.epoch == 0 and torch.equal(weights(trainer), before)


# --- the update ---


@pytest.mark.parametrize("credit", [VGPO(num_scored_steps=4), GRPO()], ids=repr)
def test_micro_batches_do_not_change_the_update(make, credit):
    def trained(micro_batch_size):
        trainer = make(credit=credit, micro_batch_size=micro_batch_size)
        begin = weights(trainer)
        trainer.train_epoch()
        return weights(trainer) - begin

    whole, small = trained(8), trained(1)
    assert whole.abs().max() > 1e-4
    # Adam divides by the gradient's size, so a weight whose gradient is rounding noise may move either way
    assert torch.nn.functional.cosine_similarity(whole, small, dim=0) > 0.999


def test_statistics_do_not_depend_on_the_size_of_micro_batches(make):
    "Shares of 4 in micro-batches of 4, or of 3 and 1: means over images, not over micro-batches."
    one, other = (
        make(target_kl=1e9, credit=VGPO(num_scored_steps=4, advantage_clip=1.0), micro_batch_size=size).train_epoch()
        for size in (4, 3)
    )
    for key in ("loss", "kl", "approx_kl", "clip_ratio"):
        assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-8), key
    assert one["approx_kl"] > 0


def test_the_gradient_is_the_mean_over_images_and_steps(make):
    trainer = make(micro_batch_size=3)
    trainer.batches = trainer.sample()
    trainer.compute_advantages()
    mine = [batch for batch in trainer.batches if batch.minibatch == 0]
    assert [len(batch.rows) for batch in mine] == [3, 1]
    for batch in mine:
        for j in batch.trained_steps():
            step = replay(partial(trainer.policy.velocity, embeds=batch.embeds), batch.path, j, trainer.sampler)
            ratio = (step.log_prob(batch.path.latents[:, j + 1]) - batch.path.log_probs[:, j]).exp()
            (-(ratio * column(batch.advantages, j)).sum() / 4 / 3).backward()
    expected = [p.grad.clone() for p in trainer.policy.parameters()]
    trainer.optim.max_grad_norm = 1e9
    trainer.optimizer.step = lambda: None
    trainer.update(mine)
    for p, gradient in zip(trainer.policy.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)


def test_the_rate_warms_up_and_decays():
    optim = OptimConfig(lr=1.0, lr_warmup_steps=4, lr_scheduler="cosine")
    rates = [optim.lr_factor(update, 20) for update in range(21)]
    assert rates[0] == pytest.approx(0.25) and max(rates) <= 1 and rates[20] == pytest.approx(0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert [OptimConfig().lr_factor(update, 20) for update in (0, 10, 20)] == [1, 1, 1]


def test_every_update_has_its_rate(make):
    record = Record()
    make(epochs=2, lr_scheduler="cosine", lr_warmup_steps=2, callbacks=[record]).fit()
    expected = [
        1e-3 * OptimConfig(lr_warmup_steps=2, lr_scheduler="cosine").lr_factor(update, 4) for update in range(4)
    ]
    assert [stats["lr"] for stats in record.stats] == pytest.approx(expected, rel=1e-12)


def test_training_changes_the_adapters_alone_and_raises_the_reward(make):
    trainer = make(lr=5e-3, epochs=6, group_size=8, clip_range=0.1)
    frozen = {n: p.clone() for n, p in trainer.policy.network.named_parameters() if not p.requires_grad}

    def held_out():
        with trainer.averaged():
            config = EvaluationConfig(num_samples=6, num_inference_steps=4)
            return evaluate(trainer.policy, {"reward": trainer.reward}, ROWS[:6], config).reward

    before = held_out()
    trainer.fit()
    assert held_out() > 1.2 * before  # many times the spread between samples
    now = dict(trainer.policy.network.named_parameters())
    assert frozen and all(torch.equal(p, now[n]) for n, p in frozen.items())


def test_the_averaged_weights_are_lent_and_given_back(make):
    trainer = make()
    before = weights(trainer)
    with trainer.averaged():
        assert torch.equal(weights(trainer), before)  # nothing is averaged yet
    trainer.train_epoch()
    after = weights(trainer)
    with pytest.raises(KeyError), trainer.averaged():
        average = weights(trainer)
        raise KeyError
    assert torch.equal(weights(trainer), after)
    assert not torch.equal(average, after) and not torch.equal(average, before)
    assert torch.equal(average, torch.cat([p.flatten() for p in trainer.ema.shadow_params]))


# --- callbacks ---


def test_callbacks_hear_of_all_that_happens_in_its_order(make):
    record = Record()
    trainer = make(callbacks=[record], credit=GRPO())
    trainer.train_epoch()
    once = [
        "before_micro_batch",
        *(f"{phase} {what}" for phase in ("rollout", "decode", "score") for what in ("begins", "ends")),
    ]
    assert record.events == [
        "before_epoch", *once, *once, "score begins", "score ends", "after_rollout",
        "update begins", "before_step", "before_step", "update ends", "after_epoch"]  # fmt: skip
    assert trainer.epoch == 1 and trainer.metrics["epoch"] == 0
    assert {"loss", "grad_norm", "lr", "clip_ratio", "approx_kl"} <= record.stats[0].keys()
    assert record.stats[0]["ratio/abs_dev_mean"] == 0 < record.stats[1]["ratio/abs_dev_mean"]


def test_a_callback_may_leave_an_update_out(make):
    class Skip(Callback):
        def before_step(self, trainer, stats):
            raise SkipStep

    trainer = make(callbacks=[Skip()])
    before = weights(trainer)
    metrics = trainer.train_epoch()
    assert torch.equal(weights(trainer), before) and metrics["grad_norm"] > 0
    assert trainer.epoch == 1 and trainer.scheduler.last_epoch == 2 and trainer.ema.optimization_step == 0
    trainer.callbacks.clear()
    trainer.train_epoch()
    assert not torch.equal(weights(trainer), before)


def test_a_callback_may_end_the_run_and_add_metrics(make):
    class End(Callback):
        def after_epoch(self, trainer):
            trainer.metrics["mine"] = 7
            if trainer.epoch == 2:
                trainer.stopped = "enough"

    trainer = make(callbacks=[End()])
    trainer.fit()
    assert trainer.epoch == 2 and trainer.stopped == "enough" and trainer.metrics["mine"] == 7


# --- what does not fit ---


@pytest.mark.parametrize(
    "how, message",
    [
        ({"window": Leading(5)}, "window.size is 5; it must lie in 1 to rollout.num_inference_steps, 4"),
        ({"window": Leading(4), "sampler": FlowCPS()}, "window.size"),
        ({"group_size": 3, "prompts_per_epoch": 3}, "2 minibatches on 1 process do not divide into 2 equal parts"),
        ({"credit": VGPO(num_scored_steps=5)}, "credit.num_scored_steps is 5"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_drawn(make, how, message):
    with pytest.raises(ValueError, match=message):
        make(**how)
