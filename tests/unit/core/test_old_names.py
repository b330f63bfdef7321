# SPDX-License-Identifier: Apache-2.0
"""Module paths and names of version 0.1 that its documentation showed still work, and say in one line what is new."""

import importlib
import subprocess
import sys

import pytest

from lionjax.core import moved

# What the documentation of 0.1 called, and what it is today.
DOCUMENTED = {
    "lionjax.layers.LoraConfig": "lionjax.nn.lora.LoraConfig",
    "lionjax.convert.verify.verify": "lionjax.convert.verify.verify",
    "lionjax.convert.placed.save_orbax": "lionjax.convert.orbax_folder.save_orbax",
    "lionjax.convert.table_of": "lionjax.convert.torch_folder.weight_map_of",
    "lionjax.evaluation.report.report": "lionjax.evaluation.report.html.write_report",
    "lionjax.data.scenes.World": "lionjax.data.scenes.world.WorldConfig",
    "lionjax.tagger.load": "lionjax.inference.tagger.load",
    "lionjax.tagger.Found": "lionjax.inference.tagger.TagResult",
}


def get(dotted: str):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("old", DOCUMENTED)
def test_a_documented_name_of_0_1_is_the_object_of_today(old):
    assert get(old) is get(DOCUMENTED[old])


def test_every_renamed_name_is_found_in_its_old_module():
    missing = []
    for module, old in moved.RENAMED:
        if module == "data.beam_writer":  # needs Apache Beam, an extra
            continue
        if not hasattr(importlib.import_module(f"lionjax.{module}"), old):
            missing.append(f"lionjax.{module}.{old}")
    assert not missing


def test_an_old_module_is_an_attribute_of_its_package_and_says_its_new_path_once():
    program = (
        "import lionjax; lionjax.convert.placed.save_orbax; lionjax.convert.placed.save_orbax; lionjax.layers.Dense"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert said.splitlines() == [
        "lionjax.convert.placed is now lionjax.convert.orbax_folder; the old path still works",
        "lionjax.layers is now lionjax.nn.layers; the old path still works",
    ]
