# SPDX-License-Identifier: Apache-2.0
"""Run all published benchmarks under a folder with one model; the results page shows them in one table."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lionjax.core.files import read_record, take_record, write_json
from lionjax.core.types import UserError
from lionjax.evaluation.protocols import PROTOCOLS, Protocol, get_protocol
from lionjax.evaluation.published import model_answers
from lionjax.evaluation.published.discovery import FoundBenchmark, find_benchmarks

log = logging.getLogger(__name__)


def evaluate_root(
    model: Any,
    root: Path,
    folder: Path,
    protocol_name: str = "",
    image_dir: str = "",
    split: str = "heldout",
    limit: int | None = None,
    blind: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(results of the benchmarks under `root`, {file or label: why it has none}), written into `folder`.

    `protocol_name`: of the benchmarks that have it; the others have their default. A benchmark with a result of the
    same settings in the folder's report.json is not run again, so that a killed run continues. Raises UserError if
    nothing under `root` is a benchmark.
    """
    found, left_out = find_benchmarks(root, image_dir)
    recorded = read_record(folder / "report.json").get("published", {})
    entries = []
    for number, benchmark in enumerate(found, 1):
        protocol = choose_protocol(benchmark.name, protocol_name)
        settings = {"split": split, "limit": limit, "updates": model.updates, "source": str(benchmark.path.resolve())}
        entry = recorded.get(f"{benchmark.label}@{protocol.name}", {})
        if model.updates is not None and settings == {key: entry.get(key) for key in settings}:
            if not blind or "blind" in entry or not entry.get("figures"):
                entries.append(entry)
                continue
        log.info("%d of %d: %s, protocol %s", number, len(found), benchmark.label, protocol.name)
        try:
            entries.append(_evaluate(model, benchmark, protocol, folder, settings, blind))
        except UserError as error:
            log.warning("%s is left out: %s", benchmark.label, error)
            left_out[benchmark.label] = str(error)
    report = take_record(folder / "report.json")
    write_json(folder / "report.json", report | {"published_left_out": left_out})
    return entries, left_out


def choose_protocol(benchmark: str, name: str) -> Protocol:
    """The protocol of a benchmark by its name, or its default where it has none of that name."""
    return get_protocol(benchmark, name if name in {one.name for one in PROTOCOLS[benchmark]} else "")


def _evaluate(
    model: Any, benchmark: FoundBenchmark, protocol: Protocol, folder: Path, settings: dict[str, Any], blind: bool
) -> dict[str, Any]:
    if benchmark.name in ("res", "reason_seg") and not model.processor.config.sam_image_size:
        raise UserError("this model predicts no masks")
    entry = model_answers.evaluate_model(
        model,
        benchmark.name,
        benchmark.source,
        protocol,
        settings["split"],
        settings["limit"],
        folder,
        label=benchmark.label,
        blind=blind,
        source_path=settings["source"],
    )
    return entry
