# SPDX-License-Identifier: Apache-2.0
"""A tiny Grounding DINO with random weights and a tokenizer of a few words."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from lionjax.core import sharding
from lionjax.data import tokenizer
from lionjax.data.image_fit import ImageFit
from lionjax.inference.detector import Detector, DetectorImages
from lionjax.models.language.bert import BertConfig
from lionjax.models.vision.grounding_dino import GroundingDino, GroundingDinoConfig
from lionjax.models.vision.swin import SwinConfig

PIECES = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", ",", "|", "a", "cat", "dog", "##s", "red", "ball"),
    *("grass", "zoo", "abacus"),
)
TINY = GroundingDinoConfig(
    SwinConfig(None, 4, 8, (1, 1, 1, 1), (1, 1, 2, 2), 4, 1.0, output_stages=(1, 2, 3)),
    BertConfig(16, 1, 2, 16, vocab_size=24, max_positions=64),
    width=32,
    num_heads=4,
    mlp_dim=16,
    encoder_depth=1,
    decoder_depth=1,
    num_queries=12,
    num_points=2,
    delimiter_ids=(2, 3, 5, 6),
)
IMAGES = DetectorImages(ImageFit("shortest_edge", (48, 80), "bilinear"), pad_to_multiple=16)


@functools.cache
def params(seed: int = 0):
    inputs = np.zeros((1, 64, 64, 3), np.float32), np.ones((1, 64, 64), bool), *[np.ones((1, 4), np.int32)] * 2
    module, rng = GroundingDino(TINY), np.random.default_rng(seed)
    leaves = sharding.abstract_params(lambda key: module.init(key, *inputs)["params"], jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape).astype(np.float32), leaves)


def save_vocabulary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(PIECES))
    return folder


def save_images(folder: Path) -> None:
    size = {"shortest_edge": 48, "longest_edge": 80}
    content = {"image_processor_type": "GroundingDinoImageProcessor", "size": size, "do_convert_annotations": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def detector(folder: Path) -> Detector:
    """The detector; its vocabulary is written to `folder`."""
    return Detector(TINY, params(), tokenizer.load(str(save_vocabulary(folder))), IMAGES)


def picture(width, height, seed=0):
    """A random RGB image."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def canned(found, prob_QL, box_Q4, monkeypatch):
    """The detector with given probabilities and boxes for every image."""
    features_QD = np.arange(len(box_Q4) * 36, dtype=np.float32).reshape(-1, 36)
    rows = (np.asarray(prob_QL, np.float32), np.asarray(box_Q4, np.float32), features_QD)
    monkeypatch.setattr(type(found), "_run", lambda self, images, texts, shape: [rows] * len(images))
    return found
