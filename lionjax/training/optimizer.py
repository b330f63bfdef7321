# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a stage: learning-rate schedule, weight-decay mask, AdamW or Muon (arXiv 2502.16982), with optax."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lionjax.core import params as trees
from lionjax.core.experiment import Stage
from lionjax.core.types import Params

log = logging.getLogger(__name__)


def learning_rate_schedule(stage: Stage) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `learning_rate`, then `stage.decay` to `end_learning_rate`.

    With `stage.steps_per_epoch`, the decay is that of the epoch's first step, over all steps of the stage (LAVIS).
    """
    decay_steps = stage.steps - stage.warmup_steps
    if decay_steps < 1:
        log.warning(
            "stage %r has %d steps and %d warmup_steps, so it never reaches its learning_rate %g; lower warmup_steps",
            *(stage.name, stage.steps, stage.warmup_steps, stage.learning_rate),
        )
    warmup = optax.linear_schedule(stage.warmup_learning_rate, stage.learning_rate, stage.warmup_steps)
    is_by_epoch = stage.steps_per_epoch > 0
    decay_steps = max(stage.steps if is_by_epoch else decay_steps, 1)
    if stage.decay == "linear":
        decay = optax.linear_schedule(stage.learning_rate, stage.end_learning_rate, decay_steps)
    else:
        alpha = stage.end_learning_rate / stage.learning_rate if stage.learning_rate else 0.0
        decay = optax.cosine_decay_schedule(stage.learning_rate, decay_steps, alpha)
    if is_by_epoch:
        return lambda step: jnp.where(
            step < stage.warmup_steps, warmup(step), decay(step // stage.steps_per_epoch * stage.steps_per_epoch)
        )
    return optax.join_schedules([warmup, decay], [stage.warmup_steps]) if stage.warmup_steps else decay


def use_weight_decay(path: str, ndim: int) -> bool:
    """Whether weight decay applies to a leaf with `ndim` axes, not counting the axes that stack layers.

    LION's rule: no decay for vectors and scalars, nor for leaves named `bias` or `scale` of any shape. Query tokens
    and router ratios have two or more axes and are decayed, as in the released LION code.
    """
    return ndim >= 2 and path.split("/")[-1] not in ("bias", "scale")


def lr_multipliers(stage: Stage, trainable: Params) -> Params:
    """The learning-rate factor of each leaf: that of the first pattern in `stage.lr_multipliers` that matches, else 1.

    Raises UserError for a pattern that matches no leaf.
    """
    trees.split(trainable, [pattern for pattern, _ in stage.lr_multipliers])  # raises

    def factor_of(path: str) -> float:
        pairs = stage.lr_multipliers
        return next((factor for pattern, factor in pairs if trees.matches(path, [pattern])), 1.0)

    return trees.unflatten({path: factor_of(path) for path in trees.flatten(trainable)})


def muon_dimension_numbers(path: str, ndim: int, num_layer_axes: int) -> MuonDimensionNumbers | None:
    """Input and output axes of a linear layer's kernel, after the axes that stack layers; None for other leaves.

    None for embedding tables, output heads, convolutions, vectors and LoRA factors. An attention's `o` kernel has the
    heads among its input axes; `q`, `k` and `v` have them among the output axes.
    """
    *_, module, name = ("", *path.split("/"))
    inputs = ndim - num_layer_axes - 1 if module == "o" else 1
    if name != "kernel" or module == "head" or ndim - num_layer_axes not in (2, 3):
        return None
    return MuonDimensionNumbers(
        tuple(range(num_layer_axes, num_layer_axes + inputs)), tuple(range(num_layer_axes + inputs, ndim))
    )


def scale_by_adam(stage: Stage) -> optax.GradientTransformation:
    """Adam with the stage's betas, the dtype of its first moments, and full or factored second moments.

    Factored, the gradient is divided by the root of the outer product of its squares' means over rows and columns, by
    Adafactor's schedule, before the first moment is taken; matrices with a side below 128 and vectors have full ones.
    """
    first, second = stage.betas
    if stage.second_moment == "full":
        return optax.scale_by_adam(
            first, second, mu_dtype=None if stage.moment_dtype == "float32" else stage.moment_dtype
        )
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8),
        optax.clip_by_block_rms(1.0),
        optax.ema(first, debias=False, accumulator_dtype=stage.moment_dtype),
    )


def scale_by_optimizer(stage: Stage, leaves: Mapping[str, tuple[tuple[int, ...], int]]) -> optax.GradientTransformation:
    """Adam or Muon with Adam for leaves that are no matrices, without weight decay and learning rate.

    `leaves`: {path: (shape, number of axes that stack layers)}.
    """
    adam = scale_by_adam(stage)
    if stage.optimizer == "adamw":
        return adam
    maps = {path: muon_dimension_numbers(path, len(shape), axes) for path, (shape, axes) in leaves.items()}

    def larger_side(path: str) -> int:
        shape = leaves[path][0]
        return max(math.prod(shape[axis] for axis in axes) for axes in maps[path])

    # The RMS of an orthogonal matrix is larger_side ** -0.5, that of Adam's updates is about 0.2 (arXiv 2502.16982).
    sizes = {path: 0.2 * larger_side(path) ** 0.5 for path in maps if maps[path]}

    def scaled(updates: Params, _) -> Params:
        flat = trees.flatten(updates)
        return trees.unflatten({path: leaf * sizes[path] if path in sizes else leaf for path, leaf in flat.items()})

    dimensions = {path: numbers or optax.MaskedNode() for path, numbers in maps.items()}
    muon = optax.chain(scale_by_muon(weight_dimension_numbers=trees.unflatten(dimensions)), optax.stateless(scaled))
    labels = {path: "muon" if numbers else "adamw" for path, numbers in maps.items()}
    return optax.partition({"muon": muon, "adamw": adam}, trees.unflatten(labels))


def make_optimizer(
    stage: Stage, trainable: Params, layer_axes: Mapping[str, int] | None = None
) -> optax.GradientTransformation:
    """The stage's optimizer for `trainable`: global-norm clipping, AdamW or Muon, weight decay, learning-rate schedule.

    Weight decay applies as in `use_weight_decay`. `layer_axes`: {path: number of axes that stack layers} (see
    `sharding.layer_axes`), 0 for missing paths.
    """
    stacked, flat = layer_axes or {}, trees.flatten(trainable)
    mask = {path: use_weight_decay(path, len(leaf.shape) - stacked.get(path, 0)) for path, leaf in flat.items()}
    parts = [
        scale_by_optimizer(stage, {p: (leaf.shape, stacked.get(p, 0)) for p, leaf in flat.items()}),
        optax.add_decayed_weights(stage.weight_decay, trees.unflatten(mask)),
        optax.scale_by_learning_rate(learning_rate_schedule(stage)),
    ]
    if stage.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(stage.clip_norm))
    if stage.lr_multipliers:
        scale = lr_multipliers(stage, trainable)
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scale)))
    return optax.chain(*parts)


def abstract_opt_state(tx: optax.GradientTransformation, trainable: Params, mesh: Mesh) -> Any:
    """ShapeDtypeStructs of the optimizer state: moments have their parameter's sharding.

    Counters and factors of second moments are replicated.
    """

    flat, replicated = trees.flatten(trainable), NamedSharding(mesh, PartitionSpec())

    def with_sharding(keys, shape):
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        paths = ("/".join(names[start:]) for start in range(len(names)))
        leaf = next((flat[path] for path in paths if path in flat), None)
        leaf_sharding = leaf.sharding if leaf is not None and leaf.shape == shape.shape else replicated
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=leaf_sharding)

    return jax.tree_util.tree_map_with_path(with_sharding, jax.eval_shape(tx.init, trainable))
