# SPDX-License-Identifier: Apache-2.0
"""A tiny T5 that generates, in torch and here."""

import numpy as np

from lionjax.models.language.t5 import T5Config

TINY = T5Config(
    vocab_size=23,
    width=16,
    head_dim=4,
    num_heads=3,
    mlp_dim=24,
    encoder_depth=2,
    decoder_depth=2,
    num_buckets=8,
    max_distance=16,
)


def words(generated) -> list[list[int]]:
    """Each row up to and with its end."""
    ids_BM, length_B = np.asarray(generated.ids_BM), np.asarray(generated.length_B)
    return [ids[:length].tolist() for ids, length in zip(ids_BM, length_B)]
