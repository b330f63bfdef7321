# SPDX-License-Identifier: Apache-2.0
"""Module paths of earlier versions, under which today's modules can still be imported.

Configs and scripts that users wrote import by these. An import by an old path works and logs one line with the new one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import logging
import types

log = logging.getLogger(__name__)

# Behind "lionjax.": the earlier path (of 0.1; `serving` is later), then the modules of today that hold its names.
_MOVED = """
adapters                   nn.adapters
answering                  inference.engine
attention                  nn.attention nn.positions
bridges                    models.connectors
bridges.latents            models.connectors.perceiver
bridges.qformer            models.connectors.qformer
class_tags                 core.class_tags
cli                        cli cli.entry cli.commands cli.errors
config                     core.config core.experiment core.sharding
convert.bert               convert.formats.bert
convert.card               convert.model_card convert.processor_files
convert.command            cli.convert
convert.delta              convert.formats.delta
convert.experts            convert.formats.ram convert.formats.hf_vision
convert.files              convert.io.reader
convert.flamingo           convert.formats.openflamingo
convert.folders            convert.jax_folder convert.companions
convert.kosmos             convert.formats.kosmos2
convert.lavis              convert.formats.lavis
convert.lora               convert.formats.peft
convert.nextchat           convert.formats.nextchat convert.formats.sam
convert.orbax              convert.io.orbax
convert.originals          convert.torch_folder
convert.owl                convert.formats.mplug_owl
convert.peers              convert.verify.hf_parts
convert.placed             convert.orbax_folder core.files
convert.plan               convert.mapping.plan
convert.prefix             convert.formats.hf_vlm
convert.published          convert.formats.hf_language convert.formats.checkpoint_format
convert.runs               convert.verify.inputs
convert.surgery            convert.resize convert.processor_files
convert.systems            convert.formats.detect convert.formats.checkpoint_format convert.formats.lion
convert.tables             convert.mapping.apply
convert.towers             convert.formats.hf_vision
convert.verify             convert.verify.compare convert.verify.hf_parts convert.verify.inputs
convert.write              convert.io.safetensors_writer core.files
data.annotations           data.datasets.annotation_files data.datasets.refcoco data.datasets.vqa data.datasets.jsonl
data.beam_writer           data.prepare.beam
data.built                 data.datasets.array_record
data.built_writer          data.prepare.array_record_writer
data.coco                  data.datasets.coco
data.drawing               data.scenes.render
data.examples              data.mixture data.samples data.config
data.expressions           data.scenes.referring
data.inspection            data.datasets.detect
data.pictures              data.images
data.places                data.boxes
data.preparing             data.prepare.worker
data.processors            data.processor
data.scene_builder         data.scenes.tfds_builder
data.scene_source          data.scenes.source
data.scenes                data.scenes.world data.scenes.render
data.scienceqa             data.datasets.scienceqa
data.sources               data.datasets.source data.datasets.easy_vqa data.scenes.dataset
data.squares               data.letterbox
data.table                 data.datasets.annotated_images
data.tasks                 data.scenes.tasks
data.texts                 data.prompt data.processor_config
data.tiny_tokenizer        tiny.tokenizer
data.told                  tiny.exercises
data.turns                 data.chat
data.wordings              data.templates
demo                       pipelines.serving.web_demo pipelines.serving.web_page pipelines.serving.chat_server
evaluation.answers         evaluation.metrics.vqa
evaluation.benchmarks      evaluation.runner evaluation.asking
evaluation.captions        evaluation.metrics.captions
evaluation.goodput         evaluation.report.goodput
evaluation.report          evaluation.report.html evaluation.report.plots
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
serving                    pipelines.serving
serving.harness            pipelines.serving.harness
serving.lmms_models        pipelines.serving.lmms_models
serving.lmms_plugin        pipelines.serving.lmms_plugin
serving.vlmevalkit         pipelines.serving.vlmevalkit
serving.web_demo           pipelines.serving.web_demo pipelines.serving.web_page pipelines.serving.chat_server
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
training.checkpoints       training.checkpoint core.files
training.feature_files     training.feature_store
training.features          training.feature_cache
training.fingerprints      training.checksum
training.journal           training.run_log
training.language_backbone tiny.language
training.mask_backbone     tiny.sam
training.place_backbone    tiny.boxes
training.refused           training.bad_steps
training.stages            training.step training.optimizer
training.start             training.resume training.validate training.init training.run_folder training.changes
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
PACKAGES = {"bridges", "language", "scaling", "serving", "systems", "vision"}
# Behind "lionjax.": the path of version 0.1, then its names that are others today.
_RENAMED = """
adapters                   CrossConfig=GatedCrossAttentionConfig GatedCross=GatedCrossAttentionBlock
answering                  Answerer=InferenceEngine LENGTHS=LENGTH_BUCKETS LOCATION=REGION_PROMPT
answering                  PLACE=BOX_PLACEHOLDER ROWS=BATCH_SIZE_BUCKETS Row=EncodedExample SHORT=SHORT_ANSWER_TOKENS
answering                  SHORT_TASKS=SHORT_ANSWER_TASKS Said=Answer blank=blank_images boxes_in=extract_boxes
answering                  bucket=round_up_to_bucket category_of=prompt_category lengths=bucketed_lengths
answering                  locate=predict_boxes segment=predict_mask_logits settings=make_generation_config
answering                  unlikely=target_nll with_boxes=insert_boxes
attention                  Mask=AttentionMask RelativeBias=RelativePositionBias
bridges.latents            Projection=ImageToTextProjection ProjectionConfig=ImageToTextProjectionConfig
bridges.qformer            Group=CrossAttentionGroup
class_tags                 EARLIER=LEGACY_CLASS_TO_TAG HOMES=TAG_TO_CLASS
cli                        Parser=StrictParser Usage=UsageError
config                     AnswerConfig=GenerationDefaults TAG_OF=CLASS_TO_TAG difference=diff_configs
config                     leaves=leaf_fields override=apply_overrides show=format_config
convert.delta              AT_ONCE=CHUNK_SIZE OWN=LLAVA_ONLY_PATTERN Sum=LazySum
convert.experts            EXPERTS=TAGGING_FORMATS
convert.files              DTYPES=SAFETENSORS_DTYPES HEADER_LIMIT=MAX_HEADER_BYTES INNER_KEYS=STATE_DICT_KEYS
convert.files              OLDEST_TORCH=MIN_TORCH_VERSION PICKLE_LIMIT=MAX_PICKLE_BYTES Tensors=CheckpointTensors
convert.flamingo           GATE=GATE_PATTERN SPELLINGS=KEY_PATTERNS
convert.folders            COMPANIONS=COMPANION_FILES OURS=JAX_STEM
convert.kosmos             KOSMOS=KOSMOS_2
convert.lavis              BLIP2_FIRST=BLIP2_STAGE1 LAVIS_WORDS=LAVIS_LANGUAGE_TYPES
convert.lora               CONFIG=ADAPTER_CONFIG_FILE FOLDER=ADAPTER_FOLDER PLAIN=SUPPORTED_OPTIONS
convert.lora               PREFIX=PEFT_PREFIX WEIGHTS=ADAPTER_STEM
convert.nextchat           META_SAM=META_SAM_FILE POINTING=REGION_FORMATS
convert.orbax              AT_ONCE=MAX_PENDING_BYTES CHUNK=CHUNK_BYTES CONFIG=CONFIG_ITEM MANIFEST=OCDBT_MANIFEST
convert.orbax              PARAMS=PARAMS_ITEM Promise=LazyShardedArray Stored=StoredTensor Where=ShardIndex
convert.originals          THEIRS=TORCH_STEM
convert.owl                OWL=MPLUG_OWL
convert.peers              LLAVA=LLAVA_KEY_PATTERNS PEERS=HF_PARTS Pairs=StringPairs Peer=HFPart
convert.peers              QFORMER=QFORMER_KEY_PATTERNS SAM=SAM_KEY_PATTERNS SWIN=SWIN_KEY_PATTERNS
convert.peers              VISION=EVA_KEY_PATTERNS
convert.placed             FULL_WORDS=DISK_FULL_MESSAGES
convert.plan               Form=TensorSpec MOST_LAYERS=MAX_LAYERS Piece=MappedTensor Plan=ConversionPlan
convert.plan               SAID_AT_ONCE=MAX_LISTED_PROBLEMS
convert.prefix             HEAD=LM_HEAD_KEY LANGUAGES=FORMAT_OF_LANGUAGE LLAVA_SPELLINGS=LLAVA_KEY_PATTERNS
convert.prefix             OWN_IMAGE_TOKEN=IMAGE_TOKEN_INDEX OWN_TOWER=LLAVA_TOWER_PREFIX PICTURE_FIRST=VLM_FORMATS
convert.prefix             TOWERS=CLIP_SIZES WORDS=EMBED_TOKENS_KEY
convert.published          Published=CheckpointFormat TEXTS=LANGUAGE_FORMATS
convert.runs               LENGTH=TEXT_LENGTH RUNS=COMPARISON_RUNS Run=ComparisonRun
convert.surgery            BICUBIC=BICUBIC_COEFFICIENT Surgery=ResizePlan
convert.systems            SYSTEMS=FORMATS Source=CheckpointSource
convert.tables             Computed=LazyTensor Parts=TensorSlices THE_NUMBERS=TENSOR_VALUES
convert.towers             EVA_IGNORES=EVA_IGNORE_PATTERN LAVIS_IGNORES=LAVIS_IGNORE_PATTERN TOWERS=VISION_FORMATS
convert.verify             AGREE=RELATIVE_TOLERANCE Stage=ModuleDiff Verified=VerificationReport
convert.verify             WEIGHTS=WEIGHT_SUFFIXES
convert.write              AT_ONCE=MAX_WRITE_BYTES FULL=DISK_FULL_ERRNOS NAMES=DTYPE_NAMES Shard=ShardFile
data.annotations           Lines=JsonLines Reader=AnnotatedImagesBuilder
data.beam_writer           Prepare=PrepareRecords
data.built                 Built=ArrayRecordDataset INDEX=INDEX_FILE Known=RecordTruth
data.built                 OpenedBuilt=OpenArrayRecordDataset Tag=Tagger
data.built_writer          AT_ONCE=GROUP_SIZE LEFT_OUT=SKIPPED_FILE Pictures=ArrayRecordBuilder
data.built_writer          PicturesConfig=ArrayRecordBuilderConfig
data.coco                  LEAST_AREA=MIN_AREA_FRACTION
data.drawing               DISTANCE=SIGNED_DISTANCE DOT=DOT_PERIOD OUTLINE=OUTLINE_WIDTH SPECKS=SPECKLE_CELLS
data.drawing               STRIPE=STRIPE_PERIOD
data.examples              Part=MixtureComponent Records=MixtureDataset SIDES=LEFT_RIGHT_PATTERN
data.examples              TRUTH_BYTES=TRUTH_CACHE_BYTES
data.expressions           ENDS=SUPERLATIVE_FORMS MARGIN=MIN_MARGIN NAMINGS=ATTRIBUTE_SETS NUMBERS=NUMBER_WORDS
data.expressions           OPPOSITE=OPPOSITE_RELATION SIDES=SPATIAL_RELATIONS
data.inspection            KNOWN=KNOWN_SOURCES
data.pictures              FORMATS=ALLOWED_FORMATS MAX_BYTES=MAX_FILE_BYTES WHOLE=FULL_IMAGE
data.places                BOX=BOX_PATTERN CLOSING=CLOSING_PUNCTUATION CODECS=BOX_FORMATS Codec=BoxCodec
data.places                HINTS=BOX_FORMAT_HINTS NUMBER=NUMBER_PATTERN
data.preparing             Worker=RecordPreparer
data.processors            Input=ImageTextInput
data.scene_builder         BuiltScenes=StoredScenes Scenes=ScenesBuilder ScenesConfig=ScenesBuilderConfig
data.scenes                CLEARLY_HIDDEN=MIN_OCCLUSION COLOR_ODDS=COLOR_PROBS HELD_OUT=HELD_OUT_PAIRS
data.scenes                PAIRS=COLOR_SHAPE_PAIRS SHAPE_ODDS=SHAPE_PROBS TRIES=MAX_TRIES
data.scenes                TRUTH_PIXELS=TRUTH_IMAGE_SIZE World=WorldConfig
data.scienceqa             LETTERS=OPTION_LETTERS
data.sources               Opened=OpenDataset OpenedScenes=OpenScenes
data.squares               Square=Letterbox
data.table                 PIXEL_SLACK=PIXEL_TOLERANCE Photo=ImageInfo Row=Annotation TEMPLATES=QUESTION_TEMPLATES
data.table                 Table=AnnotatedImages
data.tasks                 CATEGORY=TASK_CATEGORY FULL=ALL_ATTRIBUTES POPULAR=POPULAR_PAIRS SETTINGS=POPE_SETTINGS
data.tasks                 VOCABULARY=TAG_VOCABULARY VQA=VQA_KINDS
data.texts                 FIRST_BIN=FIRST_LOCATION_TOKEN IMAGE_END=IMAGE_END_TOKEN IMAGE_PATCH=IMAGE_PATCH_TOKEN
data.texts                 IMAGE_START=IMAGE_START_TOKEN LOCATION=BOX_TOKEN STRETCHED=NO_LETTERBOX
data.texts                 TAGS_BEFORE=TAGS_PREFIX TRIGGER=REGION_QUERY_TOKEN Texts=PromptBuilder
data.tiny_tokenizer        BORDERS=SPLIT_PATTERN CORE_LINES=NUM_CORE_LINES DECIMALS=BOX_DECIMALS
data.tiny_tokenizer        JOINTS=BOX_SEPARATORS PRIVATE=PRIVATE_RANGE TEXT=CORPUS_FILE
data.told                  CODE=BOX_CODE_DIM DIGITS=NUM_DIGITS DRILLS=OBJECT_NAMES EDGES=EDGE_NAMES
data.told                  PLACES=NUM_DIGIT_POSITIONS WAVES=BOX_FREQUENCIES
data.turns                 AS_ASKED=DEFAULT_FORMAT FORMS=TEMPLATE_KINDS Form=PromptFormat
data.wordings              BOX_CHECK=BOX_ATTRIBUTE_YESNO CHECK=ATTRIBUTE_YESNO
data.wordings              COREFERENCE_CHECK=COREFERENCE_ATTRIBUTE_YESNO GROUNDED=GROUNDED_CAPTION
data.wordings              MORE=COUNT_COMPARISON
demo                       EXAMPLES=EXAMPLES_PER_BENCHMARK FONTS=THEME_FONTS Talk=Conversation
evaluation.answers         CONTRACTED=CONTRACTION_LIST DIGITS=NUMBER_WORDS
evaluation.benchmarks      AT_ONCE=BATCH_SIZE PADDED=MIN_PADDED_LENGTH POINTED=TEACHER_FORCED_TASKS
evaluation.benchmarks      SIDE=MAX_IMAGE_SIDE TRAINING=MAX_TRAIN_EXAMPLES WITHOUT_TAGS=TAG_ABLATION_TASKS
evaluation.captions        DROPPED=PUNCTUATION RENAMED=PTB_BRACKETS SPLIT=PTB_CONTRACTIONS Weighed=TfIdfVector
evaluation.goodput         PARTS=TIME_PARTS
evaluation.report          METRICS=METRIC_LABELS SHOWN=GALLERY_SIZE SPEED=SPEED_FORMATS report=write_report
evaluation.scoring         BY_KIND=PER_KIND_TASKS CANDIDATES=MAX_CANDIDATES COMPARED=MAX_COMPARED_EXAMPLES
evaluation.scoring         REFERENCES=MAX_REFERENCES Scored=TaskScores
generate                   Answers=DecodeState advance=decode_step begin=prefill choose=select_next_token
generate                   finish=finalize first=jit_prefill following=jit_decode_step
heads                      Locations=BoxEncoderDecoder MaskPrompts=MaskPromptProjector NEVER=MASK_VALUE
heads                      PlaceConfig=RegionHeadConfig
kernels                    BLOCKS=BLOCK_LENGTHS CLOSE=KERNEL_TOLERANCE DTYPES=KERNEL_DTYPES LEAST=MIN_LENGTH
kernels                    MASKED=MASK_VALUE NAMES=KERNELS
language.decoder           Group=CrossAttentionGroup WHERE=POSITION_TYPES
layers                     REMAT=REMAT_POLICIES
model                      RELEASED=LION_GENERATION
model                      WEIGHTS=WEIGHT_SUFFIXES example=dummy_batch
model                      inputs=build_inputs of_params=from_params of_run=load_run of_weights=load_weights
model                      released=released_experiment with_prompts=with_prompt_length
params                     count=count_params describe=parameter_overview
plots                      ASKED=QUERY_COLOR DARK=DARK_THEME LIGHT=LIGHT_THEME Mark=Overlay
plots                      PREDICTED=PREDICTION_COLOR TRUE=TRUTH_COLOR
scaling.apart              Apart=PlanWorker BrokeOff=CompilerCrashed
scaling.compiled           READER=ANALYZER_SOURCE
scaling.libtpu             BESIDE_NO_TPU=COMPILE_ONLY_ENV STACK=THREAD_STACK_FLAG
scaling.plans              LIMITS=ROOFLINE_TERMS QUICK=QUICK_COMPILER_OPTIONS Work=CompileTarget
scaling.programs           ARRAY=ARRAY_PATTERN BYTES=DTYPE_BYTES FREE=NO_TRAFFIC_OPCODES HEAD=COMPUTATION_PATTERN
scaling.programs           INSTRUCTION=INSTRUCTION_PATTERN KINDS=COLLECTIVE_OPCODES NAME=NAME_PATTERN
scaling.topologies         KNOWN=EXAMPLE_NAMES
scores                     BLOCK=TOP_K_BLOCK_SIZE GenerateConfig=GenerationConfig Generated=GenerateOutput
scores                     IMPOSSIBLE=NEG_INF best=argmax candidates=top_k_top_p_filtering draw=sample_token
scores                     kept=aux_outputs nothing_seen=init_seen rule=process_logits see=mark_seen take=gather_rows
search                     Beams=BeamState Closed=FinishedBeams LOW=LARGE_NEGATIVE Open=LiveBeams
sharding                   RULES=LOGICAL_AXIS_RULES abstract=abstract_params constrain=with_logical_constraint
sharding                   fetch=gather_to_host init=init_sharded place=reshard_like put_batch=shard_batch
sharding                   put_whole=shard_global_batch rows_beside=aligned_group_size
sharding                   sharded=with_logical_partitioning shardings=named_shardings share=process_shard
sharding                   spec=partition_spec use=use_mesh
systems.blip2              Blip2First=Blip2Stage1 Blip2FirstModule=Blip2Stage1Module FAR=SELF_PAIR_LOGIT
systems.flamingo           RULES=MEDIA_ATTENTION
systems.nextchat           LOSSES=LOSS_VARIANTS
systems.prefix             NAMES=TORCH_NAMES Prefix=VisualPrefixLM PrefixModule=VisualPrefixLMModule
tagger                     AT_ONCE=BATCH_SIZES CHINESE=CHINESE_TAG_LIST_FILE Found=TagResult MEAN=IMAGENET_MEAN
tagger                     STD=IMAGENET_STD THRESHOLD=DEFAULT_THRESHOLD THRESHOLDS=THRESHOLD_FILE
tagger                     TagList=TagVocabulary Teller=TaggerFactory WORDS=TAG_LIST_FILE
tagger                     read_tags=read_tag_vocabulary teller=tagger_factory
training.checkpoints       Damaged=CorruptCheckpointError FULL=DISK_FULL_ERRNOS FULL_WORDS=DISK_FULL_MESSAGES
training.checkpoints       Keep=LatestAndBest Steps=AsyncCheckpointManager TEMPORARY=ORBAX_TMP_SUFFIX
training.feature_files     ABANDONED=STALE_SECONDS CHECK=CHECKSUM_BYTES ENDING=FILE_SUFFIX Files=FeatureStore
training.feature_files     KEY=KEY_BYTES LARGE=MAX_FILE_BYTES OLD=MAX_FILE_SECONDS Sight=FeatureSpec
training.feature_files     UNFINISHED=PARTIAL_SUFFIX WAYS=WRITER_OPTIONS
training.features          Memory=FeatureCache Remembered=CachedBatches
training.journal           Clock=PhaseTimer Entry=StageStats FEW=REPORTED_LOSSES Journal=RunLogger
training.journal           MISSED=DOWNTIME_PHASES RECENT=RECENT_LOSSES
training.language_backbone DRILLS=EXERCISES GROUPS=TASK_GROUPS LENGTHS=TARGET_LENGTHS PROMPTS=PROMPT_LENGTHS
training.language_backbone Reader=SceneLanguageModel SCENE=SCENE_TOKENS SHARPNESS=ATTENTION_SHARPNESS TAGS=TAG_TOKENS
training.mask_backbone     FOCAL=FOCAL_LOSS_WEIGHT
training.place_backbone    BLUR=NOISE_LEVELS PlacesSchedule=BoxHeadsSchedule Pointer=SceneRegionModel
training.refused           FEWEST=MIN_LOSSES WINDOW=LOSS_WINDOW
training.stages            ANY_LOSS=NO_LOSS_THRESHOLD State=TrainState
training.start             FREE=MUTABLE_FIELDS Layout=ParamSpecs Place=Position
training.vision_backbone   COLOR=COLOR_FIELD Painter=PatchClassifier
vision.ram                 Query=TaggingLayer
vision.sam                 HUGGING_FACE=HF_NAMES SEGMENT_ANYTHING=ORIGINAL_NAMES
vision.sam_masks           CORNER=TOP_LEFT FINAL_EPS=FINAL_NORM_EPS OTHER_CORNER=BOTTOM_RIGHT Perceptron=StackedMLP
vision.sam_masks           Prompts=PromptEncoder ROWS_TOGETHER=DECODE_GROUP_SIZE TwoWay=TwoWayAttentionBlock
vision.sam_masks           Upscale=ConvTranspose2x2
vision.swin                BETWEEN_EPS=PATCH_NORM_EPS Merge=PatchMerging Pair=ShiftedPair Stage=SwinStage
weight_rows                Op=Transform Row=WeightMapping TILE=COPY_TILE Template=KeyTemplate
"""


