# SPDX-License-Identifier: Apache-2.0
"""Compile every full-size config for TPU slices without a TPU; writes the tables of docs/plans.md.

python -m benchmarks.plans [--configs lion_flant5xl llava15_7b] [--pods v5e-16 v5e-256 v5p-512 2xv5e-256] [--missing]

Needs the extra `tpu`. Compiling a program takes minutes; compiled programs are cached, so that the command can be
interrupted and resumed. Each config's stage with the most trained parameters is planned on the config's own mesh if
that shards the batch over the whole slice, else on the nearest mesh that does; on the first slice, generation is
planned too. The compiler runs at its lowest effort, or at its default effort if memory is nearly full; a plan that
crashes the compiler or does not fit is retried on other meshes. Rows of other configs and slices are unchanged.
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
ANSWERED = PODS[:1]  # slices for which generation is planned as well as updates
NOT_PLANNED = ("tiny", "own_data")  # beginnings of names
CONFIGS = tuple(file.stem for file in sorted((ROOT / "configs").glob("*.py")) if not file.stem.startswith(NOT_PLANNED))
NEARLY_FULL = 0.7  # fraction of a chip's memory; the two efforts differ by less than the remaining 0.3
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
    "with overlap",
    "dominates",
    "gathered",
    "reduced",
    "passed on",
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

Results of `lionjax plan` for the full-size configs, written by `python -m benchmarks.plans`: the real train step,
compiled for the slice by libtpu on a machine without a TPU. Nothing here was run on a TPU.

| column | meaning |
| --- | --- |
| stage | the stage that trains most parameters |
| rows | examples of one update over the whole slice, as in the config |
| GiB a chip | peak memory that the compiler reserves, of the chip's memory |
| predicted s, MFU at most | the largest of four times, with the others hidden behind it: products, \
memory, links, network |
| with overlap | MFU if only the collectives that the program starts asynchronously are hidden, and the others wait |
| dominates | the largest of the four times |
| gathered, reduced, passed on | bytes that each chip sends in one update, in all-gathers, in all-reduces and \
reduce-scatters, and in permutes (the compiler turns many gathers and reductions beside a product into permutes) |
| effort | of the compiler. "least" compiles in a tenth to a third of the time; the program is slower, so its \
predicted times are pessimistic |

What the prediction assumes: products at the chip's published peak (v5e 197, v5p 459 TFLOP/s); memory traffic of every
instruction at the published bandwidth (819, 2,765 GB/s), where an operand of a fusion or kernel is read once and
nothing is kept on the chip between two of them unless the compiler says so; bytes of a collective by ring algorithms
over all links of the chip (200, 600 GB/s), between slices at 3.125 and 6.25 GB/s a chip; loops as often as they run.
No time is counted for launching, imbalance between chips, or input. A real step is slower than either prediction.

Where memory is nearly full, a row is compiled with the usual effort.

"""
BETWEEN = """

Generation, as planned by `lionjax plan --stage generation`: 32 prompts per host, with the config's maximum of new
tokens and its number of beams, on the mesh of the train step.

"""


@dataclasses.dataclass(frozen=True)
class Run:
    """The configs, and the slices: topology names as for `lionjax plan`, optionally prefixed with their number."""

    configs: tuple[str, ...] = CONFIGS
    pods: tuple[str, ...] = PODS
    missing: bool = False  # only rows that are not in the table, or have no prediction


def pod_of(text: str) -> topologies.Topology:
    """The topology of a name such as v5e-256 or 2xv5e-256 (two slices)."""
    number, times, name = text.partition("x")
    if times and number.isdigit():
        return topologies.parse_topology(name, int(number))
    return topologies.parse_topology(text)


def other_meshes(name: str, pod: str) -> list[MeshConfig]:
    """Meshes that shard the batch of the config's stage over the slices, nearest to the config's own first."""
    experiment = config.load(ROOT / "configs" / f"{name}.py")
    stage = experiment.stages[planner.find_stage_index(experiment, None)]
    return mesh_search.candidate_meshes(stage, pod_of(pod))


def best(name: str, pod: str, answers: bool = False) -> planner.Plan | None:
    """The plan at the lowest compiler effort; at default effort if memory is nearly full, on another mesh if the
    compiler fails or the plan does not fit. None if no mesh works."""
    experiment = config.load(ROOT / "configs" / f"{name}.py")
    stage_index = planner.find_stage_index(experiment, None)
    with PlanWorker() as compiler:

        def try_plan(quick: bool, mesh: MeshConfig | None = None) -> planner.Plan | None:
            try:
                return compiler.plan(experiment, pod_of(pod), stage_index, mesh, generation=answers, quick=quick)
            except UserError as error:
                print(f"{name} on {pod}, mesh {mesh}: {error}", file=sys.stderr)
                return None

        result = try_plan(True)
        if result and result.peak_gib and result.peak_gib > NEARLY_FULL * result.hbm_gib:
            result = try_plan(False) or result
        for mesh in other_meshes(name, pod):
            if result and result.fits:
                break
            result = try_plan(True, mesh) or result
        return result


