# SPDX-License-Identifier: Apache-2.0
"""NExT-Chat (arXiv 2311.04498): a language model that reads and says places as embeddings (pix2emb).

The picture's patches stand as words where the prompt has its image tokens, and a box stands where it has a location
token, as an embedding. To say a place, the model writes the trigger token: its state there is read as a box, the box
goes back in as the next word, and the same state with the box asks SAM for a mask.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.types import Batch, Cache, Metrics, Params
from lionjax.core.weight_map import Row, under
from lionjax.models.heads import region
from lionjax.models.heads.region import OBJECTIVES, Locations, MaskPrompts
from lionjax.models.language import decoder, decoder_weights
from lionjax.models.language.decoder import VICUNA_7B, Decoder, DecoderConfig
from lionjax.models.vision import sam_decoder, vit
from lionjax.models.vision.sam_decoder import Sam
from lionjax.models.vision.sam_encoder import SAM_VIT_H, SamConfig
from lionjax.models.vision.vit import CLIP_VIT_L, ViT, ViTConfig
from lionjax.nn.layers import MLP, Dense, dense_rows

LOSSES = ("intended", "original")


@dataclasses.dataclass(frozen=True)
class NextChat:
    """A NExT-Chat by its parts' sizes; the defaults are those of the 7B release.

    `feature_layer` counts CLIP's hidden states as transformers does: -2 is the output of the last block but one.
    `objective` is "language" in stages 1 and 2 (words and boxes) and "masks" in stage 3; "all" learns both at once, as
    LISA does (arXiv 2308.00692), from one reading. `losses`: "original" has the
    constants that the released code has by mistake (see `losses.mask_losses`, `losses.giou_loss`). The paper's
    `giou_weight` is 0.8, the code's 0.2. `box_scale`: what 1 of a box is in the pixels that SAM's prompts are told in.
    """

    vision: ViTConfig = CLIP_VIT_L
    language: DecoderConfig = dataclasses.replace(VICUNA_7B, vocab=32005)
    sam: SamConfig = SAM_VIT_H
    feature_layer: int = -2
    projector_depth: int = 2
    location_hidden: int = 2048
    mask_tokens: int = 4
    box_scale: float = 1024.0
    image_token: int = 32000
    trigger_token: int = 32003
    location_token: int = 32004
    max_boxes: int = 8  # kept of an answer
    l1_weight: float = 2.0
    giou_weight: float = 0.2
    cycle_weight: float = 1.0
    focal_weight: float = 20.0
    objective: str = "language"
    losses: str = "intended"
    dtype: str = "float32"  # of the computation

    def __post_init__(self):
        known = {"objective": OBJECTIVES, "losses": LOSSES, "projector_depth": (1, 2)}
        for field, values in known.items():
            if getattr(self, field) not in values:
                text = ", ".join(map(str, values))
                raise ValueError(f"{field} is {getattr(self, field)!r}; it can be one of {text}")

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of every part, whatever the objective."""
        return NextChatModule(self).init(key, batch, method="everything")["params"]

    def _apply(self, params: Params, method: str, *args):
        return NextChatModule(self).apply({"params": params}, *args, method=method)

    def features(self, params: Params, batch: Batch):
        """What the frozen towers make of the pictures: patches (B, P, D) and, where SAM's pictures are, its map."""
        return self._apply(params, "see", batch)

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """Words, boxes and both cycles, or masks, or all, as `objective` says."""
        return self._apply(params, "masks_loss" if self.objective == "masks" else "places_loss", batch, key)

    def locate(self, params: Params, batch: Batch):
        """The boxes (B, K, 4) read at the triggers of the given answers, their states (B, K, D), and which are real."""
        return self._apply(params, "locate", batch)

    def masks(self, params: Params, batch: Batch, box_BK4, state_BKD, asked_BK=None):
        """Mask logits (B, K, h, w) and expected IoUs (B, K) of boxes and the states that they were read from."""
        return self._apply(params, "segment", batch, box_BK4, state_BKD, asked_BK)

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[jax.Array, Cache]:
        """Read picture and prompt."""
        return self._apply(params, "begin", batch, cache_length)

    def extend(self, params: Params, token_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read one more token per row. A location token can follow a trigger only, must, and is read as the box.

        `cache.written["kept"]` holds the answer's boxes so far, their states and how many there were.
        """
        return self._apply(params, "extend", token_B, cache)

    def torch_rows(self) -> tuple[Row, ...]:
        """Names of the NExT-Chat release."""
        return torch_rows(self)


class NextChatModule(nn.Module):
    c: NextChat

    def setup(self):
        c, width = self.c, self.c.language.width
        self.vision = ViT(c.vision, (c.vision.depth + c.feature_layer,))
        if c.projector_depth == 1:
            self.projector = Dense(c.vision.width, width, ("embed", None))
        else:
            self.projector = MLP(c.vision.width, width, "gelu", features=width)
        self.language = Decoder(c.language)
        self.locations = Locations(width, c.location_hidden)
        self.mask_prompts = MaskPrompts(width, c.mask_tokens, c.sam.channels)
        self.sam = Sam(c.sam)

    def see(self, batch: Batch):
        if batch.features is not None:
            return jax.tree.map(lambda leaf: leaf.astype(self.c.dtype), batch.features)
        _, seen_TBPD, _ = self.vision(batch.image_BHWC.astype(self.c.dtype))
        seen = {"patches": seen_TBPD[0, :, 1:]}
        return seen if batch.sam_image_BHWC is None else seen | {"map": self.map(batch)}

    def map(self, batch: Batch):
        """What SAM's encoder makes of each picture, once for all its boxes."""
        if batch.features is not None:
            return batch.features["map"].astype(self.c.dtype)
        return self.sam.encode(batch.sam_image_BHWC.astype(self.c.dtype))

    def embed(self, batch: Batch, ids_BL):
        """Words (B, L, D), with patches at the image tokens and boxes at the location tokens, in their order."""
        c = self.c
        picture_BPD = self.projector(self.see(batch)["patches"])
        x_BLD = self.language.embed(ids_BL, picture_BPD.dtype)
        x_BLD = region.put(x_BLD, ids_BL == c.image_token, picture_BPD)
        if batch.boxes_BK4 is None:
            return x_BLD
        return region.put(x_BLD, ids_BL == c.location_token, self.locations.encode(batch.boxes_BK4))

    def read(self, batch: Batch, key):
        """States (B, L + M, D) of prompt and answer in one row."""
        ids_BL = jnp.concatenate([batch.prompt_BL, batch.target_BM], axis=1)
        mask_BL = jnp.concatenate([batch.prompt_mask_BL, batch.target_mask_BM], axis=1)
        return self.language(self.embed(batch, ids_BL), mask_BL, batch.task_B, key)

    def __call__(self, batch: Batch, key=None):
        """Logits (B, M, V) in float32, row m predicting target m, and the states of the whole row."""
        state_BLD = self.read(batch, key)
        length = batch.prompt_BL.shape[1]
        first_BD = decoder.last(state_BLD[:, :length], batch.prompt_mask_BL)
        before_BMD = jnp.concatenate([first_BD[:, None], state_BLD[:, length:-1]], axis=1)
        return self.language.logits(before_BMD), state_BLD

    def triggers(self, batch: Batch, state_BLD):
        """See `heads.triggers`."""
        return region.triggers(self.c, batch, state_BLD[:, batch.prompt_BL.shape[1] :])

    def places_loss(self, batch: Batch, key):
        logits_BMV, state_BLD = self(batch, key)
        loss, metrics = region.words_loss(self.c, logits_BMV, batch)
        if batch.boxes_BK4 is None:
            return loss, metrics
        found = self.triggers(batch, state_BLD)
        terms, more = region.place_losses(self.c, self.locations, batch, found)
        terms = {"text": loss} | terms
        metrics |= {f"loss_{name}": term for name, term in terms.items()} | more
        if self.c.objective == "all":
            terms["masks"], more = self.masks_loss(batch, key, found)
            metrics = more | metrics
        return sum(terms.values()), metrics

    def masks_loss(self, batch: Batch, key, found=None):
        """Of the states at triggers, which are `found` where the answer was read already."""
        side = region.mask_side(batch)
        found = found or self.triggers(batch, self.read(batch, key))
        trigger_BKD = found[0]
        box_BK4, asked_BK = self.locations.decode(trigger_BKD), region.masked(batch, found)
        logits_BKHW, iou_BK = self.segment(batch, box_BK4, trigger_BKD, asked_BK)
        enlarge = functools.partial(sam_decoder.enlarge, pixels=side)
        return region.masks_loss(self.c, batch, found, logits_BKHW, iou_BK, enlarge)

    def segment(self, batch: Batch, box_BK4, state_BKD, asked_BK=None):
        """The mask tokens of the states, then two of the boxes, ask SAM's decoder; its first mask answers."""
        own_BKTC = self.mask_prompts(state_BKD.astype(jnp.float32))
        return self.sam.point(self.map(batch), box_BK4 * self.c.box_scale, own_BKTC, asked_BK)

    def locate(self, batch: Batch):
        trigger_BKD, _, real_BK = self.triggers(batch, self.read(batch, None))
        return self.locations.decode(trigger_BKD), trigger_BKD, real_BK

    def begin(self, batch: Batch, cache_length: int):
        c = self.c
        x_BLD = self.embed(batch, batch.prompt_BL)
        state_BD, cache = self.language.begin(x_BLD, batch.prompt_mask_BL, cache_length, batch.task_B)
        last_B = decoder.last(batch.prompt_BL[..., None], batch.prompt_mask_BL)[:, 0]
        kept = region.nothing_said(c, *state_BD.shape, state_BD.dtype)
        return self.say(state_BD, last_B == c.trigger_token, kept, cache)

    def extend(self, token_B, cache: Cache):
        written = cache.written
        word_BD = self.language.embed(token_B, written["k"].dtype)
        triggered_B = (token_B == self.c.trigger_token) & ~written["triggered"][0]
        state_BD, cache = self.language.extend(region.heard(self.locations, word_BD, written), cache)
        return self.say(state_BD, triggered_B, written["kept"], cache)

    def say(self, state_BD, triggered_B, kept, cache: Cache):
        word_BV = self.language.logits(state_BD)
        logits_BV, told = region.say(self.c, self.locations, state_BD, word_BV, triggered_B, kept)
        return logits_BV, Cache(cache.written | told, cache.fixed, cache.step, cache.read)

    def everything(self, batch: Batch):
        """Runs every part once, to make its parameters."""
        c = self.c
        x_BLD = self.embed(batch, batch.prompt_BL)
        state_BLD = self.language(x_BLD, batch.prompt_mask_BL, batch.task_B)
        box_B14 = self.locations.decode(self.locations.encode(self.locations.decode(state_BLD[:, :1])))
        image = jnp.zeros((1, c.sam.image, c.sam.image, 3))
        given = self.sam.prompts.mask(jnp.zeros((1, 4 * c.sam.grid, 4 * c.sam.grid)))
        prompt = jnp.concatenate([self.mask_prompts(state_BLD[:1, :1]), self.sam.prompts.boxes(box_B14[:1])], axis=2)
        return self.language.logits(state_BLD), self.sam.decode(self.sam.encode(image), prompt, given)


def torch_rows(c: NextChat) -> tuple[Row, ...]:
    """The release's state dict, with CLIP and SAM inside."""
    if c.projector_depth == 1:
        projector = dense_rows("model.mm_projector", "projector")
    else:
        projector = (
            *dense_rows("model.mm_projector.0", "projector/up"),
            *dense_rows("model.mm_projector.2", "projector/down"),
        )
    # A tower that is no CLIP keeps its own names within.
    vision = vit.clip_rows(c.vision) if c.vision.norm_before else vit.eva_rows(c.vision)
    return (
        *under("model.vision_tower.vision_model.", "vision/", vision),
        *projector,
        *under("", "language/", decoder_weights.llama_rows(c.language)),
        *under("", "locations/", region.location_rows()),
        *under("", "mask_prompts/", region.mask_prompt_rows()),
        *under("sam.model.", "sam/", sam_decoder.torch_rows(c.sam)),
    )
