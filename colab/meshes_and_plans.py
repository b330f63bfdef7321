# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Meshes and plans
#
# The same config on one device and on eight, with rows, weights or both split, gives the same losses. Then a plan: what
# a program needs of each device, from the compiler, before anything is allocated. Eight virtual devices of this CPU
# stand for a host of eight chips. About a minute on two CPU cores.

# %%
# Installs lionjax where it is not, as on Colab. Put the address of this repository in place of URL.
import importlib.util
import os
import subprocess
import sys

SOURCE = os.environ.get("LIONJAX_SOURCE", "git+URL")
if importlib.util.find_spec("lionjax") is None:
    assert not SOURCE.endswith("URL"), "put the address of this repository in place of URL"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"lionjax[data] @ {SOURCE}"], check=True)

# %%
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # without the compiler's warnings
os.environ.setdefault("PJRT_NPROC", "32")  # threads; with fewer, virtual devices can wait for each other forever
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
print(jax.devices())

# %% [markdown]
# ## Three meshes, one result
#
# `mesh.data` splits the rows of a batch, `mesh.fsdp` rows and weights, `mesh.tensor` the heads and MLPs within a layer.
# Three updates of a small language model on each; on a command line it is
# `lionjax train tiny_text_lm --mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2`.

# %%
import json
import tempfile
from pathlib import Path

from lionjax.core import config
from lionjax.data import pipeline
from lionjax.training import loop

FEW_STEPS = "--stages.0.steps 3 --stages.0.warmup_steps 1 --run.log_every 1 --run.evaluate_limit 0".split()
MESHES = {"rows": (8, 1, 1), "weights": (1, 8, 1), "both": (2, 2, 2)}
losses = {}
for name, (data, fsdp, tensor) in MESHES.items():
    mesh = f"--mesh.data {data} --mesh.fsdp {fsdp} --mesh.tensor {tensor}".split()
    with tempfile.TemporaryDirectory() as folder:
        params, _ = loop.train(config.load("tiny_text_lm", FEW_STEPS + mesh), folder, pipeline.batches)
        lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["loss"] for line in lines]
    print(f"{name:8}", " ".join(f"{loss:.5f}" for loss in losses[name]))
assert all(abs(one - other) < 1e-3 for row in losses.values() for one, other in zip(row, losses["rows"]))

# %% [markdown]
# ## Which device holds what
#
# Parameters name their axes; one table says along which axis of the mesh each is split. Where a size does not divide,
# the axis stays whole.

# %%
from lionjax.core import params as trees
from lionjax.core.sharding import LOGICAL_AXIS_RULES

print({name: axis for name, axis in LOGICAL_AXIS_RULES.items() if axis})
for path, leaf in list(trees.flatten(params).items())[:6]:
    print(f"{path:40} {leaf.shape} {leaf.sharding.spec}")

# %% [markdown]
# ## A plan
#
# The train step of a config is compiled from shapes alone, also for sizes that this machine could not hold. For TPUs
# the command is `lionjax plan llava15_7b --topology v5e-256`, which needs the extra `tpu` and no TPU. Here the same
# analysis reads a program for the eight virtual devices: memory of a device, and what it sends in one update.

# %%
from lionjax.core.sharding import MeshConfig, make_mesh
from lionjax.planner import plans
from lionjax.planner.compile_cache import analyze_program
from lionjax.training.init import make_param_specs

experiment = config.load("tiny_llava")
for name in ("rows", "weights"):
    mesh = make_mesh(MeshConfig(*MESHES[name]))
    specs = make_param_specs(experiment, plans.dummy_batch(experiment), mesh)
    target = plans.train_step_target(experiment, len(experiment.stages) - 1, specs)
    program = target.function.trace(*target.arguments).lower().compile()
    memory = program.memory_analysis()
    mib = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20
    print(f"{name}: {mib:.1f} MiB a device")
    for kind, (count, sent, _) in analyze_program(program)["collectives"].items():
        print(f"  {kind} {count} x, {sent / 1e6:.2f} MB sent")

# %% [markdown]
# ## For a pod
#
# [docs/plans.md](../docs/plans.md) has the plans of all full-size configs for slices of v5e and v5p.

# %%
if importlib.util.find_spec("libtpu"):
    from lionjax.cli import main

    assert main("plan smollm2_llava --topology v5e-16 --quick".split()) == 0
else:
    print("lionjax plan needs libtpu: pip install 'lionjax[tpu]'")
