# SPDX-License-Identifier: Apache-2.0
"""How fast weights go from torch's names to ours and back, and how much memory that takes.

    python benchmarks/convert.py [--model t5 --gigabytes 1 | --model nextchat] [--bin] [--orbax FSDP,TENSOR]
                                 [--folder FOLDER]

A checkpoint in bfloat16, with random numbers, is written, read once so that the page cache is warm (as far as memory
goes), and converted both ways, each way in a process of its own. `t5` is a T5 of FlanT5-XL's width with as many layers
as the size wants; `nextchat` has every name and shape of NExT-Chat-7B, 15.5 GB, of which twice as much is on the disk
at a time. `--bin` writes the checkpoint as PyTorch's .bin shards with an index; `--orbax 4,2` goes through an Orbax
checkpoint laid out for so many devices (pretended ones, on a CPU), instead of a folder in our names.

Seconds of the processor are counted as well as of the clock: on a busy machine only the first say something.
Memory is what the process holds at its peak beyond what it held before the conversion, with and without the pages of
mapped files. Every tensor that comes back is held against the checksum of the one that went in.
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
    """Bytes this process holds now: all, and those that no file stands behind."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))


class Peak(threading.Thread):
    """Watches what is held, a few hundred times a second."""

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
    from lionjax.models.language.t5 import FLAN_T5_XL

    c = FLAN_T5_XL
    square, wide = c.width * c.num_heads * c.head_dim, 3 * c.width * c.mlp_dim
    layer = 2 * (4 * square + wide + 8 * square + wide)  # one encoder and one decoder layer, two bytes each
    layers = max(1, round((gigabytes * 1e9 - 4 * 2 * c.vocab_size * c.width) / layer))
    return dataclasses.replace(c, encoder_depth=layers, decoder_depth=layers)


def make(folder: Path, config) -> tuple[int, dict[str, int]]:
    """Write the checkpoint; bytes of its largest tensor, and a checksum of each."""
    import ml_dtypes

    from lionjax.convert.formats.detect import CONFIG_FILE, format_of_config
    from lionjax.convert.io.safetensors_writer import atomic_folder, write_safetensors
    from lionjax.convert.mapping.plan import TensorSpec, plan_state_dict
    from lionjax.core import config as configs
    from lionjax.core import params as trees

    kind, sums = format_of_config(config), {}
    shapes, half = trees.flatten(kind.abstract_params(config)), np.dtype(ml_dtypes.bfloat16)
    leaves = {path: TensorSpec(shape.shape, half) for path, shape in shapes.items()}
    plan = plan_state_dict(kind.weight_map(config), leaves)
    made = plan.output_specs
    first = {name: piece.torch_keys[0] for piece in plan.mapped_tensors for name in piece.tied_keys}
    numbers = {name: number for number, name in enumerate(made)}
    noise = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(half)

    def parts():
        for name, form in made.items():
            # Constants, such as position ids, are no random numbers.
            tensor = (
                np.resize(np.roll(noise, numbers[first.get(name, name)]), form.shape)
                if form.dtype == half
                else constants[name]
            )
            sums[name] = checksum(tensor)
            yield name, (), tensor

    constants = {row.torch_keys[0]: row.transform.to_torch() for row in kind.weight_map(config) if not row.flax_paths}
    with atomic_folder(folder) as partial:
        write_safetensors(partial, "model", made, parts())
        (partial / CONFIG_FILE).write_text(configs.to_json(config))
    return max(form.nbytes for form in made.values()), sums


def as_bin(src: Path, dst: Path) -> None:
    """The same checkpoint as .bin shards with an index, as older releases are published."""
    import torch
    from safetensors.torch import load_file

    dst.mkdir()
    (dst / "lionjax.json").write_bytes((src / "lionjax.json").read_bytes())
    state, shards = load_file(src / "model.safetensors"), [{}, {}]
    for number, (name, tensor) in enumerate(state.items()):
        shards[2 * number // len(state)][name] = tensor
    names = [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
    for name, shard in zip(names, shards):
        torch.save(shard, dst / name)
    where = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
    (dst / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def checksum(tensor: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def one_way(src: str, dst: str, to: str, fsdp: int, tensor: int) -> None:
    """In its own process: convert, and print what it took."""
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
    detect.weight_map_and_abstract_params(kind, config)  # tracing is not what is measured
    for name in tensors.memory_mapped:  # warm the page cache
        tensors[name].reshape(-1).view(np.uint8)[::4096].max()
        tensors.release(name)
    if to == "orbax":
        import orbax.checkpoint  # noqa: F401

        kind.abstract_params(config, mesh)
    watch = Peak()
    watch.start()
    processor, clock = time.process_time(), time.perf_counter()
    if to == "orbax":
        coverage = orbax_folder.save_orbax(src, dst, mesh)
    else:
        coverage = convert.convert(src, dst, to)
    processor, clock = time.process_time() - processor, time.perf_counter() - clock
    resident, anonymous = watch.stop()
    print(json.dumps([coverage.bytes, processor, clock, resident, anonymous]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("t5", "nextchat"), default="t5")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the T5")
    parser.add_argument("--bin", action="store_true", help="the checkpoint as .bin shards")
    parser.add_argument("--orbax", metavar="FSDP,TENSOR", help="through an Orbax checkpoint")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lionjax-convert"))
    parser.add_argument("--one-way", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    axes = [int(size) for size in (given.orbax or "1,1").split(",")]
    if given.one_way:
        one_way(*given.one_way, *axes)
        return
    from lionjax.convert.io.reader import open_weights
    from lionjax.models.vlm.nextchat import NextChat

    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    try:
        config = NextChat() if given.model == "nextchat" else t5_of(given.gigabytes)
        largest, sums = make(given.folder / "torch", config)
        if given.bin:
            as_bin(given.folder / "torch", given.folder / "bin")
            shutil.rmtree(given.folder / "torch")
        source, middle = "bin" if given.bin else "torch", "orbax" if given.orbax else "jax"
        devices = f"--xla_force_host_platform_device_count={axes[0] * axes[1]}"
        for src, dst, to in ((source, middle, middle), (middle, "back", "torch")):
            command = [
                sys.executable,
                __file__,
                "--one-way",
                str(given.folder / src),
                str(given.folder / dst),
                to,
                *(["--orbax", given.orbax] if given.orbax else []),
            ]
            around = os.environ | {"XLA_FLAGS": devices}
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=around).stdout
            shutil.rmtree(given.folder / src)
            size, processor, clock, resident, anonymous = json.loads(said.splitlines()[-1])
            print(
                f"{src} to {to}: {size / 1e9:.2f} GB bfloat16, {size / processor / 1e9:.2f} GB/s a core "
                f"({size / clock / 1e9:.2f} by the clock), peak extra memory {anonymous / largest:.2f} x the largest "
                f"tensor ({largest / 1e6:.0f} MB), {resident / largest:.2f} x with pages of mapped files",
                flush=True,
            )
        back = open_weights(given.folder / "back")
        same = back.keys() == sums.keys()
        for name, tensor in back.items():
            same = same and checksum(tensor) == sums[name]
            back.release(name)
        print(f"all {len(sums)} tensors that came back are those that went in, to the bit: {same}")
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
