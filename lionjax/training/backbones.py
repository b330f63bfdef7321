# SPDX-License-Identifier: Apache-2.0
"""Small backbones that are worth freezing: a ViT that sees scenes and a T5 that can talk about them.

LION freezes its ViT and its language model, so the ones that ship with the project are trained first, each by itself.
The ViT learns to say, patch by patch, which thing lies there and where its box is. The T5 never sees a picture: it
learns the tasks from scenes told in words, and from scenes given as sets of vectors, one for each thing or patch: the
sum of its words' embeddings and a code of its box. All heads used on the way are thrown away.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from lionjax import params as trees
from lionjax.data import scenes, tasks
from lionjax.data.processors import Processor, ProcessorConfig
from lionjax.data.tasks import box_text
from lionjax.data.told import (
    ATTRIBUTES,
    CODE,
    DIGITS,
    FIELDS,
    PLACES,
    ROLES,
    box_code,
    compare,
    drill,
    edge,
    few_things,
    mirrored,
    one_edge,
    patch_facts,
    place,
    places,
    whose,
)
from lionjax.evaluation import metrics
from lionjax.language.t5 import T5, T5Config, shift_right
from lionjax.layers import LayerNorm, normal
from lionjax.losses import token_cross_entropy
from lionjax.vision.vit import ViT, ViTConfig

log = logging.getLogger(__name__)

COLOR = list(FIELDS).index("color")
SHARPNESS = 1.0  # of the first attention, see `looking_for_like`


@dataclasses.dataclass(frozen=True)
class BackbonesConfig:
    """Sizes and schedules of both; `scenes` are drawn from the training split only."""

    vision: ViTConfig
    language: T5Config
    scenes: int = 20_000
    vision_steps: int = 4_000
    mirrored_steps: int = (
        7_000  # then as many with pictures mirrored and turned, which are as good as new ones
    )
    align_steps: int = 2_000  # see `align_vision`
    align_rate: float = 5e-4
    vision_batch: int = 64
    vision_rate: float = 1e-3
    language_steps: int = 5_000
    language_batch: int = 48
    language_rate: float = 6e-4
    again_steps: int = 11_000  # a second schedule, in which many scenes are told patch by patch
    again_rate: float = 6e-4
    patch_share: float = 0.35  # of the second schedule's steps that see a scene patch by patch
    text_share: float = 0.02  # of language steps that read a scene in words
    hinted_share: float = (
        0.2  # of language steps whose prompt begins with LION's sentence about tags
    )
    words_stay: bool = (
        False  # what the T5 is told of a thing stays as it is, for a ViT aligned with it
    )
    seed: int = 0


class Painter(nn.Module):
    """The ViT under training: for each patch, logits of every field and a code of the box."""

    c: ViTConfig

    @nn.compact
    def __call__(self, image_BHWC):
        x_BPD, _, _ = ViT(self.c, name="vision")(image_BHWC)
        h_BPD = LayerNorm(self.c.width, 1e-5, name="norm")(x_BPD[:, 1:])
        sizes = [len(values) for values in FIELDS.values()]
        out = nn.Dense(sum(sizes) + CODE, name="say")(h_BPD)
        return jnp.split(out, np.cumsum(sizes), axis=-1)


def vision_loss(params, painter, image_BHWC, fields_BP6, box_code_BPC, tinted):
    """Cross entropy of every field (attributes on covered patches only) and squared error of the code.

    Of `tinted` pictures, whose colors were exchanged, the color is not asked.
    """
    *logits, code_BPC = painter.apply({"params": params}, image_BHWC)
    covered_BP = (fields_BP6[..., 4] > 0).astype(jnp.float32)
    weight_BP = covered_BP + (fields_BP6[..., 4] == 2)
    total = 0.0
    for number, scores in enumerate(logits):
        nats_BP = optax.softmax_cross_entropy_with_integer_labels(scores, fields_BP6[..., number])
        weight = (
            weight_BP * (1 - tinted * (number == COLOR))
            if number < 4
            else 1.0 + 3.0 * (weight_BP == 2)
            if number == 4
            else 0.1 + 0 * weight_BP
        )
        total += (nats_BP * weight).sum() / jnp.maximum(jnp.sum(weight + 0 * nats_BP), 1)
    error_BP = jnp.square(code_BPC - box_code_BPC).mean(-1)
    return total + 4 * (error_BP * weight_BP).sum() / jnp.maximum(weight_BP.sum(), 1)


def optimiser(rate: float, steps: int):
    schedule = optax.warmup_cosine_decay_schedule(
        0, rate, min(200, steps // 4 + 1), steps, rate * 0.02
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.02))


def normalise(image_BHWC, mean, std):
    """uint8 -> what the processor gives."""
    return (image_BHWC.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def train_vision(c: BackbonesConfig, mean, std, start: dict | None = None) -> tuple[dict, dict]:
    """Parameters of the ViT and its figures on held-out scenes. From `start` on only the mirrored steps run."""
    side, pixels = c.vision.image // c.vision.patch, c.vision.image
    made = [scenes.sample("train", index, c.seed) for index in range(c.scenes)]
    image_NHWC, fields_NP6, box_NP4 = seen(made, side, pixels)
    test = seen([scenes.sample("heldout", index, c.seed) for index in range(500)], side, pixels)
    painter = Painter(c.vision)
    params = nn.unbox(
        jax.jit(painter.init)(jax.random.key(c.seed), normalise(image_NHWC[:1], mean, std))[
            "params"
        ]
    )
    if start is not None:
        params |= start
    steps = (0 if start is not None else c.vision_steps, c.mirrored_steps)
    schedules = [optimiser(c.vision_rate, number) for number in steps if number]

    @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=2)
    def step(params, state, tx, image, fields, code, tinted):
        loss, grads = jax.value_and_grad(vision_loss)(
            params, painter, normalise(image, mean, std), fields, code, tinted
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng, begun = np.random.default_rng(c.seed), time.time()
    for at in range(sum(steps)):
        if at in (0, steps[0]):
            tx = schedules.pop(0)
            state = tx.init(params)
        rows = rng.integers(0, c.scenes, c.vision_batch)
        batch = image_NHWC[rows], fields_NP6[rows], box_NP4[rows]
        image, fields, box = mirrored(*batch, rng.integers(0, 8)) if at >= steps[0] else batch
        # Exchanged red, green and blue teach shapes that no color gives away.
        tinted = at >= steps[0] and rng.random() < 0.4
        image = image[..., rng.permutation(3)] if tinted else image
        params, state, loss = step(
            params, state, tx, image, fields, box_code(box), np.float32(tinted)
        )
        if at % 200 == 0:
            log.info("vision step %d loss %.4f %.0f s", at, float(loss), time.time() - begun)
        if at % 1000 == 999 or at == sum(steps) - 1:
            figures = judge_vision(params, painter, test, mean, std)
            log.info("vision step %d %s", at, figures)
    return params["vision"], figures


def standard(x_BPD):
    """Vectors of mean 0 and deviation 1."""
    x_BPD = x_BPD - x_BPD.mean(-1, keepdims=True)
    return x_BPD * jax.lax.rsqrt(jnp.square(x_BPD).mean(-1, keepdims=True) + 1e-5)


def align_vision(c: BackbonesConfig, mean, std, vision: dict, reader: dict) -> tuple[dict, dict]:
    """A trained ViT whose features become what the T5 was told of each patch, and how near they come.

    `reader` is all that `train_language` keeps. Large ViTs are aligned with words too, by pairs of pictures and texts.
    """
    processor = Processor(ProcessorConfig(c.vision.image))
    side, pixels = c.vision.image // c.vision.patch, c.vision.image
    images, fields, boxes = seen(
        [scenes.sample("train", index, c.seed) for index in range(c.scenes)], side, pixels
    )
    model = Reader(c.language, word_ids(processor), tuple(map(int, digit_ids(processor).flat)))
    vit, vision, reader = ViT(c.vision), *(jax.tree.map(jnp.array, x) for x in (vision, reader))
    tx = optimiser(c.align_rate, c.align_steps)
    state = tx.init(vision)

    def errors(vision, image, fields, code):
        told = standard(model.apply({"params": reader}, fields, code, method=model.tell))
        x_BPD, _, _ = vit.apply({"params": vision}, normalise(image, mean, std))
        square_BP = jnp.square(standard(x_BPD[:, 1:]) - told).mean(-1)
        centre_BP = fields[..., 4] == 2
        return square_BP, centre_BP

    def loss_of(vision, *arrays):
        square_BP, centre_BP = errors(vision, *arrays)
        weight_BP = 1.0 + 5.0 * centre_BP
        return (square_BP * weight_BP).sum() / weight_BP.sum()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(vision, state, *arrays):
        loss, grads = jax.value_and_grad(loss_of)(vision, *arrays)
        updates, state = tx.update(grads, state, vision)
        return optax.apply_updates(vision, updates), state, loss

    rng, begun = np.random.default_rng(c.seed), time.time()
    for number in range(c.align_steps):
        rows = rng.integers(0, c.scenes, c.vision_batch)
        image, field, box = mirrored(images[rows], fields[rows], boxes[rows], rng.integers(0, 8))
        vision, state, loss = step(vision, state, image, field, box_code(box))
        if number % 100 == 99:
            log.info("align step %d loss %.4f %.0f s", number, loss, time.time() - begun)
    image, field, box = seen(
        [scenes.sample("heldout", index, c.seed) for index in range(300)], side, pixels
    )
    square_BP, centre_BP = jax.jit(errors)(vision, image, field, box_code(box))
    figures = {
        "unexplained_centre": float(square_BP[centre_BP].mean()),
        "unexplained_rest": float(square_BP[~centre_BP].mean()),
    }
    return vision, {name: round(value, 4) for name, value in figures.items()}


def seen(made, side: int, pixels: int):
    """Pictures and patch facts of scenes, stacked."""
    images = np.stack([scene.render(pixels) for scene in made])
    fields, boxes = zip(*(patch_facts(scene, side, pixels) for scene in made), strict=True)
    return images, np.stack(fields), np.stack(boxes)


def judge_vision(params, painter, test, mean, std) -> dict:
    """Accuracy of each field at centre patches, of roles everywhere, and the mean error of an edge."""
    image_NHWC, fields_NP6, box_NP4 = test
    run = jax.jit(
        lambda params, image: painter.apply({"params": params}, normalise(image, mean, std))
    )
    parts = [run(params, image_NHWC[at : at + 100]) for at in range(0, len(image_NHWC), 100)]
    outs = [
        np.concatenate([np.asarray(part[number]) for part in parts])
        for number in range(len(FIELDS) + 1)
    ]
    centre_NP = fields_NP6[..., 4] == 2
    right = {
        name: float((outs[number].argmax(-1) == fields_NP6[..., number])[centre_NP].mean())
        for number, name in enumerate(ATTRIBUTES)
    }
    role_NP = outs[4].argmax(-1)
    right["centre_recall"] = float((role_NP == 2)[centre_NP].mean())
    right["centre_precision"] = float(centre_NP[role_NP == 2].mean())
    edges_NP4 = (outs[-1].reshape(*outs[-1].shape[:2], 4, -1)[..., -1] + 1) / 2
    right["edge_error"] = float(np.abs(edges_NP4 - box_NP4)[centre_NP].mean())
    return {name: round(value, 4) for name, value in right.items()}


class Reader(nn.Module):
    """The T5 under training. A fact is the embedding of its word, so a thing's vector is the sum of its words', of its
    box's decimals' and of a code of the box; a match between a question and a thing is then one of like with like."""

    c: T5Config
    words: tuple[tuple[int, ...], ...]  # ids of every value's word, field by field
    digits: tuple[int, ...]  # ids of the decimals, place by place

    def setup(self):
        self.language = T5(self.c)
        self.code = nn.Dense(self.c.width, kernel_init=normal(0.2))
        self.roles = self.param("roles", normal(1.0), (len(ROLES), self.c.width))

    def tell(self, fields_BS6, box_code_BSC):
        """Facts as vectors: (B, S, D). A thing speaks once, where its centre is, so that it can be counted."""
        said = [
            self.language.embed(np.array(ids))[fields_BS6[..., k]]
            for k, ids in enumerate(self.words)
        ]
        digits_CD = self.language.embed(np.array(self.digits))
        loud = np.tile(np.repeat([1.0, 0.5], DIGITS), PLACES // 2)  # first and second decimals
        spelled_BSD = box_code_BSC[..., : len(loud)] * loud @ digits_CD
        thing_BSD = sum(said[:4]) + spelled_BSD + self.code(box_code_BSC[..., len(loud) :])
        centre_BS1 = (fields_BS6[..., 4] == 2)[..., None]
        return jnp.where(centre_BS1, thing_BSD, said[5]) + self.roles[fields_BS6[..., 4]]

    def __call__(
        self, fields_BS6, box_code_BSC, prompt_BL, prompt_mask_BL, target_BM, target_mask_BM
    ):
        words_BLD, mask_BL = self.language.embed(prompt_BL), prompt_mask_BL
        if fields_BS6 is not None:
            told_BSD = self.tell(fields_BS6, box_code_BSC)
            words_BLD = jnp.concatenate([told_BSD, words_BLD], axis=1)
            mask_BL = jnp.concatenate([jnp.ones(told_BSD.shape[:2], bool), mask_BL], axis=1)
        encoded_BLD = self.language.encode(words_BLD, mask_BL)
        inputs_BM = shift_right(target_BM, self.c.start_token)
        return self.language.decode(inputs_BM, target_mask_BM, encoded_BLD, mask_BL)


def word_ids(processor: Processor) -> tuple[tuple[int, ...], ...]:
    """The first token of every value's word."""
    encode = processor.tokenizer.encode
    return tuple(tuple(encode(value)[0] for value in values) for values in FIELDS.values())


