# SPDX-License-Identifier: Apache-2.0
"""The stream of batches: decided by seed, stage and place alone, whatever reads it, and stopping for what is bad."""

import dataclasses
import json
import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lionjax.core.errors import RetryError
from lionjax.core.types import IMAGE_LEVEL, REGION_LEVEL, UserError
from lionjax.data import pipeline, prefetch
from lionjax.data.config import DataConfig
from lionjax.data.datasets.annotated_images import Annotation, ImageInfo, make_example
from lionjax.data.datasets.array_record import RecordTruth
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.images import FULL_IMAGE
from lionjax.data.mixture import MixtureComponent, MixtureDataset, augment, open_mixture, prompt_format_for
from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.data.samples import examples
from lionjax.data.scenes.dataset import Scenes
from lionjax.data.scenes.tasks import Example, box_to_text

SMALL = ProcessorConfig(image_size=32, max_prompt_tokens=96, max_question_tokens=64, max_target_tokens=48)
DATA = DataConfig(sources=(Scenes(sizes=(40, 4, 6), image_size=32),), processor=SMALL, num_threads=0)
STAGE = SimpleNamespace(name="both", mixture=(("vqa", 1.0), ("rec", 2.0), ("caption", 1.0)))


def stage(*mixture, name="stage"):
    return SimpleNamespace(name=name, mixture=mixture)


def stream(data=DATA, of=STAGE, seed=0, size=8, index=0, count=1):
    return pipeline.batches(data, of, seed, size, index, count)


def take(batches, number: int) -> list:
    taken = [next(batches) for _ in range(number)]
    batches.close()
    return taken


def same(one, other) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one) if f.name != "features"]
    return all(np.array_equal(a, b) for a, b in pairs if a is not None or b is not None)


def joined(batches) -> dict[str, np.ndarray]:
    """The rows of the processes of one step side by side, as they lie on the devices: the order of the stream."""
    texts = np.concatenate([b.prompt_BL for b in batches])
    return {"prompt": texts, "record": np.concatenate([b.record_B for b in batches])}


# ---------------------------------------------------------------------- the stream


def test_the_same_seed_gives_the_same_batches_and_another_seed_or_stage_does_not():
    first, again = take(stream(), 4), take(stream(), 4)
    assert all(map(same, first, again))
    other = [take(stream(seed=1), 4), take(stream(of=stage(*STAGE.mixture, name="other")), 4)]
    for batches in other:
        assert not any(map(same, first, batches))


@pytest.mark.parametrize(("threads", "buffer", "cache"), [(1, 2, 512), (3, 5, 512), (2, 2, 0)])
def test_threads_buffers_and_image_cache_do_not_change_batches(threads, buffer, cache):
    data = dataclasses.replace(DATA, num_threads=threads, prefetch_buffer_size=buffer, image_cache_mib=cache)
    assert all(map(same, take(stream(), 12), take(stream(data), 12)))


@pytest.mark.slow
def test_worker_processes_do_not_change_batches():
    data = dataclasses.replace(DATA, num_workers=2)
    assert all(map(same, take(stream(), 5), take(stream(data), 5)))


def test_a_restored_stream_continues_with_the_same_batches():
    data = dataclasses.replace(DATA, num_threads=2, prefetch_buffer_size=4)
    whole = take(stream(data), 9)
    first = stream(data)
    for _ in range(4):
        next(first)
    position = json.loads(json.dumps(first.position()))
    first.close()
    second = stream(data)
    next(second)
    second.restore(position)
    assert all(map(same, whole[4:], take(second, 5)))


def test_a_position_counts_delivered_batches_and_not_prefetched_ones():
    data = dataclasses.replace(DATA, num_threads=2, prefetch_buffer_size=8)
    batches = stream(data)
    assert batches.position()["next"] == 0
    take(batches, 3)
    assert batches.position()["next"] == 24


@pytest.mark.parametrize("count", [2, 4])
def test_processes_divide_each_batch_and_share_one_position(count):
    whole = take(stream(), 3)
    parts = [stream(index=i, count=count) for i in range(count)]
    taken = [take(part, 3) for part in parts]
    for step in range(3):
        rows = joined([batches[step] for batches in taken])
        np.testing.assert_array_equal(rows["prompt"], whole[step].prompt_BL)
        np.testing.assert_array_equal(rows["record"], whole[step].record_B)
    assert len({json.dumps(part.position()) for part in parts}) == 1


