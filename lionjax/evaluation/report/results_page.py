# SPDX-License-Identifier: Apache-2.0
"""The page of published benchmarks: one table as HTML and Markdown, and a gallery of answers that can be filtered.

Reads `published` of a folder's report.json and the files evaluation/LABEL_PROTOCOL.jsonl, and runs no model. The page
embeds its images and works offline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lionjax.core.files import read_json, read_jsonl, write_atomic
from lionjax.core.types import UserError
from lionjax.evaluation.published.model_answers import RIGHT_SCORE, result_stem
from lionjax.evaluation.report import html

COLUMNS = (
    *("benchmark", "protocol", "figure", "this model", "95 %", "image-blind", "best constant"),
    *("published, same protocol", "questions", "trained on its train split", "seconds"),
)
NUMBER_COLUMNS = ("this model", "95 %", "image-blind", "best constant", "questions", "seconds")
MAX_PEERS = 6  # published figures in a cell
MAX_CHARS = 400  # of an answer in the gallery


def write_results_page(folder: Path) -> tuple[Path, Path]:
    """Write results.html and results.md into a folder with results; returns both paths.

    Raises UserError if its report.json has none.
    """
    report = read_json(folder / "report.json") or {}
    entries = list((report.get("published") or {}).values())
    left_out = report.get("published_left_out") or {}
    if not entries and not left_out:
        raise UserError(f"{folder} has no results of published benchmarks; run lionjax evaluate --benchmark all")
    rows = [table_row(entry) for entry in entries]
    title = f"Published benchmarks: {folder.resolve().name}"
    paths = folder / "results.html", folder / "results.md"
    write_atomic(paths[1], markdown_page(title, rows, left_out))
    body = [html_table(rows), notes_section(left_out), gallery_section(entries, folder)]
    write_atomic(paths[0], html.render_page(html.escape(title), "\n".join(filter(None, body))))
    return paths


def table_row(entry: Mapping[str, Any]) -> dict[str, str]:
    """{column: text} of a result."""
    main, interval = entry.get("main_figure") or {}, entry.get("interval")
    peers = [peer for peer in entry["published"] if peer["protocol"] == entry["protocol"]]
    shown = [f"{peer['model']}: {peer['figure']}{' (trained)' if peer['trained'] else ''}" for peer in peers]
    more = [f"{len(shown) - MAX_PEERS} more"] if len(shown) > MAX_PEERS else []
    questions = f"{entry['answered']:,}"
    if entry["answered"] != entry["questions"]:
        questions += f" of {entry['questions']:,}"
    if missing := (entry.get("missing_pictures") or {}).get("count"):
        questions += f"; {missing:,} pictures missing"
    if too_long := (entry.get("long_prompts") or {}).get("count"):
        questions += f"; {too_long:,} prompts too long"
    trained = {True: "yes", False: "no"}.get(entry["trained_on_train_split"], "unknown")
    values = (
        entry.get("label", entry["benchmark"]),
        entry["protocol"],
        main.get("name", "to be judged"),
        format_number(main.get("value")),
        " – ".join(map(format_number, interval)) if interval else "",
        format_number((entry.get("blind") or {}).get("value")),
        format_number((entry.get("majority") or {}).get("value")),
        "; ".join(shown[:MAX_PEERS] + more),
        questions,
        trained,
        format_number(entry.get("seconds")),
    )
    return dict(zip(COLUMNS, values))


def format_number(value: Any) -> str:
    """A number with four digits behind the point below 10, else two; "" for None."""
    return "" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def markdown_page(title: str, rows: Sequence[Mapping[str, str]], left_out: Mapping[str, str]) -> str:
    """The table and what is left out, as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"

    marks = ["---:" if column in NUMBER_COLUMNS else "---" for column in COLUMNS]
    lines = [f"# {title}", "", line(COLUMNS), line(marks), *(line(list(row.values())) for row in rows)]
    if left_out:
        lines += ["", "Left out:", "", *(f"- {label}: {reason}" for label, reason in left_out.items())]
    return "\n".join(lines) + "\n"


def html_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The table of results."""
    heads = [html.number_cell(name, "th") if name in NUMBER_COLUMNS else name for name in COLUMNS]
    cells = [
        [html.number_cell(text) if name in NUMBER_COLUMNS else html.escape(text) for name, text in row.items()]
        for row in rows
    ]
    return html.render_table(heads, cells)


def notes_section(left_out: Mapping[str, str]) -> str:
    """How the columns are made, and what is left out and why."""
    notes = (
        "Intervals are 95 % bootstrap intervals over the questions. Image-blind: the same model with blank images. "
        "Best constant: one answer to all questions, chosen on these questions."
    )
    items = "".join(f"<li>{html.escape(f'{label}: {reason}')}</li>" for label, reason in left_out.items())
    return f'<p class="faint">{notes}</p>' + (f"<h2>Left out</h2><ul>{items}</ul>" if items else "")


def gallery_section(entries: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """The answers with a copy of their picture, as cards, under controls that choose among them."""
    cards, labels = [], []
    for entry in entries:
        label, rows = str(entry.get("label", entry["benchmark"])), []
        for row in read_jsonl(folder / "evaluation" / f"{result_stem({'label': label} | dict(entry))}.jsonl"):
            rows += [row] if row.get("picture_copy") else []
        labels += [label] if rows else []
        cards += [gallery_card(label, row, folder) for row in rows]
    if not cards:
        return ""
    return (
        f"<h2>Answers</h2>{html.filter_controls(labels)}"
        f'<div class="answers">{"".join(cards)}</div>{html.filter_script()}'
    )


def gallery_card(label: str, row: Mapping[str, Any], folder: Path) -> str:
    """One answer; its benchmark and whether it is right stand in attributes."""
    score = row.get("score")
    mark = "" if score is None else "right" if score >= RIGHT_SCORE else "wrong"
    sign = {"right": "✓ ", "wrong": "✗ "}.get(mark, "")
    drawn = {key: row.get(key) for key in ("boxes", "truth_boxes")} if "truth_boxes" in row else {}
    image = html.annotated_image({"image": row["picture_copy"], **drawn}, folder)
    truth = html.join_references(row.get("truth") or "")
    attributes = f' data-benchmark="{html.escape(label)}" data-mark="{mark}"'
    return html.render_card(image, str(row.get("question", "")), sign + shown_answer(row), mark, truth, attributes)


def shown_answer(row: Mapping[str, Any]) -> str:
    """The answer of a row as text: what was said, the likeliest candidate's place, or a probability."""
    answer = row.get("answer")
    if answer is None and isinstance(row.get("scores"), list):
        answer = f"candidate {row['scores'].index(max(row['scores'])) + 1}"
    if answer is None:
        answer = row.get("proba", "")
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} ..."
