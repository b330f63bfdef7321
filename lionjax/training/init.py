# SPDX-License-Identifier: Apache-2.0
"""Initial parameters of a run: shapes and shardings, and values from weight files or random initialization."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax.convert.io.reader import open_weights
from lionjax.core import hub, sharding
from lionjax.core import params as trees
from lionjax.core.experiment import Experiment
from lionjax.core.types import Batch, Params, UserError
from lionjax.training import distributed, step
from lionjax.training.validate import check_example_rows, check_prompt_format, check_token_ids

log = logging.getLogger(__name__)

SHIPPED = "shipped:"  # begins the names of files and folders of the package


@dataclasses.dataclass(frozen=True)
class ParamSpecs:
    """ShapeDtypeStructs with shardings of all parameters: those that no stage trains, and those that some stage trains.

    `layer_axes`: {path: number of leading axes that stack layers} (see `sharding.layer_axes`).
    """

    frozen: Params
    trainable: Params
    layer_axes: dict[str, int]
    mesh: Mesh


def make_param_specs(experiment: Experiment, example: Batch, mesh: Mesh) -> ParamSpecs:
    """The ParamSpecs of a run, without allocating parameters. Raises UserError for invalid stages or data."""
    key = jax.random.key(experiment.seed)
    check_token_ids(experiment, example)
    check_prompt_format(experiment)
    check_example_rows(experiment)
    boxed = jax.eval_shape(sharding.traced_init(experiment.model), key, example)
    params = sharding.unbox_specs(boxed, mesh)
    step.validate_stages(experiment.stages, params)
    patterns = [pattern for stage in experiment.stages for pattern in stage.trainable]
    trainable, frozen = trees.split(params, patterns)
    dtype = experiment.run.frozen_dtype
    frozen = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, _frozen_dtype(leaf, dtype), sharding=leaf.sharding), frozen
    )
    return ParamSpecs(frozen, trainable, sharding.layer_axes(boxed), mesh)


def _frozen_dtype(leaf, dtype: str):
    return dtype if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) else leaf.dtype


def init_params(experiment: Experiment, example: Batch, specs: ParamSpecs) -> tuple[Params, Params]:
    """(frozen, trainable) parameters: from the files in `experiment.weights`, and random for all other leaves.

    Raises UserError for a file that cannot be read or does not fit the model (see `_load_weights`).
    """
    all_specs = trees.flatten(trees.merge(specs.frozen, specs.trainable))
    trainable = trees.flatten(specs.trainable)
    loaded: dict[str, jax.Array] = {}
    for prefix, file in experiment.weights:
        part_specs = {path: leaf for path, leaf in all_specs.items() if _has_prefix(path, prefix)}
        if not part_specs:
            parts = sorted({path.split("/")[0] for path in all_specs})
            raise UserError(f"weights name the part {prefix!r}; this model has {', '.join(parts)}")
        sizes = (experiment.model.info.vocab_size, experiment.model.info.embedding_rows)
        file, _, file_prefix = file.partition("#")
        path = resolve_weights_file(file)
        loaded |= _load_weights(path, file_prefix, prefix, part_specs, trainable | loaded, sizes)

    random_frozen = sorted({path.split("/")[0] for path in all_specs.keys() - trainable.keys() - loaded.keys()})
    if random_frozen and experiment.weights and distributed.is_main_process():
        log.warning(
            "the parameters of %s are random and no stage trains them; add a file for them to `weights`",
            ", ".join(random_frozen),
        )

    def init_missing(key, batch):
        flat = trees.flatten(sharding.traced_init(experiment.model)(key, batch))
        return trees.unflatten({path: leaf for path, leaf in flat.items() if path not in loaded})

    key = jax.random.key(experiment.seed)
    example = jax.tree.map(np.zeros_like, example)  # the same in all processes
    missing = {path: leaf.sharding for path, leaf in all_specs.items() if path not in loaded}
    initialized = trees.flatten(sharding.init_sharded(init_missing, key, example, shardings=trees.unflatten(missing)))
    flat = {path: loaded.get(path, initialized.get(path)).astype(leaf.dtype) for path, leaf in all_specs.items()}
    split = [{path: leaf for path, leaf in flat.items() if (path in trainable) == side} for side in (False, True)]
    return trees.unflatten(split[0]), trees.unflatten(split[1])


def load_shipped(experiment: Experiment, specs: Params) -> dict[str, jax.Array]:
    """{path: sharded array} of the leaves of `specs` that `experiment.weights` takes from files of the package.

    For a folder of weights that lacks them. Later entries replace earlier ones; a file that holds other leaves than
    `specs` raises UserError.
    """
    flat, loaded = trees.flatten(specs), {}
    sizes = (experiment.model.info.vocab_size, experiment.model.info.embedding_rows)
    for prefix, file in experiment.weights:
        part_specs = {path: leaf for path, leaf in flat.items() if _has_prefix(path, prefix)}
        file, _, file_prefix = file.partition("#")
        if part_specs and file.startswith(SHIPPED):
            path = resolve_weights_file(file)
            loaded |= _load_weights(path, file_prefix, prefix, part_specs, part_specs, sizes)
    return loaded


def resolve_weights_file(file: str) -> Path:
    """The path of a weight file; `shipped:NAME` is NAME in the package's lionjax/data/assets, `hf://...` of the hub."""
    name = file.removeprefix(SHIPPED)
    return hub.local_path(file) if name == file else Path(__file__).parent.parent / "data" / "assets" / name


