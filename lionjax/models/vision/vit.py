# SPDX-License-Identifier: Apache-2.0
"""Vision transformer (arXiv 2010.11929): EVA ViT-g, CLIP and SigLIP ViT as configs, with states of chosen layers.

EVA ViT-g (arXiv 2211.07636) is the frozen tower of LION, BLIP-2 and MiniGPT-4; CLIP (2103.00020) that of LLaVA;
SigLIP's (2303.15343) has no class token, and a head of attention pools its patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_constraint, with_logical_partitioning
from lionjax.core.weight_map import (
    WeightMapping,
    conv,
    merge_heads_kernel,
    rename_torch_keys,
    reshape,
    split_fused,
    split_heads,
    split_heads_kernel,
    split_interleaved_heads,
    with_prefix,
)
from lionjax.models.base_configs import PatchGrid, TransformerSizes
from lionjax.nn import attention as attentions
from lionjax.nn.attention import Attention
from lionjax.nn.layers import (
    MLP,
    LayerNorm,
    PatchEmbed,
    dense_weight_map,
    norm_weight_map,
    normal,
    remat_block,
    scan_blocks,
)
from lionjax.nn.lora import LoraConfig


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class ViTConfig(TransformerSizes, PatchGrid):
    """Config of a ViT."""

    norm_eps: float = 1e-6
    activation: str = "gelu"
    attention_biases: str = "qvo"  # EVA was trained with biases on queries and values but none on keys
    patch_bias: bool = True
    pre_layernorm: bool = False  # a norm before the first block (CLIP)
    post_layernorm: bool = False  # a norm of the class token's last state (CLIP), of all patches with attention_pool
    attention_pool: bool = False  # no class token; a learned query attends to all patches instead (SigLIP)
    remat: str = "none"
    lora: LoraConfig = LoraConfig()

    @property
    def num_positions(self) -> int:
        """Rows of the position table: the class token, if there is one, and the patches."""
        return self.num_patches + (not self.attention_pool)


EVA_VIT_G = ViTConfig(image_size=224, patch_size=14, width=1408, depth=39, num_heads=16, mlp_dim=6144)
CLIP_VIT_B32 = ViTConfig(
    patch_size=32,
    norm_eps=1e-5,
    activation="quick_gelu",
    attention_biases="qkvo",
    patch_bias=False,
    pre_layernorm=True,
    post_layernorm=True,
)
CLIP_VIT_L = dataclasses.replace(
    CLIP_VIT_B32, image_size=336, patch_size=14, width=1024, depth=24, num_heads=16, mlp_dim=4096
)
SIGLIP_VIT_B16 = ViTConfig(
    patch_size=16, activation="gelu_tanh", attention_biases="qkvo", post_layernorm=True, attention_pool=True
)
VIT_4B = ViTConfig(width=1792, depth=56, num_heads=16, mlp_dim=15_360)  # ViT-e (arXiv 2209.06794)
TINY_VIT = ViTConfig(
    image_size=112, patch_size=14, width=128, depth=6, num_heads=4, mlp_dim=384
)  # ships with the project


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). The carry also collects the outputs of `feature_layers`.

    CLIP's text tower has the same blocks, with a mask; `c` is then its config.
    """

    c: ViTConfig
    feature_layers: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, carry, index, mask=None):
        c = self.c
        x_BPD, features_TBPD = carry
        head = c.width // c.num_heads
        attention = Attention(c.width, c.num_heads, head, biases=c.attention_biases, lora=c.lora, name="attention")
        x_BPD = x_BPD + attention(LayerNorm(c.width, c.norm_eps, name="norm1")(x_BPD), mask=mask)
        x_BPD = x_BPD + MLP(c.width, c.mlp_dim, c.activation, lora=c.lora, name="mlp")(
            LayerNorm(c.width, c.norm_eps, name="norm2")(x_BPD)
        )
        x_BPD = with_logical_constraint(x_BPD, "batch", "length", "act_embed")
        if self.feature_layers:
            is_layer_T111 = (jnp.asarray(self.feature_layers) == index)[:, None, None, None]
            features_TBPD = jnp.where(is_layer_T111, x_BPD[None], features_TBPD)
        return (x_BPD, features_TBPD), None


