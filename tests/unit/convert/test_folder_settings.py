# SPDX-License-Identifier: Apache-2.0
"""What a released folder says of pictures and token ids decides, or the folder is refused in one sentence."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers

import lionjax
from lionjax import convert
from lionjax.convert.formats import token_ids
from lionjax.convert.formats.detect import format_of_config
from lionjax.core.types import UserError
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import CLIP_VIT_L
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

ROWS, IMAGE = 40, 36
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


def write_tokenizer(folder, words: int, image: str | None = "<image>"):
    """A tokenizer.json of `words` words; the one at id IMAGE is the image token, unless `image` is None."""
    names = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), words))]
    if image is not None:
        names[IMAGE] = image
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(names, range(words))), unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens([*SPECIAL, *([image] if image else [])])
    backend.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny LLaVA with Hugging Face's names, and its tokenizer."""
    sizes = {"image_size": 28, "patch_size": 14, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
    vision = dataclasses.replace(CLIP_VIT_L, **sizes)
    language = DecoderConfig(vocab_size=ROWS, width=16, depth=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=24)
    model = VisualPrefixLM(vision, language, image_token_id=IMAGE, prepend_image=False)
    abstract_params = format_of_config(model).abstract_params(model)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params)
    folder = tmp_path_factory.mktemp("published") / "llava"
    convert.to_torch(model, params, folder)
    (folder / "lionjax.json").unlink()
    write_tokenizer(folder, 38)
    return folder


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def too_many_tokens(folder):
    write_tokenizer(folder, ROWS + 1)


def added_token_beyond_the_table(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([f"<extra{n}>" for n in range(3)])
    backend.save(str(folder / "tokenizer.json"))


def image_token_beyond_the_table(folder):
    change_config(folder, image_token_index=ROWS)


def image_token_is_a_word(folder):
    write_tokenizer(folder, 38, None)
    change_config(folder, image_token_index=9)


def image_token_is_the_end_token(folder):
    write_tokenizer(folder, 38, None)
    change_config(folder, image_token_index=2)


def image_token_of_the_tokenizer_differs(folder):
    change_config(folder, image_token_index=35)


def image_token_by_another_name_differs(folder):
    write_tokenizer(folder, 38, "<picture>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"image_token": "<picture>"}))
    change_config(folder, image_token_index=35)


BREAKS = {
    too_many_tokens: f"token 'w{ROWS}' with id {ROWS}, but the model's word table has {ROWS} rows",
    added_token_beyond_the_table: f"with id {ROWS}, but the model's word table has {ROWS} rows",
    image_token_beyond_the_table: f"image_token_index .* is {ROWS}, but the model's word table has {ROWS} rows",
    image_token_is_a_word: "image_token_index .* is 9, which .* uses for 'w9'",
    image_token_is_the_end_token: "image_token_index .* is 2, which .* uses for '</s>'",
    image_token_of_the_tokenizer_differs: f"is 35, but .* gives '<image>' the id {IMAGE}",
    image_token_by_another_name_differs: f"is 35, but .* gives '<picture>' the id {IMAGE}",
}


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_a_folder_whose_ids_do_not_fit_is_refused_at_conversion_and_at_load(damage, published, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(published, folder)
    damage(folder)
    with pytest.raises(UserError, match=BREAKS[damage]):
        convert.convert(folder, tmp_path / "jax", "jax")
    assert not (tmp_path / "jax").exists()
    with pytest.raises(UserError, match=BREAKS[damage]):
        lionjax.load(folder)


def test_a_folder_converted_before_is_checked_at_load(published, tmp_path):
    convert.convert(published, tmp_path / "jax", "jax")
    write_tokenizer(tmp_path / "jax" / "origin", ROWS + 1)
    with pytest.raises(UserError, match=BREAKS[too_many_tokens]):
        lionjax.load(tmp_path / "jax")


def test_the_picture_settings_of_the_folder_reach_the_loaded_model(published, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(published, folder)
    settings = {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 28, "image_mean": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    convert.convert(folder, tmp_path / "jax", "jax")
    for path in (folder, tmp_path / "jax"):
        c = lionjax.load(path).processor.config
        assert (c.image_mean, c.pad_to_square) == ((0.5,) * 3, False)
        assert (c.image_fit.mode, c.image_fit.size) == ("shortest_edge", (32, 0))
    for path in (folder, tmp_path / "jax" / "origin"):
        (path / "preprocessor_config.json").write_text(json.dumps(settings | {"crop_size": 14}))
        with pytest.raises(UserError, match="crop_size is 14; it must be 28"):
            lionjax.load(folder if path == folder else tmp_path / "jax")


@pytest.mark.parametrize("image_token", [None, -1, -200, IMAGE])
def test_an_image_token_outside_the_vocabulary_is_accepted(image_token, published):
    token_ids.check_image_token(image_token, token_ids.read_vocabulary(published), ROWS)


def test_token_ids_of_generation_settings_must_have_embedding_rows():
    fitting = {"eos_token_id": (2, ROWS - 1), "pad_token_id": 0, "decoder_start_token_id": None}
    token_ids.check_used_ids(fitting, ROWS)
    for name, value in {"eos_token_id": [2, ROWS], "pad_token_id": ROWS, "decoder_start_token_id": -2}.items():
        with pytest.raises(UserError, match=f"{name} is .*, but the model's word table has {ROWS} rows"):
            token_ids.check_used_ids(fitting | {name: value}, ROWS)


def test_a_vocab_txt_is_read(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nred\n")
    found = token_ids.read_vocabulary(tmp_path)
    assert found.ids == {"[PAD]": 0, "[UNK]": 1, "red": 2}
    with pytest.raises(UserError, match="token 'red' with id 2, but the model's word table has 2 rows"):
        token_ids.check_vocabulary(found, 2)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 3}))
    added = token_ids.read_vocabulary(tmp_path)
    assert added.ids["<extra>"] == 3 and added.special == {3}
    assert token_ids.read_vocabulary(tmp_path / "none") is None
