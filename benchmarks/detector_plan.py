# SPDX-License-Identifier: Apache-2.0
"""What Grounding DINO costs on a TPU slice, and its sampling of feature maps, by the compiled program of one batch.

python -m benchmarks.detector_plan [--topology v5e-16] [--height 800] [--width 1066] [--dtype bfloat16]

Swin-T, one image and 256 text tokens a chip. Compiled for the slice by libtpu (extra `tpu`) on a machine without a TPU;
nothing runs. The bytes are those of `lionjax plan` (see docs/plans.md for what they assume). Prints a table.
"""

from __future__ import annotations

import argparse
import collections
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lionjax.core import sharding
from lionjax.models.vision.grounding_dino import GROUNDING_DINO_SWIN_T, GroundingDino
from lionjax.planner import hlo_analysis, plans, topologies
from lionjax.planner.topologies import GIB

# Parts by what is in an instruction's op_name, the first that matches.
PARTS = (
    ("sampling, enhancer", "enhancer/image/attention"),
    ("sampling, decoder", "decoder/to_image"),
    ("Swin", "/swin/"),
    ("fusion", "enhancer/fusion"),
    ("other", ""),
)


def compiled(topology: topologies.Topology, height: int, width: int, dtype: str):
    """(compiled program, FLOPs of all devices) of one batch, an image for each device."""
    mesh = sharding.make_mesh(devices=topologies.topology_devices(topology))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    text = GROUNDING_DINO_SWIN_T.max_text_len
    inputs = (((height, width, 3), dtype), ((height, width), bool), ((text,), jnp.int32), ((text,), jnp.int32))
    one = [jax.ShapeDtypeStruct((1, *shape), kind) for shape, kind in inputs]
    batch = [jax.ShapeDtypeStruct((topology.devices, *shape), kind, sharding=rows) for shape, kind in inputs]
    model = GroundingDino(GROUNDING_DINO_SWIN_T)

    def init(key, *inputs):
        return nn.unbox(model.init(key, *inputs)["params"])

    def detect(params, *inputs):
        found = model.apply({"params": params}, *inputs)
        return found.logits_BQL, found.boxes_BQ4, found.features_BQD

    shapes = jax.eval_shape(init, jax.random.key(0), *one)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=whole), shapes)
    traced = jax.jit(detect).trace(params, *batch)
    program = traced.lower().compile(compiler_options=dict(plans.QUICK_COMPILER_OPTIONS))
    return program, hlo_analysis.jaxpr_flops(traced.jaxpr.jaxpr)


def bytes_by_part(program: hlo_analysis.Program) -> dict[str, float]:
    """Bytes of memory traffic by PARTS."""
    totals: collections.Counter[str] = collections.Counter()
    for instruction, num_bytes in hlo_analysis.instruction_traffic(program):
        name = re.search(r'op_name="([^"]*)"', instruction.attributes)
        totals[next(part for part, text in PARTS if text in (name[1] if name else ""))] += num_bytes
    return totals


def main(argv=None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e-16")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1066)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args(argv)
    topologies.require_libtpu()
    topology = topologies.parse_topology(options.topology)
    program, flops = compiled(topology, options.height, options.width, options.dtype)
    chip, parts = topology.chip, bytes_by_part(hlo_analysis.parse_hlo(program.as_text()))
    total = sum(parts.values())
    products, memory = flops / topology.devices / chip.peak_tflops / 1e12, total / chip.hbm_gb_per_s / 1e9
    peak = program.memory_analysis().peak_memory_in_bytes / GIB
    print(f"{topology}, {options.dtype}: {topology.devices} images of {options.height} x {options.width}, one a chip;")
    print(f"{flops / topology.devices / 1e9:.0f} GFLOP an image, {peak:.2f} of {chip.hbm_gib} GiB a chip;")
    print(f"products {products * 1e3:.1f} ms, memory {memory * 1e3:.1f} ms at the published peaks\n")
    print("| part | GB of memory traffic | share | ms |\n|---|---|---|---|")
    for part, num_bytes in sorted(parts.items(), key=lambda item: -item[1]):
        print(
            f"| {part} | {num_bytes / 1e9:.2f} | {num_bytes / total:.0%} | {num_bytes / chip.hbm_gb_per_s / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
