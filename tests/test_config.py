import ast
import inspect
import math
import re
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass, replace
from typing import get_args

import pytest
import yaml

import vgpo.config
from vgpo.config import (
    RANGES,
    RECIPES,
    Config,
    check_config,
    options,
    parse_config,
    recipe_path,
    save_config,
    value_of,
    within,
)


@pytest.fixture
def recipe(tmp_path):
    "Writes a recipe and returns the command line that reads it."

    def write(text):
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return ["--recipe", str(tmp_path / "mine.yaml")]

    return write


def changed(config, option, value):
    "A Config with one option changed, given by its dotted name."
    section, _, leaf = option.rpartition(".")
    if not section:
        return replace(config, **{leaf: value})
    return replace(config, **{section: replace(getattr(config, section), **{leaf: value})})


def explanations(cls=Config, prefix=""):
    "The string under each field, read from the source."
    body = ast.parse(inspect.getsource(cls)).body[0].body
    found = {}
    for node, after in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            found[prefix + node.target.id] = after.value.value
    for f in fields(cls):
        if is_dataclass(f.type):
            found |= explanations(f.type, f"{prefix}{f.name}.")
    return found


def test_precedence(recipe):
    mine = recipe("optim: {lr: 1e-4}\nvalues:\n  gamma: 0.5\n")
    config = parse_config(mine)
    assert config.optim.lr == 1e-4 and config.values.gamma == 0.5
    assert config == changed(changed(Config(), "optim.lr", 1e-4), "values.gamma", 0.5)  # the rest are defaults
    for line in ([*mine, "--values.gamma", "0.9"], ["--values.gamma=0.9", *mine], ["--values.gamma", "0.9", *mine]):
        assert parse_config(line) == changed(config, "values.gamma", 0.9)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_and_survives_saving(path, tmp_path):
    config = parse_config(["--recipe", path.stem, "--values.gamma", "0.8"])
    assert config.values.gamma == 0.8 and isinstance(config, Config)
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--recipe", str(tmp_path / "config.yaml")]) == config


def test_no_argument_is_the_main_recipe():
    assert parse_config([]) == parse_config(["--recipe", "tiny-geneval"]) == parse_config(["--recipe=tiny-geneval"])


