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
from lionjax.convert.mapping.plan import Form
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.models import parts

BICUBIC = -0.75  # torch's; the pictures' programs use -0.5


@dataclasses.dataclass(frozen=True)
class Surgery:
    """The config that results, and for each leaf that changes its new shape and how it is made."""

    config: Any
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    change: Mapping[str, Callable[[np.ndarray], np.ndarray]] = dataclasses.field(default_factory=dict)

    def forms(self, made: Mapping[str, Form]) -> dict[str, Form]:
        """Forms of all leaves after it."""
        return {p: Form(self.shapes.get(p, form.shape), form.dtype) for p, form in made.items()}

    def parts(self, parts: Iterable) -> Iterable:
        """Parts of all leaves after it; see `tables.leaf_parts`."""
        for path, index, part in parts:
            yield path, index, self.change[path](part) if path in self.change else part

    def then(self, other: Surgery) -> Surgery:
        """Both, of which the second was planned on the config of the first, about other leaves."""
        return Surgery(other.config, {**self.shapes, **other.shapes}, {**self.change, **other.change})


def added_words(system: Any, count: int, known: int | None = None, multiple: int = 1) -> Surgery:
    """`count` words after the `known` ones (by default all rows), the table then filled to a multiple.

    The rows of new words, and those that fill up, are the mean of the known ones, in the word table and in the head;
    so the first answer does not prefer them. LLaVA fills to a multiple of 64.
    """
    prefix, language = parts.language_of(system)
    known = language.vocab if known is None else known
    if count < 0 or not 0 < known <= language.vocab:
        raise UserError(f"{count} words cannot follow {known} of a vocabulary of {language.vocab}")
    vocab = max(language.vocab, known + count)
    vocab += -vocab % multiple
    larger = dataclasses.replace(language, vocab=vocab)
    config, tables = parts.replace_part(system, prefix, larger), parts.token_tables(language)
    rows = parts.table_rows(larger)

    def grown(axis):
        def change(table):
            old = np.moveaxis(table, axis, 0)
            whole = np.zeros([rows if k == axis else n for k, n in enumerate(table.shape)], table.dtype)
            target, mean = np.moveaxis(whole, axis, 0), old[:known].mean(0, dtype=np.float32)
            target[: language.vocab] = old[: language.vocab]
            target[known : known + count] = mean.astype(table.dtype)
            target[language.vocab : vocab] = mean.astype(table.dtype)
            return whole

        return change

    sizes = {0: (rows, language.width), 1: (language.width, rows)}
    return Surgery(
        config,
        {prefix + path: sizes[axis] for path, axis in tables.items()},
        {prefix + path: grown(axis) for path, axis in tables.items()},
    )


def picture_size(system: Any, image: int) -> Surgery:
    """The positions of a ViT resampled for pictures of another size, as the tower's own code does it.

    Bicubic; CLIP's corners stay corners, EVA's grid covers the same picture (LAVIS's two towers). A Swin's windows
    change with the picture, and with them its tables.
    """
    if parts.swin_of(system) is not None:
        return _windows(system, image)
    prefix, vision = parts.vit_of(system)
    if image % vision.patch or image < vision.patch:
        raise UserError(f"pictures of {image} pixels do not make whole patches of {vision.patch}")
    larger = dataclasses.replace(vision, image=image)
    config = parts.replace_part(system, prefix, larger)
    old, new = vision.image // vision.patch, image // vision.patch

    def change(position_PD):
        grid = position_PD[1:].reshape(old, old, -1)
        grid = resampled(grid, new, corners=vision.norm_before).reshape(new * new, -1)
        return np.concatenate([position_PD[:1], grid])

    path = prefix + "position"
    return Surgery(config, {path: (1 + new * new, vision.width)}, {path: change})


def _windows(system: Any, image: int) -> Surgery:
    """A Swin, or what sees with one, with windows that cover the same share of another picture, as its makers did."""
    prefix, swin = parts.swin_of(system)
    window, rest = divmod(swin.window * image, swin.image or 1)
    if swin.image is None or rest or image % swin.patch or not window:
        raise UserError(
            f"pictures of {image} pixels do not make whole windows, of which those of {swin.image} have "
            f"{swin.window} places a side"
        )
    larger = dataclasses.replace(swin, image=image, window=window)
    config = parts.replace_part(system, prefix, larger)
    leaves = trees.flatten(SWIN.abstract(larger))
    shapes = {prefix + path: leaf.shape for path, leaf in leaves.items() if path.endswith("/places")}

    def change(shape):
        def resample(table_RN):
            old, new = math.isqrt(len(table_RN)), math.isqrt(shape[-2])
            grid = resampled(table_RN.reshape(old, old, -1), new, corners=False)
            return grid.reshape(new * new, -1)

        return resample

    return Surgery(config, shapes, {path: change(shape) for path, shape in shapes.items()})


def said_of_pictures(settings: dict, image: int) -> dict:
    """preprocessor_config.json for pictures of another size."""
    made = dict(settings)
    for name in ("size", "crop_size"):
        if isinstance(made.get(name), dict):
            made[name] = dict.fromkeys(made[name], image)
        elif name in made:
            made[name] = image
    return made


def resampled(grid_HWD: np.ndarray, side: int, corners: bool) -> np.ndarray:
    """A square grid (S, S, D) at another side, bicubic as torch's `interpolate`; `corners`: its align_corners."""
    if grid_HWD.shape[0] == side:
        return grid_HWD
    matrix = bicubic(grid_HWD.shape[0], side, corners)
    made = np.einsum("ah,hwd,bw->abd", matrix, grid_HWD.astype(np.float32), matrix, optimize=True)
    return made.astype(grid_HWD.dtype)


def bicubic(old: int, new: int, corners: bool) -> np.ndarray:
    """(new, old): how much each old place gives to each new one; what lies beyond the edge is the edge."""
    places = np.arange(new)
    if corners:
        at = places * ((old - 1) / (new - 1) if new > 1 else 0.0)
    else:
        at = (places + 0.5) * (old / new) - 0.5
    first = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        far = np.abs(at - (first + tap))
        near = ((BICUBIC + 2) * far - (BICUBIC + 3)) * far**2 + 1
        outer = ((far - 5) * far + 8) * far * BICUBIC - 4 * BICUBIC
        np.add.at(matrix, (places, np.clip(first + tap, 0, old - 1)), np.where(far <= 1, near, outer))
    return matrix.astype(np.float32)


def add_to_tokenizer(file: Path, words: Iterable[str]) -> tuple[int, bytes]:
    """(ids known before, the file's new content) of a tokenizer.json with words behind all others."""
    from tokenizers import AddedToken

    words, tokenizer = list(words), model_card.open_tokenizer(file)
    if there := [word for word in words if tokenizer.token_to_id(word) is not None]:
        raise UserError(f"{file} knows {there[0]!r} already")
    known = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    if [tokenizer.token_to_id(word) for word in words] != list(range(known, known + len(words))):
        raise UserError(f"{file} has gaps in its ids, so that new words would not stand behind the others")
    return known, json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1).encode()
