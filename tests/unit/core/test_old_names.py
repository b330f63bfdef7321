# SPDX-License-Identifier: Apache-2.0
"""Names of earlier versions that their documentation showed still work, and say in one line what is new."""

import dataclasses
import importlib
import json
import subprocess
import sys

import pytest

from lionjax.core import config, moved
from lionjax.core.experiment import Experiment, RunConfig, Stage
from lionjax.core.types import UserError
from lionjax.models.vision.vit import ViTConfig
from lionjax.nn.adapters import AdapterConfig
from lionjax.training.step import model_for_stage

# What the documentation of 0.1 called (`serving`: that of a later state), and what it is today.
DOCUMENTED = {
    "lionjax.layers.LoraConfig": "lionjax.nn.lora.LoraConfig",
    "lionjax.convert.verify.verify": "lionjax.convert.verify.verify",
    "lionjax.convert.placed.save_orbax": "lionjax.convert.orbax_folder.save_orbax",
    "lionjax.convert.table_of": "lionjax.convert.torch_folder.weight_map_of",
    "lionjax.evaluation.report.report": "lionjax.evaluation.report.html.write_report",
    "lionjax.data.scenes.World": "lionjax.data.scenes.world.WorldConfig",
    "lionjax.tagger.load": "lionjax.inference.tagger.load",
    "lionjax.tagger.Found": "lionjax.inference.tagger.TagResult",
    "lionjax.demo.Talk": "lionjax.pipelines.serving.web_demo.Conversation",
    "lionjax.serving.web_demo.build_demo": "lionjax.pipelines.serving.web_demo.build_demo",
    "lionjax.serving.harness.HarnessModel": "lionjax.pipelines.serving.harness.HarnessModel",
    "lionjax.serving.lmms_plugin.manifest": "lionjax.pipelines.serving.lmms_plugin.manifest",
}


def get(dotted: str):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("old", DOCUMENTED)
def test_a_documented_name_of_an_earlier_version_is_the_object_of_today(old):
    assert get(old) is get(DOCUMENTED[old])


def test_every_renamed_name_is_found_in_its_old_module():
    missing = []
    for module, old in moved.renamed_names():
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


def test_an_old_module_still_runs_as_a_program_and_says_its_new_path():
    command = [sys.executable, "-m", "lionjax.serving.vlmevalkit", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("usage: python -m lionjax.pipelines.serving.vlmevalkit ")
    assert ran.stderr.splitlines() == [
        "lionjax.serving.vlmevalkit is now lionjax.pipelines.serving.vlmevalkit; the old path still works"
    ]


TOY = Experiment("toy", ViTConfig(), ViTConfig(), (Stage("one", 1, (".*",), (("vqa", 1),), 1),))


def read_with_both_names():
    tree = json.loads(config.to_json(TOY))
    tree["run"]["keep"] = 3
    config.from_json(json.dumps(tree))


@pytest.mark.parametrize(
    "give",
    [
        lambda: RunConfig(keep=3, max_to_keep=2),
        lambda: AdapterConfig(bottleneck=8, bottleneck_dim=64),
        read_with_both_names,
        lambda: config.apply_overrides(TOY, ["--run.keep", "3", "--run.max_to_keep", "2"]),
        lambda: config.apply_overrides(TOY, ["--run.max-to-keep", "3", "--run.keep", "2"]),
        lambda: model_for_stage(TOY, dataclasses.replace(TOY.stages[0], system=(("heads", 2), ("num_heads", 4)))),
    ],
)
def test_a_field_given_under_its_old_and_its_current_name_is_refused_in_one_sentence(give):
    with pytest.raises(UserError, match="name.* of one field; give .* only$") as error:
        give()
    assert "\n" not in str(error.value)


def test_replace_takes_a_field_by_its_old_name():
    assert dataclasses.replace(RunConfig(max_to_keep=5), keep=3).max_to_keep == 3
    assert model_for_stage(TOY, dataclasses.replace(TOY.stages[0], system=(("heads", 2),))).num_heads == 2
