# SPDX-License-Identifier: Apache-2.0
"""The plain vision transformer, layers scanned, with taps: hidden states of chosen layers on the way.

EVA ViT-g is the setting that LION, BLIP-2 and MiniGPT-4 freeze; CLIP's ViT is another setting of the same file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from lionjax.core.sharding import constrain, sharded
from lionjax.core.weight_map import (
    Row,
    by_head,
    conv,
    fused,
    heads_in,
    heads_in_bias,
    heads_out,
    renamed,
    reshaped,
    under,
)
from lionjax.nn import attention as attentions
from lionjax.nn.attention import Attention
from lionjax.nn.layers import MLP, REMAT, LayerNorm, PatchEmbed, dense_rows, norm_rows, normal


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes and the few switches in which released ViTs differ."""

    image: int = 224  # pixels a side
    patch: int = 14
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    eps: float = 1e-6
    activation: str = "gelu"
    biases: str = "qvo"  # EVA was trained with biases on queries and values but none on keys
    patch_bias: bool = True
    norm_before: bool = False  # CLIP normalises the embedded patches
    norm_after: bool = False  # and, apart, the class token's last state
    remat: str = "none"

    @property
    def patches(self) -> int:
        """Patches of a picture, without the class token."""
        return (self.image // self.patch) ** 2


EVA_VIT_G = ViTConfig(image=224, patch=14, width=1408, depth=39, heads=16, hidden=6144)
CLIP_VIT_L = ViTConfig(
    image=336,
    patch=14,
    width=1024,
    depth=24,
    heads=16,
    hidden=4096,
    eps=1e-5,
    activation="quick_gelu",
    biases="qkvo",
    patch_bias=False,
    norm_before=True,
    norm_after=True,
)

TINY_VIT = ViTConfig(image=112, patch=14, width=128, depth=6, heads=4, hidden=384)  # ships with the project


class Block(nn.Module):
    """x += attention(norm x); x += mlp(norm x). On its way past a tap it leaves a copy there."""

    c: ViTConfig
    taps: tuple[int, ...]

    @nn.compact
    def __call__(self, carry, index):
        c = self.c
        x_BPD, seen_TBPD = carry
        attention = Attention(c.width, c.heads, c.width // c.heads, biases=c.biases, name="attention")
        x_BPD = x_BPD + attention(LayerNorm(c.width, c.eps, name="norm1")(x_BPD))
        x_BPD = x_BPD + MLP(c.width, c.hidden, c.activation, name="mlp")(LayerNorm(c.width, c.eps, name="norm2")(x_BPD))
        x_BPD = constrain(x_BPD, "batch", "length", "act_embed")
        if self.taps:
            here = (jnp.asarray(self.taps) == index)[:, None, None, None]
            seen_TBPD = jnp.where(here, x_BPD[None], seen_TBPD)
        return (x_BPD, seen_TBPD), None


class ViT(nn.Module):
    """(B, H, W, 3) -> the last layer's output (B, 1 + P, D) and the taps' (T, B, 1 + P, D).

    Tap i is the output of block i, counted from 0. The class token comes first.
    """

    c: ViTConfig
    taps: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, image_BHWC):
        c = self.c
        if image_BHWC.shape[1:3] != (c.image, c.image):
            raise ValueError(
                f"image is {image_BHWC.shape[1:3]} pixels but the ViT's positions are for {c.image}; "
                f"resize the image, or set image={image_BHWC.shape[1]} and resample the positions"
            )
        patch_BPD = PatchEmbed(c.patch, c.width, bias=c.patch_bias, name="patch")(image_BHWC)
        first_D = self.param("class_token", sharded(normal(0.02), ("embed",)), (c.width,))
        shape = (1 + c.patches, c.width)
        position_PD = self.param("position", sharded(normal(0.02), ("position", "embed")), shape)
        first_B1D = jnp.broadcast_to(first_D.astype(patch_BPD.dtype), (patch_BPD.shape[0], 1, c.width))
        x_BPD = jnp.concatenate([first_B1D, patch_BPD], axis=1) + position_PD.astype(patch_BPD.dtype)
        if c.norm_before:
            x_BPD = LayerNorm(c.width, c.eps, name="norm_before")(x_BPD)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.taps, name="blocks")
        seen_TBPD = jnp.zeros((len(self.taps), *x_BPD.shape), x_BPD.dtype) if self.taps else None
        (x_BPD, seen_TBPD), _ = blocks((x_BPD, seen_TBPD), jnp.arange(c.depth))
        if c.norm_after:
            # Applied to the class token alone; features of patches are taken before it.
            first_BD = LayerNorm(c.width, c.eps, name="norm_after")(x_BPD[:, 0])
            return x_BPD, seen_TBPD, first_BD
        return x_BPD, seen_TBPD, x_BPD[:, 0]


def eva_rows(c: ViTConfig) -> tuple[Row, ...]:
    """Names of eva_vit_g.pth (and of `visual_encoder.` in LAVIS and LION)."""
    head = c.width // c.heads
    into = heads_in(c.heads, head)
    block = (
        Row("attn.qkv.weight", tuple(f"attention/{x}/kernel" for x in "qkv"), fused(into, into, into)),
        Row("attn.q_bias", "attention/q/bias", heads_in_bias(c.heads, head)),
        Row("attn.v_bias", "attention/v/bias", heads_in_bias(c.heads, head)),
        Row("attn.proj.weight", "attention/o/kernel", heads_out(c.heads, head)),
        Row("attn.proj.bias", "attention/o/bias"),
        *norm_rows("norm1", "norm1"),
        *norm_rows("norm2", "norm2"),
        *dense_rows("mlp.fc1", "mlp/up"),
        *dense_rows("mlp.fc2", "mlp/down"),
    )
    return (
        Row("cls_token", "class_token", reshaped((1, 1, -1), (-1,))),
        Row("pos_embed", "position", reshaped((1, -1, c.width), (-1, c.width))),
        Row("patch_embed.proj.weight", "patch/kernel", conv),
        Row("patch_embed.proj.bias", "patch/bias"),
        *under("blocks.{i}.", "blocks/", block),
    )


