# SPDX-License-Identifier: Apache-2.0
"""`vlm_info`: the `ModelInfo` of a model with a vision tower `c.vision` and a language model `c.language`."""

from __future__ import annotations

from typing import Any

from lionjax.core.types import ModelInfo
from lionjax.models.language.backend import is_encoder_decoder


def vlm_info(c: Any, **fields: Any) -> ModelInfo:
    """What the model config `c` determines, and `fields`, other fields of ModelInfo.

    A model with a field `image_token_id` splices images into its prompt.
    """
    if hasattr(c, "image_token_id"):
        fields |= {"splices_images": True, "image_token": c.image_token_id}
    return ModelInfo(
        vocab_size=c.language.vocab_size,
        embedding_rows=c.language.padded_vocab_size,
        end_token=c.language.eos_token_id,
        is_encoder_decoder=is_encoder_decoder(c.language),
        image_size=c.vision.image_size,
        **fields,
    )
