# SPDX-License-Identifier: Apache-2.0
"""Runs of systems with places from end to end: what trains, what stays, what is saved, asked and answered."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_lion
import small_places
from PIL import Image
from pycocotools import mask as coco

import lionjax
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.boxes import box_to_text
from lionjax.data.processor import ImageTextInput, Processor
from lionjax.evaluation import asking, runner, tasks
from lionjax.evaluation.report.html import write_report
from lionjax.inference import engine
from lionjax.inference.answer_request import AnswerRequest, SessionSizes
from lionjax.inference.engine import InferenceEngine
from lionjax.inference.loading import from_params
from lionjax.inference.sampling import GenerationConfig
from lionjax.training import loop

BOX, OTHER = (0.1, 0.2, 0.6, 0.7), (0.3, 0.0, 0.9, 0.5)


def flat(params) -> dict:
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", small_places.SYSTEMS)
def test_box_and_mask_stages_train_their_parameters_and_a_stopped_run_ends_the_same(name, tmp_path):
    what = small_places.experiment(*small_places.SYSTEMS[name])
    params, figures = loop.train(what, tmp_path / "run", pipeline.batches)
    assert [stage["frozen_unchanged"] for stage in figures["stages"]] == [True, True]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    assert {"loss_text", "loss_l1", "loss_giou", "loss_cycle_state", "loss_cycle_box", "box_iou"} <= first.keys()
    assert {"loss_focal", "loss_dice", "loss_iou"} <= last.keys() and last["stage"] == "masks"

    class Enough(Exception):
        pass

    def broken(data, stage, *rest):
        stream = pipeline.batches(data, stage, *rest)
        if stage.name == "masks" and not (tmp_path / "again" / "stopped").exists():
            (tmp_path / "again" / "stopped").touch()
            raise Enough
        return stream

    with pytest.raises(Enough):
        loop.train(what, tmp_path / "again", broken)
    again, _ = loop.train(what, tmp_path / "again", pipeline.batches)
    one, other = flat(params), flat(again)
    assert one.keys() == other.keys() and all(one[path].tobytes() == other[path].tobytes() for path in one)
    start = flat(trees.merge(*first_parameters(what)))
    moved = {path for path in one if not np.array_equal(one[path], start[path])}
    trained = (*what.stages[0].trainable, *what.stages[1].trainable)
    assert all(trees.matches(path, trained) for path in moved)
    for part in ("locations/", "mask_prompts/", "sam/decoder/"):
        assert any(path.startswith(part) for path in moved), part


def first_parameters(what):
    from lionjax.training import init

    mesh = sharding.make_mesh(what.mesh)
    example = next(pipeline.batches(what.data, what.stages[0], what.seed, 8))
    return init.init_params(what, example, init.make_param_specs(what, example, mesh))


@pytest.mark.slow
@pytest.mark.parametrize("name", small_places.SYSTEMS)
def test_weights_of_a_run_go_to_torchs_names_and_back_to_the_same_bits(name, tmp_path):
    what = small_places.experiment(*small_places.SYSTEMS[name])
    made = from_params(what, small_lion.params_of(what))
    made.export(tmp_path / "torch")
    again = lionjax.load(tmp_path / "torch")
    assert again.equals_bitwise(made) and again.vlm == made.vlm
    assert again.processor.config.places == "embeddings"


def batch_of(processor: Processor, answers=None):
    picture = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    asked = [
        ImageTextInput(picture, f"What is at {box_to_text(BOX)}?", boxes=(BOX,)),
        ImageTextInput(picture, "Where is the star?"),
    ]
    return processor.batch(asked, answers)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(small_places.SYSTEMS)[1:])
def test_each_returned_box_equals_the_box_decoded_from_the_answer_tokens(name):
    """Read again at once, with the boxes as inputs; for LION over T5 and over a decoder."""
    system, config, trainable = small_places.SYSTEMS[name]
    params, processor = small_places.talking(small_places.experiment(system, config, trainable)), Processor(config)
    batch = batch_of(processor)
    how = GenerationConfig(max_new_tokens=8, eos_token_id=processor.tokenizer.eos_id, pad_token_id=0)
    made = jax.device_get(engine.generate(system, params, batch, how))
    count = (made.ids_BM[:, :-1] == small_places.TRIGGER).sum(1)
    assert count.sum() >= 1, "the model must say some places"
    np.testing.assert_array_equal(made.aux_outputs["count"], count)
    for ids in made.ids_BM.tolist():
        assert all((a == small_places.TRIGGER) == (b == small_places.LOCATION) for a, b in zip(ids, ids[1:]) if b)
    given = np.asarray(batch.boxes_mask_BK).sum(1)
    boxes, mask = np.array(batch.boxes_BK4), np.array(batch.boxes_mask_BK)
    for row, (start, number) in enumerate(zip(given, count)):
        boxes[row, start : start + number] = made.aux_outputs["box"][row, :number][: len(boxes[row]) - start]
        mask[row, start : start + number] = 1
    target = np.array(made.ids_BM)
    real = (np.arange(target.shape[1]) < np.asarray(made.length_B)[:, None]).astype(np.int32)
    spoken = dataclasses.replace(
        batch, target_BM=target, target_mask_BM=real, loss_mask_BM=real, boxes_BK4=boxes, boxes_mask_BK=mask
    )
    found, _, known = jax.jit(system.predict_boxes)(params, spoken)
    for row, number in enumerate(np.minimum(count, 3)):
        np.testing.assert_allclose(found[row, :number], made.aux_outputs["box"][row, :number], atol=1e-4)
        assert np.asarray(known)[row, :number].all()


@pytest.mark.slow
def test_an_answer_that_ends_at_a_trigger_has_no_box():
    system, config, trainable = small_places.SYSTEMS["flagship"]
    params, processor = small_lion.params_of(small_places.experiment(system, config, trainable)), Processor(config)
    batch = batch_of(processor, [f"a star {box_to_text(OTHER)}", "a star"])
    target = np.array(batch.target_BM)
    last = np.asarray(batch.target_mask_BM).sum(1) - 1
    target[np.arange(2), last] = small_places.TRIGGER  # instead of the end
    cut = dataclasses.replace(batch, target_BM=target)
    _, _, real_BK = jax.jit(system.predict_boxes)(params, cut)
    assert np.asarray(real_BK).sum(1).tolist() == [1, 0]
    loss, metrics = jax.jit(system.loss)(params, cut)
    assert np.isfinite(loss) and np.isfinite(metrics["loss_l1"])


@pytest.mark.slow
def test_masks_without_any_in_the_batch_raise_a_one_sentence_error():
    system, config, _ = small_places.SYSTEMS["flagship"]
    with pytest.raises(UserError, match="mix the task res"):
        batch = batch_of(Processor(config), ["a", "b"])
        masks = dataclasses.replace(system, objective="masks")
        params = sharding.abstract_params(masks.init, jax.random.key(0), batch)
        jax.eval_shape(masks.loss, params, batch)
    with pytest.raises(ValueError, match="region_head is None, but masks need both region_head and sam"):
        dataclasses.replace(system, places=None)


def test_location_tokens_beyond_the_vocabulary_are_refused_before_training(tmp_path):
    what = small_places.experiment(*small_places.SYSTEMS["nextchat"])
    words = dataclasses.replace(what.data.processor, places="bins", location_bins_per_side=32)
    with pytest.raises(UserError, match="the language model's vocabulary has 1024 tokens; raise model.language.vocab"):
        loop.train(
            dataclasses.replace(what, data=dataclasses.replace(what.data, processor=words)), tmp_path, pipeline.batches
        )


# Asking


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run that has ended, whose parameters say places."""
    made = tmp_path_factory.mktemp("runs") / "run"
    what = small_places.experiment(*small_places.SYSTEMS["flagship"])
    small_lion.put(made, what, small_places.talking(what), len(what.stages))
    (made / "report.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def pointing(folder):
    return lionjax.load(folder)


@pytest.mark.slow
def test_boxes_and_masks_of_an_answer_have_the_size_of_the_original_image(pointing):
    tall = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 20, 3), np.uint8))
    (answer,) = pointing.answer([tall], ["Where is the star {box}?"], [[BOX]])
    assert len(answer.boxes) >= 1 and answer.masks.shape == (len(answer.boxes), 50, 20)
    assert ((answer.boxes >= 0) & (answer.boxes <= 1)).all() and answer.masks.dtype == bool
    assert all(box_to_text(box) in answer.text for box in answer.boxes.tolist())
    (other,) = pointing.answer([tall], ["Where is the star {box}?"], [[OTHER]])
    assert other.boxes.shape != answer.boxes.shape or not np.allclose(other.boxes, answer.boxes)


