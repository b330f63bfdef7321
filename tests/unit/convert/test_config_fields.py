# SPDX-License-Identifier: Apache-2.0
"""`ConfigFields` reads and writes the fields that a config.json and a lionjax config share."""

import dataclasses

import pytest

from lionjax.convert.formats.config_fields import TOKEN_IDS, ConfigFields
from lionjax.models.language.decoder import DecoderConfig

FIELDS = ConfigFields({"width": "n_embd", "depth": "n_layer"}, dict.fromkeys(TOKEN_IDS, 7) | {"n_layer": 2}, TOKEN_IDS)


def test_what_is_written_is_read_back():
    config = DecoderConfig(width=64, depth=3, pad_token_id=5)
    other = dataclasses.replace(DecoderConfig(), **FIELDS.read(FIELDS.write(config)))
    assert FIELDS.write(config) == {"n_embd": 64, "n_layer": 3, "pad_token_id": 5, "bos_token_id": 1, "eos_token_id": 2}
    assert other == config


def test_omitted_fields_have_the_defaults_of_the_table_or_of_the_call():
    read = FIELDS.read({"n_embd": 64, "pad_token_id": None, "eos_token_id": [3, 4]}, {"bos_token_id": 9})
    assert read == {"width": 64, "depth": 2, "pad_token_id": 7, "bos_token_id": 9, "eos_token_id": 3}


def test_a_missing_field_without_default_is_named():
    with pytest.raises(KeyError, match="n_embd"):
        FIELDS.read({})
