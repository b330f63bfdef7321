# SPDX-License-Identifier: Apache-2.0
"""A small T5, and a small decoder, that can talk about scenes. They never see a picture.

They learn the tasks from scenes told in words, and from scenes given as sets of vectors, one for each thing or patch:
the sum of its words' embeddings and a code of its box. The decoder is told with the T5's words and code.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import logging
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.data.scenes import tasks, world
from lionjax.data.scenes.tasks import box_to_text
from lionjax.evaluation.metrics import regions as metrics
from lionjax.models.language import decoder
from lionjax.models.language.decoder import Decoder, DecoderConfig
from lionjax.models.language.t5 import T5, T5Config, shift_right
from lionjax.nn.layers import normal
from lionjax.nn.losses import token_cross_entropy
from lionjax.tiny.exercises import (
    FIELDS,
    NUM_DIGIT_POSITIONS,
    NUM_DIGITS,
    ROLES,
    box_exercise,
    comparison_exercise,
    edge_exercise,
    encode_box,
    lookup_exercise,
    multi_box_exercise,
    patch_labels,
    region_exercise,
    sample_patches,
    single_edge_exercise,
)
from lionjax.tiny.schedules import BackbonesConfig, LanguageSchedule, make_optimizer, save_params

log = logging.getLogger(__name__)

ATTENTION_SHARPNESS = 1.0  # of the first attention, see `looking_for_like`

# Tasks whose answers have about one length stand in one batch, so that little of it is padding.
TASK_GROUPS = {
    "drill": (("drill", 3), ("edge", 1), ("compare", 3)),
    "places": (("places", 1),),
    "short": (*(("vqa", 4), ("count", 4), ("yesno", 3), ("relation", 2), ("existence", 1)), ("one_edge", 1)),
    "box": (("rec", 3), ("res", 1), ("place", 1)),
    "middle": (("reg", 1), ("tags", 1), ("conversation", 2), ("whose", 1)),
    "long": (("caption", 2), ("grounded", 1)),
}
TARGET_LENGTHS = {"drill": 29, "places": 84, "short": 3, "box": 21, "middle": 24, "long": 88}
PROMPT_LENGTHS = {"drill": 26, "places": 16, "short": 20, "box": 20, "middle": 72, "long": 14}
GROUP_ODDS = (0.2, 0.04, 0.5, 0.16, 0.06, 0.04)
EXERCISES = {
    "drill": lookup_exercise,
    "edge": edge_exercise,
    "one_edge": single_edge_exercise,
    "compare": comparison_exercise,
    "place": box_exercise,
    "places": multi_box_exercise,
    "whose": region_exercise,
    "count": functools.partial(tasks.vqa, kind="count"),  # the two hardest kinds, more often
    "yesno": functools.partial(tasks.vqa, kind="yesno"),
}
TAG_TOKENS, SCENE_TOKENS = 50, 240  # tokens that LION's sentence about tags, or a scene in words, takes more


class SceneLanguageModel(nn.Module):
    """The language model under training. A fact is the embedding of its word, so a thing's vector is the sum of its
    words', of its box's decimals' and of a code of the box; a match between a question and a thing is then one of like
    with like."""

    c: T5Config | DecoderConfig
    field_token_ids: tuple[tuple[int, ...], ...]  # ids of every value's word, field by field
    digit_token_ids: tuple[int, ...]  # ids of the decimals, place by place

    def setup(self):
        self.language = T5(self.c) if isinstance(self.c, T5Config) else Decoder(self.c)
        self.code = nn.Dense(self.c.width, kernel_init=normal(0.2))
        self.roles = self.param("roles", normal(1.0), (len(ROLES), self.c.width))

    def embed_objects(self, fields_BS6, box_code_BSC):
        """Facts as vectors: (B, S, D). A thing speaks once, where its centre is, so that it can be counted."""
        said = [self.language.embed(np.array(ids))[fields_BS6[..., k]] for k, ids in enumerate(self.field_token_ids)]
        digits_CD = self.language.embed(np.array(self.digit_token_ids))
        loud = np.tile(np.repeat([1.0, 0.5], NUM_DIGITS), NUM_DIGIT_POSITIONS // 2)  # first and second decimals
        spelled_BSD = box_code_BSC[..., : len(loud)] * loud @ digits_CD
        thing_BSD = sum(said[:4]) + spelled_BSD + self.code(box_code_BSC[..., len(loud) :])
        centre_BS1 = (fields_BS6[..., 4] == 2)[..., None]
        return jnp.where(centre_BS1, thing_BSD, said[5]) + self.roles[fields_BS6[..., 4]]

    def __call__(self, fields_BS6, box_code_BSC, blur_BSD, prompt_BL, prompt_mask_BL, target_BM, target_mask_BM):
        words_BLD, mask_BL = self.language.embed(prompt_BL), prompt_mask_BL
        if fields_BS6 is not None:
            told_BSD = self.embed_objects(fields_BS6, box_code_BSC)
            told_BSD += blur_BSD * jax.lax.stop_gradient(told_BSD.std(-1, keepdims=True))
            words_BLD = jnp.concatenate([told_BSD, words_BLD], axis=1)
            mask_BL = jnp.concatenate([jnp.ones(told_BSD.shape[:2], bool), mask_BL], axis=1)
        if isinstance(self.c, DecoderConfig):
            return self.decoder_logits(words_BLD, mask_BL, target_BM, target_mask_BM)
        encoded_BLD = self.language.encode(words_BLD, mask_BL)
        inputs_BM = shift_right(target_BM, self.c.decoder_start_token_id)
        return self.language.decode(inputs_BM, target_mask_BM, encoded_BLD, mask_BL)

    def decoder_logits(self, inputs_BLD, mask_BL, target_BM, target_mask_BM):
        """A decoder's logits of the target, which stands behind what it was told."""
        length = inputs_BLD.shape[1]
        row_BLD = jnp.concatenate([inputs_BLD, self.language.embed(target_BM)], axis=1)
        state_BLD = self.language(row_BLD, jnp.concatenate([mask_BL, target_mask_BM], axis=1))
        first_BD = decoder.last_token(state_BLD[:, :length], mask_BL)
        before_BMD = jnp.concatenate([first_BD[:, None], state_BLD[:, length:-1]], axis=1)
        return self.language.logits(before_BMD)