def tower_rows(c: ViTConfig, rows: Callable) -> tuple[Row, ...]:
    """Names by `rows` for a tower such as CLIP's; one that norms nothing before its blocks keeps EVA's own."""
    return rows(c) if c.norm_before else eva_rows(c)


def blip_rows(c: ViTConfig) -> tuple[Row, ...]:
    """Names under `vision_model.` in Hugging Face's BLIP-2 and InstructBLIP: EVA's, with one bias for q, k and v."""
    pairs = (
        ("cls_token", "embeddings.class_embedding"),
        ("pos_embed", "embeddings.position_embedding"),
        ("patch_embed.proj", "embeddings.patch_embedding"),
        ("blocks.", "encoder.layers."),
        (".norm", ".layer_norm"),
        (".attn.proj.", ".self_attn.projection."),
        (".attn.", ".self_attn."),
    )
    cut = heads_in_bias(c.heads, c.width // c.heads)
    paths = tuple(f"blocks/attention/{x}/bias" for x in "qv")
    rows = (row for row in eva_rows(c) if row.paths[0] not in paths)
    bias = Row("encoder.layers.{i}.self_attn.qkv.bias", paths, fused(cut, None, cut))
    return (*renamed(rows, *pairs), bias)


def owl_rows(c: ViTConfig) -> tuple[Row, ...]:
    """Names under `vision_model.` in mPLUG-Owl, which keeps q, k and v of each head beside each other."""
    block = (
        *(
            Row(f"self_attn.query_key_value.{theirs}", tuple(f"attention/{x}/{ours}" for x in "qkv"), by_head(c.heads))
            for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
        ),
        Row("self_attn.dense.weight", "attention/o/kernel", heads_out(c.heads, c.width // c.heads)),
        Row("self_attn.dense.bias", "attention/o/bias"),
        *norm_rows("input_layernorm", "norm1"),
        *norm_rows("post_attention_layernorm", "norm2"),
        *dense_rows("mlp.fc1", "mlp/up"),
        *dense_rows("mlp.fc2", "mlp/down"),
    )
    return (
        Row("embeddings.cls_token", "class_token", reshaped((1, 1, -1), (-1,))),
        Row("embeddings.position_embedding", "position", reshaped((1, -1, c.width), (-1, c.width))),
        Row("embeddings.patch_embed.weight", "patch/kernel", conv),
        *norm_rows("embeddings.pre_layernorm", "norm_before"),
        *under("encoder.layers.{i}.", "blocks/", block),
    )


def openai_rows(c: ViTConfig) -> tuple[Row, ...]:
    """Names of CLIP's ViT in OpenAI's own code, as LAVIS's clip_vit_L.pth has them."""
    head = c.width // c.heads
    into, cut = heads_in(c.heads, head), heads_in_bias(c.heads, head)
    block = (
        Row("attn.in_proj_weight", tuple(f"attention/{x}/kernel" for x in "qkv"), fused(into, into, into)),
        Row("attn.in_proj_bias", tuple(f"attention/{x}/bias" for x in "qkv"), fused(cut, cut, cut)),
        Row("attn.out_proj.weight", "attention/o/kernel", heads_out(c.heads, head)),
        Row("attn.out_proj.bias", "attention/o/bias"),
        *norm_rows("ln_1", "norm1"),
        *norm_rows("ln_2", "norm2"),
        *dense_rows("mlp.c_fc", "mlp/up"),
        *dense_rows("mlp.c_proj", "mlp/down"),
    )
    return (
        Row("class_embedding", "class_token"),
        Row("positional_embedding", "position"),
        Row("conv1.weight", "patch/kernel", conv),
        *norm_rows("ln_pre", "norm_before"),
        *(norm_rows("ln_post", "norm_after") if c.norm_after else ()),
        *under("transformer.resblocks.{i}.", "blocks/", block),
    )


def lavis_rows(c: ViTConfig) -> tuple[Row, ...]:
    """Names of the towers in LAVIS: EVA's, or CLIP's in OpenAI's code."""
    return openai_rows(c) if c.norm_before else eva_rows(c)


def clip_rows(c: ViTConfig) -> tuple[Row, ...]:
    """Names of Hugging Face's CLIPVisionModel, without the `vision_model.` before them in files."""
    letters = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    block = (
        *under("self_attn.", "attention/", attentions.torch_rows(letters, c.heads, c.width // c.heads, "qkvo")),
        *norm_rows("layer_norm1", "norm1"),
        *norm_rows("layer_norm2", "norm2"),
        *dense_rows("mlp.fc1", "mlp/up"),
        *dense_rows("mlp.fc2", "mlp/down"),
    )
    return (
        Row("embeddings.class_embedding", "class_token"),
        Row("embeddings.position_embedding.weight", "position"),
        Row("embeddings.patch_embedding.weight", "patch/kernel", conv),
        *norm_rows("pre_layrnorm", "norm_before"),
        *(norm_rows("post_layernorm", "norm_after") if c.norm_after else ()),
        *under("encoder.layers.{i}.", "blocks/", block),
    )
