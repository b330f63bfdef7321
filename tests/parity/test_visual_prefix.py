# SPDX-License-Identifier: Apache-2.0
"""LLaVA, BLIP-2 and InstructBLIP beside their classes in transformers: tiny random weights, sizes drawn at each run."""

import dataclasses
import random

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_prefix as tiny
from text_batches import padded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lionjax import convert
from lionjax.core import sharding
from lionjax.inference.engine import target_nll
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.connectors import qformer
from lionjax.models.connectors.qformer import QFormer, QFormerConfig
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

NEW = 7


@pytest.fixture(scope="module", params=tiny.SYSTEMS)
def pair(request, tmp_path_factory):
    """Their model, and ours of the same weights, which came through a folder."""
    seed = tiny.seed()
    draw, folder = random.Random(seed), tmp_path_factory.mktemp("theirs")
    model = tiny.theirs(request.param, draw)
    model.save_pretrained(folder)
    system, params = convert.from_torch(folder)
    return seed, model, system, jax.tree.map(jax.numpy.asarray, params), tiny.batch_of(system, draw)


def close(mine, theirs, seed, tolerance=1e-4):
    theirs, mine = np.asarray(theirs), np.asarray(mine)
    np.testing.assert_allclose(
        mine, theirs, atol=tolerance * max(1, np.abs(theirs).max()), rtol=0, err_msg=f"seed {seed}"
    )


@pytest.mark.slow
def test_logits_loss_and_every_gradient_are_those_of_transformers(pair):
    seed, model, system, params, batch = pair
    model.zero_grad()
    out = model(**tiny.inputs(system, batch))
    out.loss.backward()

    def loss(params):
        value, _ = system.loss(params, batch)
        return value, system.logits(params, batch)

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    wanted = tiny.answer_logits(system, batch, out.logits.detach().numpy())
    for mine, theirs in zip(logits, wanted):
        close(mine[: len(theirs)], theirs, seed)
    assert float(value) == pytest.approx(out.loss.item(), abs=1e-4), f"seed {seed}"
    mine = convert.state_dict_from_params(system.weight_map(), jax.tree.map(np.asarray, grads))
    theirs = gradients(model)
    if "language_model.shared.weight" in theirs and "language_model.lm_head.weight" not in theirs:
        # This version ties the two, whatever the config says.
        mine["language_model.shared.weight"] = (
            mine["language_model.shared.weight"] + mine["language_model.lm_head.weight"]
        )
    for name, norm in theirs.items():
        assert np.linalg.norm(mine[name]) == pytest.approx(norm, rel=1e-3, abs=1e-5), f"{name}, seed {seed}"


def gradients(model) -> dict[str, float]:
    """Norms of their gradients by the names that weights have in files; the bias of EVA's keys has one of nothing."""
    from lionjax.convert.formats.hf_vlm import LLAVA_KEY_PATTERNS
    from lionjax.convert.io.reader import CheckpointTensors

    named = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    if type(model).__name__.startswith("Llava"):
        named = CheckpointTensors(named, ("gradients",)).rename_keys(*LLAVA_KEY_PATTERNS)
    return {name: float(np.linalg.norm(grad)) for name, grad in named.items()}


@pytest.mark.slow
def test_greedy_decoding_matches_transformers(pair):
    seed, model, system, params, batch = pair
    language = system.language
    config = GenerationConfig(
        max_new_tokens=NEW,
        eos_token_id=language.end_token,
        pad_token_id=0,
        decoder_start_token_id=0 if system.is_encoder_decoder else None,
    )
    made = generate(system, params, batch, config)
    asked = tiny.inputs(system, batch, answers=False, left=not system.is_encoder_decoder)
    told = model.generate(
        **asked, max_new_tokens=NEW, do_sample=False, num_beams=1, eos_token_id=language.end_token, pad_token_id=0
    ).numpy()
    # Behind the start token of a decoder, or the prompt, where they give it back.
    told = (
        told[:, 1:]
        if system.is_encoder_decoder
        else told[:, asked["input_ids"].shape[1] :]
        if told.shape[1] > NEW
        else told
    )
    for row, length in enumerate(np.asarray(made.length_B)):
        mine, theirs = np.asarray(made.ids_BM)[row, :length].tolist(), told[row, :length].tolist()
        assert mine == theirs, f"seed {seed}, row {row}"


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["blip2_opt", "instructblip_t5"], indirect=True)
def test_candidates_are_ranked_by_summed_token_loss_as_in_transformers(pair):
    seed, model, system, params, batch = pair
    with torch.no_grad():
        logits = tiny.answer_logits(system, batch, model(**tiny.inputs(system, batch)).logits.numpy())
    wanted = [
        torch.nn.functional.cross_entropy(torch.tensor(row), torch.tensor(ids[: len(row)]).long(), reduction="sum")
        for row, ids in zip(logits, batch.target_BM)
    ]
    mine = target_nll(system, params, batch)
    close(mine, wanted, seed)
    assert np.argsort(mine).tolist() == np.argsort(wanted).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["llava", "blip2_t5"], indirect=True)
