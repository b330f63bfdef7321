# SPDX-License-Identifier: Apache-2.0
"""Where a run begins: at its config's first parameters, or where its folder stands."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax import config, sharding
from lionjax import params as trees
from lionjax.config import Experiment
from lionjax.convert.files import open_weights
from lionjax.interfaces import Batch, Params, UserError
from lionjax.training import checkpoints, distributed, journal, stages
from lionjax.training.checkpoints import Damaged

log = logging.getLogger(__name__)

# Fields that say how a run goes about it, not what it computes: a folder may be continued with others.
FREE = (
    r"name",
    r"mesh\..*",
    r"run\.(log_every|save_every|evaluate_every|evaluate_limit|keep|cache_features|cache_gib|features_dir)",
    # One who meets a bad update may mend the run by these.
    r"run\.(on_bad_update|spike|bad_updates|stuck_seconds)",
    r"answer\..*",
    r"data\.(threads|workers|buffer|cache_mib|quarantine)",
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shapes, dtypes and places of the parameters: those that no stage trains, and those that some stage does.

    `layer_axes`: how many axes of each leaf stack layers.
    """

    never: Params
    learned: Params
    layer_axes: dict[str, int]
    mesh: Mesh


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


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """The folder, made if need be, for this run only. Raises UserError while another process trains in it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write in {workdir}: {error.strerror}; name another folder") from error
    with file:
        try:
            if distributed.first():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is training in {workdir}; stop it or name another folder") from error
        yield


def claim(workdir: Path, experiment: Experiment) -> None:
    """Write the config into a folder without weights, or check that the folder was made by the same one.

    What a killed run left half-written is removed.

    Fields that do not change what is computed (`FREE`) may differ, so that a run can go on, say, on another mesh.
    Raises UserError that lists the others that differ.
    """
    path, text = workdir / "config.json", config.to_json(experiment)
    begun = any((workdir / name).exists() for name in ("base", "checkpoints"))
    if begun and not path.is_file():
        raise UserError(f"{workdir} holds checkpoints but no config.json; name another folder")
    if begun:  # else a first start failed before there were weights, and may be mended
        try:
            old = config.from_json(path.read_text())
        except UserError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        changes = config.difference(old, experiment)
        free = {name for name in changes if any(re.fullmatch(pattern, name) for pattern in FREE)}
        if fixed := [f"{name} {a!r} -> {b!r}" for name, (a, b) in changes.items() if name not in free]:
            raise UserError(
                f"{workdir} was made by another config ({'; '.join(fixed)}); set these back or name another folder"
            )
        for name in sorted(free):
            log.info("%s goes on with %s %r -> %r", workdir, name, *changes[name])
    if distributed.first():
        journal.replace_text(path, text)
        checkpoints.clean(workdir)
    distributed.meet("claimed")
    if not path.is_file() or path.read_text() != text:
        raise UserError(
            f"process {jax.process_index()} does not see in {workdir} what process 0 wrote there; all processes need "
            "the same config and one folder that all hosts share"
        )


# First parameters


def layout(experiment: Experiment, example: Batch, mesh: Mesh) -> Layout:
    """What the run's parameters will be; nothing is allocated. Raises UserError for a schedule that cannot run."""
    key = jax.random.key(experiment.seed)
    check_words(experiment, example)
    check_prompts(experiment)
    whole = sharding.abstract(experiment.system.init, key, example, mesh=mesh)
    stages.check(experiment.stages, whole)
    patterns = [pattern for stage in experiment.stages for pattern in stage.trainable]
    learned, never = trees.split(whole, patterns)
    dtype = experiment.run.frozen_dtype
    never = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, _frozen(leaf, dtype), sharding=leaf.sharding), never
    )
    axes = sharding.layer_axes(jax.eval_shape(experiment.system.init, key, example))
    return Layout(never, learned, axes, mesh)


def check_words(experiment: Experiment, example: Batch) -> None:
    """Raises UserError where the data make words that the language model does not have, such as location tokens."""
    vocab = getattr(getattr(experiment.system, "language", None), "vocab", None)
    picture = getattr(experiment.system, "image_token", None)  # it need not be a word
    written = (example.prompt_BL, example.target_BM)
    most = int(max(ids[ids != picture].max(initial=0) for ids in written))
    if vocab is not None and most >= vocab:
        raise UserError(
            f"the data make the token {most}, but the language model has {vocab}; raise system.language.vocab, "
            "or write places otherwise (data.processor.places)"
        )


