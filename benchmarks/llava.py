# SPDX-License-Identifier: Apache-2.0
"""The same random LLaVA twice: transformers' LlavaForConditionalGeneration, and our `Prefix` with a LLaMA behind it."""

from __future__ import annotations

import dataclasses
import tempfile

import numpy as np

from benchmarks.instructblip import torch_optimiser as torch_optimiser
from lionjax import convert
from lionjax.core.types import IMAGE_LEVEL, Batch
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.visual_prefix import VisualPrefixLM


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of both models and of the batch; CLIP's feed-forward is four times as wide as its input, LLaMA's 8/3."""

    image: int = 112
    patch: int = 14
    vision_width: int = 256
    vision_depth: int = 6
    language_width: int = 256
    language_layers: int = 4
    head: int = 64  # size of an attention head, everywhere
    vocab: int = 8192
    batch: int = 8
    prompt: int = 32
    target: int = 16
    frozen_language: bool = False

    @property
    def image_token(self) -> int:
        """The id in whose place the picture's words come."""
        return self.vocab - 1

    @property
    def words(self) -> int:
        """Words of a picture."""
        return (self.image // self.patch) ** 2


def learned(s: Sizes) -> tuple[str, ...]:
    """As in LLaVA's second stage, where the tower alone is frozen, or as in its first, the language model too."""
    return ("projector",) if s.frozen_language else ("projector", "language")


def torch_model(s: Sizes):
    """transformers' model with random weights, the tower frozen."""
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
            weight.add_(0.02 * torch.randn_like(weight))  # no zero or one may hide anything
            learns = "projector" in name if s.frozen_language else "vision_tower" not in name
            weight.requires_grad_(learns)
    return model


def see_once(model, inputs: dict) -> None:
    """From now on the tower gives what it made of these pictures."""
    import copy

    import torch

    tower = model.model.vision_tower
    with torch.no_grad():
        seen = tower(inputs["pixel_values"], output_hidden_states=True, return_dict=True)
    tower.forward = lambda *_, **__: copy.copy(seen)


def system_of(s: Sizes) -> VisualPrefixLM:
    """Ours alone, for weights of its own."""
    vision = ViTConfig(
        s.image,
        s.patch,
        s.vision_width,
        s.vision_depth,
        s.vision_width // s.head,
        4 * s.vision_width,
        1e-5,
        "quick_gelu",
        attention_biases="qkvo",
        patch_bias=False,
        pre_layernorm=True,
        post_layernorm=True,
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
    """Our system and its parameters, through a folder as anybody's LLaVA comes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        system, params = convert.from_torch(folder)
    return system, params


def batch_of(s: Sizes) -> Batch:
    """Random pictures and texts of unequal lengths, the picture behind the first word."""
    random = np.random.default_rng(0)

    def text(length: int):
        lengths = np.linspace(max(length // 2, 3), length, s.batch).astype(int)
        mask_BL = (np.arange(length) < lengths[:, None]).astype(np.int32)
        return random.integers(3, s.vocab - 1, mask_BL.shape).astype(np.int32) * mask_BL, mask_BL

    image_BHWC = random.standard_normal((s.batch, s.image, s.image, 3), np.float32)
    prompt_BL, prompt_mask_BL = text(s.prompt)
    prompt_BL[:, 1] = s.image_token
    target_BM, target_mask_BM = text(s.target)
    rows = np.arange(s.batch, dtype=np.int32)
    return Batch(
        image_BHWC,
        prompt_BL,
        prompt_mask_BL,
        None,
        None,
        target_BM,
        target_mask_BM,
        target_mask_BM,
        np.full_like(rows, IMAGE_LEVEL),
        rows,
    )


def torch_batch(s: Sizes, answers: bool = True) -> dict:
    """The batch as transformers wants it: a token for each of the picture's words, the answer right behind the prompt.

    Without answers as `generate` wants it, padded in front.
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
        gaps = [[fill] * (longest - len(one)) for one in lists]
        return torch.tensor([one + gap if answers else gap + one for one, gap in zip(lists, gaps)])

    made = {
        "pixel_values": torch.from_numpy(np.ascontiguousarray(batch.image_BHWC.transpose(0, 3, 1, 2))),
        "input_ids": padded(rows, 0),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
    }
    return made | {"labels": padded(labels, -100)} if answers else made