class AttentionPool(nn.Module):
    """State (B, D) of a learned query that attends to all patches (B, P, D), behind an MLP block (SigLIP's head)."""

    c: ViTConfig

    @nn.compact
    def __call__(self, x_BPD):
        c = self.c
        probe_D = self.param("probe", with_logical_partitioning(normal(0.02), ("embed",)), (c.width,))
        query_B1D = jnp.broadcast_to(probe_D.astype(x_BPD.dtype), (len(x_BPD), 1, c.width))
        x_B1D = Attention(c.width, c.num_heads, c.width // c.num_heads, name="attention")(query_B1D, x_BPD)
        x_B1D = x_B1D + MLP(c.width, c.mlp_dim, c.activation, name="mlp")(
            LayerNorm(c.width, c.norm_eps, name="norm")(x_B1D)
        )
        return x_B1D[:, 0]


class ViT(nn.Module):
    """Last block's output (B, 1 + P, D), outputs of `feature_layers` (T, B, 1 + P, D), and image state (B, D).

    Feature layer i is the output of block i, from 0; without feature layers the second output is None. The class token
    comes first, and its state, normalized with `post_layernorm`, is the image's. With `attention_pool` there is no
    class token, all of the first output is normalized, and the image state is that of the head. Raises ValueError for
    an image of another size.
    """

    c: ViTConfig
    feature_layers: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, image_BHWC):
        c = self.c
        if image_BHWC.shape[1:3] != (c.image_size, c.image_size):
            raise ValueError(
                f"image is {image_BHWC.shape[1:3]} pixels, but the ViT's image_size is {c.image_size}; resize the "
                f"image, or set image_size={image_BHWC.shape[1]} and resample the position table"
            )
        patch_BPD = PatchEmbed(c.patch_size, c.width, use_bias=c.patch_bias, name="patch")(image_BHWC)
        if not c.attention_pool:
            class_D = self.param("class_token", with_logical_partitioning(normal(0.02), ("embed",)), (c.width,))
            class_B1D = jnp.broadcast_to(class_D.astype(patch_BPD.dtype), (patch_BPD.shape[0], 1, c.width))
            patch_BPD = jnp.concatenate([class_B1D, patch_BPD], axis=1)
        shape = (c.num_positions, c.width)
        position_PD = self.param("position", with_logical_partitioning(normal(0.02), ("position", "embed")), shape)
        x_BPD = patch_BPD + position_PD.astype(patch_BPD.dtype)
        if c.pre_layernorm:
            x_BPD = LayerNorm(c.width, c.norm_eps, name="norm_before")(x_BPD)
        blocks = scan_blocks(remat_block(Block, c.remat), c.depth)(c, self.feature_layers, name="blocks")
        shape = (len(self.feature_layers), *x_BPD.shape)
        features_TBPD = jnp.zeros(shape, x_BPD.dtype) if self.feature_layers else None
        (x_BPD, features_TBPD), _ = blocks((x_BPD, features_TBPD), jnp.arange(c.depth))
        if c.attention_pool:
            x_BPD = LayerNorm(c.width, c.norm_eps, name="norm_after")(x_BPD) if c.post_layernorm else x_BPD
            return x_BPD, features_TBPD, AttentionPool(c, name="pool")(x_BPD)
        class_BD = x_BPD[:, 0]
        if c.post_layernorm:
            # As in CLIP, only for the class token; patch features have no norm.
            class_BD = LayerNorm(c.width, c.norm_eps, name="norm_after")(class_BD)
        return x_BPD, features_TBPD, class_BD


