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
from lionjax.data.boxes import Box, box_to_text
from lionjax.data.chat import render_history
from lionjax.data.scenes import referring as says
from lionjax.data.scenes import world
from lionjax.data.scenes.world import Scene
from lionjax.data.templates import sample_question

TAG_VOCABULARY = (*world.SHAPES, *world.COLORS, "striped", "dotted")
POPE_SETTINGS = ("random", "popular", "adversarial")
POPULAR_PAIRS = frozenset((c, s) for c in world.COLORS[:3] for s in world.SHAPES[:3])
ALL_ATTRIBUTES = ("size", "color", "texture", "shape")
TASK_CATEGORY = {
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


def scene_to_text(scene: Scene, rng=None, with_boxes: bool = True) -> str:
    """All of a scene in words: what a model of text alone needs to answer any question here.

    Things stand from left to right, or in random order given a generator; then what hides a part of
    what, then the background. Without `boxes` nothing is said of where things are.
    """
    things = scene.things
    order = says.left_to_right(scene) if rng is None else rng.permutation(len(things))
    full = [says.noun_phrase(thing, ALL_ATTRIBUTES) for thing in things]
    if not with_boxes:
        return "; ".join([*(full[k] for k in order), f"{scene.background.kind} background"])
    boxed = [f"{full[k]} {box_to_text(things[k].box)}" for k in order]
    depth = [f"{full[k]} in front of {full[j]}" for k in order for j in things[k].covers]
    return "; ".join([*boxed, *depth, f"{scene.background.kind} background"])


def scene_tags(scene: Scene, noise: float = 0.0, seed: int = 0) -> tuple[str, ...]:
    """What a tagger would say of a scene, in the order of VOCABULARY.

    Each true tag is missing with probability `noise`, each wrong one said with a quarter of it. The same scene, noise
    and seed give the same tags.
    """
    true = {word for t in scene.things for word in (t.shape, t.color, t.texture)}
    rng = np.random.default_rng([seed, world.SPLITS.index(scene.split), scene.seed, scene.index])
    chance = rng.random(len(TAG_VOCABULARY))
    return tuple(
        word for word, draw in zip(TAG_VOCABULARY, chance) if (draw >= noise if word in true else draw < noise / 4)
    )


def _build_example(task: str, kind: str, question: str, *answers: str, **more) -> Example:
    return Example(task, kind, question, answers[0], answers, TASK_CATEGORY[task], **more)


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _choose(rng, options):
    return options[rng.integers(len(options))]


def scene_captions(scene: Scene) -> list[str]:
    """Several true one-sentence captions: what is there, how many, before what, and one relation."""
    groups, total = says.group_phrases(scene), len(scene.things)
    things = says.join_phrases(groups)
    first, last = (scene.things[says.left_to_right(scene)[end]] for end in (0, -1))
    ends = f"{says.with_article(says.noun_phrase(first))} on the left and {says.with_article(says.noun_phrase(last))} on the right"
    return [
        f"{things[0].upper()}{things[1:]}.",
        f"A picture of {things}.",
        f"There are {says.NUMBER_WORDS[total]} objects: {things}.",
        f"{things[0].upper()}{things[1:]} on a {scene.background.kind} background.",
        f"{says.NUMBER_WORDS[total].capitalize()} objects with {ends}: {things}.",
    ]


def caption(scene: Scene, rng) -> Example:
    """One sentence about the whole picture; every caption of the scene is a reference."""
    texts = scene_captions(scene)
    answer = _choose(rng, texts)
    return Example("caption", "short", sample_question(wordings.CAPTION, rng), answer, tuple(texts), "image_level")


def vqa(scene: Scene, rng, kind: str | None = None) -> Example:
    """A question with a one-word answer; `kind` is color, shape, count or yesno, at random if not given."""
    if kind is None:
        kind = _choose(rng, tuple(VQA_KINDS))
    return VQA_KINDS[kind](scene, rng)


def _attribute_question(scene: Scene, rng, attribute: str, templates) -> Example:
    found = says.sample_referent(scene, rng, excluded=(attribute,))
    if found is None:
        return _count_question(scene, rng)
    k, expr = found
    question = sample_question(templates, rng, expr=expr)
    return _build_example("vqa", attribute, question, getattr(scene.things[k], attribute), targets=(k,))


def _color_question(scene: Scene, rng) -> Example:
    return _attribute_question(scene, rng, "color", wordings.COLOR)


def _shape_question(scene: Scene, rng) -> Example:
    return _attribute_question(scene, rng, "shape", wordings.SHAPE)


def _things_by_noun(scene: Scene, rng) -> dict[str, list[int]]:
    """Names of one sort ('red objects', 'stars', ...) and the things each fits, perhaps none."""
    sort = rng.choice(("object", "color", "shape", "texture", "pair"), p=(0.1, 0.25, 0.25, 0.1, 0.3))
    if sort == "object":
        words = {"object": ()}
    elif sort == "pair":
        words = {f"{c} {s}": (c, s) for c, s in world.allowed_pairs(scene.split)}
    else:
        of = {"color": world.COLORS, "shape": world.SHAPES, "texture": world.TEXTURES}[sort]
        words = {word if sort == "shape" else f"{word} object": (word,) for word in of}
    return {
        noun: [k for k, t in enumerate(scene.things) if set(said) <= {t.color, t.shape, t.texture}]
        for noun, said in words.items()
    }


def _count_question(scene: Scene, rng) -> Example:
    nouns = _things_by_noun(scene, rng)
    counts = sorted({len(fits) for fits in nouns.values()})
    # High counts are rare in a scene, so they are asked for more often where they occur.
    weights = np.array([(0.5, 0.6, 1.2, 2.4)[min(count, 3)] for count in counts])
    count = int(rng.choice(counts, p=weights / weights.sum()))
    noun = _choose(rng, [noun for noun, fits in nouns.items() if len(fits) == count])
    question = sample_question(wordings.COUNT, rng, nouns=says.pluralize(noun))
    return _build_example("vqa", "count", question, str(count), targets=tuple(nouns[noun]))


def _yesno_question(scene: Scene, rng) -> Example:
    form = rng.choice(("color", "texture", "more"), p=(0.45, 0.3, 0.25))
    truth = bool(rng.random() < 0.5)
    example = (
        _count_comparison_question(scene, rng, truth)
        if form == "more"
        else _attribute_yesno_question(scene, rng, str(form), truth)
    )
    example = (
        example
        or _attribute_yesno_question(scene, rng, "color", truth)
        or _attribute_yesno_question(scene, rng, "texture", truth)
    )
    return example or dataclasses.replace(existence(scene, rng), task="vqa", kind="yesno")


def _attribute_yesno_question(scene: Scene, rng, attribute: str, is_true: bool) -> Example | None:
    """'Is the star red?' The word is drawn before the thing, so that no word leans to one answer."""
    words = sorted({getattr(t, attribute) for t in scene.things})
    spoken = world.allowed_pairs(scene.split)
    things = rng.permutation(len(scene.things)).tolist()
    for word in rng.permutation(words).tolist():
        said = {True: [], False: []}
        for k in things:
            fits = getattr(scene.things[k], attribute) == word
            if fits or attribute != "color" or (word, scene.things[k].shape) in spoken:
                said[fits] += [(k, expr) for expr in [says.sample_expression(scene, k, rng, (attribute,))] if expr]
        if said[True] and said[False]:
            k, expr = said[is_true][0]
            question = sample_question(wordings.ATTRIBUTE_YESNO, rng, expr=expr, word=word)
            return _build_example("vqa", "yesno", question, _yes_or_no(is_true), targets=(k,))
    return None


def _count_comparison_question(scene: Scene, rng, is_true: bool) -> Example | None:
    """'Are there more stars than rings?' Both are there, and not equally many."""
    attribute = _choose(rng, ("color", "shape"))
    values = [getattr(t, attribute) for t in scene.things]
    counts = {word: values.count(word) for word in sorted(set(values))}
    unequal = [(a, b) for a in counts for b in counts if counts[a] > counts[b]]
    if not unequal:
        return None
    nouns = [word if attribute == "shape" else f"{word} object" for word in _choose(rng, unequal)]
    first, second = (says.pluralize(noun) for noun in (nouns if is_true else nouns[::-1]))
    return _build_example(
        "vqa", "yesno", sample_question(wordings.COUNT_COMPARISON, rng, first=first, second=second), _yes_or_no(is_true)
    )


VQA_KINDS = {"color": _color_question, "shape": _shape_question, "count": _count_question, "yesno": _yesno_question}


def relation(scene: Scene, rng) -> Example:
    """Whether a statement about where two things are holds. A false one says the opposite of what is seen."""
    names = {k: says.attribute_expressions(scene, k) for k in range(len(scene.things))}
    if sum(map(bool, names.values())) < 2:
        names = {k: says.referring_expressions(scene, k) for k in names}
    pairs = []
    for a, b in ((a, b) for a in names for b in names if a != b and names[a] and names[b]):
        first, second = scene.things[a], scene.things[b]
        pairs += [(a, b, word) for word in says.SPATIAL_RELATIONS if says.relation_holds(first, word, second)]
        # Depth is seen only where one thing hides part of another; there are few such pairs, so each counts more.
        pairs += [(a, b, "in front of")] * 3 if b in first.covers else []
        pairs += [(a, b, "behind")] * 3 if a in second.covers else []
    if not pairs:
        return existence(scene, rng)
    a, b, word = _choose(rng, pairs)
    truth = bool(rng.random() < 0.5)
    first, second = (names[k][rng.integers(min(2, len(names[k])))] for k in (a, b))
    said = word if truth else says.OPPOSITE_RELATION[word]
    question = sample_question(wordings.RELATION, rng, first=first, relation=said, second=second)
    return _build_example("relation", said, question, _yes_or_no(truth), targets=(a, b))


def existence(scene: Scene, rng, setting: str | None = None) -> Example:
    """Whether a thing is in the picture, as POPE asks it; what is not there is drawn in one of three ways.

    random: by how often the world shows it; popular: one of the most frequent; adversarial: its color and its shape
    are both in the picture, only on different things.
    """
    setting = setting or _choose(rng, POPE_SETTINGS)
    present = [(t.color, t.shape) for t in scene.things]
    there = bool(rng.random() < 0.5)
    # Under "popular" both answers speak of frequent things, or the others would give away a yes.
    shown = sorted(POPULAR_PAIRS.intersection(present)) if setting == "popular" else []
    shown = shown or sorted(set(present))
    pair = _choose(rng, shown) if there else _sample_absent_pair(scene, rng, setting)
    noun = says.with_article(" ".join(pair))
    targets = tuple(k for k, other in enumerate(present) if other == pair)
    question = sample_question(wordings.EXISTENCE, rng, noun=noun)
    return _build_example("existence", setting, question, _yes_or_no(there), targets=targets)


def _sample_absent_pair(scene: Scene, rng, setting: str) -> tuple[str, str]:
    present = {(t.color, t.shape) for t in scene.things}
    colors, shapes = ({pair[word] for pair in present} for word in (0, 1))
    absent = [pair for pair in world.allowed_pairs(scene.split) if pair not in present]
    pool = {
        "random": absent,
        "popular": [pair for pair in absent if pair in POPULAR_PAIRS],
        "adversarial": [pair for pair in absent if pair[0] in colors and pair[1] in shapes],
    }[setting]
    pool = pool or absent
    odds = np.array([world.pair_weight(*pair) if setting == "random" else 1.0 for pair in pool])
    return pool[rng.choice(len(pool), p=odds / odds.sum())]


def tags(scene: Scene, rng) -> Example:
    """The true tags, as a list with commas in the order of VOCABULARY."""
    return _build_example("tags", "all", sample_question(wordings.TAGS, rng), ", ".join(scene_tags(scene)))


def _referring_example(scene: Scene, rng, task: str, kind: str, templates) -> Example:
    k, expr = says.sample_referent(scene, rng)
    box = scene.things[k].box
    question, answer = sample_question(templates, rng, expr=expr), f"Answer: {box_to_text(box)}"
    return _build_example(task, kind, question, answer, boxes=(box,), targets=(k,))


def rec(scene: Scene, rng) -> Example:
    """A referring expression, answered by the box of the one thing it fits."""
    return _referring_example(scene, rng, "rec", "box", wordings.REC)


def res(scene: Scene, rng) -> Example:
    """A referring expression, answered by a mask: that of `targets`. The answer's text is its box."""
    return _referring_example(scene, rng, "res", "mask", wordings.RES)


def reg(scene: Scene, rng) -> Example:
    """A box, answered by an expression that fits only the thing in it; every such expression is a reference."""
    k, _ = says.sample_referent(scene, rng)
    box, answers = scene.things[k].box, says.referring_expressions(scene, k)
    question = sample_question(wordings.REG, rng, box=box_to_text(box))
    return _build_example("reg", "expression", question, *answers, question_boxes=(box,), targets=(k,))


def box_vqa(scene: Scene, rng, kind: str | None = None) -> Example:
    """A question about the thing in a box, answered by a word; `kind` is color, shape, texture or yesno."""
    kind = kind or _choose(rng, ("color", "shape", "texture", "yesno"))
    k = int(rng.integers(len(scene.things)))
    thing, box = scene.things[k], scene.things[k].box
    templates = {
        "color": wordings.BOX_COLOR,
        "shape": wordings.BOX_SHAPE,
        "texture": wordings.BOX_TEXTURE,
        "yesno": wordings.BOX_ATTRIBUTE_YESNO,
    }[kind]
    words = {"box": box_to_text(box)}
    if kind == "yesno":
        spoken = world.allowed_pairs(scene.split)
        others = [word for word in world.COLORS if word != thing.color and (word, thing.shape) in spoken]
        truth = bool(rng.random() < 0.5)
        words["word"] = thing.color if truth else _choose(rng, others)
    answer = _yes_or_no(truth) if kind == "yesno" else getattr(thing, kind)
    question = sample_question(templates, rng, **words)
    return _build_example("box_vqa", kind, question, answer, question_boxes=(box,), targets=(k,))


def grounded(scene: Scene, rng, max_things: int = 4) -> Example:
    """The largest things in view from left to right, each followed by its box."""

    def size(k):
        x0, y0, x1, y1 = scene.things[k].box
        return (x0 - x1) * (y1 - y0)

    main = set(sorted(range(len(scene.things)), key=size)[:max_things])
    order = tuple(k for k in says.left_to_right(scene) if k in main)
    things = [scene.things[k] for k in order]
    text = says.join_phrases([f"{says.with_article(says.noun_phrase(t))} {box_to_text(t.box)}" for t in things])
    boxes = tuple(t.box for t in things)
    question = sample_question(wordings.GROUNDED_CAPTION, rng)
    return _build_example("grounded", "boxes", question, f"{text[0].upper()}{text[1:]}.", boxes=boxes, targets=order)


def conversation(scene: Scene, rng) -> Example:
    """Two to four turns about one thing, first found and then spoken of as 'it'."""
    unsaid = ("color", "texture")
    k, expr = says.sample_referent(scene, rng, unsaid) or says.sample_referent(scene, rng)
    thing = scene.things[k]
    where = (sample_question(wordings.REC, rng, expr=expr), f"Answer: {box_to_text(thing.box)}")
    color = (sample_question(wordings.COREFERENCE_COLOR, rng), thing.color)
    others = [texture for texture in world.TEXTURES if texture != thing.texture]
    word = thing.texture if rng.random() < 0.5 else _choose(rng, others)
    check = (sample_question(wordings.COREFERENCE_ATTRIBUTE_YESNO, rng, word=word), _yes_or_no(word == thing.texture))
    alike = sum(t.color == thing.color for t in scene.things)
    same = (sample_question(wordings.SAME_COLOR, rng), str(alike))
    later = ((color,), (check,), (color, same), (check, color), (color, check, same))
    turns = (where, *later[rng.integers(len(later))])
    (last, answer), boxes = turns[-1], (thing.box,)
    question = render_history(turns[:-1], last)
    return _build_example("conversation", "it", question, answer, boxes=boxes, targets=(k,), turns=turns)


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


def make_example(task: str, scene: Scene, rng, tag_noise: float = 0.0) -> Example:
    """One example of a task by name, with the scene's id and its (noisy) tags filled in."""
    if task not in TASKS:
        raise UserError(f"there is no task {task!r}; choose one of {', '.join(TASKS)}")
    example = TASKS[task](scene, rng)
    return dataclasses.replace(example, scene=scene.id, tags=scene_tags(scene, tag_noise))
