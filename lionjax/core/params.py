# SPDX-License-Identifier: Apache-2.0
"""Operations on parameter trees by path: flatten, match, split, merge, count, cast and print."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import jax
import numpy as np

from lionjax.core.types import Params, UserError


def flatten(params: Params, prefix: str = "") -> dict[str, object]:
    """{"vision/blocks/attn/q/kernel": leaf} of a nested dict, sorted by path, without empty subtrees."""
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
    """Whether one of the regular expressions matches the whole path or the path of a parent."""
    return any(re.fullmatch(f"(?:{pattern})(?:/.*)?", path) for pattern in patterns)


def split(params: Params, patterns: Iterable[str]) -> tuple[Params, Params]:
    """Two trees: the leaves whose path matches a pattern, and all others.

    Raises UserError for the first pattern that matches no path, naming the closest path.
    """
    patterns, flat = tuple(patterns), flatten(params)
    names = {path.split("/")[0] for path in flat} | set(flat)
    for pattern in patterns:
        if not any(matches(path, (pattern,)) for path in flat):
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"pattern {pattern!r} matches none of the {len(flat)} parameters{hint}")
    matched = {path: leaf for path, leaf in flat.items() if matches(path, patterns)}
    unmatched = {path: leaf for path, leaf in flat.items() if path not in matched}
    return unflatten(matched), unflatten(unmatched)


def merge(*trees: Params) -> Params:
    """One tree from trees with disjoint paths, without copying arrays. Raises ValueError for a path in two trees."""
    flat: dict[str, object] = {}
    for tree in trees:
        leaves = flatten(tree)
        if shared := flat.keys() & leaves.keys():
            raise ValueError(f"{len(shared)} parameters are in two of the trees, for example {min(shared)!r}")
        flat |= leaves
    return unflatten(flat)


def count_params(params: Params) -> int:
    """Number of scalars in the tree, of arrays or ShapeDtypeStructs."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())


def cast(params: Params, dtype: str) -> Params:
    """The tree with floating-point leaves cast to `dtype`; integer leaves are unchanged."""

    def cast_leaf(leaf):
        floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        return leaf.astype(dtype) if floating else leaf

    return jax.tree.map(cast_leaf, params)


def parameter_overview(params: Params, depth: int = 2) -> str:
    """A table of the subtrees at `depth` for printing: path, number of scalars, dtypes."""
    groups: dict[str, list] = {}
    for path, leaf in flatten(params).items():
        groups.setdefault("/".join(path.split("/")[:depth]), []).append(leaf)
    lines = []
    for path, leaves in groups.items():
        scalars = sum(int(np.prod(leaf.shape)) for leaf in leaves)
        lines.append(f"{path:40} {scalars:>14,}  {' '.join(sorted({str(leaf.dtype) for leaf in leaves}))}")
    return "\n".join(lines)
