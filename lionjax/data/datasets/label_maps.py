# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation as PNGs of class numbers: ADE20K's annotations, COCO-Stuff's pixel maps, and others like them.

An example asks for one class of an image, drawn anew on every access, as LISA (arXiv 2308.00692) trains on such sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data.boxes import box_around
from lionjax.data.datasets import annotated_images
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, read_json, read_text, split_lines
from lionjax.data.scenes.tasks import Example

TASK = "res"
MODES = ("L", "P", "I", "I;16")  # of Pillow: one number a pixel


@dataclass(frozen=True)
class LabelMaps:
    """Images of `image_dir` with PNGs of the same names in `label_dir`, as task `res`.

    `class_file`: a JSON list of names, or one name a line, also as "3: car"; `first_label` is the number of its first
    name in the PNGs (ADE20K: 1, COCO-Stuff: 0 for a file without "unlabeled"). Numbers of no name, such as 255, and
    names that contain `skip_mark` (COCO-Stuff: "-", as in LISA) are not asked for. `heldout_fraction`: of the images,
    for the other splits.
    """

    image_dir: str
    label_dir: str
    class_file: str
    first_label: int = 1
    skip_mark: str = ""
    heldout_fraction: float = 0.0
    name: str = "label_maps"

    def paths(self) -> tuple[Path, ...]:
        """The files and folders that it reads."""
        return Path(self.class_file), Path(self.label_dir), Path(self.image_dir)

    def open(self, split: str, max_pixels: int) -> OpenLabelMaps:
        names = read_class_names(Path(self.class_file))
        builder = AnnotatedImagesBuilder(Path(self.image_dir), split, self.heldout_fraction)
        files = sorted(Path(self.label_dir).rglob("*.png"))
        if not files:
            raise UserError(f"{self.label_dir} has no PNG of labels; give the folder of them as label_dir")
        label_files = []
        for file in files:
            name = self._image_name(file.relative_to(self.label_dir).with_suffix(""))
            if builder.includes(name):
                index = builder.add_image(name, ImageInfo(name, in_pixels=True))
                builder.add_annotation(TASK, Annotation(index))
                label_files.append(file)
        return OpenLabelMaps(self, builder.build(max_pixels), label_files, names)

    def _image_name(self, stem: Path) -> str:
        for suffix in (".jpg", ".jpeg", ".png"):
            if (Path(self.image_dir) / f"{stem}{suffix}").is_file():
                return f"{stem}{suffix}"
        return f"{stem}.jpg"


def read_class_names(path: Path) -> list[str]:
    """The names of a class file, in their order. Raises UserError for one without names."""
    if path.suffix == ".json":
        names = read_json(path)
    else:
        names = [line.partition(": ")[2] or line for _, line in split_lines(read_text(path))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{path} is no list of class names; give a JSON list of texts, or one name a line")
    return [name.strip() for name in names]


class OpenLabelMaps:
    """One split of a `LabelMaps`; see `source.OpenDataset`."""

    has_splits = True

    def __init__(self, config: LabelMaps, pictures: AnnotatedImages, label_files: list[Path], names: list[str]):
        self.config, self.pictures, self.label_files, self.names = config, pictures, label_files, names
        self.task_sizes = pictures.task_sizes

    def __len__(self) -> int:
        return len(self.pictures)

    def row_problems(self) -> Iterator[str]:
        return self.pictures.row_problems()

    def record_index(self, task: str, index: int) -> int:
        return self.pictures.record_index(task, index)

    def record_name(self, record_index: int) -> str:
        return self.pictures.record_name(record_index)

    def image_path(self, record_index: int) -> Path:
        """The path of an image file."""
        return self.pictures.image_path(record_index)

    def load_record(self, record_index: int) -> tuple[Image.Image, ImageInfo]:
        return self.pictures.load_record(record_index)

    def load_regions(self, record_index: int) -> None:
        """None: label maps keep nothing of a refiner."""

    def labels(self, record_index: int) -> np.ndarray:
        """(height, width): the class numbers of an image. Raises UserError for a file that has none."""
        file = self.label_files[record_index]
        try:
            with Image.open(file, formats=("PNG",)) as picture:
                if picture.mode not in MODES or picture.width * picture.height > self.pictures.max_pixels:
                    raise ValueError(f"mode {picture.mode}, {picture.width} x {picture.height} pixels")
                labels_HW = np.asarray(picture)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as class numbers ({error}); give a PNG of one channel") from error
        return labels_HW

    def make_example(self, task: str, index: int, truth: Any, rng: np.random.Generator, tag_noise: float) -> Example:
        """An example about a drawn class of the image. Raises UserError for an image without any that is asked for."""
        record = self.record_index(task, index)
        annotation = self.pictures.annotations[task][index]
        if annotation.problem:
            raise UserError(annotation.problem)
        labels_HW = self.labels(record)
        present = [label for label in np.unique(labels_HW).tolist() if self._is_asked(label)]
        if not present:
            raise UserError(f"{self.label_files[record]} has no pixel of a class that is asked for; remove it")
        label = present[rng.integers(len(present))]
        size = labels_HW.shape[::-1]
        if (truth.width, truth.height) != size:
            raise UserError(
                f"{self.label_files[record]} is {size[0]} x {size[1]} but its image {truth.width:g} x "
                f"{truth.height:g}; give the labels of this image"
            )
        box = tuple(edge * side for edge, side in zip(box_around(labels_HW == label), size * 2))
        name = self.names[label - self.config.first_label]
        asked = Annotation(annotation.photo, words=f"the {name}", kind=name, boxes=(box,), regions=(label,))
        return annotated_images.make_example(task, asked, truth, rng, tag_noise)

    def _is_asked(self, label: int) -> bool:
        number, mark = label - self.config.first_label, self.config.skip_mark
        return 0 <= number < len(self.names) and not (mark and mark in self.names[number])

    def masks(self, record_index: int, regions: tuple[int, ...]) -> np.ndarray:
        """bool (K, height, width): the pixels of each of the class numbers `regions`."""
        return self.labels(record_index) == np.array(regions).reshape(-1, 1, 1)
