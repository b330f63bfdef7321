# SPDX-License-Identifier: Apache-2.0
"""The small SAM: what it learns from is true, and the one that ships cuts things out where they lie in a picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from lionjax.core import params as trees
from lionjax.data import boxes as places
from lionjax.data.letterbox import SAM_MEAN, SAM_STD, Letterbox
from lionjax.data.processor import ImageTextInput, Processor, ProcessorConfig
from lionjax.data.scenes import world
from lionjax.models.vision import sam_decoder
from lionjax.models.vision.sam_decoder import Sam
from lionjax.models.vision.sam_encoder import TINY_SAM
from lionjax.tiny import sam as mask_backbone
from lionjax.tiny.sam import MasksConfig
from lionjax.training.init import resolve_weights_file

SIDE = TINY_SAM.image_size


def test_training_box_encloses_its_mask():
    c, rng = MasksConfig(TINY_SAM, num_boxes=3), np.random.default_rng(0)
    data = mask_backbone.render_split("train", 4, SIDE, 0)
    image_BHWC, box_BK4, mask_BKHW = mask_backbone.make_mask_batch(c, data, [0, 1, 2, 3], rng, 0.0)
    assert image_BHWC.shape == (4, SIDE, SIDE, 3) and mask_BKHW.any((2, 3)).all()
    for box, mask in zip(box_BK4.reshape(-1, 4), mask_BKHW.reshape(-1, SIDE, SIDE)):
        rows, columns = np.nonzero(mask)
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(edges, box, atol=2)
    _, shaken, _ = mask_backbone.make_mask_batch(c, data, [0, 1, 2, 3], np.random.default_rng(0), 0.1)
    assert 0.5 < np.abs(shaken - box_BK4).mean() < 10


def test_training_boxes_and_masks_belong_to_the_same_object():
    """Two things in a picture of 8 pixels: boxes in pixels, and the pixels that each owns."""
    owner_NHW = np.full((1, 8, 8), -1, np.int8)
    owner_NHW[0, 2:4, 1:5], owner_NHW[0, 5:8, 5:8] = 0, 1
    boxes = [np.array([[1, 2, 5, 4], [5, 5, 8, 8]], np.float32) / 8]
    data = np.full((1, 8, 8, 3), 200, np.uint8), owner_NHW, boxes
    c, rng = MasksConfig(TINY_SAM, num_boxes=6), np.random.default_rng(0)
    image_BHWC, box_BK4, mask_BKHW = mask_backbone.make_mask_batch(c, data, [0], rng, 0.0)
    np.testing.assert_allclose(image_BHWC[0, 0, 0], (200 - np.array(SAM_MEAN)) / SAM_STD, rtol=1e-5)
    found = set()
    for box, mask_HW in zip(box_BK4[0], mask_BKHW[0]):
        which = int(box[0] == 5)
        found.add(which)
        np.testing.assert_array_equal(box, [[1, 2, 5, 4], [5, 5, 8, 8]][which])
        wanted_HW = np.zeros((8, 8), bool)
        wanted_HW[[np.s_[2:4, 1:5], np.s_[5:8, 5:8]][which]] = True
        np.testing.assert_array_equal(mask_HW, wanted_HW)
    assert found == {0, 1}


def test_a_mask_of_the_padded_square_is_mapped_back_to_the_image():
    """A picture of 4 x 2 pixels lies in rows 1 and 2 of a square of 4."""
    logits_HW = np.arange(16.0).reshape(4, 4)
    made = sam_decoder.postprocess_masks(logits_HW, 4, (1, 0, 2, 4), (2, 4))
    np.testing.assert_allclose(made, [[4, 5, 6, 7], [8, 9, 10, 11]], atol=1e-6)
    made = sam_decoder.postprocess_masks(logits_HW, 4, (0, 1, 4, 2), (4, 2))
    np.testing.assert_allclose(made, logits_HW[:, 1:3], atol=1e-6)


@pytest.mark.slow
def test_the_shipped_sam_segments_objects_in_a_non_square_image():
    """Picture, box and mask all go into the padded square and come back: a slip of some pixels would show."""
    processor = Processor(
        ProcessorConfig(
            SIDE,
            max_prompt_tokens=64,
            max_question_tokens=32,
            pad_to_square=True,
            max_boxes=4,
            sam_image_size=SIDE,
            use_tags=False,
        )
    )
    params = trees.unflatten(
        {
            path.removeprefix("sam/"): leaf
            for path, leaf in load_file(resolve_weights_file("shipped:tiny_sam.safetensors")).items()
        }
    )

    @jax.jit
    def cut(image_BHWC, box_BK4):
        def masks(sam, image_BHWC, box_BK4):
            none = jnp.zeros((1, box_BK4.shape[1], 0, TINY_SAM.prompt_embed_dim))
            return sam.decode_boxes(sam.encode(image_BHWC), box_BK4 * SIDE, none)[0]

        return Sam(TINY_SAM).apply({"params": params}, image_BHWC, box_BK4, method=masks)

    shifts = ((0, 0), (0, 6), (0, -6), (6, 0), (-6, 0))
    both, either = np.zeros(5), np.zeros(5)
    for index in range(6):
        scene = world.sample_scene("heldout", index)
        high, wide = (250, 200) if index % 2 else (200, 250)
        at = (40, 0) if index % 2 else (0, 10)
        canvas = np.full((high, wide, 3), 190, np.uint8)
        canvas[at[0] : at[0] + 200, at[1] : at[1] + 200] = scene.render(200)
        for k, mask_HW in enumerate(scene.masks(200)[:4]):
            true_HW = np.zeros((high, wide), bool)
            true_HW[at[0] : at[0] + 200, at[1] : at[1] + 200] = mask_HW
            x0, y0, x1, y1 = (edge * 200 for edge in scene.things[k].box)
            box = ((x0 + at[1]) / wide, (y0 + at[0]) / high, (x1 + at[1]) / wide, (y1 + at[0]) / high)
            row = processor.encode_input(
                ImageTextInput(Image.fromarray(canvas), f"{places.box_to_text(box)}?", boxes=(box,))
            )
            batch = processor.collate({name: np.stack([value]) for name, value in row.items()})
            logits = np.asarray(cut(batch.sam_image_BHWC, batch.boxes_BK4[:, :1]))[0, 0]
            found_HW = (
                sam_decoder.postprocess_masks(logits, SIDE, Letterbox(wide, high).pixel_rect(SIDE), (high, wide)) > 0
            )
            for number, shift in enumerate(shifts):
                moved_HW = np.roll(found_HW, shift, (0, 1))
                both[number] += np.sum(moved_HW & true_HW)
                either[number] += np.sum(moved_HW | true_HW)
    overlap = both / either
    assert overlap[0] > 0.5 and (overlap[1:] < overlap[0] - 0.02).all(), overlap
