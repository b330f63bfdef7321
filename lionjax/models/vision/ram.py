# SPDX-License-Identifier: Apache-2.0
"""RAM (Recognize Anything, arXiv 2306.03514): image tagging with a Swin encoder and one query for each tag.

The query of a tag is CLIP's embedding of its name. Two layers of cross-attention to the image, without attention among
tags, give its logit.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_constraint, with_logical_partitioning
from lionjax.core.weight_map import WeightMapping, with_prefix
from lionjax.models.vision import swin
from lionjax.models.vision.swin import SWIN_L_384, Swin, SwinConfig
from lionjax.nn import attention as attentions
from lionjax.nn import layers
from lionjax.nn.attention import Attention


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class RamConfig:
    """Config; the defaults are those of ram_swin_large_14m.pth."""

    swin: SwinConfig = SWIN_L_384
    num_tags: int = 4585
    label_embed_dim: int = 512  # of CLIP's embedding of a tag's name
    encoder_width: int = 512  # of the projected image features that tags attend to
    width: int = 768
    num_heads: int = 4
    mlp_dim: int = 3072
    depth: int = 2
    norm_eps: float = 1e-12
    dropout: float = 0.1


RAM_SWIN_L = RamConfig()


class TaggingLayer(nn.Module):
    """norm(x + cross-attention(x, image)), then norm(x + mlp(x))."""

    c: RamConfig

    @nn.compact
    def __call__(self, x_BVD, key, image_BPC):
        c, keys = self.c, layers.split_key(key, 3)
        attention = Attention(
            c.width, c.num_heads, c.width // c.num_heads, c.encoder_width, dropout_rate=c.dropout, name="attention"
        )
        change_BVD = layers.dropout(attention(x_BVD, image_BPC, key=keys[0]), c.dropout, keys[1])
        x_BVD = layers.LayerNorm(c.width, c.norm_eps, name="norm1")(x_BVD + change_BVD)
        change_BVD = layers.dropout(layers.MLP(c.width, c.mlp_dim, name="mlp")(x_BVD), c.dropout, keys[2])
        x_BVD = layers.LayerNorm(c.width, c.norm_eps, name="norm2")(x_BVD + change_BVD)
        return with_logical_constraint(x_BVD, "batch", "length", "act_embed"), None


class Ram(nn.Module):
    """Logits (B, V) of all tags for images (B, H, W, 3)."""

    c: RamConfig

    def setup(self):
        c = self.c
        self.swin = Swin(c.swin)
        self.image = layers.Dense(c.swin.widths[-1], c.encoder_width, ("embed", None))
        init = with_logical_partitioning(layers.normal(0.02), ("vocab", "embed"))
        self.labels = self.param("labels", init, (c.num_tags, c.label_embed_dim))
        self.words = layers.Dense(c.label_embed_dim, c.width, ("embed", None))
        scan = layers.scan_blocks(TaggingLayer, c.depth, 1)
        self.queries = scan(c)
        self.out = layers.Dense(c.width, 1, ("embed", None))

    def encode_image(self, image_BHWC, key=None):
        """Swin's features (B, 1 + P, D): their mean, then all positions."""
        last_BPD, _ = self.swin(image_BHWC, key)
        return jnp.concatenate([last_BPD.mean(1, keepdims=True), last_BPD], axis=1)

    def decode_tags(self, image_BPC, key=None):
        """States (B, V, D) of all tags, from image features (B, P, C) of width `encoder_width`."""
        c, dtype = self.c, image_BPC.dtype
        label_VD = jax.nn.relu(self.words(self.labels.astype(dtype)))
        x_BVD = jnp.broadcast_to(label_VD, (len(image_BPC), *label_VD.shape))
        keys = None if key is None else jax.random.split(key, c.depth)
        return self.queries(x_BVD, keys, image_BPC)[0]

    def __call__(self, image_BHWC, key=None):
        keys = layers.split_key(key, 2)
        image_BPC = self.image(self.encode_image(image_BHWC, keys[0]))
        return self.out(self.decode_tags(image_BPC, keys[1]))[..., 0]


def weight_map(c: RamConfig) -> tuple[WeightMapping, ...]:
    """Names of ram_swin_large_14m.pth, for the modules used in tagging."""
    letters = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
    attention = attentions.weight_map(letters, c.num_heads, c.width // c.num_heads, "qkvo")
    layer = (
        *with_prefix("crossattention.", "attention/", attention),
        *layers.norm_weight_map("crossattention.output.LayerNorm", "norm1"),
        *layers.dense_weight_map("intermediate.dense", "mlp/up"),
        *layers.dense_weight_map("output.dense", "mlp/down"),
        *layers.norm_weight_map("output.LayerNorm", "norm2"),
    )
    return (
        *with_prefix("visual_encoder.", "swin/", swin.original_weight_map(c.swin)),
        *layers.dense_weight_map("image_proj", "image"),
        WeightMapping("label_embed", "labels"),
        *layers.dense_weight_map("wordvec_proj", "words"),
        *with_prefix("tagging_head.encoder.layer.{i}.", "queries/", layer),
        *layers.dense_weight_map("fc", "out"),
    )
