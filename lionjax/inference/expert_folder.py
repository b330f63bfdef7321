# SPDX-License-Identifier: Apache-2.0
"""Folders of models that are used alone: Grounding DINO, RAM, SAM, CLIP. Released, converted, or in a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lionjax import convert
from lionjax.core.experiment import Experiment
from lionjax.core.types import Params, UserError
from lionjax.data import tokenizer
from lionjax.data.tokenizer import Tokenizer
from lionjax.inference import loading


def check_folder(folder: str | Path, content: str) -> Path:
    """The folder. Raises UserError if there is none; `content` is what it should hold."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a folder with {content}")
    return folder


def holds_experiment(folder: Path) -> bool:
    """Whether the folder is a run, or the exported weights of one."""
    if loading.is_run(folder):
        return True
    return convert.holds_params(folder) and isinstance(convert.open_params(folder)[0], Experiment)


def load_weights(
    folder: Path, config_class: type, content: str, released_files: Sequence[str] = ()
) -> tuple[Any, Params, Path]:
    """(config, parameters, folder of the release's other files) of converted weights, or of released ones.

    `released_files`: names by which a release's file is recognized. Raises UserError for a model of another class;
    `content` is what the folder should hold.
    """
    if convert.holds_params(folder):
        (config, params), files = convert.load_params(folder), folder / convert.ORIGIN
    else:
        released = next((folder / name for name in released_files if (folder / name).is_file()), folder)
        (config, params), files = convert.from_torch(released), folder
    if not isinstance(config, config_class):
        raise UserError(f"{folder} holds a {type(config).__name__}; give a folder with {content}")
    return config, params, files


def load_tokenizer(folder: Path, needed: str, from_files: bool = False) -> Tokenizer:
    """The tokenizer of a folder. Raises UserError if there is none; `needed` says which files to copy there."""
    try:
        return tokenizer.load(str(folder), from_files=from_files)
    except UserError as error:
        if "there is no tokenizer" not in str(error):
            raise
        raise UserError(f"{folder} has no tokenizer; copy {needed} there ({error})") from error
