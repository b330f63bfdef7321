# SPDX-License-Identifier: Apache-2.0
"""The same inputs through our model and through transformers' class of it, compared stage by stage.

A stage is a module with a weight, such as a projection or a norm, in all layers together. Which of ours is which of
theirs the weight table says, so nothing here knows how a model computes. Both run in float32.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.convert.formats import detect
from lionjax.convert.formats import peft as loras
from lionjax.convert.formats.checkpoint_format import Published
from lionjax.convert.io.safetensors_writer import write_safetensors
from lionjax.convert.mapping.apply import state_from
from lionjax.convert.mapping.plan import Form, grouped
from lionjax.convert.verify.hf_parts import PEERS, Peer
from lionjax.convert.verify.inputs import RUNS
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import Row, Template, conv

AGREE = 1e-3  # of the largest number of a stage; float32 alone leaves a thousandth of that
WEIGHTS = ("/kernel", "/scale", "/table")  # ends of the paths of what a module multiplies with


@dataclasses.dataclass(frozen=True)
class Stage:
    """How far the two are apart in one module of all layers, `largest` being the largest number there."""

    name: str
    layers: int
    difference: float
    largest: float
    worst: str  # the module in which the difference is largest

    @property
    def relative(self) -> float:
        return self.difference / self.largest if self.largest else self.difference


@dataclasses.dataclass(frozen=True)
class Verified:
    """All stages in the order in which they run, then the results; and which modules could not be compared."""

    stages: tuple[Stage, ...]
    left: tuple[str, ...]

    @property
    def agree(self) -> bool:
        return all(stage.relative <= AGREE for stage in self.stages)

    def __str__(self) -> str:
        wide = max(len(stage.name) for stage in self.stages)
        lines = [f"{'stage':{wide}}  layers  largest difference  largest number"]
        for s in self.stages:
            mark = "" if s.relative <= AGREE else f"  <- they part in {s.worst}"
            lines.append(f"{s.name:{wide}}  {s.layers:6}  {s.difference:18.2e}  {s.largest:14.3g}{mark}")
        if self.left:
            lines.append(f"not compared: {', '.join(grouped(self.left))}")
        return "\n".join(lines)


def verify(config: Any, params: Params, folder: str | Path) -> Verified:
    """Compare parameters in memory with a folder that transformers loads, or whose parts it can run by themselves.

    Raises UserError where it cannot.
    """
    import jax

    system, folder = detect.system_in(config), Path(folder)
    kind = detect.of_config(system)
    if peers := PEERS.get(kind.name, lambda system: [])(system):
        tensors = detect.open_source(folder, kind.name).tensors
        return _by_parts(peers, trees.flatten(params), tensors)
    if (folder / loras.FOLDER).is_dir():
        raise UserError(f"transformers would leave out the LoRA of {folder}; verify a merged model")
    theirs = _load(kind, system, folder)
    run = RUNS[kind.name](system, np.random.default_rng(0))
    params = trees.cast(jax.tree.map(np.asarray, params), "float32")

    def forward(params, *inputs):
        return run.module.apply(
            {"params": params}, *inputs, method=run.method, capture_intermediates=True, mutable="intermediates"
        )

    made, seen = jax.jit(forward)(params, *run.inputs)
    calls = _calls(seen["intermediates"])
    results, heard = _listen(theirs, run.theirs)
    table, model = detect.table_and_model(kind, system)
    rows = [row for row in table if row.paths and row.paths[0].endswith(WEIGHTS)]
    layers = {p: leaf.shape for p, leaf in trees.flatten(model).items()}
    calls = {path: calls.get(path.rpartition("/")[0], ()) for path in layers}
    stages, left = _stages(rows, layers, calls, heard, _names(theirs, heard, kind, folder))
    for name, mine in made.items():
        stages.append(_difference(name, [(name, np.asarray(mine), results[name])]))
    return Verified(tuple(stages), tuple(left))


def _by_parts(peers: list[Peer], flat: Mapping, tensors: Mapping) -> Verified:
    """Each part as a model by itself, which transformers loads from a folder that is made of the file's tensors."""
    stages, left, used = [], [], set()
    for peer in peers:
        kind = detect.of_config(peer.config)
        rows, model = detect.table_and_model(kind, peer.config)
        shapes = trees.flatten(model)
        # What the system does not have (all of it, but for a tower alone) is random.
        rng = np.random.default_rng(0)
        random = {p: 0.1 * rng.standard_normal(x.shape).astype(np.float32) for p, x in shapes.items()}
        state = state_from(rows, trees.unflatten(random))
        found, taken = peer.tensors(tensors, state)
        ours = peer.params(flat, shapes)
        if not peer.only and (missing := sorted(state.keys() - found.keys()) or sorted(shapes.keys() - ours.keys())):
            raise UserError(f"the part {peer.name!r} lacks {len(missing)} weights, such as {missing[0]!r}")
        state |= {name: array.astype(np.float32) for name, array in found.items()}
        used |= taken
        with tempfile.TemporaryDirectory() as folder:
            forms = {name: Form.of(array) for name, array in state.items()}
            parts = ((name, (), array) for name, array in state.items())
            write_safetensors(Path(folder), "model", forms, parts)
            (Path(folder) / "config.json").write_text(json.dumps(kind.settings(peer.config)))
            seen = verify(peer.config, trees.unflatten(random | ours), folder)
        kept = [stage for stage in seen.stages if stage.name.startswith(peer.only)]
        stages += [dataclasses.replace(stage, name=f"{peer.name}: {stage.name}") for stage in kept]
        left += [name for name in seen.left if name.startswith(peer.only)]
    biases = {re.sub(r"qkv\.bias$", "q_bias", name) for name in used}
    biases |= {name.replace("q_bias", "v_bias") for name in biases}
    biases |= {re.sub(r"attn\.(query|key|value)\.", "attn.qkv.", name) for name in used}
    rest = {re.sub(r"\.(weight|bias)$", "", name) for name in tensors if name not in used | biases}
    return Verified(tuple(stages), (*left, *sorted(rest)))


