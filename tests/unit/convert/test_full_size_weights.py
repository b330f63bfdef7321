# SPDX-License-Identifier: Apache-2.0
"""The tables of full-size releases against every name, shape and dtype of their files; no byte of weights is needed."""

import dataclasses
import re

import numpy as np
import pytest
from full_size import Blank, lion_release

from lionjax.convert.formats.detect import format_of_config
from lionjax.convert.mapping.plan import plan_params, plan_state_dict
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
from lionjax.models.language import t5
from lionjax.models.vision.ram import RAM_SWIN_L
from lionjax.models.vision.vit import EVA_VIT_G
from lionjax.models.vlm.lion import Lion
from lionjax.nn.adapters import AdapterConfig


@pytest.mark.slow
@pytest.mark.parametrize("size", ["XL", "XXL"])
def test_the_full_size_lion_table_covers_every_tensor_of_the_release_and_every_leaf_of_the_model(size):
    language = dataclasses.replace({"XL": t5.FLAN_T5_XL, "XXL": t5.FLAN_T5_XXL}[size], adapters=AdapterConfig())
    lion = Lion(EVA_VIT_G, QFormerConfig(), AggregatorConfig(), language)
    kind, state = format_of_config(lion), Blank(lion_release(language.width))
    model = kind.abstract_params(lion)
    plan = plan_params(kind.weight_map(lion), state, kind.ignore_patterns, model)
    read = {name for piece in plan.mapped_tensors for name in (*piece.torch_keys, *piece.tied_keys)}
    assert read | set(plan.ignored) == set(state)
    assert all(re.match(r"visual_encoder\.(blocks\.39|fc_norm|head)\.", name) for name in plan.ignored)
    with pytest.raises(UserError, match="'t5_model.decoder.block.23.layer.2.adapter.router_ratio2'"):
        del state["t5_model.decoder.block.23.layer.2.adapter.router_ratio2"]
        plan_params(kind.weight_map(lion), state, kind.ignore_patterns, model)


def ram_release() -> dict:
    """Every tensor of ram_swin_large_14m.pth that tags, written down from the original's code, and two that do not."""
    f, forms = np.float32, {}

    def dense(name, outputs, inputs, bias=True):
        forms[name + ".weight"] = (outputs, inputs), f
        if bias:
            forms[name + ".bias"] = (outputs,), f

    def norm(name, size):
        forms[name + ".weight"], forms[name + ".bias"] = ((size,), f), ((size,), f)

    forms["visual_encoder.patch_embed.proj.weight"] = (192, 3, 4, 4), f
    forms["visual_encoder.patch_embed.proj.bias"] = (192,), f
    norm("visual_encoder.patch_embed.norm", 192)
    for s, (depth, heads, width, places) in enumerate(
        [(2, 6, 192, 96), (2, 12, 384, 48), (18, 24, 768, 24), (2, 48, 1536, 12)]
    ):
        for b in range(depth):
            block = f"visual_encoder.layers.{s}.blocks.{b}."
            norm(block + "norm1", width)
            norm(block + "norm2", width)
            forms[block + "attn.relative_position_bias_table"] = (23 * 23, heads), f
            forms[block + "attn.relative_position_index"] = (144, 144), np.int64
            if b % 2 and s < 3:  # the last stage is one window
                forms[block + "attn_mask"] = ((places // 12) ** 2, 144, 144), f
            dense(block + "attn.qkv", 3 * width, width)
            dense(block + "attn.proj", width, width)
            dense(block + "mlp.fc1", 4 * width, width)
            dense(block + "mlp.fc2", width, 4 * width)
        if s < 3:
            norm(f"visual_encoder.layers.{s}.downsample.norm", 4 * width)
            dense(f"visual_encoder.layers.{s}.downsample.reduction", 2 * width, 4 * width, bias=False)
    norm("visual_encoder.norm", 1536)
    dense("image_proj", 512, 1536)
    forms["label_embed"] = (4585, 512), f
    dense("wordvec_proj", 768, 512)
    for i in range(2):
        layer = f"tagging_head.encoder.layer.{i}."
        dense(layer + "crossattention.self.query", 768, 768)
        dense(layer + "crossattention.self.key", 768, 512)
        dense(layer + "crossattention.self.value", 768, 512)
        dense(layer + "crossattention.output.dense", 768, 768)
        norm(layer + "crossattention.output.LayerNorm", 768)
        dense(layer + "intermediate.dense", 3072, 768)
        dense(layer + "output.dense", 768, 3072)
        norm(layer + "output.LayerNorm", 768)
    dense("fc", 1, 768)
    dense("tag_encoder.encoder.layer.11.output.dense", 768, 3072)
    dense("text_decoder.cls.predictions.decoder", 30524, 768)
    return forms


@pytest.mark.slow
def test_the_full_size_ram_table_covers_every_tagging_tensor_and_every_leaf_of_the_model():
    kind, state = format_of_config(RAM_SWIN_L), Blank(ram_release())
    model = kind.abstract_params(RAM_SWIN_L)
    plan = plan_params(kind.weight_map(RAM_SWIN_L), state, kind.ignore_patterns, model)
    read = {name for piece in plan.mapped_tensors for name in (*piece.torch_keys, *piece.tied_keys)}
    assert read | set(plan.ignored) == set(state)
    assert all(re.match(r"(tag_encoder|text_decoder)\.", name) for name in plan.ignored)
    # On the way out the names and shapes are those that came in.
    made = plan_state_dict(kind.weight_map(RAM_SWIN_L), trees.flatten(model), model).output_specs
    assert {name: form.shape for name, form in made.items()} == {name: state[name].shape for name in read}
    with pytest.raises(UserError, match="'visual_encoder.layers.2.blocks.17.attn.qkv.bias'"):
        del state["visual_encoder.layers.2.blocks.17.attn.qkv.bias"]
        plan_params(kind.weight_map(RAM_SWIN_L), state, kind.ignore_patterns, model)
