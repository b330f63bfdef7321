# SPDX-License-Identifier: Apache-2.0
"""Shared types: `Batch`, `Cache`, `ModelInfo`, the `VLM` interface.

Array names end with one letter for each axis, the same in the whole project:
`B` batch, `L` text length, `M` answer length, `S` keys, `P` patches, `Q` queries, `T` feature layers, `D` width,
`F` hidden size, `N` heads, `H` head size, `V` vocabulary, `K` boxes or images, `C` channels, `A` adapters.
Images are `image_BHWC`; boxes are (x0, y0, x1, y1) in 0..1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import jax

from lionjax.core.errors import UserError, check_ranges

T = TypeVar("T")
Array = Any  # a numpy or jax array; its name gives the shape
Params = dict[str, Any]  # nested dict of arrays; the path of a leaf is its keys joined by "/"
Metrics = dict[str, Any]

IMAGE_TOKEN = -1000  # id of every image token in a row of several examples (`Batch.segment_BL`)
REGION_LEVEL, IMAGE_LEVEL = 0, 1  # task indices of LION's adapter router
CATEGORIES = ("region_level", "image_level")


@dataclass_transform(frozen_default=True)
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass of arrays or pytrees, registered as a JAX pytree."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree_dataclass
class PackedText:
    """Boxes as text, then a caption, packed into one row of fixed length for MQ-Former's first stage (Lyrics).

    All are int32 (B, L). Ids and positions are those of BERT's vocabulary and table; the caption's positions restart
    at 1. A label of -100 is in no loss.
    """

    ids_BL: Array  # [CLS], tokens of the boxes, tokens of the caption
    masked_ids_BL: Array  # the same with masked elements of the boxes
    position_BL: Array
    mask_BL: Array  # 1 on real tokens
    icg_label_BL: Array  # the caption's tokens; the token at position l is predicted from position l - 1
    msp_label_BL: Array  # the masked tokens, predicted at their own position


@pytree_dataclass
class Batch:
    """One batch of examples. Text is right-padded; masks are 1 on real tokens.

    An encoder-decoder has the prompt in its encoder and the target in its decoder; a decoder-only model has image
    tokens, prompt and target in one sequence. `features`, if not None, is the output of `VLM.extract_features` for the
    images, so that the frozen tower need not run (for `prefill` also of `answer_features`); `image_BHWC` may then be
    None. Image arrays of a segmenting model
    (LISA) may have fewer rows: each image then belongs to an equal number of rows of text in turn.
    """

    image_BHWC: Array  # float32, normalized by mean and standard deviation
    prompt_BL: Array  # int32, ids of the language model's tokenizer
    prompt_mask_BL: Array
    question_BL: Array  # int32, the question without a template, ids of the Q-Former's tokenizer
    question_mask_BL: Array
    target_BM: Array  # int32, the answer with its end token
    target_mask_BM: Array
    loss_mask_BM: Array  # 1 on the target tokens in the loss
    task_B: Array  # int32, task index of the adapter router: REGION_LEVEL or IMAGE_LEVEL
    record_B: Array  # int32, index of the record in the mixture
    boxes_BK4: Array = None  # float32 in 0..1
    boxes_mask_BK: Array = None
    masks_BKHW: Array = None  # bool, the masks of boxes_BK4
    features: Any = None
    sam_image_BHWC: Array = None  # float32, the same images with SAM's size, mean and standard deviation
    masks_mask_BK: Array = None  # 1 on real masks; None: those of all real boxes
    dataset_B: Array = None  # int32, index of the entry in the stage's mixture
    box_tokens_BKL: Array = None  # bool, the tokens of question_BL that name each of boxes_BK4 (a detector's training)
    region_BKD: Array = None  # float, features of the image's regions: a detector's queries (Lyrics)
    region_mask_BK: Array = None  # bool, the real regions
    sam_size_B2: Array = None  # int32, height and width of the image in the upper left corner of sam_image_BHWC
    mask_size_B2: Array = None  # int32, those of the image in the upper left corner of masks_BKHW; None: sam_size_B2
    packed: PackedText | None = None  # boxes and caption as text (first stage of Lyrics)
    # Of rows with several examples each (sequence packing, `data.example_rows`), m in a row, the segments 1 to m. The
    # prompt arrays then hold the whole row, prompt and target of each example in turn, with the id IMAGE_TOKEN at each
    # image token; the targets of all examples follow each other. Images and their `features` are (B, m K, ...),
    # `question_*`, `task_B` and `record_B` (B, m, ...), and boxes those of all examples in the order of the row.
    segment_BL: Array = None  # int32, the segment of each token of the row; 0: padding
    target_index_BM: Array = None  # int32, where in the row each target token is
    # Of a model with slots (PaLM-E), in the order of their slots in the prompt; rows without a slot are zero.
    state_BKS: Array = None  # float32, state vectors
    object_mask_BKHW: Array = None  # bool, masks of objects at the size of the image


@pytree_dataclass
class Cache:
    """State of autoregressive decoding. Every leaf has layers on axis 0 and the batch on axis 1.

    `generated`: of the generated tokens (keys and values), reordered with the beams. `static`: the same for all beams
    of a prompt, repeated for each (masks, an encoder's keys and values). `prompt`: keys and values of the prompt, one
    row for all its beams. `step`: number of tokens decoded so far. `start_B`: the step at which the answer of each row
    began, for rows that joined while others were decoded (`nn.kv_cache.insert_rows`); None: 0 for all.
    """

    generated: Any
    static: Any
    step: Array  # int32 scalar
    prompt: Any = None
    start_B: Array | None = None


@dataclasses.dataclass(frozen=True)
class SentenceSlots:
    """Slots of a multimodal sentence besides those of images (PaLM-E, arXiv 2303.03378): for states and objects.

    `state_width`: numbers in a state vector; `max_states`: state slots of a sentence (0: none), each of
    `num_state_tokens` tokens. `max_objects`: object slots of a sentence (0: none), each of `num_object_tokens` tokens.
    The token ids stand for each token of a slot in the prompt, and lie outside the vocabulary. Raises ValueError for
    numbers out of range.
    """

    state_width: int = 0
    max_states: int = 0
    num_state_tokens: int = 1
    max_objects: int = 0
    num_object_tokens: int = 1
    state_token_id: int = -201
    object_token_id: int = -202

    def __post_init__(self):
        check_ranges(self, "slots.", state_width=">= 0", max_states=">= 0", max_objects=">= 0")
        check_ranges(self, "slots.", num_state_tokens=">= 1", num_object_tokens=">= 1")
        if bool(self.state_width) != bool(self.max_states):
            raise ValueError(
                f"slots.state_width is {self.state_width} and slots.max_states {self.max_states}; set both or neither"
            )


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How a decoder's row is made of an example, for rows that hold several examples (see `Batch.segment_BL`).

    `image_token_id`: id in the prompt that `tokens_per_image` image tokens replace or, if `is_expanded`, that stands
    for each of them. `prepends_images`: a prompt without it has all images in front. `box_token_id`: id whose embedding
    is that of a box. `max_positions`: tokens of an example that fit the learned positions; 0: any number.
    """

    image_token_id: int | None = None
    tokens_per_image: int = 0
    is_expanded: bool = False
    prepends_images: bool = False
    box_token_id: int | None = None
    max_positions: int = 0


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Properties of a model for code outside `models/`, from `VLM.info`.

    - `vocab_size`, `embedding_rows`: vocabulary of the language model, without and with padding for a mesh; None: the
      model has no such table.
    - `image_token`: id in the prompt that the tokens of an image replace (if `splices_images`); may lie outside the
      vocabulary. `box_token`: id whose embedding is that of a box. `mask_token`: id at which an answer has a mask and
      no box.
    - `image_size`: side of the input image in pixels; `reads_images`: False for a language model alone.
    - `detects_phrases`: a detector, which reads `question_BL` as a caption and learns `boxes_BK4` of its phrases.
    - `is_dual_encoder`: image and text embeddings to compare (CLIP); the targets of a batch are its texts.
    - `reads_question`: a Q-Former reads the question with its own tokenizer; `question_vocab_size`: its word table.
    - `region_width`: width of the region features that the model reads (`Batch.region_BKD`); 0: it reads none.
      `reads_packed_text`: it reads `Batch.packed` instead of prompt and target.
    - `row_layout`: of a model that learns from rows with several examples each; None: each row is one example.
    - `slots`: the slots that a prompt may have besides images; None: it has no slots.
    - `experts`: configs of further models in its checkpoint, by the path of their parameters, which it does not run.
    - `default_processor`: fields of ProcessorConfig for released weights without a processor config;
      `default_image_fit`: those of its `image_fit`.
    - `rows_can_join`: rows can join a cache while others are decoded (`nn.kv_cache.insert_rows`).
    - `prompt_format`: how the released system is asked, a key of `prompt_formats.SYSTEM_FORMATS`; "": by the question.
    """

    vocab_size: int | None = None
    embedding_rows: int | None = None
    end_token: int = 1
    is_encoder_decoder: bool | None = None
    splices_images: bool = False
    image_token: int | None = None
    box_token: int | None = None
    mask_token: int | None = None
    image_size: int = 0
    detects_phrases: bool = False
    is_dual_encoder: bool = False
    reads_images: bool = True
    reads_question: bool = False
    question_vocab_size: int | None = None
    region_width: int = 0
    reads_packed_text: bool = False
    row_layout: RowLayout | None = None
    slots: SentenceSlots | None = None
    has_features: bool = True
    generates: bool = True
    rows_can_join: bool = True
    experts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    default_processor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    default_image_fit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt_format: str = ""


class VLM:
    """Interface of a vision-language model: a frozen config with pure functions of (params, batch).

    A model implements `init` and `loss`, and those of the other methods that it supports; the defaults raise UserError.
    Code outside `models/` uses only this interface.
    """

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(has_features=False, generates=False)

    def init(self, key: Array, batch: Batch) -> Params:
        """Random parameters; leaves are boxed with their logical axes (see `sharding.init_sharded`)."""
        raise NotImplementedError

    def loss(self, params: Params, batch: Batch, key: Array | None = None) -> tuple[Array, Metrics]:
        """Mean loss of a batch in float32, and metrics; `metrics["weight"]` is the number of tokens in the mean.

        `key` drives dropout; None: evaluation."""
        raise NotImplementedError

    def extract_features(self, params: Params, batch: Batch) -> Any:
        """Outputs of the frozen vision towers, which can be cached and passed as `Batch.features`."""
        raise self._lacks("image features to cache")

    def answer_features(self, params: Params, batch: Batch) -> Any:
        """What answering reads of the images, whatever is asked about them, for `Batch.features` of `prefill`.

        Unlike `extract_features` it may hold outputs of trained parts, so that they run once for an image."""
        return self.extract_features(params, batch)

    def logits(self, params: Params, batch: Batch, key: Array | None = None) -> Array:
        """Logits (B, M, V) in float32; position m predicts target token m."""
        raise self._lacks("answer logits")

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[Array, Cache]:
        """Logits (B, V) of the first answer token, and a cache of the prompt with `cache_length` free slots."""
        raise self._lacks("decoder for generation")

    def extend(self, params: Params, token_B: Array, cache: Cache) -> tuple[Array, Cache]:
        """Logits (B, V) of the token after `token_B`, and the cache with that token."""
        raise self._lacks("decoder for generation")

    def prefill_states(self, params: Params, batch: Batch, cache_length: int) -> tuple[Array, Array, Cache]:
        """As `prefill`, with the last hidden states (B, L, D) of the prompt's tokens in between."""
        raise self._lacks("hidden states of a decoder")

    def extend_candidates(self, params: Params, token_BK: Array, cache: Cache) -> tuple[Array, Array, Any]:
        """Logits (B, K, V) after each of K candidates for one token, their last hidden states (B, K, D), and keys and
        values of theirs for `keep_candidate`. The cache stays without them."""
        raise self._lacks("hidden states of a decoder")

    def keep_candidate(self, cache: Cache, candidates: Any, index_B: Array) -> Cache:
        """The cache with one candidate of each row of what `extend_candidates` returned last."""
        raise self._lacks("hidden states of a decoder")

    def cached_context(self, cache: Cache) -> tuple[Array, Array]:
        """Keys and values (layers, B, N, S, H) of all tokens of a cache, filled or free, which `with_context` sets."""
        raise self._lacks("keys and values of a decoder")

    def with_context(self, cache: Cache, key_value: tuple[Array, Array]) -> Cache:
        """The cache with other keys and values (layers, B, N, S, H)."""
        raise self._lacks("keys and values of a decoder")

    def predict_boxes(self, params: Params, batch: Batch) -> tuple[Array, Array, Array]:
        """Boxes (B, K, 4) in 0..1 at the region queries of the target, their states (B, K, D) and mask (B, K)."""
        raise self._lacks("box head")

    def predict_masks(self, params: Params, batch: Batch, box_BK4, state_BKD, valid_BK=None) -> tuple[Array, Array]:
        """Mask logits (B, K, h, w) and predicted IoUs (B, K) of boxes and the states they were decoded from."""
        raise self._lacks("mask head")

    def weight_map(self) -> tuple[Any, ...]:
        """Mappings between torch tensors and parameters (see `weight_map.WeightMapping`)."""
        raise self._lacks("weight map from torch")

    def _lacks(self, part: str) -> UserError:
        return UserError(f"{type(self).__name__} has no {part}")
