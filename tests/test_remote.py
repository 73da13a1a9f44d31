"Asking another machine: what is tried again and how long it waits, what is not, keys, and images as text."

import base64
import dataclasses
import io
import socket
import time

import numpy as np
import pytest
from fake_server import fake_server
from PIL import Image

from vgpo.rewards.remote import (
    MAX_BACKOFF,
    Backoff,
    CallError,
    Endpoint,
    Remote,
    call,
    image_base64,
    is_loopback,
    read_key,
)


@pytest.fixture
def waits(monkeypatch):
    "The seconds that `call` would have waited, instead of waiting."
    seconds = []
    clock = {"sleep": staticmethod(seconds.append), "time": staticmethod(time.time)}
    monkeypatch.setattr("urllib3.util.retry.time", type("clock", (), clock))
    return seconds


def test_waits_double_and_spread(waits):
    with fake_server(lambda request: (503, {}, b"busy")) as server:
        drawn = []
        for _ in range(30):
            with pytest.raises(CallError, match="503 busy; gave up after 9 attempts"):
                call(Endpoint(url=server.url, retries=8, backoff=0.5), "/x")
            drawn.append(waits[:])
            waits.clear()
    for k, own in enumerate([1, 2, 4, 8, 16, MAX_BACKOFF, MAX_BACKOFF]):  # the first retry comes at once
        found = [seconds[k] for seconds in drawn]
        assert len(found) == 30 and own <= min(found) and max(found) <= min(own + 0.5, MAX_BACKOFF)
        if own < MAX_BACKOFF:
            assert max(found) - min(found) > 0.25  # missed with probability 30 * 0.5**29, below 1e-7


