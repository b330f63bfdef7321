# SPDX-License-Identifier: Apache-2.0
"""InstructBLIP with FlanT5-XL: a BLIP-2 whose Q-Former reads the instruction, tuned on instructions (arXiv 2305.06500).

The parts of blip2_flant5xl.py with one stage that trains the Q-Former and the projector. The data are those of the
paper's held-in sets that are published with their images; each is drawn in proportion to the square root of its size.
A-OKVQA and OCR-VQA are read as JSON Lines. Left out: 14 million captions of the web, questions made from answers, and
LLaVA's dialogues, which are longer than the 128 tokens of an instruction.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, Stage
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.karpathy import KarpathyCaptions
from lionjax.data.datasets.vqa import Vqa
from lionjax.models.vlm.visual_prefix import INSTRUCTBLIP_FLAN_T5_XL, VisualPrefixLM

blip2 = runpy.run_path(str(Path(__file__).with_name("blip2_opt27b.py")))

COCO_2014 = ("data/coco/train2014", "COCO_train2014_{:012d}.jpg")
SOURCES = (
    blip2["COCO_CAPTIONS"],
    KarpathyCaptions("data/textcaps/TextCaps_0.1_train.json", "data/textcaps/train_images", name="textcaps"),
    Vqa(
        "data/vqav2/v2_OpenEnded_mscoco_train2014_questions.json",
        "data/vqav2/v2_mscoco_train2014_annotations.json",
        *COCO_2014,
        name="vqav2",
    ),
    Vqa(
        "data/okvqa/OpenEnded_mscoco_train2014_questions.json",
        "data/okvqa/mscoco_train2014_annotations.json",
        *COCO_2014,
        name="okvqa",
    ),
    JsonLines("data/aokvqa/aokvqa_v1p0_train.jsonl", "data/coco/train2017", name="aokvqa"),
    JsonLines("data/ocr_vqa/train.jsonl", "data/ocr_vqa/images", name="ocr_vqa"),
    Conversations("data/llava/detail_23k.json", "data/coco", name="llava_detail"),
    Conversations("data/llava/complex_reasoning_77k.json", "data/coco", name="llava_reasoning"),
)
INSTRUCTIONS = (
    Mix("caption", 7.5, source="coco_captions"),
    Mix("caption", 3.3, source="textcaps"),
    Mix("vqa", 6.7, source="vqav2"),
    Mix("vqa", 0.9, source="okvqa"),
    Mix("vqa", 1.3, source="aokvqa"),
    Mix("vqa", 9.0, source="ocr_vqa"),
    Mix("conversation", 1.5, source="llava_detail"),
    Mix("conversation", 2.8, source="llava_reasoning"),
)
LENGTHS = {"max_prompt_tokens": 128, "max_target_tokens": 256}


def get_config(
    system: VisualPrefixLM = INSTRUCTBLIP_FLAN_T5_XL,
    name: str = "instructblip_flant5xl",
    language: str = "flan_t5_xl",
    batch_size: int = 192,
) -> Experiment:
    """The experiment; the arguments select another language model."""
    stage = Stage(
        "instruct",
        60_000,
        blip2["BETWEEN"],
        INSTRUCTIONS,
        batch_size,
        learning_rate=1e-5,
        warmup_steps=1000,
        warmup_learning_rate=1e-8,
        weight_decay=0.05,
    )
    generation = GenerationDefaults(num_beams=5, repetition_penalty=1.5, max_new_tokens=256)
    return blip2["get_config"](system, name, language, (stage,), generation, SOURCES, LENGTHS)
