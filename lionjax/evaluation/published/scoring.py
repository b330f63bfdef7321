# SPDX-License-Identifier: Apache-2.0
"""Score the answers that some model gave to a published benchmark: `lionjax evaluate --predictions`.

`BENCHMARKS` says of each one which examples it has and how they are scored; the figures have the names of the
benchmarks' own scorers and are not rounded.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lionjax.core import config
from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation
from lionjax.data.datasets.caption_references import CaptionReferences
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.detect import detect_source
from lionjax.data.datasets.question_file import NO_ANSWERS
from lionjax.data.datasets.reason_seg import image_size
from lionjax.data.datasets.source import open_split
from lionjax.data.images import MAX_PIXELS
from lionjax.data.scenes.tasks import POPE_SETTINGS
from lionjax.evaluation.protocols import Protocol, get_protocol
from lionjax.evaluation.published import closed_answers, open_answers, region_answers
from lionjax.evaluation.published.predictions import AnsweredQuestion, Answers, join_answers
from lionjax.evaluation.published_figures import published_figures
from lionjax.evaluation.submissions import write_submission

log = logging.getLogger(__name__)

JUDGED = ("llava_bench", "owleval")
MAX_LISTED = 20  # missing pictures that are named


def _always(annotation: Annotation) -> bool:
    return True


def _has_text_options(annotation: Annotation) -> bool:
    return annotation.kind == "choose_txt"


def _has_phrases(annotation: Annotation) -> bool:
    return bool(annotation.facts.get("phrases"))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A published benchmark: the tasks of its examples, its scorer, and its main figure.

    `figure`: the path of the main figure among the figures, by protocol or for all of them (""); "*" is any key.
    `wanted`: which of the examples belong to it. `needs_sizes`: boxes or masks are in pixels of the images.
    """

    tasks: tuple[str, ...]
    score: Callable[[list[AnsweredQuestion], Protocol], dict[str, Any]]
    figure: Mapping[str, str]
    wanted: Callable[[Annotation], bool] = _always
    needs_sizes: bool = False


CAPTIONS = Benchmark(("caption",), open_answers.score_captions, {"": "CIDEr"})
VQA = Benchmark(("vqa",), open_answers.score_vqa, {"": "overall"})
EVALAI = Benchmark(("vqa",), open_answers.score_evalai, {"": "accuracy"})
MASKS = Benchmark(("res",), region_answers.score_masks, {"": "giou"}, needs_sizes=True)
BENCHMARKS: Mapping[str, Benchmark] = {
    "coco_karpathy": CAPTIONS,
    "flickr30k": CAPTIONS,
    "textcaps": CAPTIONS,
    "nocaps": Benchmark(("caption",), open_answers.score_captions, {"": "entire.CIDEr"}),
    "vqav2": VQA,
    "okvqa": VQA,
    "aokvqa": Benchmark(
        ("vqa",),
        open_answers.score_aokvqa,
        {"": "direct_answer", **dict.fromkeys(("lavis", "lion"), "direct_answer_all_as_lavis")},
    ),
    "gqa": Benchmark(
        ("vqa",),
        open_answers.score_gqa,
        {"": "official_exact", "lmms": "lmms_ignore_case_and_punctuation"}
        | dict.fromkeys(("lavis", "lion"), "lavis_normalised"),
    ),
    "iconqa": Benchmark(("choice",), closed_answers.score_iconqa, {"": "accuracy"}, _has_text_options),
    "vsr": Benchmark(("relation",), closed_answers.score_vsr, {"": "accuracy"}),
    "visdial": Benchmark(("conversation",), closed_answers.score_visdial, {"": "mrr"}),
    "vizwiz": EVALAI,
    "textvqa": EVALAI,
    "ocrvqa": Benchmark(("vqa",), open_answers.score_ocrvqa, {"": "accuracy"}),
    "docvqa": Benchmark(("vqa",), open_answers.score_docvqa, {"": "anls"}),
    "scienceqa": Benchmark(("choice",), closed_answers.score_scienceqa, {"": "accuracy"}),
    "hateful_memes": Benchmark(("vqa",), closed_answers.score_hateful_memes, {"": "auroc"}),
    "rec": Benchmark(("rec",), region_answers.score_rec, {"": "*.accuracy"}, needs_sizes=True),
    "res": dataclasses.replace(MASKS, figure={"": "ciou"}),
    "reason_seg": MASKS,
    "flickr30k_entities": Benchmark(("grounded",), region_answers.score_entities, {"": "any.1.all"}, _has_phrases),
    "reg": Benchmark(("reg", "caption"), region_answers.score_reg, {"": "CIDEr"}),
    "pope": Benchmark(("existence",), closed_answers.score_pope, {"": "f1_score"}),
    "mme": Benchmark(("vqa",), closed_answers.score_mme, {"": "perception"}),
    "mmbench": Benchmark(("choice",), closed_answers.score_mmbench, {"": "circular_lmms_static.overall"}),
    "seed": Benchmark(("choice",), closed_answers.score_seed, {"": "all"}),
    "llava_bench": Benchmark(("conversation",), region_answers.score_llava_bench, {"": "table.0.ratio"}),
    "owleval": Benchmark(("conversation",), region_answers.score_owl_eval, {"": "A_or_B"}),
}
ALIASES = {"coco": "coco_karpathy", "owl_eval": "owleval", "seed_bench": "seed", "entities": "flickr30k_entities"}
ALIASES |= {f"pope_{setting}": "pope" for setting in ("random", "popular", "adversarial")}
ALIASES |= dict.fromkeys(("refcoco", "refcoco+", "refcocog"), "rec")


