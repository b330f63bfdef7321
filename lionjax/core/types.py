# SPDX-License-Identifier: Apache-2.0
"""What every other file agrees on: a batch, a cache, and the interface of a model.

One key of letters is used in the whole project, at the end of names:
`B` batch, `L` text length, `M` answer length, `S` keys, `P` patches, `Q` queries, `T` taps, `D` width,
`F` hidden, `N` heads, `H` head size, `V` vocabulary, `K` boxes, `C` channels, `A` adapters.
Pictures are `image_BHWC`, boxes `x0 y0 x1 y1` in 0..1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import jax

from lionjax.core.errors import UserError

T = TypeVar("T")
Array = Any  # a numpy or jax array; shapes stand in the names
Params = dict[str, Any]  # nested dict of arrays; a leaf's path is its name, joined by "/"
Metrics = dict[str, Any]

REGION_LEVEL, IMAGE_LEVEL = 0, 1  # rows of the task router, in LION's order
CATEGORIES = ("region_level", "image_level")


@dataclass_transform(frozen_default=True)
def pytree_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are arrays or trees of arrays."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree_dataclass
class Batch:
    """What data makes and models read. Text is padded on the right; masks are 1 on real tokens.

    An encoder-decoder reads the prompt in its encoder and the target in its decoder; a decoder-only model reads
    picture words, prompt and target in one row. `features`, when present, holds what a frozen tower made of the
    pictures (so that the tower need not run), and `image_BHWC` may then be None.
    """

    image_BHWC: Array  # float32, normalised
    prompt_BL: Array  # int32, ids of the language model's tokenizer
    prompt_mask_BL: Array
    question_BL: Array  # int32, the bare question in the Q-Former's tokenizer
    question_mask_BL: Array
    target_BM: Array  # int32, the answer, closed by its end token
    target_mask_BM: Array
    loss_mask_BM: Array  # 1 where a target token is learned
    task_B: Array  # int32, row of the task router: REGION_LEVEL or IMAGE_LEVEL
    record_B: Array  # int32, which record of the mixture each row came from
    boxes_BK4: Array = None  # float32 in 0..1
    boxes_mask_BK: Array = None
    masks_BKHW: Array = None  # bool, of boxes_BK4
    features: Any = None
    sam_image_BHWC: Array = None  # float32, the same pictures at SAM's size, mean and deviation
    masks_mask_BK: Array = None  # which of the masks are known; None: those of all real boxes
    dataset_B: Array = None  # int32, which entry of the stage's mixture each row came from


@pytree_dataclass
class Cache:
    """What decoding remembers. Every leaf has layers on axis 0 and the batch on axis 1.

    `written` grows with each token and follows its beam; `fixed` (an encoder's keys and values, masks) is the same
    for all beams of one prompt; `read` too, and has one row for all of them. `step` counts the tokens read so far.
    """

    generated: Any
    static: Any
    step: Array  # int32 scalar
    prompt: Any = None


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What code outside `models/` needs to know of a model; `VLM.info` gives it.

    `vocab_size` is the language model's, `embedding_rows` that of its table with the rows that pad it for a mesh. None
    where a model has none of the kind. `image_token` stands in a prompt for an image (`splices_images`; it need not be
    in the vocabulary). `reads_question`: a Q-Former reads the question in a tokenizer of its own.
    `default_processor`: fields of ProcessorConfig for released weights that come without one.
    """

    vocab_size: int | None = None
    embedding_rows: int | None = None
    end_token: int = 1
    is_encoder_decoder: bool | None = None
    splices_images: bool = False
    image_token: int | None = None
    box_token: int | None = None
    image_size: int = 0
    reads_question: bool = False
    has_features: bool = True
    generates: bool = True
    default_processor: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class VLM:
    """A vision-language model: sizes in a frozen dataclass, and pure functions of (params, batch).

    A model implements `init` and `loss`, and of the rest what it can do; what it cannot raises UserError. Code outside
    `models/` uses nothing else of a model.
    """

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(has_features=False, generates=False)

    def init(self, key: Array, batch: Batch) -> Params:
        """Parameters from a random key. Leaves carry their logical axes (see `sharding.init`)."""
        raise NotImplementedError

    def loss(self, params: Params, batch: Batch, key: Array | None = None) -> tuple[Array, Metrics]:
        """Mean loss of a batch in float32, and metrics; `metrics["weight"]` is the number of tokens behind the mean.

        `key` drives dropout; None means evaluation."""
        raise NotImplementedError

    def extract_features(self, params: Params, batch: Batch) -> Any:
        """Outputs of the frozen vision towers, which may be cached and passed as `Batch.features`."""
        raise self._lacks("image features to cache")

    def logits(self, params: Params, batch: Batch, key: Array | None = None) -> Array:
        """(B, M, V) in float32; row m predicts target m."""
        raise self._lacks("likelihood of a given answer")

    def prefill(self, params: Params, batch: Batch, cache_length: int) -> tuple[Array, Cache]:
        """Read the prompt: logits (B, V) of the first answer token, and a cache with room for `cache_length` tokens."""
        raise self._lacks("decoder that could generate")

    def extend(self, params: Params, token_B: Array, cache: Cache) -> tuple[Array, Cache]:
        """Read one more token per row: logits (B, V) of the next one."""
        raise self._lacks("decoder that could generate")

    def predict_boxes(self, params: Params, batch: Batch) -> tuple[Array, Array, Array]:
        """Boxes (B, K, 4) at the region queries of the given answers, their states (B, K, D), and which are real."""
        raise self._lacks("box head")

    def predict_masks(self, params: Params, batch: Batch, box_BK4, state_BKD, valid_BK=None) -> tuple[Array, Array]:
        """Mask logits (B, K, h, w) and predicted IoUs (B, K) of boxes and the states that they were decoded from."""
        raise self._lacks("mask head")

    def weight_map(self) -> tuple[Any, ...]:
        """The table of the original's tensor names (see `weight_map.Row`)."""
        raise self._lacks("table of torch names")

    def _lacks(self, part: str) -> UserError:
        return UserError(f"{type(self).__name__} has no {part}")
