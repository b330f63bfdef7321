# SPDX-License-Identifier: Apache-2.0
"""One table, read both ways: exact bits, and everything that does not fit said at once."""

import time

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lionjax import convert
from lionjax.convert.mapping.plan import TensorSpec, group_numbered_names
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import UserError
from lionjax.core.weight_map import (
    KeyTemplate,
    WeightMapping,
    constant,
    conv,
    conv_transpose,
    copy_bits,
    linear,
    merge_heads_kernel,
    reshape,
    split_fused,
    split_heads,
    split_heads_kernel,
    squeeze,
    stack_tensors,
    with_prefix,
)

N, H, D = 2, 4, 6  # heads, head size, width; all different, so that a confused axis shows
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def block_rows() -> tuple[WeightMapping, ...]:
    heads = split_heads_kernel(N, H)
    cut = split_heads(N, H)
    return (
        WeightMapping("qkv.weight", ("q/kernel", "k/kernel", "v/kernel"), split_fused(heads, heads, heads)),
        WeightMapping("qkv.bias", ("q/bias", "v/bias"), split_fused(cut, None, cut)),
        WeightMapping("proj.weight", "o/kernel", merge_heads_kernel(N, H)),
        WeightMapping(("router1", "router2"), "router", stack_tensors()),
        WeightMapping("adapters.{j}.down.weight", "adapters/down", linear),
        WeightMapping("adapters.{j}.scale", "adapters/scale", squeeze),
    )


def every_rows() -> tuple[WeightMapping, ...]:
    return (
        *with_prefix("blocks.{i}.", "blocks/", block_rows()),
        WeightMapping("blocks.{2i}.cross.weight", "cross/kernel", linear),
        WeightMapping("blocks.{2i+1}.plain", "plain/scale"),
        WeightMapping("sam.{8i+j<7}.norm", "windowed/norm"),
        WeightMapping("sam.{8i+7}.norm", "global/norm"),
        WeightMapping("cls", "class_token", reshape((1, 1, -1), (-1,))),
        WeightMapping("patch.weight", "patch/kernel", conv),
        WeightMapping("up.weight", "up/kernel", conv_transpose),
        WeightMapping("c_attn", ("c/q", "c/k", "c/v"), split_fused(*[split_heads(N, H)] * 3, axis=1)),
        WeightMapping("shared", "words/table", tied_keys=("encoder.words", "decoder.words")),
        constant("position_ids", lambda: np.arange(5)[None]),
    )


