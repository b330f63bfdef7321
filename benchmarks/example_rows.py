# SPDX-License-Identifier: Apache-2.0
"""Padding of a language model's rows with one and with several examples in a row, and what a train step then takes.

python -m benchmarks.example_rows [--rows 10000] [--coco COCO_FOLDER] [--tokenizer FOLDER] [--repeats 5]

Rows in LLaVA's format are written from scenes: conversations of one to 16 rounds and long descriptions, a tenth of them
without an image. A LLaVA-1.5 (576 image tokens) and a tiny LLaVA (64) read them in batches. `padded`
has one example in a row, as long as the longest example; `buckets` the shortest of eight lengths for each batch. COCO's
rows are its captions, questions about objects and boxes in digits. With several processes each has its part of every
batch. Then a train step of the tiny LLaVA learns the same batches in both forms by turns; its processor time counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tyro
from PIL import Image

from lionjax.core import config, sharding
from lionjax.core import params as trees
from lionjax.core.experiment import Mix, Stage
from lionjax.core.prompt_formats import SYSTEM_FORMATS
from lionjax.core.types import Batch, RowLayout
from lionjax.data import pipeline
from lionjax.data.config import DataConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.example_rows import RowBatches, arrange_examples, array_lengths, count_row_tokens, example_lengths
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes import tasks, world
from lionjax.models.language.decoder import TINY_DECODER
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.visual_prefix import VisualPrefixLM
from lionjax.planner import hlo_analysis, plans
from lionjax.training import step as steps
from lionjax.training.init import make_param_specs
from lionjax.training.optimizer import make_optimizer

SCENES = 500  # pictures of all rows
TEXT_ONLY, LONG = 0.1, 0.15  # shares of the rows
QUESTIONS = ("vqa", "existence", "relation", "rec", "reg", "box_vqa")
MASKS = ("prompt_mask_BL", "target_mask_BM")
IMAGE_TOKEN = 21
TINY = VisualPrefixLM(TINY_VIT, TINY_DECODER, feature_layer=-1, image_token_id=IMAGE_TOKEN)
IMAGE_TOKENS = {"LLaVA-1.5": 576, "tiny LLaVA": TINY.tokens_per_image}
COCO_TASKS = (
    Mix("caption", 2.0),
    Mix("existence", 1.0),
    Mix("rec", 1.0, boxes="digits"),
    Mix("reg", 1.0, boxes="digits"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The data, the rows of a batch, and the number of timed turns."""

    rows: int = 10_000
    coco: str = ""  # a folder with captions.json, instances.json and images/; empty: none
    tokenizer: str = "tiny"
    batch: int = 128
    examples_per_row: tuple[int, ...] = (4, 8)
    processes: tuple[int, ...] = (1, 4, 8)
    step_batch: int = 16
    repeats: int = 5  # timed turns; 0: none


def rounds_of(scene: world.Scene, random: np.random.Generator) -> list[tuple[str, str]]:
    """Questions and answers about a scene: a long description, or one to 16 rounds, most of them few."""
    if random.random() < LONG:
        texts = [*tasks.scene_captions(scene), tasks.scene_to_text(scene, random)]
        parts = [texts[k] for k in random.integers(len(texts), size=random.integers(3, 16))]
        return [("Describe the image in detail.", ". ".join(parts) + ".")]
    examples = [
        tasks.make_example(QUESTIONS[random.integers(len(QUESTIONS))], scene, random)
        for _ in range(min(16, random.geometric(0.3)))
    ]
    return [(example.question, example.answer) for example in examples]


