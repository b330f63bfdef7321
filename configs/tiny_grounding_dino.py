# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO at a tiny size, trained from scratch on synthetic scenes: finds named shapes, also unseen pairs.

Captions are pairs of color and shape, single words, and tag lists as the refiner of Lyrics writes them, each with names
that are not in the image.
"""

from lionjax.core.experiment import Experiment, Mix, RunConfig, Stage
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.models.language.bert import BertConfig
from lionjax.models.vision.grounding_dino import GroundingDinoConfig
from lionjax.models.vision.grounding_dino_loss import DetectionLossConfig
from lionjax.models.vision.swin import SwinConfig
from lionjax.models.vlm.detection import PhraseDetection

IMAGE_SIZE = 96
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VOCABULARY, DELIMITERS = 526, (2, 3, 18, 35)  # of tiny_wordpiece: [CLS], [SEP], "." and "?"

DETECTOR = GroundingDinoConfig(
    SwinConfig(None, 4, 24, (1, 2, 1), (2, 2, 4), 4, 2.0, drop_path_rate=0.0, output_stages=(1, 2)),
    BertConfig(64, 2, 2, 128, dropout=0.0, vocab_size=VOCABULARY, max_positions=64, pooler=False),
    width=64,
    num_heads=4,
    mlp_dim=256,
    encoder_depth=2,
    decoder_depth=2,
    num_queries=24,
    num_levels=3,
    num_points=2,
    max_text_len=48,
    delimiter_ids=DELIMITERS,
    fusion_drop_path=0.0,
)


def get_config() -> Experiment:
    """The experiment."""
    processor = ProcessorConfig(
        image_size=IMAGE_SIZE,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        question_tokenizer="tiny_wordpiece",
        max_question_tokens=48,
        max_prompt_tokens=128,
        max_target_tokens=1,
        use_tags=False,
        max_boxes=10,
    )
    rates = {"learning_rate": 2e-3, "warmup_steps": 50, "weight_decay": 1e-4}
    stage = Stage("detect", 1600, (".*",), (Mix("detect"),), 16, optimizer="muon", **rates)
    return Experiment(
        name="tiny_grounding_dino",
        model=PhraseDetection(DETECTOR, DetectionLossConfig(weights=(2.0, 5.0, 2.0)), image_size=IMAGE_SIZE),
        data=DataConfig(sources=(Scenes(sizes=(4000, 300, 400), image_size=128),), processor=processor),
        stages=(stage,),
        run=RunConfig(log_every=20, save_every=200, max_to_keep=2, frozen_dtype="float32"),
    )
