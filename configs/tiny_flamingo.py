# SPDX-License-Identifier: Apache-2.0
"""Flamingo on synthetic scenes (arXiv 2204.14198), with the frozen tiny decoder that ships with the project.

Trains the resampler and the gated cross-attention on single images and on pairs of examples; each dataset has its own
loss weight.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix, Weights
from lionjax.models.connectors.perceiver import ResamplerConfig
from lionjax.models.language.decoder import TINY_DECODER
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.flamingo import Flamingo
from lionjax.nn.adapters import GatedCrossAttentionConfig

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))
IMAGE_TOKEN = 21  # <im_patch> of the tiny tokenizer


def get_config() -> Experiment:
    """The experiment."""
    cross_attention = GatedCrossAttentionConfig(
        every_n_layers=1, vision_width=128, num_heads=4, head_dim=32, mlp_dim=512
    )
    model = Flamingo(
        TINY_VIT,
        ResamplerConfig(128, 2, 4, 32, 512, 16),
        dataclasses.replace(TINY_DECODER, cross_attention=cross_attention),
        IMAGE_TOKEN,
        dataset_loss_weights=(1.0, 1.0, 0.5),
    )
    mixture = (Mix("vqa", 5.0), Mix("caption", 1.5), Mix("vqa", 2.0, shots=1))
    base = llava["stage"]("look", 1000, ("resampler", "language/groups/cross"), mixture, 2e-3, optimizer="muon")
    # The gates are initialized to 0, and the cross-attention behind them gets gradients in proportion to them.
    stages = (dataclasses.replace(base, lr_multipliers=((".*/(mlp_)?gate", 5.0),)),)
    weights = (
        llava["BACKBONES"][0],
        Weights("language/embedding", "shipped:tiny_t5.safetensors"),
        Weights("language/norm", "shipped:tiny_decoder.safetensors"),
        Weights("language/groups/block", "shipped:tiny_decoder.safetensors", "language/blocks"),
    )
    experiment = llava["experiment"](
        "tiny_flamingo",
        model,
        stages,
        weights,
        prompt_template="{image} {question}",
        shot_end="</s>",
        max_images=2,
        max_target_tokens=64,
    )
    # In-context examples are sampled anew each epoch, so features cannot be cached.
    return dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, cache_features=False))
