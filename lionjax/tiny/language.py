# SPDX-License-Identifier: Apache-2.0
"""Pretrains the tiny T5 and the tiny decoder on questions about synthetic scenes, without images.

The scenes are given as text, or as one vector per object or patch: the sum of the embeddings of its attributes' words
and a code of its box. The decoder is trained with the T5's embeddings and box code.
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
from lionjax.data.scenes import naming, tasks, world
from lionjax.data.scenes.tasks import box_to_text
from lionjax.evaluation.metrics import regions
from lionjax.models.language.decoder import Decoder, DecoderConfig
from lionjax.models.language.t5 import T5, T5Config, shift_right
from lionjax.nn.layers import normal
from lionjax.nn.losses import token_cross_entropy
from lionjax.nn.positions import last_token
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

ATTENTION_SHARPNESS = 1.0  # scale of the initial attention logits, see `copy_attention_init`

# Tasks with answers of similar length share a batch, to reduce padding.
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
    "count": functools.partial(tasks.vqa, kind="count"),  # extra weight for the two hardest kinds
    "yesno": functools.partial(tasks.vqa, kind="yesno"),
}
TAG_TOKENS, SCENE_TOKENS = 50, 240  # additional prompt length of LION's tag prompt, and of a scene as text


class SceneLanguageModel(nn.Module):
    """The language model with scene inputs.

    An object's vector is the sum of the embeddings of its attributes' words, of those of its box's decimals, and of a
    linear code of its box. A word of a question and the object it describes then have similar vectors.
    """

    c: T5Config | DecoderConfig
    field_token_ids: tuple[tuple[int, ...], ...]  # token ids of the values of each field
    digit_token_ids: tuple[int, ...]  # token ids of the digits, position by position

    def setup(self):
        self.language = T5(self.c) if isinstance(self.c, T5Config) else Decoder(self.c)
        self.code = nn.Dense(self.c.width, kernel_init=normal(0.2))
        self.roles = self.param("roles", normal(1.0), (len(ROLES), self.c.width))

    def embed_objects(self, fields_BS6, box_code_BSC):
        """Vectors (B, S, D) of objects or patches; only center patches hold attributes, so each object counts once."""
        values = [self.language.embed(np.array(ids))[fields_BS6[..., k]] for k, ids in enumerate(self.field_token_ids)]
        digits_CD = self.language.embed(np.array(self.digit_token_ids))
        weights = np.tile(np.repeat([1.0, 0.5], NUM_DIGITS), NUM_DIGIT_POSITIONS // 2)  # first and second decimals
        digits_BSD = box_code_BSC[..., : len(weights)] * weights @ digits_CD
        object_BSD = sum(values[:4]) + digits_BSD + self.code(box_code_BSC[..., len(weights) :])
        center_BS1 = (fields_BS6[..., 4] == 2)[..., None]
        return jnp.where(center_BS1, object_BSD, values[5]) + self.roles[fields_BS6[..., 4]]

    def __call__(self, fields_BS6, box_code_BSC, noise_BSD, prompt_BL, prompt_mask_BL, target_BM, target_mask_BM):
        """Logits (B, M, V) of the target. `noise_BSD`: in standard deviations of the scene's vectors."""
        input_BLD, mask_BL = self.language.embed(prompt_BL), prompt_mask_BL
        if fields_BS6 is not None:
            scene_BSD = self.embed_objects(fields_BS6, box_code_BSC)
            scene_BSD += noise_BSD * jax.lax.stop_gradient(scene_BSD.std(-1, keepdims=True))
            input_BLD = jnp.concatenate([scene_BSD, input_BLD], axis=1)
            mask_BL = jnp.concatenate([jnp.ones(scene_BSD.shape[:2], bool), mask_BL], axis=1)
        if isinstance(self.c, DecoderConfig):
            return self.decoder_logits(input_BLD, mask_BL, target_BM, target_mask_BM)
        encoded_BLD = self.language.encode(input_BLD, mask_BL)
        inputs_BM = shift_right(target_BM, self.c.decoder_start_token_id)
        return self.language.decode(inputs_BM, target_mask_BM, encoded_BLD, mask_BL)

    def decoder_logits(self, inputs_BLD, mask_BL, target_BM, target_mask_BM):
        """Logits (B, M, V) of the target after the inputs, for a decoder-only model."""
        length = inputs_BLD.shape[1]
        x_BLD = jnp.concatenate([inputs_BLD, self.language.embed(target_BM)], axis=1)
        state_BLD = self.language(x_BLD, jnp.concatenate([mask_BL, target_mask_BM], axis=1))
        first_BD = last_token(state_BLD[:, :length], mask_BL)
        previous_BMD = jnp.concatenate([first_BD[:, None], state_BLD[:, length:-1]], axis=1)
        return self.language.logits(previous_BMD)


