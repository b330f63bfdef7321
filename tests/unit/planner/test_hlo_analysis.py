# SPDX-License-Identifier: Apache-2.0
"""What is read out of compiled programs, held against programs whose bytes and products one can count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from paths import ROOT

from lionjax.planner import hlo_analysis

LAYERS, WIDTH, ROWS = 5, 64, 16

TEXT = """
HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%piece_of_a_stack (stack: bf16[6,64,32], number: s32[]) -> bf16[64,32] {
  %stack = bf16[6,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %number = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %piece = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} dynamic-slice(%stack, %number, %zero, %zero)
  ROOT %flat = bf16[64,32]{1,0:T(8,128)(2,1)} bitcast(%piece)
}

%begun (part: bf16[64,32]) -> bf16[64,128] {
  %part = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%part), channel_id=7, replica_groups=[4,4]<=[4,4]T(1,0)
}

%turn (carry: (s32[], bf16[6,64,32])) -> (s32[], bf16[6,64,32]) {
  %carry = (s32[]{:T(128)}, bf16[6,64,32]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %step = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %all = bf16[6,64,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %mine = bf16[64,32]{1,0:T(8,128)(2,1)} fusion(%all, %step), kind=kLoop, calls=%piece_of_a_stack
  %whole.1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%mine), kind=kCustom, calls=%begun
  %whole.2 = bf16[64,128]{1,0} all-gather(%mine), channel_id=7, replica_groups=[4,4]<=[4,4]T(1,0), op_name="vision/dot"
  ROOT %next = (s32[]{:T(128)}, bf16[6,64,32]{2,1,0:T(8,128)(2,1)}) tuple(%step, %all)
}

%goes_on (carry.1: (s32[], bf16[6,64,32])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, bf16[6,64,32]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %last = s32[]{:T(128)} constant(6)
  %now = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%now, %last), direction=LT
}

