# SPDX-License-Identifier: Apache-2.0
"""Typed annotation rows: what is refused, what is converted, and that every failure of a row is a bad record."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.segmentations import segmentation_to_mask
from lionjax.data.datasets.source import open_split
from lionjax.data.datasets.vqa import Vqa
from lionjax.data.images import MAX_PIXELS
from lionjax.data.mixture import MixtureDataset
from lionjax.data.pipeline import batches
from lionjax.data.processor import ProcessorConfig
from lionjax.data.rle import encode_rle
from lionjax.data.samples import examples

GOOD = {"image": "a.png", "question": "What is it?", "answer": "a cat"}


@pytest.fixture
def lines(tmp_path):
    """Writes rows (or texts) as JSON Lines beside a.png and b.png of 50 x 40 pixels."""
    for name in "ab":
        Image.new("RGB", (50, 40), "red").save(tmp_path / f"{name}.png")

    def source(*rows) -> JsonLines:
        texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(texts), encoding="utf-8")
        return JsonLines(str(tmp_path / "rows.jsonl"), str(tmp_path))

    return source


def usable(source, task: str = "vqa") -> list:
    data = DataConfig(sources=(source,), tag_noise=0.0, on_bad_record="replace")
    return [sample.example for sample in examples(data, task, "train")]


def problem(source) -> str:
    """The error of a source with one row that cannot be read."""
    with pytest.raises(UserError) as error:
        MixtureDataset(DataConfig(sources=(source,)), "train")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def without(*keys, **more) -> dict:
    return {key: value for key, value in GOOD.items() if key not in keys} | more


BAD_ROWS = {
    # a misspelt key, or the image under another one
    "imgae": (without("image", imgae="a.png"), "'imgae'; write 'image'"),
    "Image": (without("image", Image="a.png"), "'Image'; write 'image'"),
    "picture": (without("image", picture="a.png"), "'picture'; write 'image'"),
    "img_path": (without("image", img_path="000123"), "'img_path'; write 'image'"),
    "imagePath": (without("image", imagePath="000123"), "'imagePath'; write"),
    "images": (without("image", images=["a.png"]), "'images'; write 'image'"),
    "suffix": (without("image", xyz="a.JPG"), "'xyz'; write 'image'"),
    "qestion": (without("question", qestion="?"), "'qestion'; write 'question'"),
    "answr": (without("answer", answr="red"), "'answr'; write 'answer'"),
    "boxs": (without(boxs=[[0, 0, 1, 1]]), "'boxs'; write 'boxes'"),
    "expresion": (without("question", task="rec", expresion="it"), "'expresion'; write 'expression'"),
    # values of another type
    "answer number": (without(answer=2), "2 as 'answer'"),
    "answer list of numbers": (without("answer", answers=["red", 2]), "as 'answers'"),
    "answer dict": (without("answer", answers={"answer": "red"}), "as 'answers'"),
    "question list": (without(question=["a?"]), "as 'question'"),
    "image number": (without(image=7), "7 as 'image'"),
    "image list": (without(image=["a.png"]), "as 'image'"),
    "task number": (without(task=1), "1 as 'task'"),
    "tags number": (without(tags=[1]), "as 'tags'"),
    "boxes text": (without(boxes="0 0 1 1"), "as 'boxes'"),
    "boxes of three": (without(boxes=[[0, 0, 1]]), "as 'boxes'"),
    "boxes of texts": (without(boxes=[["0", "0", "1", "1"]]), "as 'boxes'"),
    "box dict": (without(boxes=[{"x": 1}]), "as 'boxes'"),
    "nan": ('{"image": "a.png", "question": "?", "answer": "b", "boxes": [[0, 0, NaN, 1]]}', "as 'boxes'"),
    "width alone": (without(width=50), "null as 'height'"),
    "width text": (without(width="50", height="40"), "'50' as 'width'"),
    "width 0": (without(width=0, height=40), "0 as 'width'"),
    "width true": (without(width=True, height=True), "True as 'width'"),
    "boxes without image": (without("image", boxes=[[0, 0, 1, 1]]), "boxes but no image"),
    # no row at all
    "not JSON": ('{"image": "a.png"', "not valid JSON"),
    "list": ([1, 2], "[1, 2]; give a JSON object"),
    "nothing": ({}, "neither an answer nor boxes"),
    "blank answers": (without("answer", answers=["", " "]), "neither an answer nor boxes"),
}


@pytest.mark.parametrize(("row", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_with_its_line_and_the_others_are_used(lines, row, words):
    source = lines(GOOD, row, GOOD | {"image": "b.png"})
    message = problem(source)
    assert words in message and "rows.jsonl, line 2," in message
    assert [example.answer for example in usable(source)] == ["a cat"] * 2


def test_blank_lines_count_in_the_number_of_a_bad_line(lines):
    assert "rows.jsonl, line 4," in problem(lines(GOOD, "", "  ", "{"))


def test_one_text_is_a_list_of_one_and_four_numbers_are_one_box(lines):
    rows = [
        without("answer", answers="red", tags="dog"),
        without("answer", "question", task="rec", expression="it", boxes=[0.1, 0.2, 0.5, 0.5]),
    ]
    source = lines(*rows)
    (vqa,), (rec,) = usable(source), usable(source, "rec")
    assert vqa.answers == ("red",) and vqa.tags == ("dog",) and rec.boxes == ((0.1, 0.2, 0.5, 0.5),)


def test_other_unknown_keys_are_named_once_a_file_with_the_nearest_known_one(lines, caplog):
    rows = [GOOD | {"difficulty": 3, "imag": "b.png", "id": 1}, GOOD | {"difficulty": 4, "id": 2, "source": "x"}]
    assert len(usable(lines(*rows))) == 2
    named = [record.message for record in caplog.records if "is not read" in record.message]
    assert len(named) == 2 and any("'difficulty'" in m and "line 1" in m for m in named)
    assert any("'imag' (the nearest key that is read is 'image')" in message for message in named)


PIXELS = {"task": "rec", "expression": "it", "boxes": [[10, 5, 30, 15]], "width": 50, "height": 40}
FRACTIONS = {"task": "rec", "expression": "it", "boxes": [[0.2, 0.125, 0.6, 0.375]]}


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (FRACTIONS, "line 2, has boxes of a.png in fractions, but"),
        (PIXELS | {"width": 100, "height": 80}, "line 2, has boxes of a.png in pixels of 100 x 80"),
        ({"question": "?", "answer": "b", "width": 40, "height": 50}, "an earlier row 50 x 40"),
    ],
)
def test_boxes_of_one_image_in_different_units_are_refused(lines, second, words):
    source = lines({"image": "a.png"} | PIXELS, {"image": "a.png"} | second, {"image": "b.png"} | FRACTIONS)
    assert words in problem(source)
    assert {example.boxes for example in usable(source, "rec")} == {((0.2, 0.125, 0.6, 0.375),)}


@pytest.mark.parametrize("order", [1, -1])
def test_rows_without_boxes_leave_the_units_of_the_others_alone(lines, order):
    rows = [GOOD, {"image": "a.png"} | PIXELS, {"image": "b.png"} | FRACTIONS]
    rows += [GOOD | {"image": "b.png", "width": 50, "height": 40}]
    source = lines(*rows[::order])
    assert {example.boxes for example in usable(source, "rec")} == {((0.2, 0.125, 0.6, 0.375),)}
    assert len(usable(source)) == 2


def test_boxes_in_fractions_of_an_image_with_a_size_are_a_bad_record(lines):
    source = lines({"image": "a.png"} | PIXELS | {"boxes": [[0.2, 0.1, 0.6, 0.4]]})
    with pytest.raises(UserError, match="is in fractions, but"):
        list(examples(DataConfig(sources=(source,)), "rec", "train"))
    assert usable(source, "rec") == []


# ---------------------------------------------------------------------- masks

MASK = np.zeros((40, 50), bool)
MASK[5:15, 10:30] = True
RLE = encode_rle(MASK)
POLYGON = [10, 5, 30, 5, 30, 15, 10, 15]
COUNTS = [10 * 40 + 5, *[10, 30] * 19, 10, 25 + 20 * 40]
GOOD_MASKS = {"polygon": [POLYGON], "rle": RLE, "counts": {"size": [40, 50], "counts": COUNTS}}
BAD_MASKS = {
    "other size": ({**RLE, "size": [50, 40]}, "the size (height, width) [50, 40] but the image [40, 50]"),
    "larger": (encode_rle(np.pad(MASK, 5)), "the size (height, width) [50, 60]"),
    "sum": ({"size": [40, 50], "counts": COUNTS[:-1]}, "do not add up to its 2000 pixels"),
    "negative": ({"size": [40, 50], "counts": [*COUNTS, -5, 5]}, "do not add up"),
    "damaged": ({**RLE, "counts": RLE["counts"][:-2]}, "run lengths"),
    "characters": ({**RLE, "counts": "hello\x7f"}, "run lengths"),
    "no size": ({"counts": COUNTS}, "give polygons"),
    "two corners": ([[10, 5, 30, 5]], "has 4 numbers"),
    "odd": ([[10, 5, 30, 5, 30, 15, 10]], "has 7 numbers"),
    "second too short": ([POLYGON, [1, 2]], "has 2 numbers"),
    "text": (["10 5 30 5"], "give a list of numbers"),
    "flat": (POLYGON, "give a list of numbers"),
    "nan": ([[10, 5, float("nan"), 5, 30, 15]], "give a list of numbers"),
    "number": (7, "give polygons"),
    "outside": ([[60, 60, 70, 60, 70, 70]], "has no pixel"),
}


@pytest.mark.parametrize("segmentation", GOOD_MASKS.values(), ids=GOOD_MASKS)
def test_polygons_and_both_kinds_of_run_lengths_are_the_same_mask(segmentation):
    np.testing.assert_array_equal(segmentation_to_mask(segmentation, (40, 50)), MASK)


def test_compressed_run_lengths_of_random_masks_round_trip():
    rng = np.random.default_rng(0)
    for _ in range(30):
        height, width = rng.integers(1, 70, 2)
        mask = rng.random((height, width)) < rng.random()
        mask[0, 0] = True
        np.testing.assert_array_equal(segmentation_to_mask(encode_rle(mask), (height, width)), mask)


@pytest.fixture
def coco(tmp_path):
    """A COCO folder of four images with a cat each; the first has the given segmentation."""

    def write(segmentation) -> Coco:
        (tmp_path / "coco" / "images").mkdir(parents=True)
        entries, notes = [], []
        for k in range(4):
            Image.new("RGB", (50, 40), (60 * k, 0, 0)).save(tmp_path / "coco" / "images" / f"{k}.png")
            entries.append({"id": k, "file_name": f"{k}.png", "width": 50, "height": 40})
            note = {"image_id": k, "category_id": 1, "bbox": [10, 5, 20, 10], "iscrowd": 0}
            notes.append(note | {"segmentation": [POLYGON] if k else segmentation})
        tree = {"images": entries, "annotations": notes, "categories": [{"id": 1, "name": "cat"}]}
        (tmp_path / "coco" / "instances.json").write_text(json.dumps(tree))
        return Coco(str(tmp_path / "coco"), heldout_fraction=0)

    return write


@pytest.mark.parametrize(("segmentation", "words"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_a_bad_mask_is_a_bad_record_in_training_and_evaluation(coco, segmentation, words, tmp_path, stage):
    source = coco(segmentation)
    masks = ProcessorConfig(
        16, box_format="embeddings", max_boxes=2, pad_to_square=True, sam_image_size=16, use_tags=False
    )
    data = DataConfig(sources=(source,), processor=masks, num_threads=0)
    with pytest.raises(UserError) as error:
        [next(stream) for stream in [batches(data, stage("res"), 0, 4)]]
    assert words in str(error.value) and "0.png" in str(error.value) and "\n" not in str(error.value)
    lenient = DataConfig(
        sources=(source,), processor=masks, num_threads=0, on_bad_record="replace", max_bad_fraction=0.3
    )
    stream = batches(lenient, stage("res"), 0, 4)
    assert next(stream).masks_mask_BK.sum() == 4 and stream.num_bad_records == 1
    assert len(usable(source, "res")) == 3 and len(usable(source, "rec")) == 4


@pytest.fixture
def stage():
    class Stage:
        name = "stage"

        def __init__(self, task: str):
            self.mixture = ((task, 1.0),)

    return Stage


def test_data_build_leaves_out_bad_masks_and_bad_rows_and_lists_them(coco, lines, tmp_path):
    from lionjax.data.prepare import array_record_writer

    folder = array_record_writer.build(coco([[1, 2]]), tmp_path / "built")
    built = open_split(ArrayRecordDataset(str(folder)), "train", MAX_PIXELS)
    assert built.task_sizes == {"rec": 4, "res": 3, "reg": 4, "tags": 4}
    assert "0.png has 2 numbers" in (folder / array_record_writer.SKIPPED_FILE).read_text()
    source = lines(GOOD, BAD_ROWS["imgae"][0], "{", {"question": "2 + 2?", "answer": "4"})
    folder = array_record_writer.build(source, tmp_path / "lines")
    built = open_split(ArrayRecordDataset(str(folder)), "train", MAX_PIXELS)
    assert len(built) == 2 and built.task_sizes == {"vqa": 2}
    skipped = (folder / array_record_writer.SKIPPED_FILE).read_text().splitlines()
    assert ["line 2" in skipped[0], "line 3" in skipped[1]] == [True, True]


def test_bad_rows_are_counted_and_listed_like_unreadable_images(lines, tmp_path, stage):
    rows = [GOOD | {"answer": str(k)} for k in range(18)]
    source = lines(*rows, "{", without("image", imgae="a.png"))
    small = ProcessorConfig(image_size=16)
    data = DataConfig(sources=(source,), processor=small, on_bad_record="replace", num_threads=0)
    path = tmp_path / "bad.jsonl"
    data = DataConfig(
        sources=(source,),
        processor=small,
        on_bad_record="replace",
        max_bad_fraction=0.2,
        bad_records_path=str(path),
        num_threads=0,
    )
    stream = batches(data, stage("vqa"), 0, 20)
    next(stream)
    reasons = [json.loads(line)["reason"] for line in path.read_text().splitlines()]
    assert stream.num_bad_records == len(reasons) >= 2
    assert any("line 19" in reason for reason in reasons) and any("line 20" in reason for reason in reasons)


def test_bad_entries_of_vqa_files_are_bad_records(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    questions = [{"question_id": k, "image_id": 1, "question": "how many?"} for k in range(4)]
    questions[0]["question"] = ["how many?"]
    notes = [{"question_id": k, "answers": [{"answer": "two"}]} for k in range(4)]
    notes[1]["answers"] = "two"
    notes[2]["answers"] = [{"answer": 2}]
    for name, key, rows in (("q", "questions", questions), ("a", "annotations", notes)):
        (tmp_path / f"{name}.json").write_text(json.dumps({key: rows}))
    source = Vqa(str(tmp_path / "q.json"), str(tmp_path / "a.json"), str(tmp_path))
    opened = source.open("train", MAX_PIXELS)
    assert len(list(opened.row_problems())) == 3 and [e.answer for e in usable(source)] == ["two"]


def test_popes_labels_may_be_numbers(lines):
    source = lines(*({"image": "a.png", "text": "Is it red?", "label": label} for label in (1, 0, True, "no")))
    answers = [annotation.answers for annotation in source.open("train", MAX_PIXELS).annotations["existence"]]
    assert answers == [("yes",), ("no",), ("yes",), ("no",)]


def test_a_text_only_row_is_not_a_row_with_a_misspelt_image(lines):
    source = lines({"question": "2 + 2?", "answer": "4", "id": "7", "source": "sums"}, GOOD)
    assert sorted(example.answer for example in usable(source)) == ["4", "a cat"]
    assert not list(source.open("train", MAX_PIXELS).row_problems())
    assert Path(source.file).is_file()
