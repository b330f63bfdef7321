# SPDX-License-Identifier: Apache-2.0
"""Full-size BLIP-2s, InstructBLIPs, MiniGPT-4s and LLaVAs as their makers publish them: every name and shape."""

import dataclasses
import re

import numpy as np
import pytest
from full_size import lion_release
from full_size_parts import KINDS, blank, check, openai_clip_release

from lionjax.convert.formats import delta as convert_delta
from lionjax.convert.formats import hf_vlm, lavis
from lionjax.convert.formats.detect import format_of_config
from lionjax.convert.io.reader import CheckpointTensors
from lionjax.core.types import UserError
from lionjax.models.language import decoder, t5
from lionjax.models.vision import vit
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

OPT_6_7B = dataclasses.replace(decoder.OPT_2_7B, width=4096, head_dim=128, mlp_dim=16384)
VICUNAS = (decoder.VICUNA_7B, decoder.VICUNA_13B)
PADDED = [dataclasses.replace(c, vocab_size=32001) for c in VICUNAS]  # [PAD] is InstructBLIP's one new word
LAVIS = {  # file -> (its word for the language model, the language model, whether the Q-Former reads text)
    "blip2_pretrained_opt2.7b": ("opt", decoder.OPT_2_7B, False),
    "blip2_pretrained_opt6.7b": ("opt", OPT_6_7B, False),
    "blip2_pretrained_flant5xl": ("t5", t5.FLAN_T5_XL, False),
    "blip2_pretrained_flant5xxl": ("t5", t5.FLAN_T5_XXL, False),
    "blip2_pretrained_flant5xl_vitL": ("t5", t5.FLAN_T5_XL, False),
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
    kind = format_of_config(language)
    settings = kind.config_to_hf(language)
    model = getattr(transformers, settings["architectures"][0])
    with torch.device("meta"):
        state = model(model.config_class.from_dict(settings)).state_dict()
    return {name: tuple(w.shape) for name, w in state.items()}


def bridge_release(vocab: int | None, seen: int) -> dict:
    """Q-Former, queries and norm, name -> shape; `vocab`: of one that reads text; `seen`: the tower's width."""
    shapes = {n: shape for n, (shape, _) in lion_release(2048).items()}
    shapes = {n: tuple(seen if size == 1408 else size for size in s) for n, s in shapes.items()}
    bridge = {n: s for n, s in shapes.items() if n.startswith(("Qformer.", "query_tokens", "ln_vision"))}
    if vocab is None:  # the second stage drops all that reads text
        text = r"Qformer\.bert\.(embeddings\.(word|position)|encoder\.layer\.\d+\.(intermediate|output)\.)"
        return {n: s for n, s in bridge.items() if not re.match(text, n)}
    assert bridge["Qformer.bert.embeddings.word_embeddings.weight"] == (vocab, 768)
    return bridge


def tower_release(clip: bool) -> dict:
    if clip:
        return {f"visual_encoder.{n}": shape for n, shape in openai_clip_release().items()}
    return {n: s for n, (s, _) in lion_release(2048).items() if n.startswith("visual_encoder.")}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAVIS)
def test_the_full_size_table_of_what_lavis_published_covers_its_files(name):
    word, language, text = LAVIS[name]
    width = language.width
    clip = name.endswith("_vitL")
    state = tower_release(clip) | bridge_release(30523 if text else None, 1024 if clip else 1408)
    state |= {f"{word}_proj.weight": (width, 768), f"{word}_proj.bias": (width,)}
    state |= {f"{word}_model.{n}": shape for n, shape in language_release(language).items()}
    state = blank(state)
    config = lavis.config_from_tensors(language, CheckpointTensors(state, (name,)))
    kind = KINDS["instructblip" if text else "blip2"]
    assert format_of_config(config) is kind and config.qformer.text == text
    assert (config.vision.depth, config.vision.width) == ((23, 1024) if clip else (39, 1408))
    check(kind, config, state)
    missing = "Qformer.bert.encoder.layer.11.attention.self.query.weight"
    with pytest.raises(UserError, match=missing):
        check(kind, config, {n: w for n, w in state.items() if n != missing})


FIRST = {  # file -> (whether its tower is CLIP, pixels)
    "blip2_pretrained": (False, 224),
    "blip2_pretrained_vitL": (True, 224),
    "blip2_finetune_coco": (False, 364),
}


