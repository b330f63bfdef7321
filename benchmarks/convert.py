# SPDX-License-Identifier: Apache-2.0
"""How fast weights go from torch's names to ours and back, and how much memory that takes.

    python benchmarks/convert.py [--gigabytes 1] [--folder /tmp/lionjax-convert]

A T5 of FlanT5-XL's width with as many layers as the size wants, in bfloat16, is written, read once so that the page
cache is warm, and converted both ways, each way in a process of its own. Seconds of the processor are counted as well
as of the clock: on a busy machine only the first say something. Memory is what the process holds at its peak beyond
what it held before the conversion, with and without the pages of mapped files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
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
    from lionjax.language.t5 import FLAN_T5_XL

    c = FLAN_T5_XL
    square, wide = c.width * c.heads * c.head, 3 * c.width * c.hidden
    layer = 2 * (4 * square + wide + 8 * square + wide)  # one encoder and one decoder layer, two bytes each
    layers = max(1, round((gigabytes * 1e9 - 4 * 2 * c.vocab * c.width) / layer))
    return dataclasses.replace(c, encoder_layers=layers, decoder_layers=layers)


def make(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint; bytes of its largest tensor."""
    import ml_dtypes

    from lionjax import config as configs
    from lionjax import params as trees
    from lionjax.convert_plan import Form, plan_state
    from lionjax.convert_systems import CONFIG_FILE, of_config
    from lionjax.convert_write import whole_folder, write_safetensors

    config = t5_of(gigabytes)
    kind = of_config(config)
    shapes, half = trees.flatten(kind.abstract(config)), np.dtype(ml_dtypes.bfloat16)
    leaves = {path: Form(shape.shape, half) for path, shape in shapes.items()}
    made = plan_state(kind.rows(config), leaves).made
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(2**22, np.float32).astype(ml_dtypes.bfloat16)
    parts = ((name, (), np.resize(noise, form.shape)) for name, form in made.items())
    with whole_folder(folder) as partial:
        write_safetensors(partial, "model", made, parts)
        (partial / CONFIG_FILE).write_text(configs.to_json(config))
    return max(form.nbytes for form in made.values())


def one_way(src: str, dst: str, to: str) -> None:
    """In its own process: convert, and print what it took."""
    from lionjax import convert, convert_systems

    if to == "jax":
        source = convert_systems.open_source(Path(src))
        config, tensors = source.config, source.tensors
    else:
        config, tensors = convert.open_params(src)
    convert_systems.table_and_model(convert_systems.of_config(config), config)  # tracing is not what is measured
    for name in tensors:  # warm the page cache
        tensors[name].reshape(-1).view(np.uint8)[::4096].max()
        tensors.forget(name)
    watch = Peak()
    watch.start()
    processor, clock = time.process_time(), time.perf_counter()
    coverage = convert.convert(src, dst, to)
    processor, clock = time.process_time() - processor, time.perf_counter() - clock
    resident, anonymous = watch.stop()
    print(json.dumps([coverage.bytes, processor, clock, resident, anonymous]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lionjax-convert"))
    parser.add_argument("--one-way", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one_way:
        one_way(*given.one_way)
        return
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    try:
        largest = make(given.folder / "torch", given.gigabytes)
        for src, dst, to in (("torch", "jax", "jax"), ("jax", "back", "torch")):
            command = [sys.executable, __file__, "--one-way", str(given.folder / src), str(given.folder / dst), to]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            size, processor, clock, resident, anonymous = json.loads(said.splitlines()[-1])
            print(
                f"to {to}: {size / 1e9:.2f} GB bfloat16, {size / processor / 1e9:.2f} GB/s a core "
                f"({size / clock / 1e9:.2f} by the clock), peak extra memory {anonymous / largest:.2f} x the largest "
                f"tensor ({largest / 1e6:.0f} MB), {resident / largest:.2f} x with pages of mapped files"
            )
        same = all(
            (given.folder / "torch" / file.name).read_bytes() == file.read_bytes()
            for file in (given.folder / "back").glob("*.safetensors")
        )
        print(f"the way there and back is the same to the byte: {same}")
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
