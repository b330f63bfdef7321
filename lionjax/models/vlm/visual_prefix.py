# SPDX-License-Identifier: Apache-2.0
"""Image tokens prepended to or spliced into the text: LLaVA, BLIP-2, InstructBLIP, MiniGPT-4, mPLUG-Owl, Kosmos-2.

Shikra, Frozen and the second stage of Lyrics belong here too. All are configs of one model: a vision tower, a connector
(a linear or MLP projector for each patch, or a Q-Former or resampler with learned queries), and a language model that
reads image and text embeddings as one sequence. The papers differ only in which tower, connector and language model
they use.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lionjax.core.errors import check_choices
from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_partitioning
from lionjax.core.types import IMAGE_TOKEN, VLM, Batch, Cache, Metrics, ModelInfo, Params, RowLayout
from lionjax.core.weight_map import WeightMapping
from lionjax.models.connectors import mqformer, perceiver
from lionjax.models.connectors.mqformer import MQ_FORMER, MQFormerConfig
from lionjax.models.connectors.perceiver import AbstractorConfig, ImageToTextProjectionConfig
from lionjax.models.connectors.qformer import QFormer, QFormerConfig
from lionjax.models.heads.region import scatter_embeddings
from lionjax.models.language import decoder
from lionjax.models.language.backend import is_encoder_decoder, language_model, row_layout, token_loss
from lionjax.models.language.decoder import VICUNA_7B, VICUNA_13B, DecoderConfig
from lionjax.models.language.t5 import FLAN_T5_XL, T5Config
from lionjax.models.vision.grounding_dino import GroundingDinoConfig
from lionjax.models.vision.ram import RamConfig
from lionjax.models.vision.vit import CLIP_VIT_L, EVA_VIT_G, ViT, ViTConfig
from lionjax.models.vlm import experts, visual_prefix_weights
from lionjax.models.vlm.info import vlm_info
from lionjax.models.vlm.splicing import splice
from lionjax.nn.layers import MLP, Dense, LayerNorm, normal, split_key
from lionjax.nn.lora import LoraConfig

TORCH_NAMES = ("hugging_face", "original")


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class VisualPrefixLM(VLM):
    """Config of the model; the defaults are those of LLaVA-1.5 7B (arXiv 2310.03744) as Hugging Face publishes it.

    - `feature_layer`: index of the tower's hidden state, as in transformers: -1 is the output of the last block,
      before any norm.
    - `keep_class_token`: keep the class token beside the patches.
    - `vision_norm_eps`: epsilon of a LayerNorm after the tower; None: no such norm.
    - `pool_stride`: mean-pool squares of this many patches a side; no published model does.
    - `qformer`, `resampler`: at most one of them; both None: one image token for each patch. With an MQFormerConfig the
      Q-Former reads regions too, `Batch.region_BKD` (Lyrics).
    - `projector_depth`: number of linear layers into the language model, with a GELU between two.
    - `normalize_features`: L2-normalize the tower's output (Kosmos-2).
    - `num_prefix_tokens`: this many image tokens from the mean of all patches (Frozen, arXiv 2106.13884); 0: off.
    - `add_image_end_token`: a learned embedding after the tokens of each image (mPLUG-Owl).
    - `image_token_id`: id in the prompt that the tokens of one image replace. A prompt without it has its images
      prepended if `prepend_image`, else it has no image. A row may have several images (B, K, H, W, C).
    - `identity_init_scale`: the one linear of the projector starts as this multiple of the identity, for a connector
      whose outputs are vectors of the language model already (see `QFormerConfig.copy_sharpness`); None: random.
    - `read_instruction`: a Q-Former that can read the question does so; False: not in this stage (Lyrics' captions).
    - `tagger`, `detector`: the experts of the same checkpoint, which the model does not run (see `experts`).
    - `torch_names`: names of the weights in torch, those of Hugging Face or of the original code.
    """

    vision: ViTConfig = CLIP_VIT_L
    language: DecoderConfig | T5Config = dataclasses.replace(VICUNA_7B, vocab_size=32064)
    qformer: QFormerConfig | MQFormerConfig | None = None
    feature_layer: int = -2
    keep_class_token: bool = False
    vision_norm_eps: float | None = None
    projector_depth: int = 2
    image_token_id: int | None = 32000
    prepend_image: bool = True
    torch_names: str = "hugging_face"
    dtype: str = "float32"  # of the computation
    resampler: AbstractorConfig | ImageToTextProjectionConfig | None = None
    normalize_features: bool = False
    num_prefix_tokens: int = 0
    add_image_end_token: bool = False
    pool_stride: int = 1
    lora: LoraConfig = LoraConfig()  # of the projector; the other parts have their own
    read_instruction: bool = True
    tagger: RamConfig | None = None
    detector: GroundingDinoConfig | None = None
    identity_init_scale: float | None = None

    def __post_init__(self):
        check_choices(self, torch_names=TORCH_NAMES, projector_depth=(0, 1, 2))
        if self.qformer is not None and self.resampler is not None:
            raise ValueError("both qformer and resampler are set; set at most one of them")
        if self.vision.attention_pool and not self.keep_class_token:
            raise ValueError("keep_class_token is False, but a tower with attention_pool has none; set it to True")
        if not -self.vision.depth <= self.feature_layer <= -1:
            raise ValueError(
                f"feature_layer is {self.feature_layer}; it must be in -{self.vision.depth}..-1 for a tower of "
                f"{self.vision.depth} blocks"
            )
        if self.pool_stride < 1 or self.keep_class_token * (self.pool_stride > 1) or self.side % self.pool_stride:
            raise ValueError(
                f"pool_stride is {self.pool_stride}; it must divide the {self.side} patches a side, and a stride "
                "above 1 needs keep_class_token=False"
            )
        if self.identity_init_scale is not None and self.projector_depth != 1:
            raise ValueError(
                f"identity_init_scale is {self.identity_init_scale} and projector_depth {self.projector_depth}; the "
                "identity needs one linear: set projector_depth to 1, or identity_init_scale to None"
            )
        if self.image_token_id is None and not self.prepend_image:
            raise ValueError("image_token_id is None and prepend_image is False; set one of them")
        projectors = ((False, 2), (True, 1)) if self.resampler is None else ((False, 0),)
        projectors = projectors if self.pool_stride == 1 else ()
        if self.torch_names == "hugging_face" and (self.qformer is not None, self.projector_depth) not in projectors:
            raise ValueError(
                f"projector_depth is {self.projector_depth} and pool_stride {self.pool_stride}; Hugging Face's classes "
                "have 2 linears after patches, 1 after a Q-Former, 0 after Kosmos-2's resampler and no pooling; set "
                "torch_names to 'original'"
            )

    @property
    def side(self) -> int:
        """Number of patches along one side of the image."""
        return self.vision.image_size // self.vision.patch_size

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model is an encoder-decoder."""
        return is_encoder_decoder(self.language)

    @property
    def info(self) -> ModelInfo:
        return vlm_info(
            self,
            reads_question=self.qformer is not None and self.qformer.use_text_input,
            question_vocab_size=None if self.qformer is None else self.qformer.vocab_size,
            region_width=mqformer.region_width(self.qformer),
            row_layout=self._row_layout(),
            experts=experts.expert_configs(self),
            default_processor=self._default_processor(),
            prompt_format=self._prompt_format(),
        )

    @property
    def tokens_per_image(self) -> int:
        """Number of the language model's image tokens of one image."""
        connector, has_class_token = self.qformer or self.resampler, not self.vision.attention_pool
        patches = (self.side // self.pool_stride) ** 2 + (self.keep_class_token and has_class_token)
        return (self.num_prefix_tokens or getattr(connector, "num_query_tokens", patches)) + self.add_image_end_token

    def _row_layout(self) -> RowLayout | None:
        """None also where a Q-Former reads the question or regions of an example, which rows do not keep apart."""
        if self.qformer is not None and (self.qformer.use_text_input or mqformer.region_width(self.qformer)):
            return None
        fields = {"image_token_id": self.image_token_id, "tokens_per_image": self.tokens_per_image}
        always_prepends = self.image_token_id is None
        return row_layout(self.language, prepends_images=self.prepend_image or always_prepends, **fields)

    def _default_processor(self) -> dict:
        """Fields of ProcessorConfig for released weights without a processor config."""
        if self.qformer is not None:
            return {"use_tags": False} | self._text_lengths()
        # Images are padded since LLaVA-1.5.
        return {
            "use_tags": False,
            "max_prompt_tokens": 512,
            "pad_to_square": self.projector_depth == 2,
            "pad_color": "mean",
        }

    def _text_lengths(self) -> dict:
        """Lengths of question, prompt and answer that fit tables of learned positions, where those are short."""
        positions = 0 if self.is_encoder_decoder else self.language.max_positions - self.language.position_offset
        room = (positions - self.qformer.num_query_tokens) // 2
        lengths = {"max_prompt_tokens": room, "max_target_tokens": room} if 0 < positions and room < 128 else {}
        return lengths | self.qformer.default_processor

    def _prompt_format(self) -> str:
        """The prompt format of the system that has these parts; see `core.prompt_formats`."""
        if self.num_prefix_tokens:
            return ""
        if self.resampler is not None:
            return "kosmos2" if isinstance(self.resampler, ImageToTextProjectionConfig) else "mplug_owl"
        if self.qformer is None:
            return "vicuna_v1"
        if mqformer.region_width(self.qformer):
            return "lyrics"
        if self.qformer.use_text_input:
            return "instructblip"
        if self.image_token_id == self.language.vocab_size:
            return "minigpt4"
        is_opt = not self.is_encoder_decoder and self.language.max_positions > 0
        return "blip2_opt" if is_opt else "blip2"

    def init(self, key, batch: Batch) -> Params:
        """Random parameters of all submodules, experts included. The batch may lack regions."""
        whole = dataclasses.replace(self, read_instruction=True)
        batch = mqformer.with_blank_regions(self.qformer, batch)
        return VisualPrefixLMModule(whole).init(key, batch, None)["params"] | experts.init_experts(self, key)

    def extract_features(self, params: Params, batch: Batch):
        """Patches (B, P, D) from the frozen tower, or (B, K, P, D) for rows with several images."""
        return VisualPrefixLMModule(self).apply({"params": params}, batch, method=VisualPrefixLMModule.encode_image)

    def loss(self, params: Params, batch: Batch, key=None) -> tuple[jax.Array, Metrics]:
        """Mean cross entropy of the answer tokens, and metrics."""
        return VisualPrefixLMModule(self).apply({"params": params}, batch, key, method=VisualPrefixLMModule.loss)

    def logits(self, params: Params, batch: Batch, key=None):
        """Logits (B, M, V) in float32; position m predicts target token m."""
        return VisualPrefixLMModule(self).apply({"params": params}, batch, key, method=VisualPrefixLMModule.__call__)

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[jax.Array, Cache]:
        """Logits (B, V) of the first answer token, and a cache of image and prompt with `cache_length` free slots."""
        return VisualPrefixLMModule(self).apply(
            {"params": params}, batch, cache_length, method=VisualPrefixLMModule.prefill
        )

    def extend(self, params: Params, token_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits (B, V) of the token after `token_B`, and the cache with that token."""
        return VisualPrefixLMModule(self).apply({"params": params}, token_B, cache, method=VisualPrefixLMModule.extend)

    def weight_map(self) -> tuple[WeightMapping, ...]:
        """Names of Hugging Face's class or of the original code, as `torch_names` selects."""
        if self.torch_names == "hugging_face":
            return visual_prefix_weights.hf_weight_map(self)
        return visual_prefix_weights.original_weight_map(self)


LLAVA_15_7B = VisualPrefixLM()
LLAVA_15_13B = VisualPrefixLM(language=dataclasses.replace(VICUNA_13B, vocab_size=32064))
LLAVA_7B = (
    VisualPrefixLM(  # LLaVA v1 (arXiv 2304.08485): 224 pixels, a linear projector, no image token in the vocabulary
        vision=dataclasses.replace(CLIP_VIT_L, image_size=224),
        language=VICUNA_7B,
        projector_depth=1,
        image_token_id=-200,
        torch_names="original",
    )
)
BLIP2_OPT_2_7B = VisualPrefixLM(
    vision=EVA_VIT_G,
    language=dataclasses.replace(decoder.OPT_2_7B, vocab_size=50304, eos_token_id=50118),
    qformer=QFormerConfig(use_text_input=False),
    feature_layer=-1,
    keep_class_token=True,
    vision_norm_eps=1e-6,
    projector_depth=1,
    image_token_id=50265,
)
BLIP2_FLAN_T5_XL = dataclasses.replace(
    BLIP2_OPT_2_7B, language=dataclasses.replace(FLAN_T5_XL, activation="gelu"), image_token_id=32100
)
INSTRUCTBLIP_FLAN_T5_XL = dataclasses.replace(BLIP2_FLAN_T5_XL, qformer=QFormerConfig())
INSTRUCTBLIP_VICUNA_7B = dataclasses.replace(
    INSTRUCTBLIP_FLAN_T5_XL,
    language=dataclasses.replace(
        VICUNA_7B, vocab_size=32001, pad_token_id=32000, bos_token_id=2, pad_vocab_to_multiple_of=128
    ),
    image_token_id=None,
)
# Only the projector is trained (arXiv 2304.10592).
MINIGPT4_7B = dataclasses.replace(
    BLIP2_OPT_2_7B,
    language=VICUNA_7B,
    vision_norm_eps=1e-5,
    image_token_id=VICUNA_7B.vocab_size,
    torch_names="original",
)
# Boxes are written as digits (arXiv 2306.15195); the three added tokens are image start, image patch and image end.
SHIKRA_7B = dataclasses.replace(
    LLAVA_7B, language=dataclasses.replace(VICUNA_7B, vocab_size=32003), image_token_id=32000
)


_CLIP_224 = dataclasses.replace(CLIP_VIT_L, image_size=224, post_layernorm=False)
_AFTER_TOWER = {"feature_layer": -1, "keep_class_token": True, "image_token_id": -1}
MPLUG_OWL_7B = VisualPrefixLM(
    vision=dataclasses.replace(_CLIP_224, norm_eps=1e-6),
    language=dataclasses.replace(VICUNA_7B, norm_eps=1e-6),
    resampler=AbstractorConfig(),
    vision_norm_eps=1e-6,
    projector_depth=1,
    add_image_end_token=True,
    torch_names="original",
    **_AFTER_TOWER,
)
KOSMOS2 = VisualPrefixLM(
    vision=_CLIP_224,
    language=decoder.KOSMOS2_TEXT,
    resampler=ImageToTextProjectionConfig(),
    vision_norm_eps=1e-5,
    projector_depth=0,
    normalize_features=True,
    **_AFTER_TOWER,
)
LYRICS_CODE = dataclasses.replace(  # the released code (see `lyrics_stage1`)
    INSTRUCTBLIP_VICUNA_7B,
    vision=dataclasses.replace(EVA_VIT_G, norm_eps=1e-5),
    language=dataclasses.replace(VICUNA_13B, vocab_size=32001, pad_token_id=32000, pad_vocab_to_multiple_of=128),
    qformer=MQ_FORMER,
    vision_norm_eps=1e-5,
    torch_names="original",
)
LYRICS_PAPER = dataclasses.replace(  # the parts that the paper names: CLIP's tower, and SAM's segments as regions
    LYRICS_CODE, vision=_CLIP_224, qformer=dataclasses.replace(MQ_FORMER, vision_width=_CLIP_224.width, use_sam=True)
)


class VisualPrefixLMModule(nn.Module):
    c: VisualPrefixLM

    def setup(self):
        c, width = self.c, self.c.language.width
        self.vision = ViT(c.vision, (c.vision.depth + c.feature_layer,))
        image_width = c.vision.width
        if c.vision_norm_eps is not None:
            self.vision_norm = LayerNorm(image_width, c.vision_norm_eps)
        if c.qformer is not None:
            self.qformer = QFormer(c.qformer)
            image_width = c.qformer.width
        if c.resampler is not None:
            self.latents = perceiver.build_connector(c.resampler)
            image_width = c.resampler.width
        if c.projector_depth == 1:
            outputs, scale = width * max(1, c.num_prefix_tokens), c.identity_init_scale
            init = normal(0.02) if scale is None else (lambda key, shape: scale * jnp.eye(*shape))
            self.projector = Dense(image_width, outputs, ("embed", None), kernel_init=init, lora=c.lora)
        elif c.projector_depth == 2:
            self.projector = MLP(image_width, width, "gelu", out_features=width, lora=c.lora)
        if c.add_image_end_token:
            self.last_word = self.param("last_word", with_logical_partitioning(normal(0.02), ("embed",)), (width,))
        self.language = language_model(c.language)

    def encode_image(self, batch: Batch):
        """The tower's patches (B, P, D), or (B, K, P, D) for rows with several images; `batch.features` if present."""
        c, image = self.c, batch.image_BHWC
        if batch.features is not None:
            return batch.features.astype(c.dtype)
        _, image_TBPD, _ = self.vision(image.reshape(-1, *image.shape[-3:]).astype(c.dtype))
        image_BPD = image_TBPD[0] if c.keep_class_token else image_TBPD[0, :, 1:]
        if c.pool_stride > 1:
            grid = image_BPD.reshape(
                len(image_BPD), c.side // c.pool_stride, c.pool_stride, -1, c.pool_stride, image_BPD.shape[-1]
            )
            image_BPD = grid.mean(axis=(2, 4)).reshape(len(image_BPD), -1, image_BPD.shape[-1])
        return image_BPD.reshape(*image.shape[:-3], *image_BPD.shape[1:])

    def embed_image(self, batch: Batch, key):
        """Image tokens (B, K, P, D) of the language model's width; K images a row."""
        c, features = self.c, self.encode_image(batch)
        rows, num_images = features.shape[0], features.shape[1] if features.ndim == 4 else 1
        x_BPD = features.reshape(-1, *features.shape[-2:])
        if c.vision_norm_eps is not None:
            x_BPD = self.vision_norm(x_BPD)
        if c.qformer is not None:
            reads_question = c.qformer.use_text_input and c.read_instruction
            question = (batch.question_BL, batch.question_mask_BL) if reads_question else (None, None)
            question = (x if x is None or num_images == 1 else jnp.repeat(x, num_images, axis=0) for x in question)
            regions = mqformer.regions_of(c.qformer, batch)
            x_BPD = self.qformer(x_BPD, *question, key, regions)[:, : c.qformer.num_query_tokens]
        if c.normalize_features:
            norm_BP1 = jnp.linalg.norm(x_BPD.astype(jnp.float32), axis=-1, keepdims=True)
            x_BPD = x_BPD / jnp.maximum(norm_BP1, 1e-12).astype(x_BPD.dtype)
        if c.resampler is not None:
            x_BPD = self.latents(x_BPD, key)
        if c.num_prefix_tokens:
            x_BPD = x_BPD.mean(axis=1, keepdims=True)
        if c.projector_depth:
            x_BPD = self.projector(x_BPD, key)
        x_BPD = x_BPD.reshape(rows, num_images, -1, c.language.width)
        if c.add_image_end_token:
            end = jnp.broadcast_to(self.last_word.astype(x_BPD.dtype), (rows, num_images, 1, c.language.width))
            x_BPD = jnp.concatenate([x_BPD, end], axis=2)
        return x_BPD

    def embed_inputs(self, batch: Batch, key):
        """Image and text embeddings in the order of the prompt (B, L', D), and their mask (B, L')."""
        c, ids_BL, mask_BL = self.c, batch.prompt_BL, batch.prompt_mask_BL.astype(bool)
        image_BKPD = self.embed_image(batch, key)
        is_image_token_BL = mask_BL & (False if c.image_token_id is None else ids_BL == c.image_token_id)
        # The image token may lie outside the vocabulary, so look up id 0 in its place.
        text_BLD = self.language.embed(jnp.where(is_image_token_BL, 0, ids_BL), image_BKPD.dtype)
        if c.image_token_id is not None:
            return splice(text_BLD, mask_BL, is_image_token_BL, image_BKPD, c.prepend_image)
        image_BPD = image_BKPD.reshape(len(ids_BL), -1, text_BLD.shape[-1])
        x_BLD = jnp.concatenate([image_BPD, text_BLD], axis=1)
        image_mask_BP = jnp.ones(image_BPD.shape[:2], bool)
        return x_BLD, jnp.concatenate([image_mask_BP, mask_BL], axis=1)

    def embed_row(self, batch: Batch, key):
        """Image and text embeddings (B, L, D) of rows with several examples."""
        image_BKPD, is_image_BL = self.embed_image(batch, key), batch.prompt_BL == IMAGE_TOKEN
        text_BLD = self.language.embed(jnp.where(is_image_BL, 0, batch.prompt_BL), image_BKPD.dtype)
        image_BPD = image_BKPD.reshape(len(text_BLD), -1, text_BLD.shape[-1])
        return scatter_embeddings(text_BLD, is_image_BL, image_BPD)

    def __call__(self, batch: Batch, key):
        """Logits (B, M, V) in float32; position m predicts target token m."""
        return self.language.logits(self.states_before(batch, key))

    def loss(self, batch: Batch, key):
        return token_loss(self.language, self.states_before(batch, key), batch.target_BM, batch.loss_mask_BM)

    def states_before(self, batch: Batch, key):
        """States (B, M, D) that predict each target token."""
        keys = split_key(key, 3)
        if batch.segment_BL is not None:
            x_BLD = self.embed_row(batch, keys[0])
            return self.language.forward_segments(x_BLD, batch.segment_BL, batch.target_index_BM, keys[1])[0]
        x_BLD, mask_BL = self.embed_inputs(batch, keys[0])
        target_BMD = self.language.embed(batch.target_BM, x_BLD.dtype)
        return self.language.forward(x_BLD, mask_BL, target_BMD, batch.target_mask_BM, batch.task_B, keys[1:])[0]

    def prefill(self, batch: Batch, cache_length: int):
        x_BLD, mask_BL = self.embed_inputs(batch, None)
        state_BD, cache = self.language.prefill(x_BLD, mask_BL, cache_length, batch.task_B)
        return self.language.logits(state_BD), cache

    def extend(self, token_B, cache: Cache):
        state_BD, cache = self.language.extend(self.language.embed_next(token_B, cache), cache)
        return self.language.logits(state_BD), cache
