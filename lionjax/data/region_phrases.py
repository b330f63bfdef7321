# SPDX-License-Identifier: Apache-2.0
"""String and box rules between tagger and detector: captions, phrases, NMS, phrase to tag.

They follow the refiner of Lyrics (arXiv 2312.05278; IDEA-CCNL/Fengshenbang-LM 1867d84) and, where a caption comes from
a user, Grounding DINO's demo (IDEA-Research/GroundingDINO 856dde2). NumPy and the tokenizer only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.tokenizer import Tokenizer

TAG_SEPARATOR = " | "
MAX_DETECTOR_TOKENS = 256  # of a caption with [CLS] and [SEP]; further tokens are cut
# What transformers' decoding takes out of a text, in this order.
CLEANED = tuple((f" {mark}", mark) for mark in ".?!,") + (
    *((" ' ", "'"), (" n't", "n't")),
    *((f" {end}", end) for end in ("'m", "'s", "'ve", "'re")),
)
Language = Literal["en", "zh"]


def detector_caption(text: str) -> str:
    """A caption as the detector reads it: lower case, without outer spaces, with a final full stop."""
    text = text.lower().strip()
    return text if text.endswith(".") else f"{text}."


def tags_caption(tags: Sequence[str]) -> str:
    """The detector's caption of a tag list: `dog, red ball.`, one phrase for its masks, as commas do not part phrases.

    Raises UserError for an empty list, for which there is nothing to detect.
    """
    if not tags:
        raise UserError("the picture has no tag, so there is nothing to detect; lower the tagger's thresholds")
    return detector_caption(TAG_SEPARATOR.join(tags).replace(" |", ","))


def encode_caption(tokenizer: Tokenizer, caption: str, max_tokens: int = MAX_DETECTOR_TOKENS) -> tuple[list[int], int]:
    """(ids of a caption with [CLS] and [SEP], number of ids cut) as the detector reads it.

    At most `max_tokens` ids are kept; a longer caption loses its end, [SEP] too, as in the original.
    """
    ids = [*tokenizer.bos_ids, *tokenizer.encode(caption), tokenizer.eos_id]
    return ids[:max_tokens], max(len(ids) - max_tokens, 0)


def decode_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids as BERT's tokenizer of transformers decodes them, special tokens included.

    Word pieces are joined; the spaces around "'" and before ".", ",", "?", "!" are removed.
    """
    pieces = [tokenizer.backend.id_to_token(int(token_id)) or "" for token_id in ids]
    text = " ".join(pieces).replace(" ##", "").strip()
    for spaced, closed in CLEANED:
        text = text.replace(spaced, closed)
    return text


def caption_phrase(
    tokenizer: Tokenizer, ids: Sequence[int], is_hit_L: np.ndarray, max_tokens: int = MAX_DETECTOR_TOKENS
) -> str:
    """The phrase of the hit tokens of a caption, without full stops, as Grounding DINO's demo reads it.

    `is_hit_L`: bool, one for each of `ids` (padding behind them is ignored). The first token, [CLS], and the one at the
    maximum length never belong to a phrase; a hit [SEP] does.
    """
    hit_ids = [token_id for token_id, is_hit in list(zip(ids, is_hit_L))[1 : max_tokens - 1] if is_hit]
    return decode_pieces(tokenizer, hit_ids).replace(".", "").strip()


def within_best_phrase(ids: Sequence[int], separators: Sequence[int], prob_L: np.ndarray) -> np.ndarray:
    """Bool (L,): the tokens of the phrase that has the most probable token, from one separator to the next.

    The option `remove_combined` of Grounding DINO, which keeps two phrases from being joined for one box. `separators`:
    the ids that end phrases ([CLS], [SEP], full stop).
    """
    ends = [place for place, token_id in enumerate(ids) if token_id in set(separators)]
    best = int(np.argmax(prob_L[: len(ids)]))
    first = max((end for end in ends if end < best), default=-1)
    last = min((end for end in ends if end >= best), default=len(ids))
    place_L = np.arange(len(prob_L))
    return (place_L > first) & (place_L < last)


