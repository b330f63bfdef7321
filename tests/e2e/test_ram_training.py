# SPDX-License-Identifier: Apache-2.0
"""RAM learns: a tiny one, with its own loss, names things in pictures that it has not seen."""

import functools

import compile_flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.models.vision.ram import Ram, RamConfig
from lionjax.models.vision.swin import SwinConfig
from lionjax.nn import losses

SIDE, CELL = 24, 12
COLORS = np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]])
STEP = np.indices((CELL - 4, CELL - 4)) - (CELL - 5) / 2
SHAPES = (
    np.abs(STEP).max(0) < 4,  # square
    np.abs(STEP).sum(0) < 4.5,  # diamond
    np.abs(STEP).min(0) < 1,  # cross
    np.abs(STEP[0]) < 2,  # bar
)
TAGS = len(COLORS) * len(SHAPES)
C = RamConfig(
    SwinConfig(SIDE, 2, 24, (2, 2), (2, 4), 3, 2.0, drop_path_rate=0.0), TAGS, 16, 32, 32, 2, 64, 2, dropout=0.0
)


def scenes(rng, number: int):
    """Pictures of up to four things, each a bit off its place: (B, H, W, 3) and which tags hold (B, V)."""
    image_BHWC = 0.1 * rng.standard_normal((number, SIDE, SIDE, 3)).astype(np.float32)
    target_BV = np.zeros((number, TAGS), bool)
    size = CELL - 4
    for picture, target in zip(image_BHWC, target_BV):
        for y, x in np.ndindex(2, 2):
            if rng.random() < 0.6:
                tag, (down, right) = rng.integers(TAGS), rng.integers(0, 5, 2)
                color, shape = COLORS[tag % len(COLORS)], SHAPES[tag // len(COLORS)]
                at = picture[y * CELL + down :, x * CELL + right :][:size, :size]
                at[shape] = color * rng.uniform(0.6, 1)
                target[tag] = True
    return image_BHWC, target_BV


def mean_average_precision(score_BV, target_BV) -> float:
    """The mean over tags of the average precision of pictures sorted by score."""
    found = []
    for score, target in zip(score_BV.T, target_BV.T):
        right = target[np.argsort(-score)]
        found.append((right.cumsum() / np.arange(1, len(right) + 1))[right].mean())
    return float(np.mean(found))


def beginning(key):
    """First weights: kernels as wide as narrow layers want them, and names that differ, as CLIP's embeddings do."""
    made = sharding.init_sharded(lambda key: Ram(C).init(key, jnp.zeros((1, SIDE, SIDE, 3)))["params"], key)
    flat = trees.flatten(made)
    flat |= {path: 7 * leaf for path, leaf in flat.items() if path.endswith("kernel")}
    return trees.unflatten(flat | {"labels": jax.random.normal(key, (TAGS, C.label_embed_dim))})


@pytest.mark.slow
def test_a_trained_tiny_ram_finds_the_tags_of_an_image_and_none_in_another():
    rng, params, steps = np.random.default_rng(0), beginning(jax.random.key(0)), 300
    adam = optax.adam(optax.linear_schedule(0, 3e-3, 50))

    def loss(params, image_BHWC, target_BV):
        return losses.asymmetric_loss(Ram(C).apply({"params": params}, image_BHWC), target_BV)

    @functools.partial(jax.jit, compiler_options=compile_flags.OPTIMIZED)
    def step(params, state, image_BHWC, target_BV):
        grads = jax.grad(loss)(params, image_BHWC, target_BV)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = adam.init(params)
    for _ in range(steps):
        params, state = step(params, state, *scenes(rng, 48))
    image_BHWC, target_BV = scenes(np.random.default_rng(1), 500)
    score_BV = np.asarray(jax.jit(Ram(C).apply)({"params": params}, image_BHWC))
    mine, shuffled = (mean_average_precision(score, target_BV) for score in (score_BV, np.roll(score_BV, 1, 0)))
    assert mine > 0.9 and mine > 2 * shuffled, (mine, shuffled)
