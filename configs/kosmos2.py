# SPDX-License-Identifier: Apache-2.0
"""Kosmos-2: CLIP ViT-L/14, 64 queries, a sub-LN decoder of 24 layers, boxes as location tokens (arXiv 2306.14824).

Trains the language model and the connector; the ViT is frozen. Needs the public weights, converted once with `lionjax
convert`. Learning rate, warm-up and steps are the paper's, and 2048 rows are about its 419,000 tokens a batch. GrIT is
published as addresses with boxes: read as JSON Lines, with the tasks `grounded`, `rec` and `reg`. Captions of the web
are read as a list of image and caption; the paper's pages and texts of the web are left out.
"""

import dataclasses

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage, Weights
from lionjax.core.prompt_formats import SYSTEM_FORMATS
from lionjax.core.sharding import MeshConfig
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.karpathy import KarpathyCaptions
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.visual_prefix import KOSMOS2

BETWEEN = ("language", "latents", "vision_norm")


def get_config() -> Experiment:
    """The experiment."""
    model = dataclasses.replace(
        KOSMOS2,
        vision=dataclasses.replace(KOSMOS2.vision, remat="full"),
        language=dataclasses.replace(KOSMOS2.language, remat="full"),
        dtype="bfloat16",
    )
    mixture = (
        Mix("caption", 1.0, source="web_captions"),
        *(Mix(task, 1.0, source="grit") for task in ("grounded", "rec", "reg")),
    )
    sources = (
        KarpathyCaptions("data/laion/captions.json", "data/laion/images", name="web_captions"),
        JsonLines("data/grit/train.jsonl", "data/grit/images", name="grit"),
    )
    return Experiment(
        name="kosmos2",
        model=model,
        data=DataConfig(
            sources=sources,
            on_bad_record="replace",
            processor=ProcessorConfig(
                tokenizer="weights/kosmos2",
                max_question_tokens=1,
                box_format="bins",
                **SYSTEM_FORMATS["kosmos2"].processor
                | {"prompt_template": "<image>{image}</image> <grounding> {question}"},  # answers have boxes
            ),
        ),
        stages=(
            Stage(
                "ground",
                60_000,
                BETWEEN,
                mixture,
                2048,
                learning_rate=2e-4,
                warmup_steps=375,
                weight_decay=0.01,
                warmup_learning_rate=0.0,
                betas=(0.9, 0.98),
            ),
        ),
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16", cache_features=True),
        mesh=MeshConfig(data=1, fsdp=-1),
        weights=(Weights("vision", "weights/kosmos2/params.safetensors"),),
        generation=GenerationDefaults(max_new_tokens=64),
    )