@pytest.mark.slow
@pytest.mark.parametrize("blind", [False, True])
def test_teacher_forcing_reads_features_that_a_session_has_kept_in_place_of_images(pointing, monkeypatch, blind):
    samples = list(pipeline.examples(pointing.experiment.data, "rec", "heldout", 3))
    rows = [
        found for _, found in asking.encode_samples(pointing.processor, pointing.experiment.data, samples, True, "rec")
    ]
    forced, read, predict = [row["forced"] for row in rows], [], engine.predict_boxes
    asked = InferenceEngine(pointing.vlm, pointing.params, pointing.processor, pointing.engine.mesh)
    monkeypatch.setattr(engine, "predict_boxes", lambda *given: read.append(given[2].image_BHWC) or predict(*given))
    from_images = asked.teacher_forced_boxes(forced, image_blind=blind)
    session = asked.open_session(GenerationConfig(1), rows[0][True], (64, 64), SessionSizes(4, 2, 64, 64))
    assert len(list(session.run(AnswerRequest(row[True]) for row in rows))) == 3
    from_features = asked.teacher_forced_boxes(forced, image_blind=blind)
    assert read[0] is not None and read[1] is None and sum(map(len, from_images)) >= 3
    for one, other in zip(from_images, from_features, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_answers_with_any_number_of_boxes_share_one_program(pointing):
    processor, picture = pointing.processor, np.full((40, 40, 3), 90, np.uint8)
    how = engine.make_generation_config(pointing.experiment.answer, processor, "region_level")
    before, generating = engine.predict_mask_logits._cache_size(), set()
    for boxes in ((BOX,), (BOX, OTHER), ()):
        row = processor.encode_input(ImageTextInput(picture, f"What? {''.join(map(box_to_text, boxes))}", boxes=boxes))
        pointing.engine.generate([row], how, min_shape=(1, 64, 64), image_sizes=[(40, 40)])
        generating.add(engine.generate._cache_size())
    assert len(generating) == 1
    assert engine.predict_mask_logits._cache_size() == before + 1  # some of the answers have boxes


@pytest.mark.slow
def test_an_answer_without_boxes_has_no_masks_and_reads_no_image_by_sam(pointing, monkeypatch):
    processor, picture = pointing.processor, np.full((40, 30, 3), 90, np.uint8)
    row = processor.encode_input(ImageTextInput(picture, "What?"))
    location = processor.prompt.box_codec.box_token_id
    how = engine.make_generation_config(pointing.experiment.answer, processor, "region_level")
    asked = []
    predict = engine.predict_mask_logits
    monkeypatch.setattr(engine, "predict_mask_logits", lambda *given: asked.append(1) or predict(*given))
    for length in (how.max_new_tokens, 1):  # an answer of one token has no place behind a trigger
        asked.clear()
        config = dataclasses.replace(how, max_new_tokens=length)
        (answer,) = pointing.engine.generate([row], config, image_sizes=[(30, 40)])
        assert bool(asked) == (location in answer.token_ids)
        assert answer.masks.shape == (len(answer.boxes), 40, 30)
    assert not asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "boxes", "message"),
    [
        ("What is at {box} and {box}?", [BOX], "has 2 {box} and 1 boxes"),
        ("What is at {box}?", [(0.6, 0.2, 0.1, 0.5)], "has no area"),
        ("What is at {box}?", [(0.1, 0.2, 1.6, 0.5)], "leaves the image"),
        ("What are these?", [BOX] * 5, "contain 5 boxes, but at most 4 are allowed"),
    ],
)
def test_boxes_that_do_not_fit_the_prompt_are_refused(pointing, prompt, boxes, message):
    with pytest.raises(UserError, match=message):
        pointing.answer([np.zeros((20, 20, 3), np.uint8)], [prompt], [boxes])


