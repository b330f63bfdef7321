# SPDX-License-Identifier: Apache-2.0
"""A system and data so small that a stage compiles in a second, with all that the loop must cope with: a frozen tower,
stacked layers, dropout, and answers of unequal length. Also a program: `python toy.py WORKDIR [field=value ...]`."""

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from lionjax.core import bucket, files
from lionjax.core.experiment import Experiment, RunConfig, Stage
from lionjax.core.sharding import MeshConfig, with_logical_constraint, with_logical_partitioning
from lionjax.core.types import VLM, Batch, ModelInfo
from lionjax.nn import losses
from lionjax.nn.layers import Dense, Embed, LayerNorm, dropout

WIDTH, VOCAB, LENGTH, PIXELS = 16, 24, 4, 8


class Block(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x_BMD, key):
        change = Dense(WIDTH, WIDTH, ("embed", "mlp"), name="up")(LayerNorm(WIDTH, 1e-6, name="norm")(x_BMD))
        return with_logical_constraint(
            x_BMD + dropout(nn.relu(change), self.rate, key), "batch", "length", "act_embed"
        ), None


class ToyModule(nn.Module):
    c: "Toy"

    def setup(self):
        self.tower = Dense(PIXELS * PIXELS * 3, WIDTH, ("conv", "embed"))
        self.words = Embed(VOCAB, WIDTH)
        self.hint = self.param("hint", with_logical_partitioning(nn.initializers.normal(1.0), ("embed",)), (WIDTH,))
        scan = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.blocks = scan(self.c.rate)
        self.output = Dense(WIDTH, VOCAB, ("embed", "vocab"))

    def see(self, batch):
        if batch.features is not None:
            return batch.features
        return nn.relu(self.tower(batch.image_BHWC.reshape(batch.image_BHWC.shape[0], -1)))

    def __call__(self, batch, key):
        seen_BD = self.see(batch)
        asked_BD = self.words(batch.prompt_BL).mean(1) * self.c.attention
        start_BM = jnp.pad(batch.target_BM, ((0, 0), (1, 0)))[:, :-1]
        x_BMD = self.words(start_BM) + (seen_BD + asked_BD + self.hint)[:, None]
        keys = None if key is None else jax.random.split(key, 3)
        x_BMD, _ = self.blocks(x_BMD, keys)
        return self.output(x_BMD)


@dataclasses.dataclass(frozen=True)
class Toy(VLM):
    rate: float = 0.1
    attention: float = 1.0

    @property
    def info(self):
        return ModelInfo()

    def init(self, key, batch):
        return ToyModule(self).init(key, batch, None)["params"]

    def extract_features(self, params, batch):
        return ToyModule(self).apply({"params": params}, batch, method=ToyModule.see)

    def loss(self, params, batch, key=None):
        logits_BMV = ToyModule(self).apply({"params": params}, batch, key)
        return losses.token_cross_entropy(logits_BMV, batch.target_BM, batch.loss_mask_BM)


@dataclasses.dataclass(frozen=True)
class ToyData:
    records: int = 24
    poison: int = -1  # a record whose picture is NaN


class Batches:
    """Records in an order that depends on the seed and the stage alone; endless."""

    def __init__(self, data, stage, seed, batch_size, process_index, process_count):
        self.data, self.size = data, batch_size // process_count
        self.shard, self.shards = process_index, process_count
        self.seed, self.next = (seed, sum(map(ord, stage.name))), 0

    def __iter__(self):
        return self

    def __next__(self):
        rows = self.next + self.shard * self.size + np.arange(self.size)
        self.next += self.size * self.shards
        return batch_of([self.record(row) for row in rows], self.data.poison)

    def record(self, row):
        epoch, within = divmod(int(row), self.data.records)
        return int(np.random.default_rng((*self.seed, epoch)).permutation(self.data.records)[within])

    random_augmentation = False

    def name(self, record):
        return f"toy/{record}"

    def close(self):
        pass

    def position(self):
        return {"next": self.next}

    def restore(self, position):
        self.next = position["next"]


def batch_of(records, poison=-1):
    rows = [row_of(record, poison) for record in records]
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Batch(**fields, record_B=np.asarray(records, np.int32))


