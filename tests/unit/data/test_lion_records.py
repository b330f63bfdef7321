# SPDX-License-Identifier: Apache-2.0
"""LION's published training code: its records, batches of one level in turns, and its crop and flip."""

import dataclasses
import json

import numpy as np
import pytest
from paths import CONFIGS
from PIL import Image

from lionjax.core import config
from lionjax.core.experiment import Mix, Stage
from lionjax.core.types import IMAGE_LEVEL, REGION_LEVEL, UserError
from lionjax.data import images, pipeline
from lionjax.data.config import DataConfig
from lionjax.data.datasets import detect
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.lion import LionRecords
from lionjax.data.mixture import augment_image_only, open_mixture
from lionjax.data.prepare import array_record_writer
from lionjax.data.processor import ProcessorConfig
from lionjax.data.samples import examples
from lionjax.data.scenes.tasks import Example
from lionjax.evaluation import tasks
from lionjax.training.optimizer import learning_rate_schedule

SMALL = ProcessorConfig(image_size=32, max_prompt_tokens=96, max_question_tokens=64, max_target_tokens=48)
BOX = (0.25, 0.25, 0.75, 0.5)
RECORDS = (
    {"image": "a.png", "question": "What color?", "answer": ["red", "dark"], "category": "norm", "tags": "bus | red"},
    {"image_path": "a.png", "question": "Where is it?", "answer": "Answer: [0.25, 0.250,0.75,0.5]", "category": "ref"},
    {"image_id": "b.png", "question": "What is at [0.250,0.250,0.750,0.500]?", "answer": "it", "category": "region"},
    {"image": "b.png", "question": "List [1,2,3,4].", "answer": "[1,2,3,4]", "tags": ["bus", "tree"]},
)


@pytest.fixture
def folder(tmp_path):
    canvas = np.zeros((64, 64, 3), np.uint8)
    canvas[16:32, 16:48] = 255
    for name in ("a.png", "b.png"):
        Image.fromarray(canvas).save(tmp_path / name)
    return tmp_path


def source(folder, *records, **fields) -> LionRecords:
    (folder / "records.json").write_text(json.dumps(list(records)))
    return LionRecords(str(folder / "records.json"), str(folder), **fields)


def read(folder, *records) -> dict[str, list[Example]]:
    dataset, rng = source(folder, *records).open("train", 10**6), np.random.default_rng(0)
    return {
        task: [
            dataset.make_example(task, i, dataset.image_infos[dataset.record_index(task, i)], rng, 0)
            for i in range(size)
        ]
        for task, size in dataset.task_sizes.items()
    }


# ------------------------------------------------------------------ records


def test_records_are_of_the_level_of_their_category(folder):
    found = read(folder, *RECORDS)
    assert [example.question for example in found["image_level"]] == ["What color?", "List [1,2,3,4]."]
    assert [example.question for example in found["region_level"]] == ["Where is it?", RECORDS[2]["question"]]
    assert all(example.category == task for task, group in found.items() for example in group)


@pytest.mark.parametrize("category", ["ref", "region", "region_level", "grounding", "norm", "other", None])
def test_four_categories_are_region_level_and_all_others_image_level(folder, category):
    (task,) = read(folder, RECORDS[0] | {"category": category})
    assert (task == "region_level") == (category in ("ref", "region", "region_level", "grounding"))


def test_the_first_answer_counts_and_tags_are_texts_or_lists(folder):
    color, numbers = read(folder, *RECORDS)["image_level"]
    assert color.answers == ("red",) and color.tags == ("bus", "red") and numbers.tags == ("bus", "tree")