def benchmark_name(text: str) -> str:
    """The name of a benchmark: "vqa/okvqa" is okvqa, "pope_random" pope. Raises UserError for an unknown one."""
    name = text.rpartition("/")[2].lower()
    name = ALIASES.get(name, name)
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {text!r} with answers to score; choose one of {', '.join(BENCHMARKS)}")
    return name


def whole_source(name: str, source: Any, path: str) -> Any:
    """The source of a benchmark's file with all of its questions and, of COCO's captions, their ids."""
    if isinstance(source, Coco) and "caption" in BENCHMARKS[name].tasks:
        return CaptionReferences(path, str(Path(source.folder) / source.image_dir), name=source.name)
    has_fraction = any(field.name == "heldout_fraction" for field in dataclasses.fields(source))
    return dataclasses.replace(source, heldout_fraction=0.0) if has_fraction else source


def open_benchmark(name: str, source: Any, split: str) -> AnnotatedImages:
    """The examples of a benchmark's source. Raises UserError for a source without any of its tasks."""
    dataset = open_split(source, split, MAX_PIXELS)
    if not isinstance(dataset, AnnotatedImages) or not any(
        task in dataset.task_sizes for task in BENCHMARKS[name].tasks
    ):
        tasks, found = " or ".join(BENCHMARKS[name].tasks), ", ".join(dataset.task_sizes)
        raise UserError(
            f"{name} wants questions of the task {tasks}, but {source.name} has {found}; give its own files"
        )
    return dataset


def score_predictions(
    benchmark: str,
    source_path: str,
    predictions: str,
    protocol_name: str = "",
    image_dir: str = "",
    answers_file: str = "",
    split: str = "heldout",
    fields: Sequence[str] = (),
    submission: str = "",
) -> dict[str, Any]:
    """The result of scoring a file of answers: figures, protocol, published figures, and what is missing.

    `image_dir`: the benchmark's pictures; where it is given, missing ones are counted and warned of once. `fields`:
    overrides of the source's fields. `submission`: a file to write for the benchmark's server; a test split, whose
    answers are not public, then has no figures. Raises UserError for files that do not fit together.
    """
    name = benchmark_name(benchmark)
    protocol = get_protocol(name, protocol_name)
    if name == "pope" and Path(source_path).is_dir():
        return score_pope_settings(Path(source_path), Path(predictions), protocol_name, image_dir, split)
    source = whole_source(name, detect_source(source_path, image_dir, answers_file, bool(submission)), source_path)
    source = config.apply_overrides(source, list(fields))
    dataset = open_benchmark(name, source, split)
    answers = join_answers(dataset, BENCHMARKS[name].tasks, source_path, Path(predictions), BENCHMARKS[name].wanted)
    has_truth = any(is_public(row, name) for row in answers.rows)
    if not has_truth and not submission:
        raise UserError(f"{source_path} has no public answers; write a file for its server with --submission")
    entry = score_answers(name, protocol, dataset, answers, has_truth)
    files = {"source": source_path, "predictions": predictions, "split": split}
    if submission:
        write_submission(name, Path(submission), protocol, dataset, answers, source)
        files["submission"] = submission
    missing = missing_pictures(dataset, image_dir) if image_dir else []
    return entry | files | {"missing_pictures": {"count": len(missing), "names": missing[:MAX_LISTED]}}


