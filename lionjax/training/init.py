# SPDX-License-Identifier: Apache-2.0
"""First parameters of a run: their shapes and shardings, and values from weight files or the seed."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax.convert.io.reader import open_weights
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.experiment import Experiment
from lionjax.core.types import Batch, Params, UserError
from lionjax.training import distributed, step
from lionjax.training.validate import check_prompt_format, check_token_ids

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ParamSpecs:
    """Shapes, dtypes and places of the parameters: those that no stage trains, and those that some stage does.

    `layer_axes`: how many axes of each leaf stack layers.
    """

    frozen: Params
    trainable: Params
    layer_axes: dict[str, int]
    mesh: Mesh


def make_param_specs(experiment: Experiment, example: Batch, mesh: Mesh) -> ParamSpecs:
    """What the run's parameters will be; nothing is allocated. Raises UserError for a schedule that cannot run."""
    key = jax.random.key(experiment.seed)
    check_token_ids(experiment, example)
    check_prompt_format(experiment)
    whole = sharding.abstract_params(experiment.model.init, key, example, mesh=mesh)
    step.validate_stages(experiment.stages, whole)
    patterns = [pattern for stage in experiment.stages for pattern in stage.trainable]
    learned, never = trees.split(whole, patterns)
    dtype = experiment.run.frozen_dtype
    never = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, _frozen_dtype(leaf, dtype), sharding=leaf.sharding), never
    )
    axes = sharding.layer_axes(jax.eval_shape(experiment.model.init, key, example))
    return ParamSpecs(never, learned, axes, mesh)


def _frozen_dtype(leaf, dtype: str):
    return dtype if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) else leaf.dtype


def init_params(experiment: Experiment, example: Batch, specs: ParamSpecs) -> tuple[Params, Params]:
    """(never, learned): from the experiment's weight files where they reach, else random from its seed."""
    wanted = trees.flatten(trees.merge(specs.frozen, specs.trainable))
    learned = trees.flatten(specs.trainable)
    loaded: dict[str, jax.Array] = {}
    for prefix, file in experiment.weights:
        inside = {path: leaf for path, leaf in wanted.items() if _has_prefix(path, prefix)}
        if not inside:
            parts = sorted({path.split("/")[0] for path in wanted})
            raise UserError(f"weights name the part {prefix!r}; this system has {', '.join(parts)}")
        sizes = (experiment.model.info.vocab_size, experiment.model.info.embedding_rows)
        file, _, part = file.partition("#")
        loaded |= _load_weights(resolve_weights_file(file), part, prefix, inside, learned | loaded, sizes)

    idle = sorted({path.split("/")[0] for path in wanted.keys() - learned.keys() - loaded.keys()})
    if idle and experiment.weights and distributed.is_main_process():
        log.warning(
            "weights of %s are random and no stage trains them; name a file for them in `weights`", ", ".join(idle)
        )

    def rest(key, batch):
        flat = trees.flatten(experiment.model.init(key, batch))
        return trees.unflatten({path: leaf for path, leaf in flat.items() if path not in loaded})

    key = jax.random.key(experiment.seed)
    example = jax.tree.map(np.zeros_like, example)  # every process has rows of its own
    fresh = trees.flatten(sharding.init_sharded(rest, key, example, mesh=specs.mesh))
    flat = {path: loaded.get(path, fresh.get(path)).astype(leaf.dtype) for path, leaf in wanted.items()}
    split = [{path: leaf for path, leaf in flat.items() if (path in learned) == side} for side in (False, True)]
    return trees.unflatten(split[0]), trees.unflatten(split[1])


def resolve_weights_file(file: str) -> Path:
    """The path of a weight file: `shipped:tiny_vit.safetensors` comes with the package, others are as they stand."""
    name = file.removeprefix("shipped:")
    return Path(file) if name == file else Path(__file__).parent.parent / "data" / "assets" / name


def _has_prefix(path: str, prefix: str) -> bool:
    return f"{path}/".startswith(f"{prefix}/" if prefix else "")


def _load_weights(
    file: Path, file_prefix: str, prefix: str, specs: dict, optional: dict, vocab_sizes: tuple[int | None, int | None]
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
    file_prefix = file_prefix or prefix
    inside = [name for name in tensors if _has_prefix(name, file_prefix)]
    names = {prefix + name.removeprefix(file_prefix): name for name in inside}
    names = names or {f"{prefix}/{name}": name for name in tensors}
    if unknown := sorted(names.keys() - specs.keys()):
        raise UserError(f"{file} holds {unknown[0]!r}, which this system does not have under {prefix!r}")
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
    """A table of words with the rows of zeros that the config has behind it for a mesh's sake; others as they are."""
    if embedding_rows == vocab_size or table.shape != tuple(
        vocab_size if n == embedding_rows else n for n in spec.shape
    ):
        return table
    whole = np.zeros(spec.shape, table.dtype)
    whole[tuple(map(slice, table.shape))] = table
    return whole


def _to_sharded_array(array: np.ndarray, spec: jax.ShapeDtypeStruct, description: str) -> jax.Array:
    if array.shape != spec.shape:
        raise UserError(f"{description} is {array.shape}, the config wants {spec.shape}")
    return jax.make_array_from_callback(
        spec.shape, spec.sharding, lambda index: np.asarray(array[index]).astype(spec.dtype)
    )
