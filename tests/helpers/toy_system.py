# SPDX-License-Identifier: Apache-2.0
"""A tiny recurrent system whose logits depend on the prompt and on every token since, and the same in plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.text_t5 import text_batch
from lionjax.core.types import VLM, Cache

VOCAB, WIDTH = 11, 6

read = []  # one entry each time a prompt's reading is traced
steps = []  # one entry each time a token is read, at run time


@dataclasses.dataclass(frozen=True)
class Toy(VLM):
    """`counts_steps` writes to `steps` as the compiled loop runs."""

    counts_steps: bool = False

    def prefill(self, params, batch, cache_length):
        read.append(cache_length)
        mask_BL1 = batch.prompt_mask_BL[..., None]
        context_BD = (params["prompt"][batch.prompt_BL] * mask_BL1).sum(1) / mask_BL1.sum(1)
        rows = len(context_BD)
        said_BV = jnp.zeros((rows, VOCAB), jnp.int32).at[:, 0].set(1)
        state_BD = jnp.tanh(params["token"][0] + context_BD)
        cache = Cache(
            {"state": state_BD[None], "nested": {"said": jnp.tile(said_BV, (2, 1, 1))}},
            {"context": context_BD[None], "nothing": None},
            jnp.ones((), jnp.int32),
        )
        return logits_of(params, state_BD, said_BV), cache

    def extend(self, params, token_B, cache):
        if self.counts_steps:
            jax.debug.callback(lambda: steps.append(1))
        state_BD = cache.generated["state"][0]
        state_BD = params["token"][token_B] + state_BD @ params["again"] + cache.static["context"][0]
        state_BD = jnp.tanh(state_BD)
        said_BV = cache.generated["nested"]["said"][1].at[jnp.arange(len(token_B)), token_B].add(1)
        written = {"state": state_BD[None], "nested": {"said": jnp.tile(said_BV, (2, 1, 1))}}
        return logits_of(params, state_BD, said_BV), dataclasses.replace(cache, generated=written, step=cache.step + 1)


def logits_of(params, state_D, said_V):
    # What was said often is said less.
    return state_D @ params["out"] + params["bias"] - said_V * params["shy"]


def logits_in_numpy(params, prompt, answer) -> np.ndarray:
    """Logits (V,) of the token after `answer`, everything read again."""
    context_D = np.mean([params["prompt"][token] for token in prompt], axis=0)
    state_D, said_V = np.tanh(params["token"][0] + context_D), np.eye(VOCAB)[0]
    for token in answer:
        state_D = np.tanh(params["token"][token] + state_D @ params["again"] + context_D)
        said_V = said_V + np.eye(VOCAB)[token]
    return logits_of(params, state_D, said_V)


def random_params(seed: int) -> dict:
    random = np.random.default_rng(seed)
    shapes = {
        "prompt": (VOCAB, WIDTH),
        "token": (VOCAB, WIDTH),
        "again": (WIDTH, WIDTH),
        "out": (WIDTH, VOCAB),
        "bias": (VOCAB,),
        "shy": (VOCAB,),
    }
    params = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params["bias"][1] += 1.0  # so that most answers end
    return params | {"shy": np.abs(params["shy"])}


PROMPTS = ((3, 4), (5, 6, 7, 8, 9), (2,), (10, 2, 4))


def batch_of(*prompts):
    """Prompts padded on the right."""
    ids_BL = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(ids_BL, prompts):
        row[: len(prompt)] = prompt
    lengths_B = np.array([len(prompt) for prompt in prompts])
    return text_batch(ids_BL, np.arange(ids_BL.shape[1]) < lengths_B[:, None])
