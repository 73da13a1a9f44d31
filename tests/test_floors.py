"""The house stands as its notebooks are numbered: no circle, no import forwards, one meaning per name, and sizes.

A module's floor is the number of the notebook that defines it (its `#| default_exp`), read and not written down here.
"""

import ast
import importlib
import re
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import pytest
from execnb.nbio import read_nb

ROOT = Path(__file__).parents[1]
PARTS = "method credit world training rewards evaluation models runs practice lab".split()  # in their order
START = ROOT / "nbs" / "00_start.ipynb"  # the first page lies before all parts and shows what all of them make
NOTEBOOKS = sorted({*(ROOT / "nbs").rglob("[0-9]*.ipynb")} - {START}, key=lambda path: path.name)
IDS = [path.stem for path in NOTEBOOKS]
METHOD_LINES, LINES, TRAINER_LINES = 150, 300, 250  # of code in a module, without docstrings, comments, empty lines
CELL_LINES = 25  # of code in an exported cell
SHOWN = "vgpo.motion"  # shows what a notebook made and knows nothing of the library: the early lessons want it, their modules don't
IN_A_ROW = 3  # exported cells without a check, a picture or a number between them


def number(path):
    "The number of a notebook."
    return int(path.name.partition("_")[0])


@lru_cache
def code(path):
    "The code cells of a notebook, without empty ones."
    cells = read_nb(path).cells
    return [cell.source for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def flags(source):
    return [line.lstrip("#| ").strip() for line in source.splitlines() if line.startswith("#|")]


def exported(source):
    return any(flag.split()[0] in ("export", "exports", "exporti") for flag in flags(source) if flag)


def plain(source):
    "The Python of a cell, without magics."
    return "\n".join(line for line in source.splitlines() if not re.match(r"\s*[%!]", line))


def code_lines(source):
    "The number of lines of code, without docstrings, comments and empty lines."
    tree, docs = ast.parse(source), set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for part in body if isinstance(body, list) else []:
            if isinstance(part, ast.Expr) and isinstance(getattr(part.value, "value", None), str):
                docs |= set(range(part.lineno, part.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and i not in docs for i, line in lines)


@lru_cache
def writers():
    "{module: the notebooks that write it, in their order}: mostly one, but a module may grow later."
    found = defaultdict(list)
    for path in NOTEBOOKS:
        for flag in (flag for source in code(path) for flag in flags(source)):
            named = re.fullmatch(r"(?:default_exp|exports?) ([\w.]+)", flag)
            if named and path not in found[f"vgpo.{named[1]}"]:
                found[f"vgpo.{named[1]}"].append(path)
    return dict(found)


@lru_cache
def defined():
    "{module: the notebook that defines it}, the first of those that write it."
    return {module: paths[0] for module, paths in writers().items()}


def file_of(module):
    return ROOT / Path(*module.split(".")).with_suffix(".py")


def imported(tree, module=None):
    "The modules of vgpo that a syntax tree imports, wherever in it; `module` is the one whose tree it is."
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names] + [base]
    return {name for name in names if name in defined()}


@lru_cache
def module_imports():
    "{module: modules of vgpo that it imports}."
    return {module: imported(ast.parse(file_of(module).read_text()), module) for module in defined()}


# --- order ---


def test_notebooks_have_numbers_of_their_own_and_rise_from_part_to_part():
    assert {path.parent.name for path in NOTEBOOKS} == set(PARTS)
    assert all(path.parent.parent == ROOT / "nbs" for path in NOTEBOOKS)
    twice = [n for n, count in Counter(map(number, NOTEBOOKS)).items() if count > 1]
    assert not twice
    for lower, upper in zip(PARTS, PARTS[1:], strict=False):
        numbers = [[number(path) for path in NOTEBOOKS if path.parent.name == part] for part in (lower, upper)]
        assert max(numbers[0]) < min(numbers[1]), f"{lower} before {upper}"


def test_the_first_page_writes_no_module():
    assert not [flag for source in code(START) for flag in flags(source) if re.match("default_exp|export", flag)]


def test_every_module_has_its_notebook():
    here = {path for path in (ROOT / "vgpo").rglob("*.py") if path.name not in ("__init__.py", "_modidx.py")}
    assert {file_of(module) for module in defined()} == here


@pytest.mark.parametrize("module", sorted(defined()))
def test_a_module_imports_only_what_is_below(module):
    floor = writers()[module][-1]
    above = {name for name in module_imports()[module] - {module} if number(defined()[name]) > number(floor)}
    assert not above, f"{module} is of {floor.stem}, and imports " + ", ".join(
        f"{name} of {defined()[name].stem}" for name in sorted(above)
    )


def test_no_module_imports_itself_in_a_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for name in sorted(module_imports()[module] - {module}):
                visit(name)
            path.pop()
            done.add(module)

    for module in sorted(defined()):
        visit(module)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_a_notebook_imports_no_later_one(path):
    later = set()
    for source in code(path):
        names = imported(ast.parse(plain(source)))
        if not exported(source):
            names.discard(SHOWN)
        later |= {name for name in names if number(defined()[name]) > number(path)}
    assert not later, ", ".join(f"{name} of {defined()[name].stem}" for name in sorted(later))


# --- names ---


def test_a_name_means_one_thing():
    "Of two modules that both export a name it must be one object; each program has a `main`."
    meanings = defaultdict(dict)
    for module in sorted(defined()):
        loaded = importlib.import_module(module)
        for name in getattr(loaded, "__all__", []):
            meanings[name].setdefault(id(getattr(loaded, name)), module)
    twice = {name: sorted(found.values()) for name, found in meanings.items() if len(found) > 1 and name != "main"}
    assert not twice


# --- sizes ---


@pytest.mark.parametrize("module", sorted(defined()))
def test_a_module_is_no_longer_than_one_can_read(module):
    part, lines = defined()[module].parent.name, code_lines(file_of(module).read_text())
    limit = TRAINER_LINES if module == "vgpo.trainer" else METHOD_LINES if part in ("method", "credit") else LINES
    assert lines <= limit


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_an_exported_cell_is_no_longer_than_one_can_see(path):
    long = []
    for source in code(path):
        lines = [line for line in source.strip().splitlines() if not line.startswith("#|")]
        head = all(re.match(r"(from|import|#|$|\s|[)\]}])", line) for line in lines)  # a cell of imports alone
        count = code_lines(plain(source)) if exported(source) else 0
        if count > CELL_LINES and not head:
            long.append((count, lines[0]))
    assert not long


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_what_is_exported_is_shown_soon(path):
    rows, row = [], []
    for source in [*code(path), ""]:
        body = [line for line in source.strip().splitlines() if not line.startswith("#|")]
        if exported(source) and not all(re.match(r"(from|import|#|$|\s|[)\]}])", line) for line in body):
            row.append(body[0])
        elif not flags(source):
            rows, row = [*rows, row], []
    assert not [row for row in rows if len(row) > IN_A_ROW]