def eva_weight_map(c: ViTConfig) -> tuple[WeightMapping, ...]:
    """Names of eva_vit_g.pth (and of `visual_encoder.` in LAVIS and LION)."""
    head = c.width // c.num_heads
    cut = split_heads_kernel(c.num_heads, head)
    block = (
        WeightMapping("attn.qkv.weight", tuple(f"attention/{x}/kernel" for x in "qkv"), split_fused(cut, cut, cut)),
        WeightMapping("attn.q_bias", "attention/q/bias", split_heads(c.num_heads, head)),
        WeightMapping("attn.v_bias", "attention/v/bias", split_heads(c.num_heads, head)),
        WeightMapping("attn.proj.weight", "attention/o/kernel", merge_heads_kernel(c.num_heads, head)),
        WeightMapping("attn.proj.bias", "attention/o/bias"),
        *norm_weight_map("norm1", "norm1"),
        *norm_weight_map("norm2", "norm2"),
        *dense_weight_map("mlp.fc1", "mlp/up"),
        *dense_weight_map("mlp.fc2", "mlp/down"),
    )
    return (
        WeightMapping("cls_token", "class_token", reshape((1, 1, -1), (-1,))),
        WeightMapping("pos_embed", "position", reshape((1, -1, c.width), (-1, c.width))),
        WeightMapping("patch_embed.proj.weight", "patch/kernel", conv),
        WeightMapping("patch_embed.proj.bias", "patch/bias"),
        *with_prefix("blocks.{i}.", "blocks/", block),
    )


def tower_weight_map(c: ViTConfig, weight_map_fn: Callable) -> tuple[WeightMapping, ...]:
    """`weight_map_fn(c)` for a CLIP tower (with `pre_layernorm`), else the names of EVA."""
    return weight_map_fn(c) if c.pre_layernorm else eva_weight_map(c)


