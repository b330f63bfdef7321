# SPDX-License-Identifier: Apache-2.0
"""Files that the benchmarks' servers take, with the answers that a model gave.

Each writer follows the format that the benchmark's authors, or the published code that prepares submissions, write:
`SERVERS` are the benchmarks. JSON has Python's default separators.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lionjax.core.files import write_atomic
from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages
from lionjax.data.datasets.mmbench import MISSING, MmBench
from lionjax.evaluation.metrics.vqa import normalize_evalai_answer
from lionjax.evaluation.protocols import Protocol
from lionjax.evaluation.published.open_answers import direct_answer
from lionjax.evaluation.published.predictions import AnsweredQuestion, Answers

Rows = Sequence[AnsweredQuestion]
# Columns of MMBench's TSV that its server's sheet lacks, and where the sheet has the answers (LLaVA's converter).
DROPPED_COLUMNS = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_COLUMN = 6


def write_submission(
    name: str, path: Path, protocol: Protocol, dataset: AnnotatedImages, answers: Answers, source: Any
) -> None:
    """Write the file, or for MME the folder, that the server of a benchmark takes.

    Raises UserError for a benchmark without a server, and for a missing package.
    """
    if name not in SERVERS:
        raise UserError(f"{name} has no server that takes a file; choose one of {', '.join(SERVERS)}")
    if name == "mmbench":
        write_mmbench(path, answers.rows, source)
        return
    if name == "mme":
        write_mme(path, answers.rows)
        return
    rows = answers.rows
    if name == "vqav2":  # its server wants every question
        answered = {row.annotation.question_id for row in rows}
        missing = [row for row in dataset.annotations["vqa"] if row.question_id not in answered and not row.problem]
        rows = [*rows, *(AnsweredQuestion(row, dataset.image_infos[row.photo], "") for row in missing)]
        order = {row.question_id: number for number, row in enumerate(dataset.annotations["vqa"])}
        rows.sort(key=lambda row: order[row.annotation.question_id])
    write_atomic(path, TEXT_WRITERS[name](rows, protocol))


def one_line(text: str) -> str:
    """A text without tabs and line ends, each of which becomes a blank."""
    return re.sub(r"[\t\r\n]", " ", text)


def numeric_id(text: str) -> int | str:
    """The id as the benchmark's file has it: a number where it is one."""
    return int(text) if text.isdecimal() else text


def vqav2_json(rows: Rows, protocol: Protocol) -> str:
    """[{question_id: number, answer}] of every question of VQAv2; LLaVA's protocol normalizes as EvalAI."""
    normalize = normalize_evalai_answer if protocol.name == "llava" else one_line
    return json.dumps(
        [{"question_id": numeric_id(row.annotation.question_id), "answer": normalize(row.text)} for row in rows]
    )


def vizwiz_json(rows: Rows, protocol: Protocol) -> str:
    """[{image, answer}] with answers normalized as EvalAI."""
    return json.dumps(
        [{"image": row.annotation.question_id, "answer": normalize_evalai_answer(row.text)} for row in rows]
    )


def gqa_json(rows: Rows, protocol: Protocol) -> str:
    """[{questionId: text, prediction}]; LLaVA's protocol writes lower case without a final dot."""
    is_llava = protocol.reader == "lower_case_without_dot"
    texts = [row.text.rstrip(".").lower() if is_llava else one_line(row.text) for row in rows]
    return json.dumps(
        [{"questionId": row.annotation.question_id, "prediction": text} for row, text in zip(rows, texts)]
    )


def aokvqa_json(rows: Rows, protocol: Protocol) -> str:
    """{question_id: {multiple_choice, direct_answer}}, each where the model gave it."""
    entries: dict[str, dict[str, str]] = {}
    for row in rows:
        given, direct = row.prediction, direct_answer(row.prediction)
        choice = given.get("multiple_choice") if isinstance(given, dict) else None
        parts = {"multiple_choice": choice, "direct_answer": direct}
        entries[row.annotation.question_id] = {key: one_line(text) for key, text in parts.items() if text is not None}
    return json.dumps(entries)


