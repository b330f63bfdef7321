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
    larger = dataclasses.replace(language, vocab_size=vocab)
    config, tables = parts.replace_part(model_config, prefix, larger), parts.token_tables(language)
    rows = parts.table_rows(larger)

    def grown(axis):
        def change(table):
            old = np.moveaxis(table, axis, 0)
            whole = np.zeros([rows if k == axis else n for k, n in enumerate(table.shape)], table.dtype)
            target, mean = np.moveaxis(whole, axis, 0), old[:num_known_tokens].mean(0, dtype=np.float32)
            target[: language.vocab] = old[: language.vocab]
            target[num_known_tokens : num_known_tokens + num_new_tokens] = mean.astype(table.dtype)
            target[language.vocab : vocab] = mean.astype(table.dtype)
            return whole

        return change

    sizes = {0: (rows, language.width), 1: (language.width, rows)}
    return ResizePlan(
        config,
        {prefix + path: sizes[axis] for path, axis in tables.items()},
        {prefix + path: grown(axis) for path, axis in tables.items()},
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
    larger = dataclasses.replace(vision, image=image_size)
    config = parts.replace_part(model_config, prefix, larger)
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
    window, rest = divmod(swin.window_size * image_size, swin.image_size or 1)
    if swin.image_size is None or rest or image_size % swin.patch_size or not window:
        raise UserError(
            f"pictures of {image_size} pixels do not make whole windows, of which those of {swin.image_size} have "
            f"{swin.window_size} places a side"
        )
    larger = dataclasses.replace(swin, image=image_size, window_size=window)
    config = parts.replace_part(model_config, prefix, larger)
    leaves = trees.flatten(SWIN.abstract_params(larger))
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
    made = dict(preprocessor_config)
    for name in ("size", "crop_size"):
        if isinstance(made.get(name), dict):
            made[name] = dict.fromkeys(made[name], image_size)
        elif name in made:
            made[name] = image_size
    return made


def interpolate_grid(grid_HWD: np.ndarray, side: int, align_corners: bool) -> np.ndarray:
    """A square grid (S, S, D) at another side, bicubic as torch's `interpolate`; `corners`: its align_corners."""
    if grid_HWD.shape[0] == side:
        return grid_HWD
    matrix = bicubic_matrix(grid_HWD.shape[0], side, align_corners)
    made = np.einsum("ah,hwd,bw->abd", matrix, grid_HWD.astype(np.float32), matrix, optimize=True)
    return made.astype(grid_HWD.dtype)


def bicubic_matrix(old_size: int, new_size: int, align_corners: bool) -> np.ndarray:
    """(new, old): how much each old place gives to each new one; what lies beyond the edge is the edge."""
    places = np.arange(new_size)
    if align_corners:
        at = places * ((old_size - 1) / (new_size - 1) if new_size > 1 else 0.0)
    else:
        at = (places + 0.5) * (old_size / new_size) - 0.5
    first = np.floor(at).astype(int)
    matrix = np.zeros((new_size, old_size))
    for tap in range(-1, 3):
        far = np.abs(at - (first + tap))
        near = ((BICUBIC_COEFFICIENT + 2) * far - (BICUBIC_COEFFICIENT + 3)) * far**2 + 1
        outer = ((far - 5) * far + 8) * far * BICUBIC_COEFFICIENT - 4 * BICUBIC_COEFFICIENT
        np.add.at(matrix, (places, np.clip(first + tap, 0, old_size - 1)), np.where(far <= 1, near, outer))
    return matrix.astype(np.float32)


def add_tokens_to_tokenizer(file: Path, tokens: Iterable[str]) -> tuple[int, bytes]:
    """(ids known before, the file's new content) of a tokenizer.json with words behind all others."""
    from tokenizers import AddedToken

    tokens, tokenizer = list(tokens), model_card.open_tokenizer(file)
    if there := [word for word in tokens if tokenizer.token_to_id(word) is not None]:
        raise UserError(f"{file} knows {there[0]!r} already")
    known = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in tokens])
    if [tokenizer.token_to_id(word) for word in tokens] != list(range(known, known + len(tokens))):
        raise UserError(f"{file} has gaps in its ids, so that new words would not stand behind the others")
    return known, json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1).encode()