def test_a_prompt_without_image_token_has_the_image_in_front_or_none(pair):
    seed, _, system, params, batch = pair
    real = batch.target_mask_BM.astype(bool)
    run = jax.jit(system.logits.__func__, static_argnums=0)
    plain = tiny.without_token(batch)
    in_front = dataclasses.replace(system, in_front=True)
    first = np.concatenate([np.full((len(batch.prompt_BL), 1), tiny.IMAGE_TOKEN, np.int32), plain.prompt_BL], axis=1)
    mask = np.concatenate([np.ones_like(first[:, :1]), plain.prompt_mask_BL], axis=1)
    said = run(system, params, dataclasses.replace(batch, prompt_BL=first, prompt_mask_BL=mask))[real]
    close(run(in_front, params, plain)[real], said, seed)
    close(run(dataclasses.replace(in_front, image_token=None), params, plain)[real], said, seed)
    alone = dataclasses.replace(system, in_front=False)
    other = dataclasses.replace(plain, image_BHWC=batch.image_BHWC[::-1] + 1)
    np.testing.assert_array_equal(run(alone, params, plain)[real], run(alone, params, other)[real])
    assert not np.allclose(run(in_front, params, plain)[real], run(in_front, params, other)[real], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["llava"], indirect=True)
def test_rows_with_two_images_and_with_none_match_transformers(pair):
    """And a token for each of a picture's words, as transformers writes them, means the same as one token."""
    seed, model, system, params, batch = pair
    system = dataclasses.replace(system, in_front=False)
    token, words = tiny.IMAGE_TOKEN, system.vision.num_patches + system.keep_class_token
    texts = [[1, 5, token, 6, 7, token, 8], [1, 9, 10, 11]]
    images = np.random.default_rng(seed).standard_normal((2, 2, *batch.image_BHWC.shape[1:])).astype(np.float32)
    prompt, mask = padded(texts)
    answer = np.array([[12, 13, 2], [14, 2, 0]], np.int32)
    said = dict(target_BM=answer, target_mask_BM=answer > 0, loss_mask_BM=answer > 0, task_B=np.zeros(2, np.int32))
    several = dataclasses.replace(batch, image_BHWC=images, prompt_BL=prompt, prompt_mask_BL=mask, **said)
    mine = jax.jit(system.logits)(params, several)
    for row, text in enumerate(texts):
        whole = [n for t in text for n in ([t] * words if t == token else [t])] + answer[row][answer[row] > 0].tolist()
        pixels = torch.tensor(images[row].transpose(0, 3, 1, 2).copy()) if token in text else None
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([whole]), pixel_values=pixels).logits[0].numpy()
        count = int((answer[row] > 0).sum())
        close(mine[row, :count], wanted[-count - 1 : -1], seed)
    one = [n for t in texts[0][:5] for n in ([t] * words if t == token else [t])]
    short, long = (
        dataclasses.replace(
            several,
            image_BHWC=images[:1, 0],
            prompt_BL=np.array([ids]),
            prompt_mask_BL=np.ones((1, len(ids)), int),
            **{name: value[:1] for name, value in said.items()},
        )
        for ids in (texts[0][:5], one)
    )
    logits_of = jax.jit(system.logits)
    close(logits_of(params, long), logits_of(params, short), seed)


