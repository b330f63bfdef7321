# SPDX-License-Identifier: Apache-2.0
"""MQ-Former beside transformers' Q-Former and BERT, whose parts it has, and the masks of its passes."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import assert_close
from tiny_prefix import shaken

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lionjax import convert
from lionjax.core import params as trees
from lionjax.core.types import Batch, PackedText, UserError
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.connectors import mqformer, qformer
from lionjax.models.connectors.mqformer import MQFormerConfig
from lionjax.models.connectors.qformer import QFormer, QFormerConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.lyrics_stage1 import LyricsStage1, LyricsStage1Module

ROWS, LENGTH = 3, 12


@pytest.fixture(scope="module")
def draw():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture(scope="module")
def sizes(draw):
    """Fields of a Q-Former, drawn anew."""
    heads = draw.randint(2, 3)
    return {
        "width": heads * draw.choice([4, 6]),
        "depth": draw.randint(2, 4),
        "num_heads": heads,
        "mlp_dim": draw.randint(20, 30),
        "num_query_tokens": draw.randint(4, 6),
        "vision_width": draw.choice([10, 14]),
        "vocab_size": 60,
        "max_positions": 20,
        "dropout": 0.0,
    }


def state_of(model) -> dict:
    return {name: weight.detach().numpy() for name, weight in model.state_dict().items()}


@pytest.mark.slow
def test_the_plain_qformer_falls_out_where_the_regions_are_the_image(draw, sizes):
    """The detection branch with the visual branch's weights and source: transformers' class, and ours of one source."""
    names = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_dim",
        "encoder_hidden_size": "vision_width",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
    }
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = {name: sizes[field] for name, field in names.items()} | dropouts
    theirs = shaken(transformers.InstructBlipQFormerModel(transformers.InstructBlipQFormerConfig(**settings)))
    plain = QFormerConfig(**sizes)
    both = MQFormerConfig(**sizes, num_grounding_queries=draw.randint(1, 3), region_width=plain.vision_width)
    queries = torch.randn(1, plain.num_query_tokens, plain.width)
    state = {name.replace("embeddings.layernorm", "embeddings.LayerNorm"): w for name, w in state_of(theirs).items()}
    state |= {
        name.replace(".crossattention.", ".detection_crossattention."): w
        for name, w in state.items()
        if ".crossattention." in name
    }
    state["query_tokens"] = queries.numpy()
    rows = (*qformer.query_tokens_weight_map(both), *mqformer.weight_map(both))
    params = convert.params_from_state_dict(rows, state)
    ids, source, mask = torch.randint(2, 60, (2, 7)), torch.randn(2, 9, plain.vision_width), torch.ones(2, 7).long()
    mask[1, 4:] = 0
    whole_mask = torch.cat([torch.ones(2, plain.num_query_tokens).long(), mask], 1)
    with torch.no_grad():
        wanted = theirs(
            input_ids=ids,
            attention_mask=whole_mask,
            query_embeds=queries.expand(2, -1, -1),
            encoder_hidden_states=source,
        ).last_hidden_state.numpy()
    texts, regions = (ids.numpy(), mask.numpy()), (source.numpy(), np.ones((2, 9), bool))
    found = QFormer(both).apply({"params": params}, source.numpy(), *texts, regions=regions)
    assert_close(found, wanted, "transformers", 1e-5)
    flat = trees.flatten(params)
    one = {path: leaf for path, leaf in flat.items() if "region_" not in path}
    one["queries"] = np.concatenate([flat["queries"], flat["region_queries"]])
    alone = QFormer(plain).apply({"params": trees.unflatten(one)}, source.numpy(), *texts)
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def stage1(draw, sizes):
    """(system, parameters, batch) with random values everywhere."""
    vision = ViTConfig(14, 7, sizes["vision_width"] // 2 * 2, 1, 2, 20)
    both = MQFormerConfig(**sizes | {"max_positions": LENGTH + 6}, num_grounding_queries=2, region_width=8)
    system = LyricsStage1(vision, both, embed_dim=6, cls_token_id=3, decoder_start_token_id=4)
    rng = np.random.default_rng(draw.randrange(2**32))
    batch = lyrics_batch(rng, sizes["vocab_size"])
    shapes = jax.eval_shape(system.init, jax.random.key(0), batch)
    flat = trees.flatten(unboxed(shapes))
    params = {
        path: (path.endswith("scale") + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for path, leaf in flat.items()
    }
    return system, trees.unflatten(params), batch


def unboxed(tree):
    import flax.linen as nn

    return nn.unbox(tree)


def lyrics_batch(rng, vocab: int) -> Batch:
    """Rows of 2, 4 and 0 tokens of boxes, then a caption that fills the row or not."""
    ids = rng.integers(5, vocab, (ROWS, LENGTH)).astype(np.int32)
    ids[:, 0] = 3
    boxes, captions = np.array([2, 4, 0]), np.array([LENGTH - 3, 5, 6])
    place = np.arange(LENGTH)[None]
    is_box, end = (place >= 1) & (place <= boxes[:, None]), 1 + boxes + captions
    mask, is_caption = place < end[:, None], (place > boxes[:, None]) & (place < end[:, None])
    position = np.where(is_caption, place - boxes[:, None], place) * mask
    masked = ids.copy()
    masked[0, 1], masked[1, 3] = 2, 2
    no, blank = np.full_like(ids, -100), np.zeros((ROWS, 1), np.int32)
    packed = PackedText(
        ids_BL=ids * mask,
        masked_ids_BL=masked * mask,
        position_BL=position.astype(np.int32),
        mask_BL=mask.astype(np.int32),
        icg_label_BL=np.where(is_caption | (place == 0), ids, -100),
        msp_label_BL=np.where((masked != ids) & is_box, ids, no),
    )
    regions = rng.standard_normal((ROWS, 5, 8)).astype(np.float32)
    valid = np.arange(5)[None] < np.array([[5], [3], [1]])
    image = rng.standard_normal((ROWS, 14, 14, 3)).astype(np.float32)
    rows = np.arange(ROWS, dtype=np.int32)
    return Batch(image, *(blank,) * 7, rows, rows, region_BKD=regions, region_mask_BK=valid, packed=packed)


def run(system, params, method, *inputs):
    return LyricsStage1Module(system).apply({"params": params}, *inputs, method=method)


@pytest.mark.slow
def test_the_text_pass_and_the_language_head_are_berts(stage1, sizes):
    """transformers' BertForMaskedLM without token types has the text's weights and the head."""
    system, params, batch = stage1
    c = system.qformer
    config = transformers.BertConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads,
        intermediate_size=c.mlp_dim,
        max_position_embeddings=c.max_positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = transformers.BertForMaskedLM(config).eval()
    ours = convert.state_dict_from_params(system.weight_map(), params)
    renamed = {
        name.removeprefix("qformer.").replace("attention.attention.", "attention.self."): torch.tensor(w)
        for name, w in ours.items()
        if name.startswith("qformer.")
    }
    types = torch.zeros_like(theirs.bert.embeddings.token_type_embeddings.weight)
    renamed["bert.embeddings.token_type_embeddings.weight"] = types
    fit = theirs.load_state_dict(renamed, strict=False)
    others = ("_query.", "crossattention.", "position_ids")  # of the queries alone
    assert not fit.missing_keys and all(any(part in name for part in others) for name in fit.unexpected_keys)
    packed = batch.packed
    inputs = (torch.tensor(np.asarray(x)).long() for x in (packed.ids_BL, packed.mask_BL, packed.position_BL))
    ids, mask, positions = inputs
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()

    def logits(module, batch):
        return module.lm_logits(module.encode_text(module.text_rows(batch)))

    found, real = np.asarray(run(system, params, logits, batch)), packed.mask_BL.astype(bool)
    assert_close(found[real], wanted[real], "logits", 1e-5)


def passes(module, batch):
    query_BQD, query_kv = module.encode_queries(module.sources(batch))
    captions, masked = (states(batch, query_kv) for states in (module.caption_states, module.masked_states))
    return query_BQD, module.lm_logits(captions), module.lm_logits(masked)


@pytest.mark.slow
def test_captions_read_to_the_left_masked_text_reads_both_ways_and_padded_regions_do_not_count(stage1):
    system, params, batch = stage1
    read = jax.jit(lambda batch: run(system, params, passes, batch))
    queries, captions, masked = map(np.asarray, read(batch))
    k = 6

    def changed(**fields):
        return dataclasses.replace(batch, packed=dataclasses.replace(batch.packed, **fields))

    ids, masked_ids = (x.copy() for x in (batch.packed.ids_BL, batch.packed.masked_ids_BL))
    ids[:, k], masked_ids[:, k] = 7, 7
    other_queries, other_captions, other_masked = map(np.asarray, read(changed(ids_BL=ids, masked_ids_BL=masked_ids)))
    np.testing.assert_array_equal(other_queries, queries)
    np.testing.assert_array_equal(other_captions[:, :k], captions[:, :k])
    assert np.abs(other_captions[:, k] - captions[:, k]).max() > 1e-3
    assert np.abs(other_masked[:, :k] - masked[:, :k]).max() > 1e-3
    noise = np.where(batch.region_mask_BK[..., None], batch.region_BKD, 1e3).astype(np.float32)
    for mine, same in zip(read(dataclasses.replace(batch, region_BKD=noise)), (queries, captions, masked)):
        np.testing.assert_allclose(mine, same, atol=1e-5)


@pytest.mark.slow
def test_a_caption_decoded_behind_the_boxes_is_the_one_read_at_once(stage1):
    """Rows with boxes of different length, and none: the caption's positions restart in each."""
    system, params, batch = stage1
    how = GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=0)
    ids = np.asarray(generate(system, params, batch, how).ids_BM)
    boxes = np.array([2, 4, 0])
    packed = jax.tree.map(np.copy, batch.packed)
    for row, start in enumerate(boxes + 1):
        packed.ids_BL[row, start : start + 3] = ids[row]
    logits = run(system, params, passes, dataclasses.replace(batch, packed=packed))[1]
    for row, start in enumerate(boxes + 1):
        np.testing.assert_array_equal(np.asarray(logits)[row, start - 1 : start + 2].argmax(-1), ids[row])
    # Without packed text a caption has no boxes before it.
    behind, alone = (
        np.asarray(system.prefill(params, inputs, 3)[0]) for inputs in (batch, dataclasses.replace(batch, packed=None))
    )
    np.testing.assert_allclose(alone[2], behind[2], atol=1e-5)
    assert (np.abs(alone - behind).max(axis=-1)[:2] > 1e-3).all()


