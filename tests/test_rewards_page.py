"docs/rewards.md: its tables are those of the registered classes, its links lead somewhere, and its example works."

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from vgpo.rewards.base import checked_name, make_reward, options_of, reward_classes, score

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "rewards.md").read_text()
TABLE = PAGE.partition("## Built in")[2].partition("###")[0]
ROWS = dict(re.findall(r"^\| `(\w+)` (\|.*)$", TABLE, re.M))
KNOWN = {name: cls for name, cls in reward_classes().items() if cls.__module__.startswith("vgpo.")}


def test_the_page_lists_every_reward_once():
    assert sorted(re.findall(r"^\| `(\w+)` \|", TABLE, re.M)) == sorted(KNOWN)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(\.\./([\w./]+)\)", PAGE)
    assert links and all((ROOT / link).is_file() for link in links)


@pytest.mark.parametrize("name", KNOWN)
def test_the_row_of_a_reward_has_the_scale_and_the_weights_of_its_class(name):
    cls, row = KNOWN[name], ROWS[name]
    if name not in ("Remote", "Combined", "VLMScore"):  # theirs are those of an object
        assert cls.scale in row
    for option in fields(cls):
        if option.name in ("weights", "clip_weights", "processor", "tokenizer", "head") and isinstance(
            option.default, str
        ):
            assert option.default in row, option.name


def test_the_recipes_on_the_page_name_rewards_and_options_that_exist():
    def check(spec):
        if isinstance(spec, str):
            return spec in KNOWN or checked_name(spec) == spec
        assert set(spec["init_args"]) <= set(options_of(spec["class_path"])) and spec["class_path"] in KNOWN
        return all(check(part) for part in spec["init_args"].get("rewards", {}).values())

    recipes = [yaml.safe_load(text)["reward"] for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]
    assert len(recipes) == 2 and all(map(check, recipes))


def test_the_example_on_the_page_is_a_reward_of_about_ten_lines(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    assert len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    noise = np.random.default_rng(0).normal(size=(64, 64, 3))
    images = np.stack([(128 + level * noise).clip(0, 255).astype(np.uint8) for level in (0, 60, 60)])
    images[2, :, 32:] = images[2, :, 31::-1]  # blank; noise; noise beside its mirror image
    command = re.findall(r"--reward (Function.*)\n", PAGE)[0]
    name, options = re.search(r"--reward.function (\S+) --reward.options '(.*)'", command).groups()
    reward = make_reward("Function", function=name, options=yaml.safe_load(options))
    scores = score(reward, images, ["x"] * 3, [{}] * 3)
    assert scores.scaled[0] == 0 and scores.scaled[2] == pytest.approx(1, abs=1e-6)
    assert abs(scores.scaled[1] - 0.5) < 3 / np.sqrt(64 * 32 * 3)  # a correlation of 6144 pairs, halved
    negative = images[2].astype(int)
    negative[:, 32:] = 255 - negative[:, 32:]
    assert score(make_reward(name), negative[None].astype(np.uint8), ["x"], [{}]).scaled < 0.01
