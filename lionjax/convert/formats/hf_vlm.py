# SPDX-License-Identifier: Apache-2.0
"""LLaVA, BLIP-2 and InstructBLIP as published: Hugging Face's folders, and LLaVA's own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lionjax.convert.formats.checkpoint_format import Published, abstract, read_settings, refuse_unless
from lionjax.convert.formats.hf_language import LLAMA, OPT, T5
from lionjax.convert.formats.hf_vision import CLIP, LAVIS_IGNORES
from lionjax.convert.io.reader import Tensors, open_weights
from lionjax.core import config as configs
from lionjax.core.types import UserError

if TYPE_CHECKING:
    from lionjax.models.language.decoder import DecoderConfig
    from lionjax.models.language.t5 import T5Config
    from lionjax.models.vlm.visual_prefix import Prefix

# What transformers means where a folder's config.json says nothing of its language model's sizes.
LANGUAGES = {
    "llama": (
        LLAMA,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "opt": (
        OPT,
        {
            "vocab_size": 50272,
            "hidden_size": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
        },
    ),
    "t5": (T5, {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}),
}
CLIP_336 = {  # LLaVA's tower where it says nothing
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
CLIP_224 = CLIP_336 | {"image_size": 224}
TOWERS = {"openai/clip-vit-large-patch14-336": CLIP_336, "openai/clip-vit-large-patch14": CLIP_224}
LLAVA_SPELLINGS = (  # in the memory of newer versions, in files they write, in files as published
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)


def language_in(s: dict, default: str) -> Any:
    kind = s.get("model_type", default)
    refuse_unless(kind in LANGUAGES, f"a language model of type {kind!r}", ", ".join(LANGUAGES))
    published, sizes = LANGUAGES[kind]
    return published.config(sizes | s)


def _language_settings(c: DecoderConfig | T5Config) -> dict:
    kind = next(kind for kind, _ in LANGUAGES.values() if kind.describes(c))
    return kind.settings(c)


def _is(c: DecoderConfig | T5Config, fits: Callable[[Any], bool]) -> bool:
    return type(c).__name__ == "Prefix" and c.latents is None and fits(c.qformer)


# LLaVA


def _llava_config(s: dict) -> Any:
    from lionjax.models.vlm.visual_prefix import Prefix

    if "text_config" not in s:
        return _own_llava_config(s)
    act, layer = s.get("projector_hidden_act", "gelu"), s.get("vision_feature_layer", -2)
    refuse_unless(act == "gelu", f"projector_hidden_act {act!r}", "gelu")
    refuse_unless(s.get("multimodal_projector_bias", True), "no biases in its projector", "one with")
    refuse_unless(isinstance(layer, int), f"vision_feature_layer {layer}", "a single layer")
    vision = CLIP.config(s.get("vision_config") or CLIP_336)
    return Prefix(
        vision,
        language_in(s["text_config"], "llama"),
        feature_layer=layer if layer < 0 else layer - vision.depth - 1,
        class_token=s.get("vision_feature_select_strategy", "default") == "full",
        image_token=s.get("image_token_index", s.get("image_token_id", 32000)),
        in_front=False,
    )


def _own_llava_config(s: dict) -> Any:
    """LLaVA's own config.json: that of its language model, with fields of its own among them."""
    from lionjax.models.vlm.visual_prefix import Prefix

    tower, kind = s.get("mm_vision_tower"), s.get("mm_projector_type", "linear")
    vision = s.get("vision_config") or TOWERS.get(tower)
    refuse_unless(vision is not None, f"the vision tower {tower!r}", " or ".join(TOWERS))
    depths = {"linear": 1, "mlp1x_gelu": 1, "mlp2x_gelu": 2}
    refuse_unless(kind in depths, f"mm_projector_type {kind!r}", "linear or mlp2x_gelu")
    return Prefix(
        CLIP.config(vision),
        LLAMA.config(s),
        feature_layer=s.get("mm_vision_select_layer", -2),
        class_token=s.get("mm_vision_select_feature", "patch") == "cls_patch",
        projector_depth=depths[kind],
        image_token=s.get("image_token_index", OWN_IMAGE_TOKEN),
        in_front=False,
        names="original",
    )


# What LLaVA's code writes into a prompt for a picture; no word of any vocabulary.
OWN_IMAGE_TOKEN = -200
WORDS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def own_settings(c: Prefix, model_type: str) -> dict:
    """A config.json of our own for what no published one can say."""
    return {"model_type": model_type, "system": json.loads(configs.to_json(c))}


