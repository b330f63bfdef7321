# SPDX-License-Identifier: Apache-2.0
"""BLIP-2's first stage beside transformers: similarities, matching, all three losses and every gradient norm."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_prefix as tiny
from golden import assert_close
from lavis_names import as_lavis

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.nn.functional import cross_entropy, gelu, layer_norm, linear, normalize

from lionjax import convert
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import Batch
from lionjax.core.weight_map import WeightMapping, rename_torch_keys, with_prefix
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.connectors import qformer
from lionjax.models.connectors.qformer import QFormerConfig
from lionjax.models.vision import vit
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.blip2_stage1 import Blip2Stage1
from lionjax.nn.layers import dense_weight_map, norm_weight_map

CLS, DEC, SEP, ROWS = 3, 4, 2, 4


def both(draw):
    """Their class for retrieval and ours, of the same random sizes."""
    t = tiny.tower_settings(draw)
    heads, layers, every, queries = draw.choice([2, 3]), draw.randint(2, 4), draw.choice([1, 2]), draw.randint(2, 4)
    q = {
        "vocab_size": 40,
        "hidden_size": heads * 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": draw.randint(20, 30),
        "max_position_embeddings": 20,
        "cross_attention_frequency": every,
        "encoder_hidden_size": t["hidden_size"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "use_qformer_text_input": True,
    }
    config = transformers.Blip2Config(
        vision_config=t, qformer_config=q, num_query_tokens=queries, image_text_hidden_size=6, image_token_index=None
    )
    theirs = tiny.shaken(transformers.Blip2ForImageTextRetrieval(config))
    vision = ViTConfig(
        t["image_size"],
        t["patch_size"],
        t["hidden_size"],
        t["num_hidden_layers"],
        t["num_attention_heads"],
        t["intermediate_size"],
    )
    bridge = QFormerConfig(
        heads * 4, layers, heads, q["intermediate_size"], queries, every, t["hidden_size"], 40, 20, dropout=0.0
    )
    return theirs, Blip2Stage1(vision, bridge, 1e-6, 6, cls_token_id=CLS, decoder_start_token_id=DEC)


def their_names(c: Blip2Stage1) -> tuple[WeightMapping, ...]:
    """Rows of Blip2ForImageTextRetrieval, which has no head for words."""
    bridge = with_prefix("qformer.", "qformer/", qformer.hf_weight_map(c.qformer))
    words = [(f"qformer.embeddings.{x}_embeddings", f"embeddings.{x}_embeddings") for x in ("word", "position")]
    return (
        *with_prefix("vision_model.", "vision/", vit.blip2_weight_map(c.vision)),
        *norm_weight_map("vision_model.post_layernorm", "vision_norm"),
        *with_prefix("", "qformer/", qformer.query_tokens_weight_map(c.qformer)),
        *rename_torch_keys(bridge, *words, ("qformer.embeddings.layernorm", "qformer.layernorm")),
        *dense_weight_map("vision_projection", "picture_projection"),
        *dense_weight_map("text_projection", "text_projection"),
        *dense_weight_map("itm_head", "match_head"),
        *dense_weight_map("word_dense", "word_dense"),
        *norm_weight_map("word_norm", "word_norm"),
        WeightMapping("word_bias", "word_bias"),
        WeightMapping("temp", "temperature"),
    )


@pytest.fixture(scope="module")
def pair():
    seed = tiny.seed()
    draw = random.Random(seed)
    torch.manual_seed(seed)
    theirs, system = both(draw)
    width = system.qformer.width
    extra = {
        "word_dense.weight": (width, width),
        "word_dense.bias": (width,),
        "word_norm.weight": (width,),
        "word_norm.bias": (width,),
        "word_bias": (40,),
    }
    extra = {name: torch.randn(shape).requires_grad_() for name, shape in extra.items()}
    extra["temp"] = torch.tensor(0.3, requires_grad=True)
    state = {name: w.detach().numpy() for name, w in (theirs.state_dict() | extra).items()}
    params = convert.params_from_state_dict(their_names(system), state)
    numbers = np.random.default_rng(seed)
    lengths = np.array([3, 1, 4, 2])
    mask = (np.arange(6) <= lengths[:, None]).astype(np.int32)
    target = np.where(np.arange(6) == lengths[:, None], SEP, numbers.integers(5, 40, (ROWS, 6))) * mask
    side = system.vision.image_size
    image = numbers.standard_normal((ROWS, side, side, 3)).astype(np.float32)
    nothing, rows = np.zeros((ROWS, 1), np.int32), np.arange(ROWS, dtype=np.int32)
    batch = Batch(image, nothing, nothing, nothing, nothing, target.astype(np.int32), mask, mask, rows, rows)
    return seed, theirs, extra, system, params, batch


def asked(batch: Batch):
    """Pictures, ids behind `[CLS]` and their mask, for torch."""
    ids = torch.tensor(np.concatenate([np.full((ROWS, 1), CLS), batch.target_BM], 1)).long()
    mask = torch.tensor(np.concatenate([np.ones((ROWS, 1)), batch.target_mask_BM], 1)).long()
    return torch.tensor(batch.image_BHWC.transpose(0, 3, 1, 2).copy()), ids, mask


@pytest.mark.slow
def test_image_text_similarities_and_matching_scores_match_transformers(pair):
    seed, theirs, _, system, params, batch = pair
    pixels, ids, mask = asked(batch)
    with torch.no_grad():
        alike = theirs(pixels, ids, mask).logits_per_image.numpy()
        match = theirs(pixels, ids, mask, use_image_text_matching_head=True).logits_per_image.numpy()
    mine = jax.jit(lambda p: (system.similarity(p, batch), system.itm_logits(p, batch)))(params)
    assert_close(mine[0], alike, f"similarity, seed {seed}")
    assert_close(mine[1], match, f"match, seed {seed}")


def torch_losses(theirs, extra, c: Blip2Stage1, batch: Batch):
    """The stage as LAVIS trains it, on the modules of transformers, with the likeliest other picture and text."""
    pixels, ids, mask = asked(batch)
    q, rows = c.qformer.num_query_tokens, torch.arange(ROWS)
    seen = theirs.vision_model(pixels)[0]
    query = theirs.query_tokens.expand(ROWS, -1, -1)
    states = theirs.qformer(query_embeds=query, encoder_hidden_states=seen).last_hidden_state
    picture = normalize(theirs.vision_projection(states), dim=-1)
    told = theirs.qformer(query_embeds=theirs.embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state
    text = normalize(theirs.text_projection(told[:, 0]), dim=-1)

    def best(picture, text):
        return torch.einsum("iqe,je->ijq", picture, text).amax(-1) / extra["temp"]

    to_text, to_picture = best(picture, text.detach()), best(picture.detach(), text).T
    contrast = sum(cross_entropy(x, rows, label_smoothing=0.1) for x in (to_text, to_picture)) / 2
    other_text, other_picture = (
        x.detach().masked_fill(torch.eye(ROWS, dtype=torch.bool), -1e4).argmax(1) for x in (to_text, to_picture)
    )
    triple = (torch.cat([x, x, x[other_text]]) for x in (ids, mask))
    ids3, mask3 = triple
    seen3 = torch.cat([seen, seen[other_picture], seen])
    joint = theirs.embeddings(ids3, query_embeds=theirs.query_tokens.expand(3 * ROWS, -1, -1))
    mask3 = torch.cat([torch.ones(3 * ROWS, q, dtype=torch.long), mask3], 1)
    states = theirs.qformer(
        query_embeds=joint, query_length=q, attention_mask=mask3, encoder_hidden_states=seen3
    ).last_hidden_state
    matching = cross_entropy(theirs.itm_head(states[:, :q]).mean(1), (torch.arange(3 * ROWS) < ROWS).long())

    # Queries see each other, text sees the queries and itself up to here: what a cache of the queries comes to.
    ids = torch.cat([torch.full((ROWS, 1), DEC), ids[:, 1:-1]], 1)
    size = ids.shape[1]
    may = torch.zeros(ROWS, q + size, q + size, dtype=torch.bool)
    may[:, :, :q] = True
    may[:, q:, q:] = torch.ones(size, size).tril().bool() & mask[:, None, :-1].bool()
    may[:, :q, q:] = False
    x = theirs.qformer.layernorm(theirs.embeddings(ids, query_embeds=query))
    added = torch.zeros(may.shape).masked_fill(~may, -1e9)[:, None]
    states = theirs.qformer.encoder(x, attention_mask=added, encoder_hidden_states=seen, query_length=q)
    h = gelu(linear(states.last_hidden_state[:, q:], extra["word_dense.weight"], extra["word_dense.bias"]))
    h = layer_norm(h, h.shape[-1:], extra["word_norm.weight"], extra["word_norm.bias"], 1e-12)
    logits = linear(h, theirs.embeddings.word_embeddings.weight, extra["word_bias"])
    labels = torch.tensor(np.where(batch.loss_mask_BM, batch.target_BM, -100)).long()
    captions = cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    return {"contrast": contrast, "matching": matching, "captions": captions}


@pytest.mark.slow
def test_the_three_stage1_losses_and_all_gradients_match_torch(pair):
    seed, theirs, extra, system, params, batch = pair
    theirs.zero_grad()
    wanted = torch_losses(theirs, extra, system, batch)
    sum(wanted.values()).backward()
    (value, metrics), grads = jax.jit(jax.value_and_grad(lambda p: system.loss(p, batch), has_aux=True))(params)
    for name, loss in wanted.items():
        assert float(metrics[f"loss_{name}"]) == pytest.approx(loss.item(), rel=1e-4), f"{name}, seed {seed}"
    assert float(value) == pytest.approx(sum(loss.item() for loss in wanted.values()), rel=1e-4)
    grads = convert.state_dict_from_params(their_names(system), jax.tree.map(np.asarray, grads))
    for name, weight in (*theirs.named_parameters(), *extra.items()):
        norm = 0.0 if weight.grad is None else weight.grad.norm().item()
        assert np.linalg.norm(grads[name]) == pytest.approx(norm, rel=1e-3, abs=1e-5), f"{name}, seed {seed}"


@pytest.mark.slow
def test_cached_decoding_matches_teacher_forcing(pair):
    seed, _, _, system, params, batch = pair
    how = GenerationConfig(max_new_tokens=4, eos_token_id=-1, pad_token_id=0, decoder_start_token_id=None)
    ids = np.asarray(generate(system, params, batch, how).ids_BM)
    from lionjax.models.vlm.blip2_stage1 import Blip2Stage1Module

    def at_once(module, batch):
        return module.caption_logits(batch, module.encode_queries(module.sources(batch))[1])

    @jax.jit
    def logits_of(params, ids):
        """Logits (B, M, V) of these words, read at once and one by one."""
        said = dataclasses.replace(batch, target_BM=ids, target_mask_BM=jnp.ones_like(ids))
        whole = Blip2Stage1Module(system).apply({"params": params}, said, method=at_once)
        first, cache = system.prefill(params, batch, ids.shape[1])
        each = [first]
        for place in range(ids.shape[1] - 1):
            logits, cache = system.extend(params, ids[:, place], cache)
            each.append(logits)
        return whole, jnp.stack(each, axis=1)

    whole, each = map(np.asarray, logits_of(params, ids))
    np.testing.assert_array_equal(whole.argmax(-1), ids, f"seed {seed}")
    # Whatever is said, a word's place counts: the same word at each of them.
    for text in (ids, np.full_like(ids, 7)):
        whole, each = map(np.asarray, logits_of(params, text))
        assert_close(each, whole, f"logits, seed {seed}", 1e-5)
        assert np.abs(np.diff(whole, axis=1)).max() > 1e-3 * np.abs(whole).max()


def test_hard_negatives_are_drawn_by_similarity_and_never_the_match():
    from lionjax.models.vlm.blip2_stage1 import SELF_PAIR_LOGIT
    from lionjax.models.vlm.qformer_stage1 import sample_hard_negative

    score = np.array(
        [[SELF_PAIR_LOGIT, 2.0, 0.0], [0.0, SELF_PAIR_LOGIT, 0.0], [9.0, 0.0, SELF_PAIR_LOGIT]], np.float32
    )
    keys = jax.random.split(jax.random.key(0), 500)
    found = np.asarray(jax.vmap(lambda key: sample_hard_negative(score, key))(keys))
    assert not (found == np.arange(3)).any()
    assert (found[:, 0] == 1).mean() == pytest.approx(np.exp(2) / (1 + np.exp(2)), abs=0.06)
    assert (found[:, 1] == 0).mean() == pytest.approx(0.5, abs=0.08) and (found[:, 2] == 0).mean() > 0.98
    assert sample_hard_negative(score, None).tolist() == [1, 0, 0]


@pytest.mark.slow
def test_loss_on_a_mesh_equals_the_loss_of_the_whole_batch(pair):
    _, _, _, system, params, batch = pair
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4), devices=jax.devices()[:4])
    with sharding.use_mesh(mesh):
        whole = jax.jit(system.loss)(params, sharding.shard_batch(batch, mesh))[0]
    alone = jax.jit(system.loss)(params, batch)[0]
    assert float(whole) == pytest.approx(float(alone), rel=1e-5)


LAVIS_HEADS = (  # what transformers names otherwise or lacks, written down from LAVIS's code
    ("embeddings.", "Qformer.bert.embeddings."),
    ("vision_projection.", "vision_proj."),
    ("text_projection.", "text_proj."),
    ("word_dense.", "Qformer.cls.predictions.transform.dense."),
    ("word_norm.", "Qformer.cls.predictions.transform.LayerNorm."),
    ("word_bias", "Qformer.cls.predictions.bias"),
)


@pytest.mark.slow
def test_lavis_names_map_to_the_parameters_that_match_transformers(pair):
    """Tensors of transformers' class under LAVIS's names give the parameters proven equal to it."""
    _, theirs, extra, system, params, _ = pair
    state = {n: w.detach().numpy() for n, w in (theirs.state_dict() | extra).items()}
    own = {}
    for name, tensor in as_lavis(state, "no language model").items():
        old, new = next((pair for pair in LAVIS_HEADS if name.startswith(pair[0])), (name, name))
        own[name.replace(old, new, 1)] = tensor
    made = trees.flatten(convert.params_from_state_dict(system.weight_map(), own))
    for path, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(made[path], leaf, path)


def test_weights_round_trip_under_lavis_names(pair):
    _, _, _, system, params, _ = pair
    params = jax.tree.map(np.asarray, params)
    state = convert.state_dict_from_params(system.weight_map(), params)
    table = state["Qformer.bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(state["Qformer.cls.predictions.decoder.weight"], table)
    assert "Qformer.bert.encoder.layer.0.crossattention.self.query.weight" in state and state["temp"].shape == ()
    back = trees.flatten(convert.params_from_state_dict(system.weight_map(), state))
    for path, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(back[path], leaf, path)
