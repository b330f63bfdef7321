# SPDX-License-Identifier: Apache-2.0
"""What a refiner found in an image: tags, boxes with their names, and features of the detector's queries.

`lionjax data build --refiner` keeps it in the records of a data set, features in bfloat16; the refiner of
`lionjax.pipelines` makes it for a new image.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.box_text import spatial_text
from lionjax.data.boxes import Box

TEXT_FIELD, FEATURES_FIELD = "regions", "region_features"  # of a stored record


@dataclass(frozen=True, eq=False)
class ImageRegions:
    """Tags, boxes and region features of one image.

    `boxes`: those kept, x0 y0 x1 y1 as fractions of the image, by falling score; they may leave 0..1. `names`: what the
    spatial text calls each, a tag or the detector's phrase. `features_KD`: float32, one row for each query kept: those
    of the kept boxes in their order, then the others by falling score; rows of segments, if any, come last.
    `digest`: of the models that computed the features.
    """

    tags: tuple[str, ...] = ()
    chinese: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    scores: tuple[float, ...] = ()
    phrases: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    features_KD: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    digest: str = ""

    @property
    def spatial_text(self) -> str:
        """The textual spatial representation, ` dog: [0.1, 0.2, 0.3, 0.4] ...`; empty without boxes."""
        return spatial_text(self.names, self.boxes)

    def to_json(self) -> str:
        """All as JSON, but of the features only their shape."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["features"] = fields.pop("features_KD").shape
        return json.dumps(fields, ensure_ascii=False)

    def to_record(self) -> dict[str, str | np.ndarray]:
        """The fields of a stored record: JSON, and the features as bits of bfloat16 in one row."""
        return {TEXT_FIELD: self.to_json(), FEATURES_FIELD: to_bfloat16_bits(self.features_KD).reshape(-1)}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> ImageRegions | None:
        """The inverse of `to_record`; None for a record without these fields."""
        if TEXT_FIELD not in record:
            return None
        text = record[TEXT_FIELD]
        return ImageRegions.from_json(
            text.decode() if isinstance(text, bytes) else text, from_bfloat16_bits(record[FEATURES_FIELD])
        )

    @staticmethod
    def from_json(text: str, features: np.ndarray) -> ImageRegions:
        """The inverse of `to_json`; `features`: the values of `features_KD` in any shape.

        Raises UserError for another text, and for another number of features.
        """
        try:
            raw: Mapping[str, Any] = json.loads(text)
            lists = {name: tuple(raw[name]) for name in ("tags", "chinese", "scores", "phrases", "names")}
            boxes = tuple(tuple(map(float, box)) for box in raw["boxes"])
            features_KD = np.asarray(features, np.float32).reshape(raw["features"])
            return ImageRegions(**lists, boxes=boxes, digest=raw["digest"], features_KD=features_KD)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the kept regions of a record cannot be read ({error!r}); build the data again") from error


def to_bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers rounded to bfloat16 (to nearest, ties to even), as uint16 of the same shape."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """float32 numbers from the bits of bfloat16 ones (uint16)."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def pad_regions(found: Sequence[ImageRegions], width: int, max_regions: int, max_images: int) -> dict[str, np.ndarray]:
    """Features and real regions of an example's images, (K, D) and (K,), or (I, K, D) and (I, K) if `max_images` > 1.

    Of more than `max_regions` the first are taken. An image without a region has one of zeros. Raises UserError for
    features of another width.
    """
    region_IKD = np.zeros((max_images, max_regions, width), np.float32)
    real_IK = np.zeros((max_images, max_regions), bool)
    real_IK[:, 0] = True
    for number, regions in enumerate(found):
        features_KD = regions.features_KD[:max_regions]
        if features_KD.size and features_KD.shape[1] != width:
            raise UserError(
                f"the kept regions have {features_KD.shape[1]} features, but the model reads {width}; refine the data "
                "with the detector that the model was trained with"
            )
        region_IKD[number, : len(features_KD)] = features_KD.reshape(-1, width)
        real_IK[number, : len(features_KD)] = True
    rows = {"regions": region_IKD, "regions_mask": real_IK}
    return rows if max_images > 1 else {name: array[0] for name, array in rows.items()}