def first_release(clip: bool, image: int) -> dict:
    """The first stage: tower, Q-Former and its heads, name -> shape."""
    state = tower_release(clip) | bridge_release(30523, 1024 if clip else 1408)
    if image != 224:
        state["visual_encoder.pos_embed"] = (1, 1 + (image // 14) ** 2, 1408)
    head = "Qformer.cls.predictions."
    state |= {f"{head}bias": (30523,), f"{head}decoder.weight": (30523, 768)}
    state |= {f"{head}decoder.bias": (30523,), "temp": ()}
    for name, size in {
        f"{head}transform.dense": (768, 768),
        f"{head}transform.LayerNorm": (768,),
        "vision_proj": (256, 768),
        "text_proj": (256, 768),
        "itm_head": (2, 768),
    }.items():
        state |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return state


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_the_full_size_table_of_blip2s_first_stage_covers_its_files(name):
    clip, image = FIRST[name]
    state = blank(first_release(clip, image))
    config = lavis.stage1_config_from_tensors(CheckpointTensors(state, (name,)))
    assert format_of_config(config) is KINDS["blip2_first"]
    assert (config.vision.image, config.vision.width) == (image, 1024 if clip else 1408)
    check(KINDS["blip2_first"], config, state)
    missing = "itm_head.bias"
    with pytest.raises(UserError, match=missing):
        check(KINDS["blip2_first"], config, {n: w for n, w in state.items() if n != missing})


def projector_release(width: int, depth: int) -> dict:
    state = {}
    for layer, inputs in zip([""] if depth == 1 else ["0.", "2."], (1024, width)):
        state[f"model.mm_projector.{layer}weight"] = (width, inputs)
        state[f"model.mm_projector.{layer}bias"] = (width,)
    return state


def clip_release(clip) -> dict:
    """CLIP's tower under LLaVA's names for it."""
    names = {n.removeprefix("vision_model."): s for n, s in language_release(clip).items()}
    return {f"{hf_vlm.LLAVA_TOWER_PREFIX}vision_model.{n}": shape for n, shape in names.items()}


def llava(language, depth: int, image: int) -> VisualPrefixLM:
    clip = dataclasses.replace(vit.CLIP_VIT_L, image_size=image)
    return VisualPrefixLM(
        clip, language, feature_layer=-2, projector_depth=depth, prepend_image=False, torch_names="original"
    )


SIZES = pytest.mark.parametrize("language", VICUNAS, ids=["7b", "13b"])
VERSIONS = pytest.mark.parametrize("depth, image", [(1, 224), (2, 336)], ids=["v1", "v1.5"])


@SIZES
@VERSIONS
def test_the_full_size_table_of_llavas_own_release_covers_its_files(language, depth, image):
    config = llava(language, depth, image)
    state = language_release(language) | clip_release(config.vision)
    state |= projector_release(language.width, depth)
    check(KINDS["llava"], config, blank(state))
    assert np.prod(state["lm_head.weight"]) == 32000 * language.width


@SIZES
@VERSIONS
def test_llavas_projector_with_a_llama_and_a_clip_covers_the_full_size_model(language, depth, image):
    config = llava(language, depth, image)
    text = CheckpointTensors(blank(language_release(language)), ("language",))
    trained = CheckpointTensors(blank(projector_release(language.width, depth)), ("mm_projector.bin",))
    whole = hf_vlm.add_mm_projector(trained, text)
    check(KINDS["llava"], config, dict(whole) | blank(clip_release(config.vision)))
    with pytest.raises(UserError, match="model.mm_projector"):
        check(KINDS["llava"], config, dict(text) | blank(clip_release(config.vision)))


@SIZES
@pytest.mark.parametrize("words", [32000, 32003], ids=["no new words", "three new words"])
def test_a_llava_delta_with_a_llama_and_a_clip_covers_the_full_size_model(language, words):
    """v0 and v1.1: all of the language model and one linear; the tower was never saved."""
    config = llava(dataclasses.replace(language, vocab_size=words), 1, 224)
    delta = language_release(config.language) | projector_release(language.width, 1)
    base, turns = language_release(language), "model.layers.0.self_attn.rotary_emb.inv_freq"
    delta[turns] = (64,)  # saved by the version of transformers of that time
    made = convert_delta.add_delta(
        CheckpointTensors(blank(delta), ("delta",)),
        CheckpointTensors(blank(base), ("base",)),
        KINDS["llava"].ignore_patterns,
    )
    summed = {name for name, array in made.items() if isinstance(array, convert_delta.LazySum)}
    assert summed == base.keys()
    check(KINDS["llava"], config, dict(made) | blank(clip_release(config.vision)))
    del base["model.norm.weight"], delta["model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(UserError) as told:
        convert_delta.add_delta(
            CheckpointTensors(blank(delta), ("delta",)),
            CheckpointTensors(blank(base), ("base",)),
            KINDS["llava"].ignore_patterns,
        )
    assert "base has no tensor 'model.norm.weight'" in str(told.value)
    assert "delta has no tensor 'model.layers.3.mlp.up_proj.weight'" in str(told.value)
