# SPDX-License-Identifier: Apache-2.0
"""Makes the tokenizers shipped with the package: `python -m lionjax.tiny.tokenizer`.

A BPE tokenizer with byte fallback, 1,024 tokens and T5's first three ids. It is trained on a page of text
(assets/tokenizer_text.txt) and on boxes, not on generated tasks, so that changes of the tasks do not change any id.

In a box, the first two decimals of each edge have their own tokens: the 3 of a left edge 0.3.. is another token than
the 3 of a top edge, though both decode to "3". A model of two million parameters learns eight tokens per digit in far
fewer steps than eight meanings of one token that depend on the position in the box.

A WordPiece vocabulary as BERT's, for detectors and MQ-Formers: the words of the same page, characters, and numbers of
one and two digits.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lionjax.data.tokenizer import (
    SPECIAL_TOKENS,
    SPIECE_UNDERLINE,
    TINY_TOKENIZER_FILE,
    TINY_VOCAB_SIZE,
    TINY_WORDPIECE_FILE,
)

CORPUS_FILE = TINY_TOKENIZER_FILE.parent / "tokenizer_text.txt"
# Private characters replace decimals and separators, by their position in a box, before the text is tokenized.
FIRST_PRIVATE = 0x10F000
BOX_DECIMALS = tuple(
    (edge, decimal, str(digit), chr(FIRST_PRIVATE + 32 * edge + 16 * decimal + digit))
    for edge in range(4)
    for decimal in range(2)
    for digit in range(10)
)
BOX_SEPARATORS = tuple(
    (edge, f",{whole}.", chr(FIRST_PRIVATE + 128 + 2 * edge + whole)) for edge in range(1, 4) for whole in range(2)
)
PRIVATE_RANGE = f"{chr(FIRST_PRIVATE)}-{chr(FIRST_PRIVATE + 0xFF)}"

# Pre-tokenization: separators of a box, single digits, words, single punctuation marks, single spaces.
SPLIT_PATTERN = "|".join(
    (
        rf"{SPIECE_UNDERLINE}?\[[01]\.(?=[\d{PRIVATE_RANGE}])|,[01]\.(?=\d)",
        rf"{SPIECE_UNDERLINE}?\d",
        rf"{SPIECE_UNDERLINE}?[^\W\d_]+",
        rf"{SPIECE_UNDERLINE}?[^\w{SPIECE_UNDERLINE}]",
        rf"{SPIECE_UNDERLINE}|_",
    )
)

PRINTABLE = "".join(map(chr, range(33, 127)))
NUM_CORE_LINES = 40


def corpus() -> Iterator[str]:
    """The training text: sentences, boxes, and every printable ASCII character."""
    lines = CORPUS_FILE.read_text(encoding="utf-8").splitlines()
    yield from lines
    # The first lines have the vocabulary of the synthetic scenes; the weight makes it whole-word tokens.
    yield from lines[:NUM_CORE_LINES] * 3
    for box in ("[0.1,0.2,0.3,0.4]", "[1.0,1.0,1.0,1.0]"):
        # Frequent enough that each separator of a box becomes a token.
        yield from [f"{box}{box} at {box}, {box}"] * 100
    # Digits between the characters prevent merges of two characters.
    yield from ["0".join(PRINTABLE), " 0 1 2 3 4 5 6 7 8 9"] * 50


def box_digit_normalizers() -> tuple[list, list]:
    """Normalizers that replace decimals and separators of boxes by private characters, and decoders that invert them.

    They run from the last edge to the first, because the pattern of each has the preceding edges as a look-behind.
    """
    from tokenizers import Regex, decoders, normalizers

    def box(edges: int) -> str:
        return r"\[[01]\.[0-9]{3}" + r",[01]\.[0-9]{3}" * (edges - 1)

    before = {edge: rf"{box(edge)},[01]\." if edge else r"\[[01]\." for edge in range(4)}
    steps = []
    for edge, decimal, digit, private in reversed(BOX_DECIMALS):
        steps.append((edge, 1 - decimal, rf"(?<={before[edge]}{'[0-9]' * decimal}){digit}", private))
    for edge, joint, private in BOX_SEPARATORS:
        steps.append((edge, 2, rf"(?<={box(edge)}){joint[:2]}\.", private))
    steps.sort(key=lambda step: (-step[0], step[1]))
    decoded = [(private, text) for *_, text, private in (*BOX_DECIMALS, *BOX_SEPARATORS)]
    return (
        [normalizers.Replace(Regex(pattern), private) for *_, pattern, private in steps],
        [decoders.Replace(private, text) for private, text in decoded],
    )


def train_tokenizer(path: Path = TINY_TOKENIZER_FILE) -> None:
    """Train the tokenizer and write it to `path`; the same text gives the same bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(SPIECE_UNDERLINE, prepend_scheme="first", split=False),
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
        ]
    )
    box_normalizers, box_decoders = box_digit_normalizers()
    backend.decoder = decoders.Sequence(
        [
            *box_decoders,
            decoders.Replace(SPIECE_UNDERLINE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    # Printable ASCII characters have their own tokens, so byte fallback never needs their bytes.
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256) if chr(byte) not in f" {PRINTABLE}"]
    box_tokens = [private for *_, private in (*BOX_DECIMALS, *BOX_SEPARATORS)]
    bpe_size = TINY_VOCAB_SIZE - len(SPECIAL_TOKENS) - len(byte_tokens) - len(box_tokens)
    trainer = trainers.BpeTrainer(vocab_size=bpe_size, show_progress=False)
    backend.train_from_iterator(corpus(), trainer)

    # The trainer supports neither byte tokens nor T5's order of ids, so the vocabulary is assembled here.
    state = json.loads(backend.to_str())
    bpe_tokens = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    vocabulary = [*SPECIAL_TOKENS, *byte_tokens, *bpe_tokens, *box_tokens]
    assert len(vocabulary) == len(set(vocabulary)) == TINY_VOCAB_SIZE
    state["model"]["vocab"] = {piece: i for i, piece in enumerate(vocabulary)}
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": False}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.Sequence(box_normalizers)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(backend.to_str(pretty=True), encoding="utf-8")
    temporary.replace(path)


def wordpiece_vocabulary() -> list[str]:
    """The pieces of the WordPiece vocabulary in the order of their ids; the same text gives the same pieces."""
    lines = CORPUS_FILE.read_text(encoding="utf-8").lower().splitlines()
    counts = Counter(re.findall("[a-z]{2,}", " ".join([*lines, *lines[:NUM_CORE_LINES] * 3])))
    words = sorted((word for word in counts if counts[word] > 1), key=lambda word: (-counts[word], word))
    characters = sorted(set(PRINTABLE.lower()))
    continued = [f"##{character}" for character in characters if character.isalnum()]
    numbers = [f"{number:02}" for number in range(100)]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *continued, *numbers, *words]


if __name__ == "__main__":
    train_tokenizer()
    TINY_WORDPIECE_FILE.parent.mkdir(exist_ok=True)
    TINY_WORDPIECE_FILE.write_text("\n".join(wordpiece_vocabulary()) + "\n", encoding="utf-8")
    print(f"wrote {TINY_TOKENIZER_FILE} and {TINY_WORDPIECE_FILE}")
