# SPDX-License-Identifier: Apache-2.0
"""Weights both ways: a table of rows is read from torch names to our paths, and the same table back.

In memory: `params_from`, `state_from`, and `placed_from` onto a mesh. Folders as a whole: `from_torch`,
`to_torch`. From folder to folder, a tensor at a time: `convert`. Numbers keep their exact bits and their
dtype. A folder in our own names holds `lionjax.json` (the config), `params.safetensors` (or shards of it)
and `origin/`, what came along from elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lionjax import config as configs
from lionjax import convert_systems
from lionjax import params as trees
from lionjax.convert_files import Tensors, has_nan, open_weights
from lionjax.convert_plan import Piece, Plan, plan_params, plan_state, refuse
from lionjax.convert_systems import CONFIG_FILE, Published
from lionjax.convert_write import SHARD_BYTES, whole_folder, write_safetensors
from lionjax.interfaces import Params, UserError
from lionjax.weight_rows import Row, copy_bits, same_numbers

log = logging.getLogger(__name__)

OURS, THEIRS = "params", "model"  # first words of the weight files in each kind of folder
ORIGIN = "origin"
COMPANIONS = (  # what belongs to a model besides its weights and is handed on as it is
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.txt", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


# In memory


def params_from(
    rows: Iterable[Row], state: Mapping, ignore=(), expected: Params | None = None
) -> Params:
    """Torch's tensors -> our tree, bit for bit.

    `state` maps torch names to numpy arrays, which may be memory maps. `ignore` and `expected` are those of
    `convert_plan.plan_params`. Raises UserError with all problems.
    """
    plan = plan_params(rows, state, ignore, expected)
    flat = {path: np.empty(form.shape, form.dtype) for path, form in plan.made.items()}
    for path, index, part in leaf_parts(plan, state):
        copy_bits(flat[path][(*index, ...)], part)
    return trees.unflatten(flat)


def state_from(
    rows: Iterable[Row], params: Params, expected: Params | None = None
) -> dict[str, np.ndarray]:
    """Our tree -> torch's tensors, bit for bit; the inverse of `params_from`. Raises UserError with all problems."""
    flat = trees.flatten(params)
    plan = plan_state(rows, flat, expected)
    state = {}
    for name, _, tensor in tensor_parts(plan, flat):
        state[name] = np.empty(tensor.shape, tensor.dtype)
        copy_bits(state[name], tensor)
    return state


def placed_from(rows: Iterable[Row], state: Mapping, like: Params, ignore=()) -> Params:
    """Torch's tensors -> our tree on a mesh; each process reads only the bytes that its shards need.

    `like` is a tree of shapes with shardings, as `sharding.abstract(..., mesh=mesh)` makes; the dtypes are the files'.
    """
    plan = plan_params(rows, state, ignore, like)
    pieces: dict[str, dict[tuple, Piece]] = {}
    for piece in plan.pieces:
        for path in piece.row.paths:
            pieces.setdefault(path, {})[piece.index] = piece

    def place(path, target):
        of_leaf, form = pieces[path], plan.made[path]
        row = next(iter(of_leaf.values())).row
        depth, number = len(row.letters), row.paths.index(path)

        def shard(where: tuple[slice, ...]) -> np.ndarray:
            ranges = [range(size)[part] for size, part in zip(form.shape, where, strict=True)]
            made = np.empty([len(r) for r in ranges], form.dtype)
            for local in np.ndindex(made.shape[:depth]):
                piece = of_leaf[tuple(r[k] for r, k in zip(ranges, local))]
                problems: list[str] = []
                parts = leaves_of(piece, state, problems)
                refuse(problems, "the numbers in the torch tensors")
                copy_bits(made[(*local, ...)], parts[number][where[depth:]])
            return made

        return jax.make_array_from_callback(form.shape, target.sharding, shard)

    return trees.unflatten(
        {path: place(path, target) for path, target in trees.flatten(like).items()}
    )


def leaves_of(piece: Piece, state: Mapping, problems: list[str]) -> tuple[np.ndarray, ...]:
    """The parts of the leaves that one piece gives; what its numbers forbid is added to `problems`."""
    tensors = [np.asarray(state[name]) for name in piece.tensors]
    for name in piece.tied:
        if not same_numbers(tensors[0], np.asarray(state[name])):
            problems.append(
                f"tied tensors {piece.tensors[0]!r} and {name!r} hold different numbers"
            )
    try:
        return piece.row.to_flax(*tensors)
    except ValueError as error:
        problems.append(f"tensor {piece.tensors[0]!r}: {error}")
        return ()


