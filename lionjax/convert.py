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
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lionjax import config as configs
from lionjax import convert_card, convert_lora, convert_orbax, convert_surgery, convert_systems
from lionjax import params as trees
from lionjax.convert_files import Tensors, has_nan, open_weights
from lionjax.convert_plan import Form, Plan, plan_params, plan_state
from lionjax.convert_published import Published, read_settings
from lionjax.convert_surgery import Surgery
from lionjax.convert_systems import CONFIG_FILE
from lionjax.convert_tables import leaf_parts, params_from, placed_from, state_from, tensor_parts
from lionjax.convert_write import SHARD_BYTES, whole_folder, write_safetensors
from lionjax.interfaces import Params, UserError
from lionjax.weight_rows import Row, copy_bits

__all__ = [
    "convert",
    "from_torch",
    "load_params",
    "params_from",
    "placed_from",
    "save",
    "state_from",
    "table_of",
    "to_torch",
]

log = logging.getLogger(__name__)

OURS, THEIRS = "params", "model"  # first words of the weight files in each kind of folder
ORIGIN = "origin"
COMPANIONS = (  # what belongs to a model besides its weights and is handed on as it is
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.txt", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja",
    "qformer_tokenizer/tokenizer.json", "qformer_tokenizer/spiece.model", "qformer_tokenizer/vocab.txt",
    "ram_tag_list.txt", "ram_tag_list_chinese.txt", "ram_tag_list_threshold.txt",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Tables to be changed on the way in: new words behind the vocabulary, a multiple to fill it to, a picture size."""

    words: tuple[str, ...] = ()
    vocab_multiple: int = 1
    image: int | None = None


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
    src: str | Path,
    dst: str | Path,
    to: str,
    system: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    adapter: str | Path | None = None,
    merge_lora: bool = False,
    wanted: Wanted = Wanted(),
    base: str | Path | None = None,
) -> Coverage:
    """A folder into a folder, a tensor at a time: `to` "jax" (our names) or "torch" (the original's).

    `system` names the kind of model where the source does not say it; `adapter` is a folder of PEFT's with a LoRA for
    it; `base` is the model from which the source is a difference; `wanted` changes tables; all four on the way in. On
    the way to torch a LoRA is written into a folder `adapter`, or merged into its matrices. The new folder appears when
    it is complete. Raises UserError, in words, for everything that does not fit.
    """
    start = time.perf_counter()
    if to not in ("jax", "torch"):
        raise UserError(f"to is {to!r}; it can be 'jax' or 'torch'")
    if merge_lora and to == "jax":
        raise UserError("a LoRA is merged on the way to torch; here it stays beside its matrices")
    extra = adapter is not None or base is not None or wanted != Wanted()
    if to == "torch" and extra:
        raise UserError("bases, adapters, words and picture sizes are added on the way to jax")
    stored = convert_orbax.holds_checkpoint(Path(src))
    if stored:
        convert_orbax.return_freed_memory()
    if to == "jax" and stored:
        if extra:
            raise UserError(
                "bases, adapters, words and picture sizes go with an original's weights"
            )
        coverage = _convert_stored(Path(src), Path(dst), shard_bytes)
    elif to == "jax":
        source = convert_systems.open_source(
            Path(src), system, adapter and Path(adapter), base and Path(base)
        )
        coverage = _convert_in(source, Path(dst), shard_bytes, wanted)
    else:
        coverage = _convert_out(Path(src), Path(dst), shard_bytes, merge_lora)
    coverage.seconds = time.perf_counter() - start
    for name in coverage.nan:
        log.warning("tensor %r holds NaN", name)
    return coverage


def _convert_in(
    source: convert_systems.Source, dst: Path, shard_bytes: int, wanted: Wanted
) -> Coverage:
    plan = _plan_in(source)
    coverage = coverage_of(source.kind, plan, source.tensors)
    for name, others in source.copied.items():
        coverage.tied[name] = (*coverage.tied.get(name, ()), *others)
    beside = companions_of(source.folder)
    surgery, texts = _surgery(convert_systems.system_in(source.config), wanted, beside)
    config = _with_system(source.config, surgery.config)

    def done(name, array):
        if has_nan(np.asarray(array)):
            coverage.nan.append(name)
        source.tensors.forget(name, array)

    with whole_folder(dst) as folder:
        parts = surgery.parts(leaf_parts(plan, source.tensors, done))
        files = write_safetensors(folder, OURS, surgery.forms(plan.made), parts, shard_bytes)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        copy_files(beside, folder / ORIGIN)
        for name, content in texts.items():
            (folder / ORIGIN / name).write_bytes(content)
        coverage.files = (*files, CONFIG_FILE)
    return coverage


def _convert_stored(src: Path, dst: Path, shard_bytes: int) -> Coverage:
    """An Orbax checkpoint into a folder in our own names."""
    config, tensors = open_params(src)
    kind = convert_systems.of_config(config)
    rows, model = convert_systems.table_and_model(kind, config)
    plan = plan_state(rows, tensors, model)  # refuses what is no parameter of this model
    forms, parts = convert_orbax.layers(tensors, rows)
    with whole_folder(dst) as folder:
        files = write_safetensors(folder, OURS, forms, parts, shard_bytes)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        copy_files(origin_of(src), folder / ORIGIN)
    coverage = coverage_of(kind, plan, tensors)
    coverage.files = (*files, CONFIG_FILE)
    return coverage


def companions_of(folder: Path | None) -> dict[str, Path]:
    """What lies beside the weights and is handed on as it is."""
    beside = {} if folder is None else {name: folder / name for name in COMPANIONS}
    return {name: file for name, file in beside.items() if file.is_file()}


def _surgery(
    system: Any, wanted: Wanted, beside: Mapping[str, Path]
) -> tuple[Surgery, dict[str, bytes]]:
    """The tables that change, and what they change in the files that come along."""
    made, texts, known = Surgery(system), {}, None
    if wanted.words and (file := beside.get("tokenizer.json")) is not None:
        known, texts["tokenizer.json"] = convert_surgery.add_to_tokenizer(file, wanted.words)
    if wanted.words or wanted.vocab_multiple > 1:
        words, multiple = len(wanted.words), wanted.vocab_multiple
        made = made.then(convert_surgery.added_words(system, words, known, multiple))
    if wanted.image is not None:
        made = made.then(convert_surgery.picture_size(made.config, wanted.image))
        if (file := beside.get("preprocessor_config.json")) is not None:
            said = convert_surgery.said_of_pictures(read_settings(file), wanted.image)
            texts["preprocessor_config.json"] = json.dumps(said, indent=2).encode()
    return made, texts


def _with_system(config: Any, system: Any) -> Any:
    """The config, or the whole experiment that it is, with another system's config."""
    return (
        system
        if convert_systems.system_in(config) is config
        else dataclasses.replace(config, system=system)
    )


def _convert_out(src: Path, dst: Path, shard_bytes: int, merge_lora: bool) -> Coverage:
    config, tensors = open_params(src)
    config, flat = _merged(config, tensors) if merge_lora else (config, tensors)
    kind, plan = _plan_out(config, flat)
    coverage = coverage_of(kind, plan, tensors)
    parts = tensor_parts(plan, flat, tensors.forget)
    coverage.files = _write_out(config, kind, plan, parts, dst, shard_bytes, origin_of(src))
    return coverage


def origin_of(folder: Path) -> dict[str, Path]:
    """What came along from elsewhere with weights that are in our names now."""
    origin = [file for file in sorted((folder / ORIGIN).rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder / ORIGIN)): file for file in origin}


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


def to_torch(
    config: Any,
    params: Params,
    path: str | Path,
    shard_bytes: int = SHARD_BYTES,
    companions: Mapping[str, Path] | None = None,
    merge_lora: bool = False,
) -> None:
    """Write `params` as a folder with the original's names: safetensors, config.json, a model card.

    `config` is the system's, or the experiment that trained it. `companions`: further files by their names there,
    such as tokenizers. A LoRA goes into a folder `adapter` as PEFT writes it, or into the matrices with `merge_lora`.
    Raises UserError when something does not fit, or stands at `path` already.
    """
    flat = trees.flatten(params)
    if merge_lora:
        config, flat = _merged(config, flat)
    kind, plan = _plan_out(config, flat)
    parts = tensor_parts(plan, flat)
    _write_out(config, kind, plan, parts, Path(path), shard_bytes, companions or {})


def save(
    config: Any,
    params: Params,
    path: str | Path,
    shard_bytes: int = SHARD_BYTES,
    companions: Mapping[str, Path] | None = None,
) -> None:
    """Write `params` as a folder in our own names, which `load_params` reads; arguments as those of `to_torch`."""
    flat = trees.flatten(params)
    forms = {name: Form.of(leaf) for name, leaf in flat.items()}
    with whole_folder(Path(path)) as folder:
        parts = ((name, (), np.asarray(leaf)) for name, leaf in flat.items())
        write_safetensors(folder, OURS, forms, parts, shard_bytes)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        copy_files(companions or {}, folder / ORIGIN)


def table_of(path: str | Path, system: str | None = None) -> tuple[Row, ...]:
    """The rows of a folder or file of weights, in our names or the original's. Nothing is read but what it is."""
    path = Path(path)
    ours = holds_params(path)
    config = open_params(path)[0] if ours else convert_systems.open_source(path, system).config
    rows, _ = convert_systems.table_and_model(convert_systems.of_config(config), config)
    return rows


def holds_params(path: Path) -> bool:
    """Whether a folder holds weights in our own names, as safetensors or as an Orbax checkpoint."""
    return convert_orbax.holds_checkpoint(path) or _our_file(path) is not None


def _our_file(path: Path) -> Path | None:
    files = [path / f"{OURS}.safetensors.index.json", path / f"{OURS}.safetensors"]
    return next((file for file in files if file.is_file()), None)


def open_params(path: str | Path) -> tuple[Any, Tensors]:
    """(config, parameters by path) of a folder that `convert` wrote in our names. Nothing is read yet."""
    path = Path(path)
    if convert_orbax.holds_checkpoint(path):
        return convert_orbax.read_config(path), convert_orbax.open_arrays(path)
    found = _our_file(path)
    if found is None or not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} holds no converted model; wanted {CONFIG_FILE} and {OURS}.safetensors"
        )
    return convert_systems.read_config(path), open_weights(found)


