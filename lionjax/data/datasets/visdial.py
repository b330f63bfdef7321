# SPDX-License-Identifier: Apache-2.0
"""Visual Dialog v1.0 (arXiv 1611.08669) as published: visdial_1.0_val.json and its dense annotations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.data.datasets.annotation_files import read_json
from lionjax.data.datasets.question_file import Question, QuestionFile, list_rows


@dataclass(frozen=True)
class VisDial(QuestionFile):
    """Each round of a dialog as task `conversation` after the true rounds before it; its id is IMAGE/ROUND (from 1).

    `choices` are the candidate answers (100 in the release), `facts["target"]` the true one's index. `dense`: the file
    of relevance annotations, which give one round of each image `facts["relevance"]`.
    """

    dense: str = ""
    name: str = "visdial"
    TASK = "conversation"
    FURTHER_FILES = ("dense",)

    def rows(self, split: str) -> Iterator[tuple[str, object]]:
        path = Path(self.file)
        tree = read_json(path)
        data = tree.get("data") if isinstance(tree, dict) else None
        if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in ("questions", "answers")):
            raise UserError(f"{path} has no lists 'questions' and 'answers' in 'data'; give VisDial's file")
        relevance = self._relevance()
        for location, dialog in list_rows(path, "data", "dialogs"):
            texts = {"questions": data["questions"], "answers": data["answers"], "relevance": relevance}
            yield location, {**dialog, **texts} if isinstance(dialog, dict) else dialog

    def _relevance(self) -> dict[str, list[float]]:
        rows = read_json(Path(self.dense)) if self.dense else []
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and {"image_id", "round_id", "gt_relevance"} <= row.keys() for row in rows
        ):
            raise UserError(f"{self.dense} is no list of image_id, round_id and gt_relevance; give VisDial's file")
        return {f"{row['image_id']}/{row['round_id']}": row["gt_relevance"] for row in rows}

    def questions(self, row: dict, location: str) -> Iterator[Question]:
        questions, answers, turns = row["questions"], row["answers"], []
        image = f"VisualDialog_val2018/VisualDialog_val2018_{int(row['image_id']):012d}.jpg"
        for number, part in enumerate(row["dialog"], 1):
            question, answer = questions[part["question"]], answers[part["answer"]] if "answer" in part else ""
            question_id = f"{row['image_id']}/{number}"
            if "answer_options" in part:
                choices = tuple(answers[option] for option in part["answer_options"])
                facts = {"target": part.get("gt_index"), "caption": row.get("caption") or ""}
                if (relevance := row["relevance"].get(question_id)) is not None:
                    if len(relevance) != len(choices):
                        raise UserError(f"{location} has {len(choices)} options but {len(relevance)} relevances")
                    facts["relevance"] = relevance
                fields = {"question_id": question_id, "choices": choices, "facts": facts, "turns": tuple(turns)}
                yield Question("conversation", image, Annotation(0, (answer,), question, **fields))
            turns.append((question, answer))
