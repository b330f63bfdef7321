# SPDX-License-Identifier: Apache-2.0
"""Captions by a language model that stays as it is, guided by a CLIP: MAGIC and ZeroCap from images to texts.

The two models have their own tokenizers; they meet in the text of the candidates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lionjax.core.types import Batch, UserError
from lionjax.data.tokenizer import Tokenizer
from lionjax.inference.dual_encoder import DualEncoder
from lionjax.inference.guidance import GuidanceConfig, guided_search
from lionjax.inference.model import Model
from lionjax.inference.sampling import end_token_ids
from lionjax.inference.zerocap import Caption, ZeroCapConfig, rank_captions, zerocap

ZEROCAP_PROMPT = "Image of a"
NUM_COMPARED_WORDS = 256  # of the language model, to see whether the two tokenizers spell alike


def magic_captions(
    model: Model, encoder: DualEncoder, image_BE: np.ndarray, prompt: str, config: GuidanceConfig
) -> list[Caption]:
    """A caption by MAGIC for each image embedding; of any norm, so that sums of images are described too.

    `prompt` is read as the model reads prompts, and is not part of the caption; an empty one is the start token. All
    `config.max_new_tokens` are searched, and a caption ends before its first end token. Raises UserError for an empty
    caption, and for models whose texts do not match.
    """
    tokens = _check(model, encoder)
    ids = model.processor.prompt.encode_prompt(prompt) if prompt.strip() else _start_ids(tokens)
    unit_BE = image_BE / np.linalg.norm(image_BE, axis=1, keepdims=True)
    batch = _prompts([ids] * len(image_BE))
    scorer = encoder.embedding_scorer(unit_BE)
    steps = list(
        guided_search(model.vlm, model.params, batch, config, scorer, lambda row: tokens.decode(row, keep_special=True))
    )
    ids_BM = np.stack([step.chosen_ids_B for step in steps], axis=1)
    rows = np.arange(len(ids_BM))
    prob_BM = np.stack([step.confidence[rows, step.chosen_B] for step in steps], axis=1)
    ends = end_token_ids(model.generation_config("image_level"))
    lengths = [next((k for k, i in enumerate(ids) if i in ends), len(ids)) for ids in ids_BM.tolist()]
    texts = [" ".join(tokens.decode(ids[:length]).split()) for ids, length in zip(ids_BM, lengths)]
    _require_text(texts)
    cosine_B = np.einsum("BE,BE->B", unit_BE, encoder.embed_texts(texts))
    return [
        Caption(tuple(ids[:length]), text, float(np.log(prob_M[:length]).mean()), float(cosine))
        for ids, length, text, prob_M, cosine in zip(ids_BM.tolist(), lengths, texts, prob_BM, cosine_B)
    ]


def zerocap_captions(
    model: Model, encoder: DualEncoder, image_BE: np.ndarray, prompt: str, config: ZeroCapConfig
) -> list[list[Caption]]:
    """The captions of ZeroCap's beams for each image embedding, the one that matches the image best first.

    Image embeddings and errors as in `magic_captions`. The prompt is read behind the start token, and the image is
    compared with it and the caption. Without `config.end_token_ids` a caption ends with "." or the model's end token.
    """
    tokens = _check(model, encoder)
    if not config.end_token_ids:
        config = with_end_text(config, model)
    ids = [*_start_ids(tokens), *tokens.encode(prompt)]
    special = frozenset(i for i, text in tokens.added_tokens.items() if tokens.spells_special_token(text))
    ends = frozenset(end_token_ids(model.generation_config("image_level")))

    def candidate_texts(context: Sequence[int], candidates: Sequence[int]) -> list[str]:
        before = [i for i in context if i not in special]
        return tokens.backend.decode_batch([[*before, i] for i in candidates], skip_special_tokens=False)

    def decode(row: Sequence[int]) -> str:
        return " ".join(tokens.backend.decode([i for i in row if i not in ends]).split())

    given = (image_BE, encoder.embed_candidates, candidate_texts, config)
    *_, last = zerocap(model.vlm, model.params, _prompts([ids] * len(image_BE)), *given)
    ranked = rank_captions(last.beams, image_BE, encoder.embed_candidates, decode)
    found = [[caption for caption in captions if caption.text.strip(" .")] for captions in ranked]
    _require_text([captions[0].text if captions else "" for captions in found])
    return [sorted(captions, key=lambda caption: -caption.similarity) for captions in found]


def with_end_text(config: ZeroCapConfig, model: Model, text: str | None = None) -> ZeroCapConfig:
    """The config with the token of a text, and the model's own end tokens, as end tokens.

    None: "." where it is one token. Raises UserError for another text that is not one token.
    """
    tokens = model.processor.tokenizer
    ids = _one_token(tokens, text or ".")
    if not ids and text is not None:
        raise UserError(f"{text!r} is not one token of the language model, which ends a caption; give another --end")
    vocab_size = model.vlm.info.vocab_size or math.inf
    own = [i for i in end_token_ids(model.generation_config("image_level")) if 0 <= i < vocab_size]
    return dataclasses.replace(config, end_token_ids=tuple(dict.fromkeys((*ids, *own))))


def _one_token(tokens: Tokenizer, text: str) -> list[int]:
    """The token of a text, alone or behind a word; [] if it is none or several."""
    if len(alone := tokens.encode(text)) == 1:
        return alone
    last = tokens.encode(f"a{text}")[-1:]
    return last if tokens.backend.decode(last).strip() == text.strip() != "" else []


def _check(model: Model, encoder: DualEncoder) -> Tokenizer:
    """The tokenizer of the language model. Raises UserError for a model that reads images, or other texts than CLIP."""
    if model.vlm.info.reads_images:
        raise UserError(
            f"a {type(model.vlm).__name__} reads images itself; give a language model alone to be guided by a CLIP"
        )
    tokens = model.processor.tokenizer
    check_texts_match(tokens, encoder.tokenizer)
    return tokens


def check_texts_match(language: Tokenizer, scorer: Tokenizer) -> None:
    """Raise UserError unless most words of a language model's tokenizer can be read back from the scorer's.

    Letters and digits count, in lower case; a word is the text of a token with at least two of them.
    """
    ids = sorted(set(language.backend.get_vocab(with_added_tokens=False).values()))
    words = [_letters(text) for text in language.backend.decode_batch([[i] for i in ids])]
    words = sorted({word for word in words if len(word) > 1 and "\ufffd" not in word})
    words = words[:: max(len(words) // NUM_COMPARED_WORDS, 1)]
    known = sum(_letters(scorer.backend.decode(scorer.encode(word))) == word for word in words)
    if 2 * known <= len(words):
        raise UserError(
            f"the CLIP's tokenizer reads {known} of {len(words)} words of the language model's tokenizer, so their "
            "texts cannot be compared; take two models of one language, each with the tokenizer that belongs to it"
        )


def _letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum() or c == "\ufffd")


def _start_ids(tokens: Tokenizer) -> list[int]:
    """What begins a text: the start token, or the end token where there is none, as in GPT-2."""
    return list(tokens.bos_ids) or [tokens.eos_id]


def _prompts(rows: Sequence[Sequence[int]]) -> Batch:
    """A batch of prompts of one length."""
    prompt_BL = jnp.asarray(rows, jnp.int32)
    fields = dict.fromkeys(Batch.__dataclass_fields__)
    return Batch(**fields | {"prompt_BL": prompt_BL, "prompt_mask_BL": jnp.ones_like(prompt_BL)})


def _require_text(texts: Sequence[str]) -> None:
    if empty := [place for place, text in enumerate(texts) if not text.strip()]:
        raise UserError(
            f"the caption of image {empty[0] + 1} of {len(texts)} is empty: the search ended at once; give another "
            "prompt or other weights of the image"
        )
