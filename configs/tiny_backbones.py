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
    parser.add_argument("--part", choices=("vision", "language", "alignment", "all"), default="all")
    parser.add_argument(
        "--start", type=Path, help="go on from this file, with the second schedule only"
    )
    parser.add_argument("--out", type=Path, default=Path("lionjax/data/assets"))
    parser.add_argument(
        "--reader", type=Path, default=Path("runs/tiny_t5_reader.safetensors"),
        help="where the T5 is kept together with what turned facts into vectors",
    )  # fmt: skip
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config, out = get_config(), arguments.out
    start = backbones.load(arguments.start) if arguments.start else None
    arguments.reader.parent.mkdir(parents=True, exist_ok=True)
    vit, figures = out / "tiny_vit.safetensors", {}
    if arguments.part in ("vision", "all"):
        params, figures = backbones.train_vision(
            config, processors.CLIP_MEAN, processors.CLIP_STD, start
        )
        backbones.save(params, "vision", vit)
        (out / "tiny_vit.json").write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.part in ("language", "all"):
        params, said = backbones.train_language(config, start, arguments.reader)
        backbones.save(params, "language", out / "tiny_t5.safetensors")
        (out / "tiny_t5.json").write_text(json.dumps(said, indent=1) + "\n")
    if arguments.part in ("alignment", "all"):
        before = backbones.load(arguments.start if start else vit)["vision"]
        reader = backbones.load(arguments.reader)
        params, near = backbones.align_vision(
            config, processors.CLIP_MEAN, processors.CLIP_STD, before, reader
        )
        backbones.save(params, "vision", vit)
        figures = json.loads((out / "tiny_vit.json").read_text()) | near
        (out / "tiny_vit.json").write_text(json.dumps(figures, indent=1) + "\n")
