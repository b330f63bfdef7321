# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 7B: CLIP ViT-L/14-336, an MLP projector of two layers, Vicuna-7B-v1.5 (arXiv 2310.03744).

Trains the projector on captions, then projector and language model on instructions. Needs the public weights, converted
once with `lionjax convert`; Vicuna's with a row for `<image>`, padded to 32064 rows, as in Hugging Face's LLaVA. Batch
sizes, learning rates and steps (558,000 captions, 665,000 instructions) are those of the released code; its JSON files
are replaced by similar tasks.
"""

import dataclasses

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage, Weights
from lionjax.core.sharding import MeshConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.visual_prefix import LLAVA_15_7B, VisualPrefixLM

CAPTIONS = (Mix("caption", 1.0, template="plain"),)  # only the image and its caption, ended by a newline
INSTRUCTIONS = (Mix("vqa", 3.0), Mix("caption", 1.0), Mix("existence", 0.5), Mix("rec", 0.5), Mix("reg", 0.5))
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {image} {question} ASSISTANT:"
)


def stage(name: str, steps: int, batch_size: int, rate: float, trainable, mixture) -> Stage:
    """A stage with 3% warm-up, cosine decay to 0 and no weight decay."""
    return Stage(
        name,
        steps,
        trainable,
        mixture,
        batch_size,
        learning_rate=rate,
        warmup_steps=round(0.03 * steps),
        warmup_learning_rate=0.0,
        weight_decay=0.0,
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
    return Experiment(
        name=name,
        model=dataclasses.replace(
            system,
            vision=dataclasses.replace(system.vision, remat="full"),
            language=dataclasses.replace(system.language, remat="full"),
            dtype="bfloat16",
        ),
        data=DataConfig(
            sources=(Coco("data/coco"),),
            processor=ProcessorConfig(
                image_size=side,
                tokenizer=f"weights/{vicuna}",
                max_question_tokens=1,
                max_prompt_tokens=256,
                use_tags=False,
                pad_to_square=True,
                pad_color="mean",
                prompt_template=VICUNA,
                followup_template="USER: {question} ASSISTANT:",
                caption_end="\n",
            ),
        ),
        stages=stages,
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=-1),
        weights=(
            Weights("vision", f"weights/clip_vit_l_{side}/params.safetensors"),
            Weights("language", f"weights/{vicuna}/params.safetensors"),
        ),
        generation=GenerationDefaults(max_new_tokens=256),
    )
