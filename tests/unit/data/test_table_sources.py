# SPDX-License-Identifier: Apache-2.0
"""One data set in any form gives equal examples: JSON Lines, CSV, Parquet, Arrow, tars, a folder; what is refused."""

import csv
import dataclasses
import io
import json
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet as pq

from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.config import DataConfig
from lionjax.data.datasets import column_files, tar_index
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.datasets.delimited import Csv
from lionjax.data.datasets.detect import detect_source, inspect
from lionjax.data.datasets.image_folder import ImageFolder
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.parquet import Parquet
from lionjax.data.datasets.source import has_splits, open_split
from lionjax.data.datasets.webdataset import WebDataset
from lionjax.data.images import MAX_PIXELS
from lionjax.data.processor import ProcessorConfig

SMALL = ProcessorConfig(image_size=32, max_prompt_tokens=96, max_question_tokens=64, max_target_tokens=48)
SPLITS = ("train", "validation", "heldout")
NAMES = [f"a_long_picture_name_{number}" for number in range(12)]
TALK = [
    {"from": "human", "value": "<image>\nWhat color?"},
    {"from": "gpt", "value": "Red."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]
KINDS = {
    "vqa": {"question": "How many?", "answers": ["two", "2"], "kind": "count", "tags": ["cat", "sofa"]},
    "caption": {"task": "caption", "answers": ["A plain picture."]},
    "rec": {"task": "rec", "expression": "it", "boxes": [[5, 4, 25, 20]], "width": 50, "height": 40},
    "existence": {"text": "Is there a dog?", "label": "no"},
    "conversation": {"conversations": TALK},
}


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), (20 * number, 90, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(kind: str) -> list[dict]:
    return [{"image": f"{name}.png"} | KINDS[kind] for name in NAMES]


def write_pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        (folder / f"{name}.png").write_bytes(picture(number))


def as_cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_csv(path: Path, rows: list[dict], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows({key: as_cell(value) for key, value in row.items()} for row in rows)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def image_table(rows: list[dict], paths: bool = True):
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "image"}
    held = [{"bytes": picture(k), "path": row["image"] if paths else None} for k, row in enumerate(rows)]
    return pa.table({"image": held} | columns)


def as_json_lines(folder: Path, rows: list[dict]):
    write_pictures(folder)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reader = Conversations if "conversations" in rows[0] else JsonLines
    return reader(str(folder / "rows.jsonl"), str(folder))


def as_csv(folder: Path, rows: list[dict]):
    write_pictures(folder)
    write_csv(folder / "rows.csv", rows, ";")
    return detect_source(str(folder / "rows.csv"))


def as_tsv(folder: Path, rows: list[dict]):
    write_pictures(folder / "pics")
    write_csv(folder / "rows.tsv", rows, "\t")
    return detect_source(str(folder / "rows.tsv"), str(folder / "pics"))


def as_parquet(folder: Path, rows: list[dict]):
    (folder / "data").mkdir(parents=True)
    for part in range(2):
        pq.write_table(
            image_table(rows).slice(6 * part, 6), folder / f"data/train-0000{part}-of-00002.parquet", row_group_size=4
        )
    return detect_source(str(folder))


def as_arrow(folder: Path, rows: list[dict]):
    folder.mkdir()
    table = image_table(rows)
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text("{}")
    return detect_source(str(folder))


def as_tars(folder: Path, rows: list[dict]):
    folder.mkdir()
    for part in range(3):
        files = {}
        for number in range(4 * part, 4 * part + 4):
            files[f"{NAMES[number]}.png"] = picture(number)
            files[f"{NAMES[number]}.json"] = json.dumps(rows[number]).encode()
        write_tar(folder / f"shard-{part:06}.tar", files)
    return detect_source(str(folder / "shard-{000000..000002}.tar"))


def as_folder(folder: Path, rows: list[dict]):
    write_pictures(folder)
    named = [{"file_name": row["image"]} | {key: row[key] for key in row if key != "image"} for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, named)))
    return detect_source(str(folder))


FORMS = {"csv": as_csv, "tsv": as_tsv, "parquet": as_parquet, "arrow": as_arrow, "tars": as_tars, "folder": as_folder}
CLASSES = {"csv": Csv, "tsv": Csv, "parquet": Parquet, "arrow": Parquet, "tars": WebDataset, "folder": ImageFolder}


def held_out(source, fraction: float):
    return dataclasses.replace(source, heldout_fraction=fraction)


