# SPDX-License-Identifier: Apache-2.0
"""A Flamingo on scenes. No decoder ships with the project, so its own first learns how one talks of scenes, blind.

The gates are closed in that stage. Then the language model stays as it is, and the resampler and the looks learn from
single pictures and from rows of three, each kind with a weight of its own in the loss.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.adapters import CrossConfig
from lionjax.bridges.latents import ResamplerConfig
from lionjax.config import Experiment
from lionjax.language.decoder import DecoderConfig
from lionjax.systems.flamingo import Flamingo
from lionjax.vision.vit import TINY_VIT

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
IMAGE_TOKEN = 21  # <im_patch> of the tiny tokenizer


def get_config() -> Experiment:
    """The whole run."""
    language = DecoderConfig(
        vocab=1024, width=128, layers=4, heads=4, kv_heads=4, head=32, hidden=384, end_token=1,
        cross=CrossConfig(every=2, source_width=128, heads=4, head=32, hidden=512),
    )  # fmt: skip
    system = Flamingo(
        TINY_VIT,
        ResamplerConfig(128, 2, 4, 32, 512, 16),
        language,
        IMAGE_TOKEN,
        part_weights=(1.0, 1.0, 0.5),
    )
    single = (("vqa", 5.0), ("caption", 1.5))
    rows = (*single, ("vqa+2", 2.0))
    looks = ("resampler", "language/groups/cross")
    stages = (
        llava["stage"]("read", 300, ("language/(?!groups/cross).*",), rows, 2e-3),
        llava["stage"]("look", 400, looks, rows, 2e-3),
    )
    whole = llava["experiment"](
        "tiny_flamingo", system, stages, llava["BACKBONES"][:1], reader="decoder", template="{image} {question}",
        image_token=IMAGE_TOKEN, shot_end="</s>", pictures=3, target_length=64,
    )  # fmt: skip
    # A row's pictures are drawn anew each time, so nothing of them can be kept.
    return dataclasses.replace(whole, run=dataclasses.replace(whole.run, cache_features=False))
