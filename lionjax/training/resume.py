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
from lionjax.training.checkpoint import CorruptCheckpointError
from lionjax.training.init import ParamSpecs, init_params
from lionjax.training.optimizer import abstract_opt_state, make_optimizer
from lionjax.training.run_folder import (
    base_folder,
    describe_position,
    from_state_dict,
    latest_position,
    to_state_dict,
    updates_before,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands: `step` updates into a stage.

    `optimiser` and `data` (the position in the stage's batches) are None at a stage's start. `history` holds one
    entry for each stage begun (see `journal.Entry`). `frozen` names the directory of `never`.
    """

    stage: int
    step: int
    frozen_params: Params
    trainable_params: Params
    frozen_id: str
    opt_state: Any = None
    data_position: Any = None
    history: tuple[dict, ...] = ()


# The folder


# First parameters


# Where a folder stands


def restore_or_init(workdir: Path, experiment: Experiment, example: Batch, specs: ParamSpecs) -> Position:
    """The newest place that can be trusted. What cannot is put aside, with a warning that names it."""
    while newest := latest_position(workdir, experiment):
        try:
            return _restore(workdir, experiment, example, specs, *newest)
        except CorruptCheckpointError as damage:
            checkpoint.quarantine(workdir, damage.path, str(damage))
            newest = latest_position(workdir, experiment)
            log.warning("going back to %s", describe_position(experiment, *newest) if newest else "the beginning")
    return _init_run(workdir, experiment, example, specs)


def _restore(workdir, experiment, example, specs, stage: int, step: int) -> Position:
    scratch = step and experiment.stages[stage].start == "scratch"
    base = base_folder(workdir, experiment, 0 if scratch else stage)
    path = workdir / "checkpoints" / str(updates_before(experiment, stage) + step)
    if not base.is_dir():
        raise CorruptCheckpointError(path, "the parameters that its stage began with are not there")
    items, meta = checkpoint.restore_tree(base, {"learned": specs.trainable})
    learned, optimiser, data = items["learned"], None, None
    if step:
        part = experiment.stages[stage]
        trainable, idle = trees.split(specs.trainable, part.trainable)
        rule = make_optimizer(part, trainable, specs.layer_axes)
        state = abstract_opt_state(rule, trainable, specs.mesh)
        items, meta = checkpoint.restore_tree(path, {"trainable": trainable, "optimiser": to_state_dict(state)})
        _, idle = trees.split(learned, part.trainable)
        learned = trees.merge(items["trainable"], idle)
        optimiser, data = from_state_dict(items["optimiser"], state), meta["data"]
    never = _load_frozen(workdir, experiment, example, specs, meta["frozen"])
    history = tuple(meta["history"])
    log.info("%s stands at %s", workdir, describe_position(experiment, stage, step))
    return Position(stage, step, never, learned, meta["frozen"], optimiser, data, history)


def _load_frozen(workdir, experiment, example, specs, name: str) -> Params:
    """The parameters that no stage trains. They follow from the config, so damage to them can be mended."""
    path = workdir / "frozen" / name
    try:
        if not path.is_dir():
            raise CorruptCheckpointError(path, "it is not there")
        return checkpoint.restore_tree(path, {"never": specs.frozen})[0]["never"]
    except CorruptCheckpointError as damage:
        if path.is_dir():
            checkpoint.quarantine(workdir, path, str(damage))
        never, _ = init_params(experiment, example, specs)
        made = _save_frozen(workdir, never)
        if made != name:
            raise UserError(
                f"the frozen parameters of this run are damaged ({damage}) and its config no longer makes the same "
                "ones; bring back the weight files that it began with, or begin in another folder"
            ) from damage
        log.warning("the frozen parameters were made again from the config, and are the same")
        return never


def _save_frozen(workdir: Path, frozen_params: Params) -> str:
    name = checkpoint.sha256_of_json(checkpoint.manifest({"never": frozen_params}))[:16]
    if not (workdir / "frozen" / name).is_dir():
        checkpoint.save_tree(workdir / "frozen" / name, {"never": frozen_params}, {})
    return name


def _init_run(workdir, experiment, example, specs) -> Position:
    never, learned = init_params(experiment, example, specs)
    place = Position(0, 0, never, learned, _save_frozen(workdir, never))
    save_base(workdir, experiment, place)
    return place


def save_base(workdir: Path, experiment: Experiment, position: Position) -> None:
    """Keep the parameters with which a stage begins, or the result after the last stage."""
    meta = {"frozen": position.frozen_id, "history": list(position.history)}
    checkpoint.save_tree(base_folder(workdir, experiment, position.stage), {"learned": position.trainable_params}, meta)


def load_first_base(workdir: Path, experiment: Experiment, specs: ParamSpecs) -> Params:
    """The trained parameters as the first stage found them."""
    return checkpoint.restore_tree(base_folder(workdir, experiment, 0), {"learned": specs.trainable})[0]["learned"]
