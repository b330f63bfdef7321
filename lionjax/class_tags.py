# SPDX-License-Identifier: Apache-2.0
"""The names under which config classes are written to JSON, and the names that earlier versions wrote.

A tag never changes: runs, exported folders and Orbax folders hold it. Where a class lies, and what it is called in the
code, may change; then only `HOMES` does. This file holds data and imports nothing.
"""

# {tag: "module:class" of today}
HOMES = {
    "Experiment": "lionjax.config:Experiment",
    "Stage": "lionjax.config:Stage",
    "RunConfig": "lionjax.config:RunConfig",
    "GenerationDefaults": "lionjax.config:AnswerConfig",
    "MeshConfig": "lionjax.sharding:MeshConfig",
    "LoraConfig": "lionjax.layers:LoraConfig",
    "AdapterConfig": "lionjax.adapters:AdapterConfig",
    "GatedCrossAttentionConfig": "lionjax.adapters:CrossConfig",
    "ViTConfig": "lionjax.vision.vit:ViTConfig",
    "SwinConfig": "lionjax.vision.swin:SwinConfig",
    "SamConfig": "lionjax.vision.sam:SamConfig",
    "RamConfig": "lionjax.vision.ram:RamConfig",
    "T5Config": "lionjax.language.t5:T5Config",
    "DecoderConfig": "lionjax.language.decoder:DecoderConfig",
    "BertConfig": "lionjax.language.bert:BertConfig",
    "QFormerConfig": "lionjax.bridges.qformer:QFormerConfig",
    "AggregatorConfig": "lionjax.bridges.qformer:AggregatorConfig",
    "ResamplerConfig": "lionjax.bridges.latents:ResamplerConfig",
    "AbstractorConfig": "lionjax.bridges.latents:AbstractorConfig",
    "ProjectionConfig": "lionjax.bridges.latents:ProjectionConfig",
    "RegionHeadConfig": "lionjax.heads:PlaceConfig",
    "VisualPrefixLM": "lionjax.systems.prefix:Prefix",
    "Flamingo": "lionjax.systems.flamingo:Flamingo",
    "Blip2Stage1": "lionjax.systems.blip2:Blip2First",
    "Lion": "lionjax.systems.lion:Lion",
    "NextChat": "lionjax.systems.nextchat:NextChat",
    "DataConfig": "lionjax.data.examples:DataConfig",
    "ProcessorConfig": "lionjax.data.texts:ProcessorConfig",
    "Scenes": "lionjax.data.sources:Scenes",
    "EasyVqa": "lionjax.data.sources:EasyVqa",
    "Coco": "lionjax.data.coco:Coco",
    "RefCoco": "lionjax.data.annotations:RefCoco",
    "Vqa": "lionjax.data.annotations:Vqa",
    "JsonLines": "lionjax.data.annotations:Lines",
    "ScienceQa": "lionjax.data.scienceqa:ScienceQa",
    "ArrayRecordDataset": "lionjax.data.built:Built",
    "BackbonesConfig": "lionjax.training.backbones:BackbonesConfig",
    "LanguageSchedule": "lionjax.training.backbones:LanguageSchedule",
    "BoxHeadsSchedule": "lionjax.training.place_backbone:PlacesSchedule",
    "MasksConfig": "lionjax.training.mask_backbone:MasksConfig",
}

# {what version 0.1 wrote behind "lionjax.": tag}. In this order: module, class = tag (where it has another name).
_WRITTEN_BY_0_1 = """
config                  Experiment Stage RunConfig AnswerConfig=GenerationDefaults
sharding                MeshConfig
layers                  LoraConfig
adapters                AdapterConfig CrossConfig=GatedCrossAttentionConfig
vision.vit              ViTConfig
vision.swin             SwinConfig
vision.sam              SamConfig
vision.ram              RamConfig
language.t5             T5Config
language.decoder        DecoderConfig
language.bert           BertConfig
bridges.qformer         QFormerConfig AggregatorConfig
bridges.latents         ResamplerConfig AbstractorConfig ProjectionConfig
heads                   PlaceConfig=RegionHeadConfig
systems.prefix          Prefix=VisualPrefixLM
systems.flamingo        Flamingo
systems.blip2           Blip2First=Blip2Stage1
systems.lion            Lion
systems.nextchat        NextChat
data.examples           DataConfig
data.texts              ProcessorConfig
data.sources            Scenes EasyVqa
data.coco               Coco
data.annotations        RefCoco Vqa Lines=JsonLines
data.scienceqa          ScienceQa
data.built              Built=ArrayRecordDataset
training.backbones      BackbonesConfig LanguageSchedule
training.place_backbone PlacesSchedule=BoxHeadsSchedule
training.mask_backbone  MasksConfig
"""
EARLIER = {
    f"lionjax.{line.split()[0]}.{item.partition('=')[0]}": item.partition("=")[2] or item
    for line in _WRITTEN_BY_0_1.strip().splitlines()
    for item in line.split()[1:]
}
