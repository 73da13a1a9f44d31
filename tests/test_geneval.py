"GenEval's rules: golden values, the official rule, the training score's promises, bad rows."

import itertools
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from vgpo.rewards.base import RewardError, score
from vgpo.rewards.geneval import (
    RELATIONS,
    TAGS,
    Detection,
    GenEvalRules,
    accuracy_by_task,
    check_row,
    confident,
    evaluate_row,
    relations,
)
from vgpo.world.scenes import COLORS, all_scenes, place
from vgpo.world.scenes import TAGS as SCENE_TAGS


@dataclass
class Told(GenEvalRules):
    "GenEval's rules over a detector that says what it was told."

    found: list = ()

    def __init__(self, found, **options):
        self.found = found
        super().__init__(**options)

    def make_detector(self):
        return lambda images: self.found


def thing(label, count=1, **more):
    return {"class": label, "count": count} | more


def row(*include, tag="two_object", exclude=()):
    return {"tag": tag, "prompt": "a photo of something", "include": list(include), "exclude": list(exclude)}


def at(label, x=0.0, y=0.0, color=None, r=3.0, score=1.0):
    return Detection(label, score, (x - r, y - r, x + r, y + r), color)


LEFT = row(thing("bear"), thing("dog", position=["left of", 0]), tag="position")
TWO_COLORS = row(thing("cup", color="red"), thing("fork", color="blue"), tag="color_attr")
FLOW_GRPO = [  # from Flow-GRPO's public reward server
    *[([at("cup")] * m, row(thing("cup")), soft) for m, soft in enumerate([0, 1, 0, -1])],
    *[([at("cup")] * m, row(thing("cup", 3)), soft) for m, soft in [(1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3)]],
    ([at("cup", color="red")], row(thing("cup", color="blue")), 0.5),
    ([], row(thing("cup", color="blue")), 0.0),
    ([at("cup", color="red"), at("fork", color="red")], TWO_COLORS, 0.75),
    ([at("bear", 0), at("dog", 20)], LEFT, 0.75),
    ([at("dog", 0)], LEFT, 1 / 3),
    ([at("bear", 20), at("dog", 0)], LEFT, 1.0),
]


@pytest.mark.parametrize(("detections", "r", "soft"), FLOW_GRPO)
def test_golden_values_of_flow_grpo(detections, r, soft):
    assert evaluate_row(detections, r, compat=True)["soft"] == pytest.approx(soft, abs=1e-12)


def numpy_relations(a, b):
    "The rule in numpy, after the words of the GenEval paper."
    (a0, a1), (b0, b1) = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))
    offset = (a0 + a1) / 2 - (b0 + b1) / 2
    short = np.maximum(np.abs(offset) - 0.1 * (a1 - a0 + b1 - b0), 0) * np.sign(offset)
    if (np.abs(short) < 1e-3).all():
        return set()
    x, y = short / np.linalg.norm(offset)
    return {name for name, v in zip(RELATIONS, (-x, x, -y, y), strict=True) if v > 0.5}


def test_relations_agree_with_numpy_and_follow_the_geometry():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        a, b = (np.sort(rng.uniform(0, 32, (2, 2)), 0).ravel().tolist() for _ in range(2))
        assert relations(a, b) == numpy_relations(a, b)
        moved = [[2.5 * v + 7 for v in box] for box in (a, b)]
        assert relations(*moved) == relations(a, b)  # the same at any place and size
    assert relations((0, 0, 4, 4), (20, 0, 24, 4)) == {"left of"}
    assert relations((20, 20, 24, 24), (0, 0, 4, 4)) == {"right of", "below"}  # two at once on the diagonal
    assert relations((0, 0, 4, 4), (0, 0, 4, 4)) == set()
    assert relations((0, 0, 10, 10), (1, 0, 11, 10)) == set()  # within the margin
    # 60 degrees from the axis is the limit, for points; a margin moves it
    near, beyond = np.radians(59.9), np.radians(60.1)
    for angle, holds in ((near, True), (beyond, False)):
        x, y = 10 * np.cos(angle), 10 * np.sin(angle)
        assert ("right of" in relations((x, y, x, y), (0, 0, 0, 0))) == holds
    assert relations((7, 0, 9, 2), (0, 0, 2, 2), margin=0.9) == set()


def plain_verdict(detections, r):
    "The official rule once more, for rows with one object a clause, by plain any() and all()."

    def of(label):
        return sorted((d for d in detections if d.label == label), key=lambda d: -d.score)

    def holds(i):
        c = r["include"][i]
        if not of(c["class"]):
            return False
        best = of(c["class"])[0]
        if "color" in c and best.color != c["color"]:
            return False
        if "position" not in c:
            return True
        relation, j = c["position"]
        return holds(j) and relation in numpy_relations(best.box, of(r["include"][j]["class"])[0].box)

    return all(holds(i) for i in range(len(r["include"]))) and not any(
        len(of(c["class"])) >= c["count"] for c in r["exclude"]
    )


