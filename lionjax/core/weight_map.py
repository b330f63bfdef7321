# SPDX-License-Identifier: Apache-2.0
"""One row of a weight table: which torch tensors are which of our leaves, and how the layout changes.

A model file carries its table as a plain tuple of rows; a system's table is its parts' tables put `under` prefixes.
`convert.params_from` and `convert.state_from` read the same table, one each way.

Names are templates. `{i}` stands for a layer's number; our leaf holds all layers on axis 0. `{j}` and `{k}` stand for a
second and third number, on the axes after it. A number may be a sum: `{2i}` is every second layer, `{2i+1}` the others,
`{8i+j<7}` layers 0..6, 8..14 and so on, as (groups, 7) on our side.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible change of layout: one array for each name in the row goes in, one for each path comes out."""

    name: str  # how it prints
    to_flax: Callable
    to_torch: Callable


@dataclasses.dataclass(frozen=True)
class WeightMapping:
    """torch name(s), our path(s), and the change of layout between them.

    `also` holds other torch names of the same tensor (tied weights). On the way in one of the names must be there and
    all that are there must hold the same numbers; on the way out every name is written. No path at all: see `constant`.
    """

    torch: str | tuple[str, ...]
    flax: str | tuple[str, ...]
    transform: Transform = dataclasses.field(default_factory=lambda: identity)
    tied_keys: tuple[str, ...] = ()

    def __post_init__(self):
        if self.tied_keys and len(self.torch_keys) != 1:
            raise ValueError(f"row {self.torch_keys} has several tensors; only a single one may have other names")
        letters = {KeyTemplate.parse(name).index_letters for name in (*self.torch_keys, *self.tied_keys)}
        if len(letters) != 1:
            raise ValueError(f"the torch names {(*self.torch_keys, *self.tied_keys)} do not hold the same letters")

    @property
    def torch_keys(self) -> tuple[str, ...]:
        return (self.torch,) if isinstance(self.torch, str) else self.torch

    @property
    def flax_paths(self) -> tuple[str, ...]:
        return (self.flax,) if isinstance(self.flax, str) else self.flax

    @property
    def index_letters(self) -> str:
        """The letters of its names in axis order: "" for one tensor, "i" for a run of layers, "ij" for a grid."""
        return KeyTemplate.parse(self.torch_keys[0]).index_letters

    def to_flax(self, *tensors) -> tuple:
        """One layer's tensors -> that layer's part of each leaf."""
        made = self.transform.to_flax(*tensors)
        return (made,) if isinstance(self.flax, str) else made

    def to_torch(self, *leaves) -> tuple:
        """One layer's part of each leaf -> that layer's tensors."""
        made = self.transform.to_torch(*leaves)
        return (made,) if isinstance(self.torch, str) else made


def with_prefix(torch_prefix: str, flax_prefix: str, weight_map: Iterable[WeightMapping]) -> tuple[WeightMapping, ...]:
    """The same rows for a model that sits inside another: its torch names and its paths behind prefixes.

    The torch prefix may hold a letter that the rows do not use, when a whole model is stacked.
    """

    def put(prefix, name):
        return prefix + name if isinstance(name, str) else tuple(prefix + part for part in name)

    return tuple(
        WeightMapping(
            put(torch_prefix, row.torch), put(flax_prefix, row.flax), row.transform, put(torch_prefix, row.tied_keys)
        )
        for row in weight_map
    )


def rename_torch_keys(weight_map: Iterable[WeightMapping], *replacements: tuple[str, str]) -> tuple[WeightMapping, ...]:
    """The same rows where the other side says something else: (old, new) pieces of torch names, replaced in turn."""

    def put(name):
        for old, new in replacements:
            name = name.replace(old, new) if isinstance(name, str) else tuple(part.replace(old, new) for part in name)
        return name

    return tuple(WeightMapping(put(row.torch), row.flax, row.transform, put(row.tied_keys)) for row in weight_map)


# Changes of layout. Going in they are views (the one copy is into the leaf), so they cost nothing by themselves.


