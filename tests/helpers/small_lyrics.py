# SPDX-License-Identifier: Apache-2.0
"""A tiny second stage of Lyrics with its own tagger and detector, as a run's folder leaves it, without training."""

import dataclasses

import small_detector
import small_lion
import small_ram

from lionjax.core.experiment import Experiment, RunConfig, Stage
from lionjax.data import tokenizer
from lionjax.data.config import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.inference import tagger
from lionjax.models.connectors.mqformer import MQFormerConfig
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

WORDS = tokenizer.load("tiny_wordpiece")
DETECTOR = dataclasses.replace(
    small_detector.TINY,
    text=dataclasses.replace(small_detector.TINY.text, vocab_size=WORDS.vocab_size),
    delimiter_ids=tuple(WORDS.token_to_id(piece) for piece in ("[CLS]", "[SEP]", ".", "?")),
)
SYSTEM = VisualPrefixLM(
    vision=ViTConfig(image_size=28, patch_size=14, width=16, depth=1, num_heads=2, mlp_dim=24),
    language=DecoderConfig(1024, 32, 1, 2, 2, 16, 48),
    qformer=MQFormerConfig(
        width=16,
        depth=2,
        num_heads=2,
        mlp_dim=24,
        num_query_tokens=4,
        num_grounding_queries=2,
        vision_width=16,
        region_width=DETECTOR.feature_width,
        vocab_size=WORDS.vocab_size,
        max_positions=96,
        dropout=0.0,
    ),
    feature_layer=-1,
    keep_class_token=True,
    projector_depth=1,
    image_token_id=None,
    tagger=small_ram.TINY,
    detector=DETECTOR,
)
PROCESSOR = ProcessorConfig(
    image_size=28,
    question_tokenizer="tiny_wordpiece",
    max_prompt_tokens=32,
    max_question_tokens=32,
    max_target_tokens=8,
    max_regions=12,
    use_tags=False,
)


def experiment(model: VisualPrefixLM = SYSTEM, **processor) -> Experiment:
    """One stage of one step over a few scenes."""
    data = DataConfig((Scenes((4, 2, 2), image_size=56),), dataclasses.replace(PROCESSOR, **processor))
    stage = Stage("only", 1, ("projector.*", "qformer.*"), (("vqa", 1.0),), batch_size=4)
    return Experiment(
        "lyrics", model, data=data.for_model(model.info), stages=(stage,), run=RunConfig(frozen_dtype="float32")
    )


def finished(workdir, what: Experiment):
    """A run's folder with random parameters and the tagger's list; returns the parameters."""
    params = small_lion.finished(workdir, what)
    (workdir / "origin").mkdir(exist_ok=True)
    (workdir / "origin" / tagger.TAG_LIST_FILE).write_text("\n".join(small_ram.WORDS))
    (workdir / "origin" / tagger.THRESHOLD_FILE).write_text("0.3\n" * len(small_ram.WORDS))
    return params
