# SPDX-License-Identifier: Apache-2.0
"""SAM's image encoder (arXiv 2304.02643): a ViT with window attention in most layers and global attention in a few.

Attention has decomposed relative position embeddings (rows and columns). A convolutional neck projects the output to
the image embedding that the mask decoder reads; see `sam_decoder`.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_constraint, with_logical_partitioning
from lionjax.core.weight_map import (
    Transform,
    WeightMapping,
    conv,
    merge_heads_kernel,
    split_fused,
    split_heads,
    split_heads_kernel,
    squeeze,
    with_prefix,
)
from lionjax.models.base_configs import PatchGrid, TransformerSizes
from lionjax.nn.attention import Attention
from lionjax.nn.layers import (
    MLP,
    Conv,
    Dense,
    LayerNorm,
    PatchEmbed,
    dense_weight_map,
    norm_weight_map,
    remat_block,
    scan_blocks,
    window_partition,
    window_reverse,
    zeros,
)


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class SamConfig(TransformerSizes, PatchGrid):
    """Config of the image encoder, the prompt encoder and the mask decoder."""

    image_size: int = 1024  # pixels a side
    patch_size: int = 16
    width: int = 1280
    depth: int = 32
    num_heads: int = 16
    mlp_dim: int = 5120
    window_size: int = 14  # patches a side
    global_attn_indexes: tuple[int, ...] = (7, 15, 23, 31)
    prompt_embed_dim: int = 256  # width of image embedding, prompts and decoder
    norm_eps: float = 1e-6
    mask_input_channels: int = 16  # hidden channels of the encoder of mask prompts
    decoder_depth: int = 2
    decoder_num_heads: int = 8
    decoder_mlp_dim: int = 2048
    decoder_norm_eps: float = 1e-5
    num_mask_tokens: int = 4  # one mask for clear prompts, then three for ambiguous ones
    iou_head_depth: int = 3
    iou_head_mlp_dim: int = 256
    remat: str = "none"

    @property
    def window_sizes(self) -> tuple[int, ...]:
        """Side of the attention window of each layer of a period in patches; the scan repeats the period."""
        sizes = [self.grid_size if n in self.global_attn_indexes else self.window_size for n in range(self.depth)]
        periods = (p for p in range(1, self.depth + 1) if self.depth % p == 0)
        return next(tuple(sizes[:p]) for p in periods if sizes[:p] * (self.depth // p) == sizes)


SAM_VIT_H = SamConfig()
SAM_VIT_L = SamConfig(width=1024, depth=24, mlp_dim=4096, global_attn_indexes=(5, 11, 17, 23))
TINY_SAM = SamConfig(  # ships with the project
    image_size=112,
    patch_size=8,
    width=64,
    depth=4,
    num_heads=4,
    mlp_dim=128,
    window_size=7,
    global_attn_indexes=(1, 3),
    prompt_embed_dim=64,
    mask_input_channels=8,
    decoder_num_heads=4,
    decoder_mlp_dim=128,
    iou_head_mlp_dim=64,
)
SAM_VIT_B = SamConfig(width=768, depth=12, num_heads=12, mlp_dim=3072, global_attn_indexes=(2, 5, 8, 11))


class Block(nn.Module):
    """x += attention(norm(x)) in windows of `window_size` patches a side; x += mlp(norm(x))."""

    c: SamConfig
    window_size: int

    @nn.compact
    def __call__(self, x_BHWD):
        c, head = self.c, self.c.width // self.c.num_heads
        init, shape = with_logical_partitioning(zeros, ("position", "head")), (2 * self.window_size - 1, head)
        rows_RH, columns_RH = self.param("rows", init, shape), self.param("columns", init, shape)
        attention = Attention(c.width, c.num_heads, head, name="attention")
        # Padding positions are keys too, as in the original, which does not mask them.
        h_BLD = window_partition(LayerNorm(c.width, c.norm_eps, name="norm1")(x_BHWD), self.window_size)
        query_BLNH = attention.project_query(h_BLD)
        bias = decomposed_rel_pos_bias(query_BLNH, rows_RH, columns_RH)
        change_BLD = attention.attend(query_BLNH, attention.project_key_value(h_BLD), None, bias)
        x_BHWD = x_BHWD + window_reverse(change_BLD, self.window_size, x_BHWD.shape)
        x_BHWD = x_BHWD + MLP(c.width, c.mlp_dim, name="mlp")(LayerNorm(c.width, c.norm_eps, name="norm2")(x_BHWD))
        return with_logical_constraint(x_BHWD, "batch", "length", "length", "act_embed")


class Period(nn.Module):
    """The repeated sequence of layers with window and global attention (`SamConfig.window_sizes`)."""

    c: SamConfig

    @nn.compact
    def __call__(self, x_BHWD, _):
        block = remat_block(Block, self.c.remat)
        for n, window_size in enumerate(self.c.window_sizes):
            x_BHWD = block(self.c, window_size, name=f"block_{n}")(x_BHWD)
        return x_BHWD, None


class ImageEncoder(nn.Module):
    """Image embedding (B, h, w, C) of images (B, H, W, 3), one position for each patch.

    Raises ValueError for an image of another size than `image_size`.
    """

    c: SamConfig

    @nn.compact
    def __call__(self, image_BHWC):
        c = self.c
        if image_BHWC.shape[1:3] != (c.image_size, c.image_size):
            size = f"{image_BHWC.shape[1]} x {image_BHWC.shape[2]}"
            raise ValueError(
                f"the image is {size} px, but SAM's image_size is {c.image_size}; resize and pad it to that side"
            )
        x_BPD = PatchEmbed(c.patch_size, c.width, name="patch")(image_BHWC)
        x_BHWD = x_BPD.reshape(-1, c.grid_size, c.grid_size, c.width)
        init = with_logical_partitioning(zeros, ("position", "position", "embed"))
        x_BHWD = x_BHWD + self.param("position", init, (c.grid_size, c.grid_size, c.width)).astype(x_BHWD.dtype)
        periods = scan_blocks(Period, c.depth // len(c.window_sizes))
        x_BHWD, _ = periods(c, name="periods")(x_BHWD, None)
        x_BHWC = Dense(c.width, c.prompt_embed_dim, ("embed", None), use_bias=False, name="narrow")(x_BHWD)
        x_BHWC = LayerNorm(c.prompt_embed_dim, c.norm_eps, name="narrow_norm")(x_BHWC)
        x_BHWC = Conv(c.prompt_embed_dim, c.prompt_embed_dim, use_bias=False, name="conv")(x_BHWC)
        return LayerNorm(c.prompt_embed_dim, c.norm_eps, name="conv_norm")(x_BHWC)


def decomposed_rel_pos_bias(query_BLNH, rel_pos_h_RH, rel_pos_w_RH):
    """Attention bias (B, N, L, L) in float32: unscaled queries times relative row and column embeddings."""
    batch, length, heads, head = query_BLNH.shape
    side = (len(rel_pos_h_RH) + 1) // 2
    query = query_BLNH.reshape(batch, side, side, heads, head)
    index = np.arange(side)[:, None] - np.arange(side)[None, :] + side - 1
    rows_YSH, columns_XSH = rel_pos_h_RH[index].astype(query.dtype), rel_pos_w_RH[index].astype(query.dtype)
    row_bias = jnp.einsum("BYXNH,YSH->BNYXS", query, rows_YSH, preferred_element_type=jnp.float32)
    column_bias = jnp.einsum("BYXNH,XSH->BNYXS", query, columns_XSH, preferred_element_type=jnp.float32)
    return (row_bias[..., :, None] + column_bias[..., None, :]).reshape(batch, heads, length, length)


pointwise_conv = Transform(
    "pointwise", lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None]
)  # a 1x1 convolution as a Dense

# Torch names of the encoder's modules in the original code and in Hugging Face's.
ORIGINAL_NAMES = {
    "patch": "patch_embed.proj",
    "blocks": "blocks",
    "norm": "norm",
    "narrow": "neck.0",
    "narrow_norm": "neck.1",
    "conv": "neck.2",
    "conv_norm": "neck.3",
}
HF_NAMES = {
    "patch": "patch_embed.projection",
    "blocks": "layers",
    "norm": "layer_norm",
    "narrow": "neck.conv1",
    "narrow_norm": "neck.layer_norm1",
    "conv": "neck.conv2",
    "conv_norm": "neck.layer_norm2",
}


def encoder_weight_map(c: SamConfig, torch_names: dict[str, str] = ORIGINAL_NAMES) -> tuple[WeightMapping, ...]:
    """Names under `image_encoder.` of the original, or `vision_encoder.` of Hugging Face's SamModel."""
    head = c.width // c.num_heads
    kernel, bias = split_heads_kernel(c.num_heads, head), split_heads(c.num_heads, head)
    kernel_paths, bias_paths = (tuple(f"attention/{x}/{w}" for x in "qkv") for w in ("kernel", "bias"))
    block = (
        WeightMapping("attn.qkv.weight", kernel_paths, split_fused(kernel, kernel, kernel)),
        WeightMapping("attn.qkv.bias", bias_paths, split_fused(bias, bias, bias)),
        WeightMapping("attn.proj.weight", "attention/o/kernel", merge_heads_kernel(c.num_heads, head)),
        WeightMapping("attn.proj.bias", "attention/o/bias"),
        WeightMapping("attn.rel_pos_h", "rows"),
        WeightMapping("attn.rel_pos_w", "columns"),
        *norm_weight_map(f"{torch_names['norm']}1", "norm1"),
        *norm_weight_map(f"{torch_names['norm']}2", "norm2"),
        *dense_weight_map("mlp.lin1", "mlp/up"),
        *dense_weight_map("mlp.lin2", "mlp/down"),
    )
    period = len(c.window_sizes)
    rows = [
        WeightMapping("pos_embed", "position", squeeze),
        WeightMapping(f"{torch_names['patch']}.weight", "patch/kernel", conv),
        WeightMapping(f"{torch_names['patch']}.bias", "patch/bias"),
        WeightMapping(f"{torch_names['narrow']}.weight", "narrow/kernel", pointwise_conv),
        *norm_weight_map(torch_names["narrow_norm"], "narrow_norm"),
        WeightMapping(f"{torch_names['conv']}.weight", "conv/kernel", conv),
        *norm_weight_map(torch_names["conv_norm"], "conv_norm"),
    ]
    for n in range(period):
        layer = f"{torch_names['blocks']}.{{{period}i+{n}<{c.depth // period}}}."
        rows += with_prefix(layer, f"periods/block_{n}/", block)
    return tuple(rows)
