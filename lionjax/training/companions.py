# SPDX-License-Identifier: Apache-2.0
"""The companion files of a run: tokenizers, processor, chat template and generation settings of its initial weights.

Training copies them to `origin/` of the run folder, so that an export has them when the initial weights have moved.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from lionjax.convert.companions import ORIGIN, copy_files, find_origin_files, tokenizer_folders, with_tokenizers
from lionjax.convert.formats import detect
from lionjax.core.experiment import Experiment
from lionjax.core.types import UserError
from lionjax.data import tokenizer
from lionjax.training.init import resolve_weights_file


def companion_files(experiment: Experiment, origin_files: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """{name: path} of the companion files of an experiment's model.

    They are `origin_files`, by default those beside the initial weights of the whole model, with the tokenizers that
    the experiment names. Raises UserError where a tokenizer does not exist.
    """
    files = _files_of_weights(experiment) if origin_files is None else dict(origin_files)
    processor = getattr(experiment.data, "processor", None)
    if processor is None:
        return files
    vocabularies = {
        folder: tokenizer.tokenizer_files(getattr(processor, field))
        for field, folder in tokenizer_folders(experiment.model).items()
    }
    return with_tokenizers(files, vocabularies)


def _files_of_weights(experiment: Experiment) -> dict[str, Path]:
    """The origin files of the first entry of `weights` that comes from a checkpoint of the experiment's own format."""
    try:
        format_name = detect.format_of_config(experiment).name
    except UserError:  # a model without a published format
        return {}
    for entry in experiment.weights:
        folder = resolve_weights_file(entry.file).parent
        files = find_origin_files(folder)
        if files and (folder / detect.CONFIG_FILE).is_file():
            if detect.format_of_config(detect.read_config(folder)).name == format_name:
                return files
    return {}


def save_companions(workdir: Path, experiment: Experiment) -> None:
    """Copy the companion files of an experiment to `origin/` of its run folder, unless that exists already."""
    folder, partial = workdir / ORIGIN, workdir / f".{ORIGIN}.partial"
    if folder.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    copy_files(companion_files(experiment), partial)
    os.rename(partial, folder)
