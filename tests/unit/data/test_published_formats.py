# SPDX-License-Identifier: Apache-2.0
"""Annotation files as they are published: Shikra, NExT-Chat, LAVIS, refer, COCO and ScienceQA."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from lionjax.core import config
from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.datasets import detect
from lionjax.data.datasets.coco import Coco, CocoRelease
from lionjax.data.datasets.karpathy import KarpathyCaptions
from lionjax.data.datasets.refer import Refer, read_plain_pickle
from lionjax.data.datasets.scienceqa import ScienceQa
from lionjax.data.datasets.shikra import ShikraJsonl
from lionjax.data.samples import examples


@pytest.fixture
def folder(tmp_path):
    """A folder with images of 100 x 50 pixels."""
    for name in ("1.jpg", "a.jpg", "train2014/a.jpg", "val2014/b.jpg", "train2017/a.jpg", "val2017/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (100, 50)).save(tmp_path / name)
    return tmp_path


def rows_file(folder, *rows, name="rows.jsonl"):
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return detect.detect_source(str(folder / name), str(folder))


def all_of(source, task, split="train"):
    data = DataConfig(sources=(source,), tag_noise=0.0)
    return [sample.example for sample in examples(data, task, split)]


def only(source, task, split="train"):
    (example,) = all_of(source, task, split)
    return example


# ------------------------------------------------------------------ Shikra and NExT-Chat

BOX, TEXT = (0.1, 0.2, 0.3, 0.6), "[0.100,0.200,0.300,0.600]"
OTHER, OTHER_TEXT = (0.5, 0.2, 0.7, 0.6), "[0.500,0.200,0.700,0.600]"
PIXELS, OTHER_PIXELS = [10, 10, 30, 30], [50, 10, 70, 30]


def close(boxes, *expected):
    return np.allclose(boxes, expected, atol=1e-9)


def test_an_expression_is_read_in_pixels_of_the_file_in_both_directions(folder):
    source = rows_file(folder, {"img_path": "a.jpg", "expression": "red square", "bbox": PIXELS})
    assert isinstance(source, ShikraJsonl)
    rec, reg = only(source, "rec"), only(source, "reg")
    assert close(rec.boxes, BOX) and "red square" in rec.question and rec.answer == f"Answer: {TEXT}"
    assert close(reg.question_boxes, BOX) and TEXT in reg.question and reg.answer == "red square"


def test_a_mask_row_of_next_chat_gives_its_mask(folder):
    outline = [[10, 10, 30, 10, 30, 30, 10, 30]]
    row = {"img_path": "a.jpg", "expressions": ["a", "b"], "bbox": PIXELS, "mask": outline, "height": 50, "width": 100}
    source = rows_file(folder, row)
    assert {e.answer for e in all_of(source, "res")} == {f"Answer: {TEXT}"} and len(all_of(source, "res")) == 2
    assert source.open("train", 10**6).masks(0, (0,))[0].sum() == pytest.approx(400, abs=45)


def test_a_phrase_with_several_boxes_has_them_behind_it(folder):
    sentence = "<ph_st>Two discs<ph_ed> above <ph_st>a square<ph_ed> ."
    row = {"image_id": "1", "sentence": sentence, "boxes": [PIXELS, OTHER_PIXELS], "boxes_seq": [[0, 1], [1]]}
    example = only(rows_file(folder, row), "grounded")
    assert example.answer == f"Two discs {TEXT} {OTHER_TEXT} above a square {OTHER_TEXT} ."
    assert close(example.boxes, BOX, OTHER, OTHER) and example.scene == "1.jpg"


def test_shikra_rd_has_boxes_in_question_and_answer(folder):
    row = {
        "img_path": "a.jpg",
        "question": "What is <ph_st>it<ph_ed>?",
        "cot_with_ans": "The <ph_st>disc<ph_ed>. The answer is red.",
        "boxes": [PIXELS, OTHER_PIXELS],
        "question_boxes_seq": [[1]],
        "answer_boxes_seq": [[0]],
        "answer": "red",
    }
    example = only(rows_file(folder, row), "conversation")
    assert example.question == f"What is it {OTHER_TEXT}?" and example.answer == f"The disc {TEXT}. The answer is red."
    assert close(example.question_boxes, OTHER) and close(example.boxes, BOX)


@pytest.mark.parametrize(
    ("row", "task", "question", "answer"),
    [
        ({"img_path": "a.jpg", "caption": "a disc"}, "caption", "", "a disc"),
        (
            {"image_path": "a.jpg", "question": "Color?", "annotation": {"multiple_choice_answer": "red"}},
            *("vqa", "Color?", "The answer is red."),
        ),
        (
            {"file_path": "a.jpg", "question": "Color?", "explanation": ["It glows."], "multiple_answers": "red"},
            *("vqa", "Color?", "It glows. So the answer is red."),
        ),
        (
            {"file_path": "a.jpg", "question": "Which?", "candidates": [PIXELS, OTHER_PIXELS], "answer": OTHER_PIXELS},
            *("box_vqa", f"Which? Candidates: {TEXT} {OTHER_TEXT} answer in box", f"The answer is {OTHER_TEXT} ."),
        ),
        (
            {"file_path": "a.jpg", "question": "What is", "bbox": PIXELS, "answer": "it", "point": [1, 2]},
            *("box_vqa", f"What is{TEXT}", "The answer is it ."),
        ),
        (
            {
                **{"img_fn": "a.jpg", "boxes": [[*PIXELS, 0.9]], "question": ["Why is", [0], "here ?"]},
                **{"answer_choices": [["no"], [[0], "waits"]], "answer_label": 1},
                **{"rationale_choices": [["It rains."]], "rationale_label": 0},
            },
            *("conversation", f"QUESTION: Why is {TEXT} here ?", f"It rains. {TEXT} waits"),
        ),
    ],
)
def test_every_kind_of_row_of_shikra_is_asked_as_its_code_does(folder, row, task, question, answer):
    example = only(rows_file(folder, row), task)
    assert question in example.question and example.answer == answer


@pytest.mark.parametrize("change", [{"boxes_seq": [[0]]}, {"boxes_seq": [[0], [2]]}, {"boxes": "none"}])
def test_boxes_that_do_not_fit_their_places_are_a_bad_record(folder, change):
    row = {"image_id": "1", "sentence": "<ph_st>a<ph_ed> <ph_st>b<ph_ed>", "boxes": [PIXELS], "boxes_seq": [[0], [0]]}
    with pytest.raises(UserError, match="line 1"):
        only(rows_file(folder, row | change), "grounded")


# ------------------------------------------------------------------ captions


def test_captions_of_lavis_are_grouped_by_image(folder):
    rows = [{"image": "train2014/a.jpg", "caption": f" c{i}", "image_id": "coco_1"} for i in range(3)]
    (folder / "coco_karpathy_train.json").write_text(json.dumps(rows))
    source = detect.detect_source(str(folder / "coco_karpathy_train.json"))
    assert isinstance(source, KarpathyCaptions) and only(source, "caption").answers == ("c0", "c1", "c2")
    (folder / "test.json").write_text(json.dumps([{"image": "val2014/b.jpg", "caption": ["x", "y"]}]))
    assert only(detect.detect_source(str(folder / "test.json")), "caption").answers == ("x", "y")
    inside = detect.detect_source(str(folder / "test.json"), str(folder / "val2014"))
    assert only(inside, "caption").scene == "b.jpg"


def test_karpathys_own_file_has_its_splits(folder):
    splits = {"a.jpg": "restval", "b.jpg": "test"}
    images = [
        {"filepath": f"{'train' if n == 'a.jpg' else 'val'}2014", "filename": n, "split": s, "sentences": [{"raw": s}]}
        for n, s in splits.items()
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}, indent=1))
    source = detect.detect_source(str(folder / "dataset_coco.json"))
    assert only(source, "caption").answer == "restval" and only(source, "caption", "heldout").answer == "test"


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("TextCaps_0.1_train.json", {"data": [{"image_id": "a", "caption_str": c, "image_name": "a"} for c in "xy"]}),
        ("filter_cap.json", {"annotations": [{"image_id": "a", "caption": c} for c in "xy"]}),
    ],
)
def test_captions_of_textcaps_and_minigpt4_are_grouped_by_image(folder, name, tree):
    (folder / name).write_text(json.dumps(tree, indent=1))
    source = detect.detect_source(str(folder / name), str(folder / "train2014"))
    assert isinstance(source, KarpathyCaptions)
    assert only(source, "caption").answers == ("x", "y") and only(source, "caption").scene == "a.jpg"


def test_answers_of_vqa_are_no_captions(folder):
    tree = {"annotations": [{"question_id": 1, "image_id": 1, "answers": []}]}
    (folder / "v2_mscoco_train2014_annotations.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="no format that is read"):
        detect.detect_source(str(folder / "v2_mscoco_train2014_annotations.json"))


# ------------------------------------------------------------------ COCO


def coco_tree(name, sizes=True):
    size = {"width": 100, "height": 50} if sizes else {}
    images, captions = [{"id": 1, "file_name": name} | size], [{"image_id": 1, "caption": f"of {name}"}]
    return {"images": images, "annotations": captions}


def test_coco_is_read_as_published_with_its_own_splits(folder):
    (folder / "annotations").mkdir()
    for part, name in (("train2017", "a.jpg"), ("val2017", "b.jpg")):
        tree = coco_tree(name)
        (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(tree))
        instance = {"image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20]}
        tree |= {"annotations": [instance], "categories": [{"id": 7, "name": "cat"}]}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(tree))
    source = detect.detect_source(str(folder))
    assert source == CocoRelease(str(folder), "train2017", "val2017", name=folder.name)
    assert config.from_json(config.to_json(source)) == source
    for split, name in (("train", "a.jpg"), ("heldout", "b.jpg")):
        assert only(source, "caption", split).answer == f"of {name}" and close(only(source, "rec", split).boxes, BOX)


def test_one_annotation_file_of_coco_is_read_with_and_without_sizes(folder):
    for sizes in (True, False):
        (folder / "captions_val2017.json").write_text(json.dumps(coco_tree("b.jpg", sizes)))
        source = detect.detect_source(str(folder / "captions_val2017.json"), str(folder / "val2017"))
        source = Coco(**{**source.__dict__, "heldout_fraction": 0.0})
        assert only(source, "caption").answer == "of b.jpg"


# ------------------------------------------------------------------ refer


def refer_folder(folder, refs_file="refs(unc).p", protocol=2, splits=("train", "testA", "testB")):
    refs = [
        {
            **{"ref_id": i, "ann_id": 5, "image_id": 1, "file_name": "a_5.jpg", "split": split, "category_id": 1},
            "sentences": [{"sent": f"red {split}", "raw": "Red"}, {"sent": "square", "raw": "Square"}],
        }
        for i, split in enumerate(splits)
    ]
    (folder / refs_file).write_bytes(pickle.dumps(refs, protocol))
    outline = [[10, 10, 30, 10, 30, 30, 10, 30]]
    image, instance = {"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}, {"id": 5, "image_id": 1}
    tree = {"images": [image], "annotations": [instance | {"bbox": [10, 10, 20, 20], "segmentation": outline}]}
    (folder / "instances.json").write_text(json.dumps(tree | {"categories": []}))
    return folder


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refer_has_its_published_splits_boxes_and_masks(folder, protocol):
    source = detect.detect_source(str(refer_folder(folder, protocol=protocol) / "refs(unc).p"), str(folder))
    assert isinstance(source, Refer) and len(all_of(source, "rec", "heldout")) == 4
    assert detect.detect_source(str(folder), str(folder)) == source
    rec = all_of(source, "rec")
    assert len(rec) == 2 and all(close(example.boxes, BOX) for example in rec)
    assert only(source, "reg").answers == ("red train", "square")
    assert source.open("train", 10**6).masks(0, (0,))[0].sum() == pytest.approx(400, abs=45)
    one = Refer(str(folder), str(folder), test_split="testB")
    assert {example.kind for example in all_of(one, "rec", "heldout")} == {"testB"}
    with pytest.raises(UserError, match="no split 'testC'; choose one of testA, testB, train"):
        Refer(str(folder), str(folder), test_split="testC").open("heldout", 1)


class Call:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("value", [Call(), [np.float64(1.0)], {"a": print}, {1, 2}.__class__, pytest.raises])
def test_a_pickle_that_names_any_class_or_function_is_refused_and_not_run(tmp_path, capsys, value):
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match="only numbers, texts, lists and dicts are read"):
        read_plain_pickle(tmp_path / "refs(unc).p")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("data", [b"", b"\x80\x02]q\x00", b"(lp0\nS'a", b"\x80\x02X\xff\xff\xff\x7fa."])
def test_a_damaged_pickle_is_one_sentence(tmp_path, data):
    (tmp_path / "r.p").write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as plain values"):
        read_plain_pickle(tmp_path / "r.p")


# ------------------------------------------------------------------ ScienceQA


@pytest.mark.parametrize("root", ["images/train", "train"])
def test_the_folder_of_scienceqa_is_recognized_with_both_places_of_images(tmp_path, root):
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "lecture": "", "solution": ""}
    problems = {"7": problem | {"image": "image.png"}, "8": problem | {"image": None}, "9": problem | {"image": None}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["7", "8", "9"], "val": [], "test": []}))
    (tmp_path / root / "7").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / root / "7" / "image.png")
    source = detect.detect_source(str(tmp_path))
    assert isinstance(source, ScienceQa) and [e.kind for e in all_of(source, "choice")].count("text") == 2


def test_statements_that_may_be_false_are_no_captions(folder):
    row = {"image": "a.jpg", "caption": "The cat is on the mat.", "label": 0}
    with pytest.raises(UserError, match="has no format that is read"):
        rows_file(folder, row)
    assert only(rows_file(folder, row | {"relation": "on"}), "relation").answer == "no"
