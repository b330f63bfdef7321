# SPDX-License-Identifier: Apache-2.0
"""A very small LION in two stages, with the names and import paths of 0.1.

Paths are relative to the folder that holds this data; `lionjax train` is called there.
"""

from lionjax.adapters import AdapterConfig
from lionjax.bridges.qformer import AggregatorConfig, QFormerConfig
from lionjax.config import AnswerConfig, Experiment, RunConfig, Stage
from lionjax.data.pipeline import DataConfig
from lionjax.data.processors import ProcessorConfig
from lionjax.data.sources import Scenes
from lionjax.language.t5 import T5Config
from lionjax.sharding import MeshConfig
from lionjax.systems.lion import Lion
from lionjax.vision.vit import ViTConfig

WORDS = 96
QFORMER = ("qformer", "qformer_norm", "qformer_projector", "soft_prompt")
AGGREGATOR = ("aggregator", "aggregator_norm", "aggregator_projector", ".*/adapter_0")

SYSTEM = Lion(
    vision=ViTConfig(image=16, patch=8, width=8, depth=2, heads=2, hidden=12),
    qformer=QFormerConfig(
        width=8,
        layers=2,
        heads=2,
        hidden=12,
        queries=2,
        vision_width=8,
        vocab=WORDS,
        positions=40,
        dropout=0.0,
    ),
    aggregator=AggregatorConfig(1, (0,), width=8, heads=2, hidden=12, dropout=0.0, projector=12),
    language=T5Config(
        vocab=WORDS,
        width=8,
        head=4,
        heads=2,
        hidden=12,
        encoder_layers=2,
        decoder_layers=2,
        dropout=0.1,
        activation="gelu",
        adapters=AdapterConfig(4),
    ),
    soft_prompt_token=3,
)


def get_config() -> Experiment:
    """The whole run: two updates of the first stage, four of the second."""
    shared = {"batch_size": 4, "accumulate": 2, "learning_rate": 1e-2, "warmup_steps": 1}
    return Experiment(
        name="small_lion",
        system=SYSTEM,
        data=DataConfig(
            sources=(Scenes(sizes=(12, 2, 4), pixels=32),),
            processor=ProcessorConfig(
                image_size=16,
                tokenizer="tokenizer",
                question_tokenizer="tokenizer",
                prompt_length=48,
                question_length=32,
                target_length=12,
            ),
            tag_drop=0.5,
        ),
        stages=(
            Stage(
                "image_level",
                2,
                QFORMER,
                (("vqa", 1.0), ("caption", 1.0)),
                system=(("visual_input", "QFORMER"),),
                **shared,
            ),
            Stage(
                "region_level",
                4,
                AGGREGATOR,
                (("rec", 2.0), ("vqa", 1.0)),
                system=(("visual_input", "AGGREGATOR"),),
                learning_rate_scale=(("aggregator", 0.5),),
                **shared,
            ),
        ),
        run=RunConfig(
            log_every=1,
            save_every=1,
            keep=1,
            frozen_dtype="bfloat16",
            evaluate_limit=0,
        ),
        mesh=MeshConfig(data=1),
        answer=AnswerConfig(repetition_penalty=1.5),
    )
