# SPDX-License-Identifier: Apache-2.0
"""The flagship with a decoder-only language model, as Vicuna is: the tiny one that ships, which is trained further.

Otherwise as configs/tiny_lionjax.py.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Weights
from lionjax.models.language.decoder import TINY_DECODER
from lionjax.nn.adapters import AdapterConfig

WITH_T5 = runpy.run_path(str(Path(__file__).with_name("tiny_lionjax.py")))


def get_config() -> Experiment:
    """The base run."""
    base = WITH_T5["get_config"]()
    language = dataclasses.replace(TINY_DECODER, adapters=AdapterConfig(32))
    stages = tuple(
        stage
        if stage.name == "masks"
        else dataclasses.replace(
            stage, trainable=("language", *(p for p in stage.trainable if not p.startswith(".*/adapter")))
        )
        for stage in base.stages
    )
    return dataclasses.replace(
        base,
        name="tiny_lionjax_decoder",
        model=dataclasses.replace(base.model, language=language),
        stages=stages,
        weights=(
            *(pair for pair in base.weights if pair[0] not in Weights("language", "locations")),
            Weights("language/embedding", "shipped:tiny_t5.safetensors"),
            Weights("language", "shipped:tiny_decoder.safetensors"),
        ),
    )
