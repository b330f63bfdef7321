# SPDX-License-Identifier: Apache-2.0
"""Training data of the tiny backbones from synthetic scenes: labels per object and patch, box codes, text exercises."""

from __future__ import annotations

import numpy as np

from lionjax.data.scenes import render, world
from lionjax.data.scenes.tasks import Example, box_to_text

ATTRIBUTES = {"shape": world.SHAPES, "color": world.COLORS, "size": world.SIZES, "texture": world.TEXTURES}
ROLES = ("nothing", "part", "center")
FIELDS = {**ATTRIBUTES, "role": ROLES, "ground": world.BACKGROUNDS}
BOX_FREQUENCIES = (1, 2)
NUM_DIGITS = 10
NUM_DIGIT_POSITIONS = 8  # the first two decimals of four edges
BOX_CODE_DIM = NUM_DIGIT_POSITIONS * NUM_DIGITS + 4 * (2 * len(BOX_FREQUENCIES) + 1)


def encode_box(box_K4):
    """Codes (..., BOX_CODE_DIM), float32, of boxes (..., 4) in 0..1.

    For each edge: soft one-hot vectors of its first and second decimal; then for each edge sines and cosines at
    BOX_FREQUENCIES and the edge scaled to -1..1. A digit's weight is 1 in the middle of its interval and 1/2 at its
    ends.
    """
    edge = box_K4[..., None]
    middle = (np.arange(NUM_DIGITS) + 0.5) / NUM_DIGITS
    first = np.maximum(0, 1 - np.abs(edge - middle) * NUM_DIGITS)
    distance = np.abs(edge * NUM_DIGITS % 1 - middle)
    second = np.maximum(0, 1 - np.minimum(distance, 1 - distance) * NUM_DIGITS)
    angle = 2 * np.pi * edge * np.asarray(BOX_FREQUENCIES)
    digits = np.concatenate([first, second], axis=-1)
    waves = np.concatenate([np.sin(angle), np.cos(angle), 2 * edge - 1], axis=-1)
    rows = [part.reshape(*box_K4.shape[:-1], -1) for part in (digits, waves)]
    return np.concatenate(rows, axis=-1).astype(np.float32)


def object_labels(scene) -> tuple[np.ndarray, np.ndarray]:
    """Labels of a scene's objects: value indices of FIELDS (K, 6), int32, and boxes (K, 4) in 0..1, float32."""
    ground = world.BACKGROUNDS.index(scene.background.kind)
    rows = [
        [*(values.index(getattr(thing, name)) for name, values in ATTRIBUTES.items()), 2, ground]
        for thing in scene.things
    ]
    return np.array(rows, np.int32), np.array([thing.box for thing in scene.things], np.float32)


