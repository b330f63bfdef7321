# SPDX-License-Identifier: Apache-2.0
"""A random LLaVA: transformers' LlavaForConditionalGeneration, and a VisualPrefixLM with the same weights."""

from __future__ import annotations

import dataclasses
import tempfile

import numpy as np

from benchmarks.instructblip import torch_optimizer as torch_optimizer
from benchmarks.vlm_sizes import VlmSizes
from lionjax import convert
from lionjax.core.types import Batch
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import CLIP_VIT_L
from lionjax.models.vlm.visual_prefix import VisualPrefixLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(VlmSizes):
    """CLIP's feed-forward width is 4x the input's, LLaMA's 8/3x."""

    frozen_language: bool = False

    @property
    def words(self) -> int:
        """Number of tokens of an image."""
        return (self.image // self.patch) ** 2


SIZES = Sizes(image=112, vision_width=256, vision_depth=6, language_width=256, language_layers=4, vocab=8192)


def learned(s: Sizes) -> tuple[str, ...]:
    """Patterns of the trained parameters: LLaVA's second stage, or with `frozen_language` its first stage."""
    return ("projector",) if s.frozen_language else ("projector", "language")


def torch_model(s: Sizes):
    """transformers' model with random weights and the parameters of `learned` trainable."""
    import torch
    import transformers

    torch.manual_seed(0)
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": s.vision_width,
        "intermediate_size": 4 * s.vision_width,
        "num_hidden_layers": s.vision_depth,
        "num_attention_heads": s.vision_width // s.head,
        "image_size": s.image,
        "patch_size": s.patch,
    }
    heads = s.language_width // s.head
    text = {
        "model_type": "llama",
        "vocab_size": s.vocab,
        "hidden_size": s.language_width,
        "intermediate_size": s.language_width * 8 // 3,
        "num_hidden_layers": s.language_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": s.head,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=s.image_token, vision_feature_layer=-2
    )
    model = transformers.LlavaForConditionalGeneration(config).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.02 * torch.randn_like(weight))  # no parameter stays at 0 or 1, which would hide errors
            learns = "projector" in name if s.frozen_language else "vision_tower" not in name
            weight.requires_grad_(learns)
    return model


def see_once(model, inputs: dict) -> None:
    """Replace the vision tower's forward by its cached output for these images."""
    import copy

    import torch

    tower = model.model.vision_tower
    with torch.no_grad():
        output = tower(inputs["pixel_values"], output_hidden_states=True, return_dict=True)
    tower.forward = lambda *_, **__: copy.copy(output)


def system_of(s: Sizes) -> VisualPrefixLM:
    """The lionjax model of these sizes."""
    vision = dataclasses.replace(
        CLIP_VIT_L,
        image_size=s.image,
        patch_size=s.patch,
        width=s.vision_width,
        depth=s.vision_depth,
        num_heads=s.vision_width // s.head,
        mlp_dim=4 * s.vision_width,
    )
    heads = s.language_width // s.head
    language = DecoderConfig(
        s.vocab,
        s.language_width,
        s.language_layers,
        heads,
        heads,
        s.head,
        s.language_width * 8 // 3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return VisualPrefixLM(vision, language, feature_layer=-2, image_token_id=s.image_token, prepend_image=False)


def ours_of(s: Sizes, model):
    """(lionjax model, parameters) from transformers' model, through a saved Hugging Face folder."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        system, params = convert.from_torch(folder)
    return system, params


def batch_of(s: Sizes) -> Batch:
    """A batch of random images and texts of unequal lengths, with the image after the first token."""
    batch = s.random_batch()
    batch.prompt_BL[:, 1] = s.image_token
    return batch


def torch_batch(s: Sizes, answers: bool = True) -> dict:
    """The batch as transformers' inputs: one placeholder per image token, answers right after the prompts.

    With `answers=False` for `generate`: prompts only, padded on the left.
    """
    import torch

    batch = batch_of(s)
    rows, labels = [], []
    for row in range(s.batch):
        prompt = batch.prompt_BL[row][batch.prompt_mask_BL[row] == 1].tolist()
        answer = batch.target_BM[row][batch.target_mask_BM[row] == 1].tolist() if answers else []
        prompt = [prompt[0], *[s.image_token] * s.words, *prompt[2:]]
        rows.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    longest = max(map(len, rows))

    def padded(lists, fill: int):
        paddings = [[fill] * (longest - len(ids)) for ids in lists]
        return torch.tensor([ids + padding if answers else padding + ids for ids, padding in zip(lists, paddings)])

    inputs = {
        "pixel_values": torch.from_numpy(np.ascontiguousarray(batch.image_BHWC.transpose(0, 3, 1, 2))),
        "input_ids": padded(rows, 0),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
    }
    return inputs | {"labels": padded(labels, -100)} if answers else inputs
