# SPDX-License-Identifier: Apache-2.0
"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions with boxes, in one JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lionjax.core.renamed import renamed_fields
from lionjax.data.datasets import typed_rows
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, AnnotationFile, read_json, xywh_to_xyxy


@renamed_fields()
@dataclass(frozen=True)
class RefCoco(AnnotationFile):
    """RefCOCO, RefCOCO+ or RefCOCOg: a list of {img_id, sents, bbox (x, y, width, height), height, width}.

    The image in `image_dir` is `file_name`, or else `img_id` without its last number, with .jpg. Every entry gives two
    examples: expression to box (task rec) and box to expression (task reg).
    """

    name: str = "refcoco"

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        file = Path(self.file)
        builder = AnnotatedImagesBuilder(Path(self.image_dir), split, self.heldout_fraction)
        fields = ("img_id", "sents", "bbox", "height", "width")
        for location, entry in builder.entries(file, {"refs": read_json(file)}, "refs", fields, "rec"):
            with builder.row(location, "rec"):
                stem = str(entry["img_id"]).rpartition("_")[0]
                name = typed_rows.text(entry, "file_name", location) or f"{stem}.jpg"
                size = typed_rows.image_size(entry, location)
                box = xywh_to_xyxy(entry["bbox"], location)
                expression = typed_rows.text(entry, "sents", location).strip()
                if builder.includes(name):
                    image_index = builder.add_image(name, ImageInfo(name, *size))
                    builder.check_units(image_index, size, True, location)
                    builder.add_annotation("rec", Annotation(image_index, words=expression, boxes=(box,)))
                    builder.add_annotation("reg", Annotation(image_index, (expression,), question_boxes=(box,)))
        return builder.build(max_pixels)
