# SPDX-License-Identifier: Apache-2.0
"""OpenFlamingo (arXiv 2308.01390): a file of trained weights next to the folder of its MPT and CLIP's file.

Versions of OpenFlamingo name the decoder layers differently; `KEY_PATTERNS` maps them to one name.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, lionjax_config_format, read_hf_config
from lionjax.convert.formats.config_table import ConfigTable
from lionjax.convert.formats.hf_vision import CLIP_FILE
from lionjax.convert.io.key_names import remove_generic_prefix
from lionjax.convert.io.reader import TORCH_SUFFIXES, CheckpointTensors, open_weights
from lionjax.core.types import UserError

KEY_PATTERNS = (
    (r"^module\.", ""),
    (r"^(lang_encoder\.)transformer\.blocks\.(\d+)\.gated_cross_attn_layer\.", r"\1gated_cross_attn_layers.\2."),
    (r"^(lang_encoder\.)transformer\.blocks\.(\d+)\.(?:decoder_layer\.)?", r"\1old_decoder_blocks.\2."),
)
GATE_PATTERN = re.compile(r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.attn_gate")
MPT_TYPES = ("mpt", "mosaic_gpt")
_MPT_ATTENTION_FIXED = {
    "prefix_lm": (False, None),
    "softmax_scale": (None,),
    "attn_uses_sequence_id": (False, None),
} | {"alibi": (True,), "alibi_bias_max": (8,)}
MPT_ATTENTION_TABLE = ConfigTable(
    ("",),
    computed={"qk_ln": False},
    fixed=_MPT_ATTENTION_FIXED | {"attn_type": ("multihead_attention",), "clip_qkv": (None,)},
    inert=("attn_impl", "attn_pdrop"),
)
# MPT of transformers and of its makers; an earlier version, `mosaic_gpt`, has no attn_config but its fields.
MPT_TABLE = ConfigTable(
    MPT_TYPES,
    computed={
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "expansion_ratio": None,
        "mlp_ratio": None,
        "layer_norm_epsilon": 1e-5,
        "attn_qk_ln": False,
    },
    fixed=_MPT_ATTENTION_FIXED
    | {
        "attn_clip_qkv": (None,),
        "no_bias": (True,),
        "logit_scale": (None,),
        "norm_type": ("low_precision_layernorm", "layernorm"),
        "tie_word_embeddings": (True,),
    },
    # vocab_size comes from the tensors; with ALiBi there is no table of learned positions.
    inert=(
        "vocab_size max_seq_len learned_pos_emb resid_pdrop emb_pdrop attn_pdrop attn_impl embedding_fraction "
        "low_precision_layernorm init_device init_config verbose tokenizer_name emb_init_std emb_init_uniform_lim "
        "fan_mode init_div_is_residual init_gain init_nonlinearity param_init_fn is_decoder"
    ).split(),
    parts=("attn_config",),
    aliases={"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"},
)


def open_flamingo(folder: Path) -> tuple[CheckpointFormat, Any, CheckpointTensors, Path]:
    """(checkpoint format, config, tensors, folder of the language model) from OpenFlamingo's parts in one folder.

    Raises UserError where a part is missing.
    """
    trained = [f for f in folder.iterdir() if f.suffix in TORCH_SUFFIXES and f.name != CLIP_FILE]
    mpt_folders = [
        f.parent for f in sorted(folder.glob("*/config.json")) if read_hf_config(f).get("model_type") in MPT_TYPES
    ]
    if len(trained) != 1 or len(mpt_folders) != 1 or not (folder / CLIP_FILE).is_file():
        raise UserError(
            f"{folder} needs the parts of an OpenFlamingo: the trained file, {CLIP_FILE}, and the folder of its MPT"
        )
    tensors = remove_generic_prefix(open_weights(trained[0])).rename_keys(*KEY_PATTERNS)
    gated_layers = [int(match[1]) for name in tensors if (match := GATE_PATTERN.fullmatch(name))]
    if not gated_layers:
        raise UserError(f"{trained[0]} has no gated cross-attention layers, so it is no OpenFlamingo")
    language = remove_generic_prefix(open_weights(mpt_folders[0]))
    if not any(name.startswith("transformer.") for name in language):
        language = language.with_prefix("transformer.")
    language = language.with_prefix("lang_encoder.").rename_keys(*KEY_PATTERNS)
    overridden = {name for name in tensors if name in language}
    language = CheckpointTensors(
        {n: w for n, w in language.items() if n not in overridden},
        language.files,
        language.skipped | {n: f"{trained[0].name} has its own" for n in overridden},
    )
    clip = remove_generic_prefix(open_weights(folder / CLIP_FILE))
    clip = clip.without_prefix("visual.").with_prefix("vision_encoder.")
    tensors = tensors | language | clip
    config = _config_from_tensors(read_hf_config(mpt_folders[0] / "config.json"), min(gated_layers), tensors)
    return FLAMINGO, config, tensors, mpt_folders[0]


def _config_from_tensors(mpt_config: dict, first_cross_layer: int, tensors: CheckpointTensors) -> Any:
    """The config of this MPT and these tensors; heads have 64 dimensions, as in all released models."""
    from lionjax.models.connectors.perceiver import ResamplerConfig
    from lionjax.models.language.decoder import MPT_7B
    from lionjax.models.vlm.flamingo import OPENFLAMINGO_9B
    from lionjax.nn.adapters import GatedCrossAttentionConfig

    s = MPT_TABLE.read(mpt_config)
    attention = MPT_ATTENTION_TABLE.read(s["attn_config"], "attn_config")
    width, heads = s["d_model"], s["n_heads"]
    ratio = next((ratio for ratio in (s["expansion_ratio"], s["mlp_ratio"]) if ratio is not None), 4)

    def shape(name: str) -> tuple[int, ...]:
        return tensors[name].shape

    def count(name: str) -> int:
        return sum(re.fullmatch(name, other) is not None for other in tensors)

    vocab_size = shape("lang_encoder.transformer.wte.weight")[0]
    gated = f"lang_encoder.gated_cross_attn_layers.{first_cross_layer}."
    inner_width, source_width = shape(gated + "attn.to_q.weight")[0], shape(gated + "attn.to_kv.weight")[1]
    cross_attention = GatedCrossAttentionConfig(
        first_cross_layer + 1, source_width, inner_width // 64, 64, shape(gated + "ff.1.weight")[0]
    )
    resampler = ResamplerConfig(
        source_width,
        count(r"perceiver\.layers\.\d+\.0\.to_q\.weight"),
        shape("perceiver.layers.0.0.to_q.weight")[0] // 64,
        64,
        shape("perceiver.layers.0.1.1.weight")[0],
        shape("perceiver.latents")[0],
    )
    vision_width, _, patch_size, _ = shape("vision_encoder.conv1.weight")
    side = round((shape("vision_encoder.positional_embedding")[0] - 1) ** 0.5)
    vision = dataclasses.replace(
        OPENFLAMINGO_9B.vision,
        image_size=side * patch_size,
        patch_size=patch_size,
        width=vision_width,
        num_heads=vision_width // 64,
        depth=count(r"vision_encoder\.transformer\.resblocks\.\d+\.ln_1\.weight"),
        mlp_dim=shape("vision_encoder.transformer.resblocks.0.mlp.c_fc.weight")[0],
    )
    language = dataclasses.replace(
        MPT_7B,
        vocab_size=vocab_size,
        num_frozen_embeddings=vocab_size - 3,
        pad_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 3,
        width=width,
        depth=s["n_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=width * ratio,
        norm_eps=s["layer_norm_epsilon"],
        qk_norm=attention["qk_ln"] or s["attn_qk_ln"],
        cross_attention=cross_attention,
    )
    return dataclasses.replace(
        OPENFLAMINGO_9B, vision=vision, resampler=resampler, language=language, image_token_id=vocab_size - 2
    )


FLAMINGO = lionjax_config_format(
    "flamingo", "Flamingo", ignore_patterns=(r"vision_encoder\.proj(?#after the features that are used)",)
)
