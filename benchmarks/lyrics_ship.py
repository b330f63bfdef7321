# SPDX-License-Identifier: Apache-2.0
"""Write the tiny Lyrics that ships: MQ-Former, projector and LoRA of a trained run, with its refiner.

python -m benchmarks.lyrics_ship [--workdir runs/lyrics] [--name refined-0] [--out lionjax/data/assets/tiny_lyrics]

The folder lacks the vision tower and the frozen part of the language model, which its config takes from
tiny_vit.safetensors and tiny_t5.safetensors. Weights are stored in bfloat16, those of the experts in float32, so that
the regions keep the digest of the training data. Prints the size of the folder.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import lionjax
from lionjax import convert
from lionjax.core import params as trees
from lionjax.core.experiment import Experiment
from lionjax.inference import loading
from lionjax.pipelines import refiner
from lionjax.training.init import SHIPPED

SHIPPED_LEAVES = re.compile(r"vision/.*|language/(?!.*/lora_[ab]).*")


def shipped_experiment(experiment: Experiment) -> Experiment:
    """The config with the shipped weights alone, and without the folders of its training data and features."""
    weights = tuple(entry for entry in experiment.weights if entry.file.startswith(SHIPPED))
    sources = tuple(dataclasses.replace(source, folder="") for source in experiment.data.sources)
    data = dataclasses.replace(experiment.data, sources=sources)
    settings = dataclasses.replace(experiment.run, feature_cache_dir="")
    return dataclasses.replace(experiment, weights=weights, data=data, run=settings)


def write_refiner(source: Path, out: Path) -> None:
    """A refiner's folder with the weights alone: a detector that was trained here is a run folder, else an export."""
    out.mkdir(parents=True)
    if (source / "detector" / "lionjax.json").is_file():
        shutil.copytree(source / "detector", out / "detector")
    else:
        loading.load(source / "detector").export(out / "detector", to="jax")
    shutil.copytree(source / "tagger", out / "tagger")
    shutil.copyfile(source / refiner.SETTINGS_FILE, out / refiner.SETTINGS_FILE)


def main(
    workdir: Path = Path("runs/lyrics"), name: str = "refined-0", out: Path = Path("lionjax/data/assets/tiny_lyrics")
) -> int:
    """Write the folder; returns the exit code, 1 if the model that is read back is another one."""
    model = lionjax.load(workdir / name, refiner=workdir / "refiner")
    flat = {path: leaf for path, leaf in trees.flatten(model.params).items() if not SHIPPED_LEAVES.fullmatch(path)}
    half = {path: np.asarray(jnp.asarray(leaf, jnp.bfloat16)) for path, leaf in flat.items()}
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_refiner(workdir / "refiner", Path(scratch) / "refiner")
        files = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        companions = {path.relative_to(scratch).as_posix(): path for path in files}
        convert.save(shipped_experiment(model.experiment), trees.unflatten(half), out, companions=companions)
    again = trees.flatten(lionjax.load(out).params)
    changed = [path for path, leaf in trees.flatten(model.params).items() if not close(leaf, again[path])]
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.2f} MB, {len(half)} arrays of its own; changed: {changed or 'none'}")
    return int(bool(changed))


def close(one: jax.Array, other: jax.Array) -> bool:
    """Whether two arrays are equal up to bfloat16."""
    return bool(np.allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=2**-8, atol=0))


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
