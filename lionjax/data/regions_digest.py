# SPDX-License-Identifier: Apache-2.0
"""Which refiner made the regions that a data set keeps, so that no other one's are read with them."""

from __future__ import annotations

import dataclasses

from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.datasets.source import OpenDataset, open_split

MAX_RECORDS = 1000  # searched for one with regions; text-only records have none


def with_regions_digest(data: DataConfig) -> DataConfig:
    """The config with `processor.regions_digest` of its sources' regions, if it is empty and the model reads regions.

    A run records it, so that its data and its refiner cannot be exchanged for others later. Raises UserError if two
    sources were refined by different models.
    """
    if not data.processor.region_width or data.processor.regions_digest:
        return data
    digests: dict[str, str] = {}
    for source in data.sources:
        if digest := find_digest(open_split(source, "train", data.processor.max_pixels)):
            digests.setdefault(digest, source.name)
    if len(digests) > 1:
        described = " and ".join(f"those of {name!r} by {digest}" for digest, name in digests.items())
        raise UserError(
            f"the regions of the data sources were made by different refiners, {described}; refine all with one "
            "(`lionjax data build SOURCE --refiner DIR`)"
        )
    if not digests:
        return data
    (digest,) = digests
    return dataclasses.replace(data, processor=dataclasses.replace(data.processor, regions_digest=digest))


def find_digest(dataset: OpenDataset) -> str:
    """The digest of the refiner that made the regions of a data set; empty if it keeps none."""
    for number in range(min(len(dataset), MAX_RECORDS)):
        regions = dataset.load_regions(number)
        if regions is None or regions.digest:
            return "" if regions is None else regions.digest
    return ""
