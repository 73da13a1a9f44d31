"The reward interface: what `score` lets through, what it refuses, and how."

import copy
import ctypes
import json
import random
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import vgpo
from vgpo.rewards.base import (
    Combined,
    Function,
    Reward,
    RewardError,
    Scores,
    make_reward,
    networks_of,
    options_of,
    reward_classes,
    score,
)
from vgpo.world.scenes import all_scenes, render_scene

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)
PROMPTS = ["first", "second", "third"]
ROWS = [{"n": 0.1}, {"n": 0.5}, {"n": 0.9}]


def from_rows(images, prompts, metadata):
    return [row["n"] for row in metadata]


@dataclass
class Fixed(Reward):
    "A reward that returns the given scores."

    scores: object = None

    scale = "raw / 10"

    def __call__(self, images, prompts, metadata):
        return self.scores


def scores(raw=(1.0, 5.0, 9.0), scaled=(0.1, 0.5, 0.9), strict=None, details=None):
    details = [{}] * 3 if details is None else details
    return Scores(torch.tensor(raw), torch.tensor(scaled), strict, details)


def test_good_scores_pass_untouched():
    good = scores(strict=torch.tensor([False, True, True]))
    assert score(Fixed(good), IMAGES, PROMPTS, ROWS) is good
    found = score(Function(from_rows), IMAGES, PROMPTS, ROWS, timeout=30)
    torch.testing.assert_close(found.raw, torch.tensor([0.1, 0.5, 0.9]))
    assert found.scaled.dtype == torch.float32 and found.strict is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (scores(raw=(1.0, float("nan"), 9.0)), "'Fixed' gave row 1, prompt 'second', the raw score nan"),
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
    with pytest.raises(RewardError, match="'from_rows' failed on 3 images .first prompt 'first'.: KeyError: 'n'") as e:
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
        hung = Function(lambda images, prompts, rows: time.sleep(600), name="sleepy")
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
    with pytest.raises(
        ValueError, match="unknown reward 'GenEvel': known are .*GenEval, GenEvalShapes, .*OCR.*, and 'mod"
    ):
        make_reward("GenEvel")
    with pytest.raises(ValueError, match="reward 'collections:Counter' is a class, but no reward: derive it from"):
        make_reward("collections:Counter")


def test_what_make_reward_accepts():
    ten = make_reward("JPEG", quality=10)
    data = {"class_path": "vgpo.rewards.own.JPEG", "init_args": {"quality": 10}}
    for spec in ("vgpo.rewards.own.JPEG", "vgpo.rewards.own:JPEG", type(ten)):
        assert make_reward(spec, quality=10) == ten
    assert make_reward(data) == make_reward(partial(make_reward, "JPEG", quality=10)) == ten
    assert make_reward({"class_path": "JPEG"}) == make_reward("JPEG") and make_reward(ten) is ten


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
    assert "Flow-GRPO" in make_reward("GenEvalShapes", flow_grpo_compat=True, threshold=0.5).version


def test_options_that_a_reward_does_not_have_are_named():
    with pytest.raises(ValueError, match="reward JPEG has no option 'quallity'; it has quality"):
        make_reward("JPEG", quallity=50)
    assert make_reward("vgpo.rewards.own:JPEG", quality=50).version != make_reward("JPEG").version


def test_every_reward_can_be_asked_for_its_options():
    vgpo = {name: cls for name, cls in reward_classes().items() if cls.__module__.startswith("vgpo.")}
    assert {"GenEvalShapes", "GenEval", "OCR", "PickScore", "Combined", "Function"} <= set(vgpo)
    for name, cls in vgpo.items():
        assert cls.name in (name, "") and cls.harmless <= set(options_of(name)) == set(options_of(cls)), name
        assert ("device" in options_of(name)) == bool(cls.networks), (
            name
        )  # what computes on a GPU is what the plan counts
    assert options_of("tiny_rewards:brightness") == []


def assign(images):
    images[:] = 0


def allow_writing(images):
    images.flags.writeable = True
    images[..., 0] = 0


def write_into_the_base(images):
    base = images if images.base is None else images.base
    base.flags.writeable = True
    base[...] = 0


def write_through_torch(images):
    with warnings.catch_warnings(action="ignore"):  # which is all that torch does about it
        torch.from_numpy(images).bitwise_not_()


def write_through_the_buffer(images):
    pointer = images.__array_interface__["data"][0]
    ctypes.memset(pointer, 0, images.nbytes)


