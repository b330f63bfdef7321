# SPDX-License-Identifier: Apache-2.0
"""How long training stands still for a checkpoint, and how much longer updates take while it is written.

python -m benchmarks.saving [--config configs/tiny_lion.py --stage 2 --updates 60 --save-every 6]

A stage of a real config, saved far too often. The last line has the figures: the stall is what the loop waits before
the next update may begin, against the median update.
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
    """Which stage of which config, and how often it is saved."""

    config: Path = Path("configs/tiny_lion.py")
    stage: int = 2
    updates: int = 60
    save_every: int = 6


def trained(run: Run, workdir: str) -> list[dict]:
    """The lines of metrics of a run that logs every update."""
    from lionjax.core import config, files
    from lionjax.data import pipeline
    from lionjax.training import loop

    what = config.load(run.config)
    stage = dataclasses.replace(what.stages[run.stage], steps=run.updates)
    often = dataclasses.replace(what.run, log_every=1, save_every=run.save_every)
    what = dataclasses.replace(what, stages=(stage,), run=often)
    loop.train(what, workdir, pipeline.batches)
    return files.read_jsonl(Path(workdir) / "metrics.jsonl")


def figures(lines: list[dict], save_every: int, megabytes: float) -> str:
    """The seconds of a line are those since the line before: a save is in the line behind it, with the next update."""
    behind = [line["seconds"] for line in lines[1:] if line["step"] % save_every == 1]
    others = [line["seconds"]["step"] for line in lines[1:] if line["step"] % save_every != 1]
    update = statistics.median(others)
    stall = statistics.median(seconds.get("save", 0.0) for seconds in behind)
    beside = statistics.median(seconds["step"] for seconds in behind)
    return (
        f"saving: {len(behind)} checkpoints of {megabytes:.1f} MB stall {1000 * stall:.1f} ms each, "
        f"{stall / update:.1%} of an update ({1000 * update:.0f} ms); the update beside the writing takes "
        f"{beside / update - 1:+.1%}"
    )


def main() -> None:
    run = tyro.cli(Run)
    with tempfile.TemporaryDirectory() as folder:
        lines = trained(run, folder)
        newest = max((Path(folder) / "checkpoints").iterdir(), key=lambda path: int(path.name))
        record = json.loads((newest / "record" / "metadata").read_text())
        sizes = {"float32": 4, "int32": 4, "bfloat16": 2}
        held = 0
        for dtype, shape, _ in record["leaves"].values():
            count = sizes[dtype]
            for side in shape:
                count *= side
            held += count
    print(figures(lines, run.save_every, held / 1e6))


if __name__ == "__main__":
    main()
