# SPDX-License-Identifier: Apache-2.0
"""Tables that change their size on the way in: new words, rows that fill up, positions for other pictures."""

import json

import numpy as np
import pytest
from published_folders import LLAMA, VIT, tiny_t5
from safetensors.numpy import load_file

from lionjax import convert
from lionjax.convert import ResizeOptions, resize
from lionjax.core.types import UserError
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig

WORDS = ("<im_patch>", "<im_start>", "<im_end>", "<at>", "<boxes>")  # NExT-Chat's, in its order


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("old, new", [(16, 24), (24, 16), (7, 10), (3, 3), (5, 1), (2, 9)])
def test_positions_are_resampled_as_torch_does_it(old, new, corners):
    torch = pytest.importorskip("torch")
    grid = np.random.default_rng(0).standard_normal((old, old, 3)).astype(np.float32)
    planes = torch.from_numpy(grid.transpose(2, 0, 1).copy())[None]
    want = torch.nn.functional.interpolate(planes, size=(new, new), mode="bicubic", align_corners=corners)
    made = resize.interpolate_grid(grid, new, corners)
    np.testing.assert_allclose(made, want[0].numpy().transpose(1, 2, 0), atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_positions_are_interpolated_for_larger_images_and_the_class_token_stays(clip):
    torch = pytest.importorskip("torch")
    vision = ViTConfig(image_size=28, patch_size=7, width=5, pre_layernorm=clip)
    table = np.random.default_rng(0).standard_normal((17, 5)).astype(np.float32)
    made = resize.interpolate_position_embeddings(vision, 42)
    assert made.config.image == 42 and made.shapes == {"position": (37, 5)}
    resampled = made.transforms["position"](table)
    planes = torch.from_numpy(table[1:].reshape(4, 4, 5).transpose(2, 0, 1).copy())[None]
    want = torch.nn.functional.interpolate(planes, size=(6, 6), mode="bicubic", align_corners=clip)[0]
    np.testing.assert_array_equal(resampled[0], table[0])
    np.testing.assert_allclose(resampled[1:], want.numpy().reshape(5, 36).T, atol=1e-5)


@pytest.mark.slow
def test_a_tagger_resized_to_another_image_size_gets_new_windows_and_still_works(tmp_path):
    torch = pytest.importorskip("torch")
    import jax
    from small_ram import TINY, WORDS

    from lionjax.convert.formats.ram import RAM
    from lionjax.inference import tagger

    rng, shapes = np.random.default_rng(0), RAM.abstract_params(TINY)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    convert.to_torch(TINY, params, tmp_path / "small")
    (tmp_path / "small" / tagger.TAG_LIST_FILE).write_text("\n".join(WORDS))
    convert.convert(tmp_path / "small", tmp_path / "large", "jax", resize_options=ResizeOptions(image_size=24))
    large = tagger.load(tmp_path / "large")
    assert (large.config.swin.image_size, large.config.swin.window_size) == (24, 3)
    planes = torch.from_numpy(params["swin"]["stage_0"]["pairs"]["block_1"]["places"][0].T.reshape(1, 1, 3, 3).copy())
    want = torch.nn.functional.interpolate(planes, size=(5, 5), mode="bicubic").reshape(25, 1)
    got = large.params["swin"]["stage_0"]["pairs"]["block_1"]["places"]
    np.testing.assert_allclose(got[0], want, atol=1e-5)
    assert large.probabilities([np.zeros((9, 9, 3), np.uint8)]).shape == (1, 5)
    with pytest.raises(UserError, match="image_size is 20; it does not give an integer window size"):
        resize.interpolate_position_embeddings(TINY, 20)


def saved_llama(folder, tied=False):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA | {"tie_word_embeddings": tied})
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return transformers, model


def tokenizer_of(transformers, words: int):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{k}": k for k in range(3, words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_follow_the_vocabulary_in_embeddings_head_and_tokenizer(tmp_path, tied):
    transformers, model = saved_llama(tmp_path / "base", tied)
    tokenizer_of(transformers, 50).save_pretrained(tmp_path / "base")
    convert.convert(
        tmp_path / "base", tmp_path / "ours", "jax", resize_options=ResizeOptions(WORDS, pad_vocab_to_multiple_of=8)
    )
    config, params = convert.load_params(tmp_path / "ours")
    assert config.vocab == 56  # 55, filled up
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    again, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for name in ("embed_tokens", "lm_head"):
        one, other = (m.lm_head if name == "lm_head" else m.model.embed_tokens for m in (model, again))
        one, other = one.weight.detach().numpy(), other.weight.detach().numpy()
        np.testing.assert_array_equal(other[:50], one)
        np.testing.assert_allclose(other[50:], np.broadcast_to(one.mean(0), (6, 24)), atol=1e-7)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.convert_tokens_to_ids(list(WORDS)) == [50, 51, 52, 53, 54]
    assert tokenizer("w7<at><boxes> w8")["input_ids"] == [7, 53, 54, 8]


