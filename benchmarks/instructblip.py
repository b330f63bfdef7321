# SPDX-License-Identifier: Apache-2.0
"""A random InstructBLIP in transformers, and the same weights as a Lion with only the Q-Former and without adapters."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.vlm_sizes import VlmSizes
from lionjax import convert
from lionjax.core.types import Batch
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.connectors import qformer
from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
from lionjax.models.language import t5
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision import vit
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.lion import PROJECTION_EPS, Lion
from lionjax.nn.layers import dense_weight_map, norm_weight_map


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(VlmSizes):
    """With the Q-Former's sizes. Feed-forward widths are 4x the input's, T5's 2.5x."""

    qformer_width: int = 384
    qformer_layers: int = 6
    queries: int = 32
    question_vocab: int = 30523
    question: int = 32


SIZES = Sizes(image=224, vision_width=384, vision_depth=12, language_width=512, language_layers=6, vocab=32128)


def learned(_: Sizes) -> tuple[str, ...]:
    """Patterns of the trained parameters: the Q-Former and its projection."""
    return "qformer", "qformer_projector"


def torch_model(s: Sizes):
    """transformers' model with random weights; only the Q-Former, its queries and the projection are trainable."""
    import torch
    import transformers

    torch.manual_seed(0)
    text = transformers.T5Config(
        vocab_size=s.vocab,
        d_model=s.language_width,
        d_kv=s.head,
        d_ff=s.language_width * 5 // 2,
        num_layers=s.language_layers,
        num_decoder_layers=s.language_layers,
        num_heads=s.language_width // s.head,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    text.dense_act_fn = "gelu"  # the erf variant, as InstructBLIP and LION use in T5
    vision = dict(
        hidden_size=s.vision_width,
        intermediate_size=4 * s.vision_width,
        num_hidden_layers=s.vision_depth,
        num_attention_heads=s.vision_width // s.head,
        image_size=s.image,
        patch_size=s.patch,
        initializer_range=0.02,
    )
    reader = dict(
        vocab_size=s.question_vocab,
        hidden_size=s.qformer_width,
        num_hidden_layers=s.qformer_layers,
        num_attention_heads=s.qformer_width // s.head,
        intermediate_size=4 * s.qformer_width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config = transformers.InstructBlipConfig(
        vision_config=vision,
        qformer_config=reader,
        text_config=text,
        num_query_tokens=s.queries,
        image_token_index=s.image_token,
    )
    model = transformers.InstructBlipForConditionalGeneration(config).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.02 * torch.randn_like(weight))  # no parameter stays at 0 or 1, which would hide errors
            if name.endswith("qkv.bias"):
                weight[s.vision_width : 2 * s.vision_width] = 0  # as in EVA
            weight.requires_grad_(name.startswith(("qformer.", "query_tokens", "language_projection")))
    # LION's norm after the ViT uses torch's default epsilon, transformers' the ViT's.
    model.vision_model.post_layernorm.eps = PROJECTION_EPS
    return model


def see_once(model, inputs: dict) -> None:
    """Replace the ViT's forward by its cached output for these images."""
    import copy

    import torch

    with torch.no_grad():
        output = model.vision_model(pixel_values=inputs["pixel_values"], return_dict=True)
    model.vision_model.forward = lambda **_: copy.copy(output)


def torch_optimizer(model, rate: float, decay: float):
    """torch's fused AdamW without weight decay on vectors and norms, as in LION."""
    import torch

    named_params = [(name.lower(), p) for name, p in model.named_parameters() if p.requires_grad]
    no_decay = [p for name, p in named_params if p.ndim < 2 or "norm" in name]
    with_decay = [p for name, p in named_params if not (p.ndim < 2 or "norm" in name)]
    groups = [{"params": with_decay, "weight_decay": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, fused=True)


def system_of(s: Sizes) -> Lion:
    """The lionjax model of these sizes."""
    return Lion(
        ViTConfig(s.image, s.patch, s.vision_width, s.vision_depth, s.vision_width // s.head, 4 * s.vision_width),
        QFormerConfig(
            s.qformer_width,
            s.qformer_layers,
            s.qformer_width // s.head,
            4 * s.qformer_width,
            s.queries,
            vision_width=s.vision_width,
            vocab_size=s.question_vocab,
            dropout=0.0,
        ),
        AggregatorConfig(s.vision_depth - 1, (), s.vision_width),
        T5Config(
            s.vocab,
            s.language_width,
            s.head,
            s.language_width // s.head,
            s.language_width * 5 // 2,
            s.language_layers,
            s.language_layers,
            activation="gelu",
            dropout=0.0,
        ),
        soft_prompt_token_id=None,
        visual_input="QFORMER",
    )


def ours_of(s: Sizes, model):
    """(lionjax model, parameters) from transformers' model; checks that the weights round-trip bit-exactly."""
    system = system_of(s)
    state = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    weight_map = torch_rows(system)
    params = convert.params_from_state_dict(weight_map, state)
    returned = convert.state_dict_from_params(weight_map, params)
    assert returned.keys() == state.keys() and all(np.array_equal(returned[name], state[name]) for name in state)
    return system, params


def torch_rows(c: Lion) -> tuple[WeightMapping, ...]:
    """The weight map of transformers' InstructBLIP with a T5."""
    return (
        *with_prefix("vision_model.", "vision/", vit.blip2_weight_map(c.vision)),
        *norm_weight_map("vision_model.post_layernorm", "qformer_norm"),
        *with_prefix("", "qformer/", qformer.query_tokens_weight_map(c.qformer)),
        *with_prefix("qformer.", "qformer/", qformer.hf_weight_map(c.qformer)),
        *dense_weight_map("language_projection", "qformer_projector"),
        *with_prefix("language_model.", "language/", t5.weight_map(c.language)),
    )


def batch_of(s: Sizes) -> Batch:
    """A batch of random images and texts of unequal lengths."""
    return s.random_batch(s.question, s.question_vocab)


def torch_batch(s: Sizes) -> dict:
    """The same batch as transformers' inputs: image placeholders before the prompt, label -100 on padding."""
    import torch

    batch = batch_of(s)
    placeholders = np.full((s.batch, s.queries), s.image_token, np.int32)
    labels = np.where(batch.loss_mask_BM, batch.target_BM, -100)
    arrays = {
        "pixel_values": np.ascontiguousarray(batch.image_BHWC.transpose(0, 3, 1, 2)),
        "input_ids": np.concatenate([placeholders, batch.prompt_BL], 1),
        "attention_mask": np.concatenate([np.ones_like(placeholders), batch.prompt_mask_BL], 1),
        "qformer_input_ids": batch.question_BL,
        "qformer_attention_mask": batch.question_mask_BL,
        "labels": labels,
    }
    return {name: torch.from_numpy(x if x.dtype == np.float32 else x.astype(np.int64)) for name, x in arrays.items()}
