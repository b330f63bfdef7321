# SPDX-License-Identifier: Apache-2.0
"""A very small mPLUG-Owl whose bridge learns beside a LoRA, as a user of 0.1 wrote it.

It reads scenes from ArrayRecord files and keeps what the frozen tower makes of them.
"""

from lionjax.bridges.latents import AbstractorConfig
from lionjax.config import Experiment, RunConfig, Stage
from lionjax.data.examples import DataConfig
from lionjax.data.processors import ProcessorConfig
from lionjax.data.sources import Scenes
from lionjax.language.decoder import DecoderConfig
from lionjax.layers import LoraConfig
from lionjax.sharding import MeshConfig
from lionjax.systems.prefix import Prefix
from lionjax.vision.vit import ViTConfig

IMAGE_TOKEN = 21  # <im_patch>
SCENES = "built/scenes/scenes/pixels32-seed0-6-1-4/1.0.0"

SYSTEM = Prefix(
    vision=ViTConfig(image=16, patch=8, width=8, depth=2, heads=2, hidden=12),
    language=DecoderConfig(
        vocab=96,
        width=8,
        layers=2,
        heads=2,
        kv_heads=2,
        head=4,
        hidden=12,
        end_token=1,
        lora=LoraConfig(2, 8.0, 0.05),
    ),
    latents=AbstractorConfig(8, 2, 2, 12, 2, dropout=0.0),
    feature_layer=-1,
    class_token=True,
    vision_eps=1e-6,
    projector_depth=1,
    closing=True,
    image_token=IMAGE_TOKEN,
    in_front=False,
    names="original",
)


def get_config() -> Experiment:
    """The whole run: two updates."""
    return Experiment(
        name="small_lora",
        system=SYSTEM,
        data=DataConfig(
            sources=(Scenes(sizes=(6, 1, 4), pixels=32, folder=SCENES),),
            processor=ProcessorConfig(
                image_size=16,
                tokenizer="tokenizer",
                question_tokenizer="tokenizer",
                prompt_length=32,
                question_length=32,
                target_length=12,
                tags=False,
                reader="decoder",
                template="{image} {question}",
                image_token=IMAGE_TOKEN,
            ),
        ),
        stages=(
            Stage(
                "talk",
                2,
                ("latents", "projector", "last_word", ".*/lora_[ab]"),
                (("vqa", 2.0), ("caption@plain", 1.0)),
                batch_size=4,
                learning_rate=1e-2,
                warmup_steps=1,
                optimizer="muon",
            ),
        ),
        run=RunConfig(
            log_every=1,
            save_every=1,
            keep=1,
            frozen_dtype="bfloat16",
            evaluate_limit=2,
            cache_features=True,
            features_dir="features",
        ),
        mesh=MeshConfig(data=1),
    )
