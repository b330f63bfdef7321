# SPDX-License-Identifier: Apache-2.0
"""Annotation files of every format into records, and what becomes of bad ones."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import shared_data
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.datasets import annotated_images, detect, splits
from lionjax.data.datasets import source as sources
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.easy_vqa import EasyVqa
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.refcoco import RefCoco
from lionjax.data.datasets.source import open_split
from lionjax.data.datasets.vqa import Vqa
from lionjax.data.images import MAX_PIXELS
from lionjax.data.letterbox import Letterbox
from lionjax.data.mixture import MixtureDataset
from lionjax.data.processor import ProcessorConfig
from lionjax.data.samples import examples
from lionjax.data.scenes.dataset import Scenes

DATA = shared_data.ROOT
needs_photographs = shared_data.needs("coco83")
KINDS = ("cat", "dog", "umbrella", "kite")


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def write(path: Path, tree) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture
def folder(tmp_path):
    """A COCO folder of twelve pictures: number i shows a cat at (10, 5, 20, 10), and i % 3 dogs; two captions each."""
    images, notes, captions = [], [], []
    for i in range(12):
        name = f"{i:04d}.png"
        images.append({"id": i, "file_name": name, "width": 50, "height": 40})
        shown = [(1, [10, 5, 20, 10])] + [(2, [5 * k, 20, 10, 15]) for k in range(i % 3)]
        for category, box in shown:
            x, y, w, h = box
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            note = {"image_id": i, "category_id": category, "bbox": box, "segmentation": outline}
            notes.append({**note, "iscrowd": 0})
        captions += [{"image_id": i, "caption": f"  a cat and {i % 3} dogs, said {n}"} for n in "ab"]
        (tmp_path / "coco" / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), 20 * i, np.uint8)).save(tmp_path / "coco" / "images" / name)
    kinds = [{"id": i + 1, "name": kind} for i, kind in enumerate(KINDS)]
    write(tmp_path / "coco" / "captions.json", {"images": images, "annotations": captions})
    write(tmp_path / "coco" / "instances.json", {"images": images, "annotations": notes, "categories": kinds})
    return tmp_path / "coco"


def edit(path: Path, change) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def all_usable(source, task: str, split="train") -> list:
    return all_of(source, task, split, on_bad_record="replace")


def all_of(source, task: str, split="train", **config) -> list:
    data = DataConfig(sources=(source,), tag_noise=0.0, **config)
    return list(examples(data, task, split))


# ---------------------------------------------------------------------- COCO


def test_a_coco_folder_gives_captions_tags_existence_boxes_and_masks(folder):
    opened = open_split(Coco(str(folder), heldout_fraction=0), "train", MAX_PIXELS)
    assert len(opened) == 12
    # Dogs are pointed at only in the four pictures that show exactly one.
    lone = {"rec": 16, "res": 16, "reg": 16}
    assert opened.task_sizes == {"caption": 12, "tags": 12, "existence": 12 * 2 + 8 * 2, **lone}


def test_captions_are_drawn_from_all_references(folder):
    samples = all_of(Coco(str(folder), heldout_fraction=0), "caption")
    for sample in samples:
        assert sample.example.answer in sample.example.answers and len(sample.example.answers) == 2
        assert sample.example.answer.startswith("a cat and")
    assert {s.example.answer[-1] for s in samples} == {"a", "b"}


def test_objects_that_are_alone_in_their_class_become_referring_examples_with_masks(folder):
    samples = all_of(Coco(str(folder), heldout_fraction=0), "res")
    cats = [s for s in samples if s.example.kind == "cat"]
    assert len(cats) == 12
    for sample in cats:
        assert sample.example.boxes == ((0.2, 0.125, 0.6, 0.375),)
        assert sample.example.answer == "Answer: [0.200,0.125,0.600,0.375]"
        assert "the cat" in sample.example.question
        (mask,) = sample.masks()
        wanted = np.zeros((40, 50), bool)
        wanted[5:15, 10:30] = True
        np.testing.assert_array_equal(mask, wanted)


def test_existence_questions_are_half_about_present_objects(folder):
    samples = all_of(Coco(str(folder), heldout_fraction=0), "existence")
    answers = [s.example.answer for s in samples]
    assert answers.count("yes") == answers.count("no") == 20
    for sample in samples:
        kind = next(kind for kind in KINDS if kind in sample.example.question)
        assert (kind in sample.example.tags) == (sample.example.answer == "yes")
        assert "a umbrella" not in sample.example.question


def test_crowds_small_objects_and_repeated_classes_are_never_referred_to(folder):
    def change(tree):
        for note in tree["annotations"]:
            if note["image_id"] == 0:
                note["iscrowd"] = 1
            if note["image_id"] == 3:
                note["bbox"] = [10, 5, 2, 2]

    edit(folder / "instances.json", change)
    samples = all_of(Coco(str(folder), heldout_fraction=0), "rec")
    assert {s.name for s in samples if s.example.kind == "cat"} == {
        f"coco/{i:04d}.png" for i in range(12) if i not in (0, 3)
    }


def test_splits_share_no_image_and_do_not_change_when_images_are_added(folder):
    source = Coco(str(folder), heldout_fraction=0.3)
    names = {
        split: {opened.record_name(i) for i in range(len(opened))}
        for split in sources.SPLITS
        for opened in [source.open(split, MAX_PIXELS)]
    }
    assert sum(map(len, names.values())) == 12 and len(set.union(*names.values())) == 12
    keys = {n: splits.split_key(folder / "images", n) for split in names for n in names[split]}
    assert all(splits.in_split(keys[n], split, 0.3) for split in names for n in names[split])
    shares = [splits.in_split(key, "heldout", 0.3) for key in range(2000)]
    assert 0.26 < np.mean(shares) < 0.34


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["annotations"][0].update(bbox=[10, 5, 60, 10]), "leaves the image"),
        (lambda t: t["annotations"][0].update(bbox=[30, 5, 0, 10]), "no area"),
        (lambda t: t["images"][0].update(width=500), "500"),
        (lambda t: t["images"][0].update(file_name="gone.png"), "gone.png"),
        (lambda t: t["images"][0].update(file_name="../captions.json"), "leaves"),
    ],
)
def test_a_bad_record_is_one_sentence_when_used_or_is_left_out(folder, change, words, caplog):
    (folder / "captions.json").unlink()
    edit(folder / "instances.json", change)
    source, task = (
        Coco(str(folder), heldout_fraction=0),
        "tags" if words not in ("leaves the image", "no area") else "rec",
    )
    if words == "no area":  # it is too small to be pointed at in the first place
        assert "0000.png" not in {s.name.partition("/")[2] for s in all_of(source, task)}
        return
    with pytest.raises(UserError) as error:
        all_of(source, task)
    assert words in sentence(error)
    kept = all_of(source, task, on_bad_record="replace")
    assert len(kept) == open_split(source, "train", MAX_PIXELS).task_sizes[task] - 1 and words in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["images"][0].pop("file_name"),
        lambda t: t["images"][0].update(file_name=""),
        lambda t: t["annotations"][0].update(category_id=99),
        lambda t: t["annotations"][0].update(category_id=[1]),
        lambda t: t["annotations"][0].update(bbox=[1, 2]),
        lambda t: t["annotations"][0].update(bbox="1 2 3 4"),
        lambda t: t["annotations"][0].update(bbox=[1, 2, 3, float("nan")]),
        lambda t: t["annotations"].insert(0, "cat"),
        lambda t: t["images"][0].update(width="50"),
        lambda t: t["images"][0].update(width=0),
    ],
)
def test_an_invalid_entry_is_a_bad_record_and_the_others_are_used(folder, change):
    before = open_split(Coco(str(folder), heldout_fraction=0), "train", MAX_PIXELS).task_sizes
    edit(folder / "instances.json", change)
    source = Coco(str(folder), heldout_fraction=0)
    with pytest.raises(UserError) as error:
        MixtureDataset(DataConfig(sources=(source,)), "train")
    assert "instances.json: entry 0 of" in sentence(error)
    opened = MixtureDataset(DataConfig(sources=(source,), on_bad_record="replace"), "train").datasets[0]
    assert len(list(opened.row_problems())) == 1
    assert sum(opened.task_sizes.values()) - 1 <= sum(before.values()) and len(all_usable(source, "rec")) >= 10


def test_a_file_without_its_lists_raises_a_one_sentence_error(folder):
    edit(folder / "instances.json", lambda tree: tree.pop("images"))
    with pytest.raises(UserError) as error:
        Coco(str(folder)).open("train", MAX_PIXELS)
    assert "no list 'images'" in sentence(error)


@pytest.mark.parametrize("data", [b"", b"{", b"\x1f\x8b\x00broken"])
def test_a_file_that_is_not_json_raises_a_one_sentence_error(tmp_path, data):
    path = tmp_path / "captions.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"captions\.json"):
        Coco(str(tmp_path)).open("train", MAX_PIXELS)
    with pytest.raises(UserError, match="neither"):
        Coco(str(tmp_path / "nowhere")).open("train", MAX_PIXELS)


# ---------------------------------------------------------------------- other formats


def test_refcoco_rows_ask_for_the_box_and_for_the_expression(folder, tmp_path):
    entry = {"img_id": "0001_7", "sents": " the black one ", "bbox": [10, 5, 20, 10], "height": 40, "width": 50}
    file = tmp_path / "refs.json.gz"
    (folder / "images" / "0001.jpg").symlink_to("0001.png")
    file.write_bytes(gzip.compress(json.dumps([entry]).encode()))
    source = RefCoco(str(file), str(folder / "images"))
    (rec,), (reg,) = all_of(source, "rec"), all_of(source, "reg")
    assert "the black one" in rec.example.question
    assert rec.example.answer == "Answer: [0.200,0.125,0.600,0.375]"
    assert "[0.200,0.125,0.600,0.375]" in reg.example.question and reg.example.answer == "the black one"
    assert rec.example.category == reg.example.category == "region_level"


def test_vqa_answers_are_drawn_by_annotator_frequency(folder, tmp_path):
    said = [{"answer": "two"}] * 7 + [{"answer": "2"}] * 3
    questions = [{"question_id": i, "image_id": i % 12, "question": "how many?"} for i in range(200)]
    notes = [{"question_id": i, "answers": said} for i in range(199)]
    q, a = (write(tmp_path / "q.json", {"questions": questions}), write(tmp_path / "a.json", {"annotations": notes}))
    samples = all_of(Vqa(str(q), str(a), str(folder / "images"), "{:04d}.png"), "vqa")
    assert len(samples) == 199 and len(samples[0].example.answers) == 10
    share = np.mean([s.example.answer == "two" for s in samples])
    assert 0.6 < share < 0.8


LINES = [
    {"image": "0000.png", "question": "What is it?", "answer": "a square", "tags": ["x", "y"]},
    {"image": "0001.png", "task": "rec", "expression": "the cat", "boxes": [[0.2, 0.125, 0.6, 0.375]]},
    {"image": "0002.png", "task": "rec", "expression": "it", "boxes": [[10, 5, 30, 15]], "width": 50, "height": 40},
    {"image": "0003.png", "text": "Is there a cat?", "label": "yes", "setting": "popular"},
    {"image": "0004.png", "task": "reg", "question_boxes": [[0, 0, 0.5, 1]], "answers": ["left", "the left"]},
]


@pytest.mark.parametrize("as_list", [False, True])
def test_json_lines_are_read_with_boxes_and_with_the_keys_of_pope(folder, tmp_path, as_list):
    file = tmp_path / "records.jsonl"
    text = "\n\n".join(map(json.dumps, LINES))
    file.write_text(json.dumps(LINES, indent=2) if as_list else text)
    source = JsonLines(str(file), str(folder / "images"))
    assert open_split(source, "train", MAX_PIXELS).task_sizes == {"vqa": 1, "rec": 2, "existence": 1, "reg": 1}
    boxes = {s.example.boxes for s in all_of(source, "rec")}
    assert boxes == {((0.2, 0.125, 0.6, 0.375),)}
    (pope,) = all_of(source, "existence")
    assert (pope.example.question, pope.example.answer, pope.example.kind) == ("Is there a cat?", "yes", "popular")
    (vqa,) = all_of(source, "vqa")
    assert vqa.example.tags == ("x", "y") and vqa.example.category == "image_level"
    (reg,) = all_of(source, "reg")
    assert "[0.000,0.000,0.500,1.000]" in reg.example.question and reg.example.category == "region_level"


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"question": "a"}', '{"image": "a.png"}', '{"image": "a", "answer": "b", "width": "x"}', '"x"'],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    (tmp_path / "r.jsonl").write_text(json.dumps(LINES[0]) + "\n" + line)
    with pytest.raises(UserError, match=r"r\.jsonl, line 2"):
        MixtureDataset(DataConfig(sources=(JsonLines(str(tmp_path / "r.jsonl"), str(tmp_path)),)), "train")


def test_a_record_without_a_question_for_a_task_without_wordings_raises_a_one_sentence_error(folder, tmp_path):
    write(tmp_path / "r.jsonl", {"image": "0000.png", "answer": "red"})
    with pytest.raises(UserError, match="no question"):
        all_of(JsonLines(str(tmp_path / "r.jsonl"), str(folder / "images")), "vqa")


def test_tag_noise_drops_and_adds_tags_deterministically():
    vocabulary = tuple(f"tag{i:02d}" for i in range(40))
    photos = [annotated_images.ImageInfo(f"{i}.jpg", tags=vocabulary[i % 30 : i % 30 + 8]) for i in range(300)]
    said = [annotated_images.noisy_tags(photo, vocabulary, 0.2) for photo in photos]
    kept = np.mean([len(set(tags) & set(p.tags)) / 8 for tags, p in zip(said, photos)])
    wrong = np.mean([len(set(tags) - set(p.tags)) / 8 for tags, p in zip(said, photos)])
    assert 0.76 < kept < 0.84 and 0.03 < wrong < 0.07
    assert said == [annotated_images.noisy_tags(photo, vocabulary, 0.2) for photo in photos]
    assert all(annotated_images.noisy_tags(photo, vocabulary, 0.0) == photo.tags for photo in photos)


# ---------------------------------------------------------------------- scenes and easy-VQA


def test_scenes_drawn_and_scenes_read_from_files_are_the_same_examples(tmp_path):
    from lionjax.data.prepare import array_record_writer

    drawn = Scenes(sizes=(6, 2, 4), image_size=48)
    written = Scenes(sizes=(6, 2, 4), image_size=48, folder=str(array_record_writer.build(drawn, tmp_path)))
    for task in ("vqa", "rec", "caption"):
        pairs = zip(all_of(drawn, task, "heldout"), all_of(written, task, "heldout"), strict=True)
        for one, other in pairs:
            assert one.example == other.example and one.name == other.name
            picture = np.asarray(detect.to_pil_image(other.image))
            np.testing.assert_array_equal(one.image, picture)
    res = all_of(drawn, "res", "heldout")[0]
    assert res.masks().shape == (1, 48, 48) and res.masks().any()


def test_a_folder_without_scenes_raises_a_one_sentence_error(tmp_path):
    with pytest.raises(UserError) as error:
        Scenes(folder=str(tmp_path)).open("train", MAX_PIXELS)
    assert str(tmp_path) in sentence(error)


def test_easy_vqa_gives_the_kinds_of_questions_that_are_asked_for_and_knows_no_other():
    pytest.importorskip("easy_vqa")
    opened = EasyVqa(kinds=("color",)).open("heldout", MAX_PIXELS)
    photos = [(number, opened.load_record(number)[1]) for number in range(50)]
    asked = [opened.make_example("vqa", number, photo, np.random.default_rng(0), 0.0) for number, photo in photos]
    assert {example.kind for example in asked} == {"color"} and "color" in asked[0].question
    with pytest.raises(UserError, match="no kind 'colour'; choose from yesno, color and shape"):
        EasyVqa(kinds=("colour",))


def test_easy_vqa_is_read_whole_and_its_test_set_is_held_out():
    pytest.importorskip("easy_vqa")
    opened = {split: EasyVqa().open(split, MAX_PIXELS) for split in sources.SPLITS}
    assert {split: len(one) for split, one in opened.items()} == {"train": 3800, "validation": 200, "heldout": 1000}
    assert opened["heldout"].task_sizes == {"vqa": 9673}
    assert opened["train"].task_sizes["vqa"] + opened["validation"].task_sizes["vqa"] == 38575
    picture, photo = opened["heldout"].load_record(0)
    example = opened["heldout"].make_example("vqa", 0, photo, np.random.default_rng(0), 0.0)
    assert picture.size == (64, 64) and example.answer in (
        "yes",
        "no",
        "red",
        "blue",
        "circle",
        "rectangle",
        "triangle",
    )


def test_an_unknown_split_and_an_empty_one_raise_a_one_sentence_error(folder):
    with pytest.raises(UserError, match="split"):
        open_split(Scenes(), "test", MAX_PIXELS)
    with pytest.raises(UserError, match="no records"):
        open_split(Coco(str(folder), heldout_fraction=1e-9), "heldout", MAX_PIXELS)


# ---------------------------------------------------------------------- written once, read back


def test_a_built_folder_gives_the_same_examples_as_its_source(folder, tmp_path):
    from lionjax.data.prepare import array_record_writer

    source = Coco(str(folder), heldout_fraction=0.2, name="pets")
    place = array_record_writer.build(source, tmp_path / "out")
    built = ArrayRecordDataset(str(tmp_path / "out"), name="pets")
    assert detect.detect_source(str(tmp_path / "out")) == ArrayRecordDataset(str(place))
    for task in open_split(source, "train", MAX_PIXELS).task_sizes:
        for one, other in zip(all_of(source, task), all_of(built, task), strict=True):
            assert (one.example.question, one.example.answers) == (other.example.question, other.example.answers)
            assert (one.example.boxes, one.example.tags) == (other.example.boxes, other.example.tags)
            assert one.name == other.name
            if task == "res":
                np.testing.assert_array_equal(one.masks(), other.masks())


def test_a_build_skips_records_that_training_would_refuse(folder, tmp_path, caplog):
    from lionjax.data.prepare import array_record_writer

    (folder / "images" / "0003.png").write_bytes(b"broken")
    (folder / "images" / "0004.png").unlink()
    edit(folder / "instances.json", lambda t: t["annotations"][0].update(bbox=[10, 5, 60, 10]))
    array_record_writer.build(Coco(str(folder), heldout_fraction=0), tmp_path / "out")
    opened = ArrayRecordDataset(str(tmp_path / "out")).open("heldout", MAX_PIXELS)  # undivided: every split is all
    assert len(opened) == 10 and opened.task_sizes["caption"] == 10
    assert "0003.png" in caplog.text and "0004.png" in caplog.text and "leaves the image" in caplog.text
    cats = [s for s in all_of(ArrayRecordDataset(str(tmp_path / "out")), "rec") if s.example.kind == "cat"]
    assert len(cats) == 9


def test_a_damaged_record_of_a_built_folder_raises_a_one_sentence_error(folder, tmp_path):
    from lionjax.data.prepare import array_record_writer

    place = array_record_writer.build(Coco(str(folder), heldout_fraction=0), tmp_path / "out")
    (file,) = place.glob("*.array_record*")
    data = bytearray(file.read_bytes())
    for place_of_bit in range(2000, len(data), 400):
        data[place_of_bit] ^= 4
    file.write_bytes(data)
    with pytest.raises(UserError) as error:
        all_of(ArrayRecordDataset(str(place)), "caption")
    sentence(error)
    (place / "index.npz").write_bytes(b"PK broken")
    with pytest.raises(UserError, match="build the data again"):
        ArrayRecordDataset(str(place)).open("train", MAX_PIXELS)


# ---------------------------------------------------------------------- from a word or path


def test_data_source_is_detected_from_a_name_or_path(folder, tmp_path):
    refs = write(tmp_path / "refs.json", [{"img_id": "1_1", "sents": "a", "bbox": [0, 0, 1, 1]}])
    quest = write(tmp_path / "q.json", {"questions": []})
    pope = tmp_path / "pope.json"
    pope.write_text("\n".join(json.dumps(LINES[3]) for _ in range(3)))
    assert detect.detect_source("scenes") == Scenes()
    assert isinstance(detect.detect_source("easy_vqa"), EasyVqa)
    assert detect.detect_source(str(folder)) == Coco(str(folder), name="coco")
    assert detect.detect_source(str(refs), "pics") == RefCoco(str(refs), "pics", name="refs")
    assert detect.detect_source(str(quest), "pics", "a.json") == Vqa(str(quest), "a.json", "pics", name="q")
    assert detect.detect_source(str(pope)) == JsonLines(str(pope), str(tmp_path), name="pope")
    for bad in (str(tmp_path / "nothing"), str(quest), str(tmp_path)):
        with pytest.raises(UserError) as error:
            detect.detect_source(bad)
        sentence(error)


def test_inspecting_prints_questions_and_answers(folder, capsys):
    detect.inspect(Coco(str(folder), heldout_fraction=0), "train", 1)
    printed = capsys.readouterr().out
    assert "12 records" in printed and "caption" in printed and "Answer" in printed


# ---------------------------------------------------------------------- the real thing


@needs_photographs
def test_83_photographs_of_coco_give_every_task_and_every_box_lies_in_its_picture():
    source = Coco(str(DATA / "coco83"), heldout_fraction=0)
    opened = open_split(source, "train", MAX_PIXELS)
    assert len(opened) == 83 and opened.task_sizes["caption"] == 83
    assert opened.task_sizes["rec"] == opened.task_sizes["reg"] > 100
    data = DataConfig(sources=(source,), tag_noise=0.0)
    for sample in examples(data, "res", "train", limit=25):
        (mask,), (box,) = sample.masks(), sample.example.boxes
        rows, columns = np.nonzero(mask)
        edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        width, height = sample.image.size
        np.testing.assert_allclose(edges, np.array(box) * (width, height, width, height), atol=4)


@needs_photographs
def test_boxes_and_masks_of_photographs_agree_in_the_padded_square_and_round_trip():
    side = 112
    words = ProcessorConfig(
        side, box_format="embeddings", max_boxes=4, pad_to_square=True, sam_image_size=side, use_tags=False
    )
    records = MixtureDataset(
        DataConfig(sources=(Coco(str(DATA / "coco83"), heldout_fraction=0),), processor=words), "train"
    )
    (part,) = records.components("res")
    shapes = set()
    for index in range(12):
        row = records.encode_example(part, index, np.random.default_rng(index), with_masks=True)
        (place,) = np.flatnonzero(row["masks_mask"])
        rows, columns = np.nonzero(row["masks"][place])
        edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / side
        np.testing.assert_allclose(edges, row["boxes"][place], atol=3 / side)
        opened, record = records.datasets[0], records.datasets[0].record_index("res", index)
        picture, truth = opened.load_record(record)
        (true,) = opened.make_example("res", index, truth, np.random.default_rng(index), 0.0).boxes
        np.testing.assert_allclose(Letterbox(*picture.size).from_padded(row["boxes"][place].tolist()), true, atol=1e-5)
        assert picture.size == tuple(row["size"])
        shapes.add(picture.size[0] > picture.size[1])
    assert shapes == {True, False}  # wide ones and tall ones


@pytest.mark.slow
@shared_data.needs("coco83", "refcoco", "vqa", "pope", "coco258_annotations")
def test_real_refcoco_vqa_and_pope_files_are_read_whole():
    refs = RefCoco(str(DATA / "refcoco" / "refcocog_val.json.gz"), str(DATA)).open("train", MAX_PIXELS)
    assert refs.task_sizes == {"rec": 4896, "reg": 4896}
    vqa = [str(DATA / "vqa" / f"textvqa_val_{kind}_vqa_format.json.gz") for kind in ("questions", "annotations")]
    assert Vqa(*vqa, str(DATA)).open("train", MAX_PIXELS).task_sizes == {"vqa": 5000}
    pope = detect.detect_source(str(DATA / "pope" / "coco_pope_random.json"))
    assert pope.open("train", MAX_PIXELS).task_sizes == {"existence": 3000}
    here = RefCoco(str(DATA / "coco258_annotations" / "rec_on_coco258.json"), str(DATA / "coco83" / "images"))
    samples = all_of(here, "rec", on_bad_record="replace")
    assert [s.image.size for s in samples] == [(640, 480)] * 2  # the other four pictures are not free


@pytest.mark.parametrize(
    ("label", "wanted"),
    [("yes", "yes"), ("no", "no"), (1, "yes"), (0, "no"), ("1", "yes"), ("0", "no"), (True, "yes"), (False, "no")],
)
def test_labels_of_pope_may_be_words_or_numbers(tmp_path, label, wanted):
    (tmp_path / "pope.jsonl").write_text(json.dumps({"image": "a.png", "text": "Is there a cat?", "label": label}))
    opened = JsonLines(str(tmp_path / "pope.jsonl"), str(tmp_path)).open("train", 10**6)
    assert opened.annotations["existence"][0].answers == (wanted,)
