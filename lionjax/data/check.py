# SPDX-License-Identifier: Apache-2.0
"""What the data of an experiment lack on disk: files and pictures of each source, and tasks that no source has.

A source with a method `paths()` names the files and folders that it reads; others are only opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.errors import UserError
from lionjax.core.experiment import Experiment, Mix
from lionjax.data import tokenizer
from lionjax.data.config import DataConfig
from lionjax.data.datasets.annotated_images import AnnotatedImages
from lionjax.data.datasets.source import open_split

MAX_PICTURES = 1000  # of each source; they are spread evenly over its records
FOUND, MISSING = "found", "missing"


@dataclass(frozen=True)
class Finding:
    """One line of a check. `problem`: what is missing, as a part of a sentence; empty if nothing is.

    `stage`: its name, or "all" for what all stages need. `entry`: the mixture entry. `what`: a path, or the number of
    pictures or examples.
    """

    stage: str
    entry: str
    source: str
    what: str
    problem: str = ""

    @property
    def state(self) -> str:
        return MISSING if self.problem else FOUND


def check_experiment(experiment: Experiment) -> list[Finding]:
    """The findings of each stage and source in turn, then those of tokenizers and initial weights."""
    sources = {source.name: source for source in experiment.data.sources}
    states = {name: check_source(source, experiment.data) for name, source in sources.items()}
    findings = []
    for stage in experiment.stages:
        for mix in stage.mixture:
            findings += check_entry(stage.name, mix, states)
    return [*findings, *check_tokenizers(experiment), *check_weights(experiment)]


@dataclass(frozen=True)
class SourceState:
    """The findings of a source without a stage, and its number of examples by task; None: it cannot be opened."""

    findings: tuple[Finding, ...]
    task_sizes: dict[str, int] | None


def check_source(source: Any, data: DataConfig) -> SourceState:
    """Whether the files of a source are there, and when they are, its tasks and pictures."""
    paths = source.paths() if hasattr(source, "paths") else ()
    lacking = {path for path in paths if not path.exists()}
    findings = [
        Finding(
            "", "", source.name, str(path), f"{path} of source {source.name!r} is missing" if path in lacking else ""
        )
        for path in paths
    ]
    if lacking:
        return SourceState(tuple(findings), None)
    try:
        dataset = open_split(source, "train", data.processor.max_pixels)
    except UserError as error:
        findings.append(Finding("", "", source.name, "records", f"source {source.name!r} cannot be opened: {error}"))
        return SourceState(tuple(findings), None)
    findings += _check_pictures(source.name, dataset)
    if problems := list(dataset.row_problems()):
        what = f"{len(problems)} rows that cannot be used"
        problem = "" if data.on_bad_record == "replace" else f"source {source.name!r} has {what}: {problems[0]}"
        findings.append(Finding("", "", source.name, what, problem))
    return SourceState(tuple(findings), dict(dataset.task_sizes))


def _check_pictures(name: str, dataset: Any) -> Iterator[Finding]:
    """One finding for at most `MAX_PICTURES` of a source's pictures."""
    if not isinstance(dataset, AnnotatedImages):
        return
    named = [k for k, info in enumerate(dataset.image_infos) if info.name and k not in dataset.embedded]
    if not named:
        return
    chosen = [named[k] for k in np.unique(np.linspace(0, len(named) - 1, min(len(named), MAX_PICTURES)).astype(int))]
    lacking = [path for k in chosen if not (path := dataset.image_path(k)).is_file()]
    problem = (
        f"{len(lacking)} of {len(chosen)} pictures of source {name!r} are missing, such as {lacking[0]}"
        if lacking
        else ""
    )
    yield Finding("", "", name, f"{len(chosen) - len(lacking)} of {len(chosen)} pictures looked for", problem)


def check_entry(stage: str, mix: Mix, states: dict[str, SourceState]) -> list[Finding]:
    """The findings of one mixture entry: those of the sources that may have its task, and its number of examples."""
    entry = mix.spec
    names = [mix.source] if mix.source else list(states)
    if mix.source and mix.source not in states:
        known = ", ".join(states)
        problem = f"stage {stage!r} asks for {entry!r}, but there is no source {mix.source!r}, only {known}"
        return [Finding(stage, entry, mix.source, "source", problem)]
    opened = {name: states[name].task_sizes for name in names}
    having = [name for name, sizes in opened.items() if sizes and mix.task in sizes]
    shown = having or names
    findings = [replace(finding, stage=stage, entry=entry) for name in shown for finding in states[name].findings]
    if having:
        total = sum(opened[name][mix.task] for name in having)
        return [*findings, Finding(stage, entry, ", ".join(having), f"{total} examples")]
    if all(sizes is not None for sizes in opened.values()):
        tasks = "; ".join(f"{name}: {', '.join(sizes)}" for name, sizes in opened.items())
        problem = f"stage {stage!r} asks for {entry!r}, which no source has ({tasks})"
        findings.append(Finding(stage, entry, ", ".join(names), "task", problem))
    return findings


def check_tokenizers(experiment: Experiment) -> list[Finding]:
    """Whether the tokenizers of the language model and of a Q-Former that reads the question are there."""
    processor = experiment.data.processor
    names = [processor.tokenizer] + [processor.question_tokenizer] * experiment.model.info.reads_question
    findings = []
    for name in dict.fromkeys(names):
        try:
            tokenizer.tokenizer_file(name)
            findings.append(Finding("all", "tokenizer", "", name))
        except UserError as error:
            findings.append(Finding("all", "tokenizer", "", name, str(error)))
    return findings


def check_weights(experiment: Experiment) -> list[Finding]:
    """Whether the files of initial weights are there, as one file or in shards."""
    findings = []
    for part, file in experiment.weights:
        path = Path(file.partition("#")[0])
        is_elsewhere = file.startswith(("shipped:", "hf:/"))  # in the package, or on the hub
        is_there = is_elsewhere or path.is_file() or any(path.parent.glob(f"{path.stem}-*.safetensors"))
        problem = "" if is_there else f"the weights {path} of {part!r} are missing"
        findings.append(Finding("all", f"weights of {part}", "", str(path), problem))
    return findings


def summarize(findings: Sequence[Finding]) -> str:
    """One sentence about what is missing; empty if nothing is."""
    problems = list(dict.fromkeys(finding.problem for finding in findings if finding.problem))
    if not problems:
        return ""
    more = f" ({len(problems)} things are missing)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}; the table lists what to add or mend"
