# SPDX-License-Identifier: Apache-2.0
"""The JSON Lines of Shikra (arXiv 2306.15195) and NExT-Chat (arXiv 2311.04498): one kind of row a file.

Boxes are (x0, y0, x1, y1) in pixels of the file. A text has `<boxes>`, or a phrase in `<ph_st>`...`<ph_ed>`, where
boxes stand; `boxes_seq` has the indices of the boxes of each place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data.boxes import Box
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import BOXES_MARK, AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, AnnotationFile, read_rows

PHRASE_START, PHRASE_END = "<ph_st>", "<ph_ed>"
IMAGE_KEYS = ("img_path", "file_path", "image_path", "img_fn")
# Keys of the rows that are read; the first group that a row has decides.
KINDS = {
    "res": ("img_path", "expressions", "mask"),
    "rec": ("img_path", "expression", "bbox"),
    "grounded": ("image_id", "sentence", "boxes", "boxes_seq"),
    "chain": ("img_path", "question", "cot_with_ans", "boxes"),
    "vcr": ("img_fn", "question", "answer_choices", "rationale_choices", "boxes"),
    "pointing": ("file_path", "question", "candidates", "answer"),
    "region_vqa": ("file_path", "question", "answer", "bbox"),
    "vqa_e": ("file_path", "question", "explanation", "multiple_answers"),
    "vqa_x": ("file_path", "question", "justification", "multiple_choice_answer"),
    "vqa": ("image_path", "question", "annotation"),
    "caption": ("img_path", "caption"),
}


@renamed_fields()
@dataclass(frozen=True)
class ShikraJsonl(AnnotationFile):
    """A file of Shikra's or NExT-Chat's training data, as the tasks that their code makes of it.

    REC and REG rows (`expression`, `bbox`) give `rec` and `reg`, NExT-Chat's `res3` rows `res`; Flickr30k Entities
    (`sentence`) gives `grounded`, captions `caption`, and Visual7W and PointQA `box_vqa` with boxes; VQAv2, VQA-E and
    VQA-X give `vqa`; Shikra-RD (`cot_with_ans`) and VCR `conversation`. A row of no kind is a bad record.
    """

    name: str = "shikra"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        file = Path(self.file)
        builder = AnnotatedImagesBuilder(Path(self.image_dir), split, self.heldout_fraction)
        for location, row in read_rows(file):
            kind = next((kind for kind, keys in KINDS.items() if isinstance(row, dict) and set(keys) <= set(row)), "")
            with builder.row(location, TASKS.get(kind, "vqa")):
                if isinstance(row, UserError):
                    raise row
                if not kind:
                    raise UserError(f"{location} has the keys of no kind of row in Shikra's data; correct it")
                _add_row(builder, kind, row, location)
        return builder.build(max_pixels)


TASKS = {"chain": "conversation", "vcr": "conversation", "pointing": "box_vqa", "region_vqa": "box_vqa"} | {
    **{"vqa_e": "vqa", "vqa_x": "vqa", "vqa": "vqa", "caption": "caption", "rec": "rec", "res": "res"},
    "grounded": "grounded",
}


def _add_row(builder: AnnotatedImagesBuilder, kind: str, row: dict, location: str) -> None:
    name = f"{row['image_id']}.jpg" if kind == "grounded" else typed_rows.text(row, _image_key(row), location)
    if not builder.includes(name):
        return
    size = typed_rows.image_size(row, location) or (1.0, 1.0)
    index = builder.add_image(name, ImageInfo(name, *size, in_pixels=True))
    if kind in ("rec", "res"):
        _add_expressions(builder, kind, row, index, location)
        return
    question, answer, question_boxes, boxes = _texts(kind, row, location)
    fields = {"kind": kind, "boxes": tuple(boxes), "question_boxes": tuple(question_boxes)}
    builder.add_annotation(TASKS[kind], Annotation(index, (answer,), question, **fields))


def _image_key(row: dict) -> str:
    return next(key for key in IMAGE_KEYS if key in row)


def _add_expressions(builder: AnnotatedImagesBuilder, kind: str, row: dict, index: int, location: str) -> None:
    """Expression to box (and mask), and for `rec` also box to expression."""
    boxes = typed_rows.boxes(row, "bbox", location)
    expressions = typed_rows.texts(row, "expressions" if kind == "res" else "expression", location)
    if not expressions or len(boxes) != 1:
        raise UserError(f"{location} needs an expression and one box as 'bbox'; add them")
    regions: tuple[int, ...] = ()
    if kind == "res":
        regions = (len(builder.segmentations),)
        builder.segmentations.append(row["mask"])
    for expression in expressions:
        fields = {"words": expression.strip(), "boxes": boxes, "regions": regions}
        builder.add_annotation(kind, Annotation(index, **fields))
    if kind == "rec":
        builder.add_annotation("reg", Annotation(index, tuple(e.strip() for e in expressions), question_boxes=boxes))


def _texts(kind: str, row: dict, location: str) -> tuple[str, str, list[Box], list[Box]]:
    """(question, answer, boxes of the question, boxes of the answer) of one row, as Shikra's code writes them."""
    question, boxes = row.get("question", ""), typed_rows.boxes(_without_scores(row), "boxes", location)
    if kind == "caption":
        return "", typed_rows.text(row, "caption", location), [], []
    if kind == "grounded":
        answer, answer_boxes = place_boxes(row["sentence"], row["boxes_seq"], boxes, location)
        return "", answer, [], answer_boxes
    if kind == "chain":
        question, question_boxes = place_boxes(question, row.get("question_boxes_seq") or [], boxes, location)
        answer, answer_boxes = place_boxes(row["cot_with_ans"], row.get("answer_boxes_seq") or [], boxes, location)
        return question, answer, question_boxes, answer_boxes
    if kind == "vcr":
        question, question_boxes = _join_words(question, boxes)
        reason, reason_boxes = _join_words(row["rationale_choices"][row["rationale_label"]], boxes)
        answer, answer_boxes = _join_words(row["answer_choices"][row["answer_label"]], boxes)
        return f"QUESTION: {question}", f"{reason} {answer}", question_boxes, [*reason_boxes, *answer_boxes]
    if kind == "pointing":
        candidates = list(typed_rows.boxes(row, "candidates", location))
        marks = " ".join([BOXES_MARK] * len(candidates))
        answer_boxes = list(typed_rows.boxes(row, "answer", location))
        text = f"{question} Candidates: {marks} answer in box format."
        return text, f"The answer is {BOXES_MARK} .", candidates, answer_boxes
    if kind == "region_vqa":
        box = list(typed_rows.boxes(row, "bbox", location))
        return f"{question}{BOXES_MARK}", f"The answer is {row['answer']} .", box, []
    if kind in ("vqa_e", "vqa_x"):
        key = "multiple_answers" if kind == "vqa_e" else "multiple_choice_answer"
        reasons = typed_rows.texts(row, "explanation" if kind == "vqa_e" else "justification", location)
        reason = reasons[0] if kind == "vqa_e" else "".join(reasons)
        return question, f"{reason} So the answer is {row[key]}.", [], []
    return question, f"The answer is {row['annotation']['multiple_choice_answer']}.", [], []


