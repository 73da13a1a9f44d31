"The reward server and its client: equal scores, hostile requests, lies, outages, and a run whose server is killed."

import base64
import io
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from fake_server import fake_server
from PIL import Image
from safetensors.torch import load_file
from starlette.exceptions import HTTPException

from vgpo.rewards import server
from vgpo.rewards.base import Combined, Function, Reward, RewardError, Scores, make_reward, score
from vgpo.rewards.ocr import OCR
from vgpo.rewards.remote import CallError, Remote, image_base64
from vgpo.rewards.server import (
    Limits,
    decode_image,
    image_header,
    make_app,
    open_socket,
    read_request,
    running,
    write_json,
)
from vgpo.serve import main as serve_main
from vgpo.train import main as train_main
from vgpo.world.words import WORDS, render_word, sign

HERE = Path(__file__).parent
NOISE = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)
PROMPTS, ROWS = [f"prompt {i}" for i in range(5)], [{"number": i} for i in range(5)]


def program(module, *arguments, **more):
    "A program of the package in a process of its own, which finds the rewards in this folder."
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more.pop("env", {})
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )


@contextmanager
def serving(*arguments, **more):
    "The (process, url) of a reward server in a process of its own."
    process = program("vgpo.serve", *arguments, **more)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), line + process.communicate()[0]
        yield process, line.split(" at ")[-1].strip()
    finally:
        process.kill()
        process.communicate()


def free_port():
    "A port that nobody listens at."
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Marks(Reward):
    "A reward that has all that a reward can have; its scores depend on every pixel, prompt and row."

    name, scale, version = "marks", "raw / 1000", "marks 1"

    def __init__(self, act=lambda: None):
        self.act, self.calls = act, []

    def __call__(self, images, prompts, metadata):
        self.calls.append((threading.get_ident(), len(images)))
        self.act()
        weights = np.arange(images[0].size).reshape(images[0].shape) % 251
        rows = zip(images, prompts, metadata, strict=True)
        sums = [int((image * weights).sum()) % 9973 + len(prompt) + row["number"] for image, prompt, row in rows]
        raw = torch.tensor(sums, dtype=torch.float32) / 11
        details = [{"sum": np.int64(s), "parts": torch.tensor([s, 1.5]), "none": float("nan")} for s in sums]
        return Scores(raw, raw / 1000, raw > 400, details)


@pytest.fixture
def no_waiting(monkeypatch):
    "Retries without waiting."
    clock = {"sleep": staticmethod(lambda s: None), "time": staticmethod(time.time)}
    monkeypatch.setattr("urllib3.util.retry.time", type("clock", (), clock))


def body_of(images, /, **changes):
    "The body of a request about `images`."
    texts = [image_base64(image) for image in images]
    return {"prompts": PROMPTS[: len(images)], "images": texts, "metadata": ROWS[: len(images)]} | changes


# --- what a server is for ---


@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize("batch_size, concurrency", [(16, 2), (2, 1), (2, 3), (1, 5)])
def test_scores_equal_local_ones_in_every_part(format, batch_size, concurrency):
    here, marks = score(Marks(), NOISE, PROMPTS, ROWS), Marks()
    with running(make_app(marks)) as url:
        remote = Remote(url, batch_size=batch_size, concurrency=concurrency, format=format)
        there = score(remote, NOISE, PROMPTS, ROWS)
    assert torch.equal(there.raw, here.raw) and torch.equal(there.scaled, here.scaled)
    assert (
        torch.equal(there.strict, here.strict) and there.raw.dtype == torch.float32 and there.strict.dtype == torch.bool
    )
    assert there.details == json.loads(write_json(here.details))
    assert (remote.name, remote.scale, remote.version) == ("remote-marks", "raw / 1000", "marks 1")
    assert sorted(count for _, count in marks.calls) == sorted(
        len(NOISE[i : i + batch_size]) for i in range(0, 5, batch_size)
    )
    assert len({thread for thread, _ in marks.calls}) == 1  # one worker, whoever asks


def darkness(images, prompts, metadata):
    return 1 - images.mean((1, 2, 3)) / 255


