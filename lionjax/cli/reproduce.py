# SPDX-License-Identifier: Apache-2.0
"""`lionjax reproduce`: are these the released weights, do they compute the same as in transformers, and which figures
do they reach on the paper's benchmarks."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUESTIONS = ("What is in the picture?", "Where is the red one?", "How many are there?")
NEW_TOKENS = 8  # of each answer that is compared with transformers
MAX_LOGPROB_DIFFERENCE = 1e-3  # nats; float32 rounding is about 1e-5


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax reproduce`."""
    names = "llava-1.5, blip2, instructblip, kosmos2, shikra, lion, nextchat, sam or ram"
    verb.add_argument("name", metavar="NAME", help=names)
    verb.add_argument("--weights", metavar="DIR", type=Path, required=True, help="the folder of the released weights")
    verb.add_argument("--data", metavar="ROOT", type=Path, required=True, help="a folder with the benchmarks' files")
    verb.add_argument(
        "--images", metavar="DIR", default="", help="the benchmarks' pictures (default: found under ROOT)"
    )
    verb.add_argument("--benchmark", metavar="NAME", default="", help="only this one of the paper's benchmarks")
    verb.add_argument("--limit", metavar="N", type=int, help="the first N questions of each benchmark")
    verb.add_argument("--digests", metavar="FILE", type=Path, help="lines of sha256sum for the released files")
    verb.add_argument("--no-comparison", action="store_true", help="do not run transformers, which needs more memory")
    verb.add_argument("--out", metavar="DIR", type=Path, help="write answers and results to this folder")
    verb.add_argument("--json", action="store_true", help="print everything as JSON")


def reproduce(args: argparse.Namespace) -> None:
    """Check the files, compare with transformers, and print our figures beside the paper's.

    Raises UserError for weights of another system, where the computation differs from transformers, and if none of the
    paper's benchmarks is found; what was found out before is printed.
    """
    from lionjax.convert import released_files
    from lionjax.core.types import UserError

    name = args.name.lower().replace("llava15", "llava-1.5").replace("kosmos-2", "kosmos2").replace("blip-2", "blip2")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; give an integer above 0")
    digests = {} if args.digests is None else released_files.read_digests(args.digests)
    files = released_files.check_files(name, args.weights, digests)
    benchmarks = _find_benchmarks(name, args)  # before hours of computation
    report: dict[str, Any] = {"system": name, "files": dataclasses.asdict(files) | {"released": files.is_released}}
    show = (lambda text: None) if args.json else print
    show(files)
    compared = {} if args.no_comparison else _compare(name, args.weights, show)
    report |= {"comparison": compared} | _figures(name, args, benchmarks, show)
    if args.json:
        print(json.dumps(report, indent=1))
    if args.out is not None:
        from lionjax.core.files import write_json

        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "reproduction.json", report)
    if any(part.get("equal") is False for part in compared.values()):
        raise UserError(f"the weights of {args.weights} compute something else than in transformers; see above")


def _find_benchmarks(name: str, args: argparse.Namespace) -> list[Any]:
    """The benchmarks, for RAM the folders of tags, under --data. Raises UserError if there is none."""
    from lionjax.core.types import UserError
    from lionjax.evaluation import experts
    from lionjax.evaluation.published import discovery, reproduction

    if not args.data.is_dir():
        raise UserError(f"there is no folder {args.data}; give a folder with the benchmarks' files")
    if name == "ram":
        if not (found := experts.find_tag_sets(args.data)):
            raise UserError(
                f"no NAME_ram_taglist.txt with NAME_ram_annots.txt was found under {args.data}; give RAM's folder "
                "openimages_common_214 with its pictures in imgs"
            )
        return found
    if name == "sam":
        entries = discovery.find_benchmarks(args.data, args.images)[0]
        if not (found := [entry for entry in entries if entry.name == "res"]):
            raise UserError(f"no masks of refer (refs(unc).p and instances.json) were found under {args.data}")
        return found
    return reproduction.find_paper_benchmarks(name, args.data, args.images, args.benchmark)


def _compare(name: str, folder: Path, show: Any) -> dict[str, Any]:
    """{"modules", "ids"}: our computation beside that of transformers, each with `equal` or the reason why not."""
    from lionjax import convert
    from lionjax.convert.released_files import weights_path
    from lionjax.convert.verify import compare
    from lionjax.core.types import UserError

    found: dict[str, Any] = {}
    try:
        report = compare.verify(*convert.from_torch(weights_path(folder)), folder)
    except UserError as error:
        found["modules"] = {"equal": None, "reason": str(error)}
        show(f"modules: not compared: {error}")
    else:
        worst = max(diff.relative_diff for diff in report.module_diffs)
        found["modules"] = {"equal": report.all_close, "compared": len(report.module_diffs), "worst": worst}
        show(f"modules: {len(report.module_diffs)} compared with transformers, largest relative difference {worst:.1e}")
        if not report.all_close:
            show(report)
    if name not in ("sam", "ram"):
        found["ids"] = _compare_ids(folder, show)
    return found


