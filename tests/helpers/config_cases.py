# SPDX-License-Identifier: Apache-2.0
"""One tiny model of transformers for each model_type that convert reads, with the tables of its config."""

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import tiny_prefix as tiny
import torch
import transformers
from transformers.models.kosmos2 import configuration_kosmos2
from transformers.models.sam import configuration_sam

from lionjax.convert.formats import bert, clip, hf_language, hf_vision, hf_vlm, kosmos2, sam
from lionjax.convert.formats.config_table import ConfigTable
from lionjax.models.language.bert import Bert
from lionjax.models.language.decoder import Decoder
from lionjax.models.language.t5 import T5
from lionjax.models.vision.sam_decoder import Sam
from lionjax.models.vision.swin import Swin
from lionjax.models.vision.vit import ViT
from lionjax.models.vlm.clip import ClipModule

IDS = np.random.default_rng(0).integers(3, 40, (2, 7))
ONES = np.ones_like(IDS)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model_type: the fields of a tiny config.json, the tables that read it, and the outputs of both sides."""

    settings: Mapping[str, Any]
    config_class: type
    model_class: type
    checkpoint_format: Any
    tables: Mapping[str, tuple[ConfigTable, type]]  # path of the config -> (table, transformers' config class)
    theirs: Callable[..., Any]  # (model, inputs) -> tensor
    ours: Callable[..., Any]  # (config, params, inputs) -> array
    inputs: Callable[[Any], Any] = lambda config: None  # (lionjax config) -> inputs of both
    part: str = ""  # the submodule of transformers' model that lionjax reads and `theirs` runs


def decoder_logits(c, params, _):
    def run(module, ids, mask):
        return module.logits(module(module.embed(ids), mask))

    return Decoder(c).apply({"params": params}, jnp.asarray(IDS), jnp.asarray(ONES), method=run)


def t5_logits(c, params, _):
    def run(module, ids, mask):
        encoded = module.encode(module.embed(ids), mask)
        return module.decode(ids, mask, encoded, mask)

    return T5(c).apply({"params": params}, jnp.asarray(IDS), jnp.asarray(ONES), method=run)


def pixels(side: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 3, side, side)).astype(np.float32)


def nhwc(image_BCHW: np.ndarray):
    return jnp.asarray(image_BCHW.transpose(0, 2, 3, 1))


def causal(model, _):
    return model(input_ids=torch.tensor(IDS)).logits


def two_tower_logits(model, _):
    return model(input_ids=torch.tensor(IDS), pixel_values=torch.tensor(pixels(14))).logits_per_image


def two_tower_similarity(c, params, _):
    image_BE = c.embed_images(params, nhwc(pixels(14)))
    text_BE = c.embed_texts(params, jnp.asarray(IDS))
    return ClipModule(c).apply({"params": params}, image_BE, text_BE, method=ClipModule.similarity)


LANGUAGE = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP_TEXT = LANGUAGE | {"intermediate_size": 40, "max_position_embeddings": 20}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 14,
    "patch_size": 7,
}
LLAMA = LANGUAGE | {"intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 32}
OPT = LANGUAGE | {"ffn_dim": 40, "max_position_embeddings": 32, "word_embed_proj_dim": 24}
T5_SIZES = {"vocab_size": 50, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 2, "num_heads": 4} | {
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
SAM_SETTINGS = {
    "vision_config": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
        "mlp_dim": 48,
        "window_size": 3,
        "global_attn_indexes": [1],
        "output_channels": 16,
        "num_pos_feats": 8,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 8},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 12},
}
QFORMER = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 20,
    "encoder_hidden_size": 24,
}
BOX = np.array([[[4.0, 6.0, 20.0, 25.0]]], np.float32)


def sam_masks(model, _):
    out = model(pixel_values=torch.tensor(pixels(32)[:1]), input_boxes=torch.tensor(BOX), multimask_output=True)
    return out.pred_masks[0, 0]


def our_sam_masks(c, params, _):
    masks = Sam(c).apply({"params": params}, nhwc(pixels(32)[:1]), None, None, jnp.asarray(BOX), None)
    return masks[0][0, 0][1:]


def vlm(settings: dict, kind: str, tables: dict, checkpoint_format) -> Case:
    def inputs(system):
        batch = tiny.batch_of(system, random.Random(3))
        return system, batch, tiny.inputs(system, batch)

    def theirs(model, inputs):
        system, batch, arguments = inputs
        return np.concatenate(tiny.answer_logits(system, batch, model(**arguments).logits.numpy()))

    def ours(c, params, inputs):
        _, batch, _ = inputs
        logits = np.asarray(c.logits(params, batch))
        return np.concatenate([row[:n] for row, n in zip(logits, batch.target_mask_BM.sum(1))])

    classes = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForConditionalGeneration")
    return Case(settings, *classes, checkpoint_format, tables, theirs, ours, inputs)


def kosmos(settings: dict, tables: dict) -> Case:
    classes = transformers.Kosmos2Config, transformers.Kosmos2ForConditionalGeneration

    def inputs(system):
        system = dataclasses.replace(system, image_token_id=tiny.IMAGE_TOKEN)
        batch = tiny.batch_of(system, random.Random(3), rows=1)
        arguments = tiny.inputs(system, batch)
        arguments["image_embeds_position_mask"] = arguments["input_ids"] == tiny.IMAGE_TOKEN
        return system, batch, arguments

    def theirs(model, inputs):
        system, batch, arguments = inputs
        return np.concatenate(tiny.answer_logits(system, batch, model(**arguments).logits.numpy()))

    def ours(c, params, inputs):
        _, batch, _ = inputs
        c = dataclasses.replace(c, image_token_id=tiny.IMAGE_TOKEN)
        logits = np.asarray(c.logits(params, batch))
        return np.concatenate([row[:n] for row, n in zip(logits, batch.target_mask_BM.sum(1))])

    return Case(settings, *classes, kosmos2.KOSMOS_2, tables, theirs, ours, inputs)


LLAMA_TABLES = {"": (hf_language.LLAMA_TABLE, transformers.LlamaConfig)}
TEXT_TABLES = {
    "llama": (hf_language.LLAMA_TABLE, transformers.LlamaConfig),
    "opt": (hf_language.OPT_TABLE, transformers.OPTConfig),
    "t5": (hf_language.T5_TABLE, transformers.T5Config),
}
CLIP_VISION = (hf_vision.CLIP_VISION_TABLE, transformers.CLIPVisionConfig)


def blip2(kind: str, text: dict, checkpoint_format) -> Case:
    settings = {
        "text_config": text,
        "vision_config": VISION,
        "qformer_config": QFORMER,
        "num_query_tokens": 3,
        "image_token_index": tiny.IMAGE_TOKEN,
    }
    tables = {
        "": (hf_vlm.BLIP2_TABLE, getattr(transformers, f"{kind}Config")),
        "text_config": TEXT_TABLES[text["model_type"]],
        "vision_config": (hf_vlm.BLIP2_VISION_TABLE, getattr(transformers, f"{kind}VisionConfig")),
        "qformer_config": (hf_vlm.QFORMER_TABLE, getattr(transformers, f"{kind}QFormerConfig")),
    }
    return vlm(settings, kind, tables, checkpoint_format)


CASES = {
    "llama": Case(
        LLAMA,
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        hf_language.LLAMA,
        LLAMA_TABLES,
        causal,
        decoder_logits,
    ),
    "mistral": Case(
        LLAMA | {"model_type": "mistral", "sliding_window": None},
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        hf_language.LLAMA,
        {"": (hf_language.MISTRAL_TABLE, transformers.MistralConfig)},
        causal,
        decoder_logits,
    ),
    "opt": Case(
        OPT,
        transformers.OPTConfig,
        transformers.OPTForCausalLM,
        hf_language.OPT,
        {"": TEXT_TABLES["opt"]},
        causal,
        decoder_logits,
    ),
    "gpt2": Case(
        {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 32},
        transformers.GPT2Config,
        transformers.GPT2LMHeadModel,
        hf_language.GPT2,
        {"": (hf_language.GPT2_TABLE, transformers.GPT2Config)},
        causal,
        decoder_logits,
    ),
    "t5": Case(
        T5_SIZES,
        transformers.T5Config,
        transformers.T5ForConditionalGeneration,
        hf_language.T5,
        {"": TEXT_TABLES["t5"]},
        lambda model, _: model(input_ids=torch.tensor(IDS), decoder_input_ids=torch.tensor(IDS)).logits,
        t5_logits,
    ),
    "bert": Case(
        LANGUAGE | {"intermediate_size": 40, "max_position_embeddings": 20, "type_vocab_size": 3},
        transformers.BertConfig,
        transformers.BertModel,
        bert.BERT,
        {"": (bert.TABLE, transformers.BertConfig)},
        lambda model, _: model(input_ids=torch.tensor(IDS)).last_hidden_state,
        lambda c, params, _: Bert(c).apply({"params": params}, jnp.asarray(IDS), jnp.asarray(ONES))[0],
    ),
    "clip_vision_model": Case(
        VISION,
        transformers.CLIPVisionConfig,
        transformers.CLIPVisionModel,
        hf_vision.CLIP,
        {"": CLIP_VISION},
        lambda model, _: model(pixel_values=torch.tensor(pixels(14))).last_hidden_state,
        lambda c, params, _: ViT(c).apply({"params": params}, nhwc(pixels(14)))[0],
    ),
    "clip": Case(
        {"vision_config": VISION, "text_config": CLIP_TEXT | {"eos_token_id": int(IDS[0, 3])}, "projection_dim": 10},
        transformers.CLIPConfig,
        transformers.CLIPModel,
        clip.CLIP_MODEL,
        {
            "": (clip.CLIP_MODEL_TABLE, transformers.CLIPConfig),
            "vision_config": CLIP_VISION,
            "text_config": (clip.CLIP_TEXT_TABLE, transformers.CLIPTextConfig),
        },
        two_tower_logits,
        two_tower_similarity,
    ),
    "siglip": Case(
        {"vision_config": VISION, "text_config": CLIP_TEXT | {"max_position_embeddings": IDS.shape[1]}},
        transformers.SiglipConfig,
        transformers.SiglipModel,
        clip.SIGLIP,
        {
            "": (clip.SIGLIP_TABLE, transformers.SiglipConfig),
            "vision_config": (clip.SIGLIP_VISION_TABLE, transformers.SiglipVisionConfig),
            "text_config": (clip.SIGLIP_TEXT_TABLE, transformers.SiglipTextConfig),
        },
        two_tower_logits,
        two_tower_similarity,
    ),
    "swin": Case(
        {"image_size": 24, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2, "mlp_ratio": 2.0},
        transformers.SwinConfig,
        transformers.SwinModel,
        hf_vision.SWIN,
        {"": (hf_vision.SWIN_TABLE, transformers.SwinConfig)},
        lambda model, _: model(pixel_values=torch.tensor(pixels(24))).last_hidden_state,
        lambda c, params, _: Swin(c).apply({"params": params}, nhwc(pixels(24)))[0],
    ),
    "sam": Case(
        SAM_SETTINGS,
        transformers.SamConfig,
        transformers.SamModel,
        sam.SAM,
        {
            "": (sam.SAM_TABLE, transformers.SamConfig),
            "vision_config": (sam.ENCODER_TABLE, configuration_sam.SamVisionConfig),
            "prompt_encoder_config": (sam.PROMPT_TABLE, configuration_sam.SamPromptEncoderConfig),
            "mask_decoder_config": (sam.DECODER_TABLE, configuration_sam.SamMaskDecoderConfig),
        },
        sam_masks,
        our_sam_masks,
    ),
    "llava": vlm(
        {
            "text_config": LLAMA | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": tiny.IMAGE_TOKEN,
        },
        "Llava",
        {
            "": (hf_vlm.LLAVA_TABLE, transformers.LlavaConfig),
            "text_config": TEXT_TABLES["llama"],
            "vision_config": CLIP_VISION,
        },
        hf_vlm.LLAVA,
    ),
    "blip-2": blip2("Blip2", OPT | {"model_type": "opt"}, hf_vlm.BLIP2),
    "instructblip": blip2("InstructBlip", T5_SIZES | {"model_type": "t5"}, hf_vlm.INSTRUCTBLIP),
    "kosmos-2": kosmos(
        {
            "text_config": {
                "vocab_size": 50,
                "embed_dim": 24,
                "layers": 2,
                "ffn_dim": 40,
                "attention_heads": 4,
                "max_position_embeddings": 64,
                "pad_token_id": tiny.PAD,  # transformers counts positions of other tokens only
                "bos_token_id": tiny.START,
            },
            "vision_config": VISION,
            "latent_query_num": 3,
        },
        {
            "": (kosmos2.TABLE, transformers.Kosmos2Config),
            "text_config": (kosmos2.TEXT_TABLE, configuration_kosmos2.Kosmos2TextConfig),
            "vision_config": (kosmos2.VISION_TABLE, configuration_kosmos2.Kosmos2VisionConfig),
        },
    ),
}
