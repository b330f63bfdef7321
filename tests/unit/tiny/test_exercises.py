# SPDX-License-Identifier: Apache-2.0
"""Scenes as numbers: what the shipped backbones were taught must be true."""

import numpy as np
import pytest

from lionjax.data.scenes import world
from lionjax.tiny import exercises

SIDE, PIXELS = 8, 112
SCENES = [world.sample_scene("train", index) for index in range(12)]


def color_at(image_HWC, box) -> np.ndarray:
    x, y = (box[0] + box[2]) / 2 * PIXELS, (box[1] + box[3]) / 2 * PIXELS
    return image_HWC[int(np.clip(y, 0, PIXELS - 1)), int(np.clip(x, 0, PIXELS - 1))].astype(int)


def test_every_object_has_one_center_patch_that_shows_it():
    for scene in SCENES:
        fields_P6, box_P4 = exercises.patch_labels(scene, SIDE, PIXELS)
        owner = scene.masks(PIXELS)
        centers = np.flatnonzero(fields_P6[:, 4] == 2)
        boxes = {tuple(np.round(box_P4[at], 4)) for at in centers}
        # Two things may want one patch; then the one drawn later has it.
        assert len(scene.things) - 1 <= len(boxes) == len(centers) <= len(scene.things)
        for at in centers:
            k = int(np.abs(np.array([thing.box for thing in scene.things]) - box_P4[at]).sum(1).argmin())
            np.testing.assert_allclose(scene.things[k].box, box_P4[at], atol=1e-6)
            row, column = divmod(int(at), SIDE)
            cell = owner[k].reshape(SIDE, PIXELS // SIDE, SIDE, -1)[row, :, column]
            assert cell.any()
            assert fields_P6[at, 0] == world.SHAPES.index(scene.things[k].shape)


def test_empty_patches_are_labeled_nothing():
    for scene in SCENES:
        fields_P6, box_P4 = exercises.patch_labels(scene, SIDE, PIXELS)
        nothing = fields_P6[:, 4] == 0
        seen = scene.masks(PIXELS).any(0).reshape(SIDE, PIXELS // SIDE, SIDE, -1).mean((1, 3)).reshape(-1)
        assert seen[nothing].max(initial=0) < 0.5 and not box_P4[nothing].any()


@pytest.mark.parametrize("way", range(8))
def test_flipped_boxes_match_the_flipped_objects(way):
    image = np.stack([scene.render(PIXELS) for scene in SCENES])
    fields, boxes = map(np.stack, zip(*(exercises.patch_labels(scene, SIDE, PIXELS) for scene in SCENES)))
    turned = exercises.dihedral_augment(image, fields, boxes, way)
    for before, after in zip(zip(image, fields, boxes), zip(*turned)):
        seen = []
        for picture, field_P6, box_P4 in (before, after):
            center = np.flatnonzero(field_P6[:, 4] == 2)
            seen.append(sorted((int(field_P6[at, 1]), *(color_at(picture, box_P4[at]) // 86)) for at in center))
            x = (box_P4[center, 0] + box_P4[center, 2]) / 2
            assert np.abs(x - (center % SIDE + 0.5) / SIDE).mean() < 1 / SIDE
        same = sum(one == other for one, other in zip(*seen))
        assert same >= len(seen[0]) - 2  # a center may fall on an edge, one pixel further


def test_box_codes_differ_for_boxes_a_hundredth_apart():
    box = np.array([0.1, 0.2, 0.5, 0.6])
    code, other = exercises.encode_box(box), exercises.encode_box(box + 0.01)
    assert code.shape == (exercises.BOX_CODE_DIM,) and code.dtype == np.float32
    assert np.linalg.norm(code - other) > 0.3


def test_lookup_exercises_have_correct_answers():
    rng = np.random.default_rng(0)
    for index in range(300):
        scene = SCENES[index % len(SCENES)]
        example = exercises.lookup_exercise(scene, rng)
        asked, words = example.question.split(": ")
        for word, said in zip(words.split(", "), example.answer.split(", "), strict=True):
            found = said.removeprefix(word + " ")
            fits = [t for t in scene.things if word in (t.shape, t.color, t.size, t.texture, f"{t.color} {t.shape}")]
            if asked == "count":
                assert found == str(len(fits))
            elif asked == "there":
                assert found == ("yes" if fits else "no")
            else:
                assert {getattr(thing, asked) for thing in fits} == {found}
