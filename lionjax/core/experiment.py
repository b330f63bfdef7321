# SPDX-License-Identifier: Apache-2.0
"""The `Experiment` config: model, data, training stages, run, mesh and generation settings as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lionjax.core.errors import UserError, check_dtype, check_finite, check_ranges
from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import MeshConfig

Scalar = bool | int | float | str | None


@dataclasses.dataclass(frozen=True)
class Mix:
    """One entry of a training mixture: a task of the data sources, and its weight among the entries.

    `source` limits it to one data source. `template` "plain" omits the question, "told" replaces the image of a
    synthetic scene by its description. `boxes` overrides the processor's box format ("digits", "bins", "embeddings",
    "masks").
    `shots`: so many other examples, each with its image, before the one that is learned. `group`: a batch holds entries
    of one group only; the groups of a mixture take turns, batch by batch, and weights count within a group.
    """

    task: str
    weight: float = 1.0
    source: str = ""
    template: str = ""
    boxes: str = ""
    shots: int = 0
    group: str = ""

    def __post_init__(self):
        where = f"mixture entry {self.task!r}: "
        check_finite(self, where)
        check_ranges(self, where, shots=">= 0")

    @classmethod
    def from_words(cls, spec: str, weight: float | str = 1.0) -> Mix:
        """From the command line's form, such as "coco/vqa+2@plain", and a weight. Raises UserError for others."""
        name, _, style = str(spec).partition("@")
        name, plus, shots = name.partition("+")
        source, _, task = name.rpartition("/")
        if plus and not shots.isdigit():
            raise UserError(f"mixture entry {spec!r} needs a number of examples after its plus sign, such as vqa+2")
        if style and style not in (*MIX_TEMPLATES, *MIX_BOXES):
            choices = ", ".join((*MIX_BOXES, *MIX_TEMPLATES))
            raise UserError(f"mixture entry {spec!r} has the unknown suffix {style!r}; choose one of {choices}")
        boxes = style if style in MIX_BOXES else ""
        return cls(task, float(weight), source, style if not boxes else "", boxes, int(shots or 0))

    @property
    def spec(self) -> str:
        """The form of the command line, without the weight."""
        source, style = self.source and f"{self.source}/", self.template or self.boxes
        return f"{source}{self.task}{f'+{self.shots}' if self.shots else ''}{f'@{style}' if style else ''}"

    def __iter__(self):
        return iter((self.spec, self.weight))

    def __getitem__(self, index: int):
        return tuple(self)[index]


