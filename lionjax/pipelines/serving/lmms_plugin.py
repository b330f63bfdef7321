# SPDX-License-Identifier: Apache-2.0
"""What lmms-eval finds by the entry point `lmms_eval.models`: the names of the classes of `lmms_models`."""

from __future__ import annotations


def manifest():
    """lmms-eval's manifest of `--model lionjax`, with a class for its chat requests and one for `--force_simple`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "lionjax.pipelines.serving.lmms_models"
    return ModelManifest("lionjax", f"{module}.LionJaxSimple", f"{module}.LionJaxChat")
