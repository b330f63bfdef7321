# SPDX-License-Identifier: Apache-2.0
"""Speed of evaluation: questions/s of this checkout and of an earlier commit, in alternating turns, the same answers.

python -m benchmarks.answers RUN [--commit 1a7632d] [--questions 1000] [--turns 3]     # the tiny flagship's run folder
python -m benchmarks.answers RUN --int8 [--questions 1000] [--turns 3]                 # int8 weights against float32
python -m benchmarks.answers --peer [--rows 8] [--tokens 64] [--turns 5]               # against transformers, compiled

The first writes about 250 pictures of scenes as JPEG files and 1,000 questions about them (short answers, captions,
boxes), and lets `evaluation.runner` ask them, with the variants that the earlier commit asks too. Each side runs in a
process of its own, which compiles its programs on the first questions before it is timed. On a machine that others use
too, the CPU seconds are the figure. With `--int8` both sides are this checkout, one with int8 weights; the figures of
both are printed. The last generates answers of mixed lengths with a random LLaVA, against `generate` of transformers
with its static cache, compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
TASKS = {"vqa": 4, "existence": 2, "caption": 1, "rec": 1}  # questions about each picture, as far as it has them
SIZE = 480  # side of the pictures in pixels
# Paths and arguments that both versions have.
SIDE = """
import dataclasses, json, sys, time
import lionjax
from lionjax.core import config
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.evaluation import runner
run, file, folder, names, limit = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4].split(","), int(sys.argv[5])
read_fields = config._from_plain
def read_known_fields(tree, path):  # later fields of the run's config are at their defaults in the shipped configs
    kind = config._resolve_class(tree["class"], path)
    known = {"class", *(field.name for field in dataclasses.fields(kind))}
    return read_fields({key: value for key, value in tree.items() if key in known}, path)
config._from_plain = read_known_fields
model = lionjax.load(run, **json.loads(sys.argv[7]))
source = JsonLines(file, folder, name="questions", heldout_fraction=0)
data = dataclasses.replace(model.experiment.data, sources=(source,), on_bad_record="replace")
runner.train_examples = lambda *given: []  # the constant baseline is no answering
def ask(limit):
    entries, rows = [], {}
    start, cpu = time.perf_counter(), time.process_time()
    for name in names:
        from pathlib import Path
        out = Path(sys.argv[6])
        entries.append(runner.evaluate(model.engine, data, model.experiment.generation, name, out, limit))
        lines = (out / "evaluation" / f"{name}.jsonl").read_text().splitlines()
        rows[name] = [{k: v for k, v in json.loads(line).items() if k != "image"} for line in lines]
    return time.perf_counter() - start, time.process_time() - cpu, entries, rows
