# SPDX-License-Identifier: Apache-2.0
"""The golden files: where they lie, how close is close, and LION built by their sizes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lionjax.core.types import CATEGORIES, Batch
from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision.ram import RamConfig
from lionjax.models.vision.sam_encoder import SamConfig
from lionjax.models.vision.swin import SwinConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.lion import Lion, LionModule
from lionjax.nn.adapters import AdapterConfig

ROOT = Path(os.environ.get("LIONJAX_GOLDEN", Path(__file__).resolve().parents[1] / "golden"))


def folders(system: str) -> list:
    """Folders whose config names the system; a missing root is a failure, not a silent pass."""
    found = [path.parent for path in sorted(ROOT.glob("*/config.json"))]
    assert found, f"$LIONJAX_GOLDEN is {ROOT}, where no folder holds a config.json"
    chosen = [path for path in found if json.loads((path / "config.json").read_text())["system"] == system]
    return [pytest.param(path, id=path.name) for path in chosen]


def assert_close(mine, theirs, what: str, tolerance=1e-4):
    """Within `tolerance` of the largest magnitude."""
    scale = max(np.abs(theirs).max(), 1e-30)
    worst = np.abs(np.asarray(mine, np.float64) - theirs).max() / scale
    assert worst <= tolerance, f"{what}: off by {worst:.2e} of its largest magnitude"


def assert_same_norms(mine: dict, theirs: dict):
    """Every gradient norm within 0.1 % of the original's."""
    wrong = []
    for name, norm in theirs.items():
        norm = norm or 0.0
        own = float(np.linalg.norm(np.asarray(mine[name], np.float64)))
        if abs(own - norm) > 1e-3 * norm + 1e-5:
            wrong.append(f"{name}: {own:.6g}, the original {norm:.6g}")
    assert theirs and not wrong, f"{len(wrong)} of {len(theirs)} gradient norms differ: {wrong[:5]}"


def llama_of(t: dict, **fields) -> DecoderConfig:
    """The decoder of a golden's `llama` sizes."""
    sizes = (t[name] for name in ("vocab_size", "width", "layers", "heads", "kv_heads"))
    head_dim, eps = t["width"] // t["heads"], t["rms_norm_eps"]
    rope = {"rope_theta": t["rope_theta"], "tie_embeddings": t["tie_word_embeddings"]}
    return DecoderConfig(*sizes, head_dim, t["mlp_width"], eps, **rope, **fields)


def sam_of(s: dict) -> SamConfig:
    """SAM of a golden's `sam` sizes."""
    return SamConfig(
        s["image_size"],
        s["patch_size"],
        s["width"],
        s["depth"],
        s["heads"],
        s["width"] * s["mlp_ratio"],
        s["window_size"],
        tuple(s["global_attention_layers"]),
        s["out_channels"],
        mask_input_channels=s["mask_in_channels"],
        decoder_depth=s["decoder_layers"],
        decoder_num_heads=s["decoder_heads"],
        decoder_mlp_dim=s["decoder_mlp_width"],
        num_mask_tokens=1 + s["multimask_outputs"],
        iou_head_depth=s["iou_head_depth"],
        iou_head_mlp_dim=s["iou_head_width"],
    )


def ram_of(config: dict) -> RamConfig:
    s, t = config["swin"], config["tagging_head"]
    swin = SwinConfig(
        s["image_size"],
        s["patch_size"],
        s["embed_dim"],
        tuple(s["depths"]),
        tuple(s["heads"]),
        s["window_size"],
        s["mlp_ratio"],
        "qkvo" if s["qkv_bias"] else "o",
    )
    return RamConfig(
        swin,
        config["tags"],
        config["label_dim"],
        t["encoder_width"],
        t["width"],
        t["heads"],
        t["mlp_width"],
        t["layers"],
    )


