# SPDX-License-Identifier: Apache-2.0
"""Checkpoint overhead: how long training stalls for a checkpoint, and how much slower updates are during its writing.

python -m benchmarks.saving [--config configs/tiny_lion.py --stage 2 --updates 60 --save-every 6]

Trains a stage of a config and saves it very often. The last line has the results: the stall is the time that the loop
waits before the next update can start, relative to the median update.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tyro


@dataclasses.dataclass(frozen=True)
class Run:
    """The config and stage to train, and how often to save it."""

    config: Path = Path("configs/tiny_lion.py")
    stage: int = 2
    updates: int = 60
    save_every: int = 6


def trained(run: Run, workdir: str) -> list[dict]:
    """The lines of metrics.jsonl of a run that logs every update."""
    from lionjax.core import config, files
    from lionjax.data import pipeline
    from lionjax.training import loop

    experiment = config.load(run.config)
    stage = dataclasses.replace(experiment.stages[run.stage], steps=run.updates)
    run_config = dataclasses.replace(experiment.run, log_every=1, save_every=run.save_every)
    experiment = dataclasses.replace(experiment, stages=(stage,), run=run_config)
    loop.train(experiment, workdir, pipeline.batches)
    return files.read_jsonl(Path(workdir) / "metrics.jsonl")


def figures(lines: list[dict], save_every: int, megabytes: float) -> str:
    """The result line. A line's seconds are those since the previous line, so a save is in the next update's line."""
    after_save = [line["seconds"] for line in lines[1:] if line["step"] % save_every == 1]
    without_save = [line["seconds"]["step"] for line in lines[1:] if line["step"] % save_every != 1]
    update = statistics.median(without_save)
    stall = statistics.median(seconds.get("save", 0.0) for seconds in after_save)
    during_write = statistics.median(seconds["step"] for seconds in after_save)
    return (
        f"saving: {len(after_save)} checkpoints of {megabytes:.1f} MB stall {1000 * stall:.1f} ms each, "
        f"{stall / update:.1%} of an update ({1000 * update:.0f} ms); the update during the writing takes "
        f"{during_write / update - 1:+.1%}"
    )


def main() -> None:
    """Train, and print the result line."""
    run = tyro.cli(Run, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        lines = trained(run, folder)
        newest_checkpoint = max((Path(folder) / "checkpoints").iterdir(), key=lambda path: int(path.name))
        record = json.loads((newest_checkpoint / "record" / "metadata").read_text())
        sizes = {"float32": 4, "int32": 4, "bfloat16": 2}
        num_bytes = 0
        for dtype, shape, _ in record["leaves"].values():
            count = sizes[dtype]
            for size in shape:
                count *= size
            num_bytes += count
    print(figures(lines, run.save_every, num_bytes / 1e6))


if __name__ == "__main__":
    main()
