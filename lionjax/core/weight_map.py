# SPDX-License-Identifier: Apache-2.0
"""Weight maps: which torch tensors are which Flax parameters, and the change of layout between them.

A weight map is a tuple of `WeightMapping`s; that of a VLM consists of those of its submodules under `with_prefix`. Both
directions of conversion use the same map.

Torch names are templates. `{i}` is the number of a layer; the Flax parameter has all layers stacked on axis 0. `{j}`
and `{k}` are a second and third index, on the axes after it. An index may be a sum: `{2i}` is every second layer,
`{2i+1}` the others, `{8i+j<7}` layers 0..6, 8..14 and so on, with leading axes (groups, 7) in Flax.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible change of layout from one array for each torch name to one for each Flax path."""

    name: str  # in printed weight maps and errors
    to_flax: Callable
    to_torch: Callable
    drops: Callable = lambda *tensors: False  # whether values of the torch tensors have no parameter


@dataclasses.dataclass(frozen=True)
class WeightMapping:
    """Torch name(s), Flax path(s), and the change of layout between them.

    `tied_keys`: other torch names of the same tensor (tied weights). From torch, at least one of the names must exist
    and all that exist must be equal; to torch, all are written. Without a path: see `constant`. Raises ValueError for
    tied keys of several tensors, and for names with different index letters.
    """

    torch: str | tuple[str, ...]
    flax: str | tuple[str, ...]
    transform: Transform = dataclasses.field(default_factory=lambda: identity)
    tied_keys: tuple[str, ...] = ()

    def __post_init__(self):
        if self.tied_keys and len(self.torch_keys) != 1:
            raise ValueError(f"torch is {self.torch_keys}; tied_keys can be set for a single tensor only")
        letters = {KeyTemplate.parse(name).index_letters for name in (*self.torch_keys, *self.tied_keys)}
        if len(letters) != 1:
            names = (*self.torch_keys, *self.tied_keys)
            raise ValueError(f"torch names {names} have different index letters; use the same letters in all")

    @property
    def torch_keys(self) -> tuple[str, ...]:
        return (self.torch,) if isinstance(self.torch, str) else self.torch

    @property
    def flax_paths(self) -> tuple[str, ...]:
        return (self.flax,) if isinstance(self.flax, str) else self.flax

    @property
    def index_letters(self) -> str:
        """The index letters in the order of the axes: "" for one tensor, "i" for layers, "ij" for groups of layers."""
        return KeyTemplate.parse(self.torch_keys[0]).index_letters

    def to_flax(self, *tensors) -> tuple:
        """The slice of each Flax parameter for one layer, from the torch tensors of that layer."""
        leaves = self.transform.to_flax(*tensors)
        return (leaves,) if isinstance(self.flax, str) else leaves

    def to_torch(self, *leaves) -> tuple:
        """The torch tensors of one layer, from the slice of each Flax parameter for that layer."""
        tensors = self.transform.to_torch(*leaves)
        return (tensors,) if isinstance(self.torch, str) else tensors


def with_prefix(torch_prefix: str, flax_prefix: str, weight_map: Iterable[WeightMapping]) -> tuple[WeightMapping, ...]:
    """The weight map of a submodule: torch names and Flax paths with prefixes.

    `torch_prefix` may have an index letter that the names do not use, for stacked submodules.
    """

    def add_prefix(prefix, name):
        return prefix + name if isinstance(name, str) else tuple(prefix + part for part in name)

    return tuple(
        WeightMapping(
            add_prefix(torch_prefix, mapping.torch),
            add_prefix(flax_prefix, mapping.flax),
            mapping.transform,
            add_prefix(torch_prefix, mapping.tied_keys),
        )
        for mapping in weight_map
    )


def rename_torch_keys(weight_map: Iterable[WeightMapping], *replacements: tuple[str, str]) -> tuple[WeightMapping, ...]:
    """The weight map with (old, new) substrings of the torch names replaced, one pair after the other."""

    def replace(name):
        for old, new in replacements:
            name = name.replace(old, new) if isinstance(name, str) else tuple(part.replace(old, new) for part in name)
        return name

    return tuple(WeightMapping(replace(m.torch), m.flax, m.transform, replace(m.tied_keys)) for m in weight_map)


