# SPDX-License-Identifier: Apache-2.0
"""The golden files of Grounding DINO: the model of their sizes, and what it computes under the names of arrays.npz."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from lionjax import convert
from lionjax.models.language.bert import BertConfig
from lionjax.models.vision.grounding_dino import GroundingDino, GroundingDinoConfig
from lionjax.models.vision.grounding_dino_weights import original_weight_map
from lionjax.models.vision.swin import SwinConfig

NOT_COMPUTED = {"input_ids", "text_attention_mask", "text_position_ids", "bert_output"}  # inputs, and inside BERT


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden folder."""

    c: GroundingDinoConfig
    weights: dict
    params: dict
    inputs: tuple
    theirs: dict  # what the original computes
    text_mask: np.ndarray

    def states(self) -> dict:
        """{name in arrays.npz: value} of one forward pass, traced anew."""
        module, params = GroundingDino(self.c), {"params": self.params}
        return jax.jit(lambda *inputs: module.apply(params, *inputs, method=compute))(*self.inputs)

    def comparable(self, name: str, found: dict) -> tuple[np.ndarray, np.ndarray]:
        """(mine, the original's) of one array, where the original's says something: not on padding."""
        mine, theirs = np.asarray(found[name], np.float64), self.theirs[name].astype(np.float64)
        valid = np.isfinite(theirs)
        if name == "text_features" or name.endswith(".text"):
            valid &= self.text_mask[..., None]
        assert (np.isfinite(mine) == np.isfinite(theirs)).all(), f"{name} is finite elsewhere"
        return mine[valid], theirs[valid]


def read(folder: Path) -> Golden:
    config = json.loads((folder / "config.json").read_text())
    arrays = dict(np.load(folder / "arrays.npz"))
    c, weights = config_of(config), load_file(folder / "weights.safetensors")
    params = convert.params_from_state_dict(original_weight_map(c), weights)
    last = f"enhancer.{c.encoder_depth - 1}."
    skipped = ("image.", "released_batch.", "enhancer.")
    theirs = {name: x for name, x in arrays.items() if name.startswith(last) or not name.startswith(skipped)}
    theirs = {name: x for name, x in theirs.items() if name not in NOT_COMPUTED}
    return Golden(c, weights, params, inputs_of(config, arrays), theirs, arrays["text_attention_mask"].astype(bool))


def config_of(config: dict) -> GroundingDinoConfig:
    s, t = config["swin"], config["text"]
    swin = SwinConfig(
        None,
        s["patch_size"],
        s["embed_dim"],
        tuple(s["depths"]),
        tuple(s["heads"]),
        s["window_size"],
        s["mlp_ratio"],
        "qkvo" if s["qkv_bias"] else "o",
        s["layer_norm_eps"],
        output_stages=tuple(s["out_stages"]),
    )
    text = BertConfig(
        t["width"],
        t["layers"],
        t["heads"],
        t["mlp_width"],
        norm_eps=t["layer_norm_eps"],
        vocab_size=t["vocab_size"],
        max_positions=t["max_positions"],
        type_vocab_size=t["type_vocab_size"],
    )
    c = GroundingDinoConfig(
        swin,
        text,
        config["width"],
        config["heads"],
        config["mlp_width"],
        config["encoder_layers"],
        config["decoder_layers"],
        config["queries"],
        config["levels"],
        config["points"],
        config["max_text_tokens"],
        tuple(config["special_token_ids"].values()),
        config["layer_norm_eps"],
        config["inverse_sigmoid_eps"],
        config["position"]["temperature"],
    )
    halves = {"width": c.mlp_dim // 2, "heads": c.num_heads // 2}
    assert halves == config["fusion"] and config["text_enhancer"]["mlp_width"] == halves["width"]
    return c


def inputs_of(
    config: dict, arrays, image: str = "image", texts: tuple[str, str] = ("input_ids", "text_attention_mask")
):
    """(images, pixel masks, ids, text mask), the images padded with zeros to one size; `image`, `texts`: names."""
    height, width = config["padded_size"]
    image_BHWC = np.zeros((len(config["captions"]), height, width, 3), np.float32)
    mask_BHW = np.zeros(image_BHWC.shape[:3], bool)
    for row, (rows, columns) in enumerate(config["image_sizes"]):
        image_BHWC[row, :rows, :columns] = arrays[f"{image}.{row}"].transpose(1, 2, 0)
        mask_BHW[row, :rows, :columns] = True
    return image_BHWC, mask_BHW, arrays[texts[0]].astype(np.int32), arrays[texts[1]]


def compute(module: GroundingDino, *inputs) -> dict:
    """{name in arrays.npz: value}; maps are (B, C, H, W) there."""
    maps = module.swin(inputs[0])[1]
    found = {f"backbone.{n}": x.transpose(0, 3, 1, 2) for n, x in enumerate(maps)}
    states_BLD, phrase_BLL, _ = module.encode_text(*inputs[2:], np.float32)
    found |= {"text_features": states_BLD, "text_self_attention_mask": phrase_BLL}
    encoded = module.encode(*inputs)
    start = 0
    for level, (height, width) in enumerate(encoded.shared.shapes):
        part = slice(start, start + height * width)
        start = part.stop
        shape = (len(inputs[0]), height, width)
        positions = encoded.shared.image_position_BPD[:, part] - module.level_embed[level]
        found[f"level.{level}.padding_mask"] = ~encoded.shared.valid_BP[:, part].reshape(shape)
        for name, x_BPD in (("features", encoded.image_BPD[:, part]), ("positions", positions)):
            found[f"level.{level}.{name}"] = x_BPD.reshape(*shape, -1).transpose(0, 3, 1, 2)
    image_BPD, text_BLD = module.enhance(encoded)
    last = module.c.encoder_depth - 1
    found |= {f"enhancer.{last}.image": image_BPD, f"enhancer.{last}.text": text_BLD}
    selected = module.select(image_BPD, text_BLD, encoded)
    found |= {"selection.scores": selected.score_BP, "selection.index": selected.index_BQ}
    found["selection.boxes"] = found["decoder.0.reference"] = selected.box_BQ4
    state_TBQD, box_TBQ4 = module.decode(image_BPD, text_BLD, selected.box_BQ4, encoded)
    out = module.predict(state_TBQD, box_TBQ4, selected, text_BLD, encoded.shared.text_mask_BL)
    for layer in range(module.c.decoder_depth):
        found[f"decoder.{layer}.hidden"] = module.norm(state_TBQD[layer])
        found[f"decoder.{layer + 1}.reference"] = box_TBQ4[layer]
        found[f"decoder.{layer}.logits"] = out.layer_logits_TBQL[layer]
        found[f"decoder.{layer}.boxes"] = out.layer_boxes_TBQ4[layer]
    return found | {"pred_boxes": out.boxes_BQ4, "hidden_state": out.features_BQD}
