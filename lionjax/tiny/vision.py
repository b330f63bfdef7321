# SPDX-License-Identifier: Apache-2.0
"""Pretrains the tiny ViT on synthetic scenes: classifies patches, then is aligned with the tiny T5's embeddings."""

from __future__ import annotations

import functools
import logging
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.data.scenes import world
from lionjax.models.vision.vit import ViT, ViTConfig
from lionjax.nn.layers import LayerNorm
from lionjax.tiny.exercises import ATTRIBUTES, BOX_CODE_DIM, FIELDS, dihedral_augment, encode_box, patch_labels
from lionjax.tiny.language import make_scene_model
from lionjax.tiny.schedules import BackbonesConfig, make_optimizer

log = logging.getLogger(__name__)

COLOR_FIELD = list(FIELDS).index("color")


class PatchClassifier(nn.Module):
    """The ViT with a head: a list of logits (B, P, values) for each field, then box codes (B, P, BOX_CODE_DIM)."""

    c: ViTConfig

    @nn.compact
    def __call__(self, image_BHWC):
        x_BPD, _, _ = ViT(self.c, name="vision")(image_BHWC)
        h_BPD = LayerNorm(self.c.width, 1e-5, name="norm")(x_BPD[:, 1:])
        sizes = [len(values) for values in FIELDS.values()]
        out = nn.Dense(sum(sizes) + BOX_CODE_DIM, name="say")(h_BPD)
        return jnp.split(out, np.cumsum(sizes), axis=-1)


def vision_loss(params, model, image_BHWC, fields_BP6, box_code_BPC, color_shuffled):
    """Cross entropy of all fields (of attributes on covered patches only) and squared error of the box codes.

    `color_shuffled`: 1 if the image's color channels were permuted; then the color field has no loss.
    """
    *logits, code_BPC = model.apply({"params": params}, image_BHWC)
    covered_BP = (fields_BP6[..., 4] > 0).astype(jnp.float32)
    weight_BP = covered_BP + (fields_BP6[..., 4] == 2)
    total = 0.0
    for field, logits_BPV in enumerate(logits):
        nll_BP = optax.softmax_cross_entropy_with_integer_labels(logits_BPV, fields_BP6[..., field])
        weight = (
            weight_BP * (1 - color_shuffled * (field == COLOR_FIELD))
            if field < 4
            else 1.0 + 3.0 * (weight_BP == 2)
            if field == 4
            else 0.1 + 0 * weight_BP
        )
        total += (nll_BP * weight).sum() / jnp.maximum(jnp.sum(weight + 0 * nll_BP), 1)
    error_BP = jnp.square(code_BPC - box_code_BPC).mean(-1)
    return total + 4 * (error_BP * weight_BP).sum() / jnp.maximum(weight_BP.sum(), 1)