def check_prompts(experiment: Experiment) -> None:
    """Raises UserError where prompts are not written as the system reads them, which would train without a word."""
    system, written = experiment.system, getattr(experiment.data, "processor", None)
    encodes, token = getattr(system, "encodes", None), getattr(system, "image_token", None)
    if written is None:
        return
    wanted = {None: written.reader, True: "encoder", False: "decoder"}[encodes]
    if written.reader != wanted:
        raise UserError(f"processor.reader is {written.reader!r}, but the language model is one that wants {wanted!r}")
    if hasattr(system, "image_token") and written.image_token not in (None, token):
        raise UserError(
            f"processor.image_token is {written.image_token}, but system.image_token {token}; give both the same"
        )
    said = "{image}" in written.template
    if said and hasattr(system, "image_token") and written.image_token is None and not written.image_tokens:
        raise UserError(
            f"processor.template says {{image}}, but not what stands there; set processor.image_token to {token}"
        )
    if written.image_token is not None and not said:
        raise UserError(
            "processor.image_token is set, but processor.template says nowhere {image}; say where the picture stands"
        )


def _frozen(leaf, dtype: str):
    return dtype if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) else leaf.dtype


def first_parameters(experiment: Experiment, example: Batch, layout: Layout) -> tuple[Params, Params]:
    """(never, learned): from the experiment's weight files where they reach, else random from its seed."""
    wanted = trees.flatten(trees.merge(layout.never, layout.learned))
    learned = trees.flatten(layout.learned)
    loaded: dict[str, jax.Array] = {}
    for prefix, file in experiment.weights:
        inside = {path: leaf for path, leaf in wanted.items() if _under(path, prefix)}
        if not inside:
            parts = sorted({path.split("/")[0] for path in wanted})
            raise UserError(f"weights name the part {prefix!r}; this system has {', '.join(parts)}")
        words = getattr(experiment.system, "language", None)
        file, _, part = file.partition("#")
        loaded |= _read_weights(shipped(file), part, prefix, inside, learned | loaded, words)

    idle = sorted({path.split("/")[0] for path in wanted.keys() - learned.keys() - loaded.keys()})
    if idle and experiment.weights and distributed.first():
        log.warning(
            "weights of %s are random and no stage trains them; name a file for them in `weights`", ", ".join(idle)
        )

    def rest(key, batch):
        flat = trees.flatten(experiment.system.init(key, batch))
        return trees.unflatten({path: leaf for path, leaf in flat.items() if path not in loaded})

    key = jax.random.key(experiment.seed)
    example = jax.tree.map(np.zeros_like, example)  # every process has rows of its own
    fresh = trees.flatten(sharding.init(rest, key, example, mesh=layout.mesh))
    flat = {path: loaded.get(path, fresh.get(path)).astype(leaf.dtype) for path, leaf in wanted.items()}
    split = [{path: leaf for path, leaf in flat.items() if (path in learned) == side} for side in (False, True)]
    return trees.unflatten(split[0]), trees.unflatten(split[1])


def shipped(file: str) -> Path:
    """The path of a weight file: `shipped:tiny_vit.safetensors` comes with the package, others are as they stand."""
    name = file.removeprefix("shipped:")
    return Path(file) if name == file else Path(__file__).parent.parent / "data" / "assets" / name


def _under(path: str, prefix: str) -> bool:
    return f"{path}/".startswith(f"{prefix}/" if prefix else "")


def _read_weights(
    file: Path, part: str, prefix: str, wanted: dict, may_be_new: dict, language: Any
) -> dict[str, jax.Array]:
    """The leaves under a prefix from a file (or the shards of one) in our names, each process its own part.

    The names may be those of the part alone, as of a tower that was converted by itself, or `part` is where they stand
    in the file. A leaf that the file lacks starts at random if some stage trains it, and is another file's if that
    came before. Raises UserError for any other that is missing, for one that is unknown
    and for one of another shape.
    """
    index = file.with_name(file.name + ".index.json")
    try:
        tensors = open_weights(index if index.is_file() and not file.exists() else file)
    except UserError as error:
        raise UserError(f"the weights {file} cannot be read: {error}") from error
    part = part or prefix
    inside = [name for name in tensors if _under(name, part)]
    names = {prefix + name.removeprefix(part): name for name in inside}
    names = names or {f"{prefix}/{name}": name for name in tensors}
    if unknown := sorted(names.keys() - wanted.keys()):
        raise UserError(f"{file} holds {unknown[0]!r}, which this system does not have under {prefix!r}")
    if missing := sorted(wanted.keys() - names.keys() - may_be_new.keys()):
        raise UserError(f"{file} lacks {missing[0]!r}, which no stage trains; use weights of the config's sizes")
    return {
        path: _placed(_filled(tensors[name], wanted[path], language), wanted[path], f"{file}: {path!r}")
        for path, name in sorted(names.items())
    }


def _filled(table: np.ndarray, want: jax.ShapeDtypeStruct, language: Any) -> np.ndarray:
    """A table of words with the rows of zeros that the config has behind it for a mesh's sake; others as they are."""
    words, rows = getattr(language, "vocab", 0), getattr(language, "rows", 0)
    if rows == words or table.shape != tuple(words if n == rows else n for n in want.shape):
        return table
    whole = np.zeros(want.shape, table.dtype)
    whole[tuple(map(slice, table.shape))] = table
    return whole


