# SPDX-License-Identifier: Apache-2.0
"""Words for the things of a scene: names, lists, and expressions that fit exactly one thing.

"Left of" and its kin compare centres of visible boxes and are only said when they differ clearly, by `MARGIN` of the
picture; so no true or false statement here needs a ruler.
"""

from __future__ import annotations

from lionjax.data.scenes.world import Scene, Thing

MARGIN = 0.12
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SIDES = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OPPOSITE |= {"in front of": "behind", "behind": "in front of"}
# Attributes named together, the most natural combinations first.
NAMINGS = (
    ("color", "shape"),
    ("size", "color", "shape"),
    ("color", "texture", "shape"),
    ("shape",),
    ("size", "color", "texture", "shape"),
    ("size", "shape"),
    ("texture", "shape"),
    ("color",),
    ("size", "texture", "shape"),
    ("color", "texture"),
    ("size", "color"),
)
ENDS = (
    ("left of", "leftmost {}", "{} on the left", "{} furthest to the left"),
    ("right of", "rightmost {}", "{} on the right", "{} furthest to the right"),
    ("above", "topmost {}", "{} at the top", "highest {}"),
    ("below", "bottommost {}", "{} at the bottom", "lowest {}"),
)


def name(thing: Thing, attributes=("color", "shape")) -> str:
    """'large red striped star' for all four attributes; 'object' stands for a shape left unsaid."""
    order = ("size", "color", "texture")
    said = [getattr(thing, word) for word in order if word in attributes]
    return " ".join([*said, thing.shape if "shape" in attributes else "object"])


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def counted(noun: str, count: int) -> str:
    """'a star', 'two stars', 'no stars'."""
    return article(noun) if count == 1 else f"{NUMBERS[count]} {plural(noun)}"


def listing(phrases) -> str:
    """'a, b and c'."""
    *most, last = phrases
    return f"{', '.join(most)} and {last}" if most else last


def centre(thing: Thing) -> tuple[float, float]:
    x0, y0, x1, y1 = thing.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def left_to_right(scene: Scene) -> list[int]:
    return sorted(range(len(scene.things)), key=lambda k: centre(scene.things[k]))


def groups(scene: Scene, attributes=("color", "shape")) -> list[str]:
    """Counted names, such as 'a red star' and 'two blue rings', by the leftmost of each from left to right."""
    names = [name(scene.things[k], attributes) for k in left_to_right(scene)]
    return [counted(noun, names.count(noun)) for noun in dict.fromkeys(names)]


def holds(first: Thing, relation: str, second: Thing, margin: float = MARGIN) -> bool:
    """Whether first clearly lies on that side of second."""
    (ax, ay), (bx, by) = centre(first), centre(second)
    gap = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}[relation]
    return gap >= margin


def fitting(scene: Scene, k: int, attributes) -> list[int]:
    """Indices of the things that share these attributes with thing k, itself included."""
    values = [getattr(scene.things[k], word) for word in attributes]
    return [j for j, other in enumerate(scene.things) if [getattr(other, word) for word in attributes] == values]


def descriptions(scene: Scene, k: int, without: tuple[str, ...] = ()) -> list[str]:
    """Names that fit thing k alone, the most natural first; `without` leaves attributes unsaid."""
    thing = scene.things[k]
    namings = [words for words in NAMINGS if not set(words) & set(without)]
    return ["the " + name(thing, words) for words in namings if fitting(scene, k, words) == [k]]


def superlatives(scene: Scene, k: int, without: tuple[str, ...] = ()) -> list[str]:
    """'the leftmost red star': thing k among several of one name, clearly ahead of the others in one direction."""
    found = []
    for words in (("color", "shape"), ("shape",), ("color",)):
        rivals = [j for j in fitting(scene, k, words) if j != k]
        if set(words) & set(without) or not rivals:
            continue
        for relation, *forms in ENDS:
            if all(holds(scene.things[k], relation, scene.things[j]) for j in rivals):
                found += ["the " + form.format(name(scene.things[k], words)) for form in forms]
    return found


def comparisons(scene: Scene, k: int, without: tuple[str, ...] = ()) -> list[str]:
    """'the red star left of the blue ring': of several things of one name, only k lies on that side of the other."""
    found, thing = [], scene.things[k]
    for words in (("color", "shape"), ("shape",)):
        rivals = [j for j in fitting(scene, k, words) if j != k]
        if set(words) & set(without) or not rivals:
            continue
        for j, other in enumerate(scene.things):
            anchors = [] if j == k else descriptions(scene, j)[:1]
            for relation in SIDES if anchors else ():
                apart = [r for r in rivals if r != j]
                alone = all(holds(scene.things[r], OPPOSITE[relation], other, 0.02) for r in apart)
                if alone and holds(thing, relation, other):
                    found.append(f"the {name(thing, words)} {relation} {anchors[0]}")
    return found


def expressions(scene: Scene, k: int, without: tuple[str, ...] = ()) -> list[str]:
    """Every expression here that fits thing k and no other, the most natural first; may be empty."""
    return descriptions(scene, k, without) + superlatives(scene, k, without) + comparisons(scene, k, without)


def refer(scene: Scene, k: int, rng, without: tuple[str, ...] = ()) -> str | None:
    """One expression that fits thing k alone, drawn with a liking for plain and short ones; None if there is none."""
    first = rng.choice(3, p=(0.76, 0.16, 0.08))
    for turn in range(3):
        offer = (descriptions, superlatives, comparisons)[(first + turn) % 3](scene, k, without)
        if offer:
            # Half the time the first that fits, as people do; else any, so that longer ones are learned too.
            return offer[0] if rng.random() < 0.5 else offer[rng.integers(len(offer))]
    return None


def refer_any(scene: Scene, rng, without: tuple[str, ...] = ()) -> tuple[int, str] | None:
    """A thing drawn at random and an expression for it; None where no thing has one."""
    offers = ((int(k), refer(scene, k, rng, without)) for k in rng.permutation(len(scene.things)))
    return next(((k, expr) for k, expr in offers if expr), None)
