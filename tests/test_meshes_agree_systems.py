# SPDX-License-Identifier: Apache-2.0
"""Every system, small, on several meshes of eight virtual devices: the same first parameters, losses, gradient norms
and answers as on one device."""

import dataclasses

import jax
import numpy as np
import pytest
import small_lion
import small_places

from lionjax import params as trees
from lionjax import scaling, sharding
from lionjax.answering import Answerer
from lionjax.bridges.qformer import QFormerConfig
from lionjax.config import Experiment, Stage
from lionjax.data import pipeline
from lionjax.data.examples import DataConfig
from lionjax.data.processors import Input, Processor
from lionjax.language.t5 import T5Config
from lionjax.scores import GenerateConfig
from lionjax.sharding import MeshConfig
from lionjax.systems.prefix import Prefix
from lionjax.training import checkpoints, stages, start

pytestmark = pytest.mark.slow

MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}
VISION = small_lion.SYSTEM.vision
T5 = dataclasses.replace(small_lion.SYSTEM.language, adapters=None)
QFORMER = small_lion.SYSTEM.qformer
DECODER = dataclasses.replace(small_places.DECODER, adapters=None)
READS_ON = dataclasses.replace(
    small_lion.PROCESSOR,
    reader="decoder",
    tags=False,
    template="{image} {question}",
    image_token=21,
)
LLAVA = Prefix(VISION, DECODER, image_token=21)
BLIP2 = Prefix(
    VISION, DECODER, dataclasses.replace(QFORMER, text=False), feature_layer=-1, class_token=True, vision_eps=1e-6,
    projector_depth=1, image_token=21,
)  # fmt: skip
INSTRUCTBLIP = dataclasses.replace(BLIP2, language=T5, qformer=QFORMER, image_token=None)
CAPTIONS = (("caption", 1.0), ("vqa", 1.0))


def prefix(system: Prefix, trainable: tuple[str, ...]) -> Experiment:
    reads_on = isinstance(system.language, T5Config)
    processor = dataclasses.replace(small_lion.PROCESSOR, tags=False) if reads_on else READS_ON
    stage = Stage("one", 2, trainable, CAPTIONS, batch_size=8, learning_rate=1e-3, warmup_steps=1)
    what = small_lion.experiment()
    data = DataConfig(sources=what.data.sources, processor=processor)
    return dataclasses.replace(what, system=system, data=data, stages=(stage,))


def places(name: str) -> Experiment:
    system, processor, trainable = small_places.SYSTEMS[name]
    return small_places.experiment(system, processor, trainable)


# {name: (experiment, stage)}
SYSTEMS = {
    "lion": (small_lion.experiment(), 2),
    "llava": (prefix(LLAVA, ("projector", "language")), 0),
    "blip2": (prefix(BLIP2, ("qformer", "projector")), 0),
    "instructblip": (prefix(INSTRUCTBLIP, ("qformer", "projector")), 0),
    "nextchat, words and boxes": (places("nextchat"), 0),
    "nextchat, masks": (places("nextchat"), 1),
    "flagship, words and boxes": (places("flagship"), 0),
    "flagship, masks": (places("flagship"), 1),
    "flagship over a decoder": (places("flagship over a decoder"), 0),
}
assert isinstance(QFORMER, QFormerConfig)


def mesh_of(name: str):
    shape = MESHES[name]
    return sharding.make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


def first_batch(what: Experiment, number: int):
    stream = pipeline.batches(what.data, what.stages[number], 0, 8, 0, 1)
    batch = next(stream)
    stream.close()
    return batch


