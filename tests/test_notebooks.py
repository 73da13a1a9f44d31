"Every notebook runs from top to bottom, and what is stored of it shows outputs and no error."

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "nbs"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
TIMEOUT = 300  # seconds a cell


def skipped(cell):
    "Cells that nbdev does not evaluate either: flagged `eval: false` or `gpu`."
    flags = [line.lstrip("#| ").strip() for line in cell.source.splitlines() if line.startswith("#|")]
    return cell.cell_type == "code" and ("eval: false" in flags or "gpu" in flags)


def execute(path):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not skipped(cell)]
    NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()


@pytest.fixture(scope="module")
def executions(request, tmp_path_factory):
    "The notebooks that were asked for, executing two at a time, with one thread each, in a copy of their folder."
    folder = tmp_path_factory.mktemp("notebooks") / "nbs"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    names = [item.callspec.params["name"] for item in request.session.items if item.name.startswith("test_executes[")]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(variable, os.environ.get(variable, "1"))
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        yield {name: pool.submit(execute, folder / name) for name in names}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_executes(executions, name):
    executions[name].result()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_stored_with_outputs_and_without_errors(name):
    cells = nbformat.read(FOLDER / name, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs, f"{name} is stored without outputs: execute it"
    assert not [output for output in outputs if output.output_type == "error"]
    assert cells[0].source.startswith("# ")
