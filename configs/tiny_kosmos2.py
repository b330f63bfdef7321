# SPDX-License-Identifier: Apache-2.0
"""Kosmos-2 on synthetic scenes: a sub-LN decoder trained from scratch, boxes as location tokens of a 10 x 10 grid."""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix
from lionjax.models.connectors.perceiver import ImageToTextProjectionConfig
from lionjax.models.language.decoder import KOSMOS2_TEXT

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))


def get_config() -> Experiment:
    """The experiment."""
    language = dataclasses.replace(
        KOSMOS2_TEXT,
        vocab_size=1024 + 10 * 10,
        width=128,
        depth=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=384,
        dropout=0.0,
        pad_token_id=0,
        eos_token_id=1,
        position_offset=1,
    )
    model = dataclasses.replace(
        llava["SYSTEM"],
        language=language,
        resampler=ImageToTextProjectionConfig(128, 128, 4, 64, init_std=1.0),
        keep_class_token=True,
        vision_norm_eps=1e-5,
        projector_depth=0,
        normalize_features=True,
        image_token_id=-1,
        torch_names="hugging_face",
    )
    mixture = (Mix("rec", 8.0), Mix("vqa", 4.0), Mix("caption", 1.0))
    stage = llava["stage"]("ground", 4500, ("language", "latents", "vision_norm"), mixture, 3e-3, optimizer="muon")
    return llava["experiment"](
        "tiny_kosmos2",
        model,
        (stage,),
        llava["BACKBONES"][:1],
        prompt_template="{image} {question}",
        box_format="bins",
        location_bins_per_side=10,
    )
