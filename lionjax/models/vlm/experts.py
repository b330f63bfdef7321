# SPDX-License-Identifier: Apache-2.0
"""Expert models in the checkpoint of a vision-language model: Lyrics' image tagger and its detector.

Their parameters lie under the paths `tagger` and `detector` of the model's, which does not run them: the refiner does,
before the model.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lionjax.core.types import Params
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.vision import grounding_dino_weights, ram
from lionjax.models.vision.grounding_dino import GroundingDino
from lionjax.models.vision.ram import Ram


def init_experts(c: Any, key) -> Params:
    """Random parameters {"tagger": ..., "detector": ...} of those experts that the config `c` has."""
    params = {}
    if c.tagger is not None:
        image_BHWC = jnp.zeros((1, *(c.tagger.swin.image_size,) * 2, 3))
        params["tagger"] = Ram(c.tagger).init(jax.random.fold_in(key, 1), image_BHWC)["params"]
    if c.detector is not None:
        # An image with at least as many positions as there are queries: the finest level has a stride of 8.
        side = 64 * math.ceil(math.sqrt(c.detector.num_queries / 64))
        image_BHWC, ids_BL = jnp.zeros((1, side, side, 3)), jnp.zeros((1, 4), jnp.int32)
        inputs = (image_BHWC, jnp.ones((1, side, side), bool), ids_BL, jnp.ones((1, 4), bool))
        params["detector"] = GroundingDino(c.detector).init(jax.random.fold_in(key, 2), *inputs)["params"]
    return params


def expert_configs(c: Any) -> dict[str, Any]:
    """{path of the parameters: config} of those experts that the config `c` has, for `ModelInfo.experts`."""
    return {name: expert for name, expert in (("tagger", c.tagger), ("detector", c.detector)) if expert is not None}


def experts_weight_map(c: Any) -> tuple[WeightMapping, ...]:
    """Names `ram.*` and `grounding_dino.*` in the released Lyrics."""
    tagger = with_prefix("ram.", "tagger/", ram.weight_map(c.tagger)) if c.tagger is not None else ()
    if c.detector is None:
        return tagger
    return (*tagger, *with_prefix("", "detector/", grounding_dino_weights.lyrics_weight_map(c.detector)))
