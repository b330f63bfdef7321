# SPDX-License-Identifier: Apache-2.0
"""Rows of several examples: loss, metrics and gradients are those of one example in a row."""

import dataclasses

import jax
import leafwise
import mesh_systems
import numpy as np
import pytest
import small_nextchat
from text_batches import batch_of, padded

from lionjax.core import sharding
from lionjax.core.types import Batch
from lionjax.data.example_rows import example_lengths, pack_batch
from lionjax.models.vlm.nextchat import NextChat
from lionjax.models.vlm.text_lm import TextLM
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

LLAVA = mesh_systems.LLAVA
TOKEN = LLAVA.image_token_id
DECODER = dataclasses.replace(LLAVA.language, dropout=0.0)


def over(**language) -> VisualPrefixLM:
    return dataclasses.replace(LLAVA, language=dataclasses.replace(DECODER, **language))


SYSTEMS = {
    "LLaVA": LLAVA,
    "learned positions": over(max_positions=40, position_offset=2),
    "loss in chunks": over(loss_chunk=5),
    "an image only at its token": dataclasses.replace(LLAVA, prepend_image=False),
    "BLIP-2 over a decoder": mesh_systems.BLIP2,
    "Frozen": mesh_systems.FROZEN,
    "mPLUG-Owl": mesh_systems.MPLUG_OWL,
    "Kosmos-2": mesh_systems.KOSMOS2,
    "ALiBi": over(position_type="alibi"),
    "images in front of all prompts": dataclasses.replace(LLAVA, image_token_id=None),
    "text alone": TextLM(DECODER),
}
SLOW = (
    "learned positions",
    "an image only at its token",
    "BLIP-2 over a decoder",
    "Frozen",
    "mPLUG-Owl",
    "Kosmos-2",
    "ALiBi",
    "images in front of all prompts",
    "loss in chunks",
)


def examples(images: int = 1, vocab: int = 60) -> Batch:
    """Six unequal examples: an image within the prompt, none, at its end, and questions among the targets."""
    random = np.random.default_rng(0)

    def words(count):
        return random.integers(30, vocab, count).tolist()

    prompts = [
        [*words(2), TOKEN, *words(7)],
        [*words(3)],
        [*words(1), *[TOKEN] * images, *words(1)],
        [*words(5), *[TOKEN] * (images + 1)],  # the last one has no image
        [*words(9)],
        [TOKEN, *words(2)],
    ]
    targets = [words(count) for count in (3, 8, 1, 5, 2, 4)]
    stack = (images,) if images > 1 else ()
    image = random.standard_normal((6, *stack, LLAVA.vision.image_size, LLAVA.vision.image_size, 3))
    batch = batch_of(image.astype(np.float32), padded(prompts), padded(targets, 10))
    loss_mask = batch.target_mask_BM * (random.random(batch.target_BM.shape) < 0.7)
    return dataclasses.replace(batch, loss_mask_BM=loss_mask.astype(np.int32))


def packed(model, batch: Batch, examples_per_row: int = 3) -> Batch:
    """The batch in rows with a few tokens of padding after the longest one."""
    layout = model.info.row_layout
    return pack_batch(batch, layout, examples_per_row, lambda row, target: (row + 3, target + 2))


def assert_learns_alike(model, batch: Batch, examples_per_row: int = 3, tolerance: float = 2e-6):
    params = leafwise.init_leafwise(model.init, jax.random.key(0), batch)
    learn = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    (loss, metrics), grads = learn(params, batch)
    (packed_loss, packed_metrics), packed_grads = learn(params, packed(model, batch, examples_per_row))
    assert float(packed_loss) == pytest.approx(float(loss), rel=1e-5)
    assert packed_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert float(packed_metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    for (path, one), other in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(packed_grads)):
        np.testing.assert_allclose(other, one, 1e-4, tolerance * max(1, largest), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SYSTEMS])
def test_loss_and_gradients_of_rows_of_three_examples_are_those_of_one_in_a_row(name):
    assert_learns_alike(SYSTEMS[name], examples())


@pytest.mark.slow
def test_examples_of_two_images_keep_their_images():
    assert_learns_alike(LLAVA, examples(images=2), 2)


@pytest.mark.slow
def test_boxes_of_examples_in_one_row_keep_their_queries():
    tokens = {"q": small_nextchat.TRIGGER, "b": small_nextchat.LOCATION}

    def ids(text: str) -> list[int]:
        return [tokens.get(letter) or ord(letter) - ord("c") + 3 for letter in text]

    box = (0.1, 0.2, 0.5, 0.9), (0.3, 0.1, 0.4, 0.7), (0.0, 0.5, 0.6, 0.8)
    prompts, answers = ("cqbd", "e", "f", "gg"), ("qbj", "jqbkqb", "kk", "qbcqbqb")
    boxes = [box[:2], box[1:], box[:1], box]  # the third example's box stands in its text in digits
    batch = small_nextchat.batch_of([ids(p) for p in prompts], [ids(a) for a in answers], boxes)
    model: NextChat = small_nextchat.TINY
    assert_learns_alike(model, batch, 2)
    assert_learns_alike(model, batch, 4)


@pytest.mark.slow
def test_padded_positions_and_other_examples_of_a_row_change_no_logits():
    batch = examples()
    params = leafwise.init_leafwise(LLAVA.init, jax.random.key(0), batch)
    logits = np.asarray(LLAVA.logits(params, batch))
    rows = packed(LLAVA, batch, 2)
    packed_logits = np.asarray(LLAVA.logits(params, rows))
    for row, (records, segments) in enumerate(zip(rows.record_B, rows.segment_BL)):
        starts = np.cumsum([0, *batch.target_mask_BM[records].sum(axis=1)])
        assert set(segments) == {0, 1, 2}
        for record, first, last in zip(records, starts, starts[1:]):
            np.testing.assert_allclose(packed_logits[row, first:last], logits[record, : last - first], 1e-4, 1e-4)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_layout_counts_the_image_tokens_that_the_model_makes(name):
    model = SYSTEMS[name]
    if isinstance(model, TextLM):
        return
    batch = examples()
    params = sharding.abstract_params(model.init, jax.random.key(0), batch)
    _, cache = jax.eval_shape(lambda params: model.prefill(params, batch, 1), params)
    assert cache.prompt[0].shape[3] == batch.prompt_BL.shape[1] + model.tokens_per_image
    assert (example_lengths(batch, model.info.row_layout)[0] > 0).all()
