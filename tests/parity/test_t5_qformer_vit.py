# SPDX-License-Identifier: Apache-2.0
"""Parts beside their classes in transformers: tiny random weights, sizes drawn anew at each run."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lionjax import convert
from lionjax.core.weight_map import with_prefix
from lionjax.models.connectors import qformer
from lionjax.models.connectors.qformer import QFormer, QFormerConfig
from lionjax.models.language import t5
from lionjax.models.language.t5 import T5, T5Config
from lionjax.models.vision import vit
from lionjax.models.vision.vit import ViT, ViTConfig


def numbers(module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def close(mine, theirs, tolerance=1e-4):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(np.asarray(mine), theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


@pytest.fixture
def draw(request):
    seed = random.SystemRandom().randrange(10**6)
    print(f"sizes drawn with seed {seed}")  # pytest shows it when the test fails
    torch.manual_seed(seed)
    return random.Random(seed)


def shaken(module):
    """Every weight moved off its initial zero or one, so that none can hide."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


@pytest.mark.slow
def test_t5_gives_the_logits_and_gradients_of_transformers(draw):
    heads, head = draw.randint(2, 4), draw.choice([4, 8])
    sizes = dict(
        vocab_size=draw.randint(50, 90),
        d_model=draw.choice([16, 24]),
        d_kv=head,
        d_ff=draw.randint(20, 40),
        num_layers=draw.randint(1, 3),
        num_decoder_layers=draw.randint(1, 3),
        num_heads=heads,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )
    config = transformers.T5Config(
        **sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, dropout_rate=0.0
    )
    theirs = shaken(transformers.T5ForConditionalGeneration(config))
    c = T5Config(
        sizes["vocab_size"],
        sizes["d_model"],
        head,
        heads,
        sizes["d_ff"],
        sizes["num_layers"],
        sizes["num_decoder_layers"],
        8,
        16,
        dropout=0.0,
    )
    params = convert.params_from_state_dict(t5.weight_map(c), numbers(theirs))
    ids = torch.randint(2, c.vocab_size, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    target = torch.randint(2, c.vocab_size, (3, 5))
    out = theirs(input_ids=ids, attention_mask=mask, labels=target)
    out.loss.backward()

    def loss(params):
        def run(module):
            encoded = module.encode(module.embed(ids.numpy()), mask.numpy())
            inputs = t5.shift_right(jnp.asarray(target.numpy()), c.decoder_start_token_id)
            return module.decode(inputs, jnp.ones(target.shape), encoded, mask.numpy())

        logits = T5(c).apply({"params": params}, method=run)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), target.numpy()[..., None], -1)
        return nats.mean(), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    close(logits, out.logits)
    mine = convert.state_dict_from_params(t5.weight_map(c), jax.tree.map(np.asarray, grads))
    if theirs.lm_head.weight is theirs.shared.weight:  # some versions tie them whatever the config says
        mine["shared.weight"] = mine["shared.weight"] + mine["lm_head.weight"]
    for name, parameter in theirs.named_parameters():
        assert np.linalg.norm(mine[name]) == pytest.approx(float(parameter.grad.norm()), rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_qformer_states_match_instructblip(draw):
    heads, every = draw.randint(2, 3), draw.choice([1, 2, 3])
    width, seen = heads * draw.choice([4, 6]), draw.choice([10, 14])
    config = transformers.InstructBlipQFormerConfig(
        vocab_size=60,
        hidden_size=width,
        num_hidden_layers=draw.randint(2, 5),
        num_attention_heads=heads,
        intermediate_size=draw.randint(20, 30),
        max_position_embeddings=20,
        cross_attention_frequency=every,
        encoder_hidden_size=seen,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = shaken(transformers.InstructBlipQFormerModel(config))
    c = QFormerConfig(
        width, config.num_hidden_layers, heads, config.intermediate_size, draw.randint(2, 5), every, seen, 60, 20
    )
    renamed = {}
    for name, value in numbers(theirs).items():
        name = name.replace("attention.attention.", "attention.self.").replace(
            "embeddings.layernorm", "embeddings.LayerNorm"
        )
        renamed[name] = value
    queries = torch.randn(1, c.num_query_tokens, width)
    rows = (*qformer.query_tokens_weight_map(c), *qformer.lavis_weight_map(c))
    params = convert.params_from_state_dict(rows, renamed | {"query_tokens": queries.numpy()})
    ids, source = torch.randint(2, 60, (2, 7)), torch.randn(2, 9, seen)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    both = torch.cat([torch.ones(2, c.num_query_tokens, dtype=torch.long), mask], 1)
    want = theirs(
        input_ids=ids, attention_mask=both, query_embeds=queries.expand(2, -1, -1), encoder_hidden_states=source
    )
    got = QFormer(c).apply({"params": params}, source.numpy(), ids.numpy(), mask.numpy())
    close(got, want.last_hidden_state)


@pytest.mark.slow
def test_vit_states_match_blip2(draw):
    heads, depth = draw.randint(2, 3), draw.randint(2, 4)
    width = heads * draw.choice([4, 6])
    config = transformers.Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=draw.randint(20, 30),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=28,
        patch_size=7,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        qkv_bias=True,
    )
    theirs = shaken(transformers.Blip2VisionModel(config))
    state = numbers(theirs)
    c = ViTConfig(28, 7, width, depth, heads, config.intermediate_size)
    names = {"self_attn.qkv.weight": "attn.qkv.weight", "self_attn.projection": "attn.proj", "layer_norm": "norm"}
    renamed = {
        "cls_token": state["embeddings.class_embedding"],
        "pos_embed": state["embeddings.position_embedding"],
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embedding.bias"],
    }
    assert all(layer.self_attn.qkv.bias[width : 2 * width].any() for layer in theirs.encoder.layers)
    for name, value in state.items():
        if name.startswith("encoder.layers."):
            if name.endswith("qkv.bias"):
                for letter, part in zip("qv", (value[:width], value[2 * width :])):
                    renamed[
                        name.replace("encoder.layers", "blocks").replace("self_attn.qkv.bias", f"attn.{letter}_bias")
                    ] = part
                continue
            for old, new in names.items():
                name = name.replace(old, new)
            renamed[name.replace("encoder.layers", "blocks")] = value
    params = convert.params_from_state_dict(vit.eva_weight_map(c), renamed)
    tower = {name: value for name, value in state.items() if not name.startswith("post_layernorm")}
    direct = convert.params_from_state_dict(vit.blip2_weight_map(c), tower)
    assert jax.tree.all(jax.tree.map(np.array_equal, direct, params))
    image = torch.randn(2, 3, 28, 28)
    want = theirs(pixel_values=image, output_hidden_states=True)
    taps = (depth - 1, 0)
    last, seen, _ = ViT(c, taps).apply({"params": params}, image.numpy().transpose(0, 2, 3, 1))
    for tap, layer in enumerate(taps):
        close(seen[tap], want.hidden_states[layer + 1])
    np.testing.assert_array_equal(np.asarray(seen[0]), np.asarray(last))


@pytest.mark.slow
def test_a_weight_map_under_a_prefix_still_covers_all_parameters():
    c = QFormerConfig(8, 5, 2, 12, 2, 2, 6, 30, 10)  # an odd number of layers leaves a tail
    rows = with_prefix("Qformer.bert.", "qformer/", qformer.lavis_weight_map(c))
    ids, params = np.zeros((1, 3), np.int32), None
    params = QFormer(c).init(jax.random.key(0), np.zeros((1, 4, 6), np.float32), ids, ids)["params"]
    params = {
        "qformer": jax.tree.map(
            np.asarray, jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: hasattr(x, "names"))
        )
    }
    query = params["qformer"].pop("queries")
    assert query.shape == (2, 8)
    state = convert.state_dict_from_params(rows, params)
    assert sum("crossattention.self.query.weight" in name for name in state) == 3
    back = convert.params_from_state_dict(rows, state)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))
