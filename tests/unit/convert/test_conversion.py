# SPDX-License-Identifier: Apache-2.0
"""Whole folders both ways: recognized, complete or not at all, and the same to the bit when they come back."""

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_folders import BF16, PUBLISHED, VIT, small_folder, tiny_lion, tiny_t5
from safetensors.numpy import load_file, save_file
from tiny_prefix import shaken
from weight_files import as_torch, assert_same, damaged, damages

from lionjax import convert
from lionjax.convert.io import safetensors_writer
from lionjax.convert.io.reader import open_weights
from lionjax.core import params as trees
from lionjax.core.types import UserError


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path):
    source = small_folder(tmp_path / "source")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="the disk is full; nothing was left behind"):
            convert.convert(source, tmp_path / "out", "torch")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    source = small_folder(tmp_path / "source")
    monkeypatch.setattr(safetensors_writer.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="0.0 GB left"):
        convert.convert(source, tmp_path / "out", "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
def test_a_model_round_trips_through_torch_names_bit_exactly_as_folder_and_in_memory(tmp_path, dtype):
    config, params = tiny_t5(dtype)
    convert.to_torch(config, params, tmp_path / "torch", shard_bytes=20_000)
    again, back = convert.from_torch(tmp_path / "torch")
    assert again == config
    assert_same(trees.flatten(back), trees.flatten(params))
    coverage = convert.convert(tmp_path / "torch", tmp_path / "jax", "jax")
    again, mapped = convert.load_params(tmp_path / "jax")
    assert again == config
    assert_same(trees.flatten(mapped), trees.flatten(params))
    convert.convert(tmp_path / "jax", tmp_path / "torch2", "torch", shard_bytes=20_000)
    assert_same(open_weights(tmp_path / "torch2"), open_weights(tmp_path / "torch"))
    assert "tied: shared.weight = encoder.embed_tokens.weight, decoder.embed_tokens.weight" in str(coverage)


def test_a_converted_folder_is_loaded_onto_a_mesh(tmp_path):
    import jax

    from lionjax.convert.formats.hf_language import T5
    from lionjax.core import sharding

    source = small_folder(tmp_path)
    config, plain = convert.load_params(source)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2, data=1))

    def put(leaf):
        where = sharding.partition_spec(("embed",) + (None,) * (leaf.ndim - 1), leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, where))

    like = jax.tree.map(put, T5.abstract_params(config))
    _, placed = convert.load_params(source, like)
    assert_same(trees.flatten(jax.tree.map(np.asarray, placed)), trees.flatten(plain))
    assert placed["encoder"]["blocks"]["norm"]["scale"].sharding.mesh == mesh


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_of_transformers_round_trips_and_loads_without_missing_keys(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, settings, sizes = PUBLISHED[name]
    model = getattr(transformers, model)
    theirs = shaken(model(getattr(transformers, settings)(**sizes))).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    coverage = convert.convert(tmp_path / "theirs", tmp_path / "ours", "jax")
    assert not coverage.ignored and not coverage.nan_tensors
    for file in (tmp_path / "theirs").glob("*.json"):
        assert (tmp_path / "ours" / "origin" / file.name).read_bytes() == file.read_bytes()
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch", shard_bytes=20_000)
    config, params = convert.load_params(tmp_path / "ours")
    convert.to_torch(config, params, tmp_path / "alone")  # without what came along from there
    for folder in ("back", "alone"):
        back, info = model.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        one, other = theirs.state_dict(), back.state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        same = {k: v for k, v in theirs.config.to_dict().items() if k in sizes}
        assert same == {k: v for k, v in back.config.to_dict().items() if k in sizes}


def test_a_file_without_the_model_prefix_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    whole = shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(**PUBLISHED["gpt2"][2])))
    whole.save_pretrained(tmp_path / "whole")
    whole.transformer.save_pretrained(tmp_path / "bare")
    (_, one), (_, other) = (convert.from_torch(tmp_path / kind) for kind in ("whole", "bare"))
    assert_same(trees.flatten(one), trees.flatten(other))


