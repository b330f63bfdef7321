# SPDX-License-Identifier: Apache-2.0
"""Speed of this checkout against an earlier commit, in alternating turns: training, generation, input pipeline, start.

python -m benchmarks.against_commit COMMIT [--config configs/tiny_lion.py] [--steps 12] [--turns 3]

Both sides are measured from outside, by the command line and by report.json, which are the same in every version. Each
turn trains all stages of the config for `--steps` updates and evaluates the result. Prints medians and their ratio;
above 1 this checkout is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
# The module paths of version 0.1, which every later version accepts.
PIPELINE = """
import sys, time
from lionjax import config
from lionjax.data import pipeline
experiment = config.load(sys.argv[1])
stream = pipeline.batches(experiment.data, experiment.stages[-1], 0, 32)
for _ in range(3):
    next(stream)
start = time.perf_counter()
for _ in range(int(sys.argv[2])):
    next(stream)
print(32 * int(sys.argv[2]) / (time.perf_counter() - start))
"""


def run(checkout: Path, *args: str) -> tuple[str, float]:
    """(stdout, seconds) of Python with `args` in a checkout. Raises CalledProcessError if it fails."""
    env = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    start = time.perf_counter()
    out = subprocess.run([sys.executable, *args], cwd=checkout, env=env, capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(f"{' '.join(args[:4])} in {checkout} failed: {out.stderr[-800:]}")
    return out.stdout, time.perf_counter() - start


def measure(checkout: Path, args: argparse.Namespace) -> dict[str, float]:
    """Figures of one turn: {name: value}, where seconds are better low and rates are better high."""
    figures = {"--help, s": min(run(checkout, "-m", "lionjax", "--help")[1] for _ in range(3))}
    stages = [f"--stages.{n}.steps={args.steps}" for n in range(args.stages)]
    with tempfile.TemporaryDirectory() as workdir:
        limit = f"--run.evaluate_limit={args.limit}"
        run(checkout, "-m", "lionjax", "train", args.config, "--workdir", workdir, limit, *stages)
        report = json.loads((Path(workdir) / "report.json").read_text())
        first = json.loads((Path(workdir) / "metrics.jsonl").read_text().splitlines()[0])["seconds"]
    figures["to the first step, s"] = sum(first.get(part, 0) for part in ("start", "data", "compile", "step"))
    figures["train step, s"] = report["speed"]["step_seconds"]
    figures["training, images/s"] = report["speed"]["images_per_second"]
    figures["generation, tokens/s"] = report["speed"]["generated_tokens_per_second"]
    figures["input pipeline, images/s"] = float(run(checkout, "-c", PIPELINE, args.config, str(args.batches))[0])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the earlier commit")
    parser.add_argument("--config", default="configs/tiny_lion.py")
    parser.add_argument("--stages", type=int, default=3, help="number of stages of the config")
    parser.add_argument("--steps", type=int, default=12, help="updates per stage")
    parser.add_argument("--limit", type=int, default=64, help="answers per benchmark")
    parser.add_argument("--batches", type=int, default=60, help="timed batches of the input pipeline")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    figures: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(["git", "-C", HERE, "worktree", "add", "--quiet", "--detach", before, args.commit], check=True)
        try:
            for turn in range(args.turns):
                sides = {"before": before, "now": HERE}
                for side in sides if turn % 2 == 0 else reversed(sides):
                    figures[side].append(measure(sides[side], args))
                    print(f"turn {turn + 1} of {args.turns}, {side}: {figures[side][-1]}", file=sys.stderr)
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", before], check=True)
    print(f"| | {args.commit} | now | ratio |\n|---|---|---|---|")
    for name in figures["now"][0]:
        old, new = (statistics.median(turn[name] for turn in figures[side]) for side in ("before", "now"))
        print(f"| {name} | {old:.4g} | {new:.4g} | {new / old if '/s' in name else old / new:.3f} |")


if __name__ == "__main__":
    main()
