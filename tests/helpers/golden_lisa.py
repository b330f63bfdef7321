# SPDX-License-Identifier: Apache-2.0
"""A LISA golden as our config and batches, and everything that we compute from it in a few compilations."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import text_batches
from golden import in_one_row, llama_of, sam_of
from golden_tower import clip_tower
from safetensors.numpy import load_file

from lionjax import convert
from lionjax.convert.formats import peft
from lionjax.core import sharding
from lionjax.core.types import Batch
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.heads import mask_token
from lionjax.models.vision import sam_decoder
from lionjax.models.vision.sam_decoder import postprocess_masks
from lionjax.models.vlm.lisa import Lisa, LisaModule
from lionjax.nn.lora import LoraConfig


def max_masks(arrays: dict, config: dict) -> int:
    """The largest number of [SEG] in a row."""
    rows = [*arrays["input_ids"], *(ids[0] for name, ids in arrays.items() if name.endswith(".output_ids"))]
    return max(int((row == config["tokens"]["seg"]).sum()) for row in rows)


def system_of(arrays: dict, config: dict) -> Lisa:
    v, t, names, weights = (config[name] for name in ("vision", "llama", "tokens", "loss"))
    lora = LoraConfig(config["lora"]["r"], config["lora"]["alpha"], 0.0, tuple(n[0] for n in config["lora"]["targets"]))
    return Lisa(
        vision=clip_tower(v),
        language=llama_of(t, lora=lora, eos_token_id=names["eos"], pad_token_id=names["pad"]),
        sam=sam_of(config["sam"]),
        feature_layer=v["feature_layer"],
        projector_depth=config["projector"]["depth"],
        image_token_id=names["image"],
        mask_token_id=names["seg"],
        max_masks=max_masks(arrays, config),
        text_weight=weights["ce_weight"],
        bce_weight=weights["bce_weight"],
        dice_weight=weights["dice_weight"],
        dice_scale=weights["dice_scale"],
    )


def expanded(ids: list[int], config: dict) -> list[int]:
    """Ids with the image id once for each of the image's tokens."""
    image, count = config["tokens"]["image"], config["vision"]["image_tokens"]
    return [token for i in ids for token in [i] * (count if i == image else 1)]


def batch_of(arrays: dict, config: dict) -> tuple[Batch, np.ndarray]:
    """(batch, rows of the original in it): each image has as many rows of text, of which some are only padding."""
    offset = arrays["offset"]
    counts = np.diff(offset)
    rows_per_image = counts.max()
    rows = np.concatenate([image * rows_per_image + np.arange(count) for image, count in enumerate(counts)])
    bos = config["tokens"]["bos"]
    prompts, targets = [[bos]] * (len(counts) * rows_per_image), [[]] * (len(counts) * rows_per_image)
    learned = list(targets)
    for row, ids, labels, mask in zip(rows, *(arrays[name] for name in ("input_ids", "labels", "attention_mask"))):
        end = int(mask.sum())
        start = (labels >= 0).argmax() if (labels >= 0).any() else end
        prompts[row], targets[row] = expanded(ids[:start].tolist(), config), ids[start:end].tolist()
        learned[row] = (labels[start:end] >= 0).astype(int).tolist()
    target = text_batches.padded(targets)
    batch = text_batches.batch_of(
        arrays["images_clip"].transpose(0, 2, 3, 1),
        text_batches.padded(prompts),
        target,
        sam_image_BHWC=arrays["images"].transpose(0, 2, 3, 1),
        sam_size_B2=np.repeat(arrays["resize_list"], rows_per_image, axis=0),
        mask_size_B2=np.repeat(arrays["original_sizes"], rows_per_image, axis=0),
        **true_masks(arrays, targets, rows, config),
    )
    return dataclasses.replace(batch, loss_mask_BM=text_batches.padded(learned)[0]), rows