def test_awkward_values_survive_saving(tmp_path):
    config = Config(name="1e-4", seed=2**40)
    for option, value in {
        "optim.lr": 1 / 3,
        "optim.clip_range": 1e-300,
        "optim.betas": (0.5, 1e-05),
        "optim.decay": True,
        "model.resolution": 512,
        "model.lora_targets": ["attn.to_q", "1e3"],
        "model.path": "C:\\models: #1 'ü'",
        "prompts.train": "null",
        "prompts.test": "no",
        "reward.options": {"weights": [0.5, 0.25], "on": 1, "deep": {"none": None}},
    }.items():
        config = changed(config, option, value)
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(["--recipe", str(tmp_path / "config.yaml")]) == config
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert set(saved) == {f.name for f in fields(Config)}  # every option, so later defaults do not matter
    assert all(
        set(saved[name]) == set(section) for name, section in asdict(config).items() if isinstance(section, dict)
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--valuess.gamma 0.9", "there is no option valuess.gamma; did you mean values.gamma?"),
        ("--values.gama=0.9", "there is no option values.gama; did you mean values.gamma?"),
        ("--values.gamm 0.9", "there is no option values.gamm; did you mean values.gamma?"),  # no abbreviations
        ("--xyzzy 1", "there is no option xyzzy; --help lists all of them"),
        ("--values.gamma high", "values.gamma must be float, not high"),
        ("--sampling.steps 2.5", "sampling.steps must be int, not 2.5"),
        (
            "--sampling.sampler euler",
            "sampling.sampler must be one of ['flow-sde', 'dance-sde', 'flow-cps'], not euler",
        ),
        ("--model.dtype float8", "model.dtype must be one of ['float32', 'bfloat16', 'float16'], not float8"),
        ("--optim.betas [0.9]", "optim.betas must be tuple with 2 elements, not [0.9]"),
        ("--optim.lr nan", "optim.lr must be float, not nan"),
        ("--seed null", "seed must be int, not None"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--recipe", "--recipe needs a recipe's name or a .yaml file after it"),
        ("stray", "'stray' belongs to no option; options begin with --"),
        ("--values.gamma 2", "values.gamma is 2.0; it must lie in [0, 1]"),
    ],
)
def test_bad_command_lines(line, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_config(line.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("values: {gama: 0.9}", "mine.yaml: there is no option values.gama; did you mean values.gamma?"),
        ("valuez: {}", "mine.yaml: there is no option valuez; did you mean values?"),
        ("values: 3", "mine.yaml: values must hold lines `option: value`, not 3"),
        ("values:", "mine.yaml: values must hold lines `option: value`, not None"),
        ("seed: null", "mine.yaml: seed has no value; give it one, or leave it out for its default"),
        ("recipe: tiny-ocr", "mine.yaml: there is no option recipe; "),
        ("values: {gamma: high}", "mine.yaml: values.gamma must be float, not high"),
        ("advantage: {kind: ppo}", "mine.yaml: advantage.kind must be one of ['vgpo', 'grpo'], not ppo"),
        ("- a\n- b", "mine.yaml: a recipe must hold lines `option: value`, not ['a', 'b']"),
        ("", "mine.yaml: a recipe must hold lines `option: value`, not None"),
        ("values: {gamma: [}", "mine.yaml: not valid YAML: "),
        ("values: {gamma: .nan}", "values.gamma is nan; it must lie in [0, 1]"),
    ],
)
def test_bad_recipes(recipe, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_config(recipe(text))
    assert "\n" not in str(caught.value)


def test_missing_recipes():
    for name in ("tiny-genevall", "nowhere.yaml"):
        message = f"there is no recipe '{name}'; give a .yaml file or one of .*tiny-geneval"
        with pytest.raises(FileNotFoundError, match=message):
            recipe_path(name)


def test_intervals():
    assert [within(x, "[0, 1)") for x in (-1e-9, 0, 0.5, 1)] == [False, True, True, False]
    assert [within(x, "(0, 1]") for x in (0, 1e-300, 1, 1.1)] == [False, True, True, False]
    assert not within(math.inf, "[0, inf)") and not within(math.nan, "[0, inf)")


def test_every_number_has_a_range_and_every_range_works():
    numbers = {name for name, kind in options().items() if {kind, *get_args(kind)} & {int, float}}
    assert numbers - set(RANGES) == {"seed", "reward.parts", "optim.betas"} and set(RANGES) <= numbers
    assert check_config(Config()) == Config()
    for option, interval in RANGES.items():
        low, high = map(float, interval[1:-1].split(","))
        for wrong in (low - 1, low if interval[0] == "(" else low - 0.5, high + 1, math.nan):
            with pytest.raises(ValueError, match=f"^{option} is .*; it must lie in {re.escape(interval)}$"):
                check_config(changed(Config(), option, wrong))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("sampling.sde_steps", 11, "sampling.sde_steps is 11; it must lie in 1 to sampling.steps, 10"),
        ("values.reward_steps", 11, "values.reward_steps is 11; it must lie in 1 to sampling.steps, 10"),
        ("optim.updates", 3, "optim.updates is 3; it must divide the 128 images of an epoch"),
        ("optim.betas", (0.9, 1.0), "optim.betas is (0.9, 1.0); both must lie in [0, 1)"),
        ("name", "a/b", "name is 'a/b'; it must be the name of a folder"),
        ("name", "", "name is ''; it must be the name of a folder"),
        ("name", "..", "name is '..'; it must be the name of a folder"),
    ],
)
def test_contradictions(option, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_config(changed(Config(), option, value))


def test_help_explains_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as end:
        parse_config(["--help"])
    text, explained = capsys.readouterr().out, explanations()
    assert end.value.code == 0 and set(options()) <= set(explained)
    usage = "usage: python -m vgpo.train [--plan | --resume RUN] [--recipe NAME|FILE.yaml] [--OPTION VALUE ...]\n"
    assert text.startswith(usage)
    for option in options():
        (entry,) = re.findall(rf"^  --{re.escape(option)} (.*?)(?=^  -|^$|\Z)", text, re.M | re.S)
        assert explained[option] in entry and "default: " in entry


def test_print_config_is_what_a_run_saves(recipe, capsys, tmp_path):
    mine = recipe("optim: {lr: 1e-4}\n")
    with pytest.raises(SystemExit) as end:
        parse_config([*mine, "--values.gamma", "0.7", "--print_config"])
    assert end.value.code == 0
    save_config(parse_config([*mine, "--values.gamma", "0.7"]), tmp_path / "config.yaml")
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load((tmp_path / "config.yaml").read_text())


def test_options_are_the_leaves():
    assert all(not is_dataclass(kind) for kind in options().values())
    assert value_of(Config(), "values.gamma") == Config().values.gamma and value_of(Config(), "seed") == 0


def test_the_config_knows_nothing_heavy():
    "A mistyped option must not cost the seconds that it takes to import torch."
    code = "import sys, vgpo.config; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert vgpo.config.RECIPES.is_dir()