# Tasks whose answers have about one length stand in one batch, so that little of it is padding.
GROUPS = {
    "drill": (("drill", 3), ("edge", 1), ("compare", 3)),
    "places": (("places", 1),),
    "short": (
        *(("vqa", 4), ("count", 4), ("yesno", 3), ("relation", 2), ("existence", 1)),
        ("one_edge", 1),
    ),
    "box": (("rec", 3), ("res", 1), ("place", 1)),
    "middle": (("reg", 1), ("tags", 1), ("conversation", 2), ("whose", 1)),
    "long": (("caption", 2), ("grounded", 1)),
}
LENGTHS = {"drill": 29, "places": 84, "short": 3, "box": 21, "middle": 24, "long": 88}
PROMPTS = {"drill": 26, "places": 16, "short": 20, "box": 20, "middle": 72, "long": 14}
GROUP_ODDS = (0.2, 0.04, 0.5, 0.16, 0.06, 0.04)
DRILLS = {
    "drill": drill,
    "edge": edge,
    "one_edge": one_edge,
    "compare": compare,
    "place": place,
    "places": places,
    "whose": whose,
    "count": functools.partial(tasks.vqa, kind="count"),  # the two hardest kinds, more often
    "yesno": functools.partial(tasks.vqa, kind="yesno"),
}
TAGS, SCENE = 50, 240  # tokens that LION's sentence about tags, or a scene in words, takes more


