# SPDX-License-Identifier: Apache-2.0
"""Scenes into conversations: one function a task, each from a scene and a random generator to an `Example`.

Little can be answered without looking: yes and no are equally likely by construction, high counts
are asked for where they occur, and no question fits two things. In training, no question names a
held-out combination, not even to deny it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from lionjax.core.types import UserError
from lionjax.data import templates as wordings
from lionjax.data.boxes import Box, box_text
from lionjax.data.chat import transcript
from lionjax.data.scenes import referring as says
from lionjax.data.scenes import world
from lionjax.data.scenes.world import Scene
from lionjax.data.templates import ask

VOCABULARY = (*world.SHAPES, *world.COLORS, "striped", "dotted")
SETTINGS = ("random", "popular", "adversarial")
POPULAR = frozenset((c, s) for c in world.COLORS[:3] for s in world.SHAPES[:3])
FULL = ("size", "color", "texture", "shape")
CATEGORY = {
    "caption": "image_level",
    "vqa": "image_level",
    "relation": "image_level",
    "existence": "image_level",
    "tags": "image_level",
    "rec": "region_level",
    "res": "region_level",
    "reg": "region_level",
    "box_vqa": "region_level",
    "grounded": "region_level",
    "conversation": "region_level",
    "choice": "image_level",
}


@dataclass(frozen=True)
class Example:
    """One question about one scene. `answer` is what to learn, `answers` all that evaluation accepts.

    `question_boxes` and `boxes` are the boxes written in the question and in the answer, in their order; `targets`
    are the indices of the things meant, whose masks `Scene.masks` gives. `kind` tells sorts of one task apart.
    A conversation keeps all its `turns`; its `question` is everything said before the last answer.
    """

    task: str
    kind: str
    question: str
    answer: str
    answers: tuple[str, ...]
    category: str
    question_boxes: tuple[Box, ...] = ()
    boxes: tuple[Box, ...] = ()
    targets: tuple[int, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    tags: tuple[str, ...] = ()
    scene: str = ""


def describe(scene: Scene, rng=None, boxes: bool = True) -> str:
    """All of a scene in words: what a model of text alone needs to answer any question here.

    Things stand from left to right, or in random order given a generator; then what hides a part of
    what, then the background. Without `boxes` nothing is said of where things are.
    """
    things = scene.things
    order = says.left_to_right(scene) if rng is None else rng.permutation(len(things))
    full = [says.name(thing, FULL) for thing in things]
    if not boxes:
        return "; ".join([*(full[k] for k in order), f"{scene.background.kind} background"])
    boxed = [f"{full[k]} {box_text(things[k].box)}" for k in order]
    depth = [f"{full[k]} in front of {full[j]}" for k in order for j in things[k].covers]
    return "; ".join([*boxed, *depth, f"{scene.background.kind} background"])


def tags_of(scene: Scene, noise: float = 0.0, seed: int = 0) -> tuple[str, ...]:
    """What a tagger would say of a scene, in the order of VOCABULARY.

    Each true tag is missing with probability `noise`, each wrong one said with a quarter of it. The same scene, noise
    and seed give the same tags.
    """
    true = {word for t in scene.things for word in (t.shape, t.color, t.texture)}
    rng = np.random.default_rng([seed, world.SPLITS.index(scene.split), scene.seed, scene.index])
    chance = rng.random(len(VOCABULARY))
    return tuple(
        word for word, draw in zip(VOCABULARY, chance) if (draw >= noise if word in true else draw < noise / 4)
    )


def _short(task: str, kind: str, question: str, *answers: str, **more) -> Example:
    return Example(task, kind, question, answers[0], answers, CATEGORY[task], **more)


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _pick(rng, options):
    return options[rng.integers(len(options))]


def captions(scene: Scene) -> list[str]:
    """Several true one-sentence captions: what is there, how many, before what, and one relation."""
    groups, total = says.groups(scene), len(scene.things)
    things = says.listing(groups)
    first, last = (scene.things[says.left_to_right(scene)[end]] for end in (0, -1))
    ends = f"{says.article(says.name(first))} on the left and {says.article(says.name(last))} on the right"
    return [
        f"{things[0].upper()}{things[1:]}.",
        f"A picture of {things}.",
        f"There are {says.NUMBERS[total]} objects: {things}.",
        f"{things[0].upper()}{things[1:]} on a {scene.background.kind} background.",
        f"{says.NUMBERS[total].capitalize()} objects with {ends}: {things}.",
    ]


def caption(scene: Scene, rng) -> Example:
    """One sentence about the whole picture; every caption of the scene is a reference."""
    texts = captions(scene)
    answer = _pick(rng, texts)
    return Example("caption", "short", ask(wordings.CAPTION, rng), answer, tuple(texts), "image_level")


def vqa(scene: Scene, rng, kind: str | None = None) -> Example:
    """A question with a one-word answer; `kind` is color, shape, count or yesno, at random if not given."""
    if kind is None:
        kind = _pick(rng, tuple(VQA))
    return VQA[kind](scene, rng)


def _attribute(scene: Scene, rng, attribute: str, templates) -> Example:
    found = says.refer_any(scene, rng, without=(attribute,))
    if found is None:
        return _count(scene, rng)
    k, expr = found
    question = ask(templates, rng, expr=expr)
    return _short("vqa", attribute, question, getattr(scene.things[k], attribute), targets=(k,))


def _color(scene: Scene, rng) -> Example:
    return _attribute(scene, rng, "color", wordings.COLOR)


def _shape(scene: Scene, rng) -> Example:
    return _attribute(scene, rng, "shape", wordings.SHAPE)


def _countable(scene: Scene, rng) -> dict[str, list[int]]:
    """Names of one sort ('red objects', 'stars', ...) and the things each fits, perhaps none."""
    sort = rng.choice(("object", "color", "shape", "texture", "pair"), p=(0.1, 0.25, 0.25, 0.1, 0.3))
    if sort == "object":
        words = {"object": ()}
    elif sort == "pair":
        words = {f"{c} {s}": (c, s) for c, s in world.pairs_of(scene.split)}
    else:
        of = {"color": world.COLORS, "shape": world.SHAPES, "texture": world.TEXTURES}[sort]
        words = {word if sort == "shape" else f"{word} object": (word,) for word in of}
    return {
        noun: [k for k, t in enumerate(scene.things) if set(said) <= {t.color, t.shape, t.texture}]
        for noun, said in words.items()
    }


def _count(scene: Scene, rng) -> Example:
    nouns = _countable(scene, rng)
    counts = sorted({len(fits) for fits in nouns.values()})
    # High counts are rare in a scene, so they are asked for more often where they occur.
    weights = np.array([(0.5, 0.6, 1.2, 2.4)[min(count, 3)] for count in counts])
    count = int(rng.choice(counts, p=weights / weights.sum()))
    noun = _pick(rng, [noun for noun, fits in nouns.items() if len(fits) == count])
    question = ask(wordings.COUNT, rng, nouns=says.plural(noun))
    return _short("vqa", "count", question, str(count), targets=tuple(nouns[noun]))


def _yesno(scene: Scene, rng) -> Example:
    form = rng.choice(("color", "texture", "more"), p=(0.45, 0.3, 0.25))
    truth = bool(rng.random() < 0.5)
    example = _more(scene, rng, truth) if form == "more" else _check(scene, rng, str(form), truth)
    example = example or _check(scene, rng, "color", truth) or _check(scene, rng, "texture", truth)
    return example or dataclasses.replace(existence(scene, rng), task="vqa", kind="yesno")


def _check(scene: Scene, rng, attribute: str, truth: bool) -> Example | None:
    """'Is the star red?' The word is drawn before the thing, so that no word leans to one answer."""
    words = sorted({getattr(t, attribute) for t in scene.things})
    spoken = world.pairs_of(scene.split)
    things = rng.permutation(len(scene.things)).tolist()
    for word in rng.permutation(words).tolist():
        said = {True: [], False: []}
        for k in things:
            fits = getattr(scene.things[k], attribute) == word
            if fits or attribute != "color" or (word, scene.things[k].shape) in spoken:
                said[fits] += [(k, expr) for expr in [says.refer(scene, k, rng, (attribute,))] if expr]
        if said[True] and said[False]:
            k, expr = said[truth][0]
            question = ask(wordings.CHECK, rng, expr=expr, word=word)
            return _short("vqa", "yesno", question, _yes(truth), targets=(k,))
    return None


def _more(scene: Scene, rng, truth: bool) -> Example | None:
    """'Are there more stars than rings?' Both are there, and not equally many."""
    attribute = _pick(rng, ("color", "shape"))
    values = [getattr(t, attribute) for t in scene.things]
    counts = {word: values.count(word) for word in sorted(set(values))}
    unequal = [(a, b) for a in counts for b in counts if counts[a] > counts[b]]
    if not unequal:
        return None
    nouns = [word if attribute == "shape" else f"{word} object" for word in _pick(rng, unequal)]
    first, second = (says.plural(noun) for noun in (nouns if truth else nouns[::-1]))
    return _short("vqa", "yesno", ask(wordings.MORE, rng, first=first, second=second), _yes(truth))


VQA = {"color": _color, "shape": _shape, "count": _count, "yesno": _yesno}


def relation(scene: Scene, rng) -> Example:
    """Whether a statement about where two things are holds. A false one says the opposite of what is seen."""
    names = {k: says.descriptions(scene, k) for k in range(len(scene.things))}
    if sum(map(bool, names.values())) < 2:
        names = {k: says.expressions(scene, k) for k in names}
    pairs = []
    for a, b in ((a, b) for a in names for b in names if a != b and names[a] and names[b]):
        first, second = scene.things[a], scene.things[b]
        pairs += [(a, b, word) for word in says.SIDES if says.holds(first, word, second)]
        # Depth is seen only where one thing hides part of another; there are few such pairs, so each counts more.
        pairs += [(a, b, "in front of")] * 3 if b in first.covers else []
        pairs += [(a, b, "behind")] * 3 if a in second.covers else []
    if not pairs:
        return existence(scene, rng)
    a, b, word = _pick(rng, pairs)
    truth = bool(rng.random() < 0.5)
    first, second = (names[k][rng.integers(min(2, len(names[k])))] for k in (a, b))
    said = word if truth else says.OPPOSITE[word]
    question = ask(wordings.RELATION, rng, first=first, relation=said, second=second)
    return _short("relation", said, question, _yes(truth), targets=(a, b))


def existence(scene: Scene, rng, setting: str | None = None) -> Example:
    """Whether a thing is in the picture, as POPE asks it; what is not there is drawn in one of three ways.

    random: by how often the world shows it; popular: one of the most frequent; adversarial: its color and its shape
    are both in the picture, only on different things.
    """
    setting = setting or _pick(rng, SETTINGS)
    present = [(t.color, t.shape) for t in scene.things]
    there = bool(rng.random() < 0.5)
    # Under "popular" both answers speak of frequent things, or the others would give away a yes.
    shown = sorted(POPULAR.intersection(present)) if setting == "popular" else []
    shown = shown or sorted(set(present))
    pair = _pick(rng, shown) if there else _absent(scene, rng, setting)
    noun = says.article(" ".join(pair))
    targets = tuple(k for k, other in enumerate(present) if other == pair)
    question = ask(wordings.EXISTENCE, rng, noun=noun)
    return _short("existence", setting, question, _yes(there), targets=targets)


def _absent(scene: Scene, rng, setting: str) -> tuple[str, str]:
    present = {(t.color, t.shape) for t in scene.things}
    colors, shapes = ({pair[word] for pair in present} for word in (0, 1))
    absent = [pair for pair in world.pairs_of(scene.split) if pair not in present]
    pool = {
        "random": absent,
        "popular": [pair for pair in absent if pair in POPULAR],
        "adversarial": [pair for pair in absent if pair[0] in colors and pair[1] in shapes],
    }[setting]
    pool = pool or absent
    odds = np.array([world.odds(*pair) if setting == "random" else 1.0 for pair in pool])
    return pool[rng.choice(len(pool), p=odds / odds.sum())]


def tags(scene: Scene, rng) -> Example:
    """The true tags, as a list with commas in the order of VOCABULARY."""
    return _short("tags", "all", ask(wordings.TAGS, rng), ", ".join(tags_of(scene)))


def _located(scene: Scene, rng, task: str, kind: str, templates) -> Example:
    k, expr = says.refer_any(scene, rng)
    box = scene.things[k].box
    question, answer = ask(templates, rng, expr=expr), f"Answer: {box_text(box)}"
    return _short(task, kind, question, answer, boxes=(box,), targets=(k,))


def rec(scene: Scene, rng) -> Example:
    """A referring expression, answered by the box of the one thing it fits."""
    return _located(scene, rng, "rec", "box", wordings.REC)


def res(scene: Scene, rng) -> Example:
    """A referring expression, answered by a mask: that of `targets`. The answer's text is its box."""
    return _located(scene, rng, "res", "mask", wordings.RES)


