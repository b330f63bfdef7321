# SPDX-License-Identifier: Apache-2.0
"""LoRA made by PEFT on tiny models of transformers: the same logits in ours, and after the way out in PEFT again."""

import dataclasses
import json
import random
import re
import shutil
import warnings

import jax
import numpy as np
import peft_adapters as adapters
import pytest
import tiny_prefix
from published_folders import PUBLISHED
from safetensors.numpy import load_file, save_file
from weight_files import assert_same

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import small_bridges

from lionjax import convert
from lionjax.convert.formats import detect
from lionjax.convert.formats.peft_reader import published_name
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.models.language.bert import Bert
from lionjax.models.vision.vit import ViT

ALL_LINEAR = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}


def round_trip(model, tmp_path, **settings):
    """(their model with a new adapter, our config and parameters with it, theirs loaded from our export)."""
    model.save_pretrained(tmp_path / "base")
    theirs = adapters.with_adapter(model, tmp_path / "lora", **settings)
    convert.convert(tmp_path / "base", tmp_path / "ours", "jax", adapter=tmp_path / "lora")
    config, params = convert.load_params(tmp_path / "ours")
    convert.convert(tmp_path / "ours", tmp_path / "torch", "torch")
    _, info = type(model).from_pretrained(tmp_path / "torch", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return theirs, config, jax.tree.map(np.asarray, params), run_card(tmp_path / "torch")


def run_card(folder):
    """The model that the Python of the folder's model card makes. PEFT warns of tensors that it does not find."""
    card = (folder / "README.md").read_text()
    blocks = [block.removeprefix("python") for block in card.split("```")[1::2] if block.startswith("python")]
    names = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        exec("\n".join(blocks).replace("this folder", str(folder)), names)
    return names["model"].eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", adapters.LANGUAGES)
def test_a_language_model_with_lora_on_every_linear_answers_as_peft(tmp_path, kind):
    inputs = adapters.language_inputs(kind)
    theirs, config, params, again = round_trip(adapters.language_model(kind), tmp_path, **ALL_LINEAR)
    wanted = adapters.their_logits(theirs, inputs)
    adapters.assert_alike(adapters.our_language_logits(config, params, inputs), wanted)
    adapters.assert_alike(adapters.their_logits(again, inputs), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("system", ("llava", "blip2_opt", "instructblip_t5"))
def test_a_vision_language_model_with_lora_on_every_linear_answers_as_peft(tmp_path, system):
    theirs, config, params, again = round_trip(adapters.vision_language_model(system), tmp_path, **ALL_LINEAR)
    assert_answers_alike(theirs, config, params, again)


def made_classes():
    """A tiny model of every class of transformers that lionjax reads."""
    yield from (getattr(transformers, a)(getattr(transformers, c)(**sizes)) for a, c, sizes in PUBLISHED.values())
    yield from (adapters.vision_language_model(name) for name in ("llava", "blip2_opt", "instructblip_t5"))
    yield small_bridges.kosmos(random.Random(2))[0]
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    yield transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))


def test_every_module_that_can_have_a_lora_has_a_name_in_the_files(tmp_path):
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, transformers.pytorch_utils.Conv1D)
    for number, model in enumerate(made_classes()):
        model.save_pretrained(tmp_path / str(number))
        source = detect.open_checkpoint(tmp_path / str(number))
        weight_map = source.checkpoint_format.weight_map(source.config)
        names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)]
        lost = [name for name in names if published_name(name, source, weight_map) is None]
        assert names and not lost, type(model)


def assert_answers_alike(theirs, config, params, again):
    """Checks the logits of a vision-language model: ours, theirs, and theirs from our export."""
    batch = tiny_prefix.batch_of(config, random.Random(3))
    inputs = tiny_prefix.inputs(config, batch)
    if type(again.base_model.model).__name__.startswith("Kosmos2"):
        inputs["image_embeds_position_mask"] = inputs["input_ids"] == tiny_prefix.IMAGE_TOKEN
    wanted = adapters.their_logits(theirs, inputs)
    logits = jax.jit(config.logits)(params, batch)
    for ours, row in zip(logits, tiny_prefix.answer_logits(config, batch, wanted)):
        adapters.assert_alike(ours[: len(row)], row)
    adapters.assert_alike(adapters.their_logits(again, inputs), wanted)


