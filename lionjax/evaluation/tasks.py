# SPDX-License-Identifier: Apache-2.0
"""Scorers of the benchmark tasks, and their majority baselines.

`SCORERS` maps each task to its scorer, which takes examples and predicted texts in the same order and returns a
TaskScores; that of `MASK_TASKS` takes true and predicted masks instead. `constant_answers` gives the majority
baseline: the best constant answer, estimated on training examples without image or question.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.boxes import split_text_and_boxes
from lionjax.evaluation import detection
from lionjax.evaluation.metrics import captions, regions, vqa

Examples = Sequence[Any]  # of lionjax.data.tasks.Example
MAX_CANDIDATES = 20  # candidate sentences for the constant answer
MAX_COMPARED_EXAMPLES = 80  # training examples that each candidate is scored on
PUBLISHED_REFERENCES = 10  # of a question of VQAv2, OKVQA, TextVQA, VizWiz
MAX_REFERENCES = 5  # references per example; a box may have dozens


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """Scores of one benchmark."""

    metrics: dict[str, float]  # by their keys in report.json
    details: dict[str, float]  # secondary metrics, for tables only
    per_sample: dict[str, tuple[np.ndarray, Callable]]  # metric: (one row per sample, statistic of the rows)
    sample_scores: list[float] | None = None  # score of each answer, 0..1; None where a metric has no per-answer score

    def bootstrap_intervals(self, seed: int = 0) -> dict[str, list[float]]:
        """95 % bootstrap intervals [low, high] over the samples, of the metrics in `per_sample`."""
        return {
            key: list(regions.bootstrap_interval(rows, seed, statistic))
            for key, (rows, statistic) in self.per_sample.items()
        }


def score_caption(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """CIDEr-D, BLEU-4 and ROUGE-L; `exact`: share of captions that equal a reference, of retrieved ones recall at 1."""
    references = [list(example.answers) for example in examples]
    cider_B, rouge_B = captions.cider_d(texts, references), captions.rouge_l(texts, references)
    scores = {
        "caption_cider": float(cider_B.mean()),
        "caption_bleu4": float(captions.bleu(texts, references)[3]),
        "caption_rouge_l": float(rouge_B.mean()),
    }
    details = {"exact": float(np.mean([text in example.answers for text, example in zip(texts, examples)]))}
    return TaskScores(scores, details, {"caption_cider": (cider_B, np.mean), "caption_rouge_l": (rouge_B, np.mean)})


def score_reg(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """CIDEr-D of expressions against all that refer to the object in the box; `exact`: share that equal one of them."""
    references = [list(example.answers) for example in examples]
    cider_B = captions.cider_d(texts, references)
    accepted = [{vqa.normalize_answer(text) for text in texts} for texts in references]
    exact = [float(vqa.normalize_answer(text) in accepted_texts) for text, accepted_texts in zip(texts, accepted)]
    details = {"rouge_l": float(captions.rouge_l(texts, references).mean()), "exact": float(np.mean(exact))}
    return TaskScores({"reg_cider": float(cider_B.mean())}, details, {"reg_cider": (cider_B, np.mean)}, exact)


def score_vqa(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """VQA accuracy. Ten references are those of a published file, treated as the official code does."""
    raw = [len(example.answers) == PUBLISHED_REFERENCES for example in examples]
    rows = zip(texts, examples, raw)
    scores = [vqa.vqa_accuracy(text, example.answers, raw_references=is_raw) for text, example, is_raw in rows]
    per_sample = {"vqa_accuracy": (np.array(scores), np.mean)}
    return TaskScores({"vqa_accuracy": float(np.mean(scores))}, {}, per_sample, scores)


def score_relation(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """VSR accuracy; answers that are neither yes nor no are wrong."""
    predicted, truth = [vqa.parse_yes_no(text) for text in texts], yes_no_labels(examples)
    correct = [float(prediction is not None and prediction == label) for prediction, label in zip(predicted, truth)]
    details = {"unreadable": float(np.mean([prediction is None for prediction in predicted]))}
    per_sample = {"vsr_accuracy": (np.array(correct), np.mean)}
    return TaskScores({"vsr_accuracy": vqa.vsr_accuracy(predicted, truth)}, details, per_sample, correct)


def score_steps(name: str) -> Callable[[Examples, Sequence[str]], TaskScores]:
    """The scorer of a task on the tabletop: share of answers that are the true one, word for word."""

    def score(examples: Examples, texts: Sequence[str]) -> TaskScores:
        correct = [float(text.strip(" .").lower() in example.answers) for text, example in zip(texts, examples)]
        accuracy = {f"{name}_accuracy": float(np.mean(correct))}
        return TaskScores(accuracy, {}, {f"{name}_accuracy": (np.array(correct), np.mean)}, correct)

    return score


def score_existence(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """POPE's F1 and accuracy."""
    predicted, truth = [vqa.parse_pope_answer(text) for text in texts], yes_no_labels(examples)
    scores = vqa.pope_scores(predicted, truth)

    def f1(pairs_B2: np.ndarray) -> float:
        both = 2 * np.sum(pairs_B2.all(axis=1))
        return float(both / pairs_B2.sum()) if both else 0.0

    details = {key: scores[key] for key in ("precision", "recall", "yes_ratio")}
    per_sample = {"pope_f1": (np.array([predicted, truth]).T, f1)}
    metrics = {"pope_f1": scores["f1"], "pope_accuracy": scores["accuracy"]}
    correct = [float(prediction == label) for prediction, label in zip(predicted, truth)]
    return TaskScores(metrics, details, per_sample, correct)