def test_run_resumes_with_another_number_of_processes():
    whole = take(stream(), 6)
    two = [stream(index=i, count=2) for i in range(2)]
    for part in two:
        take(part, 2)
    four = [stream(index=i, count=4) for i in range(4)]
    for part in four:
        part.restore(two[0].position())
    taken = [take(part, 3) for part in four]
    for step in range(3):
        rows = joined([batches[step] for batches in taken])
        np.testing.assert_array_equal(rows["prompt"], whole[2 + step].prompt_BL)
    one = stream()
    one.restore(four[3].position())
    assert same(next(one), whole[5])


@pytest.mark.parametrize(
    "changed_stream",
    [
        {"seed": 5},
        {"of": stage(("vqa", 1.0), ("rec", 1.0), name="both")},
        {"of": stage(("vqa", 1.0), ("rec", 1.0), ("caption", 1.0), name="both")},  # weights alone
        {"data": dataclasses.replace(DATA, sources=(Scenes(sizes=(41, 4, 6), image_size=32),))},
    ],
)
def test_a_position_in_other_data_is_refused(changed_stream):
    position = stream().position()
    with pytest.raises(UserError, match="belongs to other data"):
        stream(**changed_stream).restore(position)


# ---------------------------------------------------------------------- what is in it


def test_tasks_come_by_their_weights_and_all_records_before_any_comes_again():
    batches = stream(of=stage(("vqa", 1.0), ("rec", 3.0)), size=16)
    taken = take(batches, 20)
    share = np.mean(np.concatenate([b.task_B for b in taken]) == REGION_LEVEL)
    assert share == pytest.approx(0.75, abs=0.01)
    alone = take(stream(of=stage(("vqa", 1.0)), size=8), 10)
    records = np.concatenate([b.record_B for b in alone])
    assert sorted(records[:40]) == sorted(records[40:]) == list(range(40))
    assert records[:40].tolist() != records[40:].tolist()


def test_a_record_gets_another_question_in_each_epoch():
    taken = take(stream(of=stage(("vqa", 1.0)), size=40), 3)
    prompts = [{r: p.tobytes() for r, p in zip(b.record_B.tolist(), b.prompt_BL)} for b in taken]
    changed_prompts = sum(prompts[0][r] != prompts[1][r] for r in prompts[0])
    assert changed_prompts > 30


def test_batch_rows_hold_the_content_of_their_records():
    batches = stream(of=stage(("rec", 1.0)))
    batch = take(batches, 1)[0]
    records, processor = MixtureDataset(DATA, "train"), Processor(SMALL)
    for row in range(4):
        pixels, scene, _ = records.load_cached(0, int(batch.record_B[row]))
        np.testing.assert_array_equal(batch.image_BHWC[row], processor.normalize(pixels))
        answer = processor.prompt.decode(batch.target_BM[row])
        assert answer in {f"Answer: {box_to_text(thing.box)}" for thing in scene.things}
    assert batches.name(int(batch.record_B[0])) == f"scenes/train-0-{batch.record_B[0]:06d}"
    assert batch.task_B.tolist() == [REGION_LEVEL] * 8 and IMAGE_LEVEL != REGION_LEVEL


def test_all_batches_have_one_shape():
    taken = take(stream(), 10)
    shapes = {tuple(a.shape for a in vars(batch).values() if a is not None) for batch in taken}
    assert len(shapes) == 1
    assert taken[0].prompt_BL.shape == (8, 96) and taken[0].target_BM.shape == (8, 48)


def test_buckets_shorten_batches_and_are_given_up_where_processes_must_agree():
    data = dataclasses.replace(DATA, length_buckets=(4, 16, 64))
    short = take(stream(data, of=stage(("vqa", 1.0))), 5)
    assert {b.target_BM.shape[1] for b in short} == {4}
    for batch, fixed in zip(short, take(stream(of=stage(("vqa", 1.0))), 5)):
        np.testing.assert_array_equal(batch.prompt_BL, fixed.prompt_BL[:, : batch.prompt_BL.shape[1]])
    shared = take(stream(data, of=stage(("vqa", 1.0)), count=2), 1)
    assert shared[0].target_BM.shape[1] == 48


