# SPDX-License-Identifier: Apache-2.0
"""Rows of several examples (sequence packing): little of a row is padding, and a batch keeps its examples.

Unlike a loader that fills rows and takes as many examples as fit, a batch here has the examples that it has unpacked,
the same number in each row: long ones are put with short ones, so that the rows are nearly equally long. The order of
examples, the position of the stream and the mean loss are therefore those of the unpacked run. The model sees each
example alone (`Batch.segment_BL`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lionjax.core.types import IMAGE_TOKEN, Batch, RowLayout, UserError

MAX_LENGTH_STEP = 128  # tokens between two lengths of rows: the tile of a TPU
MAX_SWAPS = 200  # of examples between rows of a batch


class RowBatches:
    """Iterator over the batches of `batches`, repacked into rows of `examples_per_row` examples.

    `length_buckets`: lengths of rows to choose from; empty: see `round_up_length`. `agree`: with several processes, a
    function that gives the largest of each number over them, so that all choose the same length. Position, names and
    counters are those of `batches`. Raises UserError for a batch that does not divide into rows.
    """

    def __init__(
        self,
        batches: Any,
        layout: RowLayout,
        examples_per_row: int,
        length_buckets: Sequence[int] = (),
        agree: Callable[..., list[int]] | None = None,
    ):
        self.batches, self.layout, self.examples_per_row = batches, layout, examples_per_row
        self.length_buckets, self.agree = tuple(length_buckets), agree

    def __iter__(self) -> RowBatches:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __next__(self) -> Batch:
        return pack_batch(next(self.batches), self.layout, self.examples_per_row, self._lengths)

    def _lengths(self, row: int, target: int) -> tuple[int, int]:
        """Lengths of rows and of their targets for the longest of them here."""
        if self.agree is not None:
            row, target = map(int, self.agree(row, target))
        return array_lengths(row, target, self.length_buckets)


def array_lengths(row: int, target: int, length_buckets: Sequence[int] = ()) -> tuple[int, int]:
    """Lengths of the arrays for rows of at most `row` tokens with at most `target` target tokens."""
    length = round_up_length(row, length_buckets)
    # Few lengths of targets for each length of rows: each pair is a program of its own.
    return length, next(part for part in (-(-length * k // 4) for k in (1, 2, 3, 4)) if part >= target)


def round_up_length(needed: int, length_buckets: Sequence[int] = ()) -> int:
    """The shortest of `length_buckets` that holds `needed` tokens.

    Without buckets, the next multiple of a power of two, 8 to 128, that is at most a sixteenth of the length. Raises
    UserError if the longest bucket is too short.
    """
    if not length_buckets:
        step = min(MAX_LENGTH_STEP, max(8, 2 ** max(0, (needed // 16).bit_length() - 1)))
        return -(-needed // step) * step
    if needed > max(length_buckets):
        raise UserError(
            f"a row of this batch takes {needed} tokens, but the longest of data.length_buckets is "
            f"{max(length_buckets)}; add a longer one, or lower the stage's examples_per_row"
        )
    return min(length for length in length_buckets if length >= needed)


def example_lengths(batch: Batch, layout: RowLayout) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of each example in a row, image tokens included, and its number of images there), each (B,)."""
    is_image_BL = batch.prompt_mask_BL.astype(bool) & is_image_token(batch.prompt_BL, layout)
    tokens_B, text_B = is_image_BL.sum(axis=1), batch.prompt_mask_BL.sum(axis=1) + batch.target_mask_BM.sum(axis=1)
    if layout.is_expanded:
        return text_B, tokens_B // layout.tokens_per_image
    num_images = images_per_example(batch) if layout.tokens_per_image else 0
    images_B = np.where(tokens_B > 0, np.minimum(tokens_B, num_images), num_images * layout.prepends_images)
    return text_B - tokens_B + images_B * layout.tokens_per_image, images_B


