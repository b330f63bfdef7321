# SPDX-License-Identifier: Apache-2.0
"""LION-4B: EVA ViT-g and FlanT5-XL, both frozen, in three stages of instruction tuning (arXiv 2311.11860).

Needs the public weights, converted once: `lionjax convert eva_vit_g.pth weights/eva_vit_g --to jax`, likewise FlanT5.
The last stage is that of the published training code; see `published_last_stage`. Learning rate, batch size and steps
of the first two are InstructBLIP's: neither the paper nor the code gives LION's. Their image level has the data of
instructblip_flant5xl.py, their region level Visual Genome's region descriptions in Shikra's file. Tags are those of the
sources: `lionjax data build --tagger` adds RAM's.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage, Weights
from lionjax.core.sharding import MeshConfig
from lionjax.data.datasets.lion import LionRecords
from lionjax.data.datasets.shikra import ShikraJsonl
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
from lionjax.models.language.t5 import FLAN_T5_XL, T5Config
from lionjax.models.vision.vit import EVA_VIT_G
from lionjax.models.vlm.lion import Lion
from lionjax.nn.adapters import AdapterConfig

QFORMER = ("qformer", "qformer_norm", "qformer_projector")
AGGREGATOR = ("aggregator", "aggregator_norm", "aggregator_projector")
REGION_ADAPTER, IMAGE_ADAPTER = ".*/adapter_0", ".*/adapter_1"
REGION_LEVEL = (Mix("rec", 1.0, source="genome"), Mix("reg", 1.0, source="genome"))
GENOME = ShikraJsonl("data/shikra/GC_genome196_train.jsonl", "data/genome/VG_100K", name="genome")
# The code's lists of records are on the Hugging Face hub (daybreaksly/LION-data-train); these file names are ours.
RECORDS = (
    LionRecords("data/lion/image_level.json", "data/lion/images", name="lion_image"),
    LionRecords("data/lion/region_level.json", "data/lion/images", name="lion_region"),
)
BOTH_LEVELS = (
    Mix("image_level", source="lion_image", group="image_level"),
    Mix("region_level", source="lion_region", group="region_level"),
)


def system(language: T5Config) -> Lion:
    """LION with a FlanT5: erf GELU and two routed adapters parallel to every MLP."""
    language = dataclasses.replace(language, activation="gelu", adapters=AdapterConfig(64), remat="dots")
    return Lion(
        dataclasses.replace(EVA_VIT_G, remat="full"), QFormerConfig(), AggregatorConfig(), language, dtype="bfloat16"
    )


def stages(
    steps: tuple[int, int, int],
    image_level: tuple[Mix, ...],
    region_level: tuple[Mix, ...],
    shared: dict,
    image_rate: float | None = None,
    boxes: tuple[str, ...] = (),
    region_fields: dict | None = None,
) -> tuple[Stage, ...]:
    """LION's three stages: image level, region level, then both with the routers.

    `shared`: fields of all stages. `image_rate`: learning rate of the first. `boxes`: parameters that the other two
    train as well, with `region_fields`.
    """
    first = shared if image_rate is None else shared | {"learning_rate": image_rate}
    others = shared | (region_fields or {})
    qformer = {"model_overrides": (("visual_input", "QFORMER"),)}
    aggregator = {"model_overrides": (("visual_input", "AGGREGATOR"),)}
    all_adapters = (*QFORMER, *AGGREGATOR, ".*/adapters", "soft_prompt", *boxes)
    region_parts = (*AGGREGATOR, REGION_ADAPTER, "soft_prompt", *boxes)
    return (
        Stage("image_level", steps[0], (*QFORMER, IMAGE_ADAPTER, "soft_prompt"), image_level, **qformer, **first),
        Stage("region_level", steps[1], region_parts, region_level, **aggregator, **others),
        Stage("both_levels", steps[2], all_adapters, image_level + region_level, **others),
    )


def published_last_stage(experiment: Experiment) -> Experiment:
    """The experiment with the last stage of LION's published training code (commit 699a4cc of JiuTian-LION).

    10 epochs of 6,000 batches, 64 examples each, image level and region level in turns; AdamW without warm-up and
    clipping, its rate from 1e-5 to 0 on a cosine that moves once an epoch. Images are cropped and flipped; the code
    leaves boxes where they are (`data.augmentation="image_only"`), here they move along. The tags of the records are
    RAM's, so that no tagger is simulated.
    """
    schedule = {"learning_rate": 1e-5, "warmup_steps": 0, "steps_per_epoch": 6_000, "weight_decay": 0.05}
    fields = {"mixture": BOTH_LEVELS, "steps": 60_000, "batch_size": 64, "clip_norm": 0.0}
    last = dataclasses.replace(experiment.stages[-1], **schedule, **fields)
    augmented = {"crop_scale": (0.5, 1.0), "hflip": True, "tag_noise": 0.0}
    data = dataclasses.replace(experiment.data, sources=(*experiment.data.sources, *RECORDS), **augmented)
    return dataclasses.replace(experiment, data=data, stages=(*experiment.stages[:-1], last))


def get_config(language: T5Config = FLAN_T5_XL, name: str = "flan_t5_xl", batch_size: int = 192) -> Experiment:
    """The experiment; the arguments select another FlanT5."""
    instructblip = runpy.run_path(str(Path(__file__).with_name("instructblip_flant5xl.py")))
    shared = {"batch_size": batch_size, "learning_rate": 1e-5, "warmup_steps": 1000, "weight_decay": 0.05}
    processor = ProcessorConfig(tokenizer=f"weights/{name}", question_tokenizer="weights/bert_base_uncased")
    experiment = Experiment(
        name=f"lion_{name.replace('_', '')}",
        model=system(language),
        data=DataConfig(sources=(*instructblip["SOURCES"], GENOME), processor=processor, on_bad_record="replace"),
        stages=stages((60_000,) * 3, instructblip["INSTRUCTIONS"], REGION_LEVEL, shared),
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=-1),
        weights=(
            Weights("vision", "weights/eva_vit_g/params.safetensors"),
            Weights("language", f"weights/{name}/params.safetensors"),
        ),
        generation=GenerationDefaults(num_beams=5, repetition_penalty=1.5),  # as in the released code
    )
    return published_last_stage(experiment)
