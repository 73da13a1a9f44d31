import ast
import inspect
import math
import re
import textwrap
from dataclasses import fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Union, get_args, get_origin

import pytest
import yaml
from plug_classes import option_types

from vgpo.config import (
    PLUGS,
    RECIPES,
    Config,
    as_data,
    option_names,
    parse_config,
    plug_classes,
    recipe_files,
    save_config,
)
from vgpo.config import recipe_path as path_of
from vgpo.credit.gdpo import GDPO, DecoupledVGPO
from vgpo.credit.grpo import GRPO
from vgpo.credit.one_step import OneStep
from vgpo.credit.vgpo import VGPO
from vgpo.objectives.awm import AWM, VGRPO
from vgpo.objectives.clipped import ClippedSurrogate
from vgpo.objectives.flow_dppo import FlowDPPO
from vgpo.objectives.nft import NFT
from vgpo.plugs import check_fields
from vgpo.runs.resume import leaves
from vgpo.sde import DanceSDE, FlowCPS, FlowSDE
from vgpo.windows import Leading, Random

SECTIONS = {f.name: f.type for f in fields(Config) if is_dataclass(f.type)}


def changed(config, option, value):
    "A Config with one option changed, given by its dotted name."
    section, _, leaf = option.rpartition(".")
    if not section:
        return replace(config, **{leaf: value})
    return replace(config, **{section: replace(getattr(config, section), **{leaf: value})})