@pytest.mark.slow
def test_a_kosmos_2_with_lora_on_every_linear_answers_as_peft(tmp_path):
    torch.manual_seed(0)
    model, system = small_bridges.kosmos(random.Random(2))
    theirs, config, params, again = round_trip(model, tmp_path, **ALL_LINEAR)
    config = dataclasses.replace(config, image_token_id=system.image_token_id)
    assert_answers_alike(theirs, config, params, again)


# part of the model -> PEFT's target_modules, and the lionjax config's part with the names of its layers
PARTS = {
    "language": (r".*language_model.*\.(q_proj|down_proj)", {"language": ("down", "q")}),
    "tower": (r".*vision_tower.*\.(v_proj|fc1)", {"vision": ("up", "v")}),
    "projector": (r".*multi_modal_projector\.linear_2", {"": ("down",)}),
    "head and tower": (r"lm_head|.*vision_tower.*out_proj", {"language": ("head",), "vision": ("o",)}),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_parts_of_a_llava_get_the_loras_that_the_adapter_has(tmp_path, part):
    target_modules, targets = PARTS[part]
    model = adapters.vision_language_model("llava")
    theirs, config, params, again = round_trip(model, tmp_path, r=2, lora_alpha=8, target_modules=target_modules)
    for name in ("", "language", "vision"):
        lora = (getattr(config, name) if name else config).lora
        assert lora.target_modules == targets[name] if name in targets else not lora.rank
    written, read = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("torch/adapter", "lora"))
    assert_same(written, {name: w for name, w in read.items() if "base_layer" not in name})
    if part == "language":
        assert_answers_alike(theirs, config, params, again)


