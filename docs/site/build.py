"""Builds the site into build/site, from the notebooks as they are, the guides and the docstrings: `make docs`.

Sphinx reads a copy of the repository's pages, laid out as in the repository, so that their links hold, with a page for
each part and each module beside them. Notebooks are not executed. Warnings are errors, and so is an internal link
that leads nowhere. Nothing is fetched, neither here nor by the pages.
"""

import os
import re
import shutil
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

ROOT = Path(__file__).resolve().parents[2]
SITE, SOURCES = ROOT / "build/site", ROOT / "build/site-sources"
CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = CONFIG["DEFAULT"]

PARTS = {  # section -> part -> the question of its page
    "Course": {
        "method": "How does a velocity turn noise into images, how can it explore, and what loss improves it?",
        "credit": "Which step of the sampler earned what?",
        "world": "What is a reward, and can a whole text-to-image world fit on a laptop?",
        "training": "How does a diffusers pipeline become a policy, and what does one epoch of its training do?",
    },
    "Reference": {
        "rewards": "What do the rewards of the field measure, and how does one bring one's own?",
        "evaluation": "When does a difference between two models mean something?",
        "models": "Where does the tiny model come from, and what do other models do differently?",
        "runs": "What does a run need so that it can be repeated, resumed and believed?",
        "practice": "Prompts, programs and costs, and SD3.5 on a task of one's own.",
        "lab": "Open questions, measured.",
    },
}
FOLDED_LINES = 20  # a cell with more lines of code is folded, unless it is exported
SCROLLED_LINES = 25  # an output with more lines of text scrolls


# --- which pages there are ---


def notebooks(part="*"):
    "The notebooks of a part, in their order."
    return sorted(ROOT.glob(f"nbs/{part}/[0-9]*.ipynb"), key=lambda path: path.name)


def start():
    "The first page: nbs/00_….ipynb, or the README."
    return next(iter(sorted(ROOT.glob("nbs/00_*.ipynb"))), ROOT / "README.md")


def lessons():
    "The notebooks of the evening's path on the first page: the course, without the library beneath it."
    text = start().read_text(encoding="utf-8").partition("**An evening**")[2].partition("**A quarter")[0]
    return [ROOT / "nbs" / found for found in re.findall(r"\]\((\w+/\d+_\w+\.ipynb)\)", text)]


