# SPDX-License-Identifier: Apache-2.0
"""Fault injection: kill training runs with SIGKILL at random times, and compare them with an uninterrupted run.

python -m benchmarks.faults [--kills 50 --steps 20 --save-every 2 --seed 0]

The run is the toy experiment of the tests: two stages with dropout, mixed data and a frozen tower, and a checkpoint
every second update, so that most kills hit startup, restore, saving or a change of stages. A killed run is resumed in
its folder until it finishes; then the next run starts. All lines of metrics.jsonl and all bits of the parameters must
equal those of the uninterrupted run, and no checkpoint may be quarantined. The last line has the counts; the exit code
is 1 if anything is lost or differs.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

import tyro


@dataclasses.dataclass(frozen=True)
class Run:
    """Number of kills, and the length of the runs."""

    kills: int = 50
    steps: int = 20  # updates of each of the two stages
    save_every: int = 2
    seed: int = 0


def train(workdir: str, steps: int, save_every: int) -> None:
    """Train the toy experiment in its own process."""
    import toy

    from lionjax.core import files
    from lionjax.training import checkpoint, loop

    stages = (toy.stage("one", steps), toy.stage("two", steps, ("hint", "blocks/up", "words")))
    experiment = toy.experiment(*stages, run={"save_every": save_every})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    params, _ = loop.train(experiment, workdir, toy.Batches)
    bits = checkpoint.sha256_of_json(checkpoint.leaf_checksums(params))
    files.write_atomic(Path(workdir) / "bits", bits)


def lived(context, workdir: Path, run: Run, most: float | None = None) -> bool:
    """Start the run in a folder and kill it after `most` seconds. Whether it finished before."""
    process = context.Process(target=train, args=(str(workdir), run.steps, run.save_every))
    process.start()
    process.join(most)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return False
    if process.exitcode:
        raise SystemExit(f"the run in {workdir} failed with exit code {process.exitcode}")
    return True


def compare(workdir: Path, reference: Path) -> dict[str, int]:
    """Counts of lost and differing lines, parameters and checkpoints of a killed run against the uninterrupted one."""
    import toy

    lines = {line["update"]: line for line in toy.lines(workdir)}
    expected = {line["update"]: line for line in toy.lines(reference)}
    same_bits = (workdir / "bits").read_text() == (reference / "bits").read_text()
    return {
        "lost": len(expected.keys() - lines.keys()) + len(toy.lines(workdir)) - len(lines),
        "differing": sum(lines[u] != expected[u] for u in expected.keys() & lines.keys()),
        "parameters that differ": int(not same_bits),
        "checkpoints quarantined": len(list((workdir / "quarantined").glob("*/"))),
    }


def main() -> int:
    """Run until `kills` runs were killed; returns the exit code."""
    run = tyro.cli(Run, description=__doc__)
    # Processes fork from a server that has imported everything, so that they start fast.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy", "lionjax.training.loop"])
    rng, sums, kills, runs = random.Random(run.seed), {}, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "whole"
        lived(context, Path(folder) / "warm", run)  # fill the compilation cache for all runs
        start_time = time.monotonic()
        lived(context, reference, run)
        duration = time.monotonic() - start_time
        while kills < run.kills:
            workdir, runs = Path(folder) / str(runs), runs + 1
            start_time, before = time.monotonic(), kills
            while not lived(context, workdir, run, rng.uniform(0, duration) if kills < run.kills else None):
                kills += 1
                print(f"kill {kills}", end="\r", file=sys.stderr, flush=True)
            if kills == before:  # finished before the kill: update the estimated duration
                duration = time.monotonic() - start_time
            for name, count in compare(workdir, reference).items():
                sums[name] = sums.get(name, 0) + count
    counts = ", ".join(f"{count} {name}" for name, count in sums.items())
    print(f"faults: {kills} kills at random times in {runs} runs of {2 * run.steps} updates: {counts}")
    return int(any(sums.values()))


if __name__ == "__main__":
    sys.exit(main())
