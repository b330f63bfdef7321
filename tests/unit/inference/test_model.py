# SPDX-License-Identifier: Apache-2.0
"""Talking to a model: what it is asked, what comes back, and from which folders it can be loaded."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest
import small_lion
from PIL import Image

import lionjax
from lionjax import convert
from lionjax.convert import orbax_folder
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.experiment import GenerationDefaults
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import UserError
from lionjax.data import templates
from lionjax.data.processor import Processor
from lionjax.inference import engine
from lionjax.inference.sampling import GenerationConfig

BOX, OTHER = (0.125, 0.25, 0.5, 0.75), (0.0, 0.0, 0.3, 0.9)
PROMPTS = ["What is in the picture?", "Where is the red star?", "How many are there?", "What is at {box}?"]
BOXES = [None, [], None, [BOX]]


def some_pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 255, (30 + 10 * k, 50, 3), dtype=np.uint8) for k in range(count)]


@pytest.fixture(scope="module")
def model(finished_model):
    return finished_model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "torch"
    model.export(folder)
    return folder


def texts(answers) -> list[str]:
    return [answer.text for answer in answers]


# Prompts


@pytest.mark.parametrize(
    ("group", "category"),
    [
        *(
            (group, "region_level")
            for group in (templates.REC, templates.REG, templates.RES, templates.GROUNDED_CAPTION)
        ),
        *(
            (group, "image_level")
            for group in (
                templates.CAPTION,
                templates.COLOR,
                templates.SHAPE,
                templates.COUNT,
                templates.ATTRIBUTE_YESNO,
            )
        ),
        *(
            (group, "image_level")
            for group in (templates.COUNT_COMPARISON, templates.RELATION, templates.EXISTENCE, templates.TAGS)
        ),
        (("Is there a box in the picture?", "What is the man to the left doing?"), "image_level"),
        (("Can you locate it and let me know its coordinates?", "Give the bounding box of it."), "region_level"),
    ],
)
def test_each_prompt_uses_the_router_row_of_its_task_category(group, category):
    rng = np.random.default_rng(0)
    words = {"expr": "the red star", "word": "red", "nouns": "stars", "noun": "a star", "relation": "left of"}
    words |= {"first": "the star", "second": "the ring", "box": "[0.100,0.200,0.300,0.400]"}
    for wording in group:
        prompt = templates.sample_question((wording,), rng, **words)
        assert engine.prompt_category(prompt) == category, prompt


def test_boxes_replace_their_placeholder_in_the_prompt_or_are_appended():
    written = engine.insert_boxes("Is {box} left of {box}?", [BOX, OTHER])
    assert written == "Is [0.125,0.250,0.500,0.750] left of [0.000,0.000,0.300,0.900]?"
    assert engine.insert_boxes("What is this?", [BOX]) == "What is this? [0.125,0.250,0.500,0.750]"
    assert engine.insert_boxes("{box}: what?", [BOX, BOX]).endswith("what? [0.125,0.250,0.500,0.750]")
    assert engine.insert_boxes("What is this?", []) == "What is this?"
    with pytest.raises(UserError, match="has 1 {box} and 0 boxes"):
        engine.insert_boxes("What is at {box}?", [])
    with pytest.raises(UserError, match="the box"):
        engine.insert_boxes("What?", [(0.5, 0.5, 0.5, 0.9)])


def test_every_box_of_a_text_is_read_and_nothing_else():
    text = "A star [0.1,0.200, 0.300,0.4] and [0.5,0.5,0.4,0.9], [1,2,3] [0.9,0.9,1.7,1.000]."
    np.testing.assert_allclose(engine.extract_boxes(text), [[0.1, 0.2, 0.3, 0.4], [0.9, 0.9, 1.0, 1.0]])
    assert engine.extract_boxes("no box").shape == (0, 4)


@pytest.mark.slow
def test_region_level_answers_have_no_repetition_penalty_and_short_tasks_few_tokens(model):
    answer = GenerationDefaults(num_beams=3, repetition_penalty=1.5)
    region, image, vqa = (
        engine.make_generation_config(answer, model.processor, *given)
        for given in (("region_level",), ("image_level",), ("image_level", "vqa"))
    )
    assert (region.repetition_penalty, image.repetition_penalty) == (1.0, 1.5)
    assert (region.max_new_tokens, vqa.max_new_tokens) == (24, 16) and region.num_beams == 3


# Answers


@pytest.mark.slow
def test_a_batch_answers_as_each_prompt_alone_does(model):
    images = some_pictures(4)
    together = model.answer(images, PROMPTS, BOXES)
    alone = [model.answer([images[k]], [PROMPTS[k]], BOXES[k : k + 1])[0] for k in range(4)]
    assert texts(together) == texts(alone)
    assert len(set(texts(together))) == 4, "answers that are all alike would show nothing"
    assert [answer.masks.shape for answer in together] == [(0, 30 + 10 * k, 50) for k in range(4)]


@pytest.mark.slow
def test_image_box_tags_and_category_all_change_the_answer(model):
    one, other = some_pictures(2)
    (plain,) = model.answer([one], ["What is at {box}?"], [[BOX]])
    for changed in (
        model.answer([other], ["What is at {box}?"], [[BOX]]),
        model.answer([one], ["What is at {box}?"], [[OTHER]]),
        model.answer([one], ["What is at {box}?"], [[BOX]], tags=[["star", "red"]]),
        model.answer([one], ["What is at {box}?"], [[BOX]], category="image_level"),
    ):
        assert changed[0].text != plain.text
    assert texts(model.answer([one], ["What is at [0.125,0.250,0.500,0.750]?"])) == [plain.text]


@pytest.mark.slow
def test_boxes_in_the_answer_come_as_numbers(model, monkeypatch):
    said = "Answer: [0.100,0.200,0.300,0.400]"
    monkeypatch.setattr(type(model.processor.prompt), "decode", lambda self, ids: said)
    (answer,) = model.answer(some_pictures(1), ["Where is it?"])
    np.testing.assert_allclose(answer.boxes, [[0.1, 0.2, 0.3, 0.4]])


@pytest.mark.slow
def test_image_paths_and_pil_images_give_the_same_answer_as_arrays(model, tmp_path):
    (array,) = some_pictures(1)
    picture = Image.fromarray(array)
    picture.save(tmp_path / "a.png")
    given = [array, picture, tmp_path / "a.png", str(tmp_path / "a.png")]
    assert len(set(texts(model.answer(given, ["What is it?"] * 4)))) == 1


@pytest.mark.slow
def test_prompts_within_a_length_bucket_compile_nothing_new(model):
    images = some_pictures(2)
    model.answer(images, ["What?", "What is it, and what color has it?"])
    known = set(model.engine.compiled_shapes)
    model.answer(images[::-1], ["What color?", "Is it red, or is it blue?"])
    assert model.engine.compiled_shapes == known and known


@pytest.mark.slow
def test_generation_can_be_set_and_sampling_follows_the_seed(model):
    images, prompts = some_pictures(1), ["Describe it."]
    short, long = (
        model.answer(images, prompts, generation_config=GenerationConfig(max_new_tokens=most))[0].text
        for most in (2, 8)
    )
    assert len(short) < len(long) and long.startswith(short.rstrip("\ufffd"))  # half a letter may be left over
    drawn = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=2.0)
    said = [texts(model.answer(images, prompts, generation_config=drawn, seed=seed)) for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]


@pytest.mark.slow
def test_prompt_length_at_load_allows_longer_prompts_and_keeps_answers_to_short_ones(model, finished_run):
    images, words = some_pictures(1), "what " * 200
    roomy = lionjax.load(finished_run, prompt_length=300)
    assert texts(roomy.answer(images, ["What is it?"])) == texts(model.answer(images, ["What is it?"]))
    assert roomy.answer(images, [words])[0].text
    with pytest.raises(UserError, match="but at most 128 are allowed"):
        model.answer(images, [words])


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({"prompts": []}, "nothing to ask"),
        ({"prompts": "what?"}, "prompts is one str"),
        ({"prompts": ["a", "b"]}, "1 images were given for 2 prompts"),
        ({"prompts": [" "]}, "prompt is empty"),
        ({"prompts": ["what " * 200]}, "takes .* tokens, but at most 128 are allowed"),
        ({"boxes": [[BOX], [BOX]]}, "2 boxes were given for 1 prompts"),
        ({"boxes": [[(0, 0, 2, 1)]]}, "leaves the image"),
        ({"category": "middle"}, "no category 'middle'"),
        ({"images": ["nothing.png"]}, "no image nothing.png"),
        ({"images": [some_pictures(2)]}, "the image is a list; give a path, bytes, a PIL image or a uint8 array"),
        ({"history": [("Where?", "There.")]}, r"history wants for each prompt a list of \(question, answer\)"),
        ({"shots": [[("Where?", "There.")]]}, r"shots wants for each prompt a list of \(picture, question, answer\)"),
        ({"history": [[("?", "No.")]], "shots": [[(some_pictures(1)[0], "?", "No.")]]}, "not both"),
    ],
)
def test_invalid_questions_raise_a_one_sentence_error(model, mistake, said):
    given = {"images": some_pictures(1), "prompts": ["What?"]} | mistake
    if mistake == {"prompts": []}:
        given["images"] = []
    with pytest.raises(UserError, match=said):
        model.answer(**given)


# Folders


@pytest.mark.slow
def test_a_candidate_longer_than_max_target_tokens_is_refused_and_not_cut(model):
    fits, long = "red", "red " * model.processor.config.max_target_tokens
    assert sorted(model.rank_candidates(some_pictures(1), ["What?"], [[fits, "blue"]])[0]) == [0, 1]
    (total_K,), (mean_K,) = (
        model.candidate_losses(some_pictures(1), ["What?"], [[fits, "blue"]], mean) for mean in (False, True)
    )
    tokens = [len(model.processor.tokenizer.encode(text)) + 1 for text in (fits, "blue")]  # and the end token
    np.testing.assert_allclose(mean_K, total_K / tokens, rtol=1e-6)
    with pytest.raises(UserError, match="the candidate 'red red .* at most 24 are allowed"):
        model.rank_candidates(some_pictures(1), ["What?"], [[fits, long]])


@pytest.mark.slow
def test_an_exported_folder_and_one_converted_back_answer_as_the_run_does(model, exported, tmp_path):
    convert.convert(exported, tmp_path / "ours", "jax")
    convert.convert(tmp_path / "ours", tmp_path / "theirs", "torch")
    model.export(tmp_path / "saved", to="jax")
    orbax_folder.save_orbax(exported, tmp_path / "orbax", sharding.make_mesh(MeshConfig(fsdp=8, data=1)))
    wanted = texts(model.answer(some_pictures(4), PROMPTS, BOXES))
    for folder in (exported, *(tmp_path / name for name in ("ours", "theirs", "saved", "orbax"))):
        again = lionjax.load(folder)
        assert texts(again.answer(some_pictures(4), PROMPTS, BOXES)) == wanted, folder
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), again.params, model.params)
        assert all(jax.tree.leaves(same))


def test_an_exported_folder_brings_its_own_tokenizers(exported, tmp_path):
    assert {"model.safetensors", "config.json", "lionjax.json", "tokenizer.json"} <= {
        file.name for file in exported.iterdir()
    }
    again = lionjax.load(exported)
    assert again.processor.config.tokenizer == str(exported)
    assert again.processor.config.question_tokenizer == str(exported / "qformer_tokenizer")
    asked = ("Is it red?", ["star"])
    assert again.processor.prompt.encode_prompt(*asked) == Processor(small_lion.PROCESSOR).prompt.encode_prompt(*asked)


@pytest.mark.slow
def test_weights_without_tokenizers_are_refused_with_what_is_missing(model, tmp_path):
    convert.to_torch(model.vlm, model.params, tmp_path / "bare")
    with pytest.raises(UserError, match="bare has no tokenizer; put one of tokenizer.json"):
        lionjax.load(tmp_path / "bare")
    files = model.companions()
    convert.to_torch(model.vlm, model.params, tmp_path / "whole", companions=files)
    again = lionjax.load(tmp_path / "whole")
    assert again.experiment.answer.repetition_penalty == 1.5 and again.processor.config.image_size == small_lion.SIDE
    plain = GenerationConfig(max_new_tokens=24)
    asked = some_pictures(1), ["What?"]
    assert texts(again.answer(*asked, generation_config=plain)) == texts(model.answer(*asked, generation_config=plain))


@pytest.mark.slow
def test_an_unfinished_run_answers_with_its_latest_checkpoint(tmp_path, caplog):
    what = small_lion.experiment()
    first, second = (small_lion.params_of(small_lion.experiment(seed)) for seed in (0, 1))
    small_lion.put(tmp_path, what, first, 0)
    small_lion.put(tmp_path, what, first, 1)
    trained, _ = trees.split(second, what.stages[1].trainable)
    _, rest = trees.split(first, what.stages[1].trainable)
    newest = trees.merge(trained, rest)
    small_lion.put(tmp_path, what, newest, 1, step=1)
    with caplog.at_level(logging.WARNING):
        half = lionjax.load(tmp_path)
    assert "the parameters are those of stage 'second', step 1 of 2" in caplog.text
    assert half.vlm.visual_input == "AGGREGATOR" and half.updates == 3
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), half.params, newest)
    assert all(jax.tree.leaves(same))
    shutil.rmtree(tmp_path / "checkpoints")
    assert lionjax.load(tmp_path).vlm.visual_input == "QFORMER"  # what the first stage made


@pytest.mark.slow
def test_a_checkpoint_with_a_flipped_byte_is_named_and_the_one_before_it_used(tmp_path, caplog):
    what = small_lion.experiment()
    old, new = (small_lion.params_of(small_lion.experiment(seed)) for seed in (0, 1))
    small_lion.put(tmp_path, what, old, 2)
    newer = trees.flatten(new) | trees.flatten(trees.split(old, ("vision", "language/.*"))[0])
    small_lion.put(tmp_path, what, trees.unflatten(newer), 3)
    small_lion.flipped(tmp_path / "base" / "3_final")
    before = sorted(tmp_path.rglob("*"))
    with caplog.at_level(logging.WARNING):
        model = lionjax.load(tmp_path)
    assert "3_final" in caplog.text and "the previous checkpoint is used" in caplog.text
    np.testing.assert_array_equal(model.params["soft_prompt"], old["soft_prompt"])
    assert sorted(tmp_path.rglob("*")) == before, "loading changes nothing"
    small_lion.flipped(tmp_path / "frozen")
    with pytest.raises(UserError, match="frozen parameters are damaged"):
        lionjax.load(tmp_path)


def test_a_folder_without_a_model_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        lionjax.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no model"):
        lionjax.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"class": "lionjax.core.experiment.Experiment"}))
    (tmp_path / "lock").touch()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        lionjax.load(tmp_path)


@pytest.mark.slow
def test_a_model_loads_onto_a_mesh_and_answers_the_same(model, finished_run):
    spread = lionjax.load(finished_run, MeshConfig(data=2, fsdp=4))
    kernel = spread.params["language"]["head"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and not kernel.sharding.is_fully_replicated
    asked = some_pictures(2), ["What is it?", "What color is it?"]
    assert texts(spread.answer(*asked)) == texts(model.answer(*asked))
