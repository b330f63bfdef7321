# SPDX-License-Identifier: Apache-2.0
"""The CLIP of an original LLaVA whose config.json names a path of another machine."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from published_folders import LLAMA, VIT
from safetensors.numpy import load_file, save_file
from weight_files import assert_same

from lionjax import cli, convert
from lionjax.convert.formats import detect
from lionjax.convert.formats.hf_language import LLAMA as LLAMA_FORMAT
from lionjax.convert.formats.hf_vision import CLIP
from lionjax.convert.formats.vision_tower import CLIP_224, CLIP_336, LLAVA_TOWER_PREFIX, complete_llava_config
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

ELSEWHERE = "/home/x/clip"


def random_state(config) -> dict:
    """A random tensor for every torch name of a config."""
    checkpoint_format = detect.format_of_config(config)
    rng = np.random.default_rng(0)
    flat = trees.flatten(checkpoint_format.abstract_params(config))
    params = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in flat.items()}
    return convert.state_dict_from_params(checkpoint_format.weight_map(config), trees.unflatten(params))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, torch tensors, folder) of a LLaVA with its tower in its weight file, under the original's names."""
    config = VisualPrefixLM(
        CLIP.config_from_hf(VIT),
        LLAMA_FORMAT.config_from_hf(LLAMA),
        feature_layer=-2,
        projector_depth=1,
        image_token_id=-200,
        prepend_image=False,
        torch_names="original",
    )
    state, folder = random_state(config), tmp_path_factory.mktemp("whole") / "llava"
    convert.to_torch(config, convert.params_from_state_dict(config.weight_map(), state), folder)
    (folder / "lionjax.json").unlink()
    hf_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf_config | {"mm_vision_tower": ELSEWHERE, "vision_config": None}))
    return config, state, folder


@pytest.fixture
def llava(whole, tmp_path):
    """(config, torch tensors, folder) of that LLaVA with neither the tower nor its settings."""
    config, state, source = whole
    shutil.copytree(source, tmp_path / "llava")
    kept = {name: array for name, array in state.items() if not name.startswith(LLAVA_TOWER_PREFIX)}
    save_file(kept, tmp_path / "llava" / "model.safetensors")
    return config, state, tmp_path / "llava"


def write_clip(config, state: dict, folder, **settings) -> None:
    """CLIP's folder with the tower of a LLaVA."""
    folder.mkdir()
    tower = {n.removeprefix(LLAVA_TOWER_PREFIX): w for n, w in state.items() if n.startswith(LLAVA_TOWER_PREFIX)}
    save_file(tower, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CLIP.config_to_hf(config.vision) | settings))


def check_reads_back(config, state: dict, folder) -> None:
    read, params = convert.load_params(folder)
    assert read == config
    assert_same(convert.state_dict_from_params(config.weight_map(), params), state)


def test_a_tower_in_a_subfolder_is_found(llava, tmp_path):
    config, state, folder = llava
    write_clip(config, state, folder / "anything")
    convert.convert(folder, tmp_path / "out", "jax")
    check_reads_back(config, state, tmp_path / "out")


def test_of_two_subfolders_the_one_named_after_the_tower_is_read(llava, tmp_path):
    config, state, folder = llava
    write_clip(config, state, folder / "clip")
    write_clip(config, {name: -array for name, array in state.items()}, folder / "a_clip", layer_norm_eps=1e-3)
    convert.convert(folder, tmp_path / "out", "jax")
    check_reads_back(config, state, tmp_path / "out")
    (folder / "clip").rename(folder / "b_clip")
    with pytest.raises(UserError, match="--vision-tower"):
        convert.convert(folder, tmp_path / "again", "jax")


def test_the_tower_that_the_user_gives_is_read(llava, tmp_path, capsys):
    config, state, folder = llava
    write_clip(config, state, tmp_path / "elsewhere")
    options = ["--to", "jax", "--vision-tower", str(tmp_path / "elsewhere")]
    assert cli.main(["convert", str(folder), str(tmp_path / "out"), *options]) == 0
    check_reads_back(config, state, tmp_path / "out")


