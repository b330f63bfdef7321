# SPDX-License-Identifier: Apache-2.0
"""Training steps a second against InstructBLIP or LLaVA in transformers: same weights, batch, run and losses.

python -m benchmarks.train_step [instructblip] [--batch 8 --image 224 --vision-width 384 ... --threads 2]
python -m benchmarks.train_step llava [--batch 8 --image 112 --language-layers 4 ...]

A LION that reads with its Q-Former alone and has no adapters is an InstructBLIP. There all is frozen but the Q-Former
and its projection, in a LLaVA the tower alone. Both learn with AdamW in float32; torch is given its fused AdamW and
whatever attention transformers prefers. One step of each is done in turn. Losses must agree before anything is timed,
and at every step after that.
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

# Beside torch on one GPU neither may take all of its memory. Read when jax starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np

try:
    import tyro
except ImportError:  # it reads this program's own words alone; others use the functions
    tyro = None

from benchmarks import instructblip, llava
from lionjax.training.optimizer import make_optimizer

Sizes = TypeVar("Sizes", instructblip.Sizes, llava.Sizes)
PEERS = {"instructblip": instructblip, "llava": llava}

RATE, DECAY, CLIP = 1e-4, 0.05, 1.0
FIRST = 1e-4  # how far losses may differ before training
LATER = 1e-3  # and when rounding has gone through AdamW
NAMES = ("torch", "lionjax", "torch, features known", "lionjax, features known")


@dataclasses.dataclass(frozen=True)
class Run(Generic[Sizes]):
    """What is compared, how long, and on how much of the machine.

    `only` runs one of the four by itself and prints its memory.
    """

    sizes: tyro.conf.OmitArgPrefixes[Sizes]
    repeats: int = 7
    threads: int = 0  # of torch; 0: one a core (XLA always takes all that the process may use)
    memory: bool = True  # measure peak memory, each in a process of its own
    only: str = ""


def peer_of(s: Sizes):
    """The module that makes both models of these sizes."""
    return sys.modules[type(s).__module__]


def torch_step(s: Sizes, known: bool) -> Callable[[], float]:
    """A function that does one update with torch and returns the loss before it."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = peer_of(s)
    model = peer.torch_model(s).to(device)
    inputs = {name: x.to(device) for name, x in peer.torch_batch(s).items()}
    if known:
        peer.see_once(model, inputs)
    optimiser = peer.torch_optimiser(model, RATE, DECAY)
    learned = [p for p in model.parameters() if p.requires_grad]

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, CLIP)
        optimiser.step()
        return loss.item()

    return step


def our_step(s: Sizes, known: bool) -> tuple[Callable[[], float], float]:
    """The same with lionjax, and how many seconds it took to compile."""
    import jax

    from lionjax.core import sharding

    # On a GPU both would otherwise round products in their own way.
    jax.config.update("jax_default_matmul_precision", "highest")
    peer = peer_of(s)
    system, params = peer.ours_of(s, peer.torch_model(s))
    batch = peer.batch_of(s)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(params, everywhere)
    batch = sharding.shard_batch(batch, mesh)
    if known:
        features = jax.jit(system.extract_features)(params, batch)
        batch = dataclasses.replace(batch, features=features, image_BHWC=None)
    return update_of(s, system, params, batch, mesh)


def update_of(s: Sizes, system, params, batch, mesh) -> tuple[Callable[[], float], float]:
    """A function that does one update with lionjax and returns the loss before it; and its seconds of compilation."""
    import jax

    from lionjax.core import params as trees
    from lionjax.core import sharding
    from lionjax.core.experiment import Stage
    from lionjax.training import step as stages

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
    optimiser = make_optimizer(stage, trainable, axes)
    state = stages.init_train_state(optimiser, trainable, mesh)
    make = stages.make_train_step(system, stage, optimiser, jax.random.key(0), state, mesh, [])
    begun = time.perf_counter()
    update = make.lower(state, frozen, batch).compile()
    compiling = time.perf_counter() - begun
    held = {"state": state}

    def step() -> float:
        held["state"], metrics = update(held["state"], frozen, batch)
        return float(metrics["loss"])

    return step, compiling


def step_of(s: Sizes, name: str) -> tuple[Callable[[], float], float]:
    """One of `NAMES`, ready to go, and its seconds of compilation."""
    known = name.endswith("known")
    return our_step(s, known) if name.startswith("lionjax") else (torch_step(s, known), 0.0)


def forget_peak() -> None:
    """What was held until now does not count: the twin that the weights came from, the compiler."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Most bytes this process has held since then, on the GPU where there is one; libraries included."""
    import torch

    if torch.cuda.is_available():
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        return max(torch.cuda.max_memory_allocated(), stats.get("peak_bytes_in_use", 0))
    held = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(held["VmHWM"].split()[0]) * 1024


def measure_memory(name: str) -> int:
    """Peak memory of three steps, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--only", name]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def main() -> None:
    import torch

    name, *rest = sys.argv[1:] if sys.argv[1:2] and sys.argv[1] in PEERS else ("instructblip", *sys.argv[1:])
    sizes = PEERS[name].Sizes
    run = tyro.cli(Run[sizes], args=rest, default=Run(sizes()), description=__doc__)
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
    """All four in turn; medians. Raises AssertionError where their losses differ."""
    s = run.sizes
    made = {name: step_of(s, name) for name in NAMES}
    first = [step() for step, _ in made.values()]
    np.testing.assert_allclose(first, first[0], rtol=FIRST, err_msg=f"first losses of {NAMES}")
    clock, processor = ({name: [] for name in NAMES} for _ in range(2))
    for _ in range(run.repeats):
        losses = []
        for name, (step, _) in made.items():
            begun = time.perf_counter(), time.process_time()
            losses.append(step())
            clock[name].append(time.perf_counter() - begun[0])
            processor[name].append(time.process_time() - begun[1])
        np.testing.assert_allclose(losses, losses[0], rtol=LATER, err_msg=f"losses of {NAMES}")
    middle, busy = ({n: statistics.median(x) for n, x in y.items()} for y in (clock, processor))
    print(f"{s}\nlosses {first[0]:.4f} -> {losses[0]:.4f}, the same in all four\n")
    print("| step | examples/s | ms (fastest) | against torch | processor ms | against torch | compiled | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for name, taken in middle.items():
        memory = f"{measure_memory(name) / 2**30:.2f} GiB" if run.memory else "-"
        compiling = f"{made[name][1]:.1f} s" if made[name][1] else "-"
        print(
            f"| {name} | {s.batch / taken:.2f} | {1e3 * taken:.0f} ({1e3 * min(clock[name]):.0f}) | "
            f"{middle['torch'] / taken:.2f}x | {1e3 * busy[name]:.0f} | {busy['torch'] / busy[name]:.2f}x | "
            f"{compiling} | {memory} |",
            flush=True,
        )
    print(
        f"\nstep for step {middle['torch'] / middle['lionjax']:.2f}x (goal 1.0x); "
        f"with the ViT's features known {middle['torch'] / middle[NAMES[3]]:.2f}x torch's whole step "
        f"(goal 1.5x), {middle[NAMES[2]] / middle[NAMES[3]]:.2f}x torch with features known"
    )


if __name__ == "__main__":
    main()
