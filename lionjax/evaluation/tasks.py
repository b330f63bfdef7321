# SPDX-License-Identifier: Apache-2.0
"""How the answers of each benchmark are scored, and which answers a model would give that never looked.

`SCORERS` is the list of benchmarks by task. Each takes examples and texts in the same order and gives `Scored`; that of
`res` takes true masks and masks.
`constants` are the answers of the best constant: learned from training examples, blind to picture and question.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lionjax.data.boxes import split_text_and_boxes
from lionjax.evaluation.metrics import captions
from lionjax.evaluation.metrics import regions as metrics
from lionjax.evaluation.metrics import vqa as answers

Examples = Sequence[Any]  # data.tasks.Example
MAX_CANDIDATES = 20  # constant sentences that are tried
MAX_COMPARED_EXAMPLES = 80  # training examples that each is compared with
MAX_REFERENCES = 5  # accepted sentences of each, of which a box may have dozens


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """Scores of a set. `metrics`: by their keys in report.json; `details`: what else is worth a line in a table.

    `each`: by metric, one row a sample and the statistic that makes the metric of them, from which an interval can
    be drawn. `right`: how good each single answer is, 0..1; None where that says little.
    """

    metrics: dict[str, float]
    details: dict[str, float]
    per_sample: dict[str, tuple[np.ndarray, Callable]]
    sample_scores: list[float] | None = None

    def bootstrap_intervals(self, seed: int = 0) -> dict[str, list[float]]:
        """95 % bootstrap intervals [low, high] over the samples, of the metrics that have single values."""
        return {key: list(metrics.bootstrap_interval(rows, seed, how)) for key, (rows, how) in self.per_sample.items()}


def score_caption(examples: Examples, texts: Sequence[str]) -> TaskScores:
    references = [list(example.answers) for example in examples]
    cider_B, rouge_B = captions.cider_d(texts, references), captions.rouge_l(texts, references)
    scores = {
        "caption_cider": float(cider_B.mean()),
        "caption_bleu4": float(captions.bleu(texts, references)[3]),
        "caption_rouge_l": float(rouge_B.mean()),
    }
    return TaskScores(scores, {}, {"caption_cider": (cider_B, np.mean), "caption_rouge_l": (rouge_B, np.mean)})


def score_reg(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """Expressions against all that fit the thing in the box; `exact` counts those that are one of them."""
    references = [list(example.answers) for example in examples]
    cider_B = captions.cider_d(texts, references)
    wanted = [{answers.normalize_answer(text) for text in texts} for texts in references]
    exact = [float(answers.normalize_answer(text) in fits) for text, fits in zip(texts, wanted)]
    details = {"rouge_l": float(captions.rouge_l(texts, references).mean()), "exact": float(np.mean(exact))}
    return TaskScores({"reg_cider": float(cider_B.mean())}, details, {"reg_cider": (cider_B, np.mean)}, exact)


def score_vqa(examples: Examples, texts: Sequence[str]) -> TaskScores:
    right = [answers.vqa_accuracy(text, example.answers) for text, example in zip(texts, examples)]
    each = {"vqa_accuracy": (np.array(right), np.mean)}
    return TaskScores({"vqa_accuracy": float(np.mean(right))}, {}, each, right)


def score_relation(examples: Examples, texts: Sequence[str]) -> TaskScores:
    said, truth = [answers.parse_yes_no(text) for text in texts], yes_no_labels(examples)
    right = [float(mine is not None and mine == true) for mine, true in zip(said, truth)]
    details = {"unreadable": float(np.mean([mine is None for mine in said]))}
    each = {"vsr_accuracy": (np.array(right), np.mean)}
    return TaskScores({"vsr_accuracy": answers.vsr_accuracy(said, truth)}, details, each, right)


def score_existence(examples: Examples, texts: Sequence[str]) -> TaskScores:
    said, truth = [answers.parse_pope_answer(text) for text in texts], yes_no_labels(examples)
    scores = answers.pope_scores(said, truth)

    def f1(pairs_B2: np.ndarray) -> float:
        both = 2 * np.sum(pairs_B2.all(axis=1))
        return float(both / pairs_B2.sum()) if both else 0.0

    details = {key: scores[key] for key in ("precision", "recall", "yes_ratio")}
    each = {"pope_f1": (np.array([said, truth]).T, f1)}
    main = {"pope_f1": scores["f1"], "pope_accuracy": scores["accuracy"]}
    return TaskScores(main, details, each, [float(mine == true) for mine, true in zip(said, truth)])


def yes_no_labels(examples: Examples) -> list[bool]:
    return [answers.parse_yes_no(example.answer) is True for example in examples]


def score_rec(examples: Examples, texts: Sequence[str]) -> TaskScores:
    boxes, truth_B4 = ([metrics.parse_box(text) for text in texts], [example.boxes[0] for example in examples])
    scores = metrics.rec_scores(boxes, truth_B4)
    right_B = metrics.rec_ious(boxes, truth_B4) > 0.5
    each = {"rec_accuracy_50": (right_B, np.mean)}
    details = {key: scores[key] for key in ("mean_iou", "unparsable")}
    return TaskScores({"rec_accuracy_50": scores["accuracy_50"]}, details, each, right_B.astype(float).tolist())


def score_choice(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """ScienceQA's letters; an answer in which none can be found is wrong."""
    said = [answers.parse_choice(text) for text in texts]
    truth = [answers.parse_choice(example.answer) for example in examples]
    right = [float(mine is not None and mine == true) for mine, true in zip(said, truth)]
    details = {"unreadable": float(np.mean([mine is None for mine in said]))}
    each = {"choice_accuracy": (np.array(right), np.mean)}
    return TaskScores({"choice_accuracy": float(np.mean(right))}, details, each, right)


