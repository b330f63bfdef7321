# SPDX-License-Identifier: Apache-2.0
"""The small frozen backbones that ship with the project. `python configs/tiny_backbones.py` makes them anew."""

import argparse
import json
import logging
from pathlib import Path

from lionjax.data import processors
from lionjax.language.t5 import TINY_T5
from lionjax.training import backbones
from lionjax.training.backbones import BackbonesConfig
from lionjax.vision.vit import TINY_VIT


def get_config() -> BackbonesConfig:
    """Sizes and schedule."""
    return BackbonesConfig(vision=TINY_VIT, language=TINY_T5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("vision", "language", "both"), default="both")
    parser.add_argument(
        "--start", type=Path, help="go on from this file, with the second schedule only"
    )
    parser.add_argument("--out", type=Path, default=Path("lionjax/data/assets"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = get_config()
    if arguments.part in ("vision", "both"):
        start = backbones.load(arguments.start) if arguments.start else None
        params, figures = backbones.train_vision(
            config, processors.CLIP_MEAN, processors.CLIP_STD, start
        )
        backbones.save(params, "vision", arguments.out / "tiny_vit.safetensors")
        (arguments.out / "tiny_vit.json").write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.part in ("language", "both"):
        start = backbones.load(arguments.start) if arguments.start else None
        params, figures = backbones.train_language(
            config, start, arguments.out / "tiny_t5_reader.safetensors"
        )
        backbones.save(params, "language", arguments.out / "tiny_t5.safetensors")
        (arguments.out / "tiny_t5.json").write_text(json.dumps(figures, indent=1) + "\n")
