# SPDX-License-Identifier: Apache-2.0
"""The flagship over a language model that is a decoder alone, as Vicuna is: the small one that ships, which learns on.

All else is as in configs/tiny_lionjax.py.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.language.decoder import TINY_DECODER
from lionjax.nn.adapters import AdapterConfig

WITH_T5 = runpy.run_path(str(Path(__file__).with_name("tiny_lionjax.py")))


def get_config() -> Experiment:
    """The whole run."""
    whole = WITH_T5["get_config"]()
    language = dataclasses.replace(TINY_DECODER, adapters=AdapterConfig(32))
    processor = dataclasses.replace(whole.data.processor, reader="decoder")
    stages = tuple(
        stage
        if stage.name == "masks"
        else dataclasses.replace(
            stage, trainable=("language", *(p for p in stage.trainable if not p.startswith(".*/adapter")))
        )
        for stage in whole.stages
    )
    return dataclasses.replace(
        whole,
        name="tiny_lionjax_decoder",
        model=dataclasses.replace(whole.system, language=language),
        data=dataclasses.replace(whole.data, processor=processor),
        stages=stages,
        weights=(
            *(pair for pair in whole.weights if pair[0] not in ("language", "locations")),
            ("language/embedding", "shipped:tiny_t5.safetensors"),
            ("language", "shipped:tiny_decoder.safetensors"),
        ),
    )
