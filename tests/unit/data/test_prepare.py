# SPDX-License-Identifier: Apache-2.0
"""Pictures prepared with tags from a tagger, in one process and by Apache Beam: the same records, nothing lost."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from lionjax import cli, convert
from lionjax.convert.formats.ram import RAM
from lionjax.core import sharding
from lionjax.data.datasets.array_record import ArrayRecordDataset, find_dataset_folder
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.images import MAX_PIXELS, to_pil_image
from lionjax.data.prepare import array_record_writer
from lionjax.inference import tagger
from lionjax.models.vision.ram import RamConfig
from lionjax.models.vision.swin import SwinConfig

COUNT, GROUP = 11, 3
BEAM = ["--runner=DirectRunner"]
TINY = RamConfig(SwinConfig(16, 4, 4, (2,), (1,), 2, 1.0), 5, 6, 6, 8, 2, 8)
WORDS = ("abacus", "cat", "dog", "grass", "zoo")
HALF = """
import os, sys
from lionjax.data.prepare import array_record_writer
from lionjax.data.datasets.coco import Coco

class Dies:  # at the third group
    def __call__(self):
        asked = []
        def tag(seen):
            asked.append(seen)
            if len(asked) == 3:
                os._exit(9)
            return [("first",)] * len(seen)
        return tag

array_record_writer.GROUP_SIZE = 3
beam = ["--runner=DirectRunner"] if sys.argv[3] == "beam" else None
array_record_writer.build(Coco(sys.argv[1], heldout_fraction=0), sys.argv[2], make_tagger=Dies(), beam_flags=beam)
"""


@pytest.fixture(params=["alone", "beam"])
def beam(request):
    """Flags of Beam, or None for the way without it."""
    if request.param == "alone":
        return None
    pytest.importorskip("apache_beam", reason="Apache Beam, of the extra prepare, is not installed")
    return BEAM


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A COCO folder of small pictures, of which one is broken and one is missing."""
    monkeypatch.setattr(array_record_writer, "GROUP_SIZE", GROUP)
    rng, images = np.random.default_rng(0), tmp_path / "coco" / "images"
    images.mkdir(parents=True)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(images / f"{i:02d}.png")
    (images / "04.png").write_bytes(b"broken")
    (images / "07.png").unlink()
    named = [{"id": i, "file_name": f"{i:02d}.png", "width": 30, "height": 20} for i in range(COUNT)]
    said = [{"image_id": i, "caption": f"picture {i}"} for i in range(COUNT)]
    (tmp_path / "coco" / "captions.json").write_text(json.dumps({"images": named, "annotations": said}))
    return tmp_path / "coco"


@pytest.fixture
def ram(tmp_path):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), RAM.abstract_params(TINY))
    convert.to_torch(TINY, params, tmp_path / "ram")
    (tmp_path / "ram" / tagger.TAG_LIST_FILE).write_text("\n".join(WORDS))
    one = tagger.load(tmp_path / "ram")
    share_BV = one.probabilities([np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8) for i in range(9)])
    middle = np.median(share_BV, axis=0)  # so that some pictures have a tag and others not
    (tmp_path / "ram" / tagger.THRESHOLD_FILE).write_text("".join(f"{share}\n" for share in middle))
    return tmp_path / "ram"


def records(out):
    opened = ArrayRecordDataset(str(out)).open("train", MAX_PIXELS)
    return [opened.load_record(number) for number in range(len(opened))]


class Numbers:
    """A tagger that says how dark a picture is; picklable."""

    def __call__(self):
        return lambda seen: [(str(int(np.asarray(image).mean())),) for image in seen]


