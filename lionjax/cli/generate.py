# SPDX-License-Identifier: Apache-2.0
"""`lionjax generate`: answers about an image, or the continuation of a text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lionjax.cli import guide as guide_command
from lionjax.cli.errors import UsageError, positive_int


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax generate`."""
    verb.add_argument("dir", metavar="DIR", type=Path, help="a run folder or a folder of weights")
    image_help = "JPEG, PNG or WebP images; several need --answers; none for a language model alone"
    verb.add_argument("--image", metavar="FILE", nargs="+", help=image_help)
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
    _add_sampling_arguments(verb)
    _add_file_arguments(verb)
    guide_command.add_arguments(verb)


def _add_sampling_arguments(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("sampling", "default: the model's own settings")
    group.add_argument("--temperature", metavar="T", type=float, help="0: greedy; above: sample")
    group.add_argument("--top-p", metavar="P", type=float, help="sample from the likeliest tokens of this probability")
    group.add_argument("--max-tokens", metavar="N", type=positive_int, help="of an answer, at most")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="of sampling (default: 0)")
    group.add_argument("--stream", action="store_true", help="print the text while it is generated; without beams")


def _add_file_arguments(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("many questions", "a run that was stopped goes on where it stood")
    questions_help = "JSON Lines with image, prompt (or --prompt for all) and, if wanted, box, boxes, tags"
    group.add_argument("--questions", metavar="FILE", type=Path, help=questions_help)
    group.add_argument(
        "--images", metavar="DIR", type=Path, help="folder of the images of --questions (default: its own)"
    )
    group.add_argument("--answers", metavar="FILE", type=Path, help="the JSON Lines file to write")


def generate(args: argparse.Namespace) -> None:
    """Run `lionjax generate`."""
    if args.guide is not None:
        guide_command.generate(args)
        return
    guide_command.check_unguided(args)
    _check_files(args)
    if args.answers is not None:
        _answer_file(args)
        return
    from lionjax.data import images
    from lionjax.evaluation.report import plots
    from lionjax.pipelines.question_files import refuse_web_address

    if args.image is None:
        _print_continuation(args)
        return
    image = images.open_image(refuse_web_address(args.image[0]))
    box = None if args.box is None else _parse_box(args.box)
    tags = None
    if args.tagger is not None:
        from lionjax.inference import tagger

        tags = [result.tags for result in tagger.load(args.tagger).tag([image])]
    model = _load(args)
    boxes = None if box is None else [[box]]
    if args.stream:
        answer = _print_stream(model, image, args, boxes, tags)
    else:
        (answer,) = model.answer([image], [args.prompt], boxes=boxes, tags=tags, seed=args.seed)
    masks = () if answer.masks is None else answer.masks
    if args.json:
        tag_field = {} if tags is None else {"tags": list(tags[0])}
        print(json.dumps(_answer_to_json(answer) | tag_field))
    else:
        if answer.regions is not None:
            _print_regions(answer.regions)
        if not args.stream:
            print(answer.text)
        for predicted_box in answer.boxes:
            print("box " + " ".join(f"{edge:.3f}" for edge in predicted_box))
        for mask, phrase in zip(masks, answer.phrases):
            print(f"mask {mask.sum()} pixels {phrase}".rstrip())
    if args.out is not None:
        overlays = [] if box is None else [plots.Overlay(box, color=plots.QUERY_COLOR)]
        overlays += plots.answer_overlays(answer.boxes, masks, answer.phrases)
        plots.save_png(plots.draw_overlays(image, overlays), args.out)


def _check_files(args: argparse.Namespace) -> None:
    """Raise UsageError for options of one question and of many that do not go together."""
    is_many = args.questions is not None or len(args.image or ()) > 1
    if is_many != (args.answers is not None):
        told = "many questions need --answers FILE" if is_many else "--answers is of --questions, or of several images"
        raise UsageError(f"{told}; see `lionjax generate --help`")
    if args.questions is not None and args.image:
        raise UsageError("both --questions and --image were given; give one of them")
    if args.images is not None and args.questions is None:
        raise UsageError("--images is the folder of --questions; give that file too")
    for name in ("box", "out", "stream", "json"):
        if is_many and getattr(args, name):
            raise UsageError(f"--{name} is of one question; leave it out, or ask one")
    if args.stream and args.json:
        raise UsageError("--stream prints text as it comes; leave out --json")


def _load(args: argparse.Namespace):
    """The model with the settings of sampling that were given. Raises UserError for values out of range."""
    import dataclasses

    import lionjax
    from lionjax.core.errors import check_ranges

    check_ranges(args, "--", temperature=">= 0", top_p="> 0 and <= 1")
    model = lionjax.load(args.dir, prompt_length=args.prompt_length, refiner=args.refiner)
    fields = {} if args.max_tokens is None else {"max_new_tokens": args.max_tokens}
    if not fields and args.temperature is None and args.top_p is None:
        return model
    own = model.experiment.generation
    if args.temperature is not None or args.top_p is not None:
        temperature = own.temperature if args.temperature is None else args.temperature
        fields |= {"do_sample": temperature > 0, "temperature": temperature or own.temperature, "num_beams": 1}
        fields |= {} if args.top_p is None else {"top_p": args.top_p}
    experiment = dataclasses.replace(model.experiment, generation=dataclasses.replace(own, **fields))
    return dataclasses.replace(model, experiment=experiment)


def _print_stream(model, image, args: argparse.Namespace, boxes, tags):
    """Print the text as it is generated; returns the answer."""
    import sys

    from lionjax.inference.live import LiveModel
    from lionjax.inference.live_question import LiveConfig, LiveQuestion
    from lionjax.inference.model import build_inputs

    (sample,) = build_inputs([image], [args.prompt], boxes, tags, None)
    with LiveModel(model, LiveConfig(num_slots=1, timeout_seconds=86_400)) as live:
        for event in live.stream(LiveQuestion(sample, seed=args.seed)):
            print(event if isinstance(event, str) else event.rest, end="", flush=True)
    sys.stdout.write("\n")
    return event.answer


def _answer_file(args: argparse.Namespace) -> None:
    """Answer the questions of a file, or one about several images. Raises UserError if some have no answer."""
    import dataclasses

    from lionjax.core.types import UserError
    from lionjax.inference.answer_mesh import model_digest
    from lionjax.pipelines import question_files

    if args.questions is not None:
        rows = question_files.read_questions(args.questions, args.prompt)
        folder = args.images or args.questions.parent
    else:
        rows, folder = [{"image": name, "prompt": args.prompt} for name in args.image], None
    find_tags = None
    if args.tagger is not None:
        from lionjax.inference import tagger

        ram = tagger.load(args.tagger)

        def find_tags(images):
            return [tuple(result.tags) for result in ram.tag(images)]

    model = _load(args)
    settings = {
        "model": model_digest(model.vlm, model.params),
        "generation": dataclasses.asdict(model.experiment.generation),
        "prompt_length": model.processor.config.max_prompt_tokens,
        "tagger": None if args.tagger is None else args.tagger.resolve().name,
        "seed": args.seed,
    }
    num_failed = question_files.answer_file(
        model, rows, args.answers, settings, _answer_to_json, folder, find_tags, args.seed
    )
    print(f"{args.answers} has {len(rows) - num_failed} answers to {len(rows)} questions")
    if num_failed:
        raise UserError(f"{num_failed} questions have no answer; see the field error of their rows in {args.answers}")


def _print_continuation(args: argparse.Namespace) -> None:
    """Print how a language model alone continues the prompt. Raises UserError for a model that reads an image."""
    from lionjax.core.types import UserError

    if args.box is not None or args.out is not None or args.tagger is not None or args.stream:
        raise UserError("--box, --out, --tagger and --stream need an image; give --image FILE")
    model = _load(args)
    if model.vlm.info.reads_images:
        raise UserError(f"the model of {args.dir} reads an image; give --image FILE")
    (found,) = model.complete([args.prompt], seed=args.seed)
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
        "masks": [encode_rle(mask) for mask in (() if answer.masks is None else answer.masks)],
        "phrases": answer.phrases,
    }
