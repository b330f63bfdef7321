# SPDX-License-Identifier: Apache-2.0
"""mPLUG-Owl 7B: a ViT-L/14 and an abstractor of 64 queries before LLaMA-7B (arXiv 2304.14178).

Trains ViT and abstractor on captions, then a LoRA on the language model's q and v projections on instructions. Needs
the public weights, converted once with `lionjax convert`. Learning rates, batch sizes and steps are the paper's.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, Stage
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.models.vlm.visual_prefix import MPLUG_OWL_7B
from lionjax.nn.lora import LoraConfig

VISION = ("vision", "vision_norm", "latents", "projector", "last_word")
INSTRUCTIONS = (Mix("caption", 1.0, source="coco"), Mix("vqa", 1.6, source="talks"))

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


def get_config() -> Experiment:
    """The experiment."""
    language = dataclasses.replace(MPLUG_OWL_7B.language, remat="full", lora=LoraConfig(8, 32.0, 0.05))
    # Text-only conversations (Alpaca, Vicuna, Baize) as JSON Lines with a question and an answer.
    sources = (Coco("data/coco"), JsonLines("data/talks.jsonl", "data", name="talks"))
    processor = llava["chat_processor"]("llama_7b", "mplug_owl")
    shared = {"weight_decay": 0.1, "betas": (0.9, 0.98), "warmup_learning_rate": 0.0}
    pretrain = {"learning_rate": 1e-4, "warmup_steps": 2000}
    instruct = {"learning_rate": 2e-5, "end_learning_rate": 1e-6, "warmup_steps": 50}
    captions = (Mix("caption", 1.0, source="coco", template="plain"),)
    return llava["experiment"](
        "mplug_owl_7b",
        llava["full_size"](MPLUG_OWL_7B, language=language),
        processor,
        (
            Stage("pretrain", 50_000, VISION, captions, 2048, **pretrain, **shared),
            Stage("instruct", 2000, (".*/lora_[ab]",), INSTRUCTIONS, 256, **instruct, **shared),
        ),
        {"vision": "mplug_owl_7b", "language": "llama_7b"},
        sources,
        generation=GenerationDefaults(max_new_tokens=256),
    )
