# SPDX-License-Identifier: Apache-2.0
"""Write annotated images as a TFDS data set of ArrayRecord files, with an index of their examples."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from lionjax.core.files import write_json
from lionjax.core.types import UserError
from lionjax.data import images
from lionjax.data.datasets.annotated_images import AnnotatedImages
from lionjax.data.datasets.array_record import INDEX_FILE, RecordTruth, Tagger, record_truths
from lionjax.data.datasets.source import SPLITS
from lionjax.data.prepare.group_cache import Annotator, TagsOnly, group_file_name, read_group_file
from lionjax.data.prepare.worker import RecordPreparer, records_digest
from lionjax.data.scenes import tfds_builder
from lionjax.data.scenes.dataset import Scenes

log = logging.getLogger(__name__)

SKIPPED_FILE = "left_out.txt"
DIGEST_FILE = "made_from.json"  # the digest of what a data set was made from
GROUP_SIZE = 256  # images that are validated, tagged and cached together


@dataclasses.dataclass(eq=False)
class ArrayRecordBuilderConfig(tfds.core.BuilderConfig):
    """The source, its opened splits, and how to write them. `make_annotator`, `keeps_regions`: see RecordPreparer."""

    source: Any = dataclasses.field(default=None, repr=False)
    datasets: dict[str, AnnotatedImages] = dataclasses.field(default_factory=dict, repr=False)
    num_records: dict[str, int] = dataclasses.field(default_factory=dict, repr=False)  # by split
    max_pixels: int = images.MAX_PIXELS
    make_annotator: Callable[[], Annotator] | None = dataclasses.field(default=None, repr=False)
    annotator_digest: str = ""
    keeps_regions: bool = False
    group_folder: Path | None = None  # cache of finished groups, for resuming
    use_beam: bool = False


class ArrayRecordBuilder(tfds.core.GeneratorBasedBuilder):
    """Original image files, each with its questions, answers, boxes, segmentations and tags as JSON.

    Regions found by a refiner are in two more fields.
    """

    name = "pictures"  # name of the folder that it writes
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "truth": tfds.features.Text(),
        }
        if self.builder_config.keeps_regions:
            features |= tfds_builder.region_fields()
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        datasets = self.builder_config.datasets
        return {split: self._generate_examples(split) for split, records in datasets.items() if len(records)}

    def _generate_examples(self, split: str):
        c = self.builder_config
        if c.use_beam:
            from lionjax.data.prepare import beam as beam_writer

            return beam_writer.records_transform(c, split, c.num_records[split], GROUP_SIZE)
        return self._generate_sequentially(c, split)

    def _generate_sequentially(self, config: ArrayRecordBuilderConfig, split: str):
        dataset, folder = config.datasets[split], config.group_folder / split
        made_by = (config.make_annotator, folder, config.annotator_digest, config.keeps_regions)
        worker = RecordPreparer(dataset, *made_by)
        for start in range(0, config.num_records[split], GROUP_SIZE):
            yield from worker.prepare(range(start, start + GROUP_SIZE))


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Suppresses TFDS's messages about downloads, and its progress bars if stderr is not a terminal."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)


def build(
    source: Any,
    out: str | Path,
    max_pixels: int = images.MAX_PIXELS,
    make_tagger: Callable[[], Tagger] | None = None,
    beam_flags: Sequence[str] | None = None,
    tagger_digest: str = "",
    make_refiner: Callable[[], Annotator] | None = None,
) -> Path:
    """Writes all splits of a source under `out` as ArrayRecord files and returns the folder of the data set.

    The index is written last and renamed, so a folder with an index is complete. A complete data set is kept if it was
    made from the same annotations, image files and tagger (`tagger_digest`), else it is made again and replaced.
    `make_tagger()` returns a function from images to tags, which replace the source's; `make_refiner()` one from images
    to `ImageRegions`, which are kept whole (`tagger_digest` is then the refiner's). `beam_flags`: run on Apache Beam
    with these flags; the records are the same. Skipped images and annotations are listed in left_out.txt. Raises
    UserError for a source without usable records, and for scenes with a tagger or Beam.
    """
    if isinstance(source, Scenes):
        if make_tagger is not None or beam_flags is not None:
            raise UserError("scenes are generated with their tags; build them without --tagger and --beam")
        with quiet_tfds():
            return tfds_builder.build(
                out, source.sizes, source.image_size, source.seed, make_refiner, tagger_digest, GROUP_SIZE
            )
    # A source without splits is written once; `OpenArrayRecordDataset` returns it for every split.
    splits = SPLITS if getattr(source, "heldout_fraction", 1) else SPLITS[:1]
    datasets = {split: source.open(split, max_pixels) for split in splits}
    if not any(len(dataset) for dataset in datasets.values()):
        raise UserError(f"the source {source.name!r} has no records to write; check its files")
    truths = {split: record_truths(dataset) for split, dataset in datasets.items()}
    digest = " ".join(
        f"{split} {records_digest(dataset, truths[split], range(len(truths[split])), tagger_digest)}"
        for split, dataset in datasets.items()
    )
    config = ArrayRecordBuilderConfig(
        name=source.name,
        source=source,
        datasets=datasets,
        num_records={split: len(rows) for split, rows in truths.items()},
        max_pixels=max_pixels,
        make_annotator=make_refiner or (make_tagger and TagsOnly(make_tagger)),
        annotator_digest=tagger_digest,
        keeps_regions=make_refiner is not None,
        group_folder=Path(out) / f"part.{source.name}",
        use_beam=beam_flags is not None,
    )
    folder = Path(ArrayRecordBuilder(data_dir=out, config=config, file_format="array_record").data_path)
    if not folder.exists():
        _write_dataset(out, config, digest, beam_flags)
    elif not _is_made_from(folder, digest):
        log.warning("%s was made from other data, images or tags than the source has now; building it again", folder)
        shutil.rmtree(config.group_folder / "rebuilt", ignore_errors=True)
        rebuilt = _write_dataset(config.group_folder / "rebuilt", config, digest, beam_flags)
        shutil.rmtree(folder)
        rebuilt.replace(folder)
    shutil.rmtree(config.group_folder, ignore_errors=True)
    return folder


def _is_made_from(folder: Path, digest: str) -> bool:
    """Whether a data set is complete and was made from what has this digest."""
    return (folder / INDEX_FILE).is_file() and read_group_file(folder / DIGEST_FILE).get("digest") == digest


def _write_dataset(
    out: str | Path, config: ArrayRecordBuilderConfig, digest: str, beam_flags: Sequence[str] | None
) -> Path:
    """Writes a data set under `out`, where there is none yet, and returns its folder."""
    builder = ArrayRecordBuilder(data_dir=out, config=config, file_format="array_record")
    folder = Path(builder.data_path)
    with quiet_tfds():
        try:
            builder.download_and_prepare(download_config=_download_config(beam_flags))
        except Exception as error:  # TFDS and Beam raise different errors for a split without records
            reasons = _skip_reasons(config)
            if len(reasons) >= sum(config.num_records.values()):
                raise UserError(
                    f"none of the {len(reasons)} images of {config.name!r} can be used; the first error: {reasons[0]}"
                ) from error
            raise
    (folder / SKIPPED_FILE).write_text("".join(f"{reason}\n" for reason in _skip_reasons(config)))
    write_json(folder / DIGEST_FILE, {"digest": digest})
    write_index(builder, folder)
    return folder


def _download_config(beam_flags: Sequence[str] | None):
    if beam_flags is None:
        return None
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("--beam needs Apache Beam; run `pip install 'lionjax[prepare]'`") from error
    return tfds.download.DownloadConfig(beam_options=PipelineOptions(list(beam_flags)))


def _skip_reasons(config: ArrayRecordBuilderConfig) -> list[str]:
    """Reasons for all skipped images and annotations, in the order of the images."""
    reasons = []
    for split, count in sorted(config.num_records.items()):
        for start in range(0, count, GROUP_SIZE):
            group = range(start, min(start + GROUP_SIZE, count))
            reasons += read_group_file(config.group_folder / split / group_file_name(group)).get("left_out", ())
    return reasons


def write_index(builder, folder: Path) -> None:
    """Writes the index: (record, annotation) of each example by split and task, record names, and all tags."""
    arrays, tags = {}, set()
    for split in builder.info.splits:
        raw = {"image": tfds.decode.SkipDecoding()}
        record_names, examples_by_task = [], {}
        for number, record in enumerate(builder.as_data_source(split=split, decoders=raw)):
            truth = RecordTruth.from_json(record["truth"].decode())
            record_names.append(truth.image_info.name)
            tags.update(truth.image_info.tags)
            for task, rows in truth.annotations.items():
                examples_by_task.setdefault(task, []).extend(
                    (number, annotation_index) for annotation_index in range(len(rows))
                )
        arrays[f"{split}/"] = np.array(record_names)
        arrays |= {
            f"{split}/{task}": np.array(examples, np.int32) for task, examples in examples_by_task.items() if examples
        }
    partial_file = folder / f"part.{INDEX_FILE}"
    np.savez(partial_file, vocabulary=np.array(sorted(tags), dtype="U"), **arrays)
    partial_file.replace(folder / INDEX_FILE)
