# SPDX-License-Identifier: Apache-2.0
"""A Flamingo on scenes, around the small decoder that ships with the project and stays as it is.

The resampler and the looks learn from single pictures and from rows of two, each kind with a weight of its own in the
loss.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.connectors.perceiver import ResamplerConfig
from lionjax.models.language.decoder import TINY_DECODER
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.flamingo import Flamingo
from lionjax.nn.adapters import GatedCrossAttentionConfig

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
IMAGE_TOKEN = 21  # <im_patch> of the tiny tokenizer


def get_config() -> Experiment:
    """The whole run."""
    looks = GatedCrossAttentionConfig(every_n_layers=1, vision_width=128, num_heads=4, head_dim=32, mlp_dim=512)
    system = Flamingo(
        TINY_VIT,
        ResamplerConfig(128, 2, 4, 32, 512, 16),
        dataclasses.replace(TINY_DECODER, cross_attention=looks),
        IMAGE_TOKEN,
        dataset_loss_weights=(1.0, 1.0, 0.5),
    )
    rows = (("vqa", 5.0), ("caption", 1.5), ("vqa+1", 2.0))
    look = llava["stage"]("look", 1000, ("resampler", "language/groups/cross"), rows, 2e-3, optimizer="muon")
    # Gates begin closed, and what is behind them learns as far as they are open.
    stages = (dataclasses.replace(look, lr_multipliers=((".*/(mlp_)?gate", 5.0),)),)
    weights = (
        llava["BACKBONES"][0],
        ("language/embedding", "shipped:tiny_t5.safetensors"),
        ("language/norm", "shipped:tiny_decoder.safetensors"),
        ("language/groups/block", "shipped:tiny_decoder.safetensors#language/blocks"),
    )
    whole = llava["experiment"](
        "tiny_flamingo",
        system,
        stages,
        weights,
        reader="decoder",
        template="{image} {question}",
        image_token=IMAGE_TOKEN,
        shot_end="</s>",
        pictures=2,
        max_target_tokens=64,
    )
    # A row's pictures are drawn anew each time, so nothing of them can be kept.
    return dataclasses.replace(whole, run=dataclasses.replace(whole.run, cache_features=False))
