# SPDX-License-Identifier: Apache-2.0
"""Processor files of an exported Hugging Face folder: preprocessor_config.json, processor_config.json, tokenizer files.

Files that came with the released weights are kept; sizes in them follow the model, and image settings what a run was
trained with. Missing ones are made from the experiment's processor and from config.json, so that transformers'
AutoProcessor opens the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lionjax.convert.companions import PROCESSOR_FILES, QFORMER_TOKENIZER, VOCABULARY_FILES
from lionjax.convert.formats.checkpoint_format import read_hf_config
from lionjax.convert.formats.image_settings import describes_processor, image_fit_config
from lionjax.core.types import UserError

IMAGE_PROCESSOR = "image_processor"  # key of processor_config.json; transformers before version 5 has a file instead
PROCESSOR_CLASSES = {  # by model_type
    "llava": "LlavaProcessor",
    "blip-2": "Blip2Processor",
    "instructblip": "InstructBlipProcessor",
    "kosmos-2": "Kosmos2Processor",
}
KOSMOS2_TOKENS = (
    *("</doc>", "<image>", "</image>", "</chunk>", "</line>", "<phrase>", "</phrase>", "<object>", "</object>"),
    *("</delimiter_of_multi_objects/>", "<grounding>", "<patch_index_0000>", "<patch_index_1023>"),
)
BLIP_IMAGE_TOKEN = "<image>"  # transformers' BLIP-2 and InstructBLIP processors add this token where it is missing


def complete_processor_files(config: Any, folder: Path, hf_config: Mapping, image_size: int | None) -> list[str]:
    """Bring the processor files in `folder` in line with config.json; returns the names of the new files.

    Sizes and settings that the model decides are updated in the files that exist, and image settings where the
    experiment's `data.processor` has others. Missing files are written:
    preprocessor_config.json from an experiment's `data.processor`, processor_config.json for a model_type with a
    processor class, tokenizer_config.json for each tokenizer.json. Raises UserError for a file that is no JSON.
    """
    update_json_files(folder, resized_processor_files(_processor_files(folder), image_size))
    contents: dict[str, dict] = {}
    processor = getattr(getattr(config, "data", None), "processor", None)
    if processor is not None and image_size is not None:
        update_json_files(folder, _changed_image_settings(config, folder, hf_config, image_size))
    old_settings, has_image_settings = _read(folder, PROCESSOR_FILES[1]), _has_image_settings(folder)
    if processor is not None and image_size is not None and not has_image_settings:
        contents[PROCESSOR_FILES[0]] = preprocessor_config(processor, hf_config.get("model_type"))
    for subfolder in ("", f"{QFORMER_TOKENIZER}/"):
        name, file = f"{subfolder}tokenizer_config.json", folder / subfolder / "tokenizer.json"
        if file.is_file() and not (folder / name).exists():
            contents[name] = tokenizer_config(file)
    if old_settings:
        known = {key: value for key, value in model_settings(hf_config).items() if key in old_settings}
        update_json_files(folder, {PROCESSOR_FILES[1]: old_settings | known})
    elif contents.get(PROCESSOR_FILES[0]) and any((folder / name).is_file() for name in VOCABULARY_FILES):
        if settings := new_processor_config(hf_config, folder / "tokenizer.json"):
            contents[PROCESSOR_FILES[1]] = settings
    update_json_files(folder, contents)
    return list(contents)


def update_json_files(folder: Path, contents: Mapping[str, dict]) -> None:
    """Write each {name: JSON object} into `folder`."""
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _read(folder: Path, name: str) -> dict:
    return read_hf_config(folder / name)


def _processor_files(folder: Path) -> dict[str, dict]:
    return {name: content for name in PROCESSOR_FILES if (content := _read(folder, name))}


def read_image_processor(folder: Path) -> dict:
    """The settings of the image processor of a folder, nested ones first as in transformers; {} where it has none."""
    return _read(folder, PROCESSOR_FILES[1]).get(IMAGE_PROCESSOR) or _read(folder, PROCESSOR_FILES[0])


def _has_image_settings(folder: Path) -> bool:
    return bool(read_image_processor(folder)) or (folder / PROCESSOR_FILES[0]).exists()


def _changed_image_settings(experiment: Any, folder: Path, hf_config: Mapping, image_size: int) -> dict[str, dict]:
    """Those of the JSON files in `folder` with image settings that differ from an experiment's, with the experiment's.

    The `image_aspect_ratio` of an original LLaVA is in config.json.
    """
    processor, default = experiment.data.processor, experiment.model.info.default_processor
    code_pads = bool(default.get("pad_to_square")) and default.get("pad_color") == "white"
    is_original_llava = "mm_vision_tower" in hf_config and "text_config" not in hf_config
    if not (_has_image_settings(folder) or is_original_llava):
        return {}
    if describes_processor(folder, processor, image_size, code_pads):
        return {}
    changed, settings = {}, preprocessor_config(processor, hf_config.get("model_type"))
    for name, content in _processor_files(folder).items():
        if name == PROCESSOR_FILES[0]:
            kept = {key: value for key, value in content.items() if key == "processor_class"}
            changed[name] = settings | kept
        elif IMAGE_PROCESSOR in content:
            changed[name] = content | {IMAGE_PROCESSOR: settings}
    if is_original_llava:
        aspect = "pad" if processor.pad_to_square and _pads_with_mean(processor) else "square"
        changed["config.json"] = {**hf_config, "image_aspect_ratio": aspect}
    return changed


# Sizes


def resized_processor_files(contents: Mapping[str, dict], image_size: int | None) -> dict[str, dict]:
    """Those of the processor files {name: content} that change for a model of `image_size` pixels, with new sizes."""
    changed = {}
    for name, content in contents.items():
        new_content = content if name == PROCESSOR_FILES[1] else resize_preprocessor_config(content, image_size)
        if isinstance(content.get(IMAGE_PROCESSOR), dict):
            nested = resize_preprocessor_config(content[IMAGE_PROCESSOR], image_size)
            new_content = new_content | {IMAGE_PROCESSOR: nested}
        if new_content != content:
            changed[name] = new_content
    return changed


def resize_preprocessor_config(settings: dict, image_size: int | None) -> dict:
    """Image processor settings whose output has `image_size` pixels a side; unchanged where it has already.

    The output is the crop where there is one, else the padded or resized image. A size before the crop keeps its ratio
    to the crop.
    """
    names = [name for name in ("crop_size", "pad_size", "size") if settings.get(name)]
    if "crop_size" in names and not settings.get("do_center_crop", True) and "size" in names:
        names.remove("crop_size")
        names.append("crop_size")
    old_side = next((side for name in names if (side := _longest_side(settings[name]))), None)
    if image_size is None or old_side is None or old_side == image_size:
        return settings
    return settings | {name: _scaled(settings[name], image_size, old_side) for name in names}


def _longest_side(size: Any) -> int | None:
    sides = size.values() if isinstance(size, dict) else size if isinstance(size, list | tuple) else [size]
    return max((side for side in sides if type(side) is int), default=None)


def _scaled(size: Any, new_side: int, old_side: int) -> Any:
    if isinstance(size, dict):
        return {name: _scaled(side, new_side, old_side) for name, side in size.items()}
    if isinstance(size, list | tuple):
        return [_scaled(side, new_side, old_side) for side in size]
    return round(size * new_side / old_side) if type(size) is int else size


# New files


def preprocessor_config(processor: Any, model_type: str | None = None) -> dict:
    """preprocessor_config.json of a `ProcessorConfig`.

    LION resizes an image to a square regardless of its aspect ratio. LLaVA-1.5 pads it to a square with the mean color
    first, as transformers' LlavaImageProcessor does. No class pads with white, as NExT-Chat does, and that of the other
    models does not pad, so the caller must ("white_square_first", "mean_square_first").
    """
    pads_itself = model_type == "llava" and processor.pad_to_square and _pads_with_mean(processor)
    settings = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
    } | image_fit_config(processor)
    if pads_itself:
        return {"do_center_crop": False} | settings | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    color = "mean" if _pads_with_mean(processor) else "white"
    return settings | ({f"{color}_square_first": True} if processor.pad_to_square else {})


def _pads_with_mean(processor: Any) -> bool:
    mean_rgb = tuple(int(255 * mean) for mean in processor.image_mean)
    return processor.image_fit.pad_rgb == mean_rgb or (
        not processor.image_fit.pad_rgb and processor.pad_color == "mean"
    )


def model_settings(hf_config: Mapping) -> dict:
    """The settings of processor_config.json that config.json decides, {} for a model_type without such settings."""
    model_type, vision = hf_config.get("model_type"), hf_config.get("vision_config") or {}
    if model_type == "llava":
        strategy = hf_config.get("vision_feature_select_strategy", "default")
        return {"patch_size": vision.get("patch_size"), "vision_feature_select_strategy": strategy}
    if model_type in ("blip-2", "instructblip"):
        return {"num_query_tokens": hf_config.get("num_query_tokens", 32)}
    return {}


def new_processor_config(hf_config: Mapping, tokenizer_file: Path) -> dict:
    """processor_config.json of a model without one, {} where transformers' processor does not fit its tokenizer."""
    model_type = hf_config.get("model_type")
    if model_type not in PROCESSOR_CLASSES or not tokenizer_file.is_file():
        return {}
    if model_type == "kosmos-2":  # its processor adds tokens that are missing, for which the model has no embedding
        backend = open_tokenizer(tokenizer_file)
        has_tokens = all(backend.token_to_id(token) is not None for token in KOSMOS2_TOKENS)
        return {"processor_class": PROCESSOR_CLASSES[model_type]} if has_tokens else {}
    image_token_id = hf_config.get("image_token_index")
    image_token = None if image_token_id is None else open_tokenizer(tokenizer_file).id_to_token(image_token_id)
    settings = {"processor_class": PROCESSOR_CLASSES[model_type]} | model_settings(hf_config)
    if model_type == "llava":  # CLIP's class token is the additional one
        return settings | {"image_token": image_token, "num_additional_image_tokens": 1} if image_token else {}
    return settings if image_token == BLIP_IMAGE_TOKEN else {}


