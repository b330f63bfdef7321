# SPDX-License-Identifier: Apache-2.0
"""Pretrains the tiny SAM (arXiv 2304.02643) to segment the object in a box, on synthetic scenes without any text.

The boxes are jittered, because those of a language model will not be exact.
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
from lionjax.core.renamed import renamed_fields
from lionjax.data import letterbox
from lionjax.data.scenes import render, world
from lionjax.models.vision.sam_decoder import Sam, resize_mask_logits
from lionjax.models.vision.sam_encoder import SamConfig
from lionjax.nn import losses
from lionjax.tiny.schedules import HeadsSchedule

log = logging.getLogger(__name__)

FOCAL_LOSS_WEIGHT = 20.0  # as in SAM


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class MasksConfig(HeadsSchedule):
    """Sizes and schedule of SAM. `box_jitter`: standard deviation per side of a box."""

    sam: SamConfig
    num_boxes: int = 4
    box_jitter: float = 0.06
    seed: int = 0


def render_split(split: str, num_scenes: int, pixels: int, seed: int):
    """Images (N, S, S, 3), uint8, instance ids of their pixels (N, S, S), int8, and the boxes of each scene (K, 4)."""
    sampled = [world.sample_scene(split, index, seed) for index in range(num_scenes)]
    image_NHWC = np.stack([scene.render(pixels) for scene in sampled])
    instance_NHW = np.stack([render.instance_id_map(scene.things, pixels) for scene in sampled]).astype(np.int8)
    boxes = [np.array([thing.box for thing in scene.things], np.float32) for scene in sampled]
    return image_NHWC, instance_NHW, boxes


def make_mask_batch(c: MasksConfig, data, rows, rng, box_jitter: float):
    """(SAM input images, jittered boxes (B, K, 4) in pixels, masks (B, K, S, S)) of random objects of scenes `rows`."""
    image_NHWC, instance_NHW, boxes = data
    index_BK = np.stack([rng.integers(0, len(boxes[row]), c.num_boxes) for row in rows])
    box_BK4 = np.stack([boxes[row][index_K] for row, index_K in zip(rows, index_BK)])
    side_BK2 = box_BK4[..., 2:] - box_BK4[..., :2]
    noise_BK4 = box_jitter * rng.normal(size=box_BK4.shape) * np.tile(side_BK2, 2)
    mask_BKHW = instance_NHW[rows][:, None] == index_BK[..., None, None]
    pixels = image_NHWC.shape[1]
    image_BHWC = letterbox.normalize_sam_image(image_NHWC[rows], np.full((len(rows), 2), pixels))
    box_BK4 = np.clip(box_BK4 + noise_BK4, 0, 1) * pixels
    return image_BHWC, box_BK4.astype(np.float32), mask_BKHW


def train_sam(c: MasksConfig) -> tuple[dict, dict]:
    """Parameters of the SAM and its cumulative IoU ("ciou") on held-out scenes with exact boxes."""
    side, sam = c.sam.image_size, Sam(c.sam)
    data = render_split("train", c.num_scenes, side, c.seed)
    test = render_split("heldout", 200, side, c.seed)
    rng = np.random.default_rng(c.seed)
    mask_prompt = jnp.zeros((1, 4 * c.sam.grid_size, 4 * c.sam.grid_size))

    def init(key):
        box = jnp.zeros((1, 1, 4))
        return sam.init(key, jnp.zeros((1, side, side, 3)), None, None, box, mask_prompt)["params"]

    params = sharding.init_sharded(init, jax.random.key(c.seed))
    schedule = optax.warmup_cosine_decay_schedule(0, c.learning_rate, 200, c.steps, c.learning_rate * 0.02)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.02))
    state = tx.init(params)

    def loss_fn(params, image_BHWC, box_BK4, mask_BKHW):
        logits, iou = sam.apply({"params": params}, image_BHWC, box_BK4=box_BK4)
        logits_BKHW = resize_mask_logits(logits[:, :, 0], side)
        valid_BK = jnp.ones(box_BK4.shape[:2], bool)
        terms = losses.mask_losses(logits_BKHW, iou[:, :, 0], mask_BKHW, valid_BK)
        return FOCAL_LOSS_WEIGHT * terms["focal"] + terms["dice"] + terms["iou"], logits_BKHW

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, arrays):
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *arrays)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    start_time = time.time()
    for step in range(c.steps):
        rows = rng.integers(0, c.num_scenes, c.batch_size)
        params, state, loss = train_step(params, state, make_mask_batch(c, data, rows, rng, c.box_jitter))
        if step % 100 == 99:
            log.info("masks step %d loss %.4f %.0f s", step, float(loss), time.time() - start_time)
    predict = jax.jit(lambda params, arrays: loss_fn(params, *arrays)[1])
    intersection = union = 0
    for start in range(0, len(test[0]), 20):
        arrays = make_mask_batch(c, test, np.arange(start, start + 20), rng, 0.0)
        mask_BKHW = np.asarray(predict(params, arrays)) > 0
        intersection += np.sum(mask_BKHW & arrays[2])
        union += np.sum(mask_BKHW | arrays[2])
    return params, {"ciou": round(float(intersection / union), 4)}
