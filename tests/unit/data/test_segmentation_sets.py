# SPDX-License-Identifier: Apache-2.0
"""Data of reasoning and semantic segmentation: ReasonSeg's outlines, labels as PNGs, parts of objects."""

import json

import numpy as np
import pytest
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data.datasets import coco, reason_seg
from lionjax.data.datasets.label_maps import LabelMaps, read_class_names
from lionjax.data.datasets.reason_seg import ReasonSeg, draw_labels, fill_polygon
from lionjax.data.pipeline import DataConfig
from lionjax.data.samples import examples
from lionjax.data.scenes import reasoning, tasks, world
from lionjax.evaluation.tasks import SCORERS

SIZE = (40, 30)


def distance_to_outline(corners, size) -> np.ndarray:
    """The distance in pixels of each pixel's place to the closed line through the corners."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    found = np.full(size[::-1], np.inf)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]]):
        length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-9)
        along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length, 0, 1)
        found = np.minimum(found, np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)))
    return found


def is_inside(corners, size) -> np.ndarray:
    """Whether each pixel's place is inside of the polygon, by the even-odd rule."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    found = np.zeros(size[::-1], bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]]):
        crosses = (y0 > y) != (y1 > y)
        found ^= crosses & (x < (x1 - x0) * (y - y0) / ((y1 - y0) or 1) + x0)
    return found


def random_polygons(count: int):
    random = np.random.default_rng(0)
    for _ in range(count):
        angles, radius = np.sort(random.random(random.integers(3, 9))) * 2 * np.pi, random.uniform(3, 13)
        points = np.stack([20 + radius * np.cos(angles), 15 + radius * np.sin(angles)], axis=1)
        yield [tuple(point) for point in points.astype(int).tolist()]


def test_a_polygon_has_its_inside_and_an_outline_within_one_pixel():
    for corners in random_polygons(40):
        mask, distance = fill_polygon(corners, SIZE), distance_to_outline(corners, SIZE)
        inside = is_inside(corners, SIZE)
        assert mask[inside & (distance > 1)].all() and not mask[~inside & (distance > 1)].any()
        assert all(mask[y, x] for x, y in corners)


def test_a_polygon_is_drawn_as_opencv_does_within_one_pixel():
    cv2 = pytest.importorskip("cv2")
    for corners in random_polygons(40):
        expected = np.zeros(SIZE[::-1], np.uint8)
        cv2.polylines(expected, np.array([corners], np.int32), True, 1, 1)
        cv2.fillPoly(expected, np.array([corners], np.int32), 1)
        np.testing.assert_array_equal(fill_polygon(corners, SIZE), expected > 0)
        canvas = Image.new("1", SIZE)
        reason_seg.ImageDraw.Draw(canvas).polygon(corners, fill=1, outline=1)
        differs = np.asarray(canvas) != (expected > 0)
        assert (distance_to_outline(corners, SIZE)[differs] <= 1).all()


def shape(label: str, *points) -> dict:
    return {"label": label, "points": [list(point) for point in points]}


LARGE = ((2.9, 2.9), (30.2, 2.1), (30.8, 25.9), (2.4, 25.5))
SMALL = ((5, 5), (10, 5), (10, 10), (5, 10))


def test_regions_are_drawn_largest_first_and_flags_are_dropped():
    shapes = [shape("ignore", *SMALL), shape("flag", (0, 0), (1, 1)), shape("target", *LARGE)]
    labels = draw_labels(shapes, SIZE, "here")
    assert labels[2, 2] == 1 and labels[25, 30] == 1, "fractions of pixels are cut, and the outline belongs to it"
    assert (labels[5:11, 5:11] == 255).all() and (labels == 255).sum() == 36
    assert (labels == 1).sum() == 29 * 24 - 36
    covered = draw_labels([shape("Ignored area", *LARGE), shape("a label", *SMALL)], SIZE, "here")
    assert (covered == 1).sum() == 36 and covered[2, 2] == 255


def test_a_polygon_with_two_points_is_refused():
    with pytest.raises(UserError, match="here has a polygon with 2 corners; give at least three"):
        draw_labels([shape("target", (1, 1), (5, 5))], SIZE, "here")


def write_reason_seg(folder, name: str, text: str, shapes, encoding: str = "utf-8") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE).save(folder / f"{name}.jpg")
    row = json.dumps({"text": [text], "is_sentence": "?" in text, "shapes": shapes}, ensure_ascii=False)
    (folder / f"{name}.json").write_bytes(row.encode(encoding))


def test_reason_seg_trains_with_masks_boxes_and_its_own_prompt(tmp_path):
    write_reason_seg(tmp_path / "train", "a", "Where could one sit?", [shape("target", *LARGE)])
    write_reason_seg(tmp_path / "train", "b", "the café", [shape("target", *SMALL)], "cp1252")
    write_reason_seg(tmp_path / "train", "c", "the line", [shape("target", (1, 1), (5, 5))])
    source = ReasonSeg(str(tmp_path), str(tmp_path))
    data = DataConfig(sources=(source,), on_bad_record="replace")
    found = {sample.name.removeprefix("reason_seg/"): sample for sample in examples(data, "res", "train")}
    assert set(found) == {"train/a.jpg", "train/b.jpg"}
    long, short = found["train/a.jpg"].example, found["train/b.jpg"].example
    assert (long.question, long.kind) == ("Where could one sit? Please output segmentation mask.", "long")
    assert "the café" in short.question and short.kind == "short"
    np.testing.assert_allclose(short.boxes, [(5 / 40, 5 / 30, 11 / 40, 11 / 30)])
    assert found["train/b.jpg"].masks().sum() == 36 and found["train/b.jpg"].masks().shape == (1, 30, 40)
    (problem,) = source.open("train", 10**6).row_problems()
    assert "polygon with 2 corners" in problem