@functools.cache
def renamed_names() -> dict[tuple[str, str], str]:
    """{(module path of 0.1, name of 0.1): name of today}."""
    return {
        (line.split()[0], old): new
        for line in _RENAMED.strip().splitlines()
        for old, _, new in (item.partition("=") for item in line.split()[1:])
    }


def find(old: str, name: str):
    """The object of today that the earlier module `old` held as `name`."""
    if name.startswith("__"):
        raise AttributeError(name)
    today = renamed_names().get((old, name), name)
    for home in MOVED[old]:
        module = importlib.import_module(f"lionjax.{home}")
        if today in vars(module):
            return vars(module)[today]
    raise AttributeError(f"lionjax.{old} has no attribute {name!r}; see lionjax.{MOVED[old][0]}")


class _Module(types.ModuleType):
    """Gives each name from the first of today's modules that has it."""

    def __getattr__(self, name: str):
        return find(self.__name__.removeprefix("lionjax."), name)


class Finder:
    """Finds old module paths after all other finders have not found them: a meta path finder and loader.

    It has no base class: importing importlib.abc takes a fifth of the time of `lionjax --help`.
    """

    def find_spec(self, fullname, path=None, target=None):
        old = fullname.removeprefix("lionjax.")
        if old == fullname or old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=old in PACKAGES)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        if module.__name__.removeprefix("lionjax.") not in PACKAGES:  # the module in a package says where it is
            _log_new_path(module.__name__)

    def get_code(self, fullname):
        """The code of today's module, for `python -m` with an earlier path."""
        import importlib.util

        today = f"lionjax.{MOVED[fullname.removeprefix('lionjax.')][0]}"
        _log_new_path(fullname)
        return importlib.util.find_spec(today).loader.get_code(today)


def _log_new_path(fullname: str):
    log.warning("%s is now lionjax.%s; the old path still works", fullname, MOVED[fullname.removeprefix("lionjax.")][0])