LIMIT = 4


@pytest.mark.slow
def test_answers_with_boxes_have_masks_and_the_web_page_draws_them(pointing, folder):
    names = ("rec", "rec@digits", "res", "grounded", "box_vqa")
    entries = {name: runner.evaluate_model(pointing, name, folder, LIMIT) for name in names}
    figures = json.loads((folder / "report.json").read_text())["metrics"]
    wanted = {"rec_accuracy_50", "rec_accuracy_50_teacher_forced", "digits_rec_accuracy_50", "res_ciou", "res_giou"}
    assert wanted | {"phrase_recall_1", "phrase_recall_1_teacher_forced", "box_vqa_accuracy"} <= figures.keys()
    assert "teacher_forced" not in entries["rec@digits"] and set(entries["box_vqa"]["kinds"]) <= {
        "color",
        "shape",
        "texture",
        "yesno",
    }
    rows = [json.loads(line) for line in (folder / "evaluation" / "res.jsonl").read_text().splitlines()]
    assert len(rows) == LIMIT and all(row["truth_masks"][0]["size"] == [56, 56] for row in rows)
    for variant, field in (("metrics", "masks"), ("majority", "majority_masks")):
        masks = [next(iter(row.get(field, [])), None) for row in rows]
        again = tasks.score_res([row["truth_masks"][0] for row in rows], masks).metrics
        assert entries["res"][variant] == pytest.approx(again)
    assert "RES (expression to mask), cIoU" in write_report(folder).read_text()
    assert (folder / "answers_res.png").is_file()


