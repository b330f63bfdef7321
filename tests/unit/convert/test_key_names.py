# SPDX-License-Identifier: Apache-2.0
"""Names as training code saves them, in every kind of file; quantized weights are named before any value is read."""

import json

import numpy as np
import pytest
from PIL import Image
from published_folders import LLAMA, tiny_t5
from safetensors.numpy import save_file
from weight_files import as_torch, assert_same

from lionjax import cli, convert
from lionjax.convert.formats import detect
from lionjax.convert.formats.key_fit import open_part
from lionjax.convert.formats.lavis import open_lavis
from lionjax.convert.io.key_names import remove_wrappers
from lionjax.convert.io.reader import open_weights
from lionjax.core.types import UserError

KINDS = ("safetensors", "bin", "pt", "pth, model", "pth, state_dict", "bin, sharded", "safetensors, sharded")
PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "base_model.model.",
    "module._orig_mod.",
    "_orig_mod.module.model.",
    "model.model.",
    "model._orig_mod.base_model.model.",
    "net.student.",
)


def save_as(kind: str, tensors: dict, folder) -> None:
    """Write tensors as a file of a kind, or as two shards with an index."""
    suffix, _, wrap = kind.partition(", ")
    names = list(tensors)
    parts = {f"model.{suffix}": names}
    if wrap == "sharded":
        halves = (names[::2], names[1::2])
        parts = {f"model-0000{k + 1}-of-00002.{suffix}": half for k, half in enumerate(halves)}
        where = {name: file for file, part in parts.items() for name in part}
        (folder / f"model.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    for file, part in parts.items():
        state = {name: tensors[name] for name in part}
        if suffix == "safetensors":
            save_file(state, folder / file)
            continue
        torch = pytest.importorskip("torch")
        state = as_torch(torch, state)
        torch.save({wrap: state, "epoch": 3} if wrap not in ("", "sharded") else state, folder / file)


@pytest.fixture(scope="module")
def llama():
    """(checkpoint format, config, one tensor for every name) of a tiny LLaMA."""
    checkpoint_format = next(f for f in detect.FORMATS if f.name == "llama")
    config = checkpoint_format.config_from_hf(LLAMA)
    mappings = checkpoint_format.weight_map(config)
    names = sorted({key.format(i=i) for m in mappings for key in m.torch_keys for i in range(3)})
    return checkpoint_format, config, {name: np.full(2, k, np.float32) for k, name in enumerate(names)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_removed_in_every_kind_of_file(tmp_path, llama, prefix, kind):
    checkpoint_format, config, tensors = llama
    save_as(kind, {prefix + name: array for name, array in tensors.items()}, tmp_path)
    assert_same(open_part(tmp_path, checkpoint_format, config), tensors)


def test_a_checkpoint_with_or_without_the_model_prefix_is_read_alike(tmp_path, llama):
    checkpoint_format, config, tensors = llama
    bare = {name: array for name, array in tensors.items() if name != "lm_head.weight"}
    for prefix, folder in (("", "as_is"), ("module.", "wrapped"), ("model.", "twice")):
        (tmp_path / folder).mkdir()
        save_as("safetensors", {prefix + name: array for name, array in bare.items()}, tmp_path / folder)
        assert_same(open_part(tmp_path / folder, checkpoint_format, config), bare)
    (tmp_path / "inner").mkdir()
    save_as("safetensors", {n.removeprefix("model."): array for n, array in bare.items()}, tmp_path / "inner")
    assert_same(open_part(tmp_path / "inner", checkpoint_format, config), bare)


@pytest.mark.parametrize(
    "name, plain",
    [
        ("language_model._orig_mod.model.layers.0.mlp.w", "language_model.model.layers.0.mlp.w"),
        ("visual_encoder.module.blocks.0._checkpoint_wrapped_module.w", "visual_encoder.blocks.0.w"),
        ("base_model.model.model.q_proj.base_layer.weight", "model.q_proj.weight"),
        ("base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_A.weight"),
        ("module.base_model.model.q.lora_B.my-adapter.weight", "base_model.model.q.lora_B.weight"),
        ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_A.weight"),
        ("base_model.model.e.lora_embedding_A.default", "base_model.model.e.lora_embedding_A"),
        ("modules.0.submodule.w", "modules.0.submodule.w"),
        ("module", "module"),
    ],
)
def test_wrapper_names_are_removed_anywhere_and_other_names_stay(name, plain):
    assert remove_wrappers(name) == plain


def test_two_names_of_one_parameter_are_refused(tmp_path):
    save_file({"module.w": np.ones(1), "w": np.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="two tensors .* are the same parameter"):
        open_weights(tmp_path)


def test_lora_matrices_between_the_weights_are_refused(tmp_path, llama):
    checkpoint_format, config, tensors = llama
    wrapped = {f"base_model.model.{name}": array for name, array in tensors.items()}
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": np.ones(2)}
    save_as("safetensors", wrapped | lora, tmp_path)
    with pytest.raises(UserError, match="LoRA matrices beside the model's weights.*merge_and_unload") as error:
        open_part(tmp_path, checkpoint_format, config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.module."])
def test_a_wrapped_checkpoint_converts_to_the_same_parameters(tmp_path, prefix):
    config, params = tiny_t5()
    convert.to_torch(config, params, tmp_path / "plain")
    tensors = dict(open_weights(tmp_path / "plain"))
    for folder in ("wrapped", "again"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((tmp_path / "plain" / "config.json").read_bytes())
    save_as("pth, model", {prefix + name: array for name, array in tensors.items()}, tmp_path / "wrapped")
    convert.convert(tmp_path / "wrapped", tmp_path / "jax", "jax")
    convert.convert(tmp_path / "plain", tmp_path / "expected", "jax")
    assert_same(
        open_weights(tmp_path / "jax" / "params.safetensors"),
        open_weights(tmp_path / "expected" / "params.safetensors"),
    )


def test_a_wrapped_lavis_file_is_recognized(tmp_path):
    torch = pytest.importorskip("torch")
    names = ("query_tokens", "itm_head.weight", "ln_vision.weight", "visual_encoder.cls_token")
    state = {f"model.module.{name}": torch.ones(2) for name in names}
    torch.save({"model": state}, tmp_path / "blip2_pretrained.pth")
    checkpoint_format, _, tensors, _ = open_lavis(tmp_path)
    assert checkpoint_format.name == "blip2_first" and set(tensors) == set(names)


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("model.gguf", b"GGUF" + bytes(9), "GGUF"),
        ("model.safetensors", b"", "empty"),
        ("model.bin", b"PK\x03\x04" + bytes(90), "cut short"),
        ("model.bin", b"\x80\x02}q\x00(X", "is damaged or no PyTorch file"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("config.json", b"<!DOCTYPE html><html></html>", "HTML page"),
        ("config.json", b'{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', "AWQ"),
    ],
)
@pytest.mark.parametrize("verb", ["convert", "generate"])
def test_the_command_line_ends_with_one_sentence_and_exit_code_2(tmp_path, capsys, verb, file, content, words):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | LLAMA))
    if file == "config.json":
        (tmp_path / "model.safetensors").write_bytes(b"never opened")
    (tmp_path / file).write_bytes(content)
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    options = {"convert": [str(tmp_path / "out"), "--to", "jax"], "generate": ["--image", str(image), "--prompt", "?"]}
    assert cli.main([verb, str(tmp_path), *options[verb]]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]


# Quantized weights

CONFIGS = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes (4-bit)"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes (8-bit)"),
    ({"load_in_8bit": True}, "bitsandbytes (8-bit)"),
    ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
    ({"quant_method": "awq"}, "AWQ"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
    ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ({"bits": 4}, "an unnamed method"),
]


@pytest.mark.parametrize("settings, method", CONFIGS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_of_quantized_weights_is_refused_before_the_weights_are_opened(tmp_path, settings, method, nested):
    hf_config = {"model_type": "llama"} | LLAMA
    target = hf_config.setdefault("text_config", {}) if nested else hf_config
    target["quantization_config"] = settings
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    (tmp_path / "model.safetensors").write_bytes(b"never opened")
    with pytest.raises(UserError) as error:
        detect.open_checkpoint(tmp_path)
    assert f"quantized with {method}, which" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("file, method", [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")])
def test_a_file_of_a_quantization_library_is_enough(tmp_path, file, method):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | LLAMA))
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=method):
        detect.open_checkpoint(tmp_path)


@pytest.mark.parametrize("settings", [None, {}])
def test_an_empty_quantization_config_changes_nothing(tmp_path, llama, settings):
    _, _, tensors = llama
    hf_config = {"model_type": "llama"} | LLAMA | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    save_as("safetensors", tensors, tmp_path)
    assert set(detect.open_checkpoint(tmp_path).tensors) == set(tensors)


@pytest.mark.parametrize(
    "name, method",
    [
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes (4-bit)"),
        ("weight.absmax", "bitsandbytes (4-bit)"),
        ("SCB", "bitsandbytes (8-bit)"),
        ("g_idx", "GPTQ"),
        ("qweight", "GPTQ or AWQ"),
        ("weight_scale_inv", "FP8"),
        ("input_scale", "FP8"),
        ("weight_packed", "compressed-tensors"),
    ],
)
def test_tensors_of_quantized_weights_are_named_without_a_config(tmp_path, name, method):
    save_file({f"model.layers.0.mlp.up_proj.{name}": np.ones(2, np.uint8)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError) as error:
        open_weights(tmp_path)
    assert f"quantized with {method}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_floats_are_named(tmp_path, suffix, dtype):
    torch = pytest.importorskip("torch")
    state = {"w": torch.ones(2).to(getattr(torch, dtype))}
    if suffix == "safetensors":
        import safetensors.torch

        safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    else:
        torch.save(state, tmp_path / "m.bin")
    with pytest.raises(UserError, match=f"quantized with FP8.*{dtype}"):
        open_weights(tmp_path)