def test_boxes_in_the_texts_are_the_boxes_of_the_example(folder):
    where, what = read(folder, *RECORDS)["region_level"]
    assert where.answer == "Answer: [0.250,0.250,0.750,0.500]" and (where.boxes, where.question_boxes) == ((BOX,), ())
    assert what.question == RECORDS[2]["question"] and (what.boxes, what.question_boxes) == ((), (BOX,))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image": ""}, "entry 1, has no 'image'; add it"),
        ({"question": " "}, "has no 'question'"),
        ({"answer": []}, "has no 'answer'"),
        ({"answer": 3}, "as 'answer'; give a list of texts"),
        ({"image": 9}, "as 'image'; give a text"),
        ({"image": None, "imgae": "a.png"}, "unknown key 'imgae'; write 'image'"),
    ],
)
def test_a_record_that_cannot_be_used_is_a_bad_record(folder, change, words):
    (problem,) = source(folder, RECORDS[0] | change).open("train", 10**6).row_problems()
    assert words in problem and "records.json" in problem


def test_the_format_is_told_from_json_lines_by_its_keys(folder):
    path = folder / "records.json"
    cases = [(RECORDS[0], LionRecords), (RECORDS[1], LionRecords), (RECORDS[0] | {"task": "vqa"}, JsonLines)]
    for record, kind in cases:
        path.write_text(json.dumps([record]))
        assert type(detect.detect_source(str(path))) is kind


def test_records_are_built_as_array_record_with_their_levels_boxes_and_tags(folder, tmp_path_factory):
    built = array_record_writer.build(source(folder, *RECORDS), tmp_path_factory.mktemp("built"))
    data = DataConfig((ArrayRecordDataset(str(built)),), SMALL, tag_noise=0.0)
    found = {task: [s.example for s in examples(data, task, "train")] for task in ("image_level", "region_level")}
    assert {example.tags for example in found["image_level"]} == {("bus", "red"), ("bus", "tree")}
    assert {example.boxes for example in found["region_level"]} == {(BOX,), ()}


# ------------------------------------------------------------------ training


def batches(data: DataConfig, number: int, size: int = 8) -> list:
    levels = ("image_level", "region_level")
    stage = Stage("both", 1, (".*",), tuple(Mix(level, group=level) for level in levels), size)
    stream = pipeline.batches(data, stage, 0, size)
    taken = [next(stream) for _ in range(number)]
    stream.close()
    return taken


def test_batches_of_a_file_of_both_levels_alternate_one_to_one(folder):
    data = DataConfig((source(folder, *RECORDS),), SMALL, num_threads=0)
    levels = [set(batch.task_B.tolist()) for batch in batches(data, 6, 4)]
    assert levels == [{IMAGE_LEVEL}, {REGION_LEVEL}] * 3


@pytest.mark.parametrize("augmentation", ["box_aware", "image_only"])
def test_boxes_follow_crops_and_flips_unless_lion_s_own_transform_is_chosen(folder, augmentation):
    processor = dataclasses.replace(SMALL, max_boxes=1)
    augmented = {"crop_scale": (0.5, 1.0), "hflip": True, "augmentation": augmentation}
    data = DataConfig((source(folder, RECORDS[1]),), processor, num_threads=0, **augmented)
    mixture = open_mixture(data, "train")
    (component,) = mixture.components("region_level")
    boxes, errors = set(), []
    for seed in range(20):
        row = mixture.encode_example(component, 0, np.random.default_rng(seed))
        box, answer = row["boxes"][0], mixture.processor.prompt.decode(row["target"][row["target_mask"] > 0])
        rows, columns = np.nonzero(row["pixels"][..., 0] > 127)
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 32
        errors.append(np.abs(seen - box).max())
        boxes.add(tuple(box.tolist()))
        assert ",".join(f"{edge:.3f}" for edge in box) in answer.replace(" ", "")
    if augmentation == "box_aware":
        assert max(errors) < 2 / 32 and len(boxes) > 10
    else:
        assert boxes == {BOX} and max(errors) > 0.1


