# SPDX-License-Identifier: Apache-2.0
"""Compare our figures with those of the benchmarks' own scorers, on invented files of each format.

    python -m benchmarks.scorers [FOLDER]

FOLDER (tests/data/benchmarks) has the files and expected.json, which the original scorers gave. Prints one line for
each figure, and exits with 1 if one differs by more than 1e-4.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lionjax import cli
from lionjax.data.datasets.detect import detect_source
from lionjax.data.images import MAX_PIXELS
from lionjax.data.rle import encode_rle
from lionjax.evaluation.metrics import vqa

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "benchmarks"
TOLERANCE = 1e-4
NOT_SCORED = ("METEOR", "prediction")  # needs Java; words about the prediction
VQA2, OKVQA = "vqa/v2_{}mscoco_val2014_{}.json", "vqa/{}mscoco_val2014_{}.json"
# {key of expected.json: (source, predictions, answers, protocols)}
FILES = {
    "captions/coco_karpathy": ("captions/coco_karpathy_test_gt.json", "captions/captions_val2014_results.json"),
    "captions/nocaps": ("captions/nocaps_val_4500_captions.json", "captions/nocaps_val_results.json"),
    "vqa/vqav2": (VQA2.format("OpenEnded_", "questions"), "vqa/vqa_results.json", VQA2.format("", "annotations")),
    "vqa/okvqa": (OKVQA.format("OpenEnded_", "questions"), "vqa/okvqa_results.json", OKVQA.format("", "annotations")),
    "vqa/textvqa": ("vqa/TextVQA_0.5.1_val.json", "vqa/textvqa_answers.jsonl"),
    "vqa/vizwiz": ("vqa/vizwiz_val.json", "vqa/vizwiz_results.json"),
    "vqa/aokvqa": ("vqa/aokvqa_v1p0_val.json", "vqa/aokvqa_predictions_val.json"),
    "vqa/gqa": ("vqa/gqa_testdev_balanced_questions.json", "vqa/gqa_testdev_balanced_predictions.json"),
    "vqa/visdial": (
        "vqa/visdial_1.0_val.json",
        "vqa/visdial_scores.json",
        "vqa/visdial_1.0_val_dense_annotations.json",
    ),
    "vqa/hateful_memes": ("vqa/hateful_memes_dev.jsonl", "vqa/hateful_memes_scores.json"),
    "vqa/docvqa": ("vqa/docvqa_val_v1.0.json", "vqa/docvqa_results.json"),
    "yes_no/mme": ("yes_no/mme", "yes_no/mme"),
    "yes_no/pope_random": ("yes_no/coco_pope_random.json", "yes_no/pope_answers_random.jsonl"),
    "yes_no/pope_popular": ("yes_no/coco_pope_popular.json", "yes_no/pope_answers_popular.jsonl"),
    "yes_no/pope_adversarial": ("yes_no/coco_pope_adversarial.json", "yes_no/pope_answers_adversarial.jsonl"),
    "choice/scienceqa": ("choice/problems.json", "choice/scienceqa_answers.jsonl"),
    "choice/mmbench": ("choice/mmbench_circular.tsv", "choice/mmbench_predictions.json"),
    "choice/seed": ("choice/SEED-Bench.json", "choice/seed_answers.jsonl"),
    "judged/llava_bench": ("judged/questions.jsonl", "judged/judge_replies.json"),
    "judged/owleval": ("judged/owleval_questions.jsonl", "judged/owleval_ratings.jsonl"),
    "regions/flickr30k_entities": ("regions/flickr30k_entities", "regions/flickr30k_entities/predictions.json"),
    "regions/rec": ("regions/REC_refcoco_unc_val.jsonl", "regions/rec_answers.jsonl"),
}
PROTOCOLS = {"regions/rec": ("shikra", "lmms")}  # else the benchmark's own


def command(*words: str) -> dict[str, Any]:
    """What `lionjax evaluate ... --json` prints. Raises RuntimeError if it fails."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(["evaluate", *words, "--json"])
    if code:
        raise RuntimeError(f"lionjax evaluate {' '.join(words)} ended with {code}")
    return json.loads(out.getvalue())