def language_batch(
    c: BackbonesConfig, made, told, rng, processor: Processor, how: str, group: str, rows: int
):
    """One batch of scenes told as `things`, `patches` or `text`; `hinted` ones come with tags."""
    names, odds = zip(*GROUPS[group], strict=True)
    prompts, answers, facts_of = [], [], []
    for index in rng.integers(0, len(made), rows):
        task = str(rng.choice(names, p=np.array(odds) / sum(odds)))
        noise = rng.choice([0.0, 0.1, 0.3])
        example = (
            DRILLS[task](made[index], rng)
            if task in DRILLS
            else tasks.converse(task, made[index], rng, noise)
        )
        question = (
            f"{tasks.describe(made[index], rng)}. {example.question}"
            if how == "text"
            else example.question
        )
        hinted = "hinted" in how and task != "tags"
        answer = (
            edge_ids(processor, example)
            if example.task == "edge"
            else processor.target(example.answer)
        )
        prompts.append(processor.prompt(question, example.tags if hinted else ()))
        answers.append(answer)
        facts_of.append(told[index])
    if how in ("things", "hinted"):
        facts_of = [few_things(*pair, rng) for pair in facts_of]
    fields, code = None, None
    if how != "text":
        fields = np.stack([pair[0] for pair in facts_of])
        boxes = np.stack([pair[1] for pair in facts_of])
        blur = rng.choice([0.003, 0.01, 0.02], (rows, 1, 1))
        code = box_code(np.clip(boxes + blur * rng.normal(size=boxes.shape), 0, 1))
    prompt_BL, prompt_mask_BL = padded(
        prompts, PROMPTS[group] + SCENE * (how == "text") + TAGS * ("hinted" in how)
    )
    target_BM, target_mask_BM = padded(answers, LENGTHS[group])
    return fields, code, prompt_BL, prompt_mask_BL, target_BM, target_mask_BM


