"Rewards on a command line and in a file: what jsonargparse makes of the option type RewardSpec, and what it refuses."

import sys
import types
from dataclasses import dataclass, fields

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from vgpo.rewards.base import Combined, Function, Reward, RewardSpec, make_reward, reward_classes
from vgpo.rewards.ocr import OCR
from vgpo.rewards.own import JPEG

KNOWN = {name: cls for name, cls in reward_classes().items() if cls.__module__.startswith("vgpo.")}


def half(images, prompts, metadata, share=0.5):
    return [share] * len(prompts)


@dataclass
class Own(Reward):
    "A reward of one's own."

    level: float = 0.5
    """the score of all"""

    def __call__(self, images, prompts, metadata):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def own_module(monkeypatch):
    module = types.ModuleType("own_rewards")
    module.half, module.Own = half, Own
    monkeypatch.setitem(sys.modules, "own_rewards", module)


def parser():
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--reward", type=RewardSpec, default="GenEvalShapes")
    return made


def made_by(line):
    "The reward of a command line, and of the file that holds its options."
    p = parser()
    options = p.parse_args(line.split() if isinstance(line, str) else line)
    again = p.parse_string(p.dump(options))
    assert p.dump(again) == p.dump(options)
    first, second = (make_reward(p.instantiate(o).reward) for o in (options, again))
    assert type(first) is type(second) and first.name == second.name and first.version == second.version
    return first


def test_a_class_by_its_name_with_options():
    assert made_by("--reward OCR --reward.mode full --reward.threads 1") == OCR(mode="full", threads=1)
    assert made_by("--reward vgpo.rewards.own.JPEG --reward.quality 50") == JPEG(50)
    assert made_by("--reward OCR --reward.threads 3 --reward JPEG") == JPEG()


def test_functions_and_classes_of_ones_own():
    assert made_by("--reward own_rewards:half").name == "own_rewards:half"
    own = made_by(
        ["--reward", "Function", "--reward.function", "own_rewards:half", "--reward.options", "{share: 0.25}"]
    )
    assert isinstance(own, Function) and own.options == {"share": 0.25}
    assert own(None, ["a"], [{}]).scaled.tolist() == [0.25]
    assert make_reward("own_rewards.Own", level=1.0) == Own(1.0)


def test_names_of_functions_are_plain_text_that_any_writer_takes():
    line = [
        "--reward",
        "Combined",
        "--reward.rewards",
        "{a: OCR, b: 'own_rewards:half'}",
        "--reward.weights",
        "{a: 1, b: 2}",
    ]
    assert type(parser().parse_args(["--reward", "own_rewards:half"]).reward) is str
    assert type(parser().parse_args(line).reward.init_args.rewards["b"]) is str


def test_nothing_is_loaded_until_the_reward_is_made(monkeypatch):
    def load(self):
        raise AssertionError("loaded")

    monkeypatch.setattr(OCR, "__post_init__", load)
    p = parser()
    factory = p.instantiate(p.parse_args(["--reward", "OCR"])).reward
    with pytest.raises(AssertionError, match="loaded"):
        make_reward(factory)


def test_combined_rewards_on_a_command_line_and_in_a_file():
    line = ["--reward", "Combined", "--reward.rewards.text", "OCR", "--reward.rewards.text.threads", "1",
            "--reward.rewards.mine", "own_rewards:half", "--reward.weights", "{text: 3, mine: 1}"]  # fmt: skip
    both = made_by(line)
    assert isinstance(both, Combined) and both.weights == {"text": 0.75, "mine": 0.25}
    assert both.rewards["text"] == OCR(threads=1) and both.rewards["mine"].name == "own_rewards:half"
    text = """
        reward:
          class_path: Combined
          init_args:
            rewards: {text: {class_path: OCR, init_args: {threads: 1}}, mine: "own_rewards:half"}
            weights: {text: 3, mine: 1}"""
    p = parser()
    assert make_reward(p.instantiate(p.parse_string(text)).reward).name == both.name


@pytest.mark.parametrize("line, message", [
    ("--reward OCR --reward.quality 3", "Option 'quality' is not accepted"),
    ("--reward OCR --reward.mode guess", "'recognise', 'full'.*guess"),
    ("--reward OCR --reward.threads 0", "v>0"),
    ("--reward JPEG --reward.quality 101", "101"),
    ("--reward own_rewards:half --reward.share 1", "own_rewards:half"),
    ("--reward Nope", "not of the form module:function; by name there are .*GenEval, .*OCR, .*Nope"),
    ("--reward Function", "function"),
    ("--reward PYes", "model"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(line, message):
    with pytest.raises(ArgumentError, match=f"(?s){message}"):
        parser().parse_args(line.split())


def test_a_base_class_is_no_reward():
    with pytest.raises(ValueError, match="GenEvalRules cannot be made: Can't instantiate abstract class"):
        make_reward({"class_path": "vgpo.rewards.geneval.GenEvalRules"})
    assert not {"GenEvalRules", "CLIPBase", "VLMJudge", "WordJudge", "Reward"} & set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_every_option_is_explained_and_typed(name, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args([f"--reward.help={name}"])
    text = " ".join(capsys.readouterr().out.split())
    options = [option for option in fields(KNOWN[name]) if option.init]
    for option in options:
        assert f"--reward.{option.name} " in text
        after = text.split(f"--reward.{option.name} ", 2)[-1]  # the first is in the usage line
        explanation = after.partition("(type: ")[0].partition("(required")[0]
        assert len(explanation.split()) > 2, f"{name}.{option.name} is not explained"


@pytest.mark.parametrize("name", KNOWN)
def test_every_reward_checks_its_fields(name):
    "Restricted types hold for objects made in Python, too: a class that overrides __post_init__ must not forget it."
    ranges = [option for option in fields(KNOWN[name]) if hasattr(option.type, "_expression")]
    for option in ranges:
        with pytest.raises(ValueError, match=rf"{name}\.{option.name} is -1"):
            needed = {"model": "m"} if "model" in {f.name for f in fields(KNOWN[name])} else {}
            KNOWN[name](**needed | {option.name: -1})
