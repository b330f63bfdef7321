# SPDX-License-Identifier: Apache-2.0
"""Resize parameters during conversion: tokens added to the vocabulary, position embeddings interpolated.

A `ResizePlan` changes single parameters, so a conversion still holds one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lionjax.convert.formats.hf_vision import SWIN
from lionjax.convert.mapping.plan import TensorSpec
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.models import parts

BICUBIC_COEFFICIENT = -0.75  # of torch's interpolate; Pillow uses -0.5


@dataclasses.dataclass(frozen=True)
class ResizePlan:
    """The new config, and the new shape and transform of each parameter that changes, by path."""

    config: Any
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    transforms: Mapping[str, Callable[[np.ndarray], np.ndarray]] = dataclasses.field(default_factory=dict)

    def resized_specs(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Specs of all parameters after resizing."""
        return {p: TensorSpec(self.shapes.get(p, spec.shape), spec.dtype) for p, spec in specs.items()}

    def apply(self, parts: Iterable) -> Iterable:
        """Yields the resized (path, index, array) of each part; see `mapping.apply.iter_param_slices`."""
        for path, index, part in parts:
            yield path, index, self.transforms[path](part) if path in self.transforms else part

    def compose(self, other: ResizePlan) -> ResizePlan:
        """Both plans; `other` was made from the config of this one and changes other parameters."""
        return ResizePlan(other.config, {**self.shapes, **other.shapes}, {**self.transforms, **other.transforms})


def resize_token_embeddings(
    model_config: Any, num_new_tokens: int, num_known_tokens: int | None = None, pad_to_multiple_of: int = 1
) -> ResizePlan:
    """Adds `num_new_tokens` rows after the first `num_known_tokens` (default: all) to token embeddings and LM head.

    The vocabulary is then padded to a multiple of `pad_to_multiple_of` (64 for LLaVA). New and padding rows are the
    mean of the known rows, so that the model does not prefer them. Raises UserError for sizes that do not fit.
    """
    prefix, language = parts.language_of(model_config)
    old_size = language.vocab_size
    num_known_tokens = old_size if num_known_tokens is None else num_known_tokens
    if num_new_tokens < 0 or not 0 < num_known_tokens <= old_size:
        raise UserError(
            f"cannot add {num_new_tokens} tokens after the {num_known_tokens} of the tokenizer: the model's vocab_size "
            f"is {old_size}"
        )
    new_size = max(old_size, num_known_tokens + num_new_tokens)
    new_size += -new_size % pad_to_multiple_of
    new_language = dataclasses.replace(language, vocab_size=new_size)
    config, axis_by_path = parts.replace_part(model_config, prefix, new_language), parts.token_tables(language)
    num_rows = parts.table_rows(new_language)

    def resize_axis(axis):
        def change(table):
            old_rows = np.moveaxis(table, axis, 0)
            new_table = np.zeros([num_rows if k == axis else n for k, n in enumerate(table.shape)], table.dtype)
            new_rows, mean = np.moveaxis(new_table, axis, 0), old_rows[:num_known_tokens].mean(0, dtype=np.float32)
            new_rows[:old_size] = old_rows[:old_size]
            new_rows[num_known_tokens : num_known_tokens + num_new_tokens] = mean.astype(table.dtype)
            new_rows[old_size:new_size] = mean.astype(table.dtype)
            return new_table

        return change

    sizes = {0: (num_rows, language.width), 1: (language.width, num_rows)}
    shapes = {path: sizes[axis] for path, axis in axis_by_path.items()}
    if "head/kernel" in axis_by_path and language.lora.targets(("head",)):
        axis_by_path, shapes["head/lora_b"] = {**axis_by_path, "head/lora_b": 1}, (language.lora.rank, num_rows)
    return ResizePlan(
        config,
        {prefix + path: shape for path, shape in shapes.items()},
        {prefix + path: resize_axis(axis) for path, axis in axis_by_path.items()},
    )