def is_image_token(ids_BL: np.ndarray, layout: RowLayout) -> np.ndarray:
    """Which of the ids stand for an image."""
    return np.zeros(ids_BL.shape, bool) if layout.image_token_id is None else ids_BL == layout.image_token_id


def images_per_example(batch: Batch) -> int:
    """Images of each example, blank ones included."""
    if batch.image_BHWC is not None:
        return batch.image_BHWC.shape[1] if batch.image_BHWC.ndim == 5 else 1
    features = batch.features  # (B, K, P, D) for several images
    return features.shape[1] if not isinstance(features, dict) and features.ndim == 4 else 1


def count_row_tokens(batch: Batch, layout: RowLayout | None) -> tuple[int, int]:
    """(tokens that are no padding, all positions) of the rows that a language model reads.

    Without a layout, those of the texts, in the encoder and the decoder of an encoder-decoder.
    """
    if batch.segment_BL is not None:
        return int(np.sum(batch.segment_BL > 0)), batch.segment_BL.size
    positions = batch.prompt_BL.size + batch.target_BM.size
    if layout is None:
        return int(np.sum(batch.prompt_mask_BL) + np.sum(batch.target_mask_BM)), positions
    if not layout.is_expanded and layout.tokens_per_image:
        positions += len(batch.prompt_BL) * images_per_example(batch) * layout.tokens_per_image
    return int(example_lengths(batch, layout)[0].sum()), positions