def _placed(part: np.ndarray, want: jax.ShapeDtypeStruct, what: str) -> jax.Array:
    if part.shape != want.shape:
        raise UserError(f"{what} is {part.shape}, the config wants {want.shape}")
    return jax.make_array_from_callback(
        want.shape, want.sharding, lambda index: np.asarray(part[index]).astype(want.dtype)
    )


# Where a folder stands


def find(workdir: Path, experiment: Experiment, example: Batch, layout: Layout) -> Place:
    """The newest place that can be trusted. What cannot is put aside, with a warning that names it."""
    while newest := _newest(workdir, experiment):
        try:
            return _read(workdir, experiment, example, layout, *newest)
        except Damaged as damage:
            checkpoints.quarantine(workdir, damage.path, str(damage))
            newest = _newest(workdir, experiment)
            log.warning("going back to %s", words(experiment, *newest) if newest else "the beginning")
    return _begin(workdir, experiment, example, layout)


def words(experiment: Experiment, stage: int, step: int) -> str:
    """A place in words: "stage 'two', step 5"."""
    if stage == len(experiment.stages):
        return "the end of the last stage"
    return f"stage {experiment.stages[stage].name!r}, step {step}"


def updates_before(experiment: Experiment, stage: int) -> int:
    """How many updates the stages before one make; a step on disk is named by the count from the first stage on."""
    return sum(stage.steps for stage in experiment.stages[:stage])


def base_folder(workdir: Path, experiment: Experiment, stage: int) -> Path:
    """Where the trained parameters stand as a stage finds them; after the last stage: the result."""
    last = stage == len(experiment.stages)
    name = "final" if last else file_name(experiment.stages[stage].name)
    return workdir / "base" / f"{stage}_{name}"


def file_name(text: str) -> str:
    return re.sub(r"\W+", "_", text)


def places(workdir: Path, experiment: Experiment) -> list[tuple[int, int]]:
    """(stage, updates into it) of all that a folder holds, newest first."""
    found = [(stage, 0) for stage in checkpoints.found_bases(workdir / "base")]
    for update in checkpoints.found_steps(workdir / "checkpoints"):
        stage = max(s for s in range(len(experiment.stages)) if updates_before(experiment, s) < update)
        found.append((stage, update - updates_before(experiment, stage)))
    return sorted(found, reverse=True)


def _newest(workdir: Path, experiment: Experiment) -> tuple[int, int] | None:
    return next(iter(places(workdir, experiment)), None)


def _read(workdir, experiment, example, layout, stage: int, step: int) -> Place:
    scratch = step and experiment.stages[stage].start == "scratch"
    base = base_folder(workdir, experiment, 0 if scratch else stage)
    path = workdir / "checkpoints" / str(updates_before(experiment, stage) + step)
    if not base.is_dir():
        raise Damaged(path, "the parameters that its stage began with are not there")
    items, meta = checkpoints.read(base, {"learned": layout.learned})
    learned, optimiser, data = items["learned"], None, None
    if step:
        part = experiment.stages[stage]
        trainable, idle = trees.split(layout.learned, part.trainable)
        rule = stages.optimizer(part, trainable, layout.layer_axes)
        state = stages.abstract_optimiser(rule, trainable, layout.mesh)
        items, meta = checkpoints.read(path, {"trainable": trainable, "optimiser": as_dict(state)})
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
        return checkpoints.read(path, {"never": layout.never})[0]["never"]
    except Damaged as damage:
        if path.is_dir():
            checkpoints.quarantine(workdir, path, str(damage))
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
    name = checkpoints.digest(checkpoints.manifest({"never": never}))[:16]
    if not (workdir / "frozen" / name).is_dir():
        checkpoints.write(workdir / "frozen" / name, {"never": never}, {})
    return name


def _begin(workdir, experiment, example, layout) -> Place:
    never, learned = first_parameters(experiment, example, layout)
    place = Place(0, 0, never, learned, _freeze(workdir, never))
    write_base(workdir, experiment, place)
    return place


def write_base(workdir: Path, experiment: Experiment, place: Place) -> None:
    """Keep the parameters with which a stage begins, or the result after the last stage."""
    meta = {"frozen": place.frozen, "history": list(place.history)}
    checkpoints.write(base_folder(workdir, experiment, place.stage), {"learned": place.learned}, meta)


def first_base(workdir: Path, experiment: Experiment, layout: Layout) -> Params:
    """The trained parameters as the first stage found them."""
    return checkpoints.read(base_folder(workdir, experiment, 0), {"learned": layout.learned})[0]["learned"]


def as_dict(tree: Any) -> Params:
    """Any tree as nested dicts with text keys, as files want it. Nodes without leaves vanish."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return trees.unflatten({jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in pairs})


def from_dict(flat: Params, like: Any) -> Any:
    """The inverse of `as_dict` for a tree of the same structure as `like`."""
    leaves = trees.flatten(flat)
    pairs, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    return jax.tree_util.tree_unflatten(structure, [leaves[name] for name in names])