def test_a_retry_after_header_is_read_spread_and_bounded():
    def read(text):
        return Backoff(1, backoff_max=MAX_BACKOFF).parse_retry_after(text)

    dates = ["Wed, 21 Oct 99999 07:28:00 GMT", "Wed, 99 Foo 2099"]
    for text in ["", "0", "soon", "-1", "1.5", "\u00b2", "9" * 5000, *dates]:
        assert read(text) == 0, text
    drawn = [read("12") for _ in range(200)]
    assert 12 <= min(drawn) and max(drawn) < 24 and max(drawn) - min(drawn) > 10.8  # missed with probability < 1e-6
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 20))
    assert 18 < read(later) <= 40
    assert read("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert 30 <= read("Wed, 21 Oct 2099 07:28:00 GMT") < 60 and 30 <= read("86400") < 60


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_busy_server_is_asked_again_and_not_before_it_says(waits, status):
    answers = {1: (status, {"Retry-After": "7"}, b"busy"), 2: (status, {}, b"busy")}
    with fake_server(lambda request: answers.get(request.number, {"n": request.number})) as server:
        assert call(Endpoint(url=server.url, backoff=0.5), "/score", {"a": 1}) == {"n": 3}
    assert [request.body for request in server.asked] == [b'{"a": 1}'] * 3
    assert 7 <= waits[0] < 14 and 1 <= waits[1] < 1.5 and len(waits) == 2


@pytest.mark.parametrize("how", ["refused", "hangs up", "ends early"])
def test_a_lost_connection_is_asked_again_within_bounds(waits, how):
    def answer(request):
        return None if how == "hangs up" else (200, {"Content-Length": "100", "Connection": "close"}, b'{"ok":')

    with fake_server(answer) as server:
        if how != "refused":
            with pytest.raises(CallError, match=r"/x: .*; gave up after 3 attempts: is the server up\?"):
                call(Endpoint(url=server.url, retries=2, connect_timeout=2, read_timeout=5), "/x")
            assert len(server.asked) == 3
    if how == "refused":
        with pytest.raises(CallError, match="/x: Connection refused; gave up after 3 attempts"):
            call(Endpoint(url=server.url, retries=2), "/x")
    assert len(waits) == 1 and 2 <= waits[0] < 3  # before the second of two retries


@pytest.mark.parametrize("status", [201, 204, 302, 307, 400, 401, 403, 404, 413, 500, 504])
def test_any_other_status_ends_it_at_once(waits, status):
    elsewhere = fake_server(lambda request: {})
    with elsewhere as other, fake_server(lambda r: (status, {"Location": other.url}, b"a\n reason" * 99)) as server:
        with pytest.raises(CallError, match=rf"answered {status}.*: {'' if status == 204 else 'a reason'}") as error:
            call(Endpoint(url=server.url), "/score", {})
    assert len(server.asked) == 1 and not other.asked and not waits
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert ("api_key_env" in str(error.value)) == (status in (401, 403))


@pytest.mark.parametrize("content", [b"<html>hello</html>", b"[1]", b"", b"\xff\xfe", b"[" * 50000])
def test_an_answer_that_is_no_json_object_ends_it_at_once(waits, content):
    with fake_server(lambda request: (200, {}, content)) as server:
        with pytest.raises(CallError, match="no JSON object"):
            call(Endpoint(url=server.url), "/score", {})
    assert len(server.asked) == 1


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_slow_answer_is_not_asked_for_again(waits, part):
    def late():
        time.sleep(0.5)
        return b'{"ok": 1}'

    def answer(request):
        return (200, {"Content-Length": "9"}, late if part == "body" else late())

    with fake_server(answer) as server:
        assert call(Endpoint(url=server.url, read_timeout=30), "/score", {}) == {"ok": 1}
        with pytest.raises(CallError, match="gave no answer within 0.1 s: raise read_timeout"):
            call(Endpoint(url=server.url, read_timeout=0.1), "/score", {})
    assert len(server.asked) == 2 and not waits


def test_a_connection_that_nobody_accepts_times_out_soon():
    with socket.socket() as full:  # its backlog is full after a few connections, and the next ones get no answer
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        callers = [socket.socket() for _ in range(8)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(full.getsockname())
        url, begin = f"http://127.0.0.1:{full.getsockname()[1]}", time.monotonic()
        with pytest.raises(CallError, match="timed out; gave up after 2 attempts"):
            call(Endpoint(url=url, retries=1, connect_timeout=0.2, backoff=0.01), "/")
        assert time.monotonic() - begin >= 0.4
        for caller in callers:
            caller.close()


def test_the_key_comes_from_the_environment_and_stays_there(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("MY_KEY", "swordfish")
    with fake_server(lambda request: (500, {}, b"no")) as server:
        endpoint = Endpoint(url=server.url, api_key_env="MY_KEY")
        for key in ("swordfish", "changed"):
            monkeypatch.setenv("MY_KEY", key)
            with pytest.raises(CallError) as error:
                call(endpoint, "/")
            assert key not in f"{error.value}{endpoint!r}{vars(endpoint)}"
        with pytest.raises(CallError):
            call(Endpoint(url=server.url), "/")
    keys = [request.headers.get("Authorization") for request in server.asked]
    assert keys == ["Bearer swordfish", "Bearer changed", None]
    for value, message in {
        "": "MY_KEY is not set",
        "a b": "no key has",
        "a\n": "no key has",
        "é": "no key has",
    }.items():
        monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(ValueError, match=message):
            read_key("MY_KEY")


def test_our_own_machine_is_not_asked_through_a_proxy(monkeypatch):
    with fake_server(lambda request: {}) as proxy, fake_server(lambda request: {"own": 1}) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert call(Endpoint(url=server.url), "/") == {"own": 1}
        assert call(Endpoint(url="http://elsewhere.invalid"), "/") == {}  # others are, if there is one
        assert len(proxy.asked) == 1 and len(server.asked) == 1
    assert is_loopback("localhost") and is_loopback("127.0.0.1") and is_loopback("::1")
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "", None))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"url": "localhost:8901"}, "must be http://HOST:PORT"),
        ({"url": "ftp://host"}, "must be http://HOST:PORT"),
        ({"url": "http://"}, "must be http://HOST:PORT"),
        ({"url": "http://me:hunter2@host"}, "name that in api_key_env"),
        ({"url": "http://host", "retries": -1}, "retries is -1; it must be a number v with v>=0"),
        ({"url": "http://host", "read_timeout": 0}, "read_timeout is 0"),
        ({"url": "http://host", "backoff": float("nan")}, "backoff is nan"),
        ({"url": "http://host", "retries": 1.5}, "retries is 1.5"),
        ({"url": "http://host", "api_key_env": "VGPO_NO_SUCH"}, "VGPO_NO_SUCH is not set"),
    ],
)
def test_bad_endpoints_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Endpoint(**options)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("format, kind", [("png", "PNG"), ("webp", "WEBP")])
def test_images_travel_without_loss(format, kind):
    for shape in ((1, 1, 3), (7, 300, 3), (64, 64, 3)):
        image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        with Image.open(io.BytesIO(base64.b64decode(image_base64(image, format), validate=True))) as read:
            assert read.format == kind and np.array_equal(np.asarray(read), image)
    with pytest.raises(ValueError, match="format is 'jpeg'; it must be one of png, webp"):
        image_base64(image, "jpeg")


def test_every_option_of_a_remote_reward_says_whether_it_changes_scores():
    options = {option.name for option in dataclasses.fields(Remote)}
    assert Remote.harmless == options  # all of them: images arrive as they were sent, and the version is compared
    assert Endpoint.harmless == {option.name for option in dataclasses.fields(Endpoint)}
