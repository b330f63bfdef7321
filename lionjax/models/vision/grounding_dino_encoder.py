# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO's config, its feature levels, and its feature enhancer (arXiv 2303.05499, section 3.2).

Each layer of the enhancer fuses image and text by cross-attention in both directions, then text attends to itself
within each phrase, and the image to itself by deformable attention over all levels.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_constraint, with_logical_partitioning
from lionjax.core.types import pytree_dataclass
from lionjax.models.language.bert import BERT_BASE, BertConfig
from lionjax.models.vision.swin import SWIN_B_DETECTOR, SWIN_T_DETECTOR, SwinConfig, drop_path
from lionjax.nn import layers
from lionjax.nn.attention import Attention
from lionjax.nn.deformable_attention import DeformableAttention, Shapes
from lionjax.nn.flash_attention import MASK_VALUE
from lionjax.nn.positions import interleaved_sinusoids

NUM_GROUPS = 32  # of the group norms behind the projections of the levels
FUSION_SCALE = 1e-4  # initial scale of what the fusion adds
xavier = nn.initializers.xavier_uniform()


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class GroundingDinoConfig:
    """Config; the defaults are those of groundingdino_swint_ogc.pth.

    The text and fusion parts of the enhancer have half of `num_heads` and of `mlp_dim`; `mlp_dim` / 2 is also the width
    of the fusion's attention.
    """

    swin: SwinConfig = SWIN_T_DETECTOR
    text: BertConfig = BERT_BASE
    width: int = 256
    num_heads: int = 8
    mlp_dim: int = 2048
    encoder_depth: int = 6
    decoder_depth: int = 6
    num_queries: int = 900
    num_levels: int = 4
    num_points: int = 4  # that each head samples on each level
    max_text_len: int = 256  # tokens; longer texts are cut
    delimiter_ids: tuple[int, ...] = (101, 102, 1012, 1029)  # [CLS], [SEP], "." and "?", which end phrases
    norm_eps: float = 1e-5
    # A coordinate p and 1 - p are at least this before their logit: 1e-3 in the original, 1e-5 in transformers.
    inverse_sigmoid_eps: float = 1e-3
    position_temperature: float = 20.0  # of the position encodings of the image
    # Whether the boxes of a layer also train the layer before (DINO, arXiv 2203.03605); transformers does not.
    look_forward_twice: bool = True
    dropout: float = 0.0
    fusion_drop_path: float = 0.1
    remat: str = "none"

    @property
    def feature_width(self) -> int:
        """Width of `DetectorOutput.features_BQD`."""
        return self.width + 4


GROUNDING_DINO_SWIN_T = GroundingDinoConfig()
GROUNDING_DINO_SWIN_B = GroundingDinoConfig(swin=SWIN_B_DETECTOR)


class GroupNorm(nn.Module):
    """GroupNorm (arXiv 1803.08494) of x (B, H, W, D), computed in float32; the output has the dtype of x."""

    width: int
    num_groups: int
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x_BHWD):
        axes = ("embed",)
        scale = self.param("scale", with_logical_partitioning(layers.ones, axes), (self.width,))
        bias = self.param("bias", with_logical_partitioning(layers.zeros, axes), (self.width,))
        grouped = x_BHWD.astype(jnp.float32).reshape(*x_BHWD.shape[:3], self.num_groups, -1)
        centered = grouped - grouped.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(centered).mean((1, 2, 4), keepdims=True)
        y_BHWD = (centered * jax.lax.rsqrt(variance + self.eps)).reshape(x_BHWD.shape)
        return (y_BHWD * scale + bias).astype(x_BHWD.dtype)


class FeatureLevels(nn.Module):
    """The levels (B, H', W', D): a 1 x 1 projection of each backbone map, then convolutions of stride 2, all normed."""

    c: GroundingDinoConfig

    @nn.compact
    def __call__(self, maps) -> list:
        c, levels = self.c, []
        for level in range(c.num_levels):
            if level < len(maps):
                source, size, stride = maps[level], 1, 1
            else:  # the first one from the backbone's last map, not from its projection
                source, size, stride = maps[-1] if level == len(maps) else levels[-1], 3, 2
            projection = layers.Conv(source.shape[-1], c.width, size, stride, name=f"projection_{level}")
            levels.append(GroupNorm(c.width, NUM_GROUPS, name=f"norm_{level}")(projection(source)))
        return levels


