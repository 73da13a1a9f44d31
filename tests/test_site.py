"""The site: each notebook has its place, links lead somewhere, nothing of a notebook is lost; and a browser shows it.

The tests in the browser need `make docs` before them, and Chromium.
"""

import json
import re
import sys
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
from markdown_it import MarkdownIt
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs/site"))
import build  # noqa: E402


def markdown(path):
    "The Markdown of a page, as in the repository."
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def targets(text):
    "What the links and images of a text point to."
    inline = [token for block in MarkdownIt("commonmark").enable("table").parse(text) for token in block.children or []]
    return [str(token.attrs.get("href") or token.attrs.get("src")) for token in inline if token.attrs]


# --- the pages and their order ---


def test_every_page_is_in_the_sidebar_once():
    listed = Counter()
    texts = {ROOT: build.contents()}
    for part, question in ((part, question) for parts in build.PARTS.values() for part, question in parts.items()):
        texts[ROOT / "nbs" / part] = build.part_page(part, question)
    for folder, text in texts.items():
        for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.S):
            for line in block.splitlines():
                if line and not line.startswith(":"):
                    name = re.sub(r".*<(.*)>", r"\1", line)
                    listed[ROOT / name[1:] if name.startswith("/") else folder / name] += 1
    ours = Counter({path.with_suffix(""): 1 for path in build.pages() if path != build.start()})
    generated = {name for name in listed if name.name == "index" or name.parent == ROOT / "api"}
    assert len(generated) == 2 * sum(map(len, build.PARTS.values()))
    assert {name: count for name, count in listed.items() if name not in generated} == ours


def test_the_course_is_the_evenings_path_of_the_first_page():
    lessons = build.lessons()
    assert all(path.is_file() for path in lessons) and lessons == sorted(lessons, key=lambda path: path.name)
    assert 18 <= len(lessons) <= 22
    page = build.part_page("method", "")
    assert page.index("## Lessons") < page.index("05_losses.ipynb") < page.index("## The library beneath")


def test_every_notebook_is_in_a_part():
    assert {path.parent.name for path in build.notebooks()} == {
        part for parts in build.PARTS.values() for part in parts
    }


@pytest.mark.parametrize("path", build.pages(), ids=lambda path: path.stem)
def test_links_within_the_repository_have_targets(path):
    links = [target.split("#")[0] for target in targets(markdown(path))]
    gone = [link for link in links if link and ":" not in link and not (path.parent / link).exists()]
    assert not gone


def test_no_notebook_has_a_heading_twice():
    headings = {path.name: Counter(re.findall(r"(?m)^#+ .+", markdown(path))) for path in build.notebooks()}
    assert not {name: twice for name, found in headings.items() if (twice := [h for h, n in found.items() if n > 1])}


# --- the text of a page ---


@pytest.mark.parametrize("path", build.notebooks(), ids=lambda path: path.stem)
def test_a_notebook_is_shown_whole(path):
    "All cells but hidden and empty ones, in their order, with their code, without nbdev's lines, and their outputs."
    text = path.read_text(encoding="utf-8")
    before, after = nbformat.reads(text, as_version=4).cells, nbformat.reads(build.page(text, path), as_version=4).cells
    ours = {cell.id for cell in before}
    shown = {cell.id: cell for cell in after if cell.id in ours}
    assert [cell.id for cell in after if cell.id in ours] == [cell.id for cell in before if cell.id in shown]
    for cell in before:
        kept = [line for line in cell.source.splitlines() if not line.startswith("#|")]
        hidden = "#| hide" in cell.source.splitlines() or not any(map(str.strip, kept))
        if cell.cell_type == "code" and hidden:
            assert cell.id not in shown and (not cell.outputs or "#| hide" in cell.source)
        elif cell.cell_type == "code":
            assert shown[cell.id].source == "\n".join(kept).strip("\n")
            assert shown[cell.id].outputs == cell.outputs
        else:
            added = set(shown[cell.id].source.splitlines()) - set(cell.source.splitlines())
            assert not {line for line in added if "github.com" not in line and "details>" not in line} - {
                "<details class='exercises'>",
                "<summary>Show the exercises</summary>",
            }


