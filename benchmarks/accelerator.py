# SPDX-License-Identifier: Apache-2.0
"""Training and decoding on one accelerator against transformers in torch: tokens/s, MFU and memory-bandwidth use.

python -m benchmarks.accelerator [--size full|tiny] [--shapes lion_xl nextchat_7b 1b] [--repeats 10] [--write]

Shapes: an InstructBLIP of LION-FlanT5-XL's size with a trained Q-Former (without LION's adapters and aggregator, which
transformers lacks); a LLaVA of NExT-Chat-7B's size with a frozen language model; a LLaVA of 1.1 B parameters with only
the vision tower frozen. Frozen weights are bfloat16, trained ones float32, computation is bfloat16, without remat.

At full size, each side initializes random weights on the device. `--size tiny` runs on any machine in float32 with the
same weights on both sides and checks that all losses and generated ids agree. Each measurement runs in its own process,
so that running out of memory affects only itself. Needs jax, flax, optax and orbax; the torch side is skipped without
torch and transformers.

MFU is the matrix-product FLOPs of one update, counted once each in the traced program, over seconds and published peak;
the FLOPs are the same for both sides. The decode limit is the bytes of all weights read per token over the published
memory bandwidth.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np

from benchmarks import instructblip, llava, train_step
from lionjax.core import params as trees
from lionjax.planner import hlo_analysis, topologies

LLAVA_SHAPE = {"image": 336, "vision_width": 1024, "vision_depth": 24, "batch": 8, "prompt": 128, "target": 64}
SHAPES = {
    "lion_xl": dataclasses.replace(
        instructblip.SIZES,
        vision_width=1408,
        vision_depth=39,
        qformer_width=768,
        qformer_layers=12,
        language_width=2048,
        language_layers=24,
        batch=16,
        prompt=128,
        target=32,
    ),
    "nextchat_7b": llava.Sizes(
        language_width=4096, language_layers=32, head=128, vocab=32005, frozen_language=True, **LLAVA_SHAPE
    ),
    "1b": llava.Sizes(language_width=2048, language_layers=22, vocab=32000, **LLAVA_SHAPE),
}
TINY_PARTS = {"vision_width": 32, "vision_depth": 2, "language_width": 32, "language_layers": 2, "head": 16}
TINY_SHAPE = TINY_PARTS | {"image": 28, "vocab": 128, "batch": 4, "prompt": 8, "target": 8}
TINY = {
    "lion_xl": instructblip.Sizes(
        qformer_width=32, qformer_layers=2, queries=4, question_vocab=128, question=8, **TINY_SHAPE
    ),
    "nextchat_7b": llava.Sizes(frozen_language=True, **TINY_SHAPE),
    "1b": llava.Sizes(**TINY_SHAPE),
}
SIDES = ("torch", "lionjax")
RESULTS = Path(__file__).parent / "results" / "accelerator.md"
CLOSE = 1e-3  # relative tolerance of losses at tiny size
NO_TORCH = "torch or transformers is not installed"
NO_ROOM = ("out of memory", "resource_exhausted", "outofmemory")
WORDS = {"full": 128, "tiny": 33}  # tokens of the longer of the two timed answers


def arguments(argv=None) -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=10, help="timed updates, after two warm-up ones")
    parser.add_argument("--timeout", type=int, default=600, help="seconds per measurement")
    parser.add_argument("--write", action="store_true", help=f"write results/{RESULTS.name}")
    parser.add_argument(
        "--one", nargs=3, metavar=("WHAT", "SHAPE", "SIDE"), help="run a single measurement in this process"
    )
    return parser.parse_args(argv)


def main() -> None:
    """Run the measurements and print the table."""
    args = arguments()
    if args.one:
        print(json.dumps(guarded(args, *args.one)), flush=True)
        return
    results = {}
    for shape in args.shapes:
        for mode in ("train", "decode"):
            for side in args.sides:
                results[mode, shape, side] = result = measured(args, mode, shape, side)
                print(f"{mode} {shape} {side}: {result.get('failed') or format_result(result)}", file=sys.stderr)
    if args.size == "tiny":
        agree(results)
    text = "\n".join(tables(results))
    print(text)
    if args.write:
        RESULTS.write_text(report(args, results, text))


def measured(args, mode: str, shape: str, side: str) -> dict:
    """The result of one measurement in a subprocess; {"failed": reason} if it fails."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--size", args.size]
    command += ["--repeats", str(args.repeats), "--one", mode, shape, side]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {args.timeout} s"}
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        error_lines = process.stderr.strip().splitlines() or ["no word"]
        last = next((line for line in reversed(error_lines) if "Error" in line), error_lines[-1])
        return {"failed": f"ended with code {process.returncode}: {last[:200]}"}
    return json.loads(lines[-1])


