# SPDX-License-Identifier: Apache-2.0
"""Random inputs for a model and its transformers class, one `ComparisonRun` per checkpoint format."""

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
    from lionjax.models.vision.grounding_dino import GroundingDinoConfig
    from lionjax.models.vision.sam_encoder import SamConfig
    from lionjax.models.vision.swin import SwinConfig
    from lionjax.models.vision.vit import ViTConfig
    from lionjax.models.vlm.clip import Clip
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

TEXT_LENGTH = 13  # tokens


@dataclasses.dataclass(frozen=True)
class ComparisonRun:
    """One forward pass of both models."""

    module: Any  # the Flax module
    method: Callable  # (module, *flax_inputs) -> {name of a transformers output: array}
    flax_inputs: tuple
    torch_inputs: dict[str, np.ndarray]  # keyword arguments of the torch model


def _random_tokens(rng, vocab_size: int, batch_size: int = 2) -> np.ndarray:
    return rng.integers(3, vocab_size, (batch_size, TEXT_LENGTH))


def _decoder_run(c: DecoderConfig, rng) -> ComparisonRun:
    from lionjax.models.language.decoder import Decoder

    def forward(module, ids):
        return {"logits": module.logits(module(module.embed(ids), np.ones(ids.shape, bool)))}

    ids = _random_tokens(rng, c.vocab_size)
    return ComparisonRun(Decoder(c), forward, (ids,), {"input_ids": ids, "attention_mask": np.ones_like(ids)})


def _t5_run(c: T5Config, rng) -> ComparisonRun:
    from lionjax.models.language.t5 import T5

    def forward(module, ids, answer):
        encoded = module.encode(module.embed(ids), np.ones(ids.shape, bool))
        answer_mask = np.ones(answer.shape, bool)
        return {"logits": module.decode(answer, answer_mask, encoded, np.ones(ids.shape, bool))}

    ids, answer = _random_tokens(rng, c.vocab_size), _random_tokens(rng, c.vocab_size)[:, :7]
    torch_inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "decoder_input_ids": answer}
    return ComparisonRun(T5(c), forward, (ids, answer), torch_inputs)


def _bert_run(c: BertConfig, rng) -> ComparisonRun:
    from lionjax.models.language.bert import Bert

    def forward(module, ids):
        states, first = module(ids, np.ones(ids.shape, bool))
        return {"last_hidden_state": states} | ({"pooler_output": first} if c.pooler else {})

    ids = _random_tokens(rng, c.vocab_size)
    return ComparisonRun(Bert(c), forward, (ids,), {"input_ids": ids, "attention_mask": np.ones_like(ids)})


def _random_image(rng, image_size: int) -> np.ndarray:
    return rng.standard_normal((1, image_size, image_size, 3)).astype(np.float32)


def _clip_run(c: ViTConfig, rng) -> ComparisonRun:
    from lionjax.models.vision.vit import ViT

    def forward(module, image):
        states, _, first = module(image)
        return {"last_hidden_state": states, "pooler_output": first}

    image = _random_image(rng, c.image_size)
    return ComparisonRun(ViT(c), forward, (image,), {"pixel_values": image.transpose(0, 3, 1, 2).copy()})


def _two_tower_run(c: Clip, rng) -> ComparisonRun:
    """Images and texts; every text has the id that CLIP pools at."""
    from lionjax.models.vlm.clip import ClipModule

    def forward(module, image, ids):
        image, text = module.embed_images(image), module.embed_texts(ids)
        return {"image_embeds": image, "text_embeds": text, "logits_per_image": module.similarity(image, text)}

    image = _random_image(rng, c.vision.image_size)
    ids = rng.integers(3, c.text.vocab_size - 1, (2, c.text.max_positions))
    ids[:, -2] = c.text.eos_token_id
    torch_inputs = {"pixel_values": image.transpose(0, 3, 1, 2).copy(), "input_ids": ids}
    return ComparisonRun(ClipModule(c), forward, (image, ids), torch_inputs)


def _sam_run(c: SamConfig, rng) -> ComparisonRun:
    from lionjax.models.vision.sam_decoder import Sam

    def forward(module, image, box):
        masks, scores = module.decode(module.encode(image), *module.prompts(None, None, box, None))
        return {"pred_masks": masks[:, :, 1:], "iou_scores": scores[:, :, 1:]}

    image = _random_image(rng, c.image_size)
    box = np.array([[[0.1, 0.2, 0.6, 0.9]]], np.float32) * c.image_size
    torch_inputs = {"pixel_values": image.transpose(0, 3, 1, 2).copy(), "input_boxes": box}
    return ComparisonRun(Sam(c), forward, (image, box), torch_inputs)


