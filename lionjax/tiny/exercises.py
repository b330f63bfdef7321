# SPDX-License-Identifier: Apache-2.0
"""Scenes as numbers, for the shipped backbones to learn from: what lies in each patch, and look-up exercises."""

from __future__ import annotations

import numpy as np

from lionjax.data.scenes import render, world
from lionjax.data.scenes.tasks import Example, box_to_text

ATTRIBUTES = {"shape": world.SHAPES, "color": world.COLORS, "size": world.SIZES, "texture": world.TEXTURES}
ROLES = ("nothing", "part", "centre")
FIELDS = {**ATTRIBUTES, "role": ROLES, "ground": world.BACKGROUNDS}
BOX_FREQUENCIES = (1, 2)
NUM_DIGITS = 10
NUM_DIGIT_POSITIONS = 8  # first and second decimals of four edges
BOX_CODE_DIM = NUM_DIGIT_POSITIONS * NUM_DIGITS + 4 * (2 * len(BOX_FREQUENCIES) + 1)


def encode_box(box_K4):
    """Edges in 0..1 -> (..., CODE): how near the first decimal of each edge is to each digit, and the second one, edge
    by edge; then sines and cosines of two wave lengths and the edge itself.

    A digit's share is 1 in the middle of its interval and a half at its ends.
    """
    edge = box_K4[..., None]
    middle = (np.arange(NUM_DIGITS) + 0.5) / NUM_DIGITS
    first = np.maximum(0, 1 - np.abs(edge - middle) * NUM_DIGITS)
    apart = np.abs(edge * NUM_DIGITS % 1 - middle)
    second = np.maximum(0, 1 - np.minimum(apart, 1 - apart) * NUM_DIGITS)
    angle = 2 * np.pi * edge * np.asarray(BOX_FREQUENCIES)
    digits = np.concatenate([first, second], axis=-1)
    rest = np.concatenate([np.sin(angle), np.cos(angle), 2 * edge - 1], axis=-1)
    rows = [part.reshape(*box_K4.shape[:-1], -1) for part in (digits, rest)]
    return np.concatenate(rows, axis=-1).astype(np.float32)


def object_labels(scene) -> tuple[np.ndarray, np.ndarray]:
    """Things as numbers: field indices (K, 6) and boxes (K, 4)."""
    ground = world.BACKGROUNDS.index(scene.background.kind)
    rows = [
        [*(values.index(getattr(thing, name)) for name, values in ATTRIBUTES.items()), 2, ground]
        for thing in scene.things
    ]
    return np.array(rows, np.int32), np.array([thing.box for thing in scene.things], np.float32)


