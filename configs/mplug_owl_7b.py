# SPDX-License-Identifier: Apache-2.0
"""mPLUG-Owl 7B: a ViT-L/14 and an abstractor of 64 queries before LLaMA-7B (arXiv 2304.14178).

Trains ViT and abstractor on captions, then a LoRA on the language model's q and v projections on instructions. Needs
the public weights, converted once with `lionjax convert`. Learning rates, batch sizes and steps are the paper's, rows
of 2048 tokens its code's. Of its captions LAION's and COYO's, published as addresses, are read as one list of image and
caption; its instructions are LLaVA's, and texts of Alpaca (102,000), Vicuna (90,000) and Baize (50,000).
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, Stage
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.karpathy import KarpathyCaptions
from lionjax.models.vlm.visual_prefix import MPLUG_OWL_7B
from lionjax.nn.lora import LoraConfig

VISION = ("vision", "vision_norm", "latents", "projector", "last_word")
SOURCES = (
    KarpathyCaptions("data/web/captions.json", "data/web/images", name="web_captions"),
    KarpathyCaptions("data/coco/annotations/coco_karpathy_train.json", "data/coco", name="coco_captions"),
    Conversations("data/llava/llava_instruct_150k.json", "data/coco", name="llava"),
    JsonLines("data/alpaca/alpaca_data.jsonl", "data/alpaca", name="alpaca"),  # text only, as the next two
    Conversations("data/vicuna/ShareGPT_V3_unfiltered_cleaned_split.json", "data/vicuna", name="vicuna"),
    Conversations("data/baize/chat.jsonl", "data/baize", name="baize"),
)
# The instructions in proportion to their sizes; the paper gives no ratio of the captions.
CAPTIONS = (
    Mix("caption", 9.0, source="web_captions", template="plain"),
    Mix("caption", 1.0, source="coco_captions", template="plain"),
)
INSTRUCTIONS = (
    Mix("conversation", 1.5, source="llava"),
    Mix("vqa", 1.02, source="alpaca"),
    Mix("conversation", 0.9, source="vicuna"),
    Mix("conversation", 0.5, source="baize"),
)

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


def get_config() -> Experiment:
    """The experiment."""
    language = dataclasses.replace(MPLUG_OWL_7B.language, remat="full", lora=LoraConfig(8, 32.0, 0.05))
    image_tokens = MPLUG_OWL_7B.resampler.num_query_tokens + 1
    processor = llava["chat_processor"]("llama_7b", "mplug_owl", **llava["row_lengths"](image_tokens))
    shared = {"weight_decay": 0.1, "betas": (0.9, 0.98), "warmup_learning_rate": 0.0}
    pretrain = {"learning_rate": 1e-4, "warmup_steps": 2000}
    instruct = {"learning_rate": 2e-5, "end_learning_rate": 1e-6, "warmup_steps": 50}
    return llava["experiment"](
        "mplug_owl_7b",
        llava["full_size"](MPLUG_OWL_7B, language=language),
        processor,
        (
            Stage("pretrain", 50_000, VISION, CAPTIONS, 2048, **pretrain, **shared),
            Stage("instruct", 2000, (".*/lora_[ab]",), INSTRUCTIONS, 256, **instruct, **shared),
        ),
        {"vision": "mplug_owl_7b", "language": "llama_7b"},
        SOURCES,
        generation=GenerationDefaults(max_new_tokens=256),
    )
