# SPDX-License-Identifier: Apache-2.0
"""A first start for boxes as embeddings on the frozen small T5: the word for a place, and its way from and to boxes.

NExT-Chat learns its new words together with its language model. LION's is frozen, so the one word that the T5 has to
know, the trigger, is learned before, from scenes that it is told patch by patch; all other weights of it stay.
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
from lionjax.data.scenes import tasks
from lionjax.data.scenes import world as scenes
from lionjax.models.heads import region
from lionjax.models.heads.region import BoxEncoderDecoder, RegionHeadConfig
from lionjax.tiny.exercises import encode_box, patch_labels
from lionjax.tiny.language import SceneLanguageModel, make_scene_model
from lionjax.tiny.schedules import BackbonesConfig, make_optimizer

log = logging.getLogger(__name__)

TASKS = (("rec", 0.5), ("grounded", 0.1), ("reg", 0.2), ("box_vqa", 0.2))
NOISE_LEVELS = (0.0, 0.15, 0.3)  # of what is told, in shares of its deviation


@renamed_fields(rate="learning_rate", batch="batch_size", scenes="num_scenes", boxes="max_boxes")
@dataclasses.dataclass(frozen=True)
class BoxHeadsSchedule:
    """Steps of the trigger's word and of both ways; half of the questions come with tags."""

    steps: int = 700
    learning_rate: float = 3e-3
    batch_size: int = 32
    num_scenes: int = 8_000
    max_boxes: int = 6


class SceneRegionModel(nn.Module):
    """A reader that reads and writes places as embeddings; `trigger` is its word for one."""

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
        place_BKD = self.locations.encode(batch.boxes_BK4)
        return region.put(x_BLD, ids_BL == c.box_token_id, place_BKD, first_B)

    def __call__(self, batch, fields_BP6, code_BPC, blur_BPD):
        """The loss, and the mean IoU of the boxes read at triggers."""
        c, language = self.region_config, self.told.language
        told_BPD = self.told.embed_objects(fields_BP6, code_BPC)
        told_BPD += blur_BPD * told_BPD.std(-1, keepdims=True)
        words_BLD = jnp.concatenate([told_BPD, self.embed_text(batch.prompt_BL, batch)], axis=1)
        seen_BP = jnp.ones(told_BPD.shape[:2], bool)
        mask_BL = jnp.concatenate([seen_BP, batch.prompt_mask_BL.astype(bool)], axis=1)
        encoded_BLD = language.encode(words_BLD, mask_BL)
        first_B = (batch.prompt_BL == c.box_token_id).sum(axis=1)
        start_B1 = jnp.full_like(batch.target_BM[:, :1], self.reader.c.decoder_start_token_id)
        said_BMD = self.embed_text(batch.target_BM, batch, first_B)
        x_BMD = jnp.concatenate([language.embed(start_B1), said_BMD], axis=1)
        real_BM = jnp.pad(batch.target_mask_BM, ((0, 0), (1, 0)), constant_values=1)
        state_BMD = language.hidden_states(x_BMD, real_BM, encoded_BLD, mask_BL)
        # The head is frozen and never says the trigger.
        learned_BM = batch.loss_mask_BM * (batch.target_BM != c.trigger_token_id)
        heard = dataclasses.replace(batch, loss_mask_BM=learned_BM)
        loss, _ = region.words_loss(c, language.logits(state_BMD[:, :-1]), heard)
        found = region.triggers(c, batch, state_BMD[:, 1:])
        terms, metrics = region.place_losses(c, self.locations, batch, found)
        return loss + sum(terms.values()), metrics["box_iou"]


def make_box_batch(sampled_scenes, labels, batch_size: int, rng, processor: Processor, width: int):
    """Questions with boxes about scenes that are told: a `Batch` without pictures, and what the reader is told."""
    names, odds = zip(*TASKS, strict=True)
    asked, facts, nothing = [], [], np.zeros((1, 1, 3), np.uint8)
    for index in rng.integers(0, len(sampled_scenes), batch_size):
        example = tasks.make_example(str(rng.choice(names, p=odds)), sampled_scenes[index], rng, 0.1)
        tags = example.tags if rng.random() < 0.5 else ()
        boxes = (*example.question_boxes, *example.boxes)
        row = (nothing, example.question, tags, example.answer, example.category, boxes)
        asked.append(processor.encode_example(*row))
        facts.append(labels[index])
    batch = processor.collate({name: np.stack([row[name] for row in asked]) for name in asked[0]})
    fields, boxes = (np.stack(parts) for parts in zip(*facts, strict=True))
    share = rng.choice(NOISE_LEVELS, (batch_size, 1, 1)).astype(np.float32)
    blur = share * rng.standard_normal((*boxes.shape[:2], width), np.float32)
    return batch, fields, encode_box(boxes), blur


def train_box_heads(
    c: BackbonesConfig, schedule: BoxHeadsSchedule, region_config: RegionHeadConfig, reader_params: dict
) -> tuple[dict, np.ndarray, dict]:
    """Parameters of the `Locations`, the trigger's embedding, and figures on held-out scenes that are told.

    `reader` is all that `train_language` keeps; nothing of it changes.
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

    def drawn(split: str, count: int):
        made = [scenes.sample_scene(split, index, c.seed) for index in range(count)]
        return made, [patch_labels(scene, side, pixels) for scene in made]

    digits = Processor(ProcessorConfig(c.vision.image_size))
    model = SceneRegionModel(make_scene_model(c.language, digits), region_config)
    make = functools.partial(make_box_batch, processor=processor, width=c.language.width)
    train, test = drawn("train", schedule.num_scenes), drawn("heldout", min(200, schedule.num_scenes))
    example = make(*train, 2, rng)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(c.seed), *example)["params"])
    mine, frozen = trees.split(params | {"told": reader_params}, ("locations", "trigger"))
    # It begins as the word with which a box in digits begins.
    opens = digits.prompt.encode_target("[0.123,0.234,0.345,0.456]")[0]
    mine["trigger"] = jnp.array(reader_params["language"]["embedding"]["table"][opens])
    tx = make_optimizer(schedule.learning_rate, schedule.steps)
    state = tx.init(mine)

    def loss_of(mine, frozen, arrays):
        return model.apply({"params": trees.merge(mine, frozen)}, *arrays)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(mine, state, frozen, arrays):
        (loss, iou), grads = jax.value_and_grad(loss_of, has_aux=True)(mine, frozen, arrays)
        updates, state = tx.update(grads, state, mine)
        return optax.apply_updates(mine, updates), state, loss, iou

    begun, sums = time.time(), []
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(make, *train, schedule.batch_size, rng)
        for number in range(schedule.steps):
            arrays = waiting.result()
            waiting = ahead.submit(make, *train, schedule.batch_size, rng)
            mine, state, *said = step(mine, state, frozen, arrays)
            sums.append(said)
            if number % 100 == 99 or number == schedule.steps - 1:
                loss, iou = np.mean(jax.device_get(sums), axis=0)
                log.info("places step %d loss %.4f IoU %.3f %.0f s", number, loss, iou, time.time() - begun)
                sums = []
        waiting.cancel()
    see, rng = jax.jit(loss_of), np.random.default_rng(1)
    seen = [see(mine, frozen, make(*test, schedule.batch_size, rng)) for _ in range(8)]
    loss, iou = np.mean(jax.device_get(seen), axis=0)
    figures = {"loss": round(float(loss), 4), "box_iou": round(float(iou), 4)}
    return mine["locations"], np.asarray(mine["trigger"]), figures
