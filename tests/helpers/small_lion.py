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
from lionjax.inference.loading import dummy_batch
from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.lion import Lion
from lionjax.nn.adapters import AdapterConfig
from lionjax.training import checkpoint, resume
from lionjax.training.init import make_param_specs as init_layout
from lionjax.training.run_folder import check_or_write_config, updates_before

SIDE = 28
SYSTEM = Lion(
    vision=ViTConfig(image_size=SIDE, patch_size=14, width=16, depth=3, num_heads=2, mlp_dim=24),
    qformer=QFormerConfig(
        width=16,
        depth=2,
        num_heads=2,
        mlp_dim=24,
        num_query_tokens=4,
        vision_width=16,
        vocab_size=1024,
        max_positions=96,
        dropout=0.0,
    ),
    aggregator=AggregatorConfig(2, (1, 0), width=16, num_heads=2, mlp_dim=24, dropout=0.0, projector_mlp_dim=24),
    language=T5Config(1024, 32, 8, 2, 48, 2, 2, dropout=0.0, activation="gelu", adapters=AdapterConfig(8)),
    soft_prompt_token_id=3,
)
PROCESSOR = ProcessorConfig(image_size=SIDE, max_prompt_tokens=128, max_question_tokens=64, max_target_tokens=24)
QFORMER, AGGREGATOR = ("qformer.*", "soft_prompt"), ("aggregator.*", ".*/adapter_0")


def experiment(seed: int = 0, **data) -> Experiment:
    """Three stages of two steps each over a few scenes."""
    fields = {"batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1}
    both = (("vqa", 1.0), ("rec", 1.0))
    return Experiment(
        name="small",
        model=SYSTEM,
        data=DataConfig(**{"sources": (Scenes((12, 4, 12), image_size=56),), "processor": PROCESSOR} | data),
        stages=(
            Stage("first", 2, QFORMER, both, model_overrides=(("visual_input", "QFORMER"),), **fields),
            Stage("second", 2, AGGREGATOR, both, model_overrides=(("visual_input", "AGGREGATOR"),), **fields),
            Stage("third", 2, (*QFORMER, *AGGREGATOR, ".*/adapters"), both, **fields),
        ),
        run=RunConfig(log_every=1, save_every=1, frozen_dtype="float32", evaluate_limit=4),
        seed=seed,
    )


def params_of(what: Experiment):
    """Random parameters, drawn by numpy, which compiles nothing. Large enough that picture and prompt matter."""
    batch = dummy_batch(Processor(what.data.processor))
    flat = trees.flatten(sharding.abstract_params(what.model.init, jax.random.key(0), batch))
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
    check_or_write_config(workdir, what)
    layout = init_layout(
        what, dummy_batch(Processor(what.data.processor)), sharding.make_mesh(devices=jax.devices()[:1])
    )
    inside = trees.flatten(layout.trainable)
    split = [{p: x for p, x in trees.flatten(params).items() if (p in inside) == side} for side in (False, True)]
    never, learned = map(trees.unflatten, split)
    frozen = resume._save_frozen(workdir, never)
    if not step:
        resume.save_base(workdir, what, resume.Position(stage, 0, never, learned, frozen))
        return
    trainable, _ = trees.split(learned, what.stages[stage].trainable)
    update = updates_before(what, stage) + step
    checkpoint.save_tree(workdir / "checkpoints" / str(update), {"trainable": trainable}, {"frozen": frozen})


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
