# SPDX-License-Identifier: Apache-2.0
"""Every system, small, and a stage of it on several meshes of eight virtual devices."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import small_lion
import small_places
from jax.experimental.compilation_cache import compilation_cache

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.experiment import Experiment, Stage
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import Batch, PackedText
from lionjax.data import pipeline
from lionjax.data.config import DataConfig
from lionjax.data.example_rows import RowBatches
from lionjax.models.connectors.mqformer import MQFormerConfig
from lionjax.models.connectors.perceiver import AbstractorConfig, ImageToTextProjectionConfig, ResamplerConfig
from lionjax.models.connectors.qformer import QFormerConfig
from lionjax.models.language.decoder import KOSMOS2_TEXT, DecoderConfig
from lionjax.models.vlm.blip2_stage1 import Blip2Stage1
from lionjax.models.vlm.flamingo import Flamingo
from lionjax.models.vlm.lyrics_stage1 import LyricsStage1
from lionjax.models.vlm.visual_prefix import VisualPrefixLM
from lionjax.nn.adapters import GatedCrossAttentionConfig
from lionjax.training import checkpoint
from lionjax.training import step as stages
from lionjax.training.init import init_params as init_first_parameters
from lionjax.training.init import make_param_specs as init_layout
from lionjax.training.optimizer import make_optimizer

MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}
VISION = small_lion.SYSTEM.vision
T5 = dataclasses.replace(small_lion.SYSTEM.language, adapters=None)
QFORMER = small_lion.SYSTEM.qformer
DECODER = dataclasses.replace(small_places.DECODER, adapters=None)
SIZES = ("vocab_size", "width", "depth", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
DECODER_SIZES = {name: getattr(DECODER, name) for name in SIZES}
READS_ON = dataclasses.replace(
    small_lion.PROCESSOR, reader="decoder", use_tags=False, prompt_template="{image} {question}", image_token=21
)
LLAVA = VisualPrefixLM(VISION, DECODER, image_token_id=21)
BLIP2 = VisualPrefixLM(
    VISION,
    DECODER,
    dataclasses.replace(QFORMER, use_text_input=False),
    feature_layer=-1,
    keep_class_token=True,
    vision_norm_eps=1e-6,
    projector_depth=1,
    image_token_id=21,
)
INSTRUCTBLIP = dataclasses.replace(BLIP2, language=T5, qformer=QFORMER, image_token_id=None)
MPLUG_OWL = dataclasses.replace(
    LLAVA,
    resampler=AbstractorConfig(16, 2, 2, 24, 4, dropout=0.0),
    keep_class_token=True,
    projector_depth=1,
    add_image_end_token=True,
    torch_names="original",
)
KOSMOS2 = dataclasses.replace(
    LLAVA,
    resampler=ImageToTextProjectionConfig(16, 32, 2, 4),
    keep_class_token=True,
    projector_depth=0,
    normalize_features=True,
    language=dataclasses.replace(
        KOSMOS2_TEXT, **DECODER_SIZES, dropout=0.0, pad_token_id=0, eos_token_id=1, position_offset=1
    ),
)
FROZEN = dataclasses.replace(LLAVA, num_prefix_tokens=2, projector_depth=1, torch_names="original")
BLIP2_FIRST = Blip2Stage1(VISION, QFORMER, embed_dim=8, cls_token_id=4, decoder_start_token_id=5)
MQ_FORMER = MQFormerConfig(
    **{field.name: getattr(QFORMER, field.name) for field in dataclasses.fields(QFORMER)} | {"num_query_tokens": 4},
    num_grounding_queries=2,
    region_width=8,
)
LYRICS = dataclasses.replace(BLIP2, qformer=MQ_FORMER, torch_names="original")
LYRICS_FIRST = LyricsStage1(VISION, MQ_FORMER, embed_dim=8, decoder_start_token_id=5)
FLAMINGO = Flamingo(
    VISION,
    ResamplerConfig(16, 2, 2, 8, 24, 4),
    dataclasses.replace(DECODER, cross_attention=GatedCrossAttentionConfig(1, 16, 2, 8, 32)),
    21,
)
CAPTIONS = (("caption", 1.0), ("vqa", 1.0))


def scenes(system: VisualPrefixLM | Flamingo | Blip2Stage1, trainable: tuple[str, ...]) -> Experiment:
    reads_on = not isinstance(getattr(system, "language", None), DecoderConfig)
    processor = dataclasses.replace(small_lion.PROCESSOR, use_tags=False) if reads_on else READS_ON
    stage = Stage("one", 2, trainable, CAPTIONS, batch_size=8, learning_rate=1e-3, warmup_steps=1)
    what = small_lion.experiment()
    data = DataConfig(sources=what.data.sources, processor=processor)
    return dataclasses.replace(what, model=system, data=data, stages=(stage,))


def places(name: str) -> Experiment:
    system, processor, trainable = small_places.SYSTEMS[name]
    return small_places.experiment(system, processor, trainable)


def two_a_row(what: Experiment) -> Experiment:
    """The experiment with two examples in each of eight rows of its first stage."""
    first = dataclasses.replace(what.stages[0], batch_size=16, examples_per_row=2)
    return dataclasses.replace(what, stages=(first, *what.stages[1:]))


# {name: (experiment, stage)}
SYSTEMS = {
    "lion": (small_lion.experiment(), 2),
    "llava": (scenes(LLAVA, ("projector", "language")), 0),
    "llava, two examples a row": (two_a_row(scenes(LLAVA, ("projector", "language"))), 0),
    "blip2": (scenes(BLIP2, ("qformer", "projector")), 0),
    "instructblip": (scenes(INSTRUCTBLIP, ("qformer", "projector")), 0),
    "mplug_owl": (scenes(MPLUG_OWL, ("vision", "latents", "projector", "last_word")), 0),
    "kosmos2": (scenes(KOSMOS2, ("latents", "language")), 0),
    "frozen": (scenes(FROZEN, ("vision", "projector")), 0),
    "blip2's first stage": (scenes(BLIP2_FIRST, ("(?!vision/).*",)), 0),
    "lyrics' first stage": (scenes(LYRICS_FIRST, ("(?!vision/).*",)), 0),
    "lyrics": (scenes(LYRICS, ("qformer", "projector")), 0),
    "flamingo": (scenes(FLAMINGO, ("resampler", "language/groups/cross")), 0),
    "nextchat, words and boxes": (places("nextchat"), 0),
    "nextchat, two examples a row": (two_a_row(places("nextchat")), 0),
    "nextchat, masks": (places("nextchat"), 1),
    "flagship, words and boxes": (places("flagship"), 0),
    "flagship, masks": (places("flagship"), 1),
    "flagship over a decoder": (places("flagship over a decoder"), 0),
}
assert isinstance(QFORMER, QFormerConfig)


@pytest.fixture(autouse=True, scope="module")
def compiled_anew():
    """Programs of eight devices, each used once, do not come from disk: reading one has crashed XLA's CPU backend."""
    for kept in (False, True):
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()
        if not kept:
            yield