def write_labels(folder, first: int) -> dict:
    labels = np.full(SIZE[::-1], 255, np.uint8)
    labels[5:15, 10:30] = first
    labels[20:, :8] = first + 2
    (folder / "labels" / "a").mkdir(parents=True)
    (folder / "images" / "a").mkdir(parents=True)
    for number, array in enumerate((labels, np.full_like(labels, 255))):
        Image.fromarray(array).save(folder / "labels" / "a" / f"{number}.png")
        Image.new("RGB", SIZE).save(folder / "images" / "a" / f"{number}.jpg")
    return {"image_dir": str(folder / "images"), "label_dir": str(folder / "labels"), "first_label": first}


@pytest.mark.parametrize(
    "first, text", [(1, '["wall", "floor", "sky-other"]'), (0, "0: wall\n1: floor\n2: sky-other\n")]
)
def test_label_maps_ask_for_a_class_of_the_image(tmp_path, first, text):
    """In ADE20K's numbers and in COCO-Stuff's; 255 and composite names are left out."""
    file = tmp_path / ("classes.json" if first else "classes.txt")
    file.write_text(text)
    fields = write_labels(tmp_path, first)
    for mark, words in (("", {"the wall", "the sky-other"}), ("-", {"the wall"})):
        source = LabelMaps(class_file=str(file), skip_mark=mark, **fields)
        opened = source.open("train", 10**6)
        assert opened.task_sizes == {"res": 2} and opened.record_name(0) == "a/0.jpg"
        truth = opened.load_record(0)[1]
        made = [opened.make_example("res", 0, truth, np.random.default_rng(seed), 0.0) for seed in range(12)]
        assert {f"the {example.kind}" for example in made} == words
        wall = next(example for example in made if example.kind == "wall")
        np.testing.assert_allclose(wall.boxes, [(0.25, 5 / 30, 0.75, 0.5)])
        mask = opened.masks(0, wall.targets)
        assert mask.shape == (1, 30, 40) and mask.sum() == 200 and mask[0, 5:15, 10:30].all()
        with pytest.raises(UserError, match="1.png has no pixel of a class"):
            opened.make_example("res", 1, opened.load_record(1)[1], np.random.default_rng(0), 0.0)


def test_label_maps_of_another_size_or_kind_are_refused(tmp_path):
    fields = write_labels(tmp_path, 1)
    (tmp_path / "names.txt").write_text("wall\n")
    opened = LabelMaps(class_file=str(tmp_path / "names.txt"), **fields).open("train", 10**6)
    truth = opened.load_record(0)[1]
    file = tmp_path / "labels" / "a" / "0.png"
    for picture, problem in (
        (Image.new("L", (20, 30), 1), "is 20 x 30 but its image 40 x 30"),
        (Image.new("RGB", SIZE), "cannot be read as class numbers"),
    ):
        picture.save(file)
        with pytest.raises(UserError, match=problem):
            opened.make_example("res", 0, truth, np.random.default_rng(0), 0.0)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no list of class names"):
        read_class_names(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="has no PNG of labels"):
        LabelMaps(str(tmp_path), str(tmp_path / "images"), str(tmp_path / "names.txt")).open("train", 10**6)


def test_parts_of_objects_are_said_in_words():
    assert coco.part_noun("cellular_telephone:back_cover") == "back cover of the cellular telephone"
    assert coco.part_noun("traffic light") == "traffic light"


def test_inferred_objects_are_the_only_ones_that_fit():
    """Each description is checked anew against its scene; held-out pairs occur in held-out scenes only."""
    kinds = set()
    for index in range(60):
        scene = world.sample_scene(("train", "heldout")[index % 2], index)
        for found in (found for kind in reasoning.KINDS.values() for found in kind(scene)):
            kinds.add(found.kind)
            thing, others = scene.things[found.target], [t for k, t in enumerate(scene.things) if k != found.target]
            if found.kind == "hides":
                assert thing.covers and found.description == f"what hides a part of {found.noun}"
                continue
            if found.kind == "farthest":
                continue
            noun = found.noun.removeprefix("the ").removesuffix(" object")
            attribute = "shape" if noun == thing.shape else "color"
            other = reasoning.OTHER[attribute]
            group = [t for t in others if getattr(t, attribute) == noun]
            assert noun == getattr(thing, attribute) and group
            value = getattr(thing, other)
            if found.kind == "odd":
                assert value not in {getattr(t, other) for t in group} and len({getattr(t, other) for t in group}) == 1
                continue
            count = {"once": 1, "twice": 2}[found.kind]
            number = {t: sum(getattr(u, other) == getattr(t, other) for u in scene.things) for t in (thing, *group)}
            assert number[thing] == count and all(number[t] != count for t in group)
    assert kinds == set(reasoning.KINDS)


def test_the_task_of_reasoning_asks_for_one_mask_and_never_names_its_object():
    rng = np.random.default_rng(0)
    for index in range(30):
        scene = world.sample_scene("train", index)
        example = tasks.make_example("reason", scene, rng)
        (target,), (box,) = example.targets, example.boxes
        assert scene.things[target].box == box
        assert example.category == "region_level" and example.kind in {*reasoning.KINDS, "named"}


def test_masks_of_inferred_objects_are_scored_under_their_own_names():
    full, half = np.ones((2, 2), bool), np.array([[True, True], [False, False]])
    scores = SCORERS["reason"]([full, half], [half, half])
    assert (
        scores.metrics == {"reason_ciou": 4 / 6, "reason_giou": 0.75}
        and scores.per_sample.keys() == scores.metrics.keys()
    )
