# SPDX-License-Identifier: Apache-2.0
"""Throughput and peak memory of weight conversion from torch names to lionjax and back.

    python benchmarks/convert.py [--model t5 --gigabytes 1 | --model nextchat] [--bin] [--orbax FSDP,TENSOR]
                                 [--folder FOLDER]

Writes a random bfloat16 checkpoint, reads it once to warm the page cache, and converts it both ways, each in its own
process. `t5` is a T5 with FlanT5-XL's width and as many layers as --gigabytes allows; `nextchat` has all names and
shapes of NExT-Chat-7B (15.5 GB; needs twice that disk space). `--bin` writes the checkpoint as PyTorch .bin shards with
an index; `--orbax 4,2` converts to an Orbax checkpoint sharded over that many (virtual CPU) devices instead of a
lionjax folder.

Reports CPU time and wall time; on a busy machine, only CPU time is meaningful. Memory is the process's peak during the
conversion minus that before it, with and without pages of memory-mapped files. Checksums of all tensors are compared
after the round trip.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np


def held() -> tuple[int, int]:
    """Resident bytes of this process: all, and anonymous ones (not backed by a file)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))


class Peak(threading.Thread):
    """A thread that tracks the peak resident memory, sampled every 3 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before, self.peak, self.running = held(), held(), True

    def run(self):
        while self.running:
            self.peak = tuple(map(max, self.peak, held()))
            time.sleep(0.003)

    def stop(self) -> tuple[int, int]:
        self.running = False
        self.join()
        return tuple(peak - before for peak, before in zip(self.peak, self.before))


def t5_of(gigabytes: float):
    """A T5 config of FlanT5-XL's width whose bfloat16 checkpoint has about this size."""
    from lionjax.models.language.t5 import FLAN_T5_XL

    c = FLAN_T5_XL
    square, wide = c.width * c.num_heads * c.head_dim, 3 * c.width * c.mlp_dim
    layer = 2 * (4 * square + wide + 8 * square + wide)  # one encoder and one decoder layer, two bytes each
    layers = max(1, round((gigabytes * 1e9 - 4 * 2 * c.vocab_size * c.width) / layer))
    return dataclasses.replace(c, encoder_depth=layers, decoder_depth=layers)


def make(folder: Path, config) -> tuple[int, dict[str, int]]:
    """Write the checkpoint; returns the bytes of its largest tensor, and the checksum of each tensor."""
    import ml_dtypes

    from lionjax.convert.formats.detect import CONFIG_FILE, format_of_config
    from lionjax.convert.io.safetensors_writer import atomic_folder, write_safetensors
    from lionjax.convert.mapping.plan import TensorSpec, plan_state_dict
    from lionjax.core import config as configs
    from lionjax.core import params as trees

    kind, sums = format_of_config(config), {}
    shapes, bfloat16 = trees.flatten(kind.abstract_params(config)), np.dtype(ml_dtypes.bfloat16)
    leaves = {path: TensorSpec(shape.shape, bfloat16) for path, shape in shapes.items()}
    plan = plan_state_dict(kind.weight_map(config), leaves)
    specs = plan.output_specs
    source_name = {name: mapped.torch_keys[0] for mapped in plan.mapped_tensors for name in mapped.tied_keys}
    index_of = {name: index for index, name in enumerate(specs)}
    noise = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(bfloat16)

    def parts():
        for name, spec in specs.items():
            # Constants, such as position ids, have fixed values.
            tensor = (
                np.resize(np.roll(noise, index_of[source_name.get(name, name)]), spec.shape)
                if spec.dtype == bfloat16
                else constants[name]
            )
            sums[name] = checksum(tensor)
            yield name, (), tensor

    constants = {row.torch_keys[0]: row.transform.to_torch() for row in kind.weight_map(config) if not row.flax_paths}
    with atomic_folder(folder) as partial:
        write_safetensors(partial, "model", specs, parts())
        (partial / CONFIG_FILE).write_text(configs.to_json(config))
    return max(spec.nbytes for spec in specs.values()), sums


