# SPDX-License-Identifier: Apache-2.0
"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions with boxes, in one JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lionjax.core.renamed import renamed_fields
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import (
    AnnotatedImagesBuilder,
    AnnotationFile,
    convert_format_errors,
    in_split,
    read_json,
    validated_entries,
    xywh_to_xyxy,
)


@renamed_fields()
@dataclass(frozen=True)
class RefCoco(AnnotationFile):
    """RefCOCO, RefCOCO+ or RefCOCOg: a list of {img_id, sents, bbox (x, y, width, height), height, width}.

    The image in `image_dir` is `file_name`, or else `img_id` without its last number, with .jpg. Every entry gives two
    examples: expression to box (task rec) and box to expression (task reg).
    """

    name: str = "refcoco"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        file, builder = Path(self.file), AnnotatedImagesBuilder(Path(self.image_dir))
        fields = ("img_id", "sents", "bbox", "height", "width")
        with convert_format_errors(file):
            for entry in validated_entries(file, {"refs": read_json(file)}, "refs", fields):
                stem = str(entry["img_id"]).rpartition("_")[0]
                name = entry.get("file_name") or f"{stem}.jpg"
                if in_split(name, split, self.heldout_fraction):
                    size = float(entry["width"]), float(entry["height"])
                    image_index = builder.add_image(name, ImageInfo(name, *size))
                    box, expression = xywh_to_xyxy(entry["bbox"]), entry["sents"].strip()
                    builder.add_annotation("rec", Annotation(image_index, words=expression, boxes=(box,)))
                    builder.add_annotation("reg", Annotation(image_index, (expression,), question_boxes=(box,)))
        return builder.build(max_pixels)