def yes_no_labels(examples: Examples) -> list[bool]:
    """Whether the true answer of each example is yes."""
    return [vqa.parse_yes_no(example.answer) is True for example in examples]


def score_rec(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """Accuracy of the first box in each answer at IoU > 0.5."""
    boxes, truth_B4 = ([regions.parse_box(text) for text in texts], [example.boxes[0] for example in examples])
    scores = regions.rec_scores(boxes, truth_B4)
    correct_B = regions.rec_ious(boxes, truth_B4) > 0.5
    per_sample = {"rec_accuracy_50": (correct_B, np.mean)}
    details = {key: scores[key] for key in ("mean_iou", "unparsable")}
    return TaskScores({"rec_accuracy_50": scores["accuracy_50"]}, details, per_sample, correct_B.astype(float).tolist())


def score_choice(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """ScienceQA accuracy; an answer without an option letter is wrong."""
    predicted = [vqa.parse_choice(text) for text in texts]
    truth = [vqa.parse_choice(example.answer) for example in examples]
    correct = [float(prediction is not None and prediction == label) for prediction, label in zip(predicted, truth)]
    details = {"unreadable": float(np.mean([prediction is None for prediction in predicted]))}
    per_sample = {"choice_accuracy": (np.array(correct), np.mean)}
    return TaskScores({"choice_accuracy": float(np.mean(correct))}, details, per_sample, correct)


def score_box_vqa(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """VQA accuracy of questions about a box."""
    scores = score_vqa(examples, texts)
    per_sample = {"box_vqa_accuracy": scores.per_sample["vqa_accuracy"]}
    return TaskScores({"box_vqa_accuracy": scores.metrics["vqa_accuracy"]}, {}, per_sample, scores.sample_scores)


def score_res(true_masks: Sequence[regions.Mask], masks: Sequence[regions.Mask]) -> TaskScores:
    """cIoU and gIoU of masks at the original image's size; a prediction of None is an empty mask."""
    overlaps_B2 = regions.mask_overlaps(masks, true_masks)
    intersection_B, union_B = overlaps_B2.T
    iou_B = np.where(union_B == 0, 1.0, intersection_B / np.maximum(union_B, 1))
    scores = regions.res_scores(masks, true_masks)
    per_sample = {"res_ciou": (overlaps_B2, regions.ciou), "res_giou": (iou_B, np.mean)}
    details = {"no_mask": float(np.mean([mask is None for mask in masks]))}
    return TaskScores({"res_ciou": scores["ciou"], "res_giou": scores["giou"]}, details, per_sample, iou_B.tolist())


def score_reason(true_masks: Sequence[regions.Mask], masks: Sequence[regions.Mask]) -> TaskScores:
    """`score_res` of objects that must be inferred."""
    scores = score_res(true_masks, masks)
    metrics, per_sample = (
        {key.replace("res_", "reason_"): value for key, value in group.items()}
        for group in (scores.metrics, scores.per_sample)
    )
    return dataclasses.replace(scores, metrics=metrics, per_sample=per_sample)


def score_grounded(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """Recall@1 of the true captions' phrases: the box that the answer gives a phrase has IoU >= 0.5 with a true one.

    A phrase missing from the answer counts as a miss; `mentioned` is the share of phrases that are in the answer.
    """
    rows = []
    for example, text in zip(examples, texts):
        predicted, true = {}, {}
        for phrase, box in parse_grounded_phrases(text):
            predicted.setdefault(phrase, box)
        for phrase, box in parse_grounded_phrases(example.answer):
            true.setdefault(phrase, []).append(box)
        hits = regions.phrase_hits([predicted.get(phrase) for phrase in true], list(true.values()))
        rows.append((int(hits.sum()), len(true), sum(phrase in predicted for phrase in true)))
    rows_B3 = np.array(rows)

    def recall(rows_B3: np.ndarray) -> float:
        return float(rows_B3[:, 0].sum() / max(rows_B3[:, 1].sum(), 1))

    mentioned = float(rows_B3[:, 2].sum() / max(rows_B3[:, 1].sum(), 1))
    recalls = [recall(row[None]) for row in rows_B3]
    per_sample = {"phrase_recall_1": (rows_B3, recall)}
    return TaskScores({"phrase_recall_1": recall(rows_B3)}, {"mentioned": mentioned}, per_sample, recalls)


def parse_grounded_phrases(text: str) -> list[tuple[str, regions.Box]]:
    """(phrase, box) pairs of a grounded caption, without conjunctions: "A star [...] and a ring [...]." has two."""
    pairs, phrase = [], ""
    for part in split_text_and_boxes(text):
        if isinstance(part, str):
            phrase = re.sub(r"^[\s,.;]*(and\s)?\s*", "", part.lower()).strip()
        else:
            pairs.append((phrase, part))
    return pairs


def score_tags(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """Micro F1 over all tags."""
    predicted, truth = [parse_tags(text) for text in texts], [parse_tags(example.answer) for example in examples]
    scores = regions.tag_scores(predicted, truth)
    rows_B3 = np.array(
        [(len(tags & true_tags), len(tags), len(true_tags)) for tags, true_tags in zip(predicted, truth)]
    )

    def f1(rows_B3: np.ndarray) -> float:
        hits, num_predicted, num_true = rows_B3.sum(axis=0)
        return float(2 * hits / (num_predicted + num_true)) if num_predicted + num_true else 1.0

    f1_per_sample = [f1(row[None]) for row in rows_B3]
    details = {key: scores[key] for key in ("precision", "recall", "macro_f1")}
    return TaskScores({"tag_f1": scores["f1"]}, details, {"tag_f1": (rows_B3, f1)}, f1_per_sample)


def score_conversation(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """ROUGE-L and SQuAD's token F1 of the last answer of each conversation, after the true earlier rounds.

    Published figures of open answers are judged by a language model; these two only compare words with the reference.
    """
    references = [list(example.answers) for example in examples]
    rouge_B = captions.rouge_l(texts, references)
    exact_B, f1_B = np.array([vqa.squad_scores(*pair) for pair in zip(texts, references)]).T
    metrics = {"conversation_rouge_l": float(rouge_B.mean()), "conversation_f1": float(f1_B.mean())}
    per_sample = {"conversation_rouge_l": (rouge_B, np.mean), "conversation_f1": (f1_B, np.mean)}
    return TaskScores(metrics, {"exact_match": float(exact_B.mean())}, per_sample, f1_B.tolist())


def score_image_level(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """ROUGE-L and token F1 of LION's image-level records, whose answers are of any kind; as `score_conversation`."""
    scores = score_conversation(examples, texts)

    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key.replace("conversation", "image_level"): value for key, value in values.items()}

    return dataclasses.replace(scores, metrics=renamed(scores.metrics), per_sample=renamed(scores.per_sample))


def score_region_level(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """Of LION's region-level records: REC accuracy where the answer has a box, ROUGE-L where it has none."""
    metrics, per_sample, per_answer = {}, {}, np.zeros(len(examples))
    with_box = np.array([bool(example.boxes) for example in examples])
    for mask, score in ((with_box, score_rec), (~with_box, score_conversation)):
        if mask.any():
            chosen = np.flatnonzero(mask).tolist()
            scores = score([examples[k] for k in chosen], [texts[k] for k in chosen])
            names = {"rec_accuracy_50": "region_level_accuracy_50", "conversation_rouge_l": "region_level_rouge_l"}
            metrics |= {names[key]: value for key, value in scores.metrics.items() if key in names}
            per_sample |= {names[key]: value for key, value in scores.per_sample.items() if key in names}
            per_answer[mask] = scores.sample_scores
    return TaskScores(metrics, {}, per_sample, per_answer.tolist())


def score_detect(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """Share of the named boxes found at IoU > 0.5, and of the absent names for which nothing is found."""
    rows = [detection.score_names(example, text) for example, text in zip(examples, texts)]
    rates = detection.detection_rates([row for group in rows for row in group])
    counts_B4 = np.array(
        [
            [
                *np.sum([row[1:3] for row in group], axis=0),
                sum(not row[1] for row in group),
                sum(not row[1] and not row[3] for row in group),
            ]
            for group in rows
        ]
    )
    metrics = {"detect_found": rates.pop("found"), "detect_silent": rates.pop("silent")}
    shares = {"detect_found": (1, 0), "detect_silent": (3, 2)}
    per_sample = {
        key: (counts_B4[:, columns], lambda hits_total_B2: float(np.divide(*hits_total_B2.sum(axis=0).clip(1e-9))))
        for key, columns in shares.items()
    }
    right = [all(row[2] == row[1] and bool(row[1]) == bool(row[3]) for row in group) for group in rows]
    return TaskScores(metrics, rates, per_sample, [float(value) for value in right])


def parse_tags(text: str) -> set[str]:
    """The tags of a comma-separated list, lower case."""
    return {word.strip(" .").lower() for word in text.split(",")} - {""}


SCORERS: Mapping[str, Callable[[Examples, Sequence[str]], TaskScores]] = {
    "caption": score_caption,
    "vqa": score_vqa,
    "relation": score_relation,
    "existence": score_existence,
    "rec": score_rec,
    "res": score_res,
    "reason": score_reason,
    "reg": score_reg,
    "grounded": score_grounded,
    "box_vqa": score_box_vqa,
    "tags": score_tags,
    "choice": score_choice,
    "conversation": score_conversation,
    "image_level": score_image_level,
    "region_level": score_region_level,
    "detect": score_detect,
    **{task: score_steps(task) for task in ("plan", "success", "recovery", "state_vqa")},
}
# Tasks that are also scored by `Example.kind`; POPE's settings are kinds.
PER_KIND_TASKS = (
    "vqa",
    "existence",
    "box_vqa",
    "choice",
    "conversation",
    "region_level",
    "detect",
    "plan",
    "state_vqa",
)


def constant_answers(task: str, train: Examples, questions: Examples) -> list[str]:
    """The majority baseline's answer to each question, estimated on training examples.

    Short answers: the most common answer of the question's kind. Existence: "yes", since "no" has an F1 of 0. Boxes,
    sentences and tags: the constant with the best score on the training examples.
    """
    if task in ("vqa", "relation", "box_vqa", "choice", "plan", "success", "recovery", "state_vqa"):
        most_common_by_kind = {
            kind: most_common_answer(e for e in train if e.kind == kind) for kind in {e.kind for e in train}
        }
        most_common = most_common_answer(train)
        return [most_common_by_kind.get(example.kind, most_common) for example in questions]
    estimate = {
        "existence": lambda train: "yes",
        "rec": best_constant_box,
        "res": best_constant_box,
        "reason": best_constant_box,
        "tags": best_constant_tags,
        "detect": lambda train: "nothing",
    }.get(task, best_constant_sentence)
    return [estimate(train)] * len(questions)


def most_common_answer(examples) -> str:
    """The most frequent answer of some examples."""
    return Counter(example.answer for example in examples).most_common(1)[0][0]


def best_constant_box(train: Examples) -> str:
    """The training box with IoU > 0.5 to the most others; ties go to the highest summed IoU."""
    boxes_K4 = np.array([example.boxes[0] for example in train])
    iou_KK = regions.iou_matrix(boxes_K4, boxes_K4)
    best_index = max(range(len(boxes_K4)), key=lambda k: (np.sum(iou_KK[k] > 0.5), iou_KK[k].sum()))
    return "[" + ",".join(f"{edge:.3f}" for edge in boxes_K4[best_index]) + "]"


def best_constant_sentence(train: Examples) -> str:
    """The training answer with the highest mean CIDEr-D on the training examples, among MAX_CANDIDATES."""
    train = train[:MAX_COMPARED_EXAMPLES]
    references = [list(example.answers[:MAX_REFERENCES]) for example in train]
    candidates = list(dict.fromkeys(example.answer for example in train))[:MAX_CANDIDATES]
    return max(candidates, key=lambda text: captions.cider_d([text] * len(train), references).mean())


def best_constant_tags(train: Examples) -> str:
    """The n most frequent tags, with n chosen for the best F1."""
    truth = [parse_tags(example.answer) for example in train]
    by_frequency = [tag for tag, _ in Counter(tag for tags in truth for tag in sorted(tags)).most_common()]
    sets = [by_frequency[:size] for size in range(1, len(by_frequency) + 1)]
    return ", ".join(max(sets, key=lambda tags: regions.tag_scores([tags] * len(truth), truth)["f1"]))


def random_box_accuracy(train: Examples, questions: Examples) -> float:
    """Expected accuracy at IoU > 0.5 of answering with a random training box."""
    train_boxes, true_boxes = (np.array([example.boxes[0] for example in group]) for group in (train, questions))
    return float(np.mean(regions.iou_matrix(train_boxes, true_boxes) > 0.5))


def benchmark_task(benchmark: str) -> str:
    """The task of a benchmark: "coco/rec@digits" is "rec". Raises UserError for an unknown one."""
    task = benchmark.partition("@")[0].rpartition("/")[2]
    if task not in SCORERS:
        raise UserError(f"there is no benchmark {benchmark!r}; choose {', '.join(SCORERS)}, or all")
    return task