@pytest.mark.slow
def test_without_a_masked_element_that_loss_is_zero_and_learns_nothing(stage1):
    system, params, batch = stage1
    none = np.full_like(batch.packed.msp_label_BL, -100)
    batch = dataclasses.replace(batch, packed=dataclasses.replace(batch.packed, msp_label_BL=none))

    def masked_loss(word_bias):
        return system.loss(params | {"word_bias": word_bias}, batch)[1]["loss_masked"]

    loss, gradient = jax.jit(jax.value_and_grad(masked_loss))(params["word_bias"])
    assert float(loss) == 0 and not np.asarray(gradient).any()


def test_negatives_are_never_the_pair_and_every_other_has_some_weight(stage1):
    system, params, _ = stage1
    score = jnp.array([[9.0, 80.0, -50.0], [0.0, 0.0, 0.0], [3.0, 2.0, 1.0]])
    weights = np.asarray(run(system, params, lambda module, x: module.negative_weights(x), score))
    wanted = np.asarray(jax.nn.softmax(score, axis=1)) + 1e-4
    np.testing.assert_allclose(weights, wanted * (1 - np.eye(3)), rtol=1e-6)
    assert weights[0, 2] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"region_BKD": None}, "no region features"),
        (
            {"region_BKD": np.zeros((ROWS, 2, 5), np.float32), "region_mask_BK": None},
            "regions have 5 features.*reads 8",
        ),
        ({"packed": None}, "no packed text"),
    ],
)
def test_a_batch_without_what_the_stage_reads_is_refused(stage1, fields, message):
    system, params, batch = stage1
    with pytest.raises(UserError, match=message):
        jax.eval_shape(system.loss, params, dataclasses.replace(batch, **fields))


def test_more_grounding_queries_than_queries_are_refused():
    with pytest.raises(UserError, match="num_grounding_queries is 96; give a finite number >= 0 and < 96"):
        MQFormerConfig(num_grounding_queries=96)
