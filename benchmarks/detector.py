# SPDX-License-Identifier: Apache-2.0
"""Speed of Grounding DINO beside transformers on one picture, and what the sampling of feature maps costs.

python -m benchmarks.detector [--height 800] [--width 1066] [--turns 5] [--write]

Swin-T with the same random weights on both sides, float32, batch 1, a text of two phrases. The sides take turns in one
process; medians are compared. `--turns 0` only compares outputs. `--write` puts the tables into
benchmarks/results/detector.md. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "detector.md"
IDS = (101, 1037, 4937, 1012, 1037, 6556, 2491, 1012, 102)  # "a cat. a remote control." by bert-base-uncased
GOAL = 0.8  # images/s over transformers'


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1066)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    return parser.parse_args(argv)


def torch_model():
    """transformers' detector with random weights, moved off the zeros and ones that they begin with."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.GroundingDinoForObjectDetection(transformers.GroundingDinoConfig()).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return model


def our_model(model):
    """(config, parameters) with the weights of the torch model."""
    from lionjax import convert

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config, params = convert.from_torch(folder)
        return config, copied(params)


def copied(tree):
    """The arrays of a nested dict in memory, not in the file that they are mapped from."""
    return {name: copied(leaf) if isinstance(leaf, dict) else np.array(leaf) for name, leaf in tree.items()}


@dataclasses.dataclass
class Times:
    """Seconds of each turn, by the clock and of the processor in all threads."""

    clock: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.clock), statistics.median(self.processor)


def alternate(sides: dict[str, Callable], turns: int) -> dict[str, Times]:
    """{side: its times}, after one turn of each that is not counted."""
    times = {name: Times() for name in sides}
    for turn in range(turns + 1):
        for name, run in sides.items():
            start, used = time.perf_counter(), time.process_time()
            run()
            if turn:
                times[name].clock.append(time.perf_counter() - start)
                times[name].processor.append(time.process_time() - used)
            print(f"turn {turn}: {name} {time.perf_counter() - start:.2f} s", file=sys.stderr, flush=True)
    return times


def parts_of(c, params, inputs) -> dict[str, Callable]:
    """Compiled parts of our model on their own, each with inputs that the parts before it give."""
    import jax

    from lionjax.models.vision.grounding_dino import GroundingDino

    module, params = GroundingDino(c), {"params": params}

    def compiled(method, *args):
        run = jax.jit(lambda *args: module.apply(params, *args, method=method)).lower(*args).compile()
        return (lambda: jax.block_until_ready(run(*args))), run(*args)

    parts = {}
    parts["backbones"], encoded = compiled(GroundingDino.encode, *inputs)
    parts["enhancer"], (image_BPD, text_BLD) = compiled(GroundingDino.enhance, encoded)
    parts["query selection"], selected = compiled(GroundingDino.select, image_BPD, text_BLD, encoded)
    parts["decoder"], _ = compiled(GroundingDino.decode, image_BPD, text_BLD, selected.box_BQ4, encoded)
    return parts, encoded.shared.shapes


def sampling_of(c, shapes, num_queries: int) -> dict[str, Callable]:
    """The sampling of one layer on both sides: random values, points around those of a grid, weights of a softmax."""
    import jax
    import torch
    from transformers.models.grounding_dino.modeling_grounding_dino import MultiScaleDeformableAttention

    from lionjax.nn.deformable_attention import sample_levels

    rng, head = np.random.default_rng(0), c.width // c.num_heads
    value = rng.standard_normal((1, sum(h * w for h, w in shapes), c.num_heads, head), np.float32)
    scale = np.array([(w, h) for h, w in shapes], np.float32)[:, None]
    centers = np.linspace(0, 1, num_queries, dtype=np.float32)[:, None, None, None, None]
    points = (num_queries, c.num_heads, c.num_levels, c.num_points)
    point = (centers + 3 * rng.standard_normal((1, *points, 2), np.float32) / scale).astype(np.float32)
    weight = rng.random((1, *points), np.float32) / (c.num_levels * c.num_points)
    run = jax.jit(lambda *args: sample_levels(args[0], shapes, *args[1:])).lower(value, point, weight).compile()
    tensors, sizes = [torch.from_numpy(x) for x in (value, point, weight)], torch.tensor(shapes)
    theirs = MultiScaleDeformableAttention()

    def torch_side():
        with torch.inference_mode():
            return theirs(tensors[0], sizes, list(shapes), None, *tensors[1:], 64)

    wanted = torch_side().numpy()
    np.testing.assert_allclose(np.asarray(run(value, point, weight)).reshape(wanted.shape), wanted, atol=1e-4)
    return {"transformers": torch_side, "lionjax": lambda: jax.block_until_ready(run(value, point, weight))}


def measure(options: argparse.Namespace) -> str:
    """The report in Markdown."""
    import jax
    import torch

    from lionjax.models.vision.grounding_dino import GroundingDino

    model = torch_model()
    c, params = our_model(model)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, options.height, options.width, 3), np.float32)
    ids = np.array([IDS], np.int32)
    inputs = (image, np.ones(image.shape[:3], bool), ids, np.ones(ids.shape, bool))
    pixels, tokens = torch.from_numpy(image.transpose(0, 3, 1, 2).copy()), torch.from_numpy(ids).long()

    def torch_side():
        with torch.inference_mode():
            return model(pixels, tokens)

    same = agreement(torch_side(), c, params, inputs)
    if not options.turns:
        return same
    params, inputs = jax.device_put((params, inputs))
    start = time.perf_counter()
    run = jax.jit(GroundingDino(c).apply).lower({"params": params}, *inputs).compile()
    compile_seconds = time.perf_counter() - start

    def our_side():
        return jax.block_until_ready(run({"params": params}, *inputs))

    whole = alternate({"transformers": torch_side, "lionjax": our_side}, options.turns)
    parts, shapes = parts_of(c, params, inputs)
    num_positions = sum(height * width for height, width in shapes)
    rows = {name: times.medians for name, times in alternate(parts, options.turns).items()}
    layers = {"enhancer": (c.encoder_depth, num_positions), "decoder": (c.decoder_depth, c.num_queries)}
    sampled = {part: alternate(sampling_of(c, shapes, n), options.turns) for part, (_, n) in layers.items()}
    return report(options, c, whole, compile_seconds, same, rows, layers, sampled, num_positions)


