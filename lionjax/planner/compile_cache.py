# SPDX-License-Identifier: Apache-2.0
"""Compile a lowered program ahead of time and cache the analysis on disk, because compilation takes minutes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import jax

from lionjax.planner import hlo_analysis

ANALYZER_SOURCE = Path(hlo_analysis.__file__).read_text()  # part of the cache key: results depend on the analyzer


def compile_and_analyze(
    lowered, topology: str, slice_devices: int = 0, compiler_options: Mapping[str, str] | None = None
) -> dict:
    """The analysis of a compiled program, from the cache in `cache_dir` if it is there.

    Keys: "fits" (bool), "peak" (bytes of memory per device, None if the compiler does not report it), "traffic", "near"
    and "far" (bytes per device: HBM traffic, sent within a slice, sent between slices), "near_exposed", "far_exposed"
    (the part of them that is sent while the device does nothing else), "collectives" ({opcode: [count, bytes sent per
    device, bytes of the largest output]}), "seconds" (compile time). A program that does not fit the
    memory has "fits" False; other compiler errors are raised. `slice_devices`: devices per slice, 0 for one slice.
    """
    parts = (
        lowered.as_text(),
        topology,
        str(sorted((compiler_options or {}).items())),
        jax.__version__,
        metadata.version("libtpu"),
        ANALYZER_SOURCE,
    )
    file = cache_dir() / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.json"
    if file.is_file():
        return json.loads(file.read_text())
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():  # JAX's cache cannot store programs for devices that do not exist
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            program = lowered.compile(compiler_options=dict(compiler_options or {}))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        analysis = {
            "fits": False,
            "peak": requested_bytes(str(error)),
            "traffic": 0,
            "near": 0,
            "far": 0,
            "near_exposed": 0,
            "far_exposed": 0,
            "collectives": {},
        }
    else:
        analysis = analyze_program(program, slice_devices)
    analysis["seconds"] = round(time.perf_counter() - start, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(analysis))
    temporary.replace(file)
    return analysis


def analyze_program(program, slice_devices: int = 0) -> dict:
    """Memory, HBM traffic and collectives of a compiled program; keys as in `compile_and_analyze`."""
    hlo = hlo_analysis.parse_hlo(program.as_text())
    collectives = hlo_analysis.collectives(hlo, slice_devices)
    table: dict[str, list] = {}
    for collective in collectives:
        row = table.setdefault(collective.opcode, [0, 0.0, 0])
        row[:] = row[0] + collective.count, row[1] + collective.bytes_sent, max(row[2], collective.output_bytes)
    return {
        "fits": True,
        "peak": program.memory_analysis().peak_memory_in_bytes,
        "traffic": hlo_analysis.hbm_bytes_accessed(hlo),
        "near": _bytes_sent(collectives, cross_slice=False),
        "far": _bytes_sent(collectives, cross_slice=True),
        "near_exposed": _bytes_sent((c for c in collectives if not c.is_async), cross_slice=False),
        "far_exposed": _bytes_sent((c for c in collectives if not c.is_async), cross_slice=True),
        "collectives": table,
    }


def _bytes_sent(collectives: Iterable[hlo_analysis.Collective], cross_slice: bool) -> float:
    return sum(collective.bytes_sent for collective in collectives if collective.cross_slice == cross_slice)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the compiler rejected a program because it needs more memory than the device has."""
    return "RESOURCE_EXHAUSTED" in str(error)


def requested_bytes(message: str) -> float | None:
    """The bytes that a rejected program needs, from the compiler's message; None if it does not say."""
    match = re.search(r"(?:needs|[Uu]sed|requires|allocat\w+) ([0-9.]+)\s?([KMGT])", message)
    return float(match[1]) * 1024 ** (" KMGT".index(match[2])) if match else None


def cache_dir() -> Path:
    """The folder of cached analyses: $XDG_CACHE_HOME/lionjax/plans."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lionjax" / "plans"
