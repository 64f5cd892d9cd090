"""Every notebook runs from beginning to end at its own small size, and is kept with what it showed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXTRAS = ("nbclient", "nbformat", "ipykernel", "matplotlib")
MISSING = [name for name in EXTRAS if importlib.util.find_spec(name) is None]


def named(notebook: Path) -> str:
    return notebook.stem


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'flexgen_hf[notebooks]'")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_a_notebook_runs(notebook, monkeypatch, tmp_path):
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    for name in ("MODEL", "TEXT", "WINDOW", "MAX_TOKENS"):
        monkeypatch.delenv(name, raising=False)
    read = nbformat.read(notebook, as_version=4)
    client = nbclient.NotebookClient(
        read, timeout=550, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}}
    )
    client.execute()  # an error in a cell is raised here
    shown = [output for cell in read.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_a_notebook_is_kept_with_small_outputs_of_one_run_and_without_errors(notebook):
    assert notebook.stat().st_size < 200_000
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell["outputs"]]
    assert shown
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in shown)
