# SPDX-License-Identifier: Apache-2.0
"""Every full-size config compiled for TPU slices that are not there; writes the table docs/plans.md.

python -m benchmarks.plans [--configs lion_flant5xl llava15_7b] [--pods v5e-16 v5e-256 v5p-512 2xv5e-256] [--missing]

Wants the extra `tpu`, and no TPU. A program takes minutes to compile and is remembered, so that the command can be
stopped and goes on; one whose code has not changed is not compiled again. Of each config the stage is planned that
trains most, on the config's own mesh where that splits the batch over the whole slice, else on the nearest that does;
and on the first slice also the answers that it gives. The compiler works at its lowest effort, and at its usual one
where memory is nearly full; what breaks it, or does not fit, is tried on other meshes. Rows of configs or slices that
are not asked for stay as they stand.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import tyro

from lionjax import planner
from lionjax.cli import plan as plan_command
from lionjax.core import config
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import UserError
from lionjax.planner import mesh_search, topologies
from lionjax.planner.worker import PlanWorker

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "plans.md"
PODS = ("v5e-16", "v5e-256", "v5p-512", "2xv5e-256")
ANSWERED = PODS[:1]  # slices on which answers are planned as well as updates
CONFIGS = tuple(path.stem for path in sorted((ROOT / "configs").glob("*.py")) if not path.stem.startswith("tiny"))
NEARLY_FULL = 0.7  # of a chip's memory; the two efforts differ by less than the rest
UPDATES = (
    "config",
    "stage",
    "slice",
    "mesh",
    "rows",
    "fits",
    "GiB a chip",
    "trained",
    "frozen",
    "predicted s",
    "MFU at most",
    "dominates",
    "gathered",
    "reduced",
    "effort",
    "compiled in",
)
ANSWERS = (
    "config",
    "tokens",
    "slice",
    "mesh",
    "rows",
    "fits",
    "GiB a chip",
    "predicted s",
    "tokens/s at most",
    "dominates",
    "effort",
    "compiled in",
)
BEFORE = """# Plans

What `lionjax plan` says of the full-size configs, made by `python -m benchmarks.plans`: the real update, compiled for
the slice by libtpu on a machine without a TPU. Nothing here was run on one. "GiB a chip" is what the compiler reserves
at the peak, against what it has. Predicted seconds and MFU are the program's products and bytes over the published
peaks of the chip, as if all went on at once: real steps are slower. "Gathered" and "reduced" are bytes that each chip
sends in one update. The stage is the one that trains most. Rows are examples of one update over the whole slice, as the
config has them. "Effort" is the compiler's: with the least it is done in a tenth to a third of the time. The program is
then slower, so that times predicted from it are pessimistic; what it holds differs by a fifth or less in the rows
compared (0.90 against 1.11 GiB for llava15_7b, 1.48 against 1.39 for blip2_opt27b, both on v5e-256). Where that comes
near the chip's memory, the row is compiled with the usual effort.

"""
BETWEEN = """

Answers, as `lionjax plan --stage generation` plans them: 32 prompts a host, with all the tokens and beams that the
config gives an answer, on the mesh of the updates.

"""


@dataclasses.dataclass(frozen=True)
class Run:
    """Which configs, and on what: names as for `lionjax plan`, with the number of slices before them."""

    configs: tuple[str, ...] = CONFIGS
    pods: tuple[str, ...] = PODS
    missing: bool = False  # only rows that are not in the table, or stand there without a prediction


def pod_of(text: str) -> topologies.Topology:
    """The slices that a word such as 2xv5e-256 means."""
    number, times, name = text.partition("x")
    if times and number.isdigit():
        return topologies.parse_topology(name, int(number))
    return topologies.parse_topology(text)


def other_meshes(name: str, pod: str) -> list[MeshConfig]:
    """Meshes that split the batch of that stage over the slices, those nearest to the config's own first."""
    experiment = config.load(ROOT / "configs" / f"{name}.py")
    stage = experiment.stages[planner.find_stage_index(experiment, None)]
    return mesh_search.candidate_meshes(stage, pod_of(pod))


def best(name: str, pod: str, answers: bool = False) -> planner.Plan | None:
    """The plan with the least effort; with the usual one where memory is nearly full, on another mesh where there is
    none or it does not fit."""
    experiment = config.load(ROOT / "configs" / f"{name}.py")
    number = planner.find_stage_index(experiment, None)
    with PlanWorker() as compiler:

        def planned(quick: bool, mesh: MeshConfig | None = None) -> planner.Plan | None:
            try:
                return compiler.plan(experiment, pod_of(pod), number, mesh, generation=answers, quick=quick)
            except UserError as error:
                print(f"{name} on {pod}, mesh {mesh}: {error}", file=sys.stderr)
                return None

        made = planned(True)
        if made and made.peak_gib and made.peak_gib > NEARLY_FULL * made.hbm_gib:
            made = planned(False) or made
        for mesh in other_meshes(name, pod):
            if made and made.fits:
                break
            made = planned(True, mesh) or made
        return made


