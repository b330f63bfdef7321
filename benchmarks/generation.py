# SPDX-License-Identifier: Apache-2.0
"""Generation with a cache: tokens a second against Hugging Face's, same weights, same run, identical ids.

python -m benchmarks.generation [--width 256 --vocab 32128 --beams 1 5 ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time

import jax
import numpy as np

from benchmarks.text_t5 import random_prompts, text_batch, twins
from lionjax.generate import GenerateConfig, generate
from lionjax.language.t5 import TINY_T5, T5Config

SIZES = {
    # The one that ships, with the activation that Hugging Face has.
    "tiny": dataclasses.replace(TINY_T5, activation="gelu_tanh"),
    "wide": T5Config(
        vocab=8192, width=256, head=64, heads=4, hidden=1024, encoder_layers=4, decoder_layers=4
    ),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rows", type=int, default=8, help="prompts in the batch")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    import torch

    asked, cores = arguments(), len(os.sched_getaffinity(0))
    c = SIZES[asked.size]
    print(f"T5 {asked.size}, {asked.rows} prompts, {asked.tokens} tokens each, {cores} cores")
    theirs, system, params = twins(0, c, threads=cores)
    params = jax.device_put(params)
    lengths = tuple(np.linspace(asked.prompt // 4, asked.prompt, asked.rows).astype(int))
    ids_BL, mask_BL = random_prompts(0, c.vocab, lengths)
    ids, mask = torch.tensor(ids_BL), torch.tensor(mask_BL)
    batch = text_batch(ids_BL, mask_BL)
    for beams in asked.beams:
        # No end token, so that both do the same amount of work.
        config = GenerateConfig(max_new_tokens=asked.tokens, beams=beams, eos=-1)

        def ours(config=config):
            return np.asarray(generate(system, params, batch, config).ids_BM)

        def peer(config=config):
            with torch.inference_mode():
                made = theirs.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    num_beams=config.beams,
                    do_sample=False,
                    eos_token_id=None,
                    max_new_tokens=config.max_new_tokens,
                )
            return made[:, 1:].numpy()

        compare(f"beams {beams}", ours, peer, asked.rows * asked.tokens, asked.repeats)


def compare(name: str, ours, peer, tokens: int, repeats: int) -> None:
    """Both in turn, `repeats` times after a warm-up; the best of each. Raises AssertionError when their ids differ."""
    begun = time.perf_counter()
    made = ours()
    first = time.perf_counter() - begun
    np.testing.assert_array_equal(made, peer(), err_msg=f"{name}: ids differ from Hugging Face's")
    seconds = {"lionjax": [], "Hugging Face": []}
    for _ in range(repeats):
        for who, run in zip(seconds, (ours, peer)):
            begun = time.perf_counter()
            run()
            seconds[who].append(time.perf_counter() - begun)
    mine, other = (min(taken) for taken in seconds.values())
    print(
        f"{name}: lionjax {tokens / mine:,.0f} tokens/s (first call {first:.1f} s), "
        f"Hugging Face {tokens / other:,.0f}; ratio {other / mine:.2f}, ids identical",
        flush=True,
    )


if __name__ == "__main__":
    main()
