# SPDX-License-Identifier: Apache-2.0
"""Systems with places small enough to make in a second: NExT-Chat, and the flagship over T5 and over a decoder."""

import dataclasses

import small_lion
import small_nextchat
from chat_prompts import PICTURE, lengths
from small_lion import SIDE

from lionjax.core.experiment import Experiment, RunConfig, Stage
from lionjax.data.config import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.models.heads.region import RegionHeadConfig
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vlm.nextchat import NextChat
from lionjax.nn.adapters import AdapterConfig

TRIGGER, LOCATION = 19, 20  # of the tiny tokenizer
IDS = {"trigger_token_id": TRIGGER, "box_token_id": LOCATION}
SAM = small_nextchat.TINY.sam
DECODER = DecoderConfig(1024, 32, 2, 2, 2, 16, 48, eos_token_id=1, adapters=AdapterConfig(8))
NEXTCHAT = NextChat(
    vision=small_lion.SYSTEM.vision,
    language=dataclasses.replace(DECODER, adapters=None),
    sam=SAM,
    feature_layer=-1,
    box_mlp_dim=16,
    num_mask_prompt_tokens=2,
    box_scale=32.0,
    max_boxes=3,
    image_token_id=PICTURE,
    **IDS,
)
FLAGSHIP = dataclasses.replace(
    small_lion.SYSTEM,
    sam=SAM,
    region_head=RegionHeadConfig(box_mlp_dim=16, num_mask_prompt_tokens=2, max_boxes=3, **IDS),
)
ONE_ROW = dataclasses.replace(FLAGSHIP, language=DECODER)
PROCESSOR = ProcessorConfig(
    image_size=SIDE,
    **lengths(128, 64, 16),
    pad_to_square=True,
    box_format="embeddings",
    max_boxes=4,
    sam_image_size=SAM.image_size,
)
IN_ONE_ROW = dataclasses.replace(PROCESSOR, reader="decoder")
WITH_PICTURE = dataclasses.replace(IN_ONE_ROW, prompt_template="{image} {question}", num_image_tokens=4, use_tags=False)
MASKS = ("mask_prompts", "sam/decoder")
PLACES = ("locations", ".*/adapters", "aggregator.*", "soft_prompt")
WORDS = ("language", "projector", "locations")


def experiment(system, processor, trainable, seed: int = 0, steps: int = 2, **data) -> Experiment:
    """Words and boxes for some steps, then masks."""
    fields = {"batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1}
    boxes = (("rec", 1.0), ("rec@digits", 1.0), ("box_vqa", 1.0))
    return Experiment(
        name="small_places",
        model=system,
        data=DataConfig(**{"sources": (Scenes((12, 4, 12), image_size=56),), "processor": processor} | data),
        stages=(
            Stage("boxes", steps, trainable, boxes, **fields),
            Stage("masks", steps, MASKS, (("res", 1.0),), model_overrides=(("objective", "masks"),), **fields),
        ),
        run=RunConfig(log_every=1, save_every=1, frozen_dtype="float32", evaluate_limit=0, cache_features=True),
        seed=seed,
    )


SYSTEMS = {
    "nextchat": (NEXTCHAT, WITH_PICTURE, WORDS),
    "flagship": (FLAGSHIP, PROCESSOR, PLACES),
    "flagship over a decoder": (ONE_ROW, IN_ONE_ROW, PLACES),
}


def talking(what: Experiment):
    """Random parameters that say places often."""
    params = small_lion.params_of(what)
    head = params["language"]["head"]["kernel"]
    params["language"]["head"]["kernel"] = head.at[:, TRIGGER].multiply(6.0)
    return params
