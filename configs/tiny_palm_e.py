# SPDX-License-Identifier: Apache-2.0
"""PaLM-E on a tabletop of synthetic scenes: planning from object slots, a state vector or an image, with VQA.

A small decoder, its affine maps and its MLP of states are trained on the frozen tiny ViT. Batches of short sentences
and of those with an image take turns; the weights below are the shares within either half. In the paper robot data are
a tenth of all, here more than a half.
"""

from lionjax.core.experiment import Experiment, Mix, RunConfig, Stage, Weights
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.data.tabletop import world
from lionjax.data.tabletop.dataset import Tabletop
from lionjax.models.language.decoder import TINY_DECODER
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.palm_e import PalmE

TRAINABLE = ("language", "projector", "object_projector", "state_encoder")
WEB = (Mix("vqa", 0.7, group="images"), Mix("caption", 0.1, group="images"))
SHORT = (
    Mix("plan", 0.4, source="objects", group="short"),
    Mix("plan", 0.25, source="state", group="short"),
    *(
        Mix(task, share, source=source, group="short")
        for task in ("success", "recovery", "state_vqa")
        for source, share in (("objects", 0.07), ("state", 0.05))
    ),
)
WITH_IMAGE = (Mix("plan", 0.15, source="image", group="images"), Mix("state_vqa", 0.05, source="image", group="images"))
SYSTEM = PalmE(
    vision=TINY_VIT,
    language=TINY_DECODER,
    state_width=world.STATE_WIDTH,
    max_states=1,
    num_state_tokens=world.MAX_OBJECTS,
    state_mlp_dim=384,
    max_objects=world.MAX_OBJECTS,
    identity_init_scale=2.5,  # the shipped ViT is aligned with the embeddings of the shipped decoder
)
SOURCES = (
    Scenes(sizes=(3000, 300, 400), image_size=TINY_VIT.image_size),
    *(
        Tabletop((2000, 300, 400), image_size=TINY_VIT.image_size, sentence=name, name=name)
        for name in ("objects", "state", "image")
    ),
)


def get_config() -> Experiment:
    """The experiment."""
    processor = ProcessorConfig(
        image_size=TINY_VIT.image_size,
        **{"max_prompt_tokens": 96, "max_question_tokens": 1, "max_target_tokens": 40},
        use_tags=False,
        prompt_template="{image} {question}",
        num_image_tokens=TINY_VIT.num_patches,
    )
    shared = {"batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 50, "weight_decay": 0.01, "clip_norm": 1.0}
    shared["lr_multipliers"] = (("language", 0.5), ("state_encoder", 3.0))
    return Experiment(
        name="tiny_palm_e",
        model=SYSTEM,
        data=DataConfig(sources=SOURCES, processor=processor, length_buckets=(12, 56)),
        stages=(Stage("plan", 1600, TRAINABLE, SHORT + WEB + WITH_IMAGE, **shared),),
        run=RunConfig(log_every=20, save_every=500, max_to_keep=2, frozen_dtype="float32", cache_features=True),
        weights=(
            Weights("vision", "shipped:tiny_vit.safetensors"),
            Weights("language/embedding", "shipped:tiny_t5.safetensors"),
            Weights("language", "shipped:tiny_decoder.safetensors"),
        ),
    )
