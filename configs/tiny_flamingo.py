# SPDX-License-Identifier: Apache-2.0
"""A Flamingo on scenes. No decoder ships with the project: its own learns from nothing, as all but the tower does."""

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
    system = Flamingo(TINY_VIT, ResamplerConfig(128, 2, 4, 32, 512, 16), language, IMAGE_TOKEN)
    stages = (llava["stage"]("look", 1000, ("resampler", "language")),)
    return llava["experiment"](
        "tiny_flamingo", system, stages, llava["BACKBONES"][:1], reader="decoder", template="{image} {question}",
        image_token=IMAGE_TOKEN,
    )  # fmt: skip