@pytest.mark.parametrize("batch_size", [16, 2])
def test_the_parts_of_a_reward_travel_too(batch_size):
    both = Combined({"marks": Marks(), "dark": Function(darkness)}, {"marks": 1, "dark": 3})
    here = score(both, NOISE, PROMPTS, ROWS)
    with running(make_app(both)) as url:
        there = score(Remote(url, batch_size=batch_size), NOISE, PROMPTS, ROWS)
    assert torch.equal(there.scaled, here.scaled) and list(there.parts) == ["marks", "dark"]
    for name, part in here.parts.items():
        assert torch.equal(there.parts[name].raw, part.raw) and torch.equal(there.parts[name].scaled, part.scaled)
    assert torch.equal(there.parts["marks"].strict, here.parts["marks"].strict) and there.parts["dark"].strict is None


def test_a_run_may_ask_two_servers():
    marks, dark = Marks(), Function(darkness)
    with running(make_app(marks)) as one, running(make_app(dark)) as other:
        reward = Combined({"marks": Remote(one), "dark": Remote(other)}, {"marks": 3, "dark": 1})
        scored = score(reward, NOISE, PROMPTS, ROWS)
    for name, local in (("marks", marks), ("dark", dark)):
        assert torch.equal(scored.parts[name].scaled, score(local, NOISE, PROMPTS, ROWS).scaled)
    assert reward.version == f"marks: marks 1; dark: {dark.version}"


def test_a_real_server_process_answers_as_the_reward_does(monkeypatch):
    rng = random.Random(0)
    rows = [sign(rng.choice(WORDS), "red") for _ in range(6)]
    images, prompts = np.stack([render_word(row, rng) for row in rows]), [row["prompt"] for row in rows]
    engine = OCR(threads=1)
    here = score(engine, images, prompts, rows)
    monkeypatch.setenv("VGPO_REWARD_KEY", "swordfish")
    with serving("--reward", "OCR", "--reward.threads", 1, "--port", 0) as (process, url):
        remote = make_reward("Remote", url=url, batch_size=4)
        there = score(remote, images, prompts, rows)
        assert (
            torch.equal(there.raw, here.raw)
            and torch.equal(there.strict, here.strict)
            and there.details == here.details
        )
        assert remote.version == engine.version and remote.name == f"remote-{engine.name}"
        assert requests.get(url + "/health").status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == ""  # it goes without a traceback
    with pytest.raises(CallError, match="Connection refused"):
        Remote(url, retries=0)


def test_any_details_are_written_as_json():
    value = {
        1: np.float32(0.5),
        "a": [np.array([1, 2]), (torch.tensor(3), float("inf"))],
        "b": None,
        "c": True,
        "d": Path("x"),
        "e": (np.float64("nan"), torch.tensor([float("inf"), 1])),
        "f": b"\xff\x00",
        "g": Path,
    }
    found = json.loads(write_json(value), parse_constant=pytest.fail)
    assert found.pop("f") and "Path" in found.pop("g")
    assert found == {"1": 0.5, "a": [[1, 2], [3, None]], "b": None, "c": True, "d": "x", "e": [None, [None, 1]]}


def test_numbers_are_written_and_read_exactly():
    reals = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.randint(-30, 30, (5000,))
    assert torch.equal(torch.tensor(json.loads(write_json(reals))), reals)
    row = {"x": [0.1, 1e300, 5e-324, 12345678901234567890123, -0.0], "y": "\u00e9\U0001f600", "z": None}
    body = json.dumps(body_of(NOISE[:1], metadata=[row])).encode()
    assert repr(read_request(body, Limits())[0].metadata) == repr([row])


# --- hostile requests ---


def png(width, height, depth=8, color=2, rest=b""):
    "A PNG file's beginning."
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + rest


def webp(width, height):
    "A lossless WebP file's beginning."
    bits = (width - 1) | (height - 1) << 14
    return b"RIFF\x40\x00\x00\x00WEBPVP8L\x34\x00\x00\x00\x2f" + bits.to_bytes(4, "little") + bytes(20)


def as_file(mode="RGB", **options):
    "An image as a file."
    buffer = io.BytesIO()
    Image.new(mode, (16, 16)).save(buffer, **options)
    return buffer.getvalue()


