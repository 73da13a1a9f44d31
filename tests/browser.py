"A real Chromium without a window, driven by the W3C WebDriver protocol, which chromedriver speaks over HTTP."

import base64
import re
import shutil
import subprocess
import time
from contextlib import contextmanager

import requests

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1000,800"
)
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "ArrowRight": "\ue014", "ArrowDown": "\ue015", "ArrowLeft": "\ue012"}


class Browser:
    "A session of a browser; what goes wrong in it is an AssertionError."

    def __init__(self, driver, profile):
        self.url = driver
        options = {"binary": CHROMIUM, "args": [*FLAGS.split(), f"--user-data-dir={profile}"]}
        logged = {"browser": "SEVERE"}  # what the console shows in red
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logged}}}
        self.url = f"{driver}/session/{self.send('session', **wanted)['sessionId']}"

    def send(self, path, **body):
        answer = requests.post(f"{self.url}/{path}", json=body, timeout=60).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url):
        self.send("url", url=url)

    def run(self, script):
        "What a script returns."
        return self.send("execute/sync", script=script, args=[])

    def wait(self, script, seconds=30):
        "What a script returns, once that is true in JavaScript's sense."
        end = time.monotonic() + seconds
        while not (found := self.run(f"return {script}")):
            assert time.monotonic() < end, f"{script}: {self.run('return document.body.innerText')}"
            time.sleep(0.05)
        return found

    def press(self, *keys):
        "Press and release keys, one after another."
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.send("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def click(self, selector):
        element = self.send("element", using="css selector", value=selector)
        self.send(f"element/{next(iter(element.values()))}/click")

    def errors(self):
        "The errors of the console since the last call."
        return [entry["message"] for entry in self.send("se/log", type="browser")]

    def resize(self, width, height):
        "Show pages at a size in pixels; below 600 as a phone does."
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)

    def screenshot(self):
        "The page as a PNG."
        return base64.b64decode(requests.get(f"{self.url}/screenshot", timeout=60).json()["value"])


@contextmanager
def browser(profile):
    "Within this context there is a Browser, with an empty profile in the folder `profile`."
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True, **quiet)
    session = None
    try:
        lines = iter(process.stdout.readline, "")
        port = next(found[1] for line in lines if (found := re.search(r"successfully on port (\d+)", line)))
        session = Browser(f"http://127.0.0.1:{port}", profile)
        yield session
    finally:
        if session:
            requests.delete(session.url, timeout=60)
        process.terminate()
        process.communicate()