def in_one_row(made, target_mask_BM, prompts, length: int, like):
    """Prompt and answer without the padding between them, as the original's rows stand; its padding is left alone.

    `prompts`: the length of each row's prompt; `length`: where the answers start in `made`.
    """
    moved = like.copy()
    for b, start in enumerate(prompts):
        answer = int(target_mask_BM[b].sum())
        moved[b, :start], moved[b, start : start + answer] = made[b, :start], made[b, length : length + answer]
    return moved


def lion_of(config: dict, visual_input: str = "ALL") -> Lion:
    v, q, a, t = (config[name] for name in ("vision", "qformer", "aggregator", "t5"))
    adapters = AdapterConfig(config["adapters"]["bottleneck"], config["adapters"]["count"])
    return Lion(
        ViTConfig(
            v["image_size"], v["patch_size"], v["width"], v["depth"], v["heads"], v["mlp_width"], v["layer_norm_eps"]
        ),
        QFormerConfig(
            q["width"],
            q["layers"],
            q["heads"],
            q["mlp_width"],
            q["queries"],
            q["cross_attention_every"],
            q["vision_width"],
            q["vocab_size"],
            q["max_positions"],
            norm_eps=q["layer_norm_eps"],
        ),
        AggregatorConfig(
            a["query_layer"],
            tuple(a["context_layers"]),
            v["width"],
            a["heads"],
            a["mlp_width"],
            a["layer_norm_eps"],
            projector_mlp_dim=a["projector_width"],
        ),
        T5Config(
            vocab_size=t["vocab_size"],
            width=t["d_model"],
            head_dim=t["d_kv"],
            num_heads=t["heads"],
            mlp_dim=t["d_ff"],
            encoder_depth=t["encoder_layers"],
            decoder_depth=t["decoder_layers"],
            num_buckets=t["relative_attention_num_buckets"],
            max_distance=t["relative_attention_max_distance"],
            norm_eps=t["layer_norm_eps"],
            activation="gelu",
            decoder_start_token_id=t["decoder_start_token_id"],
            pad_token_id=t["pad_token_id"],
            eos_token_id=t["eos_token_id"],
            adapters=adapters,
        ),
        soft_prompt_token_id=config["soft_prompt"]["token_id"],
        visual_input=visual_input,
    )


def lion_batch(arrays, route: str) -> Batch:
    rows = len(arrays["image"])
    return Batch(
        image_BHWC=arrays["image"].transpose(0, 2, 3, 1),
        prompt_BL=arrays["t5_input_ids"].astype(np.int32),
        prompt_mask_BL=arrays["t5_attention_mask"],
        question_BL=arrays["qformer_input_ids"].astype(np.int32),
        question_mask_BL=arrays["qformer_attention_mask"],
        target_BM=arrays["target_ids"].astype(np.int32),
        target_mask_BM=arrays["target_mask"],
        loss_mask_BM=arrays["target_mask"],
        task_B=np.full(rows, CATEGORIES.index(route), np.int32),
        record_B=np.arange(rows, dtype=np.int32),
    )


def lion_states(lion: Lion, params, batch: Batch):
    """({name in arrays.npz: value}, loss) of one forward pass."""

    def everything(module, batch):
        seen_BTPD = module.encode_image(batch)
        encoded_BLD = module.language.encode(*module.embed_inputs(batch, None), batch.task_B)
        found = {"vit_output": seen_BTPD[:, -1], "t5_encoder_output": encoded_BLD}
        found["logits"] = module.logits(batch)
        for tap, layer in enumerate(lion.taps):
            found[f"vit_intermediate_{layer}"] = seen_BTPD[:, tap]
        if lion.visual_input != "AGGREGATOR":
            normed = module.qformer_norm(seen_BTPD[:, -1])
            found["qformer_output"] = module.qformer(normed, batch.question_BL, batch.question_mask_BL)
        if lion.visual_input != "QFORMER":
            context_TBPD = seen_BTPD.transpose(1, 0, 2, 3)[:-1]
            found["vision_aggregator_output"] = module.aggregator(seen_BTPD[:, -1], context_TBPD)
        return found

    found = LionModule(lion).apply({"params": params}, batch, method=everything)
    return found, lion.loss(params, batch)[0]