def _llava_settings(c: Prefix) -> dict:
    if c.names == "original" and (c.encodes or c.words or not c.vision.norm_before):
        return own_settings(c, "llava")
    if c.names == "original":
        return _own_llava_settings(c)
    words = c.language.vocab
    if c.image_token is None or not 0 <= c.image_token < words:
        raise UserError(
            f"Hugging Face's LLaVA wants a word of its {words} for the picture and image_token is {c.image_token}; "
            "add one, or set the system's names to 'original'"
        )
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": c.image_token,
        "image_seq_length": c.vision.patches + c.class_token,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": c.feature_layer,
        "vision_feature_select_strategy": "full" if c.class_token else "default",
        "tie_word_embeddings": c.language.tied,
        "text_config": _language_settings(c.language),
        "vision_config": CLIP.settings(c.vision),
    }


def _own_llava_settings(c: Prefix) -> dict:
    vision = CLIP.settings(c.vision)
    known = [name for name, sizes in TOWERS.items() if CLIP.config(sizes) == c.vision]
    own = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_hidden_size": c.vision.width,
        "mm_projector_type": "mlp2x_gelu" if c.projector_depth == 2 else "linear",
        "mm_vision_select_layer": c.feature_layer,
        "mm_vision_select_feature": "cls_patch" if c.class_token else "patch",
        "use_mm_proj": True,
    }
    own |= {"mm_vision_tower": known[0]} if known else {"vision_config": vision}
    if c.image_token not in (None, OWN_IMAGE_TOKEN):
        own["image_token_index"] = c.image_token
    return LLAMA.settings(c.language) | own


OWN_TOWER = "model.vision_tower.vision_tower."


def _llava_tensors(c: Prefix, tensors: Tensors, folder: Path) -> Tensors:
    """One spelling of many; and what the file leaves to others, as it holds only what was trained: CLIP, and LLaMA."""
    if c.names == "hugging_face":
        return tensors.respelled(*LLAVA_SPELLINGS)
    if not any(name.startswith("model.layers.") for name in tensors):
        tensors = projector_on(tensors, open_weights(_beside(folder, LLAMA, "language model")))
    if any(name.startswith(OWN_TOWER) for name in tensors):
        return tensors
    clip = open_weights(_beside(folder, CLIP, "vision tower"))
    if not any(name.startswith(CLIP.base) for name in clip):
        clip = clip.under(CLIP.base)
    return tensors | clip.under(OWN_TOWER)


def _beside(folder: Path, kind: Published, what: str) -> Path:
    """The one folder of a kind inside another."""
    found = [
        f.parent for f in sorted(folder.glob("*/config.json")) if read_settings(f).get("model_type") in kind.model_types
    ]
    if len(found) != 1:
        raise UserError(
            f"{folder} holds no {what}; put the folder of its {kind.name} (config.json and weights) inside it"
        )
    return found[0]


def projector_on(trained: Tensors, language: Tensors) -> Tensors:
    """LLaVA's mm_projector.bin with its language model. Where it holds a word table, new words were trained with it.

    As LLaVA's code does it: their rows are the last of that table, and in the head the mean of all others.
    """
    if WORDS not in trained:
        return trained | language
    words, table, head = trained[WORDS], language[WORDS], language[HEAD]
    # A table with all words in it, or one of the new alone.
    new = len(words) - len(table) if len(words) > len(table) else len(words)
    arrays = {name: array for name, array in trained.items() if name != WORDS}
    arrays |= {name: array for name, array in language.items() if name not in (WORDS, HEAD)}
    arrays[WORDS] = np.concatenate([table, words[len(words) - new :].astype(table.dtype)])
    mean = head.mean(0, dtype=np.float32).astype(head.dtype)
    arrays[HEAD] = np.concatenate([head, np.broadcast_to(mean, (new, *mean.shape))])
    made = Tensors(arrays, trained.sources + language.sources, trained.left | language.left)
    made.mapped = (trained.mapped | language.mapped) - {WORDS, HEAD}
    return made


# BLIP-2 and InstructBLIP


