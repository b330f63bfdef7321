# SPDX-License-Identifier: Apache-2.0
"""PaLM-E-12B: ViT-4B through an affine map, state and object slots, PaLM 8B (arXiv 2303.03378).

Trains all but the ViT. Neither the weights of the ViT and of PaLM nor the robots' data are public: the config shows
what training at this size takes (`lionjax plan palm_e_12b`), and learns from random weights unless `weights` names
others. Its robot data, a tenth of the examples as in the paper's full mixture, are the tabletop of tiny_palm_e.py; the
others are public questions and captions. Learning rate, batch size and steps are not in the paper.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix
from lionjax.data.tabletop import world
from lionjax.data.tabletop.dataset import Tabletop
from lionjax.models.vlm.palm_e import PalmE

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))
instructblip = runpy.run_path(str(Path(__file__).with_name("instructblip_flant5xl.py")))

TRAINABLE = ("language", "projector", "object_projector", "state_encoder")
WEB = {"coco_captions": ("caption", 0.3), "vqav2": ("vqa", 0.4), "okvqa": ("vqa", 0.2)}
ROBOT = (
    *(("plan", name) for name in ("objects", "state", "image")),
    *((task, "objects") for task in ("success", "recovery", "state_vqa")),
)
SYSTEM = PalmE(
    state_width=world.STATE_WIDTH, max_states=1, num_state_tokens=world.MAX_OBJECTS, max_objects=world.MAX_OBJECTS
)


def get_config() -> Experiment:
    """The experiment."""
    sources = tuple(source for source in instructblip["SOURCES"] if source.name in WEB)
    sources += tuple(
        Tabletop((1_000_000, 1000, 1000), image_size=SYSTEM.vision.image_size, sentence=name, name=name)
        for name in ("objects", "state", "image")
    )
    mixture = tuple(Mix(task, weight, source=name) for name, (task, weight) in WEB.items())
    mixture += tuple(Mix(task, 0.1 / len(ROBOT), source=name) for task, name in ROBOT)
    patches = SYSTEM.vision.num_patches
    processor = llava["chat_processor"](
        "palm_8b",
        "{image} {question}",
        image_size=SYSTEM.vision.image_size,
        num_image_tokens=patches,
        **llava["row_lengths"](patches, row=1024, prompt=512),
    )
    stage = llava["stage"]("generalist", 100_000, 1024, 1e-4, TRAINABLE, mixture)
    model = llava["full_size"](SYSTEM)
    answer = GenerationDefaults(max_new_tokens=64)
    return llava["experiment"]("palm_e_12b", model, processor, (stage,), {}, sources, generation=answer)
