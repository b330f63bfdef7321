# SPDX-License-Identifier: Apache-2.0
"""The small frozen backbones that ship with the project. `python configs/tiny_backbones.py` makes them anew."""

import argparse
import json
import logging
from pathlib import Path

from lionjax.data import processors
from lionjax.heads import PlaceConfig
from lionjax.language.t5 import TINY_T5
from lionjax.training import backbones, language_backbone, place_backbone, vision_backbone
from lionjax.training.backbones import BackbonesConfig
from lionjax.vision.vit import TINY_VIT


def get_config() -> BackbonesConfig:
    """Sizes and schedule."""
    return BackbonesConfig(vision=TINY_VIT, language=TINY_T5)


# Boxes as embeddings: two words that the tokenizer has for them, and heads of the flagship's size.
PLACES = PlaceConfig(
    trigger_token=19,
    location_token=20,
    location_hidden=256,
    giou_weight=0.8,  # the paper's
    cycle_weight=0.1,  # the frozen T5's states cannot come to meet the boxes' embeddings
    mask_tokens=2,
    max_boxes=6,
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--part", choices=("vision", "language", "alignment", "places", "all"), default="all"
    )
    parser.add_argument("--again", action="store_true", help="go on from the files in --out")
    parser.add_argument("--out", type=Path, default=Path("lionjax/data/assets"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config, out = get_config(), arguments.out
    vit, t5, told = (out / f"tiny_{name}.safetensors" for name in ("vit", "t5", "told"))
    if arguments.part in ("vision", "all"):
        start = backbones.load(vit) if arguments.again else None
        params, figures = vision_backbone.train_vision(
            config, processors.CLIP_MEAN, processors.CLIP_STD, start
        )
        backbones.save(params, "vision", vit)
        (out / "tiny_vit.json").write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.part in ("language", "all"):
        start = backbones.load(t5) | backbones.load(told) if arguments.again else None
        params, said = language_backbone.train_language(
            config, start, keep=out / "tiny_t5_partial.safetensors"
        )
        backbones.save(params.pop("language"), "language", t5)
        backbones.save(params, "told", told)
        (out / "tiny_t5.json").write_text(json.dumps(said, indent=1) + "\n")
    if arguments.part in ("alignment", "all"):
        before, reader = backbones.load(vit)["vision"], backbones.load(t5) | backbones.load(told)
        params, near = vision_backbone.align_vision(
            config, processors.CLIP_MEAN, processors.CLIP_STD, before, reader
        )
        backbones.save(params, "vision", vit)
        figures = json.loads((out / "tiny_vit.json").read_text()) | near
        (out / "tiny_vit.json").write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.part in ("places", "all"):
        reader = backbones.load(t5) | backbones.load(told)
        params, word, figures = place_backbone.train_places(
            config, place_backbone.PlacesSchedule(), PLACES, reader
        )
        backbones.save(params, "locations", out / "tiny_places.safetensors")
        language = backbones.load(t5)["language"]
        language["embedding"]["table"][PLACES.trigger_token] = word
        backbones.save(language, "language", t5)
        (out / "tiny_places.json").write_text(json.dumps(figures, indent=1) + "\n")
