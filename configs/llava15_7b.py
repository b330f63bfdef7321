# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 7B: CLIP ViT-L/14-336, an MLP projector of two layers, Vicuna-7B-v1.5 (arXiv 2310.03744).

Trains the projector on captions, then projector and language model on instructions. Needs the public weights, converted
once with `lionjax convert`; Vicuna's with a row for `<image>`, padded to 32064 rows, as in Hugging Face's LLaVA. Batch
sizes, learning rates and steps (558,000 captions, 665,000 instructions) are those of the released code; its JSON files
are replaced by similar tasks.
"""

import dataclasses
from typing import Any

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage, Weights
from lionjax.core.prompt_formats import SYSTEM_FORMATS
from lionjax.core.sharding import MeshConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.visual_prefix import LLAVA_15_7B, VisualPrefixLM

COCO = (Coco("data/coco"),)
TOWERS = ("vision", "language", "sam")
CAPTIONS = (Mix("caption", 1.0, template="plain"),)  # only the image and its caption, ended by a newline
INSTRUCTIONS = (Mix("vqa", 3.0), Mix("caption", 1.0), Mix("existence", 0.5), Mix("rec", 0.5), Mix("reg", 0.5))


def stage(name: str, steps: int, batch_size: int, rate: float, trainable, mixture, **fields) -> Stage:
    """A stage with 3% warm-up, cosine decay to 0 and no weight decay."""
    schedule = {"learning_rate": rate, "warmup_steps": round(0.03 * steps), "warmup_learning_rate": 0.0}
    return Stage(name, steps, trainable, mixture, batch_size, weight_decay=0.0, **schedule, **fields)


def chat_processor(language: str, system: str, max_prompt_tokens: int = 256, **fields: Any) -> ProcessorConfig:
    """Image and question in the prompt format of `system`, or in a template, for the model in weights/`language`."""
    format_fields = SYSTEM_FORMATS[system].processor if system in SYSTEM_FORMATS else {"prompt_template": system}
    prompt = {"use_tags": False, "max_prompt_tokens": max_prompt_tokens, "max_question_tokens": 1} | format_fields
    return ProcessorConfig(tokenizer=f"weights/{language}", **prompt | fields)


def full_size(model: Any, **fields: Any) -> Any:
    """`model` in bfloat16, its tower and language model rematerialized; `fields`: other fields to replace."""
    parts = {name: dataclasses.replace(part, remat="full") for name, part in vars(model).items() if name in TOWERS}
    return dataclasses.replace(model, dtype="bfloat16", **parts | fields)


def experiment(
    name: str, model: Any, processor: ProcessorConfig, stages: tuple[Stage, ...], weights: dict, sources=COCO, **fields
) -> Experiment:
    """An experiment on an accelerator's mesh; `weights`: {part: its folder in weights/}; `fields`: of Experiment."""
    run = RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16")
    return Experiment(
        name=name,
        model=model,
        data=DataConfig(sources=sources, processor=processor),
        stages=stages,
        mesh=MeshConfig(data=1, fsdp=-1),
        weights=tuple(Weights(part, f"weights/{folder}/params.safetensors") for part, folder in weights.items()),
        **{"run": run} | fields,
    )


STAGES = (
    stage("align", 2_180, 256, 1e-3, ("projector",), CAPTIONS),
    stage("instruct", 5_195, 128, 2e-5, ("projector", "language"), INSTRUCTIONS),
)


def get_config(
    system: VisualPrefixLM = LLAVA_15_7B, name: str = "llava15_7b", vicuna: str = "vicuna_7b", stages=STAGES
) -> Experiment:
    """The experiment; the arguments select another size or the schedule of the first LLaVA."""
    side = system.vision.image_size
    processor = chat_processor(vicuna, "vicuna_v1", image_size=side, pad_to_square=True, pad_color="mean")
    weights = {"vision": f"clip_vit_l_{side}", "language": vicuna}
    answer = GenerationDefaults(max_new_tokens=256)
    return experiment(name, full_size(system), processor, stages, weights, generation=answer)
