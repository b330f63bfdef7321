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

from lionjax.convert.formats.checkpoint_format import Published, abstract, read_settings, refuse_unless
from lionjax.convert.formats.hf_vision import CLIP_FILE
from lionjax.convert.io.reader import TORCH_SUFFIXES, Tensors, open_weights
from lionjax.core import config as configs
from lionjax.core.types import UserError

SPELLINGS = (
    (r"^module\.", ""),
    (r"^(lang_encoder\.)transformer\.blocks\.(\d+)\.gated_cross_attn_layer\.", r"\1gated_cross_attn_layers.\2."),
    (r"^(lang_encoder\.)transformer\.blocks\.(\d+)\.(?:decoder_layer\.)?", r"\1old_decoder_blocks.\2."),
)
GATE = re.compile(r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.attn_gate")
MPT_TYPES = ("mpt", "mosaic_gpt")


def open_flamingo(folder: Path) -> tuple[Published, Any, Tensors, Path]:
    """(kind, config, tensors, folder of the language model) of OpenFlamingo's parts in one folder.

    Raises UserError where a part is missing.
    """
    trained = [f for f in folder.iterdir() if f.suffix in TORCH_SUFFIXES and f.name != CLIP_FILE]
    texts = [f.parent for f in sorted(folder.glob("*/config.json")) if read_settings(f).get("model_type") in MPT_TYPES]
    if len(trained) != 1 or len(texts) != 1 or not (folder / CLIP_FILE).is_file():
        raise UserError(
            f"{folder} wants the parts of an OpenFlamingo: the trained file, {CLIP_FILE}, and the folder of its MPT"
        )
    tensors = open_weights(trained[0]).respelled(*SPELLINGS)
    gates = [int(found[1]) for name in tensors if (found := GATE.fullmatch(name))]
    if not gates:
        raise UserError(f"{trained[0]} holds no gated layers, so it is no OpenFlamingo")
    text = open_weights(texts[0])
    if not any(name.startswith("transformer.") for name in text):
        text = text.under("transformer.")
    text = text.under("lang_encoder.").respelled(*SPELLINGS)
    own = {name for name in tensors if name in text}
    text = Tensors(
        {n: w for n, w in text.items() if n not in own},
        text.sources,
        text.left | {n: f"{trained[0].name} has its own" for n in own},
    )
    clip = open_weights(folder / CLIP_FILE)
    clip = clip.without("visual.").under("vision_encoder.")
    tensors = tensors | text | clip
    config = _config(read_settings(texts[0] / "config.json"), min(gates), tensors)
    return FLAMINGO, config, tensors, texts[0]


def _config(s: dict, first: int, tensors: Tensors) -> Any:
    """The sizes that the tensors have, around this MPT; heads are 64 wide everywhere, as in all that are released."""
    from lionjax.models.connectors.perceiver import ResamplerConfig
    from lionjax.models.language.decoder import MPT_7B
    from lionjax.models.vlm.flamingo import OPENFLAMINGO_9B
    from lionjax.nn.adapters import CrossConfig

    more = s.get("attn_config") or {}
    refuse_unless(more.get("alibi", s.get("alibi", True)), "learned positions", "an MPT with ALiBi")
    refuse_unless(s.get("no_bias", True), "biases", "an MPT without them")
    width, heads = s["d_model"], s["n_heads"]

    def shape(name: str) -> tuple[int, ...]:
        return tensors[name].shape

    def count(name: str) -> int:
        return sum(re.fullmatch(name, other) is not None for other in tensors)

    words, gated = shape("lang_encoder.transformer.wte.weight")[0], f"lang_encoder.gated_cross_attn_layers.{first}."
    inside, source = shape(gated + "attn.to_q.weight")[0], shape(gated + "attn.to_kv.weight")[1]
    looks = CrossConfig(first + 1, source, inside // 64, 64, shape(gated + "ff.1.weight")[0])
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
        hidden=shape("vision_encoder.transformer.resblocks.0.mlp.c_fc.weight")[0],
    )
    language = dataclasses.replace(
        MPT_7B,
        vocab=words,
        frozen_words=words - 3,
        pad_token=words - 1,
        end_token=words - 3,
        width=width,
        layers=s["n_layers"],
        heads=heads,
        kv_heads=heads,
        head=width // heads,
        hidden=width * s.get("expansion_ratio", s.get("mlp_ratio", 4)),
        eps=s.get("layer_norm_epsilon", 1e-5),
        qk_norms=bool(more.get("qk_ln", s.get("attn_qk_ln", False))),
        cross=looks,
    )
    return dataclasses.replace(
        OPENFLAMINGO_9B, vision=vision, resampler=resampler, language=language, image_token=words - 2
    )


FLAMINGO = Published(
    "flamingo",
    ("flamingo",),
    lambda c: type(c).__name__ == "Flamingo",
    config=lambda settings: configs.from_json(json.dumps(settings["system"])),
    settings=lambda c: {"model_type": "flamingo", "system": json.loads(configs.to_json(c))},
    rows=lambda c: c.torch_rows(),
    abstract=abstract,
    ignore=(r"vision_encoder\.proj(?#behind the features that are used)",),
)
