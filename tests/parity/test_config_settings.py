# SPDX-License-Identifier: Apache-2.0
"""Every field of a config.json that changes what transformers computes is computed or refused by name.

For each model_type, each field of transformers' config classes is changed. Then either lionjax refuses config.json with
the field's name, or both models give the same outputs with the same weights.
"""

import copy
import functools
import json

import flax.errors
import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from config_cases import CASES, Case
from tiny_prefix import shaken
from transformers.models.mpt.configuration_mpt import MptAttentionConfig

from lionjax import convert
from lionjax.convert.formats import openflamingo
from lionjax.convert.formats.config_table import COMMON_FIXED, COMMON_INERT
from lionjax.core.types import UserError

FAST = "gpt2"  # the others are slow
BASE_FIELDS = transformers.PretrainedConfig().to_dict().keys()
UNTESTED = {"transformers_version", "return_dict", "dtype"}  # transformers itself fails with other values
ACTIVATIONS = ("gelu_new", "relu", "tanh")
ALL_ACTIVATIONS = transformers.activations.ACT2FN.keys() - {"prelu", "xielu"}  # those two have weights
VALUES = {  # fields whose other values do not follow from their type
    "feed_forward_proj": ["relu", "gated-relu", "gated-silu", "gated-gelu_new", "gated-tanh"],
    "vision_feature_select_strategy": ["full", "middle"],
    "vision_feature_layer": [-1, 1, 0, [-2, -1]],
    "num_pos_feats": [7],
    "summary_activation": ["tanh"],
    "out_features": [["stage1"]],
    "out_indices": [[1]],
    "model_type": ["siglip_vision_model", "phi"],
    "sliding_window": [3, 32, None],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 50.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 30, "rope_theta": 10.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4, "beta_slow": 2, "truncate": False, "rope_theta": 20.0}
        | {"mscale": 2.0, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7, "rope_theta": 20.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3},
        {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5},
    ],
    "global_attn_indexes": [[0], []],
    "depths": [[2, 1]],
    "num_heads": [[2, 4], 2],
}
# Fields that transformers reads beside those of its config classes: of earlier versions, and other spellings.
OTHER_FIELDS = {
    "llama": {
        "rope_theta": [50.0],
        "rope_scaling": [{"type": "linear", "factor": 4.0}, {"type": "dynamic", "factor": 4.0}],
        "partial_rotary_factor": [0.5],
        "sliding_window": [3, 64],
    },
    "gpt2": {"hidden_size": [24, 28], "num_attention_heads": [2]},
    "t5": {"num_attention_heads": [2], "head_dim": [5], "tie_word_embeddings": [True, False]},
    "clip": {"vision_config_dict": [{"hidden_act": "gelu"}], "text_config_dict": [{"hidden_act": "gelu"}]}
    | {"text_config.eos_token_id": [2]},
    "llava": {"image_token_id": [46, 45], "text_config.rope_theta": [50.0], "text_config.tie_word_embeddings": [True]},
    "blip-2": {"tie_word_embeddings": [True, False], "image_token_id": [46]},
    "instructblip": {"tie_word_embeddings": [True, False]},
}


# Nested configs whose class has a case of its own, or another system: only these fields are changed.
NESTED = {"model_type", "hidden_act", "activation_function", "feed_forward_proj", "attention_bias", "layer_norm_eps"}
NESTED |= {"rope_parameters", "sliding_window", "head_dim", "word_embed_proj_dim", "tie_word_embeddings", "qkv_bias"}
TESTED_ELSEWHERE = {("mistral", ""), ("llava", "text_config"), ("llava", "vision_config"), ("clip", "vision_config")}
TESTED_ELSEWHERE |= {("blip-2", "text_config"), ("instructblip", "text_config"), ("instructblip", "vision_config")}
TESTED_ELSEWHERE |= {("instructblip", "qformer_config"), ("kosmos-2", "vision_config")}


def other_values(field: str, value) -> list:
    """Values of a field that differ from `value`, a value or default of transformers."""
    if field in VALUES and not (field == "num_heads" and isinstance(value, int)):
        return VALUES[field]
    if field in ("hidden_act", "activation_function", "dense_act_fn", "projector_hidden_act"):
        return [name for name in (ALL_ACTIVATIONS if field == "activation_function" else ACTIVATIONS) if name != value]
    if isinstance(value, bool):
        return [not value]
    if field.endswith("_token_id") or field == "image_token_index":
        return [49]  # in no input
    if isinstance(value, int):
        return [2 * value] if "heads" in field else [value + 1]
    if isinstance(value, float):
        return [0.3] if value < 0.3 else [3 * value]
    if isinstance(value, str):
        return ["other"]
    return [[1]] if isinstance(value, (list, tuple)) else [1] if value is None else []


