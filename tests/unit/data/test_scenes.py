# SPDX-License-Identifier: Apache-2.0
"""The made-up world keeps its promises: same arguments same scene, exact truth, nothing hidden too far."""

import io
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scenes_digest import digest_of_nine

from lionjax.core.types import UserError
from lionjax.data.scenes import render
from lionjax.data.scenes import world as scenes
from lionjax.data.scenes.source import SceneSource
from lionjax.data.scenes.world import Scene, Thing, WorldConfig, sample_scene

# The digest of nine scenes. It may only change together with everything trained on the old ones.
GOLDEN_TRUTH = "837ae17972aa50de429fd49f2e3dc856ba6ac8faad56b6ad402559c9162ce7cc"


SOME = [sample_scene(split, index) for split in scenes.SPLITS for index in range(80)]


def test_equal_arguments_give_equal_scenes_and_other_arguments_others():
    assert sample_scene("train", 5, seed=1) == sample_scene("train", 5, seed=1)
    others = [sample_scene("train", 6, 1), sample_scene("train", 5, 2), sample_scene("validation", 5, 1)]
    assert all(other.things != sample_scene("train", 5, 1).things for other in others)


@pytest.mark.slow
def test_another_process_with_other_hashes_makes_the_same_scenes():
    code = "import scenes_digest as t; print(t.digest_of_nine())"
    variables = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables)
    assert done.stdout.split() == [GOLDEN_TRUTH]


# Two squares of half the picture's side, the second over the right half of the first. A square's
# sides lie at 0.86 of its extent: from 0.285 to 0.715, and from 0.535 to 0.965.
TWO = tuple(
    Thing("square", color, "large", "plain", x, 0.5, 0.5, 0.0, 1.0) for color, x in (("red", 0.5), ("blue", 0.75))
)


def test_masks_boxes_and_occlusion_of_two_squares_equal_hand_computed_values():
    things = scenes._with_visibility(TWO)
    # Of 256 pixels the first holds 73 to 182 across and down, the second 137 to 246 across.
    assert things[0].box == (73 / 256, 73 / 256, 137 / 256, 183 / 256)
    assert things[1].box == (137 / 256, 73 / 256, 247 / 256, 183 / 256)
    assert (things[0].visible, things[1].visible) == (round(64 / 110, 3), 1.0)
    assert (things[0].covers, things[1].covers) == ((), (0,))
    ground = scenes.Background("plain", (150, 160, 170), (0, 0, 0), 0.0, 6, 0)
    scene = Scene("train", 0, 0, ground, things)
    wanted = np.zeros((2, 20, 20), bool)
    wanted[0, 6:14, 6:11] = wanted[1, 6:14, 11:19] = True
    np.testing.assert_array_equal(scene.masks(20), wanted)
    picture = scene.render(20)
    for at, color in (((10, 8), "red"), ((10, 15), "blue")):
        np.testing.assert_array_equal(picture[at], render.RGB[color])
    np.testing.assert_array_equal(picture[0, 0], (150, 160, 170))


def test_scene_truth_has_the_digest_of_the_backbones_training_data():
    assert digest_of_nine() == GOLDEN_TRUTH


def test_a_scene_survives_json():
    for scene in SOME[:20]:
        assert Scene.from_json(scene.to_json()) == scene
        assert Scene.from_json(scene.to_json().encode()) == scene
        said = json.loads(scene.to_json())
        assert said["things"][0]["box"] == list(scene.things[0].box)
        assert [thing["color"] for thing in said["things"]] == [t.color for t in scene.things]
        assert (said["split"], said["index"]) == (scene.split, scene.index)


def test_boxes_are_tight_around_visible_pixels():
    for scene in SOME:
        for thing, mask in zip(scene.things, scene.masks(scenes.TRUTH_IMAGE_SIZE)):
            y, x = np.nonzero(mask)
            seen = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / scenes.TRUTH_IMAGE_SIZE
            np.testing.assert_array_equal(thing.box, seen)
        for thing, mask in zip(scene.things, scene.masks(64)):
            assert np.abs(np.subtract(render.mask_to_box(mask), thing.box)).max() <= 1.5 / 64


