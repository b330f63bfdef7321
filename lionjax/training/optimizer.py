# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a stage: learning-rate schedule, weight decay, and AdamW or Muon for each parameter."""

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
    """Learning rate by update: a line up to `learning_rate`, then a cosine down to `end_learning_rate`."""
    rest = stage.steps - stage.warmup_steps
    if rest < 1:
        log.warning(
            "stage %r: its %d steps end within the %d of the warm-up, below the learning rate of %g",
            *(stage.name, stage.steps, stage.warmup_steps, stage.learning_rate),
        )
    up = optax.linear_schedule(stage.warmup_learning_rate, stage.learning_rate, stage.warmup_steps)
    lowest = stage.end_learning_rate / stage.learning_rate if stage.learning_rate else 0.0
    down = optax.cosine_decay_schedule(stage.learning_rate, max(rest, 1), lowest)
    return optax.join_schedules([up, down], [stage.warmup_steps]) if stage.warmup_steps else down


def use_weight_decay(path: str, ndim: int) -> bool:
    """Whether weight decay applies to a leaf that has so many axes within one layer.

    LION's rule: not to vectors and scalars, and not to biases and the scales of norms and adapters whatever their
    shape. A stack of layers has an axis that does not count. Queries and router ratios have two axes or more and do
    decay, as in the original.
    """
    return ndim >= 2 and path.split("/")[-1] not in ("bias", "scale")


def lr_multipliers(stage: Stage, trainable: Params) -> Params:
    """What the learning rate of each leaf is multiplied by: the factor of the first pattern that matches it."""
    trees.split(trainable, [pattern for pattern, _ in stage.lr_multipliers])

    def one(path: str) -> float:
        pairs = stage.lr_multipliers
        return next((factor for pattern, factor in pairs if trees.matches(path, [pattern])), 1.0)

    return trees.unflatten({path: one(path) for path in trees.flatten(trainable)})


def muon_dimension_numbers(path: str, ndim: int, num_layer_axes: int) -> MuonDimensionNumbers | None:
    """Which axes of a leaf are inputs and which outputs, behind those that stack layers; None for what is no such map.

    Word tables, output heads, convolutions, vectors and LoRA's narrow pairs are none. An attention's `o` has its
    heads in front, its other maps have them behind.
    """
    *_, module, name = ("", *path.split("/"))
    inputs = ndim - num_layer_axes - 1 if module == "o" else 1
    if name != "kernel" or module == "head" or ndim - num_layer_axes not in (2, 3):
        return None
    return MuonDimensionNumbers(
        tuple(range(num_layer_axes, num_layer_axes + inputs)), tuple(range(num_layer_axes + inputs, ndim))
    )


def scale_by_optimizer(stage: Stage, leaves: Mapping[str, tuple[tuple[int, ...], int]]) -> optax.GradientTransformation:
    """What the stage's `optimizer` makes of a gradient, before decay and learning rate.

    `leaves`: the shape of each, and how many of its axes stack layers.
    """
    adam = optax.scale_by_adam(*stage.betas)
    if stage.optimizer == "adamw":
        return adam
    maps = {path: muon_dimension_numbers(path, len(shape), axes) for path, (shape, axes) in leaves.items()}

    def larger_side(path: str) -> int:
        shape = leaves[path][0]
        return max(math.prod(shape[axis] for axis in axes) for axes in maps[path])

    # A matrix of orthogonal rows has a root mean square of the larger side ** -0.5, and Adam's updates one near 0.2.
    sizes = {path: 0.2 * larger_side(path) ** 0.5 for path in maps if maps[path]}

    def scaled(updates: Params, _) -> Params:
        flat = trees.flatten(updates)
        return trees.unflatten({path: leaf * sizes[path] if path in sizes else leaf for path, leaf in flat.items()})

    dimensions = {path: found or optax.MaskedNode() for path, found in maps.items()}
    muon = optax.chain(scale_by_muon(weight_dimension_numbers=trees.unflatten(dimensions)), optax.stateless(scaled))
    labels = {path: "muon" if found else "adamw" for path, found in maps.items()}
    return optax.partition({"muon": muon, "adamw": adam}, trees.unflatten(labels))


def make_optimizer(
    stage: Stage, trainable: Params, layer_axes: Mapping[str, int] | None = None
) -> optax.GradientTransformation:
    """AdamW or Muon for the trainable half: clipping by its global norm, decay where `decays` says, warm-up and cosine.

    `layer_axes`: how many axes of a leaf stack layers (see `sharding.layer_axes`); none where a path is missing.
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
    """Shapes and shardings of the optimiser's state: moments lie as their parameters do, counters everywhere."""

    flat, everywhere = trees.flatten(trainable), NamedSharding(mesh, PartitionSpec())

    def like(keys, shape):
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        paths = ("/".join(names[start:]) for start in range(len(names)))
        leaf = next((flat[path] for path in paths if path in flat), None)
        where = everywhere if leaf is None else leaf.sharding
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(like, jax.eval_shape(tx.init, trainable))
