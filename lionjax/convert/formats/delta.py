# SPDX-License-Identifier: Apache-2.0
"""Weights published as a difference from a LLaMA that nobody may give away: LLaVA's and Vicuna's deltas.

The sum of two tensors is made when it is asked for, so that nothing is held but what is converted at the time.
"""

from __future__ import annotations

import re

import numpy as np

from lionjax.convert.io.reader import CheckpointTensors
from lionjax.convert.mapping.plan import group_numbered_names
from lionjax.core.types import UserError

LLAVA_ONLY_PATTERN = r"model\.mm_projector\..*"  # what LLaVA has and its base has not
CHUNK_SIZE = 2**20  # numbers that are added at a time


class LazySum:
    """delta + base as an array that is made by `numpy.asarray`; rows that the base lacks are the delta's own."""

    def __init__(self, delta: np.ndarray, base: np.ndarray):
        self.parts, self.shape, self.dtype = (delta, base), delta.shape, delta.dtype
        self.ndim, self.size, self.nbytes = delta.ndim, delta.size, delta.nbytes

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        delta, base = self.parts
        made = np.array(delta, order="C")
        flat, more = made.reshape(-1), base.reshape(-1)
        for at in range(0, more.size, CHUNK_SIZE):
            part = slice(at, min(at + CHUNK_SIZE, more.size))
            flat[part] = flat[part].astype(np.float32) + more[part].astype(np.float32)
        return made if dtype is None else made.astype(dtype)


def add_delta(delta: CheckpointTensors, base: CheckpointTensors, ignore_patterns: tuple[str, ...]) -> CheckpointTensors:
    """The tensors of a delta with those of its base added, in the delta's dtype and rounded once.

    A vocabulary that has grown has its new rows whole in the delta, and so has LLaVA's projector. Names that match
    `ignore` say nothing and stay as they are. Raises UserError with all that does not fit.
    """
    said = {name for name in delta if any(re.fullmatch(pattern, name) for pattern in ignore_patterns)}
    bare = {name for name in base if not any(re.fullmatch(pattern, name) for pattern in ignore_patterns)}
    new = [name for name in delta.keys() - said - bare if not re.fullmatch(LLAVA_ONLY_PATTERN, name)]
    problems = [f"the base has no tensor {text}" for text in group_numbered_names(new)]
    problems += [f"the delta has no tensor {text}" for text in group_numbered_names(bare - delta.keys())]
    arrays = dict(delta.arrays)
    for name in sorted(bare & delta.keys()):
        one, other = delta[name], base[name]
        if one.shape[1:] != other.shape[1:] or one.shape[:1] < other.shape[:1]:
            problems.append(f"{name!r} is {one.shape} in the delta and {other.shape} in the base")
        arrays[name] = LazySum(one, other)
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{delta.files[0]} is no delta to {base.files[0]}:{shown}")
    made = CheckpointTensors(arrays, delta.files + base.files, delta.skipped)
    made.memory_mapped = delta.memory_mapped
    return made