def test_what_is_folded_and_what_is_not():
    long = "\n".join(f"x{i} = {i}" for i in range(build.FOLDED_LINES + 1))
    rows = [new_output("stream", text="row\n" * 100)]
    exercises = "## What we have\n\nMuch.\n\n## Exercises\n\n1. One\n   line\n2. Two\n\n## After\n\nText."
    cells = [
        new_markdown_cell("# Title\n\n> Line"),
        new_code_cell("#| default_exp flow"),
        new_code_cell("#| hide\nimport os"),
        new_code_cell("#| export\n\n" + long),
        new_code_cell(long),
        new_code_cell("#| code-fold: true\nprint('row')", outputs=rows),
        new_markdown_cell("<details><summary>Answer 1</summary>\n\nYes.\n\n</details>"),
        new_code_cell("print(1)", metadata={"tags": ["hide-cell"]}),
        new_code_cell("x = 1\n#| eval: false"),
        new_markdown_cell(exercises),
    ]
    path = build.notebooks()[0]
    cells = nbformat.reads(build.notebook(json.dumps(new_notebook(cells=cells)), path), as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.source for cell in code] == [long, long, "print('row')", "print(1)", "x = 1"]
    tags = [cell.metadata.get("tags") for cell in code]
    assert tags == [[], ["hide-input"], ["hide-input", "output_scroll"], ["hide-cell"], []]
    assert code[3].metadata["mystnb"]["code_prompt_show"] == "Answer 1: show the code and its output"
    folded = re.search(r"<details class='exercises'>.*</details>", cells[-1].source, re.S)[0]
    assert "1. One\n   line\n2. Two" in folded and "Much" not in folded and "Text." not in folded
    assert "## Exercises" not in folded and "## Exercises" in cells[-1].source
    assert f"nbs/method/{path.name}" in cells[1].source and "](../../api/vgpo.flow.md)" in cells[1].source


def test_links_to_sources_go_to_the_repository():
    path = ROOT / "nbs/method/01_flow.ipynb"
    code = f"{build.SETTINGS['git_url']}/blob/main/vgpo/flow.py"
    kept = "[a](02_toy.ipynb) [b](../../docs/rewards.md#built-in) [c](https://x.org/y.py) [d](#here) [e](gone.py)"
    assert build.linked(kept, path) == kept
    assert build.linked("[f](../../vgpo/flow.py) [g](../../launch)", path) == (
        f"[f]({code}) [g]({build.SETTINGS['git_url']}/tree/main/launch)"
    )


def test_dead_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        "<h1 id='here'>A</h1><a href='#here'>1</a><a href='b.html#there'>2</a><a href='#no'>3</a>"
    )
    (tmp_path / "b.html").write_text(
        "<p id='there'><a href='a.html#gone'>4</a><img src='no.png'><a href='https://x.org'>5</a>"
    )
    assert build.dead_links(tmp_path) == ["a.html: #no", "b.html: a.html#gone", "b.html: no.png"]


# --- in a browser ---

PAGES = [
    str(build.start().relative_to(ROOT).with_suffix(".html")),
    "README.html",
    "nbs/credit/index.html",
    "nbs/method/01_flow.html",
    "nbs/credit/12_tcrm.html",
    "nbs/training/43_trainer.html",
    "nbs/rewards/56_coco.html",
    "nbs/practice/92_train_sd35.html",
    "docs/performance.html",
    "docs/rewards.html",
    "api/method.html",
    "api/vgpo.trainer.html",
]
PHONE, DESK = (390, 844), (1400, 1000)
TYPESET = "(!document.querySelector('.math') || document.querySelector('mjx-container'))"
UNSET = "return [...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container')).length"