def permute(name: str, *axes: int) -> Transform:
    """An op that reorders axes: `axes` are torch's axes in our order."""
    back = tuple(np.argsort(axes))
    return Transform(name, lambda w: w.transpose(axes), lambda w: w.transpose(back))


identity = Transform("same", lambda w: w, lambda w: w)
linear = permute("linear", 1, 0)  # (out, in) -> (in, out)
conv = permute("conv", 2, 3, 1, 0)  # (out, in, high, wide) -> (high, wide, in, out); also patch kernels
conv_transpose = permute("conv_transpose", 2, 3, 0, 1)  # (in, out, high, wide) -> (high, wide, in, out)
squeeze = Transform("squeeze", lambda w: w.reshape(w.shape[1:]), lambda w: w[None])  # (1, ...) -> (...)


def reshape(torch_shape: tuple[int, ...], flax_shape: tuple[int, ...]) -> Transform:
    """Another shape with the same order of numbers; one -1 in each stands for what is left."""
    return Transform(
        f"{torch_shape} to {flax_shape}", lambda w: w.reshape(flax_shape), lambda w: w.reshape(torch_shape)
    )


def pad_rows(num_rows: int, num_padded_rows: int, transform: Transform = identity) -> Transform:
    """`op` on a table of `rows` that has `whole` rows on our side: zeros behind it, cut off again on the way out.

    A mesh splits a table evenly only where its size divides.
    """

    def to_flax(w):
        if w.shape[0] != num_rows:
            raise ValueError(f"it has {w.shape[0]} rows where {num_rows} are wanted")
        return transform.to_flax(np.concatenate([w, np.zeros((num_padded_rows - num_rows, *w.shape[1:]), w.dtype)]))

    return Transform(
        f"padded({transform.name}; {num_rows} to {num_padded_rows})",
        to_flax,
        lambda w: transform.to_torch(w)[:num_rows],
    )


def split_heads_kernel(num_heads: int, head_dim: int) -> Transform:
    """A projection into heads: (heads * head, D) -> (D, heads, head)."""
    return Transform(
        f"heads_in({num_heads}, {head_dim})",
        lambda w: w.reshape(num_heads, head_dim, w.shape[1]).transpose(2, 0, 1),
        lambda w: w.transpose(1, 2, 0).reshape(num_heads * head_dim, w.shape[0]),
    )


def split_heads(num_heads: int, head_dim: int) -> Transform:
    """The last axis cut into heads: (..., heads * head) -> (..., heads, head). Also kernels of (in, out)."""
    return Transform(
        f"heads_in_bias({num_heads}, {head_dim})",
        lambda w: w.reshape(*w.shape[:-1], num_heads, head_dim),
        lambda w: w.reshape(*w.shape[:-2], num_heads * head_dim),
    )


def merge_heads_kernel(num_heads: int, head_dim: int) -> Transform:
    """A projection out of heads: (D, heads * head) -> (heads, head, D)."""
    return Transform(
        f"heads_out({num_heads}, {head_dim})",
        lambda w: w.reshape(w.shape[0], num_heads, head_dim).transpose(1, 2, 0),
        lambda w: w.transpose(2, 0, 1).reshape(w.shape[2], num_heads * head_dim),
    )


def split_fused(*parts: Transform | None, axis: int = 0) -> Transform:
    """One torch tensor cut into equal parts along `axis`, each part one of our leaves (the row has a tuple of paths).

    None is a part that must be zero on the way in, has no leaf, and is written as zeros: the keys' third of EVA's bias.
    """

    def to_flax(w):
        pieces = np.split(w, len(parts), axis)
        for number, (part, piece) in enumerate(zip(parts, pieces)):
            if part is None and np.any(piece != 0):
                raise ValueError(f"part {number} of {len(parts)} must be zero and is not")
        return tuple(part.to_flax(piece) for part, piece in zip(parts, pieces) if part is not None)

    def to_torch(*leaves):
        rest = iter(leaves)
        pieces = [None if part is None else part.to_torch(next(rest)) for part in parts]
        some = next(piece for piece in pieces if piece is not None)
        shape = list(some.shape)
        shape[axis] *= len(parts)
        whole = np.zeros(shape, some.dtype)
        for target, piece in zip(np.split(whole, len(parts), axis), pieces):
            if piece is not None:
                copy_bits(target, piece)
        return whole

    names = ", ".join("zero" if part is None else part.name for part in parts)
    return Transform(f"fused({names}; axis {axis})", to_flax, to_torch)


