# SPDX-License-Identifier: Apache-2.0
"""Writes pictures with their truth as a TFDS data set of ArrayRecord files, and the index of their examples."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from lionjax.core.types import UserError
from lionjax.data import images
from lionjax.data.datasets.annotated_images import AnnotatedImages
from lionjax.data.datasets.array_record import INDEX_FILE, RecordTruth, Tagger
from lionjax.data.datasets.source import SPLITS
from lionjax.data.prepare.worker import RecordPreparer
from lionjax.data.scenes import tfds_builder
from lionjax.data.scenes.dataset import Scenes

SKIPPED_FILE = "left_out.txt"
GROUP_SIZE = 256  # pictures that are looked at, tagged and remembered together


@dataclasses.dataclass(eq=False)
class ArrayRecordBuilderConfig(tfds.core.BuilderConfig):
    """The source, its opened splits to write, and how: `tag` makes the function that names what is on pictures."""

    source: Any = dataclasses.field(default=None, repr=False)
    datasets: dict[str, AnnotatedImages] = dataclasses.field(default_factory=dict, repr=False)
    max_pixels: int = images.MAX_PIXELS
    make_tagger: Callable[[], Tagger] | None = dataclasses.field(default=None, repr=False)
    group_folder: Path | None = None  # where groups that are done are remembered
    use_beam: bool = False


class ArrayRecordBuilder(tfds.core.GeneratorBasedBuilder):
    """Pictures as their files were, each with its questions, answers, boxes, outlines and tags as JSON."""

    name = "pictures"  # of the folder that it writes
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "truth": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        datasets = self.builder_config.datasets
        return {split: self._generate_examples(split) for split, records in datasets.items() if len(records)}

    def _generate_examples(self, split: str):
        c = self.builder_config
        if c.use_beam:
            from lionjax.data.prepare import beam as beam_writer

            return beam_writer.records_transform(c, split, len(c.datasets[split]), GROUP_SIZE)
        return self._generate_sequentially(c, split)

    def _generate_sequentially(self, config: ArrayRecordBuilderConfig, split: str):
        worker = RecordPreparer(config.datasets[split], config.make_tagger, config.group_folder / split)
        for start in range(0, len(config.datasets[split]), GROUP_SIZE):
            yield from worker.prepare(range(start, start + GROUP_SIZE))


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
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


def build(
    source: Any,
    out: str | Path,
    max_pixels: int = images.MAX_PIXELS,
    make_tagger: Callable[[], Tagger] | None = None,
    beam_flags: Sequence[str] | None = None,
) -> Path:
    """Write all splits of a source under `out` as ArrayRecord and return the folder of the data set.

    Complete by rename: a folder with an index is whole. What stands there already is kept. `tag()` gives a function
    that names what is on pictures; its tags replace the source's. `beam`: flags of Apache Beam, which then does the
    work; the records are the same. What was left out is listed in left_out.txt there.
    """
    if isinstance(source, Scenes):
        if make_tagger is not None or beam_flags is not None:
            raise UserError("scenes are drawn with their tags; build them without --tagger or --beam")
        with quiet_tfds():
            return tfds_builder.build(out, source.sizes, source.image_size, source.seed)
    # What is not divided is written once; `OpenedBuilt` gives it for every split.
    splits = SPLITS if getattr(source, "heldout_fraction", 1) else SPLITS[:1]
    opened = {split: source.open(split, max_pixels) for split in splits}
    if not any(len(one) for one in opened.values()):
        raise UserError(f"the source {source.name!r} has no records; there is nothing to write")
    groups = Path(out) / f"part.{source.name}"
    config = ArrayRecordBuilderConfig(
        name=source.name,
        source=source,
        datasets=opened,
        max_pixels=max_pixels,
        make_tagger=make_tagger,
        group_folder=groups,
        use_beam=beam_flags is not None,
    )
    builder = ArrayRecordBuilder(data_dir=out, config=config, file_format="array_record")
    folder = Path(builder.data_path)
    with quiet_tfds():
        try:
            builder.download_and_prepare(download_config=_download_config(beam_flags))
        except Exception as error:  # TFDS and Beam refuse a split without records, each in its words
            left_out = _skip_reasons(groups)
            if len(left_out) >= sum(map(len, opened.values())):
                raise UserError(
                    f"none of the {len(left_out)} pictures of {source.name!r} can be used; first: {left_out[0]}"
                ) from error
            raise
    if not (folder / INDEX_FILE).is_file():
        (folder / SKIPPED_FILE).write_text("".join(f"{reason}\n" for reason in _skip_reasons(groups)))
        write_index(builder, folder)
    shutil.rmtree(groups, ignore_errors=True)
    return folder


def _download_config(beam_flags: Sequence[str] | None):
    if beam_flags is None:
        return None
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("--beam needs Apache Beam; run `pip install 'lionjax[prepare]'`") from error
    return tfds.download.DownloadConfig(beam_options=PipelineOptions(list(beam_flags)))


def _skip_reasons(group_folder: Path) -> list[str]:
    """Why pictures and rows were left out, in the order of the pictures."""
    files = sorted(group_folder.glob("*/*.json"), key=lambda file: (file.parent.name, int(file.stem.split("-")[0])))
    return [reason for file in files for reason in json.loads(file.read_text())["left_out"]]


def write_index(builder, folder: Path) -> None:
    """(record, row) of every example by split and task, names of records, and all tags; read off the records."""
    arrays, tags = {}, set()
    for split in builder.info.splits:
        raw = {"image": tfds.decode.SkipDecoding()}
        names, places = [], {}
        for number, stored in enumerate(builder.as_data_source(split=split, decoders=raw)):
            known = RecordTruth.from_json(stored["truth"].decode())
            names.append(known.image_info.name)
            tags.update(known.image_info.tags)
            for task, rows in known.annotations.items():
                places.setdefault(task, []).extend((number, row) for row in range(len(rows)))
        arrays[f"{split}/"] = np.array(names)
        arrays |= {f"{split}/{task}": np.array(rows, np.int32) for task, rows in places.items() if rows}
    part = folder / f"part.{INDEX_FILE}"
    np.savez(part, vocabulary=np.array(sorted(tags), dtype="U"), **arrays)
    part.replace(folder / INDEX_FILE)