def nocaps_json(rows: Rows, protocol: Protocol) -> str:
    """[{image_id: number, caption}]."""
    return json.dumps(
        [{"image_id": numeric_id(row.annotation.question_id), "caption": one_line(row.text)} for row in rows]
    )


def docvqa_json(rows: Rows, protocol: Protocol) -> str:
    """[{questionId: number, answer}]."""
    return json.dumps(
        [{"questionId": numeric_id(row.annotation.question_id), "answer": one_line(row.text)} for row in rows]
    )


def pope_lines(rows: Rows, protocol: Protocol) -> str:
    """One line {question, answer} a question, in the file's order."""
    lines = [{"question": row.annotation.question, "answer": one_line(row.text)} for row in rows]
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def hateful_memes_csv(rows: Rows, protocol: Protocol) -> str:
    """Lines id,proba,label; the label is 1 from a probability of 0.5 on, unless the answer has one."""
    lines = ["id,proba,label"]
    for row in rows:
        given = row.prediction if isinstance(row.prediction, dict) else {"proba": row.prediction}
        label = given.get("label", int(given["proba"] >= 0.5))
        lines.append(f"{row.annotation.question_id},{given['proba']},{label}")
    return "\n".join(lines) + "\n"


def write_mme(folder: Path, rows: Rows) -> None:
    """TASK.txt of each task with image, question, true and given answer between tabs, in the order of the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    for row in rows:
        task, image, question = row.annotation.question_id.split("/", 2)
        truth = row.annotation.answers[0].capitalize()
        lines.setdefault(task, []).append("\t".join((image, question, truth, one_line(row.text))))
    for task, texts in lines.items():
        write_atomic(folder / f"{task}.txt", "".join(f"{text}\n" for text in texts))


def mmbench_cells(rows: Rows, source: MmBench) -> list[list[int | str | None]]:
    """The cells of MMBench's sheet: the names of the columns, then one row for each row of the TSV.

    The columns of the TSV without `DROPPED_COLUMNS`, and `prediction` as the seventh; empty cells are None.
    """
    answers = {row.annotation.question_id: row.text for row in rows}
    cells: list[list[int | str | None]] = []
    for _, row in source.rows("heldout"):
        if not isinstance(row, dict):
            continue
        kept = {name: None if text in MISSING else text for name, text in row.items() if name not in DROPPED_COLUMNS}
        if not cells:
            names: list[int | str | None] = list(kept)
            cells.append([*names[:PREDICTION_COLUMN], "prediction", *names[PREDICTION_COLUMN:]])
        values: list[int | str | None] = [numeric_id(row["index"]), *list(kept.values())[1:]]
        prediction = answers.get(row["index"])
        cells.append([*values[:PREDICTION_COLUMN], prediction, *values[PREDICTION_COLUMN:]])
    return cells


def write_mmbench(path: Path, rows: Rows, source: MmBench) -> None:
    """MMBench's sheet as an .xlsx file. Raises UserError without the package openpyxl."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise UserError('an .xlsx file needs openpyxl; install it with `pip install "lionjax[xlsx]"`') from error
    book = Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    for number, cells in enumerate(mmbench_cells(rows, source), 1):
        for column, value in enumerate(cells, 1):
            cell = sheet.cell(number, column)
            cell.value = ILLEGAL_CHARACTERS_RE.sub("", value) if isinstance(value, str) else value
            if isinstance(value, str):
                cell.data_type = "s"  # an answer such as "=1" is no formula
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


TEXT_WRITERS: Mapping[str, Callable[[Rows, Protocol], str]] = {
    "vqav2": vqav2_json,
    "okvqa": vqav2_json,
    "vizwiz": vizwiz_json,
    "gqa": gqa_json,
    "aokvqa": aokvqa_json,
    "coco_karpathy": nocaps_json,
    "nocaps": nocaps_json,
    "docvqa": docvqa_json,
    "pope": pope_lines,
    "hateful_memes": hateful_memes_csv,
}
SERVERS = (*TEXT_WRITERS, "mme", "mmbench")
