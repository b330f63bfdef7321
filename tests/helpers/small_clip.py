# SPDX-License-Identifier: Apache-2.0
"""Tiny CLIPs and SigLIPs of transformers, with sizes drawn anew, and inputs that both sides read."""

import json

import numpy as np

from lionjax.data import contrastive_tokenizers

WORDS = ("a", "photo", "of", "cat", "dog", "red", "don't", "2")


def text_sizes(rng, positions: int, **fields) -> dict:
    heads = int(rng.integers(1, 4))
    sizes = {"hidden_size": 4 * heads * int(rng.integers(2, 4)), "num_attention_heads": heads}
    sizes |= {"intermediate_size": int(rng.integers(12, 40)), "num_hidden_layers": int(rng.integers(1, 4))}
    return sizes | {"vocab_size": int(rng.integers(30, 60)), "max_position_embeddings": positions} | fields


def vision_sizes(rng, **fields) -> dict:
    heads, patch = int(rng.integers(1, 4)), int(rng.integers(3, 7))
    sizes = {"hidden_size": 4 * heads * int(rng.integers(2, 4)), "num_attention_heads": heads, "patch_size": patch}
    sizes |= {"intermediate_size": int(rng.integers(12, 40)), "num_hidden_layers": int(rng.integers(1, 4))}
    return sizes | {"image_size": patch * int(rng.integers(2, 5))} | fields


def clip_model(rng, eos_token_id: int | None = None):
    """A CLIPModel with ids above its end token; a checkpoint of old, with 2 in its config, has none above."""
    import transformers

    text = text_sizes(rng, int(rng.integers(6, 12)))
    eos = text["vocab_size"] - 4 if eos_token_id is None else eos_token_id
    text |= {"eos_token_id": eos, "bos_token_id": text["vocab_size"] - 5}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision_sizes(rng), projection_dim=int(rng.integers(5, 20))
    )
    return shaken(transformers.CLIPModel(config))


def siglip_model(rng):
    import transformers

    vision = vision_sizes(rng)
    text = text_sizes(rng, int(rng.integers(6, 12)), projection_size=vision["hidden_size"])
    return shaken(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)))


def shaken(model):
    """The model with all parameters moved: as they begin, biases are zero and norms say nothing."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model.eval()


def inputs(rng, model, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, 3, H, W) and texts (B, L); a text of CLIP ends at its own place and is padded with the end token."""
    side, text = model.config.vision_config.image_size, model.config.text_config
    ids = rng.integers(3, text.vocab_size - 6, (count, text.max_position_embeddings))
    if model.config.model_type == "clip":
        is_old = text.eos_token_id == 2
        end_id = text.vocab_size - 1 if is_old else text.eos_token_id
        ids[:, 1] = end_id - 3 if is_old else end_id + 2
        for row, end in zip(ids, rng.integers(2, ids.shape[1], count)):
            row[end:] = end_id
    return rng.standard_normal((count, 3, side, side)).astype(np.float32), ids


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary with merges of a few words, with their beginnings and ends, in CLIP's order."""
    letters = contrastive_tokenizers._byte_letters()
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            merges += [pair] if pair not in merges else []
            parts = ["".join(pair), *parts[2:]]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def write_clip_tokenizer(folder) -> int:
    """Write vocab.json and merges.txt; the number of tokens."""
    vocabulary, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return len(vocabulary)


def save_clip_tokenizer(folder):
    import transformers

    write_clip_tokenizer(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def save_folder(folder):
    """A released CLIP of sizes drawn anew, with its tokenizer and image processor."""
    import transformers

    rng = np.random.default_rng(int(np.random.default_rng().integers(2**31)))
    num_tokens = len(clip_vocabulary()[0])
    text = text_sizes(rng, 20) | {"vocab_size": num_tokens}
    text |= {"bos_token_id": num_tokens - 2, "eos_token_id": num_tokens - 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision_sizes(rng), projection_dim=9)
    shaken(transformers.CLIPModel(config)).save_pretrained(folder)
    side = config.vision_config.image_size
    transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)
    save_clip_tokenizer(folder)
    return folder
