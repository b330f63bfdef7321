# SPDX-License-Identifier: Apache-2.0
"""A Kosmos-2 on scenes: a sub-LN decoder that learns from nothing, boxes as location tokens of a grid of 10 by 10."""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.connectors.perceiver import ProjectionConfig
from lionjax.models.language.decoder import KOSMOS2_TEXT

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))


def get_config() -> Experiment:
    """The whole run."""
    language = dataclasses.replace(
        KOSMOS2_TEXT,
        vocab=1024 + 10 * 10,
        width=128,
        layers=4,
        heads=4,
        kv_heads=4,
        head=32,
        hidden=384,
        dropout=0.0,
        pad_token=0,
        end_token=1,
        position_offset=1,
    )
    system = dataclasses.replace(
        llava["SYSTEM"],
        language=language,
        latents=ProjectionConfig(128, 128, 4, 64, spread=1.0),
        class_token=True,
        vision_eps=1e-5,
        projector_depth=0,
        unit=True,
        image_token=-1,
        names="hugging_face",
    )
    mixture = (("rec", 8.0), ("vqa", 4.0), ("caption", 1.0))
    stage = llava["stage"]("ground", 4500, ("language", "latents", "vision_norm"), mixture, 3e-3, optimizer="muon")
    return llava["experiment"](
        "tiny_kosmos2",
        system,
        (stage,),
        llava["BACKBONES"][:1],
        reader="decoder",
        template="{image} {question}",
        image_token=-1,
        places="bins",
        bins=10,
    )
