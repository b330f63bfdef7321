# SPDX-License-Identifier: Apache-2.0
"""easy-VQA, the package of small images with questions about one shape and its color."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, read_json


@dataclass(frozen=True)
class EasyVqa:
    """The easy-VQA package: 5,000 pictures of one shape each, and 48,248 questions. Its test set is held out.

    `kinds`: of the questions, `yesno`, `color` and `shape`.
    """

    name: str = "easy_vqa"
    kinds: tuple[str, ...] = ("yesno", "color", "shape")

    def __post_init__(self):
        if unknown := set(self.kinds) - {"yesno", "color", "shape"}:
            raise UserError(f"easy-VQA has no kind {sorted(unknown)[0]!r}; there are yesno, color and shape")

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        import importlib.util

        found = importlib.util.find_spec("easy_vqa")
        if found is None or not found.origin:
            raise UserError("easy-VQA is not installed; run `pip install easy-vqa`")
        folder = Path(found.origin).parent / "data" / ("test" if split == "heldout" else "train")
        reader = AnnotatedImagesBuilder(folder / "images")
        for question, answer, key in read_json(folder / "questions.json"):
            validation = split != "heldout" and key % 20 == 0
            kind = "color" if "color" in question else "shape"
            kind = "yesno" if answer in ("yes", "no") else kind
            if validation == (split == "validation") and kind in self.kinds:
                number = reader.add_image(key, ImageInfo(f"{key}.png"))
                reader.add_annotation("vqa", Annotation(number, (answer,), question, kind=kind))
        return reader.build(max_pixels)
