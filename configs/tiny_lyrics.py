# SPDX-License-Identifier: Apache-2.0
"""Lyrics on synthetic scenes: tiny_instructblip.py with an MQ-Former, which reads a detector's regions too.

One stage: instructions that MQ-Former reads, with LoRA in the language model beside it. The release warms the projector
up on captions before; here it starts as the identity. `benchmarks/lyrics.py` starts from tiny_lyrics_first.py.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.language.t5 import TINY_T5
from lionjax.nn.lora import LoraConfig

first = runpy.run_path(str(Path(__file__).with_name("tiny_lyrics_first.py")))
llava = first["llava"]


def get_config() -> Experiment:
    """The experiment."""
    model = dataclasses.replace(
        llava["SYSTEM"],
        qformer=first["MQ_FORMER"],
        language=dataclasses.replace(TINY_T5, lora=LoraConfig(8, 32.0, 0.05, ("q", "k", "v"))),
        keep_class_token=True,
        vision_norm_eps=1e-5,
        identity_init_scale=3.0,
    )
    mixture = (*llava["WORDS"], *llava["PLACES"])
    parts = ("qformer", "vision_norm", "projector", "language/.*/lora_[ab]")
    stages = (first["slow_copying"](llava["stage"]("instruct", 180, parts, mixture, 1e-3, 32, "muon")),)
    processor = {name: value for name, value in first["PROCESSOR"].items() if name != "packing"}
    made = llava["experiment"]("tiny_lyrics", model, stages, **processor)
    return first["on_refined_scenes"](made)
