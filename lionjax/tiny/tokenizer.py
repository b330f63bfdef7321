# SPDX-License-Identifier: Apache-2.0
"""Makes the tokenizer shipped with the package: `python -m lionjax.tiny.tokenizer`.

A byte-pair tokenizer of 1,024 pieces with T5's first three ids. It learns from a page of text written for it
(assets/tokenizer_text.txt) and from boxes, never from generated tasks, so that a change there moves no id.

Within a box the first two decimals of each edge have pieces of their own: the 3 of a left edge 0.3.. is another piece
than the 3 of a top edge. The text is the same; a model of two million weights learns such words, as it learns colors,
many times sooner than it learns to tell eight meanings of one digit apart by counting commas.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from lionjax.data.tokenizer import SPECIAL_TOKENS, SPIECE_UNDERLINE, TINY_TOKENIZER_FILE, TINY_VOCAB_SIZE

CORPUS_FILE = TINY_TOKENIZER_FILE.parent / "tokenizer_text.txt"
# Private characters stand for decimals and joints by their place in a box, while a text is being cut into pieces.
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

# Pieces never cross these borders: the joints of a box, single digits, words, single marks, single spaces.
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
    """The text that the tokenizer learns from: sentences, boxes, and every printable sign on its own."""
    lines = CORPUS_FILE.read_text(encoding="utf-8").splitlines()
    yield from lines
    # What the embedded scenes are about comes first in the file and is worth whole words.
    yield from lines[:NUM_CORE_LINES] * 3
    for box in ("[0.1,0.2,0.3,0.4]", "[1.0,1.0,1.0,1.0]"):
        # Often enough that a joint of a box is always worth a piece of its own.
        yield from [f"{box}{box} at {box}, {box}"] * 100
    # A digit is a border, so no two signs grow together.
    yield from ["0".join(PRINTABLE), " 0 1 2 3 4 5 6 7 8 9"] * 50


def box_digit_normalizers() -> tuple[list, list]:
    """Normalizers that write decimals and joints of boxes as private characters, and decoders that write them back.

    From the last edge to the first, because each looks back at the text before it.
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
    back = [(private, text) for *_, text, private in (*BOX_DECIMALS, *BOX_SEPARATORS)]
    return (
        [normalizers.Replace(Regex(pattern), private) for *_, pattern, private in steps],
        [decoders.Replace(private, text) for private, text in back],
    )


def train_tokenizer(path: Path = TINY_TOKENIZER_FILE) -> None:
    """Learn the tokenizer and write it to `path`; the same text gives the same bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(SPIECE_UNDERLINE, prepend_scheme="first", split=False),
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
        ]
    )
    written, read = box_digit_normalizers()
    backend.decoder = decoders.Sequence(
        [
            *read,
            decoders.Replace(SPIECE_UNDERLINE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    # Printable ASCII has pieces of its own, so those bytes never occur.
    raw = [f"<0x{byte:02X}>" for byte in range(256) if chr(byte) not in f" {PRINTABLE}"]
    places = [private for *_, private in (*BOX_DECIMALS, *BOX_SEPARATORS)]
    learned = TINY_VOCAB_SIZE - len(SPECIAL_TOKENS) - len(raw) - len(places)
    trainer = trainers.BpeTrainer(vocab_size=learned, show_progress=False)
    backend.train_from_iterator(corpus(), trainer)

    # The trainer knows neither byte pieces nor our order, so the vocabulary is put together here.
    state = json.loads(backend.to_str())
    words = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    vocabulary = [*SPECIAL_TOKENS, *raw, *words, *places]
    assert len(vocabulary) == len(set(vocabulary)) == TINY_VOCAB_SIZE
    state["model"]["vocab"] = {piece: i for i, piece in enumerate(vocabulary)}
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": False}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.Sequence(written)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(backend.to_str(pretty=True), encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    train_tokenizer()
    print(f"wrote {TINY_TOKENIZER_FILE}")
