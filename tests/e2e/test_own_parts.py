# SPDX-License-Identifier: Apache-2.0
"""docs/own_parts.md, word for word: a model and a dataset from a package outside of lionjax."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

PAGE = (ROOT / "docs" / "own_parts.md").read_text()
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 30)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The page's files, and images of one color with a little noise."""
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    files = re.findall(r"`(color_parts/\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert [name for name, _ in files] == ["color_parts/data.py", "color_parts/model.py", "color_parts/config.py"]
    for directory in ("color_parts", "colors"):
        (folder / directory).mkdir()
    for name, text in files:
        (folder / name).write_text(text)
    for name, rgb in COLORS.items():
        for number in range(10):
            pixels = np.clip(rng.normal(rgb, 20, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "colors" / f"{name}_{number}.png")
    return folder


def commands() -> tuple[list[list[str]], dict[str, str]]:
    """The page's command lines without `lionjax`, and what it exports."""
    (block,) = re.findall(r"```\n(export .*?)```", PAGE, re.DOTALL)
    lines = block.strip().split("\n")
    exported = dict(line.split(" ", 1)[1].split("=") for line in lines if line.startswith("export"))
    quoted = [re.findall(r'"[^"]*"|\S+', line)[1:] for line in lines if line.startswith("lionjax")]
    return [[word.strip('"') for word in words] for words in quoted], exported


def run(folder: Path, words: list[str], **env: str) -> subprocess.CompletedProcess:
    """A command line in the folder; `.` on Python's path is followed by that of this checkout."""
    path = os.pathsep.join([env.get("PYTHONPATH", ""), str(ROOT)])
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | env | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "lionjax", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_a_model_and_a_dataset_of_another_package_train_evaluate_and_answer(folder):
    (train, evaluate, generate), exported = commands()
    allowed = exported.pop("LIONJAX_ALLOW_PACKAGES")
    done = run(folder, train, **exported)
    assert done.returncode == 0, done.stderr
    recorded = json.loads((folder / "runs/colors/config.json").read_text())
    assert recorded["model"]["class"] == "color_parts.model:MeanColorLM"

    refused = run(folder, generate, **exported)
    assert refused.returncode == 2
    assert "'color_parts'; if you trust this package, set LIONJAX_ALLOW_PACKAGES=color_parts" in refused.stderr

    exported["LIONJAX_ALLOW_PACKAGES"] = allowed
    done = run(folder, [*evaluate, "--json"], **exported)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["metrics"]["vqa_accuracy"] == 1.0
    done = run(folder, generate, **exported)
    assert done.stdout.split() == ["red"], done.stderr