def test_masks_are_disjoint_and_the_image_changes_only_inside_them():
    for scene in SOME[:40]:
        masks = scene.masks(96)
        assert masks.sum(0).max() == 1
        top = len(scene.things) - 1
        without = replace(scene, things=scene.things[:top]).render(96)
        changed = (scene.render(96) != without).any(-1)
        grown = np.zeros_like(changed)
        for y, x in np.argwhere(masks[top]):
            grown[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = True  # smooth tips reach out
        assert not (changed & ~grown).any()
        assert (changed & masks[top]).sum() >= 0.98 * masks[top].sum()


def test_every_object_has_at_least_the_minimum_visible_fraction():
    world = WorldConfig(min_visible_fraction=0.75)
    crowded = [sample_scene("train", index, seed=3, world=world) for index in range(60)]
    for scene, least in [(s, WorldConfig().min_visible_fraction) for s in SOME] + [(s, 0.75) for s in crowded]:
        seen = scene.masks(scenes.TRUTH_IMAGE_SIZE).sum((1, 2))
        for thing, area in zip(scene.things, seen):
            _, whole = render.amodal_mask(thing, scenes.TRUTH_IMAGE_SIZE)
            assert area >= least * whole.sum()
            assert abs(area / whole.sum() - thing.visible) < 1e-3
            x0, y0, x1, y1 = thing.box
            assert min(x1 - x0, y1 - y0) >= WorldConfig().min_box_side - 1e-9
    assert min(thing.visible for scene in SOME for thing in scene.things) < 0.8


def test_covers_names_the_objects_that_an_object_clearly_hides():
    pixels, pairs = scenes.TRUTH_IMAGE_SIZE, 0
    for scene in SOME:
        masks = scene.masks(pixels)
        for j, thing in enumerate(scene.things):
            place, inside = render.amodal_mask(thing, pixels)
            hidden = [masks[k][place][inside].mean() for k in range(len(scene.things))]
            for k in set(range(len(scene.things))) - {j}:
                assert (j in scene.things[k].covers) == (hidden[k] > scenes.MIN_OCCLUSION)
                pairs += j in scene.things[k].covers
    assert pairs > 20


def test_objects_of_the_same_color_never_overlap():
    for scene in SOME:
        for color in {thing.color for thing in scene.things}:
            alike = [thing for thing in scene.things if thing.color == color]
            total = np.zeros((128, 128), int)
            for thing in alike:
                place, inside = render.amodal_mask(thing, 128)
                total[place] += inside
            assert total.max() == 1


def test_held_out_pairs_appear_in_the_heldout_split_only():
    for scene in SOME:
        pairs = {(thing.color, thing.shape) for thing in scene.things}
        assert bool(pairs & scenes.HELD_OUT_PAIRS) == (scene.split == "heldout")
    assert 9 <= len(scenes.HELD_OUT_PAIRS) <= 12
    trained = scenes.allowed_pairs("train")
    assert {color for color, _ in trained} == set(scenes.COLORS)
    assert {shape for _, shape in trained} == set(scenes.SHAPES)


@pytest.mark.slow
def test_training_has_every_other_pair_and_every_word():
    things = [t for index in range(600) for t in sample_scene("train", index).things]
    assert {(t.color, t.shape) for t in things} == set(scenes.allowed_pairs("train"))
    assert {t.size for t in things} == set(scenes.SIZES)
    assert {t.texture for t in things} == set(scenes.TEXTURES)
    counts = {len(scene.things) for scene in SOME}
    assert counts == set(range(WorldConfig().min_things, WorldConfig().max_things + 1))


def test_size_words_follow_the_extent_of_objects():
    for thing in (thing for scene in SOME for thing in scene.things):
        low, high = scenes.EXTENTS[thing.size]
        assert low <= thing.extent <= high
    small, medium, large = scenes.EXTENTS.values()
    assert small[1] < 0.9 * medium[0] and medium[1] < 0.9 * large[0]


def test_a_scene_is_the_same_at_another_resolution():
    for scene in SOME[:20]:
        if scene.background.kind == "speckled":  # its grain is finer than these pixels
            continue
        large, small = scene.render(256).astype(float), scene.render(64).astype(float)
        averaged = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(averaged - small).mean() < 4


def test_untextured_objects_are_drawn_in_their_color():
    for scene in SOME[:40]:
        image, masks = scene.render(128), scene.masks(128)
        for thing, mask in zip(scene.things, masks):
            if thing.texture == "plain":
                middle = np.median(image[mask], axis=0)
                nearest = min(scenes.COLORS, key=lambda c: np.abs(render.RGB[c] - middle).sum())
                assert nearest == thing.color


def test_a_scene_source_gives_records_by_index_and_can_be_pickled():
    source = SceneSource("heldout", 5, seed=2, image_size=48)
    record = source[3]
    assert len(source) == 5 and record["id"] == "heldout-2-000003"
    image = np.asarray(Image.open(io.BytesIO(record["image"])))
    np.testing.assert_array_equal(image, sample_scene("heldout", 3, 2).render(48))
    assert Scene.from_json(record["truth"]) == source.scene(3)
    assert pickle.loads(pickle.dumps(source))[3] == record
    assert source[np.int64(3)] == record
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize(
    "wrong, word",
    [
        (lambda: sample_scene("test", 0), "'test'"),
        (lambda: SceneSource("trian", 3), "'trian'"),
        (lambda: SceneSource("train", 0), "num_scenes is 0"),
        (lambda: SceneSource("train", 3, image_size=4), "image_size is 4"),
        (lambda: WorldConfig(min_things=1), "min_things=1"),
    ],
)
def test_wrong_arguments_are_one_clear_sentence(wrong, word):
    with pytest.raises(UserError, match=word):
        wrong()


def test_world_that_cannot_be_filled_raises_user_error(monkeypatch):
    monkeypatch.setattr(scenes, "_try_place_thing", lambda *_: False)
    with pytest.raises(UserError, match="set a smaller min_things"):
        sample_scene("train", 0)


BUILD = """
import json, sys
from lionjax.data.scenes.tfds_builder import StoredScenes, build
from lionjax.data.scenes.source import SceneSource
folder = build(sys.argv[1], sizes=(6, 3, 4), image_size=32, seed=7)
written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
again = build(sys.argv[1], sizes=(6, 3, 4), image_size=32, seed=7)
same = {
    split: all(StoredScenes(folder, split)[i] == SceneSource(split, size, 7, 32)[i] for i in range(size))
    and len(StoredScenes(folder, split)) == size
    for split, size in (("train", 6), ("validation", 3), ("heldout", 4))
}
untouched = again == folder and written == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
kinds = sorted({path.name.split(".")[1].split("-")[0] for path in folder.iterdir()})
print(json.dumps([same, untouched, kinds, "tensorflow" in sys.modules]))
"""


@pytest.mark.slow
def test_records_on_disk_equal_those_made_on_the_fly_and_need_no_tensorflow(tmp_path):
    done = subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], capture_output=True, text=True, check=True)
    same, untouched, kinds, tensorflow = json.loads(done.stdout.splitlines()[-1])
    assert same == {"train": True, "validation": True, "heldout": True}
    assert untouched, "building a second time wrote something"
    assert kinds == ["array_record", "json"]
    assert not tensorflow


def test_an_interrupted_build_leaves_no_complete_folder(tmp_path):
    from lionjax.data.scenes import tfds_builder

    class Broken(SceneSource):
        def __getitem__(self, index):
            raise OSError("disk full")

    good = tfds_builder.SceneSource
    tfds_builder.SceneSource = Broken
    try:
        with pytest.raises(Exception):  # noqa: B017 - TFDS wraps errors as it likes
            tfds_builder.build(tmp_path, sizes=(2, 1, 1), image_size=32)
    finally:
        tfds_builder.SceneSource = good
    folder = tfds_builder.build(tmp_path, sizes=(2, 1, 1), image_size=32)
    assert len(tfds_builder.StoredScenes(folder, "train")) == 2
