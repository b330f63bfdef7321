# SPDX-License-Identifier: Apache-2.0
"""Pretrains box embeddings for the frozen tiny T5: the trigger token's embedding, box encoder and box decoder.

NExT-Chat (arXiv 2311.04498) trains its new tokens together with the language model. LION's language model is frozen, so
the embedding of the trigger token is pretrained here, on scenes given as patch embeddings; all other weights of the T5
are frozen.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lionjax.core import params as trees
from lionjax.core.renamed import renamed_fields
from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.data.scenes import tasks, world
from lionjax.models.heads import region
from lionjax.models.heads.region import BoxEncoderDecoder, RegionHeadConfig
from lionjax.models.language.backend import token_loss
from lionjax.tiny.exercises import encode_box, patch_labels
from lionjax.tiny.language import SceneLanguageModel, make_scene_model
from lionjax.tiny.schedules import BackbonesConfig, HeadsSchedule, make_optimizer

log = logging.getLogger(__name__)

TASKS = (("rec", 0.5), ("grounded", 0.1), ("reg", 0.2), ("box_vqa", 0.2))
NOISE_LEVELS = (0.0, 0.15, 0.3)  # of the patch embeddings, as fractions of their standard deviation


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class BoxHeadsSchedule(HeadsSchedule):
    """Training of the trigger embedding and the box encoder and decoder; half of the questions have tags."""

    num_scenes: int = 8_000
    steps: int = 700
    batch_size: int = 32
    learning_rate: float = 3e-3
    max_boxes: int = 6


class SceneRegionModel(nn.Module):
    """The scene language model with boxes as embeddings; `trigger` is the embedding of the trigger token."""

    reader: SceneLanguageModel
    region_config: RegionHeadConfig

    def setup(self):
        width = self.reader.c.width
        self.told = self.reader.copy(name="told")
        self.locations = BoxEncoderDecoder(width, self.region_config.box_mlp_dim)
        self.trigger = self.param("trigger", nn.initializers.normal(1.0), (width,))

    def embed_text(self, ids_BL, batch, first_B=0):
        c = self.region_config
        x_BLD = self.told.language.embed(ids_BL)
        x_BLD = jnp.where((ids_BL == c.trigger_token_id)[..., None], self.trigger, x_BLD)
        box_BKD = self.locations.encode(batch.boxes_BK4)
        return region.scatter_embeddings(x_BLD, ids_BL == c.box_token_id, box_BKD, first_B)

    def __call__(self, batch, fields_BP6, code_BPC, noise_BPD):
        """(loss, mean IoU of the boxes decoded at the trigger tokens)."""
        c, language = self.region_config, self.told.language
        patch_BPD = self.told.embed_objects(fields_BP6, code_BPC)
        patch_BPD += noise_BPD * patch_BPD.std(-1, keepdims=True)
        input_BLD = jnp.concatenate([patch_BPD, self.embed_text(batch.prompt_BL, batch)], axis=1)
        patch_mask_BP = jnp.ones(patch_BPD.shape[:2], bool)
        mask_BL = jnp.concatenate([patch_mask_BP, batch.prompt_mask_BL.astype(bool)], axis=1)
        encoded_BLD = language.encode(input_BLD, mask_BL)
        first_B = (batch.prompt_BL == c.box_token_id).sum(axis=1)
        start_B1 = jnp.full_like(batch.target_BM[:, :1], self.reader.c.decoder_start_token_id)
        target_BMD = self.embed_text(batch.target_BM, batch, first_B)
        x_BMD = jnp.concatenate([language.embed(start_B1), target_BMD], axis=1)
        valid_BM = jnp.pad(batch.target_mask_BM, ((0, 0), (1, 0)), constant_values=1)
        state_BMD = language.hidden_states(x_BMD, valid_BM, encoded_BLD, mask_BL)
        # The frozen output head cannot predict the trigger token.
        loss_mask_BM = batch.loss_mask_BM * (batch.target_BM != c.trigger_token_id)
        text_batch = dataclasses.replace(batch, loss_mask_BM=loss_mask_BM)
        targets = (text_batch.target_BM, region.text_loss_mask(c, text_batch))
        loss, _ = token_loss(language, state_BMD[:, :-1], *targets)
        queries = region.gather_region_queries(c, batch, state_BMD[:, 1:])
        terms, metrics = region.box_losses(c, self.locations, batch, queries)
        return loss + sum(terms.values()), metrics["box_iou"]


def make_box_batch(sampled_scenes, labels, batch_size: int, rng, processor: Processor, width: int):
    """Questions with boxes about scenes: a `Batch` with blank images, patch fields, box codes and embedding noise."""
    names, odds = zip(*TASKS, strict=True)
    rows, row_labels, blank = [], [], np.zeros((1, 1, 3), np.uint8)
    for index in rng.integers(0, len(sampled_scenes), batch_size):
        example = tasks.make_example(str(rng.choice(names, p=odds)), sampled_scenes[index], rng, 0.1)
        tags = example.tags if rng.random() < 0.5 else ()
        boxes = (*example.question_boxes, *example.boxes)
        args = (blank, example.question, tags, example.answer, example.category, boxes)
        rows.append(processor.encode_example(*args))
        row_labels.append(labels[index])
    batch = processor.collate({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    fields, boxes = (np.stack(parts) for parts in zip(*row_labels, strict=True))
    scale = rng.choice(NOISE_LEVELS, (batch_size, 1, 1)).astype(np.float32)
    noise = scale * rng.standard_normal((*boxes.shape[:2], width), np.float32)
    return batch, fields, encode_box(boxes), noise


def train_box_heads(
    c: BackbonesConfig, schedule: BoxHeadsSchedule, region_config: RegionHeadConfig, reader_params: dict
) -> tuple[dict, np.ndarray, dict]:
    """Parameters of the BoxEncoderDecoder, the trigger's embedding, and metrics on held-out scenes given as patches.

    `reader_params`: the parameters from `train_language`; they are frozen.
    """
    config = ProcessorConfig(
        c.vision.image_size,
        max_prompt_tokens=72,
        max_question_tokens=28,
        max_target_tokens=40,
        pad_to_square=True,
        box_format="embeddings",
        max_boxes=schedule.max_boxes,
    )
    processor, rng = Processor(config), np.random.default_rng(c.seed)
    side, pixels = c.vision.image_size // c.vision.patch_size, c.vision.image_size

    def sample_scenes(split: str, count: int):
        sampled = [world.sample_scene(split, index, c.seed) for index in range(count)]
        return sampled, [patch_labels(scene, side, pixels) for scene in sampled]

    digits = Processor(ProcessorConfig(c.vision.image_size))
    model = SceneRegionModel(make_scene_model(c.language, digits), region_config)
    make_batch = functools.partial(make_box_batch, processor=processor, width=c.language.width)
    train, test = sample_scenes("train", schedule.num_scenes), sample_scenes("heldout", min(200, schedule.num_scenes))
    example = make_batch(*train, 2, rng)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(c.seed), *example)["params"])
    trainable, frozen = trees.split(params | {"told": reader_params}, ("locations", "trigger"))
    # Initialized with the first token of a box in digits.
    first_token = digits.prompt.encode_target("[0.123,0.234,0.345,0.456]")[0]
    trainable["trigger"] = jnp.array(reader_params["language"]["embedding"]["table"][first_token])
    tx = make_optimizer(schedule.learning_rate, schedule.steps)
    state = tx.init(trainable)

    def loss_fn(trainable, frozen, arrays):
        return model.apply({"params": trees.merge(trainable, frozen)}, *arrays)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(trainable, state, frozen, arrays):
        (loss, iou), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable, frozen, arrays)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss, iou

    start_time, metrics = time.time(), []
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        pending = executor.submit(make_batch, *train, schedule.batch_size, rng)
        for step in range(schedule.steps):
            arrays = pending.result()
            pending = executor.submit(make_batch, *train, schedule.batch_size, rng)
            trainable, state, *step_metrics = train_step(trainable, state, frozen, arrays)
            metrics.append(step_metrics)
            if step % 100 == 99 or step == schedule.steps - 1:
                loss, iou = np.mean(jax.device_get(metrics), axis=0)
                log.info("box heads step %d loss %.4f IoU %.3f %.0f s", step, loss, iou, time.time() - start_time)
                metrics = []
        pending.cancel()
    eval_fn, rng = jax.jit(loss_fn), np.random.default_rng(1)
    metrics = [eval_fn(trainable, frozen, make_batch(*test, schedule.batch_size, rng)) for _ in range(8)]
    loss, iou = np.mean(jax.device_get(metrics), axis=0)
    figures = {"loss": round(float(loss), 4), "box_iou": round(float(iou), 4)}
    return trainable["locations"], np.asarray(trainable["trigger"]), figures