def normalize_image(image_BHWC, mean, std):
    """uint8 images normalized as by the processor."""
    return (image_BHWC.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def render_scenes(scenes, side: int, pixels: int):
    """Images (N, S, S, 3), fields (N, P, 6) and boxes (N, P, 4) of the patches of scenes; see `patch_labels`."""
    images = np.stack([scene.render(pixels) for scene in scenes])
    fields, boxes = zip(*(patch_labels(scene, side, pixels) for scene in scenes), strict=True)
    return images, np.stack(fields), np.stack(boxes)


def train_vision(c: BackbonesConfig, mean, std, init_params: dict | None = None) -> tuple[dict, dict]:
    """Parameters of the ViT and its accuracy on held-out scenes.

    With `init_params` only the steps with augmented images run.
    """
    side, pixels = c.vision.image_size // c.vision.patch_size, c.vision.image_size
    scenes = [world.sample_scene("train", index, c.seed) for index in range(c.num_scenes)]
    image_NHWC, fields_NP6, box_NP4 = render_scenes(scenes, side, pixels)
    test = render_scenes([world.sample_scene("heldout", index, c.seed) for index in range(500)], side, pixels)
    model = PatchClassifier(c.vision)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(c.seed), normalize_image(image_NHWC[:1], mean, std))["params"])
    if init_params is not None:
        params |= init_params
    steps = (0 if init_params is not None else c.vision_steps, c.augmented_steps)
    optimizers = [make_optimizer(c.vision_learning_rate, num_steps) for num_steps in steps if num_steps]

    @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=2)
    def train_step(params, state, tx, image, fields, code, color_shuffled):
        loss, grads = jax.value_and_grad(vision_loss)(
            params, model, normalize_image(image, mean, std), fields, code, color_shuffled
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng, start_time = np.random.default_rng(c.seed), time.time()
    for step in range(sum(steps)):
        if step in (0, steps[0]):
            tx = optimizers.pop(0)
            state = tx.init(params)
        rows = rng.integers(0, c.num_scenes, c.vision_batch_size)
        batch = image_NHWC[rows], fields_NP6[rows], box_NP4[rows]
        image, fields, box = dihedral_augment(*batch, rng.integers(0, 8)) if step >= steps[0] else batch
        # Permuted color channels make the model recognize shapes independently of their color.
        color_shuffled = step >= steps[0] and rng.random() < 0.4
        image = image[..., rng.permutation(3)] if color_shuffled else image
        arrays = image, fields, encode_box(box), np.float32(color_shuffled)
        params, state, loss = train_step(params, state, tx, *arrays)
        if step % 200 == 0:
            log.info("vision step %d loss %.4f %.0f s", step, float(loss), time.time() - start_time)
        if step % 1000 == 999 or step == sum(steps) - 1:
            figures = evaluate_vision(params, model, test, mean, std)
            log.info("vision step %d %s", step, figures)
    return params["vision"], figures


def evaluate_vision(params, model, test, mean, std) -> dict:
    """Accuracy of each attribute at center patches, recall and precision of the role "center", and mean edge error.

    The edge error is a fraction of the image side.
    """
    image_NHWC, fields_NP6, box_NP4 = test
    predict = jax.jit(lambda params, image: model.apply({"params": params}, normalize_image(image, mean, std)))
    parts = [predict(params, image_NHWC[start : start + 100]) for start in range(0, len(image_NHWC), 100)]
    outputs = [np.concatenate([np.asarray(part[index]) for part in parts]) for index in range(len(FIELDS) + 1)]
    center_NP = fields_NP6[..., 4] == 2
    figures = {
        name: float((outputs[field].argmax(-1) == fields_NP6[..., field])[center_NP].mean())
        for field, name in enumerate(ATTRIBUTES)
    }
    role_NP = outputs[4].argmax(-1)
    figures["center_recall"] = float((role_NP == 2)[center_NP].mean())
    figures["center_precision"] = float(center_NP[role_NP == 2].mean())
    edges_NP4 = (outputs[-1].reshape(*outputs[-1].shape[:2], 4, -1)[..., -1] + 1) / 2
    figures["edge_error"] = float(np.abs(edges_NP4 - box_NP4)[center_NP].mean())
    return {name: round(value, 4) for name, value in figures.items()}


def standardize(x_BPD):
    """Vectors with mean 0 and standard deviation 1."""
    x_BPD = x_BPD - x_BPD.mean(-1, keepdims=True)
    return x_BPD * jax.lax.rsqrt(jnp.square(x_BPD).mean(-1, keepdims=True) + 1e-5)


def embedding_difference_basis(embedding_KD):
    """An orthonormal basis (K - 1, D) of the differences between K embeddings (K, D)."""
    *_, basis = jnp.linalg.svd(embedding_KD - embedding_KD.mean(0), full_matrices=False)
    return basis[: len(embedding_KD) - 1]


def align_vision(c: BackbonesConfig, mean, std, vision_params: dict, reader_params: dict) -> tuple[dict, dict]:
    """Fine-tune the ViT so that its features match the T5's patch embeddings; returns parameters and the errors left.

    `reader_params`: the parameters from `train_language`. Stands in for the image-text pretraining of large ViTs.
    """
    processor = Processor(ProcessorConfig(c.vision.image_size))
    side, pixels = c.vision.image_size // c.vision.patch_size, c.vision.image_size
    images, fields, boxes = render_scenes(
        [world.sample_scene("train", index, c.seed) for index in range(c.num_scenes)], side, pixels
    )
    model = make_scene_model(c.language, processor)
    vit = ViT(c.vision)
    vision_params, reader_params = (jax.tree.map(jnp.array, x) for x in (vision_params, reader_params))
    tx = make_optimizer(c.align_learning_rate, c.align_steps)
    state = tx.init(vision_params)

    table_VD = reader_params["language"]["embedding"]["table"]
    bases = [embedding_difference_basis(table_VD[np.array(ids)]) for ids in model.field_token_ids[: len(ATTRIBUTES)]]

    def errors(vision, image, fields, code):
        target = standardize(model.apply({"params": reader_params}, fields, code, method=model.embed_objects))
        x_BPD, _, _ = vit.apply({"params": vision}, normalize_image(image, mean, std))
        return standardize(x_BPD[:, 1:]) - target

    def loss_fn(vision, image, fields, code, color_shuffled, center_weight):
        error_BPD = errors(vision, image, fields, code)
        color_error_BPD = error_BPD @ bases[COLOR_FIELD].T @ bases[COLOR_FIELD]
        error_BPD -= color_shuffled * color_error_BPD
        attribute_error_BP = sum(jnp.square(error_BPD @ basis.T).mean(-1) for basis in bases) / len(bases)
        square_BP = 0.5 * jnp.square(error_BPD).mean(-1) + 0.5 * attribute_error_BP
        weight_BP = 1.0 + center_weight * (fields[..., 4] == 2)
        return (square_BP * weight_BP).sum() / weight_BP.sum()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(vision, state, *arrays):
        loss, grads = jax.value_and_grad(loss_fn)(vision, *arrays)
        updates, state = tx.update(grads, state, vision)
        return optax.apply_updates(vision, updates), state, loss

    rng, start_time = np.random.default_rng(c.seed), time.time()
    for step in range(c.align_steps):
        rows = rng.integers(0, c.num_scenes, c.vision_batch_size)
        image, field, box = dihedral_augment(images[rows], fields[rows], boxes[rows], rng.integers(0, 8))
        color_shuffled = rng.random() < 0.3
        image = image[..., rng.permutation(3)] if color_shuffled else image
        # Extra weight of center patches decays to 0, because a constant one gives objects on empty patches.
        center_weight = 10 * (1 - step / c.align_steps)
        weights = np.float32(color_shuffled), np.float32(center_weight)
        vision_params, state, loss = train_step(vision_params, state, image, field, encode_box(box), *weights)
        if step % 100 == 99:
            log.info("align step %d loss %.4f %.0f s", step, loss, time.time() - start_time)
    image, field, box = render_scenes(
        [world.sample_scene("heldout", index, c.seed) for index in range(300)], side, pixels
    )
    square_BP = np.square(jax.jit(errors)(vision_params, image, field, encode_box(box))).mean(-1)
    center_BP = field[..., 4] == 2
    figures = {
        "unexplained_center": float(square_BP[center_BP].mean()),
        "unexplained_rest": float(square_BP[~center_BP].mean()),
    }
    return vision_params, {name: round(value, 4) for name, value in figures.items()}