def _blip_config(s: dict, text: bool) -> Any:
    from lionjax.models.connectors.qformer import QFormerConfig
    from lionjax.models.vision.vit import ViTConfig
    from lionjax.models.vlm.visual_prefix import Prefix

    v, q = s.get("vision_config") or {}, s.get("qformer_config") or {}
    act = v.get("hidden_act", "gelu")
    refuse_unless(act in ("gelu", "quick_gelu"), f"hidden_act {act!r}", "gelu or quick_gelu")
    refuse_unless(v.get("qkv_bias", True), "no biases on queries and values", "a tower with them")
    refuse_unless(not q.get("use_qformer_text_input"), "heads for retrieval", "one that talks")
    width, eps = v.get("hidden_size", 1408), v.get("layer_norm_eps", 1e-6)
    return Prefix(
        ViTConfig(
            v.get("image_size", 224),
            v.get("patch_size", 14),
            width,
            v.get("num_hidden_layers", 39),
            v.get("num_attention_heads", 16),
            v.get("intermediate_size", 6144),
            eps,
            act,
        ),
        language_in(s.get("text_config") or {}, "opt"),
        QFormerConfig(
            q.get("hidden_size", 768),
            q.get("num_hidden_layers", 12),
            q.get("num_attention_heads", 12),
            q.get("intermediate_size", 3072),
            s.get("num_query_tokens", 32),
            q.get("cross_attention_frequency", 2),
            width,
            q.get("vocab_size", 30522),
            q.get("max_position_embeddings", 512),
            q.get("layer_norm_eps", 1e-12),
            q.get("hidden_dropout_prob", 0.1),
            text,
        ),
        feature_layer=-1,
        class_token=True,
        vision_eps=eps,
        projector_depth=1,
        image_token=s.get("image_token_index", s.get("image_token_id")),
    )


def _blip_settings(c: Prefix) -> dict:
    """Hugging Face has one epsilon for the tower's norms and the one behind it, where LAVIS has 1e-6 and 1e-5."""
    text, q = c.qformer.text, c.qformer
    settings = {
        "architectures": [f"{'InstructBlip' if text else 'Blip2'}ForConditionalGeneration"],
        "model_type": "instructblip" if text else "blip-2",
        "num_query_tokens": q.queries,
        "use_decoder_only_language_model": not c.encodes,
        "text_config": _language_settings(c.language),
        "vision_config": {
            "model_type": "instructblip_vision_model" if text else "blip_2_vision_model",
            "image_size": c.vision.image,
            "patch_size": c.vision.patch,
            "hidden_size": c.vision.width,
            "num_hidden_layers": c.vision.depth,
            "num_attention_heads": c.vision.heads,
            "intermediate_size": c.vision.hidden,
            "layer_norm_eps": c.vision.eps,
            "hidden_act": c.vision.activation,
            "qkv_bias": True,
        },
        "qformer_config": {
            "model_type": "instructblip_qformer" if text else "blip_2_qformer",
            "vocab_size": q.vocab,
            "hidden_size": q.width,
            "num_hidden_layers": q.layers,
            "num_attention_heads": q.heads,
            "intermediate_size": q.hidden,
            "max_position_embeddings": q.positions,
            "cross_attention_frequency": q.cross_every,
            "encoder_hidden_size": q.vision_width,
            "layer_norm_eps": q.eps,
            "hidden_dropout_prob": q.dropout,
            "attention_probs_dropout_prob": q.dropout,
        },
    }
    return settings | ({} if c.image_token is None else {"image_token_index": c.image_token})


def _whole_settings(settings: Callable[[Any], dict]) -> Callable[[Any], dict]:
    """Settings as Hugging Face's where the names are; else our own config, as nobody else has one."""

    def made(c: Prefix) -> dict:
        if c.names == "hugging_face":
            return settings(c)
        return own_settings(c, "lavis")

    return made


_IDS = r".*(vision_model\.embeddings|qformer\.embeddings)\.position_ids(?#they only count)"
_TURNS = r".*model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq(?#computed)"
_UNUSED = r"(language_model|t5_model)\." + T5.ignore[0]
_STAGE_1 = r"Qformer\.cls\..*|(vision_proj|text_proj|itm_head)\..*|temp(?#heads of its first stage)"
_BLIP_IGNORES = (_IDS, _TURNS, _UNUSED, _STAGE_1, LAVIS_IGNORES)
_COPIES = tuple((f"{x}_model.lm_head.weight", f"{x}_model.shared.weight") for x in ("language", "t5"))

LLAVA = Published(
    "llava",
    ("llava", "llava_llama"),
    lambda c: _is(c, lambda q: q is None),
    _llava_config,
    _llava_settings,
    lambda c: c.torch_rows(),
    abstract,
    ignore=(_IDS, _TURNS),
    complete=_llava_tensors,
)
BLIP2 = Published(
    "blip2",
    ("blip-2",),
    lambda c: _is(c, lambda q: q is not None and not q.text),
    lambda s: _blip_config(s, False),
    _whole_settings(_blip_settings),
    lambda c: c.torch_rows(),
    abstract,
    ignore=_BLIP_IGNORES,
    copies=_COPIES,
)
INSTRUCTBLIP = Published(
    "instructblip",
    ("instructblip",),
    lambda c: _is(c, lambda q: q is not None and q.text),
    lambda s: _blip_config(s, True),
    _whole_settings(_blip_settings),
    lambda c: c.torch_rows(),
    abstract,
    ignore=_BLIP_IGNORES,
    copies=_COPIES,
)
PICTURE_FIRST = (LLAVA, BLIP2, INSTRUCTBLIP)