def score_box_vqa(examples: Examples, texts: Sequence[str]) -> TaskScores:
    scored = score_vqa(examples, texts)
    each = {"box_vqa_accuracy": scored.per_sample["vqa_accuracy"]}
    return TaskScores({"box_vqa_accuracy": scored.metrics["vqa_accuracy"]}, {}, each, scored.sample_scores)


def score_res(true_masks: Sequence[metrics.Mask], masks: Sequence[metrics.Mask]) -> TaskScores:
    """Masks against true ones, both of the original picture's size; None is an empty one."""
    overlaps_B2 = metrics.mask_overlaps(masks, true_masks)
    shared_B, union_B = overlaps_B2.T
    iou_B = np.where(union_B == 0, 1.0, shared_B / np.maximum(union_B, 1))
    scores = metrics.res_scores(masks, true_masks)
    each = {"res_ciou": (overlaps_B2, metrics.ciou), "res_giou": (iou_B, np.mean)}
    details = {"no_mask": float(np.mean([mask is None for mask in masks]))}
    return TaskScores({"res_ciou": scores["ciou"], "res_giou": scores["giou"]}, details, each, iou_B.tolist())


def score_grounded(examples: Examples, texts: Sequence[str]) -> TaskScores:
    """Phrases of the true captions, each found in the answer with a box; recall@1 counts IoU >= 0.5 with any of its.

    A phrase that the answer does not have counts as missed; `mentioned` is the share of those that it has.
    """
    rows = []
    for example, text in zip(examples, texts):
        said, true = {}, {}
        for phrase, box in parse_grounded_phrases(text):
            said.setdefault(phrase, box)
        for phrase, box in parse_grounded_phrases(example.answer):
            true.setdefault(phrase, []).append(box)
        hits = metrics.phrase_hits([said.get(phrase) for phrase in true], list(true.values()))
        rows.append((int(hits.sum()), len(true), sum(phrase in said for phrase in true)))
    rows_B3 = np.array(rows)

    def recall(rows_B3: np.ndarray) -> float:
        return float(rows_B3[:, 0].sum() / max(rows_B3[:, 1].sum(), 1))

    mentioned = float(rows_B3[:, 2].sum() / max(rows_B3[:, 1].sum(), 1))
    right = [recall(row[None]) for row in rows_B3]
    each = {"phrase_recall_1": (rows_B3, recall)}
    return TaskScores({"phrase_recall_1": recall(rows_B3)}, {"mentioned": mentioned}, each, right)


def parse_grounded_phrases(text: str) -> list[tuple[str, metrics.Box]]:
    """(words before a box, box) of a caption, without what joins them: "A star [...] and a ring [...]." has two."""
    found, words = [], ""
    for piece in split_text_and_boxes(text):
        if isinstance(piece, str):
            words = re.sub(r"^[\s,.;]*(and\s)?\s*", "", piece.lower()).strip()
        else:
            found.append((words, piece))
    return found