# Transforms. `to_flax` returns views where possible: the only copy is the one into the stacked parameter.


def permute(name: str, *axes: int) -> Transform:
    """Transposes to `axes`: axes of the torch tensor in the order of the Flax parameter."""
    inverse = tuple(np.argsort(axes))
    return Transform(name, lambda w: w.transpose(axes), lambda w: w.transpose(inverse))


identity = Transform("same", lambda w: w, lambda w: w)
linear = permute("linear", 1, 0)  # (out, in) -> (in, out)
conv = permute("conv", 2, 3, 1, 0)  # (out, in, H, W) -> (H, W, in, out); also patch embeddings
conv_transpose = permute("conv_transpose", 2, 3, 0, 1)  # (in, out, H, W) -> (H, W, in, out)
squeeze = Transform("squeeze", lambda w: w.reshape(w.shape[1:]), lambda w: w[None])  # (1, ...) -> (...)


def reshape(torch_shape: tuple[int, ...], flax_shape: tuple[int, ...]) -> Transform:
    """Reshapes from `torch_shape` to `flax_shape`; each may have one -1."""
    return Transform(
        f"{torch_shape} to {flax_shape}", lambda w: w.reshape(flax_shape), lambda w: w.reshape(torch_shape)
    )


def pad_rows(num_rows: int, num_padded_rows: int, transform: Transform = identity) -> Transform:
    """`transform` after padding a table of `num_rows` with zero rows to `num_padded_rows`; to torch they are removed.

    With padding a mesh can shard a table whose size it does not divide.
    """

    def to_flax(w):
        if w.shape[0] != num_rows:
            raise ValueError(f"it has {w.shape[0]} rows instead of {num_rows}")
        return transform.to_flax(np.concatenate([w, np.zeros((num_padded_rows - num_rows, *w.shape[1:]), w.dtype)]))

    return Transform(
        f"padded({transform.name}; {num_rows} to {num_padded_rows})",
        to_flax,
        lambda w: transform.to_torch(w)[:num_rows],
    )


def split_heads_kernel(num_heads: int, head_dim: int) -> Transform:
    """Kernel of a projection to heads: (num_heads * head_dim, D) -> (D, num_heads, head_dim)."""
    return Transform(
        f"heads_in({num_heads}, {head_dim})",
        lambda w: w.reshape(num_heads, head_dim, w.shape[1]).transpose(2, 0, 1),
        lambda w: w.transpose(1, 2, 0).reshape(num_heads * head_dim, w.shape[0]),
    )


def split_heads(num_heads: int, head_dim: int) -> Transform:
    """Last axis split into heads, for biases and (in, out) kernels: (..., N * H) -> (..., N, H)."""
    return Transform(
        f"heads_in_bias({num_heads}, {head_dim})",
        lambda w: w.reshape(*w.shape[:-1], num_heads, head_dim),
        lambda w: w.reshape(*w.shape[:-2], num_heads * head_dim),
    )


def merge_heads_kernel(num_heads: int, head_dim: int) -> Transform:
    """Kernel of a projection from heads: (D, num_heads * head_dim) -> (num_heads, head_dim, D)."""
    return Transform(
        f"heads_out({num_heads}, {head_dim})",
        lambda w: w.reshape(w.shape[0], num_heads, head_dim).transpose(1, 2, 0),
        lambda w: w.transpose(2, 0, 1).reshape(w.shape[2], num_heads * head_dim),
    )


