# SPDX-License-Identifier: Apache-2.0
"""Tiny LLaVAs, BLIP-2s and InstructBLIPs of transformers, with sizes drawn anew, and batches that both sides read."""

import dataclasses
import random

import jax
import numpy as np
import pytest
import text_batches
from golden import assert_close
from text_batches import padded

from lionjax import convert
from lionjax.core.types import Batch

SYSTEMS = ("llava", "blip2_opt", "blip2_t5", "blip2_vicuna", "instructblip_t5", "instructblip_vicuna")
IMAGE_TOKEN, PAD, START, END = 46, 0, 1, 2


def seed() -> int:
    return random.SystemRandom().randrange(10**6)


def shaken(model, amount: float = 0.1):
    """Every weight moved off its initial zero or one, so that none can hide; EVA's keys stay without a bias."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(amount * torch.randn_like(parameter))
            if name.endswith("qkv.bias"):
                third = len(parameter) // 3
                parameter[third : 2 * third] = 0
    return model.eval()


def language_settings(kind: str, draw: random.Random) -> dict:
    heads, head, layers = draw.choice([2, 4]), draw.choice([4, 6]), draw.randint(1, 3)
    width, hidden, vocab = heads * head, draw.randint(20, 40), draw.randint(IMAGE_TOKEN + 2, 60)
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    if kind == "t5":
        return ids | {
            "model_type": "t5",
            "vocab_size": vocab,
            "d_model": width,
            "d_kv": head,
            "d_ff": hidden,
            "num_layers": layers,
            "num_heads": heads,
            "num_decoder_layers": draw.randint(1, layers),  # their cache is as deep as the encoder
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }
    if kind == "opt":
        return ids | {
            "model_type": "opt",
            "vocab_size": vocab,
            "hidden_size": width,
            "word_embed_proj_dim": width,
            "ffn_dim": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "max_position_embeddings": 64,
        }
    return ids | {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, heads]),
        "head_dim": head,
        "rms_norm_eps": 1e-5,
    }


def tower_settings(draw: random.Random) -> dict:
    heads = draw.choice([2, 3])
    return {
        "hidden_size": heads * draw.choice([4, 6]),
        "intermediate_size": draw.randint(20, 30),
        "num_hidden_layers": draw.randint(2, 4),
        "num_attention_heads": heads,
        "patch_size": 7,
        "image_size": draw.choice([14, 21]),
    }


def theirs(system: str, draw: random.Random):
    """The model in transformers, its weights random."""
    import torch
    import transformers

    torch.manual_seed(draw.randrange(2**30))
    name, _, language = system.partition("_")
    text = language_settings({"": "llama", "vicuna": "llama"}.get(language, language), draw)
    tower = tower_settings(draw)
    if name == "llava":
        config = transformers.LlavaConfig(
            vision_config=tower | {"model_type": "clip_vision_model"},
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-draw.randint(2, tower["num_hidden_layers"]),
            vision_feature_select_strategy=draw.choice(["default", "full"]),
        )
        return shaken(transformers.LlavaForConditionalGeneration(config))
    heads = draw.choice([2, 3])
    bridge = {
        "vocab_size": 40,
        "hidden_size": heads * 4,
        "num_hidden_layers": draw.randint(2, 4),
        "num_attention_heads": heads,
        "intermediate_size": draw.randint(20, 30),
        "max_position_embeddings": 20,
        "cross_attention_frequency": draw.choice([1, 2]),
        "encoder_hidden_size": tower["hidden_size"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    settings = {
        "vision_config": tower,
        "qformer_config": bridge,
        "text_config": text,
        "num_query_tokens": draw.randint(2, 4),
        "image_token_index": IMAGE_TOKEN,
    }
    prefix = "InstructBlip" if name == "instructblip" else "Blip2"
    config = getattr(transformers, f"{prefix}Config")(**settings)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    return shaken(model)


def batch_of(system, draw: random.Random, rows: int = 3, token: int = IMAGE_TOKEN) -> Batch:
    """Unequal prompts with the picture anywhere in them (in front, where a Q-Former is), and unequal answers."""
    numbers = np.random.default_rng(draw.randrange(2**30))
    side, end = system.vision.image, system.language.end_token

    def words(most, vocab=token):
        return numbers.integers(3, vocab, draw.randint(1, most)).tolist()

    before = [[] if system.qformer else [START, *words(3)] for _ in range(rows)]
    prompt, question, target = (
        padded(texts, 1 + max(map(len, texts)))
        for texts in (
            [[*text, token, *words(5)] for text in before],
            [words(6, 20) for _ in range(rows)],
            [[*words(5), end] for _ in range(rows)],
        )
    )
    image = numbers.standard_normal((rows, side, side, 3)).astype(np.float32)
    return text_batches.batch_of(image, prompt, target, question)


def expanded(system, batch: Batch) -> list[list[int]]:
    """Each row's prompt as transformers wants it: an image token for each of the picture's words."""
    bridge = system.qformer or system.latents
    words = (
        bridge.num_query_tokens + system.add_image_end_token
        if bridge
        else system.vision.num_patches + system.keep_class_token
    )
    words = system.words or words
    texts = []
    for ids, mask in zip(batch.prompt_BL, batch.prompt_mask_BL):
        text = ids[mask.astype(bool)].tolist()
        place = text.index(system.image_token)
        texts.append([*text[:place], *[system.image_token] * words, *text[place + 1 :]])
    return texts


def inputs(system, batch: Batch, answers: bool = True, left: bool = False) -> dict:
    """The batch as arguments of their forward; without answers as those of their `generate`, padded on the left."""
    import torch

    prompts = expanded(system, batch)
    targets = [ids[mask.astype(bool)].tolist() for ids, mask in zip(batch.target_BM, batch.target_mask_BM)]
    encodes = system.is_encoder_decoder
    rows = prompts if encodes or not answers else [p + t for p, t in zip(prompts, targets)]
    length = max(map(len, rows))
    fill = [[PAD] * (length - len(row)) for row in rows]
    ids = [f + row if left else row + f for row, f in zip(rows, fill)]
    mask = [[0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f) for r, f in zip(rows, fill)]
    made = {
        "pixel_values": torch.tensor(batch.image_BHWC.transpose(0, 3, 1, 2).copy()),
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
    }
    if system.qformer and system.qformer.text:
        made |= {
            "qformer_input_ids": torch.tensor(batch.question_BL, dtype=torch.long),
            "qformer_attention_mask": torch.tensor(batch.question_mask_BL, dtype=torch.long),
        }
    if not answers:
        return made
    if encodes:
        labels = np.where(batch.target_mask_BM, batch.target_BM, -100)
    else:
        labels = np.full((len(rows), length), -100)
        for row, (p, t) in enumerate(zip(prompts, targets)):
            labels[row, len(p) : len(p) + len(t)] = t
    return made | {"labels": torch.tensor(labels, dtype=torch.long)}


def answer_logits(system, batch: Batch, logits: np.ndarray) -> list[np.ndarray]:
    """Of their logits those that predict each row's answer."""
    lengths = batch.target_mask_BM.sum(1)
    if system.is_encoder_decoder:
        return [row[:length] for row, length in zip(logits, lengths)]
    starts = [len(prompt) - 1 for prompt in expanded(system, batch)]
    return [row[start : start + length] for row, start, length in zip(logits, starts, lengths)]


