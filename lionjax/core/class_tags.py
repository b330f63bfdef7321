# SPDX-License-Identifier: Apache-2.0
"""The names under which config classes are written to JSON, and the names that earlier versions wrote.

A tag never changes: runs, exported folders and Orbax folders hold it. Where a class lies, and what it is called in the
code, may change; then only `TAG_TO_CLASS` does. This file holds data and imports nothing.
"""

# {tag: "module:class" of today}
TAG_TO_CLASS = {
    "Experiment": "lionjax.core.experiment:Experiment",
    "Stage": "lionjax.core.experiment:Stage",
    "Mix": "lionjax.core.experiment:Mix",
    "Weights": "lionjax.core.experiment:Weights",
    "RunConfig": "lionjax.core.experiment:RunConfig",
    "GenerationDefaults": "lionjax.core.experiment:GenerationDefaults",
    "SentenceSlots": "lionjax.core.types:SentenceSlots",
    "MeshConfig": "lionjax.core.sharding:MeshConfig",
    "RopeScaling": "lionjax.nn.rope:RopeScaling",
    "LoraConfig": "lionjax.nn.lora:LoraConfig",
    "AdapterConfig": "lionjax.nn.adapters:AdapterConfig",
    "GatedCrossAttentionConfig": "lionjax.nn.adapters:GatedCrossAttentionConfig",
    "ViTConfig": "lionjax.models.vision.vit:ViTConfig",
    "SwinConfig": "lionjax.models.vision.swin:SwinConfig",
    "SamConfig": "lionjax.models.vision.sam_encoder:SamConfig",
    "RamConfig": "lionjax.models.vision.ram:RamConfig",
    "GroundingDinoConfig": "lionjax.models.vision.grounding_dino_encoder:GroundingDinoConfig",
    "DetectionLossConfig": "lionjax.models.vision.grounding_dino_loss:DetectionLossConfig",
    "T5Config": "lionjax.models.language.t5:T5Config",
    "DecoderConfig": "lionjax.models.language.decoder:DecoderConfig",
    "ClipTextConfig": "lionjax.models.language.clip_text:ClipTextConfig",
    "BertConfig": "lionjax.models.language.bert:BertConfig",
    "QFormerConfig": "lionjax.models.connectors.qformer:QFormerConfig",
    "MQFormerConfig": "lionjax.models.connectors.mqformer:MQFormerConfig",
    "AggregatorConfig": "lionjax.models.connectors.qformer:AggregatorConfig",
    "ResamplerConfig": "lionjax.models.connectors.perceiver:ResamplerConfig",
    "AbstractorConfig": "lionjax.models.connectors.perceiver:AbstractorConfig",
    "ProjectionConfig": "lionjax.models.connectors.perceiver:ImageToTextProjectionConfig",
    "RegionHeadConfig": "lionjax.models.heads.region:RegionHeadConfig",
    "VisualPrefixLM": "lionjax.models.vlm.visual_prefix:VisualPrefixLM",
    "TextLM": "lionjax.models.vlm.text_lm:TextLM",
    "Clip": "lionjax.models.vlm.clip:Clip",
    "Flamingo": "lionjax.models.vlm.flamingo:Flamingo",
    "Blip2Stage1": "lionjax.models.vlm.blip2_stage1:Blip2Stage1",
    "LyricsStage1": "lionjax.models.vlm.lyrics_stage1:LyricsStage1",
    "Lion": "lionjax.models.vlm.lion:Lion",
    "NextChat": "lionjax.models.vlm.nextchat:NextChat",
    "Lisa": "lionjax.models.vlm.lisa:Lisa",
    "PalmE": "lionjax.models.vlm.palm_e:PalmE",
    "PhraseDetection": "lionjax.models.vlm.detection:PhraseDetection",
    "DataConfig": "lionjax.data.config:DataConfig",
    "ProcessorConfig": "lionjax.data.processor_config:ProcessorConfig",
    "PackingConfig": "lionjax.data.box_text:PackingConfig",
    "ImageFit": "lionjax.data.image_fit:ImageFit",
    "Scenes": "lionjax.data.scenes.dataset:Scenes",
    "Tabletop": "lionjax.data.tabletop.dataset:Tabletop",
    "QuestionCaptions": "lionjax.data.scenes.question_captions:QuestionCaptions",
    "EasyVqa": "lionjax.data.datasets.easy_vqa:EasyVqa",
    "Coco": "lionjax.data.datasets.coco:Coco",
    "CocoRelease": "lionjax.data.datasets.coco:CocoRelease",
    "KarpathyCaptions": "lionjax.data.datasets.karpathy:KarpathyCaptions",
    "LionRecords": "lionjax.data.datasets.lion:LionRecords",
    "Refer": "lionjax.data.datasets.refer:Refer",
    "ShikraJsonl": "lionjax.data.datasets.shikra:ShikraJsonl",
    "RefCoco": "lionjax.data.datasets.refcoco:RefCoco",
    "Vqa": "lionjax.data.datasets.vqa:Vqa",
    "LabelMaps": "lionjax.data.datasets.label_maps:LabelMaps",
    "Conversations": "lionjax.data.datasets.conversations:Conversations",
    "JsonLines": "lionjax.data.datasets.jsonl:JsonLines",
    "ImageFolder": "lionjax.data.datasets.image_folder:ImageFolder",
    "Csv": "lionjax.data.datasets.delimited:Csv",
    "Parquet": "lionjax.data.datasets.parquet:Parquet",
    "WebDataset": "lionjax.data.datasets.webdataset:WebDataset",
    "ScienceQa": "lionjax.data.datasets.scienceqa:ScienceQa",
    "AOkvqa": "lionjax.data.datasets.aokvqa:AOkvqa",
    "TextVqa": "lionjax.data.datasets.textvqa:TextVqa",
    "VizWiz": "lionjax.data.datasets.vizwiz:VizWiz",
    "OcrVqa": "lionjax.data.datasets.ocr_vqa:OcrVqa",
    "DocVqa": "lionjax.data.datasets.docvqa:DocVqa",
    "Gqa": "lionjax.data.datasets.gqa:Gqa",
    "IconQa": "lionjax.data.datasets.iconqa:IconQa",
    "Vsr": "lionjax.data.datasets.vsr:Vsr",
    "VisDial": "lionjax.data.datasets.visdial:VisDial",
    "HatefulMemes": "lionjax.data.datasets.hateful_memes:HatefulMemes",
    "CaptionReferences": "lionjax.data.datasets.caption_references:CaptionReferences",
    "ReasonSeg": "lionjax.data.datasets.reason_seg:ReasonSeg",
    "Flickr30kEntities": "lionjax.data.datasets.flickr30k_entities:Flickr30kEntities",
    "Mme": "lionjax.data.datasets.mme:Mme",
    "MmBench": "lionjax.data.datasets.mmbench:MmBench",
    "SeedBench": "lionjax.data.datasets.seed_bench:SeedBench",
    "LlavaBench": "lionjax.data.datasets.llava_bench:LlavaBench",
    "OwlEval": "lionjax.data.datasets.owl_eval:OwlEval",
    "ArrayRecordDataset": "lionjax.data.datasets.array_record:ArrayRecordDataset",
    "BackbonesConfig": "lionjax.tiny.schedules:BackbonesConfig",
    "LanguageSchedule": "lionjax.tiny.schedules:LanguageSchedule",
    "BoxHeadsSchedule": "lionjax.tiny.boxes:BoxHeadsSchedule",
    "MasksConfig": "lionjax.tiny.sam:MasksConfig",
}

# {what version 0.1 wrote behind "lionjax.": tag}. In this order: module, class = tag (where it has another name).
_V0_1_CLASSES = """
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
LEGACY_CLASS_TO_TAG = {
    f"lionjax.{line.split()[0]}.{item.partition('=')[0]}": item.partition("=")[2] or item
    for line in _V0_1_CLASSES.strip().splitlines()
    for item in line.split()[1:]
}
