# SPDX-License-Identifier: Apache-2.0
"""The benchmark for one accelerator: its models, what it counts, and that it works where little is installed."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import accelerator, instructblip, llava
from lionjax.planner import topologies


@pytest.mark.parametrize("shape", accelerator.SHAPES)
def test_parameter_counts_match_the_names_of_the_shapes(shape):
    s = accelerator.SHAPES[shape]
    peer = accelerator.train_step.peer_of(s)
    shapes = jax.eval_shape(peer.system_of(s).init, jax.random.key(0), peer.batch_of(s))
    number = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    low, high = {"lion_xl": (3.8e9, 4.2e9), "nextchat_7b": (6.8e9, 7.2e9), "1b": (1.2e9, 1.6e9)}[shape]
    assert low < number < high


def test_benchmark_models_equal_the_converted_torch_models():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for s in (accelerator.TINY["1b"], accelerator.TINY["lion_xl"]):
        peer = accelerator.train_step.peer_of(s)
        system, _ = peer.ours_of(s, peer.torch_model(s))
        assert system == peer.system_of(s)


@pytest.mark.slow
def test_flops_of_an_update_equal_the_formula():
    s = accelerator.TINY["1b"]
    peer = accelerator.train_step.peer_of(s)
    batch, system = peer.batch_of(s), peer.system_of(s)
    shapes = jax.eval_shape(lambda: accelerator.ours(s, False)[1])
    length = batch.prompt_BL.shape[1] + s.words + batch.target_BM.shape[1]
    width, hidden = s.language_width, s.language_width * 8 // 3
    weights = s.language_layers * (4 * width * width + 3 * width * hidden)
    scores = s.language_layers * 2 * length * width
    text = 3 * 2 * s.batch * (length * (weights + scores) + s.target * width * s.vocab)
    # The tower's are forward alone: its patches, and two blocks that read them and the class token.
    patches, wide = s.words, s.vision_width
    blocks = s.vision_depth * (1 + patches) * (12 * wide * wide + 2 * (1 + patches) * wide)
    tower = 2 * s.batch * (patches * 3 * s.patch**2 * wide + blocks)
    # The projector's first layer hands no gradient on.
    projector = 2 * s.batch * s.words * (2 * wide * width + 3 * width * width)
    assert accelerator.flops_of(s, system, shapes, batch) == text + tower + projector


def test_peak_flops_are_looked_up_by_device_name():
    assert topologies.peak_rates("NVIDIA H100 80GB HBM3") == (989, 3350)
    assert topologies.peak_rates("NVIDIA H200") == (989, 4800)
    assert topologies.peak_rates("TPU v5 lite") == (197, 819)
    assert topologies.peak_rates("TPU v5p") == topologies.peak_rates("TPU v5")
    assert topologies.peak_rates("cpu") is None


def made(seconds, **more):
    return {"seconds": seconds, "losses": [1.0], "tokens": 1000, "flops": 2e14, "device": "NVIDIA H100"} | more


def test_a_size_that_does_not_fit_is_reported_and_the_others_are_measured():
    found = {
        ("train", "1b", "torch"): {"failed": "does not fit into memory"},
        ("train", "1b", "lionjax"): made(0.5),
        ("decode", "1b", "torch"): {"rate": 50.0, "ids": [[1]]},
        ("decode", "1b", "lionjax"): {"rate": 100.0, "ids": [[1]], "bytes": 2.5e10},
    }
    torch, ours = accelerator.tables(found)[2:]
    assert "does not fit into memory" in torch
    assert ours == "| 1b | lionjax | 2,000 | 500.0 | 40.4% | - | 100.0 | 74.6% | 2.00x |"
    found["decode", "1b", "torch"]["rate"] = None
    torch, ours = accelerator.tables(found)[2:]
    assert "too short to time" in torch and ours.endswith("| 100.0 | 74.6% | - |")


def test_different_losses_or_tokens_are_an_error():
    sides = {("train", "1b", "torch"): made(1.0), ("train", "1b", "lionjax"): made(1.0)}
    accelerator.agree(sides)
    with pytest.raises(AssertionError):
        accelerator.agree(sides | {("train", "1b", "torch"): made(1.0, losses=[1.1])})


def test_out_of_memory_is_recorded_as_a_result(monkeypatch):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(accelerator, "train_ours", full)
    asked = accelerator.arguments(["--size", "tiny"])
    assert accelerator.guarded(asked, "train", "1b", "lionjax") == {"failed": "does not fit into memory"}


@pytest.mark.slow
def test_the_benchmark_runs_without_torch_and_data_libraries():
    lacking = ("torch", "transformers", "tyro", "grain", "tensorflow_datasets", "array_record")
    code = (
        f"import sys\nfor name in {lacking}: sys.modules[name] = None\n"
        "from benchmarks import accelerator as a\n"
        "asked = a.arguments(['--size', 'tiny', '--repeats', '1'])\n"
        "made = a.guarded(asked, 'train', 'nextchat_7b', 'lionjax')\n"
        "assert made['seconds'] > 0 and len(made['losses']) == 3, made\n"
        "assert a.guarded(asked, 'train', '1b', 'torch') == {'failed': a.NO_TORCH}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_sides_get_the_same_batch():
    for s in (accelerator.TINY["1b"], accelerator.TINY["lion_xl"]):
        assert isinstance(s, llava.Sizes | instructblip.Sizes)
        batch = accelerator.train_step.peer_of(s).batch_of(s)
        assert accelerator.tokens_of(s, batch) > int(batch.prompt_mask_BL.sum())
