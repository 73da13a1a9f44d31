"Every notebook runs from top to bottom, and what is stored of it shows outputs and no error."

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "nbs"
NOTEBOOKS = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.ipynb"))
TIMEOUT = 300  # seconds a cell


def skipped(cell):
    "Cells that nbdev does not evaluate either: flagged `eval: false` or `gpu`."
    flags = [line.lstrip("#| ").strip() for line in cell.source.splitlines() if line.startswith("#|")]
    return cell.cell_type == "code" and ("eval: false" in flags or "gpu" in flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A copy of the notebooks' folder: what they write is not to be kept."
    return shutil.copytree(
        FOLDER, tmp_path_factory.mktemp("notebooks") / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_executes(folder, monkeypatch, name):
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(folder / name, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not skipped(cell)]
    NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": (folder / name).parent}}
    ).execute()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_stored_with_outputs_and_without_errors(name):
    cells = nbformat.read(FOLDER / name, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs, f"{name} is stored without outputs: execute it"
    assert not [output for output in outputs if output.output_type == "error"]
    assert "site-packages" not in json.dumps(outputs), f"{name} shows a path of the machine that it ran on"
    assert cells[0].source.startswith("# ")
