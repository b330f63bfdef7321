# SPDX-License-Identifier: Apache-2.0
"""What the repository holds: only expected files, modules and functions of readable size, names of the field."""

import ast
import re
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
THIS_FILE = Path("tests/unit/test_repository.py")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 70
# Verbs and adverbs that say nothing to a reader who knows the papers and libraries; no function has such a name.
PRIVATE_VERBS = set(
    "ask asked begin everything given hear heard here kept know known look made near put said say see seen shown take "
    "tell told turn waves where".split()
)
# British spellings, whose American ones the code and the docs have.
_OUR = "armour behaviour colour favour flavour harbour honour labour neighbour rumour tumour vapour vigour"
_RE = "calibre centre fibre litre metre spectre theatre"
_DOUBLED = "cancell channell fuell labell levell marvell modell signall totall travell tunnell"
_ISE = (
    "author capital categor character custom emphas equal factor final general harmon initial legal local material "
    "maxim memor minim modern normal optim organ parallel penal prior quant random real recogn regular serial special "
    "stabil standard summar symbol synchron token util vector visual"
)
_OTHERS = (
    "analyse analysed analyser analysing artefact artefacts catalogue defence grey greys judgement licence offence"
)
BRITISH = re.compile(
    rf"({'|'.join(_OUR.split())})\w*|({'|'.join(_RE.split())})(s|d)?|({'|'.join(_DOUBLED.split())})(ed|er|ing)"
    rf"|({'|'.join(_ISE.split())})is(e|ed|er|ers|es|ing|ation|ations)|{'|'.join(_OTHERS.split())}"
)
# Words that files and scripts of version 0.1 hold, and tests of spellings.
KEPT_BRITISH = {
    ("lionjax/training/loop.py", "optimiser"),
    ("lionjax/training/run_folder.py", "optimiser"),
    ("lionjax/cli/plan.py", "utilisation"),
    ("lionjax/models/language/decoder.py", "centred"),
    ("docs/old_versions.md", "centred"),
    ("tests/unit/data/test_datasets.py", "colour"),  # a kind that does not exist
    ("lionjax/evaluation/published/open_answers.py", "normalised"),  # a figure's name, as its file of truths has it
    ("lionjax/evaluation/published/scoring.py", "normalised"),
    ("benchmarks/scorers.py", "normalisers"),
    ("tests/unit/evaluation/test_benchmark_scorers.py", "normalisers"),
    ("tests/unit/evaluation/test_protocols.py", "normalised"),
}
TEXT_SUFFIXES = {".css", ".html", ".js", ".md", ".py", ".sbatch", ".sh", ".toml", ".yml"}


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


def spelled_british(text: str) -> set[str]:
    """The British words of a text, lower-case; words end at underscores and capitals, as in identifiers."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)
    return {word.lower() for word in words if BRITISH.fullmatch(word.lower())}


@pytest.mark.parametrize("text", ["fill_colour", "optimiserState", "GREY", "the centred one", "labelled", "modelling"])
def test_british_spellings_are_found_in_prose_and_names(text):
    assert spelled_british(text)


def test_american_spellings_are_not_taken_for_british():
    text = "fill_color optimizer gray centered labeled modeling analyses promised raised surprise precise parallelism"
    assert spelled_british(text) == set()


def test_code_and_docs_are_in_american_spelling():
    texts = {path: (ROOT / path).read_text() for path in tracked() if path.suffix in TEXT_SUFFIXES}
    texts = {path: text for path, text in texts.items() if path != THIS_FILE and path.parts[:2] != ("tests", "data")}
    found = {(str(path), word) for path, text in texts.items() for word in spelled_british(text)}
    assert found - KEPT_BRITISH == set()
