# SPDX-License-Identifier: Apache-2.0
"""PaLM-E on a tabletop of synthetic scenes: planning from object slots, a state vector or an image, with VQA.

A small decoder, its affine maps and its MLP of states are trained on the frozen tiny ViT. The shares of the mixture are
the weights below; they sum to 1. In the paper robot data are a tenth; here they are seven tenths of it.
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
WEB = (Mix("vqa", 0.25), Mix("caption", 0.05))
ROBOT = (
    *(Mix("plan", share, source=name) for name, share in (("objects", 0.28), ("state", 0.16), ("image", 0.06))),
    *(Mix(task, 0.04, source="objects") for task in ("success", "recovery", "state_vqa")),
    *(Mix(task, 0.02, source="state") for task in ("success", "recovery", "state_vqa")),
    Mix("state_vqa", 0.02, source="image"),
)
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
    *(Tabletop(image_size=TINY_VIT.image_size, sentence=name, name=name) for name in ("objects", "state", "image")),
)


def get_config() -> Experiment:
    """The experiment."""
    processor = ProcessorConfig(
        image_size=TINY_VIT.image_size,
        **{"max_prompt_tokens": 112, "max_question_tokens": 1, "max_target_tokens": 40},
        use_tags=False,
        prompt_template="{image} {question}",
        num_image_tokens=TINY_VIT.num_patches,
    )
    shared = {"batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 50, "weight_decay": 0.01, "clip_norm": 1.0}
    shared["lr_multipliers"] = (("language", 0.5), ("state_encoder", 3.0))
    return Experiment(
        name="tiny_palm_e",
        model=SYSTEM,
        data=DataConfig(sources=SOURCES, processor=processor),
        stages=(Stage("plan", 1000, TRAINABLE, WEB + ROBOT, **shared),),
        run=RunConfig(log_every=20, save_every=500, max_to_keep=2, frozen_dtype="float32", cache_features=True),
        weights=(
            Weights("vision", "shipped:tiny_vit.safetensors"),
            Weights("language/embedding", "shipped:tiny_t5.safetensors"),
            Weights("language", "shipped:tiny_decoder.safetensors"),
        ),
    )