# Names of the same modules in earlier versions of transformers, and those that wrappers add.
OTHER_NAMES = {
    "before 4.52": (
        (r"model\.model\.language_model\.", "model.language_model.model."),
        (r"model\.model\.vision_tower\.", "model.vision_tower.vision_model."),
        (r"model\.model\.multi_modal_projector\.", "model.multi_modal_projector."),
    ),
    "4.52 to 4.57": ((r"vision_tower\.", "vision_tower.vision_model."),),
    "adapter's name": ((r"(lora_[AB])\.", r"\1.default."),),
    "compiled": ((r"base_model\.model\.", "base_model.model._orig_mod."),),
    "data parallel": ((r"^", "module."),),
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """(base folder, adapter folder, config and parameters by path) of a LLaVA with an adapter of PEFT."""
    folder = tmp_path_factory.mktemp("llava")
    model = adapters.vision_language_model("llava")
    model.save_pretrained(folder / "base")
    adapters.with_adapter(model, folder / "lora", r=2, target_modules=["q_proj", "linear_1"])
    convert.convert(folder / "base", folder / "ours", "jax", adapter=folder / "lora")
    config, params = convert.load_params(folder / "ours")
    return folder / "base", folder / "lora", config, trees.flatten(params)


@pytest.mark.parametrize("names", OTHER_NAMES)
def test_adapters_of_other_versions_and_wrappers_are_the_same(llava, tmp_path, names):
    base, lora, config, flat_params = llava
    renamed = {}
    for name, tensor in load_file(lora / "adapter_model.safetensors").items():
        for pattern, new in OTHER_NAMES[names]:
            name = re.sub(pattern, new, name, count=1)
        renamed[name] = tensor
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    shutil.copy(lora / "adapter_config.json", tmp_path)
    assert_reads_the_same(base, tmp_path, config, flat_params)


def test_an_adapter_bin_beside_other_files_of_the_training_is_the_same(llava, tmp_path):
    base, lora, config, flat_params = llava
    tensors = {name: torch.tensor(w) for name, w in load_file(lora / "adapter_model.safetensors").items()}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    shutil.copy(lora / "adapter_config.json", tmp_path)
    assert_reads_the_same(base, tmp_path, config, flat_params)


def assert_reads_the_same(base, folder, config, flat_params):
    convert.convert(base, folder / "ours", "jax", adapter=folder)
    other, params = convert.load_params(folder / "ours")
    assert other == config
    assert_same(trees.flatten(params), flat_params)


@pytest.mark.slow
def test_a_lora_folder_of_llavas_own_code_answers_as_the_whole(tmp_path):
    model = adapters.vision_language_model("llava")
    llama = transformers.LlamaForCausalLM(model.config.text_config)
    state = {name.removeprefix("model.language_model."): w for name, w in model.state_dict().items()}
    llama.model.load_state_dict({name: state[name] for name in llama.model.state_dict()})
    llama.lm_head.load_state_dict({"weight": model.lm_head.weight})
    llama.save_pretrained(tmp_path / "vicuna")
    model.model.vision_tower.save_pretrained(tmp_path / "lora" / "clip")
    projector = model.model.multi_modal_projector
    theirs = adapters.with_adapter(
        model, tmp_path / "peft", r=2, lora_alpha=8, target_modules=r".*language_model.*_proj", task_type="CAUSAL_LM"
    )
    trained = {
        f"base_model.model.model.mm_projector.{place}.{name}": w.detach().clone()
        for place, layer in ((0, projector.linear_1), (2, projector.linear_2))
        for name, w in layer.named_parameters()
    }
    torch.save(trained, tmp_path / "lora" / "non_lora_trainables.bin")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    tensors = {
        name.replace("model.model.language_model.", "model.model."): torch.tensor(w) for name, w in tensors.items()
    }
    torch.save(tensors, tmp_path / "lora" / "adapter_model.bin")
    shutil.copy(tmp_path / "peft" / "adapter_config.json", tmp_path / "lora")
    names = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
    adapters.change_config(tmp_path / "lora", target_modules=names)
    settings = model.config.text_config.to_dict() | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_vision_select_layer": model.config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if model.config.vision_feature_select_strategy == "full" else "patch",
        "vision_config": model.config.vision_config.to_dict(),
        "image_token_index": tiny_prefix.IMAGE_TOKEN,
    }
    (tmp_path / "lora" / "config.json").write_text(json.dumps(settings))
    convert.convert(tmp_path / "vicuna", tmp_path / "ours", "jax", adapter=tmp_path / "lora")
    convert.convert(tmp_path / "lora", tmp_path / "same", "jax", base=tmp_path / "vicuna")
    convert.convert(tmp_path / "ours", tmp_path / "whole", "torch")  # as the base of a further LoRA: a whole LLaVA
    shutil.rmtree(tmp_path / "whole" / "adapter")
    (tmp_path / "whole" / "lionjax.json").unlink()
    convert.convert(tmp_path / "whole", tmp_path / "onto whole", "jax", adapter=tmp_path / "lora")
    config, params = convert.load_params(tmp_path / "ours")
    assert config.torch_names == "original" and config.language.lora.rank == 2
    for folder in ("same", "onto whole"):
        other, others = convert.load_params(tmp_path / folder)
        assert other == config
        assert_same(trees.flatten(others), trees.flatten(params))
    batch = tiny_prefix.batch_of(config, random.Random(3))
    wanted = adapters.their_logits(theirs, tiny_prefix.inputs(config, batch))
    logits = jax.jit(config.logits)(params, batch)
    for ours, row in zip(logits, tiny_prefix.answer_logits(config, batch, wanted)):
        adapters.assert_alike(ours[: len(row)], row)


@pytest.mark.parametrize("kind", ("bert", "clip"))
def test_encoders_with_lora_on_every_linear_match_peft(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "clip":
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**PUBLISHED["clip"][2]))
        inputs = {"pixel_values": torch.randn(2, 3, 28, 28)}
    else:
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=20, **sizes))
        inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    theirs, config, params, again = round_trip(tiny_prefix.shaken(model), tmp_path, **ALL_LINEAR)
    with torch.no_grad():
        wanted, from_export = (model(**inputs) for model in (theirs, again))
    if kind == "clip":
        image = inputs["pixel_values"].numpy().transpose(0, 2, 3, 1)
        states, _, _ = jax.jit(ViT(config).apply)({"params": params}, image)
    else:
        ids = inputs["input_ids"].numpy()
        states, first = jax.jit(Bert(config).apply)({"params": params}, ids, np.ones_like(ids))
        adapters.assert_alike(first, wanted.pooler_output.numpy())
    adapters.assert_alike(states, wanted.last_hidden_state.numpy())
    adapters.assert_alike(from_export.last_hidden_state, wanted.last_hidden_state.numpy())


