"A player in a real browser: it moves, obeys its slider, disturbs no other, fetches nothing, and without scripts is a sheet."

import base64
import json
import re
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vgpo.motion import as_image, contact_sheet, packed, player, sheet_columns, slider

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250), (250, 0, 250), (120, 120, 120)]
FRAMES = [np.full((30, 50, 3), colour, np.uint8) for colour in COLOURS]
STRICT = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {}"
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\" & '"


# --- the sheet ---


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(8, 120), st.integers(8, 120))
def test_every_frame_lies_where_the_script_looks_for_it(count, width, height):
    frames = [np.full((height, width, 3), (i * 6, 255 - i * 6, 99), np.uint8) for i in range(count)]
    made = player(frames, max_kb=1e6)
    sheet = np.asarray(Image.open(BytesIO(made.png)).convert("RGB"))
    w, h, columns, gap, band = made.layout
    assert (w, h, columns) == (width, height, sheet_columns(count, width, height))
    for i, frame in enumerate(frames):
        x, y = i % columns * (w + gap), i // columns * (h + band) + band
        assert np.abs(sheet[y : y + h, x : x + w].astype(int) - frame).max() <= 2  # a palette of 256 colours


def test_labels_keep_off_the_frames_and_are_cut_to_their_width():
    images = [as_image(frame) for frame in FRAMES]
    labelled, band, gap = contact_sheet(images, ["w" * 200] * len(images))
    empty, *_ = contact_sheet(images, [""] * len(images))
    changed = np.argwhere((np.asarray(labelled) != np.asarray(empty)).any(-1))
    assert len(changed)
    assert (changed[:, 0] % (30 + band) < band).all() and (changed[:, 1] % (50 + gap) < 50).all()


def test_a_large_sheet_is_refused():
    frames = np.random.default_rng(0).integers(0, 256, (4, 100, 100, 3), np.uint8)
    size = len(player(frames).png) / 1000
    assert 20 < size < 200
    with pytest.raises(ValueError, match=f"take {size:.0f} kB, more than 20: show fewer or smaller"):
        player(frames, max_kb=20)


def test_a_palette_leaves_colours_what_they_are():
    ramp = np.linspace(0, 255, 120).astype(np.uint8)
    smooth = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None]), -1)  # 14,400 colours
    found = np.asarray(Image.open(BytesIO(packed(as_image(smooth)))).convert("RGB")).astype(int)
    assert np.abs(found - smooth).max() <= 24


def test_figures_are_closed_and_arguments_checked():
    before = plt.get_fignums()
    made = slider(lambda value: plt.subplots(figsize=(2, 1))[0], [0.5, 1.0, 2.0], "η", start=1.0)
    assert plt.get_fignums() == before
    assert made.labels == ["η = 0.5", "η = 1", "η = 2"] and made.start == 1 and not made.autoplay
    for wrong, match in (
        ({"frames": []}, "no frame"),
        ({"frames": FRAMES, "labels": ["a"]}, "7 frames but 1 labels"),
        ({"frames": [*FRAMES, FRAMES[0][:10]]}, "frame 7"),
        ({"frames": FRAMES, "start": 7}, "start is 7"),
        ({"frames": [FRAMES[0].astype(float)]}, "uint8"),
    ):
        with pytest.raises(ValueError, match=match):
            player(**wrong)
    with pytest.raises(ValueError, match="not among the values"):
        slider(lambda value: FRAMES[0], [1, 2], start=3)


def test_jupyter_gets_a_player_and_its_fallback():
    made = player(FRAMES)
    bundle = made._repr_mimebundle_()
    assert bundle["image/png"] == made.png and base64.b64encode(made.png).decode() in bundle["text/html"]
    assert "http" not in bundle["text/html"] and " id=" not in bundle["text/html"]


# --- in a browser ---


