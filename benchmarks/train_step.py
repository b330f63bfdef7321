# SPDX-License-Identifier: Apache-2.0
"""Train step speed against InstructBLIP or LLaVA in transformers: same weights, batch and losses.

python -m benchmarks.train_step [instructblip] [--batch 8 --image 224 --vision-width 384 ... --threads 2]
python -m benchmarks.train_step llava [--batch 8 --image 112 --language-layers 4 ...]

A LION with only the Q-Former and without adapters is an InstructBLIP. Its Q-Former and projection are trained; of a
LLaVA, all but the vision tower. Both sides use AdamW in float32; torch uses its fused AdamW and transformers' default
attention. Steps of both sides alternate. Losses must agree before the timing starts and at every step.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

# Let jax share the GPU's memory with torch; must be set before jax is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np

try:
    import tyro
except ImportError:  # only needed for this script's command line
    tyro = None

from benchmarks import instructblip, llava
from lionjax.training.optimizer import make_optimizer

Sizes = TypeVar("Sizes", instructblip.Sizes, llava.Sizes)
PEERS = {"instructblip": instructblip, "llava": llava}

RATE, DECAY, CLIP = 1e-4, 0.05, 1.0
FIRST = 1e-4  # relative tolerance of the losses before training
LATER = 1e-3  # and after updates, where AdamW amplifies rounding errors
NAMES = ("torch", "lionjax", "torch, features known", "lionjax, features known")


@dataclasses.dataclass(frozen=True)
class Run(Generic[Sizes]):
    """Sizes, number of timed steps, and threads. `only` runs one of `NAMES` and prints its peak memory in bytes."""

    sizes: tyro.conf.OmitArgPrefixes[Sizes]
    repeats: int = 7
    threads: int = 0  # of torch; 0: one per core (XLA always uses all available cores)
    memory: bool = True  # measure peak memory, each in its own process
    only: str = ""


def peer_of(s: Sizes):
    """The module that builds both models of these sizes: `instructblip` or `llava`."""
    return sys.modules[type(s).__module__]


def torch_step(s: Sizes, known: bool) -> Callable[[], float]:
    """A function that runs one torch update and returns its loss. `known`: with cached vision features."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = peer_of(s)
    model = peer.torch_model(s).to(device)
    inputs = {name: x.to(device) for name, x in peer.torch_batch(s).items()}
    if known:
        peer.see_once(model, inputs)
    optimizer = peer.torch_optimizer(model, RATE, DECAY)
    trainable = [p for p in model.parameters() if p.requires_grad]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        return loss.item()

    return step


def our_step(s: Sizes, known: bool) -> tuple[Callable[[], float], float]:
    """(a function that runs one lionjax update and returns its loss, compile seconds)."""
    import jax

    from lionjax.core import sharding

    # On a GPU, lower precisions round differently from torch's.
    jax.config.update("jax_default_matmul_precision", "highest")
    peer = peer_of(s)
    model, params = peer.ours_of(s, peer.torch_model(s))
    batch = peer.batch_of(s)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(params, replicated)
    batch = sharding.shard_batch(batch, mesh)
    if known:
        features = jax.jit(model.extract_features)(params, batch)
        batch = dataclasses.replace(batch, features=features, image_BHWC=None)
    return update_of(s, model, params, batch, mesh)


def update_of(s: Sizes, system, params, batch, mesh) -> tuple[Callable[[], float], float]:
    """(a function that runs one lionjax update of this model and returns its loss, compile seconds)."""
    import jax

    from lionjax.core import params as trees
    from lionjax.core import sharding
    from lionjax.core.experiment import Stage
    from lionjax.training.step import init_train_state, make_train_step

    peer = peer_of(s)
    stage = Stage(
        "one",
        10**6,
        peer.learned(s),
        (),
        s.batch,
        learning_rate=RATE,
        warmup_steps=0,
        end_learning_rate=RATE,
        weight_decay=DECAY,
        clip_norm=CLIP,
    )
    trainable, frozen = trees.split(params, stage.trainable)
    axes = sharding.layer_axes(jax.eval_shape(system.init, jax.random.key(0), peer.batch_of(s)))
    optimizer = make_optimizer(stage, trainable, axes)
    state = init_train_state(optimizer, trainable, mesh)
    train_step = make_train_step(system, stage, optimizer, jax.random.key(0), state, mesh, [])
    start_time = time.perf_counter()
    update = train_step.lower(state, frozen, batch).compile()
    compile_seconds = time.perf_counter() - start_time
    current = {"state": state}

    def step() -> float:
        current["state"], metrics = update(current["state"], frozen, batch)
        return float(metrics["loss"])

    return step, compile_seconds


