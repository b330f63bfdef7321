# SPDX-License-Identifier: Apache-2.0
"""Multimodal sentences: text with slots for images, states and objects in any order (PaLM-E, arXiv 2303.03378).

In a text `<image>` stands for the next image, `<state>` for the next state vector and `<obj_2>` for the second object,
as in "The robot is at <state>. Object 1 is <obj_1>. Object 2 is <obj_2>.". In the prompt each slot has as many
placeholder ids as tokens, and its data are in the order of the slots.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from lionjax.core.types import Array, SentenceSlots, UserError
from lionjax.data import letterbox

MARK = re.compile(r"<(image|state|obj_[0-9]+)>")


@dataclasses.dataclass(frozen=True)
class SlotData:
    """What the slots of a sentence hold: state vectors (K, S), and masks (K, H, W) of the objects in its first image.

    `<obj_1>` is the first mask. An object may be named several times, and then counts each time.
    """

    states: Sequence[Sequence[float]] = ()
    object_masks: Array = ()


NO_DATA = SlotData()


def has_marks(text: str) -> bool:
    """Whether a text has slots."""
    return MARK.search(text) is not None


def split_slots(text: str) -> list[tuple[str, str]]:
    """("text", words) and (mark, "") in order; mark is "image", "state" or "obj_N". Texts of spaces are left out."""
    parts = MARK.split(text)
    pairs = [("text", part.strip()) if not k % 2 else (part, "") for k, part in enumerate(parts)]
    return [(kind, words) for kind, words in pairs if kind != "text" or words]


def encode_sentence(
    text: str, encode: Callable[[str], list[int]], image_ids: Sequence[int], slots: SentenceSlots
) -> list[int]:
    """The ids of a sentence: those of its texts, each tokenized alone, and the placeholders of its slots."""
    state_ids = [slots.state_token_id] * slots.num_state_tokens
    object_ids = [slots.object_token_id] * slots.num_object_tokens
    ids: list[int] = []
    for kind, words in split_slots(text):
        ids += encode(words) if kind == "text" else {"image": image_ids, "state": state_ids}.get(kind, object_ids)
    return ids


def slot_arrays(
    text: str, data: SlotData, slots: SentenceSlots, image_size: int, num_images: int = 1
) -> dict[str, np.ndarray]:
    """{"states": float32 (max_states, S), "object_masks": bool (max_objects, H, W)} in the order of a sentence's slots.

    Keys of kinds that the model does not read are missing. Raises UserError for slots that do not match the data.
    """
    marks = MARK.findall(text)
    numbers = [int(mark.removeprefix("obj_")) for mark in marks if mark.startswith("obj_")]
    _check_counts(text, marks, data, slots, num_images)
    rows: dict[str, np.ndarray] = {}
    if slots.max_states:
        rows["states"] = np.zeros((slots.max_states, slots.state_width), np.float32)
        for row, state in zip(rows["states"], data.states):
            if len(state) != slots.state_width or not np.isfinite(state).all():
                raise UserError(
                    f"a state has {len(state)} numbers, but this model reads {slots.state_width} finite ones; "
                    "give it a state of that length"
                )
            row[:] = state
    if slots.max_objects:
        rows["object_masks"] = np.zeros((slots.max_objects, image_size, image_size), bool)
        for row, number in zip(rows["object_masks"], numbers):
            row[:] = resize_mask(np.asarray(data.object_masks[number - 1]), image_size)
    return rows


def resize_mask(mask_HW: np.ndarray, size: int) -> np.ndarray:
    """A mask stretched to bool (size, size), as images are without padding; bilinear, at least half covered."""
    if mask_HW.shape == (size, size):
        return mask_HW.astype(bool)
    return letterbox.resize_mask(mask_HW, size, size)


def _check_counts(text: str, marks: Sequence[str], data: SlotData, slots: SentenceSlots, num_images: int) -> None:
    """Raise UserError for a sentence whose slots do not match its data or the model."""
    where = f"the sentence {text[:60]!r}"
    objects = [mark for mark in marks if mark.startswith("obj_")]
    num_masks = len(data.object_masks)
    for kind, limit in (("state", slots.max_states), ("object", slots.max_objects)):
        found = marks.count("state") if kind == "state" else len(objects)
        if found > limit:
            raise UserError(
                f"{where} has {found} {kind} slots, but this model reads at most {limit}; leave some out or raise "
                f"model.max_{kind}s"
            )
    if objects and not num_masks:
        raise UserError(f"{where} has slots of objects, but no object was given; give the mask of each")
    named = {int(mark.removeprefix("obj_")) for mark in objects}
    if named != set(range(1, num_masks + 1)):
        raise UserError(
            f"{where} names the objects {sorted(named)}, but {num_masks} were given; name each of <obj_1> to "
            f"<obj_{num_masks}>"
        )
    for kind, given in (("state", len(data.states)), ("image", num_images)):
        # An image may also be there only for its objects.
        if (found := marks.count(kind)) != given and not (kind == "image" and found < given):
            raise UserError(f"{where} has {found} {kind} slots, but {given} {kind}s were given; give one for each slot")