@pytest.fixture(autouse=True)
def programs_are_let_go():
    """Each takes some hundred MB and is not used again."""
    yield
    jax.clear_caches()


def mesh_of(name: str):
    shape = MESHES[name]
    return sharding.make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


@functools.cache
def first_batch(what: Experiment, number: int):
    plain = dataclasses.replace(what.data.processor, region_width=0, packing=None)
    stage = what.stages[number]
    size = 8 * stage.examples_per_row
    stream = pipeline.batches(dataclasses.replace(what.data, processor=plain), stage, 0, size, 0, 1)
    layout = stages.model_for_stage(what, stage).info.row_layout
    batch = next(stream if stage.examples_per_row == 1 else RowBatches(stream, layout, stage.examples_per_row))
    stream.close()
    return with_random_regions(batch) if what.model.info.region_width else batch


def with_random_regions(batch: Batch) -> Batch:
    """A batch of scenes as if a refiner had seen them: three regions, and targets packed behind the boxes."""
    rng, rows = np.random.default_rng(0), len(batch.target_BM)
    ids = np.concatenate([np.full((rows, 3), 7, np.int32), batch.target_BM], axis=1)
    mask = np.concatenate([np.ones((rows, 3), np.int32), batch.target_mask_BM], axis=1)
    boxes = np.arange(ids.shape[1]) < 3
    position = np.where(boxes, np.arange(ids.shape[1]), np.arange(ids.shape[1]) - 2).astype(np.int32)
    packed = PackedText(
        ids,
        np.where(boxes, 6, ids),
        np.broadcast_to(position, ids.shape),
        mask,
        np.where(boxes | (mask == 0), -100, ids),
        np.where(boxes, ids, np.full_like(ids, -100)),
    )
    regions = rng.standard_normal((rows, 3, 8)).astype(np.float32)
    return dataclasses.replace(batch, region_BKD=regions, region_mask_BK=np.ones((rows, 3), bool), packed=packed)


@functools.cache
def layout_of(what: Experiment, mesh_name: str):
    """Shapes and shardings of the parameters of a run on a mesh."""
    return init_layout(what, first_batch(what, 0), mesh_of(mesh_name))


def first_parameters(what: Experiment, mesh_name: str):
    """(frozen, trainable) parameters of a run on a mesh, before its first step."""
    return init_first_parameters(
        dataclasses.replace(what, weights=()), first_batch(what, 0), layout_of(what, mesh_name)
    )


@functools.cache
def parameters_on_host(what: Experiment):
    """The first parameters on one device: those that all stages start from on all meshes."""
    return jax.device_get(first_parameters(what, "one"))


@functools.cache
def fingerprints(what: Experiment, mesh_name: str) -> dict:
    """{path: checksum} of a run's first parameters on a mesh."""
    parts = parameters_on_host(what) if mesh_name == "one" else first_parameters(what, mesh_name)
    return checkpoint.leaf_checksums(trees.merge(*parts))


def trained(what: Experiment, number: int, mesh_name: str, updates: int = 3):
    """(losses, gradient norms, paths that are split) of a stage on a mesh, from parameters of the host."""
    mesh, batch, stage = mesh_of(mesh_name), first_batch(what, number), what.stages[number]
    layout = layout_of(what, mesh_name)
    never, learned = map(sharding.reshard_like, parameters_on_host(what), (layout.frozen, layout.trainable))
    trainable, idle = trees.split(learned, stage.trainable)
    frozen = trees.merge(never, idle)
    where = trees.flatten(trees.merge(trainable, frozen))
    split = {path for path, leaf in where.items() if not leaf.sharding.is_fully_replicated}
    rule = make_optimizer(stage, trainable, layout.layer_axes)
    state = stages.init_train_state(rule, trainable, mesh)
    system = stages.model_for_stage(what, stage)
    step = stages.make_train_step(system, stage, rule, jax.random.key(1), state, mesh, [])
    losses, norms = [], []
    for _ in range(updates):
        state, metrics = step(state, frozen, sharding.shard_batch(batch, mesh))
        jax.block_until_ready((state, metrics))  # on few cores two updates under way can wait for each other for ever
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return losses, norms, split
