# SPDX-License-Identifier: Apache-2.0
"""Scenes on disk: a TFDS builder that writes and reads ArrayRecord files without TensorFlow."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lionjax.core.types import UserError
from lionjax.data.prepare.group_cache import Annotator, GroupCache
from lionjax.data.regions import FEATURES_FIELD, TEXT_FIELD
from lionjax.data.scenes.source import SceneSource
from lionjax.data.scenes.world import SPLITS


@dataclasses.dataclass(eq=False)
class ScenesBuilderConfig(tfds.core.BuilderConfig):
    """Number of scenes per split, image size, seed and the refiner's digest. The config name contains all of them."""

    name: str = ""
    sizes: tuple[int, int, int] = (3000, 500, 500)
    image_size: int = 128
    seed: int = 0
    make_refiner: Callable[[], Annotator] | None = dataclasses.field(default=None, repr=False)
    refiner_digest: str = ""
    group_folder: Path | None = None  # cache of what the refiner found, for resuming
    group_size: int = 256

    def __post_init__(self):
        counts = "-".join(str(size) for size in self.sizes)
        # Of the whole text: the number of kept regions stands at its end.
        digest = hashlib.sha256(self.refiner_digest.encode()).hexdigest()[:12]
        refined = f"-refined{digest}" if self.make_refiner else ""
        self.name = f"pixels{self.image_size}-seed{self.seed}-{counts}{refined}"


class ScenesBuilder(tfds.core.GeneratorBasedBuilder):
    """Images of colored shapes with exact ground truth."""

    name = "scenes"  # name of the folder that it writes
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [ScenesBuilderConfig()]

    def _info(self) -> tfds.core.DatasetInfo:
        pixels = self.builder_config.image_size
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(pixels, pixels, 3), encoding_format="png"),
            "truth": tfds.features.Text(),
        }
        if self.builder_config.make_refiner is not None:
            features |= region_fields()
        # Unshuffled, so that record i on disk is record i of SceneSource; readers shuffle.
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        c = self.builder_config
        return {
            split: self._generate_examples(SceneSource(split, size, c.seed, c.image_size))
            for split, size in zip(SPLITS, c.sizes)
        }

    def _generate_examples(self, source: SceneSource):
        # PNG bytes, as TFDS needs TensorFlow to encode an array.
        if self.builder_config.make_refiner is None:
            yield from enumerate(source)
            return
        c, refiner = self.builder_config, None
        for start in range(0, len(source), c.group_size):
            indices = range(start, min(start + c.group_size, len(source)))
            cache, records = GroupCache(c.group_folder / source.split, indices, c.refiner_digest), []
            if (regions := cache.load(len(indices))) is None:
                refiner = refiner or c.make_refiner()
                records = [source[index] for index in indices]
                regions = refiner([record["image"] for record in records])
                cache.save(regions)
            for index, record, found in zip(indices, records or map(source.__getitem__, indices), regions):
                if isinstance(found, UserError):
                    raise found
                yield index, record | found.to_record()


def region_fields() -> dict[str, Any]:
    """The features of a record that `ImageRegions.to_record` fills."""
    bits = tfds.features.Tensor(shape=(None,), dtype=np.uint16, encoding=tfds.features.Encoding.BYTES)
    return {TEXT_FIELD: tfds.features.Text(), FEATURES_FIELD: bits}


def build(
    folder,
    sizes=(3000, 500, 500),
    image_size: int = 128,
    seed: int = 0,
    make_refiner: Callable[[], Annotator] | None = None,
    refiner_digest: str = "",
    group_size: int = 256,
) -> Path:
    """Writes the three splits under `folder` and returns the folder of the data set; a complete one is kept.

    TFDS writes to a temporary folder and renames it at the end, so an existing folder is complete. `make_refiner()`
    returns a function from images to what is kept in the records beside the ground truth. It is called for
    `group_size` images at a time, whose results are cached until all is written.
    """
    config = ScenesBuilderConfig(
        sizes=tuple(sizes),
        image_size=image_size,
        seed=seed,
        make_refiner=make_refiner,
        refiner_digest=refiner_digest,
        group_size=group_size,
    )
    config.group_folder = Path(folder) / f"part.{config.name}"
    builder = ScenesBuilder(data_dir=folder, config=config, file_format="array_record")
    builder.download_and_prepare()
    shutil.rmtree(config.group_folder, ignore_errors=True)
    return Path(builder.data_path)


class StoredScenes:
    """Random access to a split that `build` wrote, with the same records as SceneSource."""

    def __init__(self, folder, split: str):
        builder = tfds.builder_from_directory(str(folder))
        raw = {"image": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(split=split, decoders=raw)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, str | bytes]:
        record = self._records[index]
        texts = {key: record[key].decode() for key in ("id", "truth")}
        return {**record, **texts}
