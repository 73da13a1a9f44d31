"""Every option of a recipe is flipped, and the run resumed.

`--resume` takes exactly the changes that leave its weights alone.

The recipes hold each value where flipping it can be seen: a clip range that clips, a KL that counts, more scored states
than one. An option that is added to the package is swept too, without a word here.
"""

import shutil
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

import pytest
import torch
from plug_classes import option_types, plug_classes

import vgpo.credit
import vgpo.objectives
import vgpo.train as program
from vgpo.callback import Callback
from vgpo.config import Config, as_data, parse_config
from vgpo.credit.base import Credit
from vgpo.objectives.base import Objective
from vgpo.rewards.base import reward_classes
from vgpo.runs.checkpoint import trainer_state
from vgpo.runs.resume import harmless_options, leaves
from vgpo.runs.session import Session
from vgpo.sde import Sampler
from vgpo.windows import Window
from vgpo.world.pretrain import make_autoencoder, make_pipeline

SMALL = [
    *(
        "--epochs=2",
        "--save_every=1",
        "--save_total_limit=9",
        "--model.lora_rank=4",
        "--reward=tiny_rewards:brightness",
    ),
    *("--rollout.prompts_per_epoch=2", "--rollout.group_size=4", "--rollout.num_inference_steps=4"),
    *("--rollout.micro_batch_size=4", "--optim.num_minibatches=2", "--optim.lr=1e-3", "--optim.max_grad_norm=1e-3"),
    *("--optim.ema_decay=0.1",),
    *("--evaluation.num_samples=2", "--evaluation.num_inference_steps=1", "--evaluation.eval_every=1"),
]
RECIPES = {  # between them they have every option of every kind of plug
    "paper": [
        *(
            "--window=Leading",
            "--window.size=2",
            "--credit=VGPO",
            "--credit.num_scored_steps=2",
            "--credit.anchor_steps=1",
        ),
        *("--credit.advantage_clip=1", "--objective=ClippedSurrogate", "--objective.clip_range=3e-5"),
        *("--objective.beta=0.1", "--optim.lr_scheduler=constant"),
    ],
    "other plugs": [
        *(
            "--sampler=FlowCPS",
            "--window=Random",
            "--window.size=1",
            "--window.per=group",
            "--credit=GRPO",
            "--credit.advantage_clip=1",
        ),
        *(
            "--objective=GRPOGuard",
            "--objective.clip_range=2e-4",
            "--objective.beta=0.1",
            "--optim.lr_scheduler=cosine",
        ),
    ],
    "mask": [
        *("--window.size=2", "--credit=GRPO", "--objective=FlowDPPO", "--objective.max_kl=3e-6"),
        "--optim.lr_scheduler=constant",
    ],
    "finished images": [
        *("--window.size=2", "--credit=GRPO", "--objective=NFT", "--objective.mix=0.5"),
        "--objective.max_advantage=1",
    ],
    "weighed images": ["--window.size=2", "--credit=GRPO", "--objective=AWM"],
    "clipped images": [
        *("--window.size=2", "--credit=GRPO", "--objective=VGRPO", "--objective.clip_range=1e-3"),
        "--optim.lr_scheduler=constant",
    ],
    "one step": ["--window=OneStep", "--window.size=1", "--window.shared_start=true", "--credit=GRPO"],
    "gains": ["--sampler=DanceSDE", "--window.size=2", "--credit=Gains", "--credit.advantage_clip=1"],
    "critic": [
        *("--window.size=3", "--credit=ProjectionCritic", "--credit.num_scored_steps=2"),
        "--credit.advantage_clip=1",
    ],
}
PLUGS = {
    "sampler": plug_classes(Sampler),
    "window": plug_classes(Window),
    "credit": plug_classes(Credit, vgpo.credit),
    "objective": plug_classes(Objective, vgpo.objectives),
}
ROUNDED = {"rollout.micro_batch_size", "model.vae_slicing"}  # sums are taken in another order
UNTRIED = {  # option: (whether a resumed run may change it, why flipping it says nothing on this machine)
    "model.path": (True, "what lies there is compared, and must be the same: see test_kept.py"),
    "model.revision": (True, "a folder has no revisions; what one stands for is compared"),
    "model.distilled_guidance_scale": (False, "no model here takes a guidance scale as an input"),
    "model.compile": (False, "compiling takes minutes; it rounds otherwise"),
    "model.vae_tiling": (False, "no image here is larger than a tile; of a larger one the seams are scored"),
    "model.fsdp": (True, "a single process has nothing to share out: see test_processes.py"),
    "callbacks": (False, "a callback may do anything"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A folder with a small model, another decoder and prompts, into which values of options point."
    root = tmp_path_factory.mktemp("resume")
    torch.manual_seed(0)
    pipe = make_pipeline(make_autoencoder(channels=8), width=64, layers=1)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    pipe.save_pretrained(root / "model")
    make_autoencoder(channels=8).save_pretrained(root / "vae")
    (root / "prompts.txt").write_text("a photo of a red circle\na photo of a blue square\n")
    return root


@pytest.fixture(scope="module")
def runs(root):
    "A function that makes the run of a recipe, once: its folder at epoch 1, and its state at epoch 2."
    made = {}

    def run(recipe):
        if recipe not in made:
            session = program.begin([*argv(root, recipe), f"--name={recipe}"])
            go_on(session, 1)
            session.lock.release()
            shutil.copytree(session.folder, root / "saved" / recipe)
            made[recipe] = root / "saved" / recipe, go_on(session, 2)
        return made[recipe]

    return run


def argv(root, recipe):
    places = {"model.path": root / "model", "prompts.train": root / "prompts.txt", "output_dir": root}
    return [*SMALL, *RECIPES[recipe], *(f"--{option}={path}" for option, path in places.items())]


def go_on(session, epoch):
    "Train a Session up to an epoch; all that its checkpoint would hold of the weights, by name."
    session.before = session.evaluate_before()
    while session.trainer.epoch < epoch:
        session.trainer.train_epoch()
    return {name: tensor.clone() for name, tensor in trainer_state(session.trainer)[0].items()}


# --- another value ---


def others(root, option, kind, value):
    "Other values of an option, the best first; some may not be valid."
    given = {
        **{"reward": ["tiny_rewards:power"], "early_stopping.validation_reward": ["tiny_rewards:power"]},
        **{"prompts.train": ["tiny-scenes"], "prompts.test": [root / "prompts.txt"], "window.init_args.start": [2]},
        **{"output_dir": [root / "elsewhere"], "name": ["elsewhere"], "model.lora_targets": ["[attn.to_q]"]},
        **{"model.embedding_cache": [root / "embeds"], "model.tiny_vae": [root / "vae"]},
        **{"tracker": ["[]"], "tracker_project": ["elsewhere"]},
    }
    if option in given:
        return given[option]
    if option.endswith(".class_path"):
        plugs = sorted(PLUGS[option.split(".")[0]], key=lambda plug: (plug.__module__, plug.__name__), reverse=True)
        return [plug.__name__ for plug in plugs if plug.__name__ != value.rpartition(".")[2]]
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return others(root, option, next(part for part in parts if part is not NoneType), value)
    if get_origin(kind) is Literal:
        return [part for part in parts if part != value]
    if get_origin(kind) is tuple:
        return [[v / 2 for v in value]]
    if kind is bool:
        return [not value]
    if issubclass(kind, int):
        return [2 * value or 4, value + 1, 1] if value is not None else [64, 2]
    if issubclass(kind, float):
        return [2 * value or 0.5, value / 2]
    raise NotImplementedError(f"say in `others` which other value {option} may have, or in UNTRIED why not")


def flipped(root, folder, option, kind, value):
    "The words of a command line that resumes a run with another valid value of an option."
    for other in others(root, option, kind, value):
        words = ["--resume", str(folder), f"--{option.replace('.init_args', '').removesuffix('.class_path')}={other}"]
        try:
            program.resumed_config(words)
        except ValueError:
            continue
        return words
    raise NotImplementedError(f"no other value of {option} is valid: say one in `others`, or in UNTRIED why not")


@lru_cache
def small(recipe):
    "A recipe's Config, read once."
    return parse_config([*SMALL, *RECIPES[recipe]])


@lru_cache
def options(recipe):
    "{option: (type, value)} of a recipe, but for those that cannot be tried."
    data = as_data(small(recipe))
    kinds = option_types(Config, data)
    return {option: (kinds[option], value) for option, value in leaves(data).items() if option not in UNTRIED}


# --- the sweep ---


@lru_cache
def cached(words):
    return parse_config(list(words))


def parsed(words):
    "A command line's Config, read once: the many runs of the sweep are resumed from one folder."
    return cached(tuple(words))


def owner(recipe, option):
    "The class that an option of a recipe's plug is a field of: an inherited one means the same in every class below."
    section, *_, name = option.split(".")
    kind = type(getattr(small(recipe), section))
    return owner_of(kind, name)


def owner_of(kind, name):
    return next(cls for cls in kind.__mro__ if name in vars(cls).get("__annotations__", ()))


def swept():
    "(recipe, option): all of the first recipe, the plugs of the second, and of the others what these have not."
    found = [("paper", option) for option in options("paper")]
    found += [
        ("other plugs", option)
        for option in options("other plugs")
        if option in ("epochs", "optim.lr_scheduler") or option.split(".")[0] in PLUGS
    ]
    seen = {(owner(*pair), pair[1]) for pair in found if ".init_args." in pair[1] and pair[1].split(".")[0] in PLUGS}
    for recipe in list(RECIPES)[2:]:
        for option in options(recipe):
            if (
                option.split(".")[0] in PLUGS
                and ".init_args." in option
                and (owner(recipe, option), option) not in seen
            ):
                found.append((recipe, option))
                seen.add((owner(recipe, option), option))
    return found


SWEPT = swept()


@pytest.mark.parametrize("kind", [kind for plugs in PLUGS.values() for kind in plugs])
def test_every_option_of_every_plug_is_swept(kind):
    section = next(name for name, plugs in PLUGS.items() if kind in plugs)
    tried = {(owner(*pair), pair[1]) for pair in SWEPT if pair[1].startswith(f"{section}.init_args.")}
    for f in fields(kind):
        assert (owner_of(kind, f.name), f"{section}.init_args.{f.name}") in tried, f"add a recipe with {kind.__name__}"


@pytest.mark.parametrize("recipe, option", SWEPT)
def test_a_resumed_run_may_change_what_leaves_its_weights_alone(root, runs, monkeypatch, recipe, option):
    saved, expected = runs(recipe)
    monkeypatch.setattr(program, "parse_config", parsed)
    folder, refusals = root / "flipped" / recipe, []
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    words = flipped(root, folder, option, *options(recipe)[option])

    def check(changes, config):
        assert changes, f"{words[-1]} changes nothing"
        try:
            real(changes, config)
        except ValueError as e:
            refusals.append(str(e))

    real = program.check_changes
    monkeypatch.setattr(program, "check_changes", check)
    try:
        session = program.resume(words)
        same = agree(go_on(session, 2), expected, option)
        session.lock.release()
    except (ValueError, RuntimeError, KeyError) as e:  # the checkpoint does not fit
        same, refusals = False, [*refusals, str(e)]
    assert same == (not refusals), f"{words[-1]}: {refusals or 'allowed'}"


def agree(found, expected, option):
    "Whether two states are the same, bit for bit if the option does not round."
    if found.keys() != expected.keys() or any(found[name].shape != expected[name].shape for name in found):
        return False
    if option in ROUNDED:
        return all(torch.allclose(found[n], expected[n], rtol=0, atol=1e-5) for n in found if n.startswith("weight."))
    return all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("option", UNTRIED)
def test_what_cannot_be_tried_is_allowed_or_refused_as_is_said_here(option):
    config = parse_config([*SMALL, *RECIPES["paper"]])
    assert option in leaves(as_data(config))
    assert (option in harmless_options(Config, config.recipe())) == UNTRIED[option][0]


@pytest.mark.parametrize("kind", [kind for plugs in PLUGS.values() for kind in plugs])
def test_what_a_plug_calls_harmless_is_an_option_that_was_tried(kind):
    tried = {option for recipe in RECIPES for option in options(recipe)}
    section = next(name for name, plugs in PLUGS.items() if kind in plugs)
    assert {f"{section}.init_args.{name}" for name in getattr(kind, "harmless", ())} <= tried


# --- rewards ---

VOTES = {"file", "port"}  # where they are kept and given
CONNECTION = {"url", "api_key_env", "connect_timeout", "read_timeout", "retries", "backoff"}
SPEED = {"batch_size", "concurrency", "format", "threads", "device"}  # how much at a time, and where


@pytest.mark.parametrize("name", reward_classes())
def test_options_of_rewards_that_change_no_score_may_change(name):
    "What says how a score is computed, and not which: the remedies that docs/serving.md gives among them."
    kind = reward_classes()[name]
    own = {f.name for f in fields(kind)} if is_dataclass(kind) else set()
    assert kind.harmless == own & (CONNECTION | SPEED | (VOTES if name == "Votes" else set()))
    path = f"{kind.__module__}.{kind.__qualname__}"
    old = parse_config([*SMALL, *RECIPES["paper"]])
    for option in own:
        before, after = (
            replace(old, reward={"class_path": path, "init_args": {option: value}}) for value in ("old", "new")
        )
        refused = check(before, after)
        assert (refused is None) == (option in kind.harmless), option
        assert refused is None or f"reward.{option}: old -> new" in refused


def check(before, after):
    "What `--resume` says of the change from one Config to another; None if it is allowed."
    try:
        program.check_changes(program.recipe_changes(as_data(before), as_data(after)), after)
    except ValueError as e:
        return str(e)


def test_options_of_a_reward_among_several_may_change_as_well():
    old = parse_config([*SMALL, *RECIPES["paper"]])

    def several(**more):
        parts = {
            "far": {
                "class_path": "vgpo.rewards.remote.Remote",
                "init_args": {"url": "http://a:1", "retries": 3} | more,
            },
            "near": {"class_path": "vgpo.rewards.own.JPEG", "init_args": {"quality": more.get("quality", 95)}},
        }
        parts["far"]["init_args"].pop("quality", None)
        init = {"rewards": parts, "weights": {"far": 1.0, "near": 1.0}}
        return replace(old, reward={"class_path": "vgpo.rewards.base.Combined", "init_args": init})

    assert check(several(), several(retries=9, url="http://b:2", read_timeout=9.0)) is None
    assert "quality: 95 -> 90" in check(several(), several(quality=90))


@dataclass
class Noting(Callback):
    "A callback with an option that says where it writes, and one that says what it does."

    file: str = "note.txt"
    every: int = 1
    harmless = frozenset({"file"})


def test_options_of_a_callback_may_change_if_its_class_says_so():
    old = parse_config([*SMALL, *RECIPES["paper"]])
    begun = replace(old, callbacks=[Noting("a.txt")])
    assert check(begun, replace(old, callbacks=[Noting("b.txt")])) is None
    assert "callbacks.0.every: 1 -> 2" in check(begun, replace(old, callbacks=[Noting("b.txt", 2)]))
    for others in ([], [Noting("a.txt"), Noting("b.txt")]):
        assert "callbacks" in check(begun, replace(old, callbacks=others)) and check(
            replace(old, callbacks=others), begun
        )


# --- what was measured before training ---


def evaluated(monkeypatch):
    "A list that grows with each evaluation: whether it was of the model before training."
    calls, real = [], Session.evaluate

    def evaluate(session):
        calls.append(session.before is None)
        return real(session)

    monkeypatch.setattr(Session, "evaluate", evaluate)
    return calls


@pytest.fixture
def begun(runs, tmp_path):
    "A copy of a run that has trained for one epoch of two."
    return shutil.copytree(runs("paper")[0], tmp_path / "run")


def before(folder, *words):
    "The evaluation of the model before training, of a run that is resumed."
    session = program.resume(["--resume", str(folder), *words])
    session.lock.release()
    return session.evaluate_before()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_resumed_run_does_not_evaluate_the_model_before_training_again(begun, monkeypatch):
    calls, kept = evaluated(monkeypatch), files(begun / "before")
    program.main(["--resume", str(begun), "--evaluation.eval_every=0"])
    assert calls == [False]  # the one in the end
    before(begun, "--save_every=5")
    assert calls == [False] and files(begun / "before") == kept


@pytest.mark.parametrize("word", ["--evaluation.num_samples=3", "--evaluation.num_inference_steps=2",
                                  "--early_stopping.validation_reward=tiny_rewards:power"])  # fmt: skip
def test_it_is_evaluated_again_where_it_would_be_another_evaluation(begun, monkeypatch, word):
    calls, kept = evaluated(monkeypatch), files(begun / "before")
    for expected in (1, 1):  # the second time it is kept as well
        before(begun, word)
        assert len(calls) == expected and files(begun / "before") != kept


@pytest.mark.parametrize("lost", ["evaluation.json", "evaluation.safetensors"])
def test_half_of_an_evaluation_is_made_again(begun, monkeypatch, lost):
    "As after a kill while it was written: `settings.json` comes last."
    calls, kept = evaluated(monkeypatch), files(begun / "before")
    for name in ("settings.json", lost):
        (begun / "before" / name).unlink()
    before(begun)
    assert len(calls) == 1 and files(begun / "before") == kept


def test_what_is_kept_is_what_would_be_drawn_again(begun):
    session = program.resume(["--resume", str(begun)])
    kept = session.evaluate_before()
    with session.trainer.policy.reference():
        drawn = session.evaluate()
    session.lock.release()
    assert kept.summary == drawn.summary and kept.metrics() == drawn.metrics()
    assert torch.equal(kept.scores["reward"].scaled, drawn.scores["reward"].scaled)
    assert kept.images.tolist() == drawn.images[kept.shown].tolist()
