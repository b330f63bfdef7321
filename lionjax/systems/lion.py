# SPDX-License-Identifier: Apache-2.0
"""LION (CVPR 2024, arXiv 2311.11860): two visual streams, tags as soft prompts, routed adapters.

The picture goes through the frozen ViT once. Its last layer goes to the Q-Former together with the bare question; its
tapped layers go to the vision aggregator; both become words of the language model's width. In the prompt, one token
gives way to a learned hint of how far to trust the tags that follow it. T5 reads the picture words and the prompt, its
adapters mixed by the task of each row.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax import losses
from lionjax.bridges import qformer
from lionjax.bridges.qformer import Aggregator, AggregatorConfig, QFormer, QFormerConfig
from lionjax.interfaces import Batch, Cache, Metrics, Params
from lionjax.language import t5
from lionjax.language.t5 import T5, T5Config
from lionjax.layers import MLP, Dense, LayerNorm, dense_rows, norm_rows, normal, split_key
from lionjax.sharding import sharded
from lionjax.vision import vit
from lionjax.vision.vit import ViT, ViTConfig
from lionjax.weight_rows import Row, under

VISUAL_INPUTS = ("ALL", "QFORMER", "AGGREGATOR")
PROJECTION_EPS = 1e-5  # torch's default, unlike the ViT's 1e-6


@dataclasses.dataclass(frozen=True)
class Lion:
    """A LION by its parts' sizes. `visual_input`: the streams that run; stage 1 QFORMER, 2 AGGREGATOR, then ALL."""

    vision: ViTConfig
    qformer: QFormerConfig
    aggregator: AggregatorConfig
    language: T5Config
    soft_prompt_token: int | None = 32099  # <extra_id_0>; None: no hint, tags are not used
    visual_input: str = "ALL"
    dtype: str = "float32"  # of the computation

    def __post_init__(self):
        if self.visual_input not in VISUAL_INPUTS:
            raise ValueError(
                f"visual_input is {self.visual_input!r}; it can be one of {', '.join(VISUAL_INPUTS)}"
            )

    @property
    def taps(self) -> tuple[int, ...]:
        """ViT layers whose output is used: the aggregator's contexts, then its query."""
        return (*self.aggregator.context_layers, self.aggregator.query_layer)

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of every part that `visual_input` uses."""
        return LionModule(self).init(key, batch, None)["params"]

    def _apply(self, params: Params, method: str, *args):
        return LionModule(self).apply({"params": params}, *args, method=method)

    def features(self, params: Params, batch: Batch):
        """What the frozen ViT makes of the pictures, (B, T, 1 + P, D): may be kept and put into `Batch.features`."""
        return self._apply(params, "see", batch)

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """Mean cross entropy of the answer's tokens."""
        logits_BMV = self.logits(params, batch, key)
        return losses.token_cross_entropy(logits_BMV, batch.target_BM, batch.loss_mask_BM)

    def logits(self, params: Params, batch: Batch, key=None):
        """(B, M, V) in float32, row m predicting target m."""
        return self._apply(params, "__call__", batch, key)

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[jax.Array, Cache]:
        """Encode picture and prompt, read the start token."""
        return self._apply(params, "begin", batch, cache_length)

    def extend(self, params: Params, token_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read one more token per row."""
        return self._apply(params, "extend", token_B, cache)

    def torch_rows(self) -> tuple[Row, ...]:
        """Names of the LION release; the ViT and T5 rows are those of eva_vit_g.pth and Hugging Face's T5."""
        return torch_rows(self)


class LionModule(nn.Module):
    c: Lion

    def setup(self):
        c = self.c
        width = c.language.width
        self.vision = ViT(c.vision, c.taps)
        if c.visual_input != "AGGREGATOR":
            self.qformer_norm = LayerNorm(c.vision.width, PROJECTION_EPS)
            self.qformer = QFormer(c.qformer)
            self.qformer_projector = Dense(c.qformer.width, width, ("embed", None))
        if c.visual_input != "QFORMER":
            self.aggregator = Aggregator(c.aggregator)
            self.aggregator_norm = LayerNorm(c.vision.width, PROJECTION_EPS)
            self.aggregator_projector = MLP(c.vision.width, c.aggregator.projector, features=width)
        if c.soft_prompt_token is not None:
            self.soft_prompt = self.param("soft_prompt", sharded(normal(1.0), ("embed",)), (width,))
        self.language = T5(c.language)

    def see(self, batch: Batch):
        if batch.features is not None:
            return batch.features.astype(self.c.dtype)
        _, seen_TBPD, _ = self.vision(batch.image_BHWC.astype(self.c.dtype))
        return seen_TBPD.transpose(1, 0, 2, 3)

    def look(self, batch: Batch, key):
        """Picture words (B, P', D): the Q-Former's first, then the aggregator's."""
        c, keys = self.c, split_key(key, 2)
        seen_TBPD = self.see(batch).transpose(1, 0, 2, 3)
        words = []
        if c.visual_input != "AGGREGATOR":
            normed_BPD = self.qformer_norm(seen_TBPD[-1])
            asked_BLD = self.qformer(normed_BPD, batch.question_BL, batch.question_mask_BL, keys[0])
            words.append(self.qformer_projector(asked_BLD[:, : c.qformer.queries]))
        if c.visual_input != "QFORMER":
            gathered_BPD = self.aggregator(seen_TBPD[-1], seen_TBPD[:-1], keys[1])
            words.append(self.aggregator_projector(self.aggregator_norm(gathered_BPD)))
        return jnp.concatenate(words, axis=1)

    def embed(self, batch: Batch, key):
        """The encoder's input: picture words and prompt words (B, L', D), and which are real (B, L')."""
        c = self.c
        picture_BPD = self.look(batch, key)
        prompt_BLD = self.language.embed(batch.prompt_BL, picture_BPD.dtype)
        if c.soft_prompt_token is not None:
            here_BL1 = (batch.prompt_BL == c.soft_prompt_token)[..., None]
            prompt_BLD = jnp.where(here_BL1, self.soft_prompt.astype(prompt_BLD.dtype), prompt_BLD)
        seen_BP = jnp.ones(picture_BPD.shape[:2], bool)
        mask_BL = jnp.concatenate([seen_BP, batch.prompt_mask_BL.astype(bool)], axis=1)
        return jnp.concatenate([picture_BPD, prompt_BLD], axis=1), mask_BL

    def encode(self, batch: Batch, key):
        keys = split_key(key, 2)
        x_BLD, mask_BL = self.embed(batch, keys[0])
        return self.language.encode(x_BLD, mask_BL, batch.task_B, keys[1]), mask_BL

    def __call__(self, batch: Batch, key):
        keys = split_key(key, 2)
        encoded_BLD, mask_BL = self.encode(batch, keys[0])
        inputs_BM = t5.shift_right(batch.target_BM, self.c.language.start_token)
        return self.language.decode(
            inputs_BM, batch.target_mask_BM, encoded_BLD, mask_BL, batch.task_B, keys[1]
        )

    def begin(self, batch: Batch, cache_length: int):
        encoded_BLD, mask_BL = self.encode(batch, None)
        return self.language.begin(encoded_BLD, mask_BL, batch.task_B, cache_length)

    def extend(self, token_B, cache: Cache):
        return self.language.extend(token_B, cache)


def torch_rows(c: Lion) -> tuple[Row, ...]:
    """LION's state dict: with one adapter (stages 1 and 2) or two and a router (stage 3), as the config says."""
    rows = [*under("visual_encoder.", "vision/", vit.eva_rows(c.vision))]
    if c.visual_input != "AGGREGATOR":
        rows += [
            *under("", "qformer/", qformer.query_rows(c.qformer)),
            *under("Qformer.bert.", "qformer/", qformer.torch_rows(c.qformer)),
            *norm_rows("ln_vision", "qformer_norm"),
            *dense_rows("t5_proj", "qformer_projector"),
        ]
    if c.visual_input != "QFORMER":
        rows += [
            *under("fusion_adapter.", "aggregator/", qformer.aggregator_rows(c.aggregator)),
            *norm_rows("ln_adapter", "aggregator_norm"),
            *dense_rows("adapter_proj.0", "aggregator_projector/up"),
            *dense_rows("adapter_proj.2", "aggregator_projector/down"),
        ]
    if c.soft_prompt_token is not None:
        rows.append(Row("soft_prompt_hint", "soft_prompt"))
    return (*rows, *under("t5_model.", "language/", t5.torch_rows(c.language)))
