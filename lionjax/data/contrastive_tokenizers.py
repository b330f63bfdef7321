# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of contrastive text towers: CLIP's byte-pair encoding (arXiv 2103.00020), and SigLIP's SentencePiece.

CLIP's ids equal those of transformers' CLIPTokenizer. SigLIP's file is a SentencePiece Unigram, whose text is lower
case without punctuation.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORD_END = "</w>"
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
OPENAI_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"  # of OpenAI's code
OPENAI_NUM_MERGES = 48894
PUNCTUATION = r"[!-/:-@\[-`{-~]"


def clip_backend(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's tokenizer: lower case, words that end in `</w>`, start and end token around each text."""
    bpe = models.BPE(
        dict(vocabulary),
        list(merges),
        continuing_subword_prefix="",
        end_of_word_suffix=CLIP_WORD_END,
        unk_token=CLIP_END,
    )
    backend = tokenizers.Tokenizer(bpe)
    steps = [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    backend.normalizer = normalizers.Sequence(steps)
    words = pre_tokenizers.Split(tokenizers.Regex(CLIP_SPLIT), "removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(CLIP_WORD_END, " ")])
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (CLIP_START, CLIP_END)])
    start, end = ((text, vocabulary[text]) for text in (CLIP_START, CLIP_END))
    backend.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return backend


def openai_clip_backend(path: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer from the merges that OpenAI's code ships, which imply its vocabulary."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1:]
    merges = [tuple(line.split()) for line in itertools.islice(lines, OPENAI_NUM_MERGES) if line]
    letters = _byte_letters()
    pieces = [*letters, *(letter + CLIP_WORD_END for letter in letters), *map("".join, merges), CLIP_START, CLIP_END]
    return clip_backend({piece: number for number, piece in enumerate(pieces)}, merges)


def _byte_letters() -> list[str]:
    """The letters of byte-level BPE in OpenAI's order: printable bytes as they are, then a letter for each other."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + number) for number in range(256 - len(printable)))]


def siglip_backend(
    pieces: Sequence[tuple[str, float]], unk_id: int, charsmap: bytes, lower: bool
) -> tokenizers.Tokenizer:
    """SigLIP's tokenizer of a SentencePiece Unigram, whose ids are the places of the pieces."""
    backend = tokenizers.Tokenizer(models.Unigram(list(pieces), unk_id=unk_id, byte_fallback=False))
    steps = [
        *([normalizers.Lowercase()] if lower else []),
        normalizers.Replace(tokenizers.Regex(PUNCTUATION), ""),
        *([normalizers.Precompiled(charsmap)] if charsmap else []),
        normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
        normalizers.Strip(),
        normalizers.Prepend("\u2581"),
        normalizers.Replace(" ", "\u2581"),
    ]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["</s>", pieces[unk_id][0]])
    return backend