def padded(rows, length: int):
    """Lists of ids, cut and padded on the right: (B, length) ids and mask."""
    ids = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for at, row in enumerate(rows):
        row = row[:length]
        ids[at, : len(row)], mask[at, : len(row)] = row, True
    return ids, mask


def looking_for_like(language: dict, c: T5Config) -> dict:
    """First weights: every attention looks for what is like its query and copies it, and the head reads words.

    Small T5s find this out by themselves only after thousands of steps on a plateau.
    """

    keys = iter(jax.random.split(jax.random.key(0), 64))

    def begin(node):
        if "q" not in node:
            return {
                name: begin(part) if isinstance(part, dict) else part for name, part in node.items()
            }
        shape = node["k"]["kernel"].shape  # (layers, D, N, H)
        square = jax.nn.initializers.orthogonal(column_axis=-1)
        like, copied = (
            jnp.stack(
                [square(next(keys), (shape[1], shape[2] * shape[3])) for _ in range(shape[0])]
            ).reshape(shape)
            for _ in range(2)
        )
        like = like * c.head**-0.25 * SHARPNESS**0.5
        parts = {"q": like, "k": like.copy(), "v": copied, "o": jnp.moveaxis(copied, -3, -1)}
        return node | {name: {"kernel": kernel} for name, kernel in parts.items()}

    table_VD = language["embedding"]["table"]
    return begin(language) | {"head": {"kernel": table_VD.T * c.width**-0.5}}


