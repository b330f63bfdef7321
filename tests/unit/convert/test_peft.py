# SPDX-License-Identifier: Apache-2.0
"""LoRA as PEFT lays it out: in, out, merged, and the same numbers in the model that runs it."""

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_folders import LLAMA, tiny_lion
from safetensors.numpy import load_file, save_file
from small_lora import CONFIG, LORA, random_params
from weight_files import assert_same, damaged, damages

from lionjax import convert
from lionjax.convert.formats import peft as loras
from lionjax.convert.mapping.plan import TensorSpec
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.data.tokenizer import TINY_TOKENIZER_FILE
from lionjax.models.language.decoder import Decoder
from lionjax.nn.lora import LoraConfig


def logits(config, params, ids):
    def read(model, ids):
        return model.logits(model(model.embed(ids), np.ones_like(ids)))

    return np.asarray(Decoder(config).apply({"params": params}, ids, method=read))


def test_a_lora_is_written_in_the_layout_of_peft(tmp_path):
    convert.to_torch(CONFIG, random_params(CONFIG), tmp_path / "torch")
    adapter = tmp_path / "torch" / "adapter"
    assert sorted(file.name for file in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.2."
    assert tensors[layer + "self_attn.q_proj.lora_A.weight"].shape == (3, 24)
    assert tensors[layer + "self_attn.q_proj.lora_B.weight"].shape == (24, 3)
    assert tensors[layer + "self_attn.o_proj.lora_A.weight"].shape == (3, 24)
    assert tensors[layer + "mlp.up_proj.lora_B.weight"].shape == (40, 3)
    assert len(tensors) == 3 * 3 * 2
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert (said["peft_type"], said["task_type"], said["r"], said["lora_alpha"]) == ("LORA", "CAUSAL_LM", 3, 12)
    assert said["target_modules"] == ["o_proj", "q_proj", "up_proj"]
    assert not any("lora" in name for name in load_file(tmp_path / "torch" / "model.safetensors"))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_model_with_lora_round_trips_bit_exactly(tmp_path, dtype):
    params = random_params(CONFIG, dtype)
    convert.save(CONFIG, params, tmp_path / "ours")
    coverage = convert.convert(tmp_path / "ours", tmp_path / "torch", "torch", shard_bytes=9000)
    assert "adapter/adapter_model.safetensors" in coverage.files
    convert.convert(tmp_path / "torch", tmp_path / "back", "jax")
    config, back = convert.load_params(tmp_path / "back")
    assert config == CONFIG
    assert_same(trees.flatten(back), trees.flatten(params))


@pytest.mark.slow
def test_the_lora_of_a_vision_language_model_is_exported_separately(tmp_path):
    lion = tiny_lion()
    lora = LoraConfig(2, 4.0, target_modules=("q", "v"))
    lion = dataclasses.replace(lion, language=dataclasses.replace(lion.language, lora=lora))
    params = random_params(lion)
    convert.to_torch(lion, params, tmp_path / "torch")
    config, back = convert.from_torch(tmp_path / "torch")
    assert config == lion
    assert_same(trees.flatten(back), trees.flatten(params))
    said = json.loads((tmp_path / "torch" / "adapter" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["q", "v"]  # no other part has matrices of these names


def test_module_names_shared_by_other_parts_are_written_in_full():
    tower, language = (
        "model.vision_tower.layers.{}.self_attn.q_proj",
        "language_model.model.layers.{}.self_attn.q_proj",
    )
    modules = [name.format(k) + ".weight" for name in (tower, language) for k in range(12)]
    specs = dict.fromkeys(modules, TensorSpec((8, 8), np.dtype("float32")))
    detours = [f"base_model.model.{language.format(k)}.lora_{x}.weight" for k in range(12) for x in "AB"]
    specs |= dict.fromkeys(detours, TensorSpec((3, 8), np.dtype("float32")))
    targets = loras.adapter_config(LORA, specs)["target_modules"]
    chosen = [name for name in modules if re.fullmatch(targets, name.removesuffix(".weight"))]
    assert chosen == [language.format(k) + ".weight" for k in range(12)]


@pytest.mark.slow
def test_a_folder_of_peft_is_read_onto_its_base_and_gives_the_merged_model_s_logits(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    theirs.save_pretrained(tmp_path / "base")
    rng, scale, tensors = np.random.default_rng(0), 8 / 4, {}
    for name, module in theirs.named_modules():
        if name.endswith(("q_proj", "v_proj", "down_proj")):
            a = rng.standard_normal((4, module.in_features)).astype(np.float32)
            b = rng.standard_normal((module.out_features, 4)).astype(np.float32)
            tensors |= {f"base_model.model.{name}.lora_{x}.weight": w for x, w in zip("AB", (a, b))}
            module.weight.data += torch.tensor(scale * b @ a)
    adapter = tmp_path / "adapter_of_somebody"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    convert.convert(tmp_path / "base", tmp_path / "ours", "jax", adapter=adapter)
    config, params = convert.load_params(tmp_path / "ours")
    assert config.lora == LoraConfig(4, 8.0, 0.0, ("down", "q", "v"))
    ids = rng.integers(0, 50, (2, 7))
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(logits(config, params, ids) - want).max() < 1e-4 * np.abs(want).max()

    convert.convert(tmp_path / "ours", tmp_path / "merged", "torch", merge_lora=True)
    assert not (tmp_path / "merged" / "adapter").exists()
    again, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        assert np.abs(again.eval()(torch.tensor(ids)).logits.numpy() - want).max() < 1e-4 * np.abs(want).max()

    convert.convert(tmp_path / "ours", tmp_path / "apart", "torch")
    assert_same(load_file(tmp_path / "apart" / "adapter" / "adapter_model.safetensors"), tensors)


@pytest.mark.slow
def test_peft_itself_loads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    params = random_params(CONFIG)
    convert.to_torch(CONFIG, params, tmp_path / "torch")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "torch")
    whole = peft.PeftModel.from_pretrained(base, tmp_path / "torch" / "adapter").eval()
    ids = np.arange(9)[None]
    with torch.no_grad():
        want = whole(torch.tensor(ids)).logits.numpy()
    assert np.abs(logits(CONFIG, params, ids) - want).max() < 1e-4 * np.abs(want).max()
    whole.save_pretrained(tmp_path / "theirs")
    assert_same(
        load_file(tmp_path / "theirs" / "adapter_model.safetensors"),
        load_file(tmp_path / "torch" / "adapter" / "adapter_model.safetensors"),
    )
    # Merged by PEFT and merged by us is the same model.
    convert.to_torch(CONFIG, params, tmp_path / "merged", merge_lora=True)
    merged, ours = (whole.merge_and_unload().state_dict(), load_file(tmp_path / "merged" / "model.safetensors"))
    assert merged.keys() == ours.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(ours[name], tensor.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_lora_that_peft_itself_made_is_read_and_goes_out_as_it_was(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    base.save_pretrained(tmp_path / "base")
    asked = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    theirs = peft.get_peft_model(base, asked).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_B" in name:  # zeros at first
                weight += 0.3 * torch.randn_like(weight)
    theirs.save_pretrained(tmp_path / "adapter")
    convert.convert(tmp_path / "base", tmp_path / "ours", "jax", adapter=tmp_path / "adapter")
    config, params = convert.load_params(tmp_path / "ours")
    ids = np.random.default_rng(0).integers(0, 50, (2, 7))
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(logits(config, params, ids) - want).max() < 1e-4 * np.abs(want).max()
    convert.convert(tmp_path / "ours", tmp_path / "torch", "torch")
    written = tmp_path / "torch" / "adapter" / "adapter_model.safetensors"
    assert_same(load_file(written), load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_a_merged_matrix_is_rounded_once_in_its_own_dtype(tmp_path):
    params = random_params(CONFIG, ml_dtypes.bfloat16)
    convert.to_torch(CONFIG, params, tmp_path / "torch", merge_lora=True)
    layer = jax.tree.map(lambda leaf: leaf[1].astype(np.float32), params["blocks"]["attention"]["o"])
    want = layer["kernel"] + 4 * np.einsum("NHR,RD->NHD", layer["lora_a"], layer["lora_b"])
    made = load_file(tmp_path / "torch" / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    assert made.dtype == ml_dtypes.bfloat16
    want = want.reshape(24, 24).T
    assert np.abs(made.astype(np.float32) - want).max() < 2**-8 * np.abs(want).max()
    assert not json.loads((tmp_path / "torch" / "lionjax.json").read_text())["lora"].get("rank")


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"use_dora": True}, "q_proj' has no lora_magnitude_vector in the adapter"),
        ({"lora_bias": True}, "q_proj' has no lora_B_bias in the adapter"),
        ({"bias": "some"}, "has bias 'some'; lionjax supports bias 'none' or 'all' or 'lora_only'"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj' has A \(3, 24\); its config has rank 8"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names 'lm_head', whose tensors the adapter lacks"),
        ({"trainable_token_indices": [3]}, "lacks the rows of its trainable_token_indices"),
        ({"target_modules": ["q_proj", "o_proj"]}, "up_proj' has a LoRA, but is not in the target_modules"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "layers.1.self_attn.q_proj' has a LoRA, but is not"),
        ({"layers_to_transform": [0, 1]}, "layers.2.self_attn.q_proj' has a LoRA, but is not"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
        ({"future_setting": {"a": 1}}, "has future_setting {'a': 1}; lionjax supports future_setting null"),
        ({"target_modules": 3}, "is no valid LoRA config"),
        ({"r": 5}, r"q_proj' has A \(3, 24\); its config has rank 5"),
        ({"lora_alpha": 5}, "has rank 3 and alpha 5, the model's config 3 and 12"),
        ({"r": "many"}, "is no valid LoRA config"),
        ({"r": 0}, "is no valid LoRA config"),
    ],
)
def test_an_adapter_with_unsupported_settings_is_refused(tmp_path, change, problem):
    convert.to_torch(CONFIG, random_params(CONFIG), tmp_path / "torch")
    file = tmp_path / "torch" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=problem):
        convert.from_torch(tmp_path / "torch")


@pytest.mark.parametrize(
    "removed, problem",
    [
        ("layers.1.self_attn.q_proj.lora_B", "layers.1.self_attn.q_proj' has no lora_B in the adapter"),
        (
            "layers.1.self_attn.q_proj.lora_",
            "layers.1.self_attn.q_proj' is in the target_modules .* but has no LoRA in",
        ),
    ],
)
def test_an_adapter_that_lacks_a_matrix_or_a_layer_is_refused(tmp_path, removed, problem):
    convert.to_torch(CONFIG, random_params(CONFIG), tmp_path / "torch")
    file = tmp_path / "torch" / "adapter" / "adapter_model.safetensors"
    save_file({name: w for name, w in load_file(file).items() if removed not in name}, file)
    with pytest.raises(UserError, match=problem):
        convert.from_torch(tmp_path / "torch")


def test_an_adapter_with_a_tensor_that_the_model_lacks_is_refused(tmp_path):
    convert.to_torch(CONFIG, random_params(CONFIG), tmp_path / "torch")
    file = tmp_path / "torch" / "adapter" / "adapter_model.safetensors"
    more = {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": np.ones((3, 24), np.float32)}
    save_file(load_file(file) | more, file)
    with pytest.raises(UserError, match="does not fit this model:\n  the model has no tensor 'model.layers.7"):
        convert.from_torch(tmp_path / "torch")


def test_merging_an_adapter_on_import_equals_merging_on_export_bit_exactly(tmp_path):
    params = random_params(CONFIG)
    convert.to_torch(CONFIG, params, tmp_path / "torch")
    convert.to_torch(CONFIG, params, tmp_path / "merged", merge_lora=True)
    (tmp_path / "torch" / "lionjax.json").unlink()
    convert.convert(tmp_path / "torch", tmp_path / "ours", "jax", merge_lora=True)
    config, ours = convert.load_params(tmp_path / "ours")
    _, merged = convert.from_torch(tmp_path / "merged")
    assert config.lora == LoraConfig()
    for path, leaf in trees.flatten(merged).items():
        np.testing.assert_allclose(trees.flatten(ours)[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    with pytest.raises(UserError, match="has no adapter to merge"):
        convert.convert(tmp_path / "merged", tmp_path / "again", "jax", merge_lora=True)


def test_added_tokens_get_columns_in_the_lora_of_the_head(tmp_path):
    lora = dataclasses.replace(LORA, target_modules=("head", "q"))
    config = dataclasses.replace(CONFIG, lora=lora)
    convert.to_torch(config, params := random_params(config), tmp_path / "torch")
    words = convert.ResizeOptions(("<a>", "<b>"))
    convert.convert(tmp_path / "torch", tmp_path / "ours", "jax", resize_options=words)
    new, made = convert.load_params(tmp_path / "ours")
    assert new.vocab_size == 52 and made["head"]["lora_b"].shape == (3, 52)
    before = params["head"]["lora_b"]
    np.testing.assert_array_equal(made["head"]["lora_b"][:, :50], before)
    np.testing.assert_allclose(made["head"]["lora_b"][:, 50:], before.mean(1, keepdims=True).repeat(2, 1), rtol=1e-5)
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    tensors = load_file(tmp_path / "back" / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.lm_head.lora_B.weight"].shape == (52, 3)


def test_an_adapter_without_its_base_or_for_another_model_is_refused(tmp_path):
    convert.to_torch(CONFIG, random_params(CONFIG), tmp_path / "torch")
    with pytest.raises(UserError, match="holds only a LoRA"):
        convert.from_torch(tmp_path / "torch" / "adapter")
    file = tmp_path / "torch" / "adapter" / "adapter_model.safetensors"
    save_file({"base_model.model.other.lora_A.weight": np.ones((3, 2), np.float32)}, file)
    with pytest.raises(UserError, match="belongs to another model"):
        convert.from_torch(tmp_path / "torch")


def test_a_scale_by_the_root_of_the_rank_is_kept_as_alpha(tmp_path):
    convert.to_torch(CONFIG, random_params(CONFIG), tmp_path / "torch")
    (tmp_path / "torch" / "lionjax.json").unlink()
    file = tmp_path / "torch" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    lora = convert.from_torch(tmp_path / "torch")[0].lora
    assert lora.alpha / lora.rank == pytest.approx(12 / 3**0.5)


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    """A LLaMA with a LoRA beside it, a tokenizer and a processor, as if from elsewhere."""
    folder = tmp_path_factory.mktemp("good") / "torch"
    convert.to_torch(CONFIG, random_params(CONFIG), folder)
    (folder / "lionjax.json").unlink()
    (folder / "tokenizer.json").write_bytes(TINY_TOKENIZER_FILE.read_bytes())
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return folder


DAMAGED = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages, name=st.sampled_from(DAMAGED), words=st.booleans())
def test_a_damaged_adapter_folder_converts_completely_or_leaves_nothing(good_folder, tmp_path, damage, name, words):
    work = Path(tempfile.mkdtemp(dir=tmp_path))
    shutil.copytree(good_folder, work / "in")
    content = (work / "in" / name).read_bytes()
    head = min(len(content), 4000)  # most of the trouble that can be made is made there
    (work / "in" / name).write_bytes(damaged(content[:head], damage) + content[head:])
    wanted = convert.ResizeOptions(("<new>",)) if words else convert.ResizeOptions()
    there = ["in"]
    try:
        convert.convert(work / "in", work / "ours", "jax", resize_options=wanted)
        there.append("ours")
        convert.convert(work / "ours", work / "back", "torch")
        there.append("back")
    except UserError as error:
        assert str(error)
    assert sorted(path.name for path in work.iterdir()) == sorted(there)
    shutil.rmtree(work)


def test_merging_without_a_lora_is_refused(tmp_path):
    plain = dataclasses.replace(CONFIG, lora=LoraConfig())
    with pytest.raises(UserError, match="has no LoRA"):
        convert.to_torch(plain, random_params(plain), tmp_path / "torch", merge_lora=True)
