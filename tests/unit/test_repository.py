# SPDX-License-Identifier: Apache-2.0
"""What the repository holds: only expected files, modules and functions of readable size, names of the field."""

import ast
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
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 70
# Verbs and adverbs that say nothing to a reader who knows the papers and libraries; no function has such a name.
PRIVATE_VERBS = set(
    "ask asked begin everything given hear heard here kept know known look made near put said say see seen shown take "
    "tell told turn waves where".split()
)


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


def functions(path: Path):
    """(name, number of lines) of every function in a file, also of nested ones."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def modules() -> list[Path]:
    return [path for path in tracked() if path.parts[0] == "lionjax" and path.suffix == ".py"]


def test_no_function_is_named_by_a_private_verb():
    found = [f"{path}: {name}" for path in modules() for name, _ in functions(path) if name.strip("_") in PRIVATE_VERBS]
    assert found == []


def test_no_module_and_no_function_is_too_long_to_read():
    long = [f"{path}: {name}" for path in modules() for name, lines in functions(path) if lines > MAX_FUNCTION_LINES]
    long += [str(path) for path in modules() if len((ROOT / path).read_text().splitlines()) > MAX_FILE_LINES]
    assert long == []