def reg(scene: Scene, rng) -> Example:
    """A box, answered by an expression that fits only the thing in it; every such expression is a reference."""
    k, _ = says.refer_any(scene, rng)
    box, answers = scene.things[k].box, says.expressions(scene, k)
    question = ask(wordings.REG, rng, box=box_text(box))
    return _short("reg", "expression", question, *answers, question_boxes=(box,), targets=(k,))


def box_vqa(scene: Scene, rng, kind: str | None = None) -> Example:
    """A question about the thing in a box, answered by a word; `kind` is color, shape, texture or yesno."""
    kind = kind or _pick(rng, ("color", "shape", "texture", "yesno"))
    k = int(rng.integers(len(scene.things)))
    thing, box = scene.things[k], scene.things[k].box
    templates = {
        "color": wordings.BOX_COLOR,
        "shape": wordings.BOX_SHAPE,
        "texture": wordings.BOX_TEXTURE,
        "yesno": wordings.BOX_CHECK,
    }[kind]
    words = {"box": box_text(box)}
    if kind == "yesno":
        spoken = world.pairs_of(scene.split)
        others = [word for word in world.COLORS if word != thing.color and (word, thing.shape) in spoken]
        truth = bool(rng.random() < 0.5)
        words["word"] = thing.color if truth else _pick(rng, others)
    answer = _yes(truth) if kind == "yesno" else getattr(thing, kind)
    question = ask(templates, rng, **words)
    return _short("box_vqa", kind, question, answer, question_boxes=(box,), targets=(k,))