def score_tags(examples: Examples, texts: Sequence[str]) -> TaskScores:
    said, truth = [parse_tags(text) for text in texts], [parse_tags(example.answer) for example in examples]
    scores = metrics.tag_scores(said, truth)
    rows_B3 = np.array([(len(mine & true), len(mine), len(true)) for mine, true in zip(said, truth)])

    def f1(rows_B3: np.ndarray) -> float:
        hits, mine, true = rows_B3.sum(axis=0)
        return float(2 * hits / (mine + true)) if mine + true else 1.0

    right = [f1(row[None]) for row in rows_B3]
    details = {key: scores[key] for key in ("precision", "recall", "macro_f1")}
    return TaskScores({"tag_f1": scores["f1"]}, details, {"tag_f1": (rows_B3, f1)}, right)


def parse_tags(text: str) -> set[str]:
    """The tags of a list with commas."""
    return {word.strip(" .").lower() for word in text.split(",")} - {""}


SCORERS: Mapping[str, Callable[[Examples, Sequence[str]], TaskScores]] = {
    "caption": score_caption,
    "vqa": score_vqa,
    "relation": score_relation,
    "existence": score_existence,
    "rec": score_rec,
    "res": score_res,
    "reg": score_reg,
    "grounded": score_grounded,
    "box_vqa": score_box_vqa,
    "tags": score_tags,
    "choice": score_choice,
}
PER_KIND_TASKS = (
    "vqa",
    "existence",
    "box_vqa",
    "choice",
)  # scored apart by `Example.kind` too; POPE's settings are kinds


# The best constant answer


def constant_answers(task: str, train: Examples, questions: Examples) -> list[str]:
    """What is answered to each example without looking at picture or question, learned from training examples.

    One-word questions: the most common answer of their kind. Existence: "yes", since never saying it has an F1 of 0.
    Boxes, sentences and tags: the one that fares best on the training examples.
    """
    if task in ("vqa", "relation", "box_vqa", "choice"):
        common = {kind: most_common_answer(e for e in train if e.kind == kind) for kind in {e.kind for e in train}}
        other = most_common_answer(train)
        return [common.get(example.kind, other) for example in questions]
    best = {
        "existence": lambda train: "yes",
        "rec": best_constant_box,
        "res": best_constant_box,
        "tags": best_constant_tags,
    }.get(task, best_constant_sentence)
    return [best(train)] * len(questions)


def most_common_answer(examples) -> str:
    return Counter(example.answer for example in examples).most_common(1)[0][0]


def best_constant_box(train: Examples) -> str:
    """The training box that hits the most others; of equals the one that overlaps them most."""
    boxes_K4 = np.array([example.boxes[0] for example in train])
    iou_KK = metrics.iou_matrix(boxes_K4, boxes_K4)
    best = max(range(len(boxes_K4)), key=lambda k: (np.sum(iou_KK[k] > 0.5), iou_KK[k].sum()))
    return "[" + ",".join(f"{edge:.3f}" for edge in boxes_K4[best]) + "]"


def best_constant_sentence(train: Examples) -> str:
    """The training answer with the highest CIDEr-D against the others' references, of a few that are tried."""
    train = train[:MAX_COMPARED_EXAMPLES]
    references = [list(example.answers[:MAX_REFERENCES]) for example in train]
    tried = list(dict.fromkeys(example.answer for example in train))[:MAX_CANDIDATES]
    return max(tried, key=lambda text: captions.cider_d([text] * len(train), references).mean())


def best_constant_tags(train: Examples) -> str:
    """The set of the most frequent tags, as many of them as give the best F1."""
    truth = [parse_tags(example.answer) for example in train]
    order = [word for word, _ in Counter(word for names in truth for word in sorted(names)).most_common()]
    sets = [order[:size] for size in range(1, len(order) + 1)]
    return ", ".join(max(sets, key=lambda said: metrics.tag_scores([said] * len(truth), truth)["f1"]))


def random_box_accuracy(train: Examples, questions: Examples) -> float:
    """The share of hits when a box drawn from the training examples is answered."""
    ours, theirs = (np.array([example.boxes[0] for example in group]) for group in (train, questions))
    return float(np.mean(metrics.iou_matrix(ours, theirs) > 0.5))
