# SPDX-License-Identifier: Apache-2.0
"""Names, number formats and ranges of the metrics in report.json."""

from __future__ import annotations

import re
from typing import NamedTuple

METRIC_LABELS = {  # key in report.json: (label, number format)
    "caption_cider": ("Captioning, CIDEr-D", "{:.3f}"),
    "vqa_accuracy": ("VQA, accuracy", "{:.1%}"),
    "rec_accuracy_50": ("REC (expression to box), accuracy at IoU > 0.5", "{:.1%}"),
    "rec_accuracy_50_teacher_forced": ("REC with teacher forcing, accuracy at IoU > 0.5", "{:.1%}"),
    "res_ciou": ("RES (expression to mask), cIoU", "{:.1%}"),
    "reason_ciou": ("Reasoning (inferred object to mask), cIoU", "{:.1%}"),
    "res_giou": ("RES (expression to mask), gIoU", "{:.1%}"),
    "reg_cider": ("REG (box to expression), CIDEr-D", "{:.3f}"),
    "box_vqa_accuracy": ("VQA about a box, accuracy", "{:.1%}"),
    "phrase_recall_1": ("Grounded captioning, phrase recall@1", "{:.1%}"),
    "phrase_recall_1_teacher_forced": ("Grounded captioning with teacher forcing, phrase recall@1", "{:.1%}"),
    "pope_f1": ("Object existence (POPE), F1", "{:.1%}"),
    "vsr_accuracy": ("Spatial relations (VSR), accuracy", "{:.1%}"),
    "tag_f1": ("Tagging, F1", "{:.1%}"),
    "plan_accuracy": ("Tabletop: next sub-goal, accuracy", "{:.1%}"),
    "success_accuracy": ("Tabletop: success detection, accuracy", "{:.1%}"),
    "recovery_accuracy": ("Tabletop: sub-goal after a failure, accuracy", "{:.1%}"),
    "state_vqa_accuracy": ("Tabletop: questions about the state, accuracy", "{:.1%}"),
    "choice_accuracy": ("Multiple choice, accuracy", "{:.1%}"),
    "detect_found": ("Detection by phrase, named boxes found", "{:.1%}"),
    "detect_silent": ("Detection by phrase, absent names without a box", "{:.1%}"),
    "reason_giou": ("Reasoning (inferred object to mask), gIoU", "{:.1%}"),
    "conversation_rouge_l": ("Conversation, ROUGE-L of the last answer", "{:.3f}"),
    "conversation_f1": ("Conversation, token F1 of the last answer", "{:.1%}"),
    "image_level_rouge_l": ("Image-level records of LION, ROUGE-L", "{:.3f}"),
    "image_level_f1": ("Image-level records of LION, token F1", "{:.1%}"),
    "region_level_accuracy_50": ("Region-level records of LION, accuracy of boxes at IoU > 0.5", "{:.1%}"),
    "region_level_rouge_l": ("Region-level records of LION without a box in the answer, ROUGE-L", "{:.3f}"),
    "caption_bleu4": ("Captioning, BLEU-4", "{:.3f}"),
    "caption_rouge_l": ("Captioning, ROUGE-L", "{:.3f}"),
    "caption_cider_untagged": ("Captioning without tags, CIDEr-D", "{:.3f}"),
    "vqa_accuracy_untagged": ("VQA without tags, accuracy", "{:.1%}"),
    "pope_f1_untagged": ("Object existence (POPE) without tags, F1", "{:.1%}"),
    "pope_accuracy": ("Object existence (POPE), accuracy", "{:.1%}"),
}
MEASURES = {  # how a metric's key ends: (name, number format, its best value; None: without a limit)
    "accuracy_50": ("accuracy at IoU > 0.5", "{:.1%}", 1.0),
    "recall_1": ("recall@1", "{:.1%}", 1.0),
    "accuracy": ("accuracy", "{:.1%}", 1.0),
    "rouge_l": ("ROUGE-L", "{:.3f}", 1.0),
    "bleu4": ("BLEU-4", "{:.3f}", 1.0),
    "cider": ("CIDEr-D", "{:.3f}", 10.0),
    "found": ("boxes found at IoU > 0.5", "{:.1%}", 1.0),
    "silent": ("absent names without a box", "{:.1%}", 1.0),
    "ciou": ("cIoU", "{:.1%}", 1.0),
    "giou": ("gIoU", "{:.1%}", 1.0),
    "f1": ("F1", "{:.1%}", 1.0),
}
VARIANTS = {"_untagged": " without tags", "_teacher_forced": " with teacher forcing"}


class Metric(NamedTuple):
    """How a metric is shown: its name, number format, and best value, the length of a full bar (None: no limit)."""

    label: str
    template: str
    best: float | None

    def format(self, value: float) -> str:
        """The value as text, without a minus before zero."""
        return format_number(self.template, value)


def describe_metric(key: str) -> Metric:
    """How the metric of a key such as "vqa_accuracy", "coco_rec_accuracy_50" or "pope_f1_untagged" is shown.

    Keys that METRIC_LABELS lacks are those of another source or variant, and are named by their parts.
    """
    plain, variant = key, ""
    for suffix, words in VARIANTS.items():
        if key.endswith(suffix):
            plain, variant = key.removesuffix(suffix), words
    measure = next((measure for measure in MEASURES if plain == measure or plain.endswith(f"_{measure}")), None)
    name, template, best = MEASURES.get(measure, ("", "{:.3f}", None))
    if key in METRIC_LABELS:
        return Metric(*METRIC_LABELS[key], best)
    known = next((known for known in METRIC_LABELS if plain == known or plain.endswith(f"_{known}")), None)
    if known is not None:
        task, _, measured = METRIC_LABELS[known][0].rpartition(", ")
        source = plain.removesuffix(known).strip("_")
        label = f"{task}{variant}{f' on {source}' if source else ''}, {measured}"
        return Metric(label, METRIC_LABELS[known][1], best)
    if measure is None:
        return Metric(plain.replace("_", " ") + variant, template, best)
    words = plain.removesuffix(measure).strip("_").replace("_", " ")
    return Metric(f"{words.capitalize()}{variant}, {name}" if words else name + variant, template, best)


def format_number(template: str, value: float) -> str:
    """`template.format(value)` without a minus before a zero."""
    text = template.format(value)
    return text[1:] if re.fullmatch(r"-0*[.,]?0*%?", text) else text