def balanced_rows(lengths: Sequence[int], examples_per_row: int) -> np.ndarray:
    """Indices (rows, examples_per_row) of examples by row, so that the longest row is short.

    The longest example goes first into the row with the fewest tokens that has a free place; then examples of the
    longest row are exchanged with others as long as that makes it shorter. Equal lengths give equal rows.
    """
    length_B = np.asarray(lengths, np.int64)
    num_rows = len(length_B) // examples_per_row
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    sums = np.zeros(num_rows, np.int64)
    for index in np.argsort(-length_B, kind="stable").tolist():
        free = [row for row in range(num_rows) if len(rows[row]) < examples_per_row]
        row = min(free, key=lambda row: (sums[row], row))
        rows[row].append(index)
        sums[row] += length_B[index]
    index_RM = np.array(rows, np.int64).reshape(num_rows, examples_per_row)
    for _ in range(MAX_SWAPS):
        sums = length_B[index_RM].sum(axis=1)
        longest = int(sums.argmax())
        # [a, r, b]: tokens that the longest row loses if its example a changes places with example b of row r.
        loss = length_B[index_RM[longest]][:, None, None] - length_B[index_RM][None]
        longer = np.maximum(sums[longest] - loss, sums[None, :, None] + loss)
        longer[:, longest] = sums[longest]
        a, row, b = np.unravel_index(int(longer.argmin()), longer.shape)
        if longer[a, row, b] >= sums[longest]:
            break
        index_RM[longest, a], index_RM[row, b] = index_RM[row, b], index_RM[longest, a]
    return np.sort(index_RM, axis=1)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Which examples share a row: indices (rows, examples of a row), images of each example that are in the row, and
    the tokens of the longest row and of the longest row of targets."""

    index_RM: np.ndarray
    images_B: np.ndarray
    row_tokens: int
    target_tokens: int


def arrange_examples(batch: Batch, layout: RowLayout, examples_per_row: int) -> Arrangement:
    """The rows of a batch of numpy arrays.

    Raises UserError for a number of examples that does not divide, an example without a prompt or with image tokens
    that do not fit its images, and one that is longer than the model's learned positions.
    """
    if len(batch.prompt_BL) % examples_per_row:
        raise UserError(
            f"{len(batch.prompt_BL)} examples of a batch on this process do not divide into rows of "
            f"{examples_per_row}; change batch_size or examples_per_row"
        )
    length_B, images_B = example_lengths(batch, layout)
    _check_examples(batch, layout, length_B, images_B)
    index_RM = balanced_rows(length_B, examples_per_row)
    target_B = batch.target_mask_BM.sum(axis=1)
    longest = (int(x_B[index_RM].sum(axis=1).max()) for x_B in (length_B, target_B))
    return Arrangement(index_RM, images_B, *longest)


def pack_batch(
    batch: Batch, layout: RowLayout, examples_per_row: int, choose_lengths: Callable[[int, int], tuple[int, int]]
) -> Batch:
    """A batch of numpy arrays with its examples in rows; see `Batch.segment_BL`.

    `choose_lengths`: from the tokens of the longest row and of the longest row of targets to the lengths of the arrays.
    Raises UserError as `arrange_examples`.
    """
    arranged = arrange_examples(batch, layout, examples_per_row)
    index_RM, images_B = arranged.index_RM, arranged.images_B
    lengths = choose_lengths(arranged.row_tokens, arranged.target_tokens)
    fields = _text_fields(batch, layout, images_B, index_RM, lengths)
    image_index_RI = _image_order(images_B, index_RM, images_per_example(batch))

    def rows_of_features(x):
        return (x.reshape(-1, *x.shape[2:]) if images_per_example(batch) > 1 else x)[image_index_RI]

    arrays = ("question_BL", "question_mask_BL", "task_B", "record_B", "dataset_B")
    fields |= {name: None if x is None else x[index_RM] for name in arrays for x in (getattr(batch, name),)}
    fields |= _box_fields(batch, layout, index_RM)
    image = batch.image_BHWC
    image = None if image is None else image.reshape(-1, *image.shape[-3:])[image_index_RI]
    return Batch(image_BHWC=image, features=_map_features(rows_of_features, batch.features), **fields)


def _check_examples(batch: Batch, layout: RowLayout, length_B: np.ndarray, images_B: np.ndarray) -> None:
    """Raises UserError for examples that have no place in a row; see `arrange_examples`."""
    prompt_B = length_B - batch.target_mask_BM.sum(axis=1)
    if not prompt_B.all():
        raise UserError(
            f"record {batch.record_B[int(prompt_B.argmin())]} has no token before its answer, which rows of several "
            "examples need; set the stage's examples_per_row to 1, or give the template a text"
        )
    if layout.max_positions and length_B.max() > layout.max_positions:
        raise UserError(
            f"an example of {length_B.max()} tokens does not fit the {layout.max_positions} learned positions of the "
            "language model; lower processor.max_prompt_tokens or processor.max_target_tokens"
        )
    if layout.is_expanded:
        is_image_BL = batch.prompt_mask_BL.astype(bool) & is_image_token(batch.prompt_BL, layout)
        tokens_B = is_image_BL.sum(axis=1)
        bad_B = (tokens_B != images_B * layout.tokens_per_image) | (images_B > images_per_example(batch))
        if bad_B.any():
            raise UserError(
                f"a prompt has {tokens_B[int(bad_B.argmax())]} image tokens, but an image takes "
                f"{layout.tokens_per_image}; set processor.num_image_tokens to that number"
            )


def _prompt_tokens(ids_L: np.ndarray, layout: RowLayout, num_images: int) -> np.ndarray:
    """The tokens of a prompt in a row, IMAGE_TOKEN at each image token."""
    is_image_L = is_image_token(ids_L, layout)
    if layout.is_expanded or not layout.tokens_per_image:
        return np.where(is_image_L, IMAGE_TOKEN, ids_L)
    if not is_image_L.any():
        return np.concatenate([np.full(num_images * layout.tokens_per_image, IMAGE_TOKEN, np.int32), ids_L])
    # An image token beyond the number of images is dropped.
    count_L = np.where(is_image_L, layout.tokens_per_image * (np.cumsum(is_image_L) <= num_images), 1)
    return np.repeat(np.where(is_image_L, IMAGE_TOKEN, ids_L), count_L)


def _text_fields(
    batch: Batch, layout: RowLayout, images_B: np.ndarray, index_RM: np.ndarray, lengths: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Row, segments and targets of a packed batch."""
    num_rows, (row_length, target_length) = len(index_RM), lengths
    ids_RL, segment_RL = (np.zeros((num_rows, row_length), np.int32) for _ in range(2))
    target_RM, loss_mask_RM, mask_RM, place_RM = (np.zeros((num_rows, target_length), np.int32) for _ in range(4))
    for row, examples in enumerate(index_RM.tolist()):
        start, first = 0, 0  # of the example in the row, and of its target among the targets
        for segment, example in enumerate(examples, 1):
            ids_L = batch.prompt_BL[example][batch.prompt_mask_BL[example].astype(bool)]
            is_target_M = batch.target_mask_BM[example].astype(bool)
            prompt_L = _prompt_tokens(ids_L, layout, int(images_B[example]))
            target_M = batch.target_BM[example][is_target_M]
            middle, end, last = (start + len(prompt_L), start + len(prompt_L) + len(target_M), first + len(target_M))
            ids_RL[row, start:middle], ids_RL[row, middle:end] = prompt_L, target_M
            segment_RL[row, start:end] = segment
            target_RM[row, first:last], mask_RM[row, first:last] = target_M, 1
            loss_mask_RM[row, first:last] = batch.loss_mask_BM[example][is_target_M]
            place_RM[row, first:last] = np.arange(middle, end)
            start, first = end, last
    return {
        "prompt_BL": ids_RL,
        "prompt_mask_BL": (segment_RL > 0).astype(np.int32),
        "target_BM": target_RM,
        "target_mask_BM": mask_RM,
        "loss_mask_BM": loss_mask_RM,
        "segment_BL": segment_RL,
        "target_index_BM": place_RM,
    }