def changes(name: str) -> list[tuple[str, str, object]]:
    """(path of the nested config, field, value) for every change of a case."""
    case, made = CASES[name], []
    for path, (_, config_class) in case.tables.items():
        defaults = config_class().to_dict()
        given = case.settings if not path else case.settings[path]
        fields = [f for f in defaults if f not in BASE_FIELDS or (name == FAST and f not in UNTESTED)]
        fields = [f for f in fields if not isinstance(defaults[f], dict) or f == "rope_parameters"]
        for field in fields if not path else [*fields, "model_type"]:
            values = other_values(field, given.get(field, defaults[field]))
            if (name, path) in TESTED_ELSEWHERE:
                values = values[:2] if field in NESTED else []
            for value in values:
                if value != given.get(field, defaults[field]):
                    made.append((path, field, value))
    for field, values in OTHER_FIELDS.get(name, {}).items():
        path, _, field = field.rpartition(".")
        made += [(path, field, value) for value in values]
    return made


class Twins:
    """A case's model of transformers with random weights, and its twin."""

    def __init__(self, case: Case, folder):
        self.case, self.folder = case, folder
        torch.manual_seed(0)
        self.model = shaken(self.build(case.settings), 0.2)
        part = self.model.get_submodule(case.part)
        self.state = {key: value.clone() for key, value in part.state_dict().items()}
        self.model.save_pretrained(folder)
        self.config, self.params = convert.from_torch(folder)
        self.inputs = case.inputs(self.config)
        self.outputs = {self.config: self.run_ours(self.config, self.params)}

    def build(self, settings: dict):
        config = self.case.config_class(**copy.deepcopy(settings))
        model = self.case.model_class._from_config(config, attn_implementation="eager")
        return model.eval()

    def run_theirs(self, settings: dict) -> np.ndarray | None:
        """Outputs with these settings; None where the weights or inputs do not fit them."""
        try:
            model = self.build(settings).get_submodule(self.case.part)
            model.load_state_dict(self.state)
            with torch.no_grad():
                return np.asarray(self.case.theirs(model, self.inputs))
        except Exception:
            return None

    def read(self, settings: dict):
        """The lionjax config of these settings; raises UserError for a refusal."""
        hf_config = {"model_type": self.case.config_class.model_type} | settings
        try:
            config = self.case.checkpoint_format.config_from_hf(hf_config)
        except ValueError as error:  # as open_checkpoint does
            raise UserError(str(error)) from error
        return self.case.checkpoint_format.infer_from_keys(config, self.names)

    @functools.cached_property
    def names(self):
        from lionjax.convert.io.reader import open_weights

        return open_weights(self.folder).keys()

    def convert_again(self, path: str, field: str, value):
        """(config, params) of the saved weights with another value of a field in config.json."""
        file = self.folder / "config.json"
        saved = file.read_text()
        changed = json.loads(saved)
        (changed[path] if path else changed)[field] = value
        try:
            file.write_text(json.dumps(changed))
            return convert.from_torch(self.folder)
        finally:
            file.write_text(saved)

    def run_ours(self, config, params) -> np.ndarray:
        with jax.disable_jit():
            return np.asarray(self.case.ours(config, params, self.inputs))