def test_beam_and_one_process_write_the_same_records_and_list_bad_ones(folder, tmp_path, beam):
    source = Coco(str(folder), heldout_fraction=0)
    array_record_writer.build(source, tmp_path / "plain", make_tagger=Numbers())
    place = array_record_writer.build(source, tmp_path / "out", make_tagger=Numbers(), beam_flags=beam)
    assert records(tmp_path / "out") == records(tmp_path / "plain")
    names = [known.image_info.name for _, known in records(place)]
    assert names == [f"{i:02d}.png" for i in range(COUNT) if i not in (4, 7)]
    for image, known in records(place):
        pixels = np.asarray(Image.open(folder / "images" / known.image_info.name))
        assert known.image_info.tags == (str(int(pixels.mean())),) and known.annotations["caption"]
        assert image == (folder / "images" / known.image_info.name).read_bytes()
    listed = (place / array_record_writer.SKIPPED_FILE).read_text().splitlines()
    assert len(listed) == 2 and "04.png" in listed[0] and "07.png" in listed[1]
    assert not list((tmp_path / "out").glob("part.*"))


def test_a_killed_build_resumes_and_tags_no_group_twice(folder, tmp_path, beam):
    words = [sys.executable, "-c", HALF, str(folder), str(tmp_path / "out"), "beam" if beam else "alone"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run(words, env=variables, capture_output=True).returncode == 9
    assert len(list((tmp_path / "out").glob("part.coco/*/*.json"))) == 2
    with pytest.raises(Exception, match="no data set"):
        find_dataset_folder(tmp_path / "out")

    place = array_record_writer.build(
        Coco(str(folder), heldout_fraction=0), tmp_path / "out", make_tagger=Numbers(), beam_flags=beam
    )
    tags = [known.image_info.tags for _, known in records(place)]
    assert tags.count(("first",)) in (4, 5, 6) and len(tags) == COUNT - 2
    assert len((place / array_record_writer.SKIPPED_FILE).read_text().splitlines()) == 2


def test_a_folder_without_usable_images_raises_a_one_sentence_error(folder, tmp_path, beam, capsys):
    for file in (folder / "images").iterdir():
        file.write_bytes(b"broken")
    words = ["data", "build", str(folder), "--share", "0", "--out", str(tmp_path / "out")]
    assert cli.main([*words, f"--beam={BEAM[0]}"] if beam else words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"lionjax: none of the {COUNT} images of") and "00.png" in said


@pytest.mark.slow
def test_the_command_fills_records_with_tags_of_a_tagger(folder, tmp_path, beam, ram):
    words = ["data", "build", str(folder), "--share", "0", "--out", str(tmp_path / "out"), "--tagger", str(ram)]
    assert cli.main([*words, f"--beam={BEAM[0]}"] if beam else words) == 0
    found = records(tmp_path / "out")
    seen = tagger.load(ram).tag([folder / "images" / known.image_info.name for _, known in found])
    assert [known.image_info.tags for _, known in found] == [one.tags for one in seen]
    assert len({one.tags for one in seen}) > 1


@pytest.mark.slow
def test_a_tagger_on_a_mesh_gives_the_tags_of_one_device(ram):
    mesh = sharding.make_mesh()
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 256, (9, 12, 3), np.uint8) for _ in range(19)]
    alone, spread = tagger.load(ram), tagger.load(ram).replicate(mesh)
    np.testing.assert_allclose(spread.probabilities(images), alone.probabilities(images), rtol=1e-5)
    assert [one.tags for one in spread.tag(images)] == [one.tags for one in alone.tag(images)]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = tagger._probabilities
        patch.setattr(tagger, "_probabilities", lambda c, p, x: (seen.append(x), real(c, p, x))[1])
        spread.probabilities(images)
    assert all(len({str(s.index) for s in x.addressable_shards}) == mesh.size for x in seen)


def test_a_folder_without_a_tagger_is_one_sentence_before_anything_is_read(folder, tmp_path, capsys):
    words = ["data", "build", str(folder), "--out", str(tmp_path / "out"), "--tagger", str(tmp_path / "none")]
    assert cli.main(words) == 2
    assert "there is no folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def captions(place):
    return {known.image_info.name: known.annotations["caption"][0].answers for _, known in records(place)}