ENTRY %main (weights: bf16[6,64,32], gradient: f32[100]) -> f32[100] {
  %weights = bf16[6,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %gradient = f32[100]{0:T(128)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, bf16[6,64,32]{2,1,0:T(8,128)(2,1)}) tuple(%start, %weights)
  %loop = (s32[]{:T(128)}, bf16[6,64,32]{2,1,0:T(8,128)(2,1)}) while(%begin), condition=%goes_on, body=%turn
  %swap = f32[100]{0} collective-permute(%gradient), channel_id=9, source_target_pairs={{0,0},{1,3},{3,1}}
  ROOT %mean = f32[100]{0} all-reduce(%gradient), channel_id=8, replica_groups=mesh['a'=2,'b'=8] {'a'}, to_apply=%add
}
"""


@pytest.fixture(scope="module")
def program():
    return hlo_analysis.parse_hlo(TEXT)


def test_while_loop_bodies_are_counted_by_their_trip_count(program):
    assert program.execution_counts["%turn"] == 6 and program.execution_counts["%main"] == 1
    assert program.execution_counts["%begun"] == 6 and "%add" not in program.execution_counts


def test_a_collective_split_over_several_instructions_counts_once_per_iteration(program):
    found = {one.opcode: one for one in hlo_analysis.collectives(program, 8)}
    gather, swap, mean = (found[kind] for kind in ("all-gather", "collective-permute", "all-reduce"))
    assert (gather.opcode, gather.group_size, gather.count) == ("all-gather", 4, 6)
    assert gather.output_bytes == 64 * 128 * 2
    assert gather.bytes_sent == 6 * 3 * 64 * 32 * 2  # three parts pass by, in each of six turns
    assert gather.op_name == "vision/dot"
    assert mean.bytes_sent == 400 and mean.cross_slice  # a ring of two: 2 x 400 x 1/2, between devices 0 and 8
    assert swap.bytes_sent == 400 and not swap.cross_slice
    assert gather.cross_slice  # devices 0, 4, 8 and 12
    assert not any(one.cross_slice for one in hlo_analysis.collectives(program))  # of one slice


@pytest.mark.parametrize(
    ("rest", "members"),
    [
        ("replica_groups={{0,2},{1,3}}, x={1}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,4]<=[4,4]T(1,0), dimensions={2}", [0, 4, 8, 12]),
        ("replica_groups=[2,8]<=[2,4,2]T(2,0,1)", [0, 2, 4, 6, 8, 10, 12, 14]),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=4] {'c'}, use=1", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=4] {'a'}", [0, 4, 8, 12]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [0, 4]),
        ("source_target_pairs={{1,1},{0,4},{4,8}}", [0, 4]),
        ("dimensions={0}", [0]),
    ],
)
def test_replica_groups_are_parsed_in_every_notation(rest, members):
    assert hlo_analysis.replica_group(rest) == members


def test_slice_of_a_stacked_array_counts_only_its_own_bytes(program):
    piece, whole = 64 * 32 * 2, 64 * 128 * 2
    # Each turn: a piece is read by a number of four bytes, written, and read twice; one whole is written, the other
    # stays on the chip; two numbers are compared into one byte. At the end 100 floats are read and written twice.
    turn = (piece + 4 + piece) + piece + (piece + whole) + (4 + 4 + 1)
    assert hlo_analysis.hbm_bytes_accessed(program) == 6 * turn + 2 * 2 * 400


# As libtpu 0.0.42.1 prints a Pallas kernel and what follows it in LLaVA-1.5's train step, with shorter names and sizes.
KERNEL = (ROOT / "tests" / "data" / "pallas_kernel.hlo").read_text()


def test_instructions_after_a_pallas_kernel_are_counted():
    program = hlo_analysis.parse_hlo(KERNEL)
    assert list(program.computations["%body"]) == "%carry %q %splash.1 %out %begin %end %sum %mine %next".split()
    found = {one.opcode: one for one in hlo_analysis.collectives(program)}
    shard, whole = 8 * 64 * 2, 32 * 64 * 2
    assert found["all-gather"].bytes_sent == 3 * shard and found["all-reduce"].bytes_sent == 2 * whole * 3 / 4
    kernel, gather, reduce, cut = shard + 8 * 128 * 4 + shard, shard + whole, 2 * whole, whole + shard
    assert hlo_analysis.hbm_bytes_accessed(program) == kernel + gather + reduce + cut


def test_collectives_with_a_start_and_a_done_count_as_asynchronous():
    found = {one.opcode: one.is_async for one in hlo_analysis.collectives(hlo_analysis.parse_hlo(KERNEL))}
    assert found == {"all-gather": True, "all-reduce": False}


NESTED = """
%piece (stack: f32[6,64,32], number: s32[]) -> f32[64,32] {
  %number = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %stack = f32[6,64,32]{2,1,0:T(8,128)} parameter(0)
  %cut = f32[1,64,32]{2,1,0:T(8,128)} dynamic-slice(%stack, %number, %zero, %zero)
  ROOT %flat = f32[64,32]{1,0:T(8,128)} bitcast(%cut)
}

%product (row: f32[8,64], number.1: s32[], stack.1: f32[6,64,32], sums: f32[6,8,32]) -> (f32[6,8,32], f32[8,32]) {
  %stack.1 = f32[6,64,32]{2,1,0:T(8,128)} parameter(2)
  %number.1 = s32[]{:T(128)} parameter(1)
  %weight = f32[64,32]{1,0:T(8,128)} fusion(%stack.1, %number.1), kind=kLoop, calls=%piece
  %row = f32[8,64]{1,0:T(8,128)} parameter(0)
  %out = f32[8,32]{1,0:T(8,128)} convolution(%row, %weight), dim_labels=bf_io->bf
  %one = f32[1,8,32]{2,1,0:T(8,128)} bitcast(%out)
  %sums = f32[6,8,32]{2,1,0:T(8,128)} parameter(3)
  %none = s32[]{:T(128)} constant(0)
  %put = f32[6,8,32]{2,1,0:T(8,128)} dynamic-update-slice(%sums, %one, %number.1, %none, %none)
  ROOT %both = (f32[6,8,32]{2,1,0:T(8,128)}, f32[8,32]{1,0:T(8,128)}) tuple(%put, %out)
}

ENTRY %main (row.1: f32[8,64], number.2: s32[], all: f32[6,64,32], kept: f32[6,8,32]) -> (f32[6,8,32], f32[8,32]) {
  %row.1 = f32[8,64]{1,0:T(8,128)} parameter(0)
  %number.2 = s32[]{:T(128)} parameter(1)
  %all = f32[6,64,32]{2,1,0:T(8,128)} parameter(2)
  %kept = f32[6,8,32]{2,1,0:T(8,128)} parameter(3)
  ROOT %done = (f32[6,8,32]{2,1,0}, f32[8,32]{1,0}) fusion(%row.1, %number.2, %all, %kept), kind=kOutput, calls=%product
}
"""


def test_a_slice_fused_into_a_dot_counts_only_the_bytes_of_the_slice():
    """The weight of one layer is cut inside the fusion of its product, and the result put into a stack in place; what
    is given stands in another order than it is numbered in."""
    row, weight, out, number = 8 * 64 * 4, 64 * 32 * 4, 8 * 32 * 4, 4
    assert hlo_analysis.hbm_bytes_accessed(hlo_analysis.parse_hlo(NESTED)) == row + number + weight + 2 * out


@pytest.mark.parametrize(
    ("shape", "whole", "outside"),
    [
        ("bf16[16,5,256]{2,0,1:T(8,128)(2,1)S(1)}", 40960, 0),
        ("(s32[]{:T(128)}, f32[4,64]{1,0:T(4,128)}, /*index=2*/pred[3]{0})", 4 + 1024 + 3, 1031),
        ("f8e4m3fn[7]{0}", 7, 7),
        ("token[]", 0, 0),
    ],
)
def test_sizes_of_arrays_in_hbm_are_counted_separately(shape, whole, outside):
    assert hlo_analysis.shape_bytes(shape) == whole
    assert hlo_analysis.shape_bytes(shape, hbm_only=True) == outside


# Programs that are compiled here


def layered(weight_LDF, x_BD):
    def layer(x_BD, weight_DF):
        return jnp.tanh(x_BD @ weight_DF), None

    return jax.lax.scan(layer, x_BD, weight_LDF)[0].sum()


def shaped(mesh, shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def test_sharded_weights_are_gathered_once_per_layer_in_a_program_compiled_here():
    mesh = Mesh(np.array(jax.devices()[:8]), "x")
    weights = shaped(mesh, (LAYERS, WIDTH, WIDTH), None, "x")
    rows = shaped(mesh, (ROWS, WIDTH), "x")
    program = hlo_analysis.parse_hlo(jax.jit(layered).lower(weights, rows).compile().as_text())
    gathers = [one for one in hlo_analysis.collectives(program) if one.opcode == "all-gather"]
    assert sum(one.count for one in gathers) == LAYERS
    assert {one.output_bytes for one in gathers} == {WIDTH * WIDTH * 4}
    assert sum(one.bytes_sent for one in gathers) == LAYERS * WIDTH * WIDTH * 4 * 7 / 8


def test_flops_count_every_loop_iteration_and_rematerialization():
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
    rows = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)

    def count(function, *given):
        return hlo_analysis.jaxpr_flops(jax.make_jaxpr(function)(*given).jaxpr)

    once = 2 * LAYERS * ROWS * WIDTH * WIDTH
    assert count(layered, weights, rows) == once
    assert count(jax.grad(layered), weights, rows) == 3 * once  # and two for the gradients

    def again(weight_LDF, x_BD):
        def layer(x_BD, weight_DF):
            return jnp.tanh(jnp.tanh(x_BD @ weight_DF) @ weight_DF), None

        return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x_BD, weight_LDF)[0].sum()

    # Twice forward, of which the first product is needed again, and four for the gradients.
    assert 7 * once <= count(jax.grad(again), weights, rows) <= 8 * once


def test_flops_of_convolutions_and_of_while_loops():
    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

    def convolve(image, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout)

    assert hlo_analysis.jaxpr_flops(jax.make_jaxpr(convolve)(image, kernel).jaxpr) == 2 * 2 * 8 * 8 * 5 * 27

    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    jaxpr = jax.make_jaxpr(until)(jnp.eye(4)).jaxpr
    assert hlo_analysis.jaxpr_flops(jaxpr, while_trip_count=10) == 10 * 2 * 4**3
