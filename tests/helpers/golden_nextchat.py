# SPDX-License-Identifier: Apache-2.0
"""A NExT-Chat golden as our config and batches, and everything that we compute from it in two compilations."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from golden import in_one_row, llama_of, sam_of
from golden_tower import clip_tower
from safetensors.numpy import load_file

from lionjax import convert
from lionjax.core.types import Batch
from lionjax.models.vision import sam_decoder
from lionjax.models.vlm.nextchat import NextChat, NextChatModule


def system_of(config: dict, objective: str = "language") -> NextChat:
    v, t, s, names = (config[name] for name in ("vision", "llama", "sam", "tokens"))
    return NextChat(
        vision=clip_tower(v),
        language=llama_of(t),
        sam=sam_of(config["sam"]),
        feature_layer=v["feature_layer"],
        projector_depth=config["projector"]["depth"],
        box_mlp_dim=config["location_encoder"][1],
        num_mask_prompt_tokens=s["prompts_per_trigger"],
        box_scale=s["box_scale"],
        image_token_id=names["image_patch"],
        trigger_token_id=names["trigger"],
        box_token_id=names["location"],
        objective=objective,
        loss_variant="released_code",
    )


def batch_of(arrays, config: dict) -> tuple[Batch, np.ndarray]:
    """All rows as a batch, prompt and answer apart; and the length of each prompt."""
    names = config["tokens"]
    ids, labels, mask = (arrays[name] for name in ("input_ids", "labels", "attention_mask"))
    prompts, lengths = (labels >= 0).argmax(1), mask.sum(1)
    rows, L, M = len(ids), prompts.max(), (lengths - prompts).max()
    text = {name: np.zeros((rows, L if name.startswith("prompt") else M), np.int32) for name in TEXTS}
    flat, boxes = iter(arrays["loc_inputs"]), (ids == names["location"]) & (mask == 1)
    K = boxes.sum(1).max()
    box, box_mask = np.zeros((rows, K, 4), np.float32), np.zeros((rows, K), np.int32)
    side = arrays["sam_target_masks"].shape[-1]
    masks, targets = np.zeros((rows, K, side, side), bool), iter(arrays["sam_target_masks"])
    for b, (start, end) in enumerate(zip(prompts, lengths)):
        text["prompt"][b, :start], text["prompt_mask"][b, :start] = ids[b, :start], 1
        text["target"][b, : end - start], text["target_mask"][b, : end - start] = ids[b, start:end], 1
        text["loss_mask"][b, : end - start] = labels[b, start:end] >= 0
        for k in range(boxes[b].sum()):
            box[b, k], box_mask[b, k] = next(flat), 1
        for place in np.flatnonzero((ids[b] == names["trigger"]) & (labels[b] > 0)):
            masks[b, boxes[b, :place].sum()] = next(targets)[0] > 0
    batch = Batch(
        image_BHWC=arrays["image"].transpose(0, 2, 3, 1),
        prompt_BL=text["prompt"],
        prompt_mask_BL=text["prompt_mask"],
        question_BL=None,
        question_mask_BL=None,
        target_BM=text["target"],
        target_mask_BM=text["target_mask"],
        loss_mask_BM=text["loss_mask"],
        task_B=np.zeros(rows, np.int32),
        record_B=np.arange(rows, dtype=np.int32),
        boxes_BK4=box,
        boxes_mask_BK=box_mask,
        masks_BKHW=masks,
        sam_image_BHWC=arrays["sam_image"].transpose(0, 2, 3, 1),
    )
    return batch, prompts


TEXTS = ("prompt", "prompt_mask", "target", "target_mask", "loss_mask")


def without_the_dummy(batch: Batch) -> Batch:
    """The last row is the original's dummy: none of its words count, and of the boxes that go in the last does not."""
    learned, real = batch.loss_mask_BM.copy(), batch.boxes_mask_BK.copy()
    learned[-1] = 0
    real[-1, np.flatnonzero(real[-1])[-1]] = 0
    return dataclasses.replace(batch, loss_mask_BM=learned, boxes_mask_BK=real)