def random_case(rng):
    "A random row of one or two clauses, and random detections of its classes."
    include = [thing("cup"), thing("fork")][: rng.randint(1, 2)]
    for c in include:
        if rng.random() < 0.5:
            c["color"] = rng.choice(["red", "blue"])
    if len(include) == 2 and rng.random() < 0.5:
        include[1]["position"] = [rng.choice(RELATIONS), 0]
    exclude = [thing(rng.choice(["cup", "knife"]), 2)] if rng.random() < 0.3 else []
    colors, labels = ["red", "blue"], ["cup", "fork", "cup", "fork", "knife"]
    detections = [
        at(rng.choice(labels), rng.uniform(0, 32), rng.uniform(0, 32), rng.choice(colors), score=rng.random())
        for _ in range(rng.randint(0, 4))
    ]
    return detections, row(*include, exclude=exclude)


def test_verdict_and_score_on_random_scenes():
    rng = random.Random(0)
    verdicts = []
    for _ in range(5000):
        detections, r = random_case(rng)
        says = evaluate_row(detections, r)
        assert says["correct"] == plain_verdict(detections, r) == (not says["reasons"])
        assert 0 <= says["soft"] <= 1
        exact = all(says["found"].get(c["class"], 0) == c["count"] for c in r["include"])
        assert (says["soft"] == 1) == (says["correct"] and exact)  # 1 if and only if all holds and nothing is spare
        closed = evaluate_row(detections, r, closed=True)
        named = sum(any(d.label == c["class"] for c in r["include"] + r["exclude"]) for d in detections)
        wanted = sum(c["count"] for c in r["include"])
        assert closed["wanted"] == pytest.approx(wanted / (wanted + len(detections) - named))
        assert closed["soft"] == pytest.approx((says["soft"] * closed["wanted"]) ** 2)
        assert evaluate_row(detections[::-1], r)["soft"] == pytest.approx(says["soft"])  # the order does not matter
        assert evaluate_row(detections, r, compat=True)["correct"] == says["correct"]
        verdicts.append(says["correct"])
    assert 0.05 < np.mean(verdicts) < 0.95  # the test has seen both


def soft(detections, r):
    return evaluate_row(detections, r)["soft"]


def test_partial_credit_is_ordered():
    blue = row(thing("cup", color="blue"), tag="colors")
    assert (
        soft([], blue) == 0 < soft([at("cup", color="red")], blue) == 0.5 < soft([at("cup", color="blue")], blue) == 1
    )
    for n in (1, 2, 3, 4):
        by_count = [soft([at("cup")] * m, row(thing("cup", n))) for m in range(17)]
        assert by_count[n] == 1 and by_count[0] == 0
        assert sorted(by_count[: n + 1]) == by_count[: n + 1] and sorted(by_count[n:], reverse=True) == by_count[n:]
        assert by_count[2 * n] == 0.5  # twice as many cost what half as many cost
    cup, fork = at("cup", color="red"), at("fork", color="blue")
    wrong_cup, wrong_fork = at("cup", color="blue"), at("fork", color="red")
    steps = [[], [cup], [wrong_cup, wrong_fork], [cup, wrong_fork], [cup, fork]]
    assert [soft(d, TWO_COLORS) for d in steps] == [0, 0.375, 0.5, 0.75, 1]
    bear, left, right = at("bear", 16), at("dog", 2), at("dog", 30)
    assert [soft(d, LEFT) for d in ([], [left], [bear, right], [bear, left])] == [0, 0.25, 0.5, 1]
    no_dogs = row(thing("cup"), exclude=[thing("dog", 1)])
    assert soft([at("cup")], no_dogs) == 1 and soft([at("cup"), left], no_dogs) == 0.5


def test_official_looks_at_the_most_confident_and_lets_spare_objects_pass():
    red = row(thing("cup", color="red"), tag="colors")
    two = [at("cup", color="red", score=0.9), at("cup", color="blue", score=0.8)]
    assert (
        evaluate_row(two, red)["correct"]
        and not evaluate_row([at("cup", color="blue", score=0.95), *two], red)["correct"]
    )
    three = row(thing("cup", 3), tag="counting", exclude=[thing("cup", 4)])
    assert [evaluate_row([at("cup")] * m, three)["correct"] for m in range(6)] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    # a target in the wrong colour is no target
    r = row(thing("bear", color="red"), thing("dog", position=["left of", 0]), tag="position")
    reasons = evaluate_row([at("bear", 16, color="blue"), at("dog", 2)], r)["reasons"]
    assert reasons == ["expected 1 red bear, found blue", "no target for dog to be left of"]


def test_every_rendered_scene_of_the_tiny_world_is_right():
    assert set(SCENE_TAGS) == set(TAGS)
    rng = random.Random(0)
    for rows in all_scenes().values():
        for r in rng.sample(rows, min(len(rows), 60)):
            check_row(r)
            objects = [c for c in r["include"] for _ in range(c["count"])]
            spots = place(rng, len(objects), r["include"][-1].get("position", [None])[0])
            truth = [
                at(c["class"], x, y, c.get("color", rng.choice(list(COLORS))), size)
                for c, (x, y, size) in zip(objects, spots, strict=True)
            ]
            says = evaluate_row(truth, r)
            assert says["correct"] and says["soft"] == evaluate_row(truth, r, compat=True)["soft"] == 1, r["prompt"]


