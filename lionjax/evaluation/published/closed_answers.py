# SPDX-License-Identifier: Apache-2.0
"""Scorers of multiple choice, of yes-or-no questions and of ranked candidates."""

from __future__ import annotations

from typing import Any

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.mme import COGNITION, PERCEPTION
from lionjax.data.datasets.question_file import OPTION_LETTERS
from lionjax.evaluation.metrics import choices, ranking, vqa, yes_no
from lionjax.evaluation.protocols import Protocol
from lionjax.evaluation.published.open_answers import Rows, percent


def score_scienceqa(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """ScienceQA as LLaVA reads and prints it; `parsed` has the index of each option, -1 for a letter of none."""
    parsed, correct, with_image = {}, [], []
    for row in rows:
        letter = vqa.parse_choice(row.text)
        index = OPTION_LETTERS.index(letter) if letter else -1
        parsed[row.annotation.question_id] = index if index < len(row.annotation.choices) else -1
        correct.append(parsed[row.annotation.question_id] == row.annotation.facts["target"])
        with_image += [correct[-1]] if row.image.name else []
    accuracy, image_accuracy = percent(correct), percent(with_image) if with_image else float("nan")
    printed = f"Total: {len(rows)}, Correct: {sum(correct)}, Accuracy: {accuracy:.2f}%"
    figures = {"printed": f"{printed}, IMG-Accuracy: {image_accuracy:.2f}%", "parsed": parsed}
    return figures | {"accuracy": accuracy, "image_accuracy": image_accuracy if with_image else None}


def score_mmbench(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """MMBench in percent: circular (a question counts if every rotation is right), and of the first rotation alone."""
    predicted, truth, correct = {}, {}, {}
    kinds, coarse, vanilla = {}, {}, {}
    for row in rows:
        index, facts = row.annotation.question_id, row.annotation.facts
        letters = dict(zip(OPTION_LETTERS, row.annotation.choices))
        predicted[index] = choices.read_option(row.text, letters) or "Z"
        if facts["target"] is None:
            raise UserError(f"row {index} of the TSV has no answer; score the dev split, and submit the test split")
        truth[index] = OPTION_LETTERS[facts["target"]]
        is_right, question = predicted[index] == truth[index], facts["question_id"]
        correct.setdefault(question, []).append(is_right)
        kinds.setdefault(question, row.annotation.kind)
        coarse.setdefault(question, facts["l2"])
        if index == question:
            vanilla[question] = is_right
    passed = choices.circular_accuracy(correct)
    figures = {"circular_lmms_static": _by_group(passed, kinds, coarse)}
    figures |= {"vanilla": _by_group(vanilla, kinds, coarse)} if vanilla else {}
    return figures | {"prefetched": predicted, "gt": truth}


def _by_group(passed: dict[str, bool], kinds: dict[str, str], coarse: dict[str, str]) -> dict[str, Any]:
    groups: dict[str, dict[str, list[bool]]] = {"category": {}, "l2": {}}
    for question, is_right in passed.items():
        for name, labels in (("category", kinds), ("l2", coarse)):
            groups[name].setdefault(labels[question], []).append(is_right)
    means = {name: {label: percent(group) for label, group in rows.items()} for name, rows in groups.items()}
    return {"overall": percent(passed.values())} | means


def score_seed(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """SEED-Bench in percent, of all questions and by image and video; an answer is the letter alone (LLaVA)."""
    correct: dict[str, list[bool]] = {"all": []}
    for row in rows:
        is_right = row.text == OPTION_LETTERS[row.annotation.facts["target"]]
        for group in ("all", row.annotation.facts["data_type"]):
            correct.setdefault(group, []).append(is_right)
    return {group: percent(values) for group, values in correct.items()}


def score_iconqa(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """IconQA's accuracy in percent on the questions with options in text, and their ids.

    An answer is an option's index, its text or its letter; how the model was asked is the protocol's answer form.
    """
    correct, unreadable = [], 0
    for row in rows:
        given = row.prediction if isinstance(row.prediction, int) else row.text
        index = given if isinstance(given, int) else choices.read_candidate(given, row.annotation.choices)
        unreadable += index is None
        correct.append(index == row.annotation.facts["target"])
    ids = [row.annotation.question_id for row in rows]
    return {"accuracy": percent(correct), "unreadable": unreadable, "text_choice_ids": ids}


def score_vsr(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """VSR's accuracy in percent, by relation, with the number of answers that are neither true nor false."""
    read = yes_no.YES_NO_READERS[protocol.reader]
    predicted, labels = [read(row.text) for row in rows], [row.annotation.answers == ("yes",) for row in rows]
    relations: dict[str, list[bool]] = {}
    for row, answer, label in zip(rows, predicted, labels):
        relations.setdefault(row.annotation.facts["relation"], []).append(answer is label)
    scores = yes_no.yes_no_scores(predicted, labels)
    figures = {"accuracy": 100 * scores["accuracy"], "f1_score": scores["f1_score"]}
    figures |= {"unreadable": predicted.count(None), "majority": percent(label is True for label in labels)}
    return figures | {"by_relation": {name: percent(values) for name, values in relations.items()}}


def score_visdial(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """VisDial's R@k, MRR (0..1), mean rank and NDCG; `ties` counts rounds whose true answer shares its score.

    An answer is `scores`, one number for each candidate, the higher the likelier.
    """
    ranks, gains, ties = [], [], 0
    for row in rows:
        scores = row.prediction.get("scores") if isinstance(row.prediction, dict) else row.prediction
        number, target = row.annotation.question_id, row.annotation.facts["target"]
        if not isinstance(scores, list) or not all(map(typed_rows.is_number, scores)):
            raise UserError(f"round {number} has no 'scores'; give a number for each candidate answer")
        if len(scores) != len(row.annotation.choices):
            raise UserError(f"round {number} has {len(scores)} scores for {len(row.annotation.choices)} candidates")
        ranks.append(ranking.mean_ranks(np.array(scores))[target])
        ties += scores.count(scores[target]) > 1
        if (relevance := row.annotation.facts.get("relevance")) is not None:
            gains.append(ranking.ndcg(np.array(scores), np.array(relevance)))
    figures = ranking.retrieval_scores(ranks) | ({"ndcg": float(np.mean(gains))} if gains else {})
    return figures | {"ties": ties}


def score_hateful_memes(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """AUROC of P(yes) and accuracy in percent; an answer has `proba` in 0..1, and `label` (else proba >= 0.5)."""
    probabilities, predicted, labels = [], [], []
    for row in rows:
        given, label = row.prediction, row.annotation.facts["label"]
        value = given.get("proba") if isinstance(given, dict) else given
        if not typed_rows.is_number(value) or label not in (0, 1):
            number = row.annotation.question_id
            raise UserError(
                f"row {number} has {typed_rows.abbreviate(value)} as 'proba' and the label {label!r}; give both"
            )
        probabilities.append(float(value))
        stated = given.get("label") if isinstance(given, dict) else None
        predicted.append(value >= 0.5 if stated is None else bool(stated))
        labels.append(bool(label))
    accuracy = percent(answer == label for answer, label in zip(predicted, labels))
    area = yes_no.auroc(probabilities, labels)
    return {"auroc": None if np.isnan(area) else 100 * area, "accuracy": accuracy}


def score_pope(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """POPE's figures, 0..1; `unreadable` counts answers that are neither yes nor no under this protocol."""
    read = yes_no.YES_NO_READERS[protocol.reader]
    predicted = [read(row.text) for row in rows]
    labels = [vqa.parse_yes_no(row.annotation.answers[0]) is True for row in rows]
    return yes_no.yes_no_scores(predicted, labels) | {"unreadable": predicted.count(None)}


def score_mme(rows: Rows, protocol: Protocol) -> dict[str, Any]:
    """MME's score of each task (at most 200), and their sums over perception and cognition."""
    read, tasks = yes_no.YES_NO_READERS[protocol.reader], {}
    for row in rows:
        is_right = read(row.text) is (row.annotation.answers == ("yes",))
        tasks.setdefault(row.annotation.kind, {}).setdefault(row.image.name, []).append(is_right)
    figures = {task: yes_no.mme_task_score(images) for task, images in tasks.items()}
    sums = {"perception": PERCEPTION, "cognition": COGNITION}
    return {name: sum(figures.get(task, 0.0) for task in group) for name, group in sums.items()} | figures
