# SPDX-License-Identifier: Apache-2.0
"""The command line's side of plans: what `lionjax plan` takes, and how a plan reads."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lionjax plan` takes."""
    parser.add_argument("config", metavar="CONFIG", help="a Python file, such as configs/nextchat_7b.py")
    names = "v4-32, v5e-16, v5e-256, v5p-512, v6e-64, tpu7x-128, or by shape as v5e:4x8"
    parser.add_argument("--topology", metavar="NAME", required=True, help=names)
    parser.add_argument("--slices", metavar="N", type=int, default=1, help="so many of them")
    parser.add_argument("--mesh", metavar="F,T", help="FSDP, FSDP,TENSOR or DATA,FSDP,TENSOR")
    words = "a stage's number or name, all, or generation; by default the one that trains most"
    parser.add_argument("--stage", metavar="N", help=words)
    parser.add_argument("--search", action="store_true", help="try meshes, remat policies and batches")
    words = "let the compiler spend a third of the time, on a slower program that holds about as much"
    parser.add_argument("--quick", action="store_true", help=words)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def plan(args: argparse.Namespace, overrides: list[str]) -> None:
    """`lionjax plan`. Raises UserError for a name that is none, and where libtpu is missing."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # also beside a real TPU: nothing runs
    from lionjax.core import config
    from lionjax.planner import topologies

    topology = topologies.parse_topology(args.topology, args.slices)
    experiment = config.load(args.config, overrides)
    topologies.require_libtpu()
    from lionjax.planner.worker import PlanWorker

    mesh = None if args.mesh is None else parse_mesh(args.mesh, args.slices)
    if args.search:
        with PlanWorker() as compiler:
            found = list(_search(experiment, topology, args.stage, args.quick, compiler.plan))
        found.sort(key=lambda one: (one.fits, one.examples_per_second), reverse=True)
        print(json.dumps([to_json(one) for one in found], indent=1) if args.json else format_ranking(found))
        return
    made, quick = [], args.quick
    with PlanWorker() as compiler:
        for number, asked in stages_to_plan(experiment, args.stage):
            made.append(compiler.plan(experiment, topology, number, mesh, generation=asked, quick=quick))
            if not args.json:
                print(format_plan(made[-1]), flush=True)
    if args.json:
        print(json.dumps([to_json(one) for one in made], indent=1))


def _search(experiment, topology, stage, quick, plan_fn):
    from lionjax.planner import mesh_search, plans

    number = plans.find_stage_index(experiment, stage)
    for one in mesh_search.search_plans(experiment, topology, number, quick=quick, plan_fn=plan_fn):
        print(format_plan_line(one), file=sys.stderr, flush=True)
        yield one


def stages_to_plan(experiment, stage: str | None) -> list[tuple[int, bool]]:
    """(stage, whether its generation is meant) of what is to be planned."""
    from lionjax.planner import plans

    last = len(experiment.stages) - 1
    if stage == "all":
        return [(number, False) for number in range(last + 1)] + [(last, True)]
    if stage == plans.GENERATION:
        return [(last, True)]
    return [(plans.find_stage_index(experiment, stage), False)]


def parse_mesh(spec: str, slices: int = 1):
    """A mesh by its sizes (64,4 is fsdp,tensor; 2,32,4 data,fsdp,tensor) or by name (fsdp=64,tensor=4)."""
    from lionjax.core.sharding import MeshConfig
    from lionjax.core.types import UserError

    parts = [part.strip() for part in spec.split(",") if part.strip()]
    try:
        if any("=" in part for part in parts):
            sizes = {name.strip(): int(size) for name, size in (part.split("=") for part in parts)}
        else:
            names = ("data", "fsdp", "tensor") if len(parts) == 3 else ("fsdp", "tensor")[: len(parts)]
            sizes = {"data": 1} | dict(zip(names, map(int, parts), strict=True))
        return MeshConfig(**({"slices": slices} | sizes))
    except (TypeError, ValueError) as error:
        message = f"--mesh {spec!r} is no mesh; write fsdp=4,tensor=2, or the sizes alone"
        raise UserError(message) from error


# How a plan reads


def to_json(result) -> dict:
    """All that is known of a plan."""
    known = {"step_seconds": result.step_seconds, "utilisation": result.mfu}
    return dataclasses.asdict(result) | known | {"dominates": result.bottleneck}


def format_plan(result) -> str:
    """A plan in sentences and a small table."""
    peak = "unknown" if result.peak_gib is None else f"{result.peak_gib:.2f}"
    verdict = "fits" if result.fits else "DOES NOT FIT"
    lines = [
        f"{result.config}, {result.what}, on {result.topology}: {verdict}, {peak} of {result.hbm_gib:g} GiB a device",
        f"  mesh        {mesh_flags(result)}, {result.rows} rows, remat {result.remat}",
        f"  parameters  {result.trained:,} trained, {result.frozen:,} frozen",
        f"  products    {format_amount(result.flops, 'FLOP')} a run, {format_amount(result.needed_flops, 'FLOP')} of them needed once",
    ]
    for kind, (count, moved, largest) in sorted(result.collectives.items(), key=lambda kind: -kind[1][1]):
        sent = f"{format_amount(moved, 'B')} sent by each device, largest array {format_amount(largest, 'B')}"
        lines.append(f"  {kind:18} {count:>6} x  {sent}")
    if result.seconds:
        each = ", ".join(f"{name} {value:.3g} s" for name, value in result.seconds.items() if value)
        lines += [
            f"  prediction  {result.step_seconds:.3g} s a run at the published peaks, if all goes on at once; "
            f"{result.bottleneck} dominates ({each})",
            f"              {result.examples_per_second:.4g} rows a second, MFU {result.mfu:.0%} at most",
        ]
    lines += [f"  note        {note}" for note in result.notes]
    effort = " with the least effort" if result.quick else ""
    return "\n".join([*lines, f"  compiled in {result.compile_seconds:.0f} s{effort}; nothing was run"])


def format_plan_line(result) -> str:
    """A plan in one line."""
    peak = "?" if result.peak_gib is None else f"{result.peak_gib:.1f}"
    fit = "broke off" if result.broke_off else "fits" if result.fits else "does not fit"
    rate = f"{result.examples_per_second:9.4g} rows/s" if result.examples_per_second else " " * 16
    return f"{rate}  {fit:12} {peak:>6} GiB  {mesh_flags(result)}, {result.rows} rows, remat {result.remat}"


def format_ranking(results) -> str:
    """Several plans, those first that fit and are fastest by prediction."""
    return "\n".join(["predicted at the published peaks", *map(format_plan_line, results)])


def mesh_flags(result) -> str:
    """The axes that have more than one device, as one writes them for `lionjax train`."""
    names = ("slices", "data", "fsdp", "tensor")
    return " ".join(f"--mesh.{name} {size}" for name, size in zip(names, result.mesh) if name != "slices" or size > 1)


def format_amount(value: float, unit: str) -> str:
    """A number with a prefix: 3.2 TB."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} P{unit}"
