# SPDX-License-Identifier: Apache-2.0
"""`ConfigFields`: one table of the fields that a config.json and a lionjax config share, used in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# Most models of transformers have these names for the sizes of their blocks.
BLOCK_SIZES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}
IMAGE_SIZES = {"image_size": "image_size", "patch_size": "patch_size"}
# Names of transformers' activations -> names in lionjax.nn.layers.ACTIVATIONS.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
}
HF_ACTIVATIONS = {  # the inverse, with the names that transformers writes
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "squared_relu": "relu2",
    "silu": "silu",
}
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclasses.dataclass(frozen=True)
class ConfigFields:
    """The fields that a lionjax config and a config.json both hold, with the same values.

    - `names`: {field of the lionjax config: field of config.json}.
    - `defaults`: {field of config.json: value}, for files that omit it.
    - `token_ids`: fields of token ids, with the same names in both.
    - `activation`: the field of config.json that names the activation; "" for none.
    """

    names: Mapping[str, str]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    token_ids: tuple[str, ...] = ()
    activation: str = ""

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The fields of config.json, without token ids."""
        return (*self.names.values(), *([self.activation] if self.activation else []))

    def read(self, hf_config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """{field of the lionjax config: value in `hf_config`}; `defaults` replaces defaults of the table.

        Raises KeyError for a missing field without default.
        """
        defaults = {**self.defaults, **(defaults or {})}
        values = {**defaults, **hf_config}
        fields = {name: values[hf_name] for name, hf_name in self.names.items()}
        if self.activation:
            fields["activation"] = ACTIVATIONS[values[self.activation]]
        return fields | {name: token_id(hf_config, name, defaults[name]) for name in self.token_ids}

    def write(self, c: Any) -> dict[str, Any]:
        """{field of config.json: value in the lionjax config `c`}."""
        values = vars(c)
        fields = {hf_name: values[name] for name, hf_name in self.names.items()}
        if self.activation:
            fields[self.activation] = HF_ACTIVATIONS[values["activation"]]
        return fields | {name: values[name] for name in self.token_ids}


def language_model_fields(
    names: Mapping[str, str], defaults: Mapping[str, Any], activation: str, pad: int | None, bos: int, eos: int
) -> ConfigFields:
    """The fields of a language model; `pad`, `bos`, `eos`: token ids for files that omit them, None for no default."""
    token_ids = {name: value for name, value in zip(TOKEN_IDS, (pad, bos, eos)) if value is not None}
    return ConfigFields(names, {**defaults, **token_ids}, TOKEN_IDS, activation)


def token_id(hf_config: Mapping[str, Any], name: str, default: int) -> int:
    """A token id of config.json; `default` where it is missing or null, the first of a list."""
    value = hf_config.get(name)
    value = value[0] if isinstance(value, list) and value else value
    return default if value is None else int(value)
