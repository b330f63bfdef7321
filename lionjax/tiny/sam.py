# SPDX-License-Identifier: Apache-2.0
"""A small SAM that is worth freezing: it learns to cut out whatever lies in a box, from drawn scenes.

It hears no words and no names; the boxes are shaken a little, as those that a language model will point at.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lionjax.core import sharding
from lionjax.data import letterbox
from lionjax.data.scenes import render
from lionjax.data.scenes import world as scenes
from lionjax.models.vision.sam_decoder import Sam, enlarge
from lionjax.models.vision.sam_encoder import SamConfig
from lionjax.nn import losses

log = logging.getLogger(__name__)

FOCAL = 20.0  # SAM's weight


@dataclasses.dataclass(frozen=True)
class MasksConfig:
    """Sizes and schedule; `scenes` are drawn from the training split only, `shaken` in shares of a box's side."""

    sam: SamConfig
    scenes: int = 3_000
    steps: int = 1_200
    batch: int = 16
    boxes: int = 4
    shaken: float = 0.06
    rate: float = 1e-3
    seed: int = 0


def drawn(split: str, count: int, pixels: int, seed: int):
    """Pictures (N, S, S, 3), whose each pixel is (N, S, S), and the boxes of their things."""
    made = [scenes.sample(split, index, seed) for index in range(count)]
    image_NHWC = np.stack([scene.render(pixels) for scene in made])
    owner_NHW = np.stack([render.owners(scene.things, pixels) for scene in made]).astype(np.int8)
    boxes = [np.array([thing.box for thing in scene.things], np.float32) for scene in made]
    return image_NHWC, owner_NHW, boxes


def batch_of(c: MasksConfig, data, rows, rng, shaken: float):
    """(pictures for SAM, boxes (B, K, 4) in pixels, masks (B, K, S, S))."""
    image_NHWC, owner_NHW, boxes = data
    which_BK = np.stack([rng.integers(0, len(boxes[row]), c.boxes) for row in rows])
    box_BK4 = np.stack([boxes[row][which_K] for row, which_K in zip(rows, which_BK)])
    side_BK2 = box_BK4[..., 2:] - box_BK4[..., :2]
    noise_BK4 = shaken * rng.normal(size=box_BK4.shape) * np.tile(side_BK2, 2)
    mask_BKHW = owner_NHW[rows][:, None] == which_BK[..., None, None]
    pixels = image_NHWC.shape[1]
    image_BHWC = letterbox.sam_normalised(image_NHWC[rows], np.full((len(rows), 2), pixels))
    box_BK4 = np.clip(box_BK4 + noise_BK4, 0, 1) * pixels
    return image_BHWC, box_BK4.astype(np.float32), mask_BKHW


def train_masks(c: MasksConfig) -> tuple[dict, dict]:
    """Parameters of the SAM and its figures on held-out scenes."""
    side, sam = c.sam.image, Sam(c.sam)
    data = drawn("train", c.scenes, side, c.seed)
    test = drawn("heldout", 200, side, c.seed)
    rng = np.random.default_rng(c.seed)
    given = jnp.zeros((1, 4 * c.sam.grid, 4 * c.sam.grid))

    def init(key):
        box = jnp.zeros((1, 1, 4))
        return sam.init(key, jnp.zeros((1, side, side, 3)), None, None, box, given)["params"]

    params = sharding.init(init, jax.random.key(c.seed))
    schedule = optax.warmup_cosine_decay_schedule(0, c.rate, 200, c.steps, c.rate * 0.02)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.02))
    state = rule.init(params)

    def loss_of(params, image_BHWC, box_BK4, mask_BKHW):
        logits, iou = sam.apply({"params": params}, image_BHWC, box_BK4=box_BK4)
        logits_BKHW = enlarge(logits[:, :, 0], side)
        real_BK = jnp.ones(box_BK4.shape[:2], bool)
        terms = losses.mask_losses(logits_BKHW, iou[:, :, 0], mask_BKHW, real_BK)
        return FOCAL * terms["focal"] + terms["dice"] + terms["iou"], logits_BKHW

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, arrays):
        (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(params, *arrays)
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    begun = time.time()
    for number in range(c.steps):
        rows = rng.integers(0, c.scenes, c.batch)
        params, state, loss = step(params, state, batch_of(c, data, rows, rng, c.shaken))
        if number % 100 == 99:
            log.info("masks step %d loss %.4f %.0f s", number, float(loss), time.time() - begun)
    see = jax.jit(lambda params, arrays: loss_of(params, *arrays)[1])
    both = either = 0
    for at in range(0, len(test[0]), 20):
        arrays = batch_of(c, test, np.arange(at, at + 20), rng, 0.0)
        mask_BKHW = np.asarray(see(params, arrays)) > 0
        both += np.sum(mask_BKHW & arrays[2])
        either += np.sum(mask_BKHW | arrays[2])
    return params, {"ciou": round(float(both / either), 4)}