def test_config_of_the_given_tower_is_used_with_tower_weights_of_the_checkpoint(whole, tmp_path):
    config, state, folder = whole
    other = {name: np.zeros_like(array) for name, array in state.items()}
    write_clip(config, other, tmp_path / "clip")
    convert.convert(folder, tmp_path / "out", "jax", vision_tower=tmp_path / "clip")
    check_reads_back(config, state, tmp_path / "out")


def test_a_whole_clip_is_read_without_its_text_tower(llava, tmp_path):
    config, state, folder = llava
    write_clip(config, state, folder / "clip")
    tensors = dict(load_file(folder / "clip" / "model.safetensors"))
    text = ("text_model.embeddings.token_embedding.weight", "text_projection.weight", "visual_projection.weight")
    save_file(tensors | {name: np.ones((2, 3), np.float32) for name in text}, folder / "clip" / "model.safetensors")
    whole = {"model_type": "clip", "text_config": {}, "vision_config": CLIP.config_to_hf(config.vision)}
    (folder / "clip" / "config.json").write_text(json.dumps(whole))
    report = convert.convert(folder, tmp_path / "out", "jax")
    assert set(report.ignored) == {LLAVA_TOWER_PREFIX + name for name in text}
    check_reads_back(config, state, tmp_path / "out")


@pytest.mark.parametrize("has_weights", [True, False])
def test_a_missing_tower_is_refused_in_one_sentence(whole, llava, tmp_path, has_weights):
    folder = (whole if has_weights else llava)[2]  # the weights of a small tower do not tell its number of heads
    with pytest.raises(UserError) as error:
        convert.convert(folder, tmp_path / "out", "jax")
    text = str(error.value)
    assert f"the vision tower {ELSEWHERE!r}" in text and "--vision-tower" in text and "\n" not in text


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("openai/clip-vit-large-patch14-336", CLIP_336),
        ("openai/clip-vit-large-patch14", CLIP_224),
        ("/data/models/clip-vit-large-patch14-336/", CLIP_336),
        ("./checkpoints/CLIP-ViT-Large-Patch14", CLIP_224),
        ("/home/user/.cache/hub/models--openai--clip-vit-large-patch14-336/snapshots/ce19dc9", CLIP_336),
        ("C:\\models\\clip-vit-large-patch14", CLIP_224),
    ],
)
def test_tower_sizes_follow_from_a_known_name_at_the_end_of_a_path(tmp_path, name, sizes):
    assert complete_llava_config({"mm_vision_tower": name}, tmp_path)["vision_config"] == sizes


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_tower_sizes_follow_from_the_width_of_an_openai_tower_in_the_weights(tmp_path, prefix):
    tower = f"{prefix}{LLAVA_TOWER_PREFIX}vision_model."
    state = {
        f"{tower}embeddings.class_embedding": (768,),
        f"{tower}embeddings.patch_embedding.weight": (768, 3, 32, 32),
        f"{tower}embeddings.position_embedding.weight": (50, 768),
    } | {f"{tower}encoder.layers.{i}.mlp.fc1.weight": (3072, 768) for i in range(3)}
    save_file({name: np.zeros(shape, np.float16) for name, shape in state.items()}, tmp_path / "model.safetensors")
    made = complete_llava_config({"mm_vision_tower": ELSEWHERE}, tmp_path)["vision_config"]
    assert made == dict(
        image_size=224,
        patch_size=32,
        hidden_size=768,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=3072,
    )


def test_a_vision_tower_for_another_model_or_of_another_kind_is_refused(llava, tmp_path):
    _, _, folder = llava
    (folder / "no_clip").mkdir()
    (folder / "no_clip" / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(UserError, match="no_clip holds no CLIP"):
        convert.convert(folder, tmp_path / "out", "jax", vision_tower=folder / "no_clip")
    config = dataclasses.replace(LLAMA_FORMAT.config_from_hf(LLAMA), depth=1)
    state = random_state(config)
    convert.to_torch(config, convert.params_from_state_dict(LLAMA_FORMAT.weight_map(config), state), tmp_path / "llama")
    with pytest.raises(UserError, match="a llama has no separate vision tower; leave out --vision-tower"):
        convert.convert(tmp_path / "llama", tmp_path / "out", "jax", vision_tower=folder)