def write_rows(folder: Path, num_rows: int) -> Conversations:
    """Write `num_rows` rows in LLaVA's format and their pictures; returns them as a source."""
    scenes = [world.sample_scene("train", index) for index in range(SCENES)]
    for index, scene in enumerate(scenes):
        Image.fromarray(scene.render(TINY_VIT.image_size)).save(folder / f"{index}.png")
    random, rows = np.random.default_rng(0), []
    for number in range(num_rows):
        scene = scenes[number % SCENES]
        rounds = rounds_of(scene, random)
        row = {"id": number, "image": f"{number % SCENES}.png"}
        mark = "<image>\n"
        if random.random() < TEXT_ONLY:
            row.pop("image")
            mark = f"{tasks.scene_to_text(scene, random, with_boxes=False)}.\n"
        talk = [text for question, answer in rounds for text in (("human", question), ("gpt", answer))]
        talk[0] = ("human", mark + talk[0][1])
        rows.append(row | {"conversations": [{"from": role, "value": text} for role, text in talk]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return Conversations(str(folder / "rows.json"), str(folder), heldout_fraction=0.0)


def data_of(source, tokenizer: str) -> DataConfig:
    """The data config of a tiny LLaVA with LLaVA-1.5's prompt."""
    lengths = {"max_prompt_tokens": 512, "max_question_tokens": 1, "max_target_tokens": 2048}
    fields = {"use_tags": False, "reader": "decoder"} | lengths | SYSTEM_FORMATS["vicuna_v1"].processor
    processor = ProcessorConfig(TINY_VIT.image_size, tokenizer=tokenizer, **fields)
    return DataConfig((source,), dataclasses.replace(processor, image_token=IMAGE_TOKEN), num_threads=0)


def examples_of(data: DataConfig, mixture: tuple[Mix, ...], size: int, number: int) -> Iterator[Batch]:
    """The first `number` batches of `size` examples, as one process reads them."""
    stage = Stage("rows", 1, (".*",), mixture, size)
    stream = pipeline.batches(data, stage, 0, size)
    yield from itertools.islice(stream, number)
    stream.close()


def part(batch: Batch, index: int, count: int) -> Batch:
    """The part of a batch that process `index` of `count` reads."""
    size = len(batch.record_B) // count
    return jax.tree.map(lambda x: x[index * size : (index + 1) * size], batch)


def packed_shape(batch: Batch, layout: RowLayout, examples_per_row: int, processes: int) -> tuple[int, ...]:
    """(rows, their length, that of their targets) of a batch whose parts the processes pack."""
    parts = [part(batch, index, processes) for index in range(processes)]
    arranged = [arrange_examples(one, layout, examples_per_row) for one in parts]
    needed = max(one.row_tokens for one in arranged), max(one.target_tokens for one in arranged)
    return (len(batch.record_B) // examples_per_row, *array_lengths(*needed))


class Padding:
    """Tokens and positions of rows, by form."""

    def __init__(self):
        self.sums: dict[str, np.ndarray] = {}
        self.shapes: dict[str, set] = {}

    def add(self, form: str, tokens: int, positions: int, shape: tuple[int, ...]) -> None:
        self.sums[form] = self.sums.get(form, np.zeros(2, np.int64)) + (tokens, positions)
        self.shapes.setdefault(form, set()).add(shape)

    def lines(self, title: str) -> list[str]:
        return [
            f"| {title} | {form} | {100 * (1 - tokens / positions):.1f} % | {len(self.shapes[form])} |"
            for form, (tokens, positions) in self.sums.items()
        ]


def measure_padding(run: Run, name: str, batches: list[Batch]) -> list[str]:
    """Lines of a table: the share of padding of each form, and its number of compiled shapes."""
    lines = []
    for system, image_tokens in IMAGE_TOKENS.items():
        layout, padding = RowLayout(IMAGE_TOKEN, image_tokens), Padding()
        lengths = [example_lengths(batch, layout)[0] for batch in batches]
        longest = int(max(length_B.max() for length_B in lengths))
        buckets = [-(-longest * k // 8) for k in range(1, 9)]
        for batch, length_B in zip(batches, lengths):
            tokens, size = int(length_B.sum()), len(length_B)
            padding.add("padded", tokens, size * longest, (longest,))
            bucket = min(length for length in buckets if length >= length_B.max())
            padding.add("buckets", tokens, size * bucket, (bucket,))
            for per_row, processes in itertools.product(run.examples_per_row, run.processes):
                if size % (per_row * processes):
                    continue
                shape = packed_shape(batch, layout, per_row, processes)
                form = f"{per_row} examples a row, {processes} process{'es' * (processes > 1)}"
                padding.add(form, tokens, shape[0] * shape[1], shape)
        spread = f"{np.concatenate(lengths).mean():.0f} tokens a row, {min(x.min() for x in lengths)} to {longest}"
        lines += padding.lines(f"{name}, {system} ({spread})")
    return lines


def count_flops(run: Run, batches: list[Batch]) -> list[str]:
    """Lines of a table: FLOPs of an example in the second stage of LLaVA-1.5 7B, counted in the traced update.

    Packed rows have the median length of the batches, and no layer is rematerialized.
    """
    what = config.load("llava15_7b")
    what = dataclasses.replace(what, model=plans.with_remat(what.model, "none"))
    specs = make_param_specs(what, plans.dummy_batch(what), sharding.make_mesh(devices=jax.devices()[:1]))
    layout, lines, first = what.model.info.row_layout, [], 0.0
    as_llava = RowLayout(IMAGE_TOKEN, layout.tokens_per_image)
    for per_row in (1, *run.examples_per_row):
        length = statistics.median_high(packed_shape(batch, as_llava, per_row, 1)[1] for batch in batches)
        stage = dataclasses.replace(what.stages[1], examples_per_row=per_row)
        data = dataclasses.replace(what.data, length_buckets=() if per_row == 1 else (length,))
        changed = dataclasses.replace(what, data=data, stages=(what.stages[0], stage))
        target = plans.train_step_target(changed, 1, specs)
        traced = target.function.trace(*target.arguments)
        flops = hlo_analysis.jaxpr_flops(traced.jaxpr.jaxpr, 1) / stage.batch_size
        first = first or flops
        form = "1 example a row of 2048" if per_row == 1 else f"{per_row} examples a row of {length}"
        lines.append(f"| {form} | {flops / 1e12:.1f} | {first / flops:.2f}x |")
    return lines


def train_step(batch: Batch):
    """(a compiled update of the tiny LLaVA, its state, frozen parameters, the mesh)."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = sharding.init_sharded(TINY.init, jax.random.key(0), batch, mesh=mesh)
    stage = Stage("rows", 10, ("projector", "language"), (Mix("conversation"),), len(batch.record_B), warmup_steps=1)
    trainable, frozen = trees.split(params, stage.trainable)
    tx = make_optimizer(stage, trainable, {})
    state = steps.init_train_state(tx, trainable, mesh)
    return steps.make_train_step(TINY, stage, tx, jax.random.key(0), state, mesh, []), state, frozen


def measure_step(run: Run, batches: list[Batch]) -> list[str]:
    """Lines of a table: processor time of an example and tokens a second of a train step, by turns."""
    layout, per_row = TINY.info.row_layout, run.examples_per_row[0]
    prompt, target = (max(int(getattr(b, name).sum(1).max()) for b in batches) for name in MASKS)

    def padded(batch: Batch) -> Batch:  # to the longest texts of these batches
        lengths = {"prompt_BL": prompt, "target_BM": target, "loss_mask_BM": target} | dict(
            zip(MASKS, (prompt, target))
        )
        return dataclasses.replace(batch, **{name: getattr(batch, name)[:, :n] for name, n in lengths.items()})

    batches = list(map(padded, batches))
    tokens = sum(count_row_tokens(batch, layout)[0] for batch in batches)
    buckets = (max(packed_shape(b, layout, per_row, 1)[1] for b in batches),)
    forms = {
        "one example a row": batches,
        f"{per_row} examples a row": [next(RowBatches(iter([b]), layout, per_row, buckets)) for b in batches],
    }
    run_step, state, frozen = train_step(batches[0])
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for turn in range(run.repeats + 1):  # the first one compiles
        for form, group in forms.items():
            start = time.process_time()
            for batch in group:
                state, metrics = run_step(state, frozen, batch)
            jax.block_until_ready(metrics)
            if turn:
                seconds[form].append(time.process_time() - start)
    examples = sum(len(batch.record_B) for batch in batches)
    medians = {form: statistics.median(values) for form, values in seconds.items()}
    first = next(iter(medians.values()))
    return [
        f"| {form} | {1e3 * median / examples:.1f} | {tokens / median:.0f} | {first / median:.2f}x |"
        for form, median in medians.items()
    ]


def main(run: Run) -> None:
    """Prints the tables."""
    with tempfile.TemporaryDirectory() as name:
        source = write_rows(Path(name), run.rows)
        data, talks = data_of(source, run.tokenizer), (Mix("conversation"),)
        read = examples_of(data, talks, run.batch, run.rows // run.batch)
        batches = [dataclasses.replace(batch, image_BHWC=batch.image_BHWC[:, :1, :1].copy()) for batch in read]
        print("| rows | form | padding | shapes |\n|---|---|---|---|")
        print("\n".join(measure_padding(run, f"{run.rows} rows of scenes", batches)))
        print("\n| update of LLaVA-1.5 7B | TFLOP an example | |\n|---|---|---|")
        print("\n".join(count_flops(run, batches)))
        if run.coco:
            coco = data_of(Coco(run.coco, heldout_fraction=0.0), run.tokenizer)
            few = list(examples_of(coco, COCO_TASKS, run.batch, 8))
            print("\n".join(measure_padding(run, "photographs", few)))
        if run.repeats:
            print(
                "\n| train step of the tiny LLaVA | ms of processor time an example | tokens/s | |\n|---|---|---|---|"
            )
            print("\n".join(measure_step(run, list(examples_of(data, talks, run.step_batch, 2)))))


if __name__ == "__main__":
    main(tyro.cli(Run))
