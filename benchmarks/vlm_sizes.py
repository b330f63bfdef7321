# SPDX-License-Identifier: Apache-2.0
"""What the random models of `instructblip` and `llava` share: names of sizes, and random batches."""

from __future__ import annotations

import dataclasses

import numpy as np

from lionjax.core.types import IMAGE_LEVEL, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class VlmSizes:
    """Sizes of the vision tower, of the language model and of the batch."""

    image: int
    patch: int = 14
    vision_width: int
    vision_depth: int
    language_width: int
    language_layers: int  # of an encoder, and of a decoder
    head: int = 64  # head dimension of all attention layers
    vocab: int
    batch: int = 8
    prompt: int = 32
    target: int = 16

    @property
    def image_token(self) -> int:
        """The placeholder id that is replaced with the image tokens."""
        return self.vocab - 1

    def random_batch(self, question_length: int = 0, question_vocab: int = 0) -> Batch:
        """A batch of random images and texts of unequal lengths, with questions if they have a length."""
        rng, rows = np.random.default_rng(0), np.arange(self.batch, dtype=np.int32)

        def text(length: int, vocab: int):
            lengths = np.linspace(max(length // 2, 3), length, self.batch).astype(int)
            mask_BL = (np.arange(length) < lengths[:, None]).astype(np.int32)
            return rng.integers(3, vocab - 1, mask_BL.shape).astype(np.int32) * mask_BL, mask_BL

        image_BHWC = rng.standard_normal((self.batch, self.image, self.image, 3), np.float32)
        prompt = text(self.prompt, self.vocab)
        question = text(question_length, question_vocab) if question_length else (None, None)
        target_BM, mask_BM = text(self.target, self.vocab)
        task_B = np.full_like(rows, IMAGE_LEVEL)
        return Batch(image_BHWC, *prompt, *question, target_BM, mask_BM, mask_BM, task_B, rows)