def load_params(path: str | Path, like: Params | None = None) -> tuple[Any, Params]:
    """(config, params) of such a folder: memory maps (of Orbax's arrays), or with `like` arrays on its mesh.

    Each process reads only the bytes of its own shards.
    """
    config, tensors = open_params(path)
    stored = convert_orbax.holds_checkpoint(Path(path))
    if like is not None and stored:
        return config, convert_orbax.placed(tensors, like)
    if like is not None:
        return config, placed_from([Row(path, path) for path in tensors], tensors, like)
    flat = {p: np.asarray(leaf) for p, leaf in tensors.items()} if stored else tensors.arrays
    return config, trees.unflatten(flat)


def _plan_in(source: convert_systems.Source) -> Plan:
    rows, model = convert_systems.table_and_model(source.kind, source.config)
    return plan_params(rows, source.tensors, source.kind.ignore, model)


def _plan_out(config: Any, flat: Mapping) -> tuple[Published, Plan]:
    kind = convert_systems.of_config(config)
    rows, model = convert_systems.table_and_model(kind, config)
    return kind, plan_state(rows, flat, model)


def _merged(config: Any, flat: Mapping) -> tuple[Any, Mapping]:
    """Config and parameters without LoRA, which is in the matrices now."""
    system = convert_systems.system_in(config)
    if (lora := convert_lora.of(system)) is None:
        raise UserError("this model has no LoRA that could be merged")
    plain = convert_lora.with_lora(system, dataclasses.replace(lora, rank=0))
    return _with_system(config, plain), convert_lora.merged(flat, lora)


