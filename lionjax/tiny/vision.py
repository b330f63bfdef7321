# SPDX-License-Identifier: Apache-2.0
"""A small ViT that sees scenes: trained to say what lies in each patch, then aligned with the words of the small T5."""

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
    """The ViT under training: for each patch, logits of every field and a code of the box."""

    c: ViTConfig

    @nn.compact
    def __call__(self, image_BHWC):
        x_BPD, _, _ = ViT(self.c, name="vision")(image_BHWC)
        h_BPD = LayerNorm(self.c.width, 1e-5, name="norm")(x_BPD[:, 1:])
        sizes = [len(values) for values in FIELDS.values()]
        out = nn.Dense(sum(sizes) + BOX_CODE_DIM, name="say")(h_BPD)
        return jnp.split(out, np.cumsum(sizes), axis=-1)


def vision_loss(params, model, image_BHWC, fields_BP6, box_code_BPC, color_shuffled):
    """Cross entropy of every field (attributes on covered patches only) and squared error of the code.

    Of `tinted` pictures, whose colors were exchanged, the color is not asked.
    """
    *logits, code_BPC = model.apply({"params": params}, image_BHWC)
    covered_BP = (fields_BP6[..., 4] > 0).astype(jnp.float32)
    weight_BP = covered_BP + (fields_BP6[..., 4] == 2)
    total = 0.0
    for number, scores in enumerate(logits):
        nats_BP = optax.softmax_cross_entropy_with_integer_labels(scores, fields_BP6[..., number])
        weight = (
            weight_BP * (1 - color_shuffled * (number == COLOR_FIELD))
            if number < 4
            else 1.0 + 3.0 * (weight_BP == 2)
            if number == 4
            else 0.1 + 0 * weight_BP
        )
        total += (nats_BP * weight).sum() / jnp.maximum(jnp.sum(weight + 0 * nats_BP), 1)
    error_BP = jnp.square(code_BPC - box_code_BPC).mean(-1)
    return total + 4 * (error_BP * weight_BP).sum() / jnp.maximum(weight_BP.sum(), 1)


