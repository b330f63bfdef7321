# SPDX-License-Identifier: Apache-2.0
"""Which files belong to which split, by the words in their names: `train-00000-of-00002.parquet`, `val/0001.tar`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "heldout": ("test", "testing", "eval", "evaluation"),
}
# The splits of the files that stand for a split, in order: a set with two parts has a test or a validation part.
STAND_INS = {"train": ("train",), "validation": ("validation", "heldout"), "heldout": ("heldout", "validation")}


def named_split(root: Path, path: Path) -> str:
    """The split that a file's name has as a word, else one of the folders under `root` that it is in; else ""."""
    for part in reversed(path.relative_to(root).parts):
        words = re.split(r"[\W_\d]+", part.lower())
        for split, names in SPLIT_WORDS.items():
            if any(name in words for name in names):
                return split
    return ""


def files_by_split(root: Path, paths: Iterable[Path]) -> dict[str, list[Path]]:
    """{split: its files}; empty unless each file under `root` has a split in its name and there are several splits."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(named_split(root, path), []).append(path)
    if "" in groups or len(groups) < 2:
        return {}
    return {split: next((groups[name] for name in STAND_INS[split] if name in groups), []) for split in SPLIT_WORDS}
