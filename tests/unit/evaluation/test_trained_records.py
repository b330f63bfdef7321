# SPDX-License-Identifier: Apache-2.0
"""Splits that all readers agree on, and evaluations that say when they ask about training records."""

import dataclasses
import json
import math
from io import StringIO

import pytest
from PIL import Image
from rich.console import Console

from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.refcoco import RefCoco
from lionjax.data.datasets.source import SPLITS
from lionjax.data.datasets.splits import split_key
from lionjax.data.datasets.vqa import Vqa
from lionjax.data.images import MAX_PIXELS
from lionjax.data.samples import examples
from lionjax.data.scenes.dataset import Scenes
from lionjax.evaluation.summary import describe_questions, metrics_table
from lionjax.evaluation.trained_records import TrainedRecords

COUNT = 40


@pytest.fixture(params=["{:012d}.jpg", "{}.jpg", "COCO_val2014_{:012d}.jpg", "cat_{:02d}.jpg"])
def folder(tmp_path, request):
    """The same images in COCO's, VQA's and RefCOCO's format and as JSON Lines, which has them a folder higher."""
    pattern, images = request.param, tmp_path / "photos"
    images.mkdir()
    names = [pattern.format(k) for k in range(COUNT)]
    for name in names:
        Image.new("RGB", (8, 8)).save(images / name)
    infos = [{"id": 7 * k, "file_name": name, "width": 8, "height": 8} for k, name in enumerate(names)]
    trees = {
        "captions": {"images": infos, "annotations": [{"image_id": 7 * k, "caption": "x"} for k in range(COUNT)]},
        "questions": {"questions": [{"question_id": k, "image_id": k, "question": "?"} for k in range(COUNT)]},
        "answers": {"annotations": [{"question_id": k, "answers": [{"answer": "a"}]} for k in range(COUNT)]},
        "refs": [
            {"img_id": "0_1", "file_name": n, "sents": "it", "bbox": [1, 1, 4, 4], "height": 8, "width": 8}
            for n in names
        ],
    }
    for name, tree in trees.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    rows = [{"image": f"photos/{name}", "question": "?", "answer": name} for name in names]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path, pattern


def readers(folder, fraction: float) -> list:
    root, pattern = folder
    images, file = str(root / "photos"), {name: str(root / f"{name}.json") for name in ("questions", "answers", "refs")}
    return [
        Coco(str(root), image_dir="photos", heldout_fraction=fraction),
        Vqa(file["questions"], file["answers"], images, pattern, heldout_fraction=fraction),
        RefCoco(file["refs"], images, heldout_fraction=fraction),
        JsonLines(str(root / "lines.jsonl"), str(root), heldout_fraction=fraction),
    ]


def test_an_image_is_in_the_same_split_whichever_reader_opens_it(folder):
    splits = []
    for source in readers(folder, 0.25):
        opened = {split: source.open(split, MAX_PIXELS) for split in SPLITS}
        names = {split: {i.name.split("/")[-1] for i in dataset.image_infos} for split, dataset in opened.items()}
        assert sum(map(len, names.values())) == COUNT and all(names.values())
        splits.append(names)
    assert splits[0] == splits[1] == splits[2] == splits[3]


def test_coco_names_of_different_years_are_one_image_and_short_names_count_their_folder():
    keys = {split_key("a", "COCO_train2014_000000000009.jpg"), split_key("b/c", "../x/000000000009.png")}
    assert keys == {"9"}
    assert split_key("data", "17/image.png") != split_key("data", "18/image.png")
    assert split_key("data", "17/image.png") == split_key("data/17", "./image.png")
    assert split_key("/old/place/images", "a.jpg") == split_key("images", "a.jpg")


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan, math.inf, "0.1", True, None])
def test_a_share_outside_of_0_to_1_is_refused(folder, fraction):
    with pytest.raises(UserError, match="heldout_fraction is"):
        readers(folder, fraction)
    for source in readers(folder, 0.0):
        with pytest.raises(UserError, match="heldout_fraction is"):
            dataclasses.replace(source, heldout_fraction=fraction)