def test_a_build_is_kept_for_the_same_source_and_rebuilt_for_another(folder, tmp_path):
    source, out = Coco(str(folder), heldout_fraction=0), tmp_path / "out"
    asked = []

    def make_tagger():
        asked.append(1)
        return Numbers()()

    place = array_record_writer.build(source, out, make_tagger=make_tagger)
    old_tags = [known.image_info.tags for _, known in records(out)]
    index = (place / "index.npz").stat().st_mtime_ns
    os.utime(folder / "images" / "00.png")  # the same content
    assert array_record_writer.build(source, out, make_tagger=make_tagger) == place
    assert (place / "index.npz").stat().st_mtime_ns == index and len(asked) == 1

    text = (folder / "captions.json").read_text()
    (folder / "captions.json").write_text(text.replace("picture 3", "another"))  # a changed row
    assert array_record_writer.build(source, out, make_tagger=make_tagger) == place
    assert captions(out)["03.png"] == ("another",) and captions(out)["02.png"] == ("picture 2",)

    Image.new("RGB", (30, 20), "white").save(folder / "images" / "00.png")  # a changed image
    array_record_writer.build(source, out, make_tagger=make_tagger)
    assert records(out)[0][1].image_info.tags == ("255",)
    assert [known.image_info.tags for _, known in records(out)][1:] == old_tags[1:]
    assert records(out)[0][0] == (folder / "images" / "00.png").read_bytes()

    tries = len(asked)  # another tagger
    array_record_writer.build(source, out, make_tagger=make_tagger, tagger_digest="other")
    assert len(asked) == tries + 1
    assert not list(out.glob("part.*"))
    find_dataset_folder(out)


def test_a_failed_rebuild_keeps_the_previous_build(folder, tmp_path):
    source, out = Coco(str(folder), heldout_fraction=0), tmp_path / "out"
    array_record_writer.build(source, out)
    for file in (folder / "images").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(Exception, match="none of the 11 images"):
        array_record_writer.build(source, out)
    assert len(captions(out)) == COUNT - 2


@pytest.mark.parametrize("damage", ["a changed image", "an empty file", "no file"])
def test_tags_of_a_killed_build_are_not_given_to_another_image(folder, tmp_path, damage):
    source, group = Coco(str(folder), heldout_fraction=0), tmp_path / "out" / "part.coco" / "train"

    def tag_and_stop(seen):
        if group.exists():
            raise KeyboardInterrupt  # in the second group
        return [("old",)] * len(seen)

    with pytest.raises(KeyboardInterrupt):
        array_record_writer.build(source, tmp_path / "out", make_tagger=lambda: tag_and_stop)
    (file,) = group.iterdir()
    if damage == "a changed image":
        Image.new("RGB", (30, 20), "white").save(folder / "images" / "01.png")
    else:
        file.write_text("") if damage == "an empty file" else file.unlink()
    array_record_writer.build(source, tmp_path / "out", make_tagger=Numbers())
    assert all(known.image_info.tags != ("old",) for _, known in records(tmp_path / "out"))


def test_text_only_rows_are_built_one_record_each_and_read_as_before(tmp_path, beam, monkeypatch):
    monkeypatch.setattr(array_record_writer, "GROUP_SIZE", GROUP)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    rows = [{"question": f"question {i}?", "answer": f"answer {i}"} for i in range(5)]
    rows.insert(2, {"image": "a.png", "question": "which color?", "answer": "red"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JsonLines(str(tmp_path / "rows.jsonl"), str(tmp_path))
    array_record_writer.build(source, tmp_path / "out", make_tagger=Numbers(), beam_flags=beam)
    built, plain = (s.open("train", MAX_PIXELS) for s in (ArrayRecordDataset(str(tmp_path / "out")), source))

    def read(opened):
        found = {}
        for index in range(opened.task_sizes["vqa"]):
            number = opened.record_index("vqa", index)
            image, truth = opened.load_record(number)
            example = opened.make_example("vqa", index, truth, np.random.default_rng(0), 0.0)
            pixels = np.asarray(to_pil_image(image))
            found[example.question] = (example.answers, example.scene, opened.record_name(number), pixels.tolist())
        return found

    assert read(built) == read(plain) and len(read(built)) == 6
    assert len(built) == 6  # a reader parses the record of its row only
    tags = [built.load_record(number)[1].image_info.tags for number in range(len(built))]
    assert sorted(tags) == [(), (), (), (), (), ("85",)]  # a blank image is not tagged
