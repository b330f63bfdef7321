# SPDX-License-Identifier: Apache-2.0
"""Detection reads images and writes boxes and phrases as transformers' processor of Grounding DINO."""

import dataclasses
import types

import numpy as np
import pytest
import small_detector
from small_detector import canned, picture

from lionjax.data import region_phrases
from lionjax.inference.detector import DetectorImages

PROMPT = "a cat. Dogs? red ball"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return small_detector.detector(tmp_path_factory.mktemp("detector"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 375), (333, 500), (90, 1000), (801, 800), (800, 800)])
def test_images_are_resized_and_normalized_as_transformers_does(found, size):
    processing = pytest.importorskip("transformers.models.grounding_dino.image_processing_pil_grounding_dino")
    image, full = picture(*size), dataclasses.replace(found, images=DetectorImages())
    theirs = processing.GroundingDinoImageProcessorPil()(images=image, return_tensors="np")["pixel_values"][0]
    pixels = full.preprocess(image)
    mean, std = (np.float32(x) for x in (full.images.mean, full.images.std))
    mine = (pixels.astype(np.float32) / 255 - mean) / std
    assert mine.shape[:2] == theirs.shape[1:] == full.resized_shape(image)
    np.testing.assert_allclose(mine.transpose(2, 0, 1), theirs, atol=1e-5)


@pytest.mark.slow
def test_boxes_scores_and_phrases_are_those_of_transformers(found, monkeypatch):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    processing = pytest.importorskip("transformers.models.grounding_dino.processing_grounding_dino")
    rng = np.random.default_rng()
    ids = region_phrases.encode_caption(found.tokenizer, region_phrases.detector_caption(PROMPT))[0]
    logits_QL = rng.normal(-1.5, 1.5, (20, 256)).astype(np.float32)
    logits_QL[:, len(ids) :] = -np.inf
    box_Q4, sizes = rng.random((20, 4)).astype(np.float32), [(64, 48), (50, 70)]
    output = types.SimpleNamespace(logits=torch.tensor(np.stack([logits_QL] * 2)), pred_boxes=torch.tensor(box_Q4))
    output.pred_boxes = output.pred_boxes.expand(2, -1, -1)
    words = {piece: k for k, piece in enumerate(small_detector.PIECES)}
    stub = types.SimpleNamespace(batch_decode=transformers.BertTokenizer(words).batch_decode)
    post_process = processing.GroundingDinoProcessor.post_process_grounded_object_detection
    target_sizes = [(height, width) for width, height in sizes]
    theirs = post_process(stub, output, torch.tensor([ids] * 2), 0.7, 0.35, target_sizes)

    prob_QL = (1 / (1 + np.exp(-logits_QL)))[:, : len(ids)]
    images = [picture(*size) for size in sizes]
    mine = canned(found, prob_QL, box_Q4, monkeypatch).detect(images, PROMPT, 0.7, 0.35)
    for result, expected in zip(mine, theirs):
        order = np.argsort(-expected["scores"].numpy(), kind="stable")
        assert 0 < len(order) < 20
        np.testing.assert_allclose(result.scores, expected["scores"].numpy()[order], rtol=1e-6)
        np.testing.assert_allclose(result.pixel_boxes_K4, expected["boxes"].numpy()[order], rtol=1e-4, atol=1e-4)
        phrases = [expected["text_labels"][k].replace(".", "").strip() for k in order]
        assert [" ".join(phrase.split()) for phrase in result.phrases] == [" ".join(p.split()) for p in phrases]