def tokenizer_config(file: Path) -> dict:
    """tokenizer_config.json for a tokenizer.json, with those special tokens that it contains."""
    backend, special_tokens = open_tokenizer(file), {}
    spellings_by_name = {
        "pad_token": ("<pad>", "[PAD]"),
        "unk_token": ("<unk>", "[UNK]"),
        "eos_token": ("</s>",),
        "bos_token": ("<s>",),
        "sep_token": ("[SEP]",),
        "cls_token": ("[CLS]",),
    }
    for name, spellings in spellings_by_name.items():
        if present := [piece for piece in spellings if backend.token_to_id(piece) is not None]:
            special_tokens[name] = present[0]
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special_tokens


def open_tokenizer(file: Path):
    """The `tokenizers.Tokenizer` of a tokenizer.json. Raises UserError where the file is not valid."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{file} is no valid tokenizer.json: {str(error).splitlines()[0]}") from error


# Added tokens


def add_tokens(companions: Mapping[str, Path], tokens: Iterable[str]) -> tuple[int | None, dict[str, bytes]]:
    """(number of ids before, {name: new content}) of the tokenizer files with `tokens` added as special tokens.

    Changed are tokenizer.json and, where they exist, the lists of added tokens in tokenizer_config.json and
    added_tokens.json. A tokenizer without tokenizer.json is written anew by transformers. (None, {}) where there is no
    tokenizer. Raises UserError where a token exists already, where ids have gaps, and where transformers is missing.
    """
    tokens = list(tokens)
    if "tokenizer.json" not in companions:
        if not any(name in companions for name in VOCABULARY_FILES):
            return None, {}
        return _add_tokens_with_transformers(companions, tokens)
    num_known, content = add_tokens_to_tokenizer(companions["tokenizer.json"], tokens)
    contents = {"tokenizer.json": content}
    new_ids = {token: num_known + k for k, token in enumerate(tokens)}
    settings = read_hf_config(companions["tokenizer_config.json"]) if "tokenizer_config.json" in companions else {}
    if isinstance(settings.get("added_tokens_decoder"), dict):
        entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        decoder = settings["added_tokens_decoder"]
        decoder = decoder | {str(new_id): {"content": token, **entry} for token, new_id in new_ids.items()}
        contents["tokenizer_config.json"] = _to_bytes(settings | {"added_tokens_decoder": decoder})
    is_legacy = any(name in companions for name in VOCABULARY_FILES[1:]) and "tokenizer_config.json" not in contents
    if "added_tokens.json" in companions or is_legacy:
        file = companions.get("added_tokens.json")
        contents["added_tokens.json"] = _to_bytes((read_hf_config(file) if file else {}) | new_ids)
    return num_known, contents


def _to_bytes(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def add_tokens_to_tokenizer(file: Path, tokens: Iterable[str]) -> tuple[int, bytes]:
    """(number of ids before, new file content) of a tokenizer.json with `tokens` appended as special tokens.

    Raises UserError where a token exists already, or where the ids have gaps.
    """
    from tokenizers import AddedToken

    tokens, tokenizer = list(tokens), open_tokenizer(file)
    _refuse_known(file, tokens, tokenizer.token_to_id)
    num_known_tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    _refuse_gaps(file, num_known_tokens, [tokenizer.token_to_id(token) for token in tokens])
    return num_known_tokens, json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1).encode()


def _add_tokens_with_transformers(companions: Mapping[str, Path], tokens: list[str]) -> tuple[int, dict[str, bytes]]:
    import tempfile

    from lionjax.convert.companions import TOKENIZER_FILES, copy_files

    file = next(companions[name] for name in VOCABULARY_FILES if name in companions)
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"adding tokens to {file} needs transformers: pip install 'lionjax[torch]', or put a tokenizer.json there"
        ) from error
    with tempfile.TemporaryDirectory() as temporary:
        names = {name: source for name, source in companions.items() if name in TOKENIZER_FILES}
        copy_files(
            names | ({"config.json": companions["config.json"]} if "config.json" in companions else {}),
            Path(temporary, "in"),
        )
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(Path(temporary, "in"), trust_remote_code=False)
        except Exception as error:  # any of its readers may fail on a damaged file
            raise UserError(f"transformers cannot read {file}: {str(error).splitlines()[0][:200]}") from error
        vocabulary = tokenizer.get_vocab()
        _refuse_known(file, tokens, vocabulary.get)
        num_known = 1 + max(vocabulary.values())
        tokenizer.add_tokens([transformers.AddedToken(t, special=True, normalized=False) for t in tokens], True)
        _refuse_gaps(file, num_known, tokenizer.convert_tokens_to_ids(tokens))
        tokenizer.save_pretrained(Path(temporary, "out"))
        return num_known, {f.name: f.read_bytes() for f in sorted(Path(temporary, "out").iterdir()) if f.is_file()}


def _refuse_known(file: Path, tokens: Iterable[str], token_to_id) -> None:
    if existing := [token for token in tokens if token_to_id(token) is not None]:
        raise UserError(f"{file} already has the token {existing[0]!r}; leave it out")


def _refuse_gaps(file: Path, num_known: int, new_ids: list[int]) -> None:
    if new_ids != list(range(num_known, num_known + len(new_ids))):
        raise UserError(f"{file} has gaps in its ids, so new tokens would not get the last ids; renumber its tokens")