def agreement(theirs, c, params, inputs) -> str:
    """Where both sides agree at this size, each part with the other side's inputs where selection could differ.

    Random weights score many positions nearly alike. Where rounding exchanges two of them, all later ranks move, and a
    query's content belongs to its rank; so the decoder is compared from transformers' own queries.
    """
    import jax

    from lionjax.models.vision.grounding_dino import GroundingDino

    def compute(module, boxes_BQ4, *inputs):
        encoded = module.encode(*inputs)
        image_BPD, text_BLD = module.enhance(encoded)
        selection = module.select(image_BPD, text_BLD, encoded)
        state_TBQD, _ = module.decode(image_BPD, text_BLD, boxes_BQ4, encoded)
        out = module.predict(state_TBQD, boxes_BQ4[None], selection, text_BLD, encoded.shared.text_mask_BL)
        return image_BPD, text_BLD, selection.score_BP, out.features_BQD[..., :-4]

    boxes_BQ4 = theirs.init_reference_points.numpy()
    apply = jax.jit(lambda *args: GroundingDino(c).apply({"params": params}, *args, method=compute))
    ours = [np.asarray(x) for x in apply(boxes_BQ4, *inputs)]
    score_BP = theirs.enc_outputs_class.max(-1).values
    wanted = [theirs.encoder_last_hidden_state_vision, theirs.encoder_last_hidden_state_text, score_BP]
    wanted = [x.numpy() for x in (*wanted, theirs.last_hidden_state)]
    names = ("enhanced image", "enhanced text", "scores", "last states from the same queries")
    worst = [f"{name} {np.abs(x - y).max() / np.abs(y).max():.1e}" for name, x, y in zip(names, ours, wanted)]
    ranked = np.sort(wanted[2][0])[::-1][: c.num_queries + 1]
    error, gap = np.abs(ours[2] - wanted[2]).max(), np.median(-np.diff(ranked))
    mine, other = (set(np.argsort(-x[0])[: c.num_queries]) for x in (ours[2], wanted[2]))
    text = f"Largest differences, of the largest value: {', '.join(worst)}. Neighbors in the ranking of the queries"
    text += f" differ by {gap:.1e} in the median, and the scores of both sides by up to {error:.1e};"
    return text + f" {len(mine & other)} of {c.num_queries} selected positions are the same."


def report(options, c, whole, compile_seconds, same, parts, layers, sampled, num_positions) -> str:
    peer = whole["transformers"].medians
    lines = ["| side | images/s | s (fastest) | against transformers | processor s | against transformers |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, times in whole.items():
        clock, used = times.medians
        cells = f"{1 / clock:.3f}", f"{clock:.2f} ({min(times.clock):.2f})", f"{peer[0] / clock:.2f}x", f"{used:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {peer[1] / used:.2f}x |")
    ratio = peer[0] / whole["lionjax"].medians[0]
    lines += ["", f"{ratio:.2f}x transformers' images/s (goal {GOAL}x). Compiled in {compile_seconds:.0f} s. "]
    lines += ["", same]
    lines += ["", "Processor seconds of the parts, and of the sampling in all layers of a part:", ""]
    lines += ["| part of lionjax | s | sampling: layers x queries | s | of the part | transformers s |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, (_, seconds) in parts.items():
        cells = ["-"] * 4
        if name in layers:
            depth, queries = layers[name]
            ours, theirs = (depth * sampled[name][side].medians[1] for side in ("lionjax", "transformers"))
            cells = [f"{depth} x {queries:,}", f"{ours:.2f}", f"{ours / seconds:.0%}", f"{theirs:.2f}"]
        lines.append(f"| {name} | {seconds:.2f} | {' | '.join(cells)} |")
    lines += ["", f"The levels have {num_positions:,} positions; each query of a layer samples"]
    lines[-1] += f" {c.num_heads} x {c.num_levels} x {c.num_points} points of 4 corners."
    return "\n".join(lines)


def heading(options: argparse.Namespace) -> str:
    """Command, date, commit and machine of this run."""
    import torch
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    size = f"--height {options.height} --width {options.width} --turns {options.turns}"
    load = os.getloadavg()[0]
    return "\n".join(
        [
            "# Grounding DINO against transformers",
            "",
            f"Swin-T, {options.height} x {options.width} px, batch 1, random weights, float32, {os.cpu_count()} cores; "
            f"load average {load:.0f}",
            f"before the run, so only ratios count. Date: {datetime.date.today()}. Commit: {commit}. "
            f"Peer: torch {torch.__version__}, transformers {transformers.__version__}.",
            "",
            f"`JAX_PLATFORMS=cpu python -m benchmarks.detector {size} --write`",
            "",
        ]
    )


def main(argv=None) -> None:
    options = arguments(argv)
    text = "\n".join([heading(options), measure(options), ""])
    print(text)
    if options.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