def contents(source, split: str = "train") -> list:
    """Every example of a split with its pixels and the name of its record."""
    try:
        dataset = open_split(source, split, MAX_PIXELS)
    except UserError as error:
        assert "has no records in its split" in str(error)
        return []
    found = []
    for task, size in dataset.task_sizes.items():
        for index in range(size):
            record = dataset.record_index(task, index)
            image, truth = dataset.load_record(record)
            example = dataset.make_example(task, index, truth, np.random.default_rng(index), 0.0)
            found.append((dataset.record_name(record), example, np.asarray(image).tobytes()))
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_in_any_form_has_the_examples_and_splits_of_json_lines(tmp_path, kind, form):
    rows = rows_of(kind)
    expected = held_out(as_json_lines(tmp_path / "lines", rows), 0.3)
    source = held_out(FORMS[form](tmp_path / form, rows), 0.3)
    assert type(source) is CLASSES[form]
    sizes = []
    for split in SPLITS:
        found = contents(source, split)
        assert found == contents(expected, split)
        sizes.append(len(found))
    assert sum(sizes) == len(rows) and min(sizes) > 0


# ---------------------------------------------------------------------- what belongs to one form


def answers(source, task: str, split: str = "train") -> list[tuple[str, str, tuple[str, ...]]]:
    """(record, question, answers) of each example; captions have a drawn question, which is left out."""
    return [
        (name, "" if task == "caption" else example.question, example.answers)
        for name, example, _ in contents(source, split)
        if example.task == task
    ]


def test_captions_beside_pictures_and_in_tars_are_captions(tmp_path):
    write_pictures(tmp_path / "pics")
    for name in NAMES:
        (tmp_path / "pics" / f"{name}.txt").write_text(f" Picture {name[-1]}.\n")
    write_tar(
        tmp_path / "all.tar",
        {f"./{name}.{end}": data for k, name in enumerate(NAMES) for end, data in
         (("png", picture(k)), ("txt", f"Picture {name[-1]}.".encode()), ("json", b'{"key": "7", "sha256": "ab"}'))},
    )  # fmt: skip
    expected = [(f"{name}.png", "", (f"Picture {name[-1]}.",)) for name in NAMES]
    assert sorted(answers(detect_source(str(tmp_path / "pics")), "caption")) == sorted(expected)
    assert answers(detect_source(str(tmp_path / "all.tar")), "caption") == expected


def test_classes_are_answers_from_subfolders_cls_files_and_the_names_that_parquet_keeps(tmp_path):
    for split, word in (("train", "red_fox"), ("train", "cat"), ("test", "red_fox"), ("test", "cat")):
        folder = tmp_path / "pics" / split / word
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(picture(1))
    asked = "What is in the picture?"
    pictures = detect_source(str(tmp_path / "pics"))
    expected = [("train/cat/1.png", asked, ("cat",)), ("train/red_fox/1.png", asked, ("red fox",))]
    assert answers(pictures, "vqa") == expected and has_splits(pictures, open_split(pictures, "train", MAX_PIXELS))
    assert [name for name, *_ in answers(pictures, "vqa", "heldout")] == ["test/cat/1.png", "test/red_fox/1.png"]
    write_tar(tmp_path / "a.tar", {"a.png": picture(1), "a.cls": b"1", "b.png": picture(2), "b.cls": b"fox"})
    (tmp_path / "classes.txt").write_text("cat\nred fox\n")
    assert [row[2] for row in answers(detect_source(str(tmp_path / "a.tar")), "vqa")] == [("red fox",), ("fox",)]
    features = {"info": {"features": {"label": {"names": ["cat", "red fox"], "_type": "ClassLabel"}}}}
    table = image_table([{"image": None, "label": 1}, {"image": None, "label": 0}])
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "c.parquet")
    found = answers(Parquet(str(tmp_path / "c.parquet"), class_question="Which?"), "vqa")
    assert found == [("c.parquet/row1", "Which?", ("red fox",)), ("c.parquet/row2", "Which?", ("cat",))]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_images_of_one_name_stay_apart_and_lists_bytes_and_paths_are_images(tmp_path, ending):
    pair = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The first."}]
    held = [{"bytes": picture(k), "path": "image.png"} for k in range(3)]
    columns = {
        "image": [held[0], None, held[1]],
        "images": [None, [held[1], held[2]], None],
        "conversations": [None, {"from": ["human", "gpt"], "value": [row["value"] for row in pair]}, None],
        "question": ["?", None, "?"],
        "answer": ["a", None, "b"],
    }
    path = tmp_path / f"mixed.{ending}"
    save(pa.table(columns), path)
    dataset = open_split(detect_source(str(path)), "train", MAX_PIXELS)
    names = [dataset.record_name(k) for k in range(len(dataset))]
    assert len(set(names)) == 4 and not list(dataset.row_problems())
    colors = [dataset.load_record(k)[0].getpixel((0, 0))[0] for k in range(4)]
    assert colors == [0, 20, 40, 20]
    (talk,) = dataset.annotations["conversation"]
    assert (talk.photo, talk.more_images) == (1, (2,))
    save(pa.table({"image": [picture(3), picture(4)], "text": ["x", "y"]}), path)
    assert [row[0] for row in contents(detect_source(str(path)))] == [f"{path.name}/row1", f"{path.name}/row2"]
    (tmp_path / "on_disk.png").write_bytes(picture(5))
    for kind in (pa.binary(), pa.null()):
        image = pa.array([{"path": "on_disk.png"}], pa.struct({"bytes": kind, "path": pa.string()}))
        save(pa.table({"image": image, "caption": ["x"]}), path)
        assert [row[0] for row in contents(detect_source(str(path)))] == ["on_disk.png"]


