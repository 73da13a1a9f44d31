"The guide to runs that go wrong quotes what its script has found, and the script's runs can be made."

import json
from pathlib import Path

import pytest

from vgpo.config import parse_config

GUIDE = Path(__file__).parents[1] / "docs" / "trouble.md"


@pytest.fixture
def trouble(script):
    return script("trouble")


def test_the_guides_table_is_what_the_script_prints(trouble):
    text = GUIDE.read_text(encoding="utf-8")
    shown = text.partition("<!-- trouble -->\n")[2].partition("\n<!-- end -->")[0]
    assert set(trouble.lines()) == set(trouble.RUNS)
    assert shown == trouble.table(trouble.lines().values())


def test_every_run_is_named_in_the_text_and_has_options_that_exist(trouble):
    text = GUIDE.read_text(encoding="utf-8").partition("<!-- end -->")[2]
    for name, words in trouble.RUNS.items():
        parse_config([*trouble.SMALL, *words])
        assert name == "healthy" or f"*{name}*" in text


def test_a_small_run(trouble, monkeypatch):
    small = ["--epochs=1", "--rollout.num_inference_steps=2", "--window.size=1", "--rollout.prompts_per_epoch=2"]
    monkeypatch.setattr(trouble, "HELD_OUT", 4)
    monkeypatch.setitem(trouble.RUNS, "small", [*small, "--rollout.group_size=2", "--optim.num_minibatches=1"])
    line = json.loads(json.dumps(trouble.train("small")))
    assert line["first"] == line["last"] and 0 <= line["after"]["reward"] <= 1
    assert trouble.row(line).count("|") == trouble.table([]).splitlines()[0].count("|")