def make_scene_model(c: T5Config | DecoderConfig, processor: Processor) -> SceneLanguageModel:
    """The language model and what it is told things with, by the tokenizer's words and decimals."""
    return SceneLanguageModel(c, field_token_ids(processor), tuple(map(int, digit_token_ids(processor).flat)))


def field_token_ids(processor: Processor) -> tuple[tuple[int, ...], ...]:
    """The first token of every value's word."""
    encode = processor.tokenizer.encode
    return tuple(tuple(encode(value)[0] for value in values) for values in FIELDS.values())


def digit_token_ids(processor: Processor) -> np.ndarray:
    """Ids of the pieces for every decimal of every edge: (PLACES, DIGITS)."""
    boxes = [processor.prompt.encode_target(f"[{','.join([f'0.{digit}{digit}0'] * 4)}]") for digit in range(NUM_DIGITS)]
    at = [1 + 4 * (place // 2) + place % 2 for place in range(NUM_DIGIT_POSITIONS)]
    return np.array(boxes)[:, at].T


def edge_answer_ids(processor: Processor, example) -> list[int]:
    """The answer to `told.edge`: decimals as they stand in boxes, behind their names if there are several."""
    comma, end = processor.tokenizer.token_to_id(","), processor.tokenizer.eos_id
    found = []
    for name, box in zip(example.answers, example.boxes, strict=True):
        edge, decimal = divmod(int(example.kind), 2)
        said = processor.prompt.encode_target(name)[:-1] if len(example.boxes) > 1 else []
        found += [*said, processor.prompt.encode_target(box_to_text(box))[1 + 4 * edge + decimal], comma]
    return [*found[:-1], end]


def make_language_batch(
    c: BackbonesConfig, scenes, labels, rng, processor: Processor, scene_input: str, group: str, batch_size: int
):
    """One batch of scenes told as `things`, `patches`, `text` or not (`blind`); `hinted` ones come with tags."""
    names, odds = zip(*TASK_GROUPS[group], strict=True)
    prompts, answers, facts_of = [], [], []
    for index in rng.integers(0, len(scenes), batch_size):
        task = str(rng.choice(names, p=np.array(odds) / sum(odds)))
        noise = rng.choice([0.0, 0.1, 0.3])
        example = (
            EXERCISES[task](scenes[index], rng)
            if task in EXERCISES
            else tasks.make_example(task, scenes[index], rng, noise)
        )
        question = (
            f"{tasks.scene_to_text(scenes[index], rng)}. {example.question}"
            if scene_input == "text"
            else example.question
        )
        hinted = "hinted" in scene_input and task != "tags"
        answer = (
            edge_answer_ids(processor, example) if example.task == "edge" else processor.prompt.encode_target(example.answer)
        )
        prompts.append(processor.prompt.encode_prompt(question, example.tags if hinted else ()))
        answers.append(answer)
        facts_of.append(labels[index])
    if scene_input in ("things", "hinted"):
        facts_of = [sample_patches(*pair, rng) for pair in facts_of]
    fields, code, blurs = None, None, None
    if scene_input not in ("text", "blind"):
        fields = np.stack([pair[0] for pair in facts_of])
        boxes = np.stack([pair[1] for pair in facts_of])
        blur = rng.choice([0.003, 0.01, 0.02], (batch_size, 1, 1))
        code = encode_box(np.clip(boxes + blur * rng.normal(size=boxes.shape), 0, 1))
        share = rng.choice([0.0, 0.15, 0.3], (batch_size, 1, 1)).astype(np.float32)
        blurs = share * rng.standard_normal((*boxes.shape[:2], c.language.width), np.float32)
    prompt_BL, prompt_mask_BL = pad_ids(
        prompts, PROMPT_LENGTHS[group] + SCENE_TOKENS * (scene_input == "text") + TAG_TOKENS * ("hinted" in scene_input)
    )
    target_BM, target_mask_BM = pad_ids(answers, TARGET_LENGTHS[group])
    return fields, code, blurs, prompt_BL, prompt_mask_BL, target_BM, target_mask_BM


def pad_ids(sequences, length: int):
    """Lists of ids, cut and padded on the right: (B, length) ids and mask."""
    ids = np.zeros((len(sequences), length), np.int32)
    mask = np.zeros((len(sequences), length), bool)
    for at, row in enumerate(sequences):
        row = row[:length]
        ids[at, : len(row)], mask[at, : len(row)] = row, True
    return ids, mask


def copy_attention_init(language: dict, c: T5Config | DecoderConfig) -> dict:
    """First weights: every attention looks for what is like its query and copies it, and the head reads words.

    Small language models find this out by themselves only after thousands of steps on a plateau.
    """

    keys = iter(jax.random.split(jax.random.key(0), 64))

    def begin(node):
        if "q" not in node:
            return {name: begin(part) if isinstance(part, dict) else part for name, part in node.items()}
        shape = node["k"]["kernel"].shape  # (layers, D, N, H)
        square = jax.nn.initializers.orthogonal(column_axis=-1)
        like, copied = (
            jnp.stack([square(next(keys), (shape[1], shape[2] * shape[3])) for _ in range(shape[0])]).reshape(shape)
            for _ in range(2)
        )
        like = like * (c.head_dim**-0.25 if isinstance(c, T5Config) else 1.0) * ATTENTION_SHARPNESS**0.5
        parts = {"q": like, "k": like.copy(), "v": copied, "o": jnp.moveaxis(copied, -3, -1)}
        return node | {name: {"kernel": kernel} for name, kernel in parts.items()}

    if isinstance(c, DecoderConfig):  # its head is its word table
        scale_D = language["norm"]["scale"] * c.width**-0.5
        return begin(language) | {"norm": {"scale": scale_D}}
    table_VD = language["embedding"]["table"]
    return begin(language) | {"head": {"kernel": table_VD.T * c.width**-0.5}}


def train_language(
    c: BackbonesConfig,
    init_params: dict | None = None,
    checkpoint_path: Path | None = None,
    last_schedule_only: bool = False,
) -> tuple[dict, dict]:
    """Parameters of the `Reader` and its figures on held-out scenes that it is told patch by patch.

    `start`: some of these parameters, to begin with instead of random ones. `again`: only the last schedule runs.
    Every thousand steps everything under training is written to `keep`.
    """
    reads = "encoder" if isinstance(c.language, T5Config) else "decoder"
    processor = Processor(
        ProcessorConfig(c.vision.image_size, max_prompt_tokens=PROMPT_LENGTHS["middle"] + SCENE_TOKENS, reader=reads)
    )
    side, pixels = c.vision.image_size // c.vision.patch_size, c.vision.image_size
    made = [world.sample_scene("train", index, c.seed) for index in range(c.num_scenes)]
    told = [patch_labels(scene, side, pixels) for scene in made]
    test = [world.sample_scene("heldout", index, c.seed) for index in range(400)]
    test_told = [patch_labels(scene, side, pixels) for scene in test]
    reader, rng = make_scene_model(c.language, processor), np.random.default_rng(c.seed)
    batch = functools.partial(make_language_batch, c, made, told, rng, processor)
    example = batch("things", "short", 2)
    axes = sharding.layer_axes(jax.eval_shape(reader.init, jax.random.key(c.seed), *example)["params"])
    params = nn.unbox(jax.jit(reader.init)(jax.random.key(c.seed), *example)["params"])
    params["language"] = copy_attention_init(params["language"], c.language)
    params = trees.unflatten(trees.flatten(params) | trees.flatten(init_params or {}))

    def judge(params):
        figures = evaluate_language(c, params, reader, test, test_told, processor)
        log.info("language %s", figures)
        if checkpoint_path is not None:
            save_params(params, "reader", checkpoint_path)
        return figures

    for schedule in c.language_schedules[-1:] if last_schedule_only else c.language_schedules:
        log.info("language: %s", schedule)
        params = run_language_schedule(c, schedule, reader, params, batch, rng, judge, axes)
        figures = judge(params)
    return params, figures


def digit_loss_weight(target_BM, digits_PV):
    """How much each token counts: first decimals most; third ones, which nobody can see, hardly at all."""
    first_BM, second_BM = (jnp.isin(target_BM, digits_PV[decimal::2]) for decimal in range(2))
    third_BM = jnp.pad(second_BM, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(first_BM, 2.0, jnp.where(third_BM, 0.15, 1.0))


def run_language_schedule(
    c: BackbonesConfig,
    schedule: LanguageSchedule,
    model: SceneLanguageModel,
    params,
    make_batch,
    rng,
    eval_fn,
    layer_axes=None,
):
    """Parameters after one schedule; `judge` is called with them every thousand steps."""
    tx = make_optimizer(schedule.learning_rate, schedule.steps, schedule.optimizer, params, layer_axes)
    state = tx.init(params)
    digits_PV = np.array(model.digit_token_ids).reshape(NUM_DIGIT_POSITIONS, NUM_DIGITS)

    def loss_of(params, arrays):
        logits_BMV = model.apply({"params": params}, *arrays)
        *_, target_BM, mask_BM = arrays
        weight_BM = mask_BM * digit_loss_weight(target_BM, digits_PV)
        return token_cross_entropy(logits_BMV, target_BM, weight_BM)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, arrays):
        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params, arrays)
        updates, state = tx.update(grads, state, params)
        moved = optax.apply_updates(params, updates)
        if schedule.freeze_embeddings:
            table = {"embedding": params["language"]["embedding"]}
            moved = params | {"language": moved["language"] | table}
        return moved, state, loss, metrics["token_accuracy"]

    shares = {
        "text": schedule.text_fraction,
        "blind": schedule.no_scene_fraction,
        "hinted": schedule.tag_fraction,
        "hinted patches": schedule.tag_fraction * (schedule.patch_fraction > 0),
        "patches": schedule.patch_fraction,
    }

    def next_batch():
        how = str(rng.choice([*shares, "things"], p=[*shares.values(), 1 - sum(shares.values())]))
        group = str(rng.choice(list(TASK_GROUPS), p=GROUP_ODDS))
        rows = c.language_batch_size // {"text": 2, "patches": 2, "hinted patches": 3}.get(how, 1)
        return how, group, make_batch(how, group, rows)

    begun, sums = time.time(), {}
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        waiting = collections.deque(ahead.submit(next_batch) for _ in range(3))
        for number in range(schedule.steps):
            how, group, arrays = waiting.popleft().result()
            waiting.append(ahead.submit(next_batch))
            params, state, loss, right = step(params, state, arrays)
            sums.setdefault(f"{how} {group}", []).append((loss, right))
            if number % 200 == 199:
                text = ", ".join(f"{name} {np.mean(jax.device_get(v), 0).round(3)}" for name, v in sorted(sums.items()))
                log.info("language step %d %.0f s: %s", number, time.time() - begun, text)
                sums = {}
            if number % 1000 == 999:
                eval_fn(params)
        for left in waiting:
            left.cancel()
    return params


def evaluate_language(c: BackbonesConfig, params, model, test_scenes, test_labels, processor: Processor) -> dict:
    """Share of held-out answers of a word or two that are right, by kind of question; scenes told patch by patch.

    Of `rec`, the share of boxes with an IoU of a half or more, each digit said after the true ones before it.
    """
    rng = np.random.default_rng(1)
    run = jax.jit(lambda params, arrays: model.apply({"params": params}, *arrays).argmax(-1))
    figures: dict[str, list] = {}
    for at in range(0, len(test_scenes), 100):
        for kind in ("color", "shape", "count", "yesno", "relation", "existence", "rec"):
            part = test_scenes[at : at + 100]
            make = tasks.TASKS.get(kind) or functools.partial(tasks.vqa, kind=kind)
            examples = [make(scene, rng) for scene in part]
            prompt, prompt_mask = pad_ids(
                [processor.prompt.encode_prompt(e.question) for e in examples], PROMPT_LENGTHS["short"]
            )
            answers = [processor.prompt.encode_target(e.answer) for e in examples]
            target, mask = pad_ids(answers, TARGET_LENGTHS["box"])
            fields = np.stack([pair[0] for pair in test_labels[at : at + 100]])
            code = encode_box(np.stack([pair[1] for pair in test_labels[at : at + 100]]))
            ids = np.asarray(run(params, (fields, code, 0.0, prompt, prompt_mask, target, mask)))
            right = ((ids == target) | ~mask).all(1)
            if kind == "rec":
                said = [processor.tokenizer.decode(row[: len(answers[0])]) for row in ids]
                boxes = [metrics.parse_box(text) or (0, 0, 0, 0) for text in said]
                right = metrics.iou(boxes, [e.boxes[0] for e in examples]) >= 0.5
            figures.setdefault(kind, []).append(right.mean())
    return {kind: round(float(np.mean(values)), 3) for kind, values in figures.items()}