CUT = """return [...document.querySelectorAll('div.math')].filter(e => e.querySelector('mjx-container')
    .getBoundingClientRect().left < e.getBoundingClientRect().left - 1).map(e => e.innerText)"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(window):
    "A browser's window, and the address of the built site."
    if not (build.SITE / "index.html").exists():
        pytest.skip("needs the site: make docs")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=build.SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield window, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def opened(site, page, size):
    "Show a page, its maths typeset and its images loaded."
    window, address = site
    window.resize(*size)
    window.said()  # what earlier pages have said is theirs
    window.open(f"{address}/{page}")
    window.wait(f"document.readyState === 'complete' && {TYPESET}")
    return window


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("page", sorted(set(PAGES)))
def test_a_page_is_shown_whole(site, page, size):
    window = opened(site, page, size)
    assert window.run("return document.querySelector('article h1').textContent.length") > 1
    assert window.run(UNSET) == 0
    assert window.run("return document.querySelectorAll('mjx-merror').length") == 0
    assert window.run("return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)") == []
    assert window.run("return document.documentElement.scrollWidth") <= size[0]
    assert window.run(CUT) == []  # such a formula's beginning cannot be scrolled to
    assert window.said("SEVERE") == []


def test_nothing_is_fetched_from_elsewhere(site):
    window = opened(site, "nbs/credit/12_tcrm.html", DESK)
    fetched = window.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(fetched) > 10 and all(name.startswith((site[1], "data:")) for name in fetched)


def test_the_first_page_is_where_a_visitor_arrives(site):
    window, address = site
    window.open(address + "/")
    window.wait(f"location.pathname === '/{PAGES[0]}' && document.readyState === 'complete'")
    assert window.run("return document.querySelector('article h1').textContent.length") > 1


def test_search_finds_temporal_weight(site):
    window = opened(site, "search.html?q=temporal+weight", DESK)
    for page in ("nbs/credit/12_tcrm.html", "api/vgpo.values.html#vgpo.values.temporal_weights"):
        window.wait(f"document.querySelector('#search-results li a[href*=\"{page}\"]')")
    assert window.said("SEVERE") == []


def test_exercises_and_long_cells_open_by_a_click(site):
    window = opened(site, "nbs/credit/12_tcrm.html", DESK)
    for folded, inner in (("details.exercises", "li"), ("details.hide", "pre")):
        visible = f"return document.querySelector('{folded} {inner}').checkVisibility()"
        assert window.run(visible) is False
        window.run(f"document.querySelector('{folded} > summary').scrollIntoView({{block: 'center'}})")
        window.click(f"{folded} > summary")
        assert window.run(visible) is True


def test_dark_and_light(site):
    window = opened(site, "nbs/credit/12_tcrm.html", DESK)
    shades = {}
    for mode in ("dark", "light"):
        window.click(".theme-switch-button")
        window.click(f".theme-change-button[data-mode={mode}]")
        color = window.run("return getComputedStyle(document.body).backgroundColor")
        shades[mode] = sum(map(int, re.findall(r"\d+", color)))
    assert shades["dark"] < 150 < 600 < shades["light"]


def test_launch_buttons_open_the_notebook_of_the_page(site):
    window = opened(site, "nbs/credit/12_tcrm.html", DESK)
    links = set(window.run("return [...document.querySelectorAll('.dropdown-launch-buttons a')].map(a => a.href)"))
    name = build.SETTINGS["git_url"].removeprefix("https://github.com/")
    assert links == {
        f"https://colab.research.google.com/github/{name}/blob/main/nbs/credit/12_tcrm.ipynb",
        f"https://mybinder.org/v2/gh/{name}/main?urlpath=lab/tree/nbs/credit/12_tcrm.ipynb",
    }


def test_previous_and_next(site):
    window = opened(site, "nbs/credit/12_tcrm.html", DESK)
    links = window.run(
        "return ['left-prev', 'right-next'].map(c => document.querySelector(`a.${c}`).getAttribute('href'))"
    )
    assert links == ["11_grpo.html", "13_adae.html"]


def moving():
    "Pages with a player or a slider in them."
    return [
        path for path in build.notebooks() if re.search(r"type: 'range'|type=.range", path.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("path", moving(), ids=lambda path: path.stem)
def test_players_move(site, path):
    window = opened(site, str(path.relative_to(ROOT).with_suffix(".html")), DESK)
    for i in range(window.run("return document.querySelectorAll('.cell_output input[type=range]').length")):
        slider = f"document.querySelectorAll('.cell_output input[type=range]')[{i}]"
        window.run(f"{slider}.scrollIntoView()")
        drawn = f"{slider}.closest('.cell_output').outerHTML"
        before = window.run(f"return {drawn}")
        window.run(
            f"const s = {slider}; s.value = s.value === s.max ? s.min : s.max; s.dispatchEvent(new Event('input'))"
        )
        assert window.run(f"return {drawn}") != before
    assert window.said("SEVERE") == []
