"The reward interface: what `score` lets through, what it refuses, and how."

import random
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from vgpo.config import RewardConfig
from vgpo.rewards.base import REWARDS, Function, RewardError, Scores, configured_reward, make_reward, score
from vgpo.world.scenes import all_scenes, render_scene

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)
PROMPTS = ["first", "second", "third"]
ROWS = [{"n": 0.1}, {"n": 0.5}, {"n": 0.9}]


def from_rows(images, prompts, metadata):
    return [row["n"] for row in metadata]


class Fixed:
    "A reward that returns the given scores."

    name, scale = "fixed", "raw / 10"

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, images, prompts, metadata):
        return self.scores


def scores(raw=(1.0, 5.0, 9.0), scaled=(0.1, 0.5, 0.9), strict=None, details=None):
    details = [{}] * 3 if details is None else details
    return Scores(torch.tensor(raw), torch.tensor(scaled), strict, details)


def test_good_scores_pass_untouched():
    good = scores(strict=torch.tensor([False, True, True]))
    assert score(Fixed(good), IMAGES, PROMPTS, ROWS) is good
    scores = score(Function(from_rows), IMAGES, PROMPTS, ROWS, timeout=30)
    torch.testing.assert_close(scores.raw, torch.tensor([0.1, 0.5, 0.9]))
    assert scores.scaled.dtype == torch.float32 and scores.strict is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (scores(raw=(1.0, float("nan"), 9.0)), "'fixed' gave row 1, prompt 'second', the raw score nan"),
        (scores(raw=(1.0, 5.0, float("inf"))), "row 2, prompt 'third', the raw score inf"),
        (scores(scaled=(0.1, 0.5, 1.01)), r"row 2, prompt 'third', the scaled score 1.01: the scale must map"),
        (scores(scaled=(-0.1, 0.5, 1.0)), "row 0, prompt 'first', the scaled score -0.1"),
        (scores(scaled=(0.5, float("nan"), 1.0)), "row 1, prompt 'second', the scaled score nan"),
        (scores(raw=(1.0, 2.0)), r"raw scores of shape \(2,\) for 3 images"),
        (scores(strict=torch.tensor([True])), r"strict scores of shape \(1,\) for 3 images"),
        (scores(details=[{}]), "1 details for 3 images"),
        ([0.1, 0.5, 0.9], "returned list: return a vgpo.rewards.base.Scores"),
    ],
)
def test_bad_scores_name_reward_row_and_remedy(bad, message):
    with pytest.raises(RewardError, match=message):
        score(Fixed(bad), IMAGES, PROMPTS, ROWS)


@pytest.mark.parametrize("timeout", [None, 30])
def test_an_exception_becomes_a_reward_error_with_its_cause(timeout):
    with pytest.raises(
        RewardError, match="'from_rows' failed on 3 images .first prompt 'first'.: KeyError: 'n'"
    ) as e:
        score(Function(from_rows), IMAGES, PROMPTS, [{}] * 3, timeout=timeout)
    assert isinstance(e.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (IMAGES.astype(np.float32), PROMPTS, r"uint8 numpy array \(B, H, W, 3\), got float32 \(3, 4, 4, 3\)"),
        (torch.zeros(3, 3, 4, 4), PROMPTS, r"got torch.float32 \(3, 3, 4, 4\)"),
        (IMAGES.transpose(0, 3, 1, 2), PROMPTS, r"got uint8 \(3, 3, 4, 4\)"),
        (None, PROMPTS, "got NoneType"),
        (IMAGES, PROMPTS[:2], "3 images, 2 prompts and 3 metadata rows"),
    ],
)
def test_bad_inputs_are_the_callers_fault(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        score(Function(from_rows), images, prompts, ROWS)


def test_a_hung_reward_is_an_error_and_does_not_keep_the_program_alive():
    program = """
        import time, numpy as np
        from vgpo.rewards.base import Function, RewardError, score
        hung = Function(lambda images, prompts, rows: time.sleep(600), "sleepy")
        try: score(hung, np.zeros((1, 4, 4, 3), np.uint8), ["p"], [{}], timeout=0.2)
        except RewardError as error: print(error)
    """
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, check=True
    )
    assert "'sleepy' failed" in done.stdout and "no answer within 0.2 s" in done.stdout
    assert time.monotonic() - start < 100  # it did not wait for the sleeper


