# SPDX-License-Identifier: Apache-2.0
"""SAM's image encoder (arXiv 2304.02643): a ViT on a large square whose layers look mostly into small windows.

Every few layers one looks at the whole picture. What a query adds to its scores depends on how many rows and columns a
key lies away. A neck narrows the result to the map that the mask decoder reads; see `sam_masks`.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lionjax.core.sharding import constrain, sharded
from lionjax.core.weight_map import Op, Row, conv, fused, heads_in, heads_in_bias, heads_out, squeeze, under
from lionjax.nn.attention import Attention
from lionjax.nn.layers import (
    MLP,
    REMAT,
    Conv,
    Dense,
    LayerNorm,
    PatchEmbed,
    dense_rows,
    from_squares,
    into_squares,
    norm_rows,
    zeros,
)


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """Sizes of the image encoder, and behind it those of the prompt encoder and the mask decoder."""

    image: int = 1024  # pixels a side
    patch: int = 16
    width: int = 1280
    depth: int = 32
    heads: int = 16
    hidden: int = 5120
    window: int = 14  # tokens a side
    global_layers: tuple[int, ...] = (7, 15, 23, 31)
    channels: int = 256  # of the map, of prompts and of the decoder
    eps: float = 1e-6
    mask_channels: int = 16  # of a mask given as a prompt, on its way to the map
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_hidden: int = 2048
    decoder_eps: float = 1e-5
    masks: int = 4  # the best one, then three alternatives for a vague prompt
    iou_depth: int = 3
    iou_hidden: int = 256
    remat: str = "none"

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.image // self.patch

    @property
    def sides(self) -> tuple[int, ...]:
        """Tokens a side of what each layer of a period sees; the periods, which are scanned, make up the depth."""
        whole = [self.grid if n in self.global_layers else self.window for n in range(self.depth)]
        periods = (p for p in range(1, self.depth + 1) if self.depth % p == 0)
        return next(tuple(whole[:p]) for p in periods if whole[:p] * (self.depth // p) == whole)


SAM_VIT_H = SamConfig()
SAM_VIT_L = SamConfig(width=1024, depth=24, hidden=4096, global_layers=(5, 11, 17, 23))
TINY_SAM = SamConfig(  # ships with the project
    image=112,
    patch=8,
    width=64,
    depth=4,
    heads=4,
    hidden=128,
    window=7,
    global_layers=(1, 3),
    channels=64,
    mask_channels=8,
    decoder_heads=4,
    decoder_hidden=128,
    masks=4,
    iou_hidden=64,
)
SAM_VIT_B = SamConfig(width=768, depth=12, heads=12, hidden=3072, global_layers=(2, 5, 8, 11))


class Block(nn.Module):
    """x += attention(norm x) within squares of `side` tokens; x += mlp(norm x)."""

    c: SamConfig
    side: int

    @nn.compact
    def __call__(self, x_BHWD):
        c, head = self.c, self.c.width // self.c.heads
        init, shape = sharded(zeros, ("position", "head")), (2 * self.side - 1, head)
        rows_RH, columns_RH = self.param("rows", init, shape), self.param("columns", init, shape)
        own = Attention(c.width, c.heads, head, name="attention")
        # Zeros beside the picture are keys as well: the original does not mask them.
        h_BLD = into_squares(LayerNorm(c.width, c.eps, name="norm1")(x_BHWD), self.side)
        query_BLNH = own.queries(h_BLD)
        bias = relative_bias(query_BLNH, rows_RH, columns_RH)
        change_BLD = own.look(query_BLNH, own.keys_values(h_BLD), None, bias)
        x_BHWD = x_BHWD + from_squares(change_BLD, self.side, x_BHWD.shape)
        x_BHWD = x_BHWD + MLP(c.width, c.hidden, name="mlp")(LayerNorm(c.width, c.eps, name="norm2")(x_BHWD))
        return constrain(x_BHWD, "batch", "length", "length", "act_embed")


class Period(nn.Module):
    """Layers that look into windows and at the whole in the order that repeats."""

    c: SamConfig

    @nn.compact
    def __call__(self, x_BHWD, _):
        block = Block if self.c.remat == "none" else nn.remat(Block, prevent_cse=False, policy=REMAT[self.c.remat])
        for n, side in enumerate(self.c.sides):
            x_BHWD = block(self.c, side, name=f"block_{n}")(x_BHWD)
        return x_BHWD, None


class ImageEncoder(nn.Module):
    """(B, H, W, 3) -> (B, h, w, C), one place for each patch."""

    c: SamConfig

    @nn.compact
    def __call__(self, image_BHWC):
        c = self.c
        if image_BHWC.shape[1:3] != (c.image, c.image):
            size = f"{image_BHWC.shape[1]} x {image_BHWC.shape[2]}"
            raise ValueError(f"the image is {size} px but SAM reads {c.image} x {c.image}; resize and pad it to that")
        x_BPD = PatchEmbed(c.patch, c.width, name="patch")(image_BHWC)
        x_BHWD = x_BPD.reshape(-1, c.grid, c.grid, c.width)
        init = sharded(zeros, ("position", "position", "embed"))
        x_BHWD = x_BHWD + self.param("position", init, (c.grid, c.grid, c.width)).astype(x_BHWD.dtype)
        periods = nn.scan(
            Period,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=c.depth // len(c.sides),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BHWD, _ = periods(c, name="periods")(x_BHWD, None)
        x_BHWC = Dense(c.width, c.channels, ("embed", None), bias=False, name="narrow")(x_BHWD)
        x_BHWC = LayerNorm(c.channels, c.eps, name="narrow_norm")(x_BHWC)
        x_BHWC = Conv(c.channels, c.channels, bias=False, name="conv")(x_BHWC)
        return LayerNorm(c.channels, c.eps, name="conv_norm")(x_BHWC)


def relative_bias(query_BLNH, rows_RH, columns_RH):
    """What is added to the scores within a square: (B, N, L, L) in float32, from the unscaled queries."""
    batch, length, heads, head = query_BLNH.shape
    side = (len(rows_RH) + 1) // 2
    query = query_BLNH.reshape(batch, side, side, heads, head)
    away = np.arange(side)[:, None] - np.arange(side)[None, :] + side - 1
    rows_YSH, columns_XSH = rows_RH[away].astype(query.dtype), columns_RH[away].astype(query.dtype)
    down = jnp.einsum("BYXNH,YSH->BNYXS", query, rows_YSH, preferred_element_type=jnp.float32)
    across = jnp.einsum("BYXNH,XSH->BNYXS", query, columns_XSH, preferred_element_type=jnp.float32)
    return (down[..., :, None] + across[..., None, :]).reshape(batch, heads, length, length)


pointwise = Op("pointwise", lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])  # a 1x1 convolution as a Dense

# The same layers in the original's words and in Hugging Face's.
SEGMENT_ANYTHING = {
    "patch": "patch_embed.proj",
    "blocks": "blocks",
    "norm": "norm",
    "narrow": "neck.0",
    "narrow_norm": "neck.1",
    "conv": "neck.2",
    "conv_norm": "neck.3",
}
HUGGING_FACE = {
    "patch": "patch_embed.projection",
    "blocks": "layers",
    "norm": "layer_norm",
    "narrow": "neck.conv1",
    "narrow_norm": "neck.layer_norm1",
    "conv": "neck.conv2",
    "conv_norm": "neck.layer_norm2",
}


def encoder_rows(c: SamConfig, words: dict[str, str] = SEGMENT_ANYTHING) -> tuple[Row, ...]:
    """Names under `image_encoder.` of the original, or `vision_encoder.` of Hugging Face's SamModel."""
    head = c.width // c.heads
    into, cut = heads_in(c.heads, head), heads_in_bias(c.heads, head)
    block = (
        Row("attn.qkv.weight", tuple(f"attention/{x}/kernel" for x in "qkv"), fused(into, into, into)),
        Row("attn.qkv.bias", tuple(f"attention/{x}/bias" for x in "qkv"), fused(cut, cut, cut)),
        Row("attn.proj.weight", "attention/o/kernel", heads_out(c.heads, head)),
        Row("attn.proj.bias", "attention/o/bias"),
        Row("attn.rel_pos_h", "rows"),
        Row("attn.rel_pos_w", "columns"),
        *norm_rows(f"{words['norm']}1", "norm1"),
        *norm_rows(f"{words['norm']}2", "norm2"),
        *dense_rows("mlp.lin1", "mlp/up"),
        *dense_rows("mlp.lin2", "mlp/down"),
    )
    period = len(c.sides)
    rows = [
        Row("pos_embed", "position", squeeze),
        Row(f"{words['patch']}.weight", "patch/kernel", conv),
        Row(f"{words['patch']}.bias", "patch/bias"),
        Row(f"{words['narrow']}.weight", "narrow/kernel", pointwise),
        *norm_rows(words["narrow_norm"], "narrow_norm"),
        Row(f"{words['conv']}.weight", "conv/kernel", conv),
        *norm_rows(words["conv_norm"], "conv_norm"),
    ]
    for n in range(period):
        layer = f"{words['blocks']}.{{{period}i+{n}<{c.depth // period}}}."
        rows += under(layer, f"periods/block_{n}/", block)
    return tuple(rows)
