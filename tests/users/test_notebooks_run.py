# SPDX-License-Identifier: Apache-2.0
"""The notebooks of colab/ from top to bottom, as their users run them (`make test-users`)."""

import os

import pytest
from paths import ROOT

if not os.environ.get("LIONJAX_USERS"):
    pytest.skip("run by `make test-users`", allow_module_level=True)
import nbclient
import nbformat

NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
MAX_SECONDS = 300  # of one on two cores
FEW_STEPS = {"LIONJAX_STEPS": "60"}  # where a notebook asks for them


@pytest.mark.timeout(3 * MAX_SECONDS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for name in ("XLA_FLAGS", "PJRT_NPROC", "JAX_DISABLE_MOST_OPTIMIZATIONS"):  # of the tests, which users do not set
        monkeypatch.delenv(name, raising=False)
    for name, value in FEW_STEPS.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=2 * MAX_SECONDS, kernel_name="python3").execute(cwd=str(tmp_path))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and [cell.execution_count for cell in cells] == list(range(1, 1 + len(cells)))
    said = [output for cell in cells for output in cell.outputs]
    assert said and not [output for output in said if output.output_type == "error"]
