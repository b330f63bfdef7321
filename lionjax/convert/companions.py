# SPDX-License-Identifier: Apache-2.0
"""Companion files: the tokenizer, processor, chat template and generation settings that belong to a checkpoint.

`lionjax convert --to jax` copies them to `origin/` of the new folder, training copies them to `origin/` of the run, and
an export writes them beside the weights again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

ORIGIN = "origin"  # subfolder of a lionjax folder or a run
QFORMER_TOKENIZER = "qformer_tokenizer"  # subfolder with the tokenizer of a Q-Former that reads the question
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe_simple_vocab_16e6.txt.gz",
    "chat_template.json",
    "chat_template.jinja",
)
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
COMPANION_FILES = (  # of a published checkpoint
    "config.json",
    "generation_config.json",
    *PROCESSOR_FILES,
    *TOKENIZER_FILES,
    *(f"{QFORMER_TOKENIZER}/{name}" for name in TOKENIZER_FILES),
    "ram_tag_list.txt",
    "ram_tag_list_chinese.txt",
    "ram_tag_list_threshold.txt",
)
CHAT_TEMPLATE_FOLDERS = ("additional_chat_templates",)  # of transformers: one .jinja file for each template


def find_companion_files(folder: Path | None) -> dict[str, Path]:
    """{name: path} of the companion files that exist in a checkpoint's folder."""
    if folder is None:
        return {}
    names = [*COMPANION_FILES]
    for subfolder in CHAT_TEMPLATE_FOLDERS:
        names += [f"{subfolder}/{file.name}" for file in sorted((folder / subfolder).glob("*.jinja"))]
    return {name: folder / name for name in names if (folder / name).is_file()}


def find_origin_files(folder: Path) -> dict[str, Path]:
    """{relative path: path} of all files in the `origin/` subfolder of a lionjax folder or a run."""
    files = [file for file in sorted((folder / ORIGIN).rglob("*")) if file.is_file()]
    return {file.relative_to(folder / ORIGIN).as_posix(): file for file in files}


def resolve_companions(companions: Mapping[str, Path] | str | Path | None) -> dict[str, Path]:
    """{name: path} of `companions`: such a mapping, a folder (a lionjax folder, a run or a torch folder), or None."""
    if companions is None or isinstance(companions, Mapping):
        return dict(companions or {})
    return find_origin_files(Path(companions)) or find_companion_files(Path(companions))


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy `files` ({relative path in `folder`: source}) into `folder`."""
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


def tokenizer_folders(model: Any) -> dict[str, str]:
    """{processor field: subfolder of that tokenizer in a model's folder}; two where a Q-Former reads the question.

    A detector reads only its caption, as the question.
    """
    if model.info.detects_phrases:
        return {"question_tokenizer": ""}
    return {"tokenizer": ""} | ({"question_tokenizer": QFORMER_TOKENIZER} if model.info.reads_question else {})


def with_tokenizers(files: Mapping[str, Path], tokenizer_files: Mapping[str, Mapping[str, Path]]) -> dict[str, Path]:
    """`files` with the tokenizers that a model uses: `tokenizer_files` is {subfolder: {name: vocabulary file}}.

    Where `files` has another vocabulary in that subfolder, its tokenizer, chat template and generation files are
    replaced by those beside the vocabulary file, because ids must agree with the trained embeddings.
    """
    merged = dict(files)
    for subfolder, vocabulary in tokenizer_files.items():
        known = {name: merged.get(_join(subfolder, name)) for name in vocabulary}
        if all(old is not None and old.read_bytes() == vocabulary[name].read_bytes() for name, old in known.items()):
            continue
        merged = {path: source for path, source in merged.items() if not _is_tokenizer_file(path, subfolder)}
        for name, file in vocabulary.items():
            beside = find_companion_files(file.parent) if file.name == name else {}
            beside = {path: source for path, source in beside.items() if _is_tokenizer_file(path, "")}
            merged |= {_join(subfolder, path): source for path, source in beside.items()}
        merged |= {_join(subfolder, name): file for name, file in vocabulary.items()}
    return merged


def _is_tokenizer_file(path: str, subfolder: str) -> bool:
    relative = PurePosixPath(path)
    folder = relative.parent.as_posix().removeprefix(".")
    is_of_language_model = folder in CHAT_TEMPLATE_FOLDERS or path == "generation_config.json"
    return (folder == subfolder and relative.name in TOKENIZER_FILES) or (is_of_language_model and not subfolder)


def _join(subfolder: str, name: str) -> str:
    return f"{subfolder}/{name}" if subfolder else name