def step_of(s: Sizes, name: str) -> tuple[Callable[[], float], float]:
    """The step function of one of `NAMES`, and its compile seconds."""
    known = name.endswith("known")
    return our_step(s, known) if name.startswith("lionjax") else (torch_step(s, known), 0.0)


def forget_peak() -> None:
    """Reset the peak memory of this process, to exclude setup and compilation."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak bytes since `forget_peak`: of GPU memory if there is a GPU, else resident, libraries included."""
    import torch

    if torch.cuda.is_available():
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        return max(torch.cuda.max_memory_allocated(), stats.get("peak_bytes_in_use", 0))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measure_memory(name: str) -> int:
    """Peak bytes of three steps in a subprocess."""
    command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--only", name]
    stdout = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(stdout.splitlines()[-1])


def main() -> None:
    """Run the comparison, or with --only one side."""
    import torch

    name, *args = sys.argv[1:] if sys.argv[1:2] and sys.argv[1] in PEERS else ("instructblip", *sys.argv[1:])
    peer = PEERS[name]
    run = tyro.cli(Run[peer.Sizes], args=args, default=Run(peer.SIZES), description=__doc__)
    torch.set_num_threads(run.threads or len(os.sched_getaffinity(0)))
    if run.only:
        step, _ = step_of(run.sizes, run.only)
        forget_peak()
        for _ in range(3):
            step()
        print(json.dumps(peak_memory()))
        return
    compare(run)


def compare(run: Run) -> None:
    """Run all four sides alternately and print medians. Raises AssertionError if their losses differ."""
    s = run.sizes
    steps = {name: step_of(s, name) for name in NAMES}
    first_losses = [step() for step, _ in steps.values()]
    np.testing.assert_allclose(first_losses, first_losses[0], rtol=FIRST, err_msg=f"first losses of {NAMES}")
    clock, processor = ({name: [] for name in NAMES} for _ in range(2))
    for _ in range(run.repeats):
        losses = []
        for name, (step, _) in steps.items():
            start = time.perf_counter(), time.process_time()
            losses.append(step())
            clock[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
        np.testing.assert_allclose(losses, losses[0], rtol=LATER, err_msg=f"losses of {NAMES}")
    wall_seconds, cpu_seconds = ({n: statistics.median(x) for n, x in y.items()} for y in (clock, processor))
    print(f"{s}\nlosses {first_losses[0]:.4f} -> {losses[0]:.4f}, the same in all four\n")
    print("| step | examples/s | ms (fastest) | vs. torch | CPU ms | vs. torch | compile time | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for name, seconds in wall_seconds.items():
        memory = f"{measure_memory(name) / 2**30:.2f} GiB" if run.memory else "-"
        compile_time = f"{steps[name][1]:.1f} s" if steps[name][1] else "-"
        print(
            f"| {name} | {s.batch / seconds:.2f} | {1e3 * seconds:.0f} ({1e3 * min(clock[name]):.0f}) | "
            f"{wall_seconds['torch'] / seconds:.2f}x | {1e3 * cpu_seconds[name]:.0f} | "
            f"{cpu_seconds['torch'] / cpu_seconds[name]:.2f}x | "
            f"{compile_time} | {memory} |",
            flush=True,
        )
    print(
        f"\nspeedup over torch {wall_seconds['torch'] / wall_seconds['lionjax']:.2f}x (goal 1.0x); "
        f"with cached ViT features {wall_seconds['torch'] / wall_seconds[NAMES[3]]:.2f}x over torch's full step "
        f"(goal 1.5x), {wall_seconds[NAMES[2]] / wall_seconds[NAMES[3]]:.2f}x over torch with cached features"
    )


if __name__ == "__main__":
    main()
