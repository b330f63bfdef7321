# SPDX-License-Identifier: Apache-2.0
"""A stage: what trains, how fast, and one update.

A stage's patterns split the parameters in two. Only the trainable half is differentiated, has an optimiser and is
handed back; the frozen half is an argument of the step and can change nowhere.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.experiment import Experiment, Stage
from lionjax.core.renamed import renames_of
from lionjax.core.types import VLM, Array, Batch, Params, UserError, pytree_dataclass
from lionjax.training.optimizer import abstract_opt_state, learning_rate_schedule, lr_multipliers

log = logging.getLogger(__name__)

NO_LOSS_THRESHOLD = np.float32(np.inf)


@pytree_dataclass
class TrainState:
    """What one update changes. `step` counts the updates of this stage."""

    step: Array
    trainable: Params
    opt_state: Any


def model_for_stage(experiment: Experiment, stage: Stage) -> VLM:
    """The experiment's model with the fields that the stage replaces. Raises UserError when it has no such field."""
    kind = type(experiment.model)
    fields = {field.name for field in dataclasses.fields(kind)} | renames_of(kind).keys()
    for name, _ in stage.model_overrides:
        if name not in fields:
            raise UserError(f"stage {stage.name!r} sets {name!r}, which is no field of {kind.__name__}")
    return dataclasses.replace(experiment.model, **dict(stage.model_overrides))


def validate_stages(stages: tuple[Stage, ...], params: Params) -> None:
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
            lr_multipliers(stage, trainable)
        except UserError as error:
            raise UserError(f"stage {stage.name!r}: {error}") from error


def init_train_state(tx: optax.GradientTransformation, trainable: Params, mesh: Mesh) -> TrainState:
    """The state before the first update of a stage."""
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_opt_state(tx, trainable, mesh))
    fresh = jax.jit(tx.init, out_shardings=where)(trainable)
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return TrainState(step, trainable, fresh)


def accumulate_gradients(loss_fn: Callable, trainable: Params, batch: Batch, key: Array, accum_steps: int):
    """(gradients, metrics) of the mean loss over a batch, read in `parts` equal pieces one after the other.

    Pieces count by their `metrics["weight"]`, so that the result is that of the whole batch at once, up to rounding.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if accum_steps == 1:
        (value, metrics), grads = gradient(trainable, batch, key)
        return grads, {**metrics, "loss": value}

    def cut(x):
        # Every device keeps its own rows: piece p takes rows p, p + parts, ... of the batch.
        pieces = jnp.moveaxis(x.reshape(x.shape[0] // accum_steps, accum_steps, *x.shape[1:]), 1, 0)
        return sharding.with_logical_constraint(pieces, None, "batch", *(None,) * (x.ndim - 1))

    def weighted(piece):
        number, part = piece
        (value, metrics), grads = gradient(trainable, part, jax.random.fold_in(key, number))
        weight = metrics["weight"].astype(jnp.float32)
        metrics = {**metrics, "loss": value, "weight": jnp.ones((), jnp.float32)}
        return jax.tree.map(lambda x: x * weight, (grads, metrics))

    def add(total, piece):
        return jax.tree.map(jnp.add, total, weighted(piece)), None

    pieces = jnp.arange(accum_steps), jax.tree.map(cut, batch)
    shapes = jax.eval_shape(lambda: weighted(jax.tree.map(lambda x: x[0], pieces)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(add, zeros, pieces)
    weight = metrics["weight"]
    mean = 1 / jnp.where(weight > 0, weight, 1)
    grads, metrics = jax.tree.map(lambda x: x * mean, (grads, metrics))
    return grads, {**metrics, "weight": weight}


def make_train_step(
    model: VLM, stage: Stage, tx: optax.GradientTransformation, key: Array, state: TrainState, mesh: Mesh, traces: list
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One compiled update: (state, frozen, batch, most) -> (state, metrics). The old state's memory is reused.

    Metrics: the system's own and loss, grad_norm, learning_rate, accepted. Where the loss or the
    gradient's norm is not finite, or the loss above `most` (none, if left out), parameters and
    optimiser stay as they were and the update is not accepted. `key` is the stage's;
    dropout follows from it and the step alone, so a resumed run draws the same. `state` tells where
    the new state lies: where the old one does. `traces` grows by one with each compilation.
    """
    rate = learning_rate_schedule(stage)

    def step(state: TrainState, frozen: Params, batch: Batch, most: Array = NO_LOSS_THRESHOLD):
        traces.append(jax.tree.map(jnp.shape, batch))

        def loss(trainable, piece, key):
            value, metrics = model.loss(trees.merge(trainable, frozen), piece, key)
            return value.astype(jnp.float32), metrics

        with sharding.use_mesh(mesh):
            here = jax.random.fold_in(key, state.step)
            grads, metrics = accumulate_gradients(loss, state.trainable, batch, here, stage.grad_accum_steps)
        norm = optax.tree.norm(grads)
        updates, moved = tx.update(grads, state.opt_state, state.trainable)
        new = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), moved)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        accepted = finite & (metrics["loss"] <= most)
        old = dataclasses.replace(state, step=new.step)
        kept = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
        learning_rate = jnp.asarray(rate(state.step), jnp.float32)
        return kept, {**metrics, "grad_norm": norm, "learning_rate": learning_rate, "accepted": accepted}

    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(where, everywhere))