def row_of(result: planner.Plan, pod: str, name: str) -> list[str]:
    """A table row of a plan, of updates or of generation."""
    bytes_by_kind = {kind: num_bytes for kind, (_, num_bytes, _) in result.collectives.items()}
    reduced = bytes_by_kind.get("all-reduce", 0) + bytes_by_kind.get("reduce-scatter", 0)
    peak = "more" if result.peak_gib is None else f"{result.peak_gib:.2f}"
    mesh = " ".join(
        f"{axis} {size}" for axis, size in zip(("slices", "data", "fsdp", "tensor"), result.mesh) if size > 1
    )
    effort = ["least" if result.quick else "usual", f"{result.compile_seconds:.0f} s"]
    fits = [pod, mesh, str(result.rows), "yes" if result.fits else "**no**", f"{peak} of {result.hbm_gib:g}"]
    has_prediction = bool(result.step_seconds)
    seconds = f"{result.step_seconds:.3g}" if has_prediction else ""
    if result.what == planner.GENERATION:
        experiment = config.load(ROOT / "configs" / f"{name}.py")
        tokens = experiment.generation.max_new_tokens or experiment.data.processor.max_target_tokens
        rate = f"{result.examples_per_second * tokens:,.0f}" if has_prediction else ""
        return [name, str(tokens), *fits, seconds, rate, result.bottleneck if has_prediction else "", *effort]
    return [
        name,
        result.what,
        *fits,
        f"{result.trained / 1e6:,.0f} M",
        f"{result.frozen / 1e6:,.0f} M",
        seconds,
        f"{result.mfu:.0%}" if has_prediction else "",
        f"{result.overlap_mfu:.0%}" if has_prediction else "",
        result.bottleneck if has_prediction else "",
        plan_command.format_amount(bytes_by_kind.get("all-gather", 0), "B") if has_prediction else "",
        plan_command.format_amount(reduced, "B") if has_prediction else "",
        plan_command.format_amount(bytes_by_kind.get("collective-permute", 0), "B") if has_prediction else "",
        *effort,
    ]


def known_rows(head: tuple[str, ...]) -> dict[tuple[str, str], list[str]]:
    """{(config, slice): row} of the existing table with these headings."""
    if not PAGE.is_file():
        return {}
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    return {(row[0], row[2]): row for row in rows if len(row) == len(head) and row[0] not in (head[0], "---")}


def whole(head: tuple[str, ...]) -> set[tuple[str, str]]:
    """The (config, slice) keys of complete rows: those that have a prediction, or do not fit."""
    needed = [head.index(name) for name in ("predicted s", "with overlap") if name in head]
    rows, fits = known_rows(head).items(), head.index("fits")
    return {key for key, row in rows if row[fits] != "yes" or all(row[column] for column in needed)}


def table(head: tuple[str, ...], rows: dict[tuple[str, str], list[str]]) -> str:
    """A Markdown table, sorted by config and slice."""
    order = sorted(rows, key=lambda key: (key[0], PODS.index(key[1]) if key[1] in PODS else 99, key[1]))
    lines = [head, ["---"] * len(head), *[[cell or " " for cell in rows[key]] for key in order]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def write(updates: dict[tuple[str, str], list[str]], answers: dict[tuple[str, str], list[str]]):
    """Write docs/plans.md."""
    missing = [f"{name} on {pod}" for pod in PODS for name in CONFIGS if (name, pod) not in updates]
    notes = f"No row yet: {', '.join(missing)}.\n\n" if missing else ""
    fits, overlap = UPDATES.index("fits"), UPDATES.index("with overlap")
    if any(row[fits] == "yes" and not row[overlap] for row in updates.values()):
        notes += (
            'Rows without a value in "with overlap" are of an earlier reader of programs, which lost what stands behind'
            "\nan attention kernel: their memory traffic and communication are too small, their MFU too large.\n"
            "They have the lengths and batch sizes of 0.1 too, most of them shorter. `--missing` makes them anew.\n\n"
        )
    footer = f"{notes}JAX {jax.__version__}, libtpu {metadata.version('libtpu')}, {datetime.date.today()}."
    temporary = PAGE.with_suffix(".part")
    text = BEFORE + table(UPDATES, updates) + BETWEEN + table(ANSWERS, answers)
    temporary.write_text(f"{text}\n\n{footer}\n")
    temporary.replace(PAGE)


def main() -> None:
    """Plan the configs and update the page after each row."""
    run = tyro.cli(Run, description=__doc__)
    topologies.require_libtpu()
    failed = 0
    todo = [(name, pod, False) for pod in run.pods for name in run.configs]
    todo += [(name, pod, True) for pod in run.pods if pod in ANSWERED for name in run.configs]
    for name, pod, answers in todo:
        head = ANSWERS if answers else UPDATES
        if run.missing and (name, pod) in whole(head):
            continue
        result = best(name, pod, answers)
        if result is None:
            failed += 1
            continue
        rows = {head: known_rows(head) for head in (UPDATES, ANSWERS)}
        rows[head][name, pod] = row_of(result, pod, name)
        write(rows[UPDATES], rows[ANSWERS])
        print(plan_command.format_plan(result), flush=True)
    print(f"{len(known_rows(UPDATES))} rows in {PAGE}; {failed} failed", file=sys.stderr)


if __name__ == "__main__":
    main()
