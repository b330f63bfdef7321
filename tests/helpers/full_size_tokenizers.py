# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers of the kinds that the full-size configs name, and models with a vocabulary as small."""

import dataclasses
import functools
import json
from pathlib import Path

import small_clip
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lionjax.core.prompt_formats import SYSTEM_FORMATS
from lionjax.data import templates

TAGS = "According to , you are allowed to use or partially use the following tags: [red, disc]."
LOCATIONS = tuple(f"<patch_index_{i:04d}>" for i in range(1024))
GROUNDING = ("<image>", "</image>", "<grounding>", "<phrase>", "</phrase>", "<object>", "</object>")
SHIKRA_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
# {folder in weights/: (kind, tokens added to it, size of the published tokenizer without them)}
FOLDERS = {
    **dict.fromkeys(("vicuna_7b", "vicuna_13b", "llama_7b"), ("llama", ("<image>", "<pad>"), 32000)),
    "palm_8b": ("llama", (), 256_000),  # unpublished: SentencePiece of this size
    "vicuna_7b_shikra": ("llama", SHIKRA_TOKENS, 32000),
    "vicuna_7b_nextchat": ("llama", (*SHIKRA_TOKENS, "<at>", "<boxes>"), 32000),
    **dict.fromkeys(
        ("llava_lightning_7b", "llava_lightning_13b"), ("llama", ("[SEG]", "<im_start>", "<im_end>"), 32000)
    ),
    **dict.fromkeys(("vicuna_7b_v1_1", "vicuna_13b_v1_1"), ("llama", ("[PAD]",), 32000)),
    **dict.fromkeys(("flan_t5_xl", "flan_t5_xxl"), ("t5", (), 32100)),
    "opt_2_7b": ("opt", (), 50265),
    **dict.fromkeys(("mpt_7b", "mpt_1b"), ("neox", ("<|endofchunk|>", "<image>", "<PAD>"), 50277)),
    "kosmos2": ("kosmos", (*GROUNDING, *LOCATIONS), 65037 - len(GROUNDING) - len(LOCATIONS)),
    "smollm2_135m": ("smollm", (), 49152),
    "bert_base_uncased": ("bert", (), 30522),
    "clip_vit_b32": ("clip", (), 49408),
}
SPECIAL = {
    "llama": ("<unk>", "<s>", "</s>"),
    "t5": ("<pad>", "</s>", "<unk>"),
    "opt": ("<s>", "<pad>", "</s>", "<unk>"),
    "neox": ("<|endoftext|>", "<|padding|>"),
    "kosmos": ("<s>", "<pad>", "</s>", "<unk>"),
    "smollm": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}
NAMES = {  # of the special tokens, in tokenizer_config.json
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
    "t5": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "opt": {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"},
    "neox": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "kosmos": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "smollm": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
}
STARTS = {"llama": "<s>", "opt": "</s>", "kosmos": "<s>"}  # what the post-processor puts before a text
SPIECE = "\u2581"


def corpus(texts: list[str]) -> list[str]:
    """The texts of all prompt formats and question templates, and `texts`; each often enough to become whole words."""
    formats = [text for kind in SYSTEM_FORMATS.values() for text in kind.processor.values() if isinstance(text, str)]
    groups = [value for name, value in vars(templates).items() if name.isupper() and isinstance(value, tuple)]
    questions = [text for group in groups for text in group if isinstance(text, str)]
    return [*formats, *questions, *texts, TAGS] * 3


@functools.cache
def byte_level(special: tuple[str, ...], texts: tuple[str, ...]) -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*special], initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


@functools.cache
def llama(special: tuple[str, ...], texts: tuple[str, ...]) -> str:
    """SentencePiece's BPE with byte fallback, as a tokenizer.json."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPIECE), normalizers.Replace(" ", SPIECE)])
    backend.pre_tokenizer = pre_tokenizers.Split(SPIECE, "merged_with_next")
    parts = [decoders.Replace(SPIECE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1100, special_tokens=tokens))
    tree = json.loads(backend.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in special]
    tree["pre_tokenizer"] = None  # a merge may not cross words, which none of those found does
    return json.dumps(tree)


@functools.cache
def unigram(special: tuple[str, ...], texts: tuple[str, ...]) -> str:
    """SentencePiece's Unigram of whole words and single characters, with T5's sentinels behind them."""
    words = sorted({word for text in texts for word in text.split()})
    characters = sorted({character for word in words for character in word} | set("0123456789.,?!'"))
    pieces = [(token, 0.0) for token in special] + [(f"{SPIECE}{word}", -5.0) for word in words]
    known = {piece for piece, _ in pieces}
    pieces += [(piece, -10.0) for piece in (SPIECE, *characters) if piece not in known]
    sentinels = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    pieces += [(token, 0.0) for token in sentinels]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>")))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([*special, *sentinels])
    return backend.to_str()


def build(kind: str, added: tuple[str, ...], texts: list[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a kind with tokens added behind it."""
    maker = {"llama": llama, "kosmos": llama, "t5": unigram}.get(kind, byte_level)
    backend = tokenizers.Tokenizer.from_str(maker(SPECIAL[kind], tuple(corpus(texts))))
    backend.add_special_tokens([*added])
    if kind == "t5":
        backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    elif start := STARTS.get(kind):
        token = (start, backend.token_to_id(start))
        backend.post_processor = processors.TemplateProcessing(f"{start} $A", special_tokens=[token])
    return backend


def write_bert(folder: Path, texts: list[str]) -> int:
    """vocab.txt of BERT's WordPiece; its size."""
    words = {word.strip("{}[].,?!:'\"()").lower() for text in corpus(texts) for word in text.split()}
    characters = {character for word in words for character in word} | set(
        "0123456789abcdefghijklmnopqrstuvwxyz.,?!'[]"
    )
    pieces = dict.fromkeys(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    pieces |= dict.fromkeys([*sorted(characters), *(f"##{c}" for c in sorted(characters)), *sorted(words - {""})])
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return len(pieces)


def write(folder: str, texts: list[str]) -> int:
    """Write the tokenizer of weights/`folder`; how many tokens fewer than the published one it has."""
    path = Path("weights") / folder
    path.mkdir(parents=True, exist_ok=True)
    kind, added, published = FOLDERS[folder]
    if kind == "bert":
        return published - write_bert(path, texts)
    if kind == "clip":
        return published - small_clip.write_clip_tokenizer(path)
    backend = build(kind, added, texts)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(NAMES[kind]))
    return published + len(added) - backend.get_vocab_size()


def with_vocabulary(model, fewer: int, fewer_question_tokens: int = 0):
    """A model config whose vocabulary has `fewer` tokens, and with it the ids at its end; the Q-Former's likewise."""
    changes = {}
    for name, value in vars(model).items():
        if dataclasses.is_dataclass(value):
            changes[name] = with_vocabulary(value, fewer_question_tokens if name == "qformer" else fewer)
        elif name in ("vocab_size", "num_frozen_embeddings") or name.endswith("token_id"):
            changes[name] = value - fewer if value is not None and value > fewer else value
    return dataclasses.replace(model, **changes)
