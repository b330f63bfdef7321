# SPDX-License-Identifier: Apache-2.0
"""The part of an unfinished answer that later tokens cannot change, for streaming."""

from __future__ import annotations

from collections.abc import Sequence

from lionjax.data.boxes import MASK_TEXT

MAX_BOX_LENGTH = 64  # characters of a box in digits, at most
REPLACEMENT = "\ufffd"  # stands for the bytes of a character that is not whole yet


def settled_text(text: str, stops: Sequence[str] = ()) -> str:
    """The beginning of an unfinished answer's text that will not change.

    Held back are a space at the end, a character that is not whole, a box that is not closed (its numbers are moved to
    the image's frame once it is), what stands behind a mask token (its box is known at the end), and what may begin one
    of `stops`.
    """
    text = text.partition(MASK_TEXT)[0].rstrip(REPLACEMENT)
    bracket = text.rfind("[", max(0, len(text) - MAX_BOX_LENGTH))
    if bracket >= 0 and "]" not in text[bracket:]:
        text = text[:bracket]
    held = max((len(stop_begin(text, stop)) for stop in stops), default=0)
    return text[: len(text) - held].rstrip()


def stop_begin(text: str, stop: str) -> str:
    """The longest end of a text with which a stop text begins."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((stop[:length] for length in lengths if text.endswith(stop[:length])), "")


def cut_at_stops(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(the text before the first stop text in it, whether there is one)."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
