# SPDX-License-Identifier: Apache-2.0
"""A LION small enough to make in a second, with random weights, and folders as runs leave them, without training."""

import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.experiment import Experiment, RunConfig, Stage
from lionjax.data.config import DataConfig
from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.inference.loading import example
from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.lion import Lion
from lionjax.nn.adapters import AdapterConfig
from lionjax.training import checkpoint, resume
from lionjax.training.init import layout as init_layout
from lionjax.training.run_folder import claim, updates_before

SIDE = 28
SYSTEM = Lion(
    vision=ViTConfig(image=SIDE, patch=14, width=16, depth=3, heads=2, hidden=24),
    qformer=QFormerConfig(
        width=16, layers=2, heads=2, hidden=24, queries=4, vision_width=16, vocab=1024, positions=96, dropout=0.0
    ),
    aggregator=AggregatorConfig(2, (1, 0), width=16, heads=2, hidden=24, dropout=0.0, projector=24),
    language=T5Config(
        vocab=1024,
        width=32,
        head=8,
        heads=2,
        hidden=48,
        encoder_layers=2,
        decoder_layers=2,
        dropout=0.0,
        activation="gelu",
        adapters=AdapterConfig(8),
    ),
    soft_prompt_token=3,
)
PROCESSOR = ProcessorConfig(image_size=SIDE, prompt_length=128, question_length=64, target_length=24)
QFORMER, AGGREGATOR = ("qformer.*", "soft_prompt"), ("aggregator.*", ".*/adapter_0")


def experiment(seed: int = 0, **data) -> Experiment:
    """Three stages of two steps each over a few scenes."""
    fields = {"batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1}
    both = (("vqa", 1.0), ("rec", 1.0))
    return Experiment(
        name="small",
        system=SYSTEM,
        data=DataConfig(**{"sources": (Scenes((12, 4, 12), pixels=56),), "processor": PROCESSOR} | data),
        stages=(
            Stage("first", 2, QFORMER, both, system=(("visual_input", "QFORMER"),), **fields),
            Stage("second", 2, AGGREGATOR, both, system=(("visual_input", "AGGREGATOR"),), **fields),
            Stage("third", 2, (*QFORMER, *AGGREGATOR, ".*/adapters"), both, **fields),
        ),
        run=RunConfig(log_every=1, save_every=1, frozen_dtype="float32", evaluate_limit=4),
        seed=seed,
    )


def params_of(what: Experiment):
    """Random parameters, drawn by numpy, which compiles nothing. Large enough that picture and prompt matter."""
    batch = example(Processor(what.data.processor))
    flat = trees.flatten(sharding.abstract(what.system.init, jax.random.key(0), batch))
    rng = np.random.default_rng(what.seed)
    return trees.unflatten({path: jnp.asarray(drawn(path, leaf.shape, rng)) for path, leaf in flat.items()})


def drawn(path: str, shape, rng) -> np.ndarray:
    values = rng.normal(size=shape).astype(np.float32)
    if len(shape) < 2 or path.endswith("scale"):
        return 1 + 0.1 * values if path.endswith("scale") else 0.1 * values
    return values * (0.6 if "tokens" in path or "output" in path else 0.3)


def finished(workdir, what: Experiment):
    """A run's folder as it stands after the last stage: the parameters, which it holds."""
    params = params_of(what)
    put(workdir, what, params, len(what.stages))
    return params


def put(workdir, what: Experiment, params, stage: int, step: int = 0):
    """Write where a run stands: at a stage's start, or some steps into it, with these parameters."""
    workdir.mkdir(parents=True, exist_ok=True)
    claim(workdir, what)
    layout = init_layout(what, example(Processor(what.data.processor)), sharding.make_mesh(devices=jax.devices()[:1]))
    inside = trees.flatten(layout.learned)
    split = [{p: x for p, x in trees.flatten(params).items() if (p in inside) == side} for side in (False, True)]
    never, learned = map(trees.unflatten, split)
    frozen = resume._freeze(workdir, never)
    if not step:
        resume.write_base(workdir, what, resume.Place(stage, 0, never, learned, frozen))
        return
    trainable, _ = trees.split(learned, what.stages[stage].trainable)
    update = updates_before(what, stage) + step
    checkpoint.write(workdir / "checkpoints" / str(update), {"trainable": trainable}, {"frozen": frozen})


def flipped(folder) -> None:
    """One bit of the largest file in a folder is turned."""
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# The same few programs are compiled by several test files.
jax.config.update("jax_compilation_cache_dir", f"{tempfile.gettempdir()}/lionjax-tests-{os.getuid()}")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
compilation_cache.reset_cache()
