# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 7B: CLIP ViT-L/14-336, an MLP projector of two layers, Vicuna-7B-v1.5 (arXiv 2310.03744).

Trains the projector on captions, then projector and language model on instructions. Needs the public weights, converted
once with `lionjax convert`; Vicuna's with a row for `<image>`, padded to 32064 rows, as in Hugging Face's LLaVA. Batch
sizes, learning rates, steps (558,000 captions, 665,000 instructions), lengths and files are those of the released code.
"""

import dataclasses
from typing import Any

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage, Weights
from lionjax.core.prompt_formats import SYSTEM_FORMATS
from lionjax.core.sharding import MeshConfig
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.visual_prefix import LLAVA_15_7B, VisualPrefixLM

TOWERS = ("vision", "language", "sam", "text")
SOURCES = (
    Conversations("data/llava/blip_laion_cc_sbu_558k.json", "data/llava/LLaVA-Pretrain", name="captions"),
    Conversations("data/llava/llava_v1_5_mix665k.json", "data", name="instructions"),
)
# Only the image and its caption, ended by a newline.
CAPTIONS = (Mix("conversation", 1.0, source="captions", template="plain"),)
INSTRUCTIONS = (Mix("conversation", 1.0, source="instructions"),)
ROW_TOKENS, PROMPT_TOKENS = 2048, 512  # of image, first question and all that follows; of the first question


def stage(name: str, steps: int, batch_size: int, rate: float, trainable, mixture, **fields) -> Stage:
    """A stage with 3% warm-up, cosine decay to 0 and no weight decay."""
    schedule = {"learning_rate": rate, "warmup_steps": round(0.03 * steps), "warmup_learning_rate": 0.0}
    return Stage(name, steps, trainable, mixture, batch_size, weight_decay=0.0, **schedule, **fields)


def row_lengths(image_tokens: int, row: int = ROW_TOKENS, prompt: int = PROMPT_TOKENS) -> dict[str, int]:
    """Lengths of ProcessorConfig for rows of `row` tokens with the image's, of which `prompt` are the prompt's."""
    return {"max_prompt_tokens": prompt, "max_target_tokens": row - image_tokens - prompt}


def chat_processor(language: str, system: str, **fields: Any) -> ProcessorConfig:
    """Image and question in the prompt format of `system`, or in a template, for the model in weights/`language`."""
    format_fields = SYSTEM_FORMATS[system].processor if system in SYSTEM_FORMATS else {"prompt_template": system}
    prompt = {"use_tags": False, "max_question_tokens": 1} | format_fields
    return ProcessorConfig(tokenizer=f"weights/{language}", **prompt | fields)


def full_size(model: Any, **fields: Any) -> Any:
    """`model` in bfloat16, its towers and language model rematerialized; `fields`: other fields to replace."""
    parts = {name: dataclasses.replace(part, remat="full") for name, part in vars(model).items() if name in TOWERS}
    return dataclasses.replace(model, dtype="bfloat16", **parts | fields)


def experiment(
    name: str, model: Any, processor: ProcessorConfig, stages: tuple[Stage, ...], weights: dict, sources, **fields
) -> Experiment:
    """An experiment on an accelerator's mesh; `weights`: {part: its folder in weights/}; `fields`: of Experiment.

    Published files have a few rows whose images are missing or that are too long: they are replaced and listed.
    """
    run = RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16")
    return Experiment(
        name=name,
        model=model,
        data=DataConfig(sources=sources, processor=processor, on_bad_record="replace"),
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
    system: VisualPrefixLM = LLAVA_15_7B,
    name: str = "llava15_7b",
    vicuna: str = "vicuna_7b",
    stages: tuple[Stage, ...] = STAGES,
    sources: tuple[Conversations, ...] = SOURCES,
) -> Experiment:
    """The experiment; the arguments select another size or the schedule and files of the first LLaVA."""
    side = system.vision.image_size
    image = {"image_size": side, "pad_to_square": True, "pad_color": "mean"}
    processor = chat_processor(vicuna, "vicuna_v1", **image, **row_lengths(system.vision.num_patches))
    weights = {"vision": f"clip_vit_l_{side}", "language": vicuna}
    answer = GenerationDefaults(max_new_tokens=256)
    return experiment(name, full_size(system), processor, stages, weights, sources, generation=answer)