def grounded(scene: Scene, rng, most: int = 4) -> Example:
    """The largest things in view from left to right, each followed by its box."""

    def size(k):
        x0, y0, x1, y1 = scene.things[k].box
        return (x0 - x1) * (y1 - y0)

    main = set(sorted(range(len(scene.things)), key=size)[:most])
    order = tuple(k for k in says.left_to_right(scene) if k in main)
    things = [scene.things[k] for k in order]
    text = says.listing([f"{says.article(says.name(t))} {box_text(t.box)}" for t in things])
    boxes = tuple(t.box for t in things)
    question = ask(wordings.GROUNDED, rng)
    return _short("grounded", "boxes", question, f"{text[0].upper()}{text[1:]}.", boxes=boxes, targets=order)


def conversation(scene: Scene, rng) -> Example:
    """Two to four turns about one thing, first found and then spoken of as 'it'."""
    unsaid = ("color", "texture")
    k, expr = says.refer_any(scene, rng, unsaid) or says.refer_any(scene, rng)
    thing = scene.things[k]
    where = (ask(wordings.REC, rng, expr=expr), f"Answer: {box_text(thing.box)}")
    color = (ask(wordings.COREFERENCE_COLOR, rng), thing.color)
    others = [texture for texture in world.TEXTURES if texture != thing.texture]
    word = thing.texture if rng.random() < 0.5 else _pick(rng, others)
    check = (ask(wordings.COREFERENCE_CHECK, rng, word=word), _yes(word == thing.texture))
    alike = sum(t.color == thing.color for t in scene.things)
    same = (ask(wordings.SAME_COLOR, rng), str(alike))
    later = ((color,), (check,), (color, same), (check, color), (color, check, same))
    turns = (where, *later[rng.integers(len(later))])
    (last, answer), boxes = turns[-1], (thing.box,)
    question = transcript(turns[:-1], last)
    return _short("conversation", "it", question, answer, boxes=boxes, targets=(k,), turns=turns)


TASKS = {
    "caption": caption,
    "vqa": vqa,
    "relation": relation,
    "existence": existence,
    "tags": tags,
    "rec": rec,
    "res": res,
    "reg": reg,
    "box_vqa": box_vqa,
    "grounded": grounded,
    "conversation": conversation,
}


def converse(task: str, scene: Scene, rng, tag_noise: float = 0.0) -> Example:
    """One example of a task by name, with the scene's id and its (noisy) tags filled in."""
    if task not in TASKS:
        raise UserError(f"there is no task {task!r}; choose one of {', '.join(TASKS)}")
    example = TASKS[task](scene, rng)
    return dataclasses.replace(example, scene=scene.id, tags=tags_of(scene, tag_noise))
