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
from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.data.scenes import tasks
from lionjax.data.scenes import world as scenes
from lionjax.models.heads import region
from lionjax.models.heads.region import Locations, PlaceConfig
from lionjax.tiny.exercises import box_code, patch_facts
from lionjax.tiny.language import Reader, reader_of
from lionjax.tiny.schedules import BackbonesConfig, optimiser

log = logging.getLogger(__name__)

TASKS = (("rec", 0.5), ("grounded", 0.1), ("reg", 0.2), ("box_vqa", 0.2))
BLUR = (0.0, 0.15, 0.3)  # of what is told, in shares of its deviation


@dataclasses.dataclass(frozen=True)
class PlacesSchedule:
    """Steps of the trigger's word and of both ways; half of the questions come with tags."""

    steps: int = 700
    rate: float = 3e-3
    batch: int = 32
    scenes: int = 8_000
    boxes: int = 6


class Pointer(nn.Module):
    """A reader that reads and writes places as embeddings; `trigger` is its word for one."""

    reader: Reader
    places: PlaceConfig

    def setup(self):
        width = self.reader.c.width
        self.told = self.reader.copy(name="told")
        self.locations = Locations(width, self.places.location_hidden)
        self.trigger = self.param("trigger", nn.initializers.normal(1.0), (width,))

    def words(self, ids_BL, batch, first_B=0):
        c = self.places
        x_BLD = self.told.language.embed(ids_BL)
        x_BLD = jnp.where((ids_BL == c.trigger_token)[..., None], self.trigger, x_BLD)
        place_BKD = self.locations.encode(batch.boxes_BK4)
        return region.put(x_BLD, ids_BL == c.location_token, place_BKD, first_B)

    def __call__(self, batch, fields_BP6, code_BPC, blur_BPD):
        """The loss, and the mean IoU of the boxes read at triggers."""
        c, language = self.places, self.told.language
        told_BPD = self.told.tell(fields_BP6, code_BPC)
        told_BPD += blur_BPD * told_BPD.std(-1, keepdims=True)
        words_BLD = jnp.concatenate([told_BPD, self.words(batch.prompt_BL, batch)], axis=1)
        seen_BP = jnp.ones(told_BPD.shape[:2], bool)
        mask_BL = jnp.concatenate([seen_BP, batch.prompt_mask_BL.astype(bool)], axis=1)
        encoded_BLD = language.encode(words_BLD, mask_BL)
        first_B = (batch.prompt_BL == c.location_token).sum(axis=1)
        start_B1 = jnp.full_like(batch.target_BM[:, :1], self.reader.c.start_token)
        said_BMD = self.words(batch.target_BM, batch, first_B)
        x_BMD = jnp.concatenate([language.embed(start_B1), said_BMD], axis=1)
        real_BM = jnp.pad(batch.target_mask_BM, ((0, 0), (1, 0)), constant_values=1)
        state_BMD = language.states(x_BMD, real_BM, encoded_BLD, mask_BL)
        # The head is frozen and never says the trigger.
        learned_BM = batch.loss_mask_BM * (batch.target_BM != c.trigger_token)
        heard = dataclasses.replace(batch, loss_mask_BM=learned_BM)
        loss, _ = region.words_loss(c, language.logits(state_BMD[:, :-1]), heard)
        found = region.triggers(c, batch, state_BMD[:, 1:])
        terms, metrics = region.place_losses(c, self.locations, batch, found)
        return loss + sum(terms.values()), metrics["box_iou"]


def places_batch(made, told, rows: int, rng, processor: Processor, width: int):
    """Questions with boxes about scenes that are told: a `Batch` without pictures, and what the reader is told."""
    names, odds = zip(*TASKS, strict=True)
    asked, facts, nothing = [], [], np.zeros((1, 1, 3), np.uint8)
    for index in rng.integers(0, len(made), rows):
        example = tasks.converse(str(rng.choice(names, p=odds)), made[index], rng, 0.1)
        tags = example.tags if rng.random() < 0.5 else ()
        boxes = (*example.question_boxes, *example.boxes)
        row = (nothing, example.question, tags, example.answer, example.category, boxes)
        asked.append(processor.row(*row))
        facts.append(told[index])
    batch = processor.assemble({name: np.stack([row[name] for row in asked]) for name in asked[0]})
    fields, boxes = (np.stack(parts) for parts in zip(*facts, strict=True))
    share = rng.choice(BLUR, (rows, 1, 1)).astype(np.float32)
    blur = share * rng.standard_normal((*boxes.shape[:2], width), np.float32)
    return batch, fields, box_code(boxes), blur


def train_places(
    c: BackbonesConfig, schedule: PlacesSchedule, places: PlaceConfig, reader: dict
) -> tuple[dict, np.ndarray, dict]:
    """Parameters of the `Locations`, the trigger's embedding, and figures on held-out scenes that are told.

    `reader` is all that `train_language` keeps; nothing of it changes.
    """
    config = ProcessorConfig(
        c.vision.image,
        prompt_length=72,
        question_length=28,
        target_length=40,
        padded=True,
        places="embeddings",
        boxes=schedule.boxes,
    )
    processor, rng = Processor(config), np.random.default_rng(c.seed)
    side, pixels = c.vision.image // c.vision.patch, c.vision.image

    def drawn(split: str, count: int):
        made = [scenes.sample(split, index, c.seed) for index in range(count)]
        return made, [patch_facts(scene, side, pixels) for scene in made]

    digits = Processor(ProcessorConfig(c.vision.image))
    model = Pointer(reader_of(c.language, digits), places)
    make = functools.partial(places_batch, processor=processor, width=c.language.width)
    train, test = drawn("train", schedule.scenes), drawn("heldout", min(200, schedule.scenes))
    example = make(*train, 2, rng)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(c.seed), *example)["params"])
    mine, frozen = trees.split(params | {"told": reader}, ("locations", "trigger"))
    # It begins as the word with which a box in digits begins.
    opens = digits.target("[0.123,0.234,0.345,0.456]")[0]
    mine["trigger"] = jnp.array(reader["language"]["embedding"]["table"][opens])
    tx = optimiser(schedule.rate, schedule.steps)
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
        waiting = ahead.submit(make, *train, schedule.batch, rng)
        for number in range(schedule.steps):
            arrays = waiting.result()
            waiting = ahead.submit(make, *train, schedule.batch, rng)
            mine, state, *said = step(mine, state, frozen, arrays)
            sums.append(said)
            if number % 100 == 99 or number == schedule.steps - 1:
                loss, iou = np.mean(jax.device_get(sums), axis=0)
                log.info("places step %d loss %.4f IoU %.3f %.0f s", number, loss, iou, time.time() - begun)
                sums = []
        waiting.cancel()
    see, rng = jax.jit(loss_of), np.random.default_rng(1)
    seen = [see(mine, frozen, make(*test, schedule.batch, rng)) for _ in range(8)]
    loss, iou = np.mean(jax.device_get(seen), axis=0)
    figures = {"loss": round(float(loss), 4), "box_iou": round(float(iou), 4)}
    return mine["locations"], np.asarray(mine["trigger"]), figures