def true_masks(arrays, targets, rows, config) -> dict:
    """Masks of all [SEG] in order: an image's masks belong to its rows in turn."""
    tall, wide = arrays["original_sizes"].max(axis=0)
    real = np.zeros((len(targets), max_masks(arrays, config)), bool)
    found = np.zeros((*real.shape, tall, wide), bool)
    per_image = len(targets) // len(arrays["original_sizes"])
    remaining = [iter(arrays[f"target_masks.{image}"]) for image in range(len(arrays["original_sizes"]))]
    for row in rows:
        for k in range(targets[row].count(config["tokens"]["seg"])):
            mask = next(remaining[row // per_image]) > 0
            found[row, k, : mask.shape[0], : mask.shape[1]], real[row, k] = mask, True
    assert all(next(left, None) is None for left in remaining)
    return {"masks_BKHW": found, "masks_mask_BK": real}


@dataclasses.dataclass
class Golden:
    """What the original gives (`theirs`) and what we compute, under the same names; gradients under torch's."""

    folder: Path
    config: dict
    system: Lisa
    names: tuple
    params: dict
    theirs: dict
    ours: dict
    gradients: dict


def names_of(system: Lisa, params) -> tuple:
    """The weight map with the LoRA's PEFT names."""
    return (*system.weight_map(), *peft.lora_weight_map(system.weight_map(), params))


def load(folder: Path) -> tuple[dict, dict, Lisa, tuple, dict]:
    """(config, arrays, system, its torch names, its parameters with LoRA)."""
    config = json.loads((folder / "config.json").read_text())
    theirs = dict(np.load(folder / "arrays.npz"))
    system = system_of(theirs, config)
    abstract = sharding.abstract_params(system.init, jax.random.key(0), batch_of(theirs, config)[0])
    weights = load_file(folder / "weights.safetensors") | load_file(folder / "lora.safetensors")
    names = names_of(system, abstract)
    return config, theirs, system, names, convert.params_from_state_dict(names, weights)


def compute(folder: Path) -> Golden:
    config, theirs, system, names, params = load(folder)
    ours, gradients = trained(system, params, theirs, config)
    ours |= evaluated(system, params, theirs, config)
    gradients = convert.state_dict_from_params(names, jax.tree.map(np.asarray, gradients))
    return Golden(folder, config, system, names, params, theirs, ours, gradients)


def trained(system: Lisa, params, theirs, config) -> tuple[dict, dict]:
    """({name: value} of `train` and `inference`, gradients)."""
    batch, rows = batch_of(theirs, config)

    def run(params):
        loss, metrics = system.loss(params, batch)
        return loss, (metrics, LisaModule(system).apply({"params": params}, batch, method=forward_states))

    (loss, (metrics, states)), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    states = {name: np.asarray(value) for name, value in states.items()}
    prompts, L = batch.prompt_mask_BL.sum(1), batch.prompt_BL.shape[1]
    found = {"projector_output": states["projector_output"][rows // (len(batch.prompt_BL) // len(theirs["images"]))]}
    for name in ("last_hidden", "text_hidden", "logits"):
        made = (states[name][rows], batch.target_mask_BM[rows], prompts[rows], L)
        found[name] = in_one_row(*made, theirs[f"train.{name}"])
    valid = states["valid"][rows]
    found["seg_rows"], found["seg_hidden_positions"] = np.nonzero(valid)[0], positions_of(states, batch, rows)
    found["prompts"] = states["prompts"][rows][valid][:, 0]
    found["image_embedding"] = states["image_embedding"].transpose(0, 3, 1, 2)
    per_image = np.split(rows, theirs["offset"][1:-1])
    for image, own in enumerate(per_image):
        height, width = theirs["original_sizes"][image]
        for name in ("low_res_masks", "iou", "masks"):
            chosen = states[name][own][states["valid"][own]]
            found[f"{name}.{image}"] = chosen[..., :height, :width] if name == "masks" else chosen
    terms = {"ce_loss": metrics["loss_text"] / system.text_weight} | {
        "mask_bce_loss": metrics["loss_bce"],
        "mask_dice_loss": metrics["loss_dice"],
        "mask_loss": metrics["loss_bce"] + metrics["loss_dice"],
    }
    ours = {f"train.{name}": value for name, value in (found | {"loss": loss} | terms).items()}
    return ours | {f"inference.masks.{i}": ours[f"train.masks.{i}"] for i in range(len(per_image))}, gradients


def mask_prompts(system: Lisa, params, theirs, config) -> np.ndarray:
    """The prompts of SAM at the [SEG] of all rows, in order."""
    batch, rows = batch_of(theirs, config)

    def run(module: LisaModule, batch: Batch):
        state_BKD, valid_BK = module.mask_states(batch, module.states_before(batch), module.c.max_masks)
        return module.mask_prompts(state_BKD)[:, :, 0], valid_BK

    prompt_BKC, valid_BK = jax.jit(lambda params: LisaModule(system).apply({"params": params}, batch, method=run))(
        params
    )
    return np.asarray(prompt_BKC)[rows][np.asarray(valid_BK)[rows]]


def mask_losses(theirs, config) -> dict[str, float]:
    """The weighted losses of the original's own low-resolution masks."""
    batch, _ = batch_of(theirs, config)
    valid_BK = batch.masks_mask_BK
    per_image = len(valid_BK) // len(theirs["images"])
    logits_BKHW = np.zeros((*valid_BK.shape, *theirs["train.low_res_masks.0"].shape[1:]), np.float32)
    for image in range(len(theirs["images"])):
        own = slice(image * per_image, (image + 1) * per_image)
        logits_BKHW[own][valid_BK[own]] = theirs[f"train.low_res_masks.{image}"]
    weights = config["loss"]
    sizes = config["sam"]["image_size"], weights["dice_scale"]
    terms = jax.jit(lambda logits: mask_token.mask_token_losses(batch, logits, valid_BK, *sizes))(logits_BKHW)
    found = {name: float(terms[name]) * weights[f"{name}_weight"] for name in ("bce", "dice")}
    return {f"mask_{name}_loss": value for name, value in found.items()} | {"mask_loss": sum(found.values())}


def positions_of(states: dict, batch: Batch, rows) -> np.ndarray:
    """Where in the original's rows, which have no padding between prompt and answer, the states of masks stand."""
    L, found = batch.prompt_BL.shape[1], []
    for row in rows:
        prompt = int(batch.prompt_mask_BL[row].sum())
        for place in states["positions"][row][states["valid"][row]]:
            found.append(place - 1 if place < L else prompt + place - L - 1)
    return np.array(found)


def forward_states(module: LisaModule, batch: Batch) -> dict:
    system = module.c
    before_BLD = module.states_before(batch)
    state_BLD = states_after(module, batch)
    state_BKD, valid_BK = module.mask_states(batch, before_BLD, system.max_masks)
    where_BL1 = np.broadcast_to(np.arange(state_BLD.shape[1])[:, None], (*state_BLD.shape[:2], 1))
    positions_BK1, _ = module.mask_states(batch, where_BL1, system.max_masks)
    logits_BKHW, iou_BK = module.predict_masks(batch, None, state_BKD, valid_BK)
    sizes = (system.sam.image_size, batch.sam_size_B2, batch.mask_size_B2, tuple(batch.mask_size_B2.max(axis=0)))
    return {
        "projector_output": module.projector(module.encode_image(batch)["patches"]),
        "last_hidden": state_BLD,
        "text_hidden": module.mask_prompts(state_BLD)[..., 0, :],
        "logits": module.language.logits(state_BLD),
        "positions": positions_BK1[..., 0],
        "valid": valid_BK,
        "prompts": module.mask_prompts(state_BKD),
        "image_embedding": module.encode_sam_image(batch),
        "low_res_masks": logits_BKHW,
        "iou": iou_BK,
        "masks": sam_decoder.image_mask_logits(logits_BKHW, *sizes),
    }


def evaluated(system: Lisa, params, theirs, config) -> dict:
    """{name: value} of all `evaluate` cases, generated in one batch."""
    cases = config["evaluate"]
    images = np.array([case["image"] for case in cases.values()])
    prompts = text_batches.padded(
        [expanded(theirs[f"evaluate.{name}.prompt_ids"][0].tolist(), config) for name in cases]
    )
    batch = text_batches.batch_of(
        theirs["images_clip"][images].transpose(0, 2, 3, 1),
        prompts,
        text_batches.padded([[]] * len(cases)),
        sam_image_BHWC=theirs["images"][images].transpose(0, 2, 3, 1),
    )
    longest = max(case["max_new_tokens"] for case in cases.values())
    ends = {"eos_token_id": system.language.eos_token_id, "pad_token_id": system.language.pad_token_id}
    output = generate(system, params, batch, GenerationConfig(max_new_tokens=longest, **ends))
    ids_BM = np.asarray(output.ids_BM)
    masks = jax.jit(lambda params, state: system.predict_masks(params, batch, None, state))
    logits_BKHW, _ = masks(params, output.aux_outputs["state"])
    states = jax.jit(LisaModule(system).apply, static_argnames="method")
    answered = dataclasses.replace(batch, target_BM=ids_BM, target_mask_BM=np.ones_like(ids_BM))
    state_BLD = np.asarray(states({"params": params}, answered, method=states_after))
    found = {}
    for row, (name, case) in enumerate(cases.items()):
        prompt = theirs[f"evaluate.{name}.prompt_ids"]
        length = min(int(output.length_B[row]), case["max_new_tokens"])
        new = ids_BM[row, :length]
        count = int((prompt == system.mask_token_id).sum() + (new == system.mask_token_id).sum())
        own, low = int(batch.prompt_mask_BL[row].sum()), np.asarray(logits_BKHW)[row, :count]
        state_LD = np.concatenate([state_BLD[row, :own], state_BLD[row, prompts[0].shape[1] :][: length - 1]])
        sizes = (0, 0, *theirs["resize_list"][case["image"]]), tuple(theirs["original_sizes"][case["image"]])
        found |= {
            f"evaluate.{name}.prompt_ids": prompt,
            f"evaluate.{name}.output_ids": np.concatenate([prompt, new[None]], axis=1),
            f"evaluate.{name}.last_hidden": state_LD[None],
            f"evaluate.{name}.low_res_masks": low,
            f"evaluate.{name}.masks": postprocess_masks(low, system.sam.image_size, *sizes),
        }
    return found


def states_after(module: LisaModule, batch: Batch):
    x_BLD, mask_BL = module.embed_inputs(batch, None)
    target_BMD = module.embed_target(batch, x_BLD.dtype)
    return module.language.forward_row(x_BLD, mask_BL, target_BMD, batch.target_mask_BM, batch.task_B)[1]