def leaf_parts(
    plan: Plan, state: Mapping, done=lambda name: None
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """(path, index, array) of every part of every leaf, `array` being `leaf[index]`, mostly a view of a torch tensor.

    `done` is told the name of each tensor that is not needed any more. Raises UserError at the end, with all problems.
    """
    problems: list[str] = []
    for piece in plan.pieces:
        for path, part in zip(piece.row.paths, leaves_of(piece, state, problems)):
            yield path, piece.index, part
        for name in (*piece.tensors, *piece.tied):
            done(name)
    refuse(problems, "the numbers in the torch tensors")


def tensor_parts(
    plan: Plan, flat: Mapping, done=lambda path: None
) -> Iterator[tuple[str, tuple, np.ndarray]]:
    """(name, (), array) of every torch tensor, a tied one under each of its names. Leaves may be on devices."""
    for _, pieces in itertools.groupby(
        plan.pieces, key=lambda piece: piece.row.paths or piece.row.names
    ):
        pieces = list(pieces)
        leaves = [np.asarray(flat[path]) for path in pieces[0].row.paths]
        for piece in pieces:
            tensors = piece.row.to_torch(*(leaf[(*piece.index, ...)] for leaf in leaves))
            yield from ((name, (), tensor) for name, tensor in zip(piece.tensors, tensors))
            yield from ((name, (), tensors[0]) for name in piece.tied)
        for path in pieces[0].row.paths:
            done(path)


# Folders


@dataclasses.dataclass
class Coverage:
    """What a conversion read and wrote, and what it left and why."""

    system: str
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    seconds: float = 0.0
    files: tuple[str, ...] = ()
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> reason
    tied: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    nan: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9) / 1e9
        lines = [
            f"{self.system}: {self.tensors} torch tensors, {self.parameters} parameters, "
            f"{self.bytes / 1e9:.3f} GB in {self.seconds:.1f} s ({rate:.2f} GB/s)",
            f"written: {', '.join(self.files)}",
        ]
        lines += [f"tied: {name} = {', '.join(others)}" for name, others in self.tied.items()]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.ignored.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"left ({reason}): {', '.join(names[:4])}{more}")
        lines += [f"warning: {name} holds NaN" for name in self.nan]
        return "\n".join(lines)


def convert(
    src: str | Path, dst: str | Path, to: str, system: str | None = None, shard_bytes=SHARD_BYTES
) -> Coverage:
    """A folder into a folder, a tensor at a time: `to` "jax" (our names) or "torch" (the original's).

    `system` names the kind of model where the source does not say it. The new folder appears when it is
    complete. Raises UserError, in words, for everything that does not fit.
    """
    start = time.perf_counter()
    if to == "jax":
        coverage = _convert_in(Path(src), Path(dst), system, shard_bytes)
    elif to == "torch":
        coverage = _convert_out(Path(src), Path(dst), shard_bytes)
    else:
        raise UserError(f"to is {to!r}; it can be 'jax' or 'torch'")
    coverage.seconds = time.perf_counter() - start
    for name in coverage.nan:
        log.warning("tensor %r holds NaN", name)
    return coverage


def _convert_in(src: Path, dst: Path, system: str | None, shard_bytes: int) -> Coverage:
    source = convert_systems.open_source(src, system)
    plan = _plan_in(source)
    coverage = _coverage(source.kind, plan, source.tensors)
    for name, others in source.copied.items():
        coverage.tied[name] = (*coverage.tied.get(name, ()), *others)

    def done(name):
        if has_nan(source.tensors[name]):
            coverage.nan.append(name)
        source.tensors.forget(name)

    with whole_folder(dst) as folder:
        files = write_safetensors(
            folder, OURS, plan.made, leaf_parts(plan, source.tensors, done), shard_bytes
        )
        (folder / CONFIG_FILE).write_text(configs.to_json(source.config))
        for name in COMPANIONS:
            if source.folder is not None and (source.folder / name).is_file():
                (folder / ORIGIN).mkdir(exist_ok=True)
                shutil.copyfile(source.folder / name, folder / ORIGIN / name)
        coverage.files = (*files, CONFIG_FILE)
    return coverage


