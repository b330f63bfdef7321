# SPDX-License-Identifier: Apache-2.0
"""Class tags in JSON: stable names that outlive moves and renames of config classes."""

import dataclasses
import importlib
import json

import pytest
from paths import EXPERIMENTS, ROOT

from lionjax.core import class_tags, config

FOLDER = ROOT / "configs"
CONFIGS = [FOLDER / f"{name}.py" for name in EXPERIMENTS]


def classes_in(value) -> set[str]:
    """Homes ("module:class") of all dataclasses in a config."""
    found = {f"{type(value).__module__}:{type(value).__qualname__}"}
    for field in dataclasses.fields(value):
        inside = getattr(value, field.name)
        for item in inside if isinstance(inside, tuple) else (inside,):
            found |= classes_in(item) if dataclasses.is_dataclass(item) else set()
    return found


@pytest.mark.parametrize("tag", class_tags.TAG_TO_CLASS)
def test_every_tag_names_a_config_class(tag):
    module, _, name = class_tags.TAG_TO_CLASS[tag].partition(":")
    assert dataclasses.is_dataclass(getattr(importlib.import_module(module), name))


def test_every_name_of_version_0_1_leads_to_a_tag():
    assert set(class_tags.LEGACY_CLASS_TO_TAG.values()) <= class_tags.TAG_TO_CLASS.keys()
    assert class_tags.LEGACY_CLASS_TO_TAG["lionjax." + "systems.prefix.Prefix"] == "VisualPrefixLM"
    assert class_tags.LEGACY_CLASS_TO_TAG["lionjax." + "data.sources.Scenes"] == "Scenes"
    assert len(class_tags.LEGACY_CLASS_TO_TAG) == 40


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_class_of_the_shipped_configs_is_written_with_a_tag(path):
    experiment = config.load(path)
    assert classes_in(experiment) <= set(class_tags.TAG_TO_CLASS.values())
    assert config.from_json(config.to_json(experiment)) == experiment


def test_a_config_written_by_version_0_1_is_read():
    experiment = config.load(FOLDER / "tiny_lion.py")
    old = {tag: name for name, tag in class_tags.LEGACY_CLASS_TO_TAG.items()}

    def as_then(tree):
        if isinstance(tree, list):
            return [as_then(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        if tree["class"] == "Mix":
            return [tree["task"], tree["weight"]]
        if tree["class"] == "Weights":
            return [tree["part"], tree["file"]]
        since = [name for name, value in tree.items() if isinstance(value, dict) and value["class"] == "ImageFit"]
        kept = {name: as_then(value) for name, value in tree.items() if name not in since}
        return kept | {"class": old[tree["class"]]}

    text = json.dumps(as_then(json.loads(config.to_json(experiment))))
    assert "systems.lion.Lion" in text and config.from_json(text) == experiment