def test_boxes_come_as_arrays_when_asked_for():
    data = dataclasses.replace(DATA, processor=dataclasses.replace(SMALL, max_boxes=2))
    batch = take(stream(data, of=stage(("rec", 1.0), ("vqa", 1.0))), 1)[0]
    for row in range(8):
        answer = Processor(SMALL).prompt.decode(batch.target_BM[row])
        count = answer.count("[")
        assert batch.boxes_mask_BK[row].sum() == count
        if count:
            assert box_to_text(batch.boxes_BK4[row, 0].tolist()) in answer


def test_tags_are_noisy_and_sometimes_left_out():
    def tagged(**change):
        data = dataclasses.replace(DATA, **change)
        batches = take(stream(data, of=stage(("caption", 1.0)), size=40), 1)
        slot = Processor(SMALL).tokenizer.soft_prompt_id
        return (batches[0].prompt_BL == slot).any(1), batches[0].prompt_mask_BL.sum()

    (all_tagged, length), (some, _), (_, noisy) = (
        tagged(tag_noise=0.0),
        tagged(tag_dropout=0.5),
        tagged(tag_noise=0.9),
    )
    assert all_tagged.all() and 8 < some.sum() < 32 and noisy < 0.8 * length


# ---------------------------------------------------------------------- bad data


@pytest.fixture
def lines(tmp_path):
    """Twenty pictures with a question each; `spoil` makes some of them bad in as many ways."""
    for i in range(20):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")

    def source(*bad: str):
        rows = [{"image": f"{i}.png", "question": f"what is {i}?", "answer": str(i)} for i in range(20)]
        if "missing" in bad:
            rows[3]["image"] = "gone.png"
        if "corrupt" in bad:
            (tmp_path / "5.png").write_bytes(b"\x89PNG broken")
        if "outside" in bad:
            rows[7]["image"] = "../../etc/passwd"
        if "box" in bad:
            rows[9]["boxes"] = [[0.5, 0.5, 0.5, 0.9]]
        if "empty" in bad:
            rows[11]["question"] = "   "
        if "long" in bad:
            rows[13]["question"] = "what " * 200
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return JsonLines(str(tmp_path / "rows.jsonl"), str(tmp_path))

    return source


BAD = {
    "missing": "gone.png",
    "corrupt": "5.png",
    "outside": "leaves",
    "box": "no area",
    "empty": "no question",
    "long": "max_prompt_tokens",
}


@pytest.mark.parametrize(("kind", "words"), BAD.items())
@pytest.mark.parametrize("threads", [0, 2])
def test_a_bad_record_stops_the_run_with_one_sentence(lines, kind, words, threads):
    data = DataConfig(sources=(lines(kind),), processor=SMALL, num_threads=threads)
    with pytest.raises(UserError) as error:
        take(stream(data, of=stage(("vqa", 1.0)), size=4), 6)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("threads", [0, 2])
def test_bad_records_are_replaced_deterministically_recorded_and_counted(lines, tmp_path, threads):
    note = tmp_path / "notes" / "bad.jsonl"
    data = DataConfig(
        sources=(lines(*BAD),),
        processor=SMALL,
        on_bad_record="replace",
        max_bad_fraction=0.4,
        bad_records_path=str(note),
        num_threads=threads,
    )
    batches = stream(data, of=stage(("vqa", 1.0)), size=4)
    taken = [next(batches) for _ in range(5)]
    assert batches.num_bad_records == 6 and batches.num_rows == 20
    notes = [json.loads(line) for line in note.read_text().splitlines()]
    assert {n["index"] for n in notes} == {3, 5, 7, 9, 11, 13} and {n["source"] for n in notes} == {"lines"}
    for words in BAD.values():
        assert any(words in n["reason"] for n in notes)
    said = [batches.dataset.processor.prompt.decode(row) for b in taken for row in b.target_BM]
    assert sorted(said) == sorted([*map(str, range(20)), "4", "6", "8", "10", "12", "14"])[:0] + sorted(
        [str(i + 1) if i in (3, 5, 7, 9, 11, 13) else str(i) for i in range(20)]
    )
    batches.close()
    again = take(stream(data, of=stage(("vqa", 1.0)), size=4), 5)
    assert all(map(same, taken, again))


