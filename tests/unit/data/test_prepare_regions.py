# SPDX-License-Identifier: Apache-2.0
"""Records that keep what a refiner found: written once, resumed after a stop, read back in bfloat16."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from lionjax import cli
from lionjax.core.types import UserError
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.images import MAX_PIXELS, to_pil_image
from lionjax.data.prepare import array_record_writer
from lionjax.data.regions import ImageRegions, from_bfloat16_bits, to_bfloat16_bits
from lionjax.data.scenes.dataset import Scenes

WIDTH = 6
DIGEST = f"{'ab' * 32} 100"  # of a folder, and the number of kept regions
BEAM = ["--runner=DirectRunner"]


def look(image) -> ImageRegions | UserError:
    """A refiner's answer that depends on the image; a dark one has no box and no feature, a narrow one is refused."""
    if min(to_pil_image(image).size) < 2:
        return UserError("too narrow")
    mean = float(np.asarray(to_pil_image(image)).mean())
    num_boxes = int(mean) % 3
    features_KD = np.full((num_boxes * 2, WIDTH), mean / 7, np.float32)
    boxes = tuple((0.1, -0.2, mean / 255, 1.01) for _ in range(num_boxes))
    names = ("dog",) * num_boxes
    return ImageRegions(("dog", "sky"), ("狗", "天"), boxes, (0.5,) * num_boxes, names, names, features_KD, "abc")


@dataclasses.dataclass(frozen=True)
class Looks:
    """A picklable maker of a refiner, which stops at the call after `calls`."""

    calls: int = 10**6

    def __call__(self):
        remaining = iter(range(self.calls))

        def refine(images):
            if next(remaining, None) is None:
                raise KeyboardInterrupt
            return [look(image) for image in images]

        return refine


@pytest.fixture
def lines(tmp_path, monkeypatch):
    monkeypatch.setattr(array_record_writer, "GROUP_SIZE", 2)
    rows = ['{"question": "what?", "answer": "text only"}']
    for i in range(6):
        Image.new("RGB", (1 if i == 5 else 9, 7), (40 * i, 50, 60)).save(tmp_path / f"{i}.png")
        rows.append(f'{{"image": "{i}.png", "question": "which color?", "answer": "{i}"}}')
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return JsonLines(str(tmp_path / "rows.jsonl"), str(tmp_path))


def assert_kept(found: ImageRegions, expected: ImageRegions):
    assert found.to_json() == expected.to_json()
    kept = from_bfloat16_bits(to_bfloat16_bits(expected.features_KD))
    np.testing.assert_array_equal(found.features_KD, kept)


def check(folder) -> int:
    """Compare all records of a built folder with what the refiner finds; returns their number."""
    opened = ArrayRecordDataset(str(folder)).open("train", MAX_PIXELS)
    for number in range(len(opened)):
        image, truth = opened.load_record(number)
        expected = look(image) if truth.image_info.name else ImageRegions()
        assert truth.image_info.tags == expected.tags
        assert_kept(opened.load_regions(number), expected)
    return len(opened)


@pytest.mark.parametrize("beam", [False, True])
def test_regions_are_kept_in_the_records_and_a_stopped_build_resumes(lines, tmp_path, beam):
    if beam:
        pytest.importorskip("apache_beam", reason="Apache Beam, of the extra prepare, is not installed")
    else:
        with pytest.raises(KeyboardInterrupt):
            array_record_writer.build(lines, tmp_path / "out", make_refiner=Looks(2), tagger_digest="a")
        files = sorted(file.name for file in (tmp_path / "out").glob("part.*/*/*"))
        assert files == ["0-2.json", "2-4.json", "2-4.npz"]  # nothing was found in the first group
        (tmp_path / "out" / "part.lines" / "train" / "2-4.npz").write_bytes(b"damaged")
    flags = BEAM if beam else None
    looks = Looks() if beam else Looks(3)  # for the damaged group and the two that were not begun
    folder = array_record_writer.build(lines, tmp_path / "out", make_refiner=looks, tagger_digest="a", beam_flags=flags)
    assert check(tmp_path / "out") == 6
    assert (folder / array_record_writer.SKIPPED_FILE).read_text() == "5.png: too narrow\n"
    assert array_record_writer.build(lines, tmp_path / "out", make_refiner=Looks(0), tagger_digest="a") == folder
    with pytest.raises(KeyboardInterrupt):  # another refiner
        array_record_writer.build(lines, tmp_path / "out", make_refiner=Looks(0), tagger_digest="b")


def test_a_source_without_a_refiner_has_no_regions(lines, tmp_path):
    array_record_writer.build(lines, tmp_path / "out")
    opened = ArrayRecordDataset(str(tmp_path / "out")).open("train", MAX_PIXELS)
    assert opened.load_regions(0) is None and lines.open("train", MAX_PIXELS).load_regions(0) is None
    assert Scenes(sizes=(2, 1, 1)).open("train", MAX_PIXELS).load_regions(0) is None


def test_scenes_are_refined_as_well_and_keep_their_ground_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(array_record_writer, "GROUP_SIZE", 2)
    scenes = Scenes(sizes=(3, 2, 1), image_size=32)
    with pytest.raises(KeyboardInterrupt):
        array_record_writer.build(scenes, tmp_path, make_refiner=Looks(1), tagger_digest=DIGEST)
    folder = array_record_writer.build(scenes, tmp_path, make_refiner=Looks(), tagger_digest=DIGEST)
    assert "3-2-1-refined" in folder.parent.name and not list(tmp_path.glob("part.*"))
    assert array_record_writer.build(scenes, tmp_path, make_refiner=Looks(0), tagger_digest=DIGEST) == folder
    with pytest.raises(KeyboardInterrupt):  # another number of regions
        array_record_writer.build(scenes, tmp_path, make_refiner=Looks(0), tagger_digest=f"{DIGEST[:-1]}8")
    for split, count in (("train", 3), ("validation", 2), ("heldout", 1)):
        opened, plain = (s.open(split, MAX_PIXELS) for s in (Scenes(folder=str(folder)), scenes))
        assert len(opened) == count
        for number in range(count):
            image, scene = opened.load_record(number)
            assert scene == plain.load_record(number)[1]
            assert_kept(opened.load_regions(number), look(image))
    assert cli.main(["data", "inspect", str(folder), "--limit", "1"]) == 0
