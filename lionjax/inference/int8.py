# SPDX-License-Identifier: Apache-2.0
"""Int8 weights for decoding: the matrices of the language model are quantized once, all else stays as it is."""

from __future__ import annotations

import functools
import re

import jax

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import VLM, Batch, Params, UserError
from lionjax.nn.int8 import quantize

# Matrices of the language model, which is the whole model for a language model alone; not adapters and LoRA.
LANGUAGE_KERNELS = re.compile(r"(language/)?((encoder|decoder)/)?(blocks|groups|head)(/(?!adapters/)[\w]+)*/kernel")
FROM_HEADS = re.compile(r".*attention/o/kernel")  # (heads, head size, outputs): two input axes


def quantize_language(model: VLM, params: Params, example: Batch) -> Params:
    """The parameters with the language model's matrices in int8; `example`: a batch to read the shapes from.

    Raises UserError for a model without such matrices.
    """
    layers = sharding.layer_axes(jax.eval_shape(sharding.traced_init(model), jax.random.key(0), example))
    flat = trees.flatten(params)
    chosen = [path for path in flat if LANGUAGE_KERNELS.fullmatch(path)]
    if not chosen:
        raise UserError(f"{type(model).__name__} has no language model whose weights int8 could hold")
    for path in chosen:
        first = layers[path]
        input_axes = (first, first + 1) if FROM_HEADS.fullmatch(path) else (first,)
        flat[path] = _quantize(flat[path], input_axes)
    return trees.unflatten(flat)


_quantize = functools.partial(jax.jit, static_argnums=1)(quantize)