def test_thresholds_and_the_cap():
    seen = [at("cup", score=s) for s in (0.3, 0.301, 0.95)] + [at("fork", score=0.5)]
    assert [d.score for d in confident(seen, 0.3, 16)] == [0.95, 0.5, 0.301]  # above, not at
    assert len(confident([at("cup")] * 20 + [at("fork")], 0.3, 16)) == 17

    images = np.zeros((2, 8, 8, 3), np.uint8)
    rows = [row(thing("cup", 2)), row(thing("cup", 2), tag="counting", exclude=[thing("cup", 3)])]
    scores = score(Told([seen, seen]), images, ["p", "q"], rows)
    assert scores.strict.tolist() == [True, False]  # 0.301 counts where 0.3 is asked for, not where 0.9 is
    assert [d["found"] for d in scores.details] == [{"cup": 2, "fork": 1}, {"cup": 1}]
    torch.testing.assert_close(scores.raw, torch.tensor([1.0, 0.5]))


def test_compat_declares_its_clamp_and_keeps_the_raw_score():
    reward = Told([[at("cup")] * 4], flow_grpo_compat=True)
    scores = score(reward, np.zeros((1, 8, 8, 3), np.uint8), ["p"], [row(thing("cup"))])
    assert scores.raw.item() == -2 and scores.scaled.item() == 0 and scores.strict.item()
    assert "below 0 becomes 0" in reward.scale


def test_colors_are_looked_at_only_where_asked_for():
    class Lazy:
        label, score, box = "cup", 1.0, (0, 0, 4, 4)

        @property
        def color(self):
            raise AssertionError("nobody asked")

    assert evaluate_row([Lazy()], row(thing("cup")))["correct"]
    with pytest.raises(AssertionError, match="nobody asked"):
        evaluate_row([Lazy()], row(thing("cup", color="red")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "colours"}, "unknown tag 'colours': use one of single_object"),
        ({"include": None}, "'include' must be a list"),
        ({"include": []}, "'include' must be a list of at least one clause"),
        ({"include": [{"count": 1}]}, "a clause without a 'class'"),
        ({"include": [thing("cup", 0)]}, "'count' must be a whole number >= 1"),
        ({"include": [thing("cup", 1.5)]}, "'count' must be a whole number >= 1"),
        ({"include": [thing("cup", color=3)]}, "'color' must be a name"),
        ({"include": [thing("cup"), thing("cup")]}, "names a class twice"),
        ({"include": [thing("cup"), thing("fork", position="left of")]}, r"position must be \[relation, index\]"),
        ({"include": [thing("cup"), thing("fork", position=["near", 0])]}, "unknown relation 'near'"),
        ({"include": [thing("cup"), thing("fork", position=["above", 1])]}, "position index 1 of clause 1"),
        ({"include": [thing("cup"), thing("fork", position=["above", -1])]}, "position index -1 of clause 1"),
        ({"exclude": [thing("cup", 1)]}, "'exclude' forbids what 'include' asks for"),
        ({"exclude": [thing("dog", 0)]}, "'count' must be a whole number >= 1"),
    ],
)
def test_bad_rows_name_the_prompt(change, message):
    bad = row(thing("cup")) | {"prompt": "a photo of trouble"} | change
    with pytest.raises(ValueError, match=f"prompt 'a photo of trouble': .*{message}"):
        check_row(bad)
    with pytest.raises(RewardError, match="'Told' failed .*a photo of trouble"):
        score(Told([[]]), np.zeros((1, 8, 8, 3), np.uint8), ["p"], [bad])


def test_a_detector_that_loses_a_picture_is_an_error():
    with pytest.raises(RewardError, match="1 lists of detections for 2 images"):
        score(Told([[]]), np.zeros((2, 8, 8, 3), np.uint8), ["p"] * 2, [row(thing("cup"))] * 2)


def test_overall_is_the_mean_over_tasks():
    rows = [row(thing("cup"), tag=tag) for tag in ("colors", "colors", "colors", "position")]
    assert accuracy_by_task(torch.tensor([True, True, True, False]), rows) == {
        "colors": 1.0,
        "position": 0.0,
        "overall": 0.5,
    }
    with pytest.raises(ValueError, match="at least one"):
        accuracy_by_task([], [])


def test_scores_have_no_ties_between_neighbouring_faults():
    "For the hardest rows, each subset of {colour 1, colour 2, place} right gives a higher score than its subsets."
    r = row(thing("cup", color="red"), thing("fork", color="blue", position=["left of", 0]), tag="position")

    def value(a, b, c):
        return soft(
            [at("cup", 16, color="red" if a else "blue"), at("fork", 2 if c else 30, color="blue" if b else "red")], r
        )

    for facts in itertools.product((False, True), repeat=3):
        for i in range(3):
            if not facts[i]:
                assert value(*facts) < value(*facts[:i], True, *facts[i + 1 :])