def _image_order(images_B: np.ndarray, index_RM: np.ndarray, num_images: int) -> np.ndarray:
    """Indices (rows, images of a row) of images among those of all examples: first those in the row, in its order."""
    image_RMK = index_RM[..., None] * num_images + np.arange(num_images)
    is_used_RMK = np.arange(num_images) < images_B[index_RM][..., None]
    order_RI = np.argsort(~is_used_RMK.reshape(len(index_RM), -1), axis=1, kind="stable")
    return np.take_along_axis(image_RMK.reshape(len(index_RM), -1), order_RI, axis=1)


def _box_fields(batch: Batch, layout: RowLayout, index_RM: np.ndarray) -> dict[str, np.ndarray]:
    """The boxes of each row: first those with a box token in it, in its order."""
    if batch.boxes_BK4 is None or layout.box_token_id is None:
        return {}
    has_token_B = (np.concatenate([batch.prompt_BL, batch.target_BM], axis=1) == layout.box_token_id).any(axis=1)
    mask_RMK = batch.boxes_mask_BK.astype(bool)[index_RM]
    rank_RMK = np.where(mask_RMK, np.where(has_token_B[index_RM][..., None], 0, 1), 2)
    order_RI = np.argsort(rank_RMK.reshape(len(index_RM), -1), axis=1, kind="stable")
    box_RI4 = batch.boxes_BK4[index_RM].reshape(len(index_RM), -1, 4)
    valid_RI = np.take_along_axis(mask_RMK.reshape(len(index_RM), -1), order_RI, axis=1)
    return {
        "boxes_BK4": np.take_along_axis(box_RI4, order_RI[..., None], axis=1),
        "boxes_mask_BK": valid_RI.astype(batch.boxes_mask_BK.dtype),
    }


def _map_features(function: Callable, features: Any) -> Any:
    """Cached features with `function` applied to each array."""
    if isinstance(features, dict):
        return {name: _map_features(function, part) for name, part in features.items()}
    return None if features is None else function(features)
