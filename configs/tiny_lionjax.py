# SPDX-License-Identifier: Apache-2.0
"""The flagship, small: LION's two visual streams, tags and router, with NExT-Chat's boxes and masks on the same T5.

Four stages: image level, region level with boxes, both with routers, and masks, from a fraction of the records
(`data.mask_fraction`). ViT, T5 and SAM are the tiny frozen ones that ship with the project; the box encoder and decoder
are initialized as pretrained with the T5 (docs/tiny_backbones.md).
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix, Stage, Weights
from lionjax.models.heads.region import RegionHeadConfig
from lionjax.models.vision.sam_encoder import TINY_SAM

tiny_lion = runpy.run_path(str(Path(__file__).with_name("tiny_lion.py")))
MASKS = ("mask_prompts", "sam/decoder")
REGION_LEVEL = (Mix("rec", 3.0), Mix("reg", 1.0), Mix("box_vqa", 1.0), Mix("grounded", 0.5))

SYSTEM = dataclasses.replace(
    tiny_lion["SYSTEM"],
    region_head=RegionHeadConfig(
        trigger_token_id=19,
        box_token_id=20,
        box_mlp_dim=256,
        num_mask_prompt_tokens=2,
        max_boxes=6,
        giou_weight=0.8,  # as in the paper
        cycle_weight=0.1,  # low, because the frozen T5's states cannot adapt to the box embeddings
    ),
    sam=TINY_SAM,
)
PROCESSOR = dataclasses.replace(
    tiny_lion["DATA"].processor,
    pad_to_square=True,
    box_format="embeddings",
    max_boxes=6,
    sam_image_size=TINY_SAM.image_size,
)


def get_config() -> Experiment:
    """The experiment."""
    shared = tiny_lion["SHARED"] | {"warmup_steps": 30}
    stages = tiny_lion["lion"]["stages"](
        (260, 240, 320),
        tiny_lion["IMAGE_LEVEL"],
        REGION_LEVEL,
        shared,
        image_rate=1e-3,
        boxes=("locations",),
        region_fields={"lr_multipliers": (("locations", 2.0),)},
    )
    return Experiment(
        name="tiny_lionjax",
        model=SYSTEM,
        data=dataclasses.replace(tiny_lion["DATA"], processor=PROCESSOR, mask_fraction=0.1),
        stages=(
            *stages,
            Stage("masks", 40, MASKS, (Mix("res", 1.0),), model_overrides=(("objective", "masks"),), **shared),
        ),
        run=tiny_lion["RUN"],
        weights=(
            Weights("vision", "shipped:tiny_vit.safetensors"),
            Weights("language", "shipped:tiny_t5.safetensors"),
            Weights("locations", "shipped:tiny_places.safetensors"),
            Weights("sam", "shipped:tiny_sam.safetensors"),
        ),
    )
