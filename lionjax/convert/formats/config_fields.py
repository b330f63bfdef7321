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
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclasses.dataclass(frozen=True)
class ConfigFields:
    """The fields that a lionjax config and a config.json both hold, with the same values.

    - `names`: {field of the lionjax config: field of config.json}.
    - `defaults`: {field of config.json: value}, for files that omit it.
    - `token_ids`: fields of token ids, with the same names in both.
    """

    names: Mapping[str, str]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    token_ids: tuple[str, ...] = ()

    def read(self, hf_config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """{field of the lionjax config: value in `hf_config`}; `defaults` replaces defaults of the table.

        Raises KeyError for a missing field without default.
        """
        defaults = {**self.defaults, **(defaults or {})}
        values = {**defaults, **hf_config}
        fields = {name: values[hf_name] for name, hf_name in self.names.items()}
        return fields | {name: token_id(hf_config, name, defaults[name]) for name in self.token_ids}

    def write(self, c: Any) -> dict[str, Any]:
        """{field of config.json: value in the lionjax config `c`}."""
        values = vars(c)
        fields = {hf_name: values[name] for name, hf_name in self.names.items()}
        return fields | {name: values[name] for name in self.token_ids}


def token_id(hf_config: Mapping[str, Any], name: str, default: int) -> int:
    """A token id of config.json; `default` where it is missing or null, the first of a list."""
    value = hf_config.get(name)
    value = value[0] if isinstance(value, list) and value else value
    return default if value is None else int(value)