def test_added_tokens_use_padding_rows_first(tmp_path):
    transformers, model = saved_llama(tmp_path / "base")
    tokenizer_of(transformers, 47).save_pretrained(tmp_path / "base")
    convert.convert(tmp_path / "base", tmp_path / "ours", "jax", resize_options=ResizeOptions(("<a>", "<b>")))
    config, params = convert.load_params(tmp_path / "ours")
    old = model.model.embed_tokens.weight.detach().numpy()
    table = params["embedding"]["table"]
    assert config.vocab == 50
    np.testing.assert_array_equal(table[[*range(47), 49]], old[[*range(47), 49]])
    np.testing.assert_allclose(table[47:49], np.broadcast_to(old[:47].mean(0), (2, 24)), atol=1e-7)


def test_padding_the_vocabulary_changes_no_existing_row(tmp_path):
    config, params = tiny_t5()
    convert.to_torch(config, params, tmp_path / "torch")
    convert.convert(
        tmp_path / "torch", tmp_path / "ours", "jax", resize_options=ResizeOptions(pad_vocab_to_multiple_of=64)
    )
    config, filled = convert.load_params(tmp_path / "ours")
    assert config.vocab == 128 and filled["head"]["kernel"].shape == (24, 128)
    assert filled["embedding"]["table"][:97].tobytes() == params["embedding"]["table"].tobytes()
    assert filled["head"]["kernel"][:, :97].tobytes() == params["head"]["kernel"].tobytes()


def test_a_clip_folder_is_converted_to_another_image_size_with_its_processor(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT))
    theirs.save_pretrained(tmp_path / "clip")
    said = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "do_resize": True}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(said))
    convert.convert(tmp_path / "clip", tmp_path / "ours", "jax", resize_options=ResizeOptions(image_size=56))
    convert.convert(tmp_path / "ours", tmp_path / "back", "torch")
    back = transformers.CLIPVisionModel.from_pretrained(tmp_path / "back")
    assert back.config.image_size == 56
    with torch.no_grad():
        assert back(torch.zeros(1, 3, 56, 56)).last_hidden_state.shape == (1, 17, 24)
    said = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert said["size"] == {"shortest_edge": 56} and said["crop_size"] == {"height": 56, "width": 56}


def test_vocabulary_padding_rows_are_removed_on_export(tmp_path):
    from small_lora import random_params

    split = DecoderConfig(50, 24, 2, 4, 2, 6, 40, pad_vocab_to_multiple_of=8)
    params = random_params(split)
    assert params["embedding"]["table"].shape == (56, 24)
    convert.to_torch(split, params, tmp_path / "torch")
    tensors = load_file(tmp_path / "torch" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == tensors["lm_head.weight"].shape == (50, 24)
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"]["kernel"][:, :50].T)
    _, back = convert.from_torch(tmp_path / "torch")
    assert back["head"]["kernel"].shape == (24, 56) and not back["head"]["kernel"][:, 50:].any()


@pytest.mark.parametrize(
    "wanted, problem",
    [
        (ResizeOptions(image_size=30), "image_size is 30; it must be a multiple of the patch size 14"),
        (ResizeOptions(added_tokens=("<a>",)), "has no vocabulary"),
    ],
)
def test_an_impossible_resize_is_refused_and_leaves_nothing(tmp_path, wanted, problem):
    transformers = pytest.importorskip("transformers")
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)).save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match=problem):
        convert.convert(tmp_path / "clip", tmp_path / "ours", "jax", resize_options=wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_adding_a_token_that_exists_is_refused(tmp_path):
    transformers, _ = saved_llama(tmp_path / "base")
    tokenizer_of(transformers, 50).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="already has the token 'w7'"):
        convert.convert(tmp_path / "base", tmp_path / "ours", "jax", resize_options=ResizeOptions(("w7",)))