def _swin_run(c: SwinConfig, rng) -> ComparisonRun:
    from lionjax.models.vision.swin import Swin

    image = _random_image(rng, c.image_size)
    torch_inputs = {"pixel_values": image.transpose(0, 3, 1, 2).copy()}
    return ComparisonRun(Swin(c), lambda module, image: {"last_hidden_state": module(image)[0]}, (image,), torch_inputs)


def _grounding_dino_run(c: GroundingDinoConfig, rng) -> ComparisonRun:
    """An image with more positions than queries, and a text of two phrases; nothing is padding.

    transformers pads its logits to `max_text_len`; their two factors are compared instead.
    """
    from lionjax.models.vision.grounding_dino import GroundingDino, example_inputs

    def forward(module, *inputs):
        out = module(*inputs)
        return {"pred_boxes": out.boxes_BQ4, "last_hidden_state": out.features_BQD[..., :-4]}

    height = max(example_inputs(c)[0].shape[1], 128)  # more than one position on the last level, for torch's norm
    image = rng.standard_normal((1, height, height + 32, 3)).astype(np.float32)
    first, last, stop, _ = c.delimiter_ids
    words = rng.integers(3, min(c.delimiter_ids), 5)
    ids = np.array([[first, *words[:2], stop, *words[2:], stop, last]])
    masks = np.ones(image.shape[:3], bool), np.ones(ids.shape, bool)
    torch_inputs = {"pixel_values": image.transpose(0, 3, 1, 2).copy(), "input_ids": ids}
    torch_inputs |= {"pixel_mask": masks[0].astype(np.int64), "attention_mask": masks[1].astype(np.int64)}
    return ComparisonRun(GroundingDino(c), forward, (image, masks[0], ids, masks[1]), torch_inputs)


def _prefix_run(c: VisualPrefixLM, rng) -> ComparisonRun:
    """A text with an image in it; transformers expects as many image tokens as the image has features."""
    from lionjax.models.vlm.visual_prefix import VisualPrefixLMModule

    if c.image_token_id is None:
        raise UserError("image_token_id is None; transformers needs an image token to run this model")
    num_image_tokens = c.qformer.num_query_tokens if c.qformer else c.vision.num_patches + c.keep_class_token
    text = _random_tokens(rng, min(c.language.vocab_size, c.image_token_id))[:1]
    question, answer = (text[:, :5] % (c.qformer.vocab_size if c.qformer else c.language.vocab_size), text[:, 5:9])
    ids = np.insert(text, 1, c.image_token_id, axis=1)
    image = _random_image(rng, c.vision.image_size)

    def forward(module, image, ids, question, answer):
        zeros, mask = np.zeros(1, np.int32), np.ones(ids.shape, bool)
        question_inputs = (question, np.ones(question.shape, bool))
        batch = Batch(image, ids, mask, *question_inputs, answer, None, None, zeros, zeros)
        # The image features replace the image token, so the last position is padding.
        x_BLD, mask_BL = (part[:, :-1] for part in module.embed_inputs(batch, None))
        if not c.is_encoder_decoder:
            return {"logits": module.language.logits(module.language(x_BLD, mask_BL))}
        encoded_BLD = module.language.encode(x_BLD, mask_BL)
        answer_mask = np.ones(answer.shape, bool)
        return {"logits": module.language.decode(answer, answer_mask, encoded_BLD, mask_BL)}

    expanded_ids = np.concatenate([ids[:, :1], np.full((1, num_image_tokens), c.image_token_id), ids[:, 2:]], axis=1)
    torch_inputs = {"pixel_values": image.transpose(0, 3, 1, 2).copy(), "input_ids": expanded_ids}
    torch_inputs["attention_mask"] = np.ones_like(expanded_ids)
    if c.qformer and c.qformer.use_text_input:
        torch_inputs |= {"qformer_input_ids": question, "qformer_attention_mask": np.ones_like(question)}
    if c.is_encoder_decoder:
        torch_inputs["decoder_input_ids"] = answer
    return ComparisonRun(VisualPrefixLMModule(c), forward, (image, ids, question, answer), torch_inputs)


COMPARISON_RUNS: dict[str, Callable[[Any, Any], ComparisonRun]] = {
    "llama": _decoder_run,
    "opt": _decoder_run,
    "gpt2": _decoder_run,
    "t5": _t5_run,
    "bert": _bert_run,
    "clip": _clip_run,
    "clip_model": _two_tower_run,
    "siglip": _two_tower_run,
    "sam": _sam_run,
    "swin": _swin_run,
    "grounding-dino": _grounding_dino_run,
    "llava": _prefix_run,
    "blip2": _prefix_run,
    "instructblip": _prefix_run,
}
