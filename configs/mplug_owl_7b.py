# SPDX-License-Identifier: Apache-2.0
"""mPLUG-Owl 7B: a ViT-L/14 and an abstractor of 64 queries before LLaMA-7B (arXiv 2304.14178).

Trains ViT and abstractor on captions, then a LoRA on the language model's q and v projections on instructions. Needs
the public weights, converted once with `lionjax convert`. Learning rates, batch sizes and steps are the paper's.
"""

import dataclasses

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage, Weights
from lionjax.core.sharding import MeshConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.visual_prefix import MPLUG_OWL_7B
from lionjax.nn.lora import LoraConfig

VISION = ("vision", "vision_norm", "latents", "projector", "last_word")
INSTRUCTIONS = (Mix("caption", 1.0, source="coco"), Mix("vqa", 1.6, source="talks"))
HUMAN = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. Human: {image} Human: {question} AI:"
)


def get_config() -> Experiment:
    """The experiment."""
    model = dataclasses.replace(
        MPLUG_OWL_7B,
        vision=dataclasses.replace(MPLUG_OWL_7B.vision, remat="full"),
        language=dataclasses.replace(MPLUG_OWL_7B.language, remat="full", lora=LoraConfig(8, 32.0, 0.05)),
        dtype="bfloat16",
    )
    schedule = {"weight_decay": 0.1, "betas": (0.9, 0.98), "warmup_learning_rate": 0.0}
    return Experiment(
        name="mplug_owl_7b",
        model=model,
        data=DataConfig(
            # Text-only conversations (Alpaca, Vicuna, Baize) as JSON Lines with a question and an answer.
            sources=(Coco("data/coco"), JsonLines("data/talks.jsonl", "data", name="talks")),
            processor=ProcessorConfig(
                tokenizer="weights/llama_7b",
                max_question_tokens=1,
                max_prompt_tokens=256,
                use_tags=False,
                prompt_template=HUMAN,
                followup_template="Human: {question} AI:",
            ),
        ),
        stages=(
            Stage(
                "pretrain",
                50_000,
                VISION,
                (Mix("caption", 1.0, source="coco", template="plain"),),
                2048,
                learning_rate=1e-4,
                warmup_steps=2000,
                **schedule,
            ),
            Stage(
                "instruct",
                2000,
                (".*/lora_[ab]",),
                INSTRUCTIONS,
                256,
                learning_rate=2e-5,
                end_learning_rate=1e-6,
                warmup_steps=50,
                **schedule,
            ),
        ),
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=-1),
        weights=(
            Weights("vision", "weights/mplug_owl_7b/params.safetensors"),
            Weights("language", "weights/llama_7b/params.safetensors"),
        ),
        generation=GenerationDefaults(max_new_tokens=256),
    )
