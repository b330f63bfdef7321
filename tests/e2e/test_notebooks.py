# SPDX-License-Identifier: Apache-2.0
"""The notebooks of colab/ are what their .py files say, and README links to each; `make test-users` runs them."""

import pytest
from paths import ROOT

nbformat = pytest.importorskip("nbformat")
jupytext = pytest.importorskip("jupytext")

SOURCES = sorted((ROOT / "colab").glob("*.py"))


def test_there_are_notebooks_and_readme_links_to_each():
    readme = (ROOT / "README.md").read_text()
    assert SOURCES and [f for f in SOURCES if f"](colab/{f.stem}.ipynb)" not in readme] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebooks_match_their_sources(source):
    written = jupytext.read(source)
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in written.cells], (
        f"run `jupytext --to ipynb {source.relative_to(ROOT)}`"
    )
    assert not any(cell.get("outputs") for cell in notebook.cells), "notebooks are kept without outputs"
