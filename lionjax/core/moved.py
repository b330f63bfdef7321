# SPDX-License-Identifier: Apache-2.0
"""Module paths of version 0.1, under which today's modules can still be imported.

Configs and scripts that users wrote import by these. An import by an old path works and logs one line with the new one.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import types

log = logging.getLogger(__name__)

# Behind "lionjax.": the path of version 0.1, then the modules of today that hold its names.
_MOVED = """
adapters                   nn.adapters
answering                  inference.engine
attention                  nn.attention nn.positions
bridges                    models.connectors
bridges.latents            models.connectors.perceiver
bridges.qformer            models.connectors.qformer
class_tags                 core.class_tags
config                     core.config core.experiment core.sharding
convert.bert               convert.formats.bert
convert.card               convert.model_card
convert.command            cli.convert
convert.conversion         convert.conversion
convert.coverage           convert.coverage
convert.delta              convert.formats.delta
convert.experts            convert.formats.ram convert.formats.hf_vision
convert.files              convert.io.reader
convert.flamingo           convert.formats.openflamingo
convert.folders            convert.jax_folder
convert.kosmos             convert.formats.kosmos2
convert.lavis              convert.formats.lavis
convert.lora               convert.formats.peft
convert.nextchat           convert.formats.nextchat convert.formats.sam
convert.orbax              convert.io.orbax
convert.originals          convert.torch_folder
convert.owl                convert.formats.mplug_owl
convert.peers              convert.verify.hf_parts
convert.placed             convert.orbax_folder
convert.plan               convert.mapping.plan
convert.prefix             convert.formats.hf_vlm
convert.published          convert.formats.hf_language convert.formats.checkpoint_format
convert.runs               convert.verify.inputs
convert.surgery            convert.resize
convert.systems            convert.formats.detect convert.formats.checkpoint_format convert.formats.lion
convert.tables             convert.mapping.apply
convert.towers             convert.formats.hf_vision
convert.write              convert.io.safetensors_writer
data.annotations           data.datasets.annotation_files data.datasets.refcoco data.datasets.vqa data.datasets.jsonl
data.beam_writer           data.prepare.beam
data.built                 data.datasets.array_record
data.built_writer          data.prepare.array_record_writer
data.coco                  data.datasets.coco
data.drawing               data.scenes.render
data.examples              data.mixture data.config
data.expressions           data.scenes.referring
data.inspection            data.datasets.detect
data.pictures              data.images
data.places                data.boxes
data.preparing             data.prepare.worker
data.processors            data.processor
data.scene_builder         data.scenes.tfds_builder
data.scene_source          data.scenes.source
data.scienceqa             data.datasets.scienceqa
data.sources               data.datasets.source data.datasets.easy_vqa data.scenes.dataset
data.squares               data.letterbox
data.table                 data.datasets.annotated_images
data.tasks                 data.scenes.tasks
data.texts                 data.prompt
data.tiny_tokenizer        tiny.tokenizer
data.told                  tiny.exercises
data.turns                 data.chat
data.wordings              data.templates
demo                       serving.web_demo
evaluation.answers         evaluation.metrics.vqa
evaluation.benchmarks      evaluation.runner
evaluation.captions        evaluation.metrics.captions
evaluation.goodput         evaluation.report.goodput
evaluation.scoring         evaluation.tasks
generate                   inference.generate
heads                      models.heads.region training.validate
interfaces                 core.types
kernels                    nn.flash_attention
language                   models.language
language.bert              models.language.bert
language.decoder           models.language.decoder
language.decoder_names     models.language.decoder_weights
language.t5                models.language.t5
layers                     nn.layers nn.lora
losses                     nn.losses
model                      inference.model inference.loading evaluation.runner
params                     core.params
plots                      evaluation.report.plots
scaling                    planner
scaling.apart              planner.worker
scaling.command            cli.plan
scaling.compiled           planner.compile_cache
scaling.libtpu             planner.libtpu
scaling.plans              planner.plans
scaling.programs           planner.hlo_analysis
scaling.search             planner.mesh_search
scaling.topologies         planner.topologies
scores                     inference.sampling
search                     inference.beam_search
sharding                   core.sharding
systems                    models.vlm
systems.blip2              models.vlm.blip2_stage1
systems.flamingo           models.vlm.flamingo
systems.lion               models.vlm.lion
systems.nextchat           models.vlm.nextchat
systems.prefix             models.vlm.visual_prefix
systems.prefix_names       models.vlm.visual_prefix_weights
tagger                     inference.tagger
training.backbones         tiny.schedules
training.checkpoints       training.checkpoint
training.feature_files     training.feature_store
training.features          training.feature_cache
training.fingerprints      training.checksum
training.journal           training.run_log
training.language_backbone tiny.language
training.mask_backbone     tiny.sam
training.place_backbone    tiny.boxes
training.refused           training.bad_steps
training.stages            training.step training.optimizer
training.start             training.resume training.validate training.init training.run_folder
training.vision_backbone   tiny.vision
vision                     models.vision
vision.ram                 models.vision.ram
vision.sam                 models.vision.sam_encoder
vision.sam_masks           models.vision.sam_decoder
vision.swin                models.vision.swin
vision.vit                 models.vision.vit
weight_rows                core.weight_map
"""
MOVED = {line.split()[0]: tuple(line.split()[1:]) for line in _MOVED.strip().splitlines()}
PACKAGES = {"bridges", "language", "scaling", "systems", "vision"}
# {(path of version 0.1, name): name of today}, where a class or constant that configs use has another name.
RENAMED: dict[tuple[str, str], str] = {}


class _Module(types.ModuleType):
    """Gives each name from the first of today's modules that has it."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        old = self.__name__.removeprefix("lionjax.")
        today = RENAMED.get((old, name), name)
        for home in MOVED[old]:
            module = importlib.import_module(f"lionjax.{home}")
            if hasattr(module, today):
                return getattr(module, today)
        raise AttributeError(f"{self.__name__} has no attribute {name!r}; see lionjax.{MOVED[old][0]}")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds old module paths after all other finders have not found them."""

    def find_spec(self, fullname, path=None, target=None):
        old = fullname.removeprefix("lionjax.")
        if old == fullname or old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        old = module.__name__.removeprefix("lionjax.")
        if old in PACKAGES:
            return  # the module in it says where it is
        log.warning("%s is now lionjax.%s; the old path still works", module.__name__, MOVED[old][0])
