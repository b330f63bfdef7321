# SPDX-License-Identifier: Apache-2.0
"""A stage: what trains, how fast, and one update.

A stage's patterns split the parameters in two. Only the trainable half is differentiated, has an optimiser and is
handed back; the frozen half is an argument of the step and can change nowhere.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lionjax import params as trees
from lionjax import sharding
from lionjax.config import Experiment, Stage
from lionjax.interfaces import Array, Batch, Params, System, UserError, pytree

log = logging.getLogger(__name__)

ANY_LOSS = np.float32(np.inf)


@pytree
class State:
    """What one update changes. `step` counts the updates of this stage."""

    step: Array
    trainable: Params
    optimiser: Any


def system_of(experiment: Experiment, stage: Stage) -> System:
    """The experiment's system with the fields that the stage replaces.

    Raises UserError when the system has no such field.
    """
    fields = {field.name for field in dataclasses.fields(experiment.system)}
    for name, _ in stage.system:
        if name not in fields:
            kind = type(experiment.system).__name__
            raise UserError(f"stage {stage.name!r} sets {name!r}, which is no field of {kind}")
    return dataclasses.replace(experiment.system, **dict(stage.system))


def check(stages: tuple[Stage, ...], params: Params) -> None:
    """Raises UserError for a schedule that cannot run: before the first step, not at the third stage."""
    if not stages:
        raise UserError("the experiment has no stages; give it at least one")
    names = [stage.name for stage in stages]
    for stage in stages:
        if names.count(stage.name) > 1:
            raise UserError(f"two stages are called {stage.name!r}; give each its own name")
        if not stage.trainable or stage.steps < 1:
            what = "no steps" if stage.trainable else "nothing to train"
            raise UserError(f"stage {stage.name!r} has {what}; leave it out or fill it in")
        try:
            trainable, _ = trees.split(params, stage.trainable)
            factors(stage, trainable)
        except UserError as error:
            raise UserError(f"stage {stage.name!r}: {error}") from error


def schedule(stage: Stage) -> optax.Schedule:
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


def decays(path: str, axes: int) -> bool:
    """Whether weight decay applies to a leaf that has so many axes within one layer.

    LION's rule: not to vectors and scalars, and not to biases and the scales of norms and adapters whatever their
    shape. A stack of layers has an axis that does not count. Queries and router ratios have two axes or more and do
    decay, as in the original.
    """
    return axes >= 2 and path.split("/")[-1] not in ("bias", "scale")


def factors(stage: Stage, trainable: Params) -> Params:
    """What the learning rate of each leaf is multiplied by: the factor of the first pattern that matches it."""
    trees.split(trainable, [pattern for pattern, _ in stage.learning_rate_scale])

    def one(path: str) -> float:
        pairs = stage.learning_rate_scale
        return next((factor for pattern, factor in pairs if trees.matches(path, [pattern])), 1.0)

    return trees.unflatten({path: one(path) for path in trees.flatten(trainable)})


def matrix(path: str, axes: int, stacked: int) -> MuonDimensionNumbers | None:
    """Which axes of a leaf are inputs and which outputs, behind those that stack layers; None for what is no such map.

    Word tables, output heads, convolutions, vectors and LoRA's narrow pairs are none. An attention's `o` has its
    heads in front, its other maps have them behind.
    """
    *_, module, name = ("", *path.split("/"))
    inputs = axes - stacked - 1 if module == "o" else 1
    if name != "kernel" or module == "head" or axes - stacked not in (2, 3):
        return None
    return MuonDimensionNumbers(tuple(range(stacked, stacked + inputs)), tuple(range(stacked + inputs, axes)))


def direction(stage: Stage, leaves: Mapping[str, tuple[tuple[int, ...], int]]) -> optax.GradientTransformation:
    """What the stage's `optimizer` makes of a gradient, before decay and learning rate.

    `leaves`: the shape of each, and how many of its axes stack layers.
    """
    adam = optax.scale_by_adam(*stage.betas)
    if stage.optimizer == "adamw":
        return adam
    maps = {path: matrix(path, len(shape), axes) for path, (shape, axes) in leaves.items()}

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


def optimizer(
    stage: Stage, trainable: Params, layer_axes: Mapping[str, int] | None = None
) -> optax.GradientTransformation:
    """AdamW or Muon for the trainable half: clipping by its global norm, decay where `decays` says, warm-up and cosine.

    `layer_axes`: how many axes of a leaf stack layers (see `sharding.layer_axes`); none where a path is missing.
    """
    stacked, flat = layer_axes or {}, trees.flatten(trainable)
    mask = {path: decays(path, len(leaf.shape) - stacked.get(path, 0)) for path, leaf in flat.items()}
    parts = [
        direction(stage, {p: (leaf.shape, stacked.get(p, 0)) for p, leaf in flat.items()}),
        optax.add_decayed_weights(stage.weight_decay, trees.unflatten(mask)),
        optax.scale_by_learning_rate(schedule(stage)),
    ]
    if stage.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(stage.clip_norm))
    if stage.learning_rate_scale:
        scale = factors(stage, trainable)
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scale)))
    return optax.chain(*parts)


def abstract_optimiser(optimiser: optax.GradientTransformation, trainable: Params, mesh: Mesh) -> Any:
    """Shapes and shardings of the optimiser's state: moments lie as their parameters do, counters everywhere."""

    flat, everywhere = trees.flatten(trainable), NamedSharding(mesh, PartitionSpec())

    def like(keys, shape):
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        paths = ("/".join(names[start:]) for start in range(len(names)))
        leaf = next((flat[path] for path in paths if path in flat), None)
        where = everywhere if leaf is None else leaf.sharding
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(like, jax.eval_shape(optimiser.init, trainable))


