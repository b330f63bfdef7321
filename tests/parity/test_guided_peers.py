# SPDX-License-Identifier: Apache-2.0
"""The peers of the benchmark of guided captions choose the tokens that MAGIC and ZeroCap choose here."""

import numpy as np
import pytest
import small_clip
import tiny_released

from lionjax.inference.guidance import GuidanceConfig
from lionjax.inference.zerocap import ZeroCapConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.slow
def test_both_sides_of_the_benchmark_choose_the_same_tokens():
    from benchmarks import guided

    tokenizer = tiny_released.opt_tokenizer()
    rng = np.random.default_rng(3)
    num_tokens = len(small_clip.clip_vocabulary()[0])
    text = small_clip.text_sizes(rng, 40) | {"vocab_size": num_tokens}
    text |= {"bos_token_id": num_tokens - 2, "eos_token_id": num_tokens - 1}
    sizes = {"vocab_size": len(tokenizer), "n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2}
    sizes |= {"bos_token_id": 2, "eos_token_id": 2}
    clip = {"text_config": text, "vision_config": small_clip.vision_sizes(rng), "projection_dim": 9}

    def write(gpt2_folder, clip_folder):
        tokenizer.save_pretrained(gpt2_folder)
        small_clip.save_clip_tokenizer(clip_folder)

    sides = guided.Sides(*guided.torch_models(sizes, clip), write)
    config = GuidanceConfig(6, 9)
    assert sides.magic(config) == sides.peer.magic(sides.prompt, sides.image_E, config)
    config = ZeroCapConfig(4, 2, 3, 20, temperature=0.05, repetition_penalty=1.2, end_token_ids=(7,))
    beams = sides.zerocap(config)
    for remember in (False, True):
        assert sides.peer.zerocap(sides.prompt, sides.image_E, config, remember) == beams
    assert len({token for beam in beams for token in beam}) > 1, "one repeated token shows little"
