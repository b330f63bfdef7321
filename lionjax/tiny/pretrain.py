# SPDX-License-Identifier: Apache-2.0
"""Pretrains the tiny frozen backbones that ship with the project: `python -m lionjax.tiny.pretrain`."""

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
from lionjax.tiny import boxes, language, schedules, vision
from lionjax.tiny.schedules import BackbonesConfig, LanguageSchedule


def get_config() -> BackbonesConfig:
    """Sizes and schedules of the tiny ViT and the tiny T5."""
    return BackbonesConfig(vision=TINY_VIT, language=TINY_T5)


# The decoder uses the T5's embeddings, which are frozen because the ViT is aligned with them. With Muon the loss leaves
# its initial plateau; with AdamW it does not.
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


# Boxes as embeddings, with two special tokens of the tokenizer; sizes as in the configs tiny_lionjax*.
BOX_HEADS = RegionHeadConfig(
    trigger_token_id=19,
    box_token_id=20,
    box_mlp_dim=256,
    giou_weight=0.8,  # as in the paper
    cycle_weight=0.1,  # low, because the frozen T5's states cannot adapt to the box embeddings
    num_mask_prompt_tokens=2,
    max_boxes=6,
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("vision", "language", "queries", "alignment", "places", "decoder", "all")
    parser.add_argument("--part", choices=parts, default="all")
    parser.add_argument("--again", action="store_true", help="continue from the files in --out")
    parser.add_argument("--out", type=Path, default=Path("lionjax/data/assets"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config, out = get_config(), args.out
    vit, t5, told = (out / f"tiny_{name}.safetensors" for name in ("vit", "t5", "told"))
    if args.part in ("vision", "all"):
        init_params = schedules.load_params(vit) if args.again else None
        params, figures = vision.train_vision(config, processor.CLIP_MEAN, processor.CLIP_STD, init_params)
        schedules.save_params(params, "vision", vit)
        (out / "tiny_vit.json").write_text(json.dumps(figures, indent=1) + "\n")
    if args.part in ("language", "all"):
        init_params = schedules.load_params(t5) | schedules.load_params(told) if args.again else None
        partial = out / "tiny_t5_partial.safetensors"
        params, figures = language.train_language(config, init_params, partial, args.again)
        schedules.save_params(params.pop("language"), "language", t5)
        schedules.save_params(params, "told", told)
        (out / "tiny_t5.json").write_text(json.dumps(figures, indent=1) + "\n")
    if args.part in ("queries", "all"):
        table = schedules.load_params(t5)["language"]["embedding"]["table"]
        queries = language.word_queries(table, processor.Processor(processor.ProcessorConfig(TINY_VIT.image_size)))
        schedules.save_params({"queries": queries}, "qformer", out / "tiny_queries.safetensors", np.float16)
    if args.part in ("alignment", "all"):
        vision_params = schedules.load_params(vit)["vision"]
        reader_params = schedules.load_params(t5) | schedules.load_params(told)
        params, errors = vision.align_vision(
            config, processor.CLIP_MEAN, processor.CLIP_STD, vision_params, reader_params
        )
        schedules.save_params(params, "vision", vit)
        figures = json.loads((out / "tiny_vit.json").read_text()) | errors
        (out / "tiny_vit.json").write_text(json.dumps(figures, indent=1) + "\n")
    if args.part in ("places", "all"):
        reader_params = schedules.load_params(t5) | schedules.load_params(told)
        params, trigger, figures = boxes.train_box_heads(config, boxes.BoxHeadsSchedule(), BOX_HEADS, reader_params)
        schedules.save_params(params, "locations", out / "tiny_places.safetensors")
        t5_params = schedules.load_params(t5)["language"]
        t5_params["embedding"]["table"][BOX_HEADS.trigger_token_id] = trigger
        schedules.save_params(t5_params, "language", t5)
        (out / "tiny_places.json").write_text(json.dumps(figures, indent=1) + "\n")
    if args.part in ("decoder", "all"):
        partial = out / "tiny_decoder_partial.safetensors"
        embedding = {"embedding": schedules.load_params(t5)["language"]["embedding"]}
        init_params = schedules.load_params(told) | {"language": embedding}
        if args.again:
            init_params = schedules.load_params(partial)
        params, figures = language.train_language(DECODER_BACKBONES, init_params, partial, args.again)
        del params["language"]["embedding"]  # shared with the T5
        schedules.save_params(params["language"], "language", out / "tiny_decoder.safetensors", np.float16)
        (out / "tiny_decoder.json").write_text(json.dumps(figures, indent=1) + "\n")
