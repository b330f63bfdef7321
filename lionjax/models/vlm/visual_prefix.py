# SPDX-License-Identifier: Apache-2.0
"""Picture words before text words: LLaVA, BLIP-2, InstructBLIP, MiniGPT-4, mPLUG-Owl, Shikra, Kosmos-2 and Frozen.

They are settings of one model. A tower sees the picture, a bridge turns what it saw into words of the language model's
width (each patch a word, or a few learned queries, which may read the instruction), and a language model reads on from
there. Which tower, bridge and language model is all that the systems differ in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.sharding import sharded
from lionjax.core.types import VLM, Batch, Cache, Metrics, ModelInfo, Params
from lionjax.core.weight_map import Row
from lionjax.models.connectors import perceiver as latents
from lionjax.models.connectors.perceiver import AbstractorConfig, ProjectionConfig
from lionjax.models.connectors.qformer import QFormer, QFormerConfig
from lionjax.models.language import decoder
from lionjax.models.language.backend import is_encoder_decoder, language_model
from lionjax.models.language.decoder import VICUNA_7B, VICUNA_13B, DecoderConfig
from lionjax.models.language.t5 import FLAN_T5_XL, T5Config
from lionjax.models.vision.vit import CLIP_VIT_L, EVA_VIT_G, ViT, ViTConfig
from lionjax.models.vlm import visual_prefix_weights
from lionjax.nn import losses
from lionjax.nn.layers import MLP, Dense, LayerNorm, normal, split_key

NAMES = ("hugging_face", "original")
VICUNA_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {image} {question} ASSISTANT:"
)
VICUNA_TURN = "USER: {question} ASSISTANT:"


@dataclasses.dataclass(frozen=True)
class Prefix(VLM):
    """A system by its parts' sizes; the defaults are those of LLaVA-1.5 7B as Hugging Face holds it.

    `feature_layer` counts the tower's hidden states as transformers does: -1 is the last block's output, before any
    norm. `class_token`: whether its word is kept. `vision_eps`: of a norm behind the tower; None: there is none.
    `pool`: squares of so many patches a side become one, their mean, which no original does.
    `qformer` and `latents` None: each patch becomes a word. `projector_depth`: linears into the language model, with a
    GELU between. `unit`: what the tower saw is made of length 1. `words`: so many are made of the mean of all patches
    (Frozen). `closing`: a learned word stands behind each picture's (mPLUG-Owl).
    `image_token` stands in a prompt where a picture's words come; a prompt without it has its pictures in front of it,
    or none at all where `in_front` is false. A row may have several pictures, (B, K, H, W, C). `names`: which code's
    names the weights have in torch.
    """

    vision: ViTConfig = CLIP_VIT_L
    language: DecoderConfig | T5Config = dataclasses.replace(VICUNA_7B, vocab=32064)
    qformer: QFormerConfig | None = None
    feature_layer: int = -2
    class_token: bool = False
    vision_eps: float | None = None
    projector_depth: int = 2
    image_token: int | None = 32000
    in_front: bool = True
    names: str = "hugging_face"
    dtype: str = "float32"  # of the computation
    latents: AbstractorConfig | ProjectionConfig | None = None
    unit: bool = False
    words: int = 0
    closing: bool = False
    pool: int = 1

    def __post_init__(self):
        for field, values in {"names": NAMES, "projector_depth": (0, 1, 2)}.items():
            if getattr(self, field) not in values:
                text = ", ".join(map(str, values))
                raise ValueError(f"{field} is {getattr(self, field)!r}; it can be one of {text}")
        if self.qformer is not None and self.latents is not None:
            raise ValueError("qformer and latents are both given; a picture has one bridge")
        if not -self.vision.depth <= self.feature_layer <= -1:
            raise ValueError(
                f"feature_layer is {self.feature_layer}; a tower of {self.vision.depth} blocks has -1 to "
                f"-{self.vision.depth}"
            )
        if self.pool < 1 or self.class_token * (self.pool > 1) or self.side % self.pool:
            raise ValueError(
                f"pool is {self.pool}; it divides the {self.side} patches a side, and the class token is none of them"
            )
        if self.image_token is None and not self.in_front:
            raise ValueError("image_token is None, so the picture can only stand in front")
        named = ((False, 2), (True, 1)) if self.latents is None else ((False, 0),)
        named = named if self.pool == 1 else ()
        if self.names == "hugging_face" and (self.qformer is not None, self.projector_depth) not in named:
            raise ValueError(
                "Hugging Face has no name for this projector (two linears behind patches, one behind a Q-Former, none "
                "behind Kosmos-2's), nor for pooled patches; set names to 'original'"
            )

    @property
    def side(self) -> int:
        """Patches that the tower has a side."""
        return self.vision.image // self.vision.patch

    @property
    def encodes(self) -> bool:
        """Whether the language model is an encoder-decoder."""
        return is_encoder_decoder(self.language)

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            vocab_size=self.language.vocab,
            embedding_rows=self.language.rows,
            end_token=self.language.end_token,
            is_encoder_decoder=self.encodes,
            splices_images=True,
            image_token=self.image_token,
            image_size=self.vision.image,
            reads_question=self.qformer is not None and self.qformer.text,
            default_processor=self._default_processor(),
        )

    def _default_processor(self) -> dict:
        """Vicuna's template around LLaVA's questions; a bare question for BLIP-2 and its kin."""
        if self.qformer is not None:
            return {"tags": False}
        return {
            "tags": False,
            "template": VICUNA_TEMPLATE,
            "next_turn": VICUNA_TURN,
            "prompt_length": 512,
            "padded": self.projector_depth == 2,  # since LLaVA-1.5
            "padding": "mean",
        }

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of every part."""
        return PrefixModule(self).init(key, batch, None)["params"]

    def _apply(self, params: Params, method: Callable, *args):
        return PrefixModule(self).apply({"params": params}, *args, method=method)

    def extract_features(self, params: Params, batch: Batch):
        """The frozen tower's patches (B, P, D), or (B, K, P, D) where rows have several images."""
        return self._apply(params, PrefixModule.encode_image, batch)

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """Mean cross entropy of the answer's tokens."""
        logits_BMV = self.logits(params, batch, key)
        return losses.token_cross_entropy(logits_BMV, batch.target_BM, batch.loss_mask_BM)

    def logits(self, params: Params, batch: Batch, key=None):
        """(B, M, V) in float32, row m predicting target m."""
        return self._apply(params, PrefixModule.__call__, batch, key)

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[jax.Array, Cache]:
        """Read image and prompt."""
        return self._apply(params, PrefixModule.prefill, batch, cache_length)

    def extend(self, params: Params, token_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read one more token per row."""
        return self._apply(params, PrefixModule.extend, token_B, cache)

    def torch_rows(self) -> tuple[Row, ...]:
        """Names of Hugging Face's class, or of the code that the weights were first published with."""
        if self.names == "hugging_face":
            return visual_prefix_weights.hugging_face_rows(self)
        return visual_prefix_weights.original_rows(self)


LLAVA_15_7B = Prefix()
LLAVA_15_13B = Prefix(language=dataclasses.replace(VICUNA_13B, vocab=32064))
LLAVA_7B = Prefix(  # the first one: half the pixels, one linear, and a picture of no token of its own
    vision=dataclasses.replace(CLIP_VIT_L, image=224),
    language=VICUNA_7B,
    projector_depth=1,
    image_token=-200,
    names="original",
)
BLIP2_OPT_2_7B = Prefix(
    vision=EVA_VIT_G,
    language=dataclasses.replace(decoder.OPT_2_7B, vocab=50304, end_token=50118),
    qformer=QFormerConfig(text=False),
    feature_layer=-1,
    class_token=True,
    vision_eps=1e-6,
    projector_depth=1,
    image_token=50265,
)
BLIP2_FLAN_T5_XL = dataclasses.replace(
    BLIP2_OPT_2_7B, language=dataclasses.replace(FLAN_T5_XL, activation="gelu"), image_token=32100
)
INSTRUCTBLIP_FLAN_T5_XL = dataclasses.replace(BLIP2_FLAN_T5_XL, qformer=QFormerConfig())
INSTRUCTBLIP_VICUNA_7B = dataclasses.replace(
    INSTRUCTBLIP_FLAN_T5_XL,
    language=dataclasses.replace(VICUNA_7B, vocab=32001, pad_token=32000, start_token=2, vocab_multiple=128),
    image_token=None,
)
# Only its projector is ever trained.
MINIGPT4_7B = dataclasses.replace(
    BLIP2_OPT_2_7B, language=VICUNA_7B, vision_eps=1e-5, image_token=VICUNA_7B.vocab, names="original"
)
# Boxes are digits of its answers; three tokens stand around and for the picture.
SHIKRA_7B = dataclasses.replace(LLAVA_7B, language=dataclasses.replace(VICUNA_7B, vocab=32003), image_token=32000)


MPLUG_OWL_7B = Prefix(
    vision=dataclasses.replace(CLIP_VIT_L, image=224, eps=1e-6, norm_after=False),
    language=dataclasses.replace(VICUNA_7B, eps=1e-6),
    latents=AbstractorConfig(),
    feature_layer=-1,
    class_token=True,
    vision_eps=1e-6,
    projector_depth=1,
    closing=True,
    image_token=-1,
    names="original",
)
KOSMOS2 = Prefix(
    vision=dataclasses.replace(CLIP_VIT_L, image=224, norm_after=False),
    language=decoder.KOSMOS2_TEXT,
    latents=ProjectionConfig(),
    feature_layer=-1,
    class_token=True,
    vision_eps=1e-5,
    projector_depth=0,
    unit=True,
    image_token=-1,
)


class PrefixModule(nn.Module):
    c: Prefix

    def setup(self):
        c, width = self.c, self.c.language.width
        self.vision = ViT(c.vision, (c.vision.depth + c.feature_layer,))
        seen = c.vision.width
        if c.vision_eps is not None:
            self.vision_norm = LayerNorm(seen, c.vision_eps)
        if c.qformer is not None:
            self.qformer = QFormer(c.qformer)
            seen = c.qformer.width
        if c.latents is not None:
            self.latents = latents.of_config(c.latents)
            seen = c.latents.width
        if c.projector_depth == 1:
            self.projector = Dense(seen, width * max(1, c.words), ("embed", None))
        elif c.projector_depth == 2:
            self.projector = MLP(seen, width, "gelu", features=width)
        if c.closing:
            self.last_word = self.param("last_word", sharded(normal(0.02), ("embed",)), (width,))
        self.language = language_model(c.language)

    def encode_image(self, batch: Batch):
        """What the tower makes of the pictures: (B, P, D), or (B, K, P, D) where rows have several."""
        c, image = self.c, batch.image_BHWC
        if batch.features is not None:
            return batch.features.astype(c.dtype)
        _, seen_TBPD, _ = self.vision(image.reshape(-1, *image.shape[-3:]).astype(c.dtype))
        seen_BPD = seen_TBPD[0] if c.class_token else seen_TBPD[0, :, 1:]
        if c.pool > 1:
            grid = seen_BPD.reshape(len(seen_BPD), c.side // c.pool, c.pool, -1, c.pool, seen_BPD.shape[-1])
            seen_BPD = grid.mean(axis=(2, 4)).reshape(len(seen_BPD), -1, seen_BPD.shape[-1])
        return seen_BPD.reshape(*image.shape[:-3], *seen_BPD.shape[1:])

    def embed_image(self, batch: Batch, key):
        """Image tokens (B, K, P, D) of the language model's width."""
        c, seen = self.c, self.encode_image(batch)
        rows, many = seen.shape[0], seen.shape[1] if seen.ndim == 4 else 1
        x_BPD = seen.reshape(-1, *seen.shape[-2:])
        if c.vision_eps is not None:
            x_BPD = self.vision_norm(x_BPD)
        if c.qformer is not None:
            asked = (batch.question_BL, batch.question_mask_BL) if c.qformer.text else (None, None)
            asked = (x if x is None or many == 1 else jnp.repeat(x, many, axis=0) for x in asked)
            x_BPD = self.qformer(x_BPD, *asked, key)[:, : c.qformer.queries]
        if c.unit:
            length_BP1 = jnp.linalg.norm(x_BPD.astype(jnp.float32), axis=-1, keepdims=True)
            x_BPD = x_BPD / jnp.maximum(length_BP1, 1e-12).astype(x_BPD.dtype)
        if c.latents is not None:
            x_BPD = self.latents(x_BPD, key)
        if c.words:
            x_BPD = x_BPD.mean(axis=1, keepdims=True)
        if c.projector_depth:
            x_BPD = self.projector(x_BPD)
        x_BPD = x_BPD.reshape(rows, many, -1, c.language.width)
        if c.closing:
            end = jnp.broadcast_to(self.last_word.astype(x_BPD.dtype), (rows, many, 1, c.language.width))
            x_BPD = jnp.concatenate([x_BPD, end], axis=2)
        return x_BPD

    def embed_inputs(self, batch: Batch, key):
        """Image and text embeddings in the prompt's order (B, L', D), and which of them are real (B, L')."""
        c, ids_BL, mask_BL = self.c, batch.prompt_BL, batch.prompt_mask_BL.astype(bool)
        picture_BKPD = self.embed_image(batch, key)
        here_BL = mask_BL & (False if c.image_token is None else ids_BL == c.image_token)
        # The token need not be a word of the table.
        text_BLD = self.language.embed(jnp.where(here_BL, 0, ids_BL), picture_BKPD.dtype)
        if c.image_token is not None:
            return splice(text_BLD, mask_BL, here_BL, picture_BKPD, c.in_front)
        picture_BPD = picture_BKPD.reshape(len(ids_BL), -1, text_BLD.shape[-1])
        x_BLD = jnp.concatenate([picture_BPD, text_BLD], axis=1)
        seen_BP = jnp.ones(picture_BPD.shape[:2], bool)
        return x_BLD, jnp.concatenate([seen_BP, mask_BL], axis=1)

    def __call__(self, batch: Batch, key):
        """Logits (B, M, V) in float32, row m predicting target m."""
        keys = split_key(key, 3)
        x_BLD, mask_BL = self.embed_inputs(batch, keys[0])
        target_BMD = self.language.embed(batch.target_BM, x_BLD.dtype)
        before_BMD, _ = self.language.forward(x_BLD, mask_BL, target_BMD, batch.target_mask_BM, batch.task_B, keys[1:])
        return self.language.logits(before_BMD)

    def prefill(self, batch: Batch, cache_length: int):
        x_BLD, mask_BL = self.embed_inputs(batch, None)
        state_BD, cache = self.language.prefill(x_BLD, mask_BL, cache_length, batch.task_B)
        return self.language.logits(state_BD), cache

    def extend(self, token_B, cache: Cache):
        state_BD, cache = self.language.extend(self.language.embed_next(token_B, cache), cache)
        return self.language.logits(state_BD), cache


def splice(text_BLD, mask_BL, here_BL, picture_BKPD, in_front: bool):
    """Each row's k-th picture where its k-th marked token stands: (B, L + K P, D) and what is real, padding behind.

    A row without a marked token has its pictures before all else where `in_front` says so, else nowhere. A mark that
    no picture is left for disappears.
    """
    rows, pictures, patches, width = picture_BKPD.shape
    before_B1 = ~here_BL.any(axis=1, keepdims=True) & in_front
    here_BL = jnp.concatenate([before_B1, here_BL], axis=1)
    real_BL = jnp.concatenate([before_B1, mask_BL], axis=1)
    text_BLD = jnp.pad(text_BLD, ((0, 0), (1, 0), (0, 0)))
    which_BL = jnp.cumsum(here_BL, axis=1) - 1
    shown_BL = jnp.where(here_BL, patches * (which_BL < pictures), 1)
    shown_BL = shown_BL.at[:, 0].set(pictures * patches) * real_BL  # words that each token becomes
    end_BL = jnp.cumsum(shown_BL, axis=1)
    place_S = jnp.arange(mask_BL.shape[1] + pictures * patches)
    token_BS = jax.vmap(lambda end_L: jnp.searchsorted(end_L, place_S, side="right"))(end_BL)
    token_BS = jnp.minimum(token_BS, end_BL.shape[1] - 1)

    def of_token(x_BL):
        return jnp.take_along_axis(x_BL, token_BS, axis=1)

    patch_BS = of_token(which_BL) * patches + place_S - of_token(end_BL - shown_BL)
    patch_BS = jnp.clip(patch_BS, 0, pictures * patches - 1)
    picture_BPD = picture_BKPD.reshape(rows, -1, width)
    x_BSD = jnp.where(
        of_token(here_BL)[..., None],
        jnp.take_along_axis(picture_BPD, patch_BS[..., None], axis=1),
        jnp.take_along_axis(text_BLD, token_BS[..., None], axis=1),
    )
    return x_BSD, place_S < end_BL[:, -1:]