def score_pope_settings(
    folder: Path, predictions: Path, protocol_name: str, image_dir: str, split: str
) -> dict[str, Any]:
    """POPE's figures of the settings random, popular and adversarial, and their mean, as papers report F1.

    Both folders have one file for each setting, with its name in theirs. Raises UserError for none or several.
    """
    entries = {}
    for setting in POPE_SETTINGS:
        files = [_only_file(place, setting) for place in (folder, predictions)]
        entries[setting] = score_predictions("pope", *map(str, files), protocol_name, image_dir, split=split)
    figures = {setting: entry["figures"] for setting, entry in entries.items()}
    mean = {key: sum(values[key] for values in figures.values()) / len(figures) for key in figures[POPE_SETTINGS[0]]}
    summed = {key: sum(entry[key] for entry in entries.values()) for key in ("questions", "answered", "bad_questions")}
    whole = entries[POPE_SETTINGS[0]] | summed | {"figures": figures | {"mean": mean}}
    whole |= {"main_figure": {"name": "mean.f1_score", "value": mean["f1_score"]}}
    return whole | {"source": str(folder), "predictions": str(predictions)}


def _only_file(folder: Path, setting: str) -> Path:
    files = [path for path in sorted(folder.glob(f"*{setting}*")) if path.suffix in (".json", ".jsonl")]
    if len(files) != 1:
        raise UserError(f"{folder} has {len(files)} files of POPE's setting {setting!r}; give a folder with one")
    return files[0]


def is_public(row: AnsweredQuestion, name: str) -> bool:
    """Whether the truth of a question is known; judged answers need none."""
    return row.annotation.answers != NO_ANSWERS or name in JUDGED


def score_answers(
    name: str, protocol: Protocol, dataset: AnnotatedImages, answers: Answers, has_truth: bool = True
) -> dict[str, Any]:
    """Figures of answered questions with the protocol and the published figures, for JSON; none without truth."""
    benchmark, rows = BENCHMARKS[name], sized_rows(name, dataset, answers.rows)
    figures = benchmark.score(rows, protocol) if has_truth else {}
    total = len(rows) + len(answers.unanswered)
    return {
        "benchmark": name,
        "protocol": protocol.name,
        "figures": figures,
        "main_figure": main_figure(name, protocol, figures) if has_truth else None,
        "questions": total,
        "answered": len(rows),
        "unanswered": answers.unanswered[:MAX_LISTED],
        "bad_questions": answers.num_bad_questions,
        "protocol_settings": protocol.to_json(),
        "trained_on_train_split": None,  # unknown for answers of another model
        "left_out": {"METEOR": "it needs Java"} if "caption" in benchmark.tasks else {},
        "published": [dataclasses.asdict(figure) for figure in published_figures(name)],
    }


def sized_rows(name: str, dataset: AnnotatedImages, rows: list[AnsweredQuestion]) -> list[AnsweredQuestion]:
    """The answered questions with the sizes of their images, where a benchmark has boxes or masks in pixels."""
    if not BENCHMARKS[name].needs_sizes:
        return rows
    return [row._replace(image=_with_size(dataset, row)) for row in rows]


def main_figure(name: str, protocol: Protocol, figures: Mapping[str, Any]) -> dict[str, Any]:
    """{"name": its path, "value"} of the figure that the benchmark is compared by under a protocol."""
    paths = BENCHMARKS[name].figure
    path = paths.get(protocol.name, paths[""])
    value: Any = figures
    for key in path.split("."):
        if isinstance(value, list):
            value = value[int(key)]
        else:
            value = next(iter(value.values())) if key == "*" else value.get(key)
    return {"name": path, "value": value}


def _with_size(dataset: AnnotatedImages, row: AnsweredQuestion):
    """The image's info with its size in pixels, read from the file's header where the annotations have none."""
    if (row.image.width, row.image.height) != (1.0, 1.0):
        return row.image
    if max(max(box) for box in (*row.annotation.boxes, (2.0,))) <= 1 and not row.annotation.regions:
        return row.image
    if not row.image.in_pixels and not row.annotation.regions:
        return row.image
    width, height = image_size(dataset.image_path(row.annotation.photo))
    return dataclasses.replace(row.image, width=float(width), height=float(height))


def missing_pictures(dataset: AnnotatedImages, image_dir: str) -> list[str]:
    """The names of pictures that are not in the image folder, with one warning."""
    named = [k for k, info in enumerate(dataset.image_infos) if info.name and k not in dataset.embedded]
    missing = [dataset.image_infos[k].name for k in named if not dataset.image_path(k).is_file()]
    if missing:
        log.warning("%d of %d pictures are not in %s, such as %s", len(missing), len(named), image_dir, missing[0])
    return missing