def tags_phrase(tokenizer: Tokenizer, tags: Sequence[str], is_hit_L: np.ndarray) -> str:
    """The phrase of hit token positions in the tag list `dog | red ball`, in lower case, as Lyrics' code reads it.

    The detector read `dog, red ball.`, whose positions agree: a comma's gives "|", the full stop's [SEP], position 0
    [CLS]. The position behind them, the caption's own [SEP], has no token here, for which the original raises
    IndexError; it is left out.
    """
    ids = [*tokenizer.bos_ids, *tokenizer.encode(TAG_SEPARATOR.join(tags)), tokenizer.eos_id]
    return decode_pieces(tokenizer, [token_id for token_id, is_hit in zip(ids, is_hit_L) if is_hit])


def match_tag(phrase: str, tags: Sequence[str]) -> int | None:
    """The index of the tag that a phrase names; None if there is none.

    A tag that equals the phrase, else the first tag of the list that equals some first or last words of it. Phrases are
    in lower case and tags keep their capitals, so that a tag with capitals is never matched.
    """
    if phrase in tags:
        return list(tags).index(phrase)
    words = phrase.split()
    parts = {" ".join(words[:end]) for end in range(1, len(words) + 1)}
    parts |= {" ".join(words[start:]) for start in range(len(words))}
    return next((index for index, tag in enumerate(tags) if tag in parts), None)


def clean_phrase(phrase: str) -> str:
    """A decoded phrase as it is compared with tags: without bars and with closed hyphens (`t - shirt`: `t-shirt`)."""
    return " ".join(phrase.replace("|", " ").split()).replace(" - ", "-")


def phrase_name(phrase: str, tags: Sequence[str], chinese: Sequence[str] = (), language: Language = "en") -> str | None:
    """The name of a box in the spatial text: its tag, or in English its phrase where no tag matches.

    In Chinese the Chinese tag of the same index, and None (the box is dropped) where no tag matches. Raises UserError
    if there is not one Chinese tag for each tag.
    """
    phrase = clean_phrase(phrase)
    index = match_tag(phrase, tags)
    if language == "en":
        return phrase if index is None else tags[index]
    if len(chinese) != len(tags):
        raise UserError(
            f"there are {len(chinese)} Chinese tags for {len(tags)} tags; add ram_tag_list_chinese.txt to the tagger's "
            "folder, or ask for language 'en'"
        )
    return None if index is None else chinese[index]


def to_corners(box_K4: np.ndarray) -> np.ndarray:
    """Boxes (K, 4) as x0 y0 x1 y1 from center and size, in float32; they are not clipped."""
    box_K4 = np.asarray(box_K4, np.float32)
    half_K2 = np.float32(0.5) * box_K4[:, 2:]
    return np.concatenate([box_K4[:, :2] - half_K2, box_K4[:, :2] + half_K2], axis=1)


def nms(box_K4: np.ndarray, score_K: np.ndarray, max_iou: float) -> np.ndarray:
    """Indices of the boxes (x0 y0 x1 y1) that non-maximum suppression keeps, in the order of falling score.

    A box is removed if its IoU with a kept box of higher score exceeds `max_iou`, as in torchvision.
    """
    box_K4 = np.asarray(box_K4, np.float32)
    order, kept = np.argsort(-np.asarray(score_K), kind="stable"), []
    area_K = (box_K4[:, 2] - box_K4[:, 0]) * (box_K4[:, 3] - box_K4[:, 1])
    while len(order):
        best, others = order[0], order[1:]
        kept.append(best)
        low_K2 = np.maximum(box_K4[best, :2], box_K4[others, :2])
        high_K2 = np.minimum(box_K4[best, 2:], box_K4[others, 2:])
        overlap_K = np.prod(np.maximum(high_K2 - low_K2, 0), axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):  # two boxes without area
            iou_K = overlap_K / (area_K[best] + area_K[others] - overlap_K)
        order = others[~(iou_K > max_iou)]
    return np.array(kept, np.int64)


def check_threshold(name: str, value: float) -> float:
    """A threshold in 0..1. Raises UserError, with its name, for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise UserError(f"{name} is {value!r}; give a number in 0..1")
    return float(value)
