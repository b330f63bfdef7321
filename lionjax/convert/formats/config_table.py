# SPDX-License-Identifier: Apache-2.0
"""`ConfigTable`: what a checkpoint format does with every field of a config.json, and the check that no other is there.

A field is computed (read into the lionjax config), fixed (accepted with the values that lionjax implements), inert
(without influence on logits and features), or a nested config with a table of its own. Any other field is refused,
because an ignored setting would give other results in silence.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from lionjax.convert.formats.config_fields import ACTIVATIONS, ConfigFields
from lionjax.core.types import UserError

# Fields of every config class of transformers, of version 5 and of earlier ones, without influence on the model.
COMMON_INERT = frozenset(
    # Where the model comes from, and the software that made or loads it.
    "_name_or_path name_or_path _commit_hash architectures auto_map custom_pipelines dtype torch_dtype model_type "
    "transformers_version transformers_weights transformers.js_config torchscript torch_compile use_bfloat16 "
    "tf_legacy_loss attn_implementation _attn_implementation _attn_implementation_autoset "
    "_attn_implementation_internal _flash_attn_2_enabled experts_implementation _experts_implementation "
    "unsloth_version unsloth_fixed tokenizer_class processor_class image_processor_type "
    # What the forward pass returns, and how it is split.
    "return_dict output_attentions output_hidden_states output_scores output_past return_dict_in_generate use_cache "
    "chunk_size_feed_forward gradient_checkpointing use_return_dict "
    # Heads, tasks and training.
    "finetuning_task task_specific_params problem_type id2label label2id num_labels classifier_dropout "
    "initializer_range initializer_factor init_std "
    # Encoder-decoder models are told apart by their model_type.
    "is_encoder_decoder "
    # Token ids and settings of generation; the formats that need them list them as computed.
    "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id "
    "decoder_start_token_id prefix max_length min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens max_new_tokens "
    "model_max_length tokenizer_model_max_length tokenizer_padding_side".split()
)
# Fields of every config class that change the model: {field: values that lionjax implements}.
COMMON_FIXED: Mapping[str, tuple] = {
    "pruned_heads": (None, {}),
    "add_cross_attention": (False, None),
    "is_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    # Others are refused when config.json is read (io/key_names.py).
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
}


@dataclasses.dataclass(frozen=True)
class ConfigTable:
    """The fields of one config.json object of a model type; a field of `COMMON_INERT` or `COMMON_FIXED` needs no entry.

    - `model_types`: allowed values of model_type; a missing one is allowed.
    - `fields`: the computed fields that the lionjax config holds too.
    - `computed`: {field: default} of other computed fields, and of `fields` where their default differs; the defaults
      are those of transformers. A value must have the type of the default; a default of None allows any type and null.
    - `fixed`: {field: the values that lionjax implements}, transformers' default first; also for computed fields.
    - `nullable`: computed fields where null is a value, though their default is another.
    - `inert`: fields without influence on logits and features in inference.
    - `parts`: nested configs; the format reads each of them with the table of its model type.
    - `aliases`: {other spelling: field}.
    """

    model_types: tuple[str, ...]
    fields: ConfigFields = ConfigFields({})
    computed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    nullable: Collection[str] = ()
    inert: Collection[str] = ()
    parts: Collection[str] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """{field: default} of all computed fields."""
        fields = self.fields
        return {**dict.fromkeys((*fields.hf_names, *fields.token_ids)), **fields.defaults, **self.computed}

    def read(self, hf_config: Mapping[str, Any] | None, path: str = "") -> dict[str, Any]:
        """{field: value} of all computed fields and parts of a config.json, with defaults for missing ones.

        `path` is the field that holds `hf_config` inside config.json, "" for config.json itself; null means no field.
        Raises UserError, with the path of the field, for a field or value that lionjax does not implement.
        """
        hf_config = {} if hf_config is None else hf_config
        if not isinstance(hf_config, Mapping):
            raise UserError(f"config.json has {path} {show(hf_config)}; it must be a JSON object")
        settings = self._rename_aliases(hf_config, path)
        model_type = settings.get("model_type")
        if model_type is not None and model_type not in self.model_types:
            raise unsupported(join(path, "model_type"), model_type, self.model_types)
        fixed, defaults = {**COMMON_FIXED, **self.fixed}, self.defaults
        for field, value in settings.items():
            if field in self.parts or field in self.inert:
                continue
            if field in fixed and not any(value == allowed for allowed in fixed[field]):
                raise unsupported(join(path, field), value, fixed[field])
            if field in defaults and not (value is None and field in self.nullable):
                self._check_computed(join(path, field), field, value, defaults[field])
            elif field not in defaults and field not in fixed and field not in COMMON_INERT:
                raise UserError(
                    f"config.json has the field {join(path, field)} {show(value)}, which lionjax does not know for a "
                    f"{self.model_types[0]}; remove the field if the model computes the same without it"
                )
        return {**defaults, **dict.fromkeys(self.parts)} | {
            field: value for field, value in settings.items() if field in defaults or field in self.parts
        }

    def read_fields(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """{field of the lionjax config: value} for `fields`; `settings` is what `read` returned."""
        return self.fields.read(settings, self.defaults)

    def _rename_aliases(self, hf_config: Mapping[str, Any], path: str) -> dict[str, Any]:
        settings = {field: value for field, value in hf_config.items() if field not in self.aliases}
        for alias, field in self.aliases.items():
            if alias in hf_config:
                require_same(join(path, alias), hf_config[alias], join(path, field), settings.get(field))
                settings[field] = hf_config[alias] if settings.get(field) is None else settings[field]
        return settings

    def _check_computed(self, path: str, field: str, value: Any, default: Any) -> None:
        if field == self.fields.activation:
            if not isinstance(value, str) or value not in ACTIVATIONS:
                raise unsupported(path, value, tuple(ACTIVATIONS))
        elif default is not None and field not in self.fields.token_ids and not _has_type_of(value, default):
            kinds = {bool: "true or false", int: "an integer", float: "a number", str: "a string", tuple: "a list"}
            raise UserError(f"config.json has {path} {show(value)}; it must be {kinds[type(default)]}")


def _has_type_of(value: Any, default: Any) -> bool:
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple))
    number = int if isinstance(default, int) else (int, float)
    return isinstance(value, number) and not isinstance(value, bool)


def join(path: str, field: str) -> str:
    """The path of a field inside the nested config at `path`."""
    return f"{path}.{field}" if path else field


def unsupported(path: str, value: Any, allowed: Collection[Any]) -> UserError:
    """The error for a field of config.json with a value that lionjax does not implement."""
    names = " or ".join(map(show, allowed))
    return UserError(f"this model has {path} {show(value)} in its config.json; only {names} is supported")


def require_same(path: str, value: Any, other_path: str, other: Any) -> None:
    """Raise UserError where two spellings of a field have different values; null says nothing."""
    if value is not None and other is not None and value != other:
        raise UserError(
            f"config.json has {path} {show(value)} and {other_path} {show(other)}, which are the same setting; "
            "remove one of them"
        )


def require_equal(path: str, value: Any, other_path: str, other: Any) -> None:
    """Raise UserError where a field differs from another that lionjax takes its value from; null says nothing."""
    if value is not None and value != other:
        raise UserError(f"this model has {path} {show(value)}; only {show(other)}, as {other_path}, is supported")


def show(value: Any) -> str:
    """A value of config.json in an error: JSON with single quotes, at most 80 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
