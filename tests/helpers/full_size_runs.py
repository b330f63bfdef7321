# SPDX-License-Identifier: Apache-2.0
"""Full-size configs as runs: shrunk, on files in the formats that they name, killed, resumed and evaluated."""

import dataclasses
import math
import os
import tempfile
from collections import Counter

import full_size_data
import full_size_segmentation
import full_size_tokenizers
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from paths import CONFIGS, EXPERIMENTS

from lionjax.core import config
from lionjax.data import pipeline
from lionjax.data.box_text import PackingConfig
from lionjax.evaluation import runner
from lionjax.inference import loading
from lionjax.tiny.shrink import shrink
from lionjax.training import checkpoint, loop

NAMES = [name for name in EXPERIMENTS if not name.startswith("tiny")]
# In a file of tests by themselves, so that two processes share the work.
REGION_NAMES = [name for name in NAMES if name.startswith(("kosmos2", "lion", "lisa", "nextchat", "shikra"))]
# What shrinking leaves equal, but for the name, the batch size and the folder of the tokenizer: one run is both.
SAME_SHRUNK = {"lion_flant5xxl": "lion_flant5xl", "lisa_13b": "lisa_7b", "llava15_13b": "llava15_7b"}
# Without image tokens: enough for the prompt template with a question, with earlier rounds, with boxes as digits, and
# with the objects of a table.
ONE_ROUND, ROUNDS, WITH_DIGITS, TABLE = 44, 60, 72, 180
SHORT_PACKING = PackingConfig(max_box_tokens=24, max_caption_tokens=20, length=40)
ROWS, UPDATES = 8, 5


class Killed(BaseException):
    """What the process gets instead of a batch; nothing catches it."""


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_shape_are_compiled_once():
    """Configs of one shape share their programs, as do the two halves of a killed run and later runs of this test."""
    folder = f"{tempfile.gettempdir()}/lionjax-tests-{os.getuid()}"
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    kept = {name: getattr(jax.config, name) for name in names}
    for settings in (dict(zip(names, (folder, 0))), kept):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is not kept:
            yield


def without_names(what):
    """A shrunk config as it is run, with what `SAME_SHRUNK` may differ in taken out."""
    processor = dataclasses.replace(what.data.processor, tokenizer="")
    data = dataclasses.replace(what.data, processor=processor)
    stages = tuple(
        dataclasses.replace(stage, batch_size=ROWS, grad_accum_steps=math.gcd(stage.grad_accum_steps, ROWS))
        for stage in what.stages
    )
    return dataclasses.replace(what, name="", data=data, stages=stages)


def assert_same_shrunk(name: str) -> None:
    """A config is shrunk to another one, whose run is then also its own."""
    one, other = (shrink(config.load(CONFIGS / f"{each}.py"), 0.5) for each in (name, SAME_SHRUNK[name]))
    assert without_names(one) == without_names(other)


def shrunk(name: str):
    """A full-size config, shrunk, with its data and tokenizers written below the working directory."""
    whole = config.load(CONFIGS / f"{name}.py")
    processor = whole.data.processor
    lengths = {"nextchat": ONE_ROUND, "lion": WITH_DIGITS, "shikra": WITH_DIGITS, "palm": TABLE}
    length = lengths.get(name.partition("_")[0], ROUNDS)
    text = min(1.0, length / (processor.max_prompt_tokens - processor.num_image_tokens))
    small = shrink(whole, text)
    if small.data.processor.packing is not None:
        short = dataclasses.replace(small.data.processor, packing=SHORT_PACKING)
        small = dataclasses.replace(small, data=dataclasses.replace(small.data, processor=short))
    full_size_data.write_all(small, full_size_segmentation)
    folders = (processor.tokenizer, processor.question_tokenizer)
    fewer = [
        full_size_tokenizers.write(folder.partition("/")[2], full_size_data.TEXTS) if "/" in folder else 0
        for folder in folders
    ]
    stages = tuple(
        dataclasses.replace(
            stage,
            batch_size=ROWS,
            grad_accum_steps=math.gcd(stage.grad_accum_steps, ROWS),
            steps=updates_for(stage.mixture),
            warmup_steps=2,
        )
        for stage in small.stages
    )
    # The last stage has one checkpoint before its end.
    run = dataclasses.replace(small.run, save_every=stages[-1].steps - 3, log_every=10, evaluate_limit=2)
    return dataclasses.replace(
        small, model=full_size_tokenizers.with_vocabulary(small.model, *fewer), run=run, stages=stages
    )


def updates_for(mixture) -> int:
    """The updates in which each entry has come `UPDATES` times."""
    totals = Counter()  # groups take turns, and weights count within one
    for mix in mixture:
        totals[mix.group] += mix.weight
    needed = (UPDATES * max(1.0, totals[mix.group] / (ROWS * mix.weight)) for mix in mixture)
    return 2 + len(totals) * math.ceil(max(needed))


def watched(seen: set, kill_at: tuple[str, int] | None = None):
    """Batches that note (stage, update, mixture entry) in `seen`; the process dies when an update's batch is read."""

    def open_batches(data, stage, *arguments):
        stream = pipeline.batches(data, stage, *arguments)

        class Watched(type(stream)):
            def __next__(self):
                batch = super().__next__()
                update = self.position()["next"] // ROWS
                if (stage.name, update) == kill_at:
                    raise Killed
                seen.update((stage.name, update, int(part)) for part in batch.dataset_B)
                return batch

        stream.__class__ = Watched
        return stream

    return open_batches


def assert_trained(name, tmp_path, monkeypatch) -> None:
    """Train a config through all its stages, with a kill and a resume, and run all its benchmarks in `tmp_path`.

    A config that is shrunk to the same as an earlier one is compared with that instead.
    """
    if name in SAME_SHRUNK:
        return assert_same_shrunk(name)
    monkeypatch.chdir(tmp_path)
    if name == "smollm2_llava":
        pytest.importorskip("easy_vqa")
    what, seen = shrunk(name), set()
    with pytest.raises(Killed):
        loop.train(what, "run", watched(seen, kill_at=(what.stages[-1].name, what.run.save_every + 2)))
    assert checkpoint.all_steps(tmp_path / "run" / "checkpoints"), "the kill is behind a checkpoint of the last stage"
    params, report = loop.train(what, "run", watched(seen))
    for stage, entry in zip(what.stages, report["stages"], strict=True):
        assert entry["steps"] == stage.steps and entry["frozen_unchanged"] and entry["bad_records"] == 0
        assert np.isfinite([entry["loss_first"], entry["loss_last"]]).all()
        updates = Counter(part for name, _, part in seen if name == stage.name)
        assert min(updates[part] for part in range(len(stage.mixture))) >= UPDATES, (stage.name, updates)
    updates = sum(stage.steps for stage in what.stages)
    entries = runner.evaluate_run(loading.from_params(what, params).engine, what, tmp_path / "run", updates)
    trained = {mix.task for stage in what.stages for mix in stage.mixture}
    assert {entry["task"] for entry in entries} == trained & runner.SCORERS.keys()