def counts(data: DataConfig, task: str, split: str, train_data: DataConfig) -> tuple[int, int, bool]:
    """(questions, those about training records, whether something is held out)."""
    trained, samples = TrainedRecords(data, split, train_data), list(examples(data, task, split))
    for sample in samples:
        trained.add(sample)
    summary = trained.summary(task)
    return len(samples), summary["trained_on"], summary["has_splits"]


def test_questions_about_training_records_are_counted(folder):
    coco, vqa, _, lines = readers(folder, 0.25)
    own = DataConfig(sources=(lines,), on_bad_record="replace")
    held_out, trained, differ = counts(own, "vqa", "heldout", own)
    assert held_out > 0 and trained == 0 and differ
    assert counts(own, "vqa", "train", own)[1] > 0
    whole = DataConfig(sources=(dataclasses.replace(lines, heldout_fraction=0.0),), on_bad_record="replace")
    assert counts(whole, "vqa", "heldout", whole) == (COUNT, COUNT, False)
    # The file of the training, given as a source from which nothing is held out.
    train_size = len(list(examples(own, "vqa", "train")))
    assert counts(whole, "vqa", "heldout", own) == (COUNT, train_size, False)
    # Other questions about the same images.
    others = DataConfig(sources=(dataclasses.replace(vqa, heldout_fraction=0.0),), on_bad_record="replace")
    assert counts(others, "vqa", "heldout", own) == (COUNT, train_size, False)
    held_out_others = DataConfig(sources=(vqa,), on_bad_record="replace")
    assert counts(held_out_others, "vqa", "heldout", own)[1] == 0
    # Two sources of the same images, of which only one holds some out.
    both = DataConfig(sources=(lines, dataclasses.replace(coco, heldout_fraction=0.0)), on_bad_record="replace")
    assert counts(both, "vqa", "heldout", both) == (held_out, held_out, True)
    assert counts(own, "vqa", "heldout", DataConfig(sources=(Scenes(sizes=(2, 2, 2)),)))[1] == 0


def test_text_only_rows_and_scenes_are_compared_too(tmp_path):
    rows = [{"question": f"{k} + 1?", "answer": str(k + 1)} for k in range(COUNT)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = JsonLines(str(tmp_path / "text.jsonl"), str(tmp_path), 0.25)
    own = DataConfig(sources=(source,))
    held_out, trained, _ = counts(own, "vqa", "heldout", own)
    assert held_out > 0 and trained == 0
    whole = DataConfig(sources=(dataclasses.replace(source, heldout_fraction=0.0),))
    samples, trained, _ = counts(whole, "vqa", "heldout", own)
    assert samples == COUNT and trained == len(list(examples(own, "vqa", "train")))
    scenes = DataConfig(sources=(Scenes(sizes=(3, 2, 2), image_size=16),))
    assert counts(scenes, "vqa", "heldout", scenes) == (2, 0, True)
    assert counts(scenes, "vqa", "train", scenes) == (3, 3, True)


def test_the_table_says_what_was_held_out_and_what_was_trained_on():
    entry = {"benchmark": "vqa", "samples": 9, "split": "heldout", "metrics": {}, "intervals": {}, "details": {}}
    assert describe_questions(entry) == "9 questions of heldout"
    assert describe_questions(entry | {"trained_on": 0, "has_splits": True}) == "9 questions of heldout"
    some = describe_questions(entry | {"trained_on": 4, "has_splits": False})
    assert some == (
        "9 questions of all records (no split is held out), 4 of them about records that the model was trained on"
    )
    file = StringIO()
    Console(file=file, width=200).print(metrics_table(entry | {"trained_on": 9, "has_splits": False}))
    assert "all of them about records that the model was trained on" in " ".join(file.getvalue().split())
    assert "heldout" not in file.getvalue()