def save(table, path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)


def test_files_named_by_splits_are_the_splits(tmp_path):
    rows = rows_of("caption")
    for number, split in enumerate(("train", "validation", "test")):
        pq.write_table(image_table(rows).slice(4 * number, 4), tmp_path / f"{split}-00000-of-00001.parquet")
    source = detect_source(str(tmp_path))
    found = {split: [name for name, *_ in contents(source, split)] for split in SPLITS}
    assert [name[-5] for names in found.values() for name in names] == [*"0123", *"4567", *"8901"]
    assert has_splits(source, open_split(source, "train", MAX_PIXELS))
    (tmp_path / "validation-00000-of-00001.parquet").unlink()
    assert [name for name, *_ in contents(source, "validation")] == found["heldout"]


def test_rows_of_one_number_in_two_splits_are_other_images_and_those_of_one_file_the_same(tmp_path, monkeypatch):
    table = image_table(rows_of("caption"), paths=False)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        save(table, tmp_path / f"{split}/data-00000-of-00001.arrow")
    opened = {split: open_split(detect_source(str(tmp_path)), split, MAX_PIXELS) for split in ("train", "heldout")}
    monkeypatch.chdir(tmp_path)
    opened["relative"] = open_split(detect_source("train/data-00000-of-00001.arrow"), "train", MAX_PIXELS)
    train, heldout, relative = ({data.image_place(k) for k in range(len(data))} for data in opened.values())
    assert len(train) == 12 and train == relative and not train & heldout


def test_row_groups_are_kept_within_a_bound_and_read_in_part_when_they_are_too_large(tmp_path, monkeypatch):
    source = as_parquet(tmp_path / "parquet", rows_of("caption"))
    expected = contents(source)
    group = pq.ParquetFile(tmp_path / "parquet/data/train-00000-of-00002.parquet").read_row_group(0)
    size = group.column("image").nbytes
    monkeypatch.setattr(column_files, "KEPT_BYTES", 2 * size)  # of four groups
    dataset = open_split(source, "train", MAX_PIXELS)
    found = [np.asarray(dataset.load_record(k)[0]).tobytes() for k in range(len(dataset))]
    reader = dataset.embedded.read_place
    assert found == [row[2] for row in expected] and 1 <= len(reader.kept) < 4
    assert sum(column.nbytes for column in reader.kept.values()) <= 2 * size
    monkeypatch.setattr(column_files, "KEPT_BYTES", 10)
    reader = pickle.loads(pickle.dumps(reader))
    assert reader(dataset.embedded.places[5]) == picture(5) and not reader.kept


def test_a_tar_is_indexed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    source = as_tars(tmp_path / "tars", rows_of("vqa"))
    expected = contents(source)
    index = tmp_path / "tars/shard-000001.tar.index.json"
    assert index.is_file()
    scans = []
    scan = tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda *of: scans.append(of) or scan(*of))
    assert contents(source) == expected and not scans
    for damage in ("", "[]", index.read_text().replace('"members": [[', '"members": [["x", 9999999, 1, ""], [')):
        index.write_text(damage)
        assert contents(source) == expected and len(scans) == 1
        scans.clear()
    write_tar(tmp_path / "tars/shard-000001.tar", {"b.txt": b"no picture"})
    assert len(contents(source)) == len(expected) - 4 + 1 and len(scans) == 1