def test_the_crop_is_drawn_as_torchvision_draws_it(monkeypatch):
    sizes = [images.random_crop(640, 480, np.random.default_rng(seed), (0.5, 1.0)) for seed in range(300)]
    areas = np.array([(x1 - x0) * (y1 - y0) / (640 * 480) for x0, y0, x1, y1 in sizes])
    ratios = np.array([(x1 - x0) / (y1 - y0) for x0, y0, x1, y1 in sizes])
    assert 0.499 < areas.min() < 0.55 and 0.9 < areas.max() <= 1
    assert 0.74 < ratios.min() < 0.85 and 1.25 < ratios.max() < 1.345
    assert all(0 <= x0 < x1 <= 640 and 0 <= y0 < y1 <= 480 for x0, y0, x1, y1 in sizes)
    # Where no crop of the area fits, the largest one of the ratio in the center (get_params of torchvision 0.18).
    assert images.random_crop(300, 90, np.random.default_rng(0), (0.9, 1.0)) == (90, 0, 210, 90)
    assert images.random_crop(90, 300, np.random.default_rng(0), (0.9, 1.0)) == (0, 90, 90, 210)
    # Pixels beyond the crop do not reach the resized image.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    data = DataConfig(crop_scale=(0.5, 0.6), augmentation="image_only")
    cropped, flipped = augment_image_only(image, object(), data, np.random.default_rng(1))
    wanted = image.crop(images.random_crop(64, 48, np.random.default_rng(1), (0.5, 0.6))).resize((32, 32), 3)
    np.testing.assert_array_equal(images.resize(cropped, 32), wanted)
    assert not flipped


def test_the_transform_that_leaves_boxes_alone_is_refused_where_padding_moves_them():
    with pytest.raises(UserError, match="does not move boxes, which processor.pad_to_square would do"):
        DataConfig(augmentation="image_only", processor=ProcessorConfig(pad_to_square=True))


# ------------------------------------------------------------------ the config


@pytest.mark.parametrize("name", ["lion_flant5xl", "lion_flant5xxl"])
def test_the_last_stage_of_the_full_size_config_is_that_of_the_published_code(name):
    what = config.load(CONFIGS / f"{name}.py")
    stage, rate = what.stages[-1], learning_rate_schedule(what.stages[-1])
    assert (stage.batch_size, stage.steps, stage.clip_norm, stage.grad_accum_steps) == (64, 60_000, 0.0, 1)
    assert (stage.betas, stage.weight_decay, stage.optimizer) == ((0.9, 0.999), 0.05, "adamw")
    wanted = [0.5e-5 * (1 + np.cos(np.pi * epoch / 10)) for epoch in range(10)]
    found = [[float(rate(6_000 * epoch + step)) for step in (0, 5_999)] for epoch in range(10)]
    np.testing.assert_allclose(found, np.stack([wanted, wanted], axis=1), rtol=1e-5)
    assert [(mix.task, mix.weight) for mix in stage.mixture] == [("image_level", 1.0), ("region_level", 1.0)]
    assert len({mix.group for mix in stage.mixture}) == 2
    assert (what.data.crop_scale, what.data.hflip, what.data.augmentation) == ((0.5, 1.0), True, "box_aware")


# ------------------------------------------------------------------ evaluation


def test_region_level_records_are_scored_by_their_box_or_by_their_words():
    def example(answer, *boxes):
        return Example("region_level", "box" if boxes else "text", "?", answer, (answer,), "region_level", (), boxes)

    group = [example("Answer: [0.250,0.250,0.750,0.500]", BOX), example("a red bus"), example("[0.1,0.1,0.2,0.2]", BOX)]
    scores = tasks.SCORERS["region_level"](group, ["[0.25,0.25,0.75,0.5]", "red bus", "none"])
    assert scores.metrics["region_level_accuracy_50"] == 0.5 and 0.6 < scores.metrics["region_level_rouge_l"] < 1
    assert scores.sample_scores == [1.0, 1.0, 0.0] and set(scores.bootstrap_intervals()) == set(scores.metrics)
    words = tasks.SCORERS["region_level"](group[1:2], ["a red bus"])
    assert words.metrics == {"region_level_rouge_l": 1.0}
    image = [dataclasses.replace(group[1], task="image_level")]
    assert set(tasks.SCORERS["image_level"](image, ["bus"]).metrics) == {"image_level_rouge_l", "image_level_f1"}
    assert tasks.constant_answers("region_level", group[1:2], group) == ["a red bus"] * 3