MIX_TEMPLATES, MIX_BOXES = ("plain", "told"), ("digits", "bins", "embeddings", "masks")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Initial weights of one part of a model: a path prefix in the parameters, and a safetensors file.

    `file` "shipped:NAME" comes with the package. `key`: the part's path in the file, where that is another.
    """

    part: str
    file: str
    key: str = ""

    @classmethod
    def from_words(cls, part: str, file: str) -> Weights:
        """From a prefix and "FILE" or "FILE#KEY"."""
        path, _, key = file.partition("#")
        return cls(part, path, key)

    def __iter__(self):
        return iter((self.part, f"{self.file}#{self.key}" if self.key else self.file))

    def __getitem__(self, index: int):
        return tuple(self)[index]


def parse_entries(entries, kind: type) -> tuple:
    """The entries of a mixture or of weights as values of `kind`; pairs of strings are parsed by `from_words`."""
    return tuple(entry if isinstance(entry, kind) else kind.from_words(*entry) for entry in entries)


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage: trainable parameters, data mixture, number of steps and optimizer settings.

    - `trainable`, `lr_multipliers`: path patterns as in `params.matches`; the learning rate of a parameter is
      multiplied by the factor of the first pattern that matches its path.
    - `mixture`: `Mix` entries, or (spec, weight) pairs as on the command line.
    - `batch_size`: examples in one update over all devices, processed in `grad_accum_steps` equal parts.
    - `examples_per_row`: so many examples share one row of the language model (sequence packing), each seen by itself
      alone, so that little of a row is padding; a batch then has `batch_size` / `examples_per_row` rows.
    - `learning_rate`: reached from `warmup_learning_rate` in `warmup_steps`, then cosine decay to `end_learning_rate`.
    - `decay`: "linear" in place of the cosine.
    - `steps_per_epoch`: with a number, the cosine counts from the stage's first step and moves once in so many steps
      (LAVIS); 0: it moves every step and counts from the end of the warm-up.
    - `optimizer`: "adamw", or "muon" for the matrices of hidden layers (arXiv 2502.16982) and AdamW for all others;
      Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both.
    - `moment_dtype`: of the first moments of AdamW. `second_moment`: "full", or "factored" into one number for each
      row and column of a matrix (Adafactor, arXiv 1804.04235). Both save memory: of the 12 bytes that AdamW keeps for
      a parameter in float32, bfloat16 saves 2 and factors save 4. Muon's moments of matrices are not concerned.
    - `model_overrides`: fields of the model config replaced in this stage, such as ("visual_input", "QFORMER").
    - `init_from`: start from the weights of the previous stage, or from scratch.

    Raises UserError for numbers out of their range, and if `grad_accum_steps` does not divide `batch_size`.
    """

    name: str
    steps: int
    trainable: tuple[str, ...]
    mixture: tuple[Mix, ...]
    batch_size: int
    grad_accum_steps: int = 1
    learning_rate: float = 1e-5
    warmup_steps: int = 1000
    warmup_learning_rate: float = 1e-8
    end_learning_rate: float = 0.0
    steps_per_epoch: int = 0
    weight_decay: float = 0.05
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW, also in a stage with Muon
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    second_moment: Literal["full", "factored"] = "full"
    clip_norm: float = 1.0
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    model_overrides: tuple[tuple[str, Scalar], ...] = ()
    init_from: Literal["previous", "scratch"] = "previous"
    decay: Literal["cosine", "linear"] = "cosine"
    examples_per_row: int = 1

    def __post_init__(self):
        object.__setattr__(self, "mixture", parse_entries(self.mixture, Mix))
        for field in ("batch_size", "grad_accum_steps", "examples_per_row"):
            value = getattr(self, field)
            if value < 1:
                raise UserError(f"stage {self.name!r}: {field} is {value}; it must be at least 1")
        rates = ("learning_rate", "warmup_learning_rate", "end_learning_rate", "weight_decay", "clip_norm")
        not_negative = dict.fromkeys(("steps", "warmup_steps", "steps_per_epoch", *rates, "lr_multipliers"), ">= 0")
        check_ranges(self, f"stage {self.name!r}: ", **not_negative, betas=">= 0 and < 1")
        if self.batch_size % self.grad_accum_steps:
            raise UserError(
                f"stage {self.name!r}: batch_size is {self.batch_size}; it must be a multiple of "
                f"grad_accum_steps={self.grad_accum_steps}"
            )
        if self.batch_size % (self.grad_accum_steps * self.examples_per_row):
            raise UserError(
                f"stage {self.name!r}: batch_size is {self.batch_size}; it must be a multiple of examples_per_row="
                f"{self.examples_per_row} times grad_accum_steps={self.grad_accum_steps}"
            )

    @property
    def num_rows(self) -> int:
        """Rows of the language model in one update."""
        return self.batch_size // self.examples_per_row


