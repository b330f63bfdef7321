# SPDX-License-Identifier: Apache-2.0
"""A folder with a language model alone continues texts as transformers does: tokens, log-probabilities, text."""

import dataclasses
import random
from pathlib import Path

import jax
import leafwise
import numpy as np
import pytest
import tiny_released

import lionjax
from lionjax import convert
from lionjax.core.types import UserError
from lionjax.data.processor import ImageTextInput
from lionjax.inference import loading
from lionjax.models.language.decoder import TINY_DECODER
from lionjax.models.vlm.text_lm import TextLM

PROMPTS = ("what is the picture?\nthe star is", "the cats")
NEW_TOKENS = 8
T5_FACTORS = {"relative_attention_bias": 20, "DenseReluDense": 4, ".v.": 4, ".o.": 4}
TOKENIZERS = {
    "gpt2": tiny_released.opt_tokenizer,
    "llama": tiny_released.llama_tokenizer,
    "t5": tiny_released.t5_tokenizer,
}


def save(kind: str, folder, seed: int):
    """(model, tokenizer) of transformers with sizes drawn by `seed`, opened from the folder they are saved into."""
    import torch
    import transformers

    draw, tokenizer = random.Random(seed), TOKENIZERS[kind]()
    depth, heads, head_dim = draw.randint(1, 3), draw.choice([2, 4]), draw.choice([4, 8])
    width, vocab = heads * head_dim, len(tokenizer)
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocab, n_positions=64, n_embd=width, n_layer=depth, n_head=heads, bos_token_id=2, eos_token_id=2
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        config = transformers.LlamaConfig(
            vocab_size=vocab,
            intermediate_size=3 * width,
            num_key_value_heads=draw.choice([1, heads]),
            pad_token_id=0,
            **sizes,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        sizes = {"d_model": width, "d_kv": head_dim, "d_ff": 24, "num_layers": depth, "num_heads": heads}
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**tiny_released.T5 | sizes | {"vocab_size": vocab})
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if kind == "t5":  # as it is, it repeats one token
                weight *= next((factor for part, factor in T5_FACTORS.items() if part in name), 1)
            else:
                weight += 0.3 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_language_model_continues_texts_as_transformers_also_after_conversion_both_ways(tmp_path, kind):
    pytest.importorskip("transformers")
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    theirs, tokenizer = save(kind, tmp_path / "theirs", seed)
    model = lionjax.load(tmp_path / "theirs")
    assert isinstance(model.vlm, TextLM) and not model.vlm.info.reads_images
    convert.convert(tmp_path / "theirs", tmp_path / "ours", "jax")
    model.export(tmp_path / "back")
    assert "AutoTokenizer" in (tmp_path / "back" / "README.md").read_text()  # and no image processor
    config = dataclasses.replace(
        model.generation_config("image_level"), max_new_tokens=NEW_TOKENS, output_logprobs=True
    )
    answers = model.complete(PROMPTS, config)
    assert len({token for answer in answers for token in answer.token_ids}) > 1, "one repeated token shows little"
    for prompt, answer in zip(PROMPTS, answers):
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        output = theirs.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=config.pad_token_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
        log_probs = theirs.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)[0].numpy()
        ids = output.sequences[0, -len(log_probs) :].tolist()
        assert list(answer.token_ids) == ids
        np.testing.assert_allclose(answer.token_log_probs, log_probs, atol=1e-4)
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)
    for folder in ("ours", "back"):
        again = lionjax.load(tmp_path / folder).complete(PROMPTS, config)
        assert [(a.text, a.token_log_probs) for a in again] == [(a.text, a.token_log_probs) for a in answers]


@pytest.mark.slow
def test_a_language_model_alone_learns_the_answers_of_a_batch():
    language = dataclasses.replace(TINY_DECODER, width=8, depth=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8)
    vlm = TextLM(language)
    model = loading.from_params(loading.released_experiment(vlm, Path("tiny")), {})
    batch = model.processor.batch([ImageTextInput(np.zeros((1, 1, 3), np.uint8), "a b")], ["c d"], (8,))
    params = leafwise.init_leafwise(vlm.init, jax.random.key(0), batch)
    loss_and_grads = jax.jit(jax.value_and_grad(lambda params: vlm.loss(params, batch)[0]))
    loss, grads = loss_and_grads(params)
    learned, _ = loss_and_grads(jax.tree.map(lambda leaf, grad: leaf - 0.05 * grad, params, grads))
    assert learned < loss
    with pytest.raises(UserError, match="nothing to continue"):
        model.complete([])
