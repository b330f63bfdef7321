# SPDX-License-Identifier: Apache-2.0
"""Mixture entries and initial weights as typed values, and their forms in words."""

import json

import pytest

from lionjax.core import config
from lionjax.core.experiment import Mix, Stage, Weights
from lionjax.core.types import UserError

WORDS = {
    "vqa": Mix("vqa"),
    "coco/vqa": Mix("vqa", source="coco"),
    "caption@plain": Mix("caption", template="plain"),
    "vqa@told": Mix("vqa", template="told"),
    "rec@digits": Mix("rec", boxes="digits"),
    "coco/vqa+2@plain": Mix("vqa", source="coco", shots=2, template="plain"),
}


@pytest.mark.parametrize("words", WORDS)
def test_mixture_entries_as_words_and_as_typed_values_are_equal(words):
    assert Mix.from_words(words, 1.0) == WORDS[words] and WORDS[words].spec == words


@pytest.mark.parametrize("words", ["vqa@sung", "vqa+two"])
def test_unknown_suffixes_of_a_mixture_entry_are_refused(words):
    with pytest.raises(UserError, match="mixture entry"):
        Mix.from_words(words)


def test_a_stage_takes_pairs_of_words_and_json_of_version_0_1():
    pairs = (("vqa", 1), ("rec@digits", 0.5))
    typed = (Mix("vqa", 1.0), Mix("rec", 0.5, boxes="digits"))
    files = (("language", "shipped:a.safetensors"), ("head", "b.safetensors#model/head"))
    weights = (Weights("language", "shipped:a.safetensors"), Weights("head", "b.safetensors", "model/head"))
    assert Stage("one", 1, (".*",), pairs, 8).mixture == typed
    stage = Stage("one", 1, (".*",), typed, 8)
    tree = json.loads(config.to_json(stage))
    assert config.from_json(json.dumps(tree)) == stage
    tree["mixture"] = [["vqa", 1.0], ["rec@digits", 0.5]]
    assert config.from_json(json.dumps(tree)) == stage
    assert tuple(Weights.from_words(*pair) for pair in files) == weights
    assert [tuple(item) for item in weights] == [tuple(pair) for pair in files]


def test_the_command_line_replaces_a_whole_mixture_by_words():
    stage = Stage("one", 1, (".*",), (Mix("vqa"),), 8)
    changed = config.apply_overrides(stage, ["--mixture", "vqa", "1", "coco/rec@digits", "2"])
    assert changed.mixture == (Mix("vqa", 1.0), Mix("rec", 2.0, source="coco", boxes="digits"))
    with pytest.raises(UserError, match="must be pairs"):
        config.apply_overrides(stage, ["--mixture", "vqa"])