VANDALS = [assign, allow_writing, write_into_the_base, write_through_torch, write_through_the_buffer]


def vandal(images, prompts, metadata, act):
    act(images)
    prompts[0], metadata[0]["n"] = "another", metadata[0]["n"] / 2
    metadata[-1].pop("deep")["list"].append(1)
    return [1.0] * len(images)


@pytest.mark.parametrize("timeout", [None, 30])
@pytest.mark.parametrize("act", VANDALS)
def test_what_a_reward_writes_into_reaches_nobody_else(act, timeout):
    "Neither the caller's images, prompts and rows, nor what the next reward sees: in one call, or in the next."
    seen = []

    def witness(images, prompts, metadata):
        seen.append((images.copy(), list(prompts), copy.deepcopy(metadata), images.flags.writeable))
        return [1.0] * len(images)

    def given():
        rows = [{"n": 0.5, "deep": {"list": []}} for _ in range(3)]
        return np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3), list(PROMPTS), rows

    images, prompts, rows = given()
    parts = {"vandal": Function(vandal, {"act": act}), "witness": Function(witness)}
    both = Combined(parts, {"vandal": 1, "witness": 1})
    for reward in (parts["vandal"], both, parts["witness"]):
        try:
            score(reward, images, prompts, rows, timeout)
        except RewardError as e:
            assert act is assign and "read-only" in str(e)  # a plain assignment is refused; the rest is in vain
    assert len(seen) == (1 if act is assign else 2)
    for saw in seen:
        assert (saw[0] == given()[0]).all() and saw[1:] == (*given()[1:], False)
    assert (images == given()[0]).all() and images.flags.writeable and (prompts, rows) == given()[1:]


def test_a_plain_function_may_use_one_array_for_all_its_answers():
    answer = np.zeros(3, np.float32)

    def reuse(images, prompts, metadata):
        answer[:] = [row["n"] for row in metadata]
        return answer

    first = score(Function(reuse), IMAGES, PROMPTS, ROWS)
    score(Function(reuse), IMAGES, PROMPTS, ROWS[::-1])
    assert_close(first.raw, torch.tensor([0.1, 0.5, 0.9]))


def test_some_of_the_scores():
    all_three = Scores(
        torch.arange(3.0), torch.arange(3.0) / 3, torch.tensor([True, False, True]), [{"n": i} for i in "abc"]
    )
    all_three.parts = {"part": Scores(torch.arange(3.0), torch.arange(3.0))}
    last = all_three[1:]
    assert (
        last.raw.tolist() == [1, 2]
        and last.strict.tolist() == [False, True]
        and last.details == [{"n": "b"}, {"n": "c"}]
    )
    assert all_three[[2, 0]].details == [{"n": "c"}, {"n": "a"}] and all_three[[2, 0]].parts["part"].raw.tolist() == [
        2,
        0,
    ]


def brightness(images, prompts, metadata):
    return images.reshape(len(images), -1).mean(1) / 255


def darkness(images, prompts, metadata):
    return 1 - brightness(images, prompts, metadata)


@dataclass
class Verdict(Function):
    "A reward in another unit, with a verdict and details."

    def __call__(self, images, prompts, metadata):
        found = super().__call__(images, prompts, metadata)
        return replace(found, raw=10 * found.raw, strict=found.raw > 0.5, details=[{"seen": True}] * len(prompts))


LEVELS = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 51, 204, 255)])
FOUR = ["a"] * 4, [{}] * 4


def test_combined_rewards():
    parts = {"dark": Function(darkness), "bright": Verdict(brightness), "also": Verdict(darkness)}
    both = Combined(parts, {"dark": 1, "bright": 3, "also": 0})
    scores = score(both, LEVELS, *FOUR)
    bright = torch.tensor([0, 0.2, 0.8, 1])
    assert_close(scores.scaled, 0.25 * (1 - bright) + 0.75 * bright)
    assert torch.equal(scores.raw, scores.scaled) and list(scores.parts) == ["dark", "bright", "also"]
    assert_close(scores.parts["bright"].raw, 10 * bright)  # in its own unit
    assert scores.strict.tolist() == [False, False, True, True]  # of the first part that has a verdict
    assert scores.details[0] == {"dark": {}, "bright": {"seen": True}, "also": {"seen": True}}
    assert both.name == "0.25 dark + 0.75 bright + 0 also" and both.version.startswith("dark: darkness; bright: ")
    assert not any("\n" in line for line in (both.name, both.scale, both.version))


