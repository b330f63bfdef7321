# SPDX-License-Identifier: Apache-2.0
"""Folders of tiny models that stand in for released weights of the nine systems of `lionjax reproduce`."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import small_nextchat
import tiny_released
from published_folders import tiny_lion

from lionjax import convert
from lionjax.convert.formats import detect
from lionjax.models.vlm.visual_prefix import SHIKRA_7B

IMAGE_TOKENS = ["<im_patch>", "<im_start>", "<im_end>"]


def save(name: str, folder: Path) -> Path:
    """A tiny model of a system with its tokenizers, in the layout of its release or in our own; returns `folder`."""
    if name in ("llava", "blip2", "instructblip"):
        tiny_released.save({"blip2": "blip2_opt"}.get(name, name), folder)
    elif name == "kosmos2":
        tiny_released.save_kosmos2(folder)
    elif name == "lion":
        save_lion(folder)
    else:
        save_llama_based(name, folder)
    return folder


def random_params(config):
    """Random float32 parameters of a model of some sizes."""
    rng = np.random.default_rng(0)
    _, shapes = detect.weight_map_and_abstract_params(detect.format_of_config(config), config)
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


def save_llama_based(name: str, folder: Path) -> None:
    """A tiny Shikra or NExT-Chat with a LLaMA tokenizer and their added tokens."""
    tokenizer = tiny_released.llama_tokenizer()
    tokenizer.add_tokens(IMAGE_TOKENS + ["<at>", "<boxes>"] * (name == "nextchat"), special_tokens=True)
    size = len(tokenizer)
    if name == "nextchat":
        tiny = small_nextchat.TINY
        language = dataclasses.replace(tiny.language, vocab_size=size)
        ids = {"image_token_id": size - 5, "trigger_token_id": size - 2, "box_token_id": size - 1}
        config = dataclasses.replace(tiny, language=language, **ids)
    else:
        sizes = {"width": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 24}
        language = dataclasses.replace(SHIKRA_7B.language, vocab_size=size, **sizes)
        sizes = {"image_size": 28, "patch_size": 14, "width": 12, "depth": 2, "num_heads": 2, "mlp_dim": 20}
        vision = dataclasses.replace(SHIKRA_7B.vision, **sizes)
        config = dataclasses.replace(SHIKRA_7B, vision=vision, language=language, image_token_id=size - 3)
    convert.to_torch(config, random_params(config), folder)
    tokenizer.save_pretrained(folder)


def save_lion(folder: Path) -> None:
    """A tiny LION with T5's tokenizer, and BERT's for the Q-Former."""
    t5, bert, tiny = tiny_released.t5_tokenizer(), tiny_released.bert_tokenizer(), tiny_lion()
    language = dataclasses.replace(tiny.language, vocab_size=len(t5))
    qformer = dataclasses.replace(tiny.qformer, vocab_size=len(bert), max_positions=64)
    config = dataclasses.replace(tiny, language=language, qformer=qformer)
    convert.to_torch(config, random_params(config), folder)
    t5.save_pretrained(folder)
    bert.save_pretrained(folder / "qformer_tokenizer")