def row_of(record, poison):
    random = np.random.default_rng(record)
    image = random.normal(size=(PIXELS, PIXELS, 3)).astype(np.float32)
    ones, length = np.ones(LENGTH, np.int32), 1 + record % LENGTH
    return {
        "image_BHWC": image * np.nan if record == poison else image,
        "prompt_BL": random.integers(0, VOCAB, LENGTH).astype(np.int32),
        "prompt_mask_BL": ones,
        "question_BL": ones,
        "question_mask_BL": ones,
        "target_BM": random.integers(0, VOCAB, LENGTH).astype(np.int32),
        "target_mask_BM": (np.arange(LENGTH) < length).astype(np.int32),
        "loss_mask_BM": (np.arange(LENGTH) < length).astype(np.int32),
        "task_B": np.int32(record % 2),
    }


def stage(name="one", steps=6, trainable=("blocks", "output"), **changes):
    fields = dict(batch_size=8, grad_accum_steps=2, learning_rate=1e-2, warmup_steps=2, warmup_learning_rate=1e-3)
    return Stage(name, steps, tuple(trainable), (("toy", 1.0),), **(fields | changes))


def experiment(*stages, run=None, **changes):
    both = (stage("one"), stage("two", 5, ("hint", "blocks/up", "words"), system=(("attention", 0.5),)))
    run = RunConfig(**(dict(log_every=1, save_every=2) | (run or {})))
    return Experiment("toy", Toy(), ToyData(), stages or both, run, **changes)


# Configs hold dataclasses of the package alone; for these tests the toy belongs to it.
sys.modules["lionjax.toy"] = sys.modules[__name__]
Toy.__module__ = ToyData.__module__ = "lionjax.toy"

# The same few programs are compiled by many tests and by the processes that they start.
jax.config.update("jax_compilation_cache_dir", f"{tempfile.gettempdir()}/lionjax-tests-{os.getuid()}")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
compilation_cache.reset_cache()


def lines(workdir):
    """The lines of metrics.jsonl without what the clock decides."""
    text = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    clocks = ("seconds", "images_per_second", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in text]


def witnessed(workdir, hang, pause):
    """Batches that take a while and write down what they deliver; the second process waits for ever at one of them."""

    class Witnessed(Batches):
        def __next__(self):
            place, stage = self.next, self.seed[1]
            if place // (self.size * self.shards) == hang and self.shard == 1:
                time.sleep(3600)
            time.sleep(pause)
            batch = super().__next__()
            line = [stage, place + self.shard * self.size, batch.record_B.tolist()]
            if not bucket.is_bucket_name(workdir):
                files.append_jsonl(Path(workdir) / "seen.jsonl", line)
            return batch

    return Witnessed


def main():
    """Train in a folder and print what came out. Fields: steps, mesh, poison, hang, pause, RunConfig's."""
    workdir, fields = sys.argv[1], dict(word.split("=") for word in sys.argv[2:])
    steps = int(fields.get("steps", 6))
    mesh = MeshConfig(*map(int, fields.get("mesh", "-1,1,1").split(",")))
    stages = (stage("one", steps), stage("two", steps, ("hint", "blocks/up", "words")))
    data = ToyData(poison=int(fields.get("poison", -1)))
    run = {f.name: fields[f.name] for f in dataclasses.fields(RunConfig) if f.name in fields}
    run = {name: value if name == "on_bad_update" else float(value) for name, value in run.items()}
    run["save_every"] = int(run.get("save_every", 2))
    what = experiment(*stages, run=run, mesh=mesh)
    batches = witnessed(workdir, int(fields.get("hang", -1)), float(fields.get("pause", 0)))
    params, report = loop.train(dataclasses.replace(what, data=data), workdir, batches)
    found = {"params": checkpoint.leaf_checksums(params), "scalars": trees.count_params(params)}
    if distributed.is_main_process():
        print(json.dumps(found))


if __name__ == "__main__":
    from lionjax.cli.errors import describe_error
    from lionjax.core import params as trees
    from lionjax.training import checkpoint, distributed, loop

    try:
        with distributed.distributed_session(describe_error):
            main()
    except (Exception, KeyboardInterrupt) as error:
        sentence, code = describe_error(error)
        print(sentence, file=sys.stderr)
        sys.exit(code)
