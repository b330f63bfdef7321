# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat-7B: CLIP ViT-L/14-336, Vicuna-7B-v1.5 and SAM ViT-H in the paper's three stages (arXiv 2311.04498).

Text and boxes, then instructions, then masks with everything frozen but the mask prompts and SAM's decoder. Needs the
public weights, converted once with `lionjax convert`; Vicuna's with the five added tokens. Steps, learning rate and
batch size are those of the released code. The data are Shikra's annotation files, as JSON Lines that name their task.
Mixture weights: in the first stage about proportional to the files' sizes, as the released code concatenates them; in
the second, half instructions (`conversation`: Shikra-RD and LLaVA) and half five equal streams.
"""

import dataclasses

from lionjax.core.experiment import Experiment, Mix, RunConfig, Stage, Weights
from lionjax.core.sharding import MeshConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.refcoco import RefCoco
from lionjax.data.datasets.vqa import Vqa
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.language.decoder import VICUNA_7B
from lionjax.models.vision.sam_encoder import SAM_VIT_H
from lionjax.models.vision.vit import CLIP_VIT_L
from lionjax.models.vlm.nextchat import NextChat

WORDS_AND_BOXES = ("language", "projector", "locations")
MASKS = ("mask_prompts", "sam/decoder")
PRETRAIN = (
    Mix("rec", 3.0, source="refcoco"),
    Mix("reg", 3.0, source="refcoco"),
    Mix("vqa", 4.0, source="vqa"),
    Mix("caption", 4.0, source="coco"),
    Mix("rec", 3.5, source="genome"),
    Mix("reg", 2.0, source="genome"),
    Mix("grounded", 1.5, source="flickr"),
    Mix("vqa", 2.0, source="vcr"),
    Mix("rec", 2.0, source="visual7w"),
)
INSTRUCT = (
    Mix("conversation", 5.0, source="instructions"),
    Mix("grounded", 1.0, source="flickr"),
    Mix("rec", 1.0, source="refcoco"),
    Mix("vqa", 1.0, source="vqa"),
    Mix("vqa", 1.0, source="vcr"),
    Mix("caption", 0.7, source="coco"),
    Mix("reg", 0.3, source="genome"),
)
SOURCES = (
    Coco("data/coco"),
    RefCoco("data/refcoco/train.json", "data/coco/images"),
    Vqa("data/vqa/questions.json", "data/vqa/annotations.json", "data/coco/images", "{:012d}.jpg"),
    *(
        JsonLines(f"data/{name}/train.jsonl", f"data/{images}/images", name=name)
        for name, images in (
            ("genome", "genome"),
            ("flickr", "flickr"),
            ("vcr", "vcr"),
            ("visual7w", "coco"),
            ("instructions", "coco"),
        )
    ),
)
BATCH = 64
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {image} {question} ASSISTANT:"
)


def stage(name: str, steps: int, trainable: tuple[str, ...], mixture: tuple, **fields) -> Stage:
    """A stage at 2e-5 with 3% warm-up and no weight decay."""
    return Stage(
        name,
        steps,
        trainable,
        mixture,
        BATCH,
        learning_rate=2e-5,
        warmup_steps=round(0.03 * steps),
        warmup_learning_rate=0.0,
        weight_decay=0.0,
        **fields,
    )


def get_config() -> Experiment:
    """The experiment."""
    return Experiment(
        name="nextchat_7b",
        model=NextChat(
            vision=dataclasses.replace(CLIP_VIT_L, remat="full"),
            language=dataclasses.replace(VICUNA_7B, vocab_size=32005, remat="full"),
            sam=dataclasses.replace(SAM_VIT_H, remat="full"),
            dtype="bfloat16",
        ),
        data=DataConfig(
            sources=SOURCES,
            processor=ProcessorConfig(
                image_size=336,
                tokenizer="weights/vicuna_7b",
                max_question_tokens=1,
                max_prompt_tokens=768,
                use_tags=False,
                pad_to_square=True,
                prompt_template=VICUNA,
                num_image_tokens=CLIP_VIT_L.num_patches,
                box_format="embeddings",
                max_boxes=8,
                sam_image_size=SAM_VIT_H.image_size,
            ),
        ),
        stages=(
            stage("pretrain", 65_000, WORDS_AND_BOXES, PRETRAIN),
            stage("instruct", 4_950, WORDS_AND_BOXES, INSTRUCT),
            stage("masks", 5_950, MASKS, (Mix("res", 1.0, source="coco"),), model_overrides=(("objective", "masks"),)),
        ),
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=-1),
        weights=(
            Weights("vision", "weights/clip_vit_l_336/params.safetensors"),
            Weights("language", "weights/vicuna_7b/params.safetensors"),
            Weights("sam", "weights/sam_vit_h/params.safetensors"),
        ),
    )