@pytest.fixture
def show(window, tmp_path):
    "Open a page with players, whose policy of contents forbids to fetch anything; returns the browser."

    def opened(*players, scripts="'unsafe-inline'"):
        head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{STRICT.format(scripts)}">'
        path = tmp_path / "page.html"
        path.write_text(head + "\n".join(made.html() for made in players), encoding="utf-8")
        window.open(path.as_uri())
        window.wait("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        return window

    return opened


def state(window):
    "Frame, label, position of the slider and name of the button of every player."
    return window.run(
        "return [...document.querySelectorAll('.vgpo-player')].map(root => [+root.dataset.frame, "
        "root.querySelector('output').textContent, +root.querySelector('input').value, root.querySelector('button').ariaLabel])"
    )


def colours(window):
    "The colour in the middle of the window of every player, from a screenshot."
    shot = Image.open(BytesIO(window.screenshot())).convert("RGB")
    boxes = window.run(
        "return [...document.querySelectorAll('.vgpo-player > div:first-child')].map(view => {"
        "const box = view.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]})"
    )
    return [shot.getpixel((round(x), round(y))) for x, y in boxes]


def near(found, frame):
    return max(abs(a - b) for a, b in zip(found, COLOURS[frame], strict=True)) < 8


MOVE = "const range = document.querySelectorAll('.vgpo-player input')[{}]; range.value = {}; range.dispatchEvent(new Event('input'))"


def test_a_slider_shows_its_frame_and_no_other_players(show):
    window = show(player(FRAMES, autoplay=False), slider(lambda i: FRAMES[i], range(7), "k", start=3))
    assert state(window) == [[0, "frame 0", 0, "play"], [3, "k = 3", 3, "play"]]
    for i in range(7):
        window.run(MOVE.format(1, i))
        assert state(window) == [[0, "frame 0", 0, "play"], [i, f"k = {i}", i, "play"]]
        one, other = colours(window)
        assert near(one, 0) and near(other, i)


def test_it_plays_once_and_again_and_can_be_stopped(show):
    window = show(player(FRAMES, autoplay=False, fps=30), player(FRAMES, autoplay=False, fps=30))
    for _ in range(2):
        window.click(".vgpo-player button")
        assert state(window)[0][0] < 6
        window.wait("document.querySelector('.vgpo-player').dataset.frame === '6'")
        assert state(window) == [[6, "frame 6", 6, "play"], [0, "frame 0", 0, "play"]]
        assert near(colours(window)[0], 6)
    slow = show(player(FRAMES, autoplay=False, fps=4))
    slow.click(".vgpo-player button")
    slow.wait("document.querySelector('.vgpo-player').dataset.frame === '1'")
    slow.click(".vgpo-player > div")  # the picture itself
    (stopped,) = state(slow)
    assert stopped[0] < 6 and stopped[3] == "play"
    slow.run("const end = performance.now() + 600; while (performance.now() < end);")
    assert state(slow) == [stopped]


def test_keys_work(show):
    window = show(player(FRAMES, autoplay=False, fps=30))
    window.press("Tab", "Tab", "ArrowRight", "ArrowRight", "ArrowLeft")  # the button, then the slider
    assert state(window)[0][:3] == [1, "frame 1", 1]
    window.run("document.querySelector('.vgpo-player button').focus()")
    window.press("Enter")
    window.wait("document.querySelector('.vgpo-player').dataset.frame === '6'")


def test_it_begins_in_sight_and_not_where_less_motion_is_wanted(show, window):
    def wanted(value):
        feature = {"name": "prefers-reduced-motion", "value": value}
        window.send("goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": [feature]})

    show(player(FRAMES, fps=30))
    window.wait("document.querySelector('.vgpo-player').dataset.frame === '6'")
    far = player(FRAMES, fps=30)
    show(*[player(FRAMES, width=900, autoplay=False)] * 3, far)
    window.run("const end = performance.now() + 500; while (performance.now() < end);")
    assert state(window)[3][0] == 0  # below the fold
    window.run("document.querySelectorAll('.vgpo-player')[3].scrollIntoView()")
    window.wait("document.querySelectorAll('.vgpo-player')[3].dataset.frame === '6'")
    try:
        wanted("reduce")
        show(player(FRAMES, fps=30))
        window.run("const end = performance.now() + 500; while (performance.now() < end);")
        assert state(window)[0][0] == 0
        window.click(".vgpo-player button")  # asked for, it plays
        window.wait("document.querySelector('.vgpo-player').dataset.frame === '6'")
    finally:
        wanted("")


def test_nothing_is_fetched_and_labels_are_text(show):
    window = show(player(FRAMES, [HOSTILE] * 7, name=HOSTILE, autoplay=False))
    assert state(window)[0][1] == HOSTILE
    assert window.run("return window.hacked ?? 0") == 0
    fetched = window.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []


def test_without_scripts_the_sheet_is_there(show):
    made = player(FRAMES, width=200)
    window = show(made, scripts="'none'")
    found = window.run(
        "const image = document.querySelector('.vgpo-player img'), box = image.getBoundingClientRect();"
        "return [document.querySelectorAll('button, input').length, box.width, image.naturalWidth, image.alt]"
    )
    width = Image.open(BytesIO(made.png)).width
    assert found == [0, width, width, "Player of 7 frames: frame, frame 0 to frame 6, row by row"]
    shot = Image.open(BytesIO(window.screenshot())).convert("RGB")
    shown = {colour for _, colour in shot.getcolors(10**6)}
    assert all(any(max(abs(a - b) for a, b in zip(c, colour, strict=True)) < 8 for c in shown) for colour in COLOURS)


def test_a_player_that_lost_its_data_stops_no_other(window, tmp_path):
    "As an untrusted notebook beside a trusted one."
    made = player(FRAMES, autoplay=False)
    lost = made.html().partition("<script>")[0]
    path = tmp_path / "lost.html"
    path.write_text(
        '<meta charset="utf-8">' + re.sub(r' data-[a-z]+="[^"]*"', "", lost) + made.html(), encoding="utf-8"
    )
    window.open(path.as_uri())
    found = "return [...document.querySelectorAll('.vgpo-player')].map(root => root.dataset.frame ?? null)"
    assert window.run(found) == [None, "0"]


def test_it_shrinks_with_the_page(show):
    window = show(player(FRAMES, width=2000, autoplay=False))
    box = json.loads(
        window.run("return JSON.stringify(document.querySelector('.vgpo-player > div').getBoundingClientRect())")
    )
    assert box["width"] < 1000 and box["height"] == pytest.approx(box["width"] * 30 / 50, abs=1)
    window.run(MOVE.format(0, 5))
    assert near(colours(window)[0], 5)
