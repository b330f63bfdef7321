# SPDX-License-Identifier: Apache-2.0
"""Lyrics' first stage on synthetic scenes (arXiv 2312.05278): MQ-Former learns from images, regions and boxes as text.

The scenes are those that a refiner with tiny_grounding_dino.py's detector has refined (see docs/lyrics.md).
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix, Stage
from lionjax.data.box_text import PackingConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.models.connectors.mqformer import MQFormerConfig
from lionjax.models.language.t5 import TINY_T5
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.lyrics_stage1 import LyricsStage1

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
detector = runpy.run_path(str(Path(__file__).with_name("tiny_grounding_dino.py")))

SCENES = Scenes(
    sizes=(1024, 64, 256),
    image_size=TINY_VIT.image_size,
    folder="runs/lyrics/data/scenes/pixels128-seed0-1024-64-256/1.0.0",
)
# As the original starts from BERT, this one starts from the embeddings of the tiny T5, in whose space the tiny tower
# describes patches. With new embeddings the contrastive loss stays at chance for 600 steps.
WORDS = ("qformer/words", "shipped:tiny_t5.safetensors#language/embedding")
# Visual queries start as words for shapes and colors, and attention by copying what resembles its query: a query then
# holds the patches of the objects with its shape or color, as vectors that the T5 can read.
QUERIES = ("qformer/queries", "shipped:tiny_queries.safetensors")
COPYING = ("qformer/queries", "qformer/.*/cross_attention")
CLS, DECODER_START = 16, 18  # of the tokenizer "tiny", see box_text.PackingTokens
MQ_FORMER = MQFormerConfig(
    128,
    2,
    4,
    256,
    num_query_tokens=24,
    cross_attention_frequency=1,
    vision_width=TINY_VIT.width,
    vocab_size=TINY_T5.vocab_size,
    max_positions=64,
    dropout=0.0,
    num_grounding_queries=8,
    copy_sharpness=20.0,
    region_width=detector["DETECTOR"].feature_width,
)
# A box takes 25 tokens: one fits before the caption, that of the strongest region. Its tag is always asked for, half of
# the time without the caption, which names it: at these few steps, tags are otherwise copied or guessed.
PACKING = PackingConfig(
    26, 37, 64, mask_probability=0.15, caption_end=True, tag_mask_probability=1.0, hide_caption_probability=0.5
)
PROCESSOR = {"question_tokenizer": "tiny", "max_regions": detector["DETECTOR"].num_queries, "packing": PACKING}


def on_refined_scenes(experiment: Experiment) -> Experiment:
    """The experiment with the refined scenes as its data."""
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, sources=(SCENES,)))


def slow_copying(stage: Stage, *more: str) -> Stage:
    """The stage with a tenth of the learning rate for what copies from the start, and for the parameters in `more`."""
    return dataclasses.replace(stage, lr_multipliers=tuple((path, 0.1) for path in (*COPYING, *more)))


def get_config() -> Experiment:
    """The experiment."""
    model = LyricsStage1(TINY_VIT, MQ_FORMER, embed_dim=64, cls_token_id=CLS, decoder_start_token_id=DECODER_START)
    stage = llava["stage"]("represent", 480, ("(?!vision/).*",), (Mix("caption"),), 2e-3, optimizer="muon")
    stages = (slow_copying(stage, "qformer/.*/mlp"),)
    weights = (llava["BACKBONES"][0], WORDS, QUERIES)
    made = llava["experiment"]("tiny_lyrics_first", model, stages, weights, **PROCESSOR)
    return on_refined_scenes(made)
