# SPDX-License-Identifier: Apache-2.0
"""Every field of PEFT's LoraConfig at another value: the same logits as PEFT, or a refusal that names the field."""

import dataclasses
import functools

import peft_adapters as adapters
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from lionjax import convert
from lionjax.convert.formats.peft_config import ADAPTER_SETTINGS, COMPUTED, INERT
from lionjax.core.types import UserError

PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}

# field -> settings of PEFT that give it another value; a name after it tells two values of one field apart
COMPUTED_CASES = {
    "r": {"r": 3},
    "lora_alpha": {"lora_alpha": 5},
    "lora_dropout": {"lora_dropout": 0.5},
    "use_rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 5}},
    "rank_pattern and rslora": {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"layers.0.self_attn.v_proj": 11}},
    "target_modules": {"target_modules": ["layers.1.fc1", "k_proj"]},
    "target_modules, a pattern": {"target_modules": r".*layers\.[01]\.(self_attn\.out_proj|fc2)"},
    "target_modules, all-linear": {"target_modules": "all-linear"},
    "exclude_modules": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "exclude_modules, a pattern": {"exclude_modules": r".*layers\.1\..*v_proj"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_to_transform, a number": {"layers_to_transform": 0},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "modules_to_save": {"modules_to_save": ["final_layer_norm", "fc1"]},
    "trainable_token_indices": {"trainable_token_indices": [12, 15]},
    "trainable_token_indices, by name": {"trainable_token_indices": {"embed_tokens": [11]}},
    "lora_bias": {"lora_bias": True},
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "bias, lora_only": {"bias": "lora_only"},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
    "init_lora_weights, orthogonal": {"init_lora_weights": "orthogonal"},
}
# Values that PEFT's file can hold and that lionjax refuses.
REFUSED_CASES = {
    "peft_type": "ADALORA",
    "init_lora_weights": "pissa_niter_4",
    "bias": "some",
    "megatron_config": {"hidden_size": 8},
    "layer_replication": [[0, 1], [0, 2]],
    "target_parameters": ["self_attn.q_proj.weight"],
    "use_qalora": True,
    "alora_invocation_tokens": [5, 6],
    "monteclora_config": {"num_samples": 2},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 0.1},
    "ensure_weight_tying": True,
}
INERT_CASES = {
    "fan_in_fan_out": True,
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "OPTForCausalLM", "parent_library": "transformers"},
    "peft_version": "0.4.0",
    "base_model_name_or_path": "somebody/else",
    "revision": "main",
    "inference_mode": False,
    "megatron_core": "other.core",
    "qalora_group_size": 3,
    "loftq_config": {"loftq_bits": 8},
    "eva_config": {"rho": 3.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "velora_config": {},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny OPT, whose linears have biases."""
    folder = tmp_path_factory.mktemp("base") / "opt"
    adapters.language_model("opt").save_pretrained(folder)
    return folder


@functools.cache
def open_base(folder):
    return transformers.OPTForCausalLM.from_pretrained(folder)


def peft_logits(base, folder):
    """Logits of PEFT with the adapter as it reads it from `folder`."""
    model = peft.PeftModel.from_pretrained(transformers.OPTForCausalLM.from_pretrained(base), folder).eval()
    return adapters.their_logits(model, adapters.language_inputs("opt"))


def our_logits(base, folder, out, merge_lora=False):
    """Logits of ours with the adapter, separate or merged."""
    convert.convert(base, out, "jax", adapter=folder, merge_lora=merge_lora)
    return adapters.our_language_logits(*convert.load_params(out), adapters.language_inputs("opt"))


def test_the_table_has_every_field_of_peft_and_every_field_has_a_case():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= ADAPTER_SETTINGS.keys()
    without = {"r": 3, "runtime_config": None}  # the latter is not written to the file
    for name, kind in ADAPTER_SETTINGS.items():
        cases = COMPUTED_CASES if kind == COMPUTED else INERT_CASES if kind == INERT else REFUSED_CASES
        assert name in cases or name in without, name


@pytest.mark.parametrize("case", COMPUTED_CASES)
def test_a_computed_field_gives_the_logits_of_peft(base, tmp_path, case):
    settings = PLAIN | COMPUTED_CASES[case]
    adapters.with_adapter(transformers.OPTForCausalLM.from_pretrained(base), tmp_path / "lora", **settings)
    wanted = peft_logits(base, tmp_path / "lora")
    merged = our_logits(base, tmp_path / "lora", tmp_path / "merged", merge_lora=True)
    adapters.assert_alike(merged, wanted)
    if case == "use_dora":
        with pytest.raises(UserError, match="has use_dora true, which cannot stay separate; give --merge-lora"):
            our_logits(base, tmp_path / "lora", tmp_path / "ours")
        return
    adapters.assert_alike(our_logits(base, tmp_path / "lora", tmp_path / "ours"), wanted)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """A plain adapter, and the logits of PEFT with it."""
    folder = tmp_path_factory.mktemp("plain")
    adapters.with_adapter(transformers.OPTForCausalLM.from_pretrained(base), folder, **PLAIN)
    return folder, peft_logits(base, folder)


@pytest.mark.parametrize("field", REFUSED_CASES)
@pytest.mark.parametrize("merge_lora", (False, True))
def test_a_refused_value_is_named_before_weights_are_read(base, plain, tmp_path, field, merge_lora):
    (tmp_path / "adapter_config.json").write_bytes((plain[0] / "adapter_config.json").read_bytes())
    adapters.change_config(tmp_path, **{field: REFUSED_CASES[field]})
    with pytest.raises(UserError, match=f"has {field} .*; lionjax supports {field} "):
        our_logits(base, tmp_path, tmp_path / "ours", merge_lora)


@pytest.mark.parametrize("field", INERT_CASES)
def test_an_inert_field_changes_no_logits_in_peft_or_ours(base, plain, tmp_path, field):
    folder, wanted = plain
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    adapters.change_config(tmp_path, **{field: INERT_CASES[field]})
    adapters.assert_alike(peft_logits(base, tmp_path), wanted)
    adapters.assert_alike(our_logits(base, tmp_path, tmp_path / "ours"), wanted)
