# SPDX-License-Identifier: Apache-2.0
"""A stage: its schedule, its optimizer, and one update."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.sharding import Mesh

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import UserError
from lionjax.training import checkpoint
from lionjax.training import step as stages
from lionjax.training.optimizer import abstract_opt_state, make_optimizer, scale_by_adam
from lionjax.training.optimizer import learning_rate_schedule as optimizer_schedule
from lionjax.training.optimizer import use_weight_decay as optimizer_decays

BATCH = toy.batch_of(range(8))


def mesh() -> Mesh:
    return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def params():
    return sharding.init_sharded(toy.Toy().init, jax.random.key(0), BATCH, mesh=mesh())


def layer_axes():
    return sharding.layer_axes(jax.eval_shape(toy.Toy().init, jax.random.key(0), BATCH))


def one_update(stage, params, batch=BATCH, system=None, updates=1, traces=None):
    """State and metrics after some updates on the same batch; the parameters given survive."""
    trainable, frozen = trees.split(jax.tree.map(jnp.copy, params), stage.trainable)
    rule = make_optimizer(stage, trainable, layer_axes())
    state = stages.init_train_state(rule, trainable, mesh())
    traces = [] if traces is None else traces
    step = stages.make_train_step(system or toy.Toy(rate=0.0), stage, rule, jax.random.key(1), state, mesh(), traces)
    for _ in range(updates):
        state, metrics = step(state, frozen, sharding.shard_batch(batch, mesh()))
    return state, jax.device_get(metrics)


def test_the_learning_rate_has_linear_warm_up_and_cosine_decay():
    stage = toy.stage(steps=110, warmup_steps=10, learning_rate=1.0, warmup_learning_rate=0.1, end_learning_rate=0.2)
    rate = optimizer_schedule(stage)
    found = [float(rate(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(found, [0.1, 0.55, 1.0, 0.6, 0.2], rtol=1e-6)


def test_the_learning_rate_decays_linearly_if_the_stage_says_so():
    stage = toy.stage(steps=110, warmup_steps=10, learning_rate=1.0, warmup_learning_rate=0.1, end_learning_rate=0.2)
    rate = optimizer_schedule(dataclasses.replace(stage, decay="linear"))
    np.testing.assert_allclose([float(rate(step)) for step in (0, 10, 35, 110)], [0.1, 1.0, 0.8, 0.2], rtol=1e-6)


def test_the_cosine_moves_by_epoch_as_in_the_training_code_of_lion():
    stage = toy.stage(steps=60_000, warmup_steps=0, learning_rate=1e-5, steps_per_epoch=6000)
    rate = optimizer_schedule(stage)
    for epoch in range(10):
        wanted = 0.5 * 1e-5 * (1 + np.cos(np.pi * epoch / 10))
        found = [float(rate(epoch * 6000 + step)) for step in (0, 1, 5999)]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    warmed = optimizer_schedule(dataclasses.replace(stage, warmup_steps=1000, warmup_learning_rate=0.0))
    found = [float(warmed(step)) for step in (0, 500, 1000, 5999, 6000)]
    np.testing.assert_allclose(found, [0.0, 5e-6, 1e-5, 1e-5, 0.5e-5 * (1 + np.cos(np.pi / 10))], rtol=1e-5)


def test_a_warm_up_longer_than_its_stage_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        rate = optimizer_schedule(toy.stage(steps=20, warmup_steps=1000, learning_rate=1.0, warmup_learning_rate=0.0))
    assert "never reaches its learning_rate" in caplog.text
    assert float(rate(20)) == pytest.approx(0.02)


def test_biases_norms_and_vectors_have_no_weight_decay_also_in_stacked_layers():
    decays = {
        "qformer/queries": (2, True),
        "soft_prompt": (1, False),
        "language/encoder/blocks/adapter/adapter_0/up/kernel": (2, True),
        "language/encoder/blocks/adapter/adapter_0/scale": (1, False),
        "language/encoder/blocks/adapter/ratio": (3, True),
        "qformer/groups/block_0/self_attention/q/bias": (2, False),
        "qformer_norm/scale": (1, False),
    }
    assert {path: optimizer_decays(path, axes) for path, (axes, _) in decays.items()} == {
        path: wanted for path, (_, wanted) in decays.items()
    }
    gate = {"blocks": {"gate": jnp.ones((3, 16))}}  # a vector for each of three layers
    stage = toy.stage(weight_decay=1.0, learning_rate=1.0, warmup_steps=0, clip_norm=0.0)
    for axes, moves in (({"blocks/gate": 1}, False), ({}, True)):
        rule = make_optimizer(stage, gate, axes)
        change, _ = rule.update(jax.tree.map(jnp.zeros_like, gate), rule.init(gate), gate)
        assert bool((change["blocks"]["gate"] != 0).all()) == moves


def test_layer_axes_of_the_toy_model_are_its_stacked_axes():
    assert layer_axes()["blocks/up/kernel"] == 1 and layer_axes()["output/kernel"] == 0


@pytest.mark.slow
def test_updates_are_those_of_torch_adamw_with_clipping():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    start = {"kernel": random.normal(size=(4, 3)), "bias": random.normal(size=3)}
    start = {name: value.astype(np.float32) for name, value in start.items()}
    grads = [{name: 3 * random.normal(size=x.shape).astype(np.float32) for name, x in start.items()} for _ in range(5)]
    stage = toy.stage(steps=5, weight_decay=0.3, learning_rate=0.1, clip_norm=1.0, betas=(0.8, 0.95))

    rule, ours = make_optimizer(stage, start), jax.tree.map(jnp.asarray, start)
    state = rule.init(ours)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    groups = [{"params": [theirs["kernel"]]}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, weight_decay=0.3, betas=(0.8, 0.95))
    for number, grad in enumerate(grads):
        updates, state = rule.update(jax.tree.map(jnp.asarray, grad), state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, value in theirs.items():
            value.grad = torch.tensor(grad[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = float(optimizer_schedule(stage)(number))
        adamw.step()
    for name in start:
        np.testing.assert_allclose(ours[name], theirs[name].detach().numpy(), atol=2e-6)


@pytest.mark.slow
def test_muon_updates_the_matrices_of_each_layer_as_torch_and_the_rest_with_adamw():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    shapes = {"q/kernel": (2, 6, 2, 4), "o/kernel": (2, 2, 4, 6), "up/kernel": (2, 6, 10), "words/table": (9, 6)}
    grads = {path: random.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    start = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
    stage = toy.stage(steps=5, warmup_steps=0, weight_decay=0.3, learning_rate=0.1, clip_norm=0.0, optimizer="muon")
    axes = dict.fromkeys(("q/kernel", "o/kernel", "up/kernel"), 1)

    def moved(stage):
        tree = trees.unflatten(jax.tree.map(jnp.asarray, start))
        rule = make_optimizer(stage, tree, axes)
        change, _ = rule.update(trees.unflatten(jax.tree.map(jnp.asarray, grads)), rule.init(tree), tree)
        return trees.flatten(change)

    ours, adamw = moved(stage), moved(dataclasses.replace(stage, optimizer="adamw"))
    np.testing.assert_allclose(ours["words/table"], adamw["words/table"], rtol=1e-6)
    flat = {"q/kernel": (6, 8), "o/kernel": (8, 6), "up/kernel": (6, 10)}
    for path, shape in flat.items():
        for layer in range(2):
            theirs = torch.nn.Parameter(torch.ones(shape))
            theirs.grad = torch.tensor(grads[path][layer].reshape(shape))
            torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw").step()
            change = theirs.detach().numpy() - 1
            # torch computes it in bfloat16
            np.testing.assert_allclose(ours[path][layer].reshape(shape), change, atol=2e-3, err_msg=path)
            assert np.abs(change + 0.03).max() > 0.02  # more than decay


@pytest.mark.slow
def adam_update(grads, **changes):
    """The last update (not its sign) by Adam alone of gradients of one matrix, and its optimizer state."""
    stage = toy.stage(learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=0.0, **changes)
    rule, tree = scale_by_adam(stage), {"kernel": jnp.zeros(grads[0].shape)}
    state = rule.init(tree)
    for grad in grads:
        update, state = rule.update({"kernel": jnp.asarray(grad)}, state, tree)
    return np.asarray(update["kernel"]), state


def test_first_moments_in_bfloat16_change_updates_within_their_rounding():
    grads = np.random.default_rng(0).normal(size=(4, 8, 6)).astype(np.float32)
    (exact, full), (rounded, half) = adam_update(grads), adam_update(grads, moment_dtype="bfloat16")
    assert (full.mu["kernel"].dtype, half.mu["kernel"].dtype, half.nu["kernel"].dtype) == ("f4", jnp.bfloat16, "f4")
    assert 0 < np.abs(exact - rounded).max() < 0.02


def test_factored_second_moments_are_those_of_adafactor_and_take_a_row_and_a_column():
    grads = np.random.default_rng(0).normal(size=(2, 130, 140)).astype(np.float32)
    update, state = adam_update(grads, second_moment="factored", betas=(0.9, 0.999))
    row = column = first = 0.0
    for number, grad in enumerate(grads.astype(np.float64), 1):
        decay = 1 - number**-0.8
        row = decay * row + (1 - decay) * (grad**2 + 1e-30).mean(axis=1)
        column = decay * column + (1 - decay) * (grad**2 + 1e-30).mean(axis=0)
        scaled = grad / np.sqrt(np.outer(row, column) / row.mean())
        first = 0.9 * first + 0.1 * scaled / max(1.0, np.sqrt((scaled**2).mean()))
    np.testing.assert_allclose(update, first, atol=1e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 130 * 140 + 300  # the first moment, and factors


def test_factors_of_second_moments_are_replicated_and_moments_split():
    on_two = sharding.make_mesh(sharding.MeshConfig(fsdp=2, data=1), jax.devices()[:2])
    split = jax.sharding.NamedSharding(on_two, jax.sharding.PartitionSpec("fsdp"))
    tree = {"kernel": jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=split)}
    stage = toy.stage(second_moment="factored", trainable=("kernel",))
    specs = jax.tree.leaves(abstract_opt_state(make_optimizer(stage, tree), tree, on_two))
    assert {leaf.shape for leaf in specs if not leaf.sharding.is_fully_replicated} == {(128, 256)}
    assert {(128,), (256,)} <= {leaf.shape for leaf in specs if leaf.sharding.is_fully_replicated}


def test_a_learning_rate_is_scaled_by_the_first_pattern_that_matches(params):
    trainable, _ = trees.split(params, ["blocks", "output"])
    grads = jax.tree.map(jnp.ones_like, trainable)
    plain = toy.stage(warmup_steps=0, weight_decay=0.0)
    scaled = dataclasses.replace(plain, lr_multipliers=(("blocks/up", 5.0), ("blocks", 0.5)))
    change = {}
    for stage in (plain, scaled):
        rule = make_optimizer(stage, trainable)
        change[stage] = trees.flatten(rule.update(grads, rule.init(trainable), trainable)[0])
    ratios = {path: float((change[scaled][path] / leaf).mean()) for path, leaf in change[plain].items()}
    factors = {"blocks/up/kernel": 5.0, "blocks/norm/scale": 0.5, "output/kernel": 1.0}
    assert {path: pytest.approx(ratios[path]) for path in factors} == factors


@pytest.mark.slow
def test_gradient_accumulation_over_unequal_microbatches_equals_the_whole_batch(params):
    whole, metrics = one_update(toy.stage(grad_accum_steps=1, trainable=[".*"]), params)
    pieces, parts = one_update(toy.stage(grad_accum_steps=4, trainable=[".*"]), params)
    weights = [toy.batch_of([row, row + 4]).loss_mask_BM.sum() for row in range(4)]
    assert len(set(weights)) > 1  # else a plain mean over the pieces would do
    for name in metrics:
        np.testing.assert_allclose(parts[name], metrics[name], rtol=2e-6, err_msg=name)
    for path, leaf in trees.flatten(whole.trainable).items():
        np.testing.assert_allclose(trees.flatten(pieces.trainable)[path], leaf, atol=2e-5, err_msg=path)


def test_train_step_is_compiled_once_per_stage(params):
    traces = []
    one_update(toy.stage(), params, updates=3, traces=traces)
    assert len(traces) == 1


def test_train_state_holds_no_frozen_parameters(params):
    state, _ = one_update(toy.stage(trainable=["output"]), params)
    assert set(state.trainable) == {"output"}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * trees.count_params(state.trainable)


def test_the_loss_comes_in_float32_and_frozen_bfloat16_changes_it_little(params):
    stage = toy.stage(trainable=["output"])
    trainable, frozen = trees.split(params, stage.trainable)
    _, wide = one_update(stage, params)
    _, narrow = one_update(stage, trees.merge(trainable, trees.cast(frozen, "bfloat16")))
    assert narrow["loss"].dtype == np.float32
    assert 0 < abs(narrow["loss"] - wide["loss"]) < 0.02


@pytest.mark.slow
def test_an_update_that_is_not_finite_changes_no_bit_of_parameters_and_optimizer(params):
    stage, poisoned = toy.stage(trainable=[".*"]), toy.batch_of(range(8), poison=3)
    trainable, _ = trees.split(params, stage.trainable)
    fresh = stages.init_train_state(make_optimizer(stage, trainable), trainable, mesh())
    state, metrics = one_update(stage, params, batch=poisoned)
    assert not metrics["accepted"] and np.isnan(metrics["loss"])
    for kept, old in ((state.trainable, params), (state.opt_state, fresh.opt_state)):
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(old), strict=True))
    assert int(state.step) == 1


@dataclasses.dataclass(frozen=True)
class Steep(toy.Toy):
    """The toy plus the root of 0: its loss is finite, its slope is not."""

    def loss(self, params, batch, key=None):
        value, metrics = super().loss(params, batch, key)
        bias = params["output"]["bias"]
        return value + jnp.sqrt((bias - jax.lax.stop_gradient(bias)).sum()), metrics


@pytest.mark.slow
def test_infinite_gradient_with_finite_loss_is_rejected(params):
    stage = toy.stage(trainable=[".*"])
    trainable, _ = trees.split(params, stage.trainable)
    fresh = stages.init_train_state(make_optimizer(stage, trainable), trainable, mesh())
    state, metrics = one_update(stage, params, system=Steep(rate=0.0))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert not metrics["accepted"] and int(state.step) == 1
    for kept, old in ((state.trainable, params), (state.opt_state, fresh.opt_state)):
        jax.tree.map(np.testing.assert_array_equal, kept, old)


@pytest.mark.slow
def test_dropout_depends_only_on_the_step(params):
    stage, system = toy.stage(trainable=["output"], learning_rate=0.0, warmup_steps=0), toy.Toy(rate=0.5)
    losses = [float(one_update(stage, params, system=system, updates=n)[1]["loss"]) for n in (1, 2, 2)]
    assert losses[1] == losses[2] != losses[0]


def test_a_schedule_that_cannot_run_is_refused_in_one_sentence(params):
    cases = {
        "two stages are named 'one'": (toy.stage(), toy.stage()),
        "has 0 steps": (toy.stage(steps=0),),
        "has no trainable patterns": (toy.stage(trainable=()),),
        "stage 'one': pattern 'blcoks' matches none .* did you mean 'blocks'": (toy.stage(trainable=("blcoks",)),),
        "stage 'one': pattern 'hint' matches none": (toy.stage(lr_multipliers=(("hint", 2.0),)),),
        "no stages": (),
    }
    for sentence, schedule in cases.items():
        with pytest.raises(UserError, match=sentence):
            stages.validate_stages(schedule, params)


def test_a_stage_replaces_fields_of_the_system_and_of_no_other():
    what = toy.experiment(toy.stage(system=(("attention", 0.25),)))
    assert stages.model_for_stage(what, what.stages[0]) == toy.Toy(attention=0.25)
    with pytest.raises(UserError, match="'depth', which is no field of Toy"):
        stages.model_for_stage(what, toy.stage(system=(("depth", 2),)))


@pytest.mark.slow
def test_checksums_show_that_only_trainable_parameters_changed(params):
    before = checkpoint.leaf_checksums(params)
    state, _ = one_update(toy.stage(trainable=["output"]), params)
    assert checkpoint.leaf_checksums(params) == before
    assert checkpoint.leaf_checksums({"output": state.trainable["output"]}).items().isdisjoint(before.items())
