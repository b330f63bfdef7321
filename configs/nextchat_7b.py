# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat-7B: CLIP ViT-L/14-336, Vicuna-7B-v1.5 and SAM ViT-H in the paper's three stages (arXiv 2311.04498).

Text and boxes, then instructions, then masks with everything frozen but the mask prompts and SAM's decoder. Needs the
public weights, converted once with `lionjax convert`; Vicuna's with the five added tokens. Steps, learning rate and
batch size are those of the released code. The data are Shikra's annotation files, as JSON Lines that name their task.
Mixture weights: in the first stage about proportional to the files' sizes, as the released code concatenates them; in
the second, half instructions (`conversation`: Shikra-RD and LLaVA) and half five equal streams.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix, Stage
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.refcoco import RefCoco
from lionjax.data.datasets.vqa import Vqa
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
llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


def stage(name: str, steps: int, trainable: tuple[str, ...], mixture: tuple, **fields) -> Stage:
    """A stage at 2e-5 with LLaVA's schedule."""
    return llava["stage"](name, steps, 64, 2e-5, trainable, mixture, **fields)


def get_config() -> Experiment:
    """The experiment."""
    processor = llava["chat_processor"](
        "vicuna_7b",
        "nextchat",
        768,
        image_size=336,
        pad_to_square=True,
        num_image_tokens=CLIP_VIT_L.num_patches,
        box_format="embeddings",
        max_boxes=8,
        sam_image_size=SAM_VIT_H.image_size,
    )
    stages = (
        stage("pretrain", 65_000, WORDS_AND_BOXES, PRETRAIN),
        stage("instruct", 4_950, WORDS_AND_BOXES, INSTRUCT),
        stage("masks", 5_950, MASKS, (Mix("res", 1.0, source="coco"),), model_overrides=(("objective", "masks"),)),
    )
    weights = {"vision": "clip_vit_l_336", "language": "vicuna_7b", "sam": "sam_vit_h"}
    return llava["experiment"]("nextchat_7b", llava["full_size"](NextChat()), processor, stages, weights, SOURCES)