ask(limit)
seconds, cpu, entries, rows = ask(None)
metrics = {key: value for entry in entries for key, value in entry["metrics"].items()}
print(json.dumps([seconds, cpu, sum(entry["samples"] for entry in entries), rows, metrics]))
"""


def write_questions(folder: Path, count: int) -> Path:
    """A JSON Lines file with at least `count` questions about pictures in `folder`, those of one picture scattered."""
    import numpy as np

    from lionjax.data import images
    from lionjax.data.scenes.dataset import Scenes

    dataset, rows = Scenes(sizes=(8, 8, count), image_size=SIZE).open("heldout", 10**7), []
    rng = np.random.default_rng(0)
    for record in range(count):
        image, truth = dataset.load_record(record)
        name = f"{record:04d}.jpg"
        images.to_pil_image(image).save(folder / name, quality=92)
        for task, number in TASKS.items():
            for _ in range(number):
                example = dataset.make_example("reg" if task == "rec" else task, record, truth, rng, 0.0)
                row = {"image": name, "task": task}
                if task == "rec":
                    row |= {"expression": example.answer, "boxes": [example.question_boxes[0]]}
                else:
                    row |= {"question": example.question, "answer": example.answer}
                rows.append(row)
        if len(rows) >= count:
            break
    rows = [rows[k] for k in rng.permutation(len(rows))[:count]]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run_side(checkout: Path, args: argparse.Namespace, file: Path, out: Path, options: dict) -> list:
    """[seconds, CPU seconds, questions, {benchmark: lines of its answers}, metrics] of one side.

    `options`: of `lionjax.load`.
    """
    env = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    given = [str(args.run.resolve()), str(file), str(file.parent), ",".join(TASKS), str(args.warm_up), str(out)]
    given.append(json.dumps(options))
    made = subprocess.run([sys.executable, "-c", SIDE, *given], cwd=checkout, env=env, capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"{checkout} failed: {made.stderr[-800:]}")
    return json.loads(made.stdout.splitlines()[-1])


def differing_rows(before: dict, now: dict) -> int:
    """Number of questions to which some variant has another answer."""
    return sum(one != other for name in before for one, other in zip(before[name], now[name], strict=True))


def compare(args: argparse.Namespace, folder: Path, sides: dict[str, tuple[Path, dict]]) -> dict[str, dict]:
    """Print questions/s of two sides, {name: (checkout, options of `load`)}, and their ratio; returns their metrics.

    Also prints the number of questions with other answers.
    """
    rates: dict[str, list[float]] = {side: [] for side in sides}
    cpu_rates: dict[str, list[float]] = {side: [] for side in sides}
    file, rows, metrics = write_questions(folder, args.questions), {}, {}
    for turn in range(args.turns):
        for side in sides if turn % 2 == 0 else reversed(sides):
            checkout, options = sides[side]
            found = run_side(checkout, args, file, folder / "out" / side, options)
            seconds, cpu, count, rows[side], metrics[side] = found
            rates[side].append(count / seconds)
            cpu_rates[side].append(count / cpu)
            print(f"turn {turn + 1}, {side}: {count} questions, {seconds:.1f} s, {cpu:.1f} CPU s", flush=True)
    print(f"{differing_rows(*rows.values())} questions have another answer")
    print(f"| | {' | '.join(sides)} | ratio |\n|---|---|---|---|")
    for name, values in (("questions/s", rates), ("questions per CPU second", cpu_rates)):
        old, new = (statistics.median(values[side]) for side in sides)
        print(f"| {name} | {old:.1f} | {new:.1f} | {new / old:.2f} |")
    return metrics


def against_commit(args: argparse.Namespace) -> None:
    """Compare this checkout with an earlier commit."""
    with tempfile.TemporaryDirectory() as name:
        before = Path(name) / "before"
        subprocess.run(["git", "-C", HERE, "worktree", "add", "--quiet", "--detach", before, args.commit], check=True)
        try:
            compare(args, Path(name), {args.commit: (before, {}), "now": (HERE, {})})
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", before], check=True)


def against_float32(args: argparse.Namespace) -> None:
    """Compare int8 weights with float32, also by the metrics."""
    with tempfile.TemporaryDirectory() as name:
        metrics = compare(args, Path(name), {"float32": (HERE, {}), "int8": (HERE, {"int8": True})})
    for key, value in metrics["float32"].items():
        print(f"| {key} | {value:.4f} | {metrics['int8'][key]:.4f} | |")


def against_peer(args: argparse.Namespace) -> None:
    """Print tokens/s of a session and of transformers' `generate` with a compiled static cache, and their ratio."""
    import dataclasses

    import jax
    import numpy as np
    import torch

    from benchmarks import llava
    from lionjax.core import sharding
    from lionjax.inference.answer_request import AnswerRequest, SessionSizes
    from lionjax.inference.sampling import GenerationConfig
    from lionjax.inference.session import AnswerSession

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    sizes = dataclasses.replace(llava.SIZES, batch=args.prompts, prompt=48)
    theirs = llava.torch_model(sizes).eval()
    system, params = llava.ours_of(sizes, theirs)
    batch, params = jax.tree.map(np.asarray, llava.batch_of(sizes)), jax.device_put(params)
    limits = np.random.default_rng(0).integers(args.tokens // 8, args.tokens + 1, args.prompts)
    config = GenerationConfig(args.tokens, eos_token_id=-1, pad_token_id=0, decoder_start_token_id=None)

    def collate(rows, lengths, with_images):
        picked = jax.tree.map(lambda leaf: leaf[[int(row["number"]) for row in rows]], batch)
        fields = {f: getattr(picked, f)[:, : lengths[0]] for f in ("prompt_BL", "prompt_mask_BL")}
        return dataclasses.replace(picked, **fields, target_BM=picked.target_BM[:, :1])

    def row(number: int) -> dict:
        mask = batch.prompt_mask_BL[number]
        return {
            "number": np.int32(number),
            "prompt": batch.prompt_BL[number],
            "prompt_mask": mask,
            "question_mask": np.zeros(1, np.int32),
            "pixels": batch.image_BHWC[number],
        }

    length = batch.prompt_BL.shape[1]

    def ours() -> list[list[int]]:
        shapes = SessionSizes(args.rows, max(1, args.rows // 4), length, 1)
        session = AnswerSession(system, params, sharding.make_mesh(devices=jax.devices()[:1]), collate, config, shapes)
        requests = (AnswerRequest(row(k), max_new_tokens=int(limits[k])) for k in range(args.prompts))
        found = {one.request_id: one.output for one in session.run(requests)}
        return [found[k].ids_BM[0, : found[k].length_B[0]].tolist() for k in range(args.prompts)]

    inputs = llava.torch_batch(sizes, False)

    def peer() -> list[list[int]]:
        made = []
        for start in range(0, args.prompts, args.rows):
            part = {name: tensor[start : start + args.rows] for name, tensor in inputs.items()}
            longest = int(limits[start : start + args.rows].max())
            with torch.inference_mode():
                ids = theirs.generate(
                    **part,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    max_new_tokens=longest,
                    cache_implementation="static",
                )
            made += [one[-longest:][:limit].tolist() for one, limit in zip(ids, limits[start : start + args.rows])]
        return made

    torch._dynamo.config.recompile_limit = 64  # each batch has its own cache length; by default torch gives up at 8
    theirs.forward = torch.compile(theirs.forward, dynamic=False)
    same = sum(one == other for one, other in zip(ours(), peer()))
    seconds: dict[str, list[float]] = {"lionjax": [], "transformers": []}
    for _ in range(args.turns):
        for side, run in zip(seconds, (ours, peer)):
            start = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - start)
    mine, other = (statistics.median(times) for times in seconds.values())
    total = int(limits.sum())
    print(f"{args.prompts} prompts with pictures, {args.rows} at once, {cores} cores, {same} answers identical")
    print(f"lionjax {total / mine:,.0f} tokens/s, transformers (static cache, compiled) {total / other:,.0f}")
    print(f"ratio {other / mine:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run folder or a folder of weights")
    parser.add_argument("--commit", default="1a7632d", help="the earlier commit")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--warm-up", type=int, default=1000, help="questions of each task that compile the programs")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--int8", action="store_true", help="int8 weights against float32 instead")
    parser.add_argument("--peer", action="store_true", help="against transformers instead")
    parser.add_argument("--rows", type=int, default=8, help="--peer: rows per batch, and slots")
    parser.add_argument("--prompts", type=int, default=64, help="--peer: number of prompts")
    parser.add_argument("--tokens", type=int, default=64, help="--peer: most new tokens of an answer")
    args = parser.parse_args()
    if not args.peer and args.run is None:
        parser.error("give a run folder, or --peer")
    against_peer(args) if args.peer else against_float32(args) if args.int8 else against_commit(args)


if __name__ == "__main__":
    main()