def make_scene_model(c: T5Config | DecoderConfig, processor: Processor) -> SceneLanguageModel:
    """The SceneLanguageModel with the token ids of the processor's tokenizer."""
    return SceneLanguageModel(c, field_token_ids(processor), tuple(map(int, digit_token_ids(processor).flat)))


def field_token_ids(processor: Processor) -> tuple[tuple[int, ...], ...]:
    """The first token id of each value of each field."""
    encode = processor.tokenizer.encode
    return tuple(tuple(encode(value)[0] for value in values) for values in FIELDS.values())


def digit_token_ids(processor: Processor) -> np.ndarray:
    """Token ids of the digits in boxes by position: (NUM_DIGIT_POSITIONS, NUM_DIGITS)."""
    boxes = [processor.prompt.encode_target(f"[{','.join([f'0.{digit}{digit}0'] * 4)}]") for digit in range(NUM_DIGITS)]
    indices = [1 + 4 * (position // 2) + position % 2 for position in range(NUM_DIGIT_POSITIONS)]
    return np.array(boxes)[:, indices].T


def word_queries(table_VD: np.ndarray, processor: Processor) -> np.ndarray:
    """The embeddings (16, D) of the words for shapes and colors, as which the queries of a tiny MQ-Former start."""
    return np.stack([table_VD[processor.tokenizer.encode(word)[0]] for word in naming.WORDS])


def edge_answer_ids(processor: Processor, example) -> list[int]:
    """Token ids of the answer to an `edge_exercise`: tokens of box digits, after the names if there are several."""
    comma, end = processor.tokenizer.token_to_id(","), processor.tokenizer.eos_id
    ids = []
    for name, box in zip(example.answers, example.boxes, strict=True):
        edge, decimal = divmod(int(example.kind), 2)
        name_ids = processor.prompt.encode_target(name)[:-1] if len(example.boxes) > 1 else []
        ids += [*name_ids, processor.prompt.encode_target(box_to_text(box))[1 + 4 * edge + decimal], comma]
    return [*ids[:-1], end]


def make_language_batch(
    c: BackbonesConfig, scenes, labels, rng, processor: Processor, scene_input: str, group: str, batch_size: int
):
    """Arrays of one batch, the arguments of `SceneLanguageModel.__call__`.

    `scene_input`: "things" (center patches and some others), "patches" (all), "text", "blind" (no scene), "hinted" or
    "hinted patches" (things or patches with tags in the prompt). `group`: key of TASK_GROUPS. Boxes and vectors get
    random noise.
    """
    names, odds = zip(*TASK_GROUPS[group], strict=True)
    prompts, answers, patches = [], [], []
    for index in rng.integers(0, len(scenes), batch_size):
        task = str(rng.choice(names, p=np.array(odds) / sum(odds)))
        tag_noise = rng.choice([0.0, 0.1, 0.3])
        example = (
            EXERCISES[task](scenes[index], rng)
            if task in EXERCISES
            else tasks.make_example(task, scenes[index], rng, tag_noise)
        )
        question = (
            f"{tasks.scene_to_text(scenes[index], rng)}. {example.question}"
            if scene_input == "text"
            else example.question
        )
        with_tags = "hinted" in scene_input and task != "tags"
        if example.task == "edge":
            answer = edge_answer_ids(processor, example)
        else:
            answer = processor.prompt.encode_target(example.answer)
        prompts.append(processor.prompt.encode_prompt(question, example.tags if with_tags else ()))
        answers.append(answer)
        patches.append(labels[index])
    if scene_input in ("things", "hinted"):
        patches = [sample_patches(*pair, rng) for pair in patches]
    fields, code, noise = None, None, None
    if scene_input not in ("text", "blind"):
        fields = np.stack([pair[0] for pair in patches])
        boxes = np.stack([pair[1] for pair in patches])
        box_noise = rng.choice([0.003, 0.01, 0.02], (batch_size, 1, 1))
        code = encode_box(np.clip(boxes + box_noise * rng.normal(size=boxes.shape), 0, 1))
        scale = rng.choice([0.0, 0.15, 0.3], (batch_size, 1, 1)).astype(np.float32)
        noise = scale * rng.standard_normal((*boxes.shape[:2], c.language.width), np.float32)
    prompt_BL, prompt_mask_BL = pad_ids(
        prompts, PROMPT_LENGTHS[group] + SCENE_TOKENS * (scene_input == "text") + TAG_TOKENS * ("hinted" in scene_input)
    )
    target_BM, target_mask_BM = pad_ids(answers, TARGET_LENGTHS[group])
    return fields, code, noise, prompt_BL, prompt_mask_BL, target_BM, target_mask_BM


def pad_ids(sequences, length: int):
    """Lists of ids, truncated and padded on the right: ids (B, length), int32, and mask (B, length), bool."""
    ids = np.zeros((len(sequences), length), np.int32)
    mask = np.zeros((len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
        sequence = sequence[:length]
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, True
    return ids, mask


def copy_attention_init(language: dict, c: T5Config | DecoderConfig) -> dict:
    """Initial weights: each attention copies the inputs that are similar to its query; the head is the embedding table.

    From random weights, small language models spend thousands of steps on a loss plateau before they learn this.
    """

    keys = iter(jax.random.split(jax.random.key(0), 64))

    def init_attention(node):
        if "q" not in node:
            return {name: init_attention(part) if isinstance(part, dict) else part for name, part in node.items()}
        shape = node["k"]["kernel"].shape  # (layers, D, N, H)
        orthogonal = jax.nn.initializers.orthogonal(column_axis=-1)
        match, copy = (
            jnp.stack([orthogonal(next(keys), (shape[1], shape[2] * shape[3])) for _ in range(shape[0])]).reshape(shape)
            for _ in range(2)
        )
        match = match * (c.head_dim**-0.25 if isinstance(c, T5Config) else 1.0) * ATTENTION_SHARPNESS**0.5
        parts = {"q": match, "k": match.copy(), "v": copy, "o": jnp.moveaxis(copy, -3, -1)}
        return node | {name: {"kernel": kernel} for name, kernel in parts.items()}

    if isinstance(c, DecoderConfig):  # its head is tied to the embedding table
        scale_D = language["norm"]["scale"] * c.width**-0.5
        return init_attention(language) | {"norm": {"scale": scale_D}}
    table_VD = language["embedding"]["table"]
    return init_attention(language) | {"head": {"kernel": table_VD.T * c.width**-0.5}}


def train_language(
    c: BackbonesConfig,
    init_params: dict | None = None,
    checkpoint_path: Path | None = None,
    last_schedule_only: bool = False,
) -> tuple[dict, dict]:
    """Parameters of the SceneLanguageModel and its accuracy on held-out scenes given as patches.

    `init_params`: replaces part of the initial parameters. `last_schedule_only`: runs only the last schedule. The
    parameters are saved to `checkpoint_path` every 1,000 steps.
    """
    reader = "encoder" if isinstance(c.language, T5Config) else "decoder"
    processor = Processor(
        ProcessorConfig(c.vision.image_size, max_prompt_tokens=PROMPT_LENGTHS["middle"] + SCENE_TOKENS, reader=reader)
    )
    side, pixels = c.vision.image_size // c.vision.patch_size, c.vision.image_size
    scenes = [world.sample_scene("train", index, c.seed) for index in range(c.num_scenes)]
    labels = [patch_labels(scene, side, pixels) for scene in scenes]
    test_scenes = [world.sample_scene("heldout", index, c.seed) for index in range(400)]
    test_labels = [patch_labels(scene, side, pixels) for scene in test_scenes]
    model, rng = make_scene_model(c.language, processor), np.random.default_rng(c.seed)
    make_batch = functools.partial(make_language_batch, c, scenes, labels, rng, processor)
    example = make_batch("things", "short", 2)
    axes = sharding.layer_axes(jax.eval_shape(model.init, jax.random.key(c.seed), *example)["params"])
    params = nn.unbox(jax.jit(model.init)(jax.random.key(c.seed), *example)["params"])
    params["language"] = copy_attention_init(params["language"], c.language)
    params = trees.unflatten(trees.flatten(params) | trees.flatten(init_params or {}))

    def evaluate(params):
        figures = evaluate_language(c, params, model, test_scenes, test_labels, processor)
        log.info("language %s", figures)
        if checkpoint_path is not None:
            save_params(params, "reader", checkpoint_path)
        return figures

    for schedule in c.language_schedules[-1:] if last_schedule_only else c.language_schedules:
        log.info("language: %s", schedule)
        params = run_language_schedule(c, schedule, model, params, make_batch, rng, evaluate, axes)
        figures = evaluate(params)
    return params, figures


def digit_loss_weight(target_BM, digits_PV):
    """Loss weight of each token: 2 for first decimals, 0.15 for third ones (below the image's resolution), else 1."""
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
    """Train with one schedule; returns the parameters. `eval_fn(params)` is called every 1,000 steps."""
    tx = make_optimizer(schedule.learning_rate, schedule.steps, schedule.optimizer, params, layer_axes)
    state = tx.init(params)
    digits_PV = np.array(model.digit_token_ids).reshape(NUM_DIGIT_POSITIONS, NUM_DIGITS)

    def loss_fn(params, arrays):
        logits_BMV = model.apply({"params": params}, *arrays)
        *_, target_BM, mask_BM = arrays
        weight_BM = mask_BM * digit_loss_weight(target_BM, digits_PV)
        return token_cross_entropy(logits_BMV, target_BM, weight_BM)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, arrays):
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, arrays)
        updates, state = tx.update(grads, state, params)
        updated = optax.apply_updates(params, updates)
        if schedule.freeze_embeddings:
            table = {"embedding": params["language"]["embedding"]}
            updated = params | {"language": updated["language"] | table}
        return updated, state, loss, metrics["token_accuracy"]

    fractions = {
        "text": schedule.text_fraction,
        "blind": schedule.no_scene_fraction,
        "hinted": schedule.tag_fraction,
        "hinted patches": schedule.tag_fraction * (schedule.patch_fraction > 0),
        "patches": schedule.patch_fraction,
    }

    def next_batch():
        scene_input = str(rng.choice([*fractions, "things"], p=[*fractions.values(), 1 - sum(fractions.values())]))
        group = str(rng.choice(list(TASK_GROUPS), p=GROUP_ODDS))
        batch_size = c.language_batch_size // {"text": 2, "patches": 2, "hinted patches": 3}.get(scene_input, 1)
        return scene_input, group, make_batch(scene_input, group, batch_size)

    start_time, metrics = time.time(), {}
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        pending = collections.deque(executor.submit(next_batch) for _ in range(3))
        for step in range(schedule.steps):
            scene_input, group, arrays = pending.popleft().result()
            pending.append(executor.submit(next_batch))
            params, state, loss, accuracy = train_step(params, state, arrays)
            metrics.setdefault(f"{scene_input} {group}", []).append((loss, accuracy))
            if step % 200 == 199:
                means = {name: np.mean(jax.device_get(pairs), 0).round(3) for name, pairs in sorted(metrics.items())}
                text = ", ".join(f"{name} {mean}" for name, mean in means.items())
                log.info("language step %d %.0f s: loss and accuracy: %s", step, time.time() - start_time, text)
                metrics = {}
            if step % 1000 == 999:
                eval_fn(params)
        for future in pending:
            future.cancel()
    return params


def evaluate_language(c: BackbonesConfig, params, model, test_scenes, test_labels, processor: Processor) -> dict:
    """Accuracy on held-out scenes given as patches, by kind of question, with teacher forcing.

    For "rec" the fraction of boxes with an IoU of at least 0.5.
    """
    rng = np.random.default_rng(1)
    predict = jax.jit(lambda params, arrays: model.apply({"params": params}, *arrays).argmax(-1))
    figures: dict[str, list] = {}
    for start in range(0, len(test_scenes), 100):
        for kind in ("color", "shape", "count", "yesno", "relation", "existence", "rec"):
            make_example = tasks.TASKS.get(kind) or functools.partial(tasks.vqa, kind=kind)
            examples = [make_example(scene, rng) for scene in test_scenes[start : start + 100]]
            prompt, prompt_mask = pad_ids(
                [processor.prompt.encode_prompt(e.question) for e in examples], PROMPT_LENGTHS["short"]
            )
            answers = [processor.prompt.encode_target(e.answer) for e in examples]
            target, mask = pad_ids(answers, TARGET_LENGTHS["box"])
            fields = np.stack([pair[0] for pair in test_labels[start : start + 100]])
            code = encode_box(np.stack([pair[1] for pair in test_labels[start : start + 100]]))
            ids = np.asarray(predict(params, (fields, code, 0.0, prompt, prompt_mask, target, mask)))
            correct = ((ids == target) | ~mask).all(1)
            if kind == "rec":
                texts = [processor.tokenizer.decode(row[: len(answers[0])]) for row in ids]
                boxes = [regions.parse_box(text) or (0, 0, 0, 0) for text in texts]
                correct = regions.iou(boxes, [e.boxes[0] for e in examples]) >= 0.5
            figures.setdefault(kind, []).append(correct.mean())
    return {kind: round(float(np.mean(values)), 3) for kind, values in figures.items()}