def split_interleaved_heads(num_heads: int, num_parts: int = 3) -> Transform:
    """Several projections into heads that are one torch Linear, ordered by head: q, k, v of head 0 first.

    (heads * parts * head, D) -> as many leaves (D, heads, head); of a bias without the D.
    """

    def to_flax(w):
        cut = w.reshape(num_heads, num_parts, -1, *w.shape[1:])
        return tuple(np.moveaxis(cut[:, part], (0, 1), (-2, -1)) for part in range(num_parts))

    def to_torch(*leaves):
        back = np.stack([np.moveaxis(leaf, (-2, -1), (0, 1)) for leaf in leaves], axis=1)
        return back.reshape(-1, *back.shape[3:])

    return Transform(f"by_head({num_heads}, {num_parts})", to_flax, to_torch)


def stack_tensors(transform: Transform = identity, axis: int = 0) -> Transform:
    """Several torch tensors (the row has a tuple of names), each through `op`, stacked on a new axis of one leaf."""
    return Transform(
        f"joined({transform.name}; axis {axis})",
        lambda *tensors: np.stack([transform.to_flax(w) for w in tensors], axis),
        lambda leaf: tuple(transform.to_torch(w) for w in np.moveaxis(leaf, axis, 0)),
    )


def constant(torch_key: str, value) -> WeightMapping:
    """A row for a tensor that says nothing new, such as position ids.

    It may be missing on the way in, must hold `value` if it is there, and is written on the way out. `value` is an
    array, or a function that makes it.
    """

    def make():
        return np.asarray(value() if callable(value) else value)

    def to_flax(w):
        if w.dtype != make().dtype or not np.array_equal(w, make()):
            raise ValueError(f"it is a constant of {make().dtype} {make().shape} and holds something else")
        return ()

    return WeightMapping(torch_key, (), Transform("constant", to_flax, make))