def guides():
    readme = [] if start().name == "README.md" else [ROOT / "README.md"]
    return [*readme, *sorted(ROOT.glob("docs/*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def pages():
    "The files of the repository that are pages of the site, each once."
    return [start(), *notebooks(), *guides()]


def heading(path):
    "The title of a notebook, and the line below it."
    title, line = re.match(r"# (.+)\n+> (.+)", nbformat.read(path, as_version=4).cells[0].source).groups()
    return f"{path.name.partition('_')[0]} {title}", line


def module_of(path):
    "The module that a notebook defines, or None."
    named = re.search(r"#\| default_exp ([\w.]+)", path.read_text(encoding="utf-8"))
    return named and f"vgpo.{named[1]}"


# --- what Sphinx reads ---


def toctree(entries, caption=""):
    "A list of pages for the sidebar, not shown where it stands; entries are page names, or `title <page name>`."
    caption = f":caption: {caption}\n" if caption else ""
    return "\n".join(["```{toctree}", ":hidden:", caption, *entries, "```", ""])


def contents():
    "The sidebar: course, reference, guides, API."
    parts = {section: [f"/nbs/{part}/index" for part in parts] for section, parts in PARTS.items()}
    files = [f"/{path.relative_to(ROOT).with_suffix('')}" for path in guides()]
    api = [f"{part.capitalize()} </api/{part}>" for parts in PARTS.values() for part in parts]
    return "\n".join(toctree(entries, name) for name, entries in {**parts, "Guides": files, "API": api}.items())


def part_page(part, question):
    "The page of a part: its notebooks, lessons first, with what each is about."
    course = [path for path in notebooks(part) if path in lessons()]
    rest = [path for path in notebooks(part) if path not in course]
    groups = {"## Lessons": course, "## The library beneath": rest} if course else {"": rest}
    shown, entries = [], []
    for name, paths in groups.items():
        rows = [(path, *heading(path)) for path in paths]
        shown += [name, "", *(f"- [{title}]({path.name}): {line}" for path, title, line in rows), ""]
        entries += [f"{title} <{path.stem}>" for path, title, _ in rows]
    return "\n".join([f"# {part.capitalize()}", "", f"*{question}*", "", *shown, toctree(entries)])


def api_pages(part):
    "{name: page} of the modules that a part's notebooks define, and of a list of them."
    found = [(path, module_of(path), *heading(path)) for path in notebooks(part) if module_of(path)]
    shown = [f"- [`{module}`]({module}.md): {line}" for _, module, _, line in found]
    listed = toctree([module for _, module, _, _ in found])
    result = {part: "\n".join([f"# API: {part}", "", *shown, "", listed])}
    for path, module, title, _ in found:
        auto = f"```{{eval-rst}}\n.. automodule:: {module}\n```\n"
        name = module.replace("_", r"\_")  # or __main__ is bold
        result[module] = f"# {name}\n\nDerived in [{title}](../{path.relative_to(ROOT)}).\n\n{auto}"
    return result


def write_sources():
    "The files that Sphinx reads. Pages keep their dates, so that a second build reads only what changed."
    shutil.rmtree(SOURCES, ignore_errors=True)
    for path in [*pages(), *ROOT.glob("docs/*.png")]:
        (SOURCES / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, SOURCES / path.relative_to(ROOT))
    (SOURCES / "api").mkdir()
    for part, question in ((part, question) for parts in PARTS.values() for part, question in parts.items()):
        (SOURCES / "nbs" / part / "index.md").write_text(part_page(part, question), encoding="utf-8")
        for name, page in api_pages(part).items():
            (SOURCES / "api" / f"{name}.md").write_text(page, encoding="utf-8")


# --- what Sphinx makes of it: the text of a page while it is read ---


def linked(text, path):
    "Markdown with links to files that are no pages, sources for instance, made links to the repository."
    shown = {*pages(), *ROOT.glob("docs/*.png")}

    def replace(found):
        target = (path.parent / found[1]).resolve()
        if target in shown or not found[1] or ":" in found[1] or not target.exists():
            return found[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"]({SETTINGS['git_url']}/{kind}/{SETTINGS['branch']}/{target.relative_to(ROOT)}{found[2] or ''})"

    return re.sub(r"\]\(([^)\s#]*)(#[^)\s]*)?\)", replace, text)


def folded_exercises(text):
    "Markdown whose exercises are shown on demand."
    fold = "\\1\n\n<details class='exercises'>\n<summary>Show the exercises</summary>\n\n\\2\n\n</details>\n\n"
    return re.sub(r"(?ms)^(## Exercises)\n+(.+?)\s*(?=^#{1,6} |\Z)", fold, text)


def code_cell(cell):
    "A code cell as it is shown: without nbdev's lines, folded where it is long or asks for it; None if hidden."
    asked = cell.metadata.get("tags", [])
    lines = cell.source.splitlines()
    flags = [line[2:].strip() for line in lines if line.startswith("#|")]
    cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
    if "hide" in flags or not cell.source.strip():
        return None
    exported = any(flag.startswith("export") for flag in flags)
    texts = ["".join(output.get("text") or output.get("data", {}).get("text/plain") or "") for output in cell.outputs]
    long = len(cell.source.splitlines()) > FOLDED_LINES and not exported
    folded = "hide-cell" if "hide-cell" in asked else "hide-input" if long or "code-fold: true" in flags else None
    scrolled = any(text.count("\n") > SCROLLED_LINES for text in texts)
    cell.metadata["tags"] = [*([folded] if folded else []), *(["output_scroll"] if scrolled else [])]
    return cell


def about(path):
    "What stands below the introduction of a notebook: how to run it, and the module that it writes."
    module, file = module_of(path), path.relative_to(ROOT)
    up = "../" * (len(file.parts) - 1)
    writes = f"This notebook writes the module [`{module}`]({up}api/{module}.md).\n\n" if module else ""
    return nbformat.v4.new_markdown_cell(
        f"""{writes}<details class="run">
<summary>Run this notebook</summary>

With the project set up (`make setup`): `.venv/bin/jupyter lab {file}`. The rocket at the top of this page opens it on
Binder, where everything is installed, or on Colab, where a first cell has to install the package:
`%pip install -q git+{SETTINGS["git_url"]}`

</details>"""
    )


def notebook(text, path):
    "The JSON of a notebook as it is shown."
    nb, answer = nbformat.reads(text, as_version=4), None
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = folded_exercises(linked(cell.source, path))
            answer = re.match(r"<details><summary>(Answer \d+)</summary>", cell.source)
        elif answer and "hide-cell" in cell.metadata.get("tags", []):
            shown, hidden = (f"{answer[1]}: {verb} the code and its output" for verb in ("show", "hide"))
            cell.metadata["mystnb"] = {"code_prompt_show": shown, "code_prompt_hide": hidden}
    shown = [code_cell(cell) if cell.cell_type == "code" else cell for cell in nb.cells]
    nb.cells = [cell for cell in shown if cell is not None]
    nb.cells.insert(1, about(path))
    if path == start():
        nb.cells.append(nbformat.v4.new_markdown_cell(contents()))
    return nbformat.writes(nb)


def page(text, path):
    "The text of any page of the repository as it is shown."
    if path.suffix == ".ipynb":
        return notebook(text, path)
    return linked(text, path) + ("\n\n" + contents() if path == start() else "")


# --- the links of the result ---


class Links(HTMLParser):
    "The ids of a page, and what it refers to."

    def __init__(self, path):
        super().__init__()
        self.ids, self.targets = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("id", "name"):
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.targets.add(value)


def dead_links(site):
    "Links within a built site that lead nowhere, as lines of text."
    pages = sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)
    found, dead = {str(path): Links(path) for path in pages}, []
    for page, links in found.items():
        for target in sorted(links.targets):
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            file = os.path.normpath(os.path.join(os.path.dirname(page), unquote(url.path))) if url.path else page
            anchored = not url.fragment or file not in found or unquote(url.fragment) in found[file].ids
            if not (anchored and (file in found or os.path.isfile(file))):
                dead.append(f"{os.path.relpath(page, site)}: {target}")
    return dead


def main():
    from sphinx.cmd.build import main as sphinx  # here, so that the tests of the functions above need no Sphinx

    write_sources()
    shutil.rmtree(SITE, ignore_errors=True)  # or pages that are no more would stay
    options = ["-W", "--keep-going", "-q", "-c", str(Path(__file__).parent), "-d", str(ROOT / "build/site-doctrees")]
    if code := sphinx([*options, *sys.argv[1:], str(SOURCES), str(SITE)]):
        return code
    name = start().relative_to(ROOT).with_suffix(".html")
    (SITE / "index.html").write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={name}">\n')
    dead = dead_links(SITE)
    print(*dead, f"{len(pages())} pages of the repository in {SITE / 'index.html'}, {len(dead)} dead links", sep="\n")
    return int(bool(dead))


if __name__ == "__main__":
    sys.exit(main())
