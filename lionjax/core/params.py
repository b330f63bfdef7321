# SPDX-License-Identifier: Apache-2.0
"""Parameter trees by path: name, split, merge, count, describe, cast. A pattern that matches nothing is an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import jax
import numpy as np

from lionjax.core.types import Params, UserError


def flatten(params: Params, prefix: str = "") -> dict[str, object]:
    """Nested dict -> {"vision/blocks/attn/q/kernel": leaf}, in sorted order of paths. Empty subtrees vanish."""
    flat: dict[str, object] = {}
    for name in sorted(params):
        path = f"{prefix}{name}"
        value = params[name]
        flat |= flatten(value, path + "/") if isinstance(value, dict) else {path: value}
    return flat


def unflatten(flat: dict[str, object]) -> Params:
    """The inverse of `flatten`."""
    params: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path is matched whole by one of the regular expressions, or lies under it."""
    return any(re.fullmatch(f"(?:{pattern})(?:/.*)?", path) for pattern in patterns)


def split(params: Params, patterns: Iterable[str]) -> tuple[Params, Params]:
    """Two trees: the leaves whose path matches a pattern, and the rest.

    Raises UserError naming every pattern that matches nothing, with the nearest path.
    """
    patterns, flat = tuple(patterns), flatten(params)
    heads = {path.split("/")[0] for path in flat} | set(flat)
    for pattern in patterns:
        if not any(matches(path, (pattern,)) for path in flat):
            near = difflib.get_close_matches(pattern, heads, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"pattern {pattern!r} matches none of the {len(flat)} parameters{hint}")
    chosen = {path: leaf for path, leaf in flat.items() if matches(path, patterns)}
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(chosen), unflatten(rest)


def merge(*trees: Params) -> Params:
    """One tree from several that share no leaf. Cheap: nothing is copied, so it may run inside `jax.grad`."""
    flat: dict[str, object] = {}
    for tree in trees:
        part = flatten(tree)
        if both := flat.keys() & part.keys():
            raise ValueError(f"{len(both)} parameters stand in two trees, for example {min(both)!r}")
        flat |= part
    return unflatten(flat)


def count_params(params: Params) -> int:
    """Number of scalars in the tree (also of shapes made by eval_shape)."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())


def cast(params: Params, dtype: str) -> Params:
    """Floating leaves in another dtype; integer leaves stay."""

    def one(leaf):
        floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        return leaf.astype(dtype) if floating else leaf

    return jax.tree.map(one, params)


def parameter_overview(params: Params, depth: int = 2) -> str:
    """A table of subtrees down to `depth`: path, scalars, dtypes. For people and logs."""
    groups: dict[str, list] = {}
    for path, leaf in flatten(params).items():
        groups.setdefault("/".join(path.split("/")[:depth]), []).append(leaf)
    lines = []
    for path, leaves in groups.items():
        scalars = sum(int(np.prod(leaf.shape)) for leaf in leaves)
        lines.append(f"{path:40} {scalars:>14,}  {' '.join(sorted({str(leaf.dtype) for leaf in leaves}))}")
    return "\n".join(lines)
