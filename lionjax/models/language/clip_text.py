# SPDX-License-Identifier: Apache-2.0
"""Text towers of CLIP (arXiv 2103.00020) and SigLIP (2303.15343): one state for a text.

Pre-norm blocks with learned positions. CLIP's are causal, and the state is that of the end token; SigLIP's attend to
all positions, padding included, and the state is that of the last one.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from lionjax.core.errors import check_choices
from lionjax.core.sharding import with_logical_partitioning
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.base_configs import TransformerSizes
from lionjax.models.vision import vit
from lionjax.models.vision.vit import Block
from lionjax.nn.attention import causal_mask
from lionjax.nn.layers import Embed, LayerNorm, norm_weight_map, normal, remat_block, scan_blocks
from lionjax.nn.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class ClipTextConfig(TransformerSizes):
    """Config of a text tower; the defaults are those of CLIP ViT-L/14. Raises ValueError for an unknown `pooling`.

    `pooling`: the position whose state is the text's. "eos": the first `eos_token_id`; "argmax": the largest id, which
    is the end token in OpenAI's code and in checkpoints of that time; "last": the last of `max_positions`, which every
    text is padded to with `pad_token_id` (SigLIP). `bos_token_id` begins a text; None: nothing does.
    """

    vocab_size: int = 49408
    max_positions: int = 77
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    causal: bool = True
    pooling: Literal["eos", "argmax", "last"] = "eos"
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 49407
    attention_biases: str = "qkvo"
    remat: str = "none"
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        check_choices(self, pooling=("eos", "argmax", "last"))


CLIP_TEXT_B = ClipTextConfig(width=512, num_heads=8, mlp_dim=2048)
CLIP_TEXT_L = ClipTextConfig()
SIGLIP_TEXT_B = ClipTextConfig(
    vocab_size=32000,
    max_positions=64,
    norm_eps=1e-6,
    activation="gelu_tanh",
    causal=False,
    pooling="last",
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=1,
)


class ClipText(nn.Module):
    """States (B, L, D) of tokens (B, L) behind the final norm, and the state (B, D) of each text.

    `packed`, of a causal tower: positions (B, L) of tokens and a mask (B, 1, L, L) of what each attends to, for rows
    of several texts, whose states are those of their tokens.

    Raises ValueError for a longer text than `max_positions`, and with pooling "last" for a shorter one.
    """

    c: ClipTextConfig

    @nn.compact
    def __call__(self, ids_BL, dtype=jnp.float32, packed=None):
        c, length = self.c, ids_BL.shape[1]
        is_long = packed is None and length > c.max_positions
        if is_long or (c.pooling == "last" and length < c.max_positions):
            limit = "must have" if c.pooling == "last" else "may have at most"
            raise ValueError(f"the texts have {length} tokens; they {limit} {c.max_positions}: cut or pad them")
        shape = (c.max_positions, c.width)
        position_LD = self.param("position", with_logical_partitioning(normal(0.01), ("position", "embed")), shape)
        position_LD, mask = position_LD.astype(dtype), causal_mask() if c.causal else None
        if packed is not None:
            position_LD, mask = position_LD[packed[0]], packed[1]
        x_BLD = Embed(c.vocab_size, c.width, name="words")(ids_BL, dtype) + position_LD[..., :length, :]
        blocks = scan_blocks(remat_block(Block, c.remat), c.depth, 1, unchecked_in=self)(c, name="blocks")
        (x_BLD, _), _ = blocks((x_BLD, None), jnp.arange(c.depth), mask)
        x_BLD = LayerNorm(c.width, c.norm_eps, name="norm")(x_BLD)
        return x_BLD, jnp.take_along_axis(x_BLD, pooled_position(c, ids_BL)[:, None, None], axis=1)[:, 0]


def pooled_position(c: ClipTextConfig, ids_BL):
    """The position (B,) whose state is a text's; 0 for a text without the end token, as in transformers."""
    if c.pooling == "last":
        return jnp.full(ids_BL.shape[:1], ids_BL.shape[1] - 1)
    return (ids_BL if c.pooling == "argmax" else ids_BL == c.eos_token_id).argmax(axis=1)


def weight_map(c: ClipTextConfig) -> tuple[WeightMapping, ...]:
    """Names under `text_model.` in Hugging Face's CLIP and SigLIP."""
    return (
        WeightMapping("embeddings.token_embedding.weight", "words/table"),
        WeightMapping("embeddings.position_embedding.weight", "position"),
        *with_prefix("encoder.layers.{i}.", "blocks/", vit.clip_block_weight_map(c)),
        *norm_weight_map("final_layer_norm", "norm"),
    )


def openai_weight_map(c: ClipTextConfig) -> tuple[WeightMapping, ...]:
    """Names of the text tower in OpenAI's code, which stands at the top of its state dict."""
    return (
        WeightMapping("token_embedding.weight", "words/table"),
        WeightMapping("positional_embedding", "position"),
        *with_prefix("transformer.resblocks.{i}.", "blocks/", vit.openai_block_weight_map(c)),
        *norm_weight_map("ln_final", "norm"),
    )
