# SPDX-License-Identifier: Apache-2.0
"""The streams of batches of a run's stages: opened, with cached features, in rows of several examples, and counted."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lionjax.core import sharding
from lionjax.core.experiment import Experiment, Stage
from lionjax.core.types import IMAGE_TOKEN, Batch, RowLayout, UserError
from lionjax.data.example_rows import RowBatches
from lionjax.training import bucket_folder, checkpoint, distributed, feature_cache, feature_store
from lionjax.training.resume import Position
from lionjax.training.run_log import StageStats


def open_batches(experiment: Experiment, stage: Stage, make_batches: Callable, workdir: Path, mesh: Mesh) -> Any:
    """The stream of a stage's batches, as `make_batches` gives it (see `loop.train`)."""
    data = experiment.data
    if getattr(data, "bad_records_path", None) == "":  # by default the run folder holds the list
        data = dataclasses.replace(data, bad_records_path=str(bucket_folder.own_file(workdir, "bad_records.jsonl")))
    stream = make_batches(data, stage, experiment.seed, stage.batch_size, *sharding.process_shard(mesh))
    if choose_lengths_with := getattr(stream, "choose_lengths_with", None):
        choose_lengths_with(distributed.max_across_processes)
    return stream


def open_all_stages(experiment: Experiment, make_batches: Callable, workdir: Path, mesh: Mesh) -> Batch:
    """The first batch of the first stage. The data of all stages are opened, so that none fails after hours."""
    example = None
    for stage in experiment.stages:
        with contextlib.closing(open_batches(experiment, stage, make_batches, workdir, mesh)) as stream:
            example = next(stream) if example is None else example
    return example


def with_feature_cache(run: Any, position: Position, model: Any, stream: Any) -> feature_cache.CachedBatches:
    """The stream with cached features: in memory, and in files if `run.feature_cache_dir` is set.

    `run`: the `loop.RunContext`.
    Raises UserError if the data augment images at random, because features are then not constant.
    """
    if stream.random_augmentation:
        raise UserError(
            "run.cache_features is set, but the data augment images at random; set run.cache_features to false, or "
            "data.crop_scale to 1,1 and data.hflip to false"
        )
    feature_fn = feature_cache.make_feature_fn(model, position.frozen_params, position.trainable_params, run.mesh)
    folder = run.experiment.run.feature_cache_dir

    def open_store(batch: Batch) -> feature_store.FeatureStore:
        spec = feature_store.make_feature_spec(model, position.frozen_params, position.trainable_params, batch)
        return feature_store.FeatureStore(Path(folder), spec)

    return feature_cache.CachedBatches(stream, feature_fn, run.cache, open_store if folder else None)


def with_example_rows(experiment: Experiment, stage: Stage, model: Any, stream: Any) -> Any:
    """The stream in rows of `stage.examples_per_row` examples, which `validate.check_example_rows` allows."""
    if stage.examples_per_row == 1:
        return stream
    buckets = getattr(experiment.data, "length_buckets", ())
    agree = distributed.max_across_processes
    return RowBatches(stream, model.info.row_layout, stage.examples_per_row, buckets, agree)


def count_text_tokens(batch: Batch, layout: RowLayout | None) -> int:
    """Tokens of prompts and targets; an image that one token stands for is one."""
    if batch.segment_BL is None:
        return int(np.sum(batch.prompt_mask_BL) + np.sum(batch.target_mask_BM))
    tokens, image_tokens = int(np.sum(batch.prompt_mask_BL)), int(np.sum(batch.prompt_BL == IMAGE_TOKEN))
    if layout is None or layout.is_expanded or not layout.tokens_per_image:
        return tokens
    return tokens - image_tokens + image_tokens // layout.tokens_per_image


class StreamCounters:
    """Adds background data loading, checkpoint time, bad records and cut answers to the statistics of a stage."""

    def __init__(self):
        self.batch_seconds = self.bad = self.cut = 0.0

    def add_background_seconds(
        self, stats: StageStats, stream: Any, checkpoints: checkpoint.AsyncCheckpointManager
    ) -> None:
        """Add the seconds spent in the background since the last call: loading batches and saving checkpoints."""
        load_seconds = getattr(stream, "load_seconds", 0.0)
        for part, seconds in (("data", load_seconds - self.batch_seconds), ("save", checkpoints.pop_save_seconds())):
            stats.behind[part] = stats.behind.get(part, 0.0) + seconds
        self.batch_seconds = load_seconds

    def add_row_counts(self, stats: StageStats, stream: Any) -> None:
        """Add the records replaced and the answers cut since the last call, summed over processes.

        All processes must call it.
        """
        counts = (getattr(stream, name, 0) for name in ("num_bad_records", "num_cut_answers"))
        bad, cut = distributed.sum_across_processes(*counts)
        stats.bad_records, self.bad = stats.bad_records + int(bad - self.bad), bad
        stats.cut_answers, self.cut = stats.cut_answers + int(cut - self.cut), cut
