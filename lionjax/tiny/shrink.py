# SPDX-License-Identifier: Apache-2.0
"""Shrink an experiment: the same run with small widths, depths and pictures, which a laptop trains in minutes.

Stages, mixtures, sources, prompt formats, tokenizers, dtypes and vocabularies stay. Initial weights are dropped: they
have other shapes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lionjax.core.errors import UserError
from lionjax.core.experiment import Experiment
from lionjax.data.config import DataConfig

WIDTH, HEADS = 16, 2
# The largest value of each size in any config of a part; one width for all parts, so that they fit together.
SIZES = {
    **dict.fromkeys(("width", "vision_width", "prompt_embed_dim", "embed_dim"), WIDTH),
    **dict.fromkeys(("mlp_dim", "decoder_mlp_dim", "iou_head_mlp_dim", "box_mlp_dim"), 2 * WIDTH),
    **dict.fromkeys(("projector_mlp_dim", "state_mlp_dim"), 2 * WIDTH),
    **dict.fromkeys(("num_heads", "decoder_num_heads"), HEADS),
    "head_dim": WIDTH // HEADS,
    **dict.fromkeys(("mask_input_channels", "bottleneck_dim"), 4),
    "window_size": 2,
    **dict.fromkeys(("encoder_depth", "decoder_depth"), 2),
}
REGIONS = 4  # of an image that a refiner has seen
PATCHES = 2  # a side, of the vision tower's picture
SAM_PATCHES = 4  # a side: two windows
TOWER_DEPTH, DEPTH = 3, 2  # of a tower whose inner layers are read, and of any other part


def shrink(experiment: Experiment, text: float = 1.0) -> Experiment:
    """The experiment with small widths, depths and pictures.

    `text`: all text lengths are multiplied by it, rounded up; image tokens in a prompt do not count. Raises UserError
    unless it is above 0 and at most 1.
    """
    if not 0 < text <= 1:
        raise UserError(f"the fraction of the text lengths is {text}; give a number above 0, at most 1")
    model = shrink_model(experiment.model)
    data = shrink_data(experiment.data, experiment.model, model, text)
    generation = shrink_lengths(experiment.generation, ("max_new_tokens", "min_new_tokens"), text)
    return dataclasses.replace(experiment, model=model, data=data, generation=generation, weights=())


def shrink_model(model: Any) -> Any:
    """A model config with small parts; indices of layers stay in their order, and periods of layers stay."""
    fields = vars(model)
    tower_depth = max(TOWER_DEPTH, -fields.get("feature_layer", -1))
    stride = fields.get("pool_stride", 1)
    side = stride * math.ceil(PATCHES / stride)
    changes = {name: shrink_part(value) for name, value in fields.items() if dataclasses.is_dataclass(value)}
    vision = {"depth": min(fields["vision"].depth, tower_depth)}
    changes["vision"] = with_patches(dataclasses.replace(changes["vision"], **vision), fields["vision"], side)
    if fields.get("sam") is not None:
        changes["sam"] = shrink_sam(changes["sam"], fields["sam"])
        if fields.get("box_scale") is not None:
            changes["box_scale"] = float(changes["sam"].image_size)
    if fields.get("aggregator") is not None:
        changes["aggregator"] = shrink_layer_indices(changes["aggregator"], changes["vision"].depth)
    return dataclasses.replace(model, **small_sizes(model), **changes)


def small_sizes(config: Any) -> dict[str, int]:
    """{field: small value} of the sizes in a config; none is larger than before."""
    return {name: min(value, vars(config)[name]) for name, value in SIZES.items() if name in vars(config)}


def shrink_part(config: Any) -> Any:
    """A part of a model with small sizes, and so its own parts."""
    fields = vars(config)
    nested = {name: shrink_part(value) for name, value in fields.items() if dataclasses.is_dataclass(value)}
    sizes = small_sizes(config)
    if "num_kv_heads" in fields:
        sizes["num_kv_heads"] = max(1, sizes["num_heads"] * fields["num_kv_heads"] // fields["num_heads"])
    if "depth" in fields:
        cross_attention = fields.get("cross_attention")
        period = 1 if cross_attention is None else cross_attention.every_n_layers
        sizes["depth"] = min(fields["depth"], period * math.ceil(DEPTH / period))
    if "global_attn_indexes" in fields:
        sizes["global_attn_indexes"] = (sizes["depth"] - 1,)
    return dataclasses.replace(config, **nested, **sizes)


def with_patches(config: Any, original: Any, side: int) -> Any:
    """A tower of pictures with `side` patches a side, or as many as before if these are fewer."""
    return dataclasses.replace(config, image_size=min(original.image_size, side * config.patch_size))


def shrink_sam(config: Any, original: Any) -> Any:
    """A small SAM whose last layer attends to the whole picture, as that of the original does."""
    return with_patches(config, original, SAM_PATCHES)


def shrink_layer_indices(aggregator: Any, depth: int) -> Any:
    """The aggregator reads the last layers of a tower of `depth` layers, in the order of those it read before."""
    layers = sorted({*aggregator.context_layers, aggregator.query_layer})
    place = {layer: depth - len(layers) + k for k, layer in enumerate(layers)}
    context_layers = tuple(place[layer] for layer in aggregator.context_layers)
    return dataclasses.replace(aggregator, query_layer=place[aggregator.query_layer], context_layers=context_layers)


def shrink_data(data: DataConfig, model: Any, small_model: Any, text: float) -> DataConfig:
    """The data config with the pictures of `small_model` and shorter texts."""
    processor = data.processor
    sam = vars(small_model).get("sam")
    changes = {"image_size": small_model.info.image_size}
    changes["sam_image_size"] = sam.image_size if processor.sam_image_size and sam is not None else 0
    if processor.num_image_tokens == vars(model)["vision"].num_patches:
        changes["num_image_tokens"] = vars(small_model)["vision"].num_patches
    if processor.region_width:
        changes["max_regions"] = min(processor.max_regions, REGIONS)
    texts = dataclasses.replace(processor, max_prompt_tokens=processor.max_prompt_tokens - processor.num_image_tokens)
    texts = shrink_lengths(texts, ("max_prompt_tokens", "max_question_tokens", "max_target_tokens"), text)
    if processor.packing is not None:
        lengths = ("max_box_tokens", "max_caption_tokens", "length")
        changes["packing"] = shrink_lengths(processor.packing, lengths, text)
    changes["max_prompt_tokens"] = texts.max_prompt_tokens + changes.get("num_image_tokens", processor.num_image_tokens)
    buckets = tuple(math.ceil(text * length) for length in data.length_buckets)
    return dataclasses.replace(data, processor=dataclasses.replace(texts, **changes), length_buckets=buckets)


def shrink_lengths(config: Any, names: tuple[str, ...], text: float) -> Any:
    """A config with the lengths `names` multiplied by `text`, rounded up."""
    return dataclasses.replace(config, **{name: math.ceil(text * vars(config)[name]) for name in names})
