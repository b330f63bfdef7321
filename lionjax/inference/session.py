# SPDX-License-Identifier: Apache-2.0
"""A session of answering: requests in, tokens and answers out; requests may be added and canceled while it runs.

`AnswerSession` is the loop behind all that asks many questions: it fills free slots with waiting prompts, generates
until slots are free, and hands out what has ended. Identical greedy requests are answered once, and an image that
several requests show is encoded once. The answers of a request do not depend on the others.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax.core import sharding
from lionjax.core.types import VLM, Batch, Params, UserError
from lionjax.inference import slots as programs
from lionjax.inference.image_pool import Collate, EncodedExample, ImagePool, ImagePools
from lionjax.inference.sampling import GenerateOutput, GenerationConfig, RowSampling, aux_outputs, row_keys
from lionjax.inference.slots import Admission, Slots

LOOK_AHEAD = 8  # admissions' worth of waiting requests from which rows of like length are chosen
KEPT_OUTPUTS = 8192  # of the newest requests, for identical ones
BLANKED = ("image_BHWC", "sam_image_BHWC", "region_BKD", "state_BKS", "object_mask_BKHW")  # without an image
UNREAD_FIELDS = ("sam", "target", "target_mask", "loss_mask", "num_cut", "size")  # of a row, while text is generated


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerRequest:
    """One question. `seed`: of its sampling; `max_new_tokens`: at most that of the session's settings, None: all.

    `temperature` (0: greedy) and `top_p` are read in a session with `GenerationConfig.row_sampling`.
    """

    row: EncodedExample
    seed: int = 0
    image_blind: bool = False
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0

    @functools.cached_property
    def image_digest(self) -> bytes:
        """A hash of the pixels; empty for the blank image."""
        return b"" if self.image_blind else _hash(self.row["pixels"])

    def digest(self, is_greedy: bool) -> bytes:
        """A hash of all that decides the answer, which is not the seed in greedy decoding."""
        texts = [self.row[name] for name in sorted(self.row) if name not in (*UNREAD_FIELDS, "pixels")]
        settings = (self.image_blind, self.max_new_tokens)
        settings += () if is_greedy else (self.seed, self.temperature, self.top_p)
        return _hash(*texts) + self.image_digest + repr(settings).encode()

    @functools.cached_property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.row["prompt_mask"].sum())

    @functools.cached_property
    def question_length(self) -> int:
        """Tokens of the question that a Q-Former reads."""
        return int(self.row["question_mask"].sum())


def _hash(*arrays: np.ndarray) -> bytes:
    hashed = hashlib.blake2b(digest_size=16)
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.digest()


@dataclasses.dataclass(frozen=True, eq=False)
class Finished:
    """What was generated for a request: `output` has one row."""

    request_id: int
    request: AnswerRequest
    output: GenerateOutput


@dataclasses.dataclass(frozen=True)
class SessionSizes:
    """Fixed shapes of a session. `num_slots` and `admission_rows` are multiples of the batch shards of the mesh.

    `prompt_length`, `question_length`: longest texts; `short_lengths`: shorter prompt lengths that have a program too.
    """

    num_slots: int
    admission_rows: int
    prompt_length: int
    question_length: int
    short_lengths: tuple[int, ...] = ()

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """All padded prompt lengths."""
        return *self.short_lengths, self.prompt_length

    def padded_length(self, length: int) -> int:
        """The shortest padded prompt length that holds `length` tokens."""
        return min(size for size in self.prompt_lengths if size >= length)

    def hold(self, request: AnswerRequest) -> bool:
        """Whether the texts of a request fit."""
        return request.length <= self.prompt_length and request.question_length <= self.question_length

    def grown_for(self, request: AnswerRequest) -> SessionSizes:
        """Sizes with lengths doubled until a request fits, at most to the lengths of its arrays."""
        prompt, question = self.prompt_length, self.question_length
        while prompt < request.length:
            prompt = min(2 * prompt, len(request.row["prompt"]))
        while question < request.question_length:
            question = min(2 * question, len(request.row["question"]))
        return dataclasses.replace(self, prompt_length=prompt, question_length=question)


class AnswerSession:
    """Generates answers to requests of one `GenerationConfig`, without beams, in slots of fixed shapes.

    All processes of a mesh must add the same requests in the same order and call `advance` together. `pools`: of images
    that other sessions with the same parameters encode, too.
    """

    def __init__(
        self,
        model: VLM,
        params: Params,
        mesh: Mesh,
        collate: Collate,
        config: GenerationConfig,
        sizes: SessionSizes,
        pools: ImagePools | None = None,
    ):
        self.model, self.params, self.mesh, self.collate = model, params, mesh, collate
        self.config, self.sizes = config, sizes
        self.num_tokens, self.num_kept = 0, KEPT_OUTPUTS
        axes = sharding.LOGICAL_AXIS_RULES["batch"]
        self._groups = int(np.prod([mesh.shape[axis] for axis in axes]))
        if sizes.num_slots % self._groups or sizes.admission_rows % self._groups:
            raise ValueError(f"{sizes} does not divide over {self._groups} batch shards; give multiples of it")
        self._slots: Slots | None = None
        self._pools = ImagePools() if pools is None else pools
        self._pool: ImagePool | None = None
        self._waiting: dict[int, AnswerRequest] = {}
        self._running: dict[int, int] = {}  # slot: request id
        self._num_added = 0
        self._twins: dict[bytes, int] = {}  # digest: the request that is generated for all identical ones
        self._followers: dict[int, list[int]] = collections.defaultdict(list)
        self._requests: dict[int, AnswerRequest] = {}
        self._outputs: dict[int, GenerateOutput] = {}  # of greedy requests that others may repeat
        self._ready: list[Finished] = []

    # ------------------------------------------------------------------ requests

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, runs or is ready."""
        return not (self._waiting or self._running or self._ready)

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    def add(self, request: AnswerRequest) -> int:
        """Queue a request; its number is in `Finished.request_id`. Raises UserError for an answer that is too long."""
        if (request.max_new_tokens or 1) > self.config.max_new_tokens:
            most = self.config.max_new_tokens
            raise UserError(f"max_new_tokens is {request.max_new_tokens}; this session generates at most {most}")
        number, self._num_added = self._num_added, self._num_added + 1
        self._requests[number] = request
        first = self._twins.setdefault(request.digest(self._is_greedy(request)), number)
        if first == number:
            self._waiting[number] = request
        elif first in self._outputs:
            self._ready.append(Finished(number, self._requests.pop(number), self._outputs[first]))
        else:
            self._followers[first].append(number)
        return number

    def _is_greedy(self, request: AnswerRequest) -> bool:
        """Whether the most likely token is chosen each time, whatever the seed."""
        return request.temperature == 0 if self.config.row_sampling else not self.config.do_sample

    def cancel(self, request_id: int) -> None:
        """Drop a request that is not finished; unknown numbers are passed over."""
        if self._requests.pop(request_id, None) is None:
            return
        for first, followers in self._followers.items():
            if request_id in followers:
                followers.remove(request_id)
                if followers or first in self._requests:  # others wait for the same answer
                    return
                request_id = first
                break
        if self._followers.get(request_id):
            return
        self._followers.pop(request_id, None)
        self._twins = {digest: first for digest, first in self._twins.items() if first != request_id}
        self._waiting.pop(request_id, None)
        for slot, running in list(self._running.items()):
            if running == request_id:
                del self._running[slot]
                with sharding.use_mesh(self.mesh):
                    is_canceled_B = np.arange(self.sizes.num_slots) == slot
                    self._slots = programs.cancel(self._slots, is_canceled_B)

    def partial_ids(self) -> dict[int, list[int]]:
        """{request: token ids so far} of the requests that are generated, for streaming between two `advance`."""
        return {
            number: output.ids_BM[0, : output.length_B[0]].tolist()
            for number, output in self.partial_outputs(()).items()
        }

    def partial_outputs(self, aux_names: Collection[str] | None = None) -> dict[int, GenerateOutput]:
        """{request: its tokens so far}, one row each, of the requests that are generated; scores are left out.

        `aux_names`: the outputs of the model besides tokens that are wanted too, by default all.
        """
        if not self._running:
            return {}
        rows, aux = self._slots.rows, aux_outputs(self._slots.cache, aux_names)
        ids_BM, length_B, is_finite_B, aux = sharding.gather_to_host(
            (rows.ids_BM, rows.length_B, rows.is_finite_B, aux)
        )
        found = {}
        for slot, number in self._running.items():
            one = slice(slot, slot + 1)
            output = GenerateOutput(
                ids_BM[one],
                length_B[one],
                aux_outputs=jax.tree.map(lambda leaf, one=one: leaf[one], aux) or None,
                is_finite_B=is_finite_B[one],
            )
            found |= {k: output for k in (number, *self._followers.get(number, ())) if k in self._requests}
        return found

    def run(self, requests: Iterable[AnswerRequest]) -> Iterator[Finished]:
        """Adds requests as slots become free, and yields each as it is finished; numbers are those of `add`."""
        source, exhausted = iter(requests), False
        window = LOOK_AHEAD * self.sizes.admission_rows
        while not (exhausted and self.is_idle):
            while not exhausted and len(self._waiting) < window:
                request = next(source, None)
                exhausted = request is None
                if request is not None:
                    self.add(request)
                if len(self._ready) >= window:
                    break
            yield from self.advance()

    def advance(self, max_steps: int | None = None) -> list[Finished]:
        """Admit what fits, generate until slots are free or `max_steps` tokens of each row, and return what has ended.

        Without requests it returns at once. Raises UserError where the model computes NaN or infinity.
        """
        rows = self.sizes.admission_rows
        if self._waiting and not self.sizes.hold(oldest := next(iter(self._waiting.values()))) and not self._running:
            self.sizes, self._slots = self.sizes.grown_for(oldest), None
        size = self.sizes
        while self._waiting and size.num_slots - len(self._running) >= min(rows, len(self._waiting)):
            if not size.hold(next(iter(self._waiting.values()))):
                break  # all others end before the slots are made anew
            self._admit()
        if self._running:
            free = size.num_slots - len(self._running)
            # At the end all slots run out; before, an admission's worth must be free.
            min_done = min(free + max(1, min(rows, len(self._waiting))), size.num_slots)
            if not self._waiting or not size.hold(next(iter(self._waiting.values()))):
                min_done = size.num_slots
            steps = max_steps or self.config.max_new_tokens
            with sharding.use_mesh(self.mesh):
                self._slots = programs.decode(self.model, self.params, self._slots, self.config, min_done, steps)
            self._collect()
        ready, self._ready = self._ready, []
        return ready

    # ------------------------------------------------------------------ slots

    def _choose(self, num_free: int) -> list[int]:
        """Waiting requests for one admission: the oldest, and others whose prompts fit its padded length."""
        oldest = itertools.islice(self._waiting.items(), LOOK_AHEAD * self.sizes.admission_rows)
        window = [
            (self.sizes.padded_length(request.length), number) for number, request in oldest if self.sizes.hold(request)
        ]
        count, first = min(num_free, len(window)), window[0][0]
        fitting = [number for length, number in window if length == first]
        fitting += [number for length, number in window if length < first]
        if len(fitting) < count:  # a longer padding is cheaper than another admission
            fitting += [number for length, number in sorted(window) if length > first]
        return fitting[:count]

    def _admit(self) -> None:
        """Put waiting requests into free slots."""
        per_group = self.sizes.num_slots // self._groups
        free = [
            [slot for slot in range(group * per_group, (group + 1) * per_group) if slot not in self._running]
            for group in range(self._groups)
        ]
        rows_of_group = self.sizes.admission_rows // self._groups
        places = [
            (group, k, free[group][k])
            for k in range(rows_of_group)
            for group in range(self._groups)
            if k < len(free[group])
        ]
        chosen = self._choose(len(places))
        slot_GR = np.full((self._groups, rows_of_group), per_group, np.int32)
        ordered = [self._waiting[chosen[0]]] * self.sizes.admission_rows  # rows of padding repeat a request
        for number, (group, k, slot) in zip(chosen, places):
            slot_GR[group, k] = slot % per_group
            ordered[group * rows_of_group + k] = self._waiting.pop(number)
            self._running[slot] = number
        with self._pools.lock, sharding.use_mesh(self.mesh):
            admission = self._make_admission(ordered, slot_GR)
            pool = None if self._pool is None else self._pool.features
            if self._slots is None:
                longest = self._longest(admission)
                self._slots = programs.init_slots(
                    self.model, self.params, longest, pool, self.config, self.sizes.num_slots
                )
                if self.mesh.size == 1:  # as what the programs return, or the first admission would compile one more
                    replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
                    self._slots = jax.device_put(self._slots, replicated)
            self._slots = programs.admit(self.model, self.params, self._slots, admission, pool, self.config)

    def _make_admission(self, ordered: Sequence[AnswerRequest], slot_GR: np.ndarray) -> Admission:
        """The admission of a batch's requests, in the order of its rows."""
        length = max(self.sizes.padded_length(one.length) for one in ordered)
        uses_pool = self.model.info.has_features and self.model.info.reads_images
        question_length = min(length, self.sizes.question_length)
        if max(one.question_length for one in ordered) > question_length:
            question_length = self.sizes.question_length
        lengths = (length, question_length)
        batch = self.collate([one.row for one in ordered], lengths, not uses_pool)
        image_B, is_blind_B = None, np.array([one.image_blind for one in ordered])
        if uses_pool:
            if self._pool is None:
                rows, row = self.sizes.admission_rows, ordered[0].row
                self._pool = self._pools.get(self.model, self.params, self.mesh, self.collate, rows, row)
            waiting = ((one.image_digest, one.row) for one in self._waiting.values())
            image_B = self._pool.places([(one.image_digest, one.row) for one in ordered], waiting)
        if is_blind_B.any():
            batch = blank_rows(batch, is_blind_B)
        most = self.config.max_new_tokens
        limit_B = np.array([one.max_new_tokens or most for one in ordered], np.int32)
        key_B = settings = None
        if self.config.do_sample or self.config.row_sampling:
            key_B = np.asarray(jax.random.key_data(row_keys([one.seed for one in ordered])))
        if self.config.row_sampling:
            settings = RowSampling(
                np.array([one.temperature for one in ordered], np.float32),
                np.array([one.top_p for one in ordered], np.float32),
            )
        return self._place(Admission(batch, slot_GR, image_B, limit_B, key_B, settings))

    def _place(self, admission: Admission) -> Admission:
        """The arrays of an admission on the mesh, its rows split over the batch axes."""
        placed = sharding.shard_global_batch(dataclasses.replace(admission, slot_GR=None), self.mesh)
        slot_GR = sharding.shard_global_batch(admission.slot_GR, self.mesh)
        return dataclasses.replace(placed, slot_GR=slot_GR)

    def _longest(self, admission: Admission) -> Admission:
        """Shapes of an admission of the longest texts."""
        batch, sizes = admission.batch, self.sizes
        lengths = {"prompt": sizes.prompt_length, "question": sizes.question_length}
        fields = {f"{name}{end}": length for name, length in lengths.items() for end in ("_BL", "_mask_BL")}
        rows = len(batch.prompt_BL)
        longest = {
            name: np.zeros((rows, length), np.int32)
            for name, length in fields.items()
            if getattr(batch, name) is not None
        }
        return dataclasses.replace(admission, batch=dataclasses.replace(batch, **longest))

    def _collect(self) -> None:
        """Move the answers of slots that have ended to `_ready`."""
        rows = self._slots.rows
        done_B, length_B, is_finite_B = sharding.gather_to_host((rows.done_B, rows.length_B, rows.is_finite_B))
        ended = [slot for slot in self._running if done_B[slot]]
        if not ended:
            return
        ids_BM, logprob_BM, aux = sharding.gather_to_host(
            (rows.ids_BM, rows.logprob_BM, aux_outputs(self._slots.cache))
        )
        for slot in ended:
            number, one = self._running.pop(slot), slice(slot, slot + 1)
            score_B = None if logprob_BM is None else logprob_BM[one].sum(axis=1)
            parts = jax.tree.map(lambda leaf, one=one: np.array(leaf[one]), (logprob_BM, aux))
            output = GenerateOutput(ids_BM[one], length_B[one], score_B, *parts, is_finite_B[one])
            self.num_tokens += int(length_B[slot])
            self._keep(number, output)
            for follower in (number, *self._followers.pop(number, ())):
                if follower in self._requests:
                    self._ready.append(Finished(follower, self._requests.pop(follower), output))

    def _keep(self, number: int, output: GenerateOutput) -> None:
        """Keep an output for identical requests, and let the oldest go."""
        self._outputs[number] = output
        while len(self._outputs) > self.num_kept:
            oldest = next(iter(self._outputs))
            del self._outputs[oldest]
            self._twins = {digest: first for digest, first in self._twins.items() if first != oldest}


def blank_rows(batch: Batch, is_blind_B: np.ndarray) -> Batch:
    """The batch with blank pictures, and regions, states and masks of objects of zeros, in some rows."""

    def blank(array):
        is_blind = is_blind_B.reshape(-1, *[1] * (array.ndim - 1))
        return np.where(is_blind, np.zeros((), array.dtype), array)

    fields = {name: getattr(batch, name) for name in BLANKED}
    return dataclasses.replace(
        batch, **{name: None if array is None else blank(array) for name, array in fields.items()}
    )
