# SPDX-License-Identifier: Apache-2.0
"""Our figures of a released model beside those of its paper: the benchmarks and protocols of each system."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lionjax.core.types import UserError
from lionjax.evaluation.protocols import get_protocol
from lionjax.evaluation.published import model_answers
from lionjax.evaluation.published.discovery import FoundBenchmark, find_benchmarks
from lionjax.evaluation.published_figures import published_figures

INSTRUCTBLIP_SETS = (
    *("gqa", "vizwiz", "textvqa", "flickr30k", "nocaps", "iconqa", "vsr", "visdial", "scienceqa", "okvqa"),
    "hateful_memes",
)
LION_SETS = (*("rec", "coco_karpathy", "flickr30k", "textcaps", "okvqa", "aokvqa", "gqa", "iconqa", "vsr", "visdial"),)
LLAVA_SETS = ("pope", "mme", "scienceqa", "gqa", "vqav2", "textvqa", "vizwiz", "seed")


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """What a paper reports: {benchmark: protocol}, and how its models' names begin among the published figures."""

    protocols: Mapping[str, str]
    models: str


REPRODUCTIONS: Mapping[str, Reproduction] = {
    "llava-1.5": Reproduction(dict.fromkeys(LLAVA_SETS, "llava") | {"mmbench": "vlmevalkit"}, "LLaVA-1.5"),
    "blip2": Reproduction({"gqa": "lavis", "nocaps": "blip2", "mme": "official"}, "BLIP-2"),
    "instructblip": Reproduction(
        {"pope": "official", "mme": "official"} | dict.fromkeys(INSTRUCTBLIP_SETS, "lavis"), "InstructBLIP"
    ),
    "kosmos2": Reproduction({"rec": "kosmos2"}, "Kosmos-2"),
    "shikra": Reproduction({"rec": "shikra", "vqav2": "official", "okvqa": "official"}, "Shikra"),
    "lion": Reproduction(dict.fromkeys(LION_SETS, "lion") | {"pope": "official", "mmbench": "vlmevalkit"}, "LION"),
    "nextchat": Reproduction({"rec": "nextchat", "pope": "shikra", "res": "nextchat", "reg": "nextchat"}, "NExT-Chat"),
}


@dataclasses.dataclass(frozen=True)
class ReproducedFigure:
    """One figure of ours with those of the paper under the same protocol, each "model: figure"."""

    label: str
    protocol: str
    name: str
    value: float | None
    interval: Sequence[float] | None
    answered: int
    questions: int
    papers: tuple[str, ...]
    note: str = ""


def find_paper_benchmarks(system: str, root: Path, image_dir: str = "", only: str = "") -> list[FoundBenchmark]:
    """The benchmarks under `root` that the paper of a system reports; `only`: this one.

    Raises UserError if there is none, with the names of those that it has.
    """
    wanted = REPRODUCTIONS[system].protocols
    if only and only not in wanted:
        raise UserError(f"the figures of {system} kept here are of {', '.join(wanted)}, not of {only!r}")
    found = [entry for entry in find_benchmarks(root, image_dir)[0] if entry.name in ({only} if only else wanted)]
    if not found:
        names = only or ", ".join(wanted)
        raise UserError(f"no file of {names} was found under {root}; docs/benchmarks.md lists the files")
    return found


def reproduce_figures(
    system: str, model: Any, found: Sequence[FoundBenchmark], limit: int | None = None, folder: Path | None = None
) -> tuple[list[ReproducedFigure], dict[str, str]]:
    """(our figures beside the paper's, {benchmark: why it has none}) of a released model.

    `folder`: where answers and results are written. POPE's mean over its three settings is added where all are there.
    """
    figures, left_out, pope = [], {}, {}
    for benchmark in found:
        protocol = get_protocol(benchmark.name, REPRODUCTIONS[system].protocols[benchmark.name])
        try:
            entry = model_answers.evaluate_model(
                model,
                benchmark.name,
                benchmark.source,
                protocol,
                limit=limit,
                folder=folder,
                label=benchmark.label,
                source_path=str(benchmark.path),
            )
        except UserError as error:
            left_out[benchmark.label] = str(error)
            continue
        figures.append(_figure(system, entry, limit))
        if benchmark.name == "pope":
            pope[benchmark.path.stem] = entry["figures"]
    if len(pope) == 3:
        mean = sum(values["f1_score"] for values in pope.values()) / 3
        first = next(figure for figure in figures if figure.label.startswith("pope/"))
        figures.append(dataclasses.replace(first, label="pope, mean of three settings", value=mean, interval=None))
    return figures, left_out


def _figure(system: str, entry: Mapping[str, Any], limit: int | None) -> ReproducedFigure:
    main = entry["main_figure"] or {"name": "to be judged", "value": None}
    notes = [f"the first {limit:,} questions" if limit else "", entry["protocol_settings"]["note"]]
    return ReproducedFigure(
        entry["label"],
        entry["protocol"],
        main["name"],
        main["value"],
        entry.get("interval"),
        entry["answered"],
        entry["questions"],
        paper_figures(system, entry["benchmark"], entry["protocol"]),
        "; ".join(filter(None, notes)),
    )


def paper_figures(system: str, benchmark: str, protocol: str) -> tuple[str, ...]:
    """The figures of a system's models on a benchmark under a protocol, as "model: figure"."""
    return tuple(
        f"{peer.model}: {peer.figure}{' (trained on its train split)' if peer.trained else ''}"
        for peer in published_figures(benchmark)
        if peer.protocol == protocol and peer.model.startswith(REPRODUCTIONS[system].models)
    )