def train_language(
    c: BackbonesConfig, start: dict | None = None, keep: Path | None = None
) -> tuple[dict, dict]:
    """Parameters of the `Reader` and its figures on held-out scenes that it is told patch by patch.

    From `start` on, such parameters or {"language": ...} alone, only the second schedule runs. Now and then everything
    under training is written to `keep`.
    """
    processor = Processor(ProcessorConfig(c.vision.image, prompt_length=PROMPTS["middle"] + SCENE))
    side, pixels = c.vision.image // c.vision.patch, c.vision.image
    made = [scenes.sample("train", index, c.seed) for index in range(c.scenes)]
    told = [patch_facts(scene, side, pixels) for scene in made]
    test = [scenes.sample("heldout", index, c.seed) for index in range(400)]
    test_told = [patch_facts(scene, side, pixels) for scene in test]
    digits, rng = digit_ids(processor), np.random.default_rng(c.seed)
    reader = Reader(c.language, word_ids(processor), tuple(map(int, digits.flat)))
    batch = functools.partial(language_batch, c, made, told, rng, processor)
    example = batch("things", "short", 2)
    params = nn.unbox(jax.jit(reader.init)(jax.random.key(c.seed), *example)["params"])
    params["language"] = looking_for_like(params["language"], c.language)
    first = [] if start else [(c.language_steps, c.language_rate, 0.0)]
    params |= start or {}

    def judge(params):
        figures = judge_language(c, params, reader, test, test_told, processor)
        log.info("language %s", figures)
        if keep is not None:
            save(params, "reader", keep)
        return figures

    for steps, rate, patches in (*first, (c.again_steps, c.again_rate, c.patch_share)):
        log.info("language: %d steps, %.0f%% of them by patches", steps, 100 * patches)
        params = learn_language(c, reader, params, batch, rng, steps, rate, patches, judge, digits)
        figures = judge(params)
    return params, figures


def edge_ids(processor: Processor, example) -> list[int]:
    """The answer to `told.edge`: decimals as they stand in boxes, behind their names if there are several."""
    comma, end = processor.tokenizer.id(","), processor.tokenizer.end_id
    found = []
    for name, box in zip(example.answers, example.boxes, strict=True):
        edge, decimal = divmod(int(example.kind), 2)
        said = processor.target(name)[:-1] if len(example.boxes) > 1 else []
        found += [*said, processor.target(box_text(box))[1 + 4 * edge + decimal], comma]
    return [*found[:-1], end]


