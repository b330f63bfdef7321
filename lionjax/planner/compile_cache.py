# SPDX-License-Identifier: Apache-2.0
"""Compile a program for devices that are not there, and keep what it says: it takes minutes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import jax

from lionjax.planner import hlo_analysis

ANALYZER_SOURCE = Path(hlo_analysis.__file__).read_text()  # another reader sees other things in the same program


def compile_and_analyze(
    lowered, topology: str, slice_devices: int = 0, compiler_options: Mapping[str, str] | None = None
) -> dict:
    """What the compiler says of a program; remembered on disk, because it takes minutes.

    {"fits", "peak" bytes, "traffic", "near", "far" bytes a device moves, "collectives", "seconds"}.
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
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():  # JAX's own cache cannot hold programs for devices that are not there
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            program = lowered.compile(compiler_options=dict(compiler_options or {}))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        seen = {
            "fits": False,
            "peak": requested_bytes(str(error)),
            "traffic": 0,
            "near": 0,
            "far": 0,
            "collectives": {},
        }
    else:
        seen = analyze_program(program, slice_devices)
    seen["seconds"] = round(time.perf_counter() - began, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(seen))
    part.replace(file)
    return seen


def analyze_program(program, slice_devices: int = 0) -> dict:
    """Memory, traffic and exchanges of a compiled program."""
    text = hlo_analysis.parse_hlo(program.as_text())
    exchanges = hlo_analysis.collectives(text, slice_devices)
    table: dict[str, list] = {}
    for one in exchanges:
        row = table.setdefault(one.opcode, [0, 0.0, 0])
        row[:] = row[0] + one.count, row[1] + one.bytes_sent, max(row[2], one.output_bytes)
    return {
        "fits": True,
        "peak": program.memory_analysis().peak_memory_in_bytes,
        "traffic": hlo_analysis.hbm_bytes_accessed(text),
        "near": sum(one.bytes_sent for one in exchanges if not one.cross_slice),
        "far": sum(one.bytes_sent for one in exchanges if one.cross_slice),
        "collectives": table,
    }


def is_out_of_memory(error: Exception) -> bool:
    """Whether the compiler refused a program because it does not fit the chip."""
    return "RESOURCE_EXHAUSTED" in str(error)


def requested_bytes(message: str) -> float | None:
    """How much memory a refused program wanted, as the compiler's sentence has it."""
    found = re.search(r"(?:needs|[Uu]sed|requires|allocat\w+) ([0-9.]+)\s?([KMGT])", message)
    return float(found[1]) * 1024 ** (" KMGT".index(found[2])) if found else None


def cache_dir() -> Path:
    """Where compiled plans are remembered."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lionjax" / "plans"