def split_fused(*parts: Transform | None, axis: int = 0) -> Transform:
    """A fused torch tensor split into equal parts along `axis`, one Flax parameter for each transform in `parts`.

    The mapping has a tuple of paths. None: the part has no parameter and changes no output, so it is dropped and
    written as zeros. It is the key part of EVA's qkv bias, which adds the same number to all scores of a query, so the
    softmax removes it. EVA's code has zeros there; transformers trains it. Raises ValueError where it is not finite.
    """

    def dropped_pieces(w):
        return [piece for part, piece in zip(parts, np.split(w, len(parts), axis)) if part is None]

    def to_flax(w):
        pieces = np.split(w, len(parts), axis)
        if not all(np.isfinite(piece).all() for piece in dropped_pieces(w)):
            raise ValueError("its part without a parameter must be finite and holds NaN or infinity")
        return tuple(part.to_flax(piece) for part, piece in zip(parts, pieces) if part is not None)

    def to_torch(*leaves):
        leaf_iterator = iter(leaves)
        pieces = [None if part is None else part.to_torch(next(leaf_iterator)) for part in parts]
        first = next(piece for piece in pieces if piece is not None)
        shape = list(first.shape)
        shape[axis] *= len(parts)
        fused = np.zeros(shape, first.dtype)
        for target, piece in zip(np.split(fused, len(parts), axis), pieces):
            if piece is not None:
                copy_bits(target, piece)
        return fused

    names = ", ".join("zero" if part is None else part.name for part in parts)
    return Transform(
        f"fused({names}; axis {axis})", to_flax, to_torch, lambda w: any(np.any(x != 0) for x in dropped_pieces(w))
    )


def split_interleaved_heads(num_heads: int, num_parts: int = 3) -> Transform:
    """A fused torch Linear of `num_parts` projections, interleaved by head: q, k, v of head 0, then of head 1, ...

    (num_heads * num_parts * head_dim, D) -> `num_parts` kernels (D, num_heads, head_dim); biases without D.
    """

    def to_flax(w):
        by_head = w.reshape(num_heads, num_parts, -1, *w.shape[1:])
        return tuple(np.moveaxis(by_head[:, part], (0, 1), (-2, -1)) for part in range(num_parts))

    def to_torch(*leaves):
        by_head = np.stack([np.moveaxis(leaf, (-2, -1), (0, 1)) for leaf in leaves], axis=1)
        return by_head.reshape(-1, *by_head.shape[3:])

    return Transform(f"by_head({num_heads}, {num_parts})", to_flax, to_torch)


def stack_tensors(transform: Transform = identity, axis: int = 0) -> Transform:
    """Several torch tensors after `transform`, stacked on a new axis of one parameter.

    The mapping has a tuple of torch names.
    """
    return Transform(
        f"joined({transform.name}; axis {axis})",
        lambda *tensors: np.stack([transform.to_flax(w) for w in tensors], axis),
        lambda leaf: tuple(transform.to_torch(w) for w in np.moveaxis(leaf, axis, 0)),
    )


def constant(torch_key: str, value) -> WeightMapping:
    """Mapping of a torch tensor without a parameter, such as position ids; it is written to torch.

    From torch it may be missing, and must equal `value` if it exists. `value`: an array or a function that returns it.
    """

    def array():
        return np.asarray(value() if callable(value) else value)

    def to_flax(w):
        if w.dtype != array().dtype or not np.array_equal(w, array()):
            raise ValueError(f"it differs from the constant of {array().dtype} {array().shape}")
        return ()

    return WeightMapping(torch_key, (), Transform("constant", to_flax, array))


