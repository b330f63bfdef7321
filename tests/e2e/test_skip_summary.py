# SPDX-License-Identifier: Apache-2.0
"""The end of a run says what was skipped for want of torch and of shared data."""

import os
import subprocess
import sys

import pytest
from paths import HELPERS, TESTS

WHOLE = """
import sys

import pytest

sys.modules["transformers"] = None  # as where it is not installed
pytest.importorskip("transformers")


def test_never_seen():
    pass
"""
SINGLE = """
import sys

import pytest
import shared_data

sys.modules["torch"] = None


def test_first():
    pytest.importorskip("torch")


def test_second():
    pytest.importorskip("torch")


def test_other_reason():
    pytest.importorskip("gone")


@shared_data.needs("photographs")
@pytest.mark.parametrize("name", ["one", "two"])
def test_photographs(name):
    pass
"""


def end_of(folder, *words) -> str:
    """The last part of what a run of the tests in a folder prints."""
    for path in (TESTS / "conftest.py", HELPERS / "compile_flags.py", HELPERS / "shared_data.py"):
        (folder / path.name).write_text(path.read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), *words]
    variables = os.environ | {"LIONJAX_DATA": str(folder / "nowhere")}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.rpartition("not compared")[2]


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_what_was_skipped_for_want_of_torch_and_of_data_is_summed_up(tmp_path, words):
    (tmp_path / "test_whole.py").write_text(WHOLE)
    (tmp_path / "test_single.py").write_text(SINGLE)
    said = end_of(tmp_path, *words).splitlines()
    wanted = "2 tests and 1 whole files (test_whole.py) skipped for want of torch or transformers"
    assert wanted in said
    at = said.index("2 skipped for want of shared data ($LIONJAX_DATA):")
    names = [f"  test_single.py::test_photographs[{name}]" for name in ("one", "two")]
    assert said[at + 1 : at + 3] == names


@pytest.mark.slow
def test_nothing_is_said_where_nothing_was_skipped(tmp_path):
    (tmp_path / "test_single.py").write_text("def test_first():\n    pass\n")
    assert "for want of" not in end_of(tmp_path)
