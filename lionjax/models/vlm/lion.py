# SPDX-License-Identifier: Apache-2.0
"""LION (CVPR 2024, arXiv 2311.11860): two visual streams, tags as soft prompts, routed adapters.

The picture goes through the frozen ViT once. Its last layer goes to the Q-Former together with the bare question; its
tapped layers go to the vision aggregator; both become words of the language model's width. In the prompt, one token
gives way to a learned hint of how far to trust the tags that follow it. T5 reads the picture words and the prompt, its
adapters mixed by the task of each row.

With `places` it is more than the original: NExT-Chat's heads on the same language model, so that boxes go in and out as
embeddings and masks follow from them. The language model may then also be a decoder alone.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.sharding import sharded
from lionjax.core.types import Batch, Cache, Metrics, Params
from lionjax.core.weight_map import Row, under
from lionjax.models.connectors import qformer
from lionjax.models.connectors.qformer import Aggregator, AggregatorConfig, QFormer, QFormerConfig
from lionjax.models.heads import region
from lionjax.models.heads.region import OBJECTIVES, Locations, MaskPrompts, PlaceConfig
from lionjax.models.language import decoder, decoder_weights, t5
from lionjax.models.language.decoder import Decoder, DecoderConfig
from lionjax.models.language.t5 import T5, T5Config
from lionjax.models.vision import sam_decoder, vit
from lionjax.models.vision.sam_decoder import Sam
from lionjax.models.vision.sam_encoder import SamConfig
from lionjax.models.vision.vit import ViT, ViTConfig
from lionjax.nn import losses
from lionjax.nn.layers import MLP, Dense, LayerNorm, dense_rows, norm_rows, normal, split_key

VISUAL_INPUTS = ("ALL", "QFORMER", "AGGREGATOR")
PROJECTION_EPS = 1e-5  # torch's default, unlike the ViT's 1e-6


@dataclasses.dataclass(frozen=True)
class Lion:
    """A LION by its parts' sizes. `visual_input`: the streams that run; stage 1 QFORMER, 2 AGGREGATOR, then ALL.

    `word_scale`: for a ViT aligned with the language model's words, how large these are: the aggregator's projector
    begins by handing on what the ViT says, at this size. None: small random projectors, as the original.
    `places`: boxes as embeddings; `sam`: masks from them, learned where `objective` is not "language" (see `nextchat`).
    """

    vision: ViTConfig
    qformer: QFormerConfig
    aggregator: AggregatorConfig
    language: T5Config | DecoderConfig
    soft_prompt_token: int | None = 32099  # <extra_id_0>; None: no hint, tags are not used
    visual_input: str = "ALL"
    dtype: str = "float32"  # of the computation
    places: PlaceConfig | None = None
    sam: SamConfig | None = None
    objective: str = "language"
    word_scale: float | None = None

    def __post_init__(self):
        for field, known in {"visual_input": VISUAL_INPUTS, "objective": OBJECTIVES}.items():
            if getattr(self, field) not in known:
                text = ", ".join(known)
                raise ValueError(f"{field} is {getattr(self, field)!r}; it can be one of {text}")
        widths = self.vision.width, self.language.width, self.aggregator.projector / 2
        if self.word_scale is not None and len(set(widths)) > 1:
            raise ValueError(
                "word_scale wants a ViT as wide as the language model and a projector of twice that, "
                f"not {self.vision.width}, {self.language.width} and {self.aggregator.projector}"
            )
        if (self.sam is not None and self.places is None) or (self.objective != "language" and self.sam is None):
            raise ValueError("masks want both places and sam; give the config the one it lacks")

    @property
    def encodes(self) -> bool:
        """Whether the language model reads the prompt in an encoder."""
        return isinstance(self.language, T5Config)

    @property
    def taps(self) -> tuple[int, ...]:
        """ViT layers whose output is used: the aggregator's contexts, then its query."""
        return (*self.aggregator.context_layers, self.aggregator.query_layer)

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of every part that `visual_input` uses, and of all heads."""
        return LionModule(self).init(key, batch, method="everything")["params"]

    def _apply(self, params: Params, method: str, *args):
        return LionModule(self).apply({"params": params}, *args, method=method)

    def features(self, params: Params, batch: Batch):
        """What the frozen towers make of the pictures, to be kept and put into `Batch.features`.

        The ViT's taps (B, T, 1 + P, D); where the batch has pictures for SAM, {"taps": ..., "map": ...}.
        """
        return self._apply(params, "keep", batch)

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """Mean cross entropy of the answer's tokens; with places also their terms, or those of masks, or all."""
        if self.objective == "masks":
            return self._apply(params, "masks_loss", batch, key)
        if self.places is not None:
            return self._apply(params, "places_loss", batch, key)
        logits_BMV = self.logits(params, batch, key)
        return losses.token_cross_entropy(logits_BMV, batch.target_BM, batch.loss_mask_BM)

    def logits(self, params: Params, batch: Batch, key=None):
        """(B, M, V) in float32, row m predicting target m."""
        return self._apply(params, "__call__", batch, key)

    def locate(self, params: Params, batch: Batch):
        """The boxes (B, K, 4) read at the triggers of the given answers, their states (B, K, D), and which are real."""
        return self._apply(params, "locate", batch)

    def masks(self, params: Params, batch: Batch, box_BK4, state_BKD, asked_BK=None):
        """Mask logits (B, K, h, w) and expected IoUs (B, K) of boxes and the states that they were read from."""
        return self._apply(params, "segment", batch, box_BK4, state_BKD, asked_BK)

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[jax.Array, Cache]:
        """Read picture and prompt, and what an answer begins with."""
        return self._apply(params, "begin", batch, cache_length)

    def extend(self, params: Params, token_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read one more token per row. With places see `NextChat.extend`."""
        return self._apply(params, "extend", token_B, cache)

    def torch_rows(self) -> tuple[Row, ...]:
        """Names of the LION release; the ViT and T5 rows are those of eva_vit_g.pth and Hugging Face's T5."""
        return torch_rows(self)


def handing_on(scale: float):
    """First weights of an MLP of twice its width that is the identity times `scale`: gelu(x) - gelu(-x) = x."""

    def init(key, shape, dtype=jnp.float32):
        narrow = min(shape)
        both_ways = jnp.concatenate([jnp.eye(narrow), -jnp.eye(narrow)], axis=1) * scale**0.5
        return (both_ways if shape[0] == narrow else both_ways.T).astype(dtype)

    return init


class LionModule(nn.Module):
    c: Lion

    def setup(self):
        c = self.c
        width = c.language.width
        self.vision = ViT(c.vision, c.taps)
        if c.visual_input != "AGGREGATOR":
            self.qformer_norm = LayerNorm(c.vision.width, PROJECTION_EPS)
            self.qformer = QFormer(c.qformer)
            small = normal(0.02 if c.word_scale is None else c.word_scale * c.qformer.width**-0.5)
            self.qformer_projector = Dense(c.qformer.width, width, ("embed", None), init=small)
        if c.visual_input != "QFORMER":
            self.aggregator = Aggregator(c.aggregator)
            self.aggregator_norm = LayerNorm(c.vision.width, PROJECTION_EPS)
            init = normal(0.02) if c.word_scale is None else handing_on(c.word_scale)
            self.aggregator_projector = MLP(c.vision.width, c.aggregator.projector, features=width, init=init)
        if c.soft_prompt_token is not None:
            self.soft_prompt = self.param("soft_prompt", sharded(normal(1.0), ("embed",)), (width,))
        self.language = T5(c.language) if c.encodes else Decoder(c.language)
        if c.places is not None:
            self.locations = Locations(width, c.places.location_hidden)
        if c.sam is not None:
            self.mask_prompts = MaskPrompts(width, c.places.mask_tokens, c.sam.channels)
            self.sam = Sam(c.sam)

    def see(self, batch: Batch):
        if batch.features is not None:
            kept = batch.features
            return (kept["taps"] if isinstance(kept, dict) else kept).astype(self.c.dtype)
        _, seen_TBPD, _ = self.vision(batch.image_BHWC.astype(self.c.dtype))
        return seen_TBPD.transpose(1, 0, 2, 3)

    def map(self, batch: Batch):
        """What SAM's encoder makes of each picture, once for all its boxes."""
        if batch.features is not None:
            return batch.features["map"].astype(self.c.dtype)
        return self.sam.encode(batch.sam_image_BHWC.astype(self.c.dtype))

    def keep(self, batch: Batch):
        taps_BTPD = self.see(batch)
        if batch.sam_image_BHWC is None or self.c.sam is None:
            return taps_BTPD
        return {"taps": taps_BTPD, "map": self.map(batch)}

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

    def words(self, ids_BL, batch: Batch, dtype, first_B=0):
        """Embeddings (B, L, D), the hint at its token and boxes at theirs; `first_B` boxes stand in words before."""
        c = self.c
        x_BLD = self.language.embed(ids_BL, dtype)
        if c.soft_prompt_token is not None:
            here_BL1 = (ids_BL == c.soft_prompt_token)[..., None]
            x_BLD = jnp.where(here_BL1, self.soft_prompt.astype(x_BLD.dtype), x_BLD)
        if c.places is None or batch.boxes_BK4 is None:
            return x_BLD
        place_BKD = self.locations.encode(batch.boxes_BK4)
        return region.put(x_BLD, ids_BL == c.places.location_token, place_BKD, first_B)

    def embed(self, batch: Batch, key):
        """What is read before the answer: picture words and prompt words (B, L', D), and which are real (B, L')."""
        picture_BPD = self.look(batch, key)
        prompt_BLD = self.words(batch.prompt_BL, batch, picture_BPD.dtype)
        seen_BP = jnp.ones(picture_BPD.shape[:2], bool)
        mask_BL = jnp.concatenate([seen_BP, batch.prompt_mask_BL.astype(bool)], axis=1)
        return jnp.concatenate([picture_BPD, prompt_BLD], axis=1), mask_BL

    def encode(self, batch: Batch, key):
        keys = split_key(key, 2)
        x_BLD, mask_BL = self.embed(batch, keys[0])
        return self.language.encode(x_BLD, mask_BL, batch.task_B, keys[1]), mask_BL

    def said(self, batch: Batch, dtype):
        """The answer's words (B, M, D), which may be boxes."""
        first_B = 0
        if self.c.places is not None:
            first_B = (batch.prompt_BL == self.c.places.location_token).sum(axis=1)
        return self.words(batch.target_BM, batch, dtype, first_B)

    def read(self, batch: Batch, key):
        """States (B, M, D) before each word of the answer, and behind each."""
        keys = split_key(key, 2)
        if self.c.encodes:
            encoded_BLD, mask_BL = self.encode(batch, keys[0])
            start_B1 = jnp.full_like(batch.target_BM[:, :1], self.c.language.start_token)
            start_B1D = self.language.embed(start_B1, encoded_BLD.dtype)
            x_BMD = jnp.concatenate([start_B1D, self.said(batch, encoded_BLD.dtype)], axis=1)
            real_B1 = jnp.ones_like(batch.target_mask_BM[:, :1])
            real_BM = jnp.concatenate([real_B1, batch.target_mask_BM], axis=1)
            state_BMD = self.language.states(x_BMD, real_BM, encoded_BLD, mask_BL, batch.task_B, keys[1])
            return state_BMD[:, :-1], state_BMD[:, 1:]
        x_BLD, mask_BL = self.embed(batch, keys[0])
        length, said_BMD = x_BLD.shape[1], self.said(batch, x_BLD.dtype)
        whole_BL = jnp.concatenate([mask_BL, batch.target_mask_BM.astype(bool)], axis=1)
        x_BLD = jnp.concatenate([x_BLD, said_BMD], axis=1)
        state_BLD = self.language(x_BLD, whole_BL, batch.task_B, keys[1])
        first_BD = decoder.last(state_BLD[:, :length], mask_BL)
        before_BMD = jnp.concatenate([first_BD[:, None], state_BLD[:, length:-1]], axis=1)
        return before_BMD, state_BLD[:, length:]

    def __call__(self, batch: Batch, key):
        if self.c.places is not None or not self.c.encodes:
            return self.language.logits(self.read(batch, key)[0])
        keys = split_key(key, 2)
        encoded_BLD, mask_BL = self.encode(batch, keys[0])
        inputs_BM = t5.shift_right(batch.target_BM, self.c.language.start_token)
        return self.language.decode(inputs_BM, batch.target_mask_BM, encoded_BLD, mask_BL, batch.task_B, keys[1])

    def places_loss(self, batch: Batch, key):
        c = self.c.places
        before_BMD, behind_BMD = self.read(batch, key)
        loss, metrics = region.words_loss(c, self.language.logits(before_BMD), batch)
        if batch.boxes_BK4 is None:
            return loss, metrics
        found = region.triggers(c, batch, behind_BMD)
        terms, more = region.place_losses(c, self.locations, batch, found)
        terms = {"text": loss} | terms
        metrics |= {f"loss_{name}": term for name, term in terms.items()} | more
        if self.c.objective == "all":
            terms["masks"], more = self.masks_loss(batch, key, found)
            metrics = more | metrics
        return sum(terms.values()), metrics

    def masks_loss(self, batch: Batch, key, found=None):
        """Of the states at triggers, which are `found` where the answer was read already."""
        c, side = self.c.places, region.mask_side(batch)
        found = found or region.triggers(c, batch, self.read(batch, key)[1])
        trigger_BKD = found[0]
        box_BK4, asked_BK = self.locations.decode(trigger_BKD), region.masked(batch, found)
        logits_BKHW, iou_BK = self.segment(batch, box_BK4, trigger_BKD, asked_BK)
        enlarge = functools.partial(sam_decoder.enlarge, pixels=side)
        return region.masks_loss(c, batch, found, logits_BKHW, iou_BK, enlarge)

    def segment(self, batch: Batch, box_BK4, state_BKD, asked_BK=None):
        """The mask tokens of the states, then two of the boxes, ask SAM's decoder; its first mask answers."""
        own_BKTC = self.mask_prompts(state_BKD.astype(jnp.float32))
        return self.sam.point(self.map(batch), box_BK4 * self.c.sam.image, own_BKTC, asked_BK)

    def locate(self, batch: Batch):
        behind_BMD = self.read(batch, None)[1]
        trigger_BKD, _, real_BK = region.triggers(self.c.places, batch, behind_BMD)
        return self.locations.decode(trigger_BKD), trigger_BKD, real_BK

    def begin(self, batch: Batch, cache_length: int):
        c = self.c
        if c.encodes:
            encoded_BLD, mask_BL = self.encode(batch, None)
            given = (encoded_BLD, mask_BL, batch.task_B, cache_length)
            state_BD, cache = self.language.begin_state(*given)
        else:
            x_BLD, mask_BL = self.embed(batch, None)
            state_BD, cache = self.language.begin(x_BLD, mask_BL, cache_length, batch.task_B)
        if c.places is None:
            return self.language.logits(state_BD), cache
        last_B = decoder.last(batch.prompt_BL[..., None], batch.prompt_mask_BL)[:, 0]
        triggered_B = (last_B == c.places.trigger_token) & (not c.encodes)
        kept = region.nothing_said(c.places, *state_BD.shape, state_BD.dtype)
        return self.say(state_BD, triggered_B, kept, cache)

    def extend(self, token_B, cache: Cache):
        c, written = self.c, cache.written
        x_BD = self.language.embed(token_B, written["self_k" if c.encodes else "k"].dtype)
        if c.places is not None:
            triggered_B = (token_B == c.places.trigger_token) & ~written["triggered"][0]
            x_BD = region.heard(self.locations, x_BD, written)
        state_BD, cache = (self.language.extend_state if c.encodes else self.language.extend)(x_BD, cache)
        if c.places is None:
            return self.language.logits(state_BD), cache
        return self.say(state_BD, triggered_B, written["kept"], cache)

    def say(self, state_BD, triggered_B, kept, cache: Cache):
        word_BV, c = self.language.logits(state_BD), self.c.places
        logits_BV, told = region.say(c, self.locations, state_BD, word_BV, triggered_B, kept)
        return logits_BV, Cache(cache.written | told, cache.fixed, cache.step, cache.read)

    def everything(self, batch: Batch):
        """Runs every part once, to make its parameters."""
        c, made = self.c, [self(batch, None)]
        box_B14 = jnp.zeros((1, 1, 4))
        if c.places is not None:
            made.append(self.locations.decode(self.locations.encode(box_B14)))
        if c.sam is not None:
            image = jnp.zeros((1, c.sam.image, c.sam.image, 3))
            given = self.sam.prompts.mask(jnp.zeros((1, 4 * c.sam.grid, 4 * c.sam.grid)))
            state_B1D = jnp.zeros((1, 1, c.language.width))
            prompt = jnp.concatenate([self.mask_prompts(state_B1D), self.sam.prompts.boxes(box_B14)], axis=2)
            made.append(self.sam.decode(self.sam.encode(image), prompt, given))
        return made


def torch_rows(c: Lion) -> tuple[Row, ...]:
    """LION's state dict: with one adapter (stages 1 and 2) or two and a router (stage 3), as the config says.

    The heads have NExT-Chat's names.
    """
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
    if c.places is not None:
        rows += under("", "locations/", region.location_rows())
    if c.sam is not None:
        rows += under("", "mask_prompts/", region.mask_prompt_rows())
        rows += under("sam.model.", "sam/", sam_decoder.torch_rows(c.sam))
    if not c.encodes:
        return (*rows, *under("llm_model.", "language/", decoder_weights.llama_rows(c.language)))
    return (*rows, *under("t5_model.", "language/", t5.torch_rows(c.language)))