def _without_scores(row: dict) -> dict:
    """The row with boxes of four numbers; VCR's have a score as the fifth."""
    boxes = row.get("boxes")
    is_scored = isinstance(boxes, list) and all(isinstance(box, list) and len(box) == 5 for box in boxes)
    return {**row, "boxes": [box[:4] for box in boxes]} if is_scored and boxes else row


def _join_words(words: Sequence[object], boxes: Sequence[Box]) -> tuple[str, list[Box]]:
    """(text, boxes in order) of VCR's sentence, in which a list of indices stands for boxes."""
    text = " ".join(BOXES_MARK if isinstance(word, list) else str(word) for word in words)
    return place_boxes(text, [word for word in words if isinstance(word, list)], boxes, "a VCR sentence")


def place_boxes(text: str, seq: Sequence[Sequence[int]], boxes: Sequence[Box], location: str) -> tuple[str, list[Box]]:
    """(text with one `<boxes>` for each box, boxes in order) of a text with a place for each group of indices in `seq`.

    Raises UserError if the text has another number of places, or an index has no box.
    """
    pieces = text.replace(PHRASE_START, "").replace(PHRASE_END, f" {BOXES_MARK}").split(BOXES_MARK)
    if len(pieces) - 1 != len(seq):
        raise UserError(f"{location} has {len(pieces) - 1} places of boxes in a text but {len(seq)} in its sequence")
    placed: list[Box] = []
    filled = pieces[0]
    for group, piece in zip(seq, pieces[1:]):
        if not all(isinstance(i, int) and 0 <= i < len(boxes) for i in group):
            raise UserError(f"{location} has the box indices {list(group)}, but {len(boxes)} boxes; correct them")
        placed += [boxes[i] for i in group]
        filled += " ".join([BOXES_MARK] * len(group)) + piece
    return filled, placed