def _has_prefix(path: str, prefix: str) -> bool:
    return f"{path}/".startswith(f"{prefix}/" if prefix else "")


def _load_weights(
    file: Path, file_prefix: str, prefix: str, specs: dict, optional: dict, vocab_sizes: tuple[int | None, int | None]
) -> dict[str, jax.Array]:
    """{path: sharded array} of the leaves under `prefix`, from a file (or an indexed set of shards) in our names.

    The file's names start with `file_prefix` (default `prefix`), or have no prefix if the part was converted alone. A
    missing leaf is allowed if it is in `optional` (some stage trains it, or an earlier file has it). Raises UserError
    for other missing leaves, for unknown leaves and for leaves of another shape.
    """
    index = file.with_name(file.name + ".index.json")
    try:
        tensors = open_weights(index if index.is_file() and not file.exists() else file)
    except UserError as error:
        raise UserError(f"the weights {file} cannot be read: {error}") from error
    file_prefix = file_prefix or prefix
    prefixed = [name for name in tensors if _has_prefix(name, file_prefix)]
    names = {prefix + name.removeprefix(file_prefix): name for name in prefixed}
    names = names or {f"{prefix}/{name}": name for name in tensors}
    if unknown := sorted(names.keys() - specs.keys()):
        raise UserError(f"{file} holds {unknown[0]!r}, which this model does not have under {prefix!r}")
    if missing := sorted(specs.keys() - names.keys() - optional.keys()):
        raise UserError(f"{file} lacks {missing[0]!r}, which no stage trains; use weights of the config's sizes")
    return {
        path: _to_sharded_array(
            _pad_vocab_rows(tensors[name], specs[path], *vocab_sizes), specs[path], f"{file}: {path!r}"
        )
        for path, name in sorted(names.items())
    }


def _pad_vocab_rows(
    table: np.ndarray, spec: jax.ShapeDtypeStruct, vocab_size: int | None, embedding_rows: int | None
) -> np.ndarray:
    """An embedding table or output head padded with zeros from vocab_size to embedding_rows; other arrays unchanged."""
    if embedding_rows == vocab_size or table.shape != tuple(
        vocab_size if n == embedding_rows else n for n in spec.shape
    ):
        return table
    padded = np.zeros(spec.shape, table.dtype)
    padded[tuple(map(slice, table.shape))] = table
    return padded


def _to_sharded_array(array: np.ndarray, spec: jax.ShapeDtypeStruct, description: str) -> jax.Array:
    if array.shape != spec.shape:
        raise UserError(f"{description} has shape {array.shape}, but the config needs {spec.shape}")
    return jax.make_array_from_callback(
        spec.shape, spec.sharding, lambda index: np.asarray(array[index]).astype(spec.dtype)
    )
