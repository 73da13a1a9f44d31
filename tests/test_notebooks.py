"""Every notebook runs from top to bottom, and what is stored of it shows outputs and no error.

Each runs in a process of its own, forked from one that has imported the large libraries, as that takes longer than most
notebooks do.
"""

import json
import os
import re
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from execnb.nbio import read_nb
from execnb.shell import CaptureShell

FOLDER = Path(__file__).parent.parent / "nbs"
NOTEBOOKS = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.ipynb"))
TIMEOUT = 600  # seconds of a notebook
LIBRARIES = [
    "accelerate",
    "diffusers",
    "execnb.shell",
    "matplotlib.pyplot",
    "peft",
    "pytest",
    "scipy.stats",
    "torch",
    "transformers",
    "vgpo.runs.session",
]


def skipped(cell):
    "Cells that nbdev does not evaluate either: flagged `eval: false` or `gpu`."
    flags = [line.lstrip("#| ").strip() for line in cell.source.splitlines() if line.startswith("#|")]
    return cell.cell_type == "code" and ("eval: false" in flags or "gpu" in flags)


def execute(path):
    "Run a notebook in this process, in the folder where it lies; RuntimeError that shows its first cell that fails."
    signal.alarm(TIMEOUT)
    os.chdir(path.parent)
    shell = CaptureShell(path)
    try:
        shell.run_all(read_nb(path), exc_stop=True, preproc=skipped)
    except Exception:
        raise RuntimeError(shell.prettytb(path)) from None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A copy of the notebooks' folder, beside the results that some read: what they write is not to be kept."
    root = tmp_path_factory.mktemp("notebooks")
    shutil.copytree(FOLDER.parent / "benchmarks", root / "benchmarks")
    return shutil.copytree(FOLDER, root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))


@pytest.fixture(scope="module")
def processes():
    "How to start a process that has imported the libraries, and has one thread."
    found = get_context("forkserver")
    found.set_forkserver_preload(LIBRARIES)
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(variable, "1")
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        yield found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_executes(folder, processes, name):
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        pool.submit(execute, folder / name).result()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_stored_with_outputs_and_without_errors(name):
    cells = read_nb(FOLDER / name).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs, f"{name} is stored without outputs: execute it"
    assert not [output for output in outputs if output.output_type == "error"]
    for place in ("site-packages", "/tmp/"):
        assert place not in json.dumps(outputs), f"{name} shows a path of the machine that it ran on"
    assert cells[0].source.startswith("# ")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_exercise_has_an_answer(name):
    texts = [cell.source for cell in read_nb(FOLDER / name).cells if cell.cell_type == "markdown"]
    asked = [text.partition("## Exercises")[2] for text in texts]
    exercises = [number for text in asked for number in re.findall(r"(?m)^(\d+)\. ", text)]
    assert re.findall(r"<summary>Answer (\d+)</summary>", "\n".join(texts)) == exercises
