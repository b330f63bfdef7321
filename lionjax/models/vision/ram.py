# SPDX-License-Identifier: Apache-2.0
"""RAM (Recognize Anything, arXiv 2306.03514): Swin sees a picture, each tag of a long list asks whether it is there.

A tag is known by CLIP's embedding of its name. Two layers, in which tags look at the picture and never at each other,
turn it into a probability.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.sharding import constrain, sharded
from lionjax.core.weight_map import Row, under
from lionjax.models.vision import swin
from lionjax.models.vision.swin import SWIN_L_384, Swin, SwinConfig
from lionjax.nn import attention as attentions
from lionjax.nn.attention import Attention
from lionjax.nn.layers import MLP, Dense, LayerNorm, dense_rows, dropout, norm_rows, normal, split_key


@dataclasses.dataclass(frozen=True)
class RamConfig:
    """Sizes; those of ram_swin_large_14m.pth by default."""

    swin: SwinConfig = SWIN_L_384
    tags: int = 4585
    label_width: int = 512  # of CLIP's embedding of a tag's name
    image_width: int = 512  # of a place of the picture, as tags see it
    width: int = 768
    heads: int = 4
    hidden: int = 3072
    layers: int = 2
    eps: float = 1e-12
    dropout: float = 0.1


RAM_SWIN_L = RamConfig()


class Query(nn.Module):
    """norm(x + attention(x to the picture)), then norm(x + mlp x)."""

    c: RamConfig

    @nn.compact
    def __call__(self, x_BVD, key, image_BPC):
        c, keys = self.c, split_key(key, 3)
        look = Attention(c.width, c.heads, c.width // c.heads, c.image_width, rate=c.dropout, name="attention")
        change_BVD = dropout(look(x_BVD, image_BPC, key=keys[0]), c.dropout, keys[1])
        x_BVD = LayerNorm(c.width, c.eps, name="norm1")(x_BVD + change_BVD)
        change_BVD = dropout(MLP(c.width, c.hidden, name="mlp")(x_BVD), c.dropout, keys[2])
        x_BVD = LayerNorm(c.width, c.eps, name="norm2")(x_BVD + change_BVD)
        return constrain(x_BVD, "batch", "length", "act_embed"), None


class Ram(nn.Module):
    """(B, H, W, 3) -> a logit for each tag (B, V)."""

    c: RamConfig

    def setup(self):
        c = self.c
        self.swin = Swin(c.swin)
        self.image = Dense(c.swin.widths[-1], c.image_width, ("embed", None))
        init = sharded(normal(0.02), ("vocab", "embed"))
        self.labels = self.param("labels", init, (c.tags, c.label_width))
        self.words = Dense(c.label_width, c.width, ("embed", None))
        scan = nn.scan(
            Query,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.queries = scan(c)
        self.out = Dense(c.width, 1, ("embed", None))

    def see(self, image_BHWC, key=None):
        """The picture as Swin sees it: its mean, then its places (B, 1 + P, D)."""
        last_BPD, _ = self.swin(image_BHWC, key)
        return jnp.concatenate([last_BPD.mean(1, keepdims=True), last_BPD], axis=1)

    def ask(self, image_BPC, key=None):
        """The states of all tags (B, V, D) before a picture in `image_width`."""
        c, dtype = self.c, image_BPC.dtype
        label_VD = jax.nn.relu(self.words(self.labels.astype(dtype)))
        x_BVD = jnp.broadcast_to(label_VD, (len(image_BPC), *label_VD.shape))
        keys = None if key is None else jax.random.split(key, c.layers)
        return self.queries(x_BVD, keys, image_BPC)[0]

    def __call__(self, image_BHWC, key=None):
        keys = split_key(key, 2)
        image_BPC = self.image(self.see(image_BHWC, keys[0]))
        return self.out(self.ask(image_BPC, keys[1]))[..., 0]


def torch_rows(c: RamConfig) -> tuple[Row, ...]:
    """Names of ram_swin_large_14m.pth, of the parts that tag."""
    letters = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
    looking = attentions.torch_rows(letters, c.heads, c.width // c.heads, "qkvo")
    layer = (
        *under("crossattention.", "attention/", looking),
        *norm_rows("crossattention.output.LayerNorm", "norm1"),
        *dense_rows("intermediate.dense", "mlp/up"),
        *dense_rows("output.dense", "mlp/down"),
        *norm_rows("output.LayerNorm", "norm2"),
    )
    return (
        *under("visual_encoder.", "swin/", swin.torch_rows(c.swin)),
        *dense_rows("image_proj", "image"),
        Row("label_embed", "labels"),
        *dense_rows("wordvec_proj", "words"),
        *under("tagging_head.encoder.layer.{i}.", "queries/", layer),
        *dense_rows("fc", "out"),
    )
