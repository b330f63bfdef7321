# SPDX-License-Identifier: Apache-2.0
"""PaLM-E written down in NumPy from the paper (arXiv 2303.03378), one row at a time, in float64 and without padding.

A row is a list of segments: ("text", ids), ("image", k), ("state", k) or ("object", k). It shares no code with lionjax;
only the layout of the parameter tree is that of `PalmE.init`.
"""

import numpy as np
from scipy.special import erf


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def affine(p, x):
    return x @ p["kernel"].reshape(x.shape[-1], -1) + (p["bias"].ravel() if "bias" in p else 0)


def layer_norm(p, x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def rms_norm(p, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def heads(p, x, count):
    return affine(p, x).reshape(len(x), count, -1).swapaxes(0, 1)  # (heads, tokens, size)


def attend(p, q, k, v, mask):
    weights = softmax(np.where(mask, q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -np.inf))
    out = (weights @ v).swapaxes(0, 1).reshape(q.shape[1], -1)
    kernel = p["kernel"].reshape(out.shape[1], -1)
    return out @ kernel + p.get("bias", 0)


def layer(blocks, index):
    return {name: layer(leaf, index) if isinstance(leaf, dict) else leaf[index] for name, leaf in blocks.items()}


def vit_patches(c, p, image_HWC):
    """The patches of the last block (P, D)."""
    size, side = c.patch_size, c.image_size // c.patch_size
    patches = image_HWC.reshape(side, size, side, size, 3).transpose(0, 2, 1, 3, 4).reshape(side * side, -1)
    x = np.concatenate([p["class_token"][None], affine(p["patch"], patches)]) + p["position"]
    for index in range(c.depth):
        b = layer(p["blocks"], index)
        h = layer_norm(b["norm1"], x, c.norm_eps)
        q, k, v = (heads(b["attention"][name], h, c.num_heads) for name in "qkv")
        x = x + attend(b["attention"]["o"], q, k, v, True)
        h = layer_norm(b["norm2"], x, c.norm_eps)
        x = x + affine(b["mlp"]["down"], gelu(affine(b["mlp"]["up"], h)))
    return x[1:]


def rotate(x, theta):
    """Rotary positions: the two halves of each head turn by position / theta^(2 i / size)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] / theta ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def decoder_logits(c, p, x):
    causal = np.tril(np.ones((len(x), len(x)), bool))
    for index in range(c.depth):
        b = layer(p["blocks"], index)
        h = rms_norm(b["norm1"], x, c.norm_eps)
        q = rotate(heads(b["attention"]["q"], h, c.num_heads), c.rope_theta)
        k, v = (heads(b["attention"][name], h, c.num_kv_heads) for name in "kv")
        k, v = (np.repeat(t, c.num_heads // c.num_kv_heads, axis=0) for t in (rotate(k, c.rope_theta), v))
        x = x + attend(b["attention"]["o"], q, k, v, causal)
        h = rms_norm(b["norm2"], x, c.norm_eps)
        gate = affine(b["mlp"]["gate"], h)
        x = x + affine(b["mlp"]["down"], gate / (1 + np.exp(-gate)) * affine(b["mlp"]["up"], h))
    return rms_norm(p["norm"], x, c.norm_eps) @ p["embedding"]["table"].T


def object_tokens(c, p, image_HWC, mask_HW):
    """One token from the patches under the mask, or all patches of the image that is zero outside of it."""
    if c.object_masking == "pixels":
        return affine(p["object_projector"], vit_patches(c.vision, p["vision"], image_HWC * mask_HW[..., None]))
    size, side = c.vision.patch_size, c.vision.image_size // c.vision.patch_size
    patches, total, area = vit_patches(c.vision, p["vision"], image_HWC), 0, 0
    for index in range(side * side):
        y, x = size * (index // side), size * (index % side)
        share = mask_HW[y : y + size, x : x + size].mean()
        total, area = total + share * patches[index], area + share
    return affine(p["object_projector"], (total / area)[None])


def embed(c, p, segments, images, states, masks):
    """The sentence (L, D): text embeddings and the tokens of the slots, in the order of the segments."""
    parts = []
    for kind, value in segments:
        if kind == "text":
            parts.append(p["language"]["embedding"]["table"][np.array(value)])
        elif kind == "image":
            parts.append(affine(p["projector"], vit_patches(c.vision, p["vision"], images[value])))
        elif kind == "state":
            hidden = gelu(affine(p["state_encoder"]["up"], states[value][None]))
            parts.append(affine(p["state_encoder"]["down"], hidden).reshape(c.num_state_tokens, -1))
        else:
            parts.append(object_tokens(c, p, images[0], masks[value]))
    return np.concatenate(parts)


def answer_logits(c, p, row, answer):
    """Logits (M, V) that predict each token of the answer; `row`: arguments of `embed` after `p`."""
    sentence = embed(c, p, *row)
    x = np.concatenate([sentence, p["language"]["embedding"]["table"][np.array(answer)]])
    return decoder_logits(c.language, p["language"], x)[len(sentence) - 1 : -1]


def loss(c, p, rows, answers):
    """Mean cross entropy over all tokens of the answers; nothing of the sentences is in it."""
    terms = []
    for row, answer in zip(rows, answers):
        probs = softmax(answer_logits(c, p, row, answer))
        terms.extend(-np.log(probs[np.arange(len(answer)), answer]))
    return np.mean(terms)