TRACKERS = ("tensorboard", "wandb", "mlflow")


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings of a run: intervals in steps (updates), checkpoints, feature cache, failure handling."""

    log_every: int = 10
    save_every: int = 1000
    evaluate_every: int = 0  # 0: only at the end of a stage
    evaluate_limit: int = 200  # questions of each benchmark after the last stage; 0: no benchmarks
    evaluate_stages: bool = False  # run the benchmarks after every other stage as well, to show what each one changed
    # Held-out questions that are answered and drawn for the trackers every `evaluate_every` updates and at the end of
    # each stage; 0: none.
    evaluate_pictures: int = 0
    trackers: tuple[str, ...] = ("tensorboard",)  # any of TRACKERS; TensorBoard only where tensorboardX is installed
    max_to_keep: int = 3  # latest checkpoints on disk, besides the best one of the current stage
    frozen_dtype: str = "bfloat16"  # of frozen parameters
    cache_features: bool = False  # cache the frozen towers' output of each record, so that they run once
    feature_cache_gib: float = 4.0  # memory of that cache on each host, in GiB
    feature_cache_dir: str = ""  # a folder that stores the cache on disk for restarts and other runs; "": none
    # A bad step (loss or gradient not finite, or a loss spike) leaves the parameters unchanged. Then the run stops,
    # skips the batch, or restores the last checkpoint and continues with the batches after the bad one.
    on_bad_step: Literal["stop", "skip", "rewind"] = "stop"
    loss_spike_sigmas: float = 0.0  # a loss this many deviations above the mean of the last 128 is a spike; 0: off
    max_bad_steps: int = 20  # the run stops at this many bad steps in one stage
    # A step that takes longer than this (ten times this while it compiles) ends the process; 0: no watchdog.
    watchdog_seconds: float = 1800.0

    def __post_init__(self):
        limits = ("log_every", "save_every", "evaluate_every", "evaluate_limit", "max_to_keep", "max_bad_steps")
        amounts = ("feature_cache_gib", "loss_spike_sigmas", "watchdog_seconds", "evaluate_pictures")
        check_ranges(self, "run.", **dict.fromkeys((*limits, *amounts), ">= 0"))
        for name in self.trackers:
            if name not in TRACKERS:
                raise UserError(f"run.trackers has {name!r}; choose from {', '.join(TRACKERS)}")
        check_dtype(self, "frozen_dtype", "run.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How tokens are chosen, named as in Hugging Face's GenerationConfig. Raises UserError for a value out of range."""

    num_beams: int = 1
    length_penalty: float = 1.0  # beams are ranked by score / length ** length_penalty; above 0 favors long ones
    repetition_penalty: float = 1.0  # above 1 makes tokens already generated less likely
    do_sample: bool = False  # sample instead of argmax; temperature, top_k and top_p apply only then
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    penalize_prompt: bool = False  # the repetition penalty counts the prompt's tokens too

    def __post_init__(self):
        check_finite(self, "generation.")
        ranges = {"num_beams": ">= 1", "repetition_penalty": "> 0", "top_k": ">= 0", "top_p": "> 0 and <= 1"}
        check_ranges(self, "generation.", **ranges)


@renamed_fields(beams="num_beams")
@dataclasses.dataclass(frozen=True)
class GenerationDefaults(DecodingConfig):
    """Generation settings of an experiment; the processor and the prompt decide what is unset.

    `inference.engine.make_generation_config` makes the `GenerationConfig` of a prompt. `repetition_penalty` does not
    apply to region-level prompts, because digits of boxes repeat, unless `penalize_boxes` is set, as in Hugging Face's
    `generate`. `max_new_tokens` 0: the maximum answer length of training. `eos_token_id`: one or several;
    None: the end token of the tokenizer; `pad_token_id` likewise. `decoder_start_token_id` None: 0 for an
    encoder-decoder.
    """

    max_new_tokens: int = 0
    min_new_tokens: int = 0
    penalize_boxes: bool = False
    eos_token_id: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self):
        super().__post_init__()
        not_negative = ("max_new_tokens", "min_new_tokens", "temperature", "pad_token_id")
        check_ranges(self, "generation.", **dict.fromkeys(not_negative, ">= 0"))


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class Experiment:
    """The whole config of a run.

    `weights`: safetensors files to initialize parts of the model from; pairs (part, "FILE" or "FILE#KEY") are accepted.
    """

    name: str
    model: object  # a VLM config, such as models.vlm.lion.Lion
    data: object  # a data config, such as data.config.DataConfig
    stages: tuple[Stage, ...]
    run: RunConfig = RunConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    weights: tuple[Weights, ...] = ()
    generation: GenerationDefaults = GenerationDefaults()

    def __post_init__(self):
        object.__setattr__(self, "weights", parse_entries(self.weights, Weights))
        check_ranges(self, seed=f">= 0 and < {2**32}")  # what both jax.random.key and NumPy's SeedSequence take
        if dataclasses.is_dataclass(self.model):
            check_model_fields(self.model)
        # The processor's fields that depend on the model are derived from it, so that they are set in one place.
        for_model = getattr(self.data, "for_model", None)
        if for_model is not None:
            object.__setattr__(self, "data", for_model(self.model.info))


def check_model_fields(config: object, where: str = "model.") -> None:
    """Raise UserError for a model config with a number that is not finite, an unknown dtype or a bad dropout rate.

    Nested configs are checked too.
    """
    check_finite(config, where)
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            check_model_fields(value, f"{where}{name}.")
        elif name == "dtype":
            check_dtype(config, name, where)
        elif name in ("dropout", "dropout_rate", "drop_path_rate"):
            check_ranges(config, where, **{name: ">= 0 and < 1"})
