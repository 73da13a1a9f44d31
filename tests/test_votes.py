"""People's votes: what is asked and what it is worth, who may vote, and that no vote is lost, asked twice or made up.

The last part needs Chromium and chromedriver: it looks at the page, clicks and presses keys.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager

import numpy as np
import pytest
import requests
import torch
from safetensors.torch import load_file
from starlette.testclient import TestClient

from vgpo.rewards.base import Combined, Function, RewardError, score
from vgpo.rewards.remote import Remote
from vgpo.rewards.server import make_app, running
from vgpo.rewards.vote_page import Box, image_digest, make_ballot, make_page, read_votes
from vgpo.rewards.votes import Votes

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
DIGESTS = [image_digest(image) for image in IMAGES]


@contextmanager
def background(function, *args):
    "A call in a thread, as a future; the thread does not outlive the tests, whatever it waits for."
    future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except Exception as e:
            future.set_exception(e)

    threading.Thread(target=work, daemon=True).start()
    yield future


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def vote_for(box, wanted):
    "Answer all that waits in a box: {prompt: digests that are liked}."
    for ballot in until(lambda: list(box.waiting.values())):
        if ballot.key not in box.votes:
            liked = [i for i, digest in enumerate(ballot.images) if digest in wanted[ballot.prompt]]
            box.vote(ballot.key, liked[0] if liked else None)


# --- what a vote is worth ---


def test_the_best_of_a_group_gets_1_and_the_others_0(tmp_path):
    votes = Votes(file=str(tmp_path / "votes.jsonl"), port=0)
    prompts = ["one", "two", "one", "three", "two", "one"]  # groups of three, two, and one alone
    with background(score, votes, IMAGES, prompts, [{}] * 6) as call:
        vote_for(votes.box, {"one": {DIGESTS[2]}, "two": set(), "three": {DIGESTS[3]}})
        scores = call.result(30)
    assert scores.raw.tolist() == scores.scaled.tolist() == [0, 0, 1, 1, 0, 0] and scores.strict is None
    assert [detail["among"] for detail in scores.details] == [3, 2, 3, 1, 2, 3]


def test_each_image_is_good_or_not(tmp_path):
    votes = Votes(ask="each", file=str(tmp_path / "votes.jsonl"), port=0)
    images = IMAGES[[0, 1, 2, 0]]  # the last is the first again, and asked about once
    with background(score, votes, images, ["one"] * 4, [{}] * 4) as call:
        vote_for(votes.box, {"one": {DIGESTS[0], DIGESTS[2]}})
        scores = call.result(30)
    assert scores.raw.tolist() == [1, 0, 1, 1] and scores.strict.tolist() == [True, False, True, True]
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 3


def test_one_image_alone_is_the_same_question_either_way(tmp_path):
    file = str(tmp_path / "votes.jsonl")
    each, best = Votes(ask="each", file=file, port=0), None
    with background(score, each, IMAGES[:1], ["one"], [{}]) as call:
        vote_for(each.box, {"one": set(DIGESTS)})
        assert call.result(30).raw == 1
    best = Votes(ask="best", file=file, port=0)
    assert score(best, IMAGES[:1], ["one"], [{}]).raw == 1 and best.url is None  # nobody was asked
    assert each.version != best.version


# --- nothing is lost, asked twice or made up ---


def test_a_call_waits_beyond_every_limit_and_ends_without_a_score_if_it_is_closed_or_stopped(tmp_path):
    votes = Votes(file=str(tmp_path / "votes.jsonl"), port=0)

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        score(votes, IMAGES, ["one"] * 6, [{}] * 6, timeout=0.1, proceed=stop)
    combined = Combined(
        {"votes": votes, "other": Function(lambda images, *_: [0.5] * len(images))}, {"votes": 1, "other": 1}
    )
    votes = combined.rewards["votes"] = Votes(file=str(tmp_path / "votes.jsonl"), port=0)
    with background(score, combined, IMAGES, ["one"] * 6, [{}] * 6, 0.1) as call:
        until(lambda: votes.box.waiting)
        time.sleep(0.5)
        assert not call.done()
        combined.close()
        with pytest.raises(RewardError, match="closed before all votes were given; those that were are kept"):
            call.result(30)
    assert read_votes(tmp_path / "votes.jsonl") == {}


def test_votes_that_were_given_before_a_kill_are_not_asked_for_again(tmp_path):
    file = tmp_path / "votes.jsonl"
    prompts = ["one", "two"] * 3
    first = Votes(file=str(file), port=0)
    with background(score, first, IMAGES, prompts, [{}] * 6) as call:
        ballot = until(lambda: list(first.box.waiting.values()))[0]
        first.box.vote(ballot.key, 1)
        first.close()
        assert isinstance(call.exception(30), RewardError)
    with open(file, "a") as half:
        half.write('{"key": "ab')  # killed while it wrote
    second = Votes(file=str(file), port=0)
    order = [4, 2, 1, 0, 5, 3]  # the images come in another order, and the groups' too
    with background(score, second, IMAGES[order], [prompts[i] for i in order], [{}] * 6) as call:
        until(lambda: second.box.waiting)
        state = second.box.state()
        assert (state["done"], state["total"], state["ballot"]["prompt"]) == (1, 2, "two")
        second.box.vote(state["ballot"]["key"], 0)
        scores = call.result(30)
    winners = [IMAGES[order][i] for i in scores.raw.nonzero()[:, 0]]
    assert list(ballot.images)[1] in map(image_digest, winners) and len(winners) == 2
    assert all(json.loads(line) for line in file.read_text().splitlines()) and len(read_votes(file)) == 2


def test_another_prompt_size_or_pixel_is_another_question():
    one = make_ballot("one", [IMAGES[0]])
    brighter = IMAGES[0].copy()
    brighter[3, 4, 1] ^= 1
    others = [("two", IMAGES[0]), ("one", brighter), ("one", IMAGES[0].reshape(4, 16, 3)), ("one", IMAGES[1])]
    assert len({one.key, *(make_ballot(prompt, [image]).key for prompt, image in others)}) == 5
    assert make_ballot("one", [*IMAGES]).key == make_ballot("one", [*IMAGES[::-1]]).key


def test_a_vote_is_taken_back_only_while_its_batch_waits(tmp_path):
    box, ballots = Box(tmp_path / "votes.jsonl"), [make_ballot(prompt, [IMAGES[0]]) for prompt in ("one", "two")]
    with background(box.ask, ballots) as call:
        until(lambda: box.waiting)
        with pytest.raises(LookupError, match="no vote that can still be taken back"):
            box.undo()
        box.vote(ballots[0].key, 0)
        box.undo()
        box.vote(ballots[0].key, None)
        box.vote(ballots[1].key, 0)
        assert call.result(30) == {ballots[0].key: None, ballots[1].key: DIGESTS[0]}
    with pytest.raises(LookupError):
        box.undo()
    assert read_votes(box.path) == call.result(30) and len(box.path.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        "{}",
        '{"key": 3, "images": [], "choice": null}',
        '{"key": "a", "images": ["x"], "choice": "y"}',
        '{"key": "a", "images": ["x"]}',
        '{"key": ["a"], "undone": true}',
        "\ufeff",
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    file = tmp_path / "votes.jsonl"
    file.write_text(f'{{"key": "a", "images": ["x"], "choice": "x"}}\n{line}\n{{"key": "a", "undone": true}}\n')
    with pytest.raises(ValueError, match=r"votes.jsonl, line 2: not a vote; delete the line, or name another file"):
        Votes(file=str(file))


def test_a_vote_that_cannot_be_kept_does_not_count(tmp_path, monkeypatch):
    box, ballot = Box(tmp_path / "votes.jsonl"), make_ballot("one", [IMAGES[0]])

    def full(path):
        raise OSError(28, "No space left on device")

    with background(box.ask, [ballot]) as call:
        until(lambda: box.waiting)
        monkeypatch.setattr("vgpo.rewards.vote_page.fsync", full)
        page = TestClient(make_page(box, "t"), base_url="http://127.0.0.1", headers={"Authorization": "Bearer t"})
        answer = page.post("/vote", json={"key": ballot.key, "choice": 0})
        assert answer.status_code == 500 and "No space left on device" in answer.json()["error"]
        assert not call.done() and not box.votes
        monkeypatch.undo()
        assert page.post("/vote", json={"key": ballot.key, "choice": None}).status_code == 200
        assert call.result(30) == {ballot.key: None}


# --- who may vote ---


@pytest.fixture
def page(tmp_path):
    "A box in which a ballot waits, and a client of its page, without a token."
    box, ballot = Box(tmp_path / "votes.jsonl"), make_ballot("<b>one</b>", [*IMAGES[:3]])
    with background(box.ask, [ballot]):
        until(lambda: box.waiting)
        yield box, ballot, TestClient(make_page(box, "secret"), base_url="http://127.0.0.1:8902")
        box.close()


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer guess", "secret", "Bearer secret2", "Bearer \xe9"]
)
def test_nothing_is_told_or_taken_without_the_token(page, given):
    box, ballot, client = page
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    body = {"key": ballot.key, "choice": 0}
    answers = [client.get("/ballot", headers=headers), client.post("/vote", json=body, headers=headers)]
    answers.append(client.post("/undo", json={}, headers=headers))
    assert [answer.status_code for answer in answers] == [401] * 3 and not box.votes
    assert all(set(answer.json()) == {"error"} for answer in answers)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8902", "10.0.0.1", "localhost.evil"])
def test_no_foreign_name_leads_to_the_page(page, host):
    box, ballot, client = page
    headers = {"Host": host, "Authorization": "Bearer secret"}
    for answer in (client.get("/", headers=headers), client.post("/vote", json={"key": ballot.key}, headers=headers)):
        assert answer.status_code == 400 and not box.votes
    assert client.get("/ballot", headers=headers | {"Host": "localhost:1234"}).status_code == 200  # through a tunnel


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"choice": 3}, 400),
        ({"choice": -1}, 400),
        ({"choice": "0"}, 400),
        ({"choice": True}, 400),
        ({"choice": 0.0}, 400),
        ({"choice": [0]}, 400),
        ({}, 400),
        ({"key": "another", "choice": 0}, 409),
        ({"key": None, "choice": 0}, 409),
        ({"key": {}, "choice": 0}, 400),
        ([], 400),
        (None, 400),
        ("vote", 400),
    ],
)
def test_what_is_no_vote_is_refused(page, body, status):
    box, ballot, client = page
    if isinstance(body, dict):
        body = {"key": ballot.key} | body
    client.headers["Authorization"] = "Bearer secret"
    answer = client.post("/vote", json=body)
    assert answer.status_code == status and not box.votes and not box.path.exists()
    assert client.post("/vote", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400


def test_only_the_first_of_two_votes_on_a_ballot_counts(tmp_path):
    box, ballots = Box(tmp_path / "votes.jsonl"), [make_ballot(prompt, [*IMAGES[:3]]) for prompt in ("one", "two")]
    client = TestClient(make_page(box, "t"), base_url="http://127.0.0.1", headers={"Authorization": "Bearer t"})
    with background(box.ask, ballots):
        until(lambda: box.waiting)
        answers = [client.post("/vote", json={"key": ballots[0].key, "choice": choice}) for choice in (1, 2)]
        assert [answer.status_code for answer in answers] == [200, 409]
        assert box.votes == {ballots[0].key: list(ballots[0].images)[1]} == read_votes(box.path)
        box.close()


def test_the_page_loads_nothing_from_elsewhere_and_is_in_no_frame(page):
    _, _, client = page
    for path in ("/", "/votes.js", "/votes.css"):
        answer = client.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert "http:" not in answer.text and "https:" not in answer.text
    assert client.post("/ballot").status_code == client.get("/vote").status_code == 405


# --- behind a server ---


def test_a_remote_client_waits_for_people_and_keeps_their_images_together(tmp_path):
    votes = Votes(file=str(tmp_path / "votes.jsonl"), port=0)
    with running(make_app(votes)) as url:
        remote = Remote(url, batch_size=2, read_timeout=0.2, retries=0)
        assert remote.asks_people and remote.version == "votes, best"
        with background(score, remote, IMAGES, ["one"] * 6, [{}] * 6, 0.1) as call:
            try:
                ballot = until(lambda: list(votes.box.waiting.values()))[0]
                assert len(ballot.images) == 6
                time.sleep(0.5)
                assert not call.done()
                vote_for(votes.box, {"one": {DIGESTS[4]}})
                assert call.result(30).raw.tolist() == [0, 0, 0, 0, 1, 0]
            finally:
                votes.close()
    with running(make_app(Function(lambda images, *_: [0.5] * len(images)))) as url:
        plain = Remote(url, batch_size=2)
        assert not plain.asks_people and plain.read_timeout == 120


class Person(threading.Thread):
    "Votes on whatever is asked at an address, as the page's script would; rests while `tired` is set."

    def __init__(self, address):
        super().__init__(daemon=True)
        self.url, token = address.split("/#")
        self.headers, self.tired, self.given = {"Authorization": f"Bearer {token}"}, threading.Event(), 0

    def run(self):
        while True:
            try:
                ballot = requests.get(f"{self.url}/ballot", headers=self.headers, timeout=10).json()["ballot"]
                if ballot is None or self.tired.is_set():
                    time.sleep(0.05)
                    continue
                choice = int(ballot["key"], 16) % len(ballot["images"])  # a whim, but a steady one
                body = {"key": ballot["key"], "choice": choice if int(ballot["key"][:2], 16) % 4 else None}
                self.given += requests.post(f"{self.url}/vote", json=body, headers=self.headers, timeout=10).ok
            except requests.ConnectionError:
                return


def start(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, env=environment, **streams)


def serve_votes(file, port=0):
    "A vote server in a process of its own: the process, its url, and a person who votes."
    server = start("vgpo", "serve", "vote", "--port", port, "--reward.port", 0, "--reward.file", file)
    lines = [server.stdout.readline() for _ in range(2)]
    assert lines[0].startswith("serving Votes") and lines[1].startswith("vote at http://127.0.0.1:"), lines
    url, address = (line.split(" at ")[-1].strip() for line in lines)
    (person := Person(address)).start()
    return server, url, person


SMALL = (
    "--recipe tiny-geneval --rollout.prompts_per_epoch 2 --rollout.group_size 3 --optim.num_minibatches 1 --epochs 2 "
    "--rollout.num_inference_steps 3 --window.size 2 --credit.num_scored_steps 1 --evaluation.num_samples 3 "
    "--evaluation.num_inference_steps 2 --rollout.reward_timeout 1 --reward Remote --reward.read_timeout 1"
).split()


def test_a_run_waits_stops_and_goes_on_and_asks_nothing_twice(tmp_path):
    file, processes = tmp_path / "votes.jsonl", []

    def train(*arguments):
        processes.append(run := start("vgpo.train", *arguments))
        return run

    try:
        server, url, person = serve_votes(file)
        processes.append(server)
        run = train(*SMALL, "--reward.url", url, "--output_dir", tmp_path, "--name", "broken")
        until(lambda: person.given >= 4, 300)  # the evaluation's three, and one of the first epoch's two
        person.tired.set()
        time.sleep(3)  # longer than any limit that the run was given
        given = len(read_votes(file))
        if given < 5:
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=60)[0]
        assert run.returncode == 75 and "stopped; go on from epoch" in said, said
        server.kill()
        server.communicate()

        server, url, person = serve_votes(file, url.rsplit(":", 1)[1])
        processes.append(server)
        run = train("--resume", tmp_path / "broken")
        said = run.communicate(timeout=300)[0]
        assert run.returncode == 0, said
        keys = [json.loads(line)["key"] for line in file.read_text().splitlines()]
        assert len(keys) == len(set(keys)) == given + person.given

        run = train(*SMALL, "--reward.url", url, "--output_dir", tmp_path, "--name", "whole")
        said = run.communicate(timeout=300)[0]
        assert run.returncode == 0, said
        assert len(file.read_text().splitlines()) == len(keys)  # the same images: nobody was asked
    finally:
        for process in processes:
            process.kill()
            process.wait()
    one, other = (
        load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("broken", "whole")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- the page in a real browser ---


QUESTION = "document.querySelector('h1').textContent"
STATUS = "document.querySelector('#status').textContent"


def shown(window, prompt):
    "Wait until the ballot of a prompt is shown and its images are loaded."
    window.wait(f"document.querySelector('#prompt').textContent === {json.dumps(prompt)}")
    window.wait("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_a_person_votes_with_keys_and_clicks(window, tmp_path):
    votes = Votes(file=str(tmp_path / "votes.jsonl"), port=0)
    hostile = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> $$ \u202e \u05d0"
    names = [hostile, "arrows", "a click", "none", "undone", "y", "n", "clicked yes"]
    groups = [names.index(name) for name in names[:5] for _ in range(12 if name == "arrows" else 3)] + [5, 6, 7]
    images = RNG.integers(0, 256, (len(groups), 24, 24, 3), dtype=np.uint8)
    prompts = [names[i] for i in groups]
    with background(score, votes, images, prompts, [{}] * len(prompts)) as call:
        try:
            until(lambda: votes.url)
            window.open(votes.url)
            shown(window, hostile)
            assert window.run(f"return {QUESTION}") == "Which image is best?"
            assert window.run(f"return {STATUS}") == "0 of 8 votes of this batch are in"
            assert window.run("return [window.hacked ?? 0, document.scripts.length, document.images.length]") == [
                0,
                1,
                3,
            ]
            assert window.run("return [...document.images].map(image => image.alt)")[1] == "image 2 of 3"
            assert window.run("return document.activeElement.id") == "question"  # what a screen reader reads first
            held = "document.dispatchEvent(new KeyboardEvent('keydown', {key: '1', repeat: true}))"
            window.run(f"{held}; document.dispatchEvent(new KeyboardEvent('keydown', {{key: '1', ctrlKey: true}}))")
            window.press("9", "x", "2")  # no such image, no such key, and the second

            shown(window, "arrows")
            assert window.run("return document.querySelectorAll('#images kbd').length") == 9
            window.press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "Enter")  # to the first, third, second

            shown(window, "a click")
            window.click("#images button:nth-child(3)")
            shown(window, "none")
            window.press("n")
            shown(window, "undone")
            window.press("1")
            shown(window, "y")
            assert window.run(f"return {QUESTION}") == "Is this image good?"
            window.press("u")
            shown(window, "undone")
            window.press("3")
            shown(window, "y")
            window.press("y")
            shown(window, "n")
            window.press("n")
            shown(window, "clicked yes")
            assert window.run(f"return {STATUS}") == "7 of 8 votes of this batch are in" and not call.done()
            window.click("#others button:first-child")
            window.wait(f"{STATUS}.includes('waits for the next batch')")
            scores = call.result(30)
        finally:
            votes.close()
    in_order = {
        name: sorted(image_digest(images[i]) for i in range(len(images)) if prompts[i] == name) for name in names
    }
    wanted = {hostile: 1, "arrows": 1, "a click": 2, "none": None, "undone": 2, "y": 0, "n": None, "clicked yes": 0}
    chosen = {in_order[name][place] for name, place in wanted.items() if place is not None}
    assert scores.raw.tolist() == [float(image_digest(image) in chosen) for image in images]


def test_the_page_waits_for_the_next_batch_and_says_when_the_address_is_old(window, tmp_path):
    votes = Votes(ask="each", file=str(tmp_path / "votes.jsonl"), port=0)
    window.open(votes.page())
    window.wait(f"{STATUS}.includes('Nothing is asked now')")
    for number in range(2):
        with background(score, votes, IMAGES[number : number + 1], ["later"], [{}]) as call:
            shown(window, "later")
            window.press("y")
            assert call.result(30).raw == 1
        window.wait(f"{STATUS}.includes('waits for the next batch ({number + 1} votes are kept)')")
    window.open(votes.page().split("#")[0] + "#old")
    window.wait(f"{STATUS}.includes('token is missing or old')")