def copy_bits(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, bit for bit, quickly also where the layout is turned round.

    Numbers move as plain words, because numpy is slow with bfloat16. A transposed matrix is copied in tiles through a
    buffer: numpy alone would fetch a cache line for each number, and rows of 8192 bytes fight for the same lines.
    """
    if target.dtype != source.dtype or target.shape != source.shape:
        raise ValueError(f"{source.dtype} {source.shape} does not go into {target.dtype} {target.shape} as it is")
    if target.dtype.itemsize <= 8:
        word = np.dtype(f"u{target.dtype.itemsize}")
        target, source = target.view(word), np.asarray(source).view(word)
    shape, strides = _coalesce_axes(source)
    if not (len(shape) == 2 and strides[0] == source.itemsize < strides[1] and target.flags.c_contiguous):
        np.copyto(target, source)
        return
    target = target.reshape(shape)
    rows = np.lib.stride_tricks.as_strided(source, shape, strides, writeable=False).T
    buffer = np.empty((COPY_TILE, COPY_TILE + 64 // source.itemsize), source.dtype)  # the odd width keeps lines apart
    for a in range(0, shape[1], COPY_TILE):
        for b in range(0, shape[0], COPY_TILE):
            part = rows[a : a + COPY_TILE, b : b + COPY_TILE]
            tile = buffer[: part.shape[0], : part.shape[1]]
            tile[...] = part
            target[b : b + COPY_TILE, a : a + COPY_TILE] = tile.T


def bitwise_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tied tensors agree, bit for bit; if their dtypes differ, after rounding the wider to the narrower."""
    if a.dtype.itemsize > b.dtype.itemsize:
        a, b = b, a
    if a.dtype != b.dtype:
        b = b.astype(a.dtype)
    word = np.dtype(f"u{a.dtype.itemsize}")
    return a.shape == b.shape and np.array_equal(a.view(word), b.view(word))


COPY_TILE = 256  # numbers a side; 5 GB/s a core where plain numpy makes 0.3


def _coalesce_axes(array: np.ndarray) -> tuple[list[int], list[int]]:
    """Shape and strides with neighbouring axes joined wherever they lie evenly in memory."""
    shape, strides = [], []
    for size, stride in zip(array.shape, array.strides):
        if size == 1:
            continue
        if shape and strides[-1] == size * stride:
            shape[-1], strides[-1] = shape[-1] * size, stride
        else:
            shape, strides = [*shape, size], [*strides, stride]
    return shape, strides


@dataclasses.dataclass(frozen=True)
class KeyTemplate:
    """A torch name with letters in it, taken apart so that it can be matched and filled."""

    text: str
    index_letters: str  # sorted
    regex: re.Pattern
    index_sums: tuple  # one for each pair of braces: (((letter, step), ...) largest step first, offset, bound or None)

    @staticmethod
    @functools.cache
    def parse(text: str) -> KeyTemplate:
        """Parse a template. Raises ValueError when its braces cannot be understood."""
        pieces = re.split(r"\{([^{}]*)\}", text)
        sums = tuple(_parse_index_sum(inside, text) for inside in pieces[1::2])
        letters = [letter for terms, _, _ in sums for letter, _ in terms]
        if len(set(letters)) != len(letters):
            raise ValueError(f"torch name {text!r} holds a letter twice; give each its own of i, j, k")
        literal = [re.escape(piece) for piece in pieces[::2]]
        regex = re.compile("([0-9]{1,9})".join(literal))
        return KeyTemplate(text, "".join(sorted(letters)), regex, sums)

    def bound(self, letter: str) -> int | None:
        """How far the letter runs, where the template says so (`<`)."""
        return next((bound for terms, _, bound in self.index_sums if terms[-1][0] == letter), None)

    def fill(self, index: tuple[int, ...]) -> str:
        """The torch name at these numbers (in the order of `letters`)."""
        value = dict(zip(self.index_letters, index, strict=True))
        numbers = iter(sum(step * value[x] for x, step in terms) + plus for terms, plus, _ in self.index_sums)
        return re.sub(r"\{[^{}]*\}", lambda _: str(next(numbers)), self.text)

    def match(self, name: str) -> tuple[int, ...] | None:
        """The numbers at which this template is `name`, or None."""
        if (found := self.regex.fullmatch(name)) is None:
            return None
        value = {}
        for number, (terms, offset, bound) in zip(found.groups(), self.index_sums):
            rest = int(number) - offset
            for letter, step in terms:
                value[letter], rest = divmod(rest, step)
            if rest or (bound is not None and value[terms[-1][0]] >= bound):
                return None
        index = tuple(value[letter] for letter in self.index_letters)
        # Negative numbers and leading zeros do not come back as the same name.
        return index if min(index, default=0) >= 0 and self.fill(index) == name else None


def _parse_index_sum(expression: str, template: str) -> tuple:
    """What stands between braces: terms such as 8i and j, an offset, and the bound behind `<`."""
    parsed = re.fullmatch(r"((?:\d*[ijk]|\d+)(?:\+(?:\d*[ijk]|\d+))*)(?:<(\d+))?", expression)
    terms, offset = [], 0
    for part in parsed[1].split("+") if parsed else ():
        if part[-1] in "ijk":
            terms.append((part[-1], int(part[:-1] or 1)))
        else:
            offset += int(part)
    terms.sort(key=lambda term: -term[1])
    bound = int(parsed[2]) if parsed and parsed[2] else None
    if not terms or len(terms) > 2 or any(step < 1 for _, step in terms):
        raise ValueError(f"braces {{{expression}}} in torch name {template!r}: want a sum such as i, 2i+1 or 8i+j<7")
    if len(terms) == 2 and (bound is None or terms[0][1] < bound * terms[1][1]):
        raise ValueError(
            f"braces {{{expression}}} in torch name {template!r}: the second letter wants a bound, as in 8i+j<7"
        )
    return tuple(terms), offset, bound
