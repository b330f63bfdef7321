# SPDX-License-Identifier: Apache-2.0
"""The small frozen backbones that ship with the project. `python -m lionjax.tiny.pretrain` makes them anew."""

import argparse
import json
import logging
from pathlib import Path

import numpy as np

from lionjax.data import processor
from lionjax.models.heads.region import RegionHeadConfig
from lionjax.models.language.decoder import TINY_DECODER
from lionjax.models.language.t5 import TINY_T5
from lionjax.models.vision.vit import TINY_VIT
from lionjax.tiny import boxes, schedules, vision
from lionjax.tiny import language as language_backbone
from lionjax.tiny.schedules import BackbonesConfig, LanguageSchedule


def get_config() -> BackbonesConfig:
    """Sizes and schedule."""
    return BackbonesConfig(vision=TINY_VIT, language=TINY_T5)


# The decoder is told as the T5 was, which is not to change: a ViT is aligned with it. Muon leaves the plateau that
# small language models begin with where AdamW stays on it.
DECODER_BACKBONES = BackbonesConfig(
    vision=TINY_VIT,
    language=TINY_DECODER,
    num_scenes=20_000,
    language_schedules=(
        LanguageSchedule(
            5_000, 4e-3, tag_fraction=0.05, no_scene_fraction=0.03, freeze_embeddings=True, optimizer="muon"
        ),
        *[
            LanguageSchedule(
                1_500,
                2e-3,
                patch_fraction=0.4,
                tag_fraction=0.05,
                no_scene_fraction=0.03,
                freeze_embeddings=True,
                optimizer="muon",
            )
        ]
        * 3,
    ),
)


# Boxes as embeddings: two words that the tokenizer has for them, and heads of the flagship's size.
BOX_HEADS = RegionHeadConfig(
    trigger_token_id=19,
    box_token_id=20,
    box_mlp_dim=256,
    giou_weight=0.8,  # the paper's
    cycle_weight=0.1,  # the frozen T5's states cannot come to meet the boxes' embeddings
    num_mask_prompt_tokens=2,
    max_boxes=6,
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--part", choices=("vision", "language", "alignment", "places", "decoder", "all"), default="all"
    )
    parser.add_argument("--again", action="store_true", help="go on from the files in --out")
    parser.add_argument("--out", type=Path, default=Path("lionjax/data/assets"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config, out = get_config(), arguments.out
    vit, t5, told = (out / f"tiny_{name}.safetensors" for name in ("vit", "t5", "told"))
    if arguments.part in ("vision", "all"):
        start = schedules.load_params(vit) if arguments.again else None
        params, figures = vision.train_vision(config, processor.CLIP_MEAN, processor.CLIP_STD, start)
        schedules.save_params(params, "vision", vit)
        (out / "tiny_vit.json").write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.part in ("language", "all"):
        start = schedules.load_params(t5) | schedules.load_params(told) if arguments.again else None
        params, said = language_backbone.train_language(
            config, start, out / "tiny_t5_partial.safetensors", arguments.again
        )
        schedules.save_params(params.pop("language"), "language", t5)
        schedules.save_params(params, "told", told)
        (out / "tiny_t5.json").write_text(json.dumps(said, indent=1) + "\n")
    if arguments.part in ("alignment", "all"):
        before, reader = schedules.load_params(vit)["vision"], schedules.load_params(t5) | schedules.load_params(told)
        params, near = vision.align_vision(config, processor.CLIP_MEAN, processor.CLIP_STD, before, reader)
        schedules.save_params(params, "vision", vit)
        figures = json.loads((out / "tiny_vit.json").read_text()) | near
        (out / "tiny_vit.json").write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.part in ("places", "all"):
        reader = schedules.load_params(t5) | schedules.load_params(told)
        params, word, figures = boxes.train_box_heads(config, boxes.BoxHeadsSchedule(), BOX_HEADS, reader)
        schedules.save_params(params, "locations", out / "tiny_places.safetensors")
        language = schedules.load_params(t5)["language"]
        language["embedding"]["table"][BOX_HEADS.trigger_token_id] = word
        schedules.save_params(language, "language", t5)
        (out / "tiny_places.json").write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.part in ("decoder", "all"):
        partial = out / "tiny_decoder_partial.safetensors"
        words = {"embedding": schedules.load_params(t5)["language"]["embedding"]}
        start = schedules.load_params(told) | {"language": words}
        if arguments.again:
            start = schedules.load_params(partial)
        params, said = language_backbone.train_language(DECODER_BACKBONES, start, partial, arguments.again)
        del params["language"]["embedding"]  # the T5's
        schedules.save_params(params["language"], "language", out / "tiny_decoder.safetensors", np.float16)
        (out / "tiny_decoder.json").write_text(json.dumps(said, indent=1) + "\n")
