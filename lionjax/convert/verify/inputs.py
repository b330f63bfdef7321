# SPDX-License-Identifier: Apache-2.0
"""The same inputs for our model and for transformers' class of it, for each kind of which there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lionjax.core.types import Batch, UserError

if TYPE_CHECKING:
    from lionjax.models.language.bert import BertConfig
    from lionjax.models.language.decoder import DecoderConfig
    from lionjax.models.language.t5 import T5Config
    from lionjax.models.vision.sam_encoder import SamConfig
    from lionjax.models.vision.swin import SwinConfig
    from lionjax.models.vision.vit import ViTConfig
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

TEXT_LENGTH = 13  # words of the text that is read


@dataclasses.dataclass(frozen=True)
class ComparisonRun:
    """One pass: `ours` on parameters gives results by the names that theirs has; `theirs` are its arguments."""

    module: Any
    method: Callable
    flax_inputs: tuple
    torch_inputs: dict[str, np.ndarray]


def _random_tokens(rng, vocab_size: int, batch_size: int = 2) -> np.ndarray:
    return rng.integers(3, vocab_size, (batch_size, TEXT_LENGTH))


def _decoder_run(c: DecoderConfig, rng) -> ComparisonRun:
    from lionjax.models.language.decoder import Decoder

    def read(module, ids):
        return {"logits": module.logits(module(module.embed(ids), np.ones(ids.shape, bool)))}

    ids = _random_tokens(rng, c.vocab_size)
    return ComparisonRun(Decoder(c), read, (ids,), {"input_ids": ids, "attention_mask": np.ones_like(ids)})


def _t5_run(c: T5Config, rng) -> ComparisonRun:
    from lionjax.models.language.t5 import T5

    def read(module, ids, answer):
        encoded = module.encode(module.embed(ids), np.ones(ids.shape, bool))
        real = np.ones(answer.shape, bool)
        return {"logits": module.decode(answer, real, encoded, np.ones(ids.shape, bool))}

    ids, answer = _random_tokens(rng, c.vocab_size), _random_tokens(rng, c.vocab_size)[:, :7]
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "decoder_input_ids": answer}
    return ComparisonRun(T5(c), read, (ids, answer), given)


def _bert_run(c: BertConfig, rng) -> ComparisonRun:
    from lionjax.models.language.bert import Bert

    def read(module, ids):
        states, first = module(ids, np.ones(ids.shape, bool))
        return {"last_hidden_state": states} | ({"pooler_output": first} if c.pooler else {})

    ids = _random_tokens(rng, c.vocab_size)
    return ComparisonRun(Bert(c), read, (ids,), {"input_ids": ids, "attention_mask": np.ones_like(ids)})


def _random_image(rng, image_size: int) -> np.ndarray:
    return rng.standard_normal((1, image_size, image_size, 3)).astype(np.float32)


def _clip_run(c: ViTConfig, rng) -> ComparisonRun:
    from lionjax.models.vision.vit import ViT

    def read(module, image):
        states, _, first = module(image)
        return {"last_hidden_state": states, "pooler_output": first}

    image = _random_image(rng, c.image_size)
    return ComparisonRun(ViT(c), read, (image,), {"pixel_values": image.transpose(0, 3, 1, 2).copy()})


def _sam_run(c: SamConfig, rng) -> ComparisonRun:
    from lionjax.models.vision.sam_decoder import Sam

    def read(module, image, box):
        masks, scores = module.decode(module.encode(image), *module.prompts(None, None, box, None))
        return {"pred_masks": masks[:, :, 1:], "iou_scores": scores[:, :, 1:]}

    image = _random_image(rng, c.image_size)
    box = np.array([[[0.1, 0.2, 0.6, 0.9]]], np.float32) * c.image_size
    given = {"pixel_values": image.transpose(0, 3, 1, 2).copy(), "input_boxes": box}
    return ComparisonRun(Sam(c), read, (image, box), given)


def _swin_run(c: SwinConfig, rng) -> ComparisonRun:
    from lionjax.models.vision.swin import Swin

    image = _random_image(rng, c.image_size)
    given = {"pixel_values": image.transpose(0, 3, 1, 2).copy()}
    return ComparisonRun(Swin(c), lambda module, image: {"last_hidden_state": module(image)[0]}, (image,), given)


def _prefix_run(c: VisualPrefixLM, rng) -> ComparisonRun:
    """A text with a picture in it; theirs wants as many image tokens as the picture has words."""
    from lionjax.models.vlm.visual_prefix import VisualPrefixLMModule

    if c.image_token_id is None:
        raise UserError("this model has no image token, without which transformers does not run it")
    words = c.qformer.num_query_tokens if c.qformer else c.vision.num_patches + c.keep_class_token
    text = _random_tokens(rng, min(c.language.vocab_size, c.image_token_id))[:1]
    question, answer = (text[:, :5] % (c.qformer.vocab_size if c.qformer else c.language.vocab_size), text[:, 5:9])
    ids = np.insert(text, 1, c.image_token_id, axis=1)
    image = _random_image(rng, c.vision.image_size)

    def read(module, image, ids, question, answer):
        one, real = np.zeros(1, np.int32), np.ones(ids.shape, bool)
        asked = (question, np.ones(question.shape, bool))
        batch = Batch(image, ids, real, *asked, answer, None, None, one, one)
        # The picture's words stand for the token, so the last place is padding.
        x_BLD, mask_BL = (part[:, :-1] for part in module.embed_inputs(batch, None))
        if not c.encodes:
            return {"logits": module.language.logits(module.language(x_BLD, mask_BL))}
        encoded_BLD = module.language.encode(x_BLD, mask_BL)
        said = np.ones(answer.shape, bool)
        return {"logits": module.language.decode(answer, said, encoded_BLD, mask_BL)}

    wide = np.concatenate([ids[:, :1], np.full((1, words), c.image_token_id), ids[:, 2:]], axis=1)
    given = {"pixel_values": image.transpose(0, 3, 1, 2).copy(), "input_ids": wide}
    given["attention_mask"] = np.ones_like(wide)
    if c.qformer and c.qformer.use_text_input:
        given |= {"qformer_input_ids": question, "qformer_attention_mask": np.ones_like(question)}
    if c.encodes:
        given["decoder_input_ids"] = answer
    return ComparisonRun(VisualPrefixLMModule(c), read, (image, ids, question, answer), given)


COMPARISON_RUNS: dict[str, Callable[[Any, Any], ComparisonRun]] = {
    "llama": _decoder_run,
    "opt": _decoder_run,
    "gpt2": _decoder_run,
    "t5": _t5_run,
    "bert": _bert_run,
    "clip": _clip_run,
    "sam": _sam_run,
    "swin": _swin_run,
    "llava": _prefix_run,
    "blip2": _prefix_run,
    "instructblip": _prefix_run,
}
