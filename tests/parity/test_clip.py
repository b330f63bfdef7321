# SPDX-License-Identifier: Apache-2.0
"""CLIP and SigLIP with both towers against transformers' classes, with sizes drawn anew at each run."""

import dataclasses
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_clip

from lionjax import convert
from lionjax.core import params as trees
from lionjax.core.types import Batch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

KINDS = ("clip", "old clip", "siglip")


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(transformers' model, our config, our parameters, generator), with sizes drawn anew."""
    seed = int(np.random.default_rng().integers(2**31))
    print(f"{request.param} of seed {seed}")
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    if request.param == "siglip":
        model = small_clip.siglip_model(rng)
    else:
        model = small_clip.clip_model(rng, 2 if request.param == "old clip" else None)
    folder = tmp_path_factory.mktemp("released")
    model.save_pretrained(folder)
    config, params = convert.from_torch(folder)
    return model, config, params, rng


def texts_as_batch(config, image_BCHW, ids_BL) -> Batch:
    """A batch whose texts, completed by the model, are `ids_BL` without the start token."""
    first = int(config.text.bos_token_id is not None)
    ids_BL[:, :first] = config.text.bos_token_id or 0
    target, end = ids_BL[:, first:], config.text.eos_token_id
    if config.text.pooling == "last":
        mask = np.ones_like(target)
        target[:, -1] = end
    else:
        mask = (np.cumsum(target == end, axis=1) <= (target == end)).astype(np.int32)
    row = np.zeros(len(target), np.int32)
    ids = np.zeros_like(target)
    return Batch(image_BCHW.transpose(0, 2, 3, 1), ids, ids, ids, ids, target, mask, mask, row, row)


def test_embeddings_logits_loss_and_gradients_match_transformers(pair):
    model, config, params, rng = pair
    image_BCHW, ids_BL = small_clip.inputs(rng, model)
    batch = texts_as_batch(config, image_BCHW, ids_BL)
    theirs = model(torch.from_numpy(ids_BL), torch.from_numpy(image_BCHW), return_loss=True)
    theirs.loss.backward()

    def run(params):
        image_BE = config.embed_images(params, batch.image_BHWC)
        loss, metrics = config.loss(params, batch)
        return loss, (image_BE, config.embed_texts(params, jnp.asarray(ids_BL)), metrics)

    (loss, (image_BE, text_BE, metrics)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    np.testing.assert_allclose(image_BE, theirs.image_embeds.detach(), atol=1e-4)
    np.testing.assert_allclose(text_BE, theirs.text_embeds.detach(), atol=1e-4)
    np.testing.assert_allclose(loss, theirs.loss.detach(), rtol=1e-4)
    logits_BB = theirs.logits_per_image.detach().numpy()
    assert metrics["image_to_text_accuracy"] == (logits_BB.argmax(1) == np.arange(len(logits_BB))).mean()
    their_grads = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    our_grads = convert.state_dict_from_params(config.weight_map(), jax.device_get(grads))
    assert our_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        np.testing.assert_allclose(our_grads[name], grad, atol=2e-4 * max(1, np.abs(grad).max()), err_msg=name)


def test_a_folder_is_converted_both_ways_bit_for_bit(pair, tmp_path):
    model, config, params, _ = pair
    model.save_pretrained(tmp_path / "released")
    convert.convert(tmp_path / "released", tmp_path / "jax", "jax")
    convert.convert(tmp_path / "jax", tmp_path / "torch", "torch")
    back, info = type(model).from_pretrained(tmp_path / "torch", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    one, other = model.state_dict(), back.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    convert.to_torch(config, params, tmp_path / "memory")
    again, _ = convert.from_torch(tmp_path / "memory")
    assert again == config


def openai_names(state: dict) -> dict:
    """The tensors of a CLIPModel under OpenAI's names, written from OpenAI's code."""
    names = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
    pairs = (
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("text_model.embeddings.token_embedding", "token_embedding"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.final_layer_norm", "ln_final"),
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("self_attn.out_proj", "attn.out_proj"),
    )
    renamed = {}
    for name, array in state.items():
        if name in names:
            renamed[names[name]] = array.T
            continue
        if "self_attn.q_proj" in name:
            fused = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            name, array = name.replace("self_attn.q_proj.", "attn.in_proj_"), np.concatenate(fused)
        elif "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = array
    return renamed


def as_module(tensors: dict):
    """A module with these tensors as its state dict."""

    class Tree(torch.nn.Module):
        def forward(self, x):
            return x + 1

    root = Tree()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, Tree())
            module = module._modules[part]
        module.register_buffer(last, tensor)
    return root


@pytest.mark.parametrize("archive", ["state dict", "TorchScript"])
def test_openai_names_give_the_same_model_and_are_written_back(tmp_path, archive):
    from lionjax.models.vlm import clip

    rng = np.random.default_rng(int(np.random.default_rng().integers(2**31)))
    width = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256}  # heads of 64 and MLPs of 4 widths
    text = small_clip.text_sizes(rng, 8, **width, eos_token_id=2)
    vision = small_clip.vision_sizes(rng, **(width | {"hidden_size": 128, "num_attention_heads": 2}))
    vision["intermediate_size"] = 512
    model = small_clip.shaken(
        transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    )
    model.save_pretrained(tmp_path / "hf")
    state = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    openai = openai_names(state)
    sizes = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    (tmp_path / "openai").mkdir()
    tensors = {n: torch.tensor(w) for n, w in openai.items()} | sizes
    if archive == "state dict":
        torch.save(tensors, tmp_path / "openai" / "ViT-B-32.pt")
    else:  # as released
        torch.jit.trace(as_module(tensors), torch.zeros(1)).save(str(tmp_path / "openai" / "ViT-B-32.pt"))
    expected, _ = convert.from_torch(tmp_path / "hf")
    config, params = convert.from_torch(tmp_path / "openai" / "ViT-B-32.pt")
    ids = {name: getattr(config.text, name) for name in ("pad_token_id",)}
    assert config == dataclasses.replace(
        expected, text=dataclasses.replace(expected.text, **ids), init_logit_scale=config.init_logit_scale
    )
    for path, leaf in trees.flatten(convert.from_torch(tmp_path / "hf")[1]).items():
        np.testing.assert_array_equal(leaf, trees.flatten(params)[path], err_msg=path)
    back = convert.state_dict_from_params(clip.openai_weight_map(config), params)
    assert back.keys() == openai.keys() and all(np.array_equal(back[name], openai[name]) for name in openai)


def test_a_model_that_transformers_has_no_class_for_is_written_and_read_back(tmp_path):
    from paths import CONFIGS

    from lionjax.convert.formats import detect

    model = runpy.run_path(str(CONFIGS / "tiny_clip.py"))["get_config"]().model
    assert detect.format_of_config(model).name == "clip_own"
    _, shapes = detect.weight_map_and_abstract_params(detect.format_of_config(model), model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    convert.to_torch(model, params, tmp_path / "torch")
    config, back = convert.from_torch(tmp_path / "torch")
    assert config == model
    jax.tree.map(np.testing.assert_array_equal, back, params)