def as_bin(src: Path, dst: Path) -> None:
    """Write the checkpoint as two .bin shards with an index, the format of older releases."""
    import torch
    from safetensors.torch import load_file

    dst.mkdir()
    (dst / "lionjax.json").write_bytes((src / "lionjax.json").read_bytes())
    state, shards = load_file(src / "model.safetensors"), [{}, {}]
    for i, (name, tensor) in enumerate(state.items()):
        shards[2 * i // len(state)][name] = tensor
    names = [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
    for name, shard in zip(names, shards):
        torch.save(shard, dst / name)
    weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
    (dst / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def checksum(tensor: np.ndarray) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def one_way(src: str, dst: str, to: str, fsdp: int, tensor: int) -> None:
    """Convert in this process; print [bytes, CPU seconds, wall seconds, peak resident bytes, peak anonymous bytes]."""
    from lionjax import convert
    from lionjax.convert import orbax_folder
    from lionjax.convert.formats import detect
    from lionjax.core import sharding

    if convert.holds_params(Path(src)):
        config, tensors = convert.open_params(src)
    else:
        source = detect.open_checkpoint(Path(src))
        config, tensors = source.config, source.tensors
    kind = detect.format_of_config(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=fsdp, tensor=tensor))
    detect.weight_map_and_abstract_params(kind, config)  # keep tracing out of the measurement
    for name in tensors.memory_mapped:  # warm the page cache
        tensors[name].reshape(-1).view(np.uint8)[::4096].max()
        tensors.release(name)
    if to == "orbax":
        import orbax.checkpoint  # noqa: F401

        kind.abstract_params(config, mesh)
    peak_memory = Peak()
    peak_memory.start()
    processor, clock = time.process_time(), time.perf_counter()
    if to == "orbax":
        report = orbax_folder.save_orbax(src, dst, mesh)
    else:
        report = convert.convert(src, dst, to)
    processor, clock = time.process_time() - processor, time.perf_counter() - clock
    resident, anonymous = peak_memory.stop()
    print(json.dumps([report.bytes, processor, clock, resident, anonymous]))


def main() -> None:
    """Write the checkpoint, convert it both ways in subprocesses, print the figures and the round-trip check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("t5", "nextchat"), default="t5")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the T5 checkpoint")
    parser.add_argument("--bin", action="store_true", help="write the checkpoint as .bin shards")
    parser.add_argument("--orbax", metavar="FSDP,TENSOR", help="convert to Orbax, sharded over this mesh")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lionjax-convert"), help="scratch folder, deleted")
    parser.add_argument("--one-way", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    axes = [int(size) for size in (args.orbax or "1,1").split(",")]
    if args.one_way:
        one_way(*args.one_way, *axes)
        return
    from lionjax.convert.io.reader import open_weights
    from lionjax.models.vlm.nextchat import NextChat

    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    try:
        config = NextChat() if args.model == "nextchat" else t5_of(args.gigabytes)
        largest, sums = make(args.folder / "torch", config)
        if args.bin:
            as_bin(args.folder / "torch", args.folder / "bin")
            shutil.rmtree(args.folder / "torch")
        source, intermediate = "bin" if args.bin else "torch", "orbax" if args.orbax else "jax"
        devices = f"--xla_force_host_platform_device_count={axes[0] * axes[1]}"
        for src, dst, to in ((source, intermediate, intermediate), (intermediate, "back", "torch")):
            command = [
                sys.executable,
                __file__,
                "--one-way",
                str(args.folder / src),
                str(args.folder / dst),
                to,
                *(["--orbax", args.orbax] if args.orbax else []),
            ]
            environment = os.environ | {"XLA_FLAGS": devices}
            stdout = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            shutil.rmtree(args.folder / src)
            size, processor, clock, resident, anonymous = json.loads(stdout.splitlines()[-1])
            print(
                f"{src} to {to}: {size / 1e9:.2f} GB bfloat16, {size / processor / 1e9:.2f} GB/s per core "
                f"({size / clock / 1e9:.2f} GB/s wall time), peak extra memory {anonymous / largest:.2f} x the largest "
                f"tensor ({largest / 1e6:.0f} MB), {resident / largest:.2f} x with memory-mapped pages",
                flush=True,
            )
        returned = open_weights(args.folder / "back")
        is_equal = returned.keys() == sums.keys()
        for name, tensor in returned.items():
            is_equal = is_equal and checksum(tensor) == sums[name]
            returned.release(name)
        print(f"round trip of {len(sums)} tensors is bit-exact: {is_equal}")
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