def test_a_float32_lora_on_a_bfloat16_base_keeps_both_dtypes(tmp_path):
    model = adapters.language_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    adapters.with_adapter(model, tmp_path / "lora", r=2, target_modules=["q_proj"])
    convert.convert(tmp_path / "base", tmp_path / "ours", "jax", adapter=tmp_path / "lora")
    convert.convert(tmp_path / "ours", tmp_path / "torch", "torch")
    for file in ("lora/adapter_model.safetensors", "torch/adapter/adapter_model.safetensors"):
        assert {w.dtype.name for w in load_file(tmp_path / file).values()} == {"float32"}
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "torch")
    assert base.dtype == torch.bfloat16
    again = peft.PeftModel.from_pretrained(base, tmp_path / "torch" / "adapter")
    assert again.state_dict().keys() == peft.PeftModel.from_pretrained(model, tmp_path / "lora").state_dict().keys()


def test_a_swin_with_lora_is_refused_apart_and_merged_as_in_peft(tmp_path):
    torch.manual_seed(0)
    model = tiny_prefix.shaken(transformers.SwinModel(transformers.SwinConfig(**PUBLISHED["swin"][2])))
    model.save_pretrained(tmp_path / "base")
    theirs = adapters.with_adapter(model, tmp_path / "lora", r=2, target_modules="all-linear")
    with pytest.raises(UserError, match="a SwinConfig has no separate LoRA .*; merge it with --merge-lora"):
        convert.convert(tmp_path / "base", tmp_path / "ours", "jax", adapter=tmp_path / "lora")
    convert.convert(tmp_path / "base", tmp_path / "ours", "jax", adapter=tmp_path / "lora", merge_lora=True)
    convert.convert(tmp_path / "ours", tmp_path / "torch", "torch")
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    ours, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("torch", "merged"))
    assert ours.keys() == {f"swin.{name}" for name in merged}
    for name, tensor in merged.items():
        np.testing.assert_allclose(ours[f"swin.{name}"], tensor, rtol=1e-4, atol=1e-5, err_msg=name)


HEADS = {
    "lm_head": ({"target_modules": ["lm_head", "q_proj"]}, None),
    "embed_tokens": ({"target_modules": ["embed_tokens", "q_proj"]}, "cannot stay separate; give --merge-lora"),
    "saved lm_head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, None),
    "saved embed_tokens": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, None),
}


@pytest.mark.parametrize("case", HEADS)
def test_embeddings_and_head_of_an_untied_model_with_lora_or_saved_whole(tmp_path, case):
    settings, problem = HEADS[case]
    model, inputs = adapters.language_model("llama"), adapters.language_inputs("llama")
    model.save_pretrained(tmp_path / "base")
    wanted = adapters.their_logits(adapters.with_adapter(model, tmp_path / "lora", r=2, **settings), inputs)
    ways = ({"merge_lora": True},) if problem else ({}, {"merge_lora": True})
    for place, options in enumerate(ways):
        out = tmp_path / f"ours{place}"
        convert.convert(tmp_path / "base", out, "jax", adapter=tmp_path / "lora", **options)
        adapters.assert_alike(adapters.our_language_logits(*convert.load_params(out), inputs), wanted)
    if problem:
        with pytest.raises(UserError, match=problem):
            convert.convert(tmp_path / "base", tmp_path / "ours", "jax", adapter=tmp_path / "lora")


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("merge_lora", (False, True))
def test_what_would_untie_embeddings_and_head_is_refused(tmp_path, case, merge_lora):
    model = adapters.language_model("llama, tied")
    model.save_pretrained(tmp_path / "base")
    adapters.with_adapter(model, tmp_path / "lora", r=2, **HEADS[case][0])
    with pytest.raises(UserError, match="cannot stay separate; give --merge-lora|tied tensors .* hold different"):
        options = {"adapter": tmp_path / "lora", "merge_lora": merge_lora}
        convert.convert(tmp_path / "base", tmp_path / "ours", "jax", **options)
    assert not (tmp_path / "ours").exists()