def test_answer_without_masks_gets_a_mask_from_its_only_box_and_none_from_several():
    truth = [{"size": [10, 20]}] * 3
    filled = engine.Answer("", np.array([[0.5, 0.0, 1.0, 0.5]]))
    two = engine.Answer("", np.zeros((2, 4)), np.ones((2, 10, 20), bool))
    one = engine.Answer("", np.zeros((1, 4)), np.ones((1, 10, 20), bool))
    masks = runner.predicted_masks([filled, two, one], truth)
    mask_HW = coco.decode(masks[0])
    assert mask_HW.sum() == 50 and mask_HW[:5, 10:].all() and masks[1] is None and coco.area(masks[2]) == 200


def test_phrases_are_matched_to_boxes_by_their_words_and_count_once():
    from lionjax.data.scenes.tasks import Example

    third = box_to_text((0.7, 0.7, 0.9, 0.9))
    true = f"A red star {box_to_text(BOX)}, a ring {box_to_text(OTHER)} and a red star {third}."
    example = Example("grounded", "boxes", "?", true, (true,), "region_level")
    assert [phrase for phrase, _ in tasks.parse_grounded_phrases(true)] == ["a red star", "a ring", "a red star"]
    said = f"A ring {box_to_text(OTHER)} and a red star {box_to_text((0.7, 0.7, 0.9, 0.88))}."
    assert tasks.score_grounded([example], [said]).metrics == {"phrase_recall_1": 1.0}
    said = f"A red star {box_to_text(OTHER)} and a blue ring {box_to_text(OTHER)}."
    scored = tasks.score_grounded([example], [said])
    assert scored.metrics == {"phrase_recall_1": 0.0} and scored.details == {"mentioned": 0.5}
    assert tasks.score_grounded([example], ["nothing"]).sample_scores == [0.0]
