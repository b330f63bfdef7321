# SPDX-License-Identifier: Apache-2.0
"""Parameter trees by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lionjax.core import params as trees
from lionjax.core.types import UserError


def tree() -> dict:
    return {
        "vision": {"blocks": {"q": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.zeros((2, 4))}}},
        "t5": {"adapter_0": {"up": jnp.full((3,), 2.0)}, "adapter_1": {"up": jnp.full((3,), 3.0)}},
        "t5_tail": {"scale": jnp.ones(5)},
        "step": jnp.asarray(7, jnp.int32),
    }


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
    return jax.tree.all(equal)


def test_flatten_names_leaves_by_path_in_sorted_order_and_unflatten_undoes_it():
    flat = trees.flatten(tree())
    assert list(flat) == sorted(flat) and "vision/blocks/q/kernel" in flat and len(flat) == 6
    assert same(trees.unflatten(flat), tree())
    assert trees.flatten({"a": {}, "b": {"c": {}}}) == {}


@pytest.mark.parametrize(
    ("pattern", "path", "yes"),
    [
        ("t5", "t5/adapter_0/up", True),  # whatever lies under it
        ("t5", "t5_tail/scale", False),  # but not what merely begins alike
        ("adapter_1", "t5/adapter_1/up", False),  # the path is matched from its start
        (".*/adapter_1", "t5/adapter_1/up", True),
        (".*/adapter_1/.*", "t5/adapter_1/up", True),
        ("t5|step", "step", True),  # an alternative stands for itself alone
        ("t5|step", "t5/adapter_0/up", True),
        ("t5|step", "steps", False),
    ],
)
def test_a_pattern_matches_a_whole_path_or_what_lies_under_it(pattern, path, yes):
    assert trees.matches(path, (pattern,)) is yes


def test_split_and_merge_are_inverse_and_share_no_leaf():
    chosen, rest = trees.split(tree(), ("t5", "vision/.*/bias"))
    assert set(trees.flatten(chosen)) == {"t5/adapter_0/up", "t5/adapter_1/up", "vision/blocks/q/bias"}
    assert not set(trees.flatten(chosen)) & set(trees.flatten(rest))
    assert same(trees.merge(rest, chosen), tree())


def test_a_pattern_that_matches_nothing_is_named_with_the_nearest_path():
    with pytest.raises(UserError) as error:
        trees.split(tree(), ("t5", "visoin"))
    assert str(error.value) == ("pattern 'visoin' matches none of the 6 parameters; did you mean 'vision'?")


def test_merging_trees_that_share_a_leaf_is_an_error():
    with pytest.raises(ValueError, match="'step'"):
        trees.merge(tree(), {"step": jnp.zeros(())})


def test_a_gradient_through_merge_touches_the_trainable_half_alone():
    trainable, frozen = trees.split(tree(), (".*/adapter_1",))

    def loss(trainable):
        whole = trees.merge(trainable, frozen)
        return (whole["t5"]["adapter_0"]["up"] * whole["t5"]["adapter_1"]["up"]).sum()

    grads = trees.flatten(jax.grad(loss)(trainable))
    assert list(grads) == ["t5/adapter_1/up"]
    np.testing.assert_array_equal(grads["t5/adapter_1/up"], [2, 2, 2])


def test_count_takes_shapes_as_well_as_arrays():
    scalars = 24 + 8 + 3 + 3 + 5 + 1
    assert trees.count_params(tree()) == trees.count_params(jax.eval_shape(tree)) == scalars


def test_cast_changes_floating_leaves_and_leaves_integers():
    halves = trees.flatten(trees.cast(tree(), "bfloat16"))
    assert halves.pop("step").dtype == jnp.int32
    assert {leaf.dtype for leaf in halves.values()} == {jnp.dtype("bfloat16")}


def test_describe_adds_up_subtrees_down_to_a_depth():
    lines = trees.parameter_overview(tree(), depth=1).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows == {
        "step": ["1", "int32"],
        "t5": ["6", "float32"],
        "t5_tail": ["5", "float32"],
        "vision": ["32", "float32"],
    }
    assert len(trees.parameter_overview(tree(), depth=2).splitlines()) == 5