def every_state(dtype, layers=4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def some(*shape):
        return rng.standard_normal(shape).astype(dtype)

    state = {}
    for i in range(layers):
        bias = some(3 * N * H)
        bias[N * H : 2 * N * H] = 0
        state |= {
            f"blocks.{i}.qkv.weight": some(3 * N * H, D),
            f"blocks.{i}.qkv.bias": bias,
            f"blocks.{i}.proj.weight": some(D, N * H),
            f"blocks.{i}.router1": some(2, D),
            f"blocks.{i}.router2": some(2, D),
        }
        for a in range(3):
            state |= {f"blocks.{i}.adapters.{a}.down.weight": some(5, D), f"blocks.{i}.adapters.{a}.scale": some(1)}
        state |= {f"blocks.{i}.cross.weight": some(D, 7)} if i % 2 == 0 else {f"blocks.{i}.plain": some(D)}
    state |= {f"sam.{i}.norm": some(D) for i in range(16)}
    state |= {"cls": some(1, 1, D), "patch.weight": some(D, 3, 2, 2), "up.weight": some(3, 5, 2, 2)}
    state |= {"c_attn": some(D, 3 * N * H), "shared": some(11, D), "position_ids": np.arange(5)[None]}
    return state | {name: state["shared"].copy() for name in ("encoder.words", "decoder.words")}


def assert_same_bits(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_torch_and_back_is_bit_exact(dtype):
    state = every_state(dtype)
    assert_same_bits(
        convert.state_dict_from_params(every_rows(), convert.params_from_state_dict(every_rows(), state)), state
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_torch_and_back_is_bit_exact(dtype):
    params = convert.params_from_state_dict(every_rows(), every_state(dtype))
    on_device = jax.tree.map(jax.numpy.asarray, params)
    back = convert.params_from_state_dict(every_rows(), convert.state_dict_from_params(every_rows(), on_device))
    assert_same_bits(trees.flatten(back), trees.flatten(params))


def test_nan_payloads_infinities_and_negative_zero_keep_their_bits():
    bits = np.array([0x7FC1, 0xFFC0, 0x8000, 0x7F80, 0x0001, 0xFF81], np.uint16)  # NaNs with a payload, -0, inf
    rows, state = (WeightMapping("w", "w", linear),), {"w": bits.view(ml_dtypes.bfloat16).reshape(2, 3)}
    there = convert.params_from_state_dict(rows, state)
    assert np.array_equal(there["w"].view(np.uint16), bits.reshape(2, 3).T)
    assert_same_bits(convert.state_dict_from_params(rows, there), state)


def test_layers_and_their_parts_are_stacked_as_the_table_says():
    state = every_state(np.float32)
    flat = trees.flatten(convert.params_from_state_dict(every_rows(), state))
    assert flat["blocks/q/kernel"].shape == (4, D, N, H)
    assert flat["blocks/router"].shape == (4, 2, 2, D)
    assert flat["blocks/adapters/scale"].shape == (4, 3)
    assert np.array_equal(flat["blocks/router"][3, 1], state["blocks.3.router2"])
    assert np.array_equal(flat["blocks/adapters/down"][1, 2], state["blocks.1.adapters.2.down.weight"].T)
    assert np.array_equal(flat["cross/kernel"][1], state["blocks.2.cross.weight"].T)
    assert np.array_equal(flat["plain/scale"][1], state["blocks.3.plain"])
    assert np.array_equal(flat["windowed/norm"][1, 6], state["sam.14.norm"])
    assert np.array_equal(flat["global/norm"][1], state["sam.15.norm"])


def test_transposed_kernels_compute_what_torch_computes():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((3, D)), rng.standard_normal((3, N, H))
    into, out = rng.standard_normal((N * H, D)), rng.standard_normal((D, N * H))
    assert np.allclose(x @ linear.to_flax(into), x @ into.T)
    assert np.allclose(
        np.einsum("BD,DNH->BNH", x, split_heads_kernel(N, H).to_flax(into)), (x @ into.T).reshape(3, N, H)
    )
    assert np.allclose(np.einsum("BNH,NHD->BD", y, merge_heads_kernel(N, H).to_flax(out)), y.reshape(3, N * H) @ out.T)


def test_convolution_kernels_compute_what_torch_computes():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    image, kernel = rng.standard_normal((1, 3, 4, 4)), rng.standard_normal((5, 3, 2, 2))
    theirs = torch.nn.functional.conv2d(torch.tensor(image), torch.tensor(kernel), stride=2).numpy()
    patches = image.reshape(1, 3, 2, 2, 2, 2).transpose(0, 2, 4, 3, 5, 1)  # (B, y, x, high, wide, C)
    assert np.allclose(np.einsum("Byxhwc,hwcd->Bdyx", patches, conv.to_flax(kernel)), theirs)
    kernel = rng.standard_normal((3, 5, 2, 2))
    theirs = torch.nn.functional.conv_transpose2d(torch.tensor(image), torch.tensor(kernel), stride=2).numpy()
    mine = np.einsum("Bcyx,hwcd->Bdyhxw", image, conv_transpose.to_flax(kernel)).reshape(1, 5, 8, 8)
    assert np.allclose(mine, theirs)


@pytest.mark.parametrize(
    "text, index, name",
    [
        ("h.{i}.w", (12,), "h.12.w"),
        ("h.{2i+1}.w", (3,), "h.7.w"),
        ("h.{8i+j<7}.w", (2, 6), "h.22.w"),
        ("s.{j}.h.{i}.w", (1, 5), "s.5.h.1.w"),
        ("plain.w", (), "plain.w"),
    ],
)
def test_a_template_is_filled_and_matched(text, index, name):
    assert KeyTemplate.parse(text).fill(index) == name
    assert KeyTemplate.parse(text).match(name) == index


@pytest.mark.parametrize(
    "text, name",
    [
        ("h.{2i+1}.w", "h.4.w"),
        ("h.{8i+j<7}.w", "h.7.w"),
        ("h.{i<6}.w", "h.6.w"),
        ("h.{i}.w", "h.01.w"),
        ("h.{i}.w", "hx1.w"),
        ("h.{i+2}.w", "h.1.w"),
        ("h.{i}.w", "h.٣.w"),
    ],
)
def test_a_template_does_not_match_its_neighbors(text, name):
    assert KeyTemplate.parse(text).match(name) is None


@pytest.mark.parametrize("text", ["h.{}", "h.{n}", "h.{i}.{i}", "h.{3}", "h.{8i+j}", "h.{8i+j<9}", "h.{i-1}"])
def test_invalid_braces_in_a_torch_name_are_refused(text):
    with pytest.raises(ValueError, match="torch name"):
        WeightMapping(text, "w")


def test_a_weight_map_under_a_prefix_is_that_of_a_submodule():
    state = {f"visual.{name}": w for name, w in every_state(np.float32).items()}
    rows = with_prefix("visual.", "vision/", every_rows())
    params = convert.params_from_state_dict(rows, state)
    assert list(params) == ["vision"]
    assert_same_bits(convert.state_dict_from_params(rows, params), state)


def said(call) -> list[str]:
    with pytest.raises(UserError) as error:
        call()
    return str(error.value).splitlines()


def test_all_problems_of_an_import_are_listed_by_name_in_one_error():
    state = every_state(np.float32)
    for name in ("blocks.2.proj.weight", "cls", "sam.3.norm"):
        del state[name]
    state |= {"blocks.1.extra": np.ones(1), "blocks.3.extra": np.ones(1)}
    state["patch.weight"] = np.ones((D, 3, 2), np.float32)
    state["blocks.1.router1"] = np.ones((3, D), np.float32)
    state["blocks.0.adapters.0.scale"] = state["blocks.0.adapters.0.scale"].astype(np.int16)
    lines = said(lambda: convert.params_from_state_dict(every_rows(), state))
    text = "\n".join(lines)
    assert len(lines) == 8 and "7 problems" in lines[0]
    assert "'blocks.2.proj.weight'" in text and "'cls'" in text and "'sam.3.norm'" in text
    assert "tensor 'blocks.1,3.extra' (2 of them) has no mapping" in text
    assert "the layers of blocks/router differ" in text and "'blocks.1.router1'" in text
    assert "int16 (1,) in 'blocks.0.adapters.0.scale'" in text
    assert "tensor 'patch.weight', float32 (6, 3, 2), does not fit conv" in text


def test_forbidden_values_are_reported_together():
    state = every_state(np.float32)
    state["blocks.1.qkv.bias"] = np.full(3 * N * H, np.nan, np.float32)
    state["decoder.words"] = state["decoder.words"] + 1
    state["position_ids"] = np.arange(5)[None] + 1
    lines = said(lambda: convert.params_from_state_dict(every_rows(), state))
    assert len(lines) == 4 and "must be finite" in lines[1] and "'decoder.words'" in lines[2] and "constant" in lines[3]


@pytest.mark.parametrize(
    "wide, narrow, common",
    [
        (np.float32, np.float16, np.float32),
        (np.float32, ml_dtypes.bfloat16, np.float32),
        (np.float16, ml_dtypes.bfloat16, np.float32),
        (np.float64, np.float16, np.float64),
    ],
)
def test_layers_of_several_float_dtypes_are_stacked_in_one_that_holds_all_values(wide, narrow, common):
    state = {name: w.astype(wide) for name, w in every_state(np.float32).items() if w.dtype == np.float32}
    ids = {name: w for name, w in every_state(np.float32).items() if w.dtype != np.float32}
    mixed = {name: w.astype(narrow) if number % 2 else w for number, (name, w) in enumerate(state.items())}
    mixed |= {name: mixed["shared"] for name in ("encoder.words", "decoder.words")}
    params = convert.params_from_state_dict(every_rows(), mixed | ids)
    dtypes = {leaf.dtype.name for leaf in trees.flatten(params).values()}
    assert np.dtype(common).name in dtypes <= {np.dtype(dtype).name for dtype in (wide, narrow, common)}
    back = convert.state_dict_from_params(every_rows(), params)
    for name, w in mixed.items():
        np.testing.assert_array_equal(back[name].astype(np.float64), w.astype(np.float64), err_msg=name)


def test_values_of_a_part_without_a_parameter_are_dropped_and_written_as_zeros():
    state = every_state(np.float32)
    zeros = convert.params_from_state_dict(every_rows(), state)
    for layer in range(3):
        if (name := f"blocks.{layer}.qkv.bias") in state:
            state[name] = state[name].copy()
            state[name][N * H : 2 * N * H] = 3.0
    params = convert.params_from_state_dict(every_rows(), state)
    assert_same_bits(trees.flatten(params), trees.flatten(zeros))
    assert not convert.state_dict_from_params(every_rows(), params)["blocks.1.qkv.bias"][N * H : 2 * N * H].any()
    transform = next(row.transform for row in every_rows() if row.torch_keys[0].endswith("qkv.bias"))
    assert transform.drops(state["blocks.1.qkv.bias"])
    assert not transform.drops(every_state(np.float32)["blocks.1.qkv.bias"])


def test_all_problems_of_an_export_are_listed_by_name_in_one_error():
    flat = trees.flatten(convert.params_from_state_dict(every_rows(), every_state(np.float32)))
    del flat["class_token"]
    flat |= {"odd": np.ones(1), "global/norm": np.ones(()), "patch/kernel": np.ones((2, 2, 3))}
    flat["blocks/q/bias"] = flat["blocks/q/bias"].astype(np.float16)
    flat["windowed/norm"] = flat["windowed/norm"][:, :5]
    lines = said(lambda: convert.state_dict_from_params(every_rows(), trees.unflatten(flat)))
    text = "\n".join(lines)
    assert len(lines) == 7
    assert "the mapping of 'cls' finds no parameter 'class_token'" in text and "parameter 'odd' has no mapping" in text
    assert "('global/norm',) must have the same 1 leading axes" in text and "do not fit conv" in text
    assert "differ in dtype" in text and "has leading axes (2, 5)" in text


@pytest.mark.parametrize(
    "rows, problem",
    [
        ((WeightMapping("a", "x"), WeightMapping("a", "y")), "tensor 'a' has two mappings"),
        ((WeightMapping("h.{i}", "x"), WeightMapping("h.{2i}", "y")), "tensor 'h.0' has two mappings"),
        ((WeightMapping("a", "x"), WeightMapping("b", "x")), "parameter 'x' has two mappings"),
    ],
)
def test_a_table_that_names_something_twice_is_refused_both_ways(rows, problem):
    state = {"a": np.ones(2), "b": np.ones(2), "h.0": np.ones(2), "h.1": np.ones(2)}
    state = {
        name: w for name, w in state.items() if any(KeyTemplate.parse(r.torch).match(name) is not None for r in rows)
    }
    assert problem in "\n".join(said(lambda: convert.params_from_state_dict(rows, state)))
    assert problem in "\n".join(
        said(lambda: convert.state_dict_from_params(rows, {"x": np.ones((2, 2)), "y": np.ones((1, 2))}))
    )


def test_tensor_shapes_are_checked_against_the_model():
    params = convert.params_from_state_dict(every_rows(), every_state(np.float32))
    expected = trees.flatten(params)
    expected["words/table"] = TensorSpec((12, D), np.dtype("float32"))
    expected["patch/kernel"] = TensorSpec(expected["patch/kernel"].shape, np.dtype("int32"))
    expected["head/kernel"] = TensorSpec((D, 11), np.dtype("float32"))
    del expected["class_token"]
    lines = said(
        lambda: convert.params_from_state_dict(
            every_rows(), every_state(np.float32), expected=trees.unflatten(expected)
        )
    )
    assert len(lines) == 5
    text = "\n".join(lines)
    assert "'head/kernel' has no mapping" in text and "'class_token' is not part of the model" in text
    assert "(11, 6) where the model has (12, 6)" in text and "float32 where the model has int32" in text


def test_missing_last_layers_are_reported_where_the_model_has_more():
    rows, state = (WeightMapping("h.{i}.w", "w"),), {f"h.{i}.w": np.ones(2) for i in range(3)}
    assert convert.params_from_state_dict(rows, state)["w"].shape == (3, 2)
    expected = {"w": TensorSpec((5, 2), np.dtype("float64"))}
    assert "'h.3..4.w' (2 of them)" in "\n".join(
        said(lambda: convert.params_from_state_dict(rows, state, expected=expected))
    )


def test_a_float16_file_fits_a_float32_model():
    expected = convert.params_from_state_dict(every_rows(), every_state(np.float32))
    params = convert.params_from_state_dict(every_rows(), every_state(ml_dtypes.bfloat16), expected=expected)
    assert params["words"]["table"].dtype == ml_dtypes.bfloat16


def test_ignored_names_are_dropped_before_matching():
    rows = (WeightMapping("h.{i}.w", "w"),)
    state = {f"h.{i}.w": np.ones(2) for i in range(4)} | {"head.weight": np.ones(1)}
    assert convert.params_from_state_dict(rows, state, ignore=(r"h\.3\..*", "head.*"))["w"].shape == (3, 2)
    with pytest.raises(UserError, match="head.weight"):
        convert.params_from_state_dict(rows, state, ignore=("head",))  # patterns are matched whole


def test_a_tied_tensor_may_come_under_any_of_its_names_and_goes_out_under_all():
    state = every_state(np.float32)
    only = {name: w for name, w in state.items() if name not in ("shared", "encoder.words")}
    assert_same_bits(
        convert.state_dict_from_params(every_rows(), convert.params_from_state_dict(every_rows(), only)), state
    )
    del only["decoder.words"]
    with pytest.raises(UserError, match="'shared'"):
        convert.params_from_state_dict(every_rows(), only)


def test_a_tied_copy_in_a_narrower_dtype_must_be_the_rounded_tensor():
    state = every_state(np.float32)
    state["decoder.words"] = state["shared"].astype(ml_dtypes.bfloat16)
    assert convert.params_from_state_dict(every_rows(), state)["words"]["table"].dtype == np.float32
    state["decoder.words"][3, 2] += 1
    with pytest.raises(UserError, match="tied tensors 'shared' and 'decoder.words' hold different values"):
        convert.params_from_state_dict(every_rows(), state)


def test_a_constant_may_be_missing_and_is_written():
    state = every_state(np.float32)
    del state["position_ids"]
    back = convert.state_dict_from_params(every_rows(), convert.params_from_state_dict(every_rows(), state))
    assert np.array_equal(back["position_ids"], np.arange(5)[None])


@pytest.mark.parametrize("op, shape", [(reshape((1, 1, -1), (-1,)), (2, 6)), (squeeze, (2, 3)), (squeeze, ())])
def test_a_shape_that_does_not_fit_a_transform_is_refused(op, shape):
    with pytest.raises(UserError, match="does not fit"):
        convert.params_from_state_dict((WeightMapping("w", "w", op),), {"w": np.ones(shape)})


def test_a_name_with_an_absurd_layer_number_is_refused():
    start = time.perf_counter()
    with pytest.raises(UserError, match="numbered up to"):
        convert.params_from_state_dict(
            (WeightMapping("h.{i}.w", "w"),), {"h.0.w": np.ones(1), "h.987654321.w": np.ones(1)}
        )
    with pytest.raises(UserError, match="has no mapping"):
        convert.params_from_state_dict(
            (WeightMapping("h.{i}.w", "w"),), {"h.0.w": np.ones(1), f"h.{'9' * 5000}.w": np.ones(1)}
        )
    assert time.perf_counter() - start < 5


def test_numbered_names_are_listed_as_ranges():
    assert group_numbered_names(["b.1.w", "b.0.w", "b.2.w", "a"]) == ["'a'", "'b.0..2.w' (3 of them)"]
    assert group_numbered_names(["b.10.w", "b.9.w"]) == ["'b.9..10.w' (2 of them)"]


@settings(deadline=None)
@given(
    st.permutations(range(4)),
    st.tuples(*[st.integers(1, 7)] * 4),
    st.sampled_from(["f4", "u1", "f8", "?", "c16", "bf16"]),
    st.integers(1, 2),
)
def test_copy_of_any_memory_layout_keeps_the_bits(order, shape, kind, step):
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bf16" else kind)
    size = int(np.prod(shape)) * dtype.itemsize
    whole = np.random.default_rng(0).integers(0, 2, size, np.uint8).view(dtype).reshape(shape)
    source = whole.transpose(order)[::step]
    target = np.zeros(source.shape, dtype)
    copy_bits(target, source)
    assert target.tobytes() == np.ascontiguousarray(source).tobytes()


@pytest.mark.parametrize("shape", [(300, 513), (1, 700), (1024, 256), (257, 1)])
def test_a_large_transposed_matrix_is_copied_tile_by_tile(shape):
    source = np.random.default_rng(0).integers(0, 60000, shape).astype(np.uint16)
    target = np.zeros(shape[::-1], np.uint16)
    copy_bits(target, source.T)
    assert np.array_equal(target, source.T)


def test_copy_bits_refuses_another_dtype():
    with pytest.raises(ValueError, match="it must be"):
        copy_bits(np.zeros(3, np.float32), np.zeros(3, np.float16))


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4, "tensor": 2, "data": 1}, {"tensor": 4, "fsdp": 1, "data": 2}])
def test_parameters_placed_on_a_mesh_are_the_same_and_lie_where_they_should(mesh):
    mesh = sharding.make_mesh(sharding.MeshConfig(**mesh))
    rows, state = every_rows(), every_state(ml_dtypes.bfloat16)
    plain = trees.flatten(convert.params_from_state_dict(rows, state))
    axes = {3: ("layers", "embed", "vocab"), 4: ("layers", "embed", "heads", "head"), 2: ("vocab", "embed")}

    def like(path, leaf):
        names = axes.get(leaf.ndim, (None,) * leaf.ndim)
        where = jax.sharding.NamedSharding(mesh, sharding.partition_spec(names, leaf.shape, mesh, path))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    wanted = {path: like(path, leaf) for path, leaf in plain.items()}
    placed = trees.flatten(convert.sharded_params_from_state_dict(rows, state, trees.unflatten(wanted)))
    assert_same_bits({path: np.asarray(leaf) for path, leaf in placed.items()}, plain)
    assert all(placed[path].sharding == wanted[path].sharding for path in wanted)
