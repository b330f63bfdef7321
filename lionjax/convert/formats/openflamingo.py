# SPDX-License-Identifier: Apache-2.0
"""OpenFlamingo: what was trained, beside the folder of its MPT and CLIP's own file, in one folder.

What was trained names a decoder's layer in one way or another by the version that saved it; here they have one name.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import (
    CheckpointFormat,
    abstract_params,
    read_hf_config,
    require_supported,
)
from lionjax.convert.formats.hf_vision import CLIP_FILE
from lionjax.convert.io.reader import TORCH_SUFFIXES, CheckpointTensors, open_weights
from lionjax.core import config as configs
from lionjax.core.types import UserError

KEY_PATTERNS = (
    (r"^module\.", ""),
    (r"^(lang_encoder\.)transformer\.blocks\.(\d+)\.gated_cross_attn_layer\.", r"\1gated_cross_attn_layers.\2."),
    (r"^(lang_encoder\.)transformer\.blocks\.(\d+)\.(?:decoder_layer\.)?", r"\1old_decoder_blocks.\2."),
)
GATE_PATTERN = re.compile(r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.attn_gate")
MPT_TYPES = ("mpt", "mosaic_gpt")


def open_flamingo(folder: Path) -> tuple[CheckpointFormat, Any, CheckpointTensors, Path]:
    """(kind, config, tensors, folder of the language model) of OpenFlamingo's parts in one folder.

    Raises UserError where a part is missing.
    """
    trained = [f for f in folder.iterdir() if f.suffix in TORCH_SUFFIXES and f.name != CLIP_FILE]
    texts = [f.parent for f in sorted(folder.glob("*/config.json")) if read_hf_config(f).get("model_type") in MPT_TYPES]
    if len(trained) != 1 or len(texts) != 1 or not (folder / CLIP_FILE).is_file():
        raise UserError(
            f"{folder} wants the parts of an OpenFlamingo: the trained file, {CLIP_FILE}, and the folder of its MPT"
        )
    tensors = open_weights(trained[0]).rename_keys(*KEY_PATTERNS)
    gates = [int(found[1]) for name in tensors if (found := GATE_PATTERN.fullmatch(name))]
    if not gates:
        raise UserError(f"{trained[0]} holds no gated layers, so it is no OpenFlamingo")
    text = open_weights(texts[0])
    if not any(name.startswith("transformer.") for name in text):
        text = text.with_prefix("transformer.")
    text = text.with_prefix("lang_encoder.").rename_keys(*KEY_PATTERNS)
    own = {name for name in tensors if name in text}
    text = CheckpointTensors(
        {n: w for n, w in text.items() if n not in own},
        text.files,
        text.skipped | {n: f"{trained[0].name} has its own" for n in own},
    )
    clip = open_weights(folder / CLIP_FILE)
    clip = clip.without_prefix("visual.").with_prefix("vision_encoder.")
    tensors = tensors | text | clip
    config = _config_from_tensors(read_hf_config(texts[0] / "config.json"), min(gates), tensors)
    return FLAMINGO, config, tensors, texts[0]


def _config_from_tensors(mpt_config: dict, first_cross_layer: int, tensors: CheckpointTensors) -> Any:
    """The sizes that the tensors have, around this MPT; heads are 64 wide everywhere, as in all that are released."""
    from lionjax.models.connectors.perceiver import ResamplerConfig
    from lionjax.models.language.decoder import MPT_7B
    from lionjax.models.vlm.flamingo import OPENFLAMINGO_9B
    from lionjax.nn.adapters import GatedCrossAttentionConfig

    more = mpt_config.get("attn_config") or {}
    require_supported(more.get("alibi", mpt_config.get("alibi", True)), "learned positions", "an MPT with ALiBi")
    require_supported(mpt_config.get("no_bias", True), "biases", "an MPT without them")
    width, heads = mpt_config["d_model"], mpt_config["n_heads"]

    def shape(name: str) -> tuple[int, ...]:
        return tensors[name].shape

    def count(name: str) -> int:
        return sum(re.fullmatch(name, other) is not None for other in tensors)

    words, gated = (
        shape("lang_encoder.transformer.wte.weight")[0],
        f"lang_encoder.gated_cross_attn_layers.{first_cross_layer}.",
    )
    inside, source = shape(gated + "attn.to_q.weight")[0], shape(gated + "attn.to_kv.weight")[1]
    looks = GatedCrossAttentionConfig(first_cross_layer + 1, source, inside // 64, 64, shape(gated + "ff.1.weight")[0])
    queries, inside = shape("perceiver.latents")[0], shape("perceiver.layers.0.0.to_q.weight")[0]
    resampler = ResamplerConfig(
        source,
        count(r"perceiver\.layers\.\d+\.0\.to_q\.weight"),
        inside // 64,
        64,
        shape("perceiver.layers.0.1.1.weight")[0],
        queries,
    )
    seen, _, patch, _ = shape("vision_encoder.conv1.weight")
    side = round((shape("vision_encoder.positional_embedding")[0] - 1) ** 0.5)
    vision = dataclasses.replace(
        OPENFLAMINGO_9B.vision,
        image=side * patch,
        patch=patch,
        width=seen,
        heads=seen // 64,
        depth=count(r"vision_encoder\.transformer\.resblocks\.\d+\.ln_1\.weight"),
        mlp_dim=shape("vision_encoder.transformer.resblocks.0.mlp.c_fc.weight")[0],
    )
    language = dataclasses.replace(
        MPT_7B,
        vocab=words,
        num_frozen_embeddings=words - 3,
        pad_token_id=words - 1,
        end_token=words - 3,
        width=width,
        layers=mpt_config["n_layers"],
        heads=heads,
        kv_heads=heads,
        head=width // heads,
        mlp_dim=width * mpt_config.get("expansion_ratio", mpt_config.get("mlp_ratio", 4)),
        eps=mpt_config.get("layer_norm_epsilon", 1e-5),
        qk_norm=bool(more.get("qk_ln", mpt_config.get("attn_qk_ln", False))),
        cross_attention=looks,
    )
    return dataclasses.replace(
        OPENFLAMINGO_9B, vision=vision, resampler=resampler, language=language, image_token=words - 2
    )


FLAMINGO = CheckpointFormat(
    "flamingo",
    ("flamingo",),
    lambda c: type(c).__name__ == "Flamingo",
    config_from_hf=lambda settings: configs.from_json(json.dumps(settings["system"])),
    config_to_hf=lambda c: {"model_type": "flamingo", "system": json.loads(configs.to_json(c))},
    weight_map=lambda c: c.weight_map(),
    abstract_params=abstract_params,
    ignore_patterns=(r"vision_encoder\.proj(?#behind the features that are used)",),
)
