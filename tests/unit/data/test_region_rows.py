# SPDX-License-Identifier: Apache-2.0
"""Kept regions as rows of a batch: features, packed text, text in the prompt, refusals."""

import dataclasses

import numpy as np
import pytest

from lionjax.core.experiment import Mix, Stage
from lionjax.core.types import ModelInfo, UserError
from lionjax.data import pipeline, tokenizer
from lionjax.data.box_text import PackingConfig, pack_text
from lionjax.data.config import DataConfig
from lionjax.data.processor import ImageTextInput, Processor, ProcessorConfig
from lionjax.data.regions import ImageRegions
from lionjax.data.scenes.dataset import OpenScenes, Scenes

INFO = ModelInfo(region_width=6, reads_packed_text=True)
PROCESSOR = ProcessorConfig(image_size=8, question_tokenizer="tiny_wordpiece", max_regions=3, use_tags=False)
FOUND = ImageRegions(
    tags=("star", "red"),
    boxes=((0.1, 0.2, 0.3, 0.4), (-0.1, 0.5, 0.9, 1.0)),
    names=("star", "red"),
    features_KD=np.arange(24, dtype=np.float32).reshape(4, 6),
    digest="abc",
)
IMAGE = np.zeros((8, 8, 3), np.uint8)


def processor_for(info: ModelInfo = INFO, **changes) -> Processor:
    data = DataConfig((Scenes((4, 1, 1), 8),), dataclasses.replace(PROCESSOR, **changes))
    return Processor(data.for_model(info).processor)


def encode(processor: Processor, found, caption: str = "A star."):
    return processor.encode_regions(found, caption, np.random.default_rng(3), "scenes/one")


def test_the_first_regions_are_read_and_missing_ones_are_masked():
    rows = encode(processor_for(), [FOUND])
    np.testing.assert_array_equal(rows["regions"], FOUND.features_KD[:3])
    assert rows["regions_mask"].all()
    rows = encode(processor_for(max_regions=5), [FOUND])
    assert rows["regions_mask"].tolist() == [True] * 4 + [False] and not rows["regions"][4].any()
    empty = encode(processor_for(), [ImageRegions(digest="abc")])
    assert empty["regions_mask"].tolist() == [True, False, False] and not empty["regions"].any()


def test_several_images_have_a_set_of_regions_each():
    rows = encode(processor_for(max_images=3), [FOUND, ImageRegions()])
    assert rows["regions"].shape == (3, 3, 6) and rows["regions_mask"].sum(1).tolist() == [3, 1, 1]


def test_the_caption_is_packed_behind_the_boxes_with_the_same_draws():
    packing = PackingConfig(max_box_tokens=30, length=50)
    rows = encode(processor_for(packing=packing), [FOUND])
    words, rng = tokenizer.load("tiny_wordpiece"), np.random.default_rng(3)
    theirs = pack_text(words, "A star.", FOUND.names, FOUND.boxes, rng, packing)
    for name, array in theirs.items():
        np.testing.assert_array_equal(rows[f"packed_{name}"], array)
    batch = processor_for(packing=packing).batch([ImageTextInput(IMAGE, "what?", regions=FOUND)], ["A star."])
    assert batch.region_BKD.shape == (1, 3, 6) and batch.packed.ids_BL.shape == (1, 50)
    np.testing.assert_array_equal(batch.packed.position_BL[0], theirs["position"])


def test_a_model_without_regions_gets_none_and_one_without_packed_text_no_packed_text():
    assert encode(processor_for(ModelInfo()), [FOUND]) == {}
    assert not any(
        "packed" in name for name in encode(processor_for(dataclasses.replace(INFO, reads_packed_text=False)), [FOUND])
    )
    batch = processor_for().batch([ImageTextInput(IMAGE, "what?")])  # for the shapes of parameters
    assert batch.region_BKD is None and batch.packed is None


def test_boxes_stand_as_text_in_the_prompt_alone_and_only_if_asked_for():
    plain, asked = (processor_for(spatial_text_in_prompt=on) for on in (False, True))
    rows = [p.encode_input(ImageTextInput(IMAGE, "What is it?", regions=FOUND)) for p in (plain, asked)]
    prompts = [plain.tokenizer.decode(row["prompt"][row["prompt_mask"].astype(bool)]) for row in rows]
    assert prompts[0].startswith("What is it?") and prompts[1].startswith("star: [0.1")
    assert prompts[1].endswith("What is it?")
    np.testing.assert_array_equal(rows[0]["question"], rows[1]["question"])


@pytest.mark.parametrize(
    ("found", "changes", "sentence"),
    [
        (None, {}, "scenes/one has no kept regions, which this model reads; refine the images first"),
        (FOUND, {"regions_digest": "xyz"}, "were made by the refiner 'abc', but processor.regions_digest is 'xyz'"),
        (dataclasses.replace(FOUND, features_KD=np.zeros((2, 5))), {}, "have 5 features, but the model reads 6"),
    ],
)
def test_images_that_another_refiner_or_none_has_seen_are_refused_in_a_sentence(found, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        encode(processor_for(**changes), [found])


def test_training_batches_hold_regions_and_packed_text(monkeypatch):
    monkeypatch.setattr(OpenScenes, "load_regions", lambda self, record: FOUND)
    data = DataConfig((Scenes((4, 1, 1), 16),), PROCESSOR, num_threads=0).for_model(INFO)
    stage = Stage("s", 1, ("**",), (Mix("caption"),), 2)
    batch = next(pipeline.batches(data, stage, 0, 2))
    assert batch.region_BKD.shape == (2, 3, 6) and batch.region_mask_BK.all()
    assert batch.packed.ids_BL.shape == (2, 600) and (batch.packed.icg_label_BL > 0).any(1).all()
    with pytest.raises(UserError, match="has shots, which a model that reads regions lacks"):
        next(pipeline.batches(data, dataclasses.replace(stage, mixture=(Mix("caption", shots=1),)), 0, 2))
    with pytest.raises(UserError, match="do not move the regions that a refiner kept"):
        dataclasses.replace(data, hflip=True)
