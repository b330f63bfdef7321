# SPDX-License-Identifier: Apache-2.0
"""Systems with places small enough to make in a second: NExT-Chat, and the flagship over T5 and over a decoder."""

import dataclasses

import small_lion
from small_lion import SIDE

from lionjax.core.experiment import Experiment, RunConfig, Stage
from lionjax.data.config import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.models.heads.region import PlaceConfig
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.sam_encoder import SamConfig
from lionjax.models.vlm.nextchat import NextChat
from lionjax.nn.adapters import AdapterConfig

TRIGGER, LOCATION = 19, 20  # of the tiny tokenizer
SAM = SamConfig(
    image=32,
    patch=8,
    width=8,
    depth=2,
    heads=2,
    hidden=12,
    window=2,
    global_layers=(1,),
    channels=8,
    mask_channels=4,
    decoder_heads=2,
    decoder_hidden=8,
    iou_hidden=8,
)
DECODER = DecoderConfig(
    vocab=1024, width=32, layers=2, heads=2, kv_heads=2, head=16, hidden=48, end_token=1, adapters=AdapterConfig(8)
)
NEXTCHAT = NextChat(
    vision=small_lion.SYSTEM.vision,
    language=dataclasses.replace(DECODER, adapters=None),
    sam=SAM,
    feature_layer=-1,
    location_hidden=16,
    mask_tokens=2,
    box_scale=32.0,
    image_token=21,
    trigger_token=TRIGGER,
    location_token=LOCATION,
    max_boxes=3,
)
FLAGSHIP = dataclasses.replace(
    small_lion.SYSTEM,
    sam=SAM,
    places=PlaceConfig(trigger_token=TRIGGER, location_token=LOCATION, location_hidden=16, mask_tokens=2, max_boxes=3),
)
ONE_ROW = dataclasses.replace(FLAGSHIP, language=DECODER)
PROCESSOR = ProcessorConfig(
    image_size=SIDE,
    prompt_length=128,
    question_length=64,
    target_length=16,
    padded=True,
    places="embeddings",
    boxes=4,
    sam_size=SAM.image,
)
IN_ONE_ROW = dataclasses.replace(PROCESSOR, reader="decoder")
WITH_PICTURE = dataclasses.replace(IN_ONE_ROW, template="{image} {question}", image_tokens=4, tags=False)
MASKS = ("mask_prompts", "sam/decoder")
PLACES = ("locations", ".*/adapters", "aggregator.*", "soft_prompt")
WORDS = ("language", "projector", "locations")


def experiment(system, processor, trainable, seed: int = 0, steps: int = 2, **data) -> Experiment:
    """Words and boxes for some steps, then masks."""
    fields = {"batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1}
    boxes = (("rec", 1.0), ("rec@digits", 1.0), ("box_vqa", 1.0))
    return Experiment(
        name="small_places",
        system=system,
        data=DataConfig(**{"sources": (Scenes((12, 4, 12), pixels=56),), "processor": processor} | data),
        stages=(
            Stage("boxes", steps, trainable, boxes, **fields),
            Stage("masks", steps, MASKS, (("res", 1.0),), system=(("objective", "masks"),), **fields),
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
