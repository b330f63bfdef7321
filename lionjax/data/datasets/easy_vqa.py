# SPDX-License-Identifier: Apache-2.0
"""easy-VQA (PyPI package easy-vqa): small images with questions about one shape and its color."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, read_json


@dataclass(frozen=True)
class EasyVqa:
    """easy-VQA: 5,000 images with one shape each, and 48,248 questions. Split "heldout" is its test set.

    `kinds`: the types of questions to use: `yesno`, `color`, `shape`. Raises UserError for another one; `open` raises
    UserError if the package is not installed.
    """

    name: str = "easy_vqa"
    kinds: tuple[str, ...] = ("yesno", "color", "shape")

    def __post_init__(self):
        if unknown := set(self.kinds) - {"yesno", "color", "shape"}:
            raise UserError(f"easy-VQA has no kind {sorted(unknown)[0]!r}; choose from yesno, color and shape")

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        import importlib.util

        spec = importlib.util.find_spec("easy_vqa")
        if spec is None or not spec.origin:
            raise UserError("easy-VQA is not installed; run `pip install easy-vqa`")
        folder = Path(spec.origin).parent / "data" / ("test" if split == "heldout" else "train")
        builder = AnnotatedImagesBuilder(folder / "images")
        for question, answer, key in read_json(folder / "questions.json"):
            is_validation = split != "heldout" and key % 20 == 0
            kind = "color" if "color" in question else "shape"
            kind = "yesno" if answer in ("yes", "no") else kind
            if is_validation == (split == "validation") and kind in self.kinds:
                image_index = builder.add_image(key, ImageInfo(f"{key}.png"))
                builder.add_annotation("vqa", Annotation(image_index, (answer,), question, kind=kind))
        return builder.build(max_pixels)