def row_of(made: planner.Plan, pod: str, name: str) -> list[str]:
    """One line of a table, of an update or of answers."""
    moved = {kind: moved for kind, (_, moved, _) in made.collectives.items()}
    reduced = moved.get("all-reduce", 0) + moved.get("reduce-scatter", 0)
    peak = "more" if made.peak_gib is None else f"{made.peak_gib:.2f}"
    mesh = " ".join(f"{axis} {size}" for axis, size in zip(("slices", "data", "fsdp", "tensor"), made.mesh) if size > 1)
    effort = ["least" if made.quick else "usual", f"{made.compile_seconds:.0f} s"]
    fits = [pod, mesh, str(made.rows), "yes" if made.fits else "**no**", f"{peak} of {made.hbm_gib:g}"]
    known = bool(made.step_seconds)
    seconds = f"{made.step_seconds:.3g}" if known else ""
    if made.what == planner.GENERATION:
        experiment = config.load(ROOT / "configs" / f"{name}.py")
        tokens = experiment.generation.max_new_tokens or experiment.data.processor.max_target_tokens
        rate = f"{made.examples_per_second * tokens:,.0f}" if known else ""
        return [name, str(tokens), *fits, seconds, rate, made.bottleneck if known else "", *effort]
    return [
        name,
        made.what,
        *fits,
        f"{made.trained / 1e6:,.0f} M",
        f"{made.frozen / 1e6:,.0f} M",
        seconds,
        f"{made.mfu:.0%}" if known else "",
        made.bottleneck if known else "",
        plan_command.format_amount(moved.get("all-gather", 0), "B") if known else "",
        plan_command.format_amount(reduced, "B") if known else "",
        *effort,
    ]


def known_rows(head: tuple[str, ...]) -> dict[tuple[str, str], list[str]]:
    """{(config, slice): row} of one of the tables as it stands."""
    if not PAGE.is_file():
        return {}
    lines = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    return {(row[0], row[2]): row for row in lines if len(row) == len(head) and row[0] not in (head[0], "---")}


def whole(head: tuple[str, ...]) -> set[tuple[str, str]]:
    """Which rows need not be made: those that have a prediction, or do not fit."""
    places = head.index("fits"), head.index("predicted s")
    rows = known_rows(head).items()
    return {key for key, row in rows if row[places[0]] != "yes" or row[places[1]]}


def table(head: tuple[str, ...], rows: dict[tuple[str, str], list[str]]) -> str:
    """A table in the configs' order."""
    order = sorted(rows, key=lambda key: (key[0], PODS.index(key[1]) if key[1] in PODS else 99, key[1]))
    lines = [head, ["---"] * len(head), *[[cell or " " for cell in rows[key]] for key in order]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def write(updates: dict[tuple[str, str], list[str]], answers: dict[tuple[str, str], list[str]]):
    """The page."""
    absent = [f"{name} on {pod}" for pod in PODS for name in CONFIGS if (name, pod) not in updates]
    still = f"No row yet: {', '.join(absent)}.\n\n" if absent else ""
    if any(row[UPDATES.index("fits")] == "yes" and not row[UPDATES.index("predicted s")] for row in updates.values()):
        still += "Rows without a prediction wait to be made again: what they move was counted too high.\n\n"
    made = f"{still}JAX {jax.__version__}, libtpu {metadata.version('libtpu')}, {datetime.date.today()}."
    part = PAGE.with_suffix(".part")
    text = BEFORE + table(UPDATES, updates) + BETWEEN + table(ANSWERS, answers)
    part.write_text(f"{text}\n\n{made}\n")
    part.replace(PAGE)


def main() -> None:
    """Fill the tables."""
    run = tyro.cli(Run, description=__doc__)
    topologies.require_libtpu()
    failed = 0
    wanted = [(name, pod, False) for pod in run.pods for name in run.configs]
    wanted += [(name, pod, True) for pod in run.pods if pod in ANSWERED for name in run.configs]
    for name, pod, answers in wanted:
        head = ANSWERS if answers else UPDATES
        if run.missing and (name, pod) in whole(head):
            continue
        made = best(name, pod, answers)
        if made is None:
            failed += 1
            continue
        rows = {head: known_rows(head) for head in (UPDATES, ANSWERS)}
        rows[head][name, pod] = row_of(made, pod, name)
        write(rows[UPDATES], rows[ANSWERS])
        print(plan_command.format_plan(made), flush=True)
    print(f"{len(known_rows(UPDATES))} rows in {PAGE}; {failed} failed", file=sys.stderr)


if __name__ == "__main__":
    main()