def test_a_combination_of_perfect_scores_is_not_above_1():
    ones = {str(i): Function(lambda images, *_: np.ones(len(images))) for i in range(3)}
    for weights in ((0.1, 0.2, 0.7), (1, 1, 1), (3, 1e-9, 2.2)):
        scores = score(Combined(ones, dict(zip("012", weights, strict=True))), LEVELS, *FOUR)
        assert_close(scores.scaled, torch.ones(4))


def test_a_failing_part_is_named():
    parts = {"good": Function(darkness), "bad": Function(lambda *_: [2.0] * 4, name="bad")}
    with pytest.raises(RewardError, match=r"reward '0.5 good \+ 0.5 bad' failed .* reward 'bad' gave row 0"):
        score(Combined(parts, {"good": 1, "bad": 1}), LEVELS, *FOUR)


def test_two_rewards_of_one_kind_are_parts_with_names_of_their_own():
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    rewards = {"fine": "JPEG", "coarse": {"class_path": "JPEG", "init_args": {"quality": 10}}}
    scores = score(make_reward("Combined", rewards=rewards, weights={"fine": 1, "coarse": 3}), noise, PROMPTS, ROWS)
    assert list(scores.parts) == ["fine", "coarse"]
    for name, quality in (("fine", 95), ("coarse", 10)):
        alone = score(make_reward("JPEG", quality=quality), noise, PROMPTS, ROWS)
        assert torch.equal(scores.parts[name].raw, alone.raw)
    with pytest.raises(ValueError, match="unknown reward 'JPG': known are"):
        make_reward("Combined", rewards={"fine": "JPG"}, weights={"fine": 1})


@pytest.mark.parametrize("weights", [{}, {"a": 1}, {"a": 1, "b": 1, "c": 1}, {"a": 0, "b": 0}, {"a": 2, "b": -1},
                                     {"a": 1, "b": float("inf")}, {"a": 1, "b": float("nan")}])  # fmt: skip
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="Combined has the rewards a, b and the weights .*: give each reward a weight"):
        make_reward("Combined", rewards={"a": "JPEG", "b": "JPEG"}, weights=weights)


def test_rows_are_checked_by_all_parts():
    both = make_reward(
        "Combined", rewards={"jpeg": "JPEG", "shapes": "GenEvalShapes"}, weights={"jpeg": 1, "shapes": 1}
    )
    with pytest.raises(ValueError, match="GenEval row with prompt 'a sign'"):
        both.check_row({"prompt": "a sign"})
    make_reward("JPEG").check_row({"prompt": "a sign"})


def leaves(images, prompts, metadata):
    raise SystemExit(0)


GOOD = torch.zeros(2)


@pytest.mark.parametrize("answer, message", [
    (leaves, "failed on 2 images .*SystemExit"),
    (lambda *_: Scores(GOOD.double(), GOOD), "raw scores that are no torch.float32 tensor"),
    (lambda *_: Scores(GOOD, GOOD.long()), "scaled scores that are no torch.float32 tensor"),
    (lambda *_: Scores(GOOD, GOOD.numpy()), "scaled scores that are no torch.float32 tensor"),
    (lambda *_: Scores(GOOD, GOOD.clone().requires_grad_()), "without gradient"),
    (lambda *_: Scores(GOOD, GOOD, GOOD), "strict scores that are no torch.bool tensor"),
])  # fmt: skip
def test_scores_of_another_kind_and_judges_that_leave_are_errors(answer, message):
    class Mine(Reward):
        name = "mine"
        __call__ = staticmethod(lambda *given: replace(answer(*given), details=[{}, {}]))

    with pytest.raises(RewardError, match=f"reward 'mine' .*{message}"):
        score(Mine(), np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], [{}, {}])


def test_networks_of_rewards_are_described_once_and_all_are_needed():
    described = json.loads((Path(vgpo.__file__).parent / "model_configs" / "rewards.json").read_text())
    named = [
        network for cls in reward_classes().values() if cls.__module__.startswith("vgpo.") for network in cls.networks
    ]
    assert set(named) == set(described)
    parts = {
        "a": "GenEval",
        "b": {"class_path": "Aesthetic", "init_args": {"device": "cuda", "dtype": "bfloat16"}},
        "c": "x:y",
    }
    found = networks_of({"class_path": "Combined", "init_args": {"rewards": parts, "weights": {}}})
    assert found == [("Mask2Former Swin-S", "cpu", "float32"), ("CLIP ViT-L/14", "cpu", "float32"),
                     ("CLIP ViT-L/14", "cuda", "bfloat16")]  # fmt: skip
