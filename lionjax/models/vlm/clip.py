# SPDX-License-Identifier: Apache-2.0
"""CLIP (arXiv 2103.00020) and SigLIP (2303.15343): an image tower and a text tower with embeddings to compare.

The loss compares all images with all texts of the global batch: by a softmax over texts and over images (CLIP), or by
a sigmoid for each pair (SigLIP).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from lionjax.core.errors import check_choices
from lionjax.core.sharding import with_logical_constraint, with_logical_partitioning
from lionjax.core.types import VLM, Array, Batch, Metrics, ModelInfo, Params
from lionjax.core.weight_map import WeightMapping, reshape, with_prefix
from lionjax.models.language import clip_text
from lionjax.models.language.clip_text import CLIP_TEXT_B, CLIP_TEXT_L, SIGLIP_TEXT_B, ClipText, ClipTextConfig
from lionjax.models.vision import vit
from lionjax.models.vision.vit import CLIP_VIT_B32, CLIP_VIT_L, SIGLIP_VIT_B16, ViT, ViTConfig
from lionjax.nn.layers import Dense, dense_weight_map, l2_normalize, norm_weight_map
from lionjax.nn.losses import image_text_contrast, sigmoid_contrast


@dataclasses.dataclass(frozen=True)
class Clip(VLM):
    """Config; the defaults are those of CLIP ViT-B/32. Raises ValueError for an unknown objective or differing widths.

    The texts of a batch are its targets. An image tower with `attention_pool` (SigLIP) has no projection, so its width
    is `embed_dim`. `init_logit_scale`: logarithm of the factor of the cosines at the start. `max_logit_scale`: the
    factor's limit in training (CLIP's paper: 100); None: no limit.
    """

    vision: ViTConfig = CLIP_VIT_B32
    text: ClipTextConfig = CLIP_TEXT_B
    embed_dim: int = 512
    objective: Literal["softmax", "sigmoid"] = "softmax"
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float = -10.0  # of the sigmoid objective
    max_logit_scale: float | None = None
    dtype: str = "float32"  # of the computation

    def __post_init__(self):
        check_choices(self, objective=("softmax", "sigmoid"))
        if self.vision.attention_pool and self.vision.width != self.embed_dim:
            raise ValueError(
                f"embed_dim is {self.embed_dim}, but an image tower with attention_pool has no projection; set it to "
                f"the tower's width {self.vision.width}"
            )

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            vocab_size=self.text.vocab_size,
            end_token=self.text.eos_token_id,
            image_size=self.vision.image_size,
            is_dual_encoder=True,
            generates=False,
        )

    def init(self, key: Array, batch: Batch) -> Params:
        """Random parameters of both towers."""
        return ClipModule(self).init(key, batch)["params"]

    def extract_features(self, params: Params, batch: Batch) -> Array:
        """State (B, D) of the image tower, before its projection."""
        return ClipModule(self).apply({"params": params}, batch, method=ClipModule.encode_image)

    def loss(self, params: Params, batch: Batch, key: Array | None = None) -> tuple[Array, Metrics]:
        """The contrastive loss of the batch's images and texts, and metrics; there is no dropout."""
        return ClipModule(self).apply({"params": params}, batch)

    def embed_images(self, params: Params, image_BHWC: Array) -> Array:
        """Embeddings (B, E) of normalized images, of norm 1, in float32."""
        return ClipModule(self).apply({"params": params}, image_BHWC, method=ClipModule.embed_images)

    def embed_texts(self, params: Params, ids_BL: Array) -> Array:
        """Embeddings (B, E) of texts, of norm 1, in float32; see `ClipTextConfig` for the ids."""
        return ClipModule(self).apply({"params": params}, ids_BL, method=ClipModule.embed_texts)

    def image_projections(self, params: Params, image_BHWC: Array) -> Array:
        """As `embed_images`, not divided by their norms: what is added and subtracted in ZeroCap's arithmetic."""
        return ClipModule(self).apply({"params": params}, image_BHWC, method=ClipModule.image_projections)

    def embed_packed_texts(self, params: Params, ids_BL: Array, position_BL: Array, mask_BLL: Array) -> Array:
        """Embeddings (B, L, E) of the texts that end at each token, of rows packed as `mask_BLL` says.

        It is True where a token attends to another. Raises UserError for a text tower that is not causal.
        """
        if not self.reads_packed_texts:
            raise self._lacks("causal text tower, which packed texts need")
        packed = position_BL, mask_BLL[:, None]
        return ClipModule(self).apply({"params": params}, ids_BL, packed, method=ClipModule.embed_packed_texts)

    @property
    def reads_packed_texts(self) -> bool:
        """Whether the state of a text depends on no later token."""
        return self.text.causal and self.text.pooling != "last"

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of Hugging Face's CLIPModel, or SiglipModel for an image tower with `attention_pool`."""
        return siglip_weight_map(self) if self.vision.attention_pool else hf_weight_map(self)


CLIP_B32 = Clip()
CLIP_L14 = Clip(dataclasses.replace(CLIP_VIT_L, image_size=224), CLIP_TEXT_L, 768)
SIGLIP_B16 = Clip(SIGLIP_VIT_B16, SIGLIP_TEXT_B, 768, "sigmoid", init_logit_scale=math.log(10))