def test_rewards_by_name(tmp_path, monkeypatch):
    (tmp_path / "home_made.py").write_text("def f(images, prompts, rows, at=0.5): return [at] * len(rows)\nx = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = make_reward("home_made:f", at=0.25)
    assert mine.name == "home_made:f" and mine.scale
    assert score(mine, IMAGES, PROMPTS, ROWS).scaled.tolist() == [0.25] * 3
    with pytest.raises(ValueError, match="'home_made:x' is a int, not a function"):
        make_reward("home_made:x")
    with pytest.raises(ValueError, match="'home_made:g' cannot be imported .*no attribute 'g'"):
        make_reward("home_made:g")
    with pytest.raises(ValueError, match="'nowhere:f' cannot be imported .*No module named 'nowhere'"):
        make_reward("nowhere:f")
    with pytest.raises(ValueError, match=f"unknown reward 'genevel': known are {', '.join(sorted(REWARDS))}"):
        make_reward("genevel")


def test_geneval_shapes_sees_what_the_tiny_world_painted():
    rng = random.Random(0)
    rows = [row for of_task in all_scenes().values() for row in rng.sample(of_task, min(len(of_task), 20))]
    images = np.stack([render_scene(row, rng) for row in rows])
    reward = make_reward("GenEvalShapes")
    assert reward.threshold == reward.counting_threshold == 0.6
    scores = score(reward, images, [row["prompt"] for row in rows], rows)
    assert scores.strict.float().mean() > 0.9 and scores.raw.mean() > 0.95
    blank = score(reward, np.zeros_like(images), [row["prompt"] for row in rows], rows)
    assert not blank.strict.any() and blank.raw.max() == 0
    assert make_reward("GenEvalShapes", flow_grpo_compat=True, threshold=0.5).name == "geneval-flow-grpo"


def test_options_that_a_reward_does_not_have_are_named():
    with pytest.raises(ValueError, match="reward 'jpeg' cannot be made: .*unexpected keyword argument 'quallity'"):
        make_reward("JPEG", quallity=50)
    assert make_reward("vgpo.rewards.own:JPEG", quality=50).version != make_reward("JPEG").version


def test_two_rewards_of_one_kind_are_told_apart_by_a_label():
    parts, options = {"jpeg@fine": 1, "jpeg@coarse": 3}, {"jpeg@coarse": {"quality": 10}}
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    scores = score(configured_reward(RewardConfig(parts=parts, part_options=options)), noise, PROMPTS, ROWS)
    assert list(scores.parts) == list(parts)
    for name, quality in (("jpeg@fine", 95), ("jpeg@coarse", 10)):
        alone = score(make_reward("JPEG", quality=quality), noise, PROMPTS, ROWS)
        assert torch.equal(scores.parts[name].raw, alone.raw)
    with pytest.raises(ValueError, match="unknown reward 'jpg': known are"):
        make_reward("jpg@fine")
    with pytest.raises(ValueError, match="reward 'jpeg@fine' cannot be made: .*'quallity'"):
        make_reward("jpeg@fine", quallity=50)


def leaves(images, prompts, metadata):
    raise SystemExit(0)


GOOD = torch.zeros(2)


@pytest.mark.parametrize("judge, message", [
    (leaves, "failed on 2 images .*SystemExit"),
    (lambda *_: Scores(GOOD.double(), GOOD), "raw scores that are no torch.float32 tensor"),
    (lambda *_: Scores(GOOD, GOOD.long()), "scaled scores that are no torch.float32 tensor"),
    (lambda *_: Scores(GOOD, GOOD.numpy()), "scaled scores that are no torch.float32 tensor"),
    (lambda *_: Scores(GOOD, GOOD.clone().requires_grad_()), "without gradient"),
    (lambda *_: Scores(GOOD, GOOD, GOOD), "strict scores that are no torch.bool tensor"),
])  # fmt: skip
def test_scores_of_another_kind_and_judges_that_leave_are_errors(judge, message):
    class Judge:
        name, scale, version = "mine", "none", "1"
        __call__ = staticmethod(lambda *given: replace(judge(*given), details=[{}, {}]))

    with pytest.raises(RewardError, match=f"reward 'mine' .*{message}"):
        score(Judge(), np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], [{}, {}])
