"Judges by chat completion: formulas by hand, requests as servers expect them, and answers that hold no score."

import base64
import io
import json
import math
import threading
import time

import numpy as np
import pytest
import torch
import urllib3.util.retry
from fake_server import fake_server
from PIL import Image
from scipy.special import expit, softmax
from torch.testing import assert_close

from vgpo.rewards.base import Combined, RewardError, make_reward, options_of, reward_classes, score
from vgpo.rewards.judges import (
    DeQA,
    PYes,
    UnifiedReward,
    VLMJudge,
    VLMScore,
    parse_score,
    resized,
    word_probabilities,
)
from vgpo.rewards.remote import CallError
from vgpo.runs.session import seams_note

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
PROMPTS = ["a red cube", 'a sign that says "{OPEN}"', "ein Würfel"]
ROWS = [{}] * 3


def says(text, **more):
    "A chat completion that says `text`."
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | more]}


def token(probabilities, text="?"):
    "A chat completion whose first token has these probabilities."
    top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in probabilities.items()]
    return says(text, logprobs={"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]})


def ask_all(make, answer, images=IMAGES, **options):
    "The Scores of a judge whose server gives `answer`, or answer(request), and the requests' bodies."
    respond = answer if callable(answer) else lambda request: answer
    with fake_server(respond) as server:
        scores = score(
            make(model="m", url=server.url + "/v1", **options), images, PROMPTS[: len(images)], [{}] * len(images)
        )
    return scores, [json.loads(request.body) for request in server.asked]


def test_a_request_is_a_chat_with_the_picture_and_the_question(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "swordfish")
    asked = []

    def answer(request):
        asked.append(request)
        return says("Final Score: 3")

    extra = {"max_tokens": None, "max_completion_tokens": 99, "chat_template_kwargs": {"enable_thinking": False}}
    _, bodies = ask_all(UnifiedReward, answer, api_key_env="JUDGE_KEY", extra=extra)
    assert {r.path for r in asked} == {"/v1/chat/completions"} and {r.method for r in asked} == {"POST"}
    assert {r.headers["Authorization"] for r in asked} == {"Bearer swordfish"}
    seen = {}
    for body in bodies:
        assert body["model"] == "m" and body["temperature"] == 0 and body["max_completion_tokens"] == 99
        assert "max_tokens" not in body and body["chat_template_kwargs"] == {"enable_thinking": False}
        (message,) = body["messages"]
        image, question = message["content"]
        head, data = image["image_url"]["url"].split(",")
        assert (message["role"], image["type"], question["type"], head) == (
            "user", "image_url", "text", "data:image/png;base64")  # fmt: skip
        seen[question["text"]] = np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        (shown,) = [image for text, image in seen.items() if prompt in text]
        assert np.array_equal(shown, image)


def test_unified_reward_reads_the_published_form():
    texts = ["Final Score: 3.5", "The cube (object): 1\nFinal Score:\n 5\nbye", "final. Final Score:1 or so"]
    answers = dict(zip(PROMPTS, texts, strict=True))

    def answer(request):
        question = json.loads(request.body)["messages"][0]["content"][1]["text"]
        return says(next(text for prompt, text in answers.items() if prompt in question))

    scores, _ = ask_all(UnifiedReward, answer)
    assert scores.raw.tolist() == [3.5, 5, 1] and scores.strict is None
    assert_close(scores.scaled, torch.tensor([0.7, 1.0, 0.2]))
    assert [detail["answer"] for detail in scores.details] == texts


@pytest.mark.parametrize(
    "text, message",
    [
        ("I would say four of five.", "no score in the answer about 'a red cube', which begins: 'I would say four"),
        ("Final Score: 10", "no score"),  # its first digit is a 1
        ("Final Score: 4.56, rather than 5.5", None),
        ("Final Score: 5.5", "score 5.5, which is not in 1 to 5"),
        ("Final Score: 0", "no score"),
        ("**Final Score:** 4", "no score"),
        ("", "which begins: ''"),
        (None, "which begins: ''"),
        ("bla " * 100, "bla …"),
    ],
)
def test_a_text_without_a_score_is_an_error_and_no_number(text, message):
    if message is None:
        assert ask_all(UnifiedReward, says(text), IMAGES[:1])[0].raw.tolist() == [pytest.approx(4.56)]
        return
    with pytest.raises(RewardError, match=f"reward 'UnifiedReward' failed .*{message}") as error:
        ask_all(UnifiedReward, says(text), IMAGES[:1])
    assert "\n" not in str(error.value)


def test_an_answer_that_was_cut_off_says_so():
    with pytest.raises(RewardError, match=r"\(cut off: raise max_tokens in extra\), which begins: 'Let me think"):
        ask_all(UnifiedReward, says("Let me think", finish_reason="length"))


def test_vlm_score_has_any_range_and_pattern():
    scores, bodies = ask_all(VLMScore, says("Score: 7.5 of 10"))
    assert scores.raw.tolist() == [7.5] * 3 and scores.scaled.tolist() == [0.75] * 3
    assert "from 0 (not at all) to 10" in bodies[0]["messages"][0]["content"][1]["text"]
    scores, _ = ask_all(VLMScore, says("<s>-1</s>"), low=-2, high=2, pattern=r"<s>(-?\d)</s>", question="{prompt}?")
    assert scores.raw.tolist() == [-1] * 3 and scores.scaled.tolist() == [0.25] * 3
    with pytest.raises(RewardError, match="score 11, which is not in 0 to 10"):
        ask_all(VLMScore, says("Score: 11"))
    assert parse_score(r"(\d+)", "a 7", 0, 9) == 7


def test_p_yes_sums_over_the_ways_to_write_the_words():
    top = {"Yes": 0.3, " yes": 0.2, "\u0120YES": 0.05, "No": 0.15, "\u2581no": 0.1, "Maybe": 0.1, "yesterday": 0.1}
    scores, bodies = ask_all(PYes, token(top))
    assert_close(scores.raw, torch.full((3,), 0.55 / 0.80))
    assert torch.equal(scores.scaled, scores.raw) and scores.details[0]["yes_or_no"] == 0.8
    assert bodies[0]["logprobs"] is True and bodies[0]["top_logprobs"] == 20 and bodies[0]["max_tokens"] == 1


def vocabulary(logits, words, count):
    "The completion of a model with logits for `words` and 500 other tokens, listing the `count` most likely."
    names = list(words) + [f"x{i}" for i in range(len(logits) - len(words))]
    p = softmax(logits)
    return token({names[i]: p[i] for i in np.argsort(-p)[:count]})["choices"][0]


def test_p_yes_is_the_sigmoid_of_the_difference_of_logits():
    rng = np.random.default_rng(0)
    for _ in range(50):
        logits = np.concatenate([rng.normal(9, 2, size=2), rng.normal(size=500)])
        shares, total = word_probabilities(vocabulary(logits, ("yes", "no"), 502), ("yes", "no"))
        assert shares["yes"] == pytest.approx(expit(logits[0] - logits[1]), abs=1e-9)
        assert total == pytest.approx(softmax(logits)[:2].sum())


def test_deqa_is_the_expectation_of_the_softmax_over_five_words():
    logits = np.array([0.3, 2.0, 1.0, -1.0, -3.0])
    words = ["Excellent", " good", "fair", "Poor", "bad"]
    scores, _ = ask_all(DeQA, token(dict(zip(words, 0.9 * softmax(logits), strict=True)) | {"Great": 0.1}))
    expected = float(softmax(logits) @ np.array([5.0, 4, 3, 2, 1]))
    assert_close(scores.raw, torch.full((3,), expected))
    assert_close(scores.scaled, torch.full((3,), (expected - 1) / 4))
    for word, value, scaled in (("excellent", 5, 1), ("bad", 1, 0)):
        scores, _ = ask_all(DeQA, token({word: 1.0}))
        assert scores.raw.tolist() == [value] * 3 and scores.scaled.tolist() == [scaled] * 3


def test_what_is_not_listed_cannot_change_a_score_by_more_than_the_tolerance():
    rng, words, answered = np.random.default_rng(1), ("yes", "no"), 0
    for _ in range(500):
        logits = np.concatenate([rng.normal(5, 4, size=2), 2 * rng.normal(size=500)])
        try:
            shares, _ = word_probabilities(vocabulary(logits, words, 20), words, tolerance=0.03)
        except ValueError:
            continue
        answered += 1
        assert abs(shares["yes"] - expit(logits[0] - logits[1])) <= 0.03
    assert answered > 100
    top = {"The": 0.9, "yes": 0.01, **{f"x{i}": 0.004 for i in range(10)}}
    with pytest.raises(RewardError, match="no clear probabilities of yes/no"):
        ask_all(PYes, token(top))
    assert ask_all(PYes, token(top), tolerance=9)[0].raw.tolist() == [1] * 3


@pytest.mark.parametrize(
    "answer",
    [
        says("Yes"),
        says("Yes", logprobs=None),
        says("Yes", logprobs={"content": []}),
        says("Yes", logprobs={"content": [{"token": "Yes", "logprob": 0}]}),
        says("Yes", logprobs={"content": [{"top_logprobs": [{"token": "Yes", "logprob": None}]}]}),
        says("Yes", logprobs={"content": [{"top_logprobs": [{"token": "Yes", "logprob": float("nan")}]}]}),
        token({"Perhaps": 1.0}),
    ],
)
@pytest.mark.parametrize("make", [PYes, DeQA])
def test_missing_probabilities_are_an_error_and_no_number(make, answer):
    with pytest.raises(RewardError, match="no (top_logprobs|clear probabilities)"):
        ask_all(make, answer)


@pytest.mark.parametrize(
    "answer", [{"error": "no such model"}, {"choices": []}, {"choices": [{"text": "5"}]}, {"choices": {"0": 1}}]
)
def test_what_is_no_chat_completion_is_an_error(answer):
    with pytest.raises(RewardError, match="not a chat completion"):
        ask_all(UnifiedReward, answer)


def test_scores_keep_their_order_while_several_questions_are_under_way():
    busy, most, lock, meet = 0, 0, threading.Lock(), threading.Barrier(4, timeout=30)

    def answer(request):
        nonlocal busy, most
        text = json.loads(request.body)["messages"][0]["content"][1]["text"]
        with lock:
            busy += 1
            most = max(most, busy)
        if request.number <= 4:
            meet.wait()  # stands until four questions are here together
        time.sleep(0.002 * (request.number % 5))
        with lock:
            busy -= 1
        return says(f"Score: {int(text) % 10}")

    prompts, images = [str(i) for i in range(24)], np.zeros((24, 4, 4, 3), np.uint8)
    with fake_server(answer) as server:
        judge = VLMScore(model="m", url=server.url, question="{prompt}", concurrency=4)
        scores = score(judge, images, prompts, [{}] * 24)
    assert scores.raw.tolist() == [i % 10 for i in range(24)] and most == 4


def test_a_busy_server_is_asked_again_and_a_failing_one_is_not(monkeypatch):
    monkeypatch.setattr(urllib3.util.retry, "time", type("clock", (), {"sleep": staticmethod(lambda s: None)}))
    answers = {1: (503, {}, b"loading"), 2: says("Final Score: 2")}
    once = ask_all(UnifiedReward, lambda request: answers[request.number], IMAGES[:1])
    assert once[0].raw.tolist() == [2] and len(once[1]) == 2
    for status, message in ((401, "401 .*api_key_env"), (400, "answered 400: too many images"), (500, "answered 500")):
        with fake_server(lambda r, status=status: (status, {}, b"too many images")) as server:
            with pytest.raises(CallError, match=message):
                UnifiedReward(model="m", url=server.url)(IMAGES[:1], PROMPTS[:1], ROWS[:1])
            assert len(server.asked) == 1
    with fake_server(lambda r: time.sleep(0.3)) as server:
        with pytest.raises(CallError, match="no answer within 0.1 s"):
            UnifiedReward(model="m", url=server.url, read_timeout=0.1)(IMAGES[:1], PROMPTS[:1], ROWS[:1])
        assert len(server.asked) == 1


def test_one_picture_without_a_score_fails_the_batch():
    def answer(request):
        return says("no idea") if b"W\\u00fcrfel" in request.body else says("Final Score: 4")

    with pytest.raises(RewardError, match="no score in the answer about 'ein Würfel'"):
        ask_all(UnifiedReward, answer)


def test_pictures_are_scaled_to_their_longer_side():
    assert resized(np.zeros((64, 32, 3), np.uint8), 16).shape == (16, 8, 3)
    assert resized(np.zeros((3, 900, 3), np.uint8), 30).shape == (1, 30, 3)
    image = IMAGES[0]
    assert resized(image, None) is image and resized(image, 8) is image
    flat = resized(np.full((8, 8, 3), (10, 200, 30), np.uint8), 32)
    assert flat.dtype == np.uint8 and (flat == (10, 200, 30)).all()
    _, bodies = ask_all(UnifiedReward, says("Final Score: 1"), IMAGES[:1], resolution=56)
    data = bodies[0]["messages"][0]["content"][0]["image_url"]["url"].split(",")[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (56, 56)


def test_the_version_changes_with_what_shapes_an_answer_and_holds_no_key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "swordfish")
    base = PYes(model="m").version
    assert base.startswith("m by chat completion") and "\n" not in base
    assert PYes(model="m", url="http://other:1/v1", concurrency=2, api_key_env="JUDGE_KEY", retries=0).version == base
    others = [
        PYes(model="n"),
        PYes(model="m", question="{prompt}?"),
        PYes(model="m", extra={"seed": 1}),
        PYes(model="m", resolution=512),
        DeQA(model="m"),
    ]
    versions = {judge.version for judge in others} | {base} | {VLMScore(model="m", high=h).version for h in (5, 10)}
    assert len(versions) == len(others) + 3
    assert "swordfish" not in PYes(model="m", api_key_env="JUDGE_KEY").version


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "PYes cannot be made: .*model"),
        ({"model": "m", "question": "Is it good?"}, "must have {prompt}"),
        ({"model": "m", "api_key_env": "VGPO_NO_SUCH"}, "VGPO_NO_SUCH is not set"),
        ({"model": "m", "concurrency": 0}, "PYes.concurrency is 0; it must be a number v with v>0"),
        ({"model": "m", "resolution": 0}, "PYes.resolution is 0; it must be a number v with v>0"),
        ({"model": "m", "url": "localhost:8000/v1"}, "must be http://HOST:PORT"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_reward("PYes", **options)


def test_bad_ranges_and_patterns_are_refused():
    with pytest.raises(ValueError, match="low is 5 and high is 1"):
        VLMScore(model="m", low=5, high=1)
    with pytest.raises(ValueError, match="must have one group"):
        VLMScore(model="m", pattern=r"\d+")


JUDGES = [name for name, cls in reward_classes().items() if issubclass(cls, VLMJudge)]


@pytest.mark.parametrize("name", JUDGES)
def test_judges_are_known_by_the_names_of_their_classes(name):
    reward = make_reward(name, model="m")
    assert reward.name == name and reward.scale and reward.version
    assert {"model", "url", "api_key_env", "read_timeout", "retries", "resolution"} <= set(options_of(name))


def test_there_are_four_judges():
    assert {"UnifiedReward", "VLMScore", "PYes", "DeQA"} <= set(JUDGES)


@pytest.mark.parametrize("make", [lambda judge: judge, lambda judge: Combined({"judge": judge}, {"judge": 1.0})])
def test_a_judge_of_full_size_images_that_are_decoded_in_tiles_is_named(make):
    assert "may learn to like or dislike the seams" in seams_note(True, make(UnifiedReward(model="m")))
    assert seams_note(True, make(UnifiedReward(model="m", resolution=256))) is None
    assert seams_note(False, make(UnifiedReward(model="m"))) is None
