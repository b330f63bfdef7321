# SPDX-License-Identifier: Apache-2.0
"""Lyrics on synthetic scenes: tiny_instructblip.py with an MQ-Former, which reads a detector's regions too.

Stages as in the release: captions without instruction, then instructions that MQ-Former reads, then LoRA in the
language model, here beside MQ-Former. `benchmarks/lyrics.py` starts it from tiny_lyrics_first.py.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix
from lionjax.models.language.t5 import TINY_T5
from lionjax.nn.lora import LoraConfig

first = runpy.run_path(str(Path(__file__).with_name("tiny_lyrics_first.py")))
llava = first["llava"]
BETWEEN = ("qformer", "vision_norm", "projector")


def get_config() -> Experiment:
    """The experiment."""
    model = dataclasses.replace(
        llava["SYSTEM"],
        qformer=first["MQ_FORMER"],
        language=dataclasses.replace(TINY_T5, lora=LoraConfig(8, 32.0, 0.05, ("q", "k", "v"))),
        keep_class_token=True,
        vision_norm_eps=1e-5,
    )
    mixture = (*llava["WORDS"], *llava["PLACES"])
    captions = llava["stage"]("captions", 100, BETWEEN, (Mix("caption"),), 2e-3, optimizer="muon")
    stages = (
        dataclasses.replace(captions, model_overrides=(("read_instruction", False),)),
        llava["stage"]("instruct", 800, BETWEEN, mixture, 2e-3, optimizer="muon"),
        llava["stage"]("lora", 300, (*BETWEEN, "language/.*/lora_[ab]"), mixture, optimizer="muon"),
    )
    processor = {name: value for name, value in first["PROCESSOR"].items() if name != "packing"}
    made = llava["experiment"]("tiny_lyrics", model, stages, **processor)
    return first["on_refined_scenes"](made)