def coverage_of(kind: Published, plan: Plan, tensors: Tensors) -> Coverage:
    tied = {piece.tensors[0]: piece.tied for piece in plan.pieces if piece.tied}
    ignored = tensors.left | {name: _reason(pattern) for name, pattern in plan.ignored.items()}
    count = sum(len(piece.tensors) + len(piece.tied) for piece in plan.pieces)
    paths = {path for piece in plan.pieces for path in piece.row.paths}
    size = sum(form.nbytes for form in plan.made.values())
    return Coverage(kind.name, count, len(paths), size, ignored=ignored, tied=tied)


def _reason(pattern: str) -> str:
    """Why names of a pattern are passed over: what it says in a comment, else the pattern itself."""
    comments = re.findall(r"\(\?#([^)]*)\)", pattern)
    return comments[-1] if comments else f"matches {pattern}"


def _write_out(
    config,
    kind: Published,
    plan: Plan,
    parts,
    dst: Path,
    shard_bytes: int,
    beside: Mapping[str, Path],
):
    """The folder for torch's side, with what belongs beside the weights: what came along from there, tokenizers."""
    files: list[str] = []
    with whole_folder(dst) as folder:
        # A LoRA's rows come last, so its tensors do. Grouping holds one tensor more, so it is only done for a LoRA.
        groups = itertools.groupby(parts, lambda part: convert_lora.is_detour(part[0]))
        for detour, group in (
            groups if any(map(convert_lora.is_detour, plan.made)) else [(False, parts)]
        ):
            forms = {
                n: form for n, form in plan.made.items() if convert_lora.is_detour(n) == detour
            }
            where = folder / convert_lora.FOLDER if detour else folder
            where.mkdir(exist_ok=True)
            if detour:  # PEFT knows one file only
                names = write_safetensors(where, convert_lora.WEIGHTS, forms, group, 2**62)
                files += [f"{convert_lora.FOLDER}/{name}" for name in names]
            else:
                files += write_safetensors(where, THEIRS, forms, group, shard_bytes)
        copy_files(beside, folder)
        settings = read_settings(folder / "config.json")
        dtype = max(
            (form.dtype for form in plan.made.values()), key=lambda d: (d.itemsize <= 4, d.itemsize)
        ).name
        known = kind.settings(convert_systems.system_in(config)) | {"dtype": dtype}
        settings = _over(settings, known)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        _write_adapter(config, plan, settings, folder / convert_lora.FOLDER)
        (folder / CONFIG_FILE).write_text(configs.to_json(config))
        files += convert_card.write_processors(config, folder)
        (folder / "README.md").write_text(convert_card.card(kind.name, config, settings, plan.made))
    return (*files, "config.json", CONFIG_FILE, "README.md")


def _write_adapter(config: Any, plan: Plan, settings: dict, folder: Path) -> None:
    """What PEFT wants to know of the LoRA whose tensors lie in `folder`; nothing where there is none."""
    detours = [name for name in plan.made if convert_lora.is_detour(name)]
    if detours:
        lora = convert_lora.of(convert_systems.system_in(config))
        matrices = {n for n, form in plan.made.items() if len(form.shape) == 2 and n not in detours}
        architecture = (settings.get("architectures") or [""])[0]
        said = convert_lora.settings(lora, detours, matrices, architecture)
        (folder / convert_lora.CONFIG).write_text(json.dumps(said, indent=2) + "\n")


def _over(old: dict, new: dict) -> dict:
    """Settings with new ones over them, part by part."""
    parts = {
        key
        for key in old.keys() & new.keys()
        if isinstance(old[key], dict) and isinstance(new[key], dict)
    }
    return old | new | {key: _over(old[key], new[key]) for key in parts}


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copies of files under the names that they have in `folder`."""
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
