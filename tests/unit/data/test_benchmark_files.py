# SPDX-License-Identifier: Apache-2.0
"""Files of published benchmarks: how many questions they have, the first one, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import shared_data
from PIL import Image

from lionjax.core import config
from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.datasets import detect
from lionjax.data.datasets.source import has_splits
from lionjax.data.rle import decode_rle
from lionjax.data.samples import examples

FILES = Path(__file__).resolve().parents[2] / "data" / "benchmarks"
TEN = ("red",) * 7 + ("dark red",) * 2 + ("maroon",)
CAPTIONS = ("a red square and a blue disc", "a square to the left of a disc")
# (file, second file, class, counts of the test split, first question: id, text, answers, choices, image)
CASES = [
    ("captions/coco_karpathy_test_gt.json", "", "CaptionReferences", {"caption": 4}, ("1", "", CAPTIONS, (), "1.jpg")),
    ("captions/coco_karpathy_test.json", "", "KarpathyCaptions", {"caption": 4}, ("1", "", CAPTIONS)),
    ("captions/dataset_coco.json", "", "KarpathyCaptions", {"caption": 2}, ("1", "", CAPTIONS)),
    ("captions/flickr30k_test.json", "", "KarpathyCaptions", {"caption": 4}, ("1", "", CAPTIONS)),
    ("captions/nocaps_val_4500_captions.json", "", "CaptionReferences", {"caption": 4}, ("0", "", CAPTIONS)),
    ("captions/TextCaps_0.1_val.json", "", "KarpathyCaptions", {"caption": 4}, ("1", "", CAPTIONS)),
    (
        *("vqa/v2_OpenEnded_mscoco_val2014_questions.json", "vqa/v2_mscoco_val2014_annotations.json", "Vqa"),
        *({"vqa": 4}, ("1000", "What color is the square?", TEN)),
    ),
    ("vqa/aokvqa_v1p0_val.json", "", "AOkvqa", {"vqa": 4}, ("q1AbCdEf", "What color is the square?", TEN, ("red",))),
    (
        *("vqa/TextVQA_0.5.1_val.json", "", "TextVqa", {"vqa": 4}),
        ("34601", "What color is the square?", TEN, (), "train_images/0000000000000001.jpg"),
    ),
    ("vqa/vizwiz_val.json", "", "VizWiz", {"vqa": 4}, ("VizWiz_val_00000001.jpg", "What color is the square?", TEN)),
    (
        *("vqa/ocrvqa_dataset.json", "", "OcrVqa", {"vqa": 6}),
        ("0000000003/0", "Who wrote this book?", ("Ann Other",), (), "0000000003.jpg"),
    ),
    (
        *("vqa/docvqa_val_v1.0.json", "", "DocVqa", {"vqa": 4}),
        ("101", "What is written?", ("12 May 1999", "May 12, 1999"), (), "documents/d1.png"),
    ),
    (
        *("vqa/gqa_testdev_balanced_questions.json", "", "Gqa", {"vqa": 4}),
        ("201", "What color is the square?", ("red",), (), "images/n1.jpg"),
    ),
    (
        *("vqa/iconqa_problems.json", "", "IconQa", {"choice": 3, "vqa": 1}),
        ("1", "How many shapes are there?\nA. 1\nB. 2\nC. 3", ("B",), ("1", "2", "3"), "test/choose_txt/1/image.png"),
    ),
    (
        *("vqa/vsr_zeroshot_test.jsonl", "", "Vsr", {"relation": 4}),
        ("", "Is this true of the image? The square is left of the disc.", ("yes",), (), "000000000001.jpg"),
    ),
    (
        *("vqa/visdial_1.0_val.json", "vqa/visdial_1.0_val_dense_annotations.json", "VisDial", {"conversation": 20}),
        ("1/1", "is it round", ("yes",), ("yes", "no", "red")),
    ),
    (
        *("vqa/hateful_memes_dev.jsonl", "", "HatefulMemes", {"vqa": 4}),
        (
            "1",
            'This is an image with: "words on the picture" written on it. Is it hateful?',
            ("yes",),
            (),
            "img/00001.png",
        ),
    ),
    (
        *("yes_no/mme", "", "Mme", {"vqa": 56}),
        ("existence/1.jpg/Is it so? Please answer yes or no.", "Is it so? Please answer yes or no.", ("yes",)),
    ),
    (
        "yes_no/coco_pope_random.json",
        "",
        "JsonLines",
        {"existence": 4},
        ("1", "Is there a square in the image?", ("yes",)),
    ),
    ("choice", "", "ScienceQa", {"choice": 4}, ("1", "Which one is round?\nContext: N/A", (), ("a square", "a disc"))),
    (
        *("choice/mmbench_circular.tsv", "", "MmBench", {"choice": 9}),
        ("1", "What is left?\nA. a square\nB. a disc\nC. a line", ("A",), ("a square", "a disc", "a line"), "1.jpg"),
    ),
    (
        *("choice/SEED-Bench.json", "", "SeedBench", {"choice": 4}),
        ("101", "What color is the disc?\nA. red\nB. green", ("B",), ("red", "green"), "SEED-Bench-image/1"),
    ),
    (
        *("judged/questions.jsonl", "judged/answers_gpt4.jsonl", "LlavaBench", {"conversation": 6}),
        ("0", "What is shown?", ("A red square beside a blue disc.",), (), "001.jpg"),
    ),
    (
        "judged/owleval_questions.jsonl",
        "",
        "OwlEval",
        {"conversation": 4},
        ("1", "What is odd here?", ("",), (), "1.jpg"),
    ),
    ("regions/reason_seg", "", "ReasonSeg", {"res": 1}, ("1", "", (), (), "val/1.jpg")),
    (
        *("regions/flickr30k_entities", "", "Flickr30kEntities", {"grounded": 3}),
        ("1/0", "", ("A red square <boxes> and a blue disc <boxes> on a pale ground .",), (), "1.jpg"),
    ),
    ("regions/refcoco/refs(unc).p", "", "Refer", {"rec": 10, "res": 10, "reg": 5}, ("2", "", ())),
    ("regions/REC_refcoco_unc_val.jsonl", "", "ShikraJsonl", {"rec": 8, "reg": 8}, ("", "", ())),
    ("regions/refcoco_minigpt4.json", "", "RefCoco", {"rec": 8, "reg": 8}, ("", "", ())),
]


def open_file(path, answers="", images="", split="heldout"):
    source = detect.detect_source(str(path), str(images), str(answers) if answers else "")
    return source, source.open(split, 10**7)


@pytest.mark.parametrize(("file", "answers", "name", "counts", "first"), CASES, ids=[case[0] for case in CASES])
def test_each_file_is_recognized_with_its_count_and_its_first_question(file, answers, name, counts, first):
    source, opened = open_file(FILES / file, FILES / answers if answers else "")
    assert type(source).__name__ == name and opened.task_sizes == counts and not list(opened.row_problems())
    assert config.from_json(config.to_json(source)) == source and (not answers or FILES / answers in source.paths())
    question = next(iter(opened.annotations.values()))[0]
    number, text, texts, choices, image = (*first, *((), "")[len(first) - 3 :])
    assert question.question_id == number and question.question.startswith(text)
    assert question.answers[: len(texts)] == texts and question.choices[: len(choices)] == choices
    assert opened.record_name(question.photo).endswith(image)


def test_facts_that_only_scorers_read_are_kept_beside_the_questions():
    _, opened = open_file(FILES / "vqa/aokvqa_v1p0_val.json")
    assert [row.facts["difficult"] for row in opened.annotations["vqa"]] == [False, False, False, True]
    _, opened = open_file(FILES / CASES[6][0], FILES / CASES[6][1], FILES / "images")
    assert opened.annotations["vqa"][0].facts["answer_type"] == "other"
    assert opened.record_name(0) == "COCO_val2014_000000000001.jpg"  # found by COCO's name of its id
    _, opened = open_file(FILES / CASES[15][0], FILES / CASES[15][1])
    second = opened.annotations["conversation"][1]
    assert (
        second.turns == (("is it round", "yes"),) and second.facts["relevance"][3] == 1 and second.facts["target"] == 3
    )
    _, opened = open_file(FILES / "regions/flickr30k_entities")
    assert [len(row.facts["phrases"]) for row in opened.annotations["grounded"]] == [2, 0, 2]


def test_the_mask_of_reason_seg_has_its_edge_and_leaves_out_what_is_ignored():
    _, opened = open_file(FILES / "regions/reason_seg")
    row = opened.annotations["res"][0]
    mask_HW = decode_rle(opened.segmentations[row.regions[0]])
    assert mask_HW.sum() == 500 and decode_rle(row.facts["ignore"]).sum() == 125
    assert mask_HW[10, 8] and mask_HW[34, 27] and not mask_HW[35, 8] and not mask_HW[34, 28]


def test_files_with_splits_of_their_own_keep_them():
    path = FILES / "vqa/ocrvqa_dataset.json"
    sizes = [open_file(path, split=split)[1].task_sizes["vqa"] for split in ("train", "validation", "heldout")]
    assert sizes == [3, 3, 6]
    source, opened = open_file(path)
    assert has_splits(source, opened) and not has_splits(*open_file(FILES / "vqa/vizwiz_val.json"))
    splits = [
        row.kind
        for split in ("train", "validation", "heldout")
        for row in open_file(FILES / "regions/refcoco/refs(unc).p", split=split)[1].annotations["rec"]
    ]
    assert {name: splits.count(name) for name in splits} == {"train": 4, "val": 2, "testA": 4, "testB": 6}


def test_a_question_of_mmbench_is_shown_with_the_image_of_its_first_rotation():
    source, opened = open_file(FILES / "choice/mmbench_circular.tsv")
    data = DataConfig((source,), num_threads=0)
    samples = list(examples(data, "choice"))
    assert len(samples) == 9 and len(opened) == 3
    assert {np.asarray(sample.image).shape for sample in samples} == {(72, 96, 3)}


def test_a_missing_picture_is_a_warning_and_the_others_are_used(tmp_path, caplog):
    shutil.copytree(FILES / "images", tmp_path / "val2014")
    (tmp_path / "val2014/COCO_val2014_000000000002.jpg").unlink()
    source, _ = open_file(FILES / "captions/coco_karpathy_test.json", images=tmp_path)
    data = DataConfig((source,), on_bad_record="replace", num_threads=0)
    assert len(list(examples(data, "caption"))) == 3
    assert sum("COCO_val2014_000000000002.jpg" in text for text in caplog.messages) == 1


def broken(tmp_path, file, change):
    """The one problem of a copy of a file whose JSON was changed."""
    path = tmp_path / Path(file).name
    text = (FILES / file).read_text()
    if file.endswith(".jsonl"):
        rows = [json.loads(line) for line in text.splitlines()]
        change(rows)
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        tree = json.loads(text)
        change(tree)
        path.write_text(json.dumps(tree, indent=1))
    for other in (FILES / file).parent.glob("iconqa_pid*"):
        shutil.copy(other, tmp_path)
    (problem,) = open_file(path)[1].row_problems()
    assert "\n" not in problem and str(path) in problem
    return problem


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("vqa/aokvqa_v1p0_val.json", lambda t: t[1].pop("question"), "entry 2, has no 'question'"),
        ("vqa/vizwiz_val.json", lambda t: t[1].update(answers="red"), "entry 2, has 'red' as 'answers'"),
        (
            "vqa/TextVQA_0.5.1_val.json",
            lambda t: t["data"][2].update(question=3),
            "entry 2 of 'data' has 3 as 'question'",
        ),
        ("vqa/docvqa_val_v1.0.json", lambda t: t["data"].insert(0, 5), "entry 0 of 'data' is 5"),
        ("vqa/gqa_testdev_balanced_questions.json", lambda t: t["202"].pop("imageId"), "question 202 has no 'imageId'"),
        ("vqa/ocrvqa_dataset.json", lambda t: t["0000000003"]["answers"].pop(), "3 questions but 2 answers"),
        ("vqa/iconqa_problems.json", lambda t: t["1"].update(answer=7), "question 1 has 7 as its answer"),
        ("vqa/vsr_zeroshot_test.jsonl", lambda t: t[3].update(label=2), "line 4, has 2 as 'label'"),
        ("vqa/hateful_memes_dev.jsonl", lambda t: t[2].pop("img"), "line 3, has no 'img'"),
        ("choice/SEED-Bench.json", lambda t: t["questions"][0].update(answer="F"), "entry 0 of 'questions'"),
        ("captions/nocaps_val_4500_captions.json", lambda t: t["annotations"][0].pop("caption"), "entry 0 of 'annot"),
        ("judged/questions.jsonl", lambda t: t[0].pop("category"), "line 1, has no 'category'"),
        ("judged/owleval_questions.jsonl", lambda t: t[0].pop("question_id"), "line 1, has null as 'question_id'"),
        ("vqa/visdial_1.0_val.json", lambda t: t["data"]["dialogs"][0]["dialog"][1].update(question=99), "entry 0 of"),
    ],
)
def test_a_broken_entry_is_one_sentence_with_file_and_entry(tmp_path, file, change, words):
    assert words in broken(tmp_path, file, change)


def test_a_tsv_with_broken_base64_or_too_few_cells_is_one_sentence_with_file_and_line(tmp_path):
    lines = (FILES / "choice/mmbench_circular.tsv").read_text().splitlines()
    cells = lines[1].split("\t")
    cells[9] = cells[9][:-3] + "!!!"
    lines[1], lines[4] = "\t".join(cells), "\t".join(lines[4].split("\t")[:5])
    path = tmp_path / "mmbench.tsv"
    path.write_text("\n".join(lines))
    problems = list(open_file(path)[1].row_problems())
    assert len(problems) == 2 and all(str(path) in problem for problem in problems)
    assert (
        "line 2, has an image that is no base64" in problems[0] and "line 5, has another number of cells" in problems[1]
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"val/1.json": "{"}, "1.json cannot be read as JSON"),
        ({"val/1.json": '{"text": ["a"], "shapes": []}'}, "1.jpg cannot be read as an image"),
        ({"val/1.json": '{"shapes": []}'}, "has no 'text'"),
    ],
)
def test_a_broken_file_of_reason_seg_is_one_sentence(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "val/0.json").write_text('{"text": ["a"], "shapes": []}')
    Image.new("RGB", (8, 8)).save(tmp_path / "val/0.jpg")
    (problem,) = open_file(tmp_path)[1].row_problems()
    assert words in problem and "1.j" in problem


def test_xml_that_declares_entities_is_not_read(tmp_path):
    folder = tmp_path / "entities"
    shutil.copytree(FILES / "regions/flickr30k_entities", folder)
    path = folder / "Annotations/1.xml"
    path.write_text('<!DOCTYPE a [<!ENTITY b "c">]>' + path.read_text())
    (problem,) = open_file(folder)[1].row_problems()
    assert "1.xml declares a document type or entities" in problem


def test_a_line_of_mme_without_its_cells_is_one_sentence(tmp_path):
    (tmp_path / "count.txt").write_text("1.jpg\tIs it so?\tYes\n2.jpg Is it so? Yes\n3.jpg\tIs it so?\tPerhaps\n")
    opened = open_file(tmp_path)[1]
    first, second = opened.row_problems()
    assert "count.txt, line 2, has 1 cells" in first and "count.txt, line 3, has 'Perhaps' as its answer" in second
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of MME's files"):
        open_file(FILES / "yes_no/mme")[0].__class__(str(tmp_path / "empty"), "").open("heldout", 10**7)


def test_a_latin_1_file_of_reason_seg_is_read(tmp_path):
    (tmp_path / "val").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val/0.jpg")
    (tmp_path / "val/0.json").write_bytes(
        '{"text": ["café"], "is_sentence": false, "shapes": [{"label": "target", '.encode("cp1252")
        + b'"points": [[0, 0], [4, 0], [4, 4]]}]}'
    )
    row = open_file(tmp_path)[1].annotations["res"][0]
    assert row.words == "café" and row.kind == "short"


@pytest.mark.slow
@shared_data.needs("refcoco", "pope", "vqa", "captions_val2017.json.gz")
@pytest.mark.parametrize(
    ("file", "answers", "task", "count"),
    [
        *(
            (f"refcoco/{name}.json.gz", "", "rec", count)
            for name, count in {
                "refcoco_val": 10834,
                "refcoco_testA": 5657,
                "refcoco_testB": 5095,
                "refcoco+_val": 10758,
                "refcoco+_testA": 5726,
                "refcoco+_testB": 4889,
                "refcocog_val": 4896,
                "refcocog_test": 9602,
            }.items()
        ),
        *((f"pope/coco_pope_{name}.json", "", "existence", 3000) for name in ("random", "popular", "adversarial")),
        *(
            (
                f"vqa/{name}_val_questions_vqa_format.json.gz",
                f"vqa/{name}_val_annotations_vqa_format.json.gz",
                "vqa",
                count,
            )
            for name, count in {"textvqa": 5000, "vizwiz": 4319}.items()
        ),
        ("vqa/okvqa_OpenEnded_mscoco_val2014_questions.json.gz", "", "vqa", 5046),  # without its answers
        ("captions_val2017.json.gz", "", "caption", 5000),
    ],
)
def test_every_row_of_the_real_files_is_read(file, answers, task, count):
    answers = shared_data.ROOT / answers if answers else ""
    source = detect.detect_source(str(shared_data.ROOT / file), "", str(answers), is_test=True)
    opened = dataclasses.replace(source, heldout_fraction=0.0).open("heldout", 10**7)
    assert opened.task_sizes[task] == count and not list(opened.row_problems())