def start(optimiser: optax.GradientTransformation, trainable: Params, mesh: Mesh) -> State:
    """The state before the first update of a stage."""
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_optimiser(optimiser, trainable, mesh))
    fresh = jax.jit(optimiser.init, out_shardings=where)(trainable)
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return State(step, trainable, fresh)


def gradients(loss: Callable, trainable: Params, batch: Batch, key: Array, parts: int):
    """(gradients, metrics) of the mean loss over a batch, read in `parts` equal pieces one after the other.

    Pieces count by their `metrics["weight"]`, so that the result is that of the whole batch at once, up to rounding.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, metrics), grads = gradient(trainable, batch, key)
        return grads, {**metrics, "loss": value}

    def cut(x):
        # Every device keeps its own rows: piece p takes rows p, p + parts, ... of the batch.
        pieces = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        return sharding.constrain(pieces, None, "batch", *(None,) * (x.ndim - 1))

    def weighted(piece):
        number, part = piece
        (value, metrics), grads = gradient(trainable, part, jax.random.fold_in(key, number))
        weight = metrics["weight"].astype(jnp.float32)
        metrics = {**metrics, "loss": value, "weight": jnp.ones((), jnp.float32)}
        return jax.tree.map(lambda x: x * weight, (grads, metrics))

    def add(total, piece):
        return jax.tree.map(jnp.add, total, weighted(piece)), None

    pieces = jnp.arange(parts), jax.tree.map(cut, batch)
    shapes = jax.eval_shape(lambda: weighted(jax.tree.map(lambda x: x[0], pieces)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(add, zeros, pieces)
    weight = metrics["weight"]
    mean = 1 / jnp.where(weight > 0, weight, 1)
    grads, metrics = jax.tree.map(lambda x: x * mean, (grads, metrics))
    return grads, {**metrics, "weight": weight}


def make_step(
    system: System,
    stage: Stage,
    optimiser: optax.GradientTransformation,
    key: Array,
    state: State,
    mesh: Mesh,
    traces: list,
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """One compiled update: (state, frozen, batch, most) -> (state, metrics). The old state's memory is reused.

    Metrics: the system's own and loss, grad_norm, learning_rate, accepted. Where the loss or the
    gradient's norm is not finite, or the loss above `most` (none, if left out), parameters and
    optimiser stay as they were and the update is not accepted. `key` is the stage's;
    dropout follows from it and the step alone, so a resumed run draws the same. `state` tells where
    the new state lies: where the old one does. `traces` grows by one with each compilation.
    """
    rate = schedule(stage)

    def step(state: State, frozen: Params, batch: Batch, most: Array = ANY_LOSS):
        traces.append(jax.tree.map(jnp.shape, batch))

        def loss(trainable, piece, key):
            value, metrics = system.loss(trees.merge(trainable, frozen), piece, key)
            return value.astype(jnp.float32), metrics

        with sharding.use(mesh):
            here = jax.random.fold_in(key, state.step)
            grads, metrics = gradients(loss, state.trainable, batch, here, stage.accumulate)
        norm = optax.tree.norm(grads)
        updates, moved = optimiser.update(grads, state.optimiser, state.trainable)
        new = State(state.step + 1, optax.apply_updates(state.trainable, updates), moved)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        accepted = finite & (metrics["loss"] <= most)
        old = dataclasses.replace(state, step=new.step)
        kept = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
        learning_rate = jnp.asarray(rate(state.step), jnp.float32)
        return kept, {**metrics, "grad_norm": norm, "learning_rate": learning_rate, "accepted": accepted}

    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(where, everywhere))