def copy_bits(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, bit for bit, also fast for a transposed source. Raises ValueError if dtype or shape differ.

    Elements are copied as unsigned integers, because numpy is slow with bfloat16. A transposed matrix is copied in
    tiles through a buffer: numpy alone would load a cache line for each element, and rows of 8192 bytes map to the same
    cache lines.
    """
    if target.dtype != source.dtype or target.shape != source.shape:
        raise ValueError(
            f"source is {source.dtype} {source.shape}; it must be {target.dtype} {target.shape} as the target"
        )
    if target.dtype.itemsize <= 8:
        uint = np.dtype(f"u{target.dtype.itemsize}")
        target, source = target.view(uint), np.asarray(source).view(uint)
    shape, strides = _coalesce_axes(source)
    if not (len(shape) == 2 and strides[0] == source.itemsize < strides[1] and target.flags.c_contiguous):
        np.copyto(target, source)
        return
    target = target.reshape(shape)
    rows = np.lib.stride_tricks.as_strided(source, shape, strides, writeable=False).T
    buffer = np.empty((COPY_TILE, COPY_TILE + 64 // source.itemsize), source.dtype)  # padded against cache conflicts
    for a in range(0, shape[1], COPY_TILE):
        for b in range(0, shape[0], COPY_TILE):
            part = rows[a : a + COPY_TILE, b : b + COPY_TILE]
            tile = buffer[: part.shape[0], : part.shape[1]]
            tile[...] = part
            target[b : b + COPY_TILE, a : a + COPY_TILE] = tile.T


def bitwise_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors are bitwise equal; with different dtypes, after casting the wider one to the narrower."""
    if a.dtype.itemsize > b.dtype.itemsize:
        a, b = b, a
    if a.dtype != b.dtype:
        b = b.astype(a.dtype)
    uint = np.dtype(f"u{a.dtype.itemsize}")
    return a.shape == b.shape and np.array_equal(a.view(uint), b.view(uint))


COPY_TILE = 256  # elements a side; 5 GB/s a core, against 0.3 GB/s of numpy's own copy


def _coalesce_axes(array: np.ndarray) -> tuple[list[int], list[int]]:
    """Shape and strides with adjacent axes merged where they are contiguous in memory."""
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
    """A parsed torch name template, for matching names and filling in indices."""

    text: str
    index_letters: str  # sorted
    regex: re.Pattern
    index_sums: tuple  # for each pair of braces: (((letter, step), ...) by descending step, offset, bound or None)

    @staticmethod
    @functools.cache
    def parse(text: str) -> KeyTemplate:
        """The template of `text`. Raises ValueError for invalid braces."""
        pieces = re.split(r"\{([^{}]*)\}", text)
        sums = tuple(_parse_index_sum(expression, text) for expression in pieces[1::2])
        letters = [letter for terms, _, _ in sums for letter, _ in terms]
        if len(set(letters)) != len(letters):
            raise ValueError(f"torch name {text!r} has an index letter twice; use each of i, j, k at most once")
        literal = [re.escape(piece) for piece in pieces[::2]]
        regex = re.compile("([0-9]{1,9})".join(literal))
        return KeyTemplate(text, "".join(sorted(letters)), regex, sums)

    def bound(self, letter: str) -> int | None:
        """The exclusive bound of an index letter (`<` in the template), or None."""
        return next((bound for terms, _, bound in self.index_sums if terms[-1][0] == letter), None)

    def fill(self, index: tuple[int, ...]) -> str:
        """The torch name at these indices, in the order of `index_letters`."""
        value = dict(zip(self.index_letters, index, strict=True))
        numbers = iter(sum(step * value[x] for x, step in terms) + plus for terms, plus, _ in self.index_sums)
        return re.sub(r"\{[^{}]*\}", lambda _: str(next(numbers)), self.text)

    def match(self, name: str) -> tuple[int, ...] | None:
        """The indices at which this template gives `name`, or None."""
        if (match := self.regex.fullmatch(name)) is None:
            return None
        value = {}
        for number, (terms, offset, bound) in zip(match.groups(), self.index_sums):
            remainder = int(number) - offset
            for letter, step in terms:
                value[letter], remainder = divmod(remainder, step)
            if remainder or (bound is not None and value[terms[-1][0]] >= bound):
                return None
        index = tuple(value[letter] for letter in self.index_letters)
        # Negative indices and leading zeros would not be filled in as the same name.
        return index if min(index, default=0) >= 0 and self.fill(index) == name else None


def _parse_index_sum(expression: str, template: str) -> tuple:
    """(terms, offset, bound) of an expression in braces such as 8i+j<7. Raises ValueError for any other expression."""
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
        raise ValueError(f"braces {{{expression}}} in torch name {template!r} must be a sum such as i, 2i+1 or 8i+j<7")
    if len(terms) == 2 and (bound is None or terms[0][1] < bound * terms[1][1]):
        raise ValueError(
            f"braces {{{expression}}} in torch name {template!r} need a bound for the second letter, as in 8i+j<7"
        )
    return tuple(terms), offset, bound