@pytest.mark.slow
def test_qformer_without_text_matches_blip2():
    seed = tiny.seed()
    draw = random.Random(seed)
    torch.manual_seed(seed)
    heads, layers, every = draw.choice([2, 3]), draw.randint(1, 5), draw.choice([1, 2, 3])
    sizes = dict(
        hidden_size=heads * 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=22,
        cross_attention_frequency=every,
        encoder_hidden_size=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = tiny.shaken(transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**sizes)))
    c = QFormerConfig(heads * 4, layers, heads, 22, draw.randint(2, 5), every, 10, use_text_input=False)
    queries = torch.randn(1, c.num_query_tokens, c.width)
    state = {name: w.numpy() for name, w in theirs.state_dict().items()} | {"query_tokens": queries.numpy()}
    params = convert.params_from_state_dict((*qformer.query_tokens_weight_map(c), *qformer.hf_weight_map(c)), state)
    source = torch.randn(2, 7, 10)
    with torch.no_grad():
        wanted = theirs(query_embeds=queries.expand(2, -1, -1), encoder_hidden_states=source).last_hidden_state
    close(QFormer(c).apply({"params": params}, source.numpy()), wanted, seed)


@pytest.mark.slow
def test_pooled_patches_are_the_means_of_their_squares():
    seed = tiny.seed()
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    side = draw.choice([4, 6])
    tower = ViTConfig(7 * side, 7, 2 * draw.randint(3, 5), draw.randint(2, 3), 2, 12)
    whole = VisualPrefixLM(tower, DecoderConfig(48, 16, 1, 2, 2, 8, 24), image_token_id=None, torch_names="original")
    batch = tiny.batch_of(whole, draw, rows=2)
    params = jax.tree.map(
        lambda leaf: (0.3 * numbers.standard_normal(leaf.shape)).astype(np.float32),
        nn.unbox(jax.eval_shape(whole.init, jax.random.key(0), batch)),
    )
    seen = torch.tensor(np.asarray(jax.jit(whole.extract_features)(params, batch))).mT.unflatten(-1, (side, side))
    for pool in (2, side):
        mine = jax.jit(dataclasses.replace(whole, pool=pool).extract_features)(params, batch)
        close(mine, torch.nn.functional.avg_pool2d(seen, pool).flatten(2).mT.numpy(), seed)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["instructblip_vicuna"], indirect=True)
def test_cached_features_give_the_same_loss(pair):
    _, _, system, params, batch = pair
    kept = dataclasses.replace(batch, image_BHWC=None, features=jax.jit(system.extract_features)(params, batch))
    one, other = (jax.jit(system.loss)(params, b)[0] for b in (batch, kept))
    assert float(one) == pytest.approx(float(other), abs=1e-5)


def test_sizes_that_make_no_sense_are_refused_in_words():
    with pytest.raises(ValueError, match="projector_depth is 3; it can be one of 0, 1, 2"):
        VisualPrefixLM(projector_depth=3)
    with pytest.raises(ValueError, match="feature_layer is 0; it must be in -24..-1 for a tower of 24 blocks"):
        VisualPrefixLM(feature_layer=0)
    with pytest.raises(ValueError, match="image_token_id is None and prepend_image is False"):
        VisualPrefixLM(image_token_id=None, prepend_image=False)
    with pytest.raises(ValueError, match="pool_stride is 5; it must divide the 24 patches a side"):
        VisualPrefixLM(pool_stride=5, torch_names="original")
    with pytest.raises(ValueError, match="pool_stride 2; .* and no pooling; set torch_names"):
        VisualPrefixLM(pool_stride=2)


@pytest.mark.slow
def test_on_a_mesh_the_loss_is_the_same_and_a_padded_vocabulary_is_split_where_an_odd_one_is_not():
    language = DecoderConfig(
        vocab_size=51, width=16, depth=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16, eos_token_id=2
    )
    tower = ViTConfig(
        14, 7, 8, 1, 2, 8, attention_biases="qkvo", patch_bias=False, pre_layernorm=True, post_layernorm=True
    )
    odd = VisualPrefixLM(tower, language, feature_layer=-1, image_token_id=tiny.IMAGE_TOKEN)
    padded = dataclasses.replace(odd, language=dataclasses.replace(language, pad_vocab_to_multiple_of=64))
    batch = tiny.batch_of(odd, random.Random(0), rows=8)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = sharding.abstract_params(odd.init, jax.random.key(0), batch, mesh=mesh)
    assert "tensor" not in shapes["language"]["head"]["kernel"].sharding.spec
    params = sharding.init_sharded(padded.init, jax.random.key(0), batch, mesh=mesh)
    assert "tensor" in params["language"]["head"]["kernel"].sharding.spec
    with sharding.use_mesh(mesh):
        whole = jax.jit(padded.loss)(params, sharding.shard_batch(batch, mesh))[0]
    alone = jax.jit(padded.loss)(jax.device_get(params), batch)[0]
    assert float(whole) == pytest.approx(float(alone), rel=1e-5)