@dataclasses.dataclass
class Golden:
    """What the original gives (`theirs`) and what we compute, under the same names; gradients under torch's."""

    folder: Path
    system: NextChat
    params: dict
    theirs: dict
    ours: dict
    gradients: dict  # of stage 1 and stage 3


def compute(folder: Path, with_gradients: bool = True) -> Golden:
    """Without gradients it compiles in half of the time."""
    config = json.loads((folder / "config.json").read_text())
    theirs = dict(np.load(folder / "arrays.npz"))
    words, masks = system_of(config), system_of(config, "masks")
    params = convert.params_from_state_dict(words.weight_map(), load_file(folder / "weights.safetensors"))
    batch, prompts = batch_of(theirs, config)
    counted = without_the_dummy(batch)

    def first(params):
        loss, metrics = words.loss(params, counted)
        return loss, (metrics, NextChatModule(words).apply({"params": params}, batch, method=told))

    def third(params):
        return masks.loss(params, batch)[0], NextChatModule(masks).apply({"params": params}, batch, method=shown)

    def run(stage):
        if with_gradients:
            return jax.jit(jax.value_and_grad(stage, has_aux=True))(params)
        return jax.jit(stage)(params), None

    (loss, (metrics, said)), first_grads = run(first)
    (mask_loss, seen), third_grads = run(third)
    real = said.pop("real")
    ours = {name: np.asarray(said[name])[real] for name in ("trigger_hidden", "predicted_boxes")}
    ours |= {name: np.asarray(value)[real] for name, value in seen.items() if name != "sam_image_embedding"}
    ours["sam_mask_logits"], ours["sam_iou"] = ours["sam_mask_logits"][:, None], ours["sam_iou"][:, None]
    ours["sam_image_embedding"] = np.asarray(seen["sam_image_embedding"]).transpose(0, 3, 1, 2)
    ours["projector_output"] = said["projector_output"]
    L = batch.prompt_BL.shape[1]
    for name in ("last_hidden", "logits"):
        ours[name] = in_one_row(np.asarray(said[name]), batch.target_mask_BM, prompts, L, theirs[name])
    ours |= {
        "loss_total": loss,
        "loss_lm": metrics["loss_text"],
        "loss_box": metrics["loss_l1"] + metrics["loss_giou"],
        "loss_cycle_hidden": metrics["loss_cycle_state"],
        "loss_cycle_box": metrics["loss_cycle_box"],
        "stage3_loss": mask_loss,
    }
    rows = words.weight_map()
    gradients = {
        f"stage{number}": convert.state_dict_from_params(rows, jax.tree.map(np.asarray, grads))
        for number, grads in ((1, first_grads), (3, third_grads))
        if grads is not None
    }
    return Golden(folder, words, params, theirs, ours, gradients)


def told(module: NextChatModule, batch: Batch):
    x_BLD, mask_BL = module.embed_inputs(batch, None)
    row_BLD = jnp.concatenate([x_BLD, module.embed_target(batch, x_BLD.dtype)], axis=1)
    mask_BL = jnp.concatenate([mask_BL, batch.target_mask_BM], axis=1)
    state_BLD = module.language(row_BLD, mask_BL, batch.task_B)
    _, trigger_BKD, real_BK = module.predict_boxes(batch)
    return {
        "projector_output": module.projector(module.encode_image(batch)["patches"]),
        "last_hidden": state_BLD,
        "logits": module.language.logits(state_BLD),
        "trigger_hidden": trigger_BKD,
        "predicted_boxes": module.locations.decode(trigger_BKD),
        "real": real_BK,
    }


def shown(module: NextChatModule, batch: Batch):
    box_BK4, trigger_BKD, _ = module.predict_boxes(batch)
    logits_BKHW, iou_BK = module.predict_masks(batch, box_BK4, trigger_BKD)
    return {
        "sam_boxes_times_1024": box_BK4 * module.c.box_scale,
        "sam_sparse_prompts": module.mask_prompts(trigger_BKD),
        "sam_mask_logits": sam_decoder.resize_mask_logits(logits_BKHW, module.c.sam.image_size),
        "sam_iou": iou_BK,
        "sam_image_embedding": module.encode_sam_image(batch),
    }
