# SPDX-License-Identifier: Apache-2.0
"""Tables that change their size on the way in: words added to a vocabulary, positions resampled for other pictures.

Both say what becomes of a few leaves and leave the rest alone, so that a conversion stays one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.convert import model_card
from lionjax.convert.formats.hf_vision import SWIN
from lionjax.convert.mapping.plan import TensorSpec
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.models import parts

BICUBIC_COEFFICIENT = -0.75  # torch's; the pictures' programs use -0.5


@dataclasses.dataclass(frozen=True)
class ResizePlan:
    """The config that results, and for each leaf that changes its new shape and how it is made."""

    config: Any
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    transforms: Mapping[str, Callable[[np.ndarray], np.ndarray]] = dataclasses.field(default_factory=dict)

    def resized_specs(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Forms of all leaves after it."""
        return {p: TensorSpec(self.shapes.get(p, form.shape), form.dtype) for p, form in specs.items()}

    def apply(self, parts: Iterable) -> Iterable:
        """Parts of all leaves after it; see `tables.leaf_parts`."""
        for path, index, part in parts:
            yield path, index, self.transforms[path](part) if path in self.transforms else part

    def compose(self, other: ResizePlan) -> ResizePlan:
        """Both, of which the second was planned on the config of the first, about other leaves."""
        return ResizePlan(other.config, {**self.shapes, **other.shapes}, {**self.transforms, **other.transforms})


def resize_token_embeddings(
    model_config: Any, num_new_tokens: int, num_known_tokens: int | None = None, pad_to_multiple_of: int = 1
) -> ResizePlan:
    """`count` words after the `known` ones (by default all rows), the table then filled to a multiple.

    The rows of new words, and those that fill up, are the mean of the known ones, in the word table and in the head;
    so the first answer does not prefer them. LLaVA fills to a multiple of 64.
    """
    prefix, language = parts.language_of(model_config)
    num_known_tokens = language.vocab if num_known_tokens is None else num_known_tokens
    if num_new_tokens < 0 or not 0 < num_known_tokens <= language.vocab:
        raise UserError(f"{num_new_tokens} words cannot follow {num_known_tokens} of a vocabulary of {language.vocab}")
    vocab = max(language.vocab, num_known_tokens + num_new_tokens)
    vocab += -vocab % pad_to_multiple_of
    new_language = dataclasses.replace(language, vocab_size=vocab)
    config, axis_by_path = parts.replace_part(model_config, prefix, new_language), parts.token_tables(language)
    num_rows = parts.table_rows(new_language)

    def grown(axis):
        def change(table):
            old_rows = np.moveaxis(table, axis, 0)
            new_table = np.zeros([num_rows if k == axis else n for k, n in enumerate(table.shape)], table.dtype)
            new_rows, mean = np.moveaxis(new_table, axis, 0), old_rows[:num_known_tokens].mean(0, dtype=np.float32)
            new_rows[: language.vocab] = old_rows[: language.vocab]
            new_rows[num_known_tokens : num_known_tokens + num_new_tokens] = mean.astype(table.dtype)
            new_rows[language.vocab : vocab] = mean.astype(table.dtype)
            return new_table

        return change

    sizes = {0: (num_rows, language.width), 1: (language.width, num_rows)}
    return ResizePlan(
        config,
        {prefix + path: sizes[axis] for path, axis in axis_by_path.items()},
        {prefix + path: grown(axis) for path, axis in axis_by_path.items()},
    )


def interpolate_position_embeddings(model_config: Any, image_size: int) -> ResizePlan:
    """The positions of a ViT resampled for pictures of another size, as the tower's own code does it.

    Bicubic; CLIP's corners stay corners, EVA's grid covers the same picture (LAVIS's two towers). A Swin's windows
    change with the picture, and with them its tables.
    """
    if parts.swin_of(model_config) is not None:
        return _resize_swin_windows(model_config, image_size)
    prefix, vision = parts.vit_of(model_config)
    if image_size % vision.patch_size or image_size < vision.patch_size:
        raise UserError(f"pictures of {image_size} pixels do not make whole patches of {vision.patch_size}")
    new_vision = dataclasses.replace(vision, image=image_size)
    config = parts.replace_part(model_config, prefix, new_vision)
    old, new = vision.image_size // vision.patch_size, image_size // vision.patch_size

    def change(position_PD):
        grid = position_PD[1:].reshape(old, old, -1)
        grid = interpolate_grid(grid, new, align_corners=vision.pre_layernorm).reshape(new * new, -1)
        return np.concatenate([position_PD[:1], grid])

    path = prefix + "position"
    return ResizePlan(config, {path: (1 + new * new, vision.width)}, {path: change})


def _resize_swin_windows(model_config: Any, image_size: int) -> ResizePlan:
    """A Swin, or what sees with one, with windows that cover the same share of another picture, as its makers did."""
    prefix, swin = parts.swin_of(model_config)
    window, remainder = divmod(swin.window_size * image_size, swin.image_size or 1)
    if swin.image_size is None or remainder or image_size % swin.patch_size or not window:
        raise UserError(
            f"pictures of {image_size} pixels do not make whole windows, of which those of {swin.image_size} have "
            f"{swin.window_size} places a side"
        )
    new_swin = dataclasses.replace(swin, image=image_size, window_size=window)
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


def resize_preprocessor_config(preprocessor_config: dict, image_size: int) -> dict:
    """preprocessor_config.json for pictures of another size."""
    new_config = dict(preprocessor_config)
    for name in ("size", "crop_size"):
        if isinstance(new_config.get(name), dict):
            new_config[name] = dict.fromkeys(new_config[name], image_size)
        elif name in new_config:
            new_config[name] = image_size
    return new_config


def interpolate_grid(grid_HWD: np.ndarray, side: int, align_corners: bool) -> np.ndarray:
    """A square grid (S, S, D) at another side, bicubic as torch's `interpolate`; `corners`: its align_corners."""
    if grid_HWD.shape[0] == side:
        return grid_HWD
    matrix = bicubic_matrix(grid_HWD.shape[0], side, align_corners)
    resampled = np.einsum("ah,hwd,bw->abd", matrix, grid_HWD.astype(np.float32), matrix, optimize=True)
    return resampled.astype(grid_HWD.dtype)


def bicubic_matrix(old_size: int, new_size: int, align_corners: bool) -> np.ndarray:
    """(new, old): how much each old place gives to each new one; what lies beyond the edge is the edge."""
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


def add_tokens_to_tokenizer(file: Path, tokens: Iterable[str]) -> tuple[int, bytes]:
    """(ids known before, the file's new content) of a tokenizer.json with words behind all others."""
    from tokenizers import AddedToken

    tokens, tokenizer = list(tokens), model_card.open_tokenizer(file)
    if existing := [token for token in tokens if tokenizer.token_to_id(token) is not None]:
        raise UserError(f"{file} knows {existing[0]!r} already")
    num_known_tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if [tokenizer.token_to_id(token) for token in tokens] != list(
        range(num_known_tokens, num_known_tokens + len(tokens))
    ):
        raise UserError(f"{file} has gaps in its ids, so that new words would not stand behind the others")
    return num_known_tokens, json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1).encode()