def resize_mask(mask_BHW, height: int, width: int):
    """The mask at the nearest upper-left positions of a grid; index arithmetic in float32 as in torch's interpolate."""

    def index(size, new_size):
        step = np.float32(size) / np.float32(new_size)
        return np.minimum(np.floor(np.arange(new_size, dtype=np.float32) * step).astype(np.int32), size - 1)

    return mask_BHW[:, index(mask_BHW.shape[1], height)][:, :, index(mask_BHW.shape[2], width)]


def image_positions(valid_BHW, width: int, temperature: float):
    """Sinusoidal encodings (B, H, W, D) of y, then x, counted over valid positions and divided by their number."""

    def encode(axis):
        count_BHW = jnp.cumsum(valid_BHW.astype(jnp.float32), axis)
        total = jax.lax.slice_in_dim(count_BHW, count_BHW.shape[axis] - 1, None, axis=axis)
        return interleaved_sinusoids(count_BHW / (total + 1e-6), width // 2, temperature)

    return jnp.concatenate([encode(1), encode(2)], axis=-1)


def valid_sizes(masks):
    """The valid width and height of each level in positions: (B, T, 2) float32."""
    sizes = [jnp.stack([mask[:, 0].sum(-1), mask[:, :, 0].sum(-1)], axis=-1) for mask in masks]
    return jnp.stack(sizes, axis=1).astype(jnp.float32)


def pixel_centers(shapes: Shapes, size_BT2):
    """Centers (B, P, 2) of all positions of all levels, x and y in parts of the valid size of their level."""
    centers = []
    for level, (height, width) in enumerate(shapes):
        y, x = np.divmod(np.arange(height * width, dtype=np.float32), width)
        centers.append((np.stack([x, y], axis=-1) + 0.5) / size_BT2[:, level, None])
    return jnp.concatenate(centers, axis=1)


def attend_with_positions(c: GroundingDinoConfig, num_heads: int, name: str, x_BLD, position_BLD, mask=None):
    """Self-attention whose queries and keys, but not its values, have the positions added."""
    attention = make_attention(c, num_heads, name)
    query_BLD = x_BLD + position_BLD
    return attention.attend(attention.project_query(query_BLD), (attention.k(query_BLD), attention.v(x_BLD)), mask)


def make_attention(c: GroundingDinoConfig, num_heads: int, name: str) -> Attention:
    """Attention of the model's width, initialized as by Glorot's rule."""
    init = layers.normal((2 * c.width) ** -0.5)
    return Attention(c.width, num_heads, c.width // num_heads, kernel_inits=(init,) * 4, name=name)


def norm(c: GroundingDinoConfig, name: str) -> layers.LayerNorm:
    return layers.LayerNorm(c.width, c.norm_eps, name=name)


def feed_forward(c: GroundingDinoConfig, mlp_dim: int, x_BLD, norm_name: str, key):
    """norm(x + mlp(x)), with dropout of the change."""
    change_BLD = layers.MLP(c.width, mlp_dim, "relu", kernel_init=xavier, name="mlp")(x_BLD)
    return norm(c, norm_name)(x_BLD + layers.dropout(change_BLD, c.dropout, key))


@pytree_dataclass
class EnhancerInputs:
    """What all layers of the enhancer share."""

    image_position_BPD: jax.Array
    reference_BPT2: jax.Array
    valid_BP: jax.Array
    text_position_BLD: jax.Array
    text_mask_BL: jax.Array
    phrase_BLL: jax.Array
    shapes: Shapes = dataclasses.field(metadata={"static": True})


class Fusion(nn.Module):
    """Image (B, P, D) and text (B, L, D) after attention of each to the other, by one score for each pair.

    The residuals start from the normed inputs, as in the original. Its limits on the scores, which guard 16-bit floats,
    are left out: scores are float32.
    """

    c: GroundingDinoConfig

    @nn.compact
    def __call__(self, image_BPD, text_BLD, valid_BP, text_mask_BL, key):
        c, keys = self.c, layers.split_key(key, 2)
        heads, head = c.num_heads // 2, c.mlp_dim // c.num_heads

        def project(name, x):
            init = layers.normal((2 / (c.width + heads * head)) ** 0.5)
            return layers.Dense(c.width, (heads, head), ("embed", "heads", "head"), kernel_init=init, name=name)(x)

        def add(name, x, change, key):
            change = layers.DenseFromHeads(heads, head, c.width, kernel_init=xavier, name=f"{name}_out")(change)
            scale_init = with_logical_partitioning(nn.initializers.constant(FUSION_SCALE), ("embed",))
            scale = self.param(f"{name}_scale", scale_init, (c.width,)).astype(x.dtype)
            return x + drop_path(scale * change, c.fusion_drop_path, key)

        normed_image_BPD, normed_text_BLD = norm(c, "image_norm")(image_BPD), norm(c, "text_norm")(text_BLD)
        query_BPNH, key_BLNH = project("image_query", normed_image_BPD), project("text_key", normed_text_BLD)
        scaled_BPNH = query_BPNH * head**-0.5
        score_BNPL = jnp.einsum("BPNH,BLNH->BNPL", scaled_BPNH, key_BLNH, preferred_element_type=jnp.float32)
        to_text = jax.nn.softmax(jnp.where(text_mask_BL[:, None, None], score_BNPL, MASK_VALUE), axis=3)
        to_image = jax.nn.softmax(jnp.where(valid_BP[:, None, :, None], score_BNPL, MASK_VALUE), axis=2)
        text_BLNH, image_BPNH = project("text_value", normed_text_BLD), project("image_value", normed_image_BPD)
        image_change_BPNH = jnp.einsum("BNPL,BLNH->BPNH", to_text.astype(text_BLNH.dtype), text_BLNH)
        text_change_BLNH = jnp.einsum("BNPL,BPNH->BLNH", to_image.astype(image_BPNH.dtype), image_BPNH)
        image_BPD = add("image", normed_image_BPD, image_change_BPNH, keys[0])
        return image_BPD, add("text", normed_text_BLD, text_change_BLNH, keys[1])


class TextLayer(nn.Module):
    """Self-attention of the text within its phrases, and a feed-forward layer."""

    c: GroundingDinoConfig

    @nn.compact
    def __call__(self, x_BLD, shared: EnhancerInputs, key):
        c, keys = self.c, layers.split_key(key, 2)
        position_BLD, mask = shared.text_position_BLD, shared.phrase_BLL[:, None]
        change_BLD = attend_with_positions(c, c.num_heads // 2, "attention", x_BLD, position_BLD, mask)
        x_BLD = norm(c, "norm1")(x_BLD + layers.dropout(change_BLD, c.dropout, keys[0]))
        return feed_forward(c, c.mlp_dim // 2, x_BLD, "norm2", keys[1])


class ImageLayer(nn.Module):
    """Deformable self-attention over all levels, and a feed-forward layer."""

    c: GroundingDinoConfig

    @nn.compact
    def __call__(self, x_BPD, shared: EnhancerInputs, key):
        c, keys = self.c, layers.split_key(key, 2)
        attention = DeformableAttention(c.width, c.num_heads, c.num_levels, c.num_points, name="attention")
        change_BPD = attention(
            x_BPD + shared.image_position_BPD, x_BPD, shared.reference_BPT2, shared.shapes, shared.valid_BP
        )
        x_BPD = norm(c, "norm1")(x_BPD + layers.dropout(change_BPD, c.dropout, keys[0]))
        return feed_forward(c, c.mlp_dim, x_BPD, "norm2", keys[1])


class EnhancerLayer(nn.Module):
    """One layer of the feature enhancer: fusion, text layer, image layer."""

    c: GroundingDinoConfig

    @nn.compact
    def __call__(self, states, key, shared: EnhancerInputs):
        c, keys = self.c, layers.split_key(key, 3)
        fusion = Fusion(c, name="fusion")
        image_BPD, text_BLD = fusion(*states, shared.valid_BP, shared.text_mask_BL, keys[0])
        text_BLD = TextLayer(c, name="text")(text_BLD, shared, keys[1])
        states = ImageLayer(c, name="image")(image_BPD, shared, keys[2]), text_BLD
        return tuple(with_logical_constraint(x, "batch", "length", "act_embed") for x in states), None