def digit_ids(processor: Processor) -> np.ndarray:
    """Ids of the pieces for every decimal of every edge: (PLACES, DIGITS)."""
    boxes = [
        processor.target(f"[{','.join([f'0.{digit}{digit}0'] * 4)}]") for digit in range(DIGITS)
    ]
    at = [1 + 4 * (place // 2) + place % 2 for place in range(PLACES)]
    return np.array(boxes)[:, at].T


def decimal_weight(target_BM, digits_PV):
    """How much each token counts: first decimals most; third ones, which nobody can see, hardly at all."""
    first_BM, second_BM = (jnp.isin(target_BM, digits_PV[decimal::2]) for decimal in range(2))
    third_BM = jnp.pad(second_BM, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(first_BM, 2.0, jnp.where(third_BM, 0.15, 1.0))


def learn_language(
    c,
    reader: Reader,
    params,
    batch,
    rng,
    steps: int,
    rate: float,
    patches: float,
    judge,
    digits_PV: np.ndarray,
):
    """One schedule; `judge` is called every thousand steps."""
    tx = optimiser(rate, steps)
    state = tx.init(params)

    def loss_of(params, arrays):
        logits_BMV = reader.apply({"params": params}, *arrays)
        weight_BM = arrays[5] * decimal_weight(arrays[4], digits_PV)
        return token_cross_entropy(logits_BMV, arrays[4], weight_BM)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, arrays):
        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params, arrays)
        updates, state = tx.update(grads, state, params)
        moved = optax.apply_updates(params, updates)
        if c.words_stay:
            table = {"embedding": params["language"]["embedding"]}
            moved = params | {"language": moved["language"] | table}
        return moved, state, loss, metrics["token_accuracy"]

    shares = {
        "text": c.text_share,
        "hinted": c.hinted_share,
        "hinted patches": c.hinted_share * (patches > 0),
        "patches": patches,
    }

    def next_batch():
        how = str(rng.choice([*shares, "things"], p=[*shares.values(), 1 - sum(shares.values())]))
        group = str(rng.choice(list(GROUPS), p=GROUP_ODDS))
        rows = c.language_batch // {"text": 2, "patches": 2, "hinted patches": 3}.get(how, 1)
        return how, group, batch(how, group, rows)

    begun, sums = time.time(), {}
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        waiting = collections.deque(ahead.submit(next_batch) for _ in range(3))
        for number in range(steps):
            how, group, arrays = waiting.popleft().result()
            waiting.append(ahead.submit(next_batch))
            params, state, loss, right = step(params, state, arrays)
            sums.setdefault(f"{how} {group}", []).append((loss, right))
            if number % 200 == 199:
                text = ", ".join(
                    f"{name} {np.mean(jax.device_get(v), 0).round(3)}"
                    for name, v in sorted(sums.items())
                )
                log.info("language step %d %.0f s: %s", number, time.time() - begun, text)
                sums = {}
            if number % 1000 == 999:
                judge(params)
        for left in waiting:
            left.cancel()
    return params


def judge_language(c: BackbonesConfig, params, reader, test, told, processor: Processor) -> dict:
    """Share of held-out answers of a word or two that are right, by kind of question; scenes told patch by patch.

    Of `rec`, the share of boxes with an IoU of a half or more, each digit said after the true ones before it.
    """
    rng = np.random.default_rng(1)
    run = jax.jit(lambda params, arrays: reader.apply({"params": params}, *arrays).argmax(-1))
    figures: dict[str, list] = {}
    for at in range(0, len(test), 100):
        for kind in ("color", "shape", "count", "yesno", "relation", "existence", "rec"):
            part = test[at : at + 100]
            make = tasks.TASKS.get(kind) or functools.partial(tasks.vqa, kind=kind)
            examples = [make(scene, rng) for scene in part]
            prompt, prompt_mask = padded(
                [processor.prompt(e.question) for e in examples], PROMPTS["short"]
            )
            answers = [processor.target(e.answer) for e in examples]
            target, mask = padded(answers, LENGTHS["box"])
            fields = np.stack([pair[0] for pair in told[at : at + 100]])
            code = box_code(np.stack([pair[1] for pair in told[at : at + 100]]))
            ids = np.asarray(run(params, (fields, code, prompt, prompt_mask, target, mask)))
            right = ((ids == target) | ~mask).all(1)
            if kind == "rec":
                said = [processor.tokenizer.decode(row[: len(answers[0])]) for row in ids]
                boxes = [metrics.parse_box(text) or (0, 0, 0, 0) for text in said]
                right = metrics.iou(boxes, [e.boxes[0] for e in examples]) >= 0.5
            figures.setdefault(kind, []).append(right.mean())
    return {kind: round(float(np.mean(values)), 3) for kind, values in figures.items()}


def load(file: Path) -> dict:
    """What `save` wrote, under its prefix; parts of a `reader`, and what it was `told` with, stand by themselves."""
    flat = safetensors.numpy.load_file(file)
    tree = trees.unflatten({path: leaf.astype(np.float32) for path, leaf in flat.items()})
    return tree.get("reader", tree.get("told", tree))


def save(params: dict, prefix: str, file: Path) -> None:
    """One part of a system as safetensors, by our paths."""
    flat = {
        f"{prefix}/{path}": np.asarray(leaf, np.float32)
        for path, leaf in trees.flatten(params).items()
    }
    partial = file.with_suffix(".partial")
    safetensors.numpy.save_file(flat, partial)
    partial.rename(file)
