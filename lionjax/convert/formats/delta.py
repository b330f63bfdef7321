# SPDX-License-Identifier: Apache-2.0
"""Delta weights: checkpoints published as a difference from LLaMA (LLaVA, Vicuna), added to their base.

Sums are computed on access, so a conversion still holds one tensor at a time.
"""

from __future__ import annotations

import re

import numpy as np

from lionjax.convert.io.reader import CheckpointTensors
from lionjax.convert.mapping.plan import group_numbered_names
from lionjax.core.types import UserError

LLAVA_ONLY_PATTERN = r"model\.mm_projector\..*"  # tensors of LLaVA that its base does not have
CHUNK_SIZE = 2**20  # elements that are added at a time


class LazySum:
    """delta + base, computed by `numpy.asarray`; rows that the base lacks are those of the delta."""

    def __init__(self, delta: np.ndarray, base: np.ndarray):
        self.parts, self.shape, self.dtype = (delta, base), delta.shape, delta.dtype
        self.ndim, self.size, self.nbytes = delta.ndim, delta.size, delta.nbytes

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        delta, base = self.parts
        total = np.array(delta, order="C")
        flat, flat_base = total.reshape(-1), base.reshape(-1)
        for start in range(0, flat_base.size, CHUNK_SIZE):
            part = slice(start, min(start + CHUNK_SIZE, flat_base.size))
            flat[part] = flat[part].astype(np.float32) + flat_base[part].astype(np.float32)
        return total if dtype is None else total.astype(dtype)


def add_delta(delta: CheckpointTensors, base: CheckpointTensors, ignore_patterns: tuple[str, ...]) -> CheckpointTensors:
    """The tensors of a delta with its base added in float32, rounded once to the delta's dtype.

    New vocabulary rows and LLaVA's projector are complete in the delta. Tensors that match `ignore_patterns` stay as
    they are. Raises UserError with all names and shapes that differ.
    """
    ignored = {name for name in delta if any(re.fullmatch(pattern, name) for pattern in ignore_patterns)}
    base_names = {name for name in base if not any(re.fullmatch(pattern, name) for pattern in ignore_patterns)}
    new = [name for name in delta.keys() - ignored - base_names if not re.fullmatch(LLAVA_ONLY_PATTERN, name)]
    problems = [f"the base has no tensor {text}" for text in group_numbered_names(new)]
    problems += [f"the delta has no tensor {text}" for text in group_numbered_names(base_names - delta.keys())]
    arrays = dict(delta.arrays)
    for name in sorted(base_names & delta.keys()):
        delta_array, base_array = delta[name], base[name]
        if delta_array.shape[1:] != base_array.shape[1:] or delta_array.shape[:1] < base_array.shape[:1]:
            problems.append(f"{name!r} is {delta_array.shape} in the delta and {base_array.shape} in the base")
        arrays[name] = LazySum(delta_array, base_array)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{delta.files[0]} is no delta of {base.files[0]}; give its base as --base:{listed}")
    tensors = CheckpointTensors(arrays, delta.files + base.files, delta.skipped)
    tensors.memory_mapped = delta.memory_mapped
    return tensors