def test_the_index_of_a_folder_that_cannot_be_written_is_kept_in_the_cache_folder(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {"a.png": picture(0), "a.txt": b"x"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write = tar_index.write_atomic

    def refuse(path, content):
        if path.parent == tmp_path:
            raise PermissionError(13, "read only")
        write(path, content)

    monkeypatch.setattr(tar_index, "write_atomic", refuse)
    assert len(contents(WebDataset(str(tmp_path / "a.tar")))) == 1
    monkeypatch.setattr(tar_index, "_scan", None)
    assert len(contents(WebDataset(str(tmp_path / "a.tar")))) == 1
    assert not list(tmp_path.glob("*.json")) and len(list(tmp_path.glob("cache/lionjax/tar_index/*.json"))) == 1


@pytest.mark.parametrize("form", ["tars", "parquet"])
def test_a_stream_from_files_with_images_resumes_with_the_same_batches(tmp_path, form):
    data = DataConfig(sources=(FORMS[form](tmp_path / form, rows_of("vqa")),), processor=SMALL, num_threads=2)

    def stream():
        return pipeline.batches(data, SimpleNamespace(name="s", mixture=(("vqa", 1.0),)), 0, 4, 0, 1)

    first = stream()
    for _ in range(2):
        next(first)
    position = json.loads(json.dumps(first.position()))
    resumed = stream()
    resumed.restore(position)
    for _ in range(3):
        one, other = next(first), next(resumed)
        assert np.array_equal(one.record_B, other.record_B) and np.array_equal(one.image_BHWC, other.image_BHWC)
    first.close()
    resumed.close()


@pytest.mark.slow
def test_tars_build_an_array_record_data_set_and_are_printed(tmp_path, capsys):
    from lionjax.data.prepare import array_record_writer

    source = as_tars(tmp_path / "tars", rows_of("vqa"))
    array_record_writer.build(source, tmp_path / "built")
    built = ArrayRecordDataset(str(tmp_path / "built"))
    found = sorted((name, example.answers, pixels) for name, example, pixels in decoded(built))
    assert found == sorted((name, example.answers, pixels) for name, example, pixels in contents(source))
    inspect(source, "train", 2)
    assert "12 records, 12 examples" in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_the_config_for_own_data_takes_any_form_and_keeps_it_as_json(tmp_path, monkeypatch, form):
    from small_prefix import OWN_TOWER

    from lionjax.core import config
    from lionjax.core.experiment import Experiment

    released = Experiment("base", OWN_TOWER, DataConfig(sources=(), processor=SMALL), ())
    monkeypatch.setattr("lionjax.inference.loading.read_experiment", lambda _: released)
    (tmp_path / "params.safetensors").write_bytes(b"")
    source = FORMS[form](tmp_path / form, rows_of("vqa"))
    images = ("--images", source.image_dir) if source.image_dir else ()
    made = config.load("own_data", ["--data", source.file, *images, "--base", str(tmp_path), "--heldout", "0"])
    assert made.data.sources == (source,) == config.from_json(config.to_json(made)).data.sources
    assert [(mix.task, mix.weight) for mix in made.stages[0].mixture] == [("vqa", 12.0)]


def decoded(source) -> list:
    return [
        (sample.name.partition("/")[2], sample.example, np.asarray(Image.open(io.BytesIO(sample.image))).tobytes())
        for sample in pipeline.examples(DataConfig(sources=(source,)), "vqa", "train")
    ]


# ---------------------------------------------------------------------- what is refused


def refusal(source) -> str:
    """The only error of a source: of its file when it is opened, of its only bad row, or of its only bad image."""
    try:
        dataset = open_split(source, "train", MAX_PIXELS)
        problems = list(dataset.row_problems())
        for record in range(len(dataset)) if not problems else ():
            dataset.load_record(record)
    except UserError as error:
        problems = [str(error)]
    assert len(problems) == 1 and "\n" not in problems[0] and len(problems[0]) < 500
    return problems[0]


BAD_CSV = {
    "misspelt": ("image,answr\na.png,x\n", "unknown key 'answr'; write 'answer'"),
    "no image": ("picture,answer\na.png,x\n", "write 'image'"),
    "no answers": ("image,question\na.png,x\n", "no column of answers"),
    "cells": ("image,answer\na.png,x\na.png\n", "line 3, has another number of cells"),
    "twice": ("image,answer,answer\na.png,x,y\n", "'answer' twice"),
    "empty": ("", "is empty"),
    "boxes": ('image,boxes\na.png,"[[0, 0"\n', "line 2, has no JSON as 'boxes'"),
    "three": ('image,boxes\na.png,"[[0, 0, 1]]"\n', "line 2, has [[0, 0, 1]] as 'boxes'"),
    "talk": ("image,messages\na.png,hello\n", "no JSON as 'messages'"),
    "no answer": ("image,question,answer\na.png,x,\n", "line 2, has neither an answer nor boxes"),
    "deep": ("image,messages\na.png," + 10_000 * "[" + "\n", "no JSON as 'messages'"),
    "path": ("image,answer\n../secret.png,x\n", "leaves the data folder"),
    "absolute": ("image,answer\n/etc/passwd,x\n", "leaves the data folder"),
    "bytes": ("image,answer\n\udcff,x\n", "cannot be read as text"),
}


@pytest.mark.parametrize(("text", "words"), BAD_CSV.values(), ids=BAD_CSV)
def test_a_bad_table_is_refused_in_one_sentence(tmp_path, text, words):
    folder = tmp_path / "pics"
    write_pictures(folder)
    (folder / "a.png").write_bytes(picture(0))
    (tmp_path / "secret.png").write_bytes(picture(0))
    (folder / "rows.csv").write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(detect_source(str(folder / "rows.csv")))
    assert words in message and ("rows.csv" in message or "folder" in message)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_a_link_in_a_tar_is_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(link("a.png", "/etc/passwd"))
        info = tarfile.TarInfo("a.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    assert "sample a, has the file a.png, which is a link" in refusal(WebDataset(str(tmp_path / "a.tar")))


def test_names_that_lead_out_of_a_tar_are_labels_only(tmp_path):
    (tmp_path / "x").mkdir()
    write_tar(tmp_path / "x/a.tar", {"../../up.png": picture(0), "../../up.txt": b"x", "/up2.png": picture(0)})
    dataset = open_split(WebDataset(str(tmp_path / "x/a.tar")), "train", MAX_PIXELS)
    assert dataset.record_name(0) == "up.png" and dataset.load_record(0)[0].size == (50, 40)
    assert {path.name for path in tmp_path.rglob("*")} == {"x", "a.tar", "a.tar.index.json"}


@pytest.mark.parametrize("cut", [700, 512 * 3, 512 * 3 + 100, 10_240 - 200, 512 * 4])
def test_a_tar_that_is_cut_off_is_refused_wherever_the_cut_is(tmp_path, cut):
    path = tmp_path / "a.tar"
    write_tar(path, {"a.png": picture(0).ljust(600, b"0"), "a.txt": b"x"})
    content = path.read_bytes()
    assert content[512 * 5 :] == bytes(len(content) - 512 * 5)  # two headers with 2 + 1 blocks
    path.write_bytes(content[: min(cut, 512 * 5)])
    assert "download it again" in refusal(WebDataset(str(path)))


def test_a_compressed_tar_and_other_files_are_no_tars(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    assert "compressed; decompress" in refusal(WebDataset(str(tmp_path / "a.tar"))).replace(
        "it is compressed)", "compressed"
    )
    (tmp_path / "b.tar").write_bytes(b"<html>" * 1000)
    assert "cannot be read as a tar" in refusal(WebDataset(str(tmp_path / "b.tar")))


def test_a_header_with_a_size_below_0_does_not_lead_back(tmp_path):
    info = tarfile.TarInfo("a.txt")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}".encode() + b"\0 "
    (tmp_path / "a.tar").write_bytes(2 * bytes(info.tobuf()) + bytes(block) + bytes(2048))  # back to the second
    assert "damaged" in refusal(WebDataset(str(tmp_path / "a.tar")))


BAD_SAMPLES = {
    "alone": ({"a.png": picture(0)}, "sample a, has no txt, json or cls"),
    "json": ({"a.png": picture(0), "a.json": b"{"}, "not valid JSON"),
    "list": ({"a.png": picture(0), "a.json": b"[[1]]"}, "give an object"),
    "latin": ({"a.png": picture(0), "a.txt": b"\xff"}, "no UTF-8"),
    "class": ({"a.png": picture(0), "a.cls": b"7"}, "class number 7, but there is no classes.txt"),
    "elsewhere": ({"a.json": b'{"image": "/etc/passwd", "answer": "x"}'}, "an image that the tar does not hold"),
    "picture": ({"a.png": b"no picture", "a.txt": b"x"}, "a.png cannot be read as an image"),
    "empty": ({"a.png": b"", "a.txt": b"x"}, "a.png cannot be read as an image"),
    "key": ({"a.png": picture(0), "a.json": b'{"answr": "x"}'}, "sample a, has the unknown key 'answr'"),
    "two images": ({"a.1.png": picture(0), "a.2.png": picture(0), "a.txt": b"x"}, "several images"),
}


@pytest.mark.parametrize(("files", "words"), BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_a_bad_sample_is_a_bad_record_named_with_its_tar(tmp_path, files, words):
    write_tar(tmp_path / "a.tar", files)
    assert words in refusal(WebDataset(str(tmp_path / "a.tar")))


def test_an_image_with_too_many_pixels_or_bytes_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.new("1", (9_000, 8_000)).save(buffer, "PNG")
    write_tar(tmp_path / "a.tar", {"a.png": buffer.getvalue(), "a.txt": b"x"})
    assert "9000 x 8000 pixels" in refusal(WebDataset(str(tmp_path / "a.tar"))) and len(buffer.getvalue()) < 10**6
    save(pa.table({"image": [picture(0)], "text": ["x"]}), tmp_path / "a.parquet")
    monkeypatch.setattr("lionjax.data.images.MAX_FILE_BYTES", 10)
    for name in ("a.tar", "a.parquet"):
        assert "larger than" in refusal(detect_source(str(tmp_path / name)))


BAD_PARQUET = {
    "columns": ({"pixels": [1], "target": [2]}, "no column of answers"),
    "misspelt": ({"image": ["a.png"], "anwser": ["x"]}, "write 'answer'"),
    "numbers": ({"image": ["a.png"], "answer": [3]}, "row 1, has 3 as 'answer'"),
    "class": ({"image": ["a.png"], "label": [3]}, "name of the class in place of its number"),
    "talk": ({"image": ["a.png"], "messages": [[{"role": "user", "content": "?"}]]}, "no question with an answer"),
    "null": ({"image": [{"bytes": None, "path": "a"}, {"bytes": picture(0), "path": "b"}], "text": ["x", "y"]},
             "no bytes for the image of row"),
    "outside": ({"image": ["../a.png"], "answer": ["x"]}, "leaves the data folder"),
}  # fmt: skip


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize(("columns", "words"), BAD_PARQUET.values(), ids=BAD_PARQUET)
def test_parquet_and_arrow_of_another_schema_are_refused_in_one_sentence(tmp_path, columns, words, ending):
    save(pa.table(columns), tmp_path / f"a.{ending}")
    assert words in refusal(detect_source(str(tmp_path / f"a.{ending}")))


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_damaged_parquet_or_arrow_file_is_refused_in_one_sentence(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    save(image_table(rows_of("caption")), path)
    content = path.read_bytes()
    for damaged in (b"", b"<html>", content[:-50], content[: len(content) // 2]):
        path.write_bytes(damaged)
        assert f"a.{ending} cannot be read as" in refusal(detect_source(str(path)))


def test_folders_without_captions_or_with_some_missing_say_what_to_add(tmp_path):
    write_pictures(tmp_path / "pics")
    with pytest.raises(UserError, match="12 pictures without captions; add x.txt"):
        detect_source(str(tmp_path / "pics")).open("train", MAX_PIXELS)
    for name in NAMES[1:]:
        (tmp_path / "pics" / f"{name}.txt").write_text("x")
    assert f"add it as {NAMES[0]}.txt" in refusal(ImageFolder(str(tmp_path / "pics")))
    (tmp_path / "pics" / "metadata.csv").write_text("file_name,caption\n,x\n")
    assert "line 2, has no 'file_name'" in refusal(ImageFolder(str(tmp_path / "pics")))


def test_a_pattern_names_the_tar_that_is_missing(tmp_path):
    as_tars(tmp_path / "tars", rows_of("vqa"))
    source = detect_source(str(tmp_path / "tars/shard-{000000..000009}.tar"))
    with pytest.raises(UserError, match="no file .*shard-000003.tar"):
        source.open("train", MAX_PIXELS)
    for pattern in ("s-{5..1}.tar", "s-{0..99999999}.tar"):
        with pytest.raises(UserError, match="is no range"):
            WebDataset(pattern).open("train", MAX_PIXELS)