def _compare_ids(folder: Path, show: Any) -> dict[str, Any]:
    """Whether our greedy answers have the ids and log-probabilities of transformers', prompt by prompt."""
    import numpy as np

    import lionjax
    from lionjax.convert.formats import detect
    from lionjax.convert.verify import generated_ids
    from lionjax.core.sharding import MeshConfig
    from lionjax.core.types import UserError

    format_name = detect.open_checkpoint(folder).checkpoint_format.name
    template = generated_ids.PROMPTS.get(format_name)
    try:
        if template is None or not (folder / "config.json").is_file():
            raise UserError(f"transformers has no class for these files of a {format_name}")
        model = lionjax.load(folder, MeshConfig())  # with a mesh, weights are not cast to bfloat16
        prompts = [template.format(question=question) for question in QUESTIONS]
        images = _drawn_images(len(prompts), model.processor.config.image_size)
        theirs = generated_ids.transformers_answers(folder, images, prompts, NEW_TOKENS)
    except UserError as error:
        show(f"ids: not compared: {error}")
        return {"equal": None, "reason": str(error)}
    fields = {"max_new_tokens": NEW_TOKENS, "num_beams": 1, "do_sample": False, "repetition_penalty": 1.0}
    fields |= {"length_penalty": 1.0, "min_length": 0, "output_logprobs": True}
    config = dataclasses.replace(model.generation_config("image_level"), **fields)
    ours = model.answer(images, prompts, generation_config=config)
    same = [answer.token_ids == other.ids for answer, other in zip(ours, theirs)]
    pairs = [(mine.token_log_probs, other.logprobs) for mine, other, equal in zip(ours, theirs, same) if equal]
    worst = max((float(np.abs(np.array(mine) - other).max()) for mine, other in pairs), default=float("inf"))
    show(f"ids: {sum(same)} of {len(same)} answers equal to transformers', log-probabilities within {worst:.1e}")
    return {"equal": all(same) and worst <= MAX_LOGPROB_DIFFERENCE, "same": same, "worst_logprob": worst}


def _drawn_images(count: int, side: int) -> list[Any]:
    """Square pictures of colored rectangles, the same each time; of the model's size, so that no resizing differs."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng, drawn = np.random.default_rng(0), []
    for _ in range(count):
        image = Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3).tolist()))
        draw = ImageDraw.Draw(image)
        for _ in range(4):
            x, y, width, height = (rng.uniform(0.1, 0.5, 4) * side).tolist()
            draw.rectangle((x, y, x + width, y + height), tuple(rng.integers(0, 256, 3).tolist()))
        drawn.append(image)
    return drawn


def _figures(name: str, args: argparse.Namespace, benchmarks: Sequence[Any], show: Any) -> dict[str, Any]:
    """{"figures", "left_out"} of the benchmarks, printed as a table."""
    if name in ("sam", "ram"):
        return _expert_figures(name, args, benchmarks, show)
    import lionjax
    from lionjax.evaluation.published import reproduction

    model = lionjax.load(args.weights)
    figures, left_out = reproduction.reproduce_figures(name, model, benchmarks, args.limit, args.out)
    for figure in figures:
        value = "to be judged" if figure.value is None else f"{figure.value:.4f}"
        interval = " ({:.4f} to {:.4f})".format(*figure.interval) if figure.interval else ""
        show(f"{figure.label}, protocol {figure.protocol}: {figure.name} {value}{interval}, {figure.answered} answers")
        show("  " + ("; ".join(figure.papers) or "the paper has no figure under this protocol here"))
        if figure.note:
            show(f"  {figure.note}")
    for label, reason in left_out.items():
        show(f"{label} is left out: {reason}")
    return {"figures": [dataclasses.asdict(figure) for figure in figures], "left_out": left_out}


def _expert_figures(name: str, args: argparse.Namespace, found: Sequence[Any], show: Any) -> dict[str, Any]:
    """The figures of SAM or RAM, whose papers' own are not kept here."""
    from lionjax.evaluation import experts
    from lionjax.evaluation.published import scoring

    figures: list[dict[str, Any]] = []
    for entry in found:
        if name == "sam":
            from lionjax.inference import segmenter

            dataset = scoring.open_benchmark("res", entry.source, "heldout")
            scores, label = experts.box_prompt_scores(segmenter.load(args.weights), dataset, args.limit), entry.label
        else:
            from lionjax.inference import tagger

            scores, label = (
                experts.tagging_scores(tagger.load(args.weights), entry, args.images, args.limit),
                entry.name,
            )
        figures.append({"label": label, **scores})
        show(
            f"{label}: "
            + ", ".join(
                f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in scores.items()
            )
        )
    note = {
        "sam": "SAM's paper has no figure for true boxes (its mask AP of 46.5 on COCO is for boxes of ViTDet-H)",
        "ram": "compare with table 3 of RAM's paper (arXiv 2306.03514), whose figures are not kept here",
    }[name]
    show(f"  {note}")
    return {"figures": figures, "left_out": {}, "note": note}
