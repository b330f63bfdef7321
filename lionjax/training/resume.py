# SPDX-License-Identifier: Apache-2.0
"""Where a run begins: at its config's first parameters, or where its folder stands."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from lionjax.core import params as trees
from lionjax.core.experiment import Experiment
from lionjax.core.types import Batch, Params, UserError
from lionjax.training import checkpoint
from lionjax.training.checkpoint import Damaged
from lionjax.training.init import Layout, first_parameters
from lionjax.training.optimizer import abstract_optimiser, optimizer
from lionjax.training.run_folder import _newest, as_dict, base_folder, from_dict, updates_before, words

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run stands: `step` updates into a stage.

    `optimiser` and `data` (the position in the stage's batches) are None at a stage's start. `history` holds one
    entry for each stage begun (see `journal.Entry`). `frozen` names the directory of `never`.
    """

    stage: int
    step: int
    never: Params
    learned: Params
    frozen: str
    optimiser: Any = None
    data: Any = None
    history: tuple[dict, ...] = ()


# The folder


# First parameters


# Where a folder stands


def find(workdir: Path, experiment: Experiment, example: Batch, layout: Layout) -> Place:
    """The newest place that can be trusted. What cannot is put aside, with a warning that names it."""
    while newest := _newest(workdir, experiment):
        try:
            return _read(workdir, experiment, example, layout, *newest)
        except Damaged as damage:
            checkpoint.quarantine(workdir, damage.path, str(damage))
            newest = _newest(workdir, experiment)
            log.warning("going back to %s", words(experiment, *newest) if newest else "the beginning")
    return _begin(workdir, experiment, example, layout)


def _read(workdir, experiment, example, layout, stage: int, step: int) -> Place:
    scratch = step and experiment.stages[stage].start == "scratch"
    base = base_folder(workdir, experiment, 0 if scratch else stage)
    path = workdir / "checkpoints" / str(updates_before(experiment, stage) + step)
    if not base.is_dir():
        raise Damaged(path, "the parameters that its stage began with are not there")
    items, meta = checkpoint.read(base, {"learned": layout.learned})
    learned, optimiser, data = items["learned"], None, None
    if step:
        part = experiment.stages[stage]
        trainable, idle = trees.split(layout.learned, part.trainable)
        rule = optimizer(part, trainable, layout.layer_axes)
        state = abstract_optimiser(rule, trainable, layout.mesh)
        items, meta = checkpoint.read(path, {"trainable": trainable, "optimiser": as_dict(state)})
        _, idle = trees.split(learned, part.trainable)
        learned = trees.merge(items["trainable"], idle)
        optimiser, data = from_dict(items["optimiser"], state), meta["data"]
    never = _thaw(workdir, experiment, example, layout, meta["frozen"])
    history = tuple(meta["history"])
    log.info("%s stands at %s", workdir, words(experiment, stage, step))
    return Place(stage, step, never, learned, meta["frozen"], optimiser, data, history)


def _thaw(workdir, experiment, example, layout, name: str) -> Params:
    """The parameters that no stage trains. They follow from the config, so damage to them can be mended."""
    path = workdir / "frozen" / name
    try:
        if not path.is_dir():
            raise Damaged(path, "it is not there")
        return checkpoint.read(path, {"never": layout.never})[0]["never"]
    except Damaged as damage:
        if path.is_dir():
            checkpoint.quarantine(workdir, path, str(damage))
        never, _ = first_parameters(experiment, example, layout)
        made = _freeze(workdir, never)
        if made != name:
            raise UserError(
                f"the frozen parameters of this run are damaged ({damage}) and its config no longer makes the same "
                "ones; bring back the weight files that it began with, or begin in another folder"
            ) from damage
        log.warning("the frozen parameters were made again from the config, and are the same")
        return never


def _freeze(workdir: Path, never: Params) -> str:
    name = checkpoint.digest(checkpoint.manifest({"never": never}))[:16]
    if not (workdir / "frozen" / name).is_dir():
        checkpoint.write(workdir / "frozen" / name, {"never": never}, {})
    return name


def _begin(workdir, experiment, example, layout) -> Place:
    never, learned = first_parameters(experiment, example, layout)
    place = Place(0, 0, never, learned, _freeze(workdir, never))
    write_base(workdir, experiment, place)
    return place


def write_base(workdir: Path, experiment: Experiment, place: Place) -> None:
    """Keep the parameters with which a stage begins, or the result after the last stage."""
    meta = {"frozen": place.frozen, "history": list(place.history)}
    checkpoint.write(base_folder(workdir, experiment, place.stage), {"learned": place.learned}, meta)


def first_base(workdir: Path, experiment: Experiment, layout: Layout) -> Params:
    """The trained parameters as the first stage found them."""
    return checkpoint.read(base_folder(workdir, experiment, 0), {"learned": layout.learned})[0]["learned"]