def normalize_image(image_BHWC, mean, std):
    """uint8 -> what the processor gives."""
    return (image_BHWC.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def render_scenes(scenes, side: int, pixels: int):
    """Pictures and patch facts of scenes, stacked."""
    images = np.stack([scene.render(pixels) for scene in scenes])
    fields, boxes = zip(*(patch_labels(scene, side, pixels) for scene in scenes), strict=True)
    return images, np.stack(fields), np.stack(boxes)


def train_vision(c: BackbonesConfig, mean, std, init_params: dict | None = None) -> tuple[dict, dict]:
    """Parameters of the ViT and its figures on held-out scenes. From `start` on only the mirrored steps run."""
    side, pixels = c.vision.image_size // c.vision.patch_size, c.vision.image_size
    made = [world.sample_scene("train", index, c.seed) for index in range(c.num_scenes)]
    image_NHWC, fields_NP6, box_NP4 = render_scenes(made, side, pixels)
    test = render_scenes([world.sample_scene("heldout", index, c.seed) for index in range(500)], side, pixels)
    painter = PatchClassifier(c.vision)
    params = nn.unbox(
        jax.jit(painter.init)(jax.random.key(c.seed), normalize_image(image_NHWC[:1], mean, std))["params"]
    )
    if init_params is not None:
        params |= init_params
    steps = (0 if init_params is not None else c.vision_steps, c.augmented_steps)
    schedules = [make_optimizer(c.vision_learning_rate, number) for number in steps if number]

    @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=2)
    def step(params, state, tx, image, fields, code, tinted):
        loss, grads = jax.value_and_grad(vision_loss)(
            params, painter, normalize_image(image, mean, std), fields, code, tinted
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng, begun = np.random.default_rng(c.seed), time.time()
    for at in range(sum(steps)):
        if at in (0, steps[0]):
            tx = schedules.pop(0)
            state = tx.init(params)
        rows = rng.integers(0, c.num_scenes, c.vision_batch_size)
        batch = image_NHWC[rows], fields_NP6[rows], box_NP4[rows]
        image, fields, box = dihedral_augment(*batch, rng.integers(0, 8)) if at >= steps[0] else batch
        # Exchanged red, green and blue teach shapes that no color gives away.
        tinted = at >= steps[0] and rng.random() < 0.4
        image = image[..., rng.permutation(3)] if tinted else image
        params, state, loss = step(params, state, tx, image, fields, encode_box(box), np.float32(tinted))
        if at % 200 == 0:
            log.info("vision step %d loss %.4f %.0f s", at, float(loss), time.time() - begun)
        if at % 1000 == 999 or at == sum(steps) - 1:
            figures = evaluate_vision(params, painter, test, mean, std)
            log.info("vision step %d %s", at, figures)
    return params["vision"], figures


def evaluate_vision(params, model, test, mean, std) -> dict:
    """Accuracy of each field at centre patches, of roles everywhere, and the mean error of an edge."""
    image_NHWC, fields_NP6, box_NP4 = test
    run = jax.jit(lambda params, image: model.apply({"params": params}, normalize_image(image, mean, std)))
    parts = [run(params, image_NHWC[at : at + 100]) for at in range(0, len(image_NHWC), 100)]
    outs = [np.concatenate([np.asarray(part[number]) for part in parts]) for number in range(len(FIELDS) + 1)]
    centre_NP = fields_NP6[..., 4] == 2
    right = {
        name: float((outs[number].argmax(-1) == fields_NP6[..., number])[centre_NP].mean())
        for number, name in enumerate(ATTRIBUTES)
    }
    role_NP = outs[4].argmax(-1)
    right["centre_recall"] = float((role_NP == 2)[centre_NP].mean())
    right["centre_precision"] = float(centre_NP[role_NP == 2].mean())
    edges_NP4 = (outs[-1].reshape(*outs[-1].shape[:2], 4, -1)[..., -1] + 1) / 2
    right["edge_error"] = float(np.abs(edges_NP4 - box_NP4)[centre_NP].mean())
    return {name: round(value, 4) for name, value in right.items()}


def standardize(x_BPD):
    """Vectors of mean 0 and deviation 1."""
    x_BPD = x_BPD - x_BPD.mean(-1, keepdims=True)
    return x_BPD * jax.lax.rsqrt(jnp.square(x_BPD).mean(-1, keepdims=True) + 1e-5)


def embedding_difference_basis(embedding_KD):
    """An orthonormal basis of all differences between some words' embeddings: (K - 1, D)."""
    *_, basis = jnp.linalg.svd(embedding_KD - embedding_KD.mean(0), full_matrices=False)
    return basis[: len(embedding_KD) - 1]


def align_vision(c: BackbonesConfig, mean, std, vision_params: dict, reader_params: dict) -> tuple[dict, dict]:
    """A trained ViT whose features become what the T5 was told of each patch, and how near they come.

    `reader` is all that `train_language` keeps. Large ViTs are aligned with words too, by pairs of pictures and texts.
    """
    processor = Processor(ProcessorConfig(c.vision.image_size))
    side, pixels = c.vision.image_size // c.vision.patch_size, c.vision.image_size
    images, fields, boxes = render_scenes(
        [world.sample_scene("train", index, c.seed) for index in range(c.num_scenes)], side, pixels
    )
    model = make_scene_model(c.language, processor)
    vit, vision_params, reader_params = (
        ViT(c.vision),
        *(jax.tree.map(jnp.array, x) for x in (vision_params, reader_params)),
    )
    tx = make_optimizer(c.align_learning_rate, c.align_steps)
    state = tx.init(vision_params)

    table_VD = reader_params["language"]["embedding"]["table"]
    spans = [embedding_difference_basis(table_VD[np.array(ids)]) for ids in model.field_token_ids[: len(ATTRIBUTES)]]

    def errors(vision, image, fields, code):
        told = standardize(model.apply({"params": reader_params}, fields, code, method=model.embed_objects))
        x_BPD, _, _ = vit.apply({"params": vision}, normalize_image(image, mean, std))
        return standardize(x_BPD[:, 1:]) - told

    def loss_of(vision, image, fields, code, tinted, eager):
        error_BPD = errors(vision, image, fields, code)
        of_color_BPD = error_BPD @ spans[COLOR_FIELD].T @ spans[COLOR_FIELD]
        error_BPD -= tinted * of_color_BPD
        among_words = sum(jnp.square(error_BPD @ span.T).mean(-1) for span in spans) / len(spans)
        square_BP = 0.5 * jnp.square(error_BPD).mean(-1) + 0.5 * among_words
        weight_BP = 1.0 + eager * (fields[..., 4] == 2)
        return (square_BP * weight_BP).sum() / weight_BP.sum()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(vision, state, *arrays):
        loss, grads = jax.value_and_grad(loss_of)(vision, *arrays)
        updates, state = tx.update(grads, state, vision)
        return optax.apply_updates(vision, updates), state, loss

    rng, begun = np.random.default_rng(c.seed), time.time()
    for number in range(c.align_steps):
        rows = rng.integers(0, c.num_scenes, c.vision_batch_size)
        image, field, box = dihedral_augment(images[rows], fields[rows], boxes[rows], rng.integers(0, 8))
        tinted = rng.random() < 0.3  # red, green and blue exchanged; colors then do not count
        image = image[..., rng.permutation(3)] if tinted else image
        # Centres first; at the end every patch counts alike, or things would be seen where there are none.
        eager = 10 * (1 - number / c.align_steps)
        how = np.float32(tinted), np.float32(eager)
        vision_params, state, loss = step(vision_params, state, image, field, encode_box(box), *how)
        if number % 100 == 99:
            log.info("align step %d loss %.4f %.0f s", number, loss, time.time() - begun)
    image, field, box = render_scenes(
        [world.sample_scene("heldout", index, c.seed) for index in range(300)], side, pixels
    )
    square_BP = np.square(jax.jit(errors)(vision_params, image, field, encode_box(box))).mean(-1)
    centre_BP = field[..., 4] == 2
    figures = {
        "unexplained_centre": float(square_BP[centre_BP].mean()),
        "unexplained_rest": float(square_BP[~centre_BP].mean()),
    }
    return vision_params, {name: round(value, 4) for name, value in figures.items()}
