# SPDX-License-Identifier: Apache-2.0
"""`lionjax synthesize`: instruction data made by a language model, or by detector and tagger."""

from __future__ import annotations

import argparse
from pathlib import Path

from lionjax.cli.errors import positive_int
from lionjax.cli.language_model import add_language_model_arguments, open_language_model, print_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax synthesize`."""
    kinds = "conversation, detail, reasoning, chain, curation, promptcap or grounded"
    parser.add_argument("kind", metavar="KIND", help=kinds)
    input_help = "JSON Lines of id, image, captions and instances; for promptcap of questions"
    parser.add_argument("input", metavar="FILE", type=Path, help=input_help)
    instances_help = "COCO's instances_SET.json, where FILE is its captions_SET.json"
    parser.add_argument("--instances", metavar="FILE", type=Path, help=instances_help)
    parser.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="instructions.json, refused.jsonl")
    parser.add_argument("--images", metavar="DIR", type=Path, help="image folder, for chain, curation and grounded")
    few_shot_help = "system_message.txt, NNN_caps.txt and NNN_conv.txt instead of our examples, as LLaVA's"
    parser.add_argument("--few-shot", metavar="DIR", type=Path, help=few_shot_help)
    parser.add_argument("--chain-version", default="bc", help="chain: a, c or bc (default: bc)")
    parser.add_argument("--captioner", metavar="DIR", type=Path, help="curation: a model that describes the images")
    review_help = "curation: the choices that review.html saved; without it the page is written"
    parser.add_argument("--review", metavar="FILE", type=Path, help=review_help)
    parser.add_argument(
        "--min-words", metavar="N", type=int, default=80, help="curation: of a description (default: 80)"
    )
    parser.add_argument("--examples", metavar="FILE", type=Path, help="promptcap: solved questions for its filter")
    parser.add_argument("--shots", metavar="N", type=int, default=0, help="promptcap: examples in the filter's prompt")
    parser.add_argument(
        "--samples", metavar="N", type=int, default=10, help="promptcap: captions a question (default: 10)"
    )
    parser.add_argument("--detector", metavar="DIR", type=Path, help="grounded: a folder with Grounding DINO")
    parser.add_argument("--tagger", metavar="DIR", type=Path, help="grounded: RAM, for images without captions")
    parser.add_argument("--limit", metavar="N", type=positive_int, help="maximum number of items")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what is drawn (default: 0)")
    add_language_model_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the number of requests and the first prompt")


def synthesize(args: argparse.Namespace) -> None:
    """Run `lionjax synthesize`. Raises UserError for files and settings that do not fit."""
    from lionjax.pipelines.instructions import generation

    settings = generation.GenerationSettings(
        args.kind, args.chain_version, args.samples, args.shots, args.min_words, args.seed
    )
    items = generation.read_input(settings, args.input, args.limit, args.instances)
    report = _run(args, generation, settings, items)
    if report is None:
        return
    print(f"{report['num_records']} of {report['num_items']} items are in {args.workdir / 'instructions.json'}")
    for reason, count in report["refused"].items():
        print(f"refused {count}: {reason}")


def _run(args: argparse.Namespace, generation, settings, items):
    """The report of a run; None for a dry run."""
    from lionjax.core.errors import UserError
    from lionjax.core.files import make_folder, read_record
    from lionjax.pipelines.instructions.records import REPORT_FILE

    if args.kind == "grounded" and args.detector is None:
        raise UserError("grounded captions need a detector; give --detector DIR")
    make_folder(args.workdir)  # before anything is computed
    there = read_record(args.workdir / REPORT_FILE).get("kind", args.kind)
    if there != args.kind:
        raise UserError(f"{args.workdir} has the records of {there!r:.40}; give each kind a --workdir of its own")
    images = generation.Images(args.images)
    if args.kind == "grounded":
        from lionjax.inference import detector, tagger

        found = detector.load(args.detector).padded_to(32)
        tags = None if args.tagger is None else tagger.load(args.tagger)
        return generation.synthesize_grounded(settings, items, found, tags, args.workdir, images)
    if args.kind == "promptcap":
        if args.dry_run:
            raise UserError("the requests of promptcap follow from its captions; use --limit and --budget instead")
        from lionjax.pipelines.captions_as_text import read_questions

        examples = read_questions(args.examples) if args.examples else []
        model = open_language_model(args, "synthesize")
        return generation.synthesize_promptcap(settings, items, examples, model, args.workdir)
    from lionjax.pipelines.instructions.few_shot import read_few_shot

    few_shot = None if args.few_shot is None else read_few_shot(args.few_shot)
    if args.dry_run:
        print_plan(args, generation.build_requests(settings, items, few_shot), "synthesize")
        return None
    model, captioner = open_language_model(args, "synthesize"), None
    if args.captioner is not None:
        import lionjax

        captioner = lionjax.load(args.captioner)
    return generation.synthesize(settings, items, model, args.workdir, images, few_shot, captioner, args.review)