def explanations(kind):
    "{field: the string under it}, read from the source of a dataclass and of its bases."
    found = {}
    for cls in reversed([c for c in kind.__mro__ if c.__module__.partition(".")[0] == "vgpo"]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for node, after in zip(body, body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[node.target.id] = after.value.value
    return found


def same(one, other):
    return as_data(one) == as_data(other)


# --- what is read ---


def test_precedence(recipe):
    mine = recipe("optim: {lr: 1e-4}\ncredit:\n  class_path: VGPO\n  init_args: {gamma: 0.5}\n")
    config = parse_config(mine)
    assert config.optim.lr == 1e-4 and config.credit == VGPO(gamma=0.5)
    expected = changed(changed(Config(reward=config.reward), "optim.lr", 1e-4), "credit.gamma", 0.5)
    assert same(config, expected)  # the rest are defaults
    for line in ([*mine, "--credit.gamma", "0.9"], ["--credit.gamma=0.9", *mine], ["--credit.gamma", "0.9", *mine]):
        assert same(parse_config(line), changed(config, "credit.gamma", 0.9))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_and_survives_saving(path, tmp_path):
    config = parse_config(["--recipe", path.stem, "--credit.advantage_clip", "0.8"])
    assert config.credit.advantage_clip == 0.8 and isinstance(config, Config)
    save_config(config, tmp_path / "config.yaml")
    assert same(parse_config(["--recipe", str(tmp_path / "config.yaml")]), config)


def test_no_argument_is_the_main_recipe():
    main = parse_config(["--recipe", "tiny-geneval"])
    assert same(parse_config([]), main) and same(parse_config(["--recipe=tiny-geneval"]), main)


def test_a_recipe_may_build_on_another(recipe, tmp_path):
    recipe("epochs: 7\noptim: {lr: 1e-4, weight_decay: 0}\n"
           "credit: {class_path: VGPO, init_args: {gamma: 0.5, anchor_steps: 2}}\n",
           "lowest")  # fmt: skip
    recipe("base: lowest.yaml\noptim: {lr: 1e-3}\ncredit: {class_path: VGPO, init_args: {gamma: 0.25}}\n", "middle")
    highest = recipe("base: middle.yaml\nseed: 3\n", "highest")
    config = parse_config(highest)
    assert (config.epochs, config.seed, config.optim.lr, config.optim.weight_decay) == (7, 3, 1e-3, 0)
    assert config.credit == VGPO(gamma=0.25, anchor_steps=2)  # what is not said again is kept
    assert parse_config([*highest, "--optim.lr=2e-3"]).optim.lr == 2e-3
    assert [path.stem for path in recipe_files(highest[1])] == ["lowest", "middle", "highest"]
    assert parse_config(recipe("base: tiny-ocr\n")).name == "tiny-ocr"
    other = parse_config(recipe("base: lowest.yaml\ncredit: GRPO\n"))
    assert other.credit == GRPO()  # another class has nothing of the first one's options
    save_config(config, tmp_path / "saved.yaml")
    assert "base" not in yaml.safe_load((tmp_path / "saved.yaml").read_text())


def test_a_recipe_does_not_build_on_itself(recipe):
    recipe("base: two.yaml\n", "one")
    two = recipe("base: one.yaml\n", "two")
    with pytest.raises(ValueError, match="two.yaml: the recipe builds on itself; take `base` out"):
        parse_config(two)


def test_every_plug_is_chosen_by_its_name_with_its_own_options():
    for line, plug in {
        "--sampler FlowCPS --sampler.noise_level 0.3": FlowCPS(0.3), "--sampler DanceSDE": DanceSDE(0.7),
        "--window Random --window.size 2 --window.start 1 --window.stop 8 --window.per group": Random(2, 1, 8, "group"),
        "--credit GRPO --credit.scale_rewards batch": GRPO("batch"), "--credit GDPO": GDPO(),
        "--credit DecoupledVGPO --credit.gamma 1": DecoupledVGPO(gamma=1.0, num_scored_steps=5),
        "--credit vgpo.credit.vgpo.VGPO": VGPO(num_scored_steps=5),
        "--objective.beta 0.1": ClippedSurrogate(clip_range=1e-3, beta=0.1),
        "--objective FlowDPPO --objective.max_kl 1e-3 --objective.step_weights noise": FlowDPPO(max_kl=1e-3, step_weights="noise"),
        "--objective NFT --objective.mix 0.5 --credit GRPO": NFT(mix=0.5),
        "--objective AWM --objective.error_of clean --credit GDPO": AWM(error_of="clean"),
        "--objective VGRPO --objective.clip_range 0.1 --credit GRPO": VGRPO(clip_range=0.1),
    }.items():  # fmt: skip
        assert getattr(parse_config(line.split()), line[2:].split()[0].split(".")[0]) == plug, line


def test_awkward_values_survive_saving(tmp_path):
    config = Config(name="1e-4", seed=2**40)
    for option, value in {
        "optim.lr": 1 / 3,
        "objective.clip_range": 1e-300,
        "optim.betas": (0.5, 1e-05),
        "optim.lr_scheduler": "cosine",
        "model.resolution": 512,
        "model.lora_targets": ["attn.to_q", "1e3"],
        "model.path": "C:\\models: #1 'ü'",
        "prompts.train": "null",
        "prompts.test": "no",
        "reward": {
            "class_path": "vgpo.rewards.base.Function",
            "init_args": {
                "function": "tiny_rewards:power",
                "options": {"weights": [0.5], "on": 1, "deep": {"none": None}},
                "name": "",
            },
        },
    }.items():  # fmt: skip
        config = changed(config, option, value)
    save_config(config, tmp_path / "config.yaml")
    assert same(parse_config(["--recipe", str(tmp_path / "config.yaml")]), config)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert set(saved) == {f.name for f in fields(Config)}  # every option, so later defaults do not matter
    assert all(set(saved[name]) == {f.name for f in fields(kind)} for name, kind in SECTIONS.items())
    for name in ("sampler", "window", "credit", "objective"):
        assert set(saved[name]["init_args"]) == {f.name for f in fields(getattr(config, name))}


def test_print_config_is_what_a_run_saves(recipe, capsys, tmp_path):
    mine = recipe("optim: {lr: 1e-4}\n")
    with pytest.raises(SystemExit) as end:
        parse_config([*mine, "--credit.gamma", "0.7", "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed.pop("base", None) is None
    save_config(parse_config([*mine, "--credit.gamma", "0.7"]), tmp_path / "config.yaml")
    assert printed == yaml.safe_load((tmp_path / "config.yaml").read_text())


# --- what is refused ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--creditt.gamma 0.9", "there is no option creditt.gamma; did you mean credit.gamma?"),
        ("--credit.gama=0.9", "there is no option credit.gama; did you mean credit.gamma?"),
        ("--credit.gamm 0.9", "there is no option credit.gamm; did you mean credit.gamma?"),  # no abbreviations
        ("--optim.lrr 0.9", "there is no option optim.lrr; did you mean optim.lr?"),
        (
            "--credit GRPO --credit.gamma 1",
            "there is no option credit.gamma in the chosen class; it is one of VGPO, DecoupledVGPO",
        ),
        ("--window.per group", "there is no option window.per in the chosen class; it is one of Random, OneStep"),
        ("--reward OCR --reward.moode full", "there is no option reward.moode; did you mean reward.mode?"),
        ("--xyzzy 1", "there is no option xyzzy; --help lists all of them"),
        ("--credit.gamma high", "credit.gamma must be a number, not high"),
        ("--rollout.num_inference_steps 2.5", "rollout.num_inference_steps must be a whole number, not 2.5"),
        ("--model.dtype float8", "model.dtype must be one of 'float32', 'bfloat16', 'float16', not float8"),
        ("--optim.betas [0.9]", "optim.betas must be a tuple with 2 elements, not [0.9]"),
        ("--optim.betas [0.9,1.0]", "optim.betas is 1.0; it must be a number v with v>=0 and v<1"),
        ("--optim.lr nan", "optim.lr is nan; it must be a number v with v>0"),
        ("--seed null", "seed must be a number, not null"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--recipe", "--recipe needs a recipe's name or a .yaml file after it"),
        ("stray", "'stray' belongs to no option; options begin with --"),
        ("--credit.gamma 2", "credit.gamma is 2; it must be a number v with v>=0 and v<=1"),
        ("--reward OCR --reward.threads 0", "reward.threads is 0; it must be a number v with v>0"),
        ("--rollout.async_scoring maybe", "rollout.async_scoring must be a bool, not maybe"),
    ],
)  # fmt: skip
def test_bad_command_lines(line, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_config(line.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("credit: {gama: 0.9}", "mine.yaml: there is no option credit.gama; did you mean credit.gamma?"),
        (
            "credit: {class_path: VGPO, init_args: {gama: 0.9}}",
            "mine.yaml: there is no option credit.gama; did you mean",
        ),
        ("creditz: {}", "mine.yaml: there is no option creditz; did you mean credit?"),
        ("optim: {lrr: 1}", "mine.yaml: there is no option optim.lrr; did you mean optim.lr?"),
        ("rollout: 3", "mine.yaml: rollout must hold lines `option: value`, not 3"),
        ("rollout:", "mine.yaml: rollout must hold lines `option: value`, not None"),
        ("seed: null", "mine.yaml: seed has no value; give it one, or leave it out for its default"),
        ("recipe: tiny-ocr", "mine.yaml: there is no option recipe; "),
        ("base: 3", "mine.yaml: base must be a recipe's name, not 3"),
        ("credit: {class_path: VGPO, init_args: {gamma: high}}", "mine.yaml: credit.gamma must be a number, not high"),
        ("credit: PPO", "mine.yaml: credit: there is no class PPO; known are "),
        ("sampler: Euler", "mine.yaml: sampler: there is no class Euler; known are "),
        ("sampler: {q: 1}", "mine.yaml: there is no option sampler.q; "),
        ("- a\n- b", "mine.yaml: a recipe must hold lines `option: value`"),
        ("", "mine.yaml: a recipe must hold lines `option: value`"),
        ("credit: {gamma: [}", "mine.yaml: not valid YAML: "),
        ("optim: {lr: .nan}", "optim.lr is nan; it must be a number v with v>0"),
    ],
)
def test_bad_recipes(recipe, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_config(recipe(text))
    assert "\n" not in str(caught.value)


def test_missing_recipes(recipe):
    for name in ("tiny-genevall", "nowhere.yaml"):
        message = f"there is no recipe '{name}'; give a .yaml file or one of .*tiny-geneval"
        with pytest.raises(FileNotFoundError, match=message):
            path_of(name)
        with pytest.raises(FileNotFoundError, match=message):
            parse_config(recipe(f"base: {name}"))


# --- numbers ---


def numbers():
    "{option: its type, int and float for plain ones} of all numbers in a Config, whichever plugs are chosen."
    found = dict(option_types(Config, as_data(Config())))
    for option in PLUGS:
        for kind in (kind for kind in plug_classes(option).values() if kind.__module__.startswith("vgpo.")):
            found |= {f"{option}.{kind.__name__}.{f.name}": f.type for f in fields(kind) if f.init}
    result = {}
    for option, kind in found.items():
        parts = get_args(kind) if get_origin(kind) in (Union, UnionType, tuple) else (kind,)
        numbers = [
            part
            for part in parts
            if inspect.isclass(part) and issubclass(part, (int, float)) and part not in (bool, NoneType)
        ]
        if numbers:
            result[option] = numbers[0]
    return result


def unloaded(kind, name, value):
    "Check the fields of a plug, one of them of this value and the others of none, without loading what it needs."
    plug = object.__new__(kind)
    for f in fields(kind):
        object.__setattr__(plug, f.name, value if f.name == name else f.default)
    check_fields(plug)


def test_every_number_has_a_range():
    free = {option.rpartition(".")[2] for option, kind in numbers().items() if kind in (int, float)}
    assert free == {
        "noise_level",  # each sampler checks its own, see below
        "low", "high",  # of a scale that the user's question asks for
    }  # fmt: skip


@pytest.mark.parametrize("option", [option for option, kind in numbers().items() if hasattr(kind, "_restrictions")])
def test_every_range_works(option):
    name, kind = option.replace(".init_args", ""), numbers()[option]
    plug = name.split(".")[0] if name.count(".") == 2 else None
    for comparison, limit in kind._restrictions:
        beyond = {"gt": limit, "ge": limit - 1, "lt": limit, "le": limit + 1}[comparison.__name__]
        for wrong in (beyond, math.nan):
            message = rf"\b{name.rpartition('.')[2]} is .*; it must be a number v with {re.escape(kind._expression)}"
            with pytest.raises(ValueError, match=message):
                if plug:  # before it loads anything
                    unloaded(plug_classes(plug)[name.split(".")[1]], name.rpartition(".")[2], wrong)
                else:
                    changed(Config(), name, (wrong, 0.5) if name == "optim.betas" else wrong)


@pytest.mark.parametrize(
    "sampler, wrong", [(FlowSDE, -1), (DanceSDE, math.inf), (FlowCPS, 1.5), (FlowSDE, math.nan), (FlowCPS, 0)]
)
def test_noise_levels_that_cannot_be(sampler, wrong):
    with pytest.raises(ValueError, match="noise_level"):
        Config(sampler=sampler(wrong))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("window.size", 11, "window.size is 11; it must lie in 1 to rollout.num_inference_steps, 10"),
        ("credit.num_scored_steps", 11, "credit.num_scored_steps is 11; it must lie in 1 to rollout.num_inference"),
        ("optim.num_minibatches", 3, "optim.num_minibatches is 3; it must divide the 128 images of an epoch"),
        ("name", "a/b", "name is 'a/b'; it must be the name of a folder"),
        ("name", "", "name is ''; it must be the name of a folder"),
        ("name", "..", "name is '..'; it must be the name of a folder"),
        ("early_stopping.patience", 2, "early_stopping.patience is 2; it counts held-out evaluations: set evaluation."),
    ],
)  # fmt: skip
def test_contradictions(option, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        changed(Config(), option, value)


@pytest.mark.parametrize(
    "objective",
    [ClippedSurrogate(beta=0.1), ClippedSurrogate(target_kl=0.1), FlowDPPO(beta=0.1), NFT(beta=0.1)],
    ids=repr,
)
def test_without_adapters_there_is_no_reference(objective):
    config = replace(changed(Config(), "model.lora_rank", 0), credit=GRPO())
    remedy = "set objective.beta, and objective.target_kl if there is one, to 0, or train adapters"
    with pytest.raises(ValueError, match=remedy):
        replace(config, objective=objective)


def ours(option):
    return [kind for kind in plug_classes(option).values() if kind.__module__.startswith("vgpo.")]


OF_FINISHED_IMAGES = [kind for kind in ours("objective") if kind.samples_ode]
IN_BETWEEN = [kind() for kind in ours("credit") if len(kind().scored_states(10)) > 1]


@pytest.mark.parametrize("credit", IN_BETWEEN, ids=lambda credit: type(credit).__name__)
@pytest.mark.parametrize("objective", OF_FINISHED_IMAGES)
def test_what_learns_from_finished_images_wants_an_estimator_that_scores_no_others(objective, credit):
    states = len(credit.scored_states(10))
    message = (
        f"objective {objective.__name__} learns from finished images, but credit {type(credit).__name__} scores {states} "
        "states of each; choose an estimator that scores the last only: --credit GRPO"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Config(objective=objective(), credit=credit)
    Config(objective=ClippedSurrogate(), credit=credit)
    for terminal in (GRPO(), GDPO()):
        assert Config(objective=objective(), credit=terminal).objective == objective()


@pytest.mark.parametrize("objective", OF_FINISHED_IMAGES)
@pytest.mark.parametrize("window", [Leading(shared_start=True), OneStep()], ids=repr)
def test_images_of_the_ode_do_not_share_their_start(objective, window):
    message = f"objective {objective.__name__} draws images by the ODE, and those of a group .* set window.shared_start to false"
    with pytest.raises(ValueError, match=message):
        Config(objective=objective(), credit=GRPO(), window=window)
    Config(objective=objective(), credit=GRPO(), window=replace(window, shared_start=False))
    Config(credit=GRPO(), window=window)


def test_sampler_and_window_must_fit():
    with pytest.raises(ValueError, match="window.size"):
        Config(sampler=FlowCPS(), window=Leading(10))
    Config(sampler=FlowSDE(), window=Leading(10))


# --- help ---


def shown(monkeypatch, capsys, *words):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as end:
        parse_config(list(words))
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_explains_every_option(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, "--help")
    assert text.startswith(
        "usage: python -m vgpo.train [--resume RUN] [--recipe NAME|FILE.yaml] [--OPTION VALUE ...]\n"
    )
    for prefix, kind in {"": Config, **{f"{name}.": kind for name, kind in SECTIONS.items()}}.items():
        for f in fields(kind):
            if not prefix and f.name in SECTIONS:
                continue
            (entry,) = re.findall(rf"^  --{re.escape(prefix + f.name)} (.*?)(?=^  -|^$|\Z)", text, re.M | re.S)
            assert explanations(kind)[f.name] in entry and "default: " in entry


@pytest.mark.parametrize("option", [option for option in PLUGS if option != "callbacks"])
def test_help_of_a_plug_explains_its_options(monkeypatch, capsys, option):
    for name, kind in plug_classes(option).items():
        if not kind.__module__.startswith("vgpo."):
            continue  # of another test
        text = shown(monkeypatch, capsys, f"--{option}.help", name)
        for f in fields(kind):
            if f.init:
                assert f"--{option}.{f.name} " in text and explanations(kind)[f.name] in text, (name, f.name)


def test_names_of_options_are_those_of_all_plugs():
    names = option_names()
    assert len(names) == len(set(names)) and {
        "seed",
        "optim.lr",
        "credit.gamma",
        "window.per",
        "reward.threads",
    } <= set(names)
    for option in leaves(as_data(parse_config([]))):
        assert option.replace(".init_args", "").removesuffix(".class_path") in names