@pytest.fixture(scope="module", autouse=True)
def one_thread_of_torch():
    """Models as small as these cost many times more processor time on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return functools.cache(lambda name: Twins(CASES[name], tmp_path_factory.mktemp(name.replace("-", ""))))


def check(twins: Twins, path: str, field: str, value) -> str:
    """What became of a change: refused, computed or inert. Raises AssertionError where outputs differ."""
    settings = copy.deepcopy(dict(twins.case.settings))
    (settings if not path else settings.setdefault(path, {}))[field] = value
    full = f"{path}.{field}" if path else field
    try:
        config = twins.read(settings)
    except UserError as error:
        assert full in str(error), f"the refusal of {full} = {value!r} does not name it: {error}"
        return "refused"
    is_input = field in ("image_token_index", "image_token_id")  # the prompts of `inputs` have the other token
    wanted = None if is_input and config != twins.config else twins.run_theirs(settings)
    if wanted is None:
        assert config != twins.config, f"{full} = {value!r} does not fit in transformers and is ignored"
        return "computed"
    if config not in twins.outputs:
        try:
            if field == "tie_word_embeddings":
                raise flax.errors.FlaxError("the LM head is other weights")
            mine = twins.run_ours(config, twins.params)
        except ValueError as error:  # raised when the model runs, such as for an image of another size
            assert field in str(error)
            return "computed"
        except flax.errors.FlaxError:  # the same tensors in other shapes, such as another number of heads
            try:
                mine = twins.run_ours(*twins.convert_again(path, field, value))
            except UserError as error:
                assert "tied tensors" in str(error) or "finds no tensor" in str(error)
                return "refused"
        twins.outputs[config] = mine
    mine = twins.outputs[config]
    assert mine.shape == wanted.shape and np.abs(mine - wanted).max() < 2e-4 * np.abs(wanted).max(), (
        f"{full} = {value!r}: outputs differ by {np.abs(mine - wanted).max() / np.abs(wanted).max():.1e}"
    )
    return "inert" if config == twins.config else "computed"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == FAST else [pytest.mark.slow]) for n in CASES])
def test_every_changed_field_gives_equal_outputs_or_a_refusal_by_name(twins, name):
    pair, failures, results = twins(name), [], {}
    for path, field, value in changes(name):
        try:
            results[f"{path}.{field} {value}"] = check(pair, path, field, value)
        except AssertionError as error:
            failures.append(str(error).splitlines()[0])
    assert not failures, "\n".join(failures)
    assert {"refused", "computed", "inert"} <= set(results.values()), results


MPT_TABLES = {
    "mpt": (openflamingo.MPT_TABLE, transformers.MptConfig),
    "mpt attention": (openflamingo.MPT_ATTENTION_TABLE, MptAttentionConfig),
}
TABLES = {f"{name} {path}": pair for name, case in CASES.items() for path, pair in case.tables.items()} | MPT_TABLES
# Where a table's default is not that of the class: it follows from other fields, or is a default of the larger model.
DERIVED = {"mlp_dim", "head_dim", "num_key_value_heads", "num_decoder_layers", "word_embed_proj_dim", "num_pos_feats"}
DERIVED |= {"image_embedding_size", "is_gated_act", "dense_act_fn", "scale_decoder_outputs", "rope_parameters"}
DERIVED |= {"attn_config", "expansion_ratio", "tie_word_embeddings", "projection_size"}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_every_field_of_transformers_with_its_default(name):
    table, config_class = TABLES[name]
    defaults = config_class().to_dict()
    known = {*table.defaults, *table.fixed, *table.inert, *table.parts, *COMMON_FIXED, *COMMON_INERT}
    assert not defaults.keys() - known, f"fields of {config_class.__name__} that the table does not have"
    groups = [{*table.defaults, *table.fixed}, {*table.inert}, {*table.parts}]
    assert sum(map(len, groups)) == len(set().union(*groups)), "a field is in two groups"
    for field, value in defaults.items():
        if field in DERIVED or isinstance(value, dict) or field in table.fields.token_ids:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if field in table.defaults:
            assert table.defaults[field] == value, field
        elif field in table.fixed:
            assert table.fixed[field][0] == value or value in table.fixed[field], field


@pytest.mark.parametrize("part", ["", "attn_config"])
def test_what_the_table_of_mpt_calls_inert_changes_no_logits(part):
    sizes = {"d_model": 24, "n_heads": 4, "n_layers": 2, "vocab_size": 50}
    model = shaken(transformers.MptForCausalLM(transformers.MptConfig(**sizes)))
    ids, state = torch.arange(3, 12)[None], model.state_dict()
    table, config_class = MPT_TABLES["mpt attention" if part else "mpt"]
    for field, default in config_class().to_dict().items():
        if field in BASE_FIELDS or field in sizes or isinstance(default, dict):
            continue
        for value in other_values(field, default):
            hf_config = {field: value} if part else sizes | {field: value}
            try:
                if table.read(hf_config) != table.read({} if part else sizes):
                    continue  # computed
            except UserError as error:
                assert field in str(error)
                continue
            settings = sizes | {part: hf_config} if part else hf_config
            other = transformers.MptForCausalLM(transformers.MptConfig(**settings))
            other.load_state_dict(state)
            assert torch.equal(other.eval()(ids).logits, model(ids).logits), field
