# SPDX-License-Identifier: Apache-2.0
"""A random T5 in Hugging Face transformers, and the same weights as a TextLM. For tests and benchmarks."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from lionjax import convert
from lionjax.core.types import Batch
from lionjax.models.language import t5
from lionjax.models.language.t5 import T5Config
from lionjax.models.vlm.text_lm import TextLM


def text_batch(prompt_BL, mask_BL) -> Batch:
    """A batch with prompts only."""
    empty_fields = dict.fromkeys(field.name for field in dataclasses.fields(Batch))
    text = {"prompt_BL": jnp.asarray(prompt_BL, jnp.int32), "prompt_mask_BL": jnp.asarray(mask_BL)}
    return Batch(**empty_fields | text)


def random_prompts(seed: int, vocab: int, lengths: tuple[int, ...]):
    """(ids, mask): random prompts of the given lengths, padded on the right with 0, int arrays (B, L)."""
    rng = np.random.default_rng(seed)
    mask_BL = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
    return rng.integers(2, vocab, mask_BL.shape) * mask_BL, mask_BL


def twins(seed: int, c: T5Config, threads: int = 1):
    """(Hugging Face's model, lionjax model, its parameters) with the same random weights; sets torch's threads."""
    import torch
    import transformers

    torch.set_num_threads(threads)  # more threads slow down parallel tests
    torch.manual_seed(seed)
    token_ids = {name: getattr(c, name) for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id")}
    sizes = {"vocab_size": c.vocab_size, "d_model": c.width, "d_kv": c.head_dim, "d_ff": c.mlp_dim}
    config = transformers.T5Config(
        num_layers=c.encoder_depth,
        num_decoder_layers=c.decoder_depth,
        num_heads=c.num_heads,
        relative_attention_num_buckets=c.num_buckets,
        relative_attention_max_distance=c.max_distance,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        **sizes,
        **token_ids,
    )
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    # A freshly initialized T5 repeats one token; larger weights give varied outputs that sometimes end.
    larger = {"relative_attention_bias": 20, "DenseReluDense": 4, ".v.": 4, ".o.": 4}
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            for part, factor in larger.items():
                weight *= factor if part in name else 1
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return theirs, TextLM(c), convert.params_from_state_dict(t5.weight_map(c), state)