def blip2_weight_map(c: ViTConfig) -> tuple[WeightMapping, ...]:
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
    cut = split_heads(c.num_heads, c.width // c.num_heads)
    paths = tuple(f"blocks/attention/{x}/bias" for x in "qv")
    rows = (row for row in eva_weight_map(c) if row.flax_paths[0] not in paths)
    bias = WeightMapping("encoder.layers.{i}.self_attn.qkv.bias", paths, split_fused(cut, None, cut))
    return (*rename_torch_keys(rows, *pairs), bias)


def mplug_owl_weight_map(c: ViTConfig) -> tuple[WeightMapping, ...]:
    """Names under `vision_model.` in mPLUG-Owl, where q, k and v are interleaved by head."""
    block = (
        *(
            WeightMapping(
                f"self_attn.query_key_value.{torch}",
                tuple(f"attention/{x}/{flax}" for x in "qkv"),
                split_interleaved_heads(c.num_heads),
            )
            for torch, flax in (("weight", "kernel"), ("bias", "bias"))
        ),
        WeightMapping(
            "self_attn.dense.weight", "attention/o/kernel", merge_heads_kernel(c.num_heads, c.width // c.num_heads)
        ),
        WeightMapping("self_attn.dense.bias", "attention/o/bias"),
        *norm_weight_map("input_layernorm", "norm1"),
        *norm_weight_map("post_attention_layernorm", "norm2"),
        *dense_weight_map("mlp.fc1", "mlp/up"),
        *dense_weight_map("mlp.fc2", "mlp/down"),
    )
    return (
        WeightMapping("embeddings.cls_token", "class_token", reshape((1, 1, -1), (-1,))),
        WeightMapping("embeddings.position_embedding", "position", reshape((1, -1, c.width), (-1, c.width))),
        WeightMapping("embeddings.patch_embed.weight", "patch/kernel", conv),
        *norm_weight_map("embeddings.pre_layernorm", "norm_before"),
        *with_prefix("encoder.layers.{i}.", "blocks/", block),
    )


def fused_attention_weight_map(c: ViTConfig, torch_prefix: str) -> tuple[WeightMapping, ...]:
    """Names of torch's MultiheadAttention, whose projections are one tensor, at `torch_prefix`."""
    head = c.width // c.num_heads
    kernel, bias = split_heads_kernel(c.num_heads, head), split_heads(c.num_heads, head)
    paths = {name: tuple(f"attention/{x}/{name}" for x in "qkv") for name in ("kernel", "bias")}
    return (
        WeightMapping(f"{torch_prefix}in_proj_weight", paths["kernel"], split_fused(kernel, kernel, kernel)),
        WeightMapping(f"{torch_prefix}in_proj_bias", paths["bias"], split_fused(bias, bias, bias)),
        WeightMapping(f"{torch_prefix}out_proj.weight", "attention/o/kernel", merge_heads_kernel(c.num_heads, head)),
        WeightMapping(f"{torch_prefix}out_proj.bias", "attention/o/bias"),
    )


def openai_block_weight_map(c: ViTConfig) -> tuple[WeightMapping, ...]:
    """Names of one block of both towers in OpenAI's code."""
    return (
        *fused_attention_weight_map(c, "attn."),
        *norm_weight_map("ln_1", "norm1"),
        *norm_weight_map("ln_2", "norm2"),
        *dense_weight_map("mlp.c_fc", "mlp/up"),
        *dense_weight_map("mlp.c_proj", "mlp/down"),
    )


def openai_clip_weight_map(c: ViTConfig) -> tuple[WeightMapping, ...]:
    """Names of CLIP's ViT in OpenAI's code, as in LAVIS's clip_vit_L.pth."""
    return (
        WeightMapping("class_embedding", "class_token"),
        WeightMapping("positional_embedding", "position"),
        WeightMapping("conv1.weight", "patch/kernel", conv),
        *norm_weight_map("ln_pre", "norm_before"),
        *(norm_weight_map("ln_post", "norm_after") if c.post_layernorm else ()),
        *with_prefix("transformer.resblocks.{i}.", "blocks/", openai_block_weight_map(c)),
    )


def lavis_weight_map(c: ViTConfig) -> tuple[WeightMapping, ...]:
    """Names of the towers in LAVIS: those of EVA, or of CLIP in OpenAI's code."""
    return openai_clip_weight_map(c) if c.pre_layernorm else eva_weight_map(c)


def clip_block_weight_map(c: ViTConfig) -> tuple[WeightMapping, ...]:
    """Names of one block of both towers in Hugging Face's CLIP and SigLIP."""
    letters = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    return (
        *with_prefix(
            "self_attn.", "attention/", attentions.weight_map(letters, c.num_heads, c.width // c.num_heads, "qkvo")
        ),
        *norm_weight_map("layer_norm1", "norm1"),
        *norm_weight_map("layer_norm2", "norm2"),
        *dense_weight_map("mlp.fc1", "mlp/up"),
        *dense_weight_map("mlp.fc2", "mlp/down"),
    )


def siglip_weight_map(c: ViTConfig) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's SiglipVisionModel, without the prefix `vision_model.` in files."""
    head = (
        WeightMapping("probe", "probe", reshape((1, 1, -1), (-1,))),
        *fused_attention_weight_map(c, "attention."),
        *norm_weight_map("layernorm", "norm"),
        *dense_weight_map("mlp.fc1", "mlp/up"),
        *dense_weight_map("mlp.fc2", "mlp/down"),
    )
    return (
        WeightMapping("embeddings.position_embedding.weight", "position"),
        WeightMapping("embeddings.patch_embedding.weight", "patch/kernel", conv),
        WeightMapping("embeddings.patch_embedding.bias", "patch/bias"),
        *norm_weight_map("post_layernorm", "norm_after"),
        *with_prefix("encoder.layers.{i}.", "blocks/", clip_block_weight_map(c)),
        *with_prefix("head.", "pool/", head),
    )


def clip_weight_map(c: ViTConfig) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's CLIPVisionModel, without the prefix `vision_model.` in files."""
    return (
        WeightMapping("embeddings.class_embedding", "class_token"),
        WeightMapping("embeddings.position_embedding.weight", "position"),
        WeightMapping("embeddings.patch_embedding.weight", "patch/kernel", conv),
        *norm_weight_map("pre_layrnorm", "norm_before"),
        *(norm_weight_map("post_layernorm", "norm_after") if c.post_layernorm else ()),
        *with_prefix("encoder.layers.{i}.", "blocks/", clip_block_weight_map(c)),
    )