def guarded(args, mode: str, shape: str, side: str) -> dict:
    """The result of one measurement in this process; {"failed": reason} if out of memory or without torch."""
    sizes = (TINY if args.size == "tiny" else SHAPES)[shape]
    if mode == "decode":
        sizes = dataclasses.replace(sizes, batch=1)
    functions = {
        ("train", "lionjax"): train_ours,
        ("train", "torch"): train_torch,
        ("decode", "lionjax"): decode_ours,
        ("decode", "torch"): decode_torch,
    }
    try:
        return functions[mode, side](args, sizes)
    except ImportError as error:
        if (error.name or "").split(".")[0] in ("torch", "transformers"):
            return {"failed": NO_TORCH}
        raise
    except Exception as error:  # XLA and torch have different out-of-memory errors
        if any(phrase in f"{type(error).__name__} {error}".lower() for phrase in NO_ROOM):
            return {"failed": "does not fit into memory"}
        raise


def ours(s, same_weights: bool):
    """(model, parameters on the device): transformers' random weights, or own ones with frozen ones in bfloat16."""
    import flax.linen as nn
    import jax

    peer = train_step.peer_of(s)
    if same_weights:
        jax.config.update("jax_default_matmul_precision", "highest")
        with contextlib.suppress(ImportError):
            import torch  # noqa: F401

            model, params = peer.ours_of(s, peer.torch_model(s))
            return model, jax.device_put(params)
    model = peer.system_of(s)
    model = model if same_weights else dataclasses.replace(model, dtype="bfloat16")
    trainable_patterns = peer.learned(s)

    def init_params(key):
        params = nn.unbox(model.init(key, jax.tree.map(np.zeros_like, peer.batch_of(s))))
        if same_weights:
            return params
        trainable, frozen = trees.split(params, trainable_patterns)
        return trees.merge(trainable, trees.cast(frozen, "bfloat16"))

    return model, jax.jit(init_params)(jax.random.key(0))


def train_ours(args, s) -> dict:
    """Time lionjax's train step."""
    import jax

    from lionjax.core import sharding

    model, params = ours(s, args.size == "tiny")
    batch = train_step.peer_of(s).batch_of(s)
    flops = flops_of(s, model, params, batch)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    step, compile_seconds = train_step.update_of(s, model, params, sharding.shard_batch(batch, mesh), mesh)
    del params
    kind = jax.devices()[0].device_kind
    return timed(step, args.repeats) | {
        "compile": compile_seconds,
        "flops": flops,
        "tokens": tokens_of(s, batch),
        "device": kind,
    }


def flops_of(s, system, params, batch) -> float:
    """Matrix-product FLOPs of one update, traced in float32 with reference attention (kernels' FLOPs are invisible)."""
    import jax

    plain = dataclasses.replace(system, dtype="float32")
    shapes = jax.eval_shape(lambda x: trees.cast(x, "float32"), params)
    trainable, frozen = trees.split(shapes, train_step.peer_of(s).learned(s))

    def gradients(trainable, frozen, batch):
        loss = lambda t: plain.loss(trees.merge(t, frozen), batch)[0]  # noqa: E731
        return jax.grad(loss)(trainable)

    return hlo_analysis.jaxpr_flops(jax.make_jaxpr(gradients)(trainable, frozen, batch).jaxpr)