class ClipModule(nn.Module):
    """(loss, metrics) of a batch."""

    c: Clip

    def setup(self):
        c = self.c
        self.vision, self.text = ViT(c.vision), ClipText(c.text)
        has_pool = c.vision.attention_pool
        if not has_pool:
            self.image_projection = Dense(c.vision.width, c.embed_dim, ("embed", None), use_bias=False)
        self.text_projection = Dense(c.text.width, c.embed_dim, ("embed", None), use_bias=has_pool)
        self.logit_scale = self._scalar("logit_scale", c.init_logit_scale)
        if c.objective == "sigmoid":
            self.logit_bias = self._scalar("logit_bias", c.init_logit_bias)

    def _scalar(self, name: str, value: float):
        return self.param(name, with_logical_partitioning(nn.initializers.constant(value), ()), ())

    def encode_image(self, batch: Batch):
        """State (B, D) of the image tower; `batch.features` if present."""
        if batch.features is not None:
            return batch.features.astype(self.c.dtype)
        return self.vision(batch.image_BHWC.astype(self.c.dtype))[2]

    def project_image(self, state_BD):
        """Embeddings (B, E) of norm 1 of the image tower's states."""
        return l2_normalize(state_BD if self.c.vision.attention_pool else self.image_projection(state_BD))

    def image_projections(self, image_BHWC):
        state_BD = self.vision(image_BHWC.astype(self.c.dtype))[2]
        return (state_BD if self.c.vision.attention_pool else self.image_projection(state_BD)).astype(jnp.float32)

    def embed_images(self, image_BHWC):
        return self.project_image(self.vision(image_BHWC.astype(self.c.dtype))[2])

    def embed_texts(self, ids_BL):
        return l2_normalize(self.text_projection(self.text(ids_BL, self.c.dtype)[1]))

    def embed_packed_texts(self, ids_BL, packed):
        return l2_normalize(self.text_projection(self.text(ids_BL, self.c.dtype, packed)[0]))

    def similarity(self, image_BE, text_BE):
        """Logits (B, B) of images (rows) and texts (columns): their cosines scaled, with SigLIP's bias."""
        limit = self.c.max_logit_scale
        scale = self.logit_scale if limit is None else jnp.minimum(self.logit_scale, math.log(limit))
        # Rows stay on the devices of their images: of both embeddings, and in the gradients, only the texts move.
        cosine_BB = jnp.einsum("BE,CE->BC", image_BE, text_BE, precision="highest")
        cosine_BB = with_logical_constraint(cosine_BB, "batch", None)
        logits_BB = cosine_BB * jnp.exp(scale.astype(jnp.float32))
        return logits_BB + self.logit_bias.astype(jnp.float32) if self.c.objective == "sigmoid" else logits_BB

    def __call__(self, batch: Batch):
        image_BE = self.project_image(self.encode_image(batch))
        logits_BB = self.similarity(image_BE, self.embed_texts(batch_texts(self.c.text, batch)))
        if self.c.objective == "sigmoid":
            loss = sigmoid_contrast(logits_BB)
        else:
            loss = image_text_contrast(logits_BB, logits_BB.T)
        own_B = jnp.arange(len(logits_BB))
        return loss, {
            "weight": jnp.asarray(len(logits_BB), jnp.float32),
            "image_to_text_accuracy": (logits_BB.argmax(axis=1) == own_B).mean(),
            "text_to_image_accuracy": (logits_BB.argmax(axis=0) == own_B).mean(),
        }


def batch_texts(c: ClipTextConfig, batch: Batch):
    """Ids (B, L) of a batch's targets as the text tower reads them; a text that was cut ends in the end token too.

    Raises ValueError where they are longer than `max_positions`.
    """
    mask_BM = batch.target_mask_BM.astype(bool)
    ids_BL = jnp.where(mask_BM, batch.target_BM, c.pad_token_id)
    ids_BL = ids_BL.at[:, -1].set(jnp.where(mask_BM[:, -1], c.eos_token_id, ids_BL[:, -1]))
    padding = ((0, 0), (int(c.bos_token_id is not None), 0))
    ids_BL = jnp.pad(ids_BL, padding, constant_values=c.bos_token_id or 0)
    if c.pooling == "last" and ids_BL.shape[1] < c.max_positions:
        padding = ((0, 0), (0, c.max_positions - ids_BL.shape[1]))
        ids_BL = jnp.pad(ids_BL, padding, constant_values=c.pad_token_id)
    return ids_BL


def hf_weight_map(c: Clip) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's CLIPModel; an image tower of another kind than CLIP's has those of EVA."""
    vision = vit.tower_weight_map(c.vision, vit.clip_weight_map)
    if not c.vision.pre_layernorm and c.vision.post_layernorm:
        vision = (*vision, *norm_weight_map("post_layernorm", "norm_after"))
    bias = (WeightMapping("logit_bias", "logit_bias"),) if c.objective == "sigmoid" else ()
    return (
        *with_prefix("vision_model.", "vision/", vision),
        *with_prefix("text_model.", "text/", clip_text.weight_map(c.text)),
        *dense_weight_map("visual_projection", "image_projection", bias=False),
        *dense_weight_map("text_projection", "text_projection", bias=False),
        WeightMapping("logit_scale", "logit_scale"),
        *bias,
    )


def siglip_weight_map(c: Clip) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's SiglipModel."""
    return (
        *with_prefix("vision_model.", "vision/", vit.siglip_weight_map(c.vision)),
        *with_prefix("text_model.", "text/", clip_text.weight_map(c.text)),
        *dense_weight_map("text_model.head", "text_projection"),
        *(WeightMapping(name, name, reshape((1,), ())) for name in ("logit_scale", "logit_bias")),
    )


def openai_weight_map(c: Clip) -> tuple[WeightMapping, ...]:
    """Names of OpenAI's state dicts, such as ViT-B-32.pt."""
    return (
        *with_prefix("visual.", "vision/", vit.openai_clip_weight_map(c.vision)),
        *with_prefix("", "text/", clip_text.openai_weight_map(c.text)),
        WeightMapping("visual.proj", "image_projection/kernel"),
        WeightMapping("text_projection", "text_projection/kernel"),
        WeightMapping("logit_scale", "logit_scale"),
    )
