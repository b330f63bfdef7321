# SPDX-License-Identifier: Apache-2.0
"""A very small LLaVA over a language model to which words were added, as a user of 0.1 wrote it.

The language model lies in `resized`, where `lionjax convert --add-words --vocab-multiple` put it.
One picture of the data cannot be read, and updates with an unusual loss are passed over.
"""

from lionjax.config import Experiment, RunConfig, Stage
from lionjax.data.annotations import Lines
from lionjax.data.pipeline import DataConfig
from lionjax.data.processors import ProcessorConfig
from lionjax.language.decoder import DecoderConfig
from lionjax.sharding import MeshConfig
from lionjax.systems.prefix import Prefix
from lionjax.vision.vit import ViTConfig

IMAGE_TOKEN = 21  # <im_patch>
WORDS = 112  # 96, two that were added, and rows up to a multiple of 16

SYSTEM = Prefix(
    vision=ViTConfig(
        16,
        8,
        8,
        2,
        2,
        12,
        1e-5,
        "quick_gelu",
        biases="qkvo",
        patch_bias=False,
        norm_before=True,
        norm_after=True,
    ),
    language=DecoderConfig(
        vocab=WORDS,
        width=8,
        layers=2,
        heads=2,
        kv_heads=1,
        head=4,
        hidden=12,
        end_token=1,
        vocab_multiple=32,
    ),
    image_token=IMAGE_TOKEN,
)


def get_config() -> Experiment:
    """The whole run: 22 updates of the projector."""
    return Experiment(
        name="small_resized",
        system=SYSTEM,
        data=DataConfig(
            sources=(Lines("lines/lines.jsonl", "lines", share=0.25),),
            processor=ProcessorConfig(
                image_size=16,
                tokenizer="resized",
                question_tokenizer="tokenizer",
                prompt_length=32,
                question_length=1,
                target_length=8,
                tags=False,
                padded=True,
                padding="mean",
                reader="decoder",
                template="USER: {image} {question} ASSISTANT:",
                image_token=IMAGE_TOKEN,
            ),
            on_bad_record="replace",
            bad_share=0.5,
        ),
        stages=(
            Stage(
                "align",
                22,
                ("projector",),
                (("vqa", 1.0),),
                batch_size=2,
                learning_rate=1e-4,
                warmup_steps=1,
            ),
        ),
        run=RunConfig(
            log_every=2,
            save_every=6,
            keep=1,
            frozen_dtype="float16",
            evaluate_limit=0,
            on_bad_update="skip",
            spike=0.3,
            bad_updates=20,
        ),
        mesh=MeshConfig(data=1),
        weights=(("language", "resized/params.safetensors"),),
    )