def tokens_of(s, batch) -> int:
    """Tokens of the language model in one update: prompt, image and target tokens."""
    image_tokens = s.words if isinstance(s, llava.Sizes) else s.queries
    return int(batch.prompt_mask_BL.sum() + batch.target_mask_BM.sum()) + image_tokens * s.batch


def decode_ours(args, s) -> dict:
    """Time lionjax's decoding of one prompt."""
    import jax

    from lionjax.inference.generate import GenerationConfig, generate

    model, params = ours(s, args.size == "tiny")
    params = trees.cast(params, model.dtype)
    start = 0 if isinstance(s, instructblip.Sizes) else None
    batch = jax.device_put(train_step.peer_of(s).batch_of(s))

    def answer(num_tokens: int):
        config = GenerationConfig(
            max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=0, decoder_start_token_id=start
        )
        return np.asarray(generate(model, params, batch, config).ids_BM)

    result = rate(answer, args)
    flat = trees.flatten(params)
    bytes_read = sum(leaf.nbytes for path, leaf in flat.items() if read_for_a_token(path))
    return result | {"bytes": bytes_read, "device": jax.devices()[0].device_kind}


def read_for_a_token(path: str) -> bool:
    """Whether decoding a token reads the whole parameter: not vision tower, encoder and token embedding."""
    return path.startswith("language/") and not path.startswith(("language/encoder/", "language/embedding/"))


def theirs(s, same_weights: bool):
    """(model, inputs, device) in torch: in float32, or initialized on the device with frozen weights in bfloat16."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = train_step.peer_of(s)
    with torch.device("cpu" if same_weights else device):
        model = peer.torch_model(s).to(device)
    if not same_weights:
        for weight in model.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(torch.bfloat16)
    return model, {name: x.to(device) for name, x in peer.torch_batch(s).items()}, device


def half(device: str, same_weights: bool):
    """A bfloat16 autocast context; none with `same_weights`."""
    import torch

    return contextlib.nullcontext() if same_weights else torch.autocast(device, torch.bfloat16)


def train_torch(args, s) -> dict:
    """Time transformers' train step."""
    import torch

    tiny = args.size == "tiny"
    model, inputs, device = theirs(s, tiny)
    peer = train_step.peer_of(s)
    optimizer = peer.torch_optimizer(model, train_step.RATE, train_step.DECAY)
    trainable = [weight for weight in model.parameters() if weight.requires_grad]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with half(device, tiny):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, train_step.CLIP)
        optimizer.step()
        return loss.item()

    return timed(step, args.repeats) | {"version": torch.__version__}


def decode_torch(args, s) -> dict:
    """Time transformers' decoding of one prompt."""
    import torch

    tiny = args.size == "tiny"
    model, inputs, _ = theirs(s, tiny)
    model = (model if tiny else model.to(torch.bfloat16)).eval()
    if isinstance(s, llava.Sizes):
        inputs = {n: x.to(model.device) for n, x in train_step.peer_of(s).torch_batch(s, False).items()}
    inputs.pop("labels", None)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)

    def answer(num_tokens: int):
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                eos_token_id=None,
                pad_token_id=0,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
            )
        return ids[:, -num_tokens:].cpu().numpy()

    return rate(answer, args)


def timed(step, repeats: int) -> dict:
    """{"losses", "seconds": median of an update, which waits for its loss}."""
    losses, seconds = [step(), step()], []
    for _ in range(repeats):
        start_time = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start_time)
    return {"losses": losses, "seconds": statistics.median(seconds)}


