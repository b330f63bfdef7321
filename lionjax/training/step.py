# SPDX-License-Identifier: Apache-2.0
"""The train step: state, gradient accumulation and one compiled update.

A stage's patterns split the parameters in two. Only the trainable half is differentiated, has optimizer state and is
returned; the frozen half is an argument of the step and is never an output.
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
from lionjax.core.renamed import check_given_once, renames_of
from lionjax.core.types import VLM, Array, Batch, Params, UserError, pytree_dataclass
from lionjax.training.optimizer import abstract_opt_state, learning_rate_schedule, lr_multipliers

log = logging.getLogger(__name__)

NO_LOSS_THRESHOLD = np.float32(np.inf)


@pytree_dataclass
class TrainState:
    """The arrays that an update changes: `step` (updates of this stage), trainable parameters, optimizer state."""

    step: Array
    trainable: Params
    opt_state: Any


def model_for_stage(experiment: Experiment, stage: Stage) -> VLM:
    """The experiment's model with the stage's `model_overrides` applied. Raises UserError for an unknown field."""
    cls = type(experiment.model)
    fields = {field.name for field in dataclasses.fields(cls)} | renames_of(cls).keys()
    for name, _ in stage.model_overrides:
        if name not in fields:
            raise UserError(
                f"stage {stage.name!r}: model_overrides sets {name!r}, which is no field of {cls.__name__}; its fields "
                f"are {', '.join(sorted(field.name for field in dataclasses.fields(cls)))}"
            )
    check_given_once(cls, dict(stage.model_overrides), f"stage {stage.name!r}: model_overrides of ")
    return dataclasses.replace(experiment.model, **dict(stage.model_overrides))


def validate_stages(stages: tuple[Stage, ...], params: Params) -> None:
    """Raises UserError for stages that cannot run, so that the error comes before the first stage is trained."""
    if not stages:
        raise UserError("the experiment has no stages; give it at least one")
    names = [stage.name for stage in stages]
    for stage in stages:
        if names.count(stage.name) > 1:
            raise UserError(f"two stages are named {stage.name!r}; give each stage a unique name")
        if not stage.trainable or stage.steps < 1:
            problem = f"{stage.steps} steps; set steps >= 1" if stage.trainable else "no trainable patterns; add some"
            raise UserError(f"stage {stage.name!r} has {problem}, or remove the stage")
        try:
            trainable, _ = trees.split(params, stage.trainable)
            lr_multipliers(stage, trainable)
        except UserError as error:
            raise UserError(f"stage {stage.name!r}: {error}") from error


def init_train_state(tx: optax.GradientTransformation, trainable: Params, mesh: Mesh) -> TrainState:
    """The state before the first update of a stage."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_opt_state(tx, trainable, mesh))
    opt_state = jax.jit(tx.init, out_shardings=shardings)(trainable)
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return TrainState(step, trainable, opt_state)


def accumulate_gradients(loss_fn: Callable, trainable: Params, batch: Batch, key: Array, accum_steps: int):
    """(gradients, metrics) of the mean loss over a batch, computed in `accum_steps` equal microbatches in sequence.

    Microbatches are weighted by their `metrics["weight"]`, so that the result equals that of the whole batch, up to
    rounding.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if accum_steps == 1:
        (value, metrics), grads = gradient(trainable, batch, key)
        return grads, {**metrics, "loss": value}

    def split_microbatches(x):
        # Rows stay on their device: microbatch i takes rows i, i + accum_steps, ... of the batch.
        x = jnp.moveaxis(x.reshape(x.shape[0] // accum_steps, accum_steps, *x.shape[1:]), 1, 0)
        return sharding.with_logical_constraint(x, None, "batch", *(None,) * (x.ndim - 2))

    def weighted_gradients(microbatch):
        index, rows = microbatch
        (value, metrics), grads = gradient(trainable, rows, jax.random.fold_in(key, index))
        weight = metrics["weight"].astype(jnp.float32)
        metrics = {**metrics, "loss": value, "weight": jnp.ones((), jnp.float32)}
        return jax.tree.map(lambda x: x * weight, (grads, metrics))

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, weighted_gradients(microbatch)), None

    microbatches = jnp.arange(accum_steps), jax.tree.map(split_microbatches, batch)
    shapes = jax.eval_shape(lambda: weighted_gradients(jax.tree.map(lambda x: x[0], microbatches)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(add, zeros, microbatches)
    weight = metrics["weight"]
    mean = 1 / jnp.where(weight > 0, weight, 1)
    grads, metrics = jax.tree.map(lambda x: x * mean, (grads, metrics))
    return grads, {**metrics, "weight": weight}


def make_train_step(
    model: VLM, stage: Stage, tx: optax.GradientTransformation, key: Array, state: TrainState, mesh: Mesh, traces: list
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One jitted update: (state, frozen, batch, loss_threshold) -> (state, metrics). The old state is donated.

    Metrics: the model's own, and loss, grad_norm, learning_rate, accepted. If the loss or the gradient norm is not
    finite, or the loss is above `loss_threshold` (default infinity), `accepted` is False and parameters and optimizer
    state do not change. Dropout depends on the stage's `key` and `state.step` only, so a resumed run draws the same
    masks. The new state has the shardings of `state`. `traces` grows by one item with each compilation.
    """
    schedule = learning_rate_schedule(stage)

    def step(state: TrainState, frozen: Params, batch: Batch, loss_threshold: Array = NO_LOSS_THRESHOLD):
        traces.append(jax.tree.map(jnp.shape, batch))

        def loss(trainable, microbatch, key):
            value, metrics = model.loss(trees.merge(trainable, frozen), microbatch, key)
            return value.astype(jnp.float32), metrics

        with sharding.use_mesh(mesh):
            step_key = jax.random.fold_in(key, state.step)
            grads, metrics = accumulate_gradients(loss, state.trainable, batch, step_key, stage.grad_accum_steps)
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        new = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        accepted = finite & (metrics["loss"] <= loss_threshold)
        old = dataclasses.replace(state, step=new.step)
        selected = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        return selected, {**metrics, "grad_norm": norm, "learning_rate": learning_rate, "accepted": accepted}

    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, replicated))
