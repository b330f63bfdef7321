# SPDX-License-Identifier: Apache-2.0
"""Every figure that the benchmarks' own scorers gave for invented files, by the command line and without a model."""

import json

import pytest

from benchmarks import scorers

EXPECTED = json.loads((scorers.FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module")
def table():
    return scorers.rows()


def test_the_table_has_every_figure_but_meteor(table):
    assert len(table) == 236
    assert {path.split("/")[0] if "normalisers" in path else "/".join(path.split("/")[:2]) for path, *_ in table} == {
        *EXPECTED
    }


@pytest.mark.parametrize("key", EXPECTED)
def test_figures_equal_those_of_the_original_scorers(table, key):
    rows = [row for row in table if row[0].startswith(f"{key}/")]
    assert rows and [row for row in rows if not row[3]] == []
