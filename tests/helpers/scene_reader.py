# SPDX-License-Identifier: Apache-2.0
"""An independent reader: it answers questions from the text of `tasks.describe` alone.

It shares no code with what it checks but the lists of wordings: expressions are parsed word by word and
resolved by looking at boxes, so a wrong or ambiguous question shows as a different answer.
"""

import re

SIZES = ("small", "medium", "large")
TEXTURES = ("plain", "striped", "dotted")
DIRECTIONS = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}
DIRECTIONS |= {"highest": (1, 1), "lowest": (1, -1)}
TAILS = {
    " furthest to the left": "leftmost",
    " furthest to the right": "rightmost",
    " on the left": "leftmost",
    " on the right": "rightmost",
    " at the top": "topmost",
    " at the bottom": "bottommost",
}
SIDES = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
FIELDS = {"expr": "[Tt]he .+", "word": r"\w+", "noun": r"an? \w+ \w+", "nouns": r"[\w ]+"}
FIELDS |= {"relation": "left of|right of|above|below|in front of|behind"}


def read(description):
    """The text of a scene as (things, what hides what): a thing is its words and its box."""
    *parts, background = description.split("; ")
    assert background.endswith(" background")
    boxed = [part for part in parts if "[" in part]
    things = []
    for part in boxed:
        words, box = part[:-1].split(" [")
        size, color, texture, shape = words.split()
        edges = [float(edge) for edge in box.split(",")]
        middle = ((edges[0] + edges[2]) / 2, (edges[1] + edges[3]) / 2)
        thing = {"size": size, "color": color, "texture": texture, "shape": shape}
        things.append({**thing, "words": words, "box": edges, "middle": middle})
    return things, [tuple(part.split(" in front of ")) for part in parts if "[" not in part]


def named(things, noun):
    """Things that a bare name such as 'large red striped object' fits."""
    words = set(noun.split()) - {"object"}
    return [thing for thing in things if words <= set(thing["words"].split())]


def resolve(things, expression):
    """All things that an expression may mean; superlatives keep every candidate that is not clearly behind."""
    text = expression.lower().removeprefix("the ")
    for side, (axis, sign) in SIDES.items():
        noun, found, anchor = text.partition(f" {side} the ")
        if found:
            (other,) = resolve(things, anchor)
            here = sign * other["middle"][axis]
            near = [t for t in named(things, noun) if t is not other]
            return [t for t in near if sign * t["middle"][axis] < here]
    for tail, word in TAILS.items():
        if text.endswith(tail):
            text = f"{word} {text.removesuffix(tail)}"
    first, _, noun = text.partition(" ")
    if first in DIRECTIONS:
        axis, sign = DIRECTIONS[first]
        found = named(things, noun)
        best = min(sign * t["middle"][axis] for t in found)
        return [t for t in found if sign * t["middle"][axis] < best + 0.1]
    return named(things, text)


def only(things, expression):
    found = resolve(things, expression)
    assert len(found) == 1, f"{expression!r} fits {[t['words'] for t in found]}"
    return found[0]


def heard(question, templates, **fields):
    """The words with which one of the templates gives this question, or None."""
    patterns = FIELDS | fields
    for template in templates:
        pieces = re.split(r"{(\w+)}", template)
        parts = [
            f"(?P<{part.lower()}>{patterns.get(part.lower(), '.+')})" if odd % 2 else re.escape(part)
            for odd, part in enumerate(pieces)
        ]
        found = re.fullmatch("".join(parts), question)
        if found:
            return found.groupdict()
    return None


def singular(noun):
    return re.sub(r"(?<=s)es$|s$", "", noun)


def how_many(things, nouns):
    return len(named(things, singular(nouns.lower())))


def is_so(things, hides, first, relation, second):
    """Whether a relation holds, read from centers of boxes or from what hides what."""
    a, b = only(things, first), only(things, second)
    if relation in SIDES:
        axis, sign = SIDES[relation]
        return sign * a["middle"][axis] < sign * b["middle"][axis]
    pair = (a["words"], b["words"]) if relation == "in front of" else (b["words"], a["words"])
    assert pair in hides or pair[::-1] in hides
    return pair in hides
