# SPDX-License-Identifier: Apache-2.0
"""The command line's side of plans: what `lionjax plan` takes, and how a plan reads."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """What `lionjax plan` takes."""
    verb.add_argument("config", metavar="CONFIG", help="a Python file, such as configs/nextchat_7b.py")
    names = "v4-32, v5e-16, v5e-256, v5p-512, v6e-64, tpu7x-128, or by shape as v5e:4x8"
    verb.add_argument("--topology", metavar="NAME", required=True, help=names)
    verb.add_argument("--slices", metavar="N", type=int, default=1, help="so many of them")
    verb.add_argument("--mesh", metavar="F,T", help="FSDP, FSDP,TENSOR or DATA,FSDP,TENSOR")
    words = "a stage's number or name, all, or generation; by default the one that trains most"
    verb.add_argument("--stage", metavar="N", help=words)
    verb.add_argument("--search", action="store_true", help="try meshes, remat policies and batches")
    words = "let the compiler spend a third of the time, on a slower program that holds about as much"
    verb.add_argument("--quick", action="store_true", help=words)
    verb.add_argument("--json", action="store_true", help="print the figures as JSON")


def plan(given: argparse.Namespace, overrides: list[str]) -> None:
    """`lionjax plan`. Raises UserError for a name that is none, and where libtpu is missing."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # also beside a real TPU: nothing runs
    from lionjax.core import config
    from lionjax.planner import topologies

    topology = topologies.parse(given.topology, given.slices)
    experiment = config.load(given.config, overrides)
    topologies.check()
    from lionjax.planner.worker import Apart

    mesh = None if given.mesh is None else mesh_of(given.mesh, given.slices)
    if given.search:
        with Apart() as compiler:
            found = list(_searched(experiment, topology, given.stage, given.quick, compiler.plan))
        found.sort(key=lambda one: (one.fits, one.speed), reverse=True)
        print(json.dumps([as_json(one) for one in found], indent=1) if given.json else ranking(found))
        return
    made, quick = [], given.quick
    with Apart() as compiler:
        for number, asked in wanted(experiment, given.stage):
            made.append(compiler.plan(experiment, topology, number, mesh, generation=asked, quick=quick))
            if not given.json:
                print(text(made[-1]), flush=True)
    if given.json:
        print(json.dumps([as_json(one) for one in made], indent=1))


def _searched(experiment, topology, stage, quick, make):
    from lionjax.planner import mesh_search, plans

    number = plans.stage_number(experiment, stage)
    for one in mesh_search.search(experiment, topology, number, quick=quick, make=make):
        print(line(one), file=sys.stderr, flush=True)
        yield one


def wanted(experiment, stage: str | None) -> list[tuple[int, bool]]:
    """(stage, whether its generation is meant) of what is to be planned."""
    from lionjax.planner import plans

    last = len(experiment.stages) - 1
    if stage == "all":
        return [(number, False) for number in range(last + 1)] + [(last, True)]
    if stage == plans.GENERATION:
        return [(last, True)]
    return [(plans.stage_number(experiment, stage), False)]


def mesh_of(words: str, slices: int = 1):
    """A mesh by its sizes (64,4 is fsdp,tensor; 2,32,4 data,fsdp,tensor) or by name (fsdp=64,tensor=4)."""
    from lionjax.core.sharding import MeshConfig
    from lionjax.core.types import UserError

    parts = [part.strip() for part in words.split(",") if part.strip()]
    try:
        if any("=" in part for part in parts):
            sizes = {name.strip(): int(size) for name, size in (part.split("=") for part in parts)}
        else:
            names = ("data", "fsdp", "tensor") if len(parts) == 3 else ("fsdp", "tensor")[: len(parts)]
            sizes = {"data": 1} | dict(zip(names, map(int, parts), strict=True))
        return MeshConfig(**({"slices": slices} | sizes))
    except (TypeError, ValueError) as error:
        message = f"--mesh {words!r} is no mesh; write fsdp=4,tensor=2, or the sizes alone"
        raise UserError(message) from error


# How a plan reads


def as_json(made) -> dict:
    """All that is known of a plan."""
    known = {"step_seconds": made.step_seconds, "utilisation": made.utilisation}
    return dataclasses.asdict(made) | known | {"dominates": made.dominates}


def text(made) -> str:
    """A plan in sentences and a small table."""
    peak = "unknown" if made.peak_gib is None else f"{made.peak_gib:.2f}"
    verdict = "fits" if made.fits else "DOES NOT FIT"
    lines = [
        f"{made.config}, {made.what}, on {made.topology}: {verdict}, {peak} of {made.hbm_gib:g} GiB a device",
        f"  mesh        {mesh_words(made)}, {made.rows} rows, remat {made.remat}",
        f"  parameters  {made.trained:,} trained, {made.frozen:,} frozen",
        f"  products    {amount(made.flops, 'FLOP')} a run, {amount(made.needed_flops, 'FLOP')} of them needed once",
    ]
    for kind, (count, moved, largest) in sorted(made.collectives.items(), key=lambda kind: -kind[1][1]):
        sent = f"{amount(moved, 'B')} sent by each device, largest array {amount(largest, 'B')}"
        lines.append(f"  {kind:18} {count:>6} x  {sent}")
    if made.seconds:
        each = ", ".join(f"{name} {value:.3g} s" for name, value in made.seconds.items() if value)
        lines += [
            f"  prediction  {made.step_seconds:.3g} s a run at the published peaks, if all goes on at once; "
            f"{made.dominates} dominates ({each})",
            f"              {made.speed:.4g} rows a second, MFU {made.utilisation:.0%} at most",
        ]
    lines += [f"  note        {note}" for note in made.notes]
    effort = " with the least effort" if made.quick else ""
    return "\n".join([*lines, f"  compiled in {made.compile_seconds:.0f} s{effort}; nothing was run"])


def line(made) -> str:
    """A plan in one line."""
    peak = "?" if made.peak_gib is None else f"{made.peak_gib:.1f}"
    fit = "broke off" if made.broke_off else "fits" if made.fits else "does not fit"
    rate = f"{made.speed:9.4g} rows/s" if made.speed else " " * 16
    return f"{rate}  {fit:12} {peak:>6} GiB  {mesh_words(made)}, {made.rows} rows, remat {made.remat}"


def ranking(found) -> str:
    """Several plans, those first that fit and are fastest by prediction."""
    return "\n".join(["predicted at the published peaks", *map(line, found)])


def mesh_words(made) -> str:
    """The axes that have more than one device, as one writes them for `lionjax train`."""
    names = ("slices", "data", "fsdp", "tensor")
    return " ".join(f"--mesh.{name} {size}" for name, size in zip(names, made.mesh) if name != "slices" or size > 1)


def amount(value: float, unit: str) -> str:
    """A number with a prefix: 3.2 TB."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} P{unit}"