def test_too_many_bad_records_stop_the_run(lines):
    data = DataConfig(
        sources=(lines(*BAD),), processor=SMALL, on_bad_record="replace", max_bad_fraction=0.05, num_threads=0
    )
    with pytest.raises(UserError, match="max_bad_fraction"):
        take(stream(data, of=stage(("vqa", 1.0)), size=4), 5)


def judged(num_rows, num_bad, fraction=0.01, earlier=(0, 0)):
    """Whether so many bad records in one batch stop a run."""
    batches = stream(DataConfig(max_bad_fraction=fraction, on_bad_record="replace"), of=stage(("vqa", 1.0)), size=4)
    batches.count_earlier(*earlier)
    note = json.dumps([{"source": 0, "task": "vqa", "index": 0, "reason": "broken"}])
    try:
        batches._count_bad_records(np.array([note] * num_bad + [""] * (num_rows - num_bad)))
    except UserError:
        return True
    finally:
        batches.close()
    return False


def test_the_fraction_of_bad_records_is_judged_over_all_that_the_run_has_seen():
    assert not judged(100, 4)  # the first hundred of a source with 1 % bad records
    assert judged(100, 10) and judged(10_000, 150)
    assert not judged(100, 10, earlier=(100_000, 900))  # after a restart
    assert judged(100, 1, earlier=(100_000, 1_200))
    assert judged(4, 2, fraction=0.0) and not judged(4, 1, fraction=0.0)


def test_a_source_of_nothing_but_bad_records_stops_at_once(tmp_path):
    rows = [{"image": f"{i}.png", "question": "a?", "answer": "b"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(
        sources=(JsonLines(str(tmp_path / "rows.jsonl"), str(tmp_path)),),
        processor=SMALL,
        on_bad_record="replace",
        max_bad_fraction=1.0,
    )
    with pytest.raises(UserError, match="in a row"):
        next(stream(data, of=stage(("vqa", 1.0)), size=4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"of": stage(("vqq", 1.0))}, "vqq"),
        ({"of": stage(("coco/vqa", 1.0))}, "coco/vqa"),
        ({"of": stage(("vqa", -1.0))}, "weights"),
        ({"of": stage(("vqa", 0.0))}, "weights"),
        ({"of": stage()}, "weights"),
        ({"size": 9, "count": 2}, "divide"),
        ({"size": 0}, "divide"),
    ],
)
def test_a_stage_without_examples_raises_a_one_sentence_error(arguments, words):
    with pytest.raises(UserError) as error:
        stream(**arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field", [{"tag_noise": 2.0}, {"crop": (0.0, 1.0)}, {"threads": -1}, {"sources": (Scenes(), Scenes(seed=1))}]
)
def test_an_invalid_data_config_raises_a_one_sentence_error(field):
    with pytest.raises(UserError):
        DataConfig(**field)


def test_answers_longer_than_max_target_tokens_are_counted_named_once_and_have_no_end_token(lines, caplog):
    source = lines()
    rows = [json.loads(line) for line in Path(source.file).read_text().splitlines()]
    for row in rows[::2]:
        row["answer"] = "red " * 60
    Path(source.file).write_text("\n".join(map(json.dumps, rows)))
    batches = stream(DataConfig(sources=(source,), processor=SMALL), of=stage(("vqa", 1.0)), size=4)
    taken = [next(batches) for _ in range(5)]
    assert batches.num_cut_answers == 10 and batches.num_bad_records == 0
    eos = Processor(SMALL).tokenizer.eos_id
    for target_BM, length_B in ((b.target_BM, b.target_mask_BM.sum(1)) for b in taken):
        for target_M, length in zip(target_BM, length_B):
            assert (eos in target_M[:length]) == (length < SMALL.max_target_tokens)
    (warning,) = [record.message for record in caplog.records if "is cut to" in record.message]
    assert "processor.max_target_tokens=48" in warning and "lines/" in warning
    batches.close()