def _load(kind: Published, system: Any, folder: Path):
    """Their model in float32. Raises UserError where there is no class or something is missing for it."""
    architecture = (kind.settings(system).get("architectures") or [""])[0]
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"verifying runs the original beside ours and needs {error.name}") from error
    known = getattr(transformers, architecture, None)
    if kind.name not in RUNS or known is None:
        raise UserError(f"transformers has no class to run a {kind.name} of ours beside it")
    transformers.logging.set_verbosity_error()
    loaded = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    try:
        model, told = known.from_pretrained(folder, **loaded)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot load {folder}: {str(error).splitlines()[0]}") from error
    if missing := sorted(told["missing_keys"]):
        raise UserError(f"{folder} lacks {len(missing)} weights for transformers, such as {missing[0]!r}")
    return model.eval()


def _calls(tree: Mapping, path: str = "") -> dict[str, tuple]:
    """What each of our modules gave, by its path, one entry for each call."""
    found = {}
    for name, value in tree.items():
        if name == "__call__":
            found[path.rstrip("/")] = value
        else:
            found |= _calls(value, f"{path}{name}/")
    return found


def _listen(model, given: Mapping[str, np.ndarray]) -> tuple[Any, dict[str, list[np.ndarray]]]:
    """Their results, and what each module with a weight of its own gave, in the order of the first call."""
    import torch

    heard: dict[str, list[np.ndarray]] = {}

    def listener(name):
        def hear(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            heard.setdefault(name, []).append(output.numpy())

        return hear

    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            module.register_forward_hook(listener(name))
    with torch.no_grad():
        results = model(**{name: torch.from_numpy(value) for name, value in given.items()})
    return {name: value.numpy() for name, value in results.items() if hasattr(value, "numpy")}, heard


def _names(model, heard: Mapping, kind: Published, folder: Path) -> dict[str, str]:
    """The name in the file of each module's weight: its own, or by its numbers where their code renames it."""
    tensors = detect.open_source(folder).tensors  # spelled as in the rows
    modules, names, taken = dict(model.named_modules()), {}, set()
    for module in heard:
        own = [f"{front}{module}.weight" for front in ("", kind.base, kind.inside)]
        names[module] = next((name for name in own if name in tensors), "")
        taken.add(names[module])
    rest = {name: array for name, array in tensors.items() if name not in taken}
    for module in (module for module, name in names.items() if not name):
        weight = modules[module].weight.detach().numpy()
        alike = [n for n, array in rest.items() if array.shape == weight.shape and _same(array, weight)]
        if alike:
            names[module] = max(alike, key=lambda n: difflib.SequenceMatcher(None, n, module).ratio())
            del rest[names[module]]
    return {module: name for module, name in names.items() if name}


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one.reshape(-1)[:4096].astype(np.float32), other.reshape(-1)[:4096])


def _stages(rows, shapes: Mapping, calls: Mapping, heard: Mapping, names: Mapping) -> tuple[list, list]:
    """Every row whose modules both sides have, and the modules that no row could compare."""
    found: dict[str, list] = {}
    left = []
    for module, theirs in heard.items():
        matched = ((row, Template.of(row.names[0]).match(names.get(module, ""))) for row in rows)
        row, index = next((m for m in matched if m[1] is not None), (None, ()))
        pairs = [] if row is None else _row_pairs(module, row, index, shapes, calls, theirs)
        if pairs:
            found.setdefault(row.names[0].removesuffix(".weight"), []).extend(pairs)
        else:
            left.append(module)
    return [_difference(name, pairs) for name, pairs in found.items()], left


def _row_pairs(module: str, row: Row, index, shapes: Mapping, calls: Mapping, theirs: list) -> list[tuple]:
    """Both sides of one module, call by call; nothing where ours does not stack its layers as the weights are."""
    pairs, depth = [], len(index)
    for number, their in enumerate(theirs):
        parts = []
        for path in row.paths:
            made = np.asarray(calls[path][number]) if number < len(calls[path]) else np.zeros(0)
            if made.ndim <= depth or made.shape[:depth] != shapes[path][:depth]:
                return pairs
            part = made[index]
            # T5's positions: ours have the heads in front, theirs behind.
            parts.append(np.moveaxis(part, -3, -1) if path.endswith("relative/table") else part)
        pairs += _pair(module, parts, np.moveaxis(their, 1, -1) if row.op is conv else their)
    return pairs


def _pair(module: str, parts: list[np.ndarray], theirs: np.ndarray) -> list[tuple]:
    """Both sides in one shape; nothing where they lie otherwise in memory."""
    width = theirs.shape[-1] // len(parts)
    flat = []
    for part in parts:
        tails = [int(np.prod(part.shape[k:])) for k in range(part.ndim)]
        if part.size * len(parts) != theirs.size or width not in tails:
            return []
        flat.append(part.reshape(-1, width))
    mine = np.concatenate(flat, axis=-1)
    return [(module, mine, theirs.reshape(mine.shape))]


def _difference(name: str, pairs: list[tuple[str, np.ndarray, np.ndarray]]) -> Stage:
    apart = [(float(np.abs(mine - theirs).max()), module) for module, mine, theirs in pairs]
    apart = [(np.inf if np.isnan(number) else number, module) for number, module in apart]
    difference, worst = max(apart)
    largest = max(float(np.abs(theirs).max()) for _, _, theirs in pairs)
    return Stage(name, len({module for module, _, _ in pairs}), difference, largest, worst)
