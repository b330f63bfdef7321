# SPDX-License-Identifier: Apache-2.0
"""The notebooks of colab/ run from top to bottom, and are what their .py files say."""

import os

import pytest
from paths import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
jupytext = pytest.importorskip("jupytext")

SOURCES = sorted((ROOT / "colab").glob("*.py"))


def test_there_are_notebooks():
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebooks_match_their_sources(source):
    written = jupytext.read(source)
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in written.cells], (
        f"run `jupytext --to ipynb {source.relative_to(ROOT)}`"
    )
    assert not any(cell.get("outputs") for cell in notebook.cells), "notebooks are kept without outputs"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs(source, tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=1000, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and [cell.execution_count for cell in cells] == list(range(1, 1 + len(cells)))
    said = [output for cell in cells for output in cell.outputs]
    assert said and not [output for output in said if output.output_type == "error"]