def without_token(batch: Batch) -> Batch:
    """The same prompts with nothing where the picture would stand."""
    keep = (batch.prompt_BL != IMAGE_TOKEN) & (batch.prompt_mask_BL == 1)
    ids, mask = padded([ids[kept] for ids, kept in zip(batch.prompt_BL, keep)], batch.prompt_BL.shape[1])
    return dataclasses.replace(batch, prompt_BL=ids, prompt_mask_BL=mask)


def assert_learns_alike(system, params, batch, logits, value, weights, seed):
    """The loss, each row's logits and the norm of every gradient beside torch's, whose backward pass has run.

    `weights`: (name, parameter) of torch. Hands back the gradients under those names.
    """

    def loss(params):
        return system.loss(params, batch)[0], system.logits(params, batch)

    (mine, made), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for row, wanted in enumerate(logits):
        assert_close(made[row, : len(wanted)], wanted, f"logits, seed {seed}")
    assert float(mine) == pytest.approx(value.item(), rel=1e-4), f"seed {seed}"
    grads = convert.state_dict_from_params(system.weight_map(), jax.tree.map(np.asarray, grads))
    for name, weight in weights:
        norm = 0.0 if weight.grad is None else weight.grad.norm().item()
        assert np.linalg.norm(grads[name]) == pytest.approx(norm, rel=1e-3, abs=1e-5), f"{name}, seed {seed}"
    return grads
