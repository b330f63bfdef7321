# SPDX-License-Identifier: Apache-2.0
"""Losses of boxes and masks: their values, what does not count, and what must stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lionjax.core.sharding import MeshConfig, make_mesh
from lionjax.nn import losses

FLAT = [0.4, 0.2, 0.4, 0.6]
POINT = [0.5, 0.5, 0.5, 0.5]
REVERSED = [0.8, 0.7, 0.3, 0.1]
BOXES = np.array(
    [[[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.9, 0.8]], [[0.0, 0.0, 1.0, 1.0], [0.7, 0.1, 0.8, 0.9]]], np.float32
)


def giou_of(one, other) -> float:
    """GIoU of two proper boxes, as its paper says it."""
    sides = [max(0, min(one[k + 2], other[k + 2]) - max(one[k], other[k])) for k in (0, 1)]
    both = sides[0] * sides[1]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    hull = np.prod([max(one[k + 2], other[k + 2]) - min(one[k], other[k]) for k in (0, 1)])
    return both / (sum(areas) - both) - (hull - sum(areas) + both) / hull


def test_giou_equals_the_paper_also_for_disjoint_and_nested_boxes():
    others = BOXES[::-1, ::-1]
    made = losses.generalized_iou(BOXES, others)
    wanted = [[giou_of(a, b) for a, b in zip(*rows)] for rows in zip(BOXES, others)]
    np.testing.assert_allclose(made, wanted, atol=1e-6)
    assert np.min(wanted) < 0 < np.max(wanted)
    np.testing.assert_allclose(losses.generalized_iou(BOXES, BOXES), 1, atol=1e-6)


@pytest.mark.parametrize("bad", [FLAT, POINT, REVERSED])
def test_a_degenerate_box_has_a_finite_giou_loss_and_gradient(bad):
    real = np.ones((1, 1))
    truth = BOXES[:1, 1:]

    def loss(box):
        return losses.giou_loss(box, truth, real)

    value, slope = jax.value_and_grad(loss)(jnp.asarray([[bad]], jnp.float32))
    assert np.isfinite(value) and value >= 1 and np.isfinite(slope).all()
    if bad == REVERSED:
        assert slope[0, 0, 3] < 0  # its lower edge lies above the truth
    both = losses.generalized_iou(jnp.asarray([[bad]]), jnp.asarray([[bad]]))
    assert np.isfinite(both).all()


def test_giou_of_the_released_code_skips_reversed_boxes_and_is_zero_without_others():
    predicted, real = BOXES.copy(), np.ones((2, 2))
    predicted[0, 0] = REVERSED
    truth = BOXES[::-1, ::-1]
    rest = [1 - giou_of(a, b) for a, b in zip(predicted.reshape(-1, 4)[1:], truth.reshape(-1, 4)[1:])]
    made = losses.giou_loss(predicted, truth, real, released_code=True)
    assert float(made) == pytest.approx(np.mean(rest), abs=1e-6)
    predicted[:] = REVERSED
    assert losses.giou_loss(predicted, truth, real, released_code=True) == 0


def all_losses(predicted, box, real, logits, iou, mask):
    terms = losses.mask_losses(logits, iou, mask, real)
    terms |= {f"original_{name}": term for name, term in losses.mask_losses(logits, iou, mask, real, True).items()}
    terms["giou"] = losses.giou_loss(predicted, box, real)
    terms["l1"] = losses.masked_mean(jnp.abs(predicted - box), real)
    return terms


def example(seed=0, rows=2):
    random = np.random.default_rng(seed)
    box = np.sort(random.random((rows, 3, 2, 2)), axis=2).reshape(rows, 3, 4).astype(np.float32)
    logits = random.normal(0, 3, (rows, 3, 8, 8)).astype(np.float32)
    iou = random.random((rows, 3)).astype(np.float32)
    return box[:, ::-1], box, random.random((rows, 3)) < 0.6, logits, iou, random.random((rows, 3, 8, 8)) < 0.4


@pytest.mark.slow
def test_padded_boxes_and_masks_have_no_loss_and_no_gradient():
    predicted, box, real, logits, iou, mask = example()

    def spoil(x):
        return np.where(real.reshape(2, 3, *(1,) * (x.ndim - 2)), x, 7).astype(x.dtype)

    spoiled = [spoil(x) for x in (predicted, logits, iou)]
    before = all_losses(predicted, box, real, logits, iou, mask)
    after = all_losses(spoiled[0], box, real, spoiled[1], spoiled[2], mask)
    for name in before:
        assert float(before[name]) == pytest.approx(float(after[name]), rel=1e-6), name
    slope = jax.grad(lambda p, x: sum(all_losses(p, box, real, x, iou, mask).values()), (0, 1))(predicted, logits)
    assert not np.asarray(slope[0])[~real].any() and np.asarray(slope[0])[real].any()
    assert not np.asarray(slope[1])[~real].any() and np.asarray(slope[1])[real].any()


def test_a_batch_without_a_box_or_a_mask_has_loss_zero_and_finite_gradients():
    predicted, box, real, logits, iou, mask = example()
    nothing = np.zeros_like(real)
    assert all(value == 0 for value in all_losses(predicted, box, nothing, logits, iou, mask).values())
    slope = jax.grad(lambda p: sum(all_losses(p, box, nothing, logits, iou, mask).values()))(predicted)
    assert not np.asarray(slope).any()


@pytest.mark.slow
def test_means_are_over_the_real_boxes_of_all_devices():
    arrays = example(1, rows=8)
    real = np.zeros((8, 3), bool)
    real[0], real[5, 1] = True, True  # most devices have none
    arrays = (*arrays[:2], real, *arrays[3:])
    mesh = make_mesh(MeshConfig(data=8))
    spread = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in arrays]
    there, here = jax.jit(all_losses)(*spread), all_losses(*arrays)
    for name in here:
        assert float(there[name]) == pytest.approx(float(here[name]), rel=1e-5), name


def test_mask_losses_are_their_formulas():
    logits, iou, mask, real = *example()[3:], np.ones((2, 3))
    x, y = logits.astype(np.float64).reshape(6, -1), mask.reshape(6, -1).astype(np.float64)
    share = 1 / (1 + np.exp(-x))
    nats = -(y * np.log(share) + (1 - y) * np.log(1 - share))
    for original, smooth, seen in ((False, 1, x > 0), (True, 6, x >= 0.5)):
        mean = nats.mean(1) if original else nats
        focal = (6 if original else 0.8) * (1 - np.exp(-mean)) ** 2 * mean
        dice = 1 - (2 * (share * y).sum(1) + smooth) / (share.sum(1) + y.sum(1) + smooth)
        error = (iou.reshape(6) - (seen * y).sum(1) / (seen + y > 0).sum(1)) ** 2
        wanted = {"focal": focal.mean(), "dice": dice.mean(), "iou": error.mean()}
        if original:
            wanted |= {"focal": focal.sum(), "dice": dice.sum()}
        made = losses.mask_losses(logits, iou, mask, real, original)
        assert {k: float(v) for k, v in made.items()} == pytest.approx(wanted, rel=1e-5)
