# SPDX-License-Identifier: Apache-2.0
"""`lionjax generate`: answers about an image, or the continuation of a text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lionjax.cli import guide as guide_command
from lionjax.cli.errors import positive_int


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax generate`."""
    verb.add_argument("dir", metavar="DIR", type=Path, help="a run folder or a folder of weights")
    verb.add_argument("--image", metavar="FILE", help="a JPEG, PNG or WebP image; none for a language model alone")
    prompt_help = "the question or instruction; with --guide what the caption begins with"
    verb.add_argument("--prompt", metavar="TEXT", help=prompt_help)
    verb.add_argument("--box", metavar="X0,Y0,X1,Y1", help="the box that the prompt refers to, in 0..1")
    verb.add_argument("--tagger", metavar="DIR", type=Path, help="a folder with RAM, to tag the image")
    refiner_help = "a refiner's folder, for a model that reads regions (default: the one in the model's folder)"
    verb.add_argument("--refiner", metavar="DIR", type=Path, help=refiner_help)
    prompt_length_help = "maximum prompt length in tokens (default: as in training)"
    verb.add_argument("--prompt-length", metavar="N", type=positive_int, help=prompt_length_help)
    verb.add_argument("--json", action="store_true", help="print text, boxes and masks as JSON")
    verb.add_argument("--out", metavar="PNG", type=Path, help="write the image with boxes and masks to this file")
    guide_command.add_arguments(verb)


def generate(args: argparse.Namespace) -> None:
    """Run `lionjax generate`."""
    if args.guide is not None:
        guide_command.generate(args)
        return
    guide_command.check_unguided(args)
    import lionjax
    from lionjax.data import images
    from lionjax.evaluation.report import plots

    if args.image is None:
        _print_continuation(args)
        return
    image = images.open_image(args.image)
    box = None if args.box is None else _parse_box(args.box)
    tags = None
    if args.tagger is not None:
        from lionjax.inference import tagger

        tags = [result.tags for result in tagger.load(args.tagger).tag([image])]
    model = lionjax.load(args.dir, prompt_length=args.prompt_length, refiner=args.refiner)
    boxes = None if box is None else [[box]]
    (answer,) = model.answer([image], [args.prompt], boxes=boxes, tags=tags)
    if args.json:
        tag_field = {} if tags is None else {"tags": list(tags[0])}
        print(json.dumps(_answer_to_json(answer) | tag_field))
    else:
        if answer.regions is not None:
            _print_regions(answer.regions)
        print(answer.text)
        for predicted_box in answer.boxes:
            print("box " + " ".join(f"{edge:.3f}" for edge in predicted_box))
    if args.out is not None:
        overlays = [] if box is None else [plots.Overlay(box, color=plots.QUERY_COLOR)]
        overlays += [plots.Overlay(predicted_box, color=plots.PREDICTION_COLOR) for predicted_box in answer.boxes]
        overlays += [plots.Overlay(mask=mask, color=plots.PREDICTION_COLOR) for mask in answer.masks]
        plots.save_png(plots.draw_overlays(image, overlays), args.out)


def _print_continuation(args: argparse.Namespace) -> None:
    """Print how a language model alone continues the prompt. Raises UserError for a model that reads an image."""
    import lionjax
    from lionjax.core.types import UserError

    if args.box is not None or args.out is not None or args.tagger is not None:
        raise UserError("--box, --out and --tagger need an image; give --image FILE")
    model = lionjax.load(args.dir, prompt_length=args.prompt_length)
    if model.vlm.info.reads_images:
        raise UserError(f"the model of {args.dir} reads an image; give --image FILE")
    (found,) = model.complete([args.prompt])
    print(json.dumps({"text": found.text}) if args.json else found.text)


def _print_regions(found) -> None:
    """Print what a refiner found: tags, boxes with score and name, and spatial text."""
    print(f"tags {' | '.join(found.tags)}")
    for name, score, box in zip(found.names, found.scores, found.boxes):
        print(f"region {score:.3f} " + " ".join(f"{edge:.3f}" for edge in box) + f" {name}")
    print(f"spatial text{found.spatial_text}")


def _parse_box(text: str) -> tuple[float, float, float, float]:
    """A box "X0,Y0,X1,Y1" in 0..1. Raises UserError for anything else."""
    from lionjax.data import images

    return images.normalize_box(text.split(","), name="--box")


def _answer_to_json(answer) -> dict:
    """An answer for JSON: masks as COCO's compressed run lengths."""
    import numpy as np

    from lionjax.data.rle import encode_rle

    found = answer.regions
    seen = {} if found is None else {"refined": json.loads(found.to_json()) | {"spatial_text": found.spatial_text}}
    return seen | {
        "text": answer.text,
        "boxes": np.asarray(answer.boxes, float).reshape(-1, 4).tolist(),
        "masks": [encode_rle(mask) for mask in answer.masks],
    }
