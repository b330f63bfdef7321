# SPDX-License-Identifier: Apache-2.0
"""Folders of Grounding DINO, RAM and SAM are told apart before any weights are read."""

import json

import pytest

from lionjax.core.errors import UserError
from lionjax.inference.folder_kind import folder_kind


@pytest.mark.parametrize(
    "files, kind",
    [
        (["groundingdino_swint_ogc.pth", "vocab.txt"], "detector"),
        (["ram_swin_large_14m.pth"], "tagger"),
        (["ram_tag_list.txt", "model.safetensors"], "tagger"),
        (["sam_vit_h_4b8939.pth"], "segmenter"),
        (["model.safetensors"], "model"),
    ],
)
def test_released_files_name_their_kind(tmp_path, files, kind):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    assert folder_kind(tmp_path) == kind


@pytest.mark.parametrize("model_type, kind", [("grounding-dino", "detector"), ("sam", "segmenter"), ("llava", "model")])
def test_configs_of_hugging_face_name_their_kind(tmp_path, model_type, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert folder_kind(tmp_path) == kind


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        folder_kind(tmp_path / "none")
