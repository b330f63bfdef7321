# SPDX-License-Identifier: Apache-2.0
"""The figures of one benchmark: metrics with intervals, metrics by kind of question, and the table of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lionjax.evaluation.tasks import SCORERS, TaskScores


def summarize_scores(prefix: str, scores: Mapping[str, TaskScores]) -> dict[str, Any]:
    """Metrics, intervals and details of the answers, and the metrics of each variant.

    `prefix` (the source, for a benchmark of one source) is prepended to the metrics' keys.
    """

    def with_prefix(values: Mapping[str, Any]) -> dict[str, Any]:
        return {prefix + key: value for key, value in values.items()}

    answers = scores["answers"]
    entry = {
        "metrics": with_prefix(answers.metrics),
        "intervals": with_prefix(answers.bootstrap_intervals()),
        "details": answers.details,
    }
    variants = {variant: with_prefix(s.metrics) for variant, s in scores.items() if variant != "answers"}
    return entry | variants


def metrics_by_kind(
    task: str, examples: Sequence[Any], texts_by_variant: Mapping[str, Sequence[str]]
) -> dict[str, dict]:
    """{kind: {"samples": count, variant: metrics}}, e.g. for color and count questions, or POPE's three settings."""
    kinds = {}
    for kind in dict.fromkeys(example.kind for example in examples):
        indices = [index for index, example in enumerate(examples) if example.kind == kind]
        group = [examples[index] for index in indices]
        metrics = {
            variant: SCORERS[task](group, [texts[index] for index in indices]).metrics
            for variant, texts in texts_by_variant.items()
        }
        kinds[kind] = {"samples": len(indices), **metrics}
    return kinds


def describe_questions(entry: Mapping[str, Any]) -> str:
    """How many questions of what split, and how many of them are about records that the model was trained on."""
    samples, trained = entry["samples"], entry.get("trained_on", 0)
    split = entry["split"] if entry.get("has_splits", True) else "all records (no split is held out)"
    words = f"{samples} questions of {split}"
    if left_out := entry.get("left_out"):
        words += f", without {left_out['questions']} that could not be read or asked"
    if not trained:
        return words
    share = "all" if trained == samples else str(trained)
    return f"{words}, {share} of them about records that the model was trained on"


def metrics_table(entry: Mapping[str, Any]):
    """The metrics of one benchmark as a rich table."""
    from rich.table import Table

    variants = ("teacher_forced", "untagged", "blind", "tags_alone", "majority")
    variants = [name for name in variants if name in entry]
    title = f"{entry['benchmark']}: {describe_questions(entry)}"
    table = Table("", title=title, title_justify="left")
    for name in ("this model", "95 %", *(name.replace("_", " ") for name in variants)):
        table.add_column(name, justify="right")
    for key, value in entry["metrics"].items():
        low, high = entry["intervals"].get(key, (None, None))
        interval = "" if low is None else f"{low:.3f} – {high:.3f}"
        table.add_row(key, f"{value:.3f}", interval, *(f"{entry[name][key]:.3f}" for name in variants))
    for kind, group in entry.get("kinds", {}).items():
        key = next(iter(group["answers"]))
        row = [f"{group[name][key]:.3f}" for name in ("answers", *variants)]
        table.add_row(f"  {kind} ({group['samples']})", row[0], "", *row[1:], style="dim")
    for key, value in entry["details"].items():
        table.add_row(f"  {key}", f"{value:.3f}", "", style="dim")
    return table
