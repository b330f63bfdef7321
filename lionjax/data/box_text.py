# SPDX-License-Identifier: Apache-2.0
"""Spatial text of Lyrics (arXiv 2312.05278): boxes with their tags as a string, and packed with a caption for stage 1.

The string is ` TAG: [x0, y0, x1, y1]` for each box, with coordinates in 0..1 rounded to three decimals. The packed text
is `[CLS] boxes caption`; in the boxes the tag, brackets and coordinates stand without colon and commas, and `[SEP]`
closes each. Ids are those of the question tokenizer (BERT's WordPiece). The rules are those of the release
(IDEA-CCNL/Fengshenbang-LM 1867d84), checked on its arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lionjax.core.errors import check_ranges
from lionjax.core.types import UserError
from lionjax.data.boxes import Box
from lionjax.data.tokenizer import Tokenizer

NO_LABEL = -100
# Of the elements of a box, {tag, "[", x0, y0, x1, y1, "]"}, those that can be masked.
MASKABLE = (0, 2, 3, 4, 5)
MASKABLE_AS_RELEASED = (0, 2, 3, 4, 6)  # the release never masks y1, but masks the closing bracket
BERT_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
TINY_TOKENS = ("<pad>", "<extra_id_13>", "</s>", "<extra_id_14>", "<extra_id_15>")


@dataclass(frozen=True)
class PackingConfig:
    """Lengths and masking of the packed text; the defaults are those of the release.

    `max_box_tokens`, `max_caption_tokens`: ids kept of the boxes and of the caption; `length`: ids of a row, the rest
    is cut. `mask_probability`: of each maskable element of a box. `msp_compat`: the closing bracket can be masked and
    y1 cannot, as in the release. `caption_end`: `[SEP]` closes the caption, so that its end is learned.

    The release has neither of these: `tag_mask_probability`: of a tag, in place of `mask_probability`; None: the same.
    `hide_caption_probability`: of masking the whole caption beside the masked boxes, without asking for it, so that
    tags are not copied from there. Raises UserError for numbers out of range.
    """

    max_box_tokens: int = 511
    max_caption_tokens: int = 87
    length: int = 600
    mask_probability: float = 0.15
    msp_compat: bool = False
    caption_end: bool = False
    tag_mask_probability: float | None = None
    hide_caption_probability: float = 0.0

    def __post_init__(self):
        counts = dict.fromkeys(("max_box_tokens", "max_caption_tokens"), ">= 0")
        names = ("mask_probability", "tag_mask_probability", "hide_caption_probability")
        shares = dict.fromkeys(names, ">= 0 and <= 1")
        check_ranges(self, "packing.", **counts, length=">= 1", **shares)

    @property
    def element_probabilities(self) -> tuple[float, ...]:
        """Of masking each maskable element of a box, the tag first."""
        tag = self.mask_probability if self.tag_mask_probability is None else self.tag_mask_probability
        return (tag, *[self.mask_probability] * (len(MASKABLE) - 1))


@dataclass(frozen=True)
class PackingTokens:
    """Ids that the packed text adds: padding, its first token, the end of a box, a masked token, start of decoding."""

    pad: int
    cls: int
    sep: int
    mask: int
    start: int

    @staticmethod
    def of(tokenizer: Tokenizer) -> PackingTokens:
        """Those of a tokenizer. BERT's own vocabulary lacks `[DEC]`, which BLIP-2 adds behind its last id.

        Raises UserError for a tokenizer that has neither BERT's tokens nor those of "tiny".
        """
        lookup = tokenizer.backend.token_to_id
        *known, start = (lookup(token) for token in BERT_TOKENS)
        if None not in known:
            return PackingTokens(*known, tokenizer.vocab_size if start is None else start)
        tiny = [lookup(token) for token in TINY_TOKENS]
        if None not in tiny:
            return PackingTokens(*tiny)
        missing = BERT_TOKENS[known.index(None)]
        raise UserError(f"the question tokenizer has no token {missing}; give 'tiny' or a folder with BERT's vocab.txt")


def coordinate_text(value: float) -> str:
    """A coordinate as the release writes it: rounded to three decimals, as short as possible ("0.5", "-0.0")."""
    return str(round(float(value), 3))


def spatial_text(tags: Iterable[str], boxes: Iterable[Box]) -> str:
    """The boxes of a picture as one string, a space before each; empty without boxes."""
    pairs = zip(tags, boxes, strict=True)
    return "".join(f" {tag}: [{', '.join(map(coordinate_text, box))}]" for tag, box in pairs)


def pack_text(
    tokenizer: Tokenizer,
    caption: str,
    tags: Sequence[str],
    boxes: Sequence[Box],
    draws: np.ndarray | np.random.Generator,
    config: PackingConfig = PackingConfig(),
) -> dict[str, np.ndarray]:
    """One row of `PackedText`, by the names of its fields without axes; int32 of shape (`config.length`,).

    `tags` and `boxes`: of the kept boxes, in order. `draws`: a number in 0..1 for each maskable element in order (an
    element is masked if its draw is at most its probability), or the generator that draws them; only a generator hides
    captions. Boxes, caption and row are cut at the lengths of `config`. Positions count boxes and caption from 1 each.
    Raises UserError for another number of draws.
    """
    c, special = config, PackingTokens.of(tokenizer)
    maskable = MASKABLE_AS_RELEASED if c.msp_compat else MASKABLE
    num_draws, hides_caption = len(maskable) * len(boxes), False
    if isinstance(draws, np.random.Generator):
        rng, draws = draws, draws.random(num_draws)
        hides_caption = c.hide_caption_probability > 0 and rng.random() < c.hide_caption_probability
    if len(draws) != num_draws:
        raise UserError(f"{len(draws)} draws were given for {num_draws} maskable elements; give one for each")
    is_masked = iter(np.asarray(draws) <= np.tile(c.element_probabilities, len(boxes)))
    box_ids, masked_ids, box_labels = [], [], []
    for tag, box in zip(tags, boxes, strict=True):
        for k, text in enumerate((tag, "[", *map(coordinate_text, box), "]")):
            ids = tokenizer.encode(text, parse_special=k == 0)  # a detector's phrase may have "[SEP]"
            hidden = k in maskable and next(is_masked)
            box_ids += ids
            masked_ids += [special.mask] * len(ids) if hidden else ids
            box_labels += ids if hidden else [NO_LABEL] * len(ids)
        box_ids, masked_ids, box_labels = [*box_ids, special.sep], [*masked_ids, special.sep], [*box_labels, NO_LABEL]
    box_ids, masked_ids, box_labels = (ids[: c.max_box_tokens] for ids in (box_ids, masked_ids, box_labels))
    caption_ids = tokenizer.encode(caption)[: c.max_caption_tokens] + [special.sep] * c.caption_end
    shown_ids = [special.mask] * len(caption_ids) if hides_caption else caption_ids
    rows = {
        "ids": ([special.cls, *box_ids, *caption_ids], special.pad),
        "masked_ids": ([special.cls, *masked_ids, *shown_ids], special.pad),
        "position": ([0, *range(1, len(box_ids) + 1), *range(1, len(caption_ids) + 1)], 0),
        "mask": ([1] * (1 + len(box_ids) + len(caption_ids)), 0),
        "icg_label": ([special.start, *[NO_LABEL] * len(box_ids), *caption_ids], NO_LABEL),
        "msp_label": ([NO_LABEL, *box_labels, *[NO_LABEL] * len(caption_ids)], NO_LABEL),
    }
    return {name: _fixed_length(ids, c.length, fill) for name, (ids, fill) in rows.items()}


def _fixed_length(ids: Sequence[int], length: int, fill: int) -> np.ndarray:
    row = np.full(length, fill, np.int32)
    row[: len(ids)] = ids[:length]
    return row
