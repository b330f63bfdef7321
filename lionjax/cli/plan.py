# SPDX-License-Identifier: Apache-2.0
"""`lionjax plan`: arguments and text or JSON output."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax plan`."""
    parser.add_argument("config", metavar="CONFIG", help="a Python file, or the name of one that ships: nextchat_7b")
    names = "v4-32, v5e-16, v5e-256, v5p-512, v6e-64, tpu7x-128, or a shape such as v5e:4x8"
    parser.add_argument("--topology", metavar="NAME", required=True, help=names)
    parser.add_argument("--slices", metavar="N", type=int, default=1, help="number of slices (default: 1)")
    parser.add_argument("--mesh", metavar="F,T", help="FSDP, FSDP,TENSOR or DATA,FSDP,TENSOR (default: the config's)")
    stages = "a stage's number or name, `all`, `generation` or `answers` (default: the stage that trains most)"
    parser.add_argument("--stage", metavar="N", help=stages)
    parser.add_argument("--search", action="store_true", help="try meshes, remat policies and batch sizes; rank them")
    quick = "compile in a third of the time, to a slower program that needs about as much memory"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def plan(args: argparse.Namespace, overrides: list[str]) -> None:
    """Run `lionjax plan`. Raises UserError for an unknown topology, mesh or stage, and if libtpu is missing."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # programs are only compiled, even if the host has a TPU
    from lionjax.core import config
    from lionjax.planner import topologies

    topology = topologies.parse_topology(args.topology, args.slices)
    experiment = config.load(args.config, overrides)
    topologies.require_libtpu()
    from lionjax.planner.worker import PlanWorker

    mesh = None if args.mesh is None else parse_mesh(args.mesh, args.slices)
    if args.stage == "answers":
        _plan_answers(args, experiment, topology, mesh)
        return
    if args.search:
        with PlanWorker() as compiler:
            results = list(_search(experiment, topology, args.stage, args.quick, compiler.plan))
        results.sort(key=lambda result: (result.fits, result.examples_per_second), reverse=True)
        print(json.dumps([to_json(result) for result in results], indent=1) if args.json else format_ranking(results))
        return
    results, quick = [], args.quick
    with PlanWorker() as compiler:
        for stage_index, generation in stages_to_plan(experiment, args.stage):
            results.append(compiler.plan(experiment, topology, stage_index, mesh, generation=generation, quick=quick))
            if not args.json:
                print(format_plan(results[-1]), flush=True)
    if args.json:
        print(json.dumps([to_json(result) for result in results], indent=1))


def _plan_answers(args: argparse.Namespace, experiment, topology, mesh) -> None:
    """Print the plan of answering in slots."""
    from lionjax.planner import answer_plans
    from lionjax.planner.worker import PlanWorker

    with PlanWorker(answer_plans.run_answer_job) as compiler:
        result = compiler.plan(experiment, topology, 0, mesh, quick=args.quick)
    if args.json:
        print(json.dumps(dataclasses.asdict(result) | {"tokens_per_second": result.tokens_per_second}, indent=1))
    else:
        print(format_answer_plan(result))


def format_answer_plan(result) -> str:
    """An AnswerPlan as text of several lines."""
    verdict = "fits" if result.fits else "DOES NOT FIT"
    _, data, fsdp, tensor = result.mesh
    lines = [
        f"{result.config}, answers, on {result.topology}: {verdict}, {result.peak_gib:.2f} of {result.hbm_gib:g} GiB "
        "per device",
        f"  mesh        data {data} fsdp {fsdp} tensor {tensor}, bfloat16 weights",
        f"  slots       {result.num_slots}, {result.admission_rows} prompts of {result.prompt_tokens} tokens of text "
        f"admitted at once, {result.tokens} tokens an answer",
    ]
    if result.fits:
        for name, seconds in result.programs.items():
            bottleneck = max(result.terms[name], key=result.terms[name].get)
            lines.append(f"  {name:<11} {seconds * 1e3:.3g} ms at the published peak rates; bottleneck: {bottleneck}")
        lines.append(f"  prediction  {result.tokens_per_second:,.0f} tokens/s at most, images and prompts counted")
    return "\n".join(lines)


def _search(experiment, topology, stage, quick, plan_fn):
    from lionjax.planner import mesh_search, plans

    stage_index = plans.find_stage_index(experiment, stage)
    for result in mesh_search.search_plans(experiment, topology, stage_index, quick=quick, plan_fn=plan_fn):
        print(format_plan_line(result), file=sys.stderr, flush=True)
        yield result


def stages_to_plan(experiment, stage: str | None) -> list[tuple[int, bool]]:
    """[(stage index, whether to plan generation)] for the value of --stage."""
    from lionjax.planner import plans

    last = len(experiment.stages) - 1
    if stage == "all":
        return [(stage_index, False) for stage_index in range(last + 1)] + [(last, True)]
    if stage == plans.GENERATION:
        return [(last, True)]
    return [(plans.find_stage_index(experiment, stage), False)]


def parse_mesh(spec: str, slices: int = 1):
    """A MeshConfig from sizes ("64,4": fsdp,tensor; "2,32,4": data,fsdp,tensor) or names ("fsdp=64,tensor=4").

    Raises UserError for anything else.
    """
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
        message = f"--mesh {spec!r} is no mesh; write fsdp=4,tensor=2, or only the sizes: 4,2"
        raise UserError(message) from error


def to_json(result) -> dict:
    """The fields of a Plan and the predictions derived from them."""
    predictions = {"step_seconds": result.step_seconds, "utilisation": result.mfu, "dominates": result.bottleneck}
    predictions |= {"overlap_step_seconds": result.overlap_step_seconds, "overlap_mfu": result.overlap_mfu}
    return dataclasses.asdict(result) | predictions


def format_plan(result) -> str:
    """A plan as text of several lines."""
    peak = "unknown" if result.peak_gib is None else f"{result.peak_gib:.2f}"
    verdict = "fits" if result.fits else "DOES NOT FIT"
    lines = [
        f"{result.config}, {result.what}, on {result.topology}: {verdict}, {peak} of {result.hbm_gib:g} GiB per device",
        f"  mesh        {mesh_flags(result)}, batch size {result.rows}, remat {result.remat}",
        f"  parameters  {result.trained:,} trained, {result.frozen:,} frozen",
        f"  products    {format_amount(result.flops, 'FLOP')} per step, "
        f"{format_amount(result.needed_flops, 'FLOP')} without rematerialization",
    ]
    for opcode, (count, bytes_sent, largest) in sorted(result.collectives.items(), key=lambda item: -item[1][1]):
        amounts = f"{format_amount(bytes_sent, 'B')} sent per device, largest array {format_amount(largest, 'B')}"
        lines.append(f"  {opcode:18} {count:>6} x  {amounts}")
    if result.seconds:
        terms = ", ".join(f"{name} {value:.3g} s" for name, value in result.seconds.items() if value)
        lines += [
            f"  prediction  {result.step_seconds:.3g} s per step at the published peak rates, fully overlapped; "
            f"bottleneck: {result.bottleneck} ({terms})",
            f"              {result.examples_per_second:.4g} examples/s, MFU at most {result.mfu:.0%}",
            f"  with the program's own overlap  {result.overlap_step_seconds:.3g} s per step, "
            f"MFU {result.overlap_mfu:.0%}",
        ]
    lines += [f"  note        {note}" for note in result.notes]
    effort = " with --quick" if result.quick else ""
    return "\n".join([*lines, f"  compiled in {result.compile_seconds:.0f} s{effort}; nothing was executed"])


def format_plan_line(result) -> str:
    """A plan as one line."""
    peak = "?" if result.peak_gib is None else f"{result.peak_gib:.1f}"
    verdict = "crashed" if result.broke_off else "fits" if result.fits else "does not fit"
    rate = f"{result.examples_per_second:9.4g} examples/s" if result.examples_per_second else " " * 20
    settings = f"{mesh_flags(result)}, batch size {result.rows}, remat {result.remat}"
    return f"{rate}  {verdict:12} {peak:>6} GiB  {settings}"


def format_ranking(results) -> str:
    """One line per plan below a heading; `results` are already in order."""
    return "\n".join(["predicted at the published peak rates", *map(format_plan_line, results)])


def mesh_flags(result) -> str:
    """The plan's mesh as flags of `lionjax train`; slices only if there are several."""
    names = ("slices", "data", "fsdp", "tensor")
    return " ".join(f"--mesh.{name} {size}" for name, size in zip(names, result.mesh) if name != "slices" or size > 1)


def format_amount(value: float, unit: str) -> str:
    """A number with three digits and a metric prefix: "3.2 TB"."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} P{unit}"
