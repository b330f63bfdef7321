# SPDX-License-Identifier: Apache-2.0
"""Kills short runs with SIGKILL at random moments of their lives, and holds what comes out against a run left alone.

python -m benchmarks.faults [--kills 50 --steps 20 --save-every 2 --seed 0]

The run is the toy of the tests: two stages with dropout, mixed data and a frozen tower, a checkpoint at every other
update, so that most moments fall into starting, restoring, saving or the change of stages. A run that was killed is
started again in its folder until it ends by itself; then the next one begins. Every line of metrics and every bit of
the parameters must be those of the undisturbed run, and no checkpoint may have been put aside. The last line has the
figures; the code is 1 if anything was lost or differs.
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
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import tyro


@dataclasses.dataclass(frozen=True)
class Run:
    """How often to kill, and what."""

    kills: int = 50
    steps: int = 20  # updates of each of the two stages
    save_every: int = 2
    seed: int = 0


def train(workdir: str, steps: int, save_every: int) -> None:
    """The run, in a process of its own, until it ends or is ended."""
    import toy

    from lionjax.core import files
    from lionjax.training import checkpoint, loop

    stages = (toy.stage("one", steps), toy.stage("two", steps, ("hint", "blocks/up", "words")))
    what = toy.experiment(*stages, run={"save_every": save_every})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    params, _ = loop.train(what, workdir, toy.Batches)
    bits = checkpoint.sha256_of_json(checkpoint.leaf_checksums(params))
    files.write_atomic(Path(workdir) / "bits", bits)


def lived(context, workdir: Path, run: Run, most: float | None = None) -> bool:
    """Start the run in a folder; after `most` seconds kill it. Whether it ended by itself."""
    process = context.Process(target=train, args=(str(workdir), run.steps, run.save_every))
    process.start()
    process.join(most)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return False
    if process.exitcode:
        raise SystemExit(f"the run in {workdir} ended with {process.exitcode}, which nobody asked for")
    return True


def compare(workdir: Path, whole: Path) -> dict[str, int]:
    """What a run that was killed has lost, and where it differs, against the one left alone."""
    import toy

    found = {line["update"]: line for line in toy.lines(workdir)}
    wanted = {line["update"]: line for line in toy.lines(whole)}
    same_bits = (workdir / "bits").read_text() == (whole / "bits").read_text()
    return {
        "lost": len(wanted.keys() - found.keys()) + len(toy.lines(workdir)) - len(found),
        "differing": sum(found[u] != wanted[u] for u in wanted.keys() & found.keys()),
        "parameters that differ": int(not same_bits),
        "checkpoints put aside": len(list((workdir / "quarantined").glob("*/"))),
    }


def main() -> int:
    run = tyro.cli(Run)
    # Forked from a server that has imported everything, each process begins at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy", "lionjax.training.loop"])
    moments, sums, kills, runs = random.Random(run.seed), {}, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        lived(context, Path(folder) / "warm", run)  # so that all runs find their programs compiled
        began = time.monotonic()
        lived(context, whole, run)
        alone = time.monotonic() - began
        while kills < run.kills:
            workdir, runs = Path(folder) / str(runs), runs + 1
            began, before = time.monotonic(), kills
            while not lived(context, workdir, run, moments.uniform(0, alone) if kills < run.kills else None):
                kills += 1
                print(f"kill {kills}", end="\r", file=sys.stderr, flush=True)
            if kills == before:  # its moment never came: so much for what a life lasts
                alone = time.monotonic() - began
            for name, count in compare(workdir, whole).items():
                sums[name] = sums.get(name, 0) + count
    said = ", ".join(f"{count} {name}" for name, count in sums.items())
    print(f"faults: {kills} kills at random moments in {runs} runs of {2 * run.steps} updates: {said}")
    return int(any(sums.values()))


if __name__ == "__main__":
    sys.exit(main())