def patch_labels(scene, side: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for each of side x side patches: (P, 6), (P, 4); a patch belongs to the thing that fills most of it."""
    owner = render.instance_id_map(scene.things, pixels)
    cell = pixels // side
    blocks = owner.reshape(side, cell, side, cell).swapaxes(1, 2).reshape(side * side, -1)
    number = len(scene.things)
    share_PK = np.stack([(blocks == k).mean(1) for k in range(number)], axis=1)
    k_P, covered_P = share_PK.argmax(1), share_PK.max(1) > 0.12
    fields_K6, box_K4 = object_labels(scene)
    fields_P6, box_P4 = fields_K6[k_P].copy(), box_K4[k_P].copy()
    fields_P6[:, 4] = np.where(covered_P, 1, 0)
    fields_P6[~covered_P, :4] = 0
    box_P4[~covered_P] = 0
    for k in np.argsort([np.prod(b[2:] - b[:2]) for b in box_K4])[::-1]:
        # The patch of a thing's centre speaks for it; if something else lies there, the patch it fills most does.
        x, y = (box_K4[k, :2] + box_K4[k, 2:]) / 2
        at = int(y * side) * side + int(x * side)
        at = at if k_P[at] == k and covered_P[at] else int(share_PK[:, k].argmax())
        fields_P6[at], box_P4[at] = fields_K6[k], box_K4[k]
    return fields_P6, box_P4


def dihedral_augment(image_BHWC, fields_BP6, box_BP4, symmetry: int):
    """One of the eight ways to mirror and turn a square, done to pictures, patches and boxes alike."""
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
    """The centre patches in random order, and some of the other patches between them."""
    centre = np.flatnonzero(fields_P6[:, 4] == 2)[:num_patches]
    rest = np.flatnonzero(fields_P6[:, 4] != 2)
    chosen = np.concatenate([centre, rng.choice(rest, num_patches - len(centre), replace=False)])
    chosen = rng.permutation(chosen)
    return fields_P6[chosen], box_P4[chosen]


def lookup_exercise(scene, rng) -> Example:
    """Several look-ups at once: 'color: star, ring' -> 'star red, ring blue'. Many a line teach looking up sooner."""
    given, asked = rng.choice(list(OBJECT_NAMES)[:-1], 2, replace=False) if rng.random() < 0.6 else ("pair", "there")
    if given == "pair":
        pairs = [OBJECT_NAMES["pair"](thing) for thing in scene.things]
        others = [f"{c} {s}" for c, s in world.allowed_pairs(scene.split) if f"{c} {s}" not in pairs]
        chosen = [*rng.permutation(pairs)[:3], *rng.permutation(others)[:3]]
        chosen = [str(word) for word in rng.permutation(chosen)]
        said = ["yes" if word in pairs else "no" for word in chosen]
        if rng.random() < 0.3:
            asked, said = "count", [str(pairs.count(word)) for word in chosen]
    else:
        look = {name: [OBJECT_NAMES[name](thing) for thing in scene.things] for name in (given, asked)}
        words = sorted(set(look[given]))
        answers = {word: {a for g, a in zip(look[given], look[asked]) if g == word} for word in words}
        chosen = [str(word) for word in rng.permutation(words) if len(answers[word]) == 1]
        said = [next(iter(answers[word])) for word in chosen]
        if not chosen or rng.random() < 0.2:
            asked, chosen = "count", words
            said = [str(look[given].count(word)) for word in chosen]
    question = f"{asked}: {', '.join(chosen)}"
    answer = ", ".join(f"{word} {found}" for word, found in zip(chosen, said, strict=True))
    return Example("drill", asked, question, answer, (answer,), "image_level")


OBJECT_NAMES = {
    "shape": lambda thing: thing.shape,
    "color": lambda thing: thing.color,
    "size": lambda thing: thing.size,
    "texture": lambda thing: thing.texture,
    "pair": lambda thing: f"{thing.color} {thing.shape}",
}


EDGE_NAMES = ("left", "top", "right", "bottom")


def unambiguous_objects(scene, rng) -> list[tuple[str, tuple]]:
    """Names of a word or two that fit one thing only, with its box, in random order."""
    kinds = rng.choice(["shape", "color", "pair", "pair"], len(scene.things))
    names = [OBJECT_NAMES[str(kind)](thing) for kind, thing in zip(kinds, scene.things, strict=True)]
    alone = [
        (name, scene.things[k].box)
        for k, name in enumerate(names)
        if sum(matches_name(thing, name) for thing in scene.things) == 1
    ]
    largest = max(scene.things, key=lambda thing: thing.extent)
    return [alone[k] for k in rng.permutation(len(alone))] or [("largest object", largest.box)]


def box_exercise(scene, rng, max_boxes: int = 1) -> Example:
    """Boxes of things that a word or two are enough for: 'box: star' -> '[0.123,0.234,0.345,0.456]'."""
    names, boxes = zip(*unambiguous_objects(scene, rng)[:max_boxes], strict=True)
    said = ", ".join(f"{name} {box_to_text(box)}" for name, box in zip(names, boxes, strict=True))
    answer = box_to_text(boxes[0]) if max_boxes == 1 else said
    question = f"box: {', '.join(names)}"
    return Example("place", "box", question, answer, (answer,), "region_level", boxes=tuple(boxes))


def edge_exercise(scene, rng, max_objects: int = 4) -> Example:
    """One decimal of one edge of several things: 'left: star, ring'; `kind` says which, `boxes` has all of them."""
    named, number = unambiguous_objects(scene, rng)[:max_objects], int(rng.integers(NUM_DIGIT_POSITIONS))
    asked = ("", "fine ")[number % 2] + EDGE_NAMES[number // 2]
    names, boxes = zip(*named, strict=True)
    question = f"{asked}: {', '.join(names)}"
    return Example("edge", str(number), question, "", tuple(names), "region_level", boxes=boxes)


def single_edge_exercise(scene, rng) -> Example:
    """The same for one thing: so short an answer teaches best what to look at."""
    return edge_exercise(scene, rng, max_objects=1)


def multi_box_exercise(scene, rng) -> Example:
    """Up to four boxes a line."""
    return box_exercise(scene, rng, max_boxes=4)


def region_exercise(scene, rng) -> Example:
    """The way back: 'at: [0.123,0.234,0.345,0.456]' -> 'red star'."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    answer = f"{thing.size} {thing.color} {thing.texture} {thing.shape}"
    question = f"at: {box_to_text(thing.box)}"
    return Example("whose", "at", question, answer, (answer,), "region_level", boxes=(thing.box,))


def comparison_exercise(scene, rng) -> Example:
    """Several comparisons at once: 'above: red star ring, blue star' -> 'yes, no'."""
    named = unambiguous_objects(scene, rng)
    asked = str(rng.choice(["beside", "above", "more", "same"]))
    if asked in ("beside", "above") and len(named) > 1:
        axis, said, pairs = 0 if asked == "beside" else 1, [], []
        for _ in range(5):
            one, other = (named[k] for k in rng.choice(len(named), 2, replace=False))
            gap = sum(other[1][axis::2]) - sum(one[1][axis::2])
            if abs(gap) > 0.12:
                pairs.append(f"{one[0]} {other[0]}")
                said.append(gap > 0)
        if pairs:
            return _comparison_example(scene, asked, pairs, said)
    words = sorted({OBJECT_NAMES[name](thing) for thing in scene.things for name in ("shape", "color")})
    number = {word: sum(matches_name(thing, word) for thing in scene.things) for word in words}
    asked = "same" if asked == "same" else "more"
    pairs = [rng.choice(words, 2, replace=False) for _ in range(5)]
    said = [number[a] == number[b] if asked == "same" else number[a] > number[b] for a, b in pairs]
    return _comparison_example(scene, asked, [f"{a} {b}" for a, b in pairs], said)


def _comparison_example(scene, kind: str, pairs: list[str], truths) -> Example:
    answer = ", ".join("yes" if right else "no" for right in truths)
    return Example("compare", kind, f"{kind}: {', '.join(pairs)}", answer, (answer,), "image_level")


def matches_name(thing, name: str) -> bool:
    """Whether a color, a shape or both are those of a thing."""
    return set(name.split()) <= {thing.shape, thing.color}
