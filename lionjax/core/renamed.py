# SPDX-License-Identifier: Apache-2.0
"""Fields of config classes under the names of earlier versions: still accepted, and said in one line when used.

A class that renames a field keeps reading it: in JSON, as a keyword of the constructor and of `dataclasses.replace`,
as an attribute, and on the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from lionjax.core.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
_reported: set[str] = set()
# A config class, then its fields whose name of version 0.1 is another: old=new. Fields that also changed their values
# are arguments of `renamed_fields`.
_OLD_FIELDS = """
AbstractorConfig             layers=depth heads=num_heads hidden=mlp_dim queries=num_query_tokens eps=norm_eps
AbstractorConfig             inner_eps=sub_ln_eps
AdapterConfig                bottleneck=bottleneck_dim count=num_adapters tasks=num_tasks
AggregatorConfig             heads=num_heads hidden=mlp_dim eps=norm_eps projector=projector_mlp_dim
BackbonesConfig              scenes=num_scenes mirrored_steps=augmented_steps align_rate=align_learning_rate
BackbonesConfig              vision_batch=vision_batch_size vision_rate=vision_learning_rate
BackbonesConfig              language_batch=language_batch_size
BertConfig                   vocab=vocab_size layers=depth heads=num_heads hidden=mlp_dim positions=max_positions
BertConfig                   kinds=type_vocab_size eps=norm_eps pad_token=pad_token_id
Blip2Stage1                  vision_eps=vision_norm_eps shared=embed_dim smoothing=label_smoothing
Blip2Stage1                  start_token=cls_token_id write_token=decoder_start_token_id
BoxHeadsSchedule             rate=learning_rate batch=batch_size scenes=num_scenes boxes=max_boxes
Coco                         captions=captions_file instances=instances_file images=image_dir share=heldout_fraction
DataConfig                   tag_drop=tag_dropout crop=crop_scale flip=hflip mask_share=mask_fraction
DataConfig                   buckets=length_buckets bad_share=max_bad_fraction quarantine=bad_records_path
DataConfig                   cache_mib=image_cache_mib threads=num_threads buffer=prefetch_buffer_size
DataConfig                   workers=num_workers
DecoderConfig                vocab=vocab_size layers=depth heads=num_heads kv_heads=num_kv_heads head=head_dim
DecoderConfig                hidden=mlp_dim eps=norm_eps gated=gated_mlp biases=attention_biases
DecoderConfig                positions=max_positions tied=tie_embeddings pad_token=pad_token_id
DecoderConfig                start_token=bos_token_id end_token=eos_token_id vocab_multiple=pad_vocab_to_multiple_of
DecoderConfig                qk_norms=qk_norm inner_norms=sub_ln scaled=scale_embeddings
DecoderConfig                frozen_words=num_frozen_embeddings cross=cross_attention
Experiment                   system=model answer=generation
Flamingo                     image_token=image_token_id rule=media_attention part_weights=dataset_loss_weights
GatedCrossAttentionConfig    every=every_n_layers source_width=vision_width heads=num_heads head=head_dim
GatedCrossAttentionConfig    hidden=mlp_dim
ImageToTextProjectionConfig  source_width=vision_width heads=num_heads queries=num_query_tokens spread=init_std
JsonLines                    images=image_dir share=heldout_fraction
LanguageSchedule             rate=learning_rate patches=patch_fraction hinted=tag_fraction text=text_fraction
LanguageSchedule             blind=no_scene_fraction words_stay=freeze_embeddings
Lion                         soft_prompt_token=soft_prompt_token_id places=region_head word_scale=identity_init_scale
MasksConfig                  scenes=num_scenes batch=batch_size boxes=num_boxes shaken=box_jitter rate=learning_rate
NextChat                     location_hidden=box_mlp_dim mask_tokens=num_mask_prompt_tokens image_token=image_token_id
NextChat                     trigger_token=trigger_token_id location_token=box_token_id
ProcessorConfig              mean=image_mean std=image_std prompt_length=max_prompt_tokens
ProcessorConfig              question_length=max_question_tokens target_length=max_target_tokens tags=use_tags
ProcessorConfig              padded=pad_to_square padding=pad_color template=prompt_template
ProcessorConfig              image_tokens=num_image_tokens plain_end=caption_end next_turn=followup_template
ProcessorConfig              pictures=max_images places=box_format bins=location_bins_per_side boxes=max_boxes
ProcessorConfig              sam_size=sam_image_size
QFormerConfig                layers=depth heads=num_heads hidden=mlp_dim queries=num_query_tokens
QFormerConfig                cross_every=cross_attention_frequency vocab=vocab_size positions=max_positions
QFormerConfig                eps=norm_eps text=use_text_input
RamConfig                    tags=num_tags label_width=label_embed_dim image_width=encoder_width heads=num_heads
RamConfig                    hidden=mlp_dim layers=depth eps=norm_eps
RefCoco                      images=image_dir share=heldout_fraction
RegionHeadConfig             trigger_token=trigger_token_id location_token=box_token_id location_hidden=box_mlp_dim
RegionHeadConfig             mask_tokens=num_mask_prompt_tokens
ResamplerConfig              layers=depth heads=num_heads head=head_dim hidden=mlp_dim queries=num_query_tokens
ResamplerConfig              frames=max_frames eps=norm_eps
RunConfig                    keep=max_to_keep cache_gib=feature_cache_gib features_dir=feature_cache_dir
RunConfig                    on_bad_update=on_bad_step spike=loss_spike_sigmas bad_updates=max_bad_steps
RunConfig                    stuck_seconds=watchdog_seconds
SamConfig                    image=image_size patch=patch_size heads=num_heads hidden=mlp_dim window=window_size
SamConfig                    global_layers=global_attn_indexes channels=prompt_embed_dim eps=norm_eps
SamConfig                    mask_channels=mask_input_channels decoder_heads=decoder_num_heads
SamConfig                    decoder_hidden=decoder_mlp_dim decoder_eps=decoder_norm_eps masks=num_mask_tokens
SamConfig                    iou_depth=iou_head_depth iou_hidden=iou_head_mlp_dim
Stage                        accumulate=grad_accum_steps learning_rate_scale=lr_multipliers system=model_overrides
Stage                        start=init_from
SwinConfig                   image=image_size patch=patch_size heads=num_heads window=window_size ratio=mlp_ratio
SwinConfig                   biases=attention_biases eps=norm_eps drop_path=drop_path_rate
T5Config                     vocab=vocab_size head=head_dim heads=num_heads hidden=mlp_dim encoder_layers=encoder_depth
T5Config                     decoder_layers=decoder_depth buckets=num_buckets eps=norm_eps
T5Config                     start_token=decoder_start_token_id pad_token=pad_token_id end_token=eos_token_id
ViTConfig                    image=image_size patch=patch_size heads=num_heads hidden=mlp_dim eps=norm_eps
ViTConfig                    biases=attention_biases norm_before=pre_layernorm norm_after=post_layernorm
VisualPrefixLM               class_token=keep_class_token vision_eps=vision_norm_eps image_token=image_token_id
VisualPrefixLM               in_front=prepend_image names=torch_names latents=resampler unit=normalize_features
VisualPrefixLM               words=num_prefix_tokens closing=add_image_end_token pool=pool_stride
Vqa                          images=image_dir pattern=file_name_pattern share=heldout_fraction
"""
OLD_FIELDS = [line.split() for line in _OLD_FIELDS.strip().splitlines()]


@dataclasses.dataclass(frozen=True)
class Renamed:
    """The field's name of today. `values`: {value as it was: as it is}; values that are not listed did not change."""

    name: str
    values: Mapping[Any, Any] = dataclasses.field(default_factory=dict)

    def today(self, value: Any) -> Any:
        """A value of the earlier version as it is written today."""
        try:
            return self.values.get(value, value)
        except TypeError:  # a list from JSON
            return value

    def then(self, value: Any) -> Any:
        """A value of today as the earlier version wrote it."""
        return next((old for old, new in self.values.items() if new == value), value)


