# SPDX-License-Identifier: Apache-2.0
"""What lies in the repository: nothing that nobody meant to commit."""

import subprocess
from pathlib import Path

import pytest
from paths import ROOT

EXPECTED = {
    *(".ci .gitignore LICENSE Makefile README.md pyproject.toml mkdocs.yml".split()),
    *("benchmarks colab configs docs launch lionjax lock tests".split()),
    *("CHANGELOG.md CITATION.cff CONTRIBUTING.md".split()),
}
NEVER = {".whl", ".gz", ".zip", ".tar", ".log", ".pyc"}


def tracked() -> list[Path]:
    """Paths of all tracked files, relative to the root; skips outside a git checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def test_root_holds_only_expected_entries():
    assert {path.parts[0] for path in tracked()} - EXPECTED == set()


def test_no_build_products_or_archives_are_tracked():
    found = [str(path) for path in tracked() if path.suffix in NEVER and path.parts[0] != "tests"]
    assert found == []
