# SPDX-License-Identifier: Apache-2.0
"""LLaVA (v1: a linear projector) on synthetic scenes: trains in minutes on a laptop, with the shipped tiny backbones.

Trains the projector, then projector and language model. The other tiny configs of the family differ in the connector
and in the trained parts.
"""

from lionjax.core.experiment import Experiment, Mix, RunConfig, Stage
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.models.language.t5 import TINY_T5
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

WORDS = (Mix("vqa", 5.0), Mix("existence", 2.0), Mix("caption", 1.5))
PLACES = (Mix("rec", 6.0),)
BACKBONES = (("vision", "shipped:tiny_vit.safetensors"), ("language", "shipped:tiny_t5.safetensors"))


def stage(
    name: str,
    steps: int,
    trainable: tuple[str, ...],
    mixture=WORDS + PLACES,
    rate: float = 1e-3,
    batch_size: int = 16,
    optimizer: str = "adamw",
) -> Stage:
    """A stage with defaults for these sizes; connectors with new attention layers need Muon."""
    return Stage(
        name,
        steps,
        trainable,
        mixture,
        batch_size,
        learning_rate=rate,
        warmup_steps=20,
        weight_decay=0.01,
        optimizer=optimizer,
    )


def experiment(name: str, system: object, stages: tuple[Stage, ...], weights=BACKBONES, **processor) -> Experiment:
    """An experiment on synthetic scenes; `processor`: fields of ProcessorConfig that differ from the defaults here."""
    fields = {
        "max_prompt_tokens": 24,
        "max_question_tokens": 24,
        "max_target_tokens": 40,
        "use_tags": False,
    } | processor
    trains_tower = any("vision" in part.trainable for part in stages)
    return Experiment(
        name=name,
        model=system,
        data=DataConfig(
            sources=(Scenes(sizes=(3000, 300, 400), image_size=TINY_VIT.image_size),),
            processor=ProcessorConfig(image_size=TINY_VIT.image_size, **fields),
        ),
        stages=stages,
        run=RunConfig(
            log_every=20, save_every=200, max_to_keep=2, frozen_dtype="float32", cache_features=not trains_tower
        ),
        weights=weights,
    )


SYSTEM = VisualPrefixLM(
    TINY_VIT, TINY_T5, feature_layer=-1, projector_depth=1, image_token_id=None, torch_names="original"
)


def get_config() -> Experiment:
    """The experiment."""
    stages = (
        stage("align", 100, ("projector",), (Mix("caption", 1.0, template="plain"),), 3e-3),
        stage("instruct", 400, ("projector", "language"), rate=7e-4),
    )
    return experiment("tiny_llava", SYSTEM, stages)
