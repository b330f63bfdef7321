# SPDX-License-Identifier: Apache-2.0
"""Pretrains the tiny frozen SAM that ships with the project: `python -m lionjax.tiny.pretrain_sam`."""

import argparse
import json
import logging
from pathlib import Path

from lionjax.models.vision.sam_encoder import TINY_SAM
from lionjax.tiny import sam, schedules
from lionjax.tiny.sam import MasksConfig


def get_config() -> MasksConfig:
    """Sizes and schedule of the tiny SAM."""
    return MasksConfig(TINY_SAM)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("lionjax/data/assets"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    params, figures = sam.train_sam(get_config())
    schedules.save_params(params, "sam", args.out / "tiny_sam.safetensors")
    (args.out / "tiny_sam.json").write_text(json.dumps(figures, indent=1) + "\n")