GOOD = {format: base64.b64decode(image_base64(NOISE[0], format)) for format in ("png", "webp")}
HOSTILE = {
    "png bomb": (png(50000, 50000), 413),
    "webp bomb": (webp(16384, 16384), 413),
    "one row too long": (png(2**31 - 1, 1), 413),
    "no size": (png(0, 0), 400),
    "no data": (png(16, 16), 400),
    "text": (b"hello, world, how are you today?", 400),
    "nothing": (b"", 400),
    "gif": (as_file("P", format="GIF"), 400),
    "jpeg": (as_file(format="JPEG"), 400),
    "tiff": (as_file(format="TIFF"), 400),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 400),
    "lossy webp": (as_file(format="WEBP"), 400),
    "palette": (as_file("P", format="PNG"), 400),
    "alpha": (as_file("RGBA", format="PNG"), 400),
    "webp alpha": (as_file("RGBA", format="WEBP", lossless=True, exact=True), 400),
    "16 bits": (png(16, 16, depth=16), 400),
    "animation": (as_file(format="PNG", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")]), 400),
    "half a png": (GOOD["png"][:200], 400),
    "half a webp": (GOOD["webp"][:200], 400),
    "only the signature": (GOOD["png"][:20], 400),
    "a second, larger header": (GOOD["png"][:33] + png(9000, 9000)[8:] + GOOD["png"][33:], 400),
    "png in webp's clothes": (GOOD["webp"][:25] + GOOD["png"], 400),
}


@pytest.fixture(scope="module")
def guarded():
    "A server with small limits and a reward that counts its calls."
    marks = Marks()
    with running(
        make_app(marks, limits=Limits(max_body_bytes=200_000, max_images=4, max_pixels=1024, max_total_pixels=2048))
    ) as url:
        yield url, marks


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused_and_the_server_lives(guarded, name):
    (url, marks), (data, status) = guarded, HOSTILE[name]
    before = len(marks.calls)
    reply = requests.post(url + "/score", json=body_of(NOISE[:1], images=[base64.b64encode(data).decode()]))
    assert reply.status_code == status and reply.json()["error"].startswith("image 0")
    assert len(reply.json()["error"]) < 300 and "\n" not in reply.json()["error"]
    assert len(marks.calls) == before
    assert requests.post(url + "/score", json=body_of(NOISE[:1])).status_code == 200


@pytest.mark.parametrize("data", [png(50000, 50000), webp(16384, 16384), png(2000, 2000)])
def test_a_bomb_is_refused_by_its_header_before_any_decoder_sees_it(monkeypatch, data):
    monkeypatch.setattr(server.Image, "open", None)
    with pytest.raises(HTTPException, match="too many") as error:
        read_request(
            json.dumps(body_of(NOISE[:1], images=[base64.b64encode(data).decode()])).encode(), Limits(max_pixels=2**21)
        )
    assert error.value.status_code == 413


def test_a_second_header_is_noticed_before_its_pixels_are_unpacked(monkeypatch):
    loads = []
    monkeypatch.setattr(server.Image.Image, "load", lambda image: loads.append(image.size))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: loads.append(image.size))
    with pytest.raises(ValueError, match="not what its header says"):
        decode_image(HOSTILE["a second, larger header"][0])
    assert not loads