def trained(what: Experiment, number: int, mesh_name: str, updates: int = 3):
    """(fingerprints of the first parameters, losses, gradient norms, paths that are split) of a stage on a mesh."""
    mesh, batch, stage = mesh_of(mesh_name), first_batch(what, number), what.stages[number]
    layout = start.layout(what, batch, mesh)
    never, learned = start.first_parameters(dataclasses.replace(what, weights=()), batch, layout)
    first = checkpoints.fingerprints(trees.merge(never, learned))
    trainable, idle = trees.split(learned, stage.trainable)
    frozen = trees.merge(never, idle)
    where = trees.flatten(trees.merge(trainable, frozen))
    split = {path for path, leaf in where.items() if not leaf.sharding.is_fully_replicated}
    rule = stages.optimizer(stage, trainable, layout.layer_axes)
    state = stages.start(rule, trainable, mesh)
    system = stages.system_of(what, stage)
    step = stages.make_step(system, stage, rule, jax.random.key(1), state, mesh, [])
    losses, norms = [], []
    for _ in range(updates):
        state, metrics = step(state, frozen, sharding.put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return first, losses, norms, split


@pytest.fixture(scope="module")
def on_one_device():
    known = {}

    def of(name):
        if name not in known:
            known[name] = trained(*SYSTEMS[name], "one")
        return known[name]

    return of


@pytest.mark.parametrize("mesh", ["data", "fsdp", "all"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_first_parameters_losses_and_gradient_norms_do_not_depend_on_the_mesh(
    on_one_device, name, mesh
):
    first, losses, norms, split = trained(*SYSTEMS[name], mesh)
    wanted = on_one_device(name)
    assert first == wanted[0]
    np.testing.assert_allclose(losses, wanted[1], rtol=2e-5)
    np.testing.assert_allclose(norms, wanted[2], rtol=2e-4)
    assert losses[2] != losses[0] and min(norms) > 0  # the first update is a warm-up
    assert bool(split) == (mesh != "data")  # else nothing was tried


@pytest.mark.parametrize("name", ["lion", "nextchat, masks"])
def test_a_batch_lies_on_every_mesh_in_its_own_order(name):
    what, number = SYSTEMS[name]
    batch = first_batch(what, number)
    for mesh in map(mesh_of, MESHES):
        assert sharding.share(mesh) == (0, 1)  # one process reads all rows, whatever the mesh
        placed = sharding.put_batch(batch, mesh)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), batch)


def answerer(name: str, mesh_name: str) -> Answerer:
    what, number = SYSTEMS[name]
    mesh = mesh_of(mesh_name)
    like = sharding.abstract(what.system.init, jax.random.key(0), scaling.blank(what), mesh=mesh)
    make = small_places.talking if getattr(what.system, "sam", None) else small_lion.params_of
    params = sharding.place(make(what), like)
    return Answerer(what.system, params, Processor(what.data.processor), mesh)


def said(name: str, mesh_name: str):
    talks = answerer(name, mesh_name)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (8, 40, 40, 3), np.uint8)
    questions = [
        "What is it?",
        "Where is the small red circle?",
        "How many?",
        "Is there a dog in it?",
    ] * 2
    rows = [
        talks.processor.row_of(Input(picture, text)) for picture, text in zip(pictures, questions)
    ]
    language = SYSTEMS[name][0].system.language
    how = GenerateConfig(
        8, eos=language.end_token, start=0 if isinstance(language, T5Config) else None
    )
    beams = dataclasses.replace(how, beams=2)
    large = [(40, 40)] * 8 if "sam" in rows[0] else None
    return talks.say(rows, how, sizes=large), talks.say(rows, beams)


@pytest.mark.parametrize(
    "name",
    ["lion", "llava", "instructblip", "nextchat, words and boxes", "flagship, words and boxes"],
)
def test_answers_boxes_and_masks_do_not_depend_on_the_mesh(name):
    wanted = said(name, "one")
    assert (
        len({answer.text for answer in wanted[0]}) > 1
    )  # it does not say the same whatever it sees
    for mesh in ("fsdp", "all"):
        for alone, here in zip(wanted, said(name, mesh)):
            assert [one.text for one in here] == [one.text for one in alone]
            for one, other in zip(here, alone):
                np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-4)
                if other.masks is not None:
                    assert (one.masks == other.masks).mean() > 0.999 if other.masks.size else True