def interpolate_position_embeddings(model_config: Any, image_size: int) -> ResizePlan:
    """Position embeddings of a ViT interpolated (bicubic) for images of `image_size` pixels a side.

    As in LAVIS: CLIP with align_corners=True, EVA with align_corners=False. Of a Swin, the window size and the relative
    position tables change. Raises UserError for a size that is no multiple of the patch size.
    """
    if parts.swin_of(model_config) is not None:
        return _resize_swin_windows(model_config, image_size)
    prefix, vision = parts.vit_of(model_config)
    if image_size % vision.patch_size or image_size < vision.patch_size:
        raise UserError(f"image_size is {image_size}; it must be a multiple of the patch size {vision.patch_size}")
    new_vision = dataclasses.replace(vision, image_size=image_size)
    config = parts.replace_part(model_config, prefix, new_vision)
    old, new = vision.image_size // vision.patch_size, image_size // vision.patch_size
    first = vision.num_positions - vision.num_patches  # of the class token

    def change(position_PD):
        grid = position_PD[first:].reshape(old, old, -1)
        grid = interpolate_grid(grid, new, align_corners=vision.pre_layernorm).reshape(new * new, -1)
        return np.concatenate([position_PD[:first], grid])

    path = prefix + "position"
    return ResizePlan(config, {path: (new_vision.num_positions, vision.width)}, {path: change})


def _resize_swin_windows(model_config: Any, image_size: int) -> ResizePlan:
    """A Swin (or a model with one) for another image size: the window size changes in proportion, as in the original.

    Raises UserError where the new window size is no integer.
    """
    prefix, swin = parts.swin_of(model_config)
    window, remainder = divmod(swin.window_size * image_size, swin.image_size or 1)
    if swin.image_size is None or remainder or image_size % swin.patch_size or not window:
        raise UserError(
            f"image_size is {image_size}; it does not give an integer window size "
            f"(this Swin has {swin.window_size} patches at image_size {swin.image_size})"
        )
    new_swin = dataclasses.replace(swin, image_size=image_size, window_size=window)
    config = parts.replace_part(model_config, prefix, new_swin)
    leaves = trees.flatten(SWIN.abstract_params(new_swin))
    shapes = {prefix + path: leaf.shape for path, leaf in leaves.items() if path.endswith("/places")}

    def change(shape):
        def resample(table_RN):
            old, new = math.isqrt(len(table_RN)), math.isqrt(shape[-2])
            grid = interpolate_grid(table_RN.reshape(old, old, -1), new, align_corners=False)
            return grid.reshape(new * new, -1)

        return resample

    return ResizePlan(config, shapes, {path: change(shape) for path, shape in shapes.items()})


def interpolate_grid(grid_HWD: np.ndarray, side: int, align_corners: bool) -> np.ndarray:
    """A grid (S, S, D) resized to (side, side, D), equal to torch's bicubic `interpolate`."""
    if grid_HWD.shape[0] == side:
        return grid_HWD
    matrix = bicubic_matrix(grid_HWD.shape[0], side, align_corners)
    resampled = np.einsum("ah,hwd,bw->abd", matrix, grid_HWD.astype(np.float32), matrix, optimize=True)
    return resampled.astype(grid_HWD.dtype)


def bicubic_matrix(old_size: int, new_size: int, align_corners: bool) -> np.ndarray:
    """(new_size, old_size): weights of the old positions for each new one; indices are clamped at the edges."""
    index = np.arange(new_size)
    if align_corners:
        position = index * ((old_size - 1) / (new_size - 1) if new_size > 1 else 0.0)
    else:
        position = (index + 0.5) * (old_size / new_size) - 0.5
    first = np.floor(position).astype(int)
    matrix = np.zeros((new_size, old_size))
    for tap in range(-1, 3):
        distance = np.abs(position - (first + tap))
        inner = ((BICUBIC_COEFFICIENT + 2) * distance - (BICUBIC_COEFFICIENT + 3)) * distance**2 + 1
        outer = ((distance - 5) * distance + 8) * distance * BICUBIC_COEFFICIENT - 4 * BICUBIC_COEFFICIENT
        np.add.at(matrix, (index, np.clip(first + tap, 0, old_size - 1)), np.where(distance <= 1, inner, outer))
    return matrix.astype(np.float32)
