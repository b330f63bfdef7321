# SPDX-License-Identifier: Apache-2.0
"""A run records which refiner made its regions: it is read from the data, and two refiners are refused."""

import dataclasses

import numpy as np
import pytest
import small_lyrics

from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.pipeline import batches
from lionjax.data.prepare import array_record_writer
from lionjax.data.processor import ProcessorConfig
from lionjax.data.regions import ImageRegions
from lionjax.data.regions_digest import with_regions_digest
from lionjax.data.scenes.dataset import Scenes
from lionjax.training import loop


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A maker of a refiner that finds one region with a given digest in each image."""

    digest: str
    width: int

    def __call__(self):
        features_KD = np.ones((1, self.width), np.float32)
        return lambda images: [ImageRegions(features_KD=features_KD, digest=self.digest) for _ in images]


def refined(folder, digest, width) -> Scenes:
    source, maker = Scenes(sizes=(2, 1, 1), image_size=32), Fixed(digest, width)
    made = array_record_writer.build(source, folder / digest, make_refiner=maker, tagger_digest=digest)
    return Scenes(folder=str(made), name=digest)


def test_the_digest_of_the_data_is_recorded_and_two_refiners_are_refused(tmp_path):
    one, other = (refined(tmp_path, digest, 6) for digest in ("aa", "bb"))
    processor = ProcessorConfig(image_size=16, region_width=6)
    data = DataConfig((one,), processor)
    assert with_regions_digest(data).processor.regions_digest == "aa"
    with pytest.raises(UserError, match="different refiners, those of 'aa' by aa and those of 'bb' by bb; refine all"):
        with_regions_digest(DataConfig((one, other), processor))
    pinned = dataclasses.replace(processor, regions_digest="zz")
    assert with_regions_digest(DataConfig((one, other), pinned)).processor == pinned
    plain = DataConfig((one, other), ProcessorConfig(image_size=16))
    assert with_regions_digest(plain) is plain
    unrefined = DataConfig((Scenes(sizes=(2, 1, 1), image_size=32),), processor)
    assert with_regions_digest(unrefined) is unrefined


def test_training_on_the_regions_of_another_detector_is_refused(tmp_path):
    what = small_lyrics.experiment(max_regions=1)
    width, data = small_lyrics.DETECTOR.feature_width, what.data
    found = {digest: refined(tmp_path, digest, width) for digest in ("aa", "bb")}
    changed = {digest: dataclasses.replace(data, sources=(source,)) for digest, source in found.items()}
    experiments = {digest: dataclasses.replace(what, data=other) for digest, other in changed.items()}
    with pytest.raises(StopIteration):  # behind the check of the config
        loop.train(experiments["aa"], tmp_path / "run", stop)
    (tmp_path / "run" / "base").mkdir()
    with pytest.raises(UserError, match="regions_digest"):
        loop.train(experiments["bb"], tmp_path / "run", batches)


def stop(*arguments):
    raise StopIteration
