# SPDX-License-Identifier: Apache-2.0
"""Which fields of a config may differ when a run is resumed in its folder, and why the others may not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from lionjax.convert.companions import ORIGIN, tokenizer_folders
from lionjax.core import config
from lionjax.core.experiment import Experiment, Stage
from lionjax.core.types import UserError
from lionjax.data import tokenizer
from lionjax.training.bucket_folder import display_name
from lionjax.training.optimizer import learning_rate_schedule

SCHEDULE_FIELDS = (
    r"stages\.\d+\.(steps|learning_rate|warmup_steps|warmup_learning_rate|end_learning_rate|steps_per_epoch)"
)
# Fields with which a run may be resumed with other values (regular expressions): those that do not change the result,
# and those that a person changes to mend what stopped it. Each change is logged and added to changes.jsonl.
MUTABLE_FIELDS = (
    r"name",
    r"mesh\..*",
    r"run\.(log_every|save_every|evaluate_every|evaluate_limit|max_to_keep|cache_features)",
    r"run\.(evaluate_stages|evaluate_pictures|trackers(\.\d+)?)",
    r"run\.(feature_cache_gib|feature_cache_dir)",
    # Change the result only after a bad step, which is when a user has to set them.
    r"run\.(on_bad_step|loss_spike_sigmas|max_bad_steps|watchdog_seconds)",
    r"generation\..*",
    # Moved files. The parameters come from the checkpoints, and records of another number or order are refused.
    r"weights",
    r"data\.sources\.\d+\.(file|folder|image_dir|questions|answers|captions_file|instances_file|refs_file)",
    r"data\.(on_bad_record|max_bad_fraction)",
    r"data\.(num_threads|num_workers|prefetch_buffer_size|image_cache_mib|bad_records_path)",
    # Sources that are added or left out at the end: a begun stage refuses them where they change its records.
    r"data\.sources\.\d+",
    # From the resumed update on, in a stage that is not finished.
    SCHEDULE_FIELDS,
    r"stages\.\d+\.(batch_size|grad_accum_steps|examples_per_row)",
)
TOKENIZER_FIELDS = r"data\.processor\.(tokenizer|question_tokenizer)"
# Why all other fields may not differ: the first pattern that matches.
REASONS = (
    (r"model\..*", "the saved parameters are those of this model"),
    (r"seed", "the initial parameters and the order of the records depend on it"),
    (r"data\.sources.*", "the order of the records depends on it"),
    (r"data\.processor\..*", "the parameters are trained on prompts and images made with it"),
    (r"data\..*", "the parameters are trained on records made with it"),
    (r"run\.frozen_dtype", "the frozen parameters are saved with it"),
    (r".*", "the saved parameters depend on it"),
)
STAGE_REASONS = (
    ("name|mixture", "the order of its records depends on it"),
    ("trainable|optimizer|moment_dtype|second_moment|clip_norm|lr_multipliers", "its optimizer state depends on it"),
    (".*", "its updates so far were made with it"),
)


@dataclasses.dataclass(frozen=True)
class RunChanges:
    """The differences between the config of a run folder and that of this start: {field: (old value, new value)}.

    `notes`: sentences on their effect. `reopened`: the index of a finished stage that has more steps now.
    """

    fields: dict[str, tuple[Any, Any]]
    notes: tuple[str, ...] = ()
    reopened: int | None = None


def plan_changes(workdir: Path, old: Experiment, new: Experiment, positions: list[tuple[int, int]]) -> RunChanges:
    """The changes from the config `old` of a run folder to `new`; `positions`: its `run_folder.saved_positions`.

    Raises UserError with all fields that cannot change, and why.
    """
    stage, step = positions[0] if positions else (0, 0)
    fields = _merge_whole_entries(config.diff_configs(old, new), old, new)
    reopened = stage - 1 if not step and f"stages.{stage - 1}.steps" in fields else None
    if reopened is not None and new.stages[reopened].steps < old.stages[reopened].steps:
        reopened = None
    refused = []
    for name, (before, after) in fields.items():
        reason = _why_not(workdir, old, new, name, (stage, step), reopened)
        refused += [f"{name} {before!r} -> {after!r} ({reason})"] if reason else []
    if refused:
        raise UserError(
            f"{display_name(workdir)} was made by another config: {'; '.join(refused)}; restore what is named here, "
            "or set another --workdir"
        )
    current = stage if step else reopened
    notes = [] if current is None else _current_stage_notes(old, new, fields, current, positions)
    notes += [f"stage {part.name!r} is added at the end" for part in new.stages[len(old.stages) :]]
    return RunChanges(fields, tuple(notes), reopened)


def _merge_whole_entries(fields: dict[str, tuple], old: Experiment, new: Experiment) -> dict[str, tuple]:
    """The differences with one entry "stages.2" or "data.sources.1" for all fields of what is added or left out."""
    merged: dict[str, tuple] = {}
    for name, values in fields.items():
        match = re.match(r"(stages|data\.sources)\.(\d+)\.", name)
        both = [_entries(one, match[1]) for one in (old, new)] if match else []
        if match and int(match[2]) >= min(map(len, both)):
            index = int(match[2])
            names = (entries[index].name if index < len(entries) else None for entries in both)
            merged[f"{match[1]}.{index}"] = tuple(names)
        else:
            merged[name] = values
    return merged


def _entries(experiment: Experiment, name: str) -> tuple:
    return experiment.stages if name == "stages" else experiment.data.sources


def _stage_index(name: str) -> int | None:
    match = re.match(r"stages\.(\d+)", name)
    return int(match[1]) if match else None


def _why_not(
    workdir: Path, old: Experiment, new: Experiment, name: str, position: tuple[int, int], reopened: int | None
) -> str | None:
    """Why a field cannot differ for a run at `position`, (stage, step); None if it can."""
    index = _stage_index(name)
    if index is not None:
        if index < position[0] or (index == position[0] and position[1]):
            return _why_not_in_stage(old, new, name, position, reopened)
        return None  # no update of this stage is saved
    if re.fullmatch(TOKENIZER_FIELDS, name):
        return _tokenizer_difference(workdir, old, new, name.rpartition(".")[2])
    if any(re.fullmatch(pattern, name) for pattern in MUTABLE_FIELDS):
        return None
    return next(reason for pattern, reason in REASONS if re.fullmatch(pattern, name))


def _why_not_in_stage(
    old: Experiment, new: Experiment, name: str, position: tuple[int, int], reopened: int | None
) -> str | None:
    """`_why_not` for a field of a stage that has begun."""
    index, field = _stage_index(name), name.rpartition(".")[2]
    stage, (current, step) = old.stages[index], position
    if index >= len(new.stages):
        return f"stage {stage.name!r} has begun"
    is_last_begun = index == current or (index == current - 1 and not step)
    if field == "steps" and is_last_begun:
        done = step if index == current else stage.steps
        if new.stages[index].steps < done:
            return f"stage {stage.name!r} has done {done} updates already; give {done} or more"
    if index < current and index != reopened:
        hint = "; only with more steps can it go on" if is_last_begun else ", and the next stage began from its result"
        return f"stage {stage.name!r} is finished{hint}"
    if any(re.fullmatch(pattern, name) for pattern in MUTABLE_FIELDS):
        return None
    reason = next(reason for pattern, reason in STAGE_REASONS if re.fullmatch(pattern, field))
    return f"stage {stage.name!r} has begun and {reason}"


def _tokenizer_difference(workdir: Path, old: Experiment, new: Experiment, field: str) -> str | None:
    """Why a processor's tokenizer cannot be replaced: what differs; None if it gives the same ids.

    Compared are the copy that the run made at its start and the new one, or without a copy that of the old path.
    Raises UserError if the new one cannot be read.
    """
    subfolders = tokenizer_folders(old.model)
    if field not in subfolders:  # the model does not read it
        return None
    name, old_name = getattr(new.data.processor, field), getattr(old.data.processor, field)
    from_files = new.data.processor.prompt_tokenization == "whole"
    for candidate in (
        (old_name,) if old_name in tokenizer.SHIPPED_FILES else (str(workdir / ORIGIN / subfolders[field]), old_name)
    ):
        try:
            before = tokenizer.load(candidate, from_files)
        except UserError:
            continue
        return tokenizer.describe_difference(before, tokenizer.load(name, from_files))
    return "the run holds no copy of its tokenizer to compare it with, and the old path is gone: put it back there"


def _current_stage_notes(
    old: Experiment, new: Experiment, fields: dict[str, tuple], index: int, positions: list[tuple[int, int]]
) -> list[str]:
    """Sentences about the stage in which a run goes on: from which update, and the learning rate before and after."""
    stage, step = next(position for position in positions if position[0] == index)
    before, after = old.stages[stage], new.stages[stage]
    notes = []
    if positions[0][0] > index and step < before.steps:
        notes.append(
            f"stage {after.name!r} goes on after step {step}, of which the newest checkpoint is; steps {step + 1} to "
            f"{before.steps} are made again"
        )
    if any(_stage_index(name) == index and re.fullmatch(SCHEDULE_FIELDS, name) for name in fields):
        notes.append(
            f"stage {after.name!r} follows the learning-rate schedule of {after.steps} steps from step {step} on: "
            f"{_rate(after, step):.3g} there instead of {_rate(before, step):.3g}"
        )
    return notes


def _rate(stage: Stage, step: int) -> float:
    return float(learning_rate_schedule(stage)(step))
