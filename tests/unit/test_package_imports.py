# SPDX-License-Identifier: Apache-2.0
"""One table says which package may import which. Reads all imports of the source, also those inside functions."""

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "lionjax"

MAY_IMPORT = {
    "core": "",
    "nn": "core",
    "models": "core nn",
    "data": "core",
    "convert": "core nn models",
    "training": "core data convert",
    "inference": "core nn models data convert training",
    "evaluation": "core data inference",
    "pipelines": "core data inference evaluation",
    "planner": "core nn data training inference",
    "tiny": "core nn models data training evaluation",
    "cli": "core nn models data convert training inference evaluation pipelines planner tiny",
}
TOP_FILES = {"__init__.py", "__main__.py", "py.typed"}
# Only these know the libraries in which models are written; others call a model through `core.types`.
KNOW_FLAX = {"core.sharding", "nn", "models", "tiny"}
# Only conversion knows that the originals' frameworks exist, and only inside functions.
ORIGINALS = {"torch", "transformers", "tensorflow"}
ACCELERATED = {"jax", "flax", "optax", "orbax"}  # data makes numpy arrays


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str, source: str):
    """Each import of a source text: (full dotted name, whether it stands inside a function)."""
    tree = ast.parse(source)
    for_editors = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in for_editors:  # never executed
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                here = ["lionjax", *module.split(".")]
                up = node.level - (FILES.get(module, Path()).name == "__init__.py")
                start = ".".join([*here[: len(here) - up], *filter(None, [node.module])])
            yield from ((f"{start}.{alias.name}", id(node) in inside) for alias in node.names)


def module_in(name: str) -> str | None:
    """The module of this package that a dotted name lies in: 'lionjax.nn.lora.LoraConfig' is in 'nn.lora'."""
    parts = name.split(".")
    if parts[0] != "lionjax":
        return None
    parts = ["pipelines", "loading"] if parts[1:] == ["load"] else parts[1:]
    while parts and ".".join(parts) not in FILES:
        parts.pop()
    return ".".join(parts)


def complaints(module: str, source: str) -> list[str]:
    """What a module imports that it may not, each as a sentence."""
    package, found = module.split(".")[0], []
    allowed = {package, "", *MAY_IMPORT[package].split()}
    for name, inside in imports(module, source):
        root, target = name.split(".")[0], module_in(name)
        if root == "flax" and not {module, package} & KNOW_FLAX:
            found.append(f"{module} imports {name}; flax is for {', '.join(sorted(KNOW_FLAX))}")
        if root in ORIGINALS and not (inside and package == "convert"):
            found.append(f"{module} imports {name}; only convert may, and inside a function")
        if root in ACCELERATED and package == "data":
            found.append(f"{module} imports {name}; data makes numpy arrays and knows no model")
        if target is not None and target.split(".")[0] not in allowed:
            found.append(f"{module} imports {target}; {package} may import {MAY_IMPORT[package] or 'nothing'}")
    return found


@pytest.mark.parametrize("module", [name for name in FILES if name not in ("", "__main__")])
def test_module_imports_only_what_the_table_allows(module):
    assert complaints(module, FILES[module].read_text()) == []


def test_the_package_has_at_most_14_entries_and_the_table_lists_each_without_a_cycle():
    entries = {path.name for path in PACKAGE.iterdir() if path.is_file() or any(path.rglob("*.py"))}
    assert entries - TOP_FILES == MAY_IMPORT.keys() and len(entries) <= 14
    graphlib.TopologicalSorter({name: may.split() for name, may in MAY_IMPORT.items()}).prepare()


def test_no_two_modules_import_each_other():
    graph = {
        module: {module_in(name) for name, _ in imports(module, path.read_text())} - {None, "", module}
        for module, path in FILES.items()
        if module
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle
    assert "core.types" in graph["core.params"], "no import was found"


@pytest.mark.parametrize(
    "module, source",
    [
        ("core.types", "def f():\n    from lionjax import cli"),
        ("nn.layers", "from lionjax.models.vision import vit"),
        ("models.vlm.lion", "from lionjax.training import loop"),
        ("training.loop", "from ..models.vlm.lion import Lion"),
        ("training.loop", "from lionjax.evaluation import metrics"),
        ("data.mixture", "import jax.numpy as jnp"),
        ("data.mixture", "from lionjax.nn.layers import Dense"),
        ("core.config", "from flax import linen"),
        ("training.step", "import flax.linen as nn"),
        ("inference.generate", "def f():\n    import torch"),
        ("convert.io.reader", "import torch"),
        ("convert.io.reader", "from lionjax import load"),
        ("convert", "def f():\n    from ..inference import model"),
    ],
)
def test_a_forbidden_import_is_reported(module, source):
    assert len(complaints(module, source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("nn.attention", "from lionjax.nn.layers import Dense"),
        ("models.vision.swin", "import flax.linen as nn\nfrom lionjax.nn import attention"),
        ("evaluation.runner", "from lionjax.inference import engine\nfrom . import metrics"),
        ("data.mixture", "import numpy as np\nfrom lionjax.data.scenes import world"),
        ("convert.io.reader", "def f():\n    import torch"),
        ("cli.entry", "from lionjax import __version__, load"),
    ],
)
def test_an_allowed_import_is_not_reported(module, source):
    assert complaints(module, source) == []


def test_importing_the_package_loads_nothing_heavy():
    heavy = "torch tensorflow tensorflow_datasets grain transformers jax flax matplotlib numpy"
    code = f"import sys, lionjax.convert, lionjax.planner; print([m for m in {heavy.split()} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.strip() == "[]", said.stdout + said.stderr


def test_load_and_convert_are_imported_on_first_use_and_unknown_names_are_refused():
    code = "import lionjax; print(lionjax.convert.from_torch, lionjax.load, lionjax.__version__)\nlionjax.lode"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "from_torch" in said.stdout and "load" in said.stdout
    assert "lionjax has no attribute 'lode'" in said.stderr


@pytest.mark.parametrize("package", ["convert", "planner"])
def test_a_package_gives_each_name_that_it_offers_and_refuses_others(package):
    loaded = importlib.import_module(f"lionjax.{package}")
    assert all(callable(getattr(loaded, name)) or name.isupper() for name in loaded.__all__)
    with pytest.raises(AttributeError, match=f"lionjax.{package} has no attribute 'lode'"):
        _ = loaded.lode
