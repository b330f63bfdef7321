# SPDX-License-Identifier: Apache-2.0
"""Shrinking an experiment: sizes become small, all else stays."""

import dataclasses

import pytest
from paths import CONFIGS

from lionjax.core import config
from lionjax.core.experiment import Weights
from lionjax.core.types import UserError
from lionjax.tiny.shrink import shrink

SMALL = 32  # the largest width that remains
NAMES = ("llava15_7b", "lion_flant5xxl", "nextchat_7b", "openflamingo_9b", "kosmos2", "smollm2_llava", "mplug_owl_7b")


def load(name):
    return config.load(CONFIGS / f"{name}.py")


def leaves(value, path=""):
    """{path: value} of all fields of nested configs."""
    if not dataclasses.is_dataclass(value):
        return {path: value}
    return {name: leaf for field in vars(value) for name, leaf in leaves(vars(value)[field], f"{path}.{field}").items()}


@pytest.mark.parametrize("name", NAMES)
def test_only_sizes_and_pictures_of_a_model_change(name):
    before, after = leaves(load(name).model), leaves(shrink(load(name)).model)
    assert before.keys() == after.keys()
    sizes = ("width", "dim", "depth", "heads", "size", "indexes", "channels", "layer", "layers", "scale")
    for path, value in after.items():
        if value != before[path]:
            assert path.endswith(sizes) and not path.endswith("vocab_size"), path
    widths = [value for path, value in after.items() if path.endswith(("width", "_dim"))]
    assert max(widths) <= SMALL and min(widths) > 0


@pytest.mark.parametrize("name", NAMES)
def test_stages_sources_and_formats_stay_and_initial_weights_go(name):
    before, after = load(name), shrink(load(name), 0.5)
    assert after.stages == before.stages and after.data.sources == before.data.sources
    assert after.weights == () and before.weights and isinstance(before.weights[0], Weights)
    changed = {
        field for field, value in vars(after.data.processor).items() if value != vars(before.data.processor)[field]
    }
    lengths = {"max_prompt_tokens", "max_question_tokens", "max_target_tokens"}
    of_regions = {"max_regions", "packing"} if name.startswith("lyrics") else set()
    assert changed <= lengths | of_regions | {"image_size", "sam_image_size", "num_image_tokens"}
    assert after.data.processor.image_size == after.model.info.image_size < before.model.info.image_size


def test_text_lengths_keep_their_ratios_and_image_tokens_do_not_count():
    before, after = load("nextchat_7b").data.processor, shrink(load("nextchat_7b"), 0.25).data.processor
    assert after.num_image_tokens == 4 and before.num_image_tokens == 576
    assert after.max_prompt_tokens - 4 == (before.max_prompt_tokens - 576) / 4
    assert after.max_target_tokens == before.max_target_tokens / 4
    assert shrink(load("llava15_7b")).data.processor.max_target_tokens == 960


def test_layers_that_are_read_keep_their_order_and_periods_of_layers_stay():
    aggregator = shrink(load("lion_flant5xl")).model.aggregator
    assert aggregator.context_layers == (1, 0) and aggregator.query_layer == 2
    language = shrink(load("openflamingo_9b")).model.language
    assert language.depth == language.cross_attention.every_n_layers == 4
    assert shrink(load("smollm2_llava")).model.language.num_kv_heads == 1


@pytest.mark.parametrize("text", [0, -1.0, 1.5, float("nan")])
def test_a_fraction_of_the_text_lengths_outside_its_range_is_refused(text):
    with pytest.raises(UserError, match="above 0, at most 1"):
        shrink(load("llava15_7b"), text)