def test_from_a_full_clip_the_vision_tower_alone_is_read_by_its_format_and_the_rest_reported(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = dict(vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)
    config = transformers.CLIPConfig(vision_config=VIT, text_config=text, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    coverage = convert.convert(tmp_path / "clip", tmp_path / "ours", "jax", system="clip")
    assert {name.split(".")[0] for name in coverage.ignored} == {
        "text_model",
        "text_projection",
        "visual_projection",
        "logit_scale",
    }
    assert "skipped (text tower and contrastive projections): logit_scale, " in str(coverage)


def test_swin_classifier_is_converted_without_its_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = PUBLISHED["swin"][2]
    config = transformers.SwinConfig(**sizes, num_labels=3)
    whole = shaken(transformers.SwinForImageClassification(config))
    whole.save_pretrained(tmp_path / "whole")
    whole.swin.save_pretrained(tmp_path / "bare")
    coverage = convert.convert(tmp_path / "whole", tmp_path / "ours", "jax")
    assert set(coverage.ignored) == {"classifier.weight", "classifier.bias"}
    one, other = convert.load_params(tmp_path / "ours")[1], convert.from_torch(tmp_path / "bare")[1]
    assert_same(trees.flatten(one), trees.flatten(other))


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"model_type": "t5", "feed_forward_proj": "relu"}, "feed_forward_proj 'relu'"),
        (
            {"model_type": "t5", "feed_forward_proj": "gated-gelu"},
            "tie_word_embeddings true .* only false is supported",
        ),
        ({"model_type": "t5"}, "feed_forward_proj 'relu' .* only 'gated-gelu' or 'gated-silu' is supported"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.rope_type 'dynamic'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias true .* only false or null is supported"),
        ({"model_type": "opt", "hidden_size": 8, "word_embed_proj_dim": 4}, "word_embed_proj_dim 4; only 8, as hidden"),
        ({"model_type": "gpt2", "activation_function": "tanh"}, "activation_function 'tanh' .* only 'gelu' or "),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx true"),
        ({"model_type": "clip_vision_model", "hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"model_type": "swin", "image_size": [224, 196]}, r"image_size \[224, 196\]; it must be an integer"),
        ({"model_type": "swin", "use_absolute_embeddings": True}, "use_absolute_embeddings true"),
        ({"model_type": "llama", "vocab_size": "many"}, "vocab_size 'many'; it must be an integer"),
        ({"model_type": "llama", "logit_softcap": 30.0}, "the field logit_softcap 30.0, which lionjax does not know"),
        ({"model_type": ["llama"]}, "--system, one of lion, "),
    ],
)
def test_settings_that_lionjax_does_not_compute_are_refused(tmp_path, settings, problem):
    save_file({"w": np.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=problem):
        convert.from_torch(tmp_path)


def openai_names(state: dict) -> dict:
    """Hugging Face's CLIP tower under OpenAI's names, where q, k and v are one matrix."""
    made = {
        "class_embedding": state["embeddings.class_embedding"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "conv1.weight": state["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        made[f"ln_pre.{kind}"] = state[f"pre_layrnorm.{kind}"]
        made[f"ln_post.{kind}"] = state[f"post_layernorm.{kind}"]
        for i in range(2):
            old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            parts = [state[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            made[f"{new}attn.in_proj_{kind}"] = np.concatenate(parts)
            made[f"{new}attn.out_proj.{kind}"] = state[f"{old}self_attn.out_proj.{kind}"]
            for theirs, ours in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                made[f"{new}{ours}.{kind}"] = state[f"{old}{theirs}.{kind}"]
    return made


@pytest.mark.parametrize("post", [True, False])
def test_clip_under_openai_names_is_recognized_and_gives_the_same_tower(tmp_path, monkeypatch, post):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from lionjax.models.vision import vit

    sizes = VIT | {"image_size": 224, "patch_size": 112}  # as many patches as 28 and 14
    theirs = shaken(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)))
    theirs.save_pretrained(tmp_path / "clip")
    config, params = convert.from_torch(tmp_path / "clip")
    monkeypatch.setattr(vit, "CLIP_VIT_L", dataclasses.replace(config, image=336, depth=24))
    state = load_file(tmp_path / "clip" / "model.safetensors")
    state = openai_names({n.removeprefix("vision_model."): w for n, w in state.items()})
    if not post:
        state = {n: w for n, w in state.items() if "ln_post" not in n}
        config = dataclasses.replace(config, post_layernorm=False)
        del params["norm_after"]
    torch.save(as_torch(torch, state | {"proj": np.ones((24, 8), np.float32)}), tmp_path / "clip_vit_L.pth")
    coverage = convert.convert(tmp_path / "clip_vit_L.pth", tmp_path / "ours", "jax")
    assert coverage.ignored == {"proj": "contrastive projection"}
    again, made = convert.load_params(tmp_path / "ours")
    assert again == config
    assert_same(trees.flatten(made), trees.flatten(params))


def test_an_eva_tower_is_recognized_and_its_unused_last_block_is_skipped(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from lionjax.models.vision import vit

    tiny = vit.ViTConfig(image_size=28, patch_size=14, width=24, depth=39, num_heads=4, mlp_dim=40)
    monkeypatch.setattr(vit, "EVA_VIT_G", tiny)
    rng, state = np.random.default_rng(0), {}
    for i in range(40):
        shapes = {
            "norm1.weight": (24,),
            "norm1.bias": (24,),
            "norm2.weight": (24,),
            "norm2.bias": (24,),
            "attn.qkv.weight": (72, 24),
            "attn.q_bias": (24,),
            "attn.v_bias": (24,),
            "attn.proj.weight": (24, 24),
            "attn.proj.bias": (24,),
            "mlp.fc1.weight": (40, 24),
            "mlp.fc1.bias": (40,),
            "mlp.fc2.weight": (24, 40),
            "mlp.fc2.bias": (24,),
        }
        state |= {f"blocks.{i}.{name}": rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    shapes = {
        "cls_token": (1, 1, 24),
        "pos_embed": (1, 5, 24),
        "patch_embed.proj.weight": (24, 3, 14, 14),
        "patch_embed.proj.bias": (24,),
        "head.weight": (7, 24),
        "fc_norm.bias": (24,),
    }
    state |= {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    torch.save(as_torch(torch, state), tmp_path / "eva_vit_g.pth")
    coverage = convert.convert(tmp_path / "eva_vit_g.pth", tmp_path / "ours", "jax")
    assert set(coverage.ignored) == {n for n in state if n.startswith(("blocks.39.", "head.", "fc_norm."))}
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    assert_same(open_weights(tmp_path / "back"), {n: w for n, w in state.items() if n not in coverage.ignored})


def test_an_unknown_checkpoint_is_refused_with_the_known_formats(tmp_path):
    save_file({"w": np.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no config.json with a model_type; .* with --system, one of lion, "):
        convert.from_torch(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match="model_type 'mamba'"):
        convert.from_torch(tmp_path)
    with pytest.raises(UserError, match="--system is 't6'; it can be one of lion, "):
        convert.from_torch(tmp_path, system="t6")


def test_nan_values_are_kept_with_a_warning(tmp_path):
    config, params = tiny_t5()
    params["head"]["kernel"][3, 4] = np.nan
    convert.to_torch(config, params, tmp_path / "torch")
    coverage = convert.convert(tmp_path / "torch", tmp_path / "jax", "jax")
    assert coverage.nan_tensors == ["lm_head.weight"] and "lm_head.weight holds NaN" in str(coverage)
    assert_same(trees.flatten(convert.load_params(tmp_path / "jax")[1]), trees.flatten(params))


def test_a_checkpoint_that_cannot_be_converted_leaves_no_folder(tmp_path):
    config, params = tiny_t5()
    convert.to_torch(config, params, tmp_path / "torch")
    tensors = load_file(tmp_path / "torch" / "model.safetensors")
    tensors["decoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"] * 2  # seen at the numbers only
    save_file(tensors, tmp_path / "torch" / "model.safetensors")
    with pytest.raises(UserError, match="tied tensors"):
        convert.convert(tmp_path / "torch", tmp_path / "jax", "jax")
    assert [path.name for path in tmp_path.iterdir()] == ["torch"]


@pytest.fixture
def released_lion(tmp_path, monkeypatch):
    """A LION as it is published: what was trained, with the optimizer; the tower; a folder with the FlanT5."""
    import jax

    from lionjax.convert.formats.detect import format_of_config
    from lionjax.models.connectors import qformer
    from lionjax.models.vision import vit

    torch = pytest.importorskip("torch")
    lion, rng, folder = tiny_lion(), np.random.default_rng(0), tmp_path / "release"
    monkeypatch.setattr(vit, "EVA_VIT_G", lion.vision)
    monkeypatch.setattr(qformer, "QFormerConfig", lambda: lion.qformer)
    monkeypatch.setattr(qformer, "AggregatorConfig", lambda: lion.aggregator)
    shapes = format_of_config(lion).abstract_params(lion)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    state = convert.state_dict_from_params(lion.weight_map(), params)
    eva = {n.removeprefix("visual_encoder."): w for n, w in state.items() if n.startswith("visual_encoder.")}
    language = {n.removeprefix("t5_model."): w for n, w in state.items() if n.startswith("t5_model.")}
    tables = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    trained = {n: w for n, w in state.items() if not n.startswith(("visual_encoder.", "t5_model.")) or "adapter" in n}
    trained |= {f"t5_model.{n}": language[n].astype(BF16) for n in tables}
    folder.mkdir()
    torch.save(as_torch(torch, eva | {"head.weight": np.ones((3, 24), np.float32)}), folder / "eva_vit_g.pth")
    saved = {"model": as_torch(torch, trained), "optimizer": {"state": torch.ones(9)}, "epoch": 2}
    torch.save(saved, folder / "LION-FlanT5-XL.pth")
    plain = dataclasses.replace(lion.language, adapters=None, activation="gelu_tanh")
    t5 = {n: w for n, w in language.items() if "adapter" not in n}
    convert.to_torch(
        plain, convert.params_from_state_dict(format_of_config(plain).weight_map(plain), t5), folder / "flan-t5"
    )
    return folder, lion, params, state


@pytest.mark.slow
def test_the_three_files_of_a_released_lion_round_trip(released_lion, tmp_path, monkeypatch):
    folder, lion, params, state = released_lion
    config, made = convert.from_torch(folder)
    assert config == lion
    assert_same(trees.flatten(made), trees.flatten(params))
    coverage = convert.convert(folder, tmp_path / "ours", "jax")
    text = str(coverage)
    assert "skipped (outside of 'model'): optimizer, epoch" in text
    assert "skipped (a copy of t5_model.shared.weight): t5_model.encoder.embed_tokens.weight" in text
    assert "visual_encoder.head.weight" in coverage.ignored
    # Its makers' own name for the file.
    (folder / "LION-FlanT5-XL.pth").rename(folder / "XL_stage3_Learnable.pth")
    assert_same(trees.flatten(convert.from_torch(folder)[1]), trees.flatten(params))
    monkeypatch.undo()  # the sizes now stand in our own config
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    assert_same(open_weights(tmp_path / "back"), state)
    assert convert.from_torch(tmp_path / "back")[0] == lion


@pytest.mark.slow
def test_a_lion_with_the_language_model_of_another_is_refused(released_lion):
    folder, *_ = released_lion
    weights = load_file(folder / "flan-t5" / "model.safetensors")
    for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        weights[name] = weights[name] + 1
    save_file(weights, folder / "flan-t5" / "model.safetensors")
    with pytest.raises(UserError, match="differs from the token embeddings of this FlanT5"):
        convert.from_torch(folder)
    (folder / "eva_vit_g.pth").unlink()
    with pytest.raises(UserError, match="needs the three parts of a LION"):
        convert.from_torch(folder)


@pytest.mark.slow
def test_the_command_converts_a_tiny_model_in_less_than_five_seconds_of_the_processor(tmp_path):
    """By the clock it may wait for others."""
    import resource

    config, params = tiny_t5()
    convert.to_torch(config, params, tmp_path / "torch")
    for src, dst, to in (("torch", "ours", "jax"), ("ours", "back", "torch")):
        paths = [str(tmp_path / src), str(tmp_path / dst)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "lionjax.cli", "convert", *paths, "--to", to], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert_same(open_weights(tmp_path / "back"), open_weights(tmp_path / "torch"))


@pytest.fixture(scope="module")
def good_t5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "torch"
    config, params = tiny_t5()
    convert.to_torch(config, params, folder)
    return folder


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages, name=st.sampled_from(["model.safetensors", "lionjax.json"]), head=st.booleans())
def test_a_damaged_folder_is_converted_whole_or_leaves_nothing(good_t5, tmp_path, damage, name, head):
    work = Path(tempfile.mkdtemp(dir=tmp_path))
    shutil.copytree(good_t5, work / "in")
    content = (work / "in" / name).read_bytes()
    split = 9000 if head else len(content)  # most of the trouble that can be made is made in the header
    (work / "in" / name).write_bytes(damaged(content[:split], damage) + content[split:])
    try:
        convert.convert(work / "in", work / "out", "jax")
    except UserError:
        assert [path.name for path in work.iterdir()] == ["in"]
    else:
        convert.load_params(work / "out")
    shutil.rmtree(work)