def _convert_out(src: Path, dst: Path, shard_bytes: int) -> Coverage:
    config, tensors = open_params(src)
    kind = convert_systems.of_config(config)
    rows, model = convert_systems.table_and_model(kind, config)
    plan = plan_state(rows, tensors, model)
    coverage = _coverage(kind, plan, tensors)
    parts = tensor_parts(plan, tensors, tensors.forget)
    coverage.files = _write_out(config, kind, plan, parts, dst, shard_bytes, src / ORIGIN)
    return coverage


def from_torch(path: str | Path, system: str | None = None) -> tuple[Any, Params]:
    """(config, params) of a checkpoint with the original's names; params are numpy arrays in the checkpoint's dtype.

    `system` names the kind of model where the files do not say it. Raises UserError with all that does not fit.
    """
    source = convert_systems.open_source(Path(path), system)
    plan = _plan_in(source)
    flat = {path: np.empty(form.shape, form.dtype) for path, form in plan.made.items()}
    for leaf, index, part in leaf_parts(plan, source.tensors, source.tensors.forget):
        copy_bits(flat[leaf][(*index, ...)], part)
    return source.config, trees.unflatten(flat)


def to_torch(config: Any, params: Params, path: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `params` as a folder with the original's names: safetensors, config.json, a model card.

    Raises UserError when something does not fit, or stands at `path` already.
    """
    kind, flat = convert_systems.of_config(config), trees.flatten(params)
    rows, model = convert_systems.table_and_model(kind, config)
    plan = plan_state(rows, flat, model)
    _write_out(config, kind, plan, tensor_parts(plan, flat), Path(path), shard_bytes, None)


def open_params(path: str | Path) -> tuple[Any, Tensors]:
    """(config, parameters by path) of a folder that `convert` wrote in our names. Nothing is read yet."""
    path = Path(path)
    files = [path / f"{OURS}.safetensors.index.json", path / f"{OURS}.safetensors"]
    found = next((file for file in files if file.is_file()), None)
    if found is None or not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} holds no converted model; wanted {CONFIG_FILE} and {OURS}.safetensors"
        )
    return convert_systems.read_config(path), open_weights(found)


def load_params(path: str | Path, like: Params | None = None) -> tuple[Any, Params]:
    """(config, params) of such a folder: memory maps, or with `like` arrays on its mesh (see `placed_from`)."""
    config, tensors = open_params(path)
    if like is None:
        return config, trees.unflatten(tensors.arrays)
    return config, placed_from([Row(path, path) for path in tensors], tensors, like)


def _plan_in(source: convert_systems.Source) -> Plan:
    rows, model = convert_systems.table_and_model(source.kind, source.config)
    return plan_params(rows, source.tensors, source.kind.ignore, model)


def _coverage(kind: Published, plan: Plan, tensors: Tensors) -> Coverage:
    tied = {piece.tensors[0]: piece.tied for piece in plan.pieces if piece.tied}
    ignored = tensors.left | {name: f"matches {pattern}" for name, pattern in plan.ignored.items()}
    count = sum(len(piece.tensors) + len(piece.tied) for piece in plan.pieces)
    paths = {path for piece in plan.pieces for path in piece.row.paths}
    size = sum(form.nbytes for form in plan.made.values())
    return Coverage(kind.name, count, len(paths), size, ignored=ignored, tied=tied)


def _write_out(
    config, kind: Published, plan: Plan, parts, dst: Path, shard_bytes: int, origin: Path | None
):
    """The folder for torch's side, with what came along from there (`origin`) put back beside the weights."""
    settings = {}
    with whole_folder(dst) as folder:
        files = write_safetensors(folder, THEIRS, plan.made, parts, shard_bytes)
        if origin is not None and origin.is_dir():
            for file in sorted(origin.iterdir()):
                shutil.copyfile(file, folder / file.name)
            if (folder / "config.json").is_file():
                settings = json.loads((folder / "config.json").read_text())
        dtype = max(
            (form.dtype for form in plan.made.values()), key=lambda d: (d.itemsize <= 4, d.itemsize)
        ).name
        settings |= kind.settings(config) | {"dtype": dtype}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        (folder / "README.md").write_text(_card(kind, plan))
    return (*files, "config.json", CONFIG_FILE, "README.md")


def _card(kind: Published, plan: Plan) -> str:
    numbers = sum(int(np.prod(form.shape)) for form in plan.made.values())
    return (
        f"# {kind.name}\n\n{numbers:,} numbers in {len(plan.made)} tensors, under the names of the original "
        f"PyTorch code, written by lionjax.\n`{CONFIG_FILE}` lets lionjax read this folder back without loss. "
        "The licence is that of the weights and the data it was trained from.\n"
    )