def test_damaged_files_are_refused_or_decoded_and_nothing_else():
    assert image_header(GOOD["png"]) == ("PNG", 16, 12) and image_header(GOOD["webp"]) == ("WEBP", 16, 12)
    rng, outcomes = random.Random(0), {"refused": 0, "decoded": 0}
    for i in range(3000):
        data = bytearray(GOOD[("png", "webp")[i % 2]])
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = bytes(data[: rng.randint(0, len(data))] if i % 3 == 0 else data)
        try:
            _, width, height = image_header(data)
            if width * height > 2**16:
                raise ValueError("too large")
            assert decode_image(data).shape == (height, width, 3)
            outcomes["decoded"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize(
    "changes, status, message",
    [
        ({"prompts": PROMPTS[:2]}, 400, "'prompts': 2, 'images': 1, 'metadata': 1"),
        ({"images": []}, 400, "'images': 0"),
        ({"prompts": [], "images": [], "metadata": []}, 400, "prompts: List should have at least 1 item"),
        ({"metadata": [[]]}, 400, "metadata.0: Input should be an object"),
        ({"metadata": None}, 400, "metadata: Input should be a valid array"),
        ({"prompts": "a"}, 400, "prompts: Input should be a valid array"),
        ({"prompts": [1]}, 400, "prompts.0: Input should be a valid string"),
        ({"images": ["http://10.0.0.1/a.png"]}, 400, "image 0: Only base64 data is allowed"),
        ({"images": ["/etc/passwd"]}, 400, "image 0"),
        ({"prompts": [1] * 10_000, "images": [2] * 10_000}, 400, "^prompts.0: [^;]*; images.0: [^;]*$"),
        ({"prompt": ["a"]}, 400, "prompt: Extra inputs are not permitted"),
        ({"prompts": PROMPTS, "images": [""] * 5, "metadata": ROWS}, 413, "5 images: send 4 at most"),
        ({"images": [image_base64(np.zeros((40, 40, 3), np.uint8))]}, 413, "image 0 has 40 x 40 pixels"),
        (body_of(np.zeros((3, 32, 32, 3), np.uint8)), 413, "32 x 32 pixels: too many for 3"),
        (body_of(NOISE[:2], images=[image_base64(NOISE[0]), image_base64(NOISE[0, :4])]), 400, "images of 2 sizes"),
        ({"metadata": [{"x": "x" * 300_000}]}, 413, "send 200000 bytes at most"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_with_a_reason(guarded, changes, status, message):
    reply = requests.post(guarded[0] + "/score", json=body_of(NOISE[:1], **changes))
    assert reply.status_code == status
    assert re.search(message, reply.json()["error"]), reply.json()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}', b"1" * 10_000])
def test_what_is_no_json_object_is_refused(guarded, data):
    reply = requests.post(guarded[0] + "/score", data=data, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and set(reply.json()) == {"error"}


def test_other_forms_methods_and_paths_are_refused(guarded):
    url, _ = guarded
    body = json.dumps(body_of(NOISE[:1]))
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json-seq",
        "",
    ):  # what web pages can send
        assert requests.post(url + "/score", data=body, headers={"Content-Type": kind}).status_code == 400
    assert requests.post(url + "/score", data=body, headers={"Content-Type": "application/JSON; charset=utf-8"}).ok
    assert requests.get(url + "/score").status_code == 405 and requests.get(url + "/").status_code == 404
    assert requests.get(url + "/nowhere").json() == {"error": "Not Found"}


def test_long_uploads_are_refused_whether_they_say_their_length_or_not(no_waiting):
    def pieces():
        for _ in range(64):
            yield b" " * 65536

    with running(make_app(Marks(), limits=Limits(max_body_bytes=100_000, upload_timeout=0.3))) as url:
        for data in (b" " * 2**23, pieces()):
            reply = requests.post(url + "/score", data=data, headers={"Content-Type": "application/json"})
            assert reply.status_code == 413
        big = np.random.default_rng(0).integers(0, 256, (4, 400, 400, 3), dtype=np.uint8)
        with pytest.raises(RewardError, match="answered 413: .*send 100000 bytes at most"):  # and not: connection lost
            score(Remote(url), big, PROMPTS[:4], ROWS[:4])
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:  # says more than it sends
            slow.sendall(
                b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"
            )
            received = b""
            while b"did not arrive within 0.3 s" not in received:
                received += slow.recv(4096)  # raises after 30 s
        assert requests.get(url + "/health").json()["waiting"] == 0


# --- keys and addresses ---


def test_the_key_is_asked_for_and_compared_in_constant_time(monkeypatch, no_waiting):
    compared, compare = [], server.hmac.compare_digest
    monkeypatch.setattr(server.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    marks = Marks()
    with running(make_app(marks, key="swordfish")) as url:
        wrong = [
            b"Bearer guess",
            b"Basic swordfish",
            b"Bearer",
            b"swordfish",
            b"",
            "Bearer swordfish\u00e9".encode("latin-1"),
        ]
        for header in [{}, *({"Authorization": value} for value in wrong)]:
            for reply in (requests.get(url + "/health", headers=header), requests.post(url + "/score", headers=header)):
                assert reply.status_code == 401 and reply.headers["WWW-Authenticate"] == "Bearer"
                assert "swordfish" not in reply.text
        assert (b"guess", b"swordfish") in compared
        with pytest.raises(CallError, match="answered 401 .*api_key_env says"):
            Remote(url)
        monkeypatch.setenv("VGPO_REWARD_KEY", "swordfish")
        remote = Remote(url)
        score(remote, NOISE, PROMPTS, ROWS)
        monkeypatch.setenv("VGPO_REWARD_KEY", "changed")
        with pytest.raises(RewardError, match="answered 401"):
            score(remote, NOISE, PROMPTS, ROWS)
        monkeypatch.setenv("OTHER", "swordfish")
        score(Remote(url, api_key_env="OTHER"), NOISE, PROMPTS, ROWS)
    assert [count for _, count in marks.calls] == [5, 5]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_nobody_outside_is_served_without_a_key(host, monkeypatch):
    monkeypatch.delenv("VGPO_REWARD_KEY", raising=False)
    with pytest.raises(ValueError, match="can be reached from other machines, and there is no key"):
        open_socket(host, 0, None)
    with pytest.raises(SystemExit, match="error: .*there is no key: put one"):
        serve_main(["--reward=served_rewards:unhurried", f"--host={host}"])


def test_with_a_key_others_are_served(monkeypatch):
    with open_socket("0.0.0.0", 0, "swordfish") as sock:
        assert sock.getsockname()[0] == "0.0.0.0"
    with running(make_app(Marks(), "swordfish"), host="0.0.0.0", key="swordfish") as url:
        monkeypatch.setenv("VGPO_REWARD_KEY", "swordfish")
        assert Remote(url.replace("0.0.0.0", "127.0.0.1")).name == "remote-marks"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonsense"], "unknown reward 'nonsense'"),
        (["served_rewards:nobody"], "cannot be imported"),
        (["OCR", "--reward.thread", "2"], "there is no option reward.thread"),
        (["OCR", "--reward.threads", "0"], "threads is 0; it must be a number v with v>0"),
        (["JPEG", "--reward.threads", "1"], "there is no option reward.threads"),
        (["OCR", "--api_key_env", "VGPO_NO_SUCH"], "VGPO_NO_SUCH is not set"),
        (["OCR", "--max_queue", "0"], "max_queue is 0; it must be"),
        (["OCR", "--nonsense", "0"], "nonsense"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(arguments, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}") as error:
        serve_main(["--reward", *arguments, "--port=0"])
    assert "\n" not in str(error.value)


def test_the_help_has_every_limit_and_every_reward(capsys):
    with pytest.raises(SystemExit, match="0"):
        serve_main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in (*vars(Limits()), "reward", "host", "port", "api_key_env"):
        assert f"--{name}" in text
    assert "requests that wait or are scored" in text and "vgpo.rewards.ocr.OCR" in text
    with pytest.raises(ValueError, match="max_queue is 0"):
        Limits(max_queue=0)


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        with pytest.raises(SystemExit, match=f"error: .*in use.*{sock.getsockname()[1]}"):
            serve_main(["--reward=OCR", f"--port={sock.getsockname()[1]}"])


# --- failing, slow and busy rewards ---


def raises(images, prompts, metadata):
    raise RuntimeError("CUDA out of memory\n  and more lines")


def short(images, prompts, metadata):
    return [0.5]


def nan(images, prompts, metadata):
    return [float("nan")] * len(images)


@pytest.mark.parametrize(
    "fn, message", [(raises, "RuntimeError: CUDA out of memory and more lines"), (short, "shape"), (nan, "score nan")]
)
def test_a_failing_reward_is_an_error_with_its_own_line_and_asked_once(fn, message):
    calls = []
    reward = Function(lambda *args: calls.append(1) or fn(*args), name="mine")
    with running(make_app(reward)) as url:
        with pytest.raises(RewardError, match=f"answered 500: .*reward 'mine' .*{message}") as error:
            score(Remote(url), NOISE, PROMPTS, ROWS)
    assert len(calls) == 1 and "\n" not in str(error.value)


def test_a_slow_reward_is_waited_for_and_too_slow_a_one_is_asked_once():
    gate = threading.Event()
    marks = Marks(lambda: gate.wait(30))
    with running(make_app(marks)) as url:
        threading.Timer(0.5, gate.set).start()
        begin = time.monotonic()
        score(Remote(url, read_timeout=30), NOISE, PROMPTS, ROWS)
        assert time.monotonic() - begin > 0.4
        gate.clear()
        with pytest.raises(RewardError, match="gave no answer within 0.2 s: raise read_timeout"):
            score(Remote(url, read_timeout=0.2), NOISE, PROMPTS, ROWS)
        gate.set()
    assert len(marks.calls) == 2


def test_a_full_queue_turns_away_and_the_client_comes_back():
    gate, marks = threading.Event(), None
    marks = Marks(lambda: gate.wait(30))
    with running(make_app(marks, limits=Limits(max_queue=2))) as url:
        remote = Remote(url, batch_size=1, concurrency=5, backoff=0.05)  # five requests at once
        found = []
        caller = threading.Thread(target=lambda: found.append(score(remote, NOISE, PROMPTS, ROWS)))
        caller.start()
        until(lambda: requests.get(url + "/health").json()["waiting"] == 2)
        reply = requests.post(url + "/score", json=body_of(NOISE[:1]))
        assert reply.status_code == 503 and int(reply.headers["Retry-After"]) >= 1 and "2 requests wait" in reply.text
        gate.set()
        caller.join(60)
    assert torch.equal(found[0].raw, score(Marks(), NOISE, PROMPTS, ROWS).raw) and len(marks.calls) == 5


def until(holds, deadline=60):
    "Wait until `holds()`."
    end = time.monotonic() + deadline
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_hung_up_is_not_served():
    gate = threading.Event()
    marks = Marks(lambda: gate.wait(30))
    with running(make_app(marks)) as url:
        first = threading.Thread(target=requests.post, args=(url + "/score",), kwargs={"json": body_of(NOISE[:1])})
        first.start()
        until(lambda: marks.calls)
        with pytest.raises(CallError, match="no answer within 0.3 s"):
            Remote(url, read_timeout=0.3)(NOISE, PROMPTS, ROWS)
        time.sleep(0.1)
        gate.set()
        first.join(60)
        until(lambda: requests.get(url + "/health").json()["waiting"] == 0)
        assert [count for _, count in marks.calls] == [1]


# --- answers that are none ---

TRUTH = {
    "raw": [1.0, 2],
    "scaled": [0, 0.5],
    "strict": [True, False],
    "details": [{}, {}],
    "reward": "r",
    "version": "1",
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"raw": [1.0]}, "raw must be a list of 2 int or float"),
        ({"raw": [1.0, 2.0, 3.0]}, "raw must be a list of 2"),
        ({"scaled": ["0.5", "0.5"]}, "scaled must be"),
        ({"scaled": [True, False]}, "scaled must be"),
        ({"scaled": [0.5, None]}, "scaled must be"),
        ({"scaled": 0.5}, "scaled must be"),
        ({"scaled": [0.5, 1.5]}, "row 1, prompt 'prompt 1', the scaled score 1.5"),
        ({"scaled": [-0.1, 0.5]}, "row 0, .* the scaled score -0.1"),
        ({"raw": [float("nan"), 1.0]}, "row 0, .* the raw score nan"),
        ({"raw": [1.0, float("inf")]}, "row 1, .* the raw score inf"),
        ({"raw": [1.0, 1e300]}, "row 1, .* the raw score inf"),
        ({"strict": [1, 0]}, "strict must be a list of 2 bool"),
        ({"strict": [True]}, "strict must be a list of 2 bool"),
        ({"details": [{}]}, "details must be a list of 2 dict"),
        ({"details": "none"}, "details must be a list of 2 dict"),
        ({"reward": "s"}, "reward was 'r' and is now 's'"),
        ({"version": "2"}, "version was '1' and is now '2': scores of the two are not comparable"),
        ({"version": None}, "version was '1' and is now None"),
        ({"parts": []}, "parts must be objects under the same names"),
        ({"parts": {"a": [0.5, 0.5]}}, "parts must be objects"),
        ({"parts": {"a": {"raw": [1.0]}}}, "raw must be a list of 2 int or float"),
        ({"parts": {"a": {"raw": [1, 1], "scaled": [0.5, 7], "details": [{}, {}]}}}, "'a' .*the scaled score 7"),
    ],
)
def test_an_answer_that_is_none_is_an_error(change, message):
    health = {"reward": "r", "scale": "s", "version": "1"}
    with fake_server(lambda request: health if request.path == "/health" else TRUTH | change) as fake:
        with pytest.raises(RewardError, match=message):
            score(Remote(fake.url), NOISE[:2], PROMPTS[:2], ROWS[:2])
        assert len(fake.asked) == 2


def test_answers_with_different_parts_are_an_error():
    part = {"raw": [0.5], "scaled": [0.5], "strict": None, "details": [{}]}

    def answer(request):
        if request.path == "/health":
            return {"reward": "r", "scale": "s", "version": "1"}
        parts = {} if json.loads(request.body)["prompts"] == PROMPTS[:1] else {"a": part}
        return part | {"reward": "r", "version": "1", "parts": parts}

    with fake_server(answer) as fake:
        with pytest.raises(RewardError, match="parts must be objects under the same names"):
            score(Remote(fake.url, batch_size=1), NOISE[:2], PROMPTS[:2], ROWS[:2])


def test_a_true_answer_is_taken_and_what_is_no_reward_server_is_not(no_waiting):
    health = {"reward": "r", "scale": "s", "version": "1"}
    with fake_server(lambda request: health if request.path == "/health" else TRUTH) as fake:
        found = score(Remote(fake.url), NOISE[:2], PROMPTS[:2], ROWS[:2])
    assert found.raw.tolist() == [1, 2] and found.strict.tolist() == [True, False]
    for answer in ({"status": "ok"}, health | {"version": 1}, (200, {}, b"<html>"), (404, {}, b"")):
        with fake_server(lambda request, answer=answer: answer) as fake:
            with pytest.raises(CallError, match="no reward server|no JSON object|answered 404"):
                Remote(fake.url)


def test_bad_client_options_are_refused():
    for options, message in (({"batch_size": 0}, "batch_size.*0"), ({"url": "here"}, "http://HOST:PORT"),
                             ({"format": "jpeg"}, "format.*jpeg"), ({"nonsense": 1}, "nonsense"),
                             ({"api_key_env": "VGPO_NO_SUCH"}, "VGPO_NO_SUCH is not set")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make_reward("Remote", **options)


# --- a run whose server is killed ---

SMALL = [
    *("--rollout.prompts_per_epoch=2", "--rollout.group_size=2", "--rollout.num_inference_steps=3", "--epochs=8"),
    *("--window.size=2", "--credit.num_scored_steps=2", "--evaluation.num_samples=4"),
    *("--evaluation.num_inference_steps=2", "--optim.num_minibatches=2", "--optim.lr=1e-3", "--save_every=100"),
    *("--log_images_every=100", "--optim.ema_decay=0.9", "--objective.clip_range=1e-3"),
]


def test_a_run_whose_server_is_killed_ends_like_an_unbroken_one(tiny_folder, tmp_path, one_thread):
    name, port = "served_rewards:unhurried", free_port()
    options = [*SMALL, f"--model.path={tiny_folder}", f"--output_dir={tmp_path}"]
    log = tmp_path / "broken" / "metrics.jsonl"

    def epochs():
        assert run.poll() is None, run.communicate()[0]
        return len(log.read_text().splitlines()) if log.exists() else 0

    far = ["--reward=Remote", f"--reward.url=http://127.0.0.1:{port}", "--reward.backoff=0.3"]
    patient = [*far, "--reward.retries=3"]  # waits of 0, 0.6 and 1.2 s, and up to 0.6 s by chance
    train_main([*options, "--name=whole", f"--reward={name}"])  # scored here and left alone
    with serving("--reward", name, "--port", port, cwd=tmp_path) as (process, url):
        run = program("vgpo.train", *options, "--name=broken", *patient, cwd=tmp_path)
        until(lambda: epochs() >= 1)
        process.kill()
    killed_at = epochs()
    with running(make_app(make_reward(name)), port=port):  # back within its patience, so the run goes on
        until(lambda: epochs() >= killed_at + 2)
    gone = time.monotonic()
    message = run.communicate(timeout=120)[0].strip().splitlines()  # and now it stays away
    assert time.monotonic() - gone > 1.7 and run.returncode == 1
    done = len(log.read_text().splitlines())
    assert killed_at + 2 <= done < 8
    assert "CallError" in message[-2] and "gave up after 4 attempts: is the server up?" in message[-2]
    assert message[-1] == f"go on from epoch {done} with: python -m vgpo.train --resume {tmp_path / 'broken'}"

    with running(make_app(make_reward(name)), port=port):
        train_main(["--resume", str(tmp_path / "broken"), "--reward.retries=9", "--reward.read_timeout=60"])
    for file in ("lora/pytorch_lora_weights.safetensors", "checkpoints/epoch-00008/state.safetensors"):
        one, other = load_file(tmp_path / "whole" / file), load_file(tmp_path / "broken" / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    rewards = [[json.loads(x)["reward"] for x in (tmp_path / n / "metrics.jsonl").open()] for n in ("whole", "broken")]
    assert len(rewards[0]) == 8 and rewards[0] == rewards[1]
