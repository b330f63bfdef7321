# SPDX-License-Identifier: Apache-2.0
"""Full-size BLIP-2s, InstructBLIPs, MiniGPT-4s and LLaVAs as their makers publish them: every name and shape."""

import dataclasses
import re

import numpy as np
import pytest
from test_full_size_parts import KINDS, blank, check
from test_full_size_weights import lion_release

from lionjax import convert_prefix
from lionjax.convert_files import Tensors
from lionjax.convert_systems import of_config
from lionjax.interfaces import UserError
from lionjax.language import decoder, t5
from lionjax.systems.prefix import Prefix
from lionjax.vision import vit

OPT_6_7B = dataclasses.replace(decoder.OPT_2_7B, width=4096, head=128, hidden=16384)
VICUNAS = (decoder.VICUNA_7B, decoder.VICUNA_13B)
PADDED = [
    dataclasses.replace(c, vocab=32001) for c in VICUNAS
]  # [PAD] is InstructBLIP's one new word
LAVIS = {  # file -> (its word for the language model, the language model, whether the Q-Former reads text)
    "blip2_pretrained_opt2.7b": ("opt", decoder.OPT_2_7B, False),
    "blip2_pretrained_opt6.7b": ("opt", OPT_6_7B, False),
    "blip2_pretrained_flant5xl": ("t5", t5.FLAN_T5_XL, False),
    "blip2_pretrained_flant5xxl": ("t5", t5.FLAN_T5_XXL, False),
    "instruct_blip_flanxl_trimmed": ("t5", t5.FLAN_T5_XL, True),
    "instruct_blip_flanxxl_trimmed": ("t5", t5.FLAN_T5_XXL, True),
    "instruct_blip_vicuna7b_trimmed": ("llm", PADDED[0], True),
    "instruct_blip_vicuna13b_trimmed": ("llm", PADDED[1], True),
    "pretrained_minigpt4_7b": ("llama", VICUNAS[0], False),
    "pretrained_minigpt4": ("llama", VICUNAS[1], False),
}


def language_release(language) -> dict:
    """Every tensor of a language model, name -> shape, from transformers' class of it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind = of_config(language)
    settings = kind.settings(language)
    model = getattr(transformers, settings["architectures"][0])
    with torch.device("meta"):
        state = model(model.config_class.from_dict(settings)).state_dict()
    return {name: tuple(w.shape) for name, w in state.items()}


def bridge_release(width: int, vocab: int | None) -> dict:
    """Q-Former, queries and norm, name -> shape; `vocab`: the words of one that reads text."""
    shapes = {n: shape for n, (shape, _) in lion_release(2048).items()}
    bridge = {
        n: s for n, s in shapes.items() if n.startswith(("Qformer.", "query_tokens", "ln_vision"))
    }
    if vocab is None:  # the second stage drops all that reads text
        text = r"Qformer\.bert\.(embeddings\.(word|position)|encoder\.layer\.\d+\.(intermediate|output)\.)"
        return {n: s for n, s in bridge.items() if not re.match(text, n)}
    assert bridge["Qformer.bert.embeddings.word_embeddings.weight"] == (vocab, 768)
    return bridge


def tower_release() -> dict:
    return {n: s for n, (s, _) in lion_release(2048).items() if n.startswith("visual_encoder.")}


@pytest.mark.parametrize("name", LAVIS)
def test_the_full_size_table_of_what_lavis_published_covers_its_files(name):
    word, language, text = LAVIS[name]
    width = language.width
    state = tower_release() | bridge_release(width, 30523 if text else None)
    state |= {f"{word}_proj.weight": (width, 768), f"{word}_proj.bias": (width,)}
    state |= {f"{word}_model.{n}": shape for n, shape in language_release(language).items()}
    state = blank(state)
    config = convert_prefix._lavis_config(language, Tensors(state, (name,)))
    kind = KINDS["instructblip" if text else "blip2"]
    assert of_config(config) is kind and config.qformer.text == text
    check(kind, config, state)
    missing = "Qformer.bert.encoder.layer.11.attention.self.query.weight"
    with pytest.raises(UserError, match=missing):
        check(kind, config, {n: w for n, w in state.items() if n != missing})


@pytest.mark.parametrize("language", VICUNAS, ids=["7b", "13b"])
@pytest.mark.parametrize("depth, image", [(1, 224), (2, 336)], ids=["v1", "v1.5"])
def test_the_full_size_table_of_llavas_own_release_covers_its_files(language, depth, image):
    width, clip = language.width, dataclasses.replace(vit.CLIP_VIT_L, image=image)
    state = language_release(language)
    tower = "model.vision_tower.vision_tower."
    names = {
        n if n.startswith("vision_model.") else f"vision_model.{n}": s
        for n, s in language_release(clip).items()
    }
    state |= {tower + n: shape for n, shape in names.items()}
    layers = [""] if depth == 1 else ["0.", "2."]
    for layer, inputs in zip(layers, (1024, width)):
        state[f"model.mm_projector.{layer}weight"] = (width, inputs)
        state[f"model.mm_projector.{layer}bias"] = (width,)
    config = Prefix(
        clip, language, feature_layer=-2, projector_depth=depth, in_front=False, names="original"
    )
    check(KINDS["llava"], config, blank(state))
    assert np.prod(state["lm_head.weight"]) == 32000 * width