def patch_labels(scene, side: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of side x side patches of an image of `pixels` x `pixels`: fields (P, 6) and boxes (P, 4).

    A patch has the labels of the object that covers most of it, if that is more than 12%. Each object has one patch
    with the role "center".
    """
    instance_ids = render.instance_id_map(scene.things, pixels)
    cell = pixels // side
    blocks = instance_ids.reshape(side, cell, side, cell).swapaxes(1, 2).reshape(side * side, -1)
    fraction_PK = np.stack([(blocks == k).mean(1) for k in range(len(scene.things))], axis=1)
    k_P, covered_P = fraction_PK.argmax(1), fraction_PK.max(1) > 0.12
    fields_K6, box_K4 = object_labels(scene)
    fields_P6, box_P4 = fields_K6[k_P].copy(), box_K4[k_P].copy()
    fields_P6[:, 4] = np.where(covered_P, 1, 0)
    fields_P6[~covered_P, :4] = 0
    box_P4[~covered_P] = 0
    for k in np.argsort([np.prod(b[2:] - b[:2]) for b in box_K4])[::-1]:
        # The patch at the center of the box, or the patch it covers most if another object is there.
        x, y = (box_K4[k, :2] + box_K4[k, 2:]) / 2
        patch = int(y * side) * side + int(x * side)
        patch = patch if k_P[patch] == k and covered_P[patch] else int(fraction_PK[:, k].argmax())
        fields_P6[patch], box_P4[patch] = fields_K6[k], box_K4[k]
    return fields_P6, box_P4


def dihedral_augment(image_BHWC, fields_BP6, box_BP4, symmetry: int):
    """One of the eight symmetries of a square (0..7) applied to images, patch labels and boxes."""
    side = int(np.sqrt(fields_BP6.shape[1]))
    fields = fields_BP6.reshape(-1, side, side, fields_BP6.shape[-1])
    box = box_BP4.reshape(-1, side, side, 4)
    if symmetry & 4:
        image_BHWC, fields, box = (x.swapaxes(1, 2) for x in (image_BHWC, fields, box[..., [1, 0, 3, 2]]))
    for bit, axis, (low, high) in ((1, 2, (0, 2)), (2, 1, (1, 3))):
        if symmetry & bit:
            image_BHWC, fields, box = (np.flip(x, axis) for x in (image_BHWC, fields, box))
            box = box.copy()
            box[..., [low, high]] = 1 - box[..., [high, low]]
    return image_BHWC, fields.reshape(fields_BP6.shape), box.reshape(box_BP4.shape)


def sample_patches(fields_P6, box_P4, rng, num_patches: int = 14):
    """Labels of `num_patches` patches in random order: all center patches and a random choice of the others."""
    center = np.flatnonzero(fields_P6[:, 4] == 2)[:num_patches]
    other = np.flatnonzero(fields_P6[:, 4] != 2)
    chosen = np.concatenate([center, rng.choice(other, num_patches - len(center), replace=False)])
    chosen = rng.permutation(chosen)
    return fields_P6[chosen], box_P4[chosen]


def lookup_exercise(scene, rng) -> Example:
    """Several attribute look-ups in one text: 'color: star, ring' -> 'star red, ring blue'.

    Several look-ups per example make the model learn them in fewer steps.
    """
    key, value = rng.choice(list(OBJECT_NAMES)[:-1], 2, replace=False) if rng.random() < 0.6 else ("pair", "there")
    if key == "pair":
        pairs = [OBJECT_NAMES["pair"](thing) for thing in scene.things]
        absent = [f"{c} {s}" for c, s in world.allowed_pairs(scene.split) if f"{c} {s}" not in pairs]
        chosen = [*rng.permutation(pairs)[:3], *rng.permutation(absent)[:3]]
        chosen = [str(word) for word in rng.permutation(chosen)]
        answers = ["yes" if word in pairs else "no" for word in chosen]
        if rng.random() < 0.3:
            value, answers = "count", [str(pairs.count(word)) for word in chosen]
    else:
        names = {name: [OBJECT_NAMES[name](thing) for thing in scene.things] for name in (key, value)}
        words = sorted(set(names[key]))
        values = {word: {v for k, v in zip(names[key], names[value]) if k == word} for word in words}
        chosen = [str(word) for word in rng.permutation(words) if len(values[word]) == 1]
        answers = [next(iter(values[word])) for word in chosen]
        if not chosen or rng.random() < 0.2:
            value, chosen = "count", words
            answers = [str(names[key].count(word)) for word in chosen]
    question = f"{value}: {', '.join(chosen)}"
    answer = ", ".join(f"{word} {text}" for word, text in zip(chosen, answers, strict=True))
    return Example("drill", value, question, answer, (answer,), "image_level")


OBJECT_NAMES = {
    "shape": lambda thing: thing.shape,
    "color": lambda thing: thing.color,
    "size": lambda thing: thing.size,
    "texture": lambda thing: thing.texture,
    "pair": lambda thing: f"{thing.color} {thing.shape}",
}


EDGE_NAMES = ("left", "top", "right", "bottom")


def unambiguous_objects(scene, rng) -> list[tuple[str, tuple]]:
    """(name, box) of the objects that a random name of one or two words identifies, in random order.

    [("largest object", its box)] if there are none.
    """
    kinds = rng.choice(["shape", "color", "pair", "pair"], len(scene.things))
    names = [OBJECT_NAMES[str(kind)](thing) for kind, thing in zip(kinds, scene.things, strict=True)]
    unambiguous = [
        (name, scene.things[k].box)
        for k, name in enumerate(names)
        if sum(matches_name(thing, name) for thing in scene.things) == 1
    ]
    largest = max(scene.things, key=lambda thing: thing.extent)
    return [unambiguous[k] for k in rng.permutation(len(unambiguous))] or [("largest object", largest.box)]


def box_exercise(scene, rng, max_boxes: int = 1) -> Example:
    """The boxes of unambiguous objects: 'box: star' -> '[0.123,0.234,0.345,0.456]'."""
    names, boxes = zip(*unambiguous_objects(scene, rng)[:max_boxes], strict=True)
    named_boxes = ", ".join(f"{name} {box_to_text(box)}" for name, box in zip(names, boxes, strict=True))
    answer = box_to_text(boxes[0]) if max_boxes == 1 else named_boxes
    question = f"box: {', '.join(names)}"
    return Example("place", "box", question, answer, (answer,), "region_level", boxes=tuple(boxes))


def edge_exercise(scene, rng, max_objects: int = 4) -> Example:
    """One decimal of one edge of several objects: 'left: star, ring'.

    The answer is made by `language.edge_answer_ids` from `kind` (index of the decimal, 0..7), `answers` (the objects'
    names) and `boxes`.
    """
    objects, index = unambiguous_objects(scene, rng)[:max_objects], int(rng.integers(NUM_DIGIT_POSITIONS))
    edge = ("", "fine ")[index % 2] + EDGE_NAMES[index // 2]
    names, boxes = zip(*objects, strict=True)
    question = f"{edge}: {', '.join(names)}"
    return Example("edge", str(index), question, "", tuple(names), "region_level", boxes=boxes)


def single_edge_exercise(scene, rng) -> Example:
    """`edge_exercise` for one object; the one-token answer gives the clearest signal to the attention."""
    return edge_exercise(scene, rng, max_objects=1)


def multi_box_exercise(scene, rng) -> Example:
    """`box_exercise` with up to four boxes."""
    return box_exercise(scene, rng, max_boxes=4)


def region_exercise(scene, rng) -> Example:
    """The inverse of `box_exercise`: 'at: [0.123,0.234,0.345,0.456]' -> 'small red plain star'."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    answer = f"{thing.size} {thing.color} {thing.texture} {thing.shape}"
    question = f"at: {box_to_text(thing.box)}"
    return Example("whose", "at", question, answer, (answer,), "region_level", boxes=(thing.box,))


def comparison_exercise(scene, rng) -> Example:
    """Several comparisons in one text: 'above: red star ring, blue star' -> 'yes, no'."""
    objects = unambiguous_objects(scene, rng)
    kind = str(rng.choice(["beside", "above", "more", "same"]))
    if kind in ("beside", "above") and len(objects) > 1:
        axis, truths, pairs = 0 if kind == "beside" else 1, [], []
        for _ in range(5):
            first, second = (objects[k] for k in rng.choice(len(objects), 2, replace=False))
            gap = sum(second[1][axis::2]) - sum(first[1][axis::2])
            if abs(gap) > 0.12:
                pairs.append(f"{first[0]} {second[0]}")
                truths.append(gap > 0)
        if pairs:
            return _comparison_example(scene, kind, pairs, truths)
    words = sorted({OBJECT_NAMES[name](thing) for thing in scene.things for name in ("shape", "color")})
    counts = {word: sum(matches_name(thing, word) for thing in scene.things) for word in words}
    kind = "same" if kind == "same" else "more"
    pairs = [rng.choice(words, 2, replace=False) for _ in range(5)]
    truths = [counts[a] == counts[b] if kind == "same" else counts[a] > counts[b] for a, b in pairs]
    return _comparison_example(scene, kind, [f"{a} {b}" for a, b in pairs], truths)


def _comparison_example(scene, kind: str, pairs: list[str], truths) -> Example:
    answer = ", ".join("yes" if truth else "no" for truth in truths)
    return Example("compare", kind, f"{kind}: {', '.join(pairs)}", answer, (answer,), "image_level")


def matches_name(thing, name: str) -> bool:
    """Whether a name (a color, a shape or both) fits an object."""
    return set(name.split()) <= {thing.shape, thing.color}
