# SPDX-License-Identifier: Apache-2.0
"""Lyrics' first stage on synthetic scenes (arXiv 2312.05278): MQ-Former learns from images, regions and boxes as text.

The scenes are those that a refiner with tiny_grounding_dino.py's detector has refined (see docs/lyrics.md).
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix
from lionjax.data.box_text import PackingConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.models.connectors.mqformer import MQFormerConfig
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.lyrics_stage1 import LyricsStage1

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
detector = runpy.run_path(str(Path(__file__).with_name("tiny_grounding_dino.py")))

SCENES = Scenes(
    sizes=(3000, 300, 400),
    image_size=TINY_VIT.image_size,
    folder="runs/lyrics/data/scenes/pixels128-seed0-3000-300-400/1.0.0",
)
VOCABULARY = detector["VOCABULARY"] + 1  # with [DEC]
MQ_FORMER = MQFormerConfig(
    64,
    4,
    4,
    128,
    num_query_tokens=32,
    vision_width=TINY_VIT.width,
    vocab_size=VOCABULARY,
    max_positions=128,
    dropout=0.0,
    num_grounding_queries=16,
    region_width=detector["DETECTOR"].feature_width,
)
PROCESSOR = {
    "question_tokenizer": "tiny_wordpiece",
    "max_regions": detector["DETECTOR"].num_queries,
    "packing": PackingConfig(max_box_tokens=88, max_caption_tokens=38, length=128, caption_end=True),
}


def on_refined_scenes(experiment: Experiment) -> Experiment:
    """The experiment with the refined scenes as its data."""
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, sources=(SCENES,)))


def get_config() -> Experiment:
    """The experiment."""
    model = LyricsStage1(
        TINY_VIT, MQ_FORMER, embed_dim=64, cls_token_id=2, decoder_start_token_id=detector["VOCABULARY"]
    )
    stages = (llava["stage"]("represent", 600, ("(?!vision/).*",), (Mix("caption"),), 1.5e-3, optimizer="muon"),)
    made = llava["experiment"]("tiny_lyrics_first", model, stages, llava["BACKBONES"][:1], **PROCESSOR)
    return on_refined_scenes(made)
