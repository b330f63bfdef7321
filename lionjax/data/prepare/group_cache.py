# SPDX-License-Identifier: Apache-2.0
"""Cache files of finished groups of images, so that an interrupted preparation does not run its models again."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.datasets.array_record import Tagger
from lionjax.data.regions import FEATURES_FIELD, TEXT_FIELD, ImageRegions

NO_FEATURES = np.zeros(0, np.uint16)
# From images to what a tagger or refiner finds in each, or why it cannot read it.
Annotator = Callable[[Sequence], Sequence[ImageRegions | UserError]]
REFUSED = "refused"  # key of the reason in place of what was found


@dataclass(frozen=True)
class TagsOnly:
    """A picklable maker of an annotator that has a tagger's tags and no boxes. `make_tagger` returns the tagger."""

    make_tagger: Callable[[], Tagger]

    def __call__(self) -> Annotator:
        tagger = self.make_tagger()
        return lambda images: [ImageRegions(tags=tuple(tags)) for tags in tagger(images)]


class GroupCache:
    """One group's files in a folder: JSON with texts and skip reasons, and a file with the features, if there are any.

    They are used only for the same `digest` (of what the group was made of). The JSON file is written last and renamed.
    """

    def __init__(self, folder: Path, indices: range, digest: str):
        self.file, self.digest = folder / group_file_name(indices), digest
        self.features_file = self.file.with_suffix(".npz")

    def load(self, num_images: int) -> list[ImageRegions | UserError] | None:
        """What the annotator gave for each image; None if it is missing, damaged, or of something else."""
        content = read_group_file(self.file)
        texts = content.get("regions", ())
        if content.get("digest") != self.digest or len(texts) != num_images:
            return None
        features: Mapping[str, np.ndarray] = {}
        try:
            if self.features_file.exists():
                with np.load(self.features_file, allow_pickle=False) as opened:
                    features = dict(opened)
            found = [(text, features.get(str(k), NO_FEATURES)) for k, text in enumerate(texts)]
            return [
                UserError(text[REFUSED])
                if isinstance(text, dict)
                else ImageRegions.from_record({TEXT_FIELD: text, FEATURES_FIELD: bits})
                for text, bits in found
            ]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, UserError):
            return None

    @property
    def is_complete(self) -> bool:
        """Whether there is a JSON file of this digest."""
        return read_group_file(self.file).get("digest") == self.digest

    def save(self, regions: Sequence[ImageRegions | UserError], skip_reasons: Sequence[str] = ()) -> None:
        """Writes both files."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        texts: list[Any] = []
        features: dict[str, np.ndarray] = {}
        for number, found in enumerate(regions):
            if isinstance(found, UserError):
                texts.append({REFUSED: str(found)})
                continue
            record = found.to_record()
            texts.append(record[TEXT_FIELD])
            if len(record[FEATURES_FIELD]):
                features[str(number)] = record[FEATURES_FIELD]
        if features:
            partial_file = self.file.with_suffix(f".{os.getpid()}.npz")
            np.savez(partial_file, **features)
            partial_file.replace(self.features_file)
        partial_file = self.file.with_suffix(f".{os.getpid()}")
        partial_file.write_text(json.dumps({"digest": self.digest, "regions": texts, "left_out": list(skip_reasons)}))
        partial_file.replace(self.file)


def group_file_name(indices: range) -> str:
    """The name of a group's cache file."""
    return f"{indices.start}-{indices.stop}.json"


def read_group_file(file: Path) -> dict[str, Any]:
    """The content of a group's cache file; {} if it is missing or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
