# SPDX-License-Identifier: Apache-2.0
"""Writes pictures with their truth as a TFDS data set of ArrayRecord files, and the index of their examples."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from lionjax.data import pictures, scene_builder
from lionjax.data.built import INDEX, Known, usable
from lionjax.data.sources import SPLITS, Scenes
from lionjax.data.table import Table
from lionjax.interfaces import UserError


@dataclasses.dataclass(eq=False)
class PicturesConfig(tfds.core.BuilderConfig):
    """The opened splits to write."""

    opened: dict[str, Table] = dataclasses.field(default_factory=dict, repr=False)


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Pictures as their files were, each with its questions, answers, boxes, outlines and tags as JSON."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "truth": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        opened = self.builder_config.opened
        return {split: self._generate_examples(one) for split, one in opened.items() if len(one)}

    def _generate_examples(self, opened: Table):
        for number, (image, known) in enumerate(usable(opened)):
            yield number, {"id": known.photo.name, "image": image, "truth": known.to_json()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without TFDS's talk of downloads, of which there are none; its progress bars stay, on a terminal."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


def build(source: Any, out: str | Path, max_pixels: int = pictures.MAX_PIXELS) -> Path:
    """Write all splits of a source under `out` as ArrayRecord and return the folder of the data set.

    Complete by rename: a folder with an index is whole. What stands there already is kept.
    """
    if isinstance(source, Scenes):
        with quiet():
            return scene_builder.build(out, source.sizes, source.pixels, source.seed)
    # What is not divided is written once; `OpenedBuilt` gives it for every split.
    splits = SPLITS if getattr(source, "share", 1) else SPLITS[:1]
    opened = {split: source.open(split, max_pixels) for split in splits}
    if not any(len(one) for one in opened.values()):
        raise UserError(f"the source {source.name!r} has no records; there is nothing to write")
    with quiet():
        config = PicturesConfig(name=source.name, opened=opened)
        builder = Pictures(data_dir=out, config=config, file_format="array_record")
        builder.download_and_prepare()
    folder = Path(builder.data_path)
    if not (folder / INDEX).is_file():
        write_index(builder, folder)
    return folder


def write_index(builder, folder: Path) -> None:
    """(record, row) of every example by split and task, names of records, and all tags; read off the records."""
    arrays, tags = {}, set()
    for split in builder.info.splits:
        raw = {"image": tfds.decode.SkipDecoding()}
        names, places = [], {}
        for number, stored in enumerate(builder.as_data_source(split=split, decoders=raw)):
            known = Known.from_json(stored["truth"].decode())
            names.append(known.photo.name)
            tags.update(known.photo.tags)
            for task, rows in known.rows.items():
                places.setdefault(task, []).extend((number, row) for row in range(len(rows)))
        arrays[f"{split}/"] = np.array(names)
        arrays |= {
            f"{split}/{task}": np.array(rows, np.int32) for task, rows in places.items() if rows
        }
    part = folder / f"part.{INDEX}"
    np.savez(part, vocabulary=np.array(sorted(tags), dtype="U"), **arrays)
    part.replace(folder / INDEX)