# ---------------------------------------------------------------------- several sources, augmentation, evaluation


def test_several_sources_are_mixed_and_their_records_have_numbers_of_their_own(lines):
    data = dataclasses.replace(DATA, sources=(*DATA.sources, lines()))
    batches = stream(data, of=stage(("vqa", 1.0), ("lines/vqa", 1.0)), size=12)
    taken = take(batches, 10)
    records = np.concatenate([b.record_B for b in taken])
    from_lines = [batches.name(int(r)) for r in records if r >= 40]
    assert all(re.fullmatch(r"lines/\d+\.png", name) for name in from_lines)
    # "vqa" means both sources by their sizes, 40 and 20; "lines/vqa" one.
    assert len(from_lines) / len(records) == pytest.approx(0.5 * 20 / 60 + 0.5, abs=0.05)


def region(question, answer, asked=(), said=()) -> Example:
    words = {"answer": answer, "answers": (answer,), "category": "region_level"}
    return Example("rec", "rec", question, question_boxes=asked, boxes=said, **words)


def test_crops_and_flips_move_boxes_in_arrays_and_in_text():
    a, b = (0.2, 0.4, 0.5, 0.6), (0.6, 0.3, 0.8, 0.7)
    example = region(f"What is in {box_to_text(a)}?", f"Answer: {box_to_text(b)}", (a,), (b,))
    data = dataclasses.replace(DATA, crop_scale=(0.5, 0.9), hflip=True)
    seen, mirrors = set(), 0
    for seed in range(30):
        moved, window, mirrored = augment(example, object(), data, np.random.default_rng(seed))
        seen.add(window)
        mirrors += mirrored
        assert moved.question == f"What is in {box_to_text(moved.question_boxes[0])}?"
        assert moved.answer == f"Answer: {box_to_text(moved.boxes[0])}"
        width = window[2] - window[0]
        x0, x1 = ((edge - window[0]) / width for edge in (a[0], a[2]))
        wanted = (1 - x1, 1 - x0) if mirrored else (x0, x1)
        np.testing.assert_allclose((moved.question_boxes[0][0], moved.question_boxes[0][2]), wanted)
    assert len(seen) > 10 and 5 < mirrors < 25


def test_examples_that_say_left_or_right_are_not_flipped_and_scenes_not_augmented():
    rng, data = np.random.default_rng(0), dataclasses.replace(DATA, crop_scale=(0.5, 0.9), hflip=True)
    sides = region("Where is the leftmost ring?", "Answer: [0.100,0.100,0.200,0.200]", (), ((0.1, 0.1, 0.2, 0.2),))
    assert not any(augment(sides, object(), data, rng)[2] for _ in range(20))
    scene = MixtureDataset(DATA, "train").load_cached(0, 0)[1]
    assert augment(sides, scene, data, rng) == (sides, FULL_IMAGE, False)
    question = dataclasses.replace(region("How many?", "2"), task="vqa")
    assert augment(question, object(), data, rng)[1] == FULL_IMAGE


def test_cropped_photos_reach_the_batch_with_their_boxes(tmp_path):
    canvas = np.zeros((64, 64, 3), np.uint8)
    canvas[16:32, 16:48] = 255
    Image.fromarray(canvas).save(tmp_path / "a.png")
    row = {"image": "a.png", "task": "rec", "expression": "it", "boxes": [[0.25, 0.25, 0.75, 0.5]]}
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    sources = (JsonLines(str(tmp_path / "r.jsonl"), str(tmp_path)),)
    data = DataConfig(
        sources=sources,
        processor=dataclasses.replace(SMALL, max_boxes=1),
        crop_scale=(0.5, 0.9),
        hflip=True,
        num_threads=0,
    )
    batch = take(stream(data, of=stage(("rec", 1.0)), size=16), 1)[0]
    for image, box in zip(batch.image_BHWC, batch.boxes_BK4[:, 0]):
        rows, columns = np.nonzero(image[..., 0] > 0)
        edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 32
        np.testing.assert_allclose(edges, box, atol=1.5 / 32)
    assert len({tuple(box) for box in batch.boxes_BK4[:, 0].tolist()}) > 8