def score(key: str, folder: Path) -> dict[str, Any]:
    """Our figures of the files of a key, by the command line."""
    source, predictions, *answers = FILES[key]
    words = ["--benchmark", key, "--source", str(folder / source), "--predictions", str(folder / predictions)]
    words += ["--answers", str(folder / answers[0])] if answers else []
    words += ["--images", str(folder / "images")] if key == "regions/rec" else []
    figures: dict[str, Any] = {}
    for protocol in PROTOCOLS.get(key, ("official",)):
        figures |= command(*words, "--protocol", protocol)["figures"]
    return figures


def score_reason_seg(folder: Path) -> dict[str, Any]:
    """ReasonSeg with the predicted rectangle of rows 10 to 34 and columns 10 to 34."""
    mask_HW = np.zeros((72, 96), bool)
    mask_HW[10:35, 10:35] = True
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "masks.json"
        file.write_text(json.dumps([{"question_id": "1", "mask": encode_rle(mask_HW)}]))
        source = str(folder / "regions" / "reason_seg")
        return command("--benchmark", "reason_seg", "--source", source, "--predictions", str(file))["figures"]


def split_counts(folder: Path) -> dict[str, int]:
    """Sentences of refs(unc).p by split."""
    path = str(folder / "regions" / "refcoco" / "refs(unc).p")
    counts: dict[str, int] = {}
    for split in ("train", "validation", "heldout"):
        for row in detect_source(path, str(folder / "images")).open(split, MAX_PIXELS).annotations.get("rec", []):
            counts[row.kind] = counts.get(row.kind, 0) + 1
    return counts


def our_figures(folder: Path) -> dict[str, Any]:
    """Our figures under the keys of expected.json."""
    figures = {key: score(key, folder) for key in FILES}
    expected = json.loads((folder / "expected.json").read_text())
    normalizers = {"vqa": vqa.normalize_answer, "evalai": vqa.normalize_evalai_answer}
    figures["normalisers"] = {
        text: {name: normalize(text) for name, normalize in normalizers.items()} for text in expected["normalisers"]
    }
    figures["regions/reason_seg"] = score_reason_seg(folder)
    figures["regions/refcoco"] = split_counts(folder)
    rows = detect_source(str(folder / "vqa" / "iconqa_problems.json")).open("heldout", MAX_PIXELS).annotations["choice"]
    ids = [row.question_id for row in rows if row.kind == "choose_txt"]
    return figures | {"vqa/iconqa": {"text_choice_ids": ids}}


def compare(ours: Any, expected: Any, path: str = "") -> Iterator[tuple[str, Any, Any, bool]]:
    """(path, our value, expected value, whether they agree) of every figure of `expected`."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            if key not in NOT_SCORED:
                given = ours.get(key) if isinstance(ours, dict) else None
                yield from compare(given, value, f"{path}/{key}".lstrip("/"))
    elif isinstance(expected, list):
        given = ours if isinstance(ours, list) and len(ours) == len(expected) else [None] * len(expected)
        for number, (left, right) in enumerate(zip(given, expected)):
            yield from compare(left, right, f"{path}/{number}")
    elif isinstance(expected, int | float) and not isinstance(expected, bool):
        is_close = isinstance(ours, int | float) and abs(ours - expected) <= TOLERANCE
        yield path, ours, expected, is_close
    else:
        yield path, ours, expected, ours == expected


def rows(folder: Path = FOLDER) -> list[tuple[str, Any, Any, bool]]:
    """All figures of expected.json beside ours."""
    expected = json.loads((folder / "expected.json").read_text())
    known = {key: value for key, value in expected.items() if not key.startswith("agents/")}
    return list(compare(our_figures(folder), known))


def main() -> None:
    table = rows(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
    for path, ours, expected, agree in table:
        print(f"{'same' if agree else 'DIFFERS':8}{path:60} {ours!s:24} {expected!s}")
    differing = sum(not agree for *_, agree in table)
    print(f"{len(table)} figures, {differing} differ")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