def renamed_fields(**renames: str | Renamed):
    """Class decorator above `@dataclass`: accepts the old names of the class in the table, and those of `renames`.

    `@renamed_fields(vocab="vocab_size")` accepts `vocab` for `vocab_size`. The constructor raises UserError where a
    field is given under both names.
    """

    def decorate(cls: type[T]) -> type[T]:
        init, table = cls.__init__, _old_fields(cls.__name__)
        table |= {old: new if isinstance(new, Renamed) else Renamed(new) for old, new in renames.items()}

        @functools.wraps(init)
        def init_with_old_names(self, *args, **kwargs):
            # `dataclasses.replace` gives every field, also the one that an old name replaces.
            if not all(field.name in kwargs for field in dataclasses.fields(cls)):
                check_given_once(cls, kwargs)
            for old in table.keys() & kwargs.keys():
                report(cls.__name__, old, table[old].name)
                kwargs[table[old].name] = table[old].today(kwargs.pop(old))
            init(self, *args, **kwargs)

        cls.__init__ = init_with_old_names
        cls.RENAMED_FIELDS = renames_of(cls) | table
        for old, new in table.items():
            if old not in vars(cls):
                setattr(cls, old, property(lambda self, new=new: new.then(getattr(self, new.name))))
        return cls

    return decorate


def _old_fields(class_name: str) -> dict[str, Renamed]:
    """The plain renames of a class in the table."""
    items = (item.partition("=") for name, *items in OLD_FIELDS if name == class_name for item in items)
    return {old: Renamed(new) for old, _, new in items}


def renames_of(cls: type) -> Mapping[str, Renamed]:
    """{name of an earlier version: the field of today} of a config class."""
    return getattr(cls, "RENAMED_FIELDS", {})


def check_given_once(cls: type, names: Iterable[str], where: str = "") -> None:
    """Raise UserError if `names` has a field of a config class under both its old and its current name.

    `where` precedes the class name in the message.
    """
    names = set(names)
    for old, renamed in renames_of(cls).items():
        if {old, renamed.name} <= names:
            raise UserError(
                f"{where}{cls.__name__} is given {old!r} and {renamed.name!r}, which are the old and the current name "
                f"of one field; give {renamed.name!r} only"
            )


def report(owner: str, old: str, new: str) -> None:
    """Say once in a process that an old name was used."""
    if f"{owner}.{old}" not in _reported:
        _reported.add(f"{owner}.{old}")
        log.warning("%s.%s is now %s; the old name still works", owner, old, new)