def test_evaluation_questions_do_not_depend_on_the_limit_and_come_from_their_split():
    few, many = (list(examples(DATA, "vqa", "heldout", limit, seed=3)) for limit in (3, None))
    assert [s.example for s in few] == [s.example for s in many[:3]] and len(many) == 6
    assert all(s.name.startswith("scenes/heldout-0-") for s in many)
    other = list(examples(DATA, "vqa", "heldout", None, seed=4))
    assert [s.example.question for s in other] != [s.example.question for s in many]


def test_evaluation_leaves_bad_records_out_only_when_told(lines, caplog):
    data = DataConfig(sources=(lines("missing", "empty"),), processor=SMALL)
    with pytest.raises(UserError):
        list(examples(data, "vqa", "heldout"))
    kept = list(examples(dataclasses.replace(data, on_bad_record="replace"), "vqa", "heldout"))
    assert len(kept) == 18 and "gone.png" in caplog.text


def test_stages_share_opened_sources_until_a_file_changes(lines, tmp_path):
    data = DataConfig(sources=(lines(),), processor=SMALL)
    first = open_mixture(data, "train")
    assert open_mixture(dataclasses.replace(data), "train") is first and open_mixture(data, "heldout") is not first
    lines("box")
    assert open_mixture(data, "train") is not first


@pytest.mark.slow
def test_a_bad_record_in_a_worker_process_is_the_same_sentence(lines):
    data = DataConfig(sources=(lines("missing"),), processor=SMALL, num_workers=1)
    with pytest.raises(UserError, match=r"gone\.png"):
        take(stream(data, of=stage(("vqa", 1.0)), size=4), 6)


@pytest.mark.parametrize("name, kind", [("", "told"), ("a.png", "")])
def test_a_record_without_an_image_has_a_text_only_prompt_also_from_built_data(name, kind):
    info, component = ImageInfo(name), MixtureComponent(0, "vqa", 1, 1.0)
    example = make_example("vqa", Annotation(0, ("red",), "Which?"), info, np.random.default_rng(0))
    for truth in (info, RecordTruth(info, {}, [])):
        assert prompt_format_for(component, truth, example).kind == kind


# ---------------------------------------------------------------------- the questions of an evaluation


def line_questions(folder, count: int) -> DataConfig:
    """Two questions about each of `count` pictures; the second picture is missing."""
    for k in range(count):
        if k != 1:
            Image.new("RGB", (40, 30), (9 * k, 200, 90)).save(folder / f"{k}.png")
    rows = [{"image": f"{k % count}.png", "question": f"What is {k}?", "answer": "red"} for k in range(2 * count)]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JsonLines(str(folder / "lines.jsonl"), str(folder), heldout_fraction=0)
    return DataConfig((source,), SMALL, on_bad_record="replace")


def read(data, **options) -> list:
    found = examples(data, "vqa", by_record=True, **options)
    return [(one.position, one.example.question, np.asarray(one.image).tobytes()) for one in found]


@pytest.mark.slow
def test_images_read_in_processes_are_the_same_and_a_process_that_ends_is_said(tmp_path):
    data, skipped = line_questions(tmp_path, 12), {}
    expected = read(data)
    assert len(expected) == 22
    assert read(data, num_workers=1, on_skip=skipped.setdefault) == expected
    assert list(skipped) == ["lines/1.png"]
    found = examples(data, "vqa", by_record=True, num_workers=1)
    next(found)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(RetryError, match="a process that reads images ended"):
        list(found)


def test_parts_share_the_images_and_together_have_every_question_once(tmp_path):
    data = line_questions(tmp_path, 7)
    parts = [read(data, part=(k, 3)) for k in range(3)]
    assert sorted(sum(parts, [])) == sorted(read(data)) and all(parts)
    pictures = [{picture for _, _, picture in part} for part in parts]
    assert not pictures[0] & pictures[1] and not pictures[1] & pictures[2] and not pictures[0] & pictures[2]


def test_processes_are_chosen_for_many_images_and_cores(monkeypatch):
    for cores, images, chosen in ((4, 9999, 0), (16, 63, 0), (16, 200, 3), (16, 9999, 8), (6, 9999, 3)):
        monkeypatch.setattr(prefetch.os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        assert prefetch.choose_num_workers(images) == chosen