def rate(answer, args) -> dict:
    """{"ids", "rate": decode tokens/s without prefill}, from the time of a long answer minus that of a short one.

    The rate is None if the difference is below 10 % of the total, as on a busy machine.
    """
    long, seconds = WORDS[args.size], {}
    for num_tokens in (2, long):
        ids = answer(num_tokens)
        times = []
        for _ in range(max(3, args.repeats // 3)):
            start_time = time.perf_counter()
            answer(num_tokens)
            times.append(time.perf_counter() - start_time)
        seconds[num_tokens] = min(times)
    difference = seconds[long] - seconds[2]
    return {"ids": ids.tolist(), "rate": (long - 2) / difference if difference > 0.1 * seconds[long] else None}


def format_result(result: dict) -> str:
    """A result in a few words."""
    if "seconds" in result:
        return f"{1e3 * result['seconds']:.1f} ms"
    return f"{result['rate']:.1f} tokens/s" if result["rate"] else "too short to time"


def agree(results: dict) -> None:
    """Raise AssertionError if both sides have results whose losses or generated ids differ."""
    for (mode, shape, side), result in results.items():
        other = results.get((mode, shape, "torch"), {})
        if side == "torch" or "failed" in result or "failed" in other or not other:
            continue
        if mode == "train":
            np.testing.assert_allclose(result["losses"], other["losses"], rtol=CLOSE, err_msg=shape)
        else:
            np.testing.assert_array_equal(result["ids"], other["ids"], err_msg=shape)


def tables(results: dict) -> list[str]:
    """All results as the lines of one Markdown table."""
    kind = next((result["device"] for result in results.values() if "device" in result), "unknown")
    peak = topologies.peak_rates(kind)
    lines = [
        "| shape | side | train, tokens/s | ms | MFU | vs. torch | decode, tokens/s | of the limit | vs. torch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in dict.fromkeys(shape for _, shape, _ in results):
        train, decode = (
            {side: results[mode, shape, side] for side in SIDES if (mode, shape, side) in results}
            for mode in ("train", "decode")
        )
        reference = train.get("lionjax", {})
        for side in train:
            cells = train_cells(train, side, reference, peak) + decode_cells(decode, side, peak)
            lines.append(f"| {shape} | {side} | {' | '.join(cells)} |")
    return lines


def train_cells(train: dict, side: str, counted: dict, peak) -> list[str]:
    """The training columns of one side."""
    result, other = train[side], train.get("torch", {})
    if "failed" in result:
        return [result["failed"], "-", "-", "-"]
    seconds = result["seconds"]
    speed = f"{counted['tokens'] / seconds:,.0f}" if "tokens" in counted else "-"
    mfu = "-"
    if peak and "flops" in counted:
        mfu = f"{counted['flops'] / seconds / peak[0] / 1e12:.1%}"
    ratio = f"{other['seconds'] / seconds:.2f}x" if "seconds" in other else "-"
    return [speed, f"{1e3 * seconds:.1f}", mfu, ratio]


def decode_cells(decode: dict, side: str, peak) -> list[str]:
    """The decoding columns of one side."""
    result, other = decode[side], decode.get("torch", {})
    if "failed" in result:
        return [result["failed"], "-", "-"]
    if not result["rate"]:
        return ["too short to time", "-", "-"]
    bytes_read = decode.get("lionjax", {}).get("bytes")
    of_limit = f"{result['rate'] * bytes_read / (peak[1] * 1e9):.1%}" if peak and bytes_read else "-"
    ratio = f"{result['rate'] / other['rate']:.2f}x" if other.get("rate") else "-"
    return [f"{result['rate']:.1f}", of_limit, ratio]


def report(args, results: dict, table: str) -> str:
    """The page for benchmarks/results."""
    kind = next((result["device"] for result in results.values() if "device" in result), "unknown")
    version = next((result["version"] for result in results.values() if "version" in result), "none")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    command = " ".join(["python -m benchmarks.accelerator", *sys.argv[1:]])
    proof = (
        "This is not a measurement of an accelerator: tiny float32 models check that the program runs, and that losses "
        "and tokens of both sides agree. The speeds are meaningless.\n\n"
        if args.size == "tiny"
        else ""
    )
    return (
        f"# One accelerator against transformers\n\n{proof}Device: {kind}. Date: {datetime.date.today()}. "
        f"Commit: {commit or 'unknown'}. Peer: torch {version}.\n\n`{command}`\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
