# SPDX-License-Identifier: Apache-2.0
"""A session of answering: requests in, tokens and answers out; requests may be added and canceled while it runs.

`AnswerSession` is the loop behind all that asks many questions: it fills free slots with waiting prompts, generates
until slots are free, and hands out what has ended. Identical greedy requests are answered once, and an image that
several requests show is encoded once. The answers of a request do not depend on the others.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent import futures

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax.core import sharding
from lionjax.core.types import VLM, Batch, Params, UserError
from lionjax.inference import slots as programs
from lionjax.inference.answer_request import AnswerRequest, Finished, SessionSizes
from lionjax.inference.image_pool import Collate, ImagePool, ImagePools
from lionjax.inference.sampling import GenerateOutput, GenerationConfig, RowSampling, aux_outputs, row_keys
from lionjax.inference.slots import Admission, Slots

PREFILLS_AHEAD = 2  # admissions read at most while tokens are generated, each in a thread: one alone leaves cores idle,
SHARE_BESIDE_PREFILL = 0.5  # if at least this share of the slots is in use; a step of few costs as much as one of all
STEPS_BESIDE_PREFILL = 4  # of which so many are generated at most before a look at whether an admission can join
LOOK_AHEAD = 8  # admissions' worth of waiting requests from which rows of like length are chosen
KEPT_OUTPUTS = 8192  # of the newest requests, for identical ones
BLANKED = ("image_BHWC", "sam_image_BHWC", "region_BKD", "state_BKS", "object_mask_BKHW")  # without an image


@dataclasses.dataclass(eq=False)
class _Prefill:
    """An admission that another thread reads. `numbers`: of the requests of its rows, None for canceled ones."""

    numbers: list[int | None]
    result: futures.Future[tuple[Admission, Slots]]


class AnswerSession:
    """Generates answers to requests of one `GenerationConfig`, without beams, in slots of fixed shapes.

    All processes of a mesh must add the same requests in the same order and call `advance` together. `pools`: of images
    that other sessions with the same parameters encode, too. On a CPU, where one program does not keep all cores busy,
    threads read the next prompts while tokens are generated; an accelerator runs one program at a time anyway.
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
        is_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        self._reader = futures.ThreadPoolExecutor(PREFILLS_AHEAD, "prefill") if is_cpu else None
        self._prefills: collections.deque[_Prefill] = collections.deque()

    # ------------------------------------------------------------------ requests

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, runs or is ready."""
        return not (self._waiting or self._prefills or self._running or self._ready)

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting) + sum(len(prefill.numbers) for prefill in self._prefills)

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
        for prefill in self._prefills:
            prefill.numbers = [None if number == request_id else number for number in prefill.numbers]
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
        if self._waiting and not (self._running or self._prefills or self._holds_oldest()):
            oldest = next(iter(self._waiting.values()))
            self.sizes, self._slots = self.sizes.grown_for(oldest), None
        if self._reader is None:
            self._admit_waiting()
        else:
            self._insert_prefilled(must_wait=max_steps is None)
        if self._running:
            self._decode(max_steps)
            self._collect()
        ready, self._ready = self._ready, []
        return ready

    # ------------------------------------------------------------------ slots

    def _holds_oldest(self) -> bool:
        """Whether a request waits and the oldest fits; if not, the slots are made anew once all others have ended."""
        return bool(self._waiting) and self.sizes.hold(next(iter(self._waiting.values())))

    def _decode(self, max_steps: int | None) -> None:
        """Generate until there is room for the next admission, at most `max_steps` tokens of each row."""
        size, steps = self.sizes, max_steps or self.config.max_new_tokens
        num_free = size.num_slots - len(self._running)
        num_next = len(self._prefills[0].numbers) if self._prefills else min(size.admission_rows, len(self._waiting))
        if self._prefills or self._holds_oldest():
            min_done = min(num_free + max(1, num_next), size.num_slots)
        else:
            min_done = size.num_slots  # nothing joins, so that all run out
        if max_steps is not None and self._prefills and num_next <= num_free:
            steps = min(steps, STEPS_BESIDE_PREFILL)
        with sharding.use_mesh(self.mesh):
            self._slots = programs.decode(self.model, self.params, self._slots, self.config, min_done, steps)

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

    def _admit_waiting(self) -> None:
        """Put waiting requests into free slots, while an admission's worth is free."""
        size = self.sizes
        while self._holds_oldest():
            if size.num_slots - len(self._running) < min(size.admission_rows, len(self._waiting)):
                return
            self._admit()

    def _admit(self) -> None:
        """Put one admission of waiting requests into free slots."""
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
            admission = self._make_admission(ordered, slot_GR, self._waiting.values())
            self._ensure_slots(admission)
            features = None if self._pool is None else self._pool.features
            self._slots = programs.admit(self.model, self.params, self._slots, admission, features, self.config)

    def _ensure_slots(self, admission: Admission) -> None:
        """Make free slots if there are none yet. The pool must be locked, and the mesh in use."""
        if self._slots is not None:
            return
        longest, features = self._longest(admission), None if self._pool is None else self._pool.features
        num_slots = self.sizes.num_slots
        self._slots = programs.init_slots(self.model, self.params, longest, features, self.config, num_slots)
        if self.mesh.size == 1:  # as what the programs return, or the first admission would compile one more
            replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
            self._slots = jax.device_put(self._slots, replicated)

    def _start_prefills(self) -> None:
        """Let other threads read waiting requests, whether or not slots are free."""
        while self._holds_oldest() and len(self._prefills) < PREFILLS_AHEAD:
            if self._prefills and len(self._waiting) < self.sizes.admission_rows:
                return  # others may come to fill the admission
            numbers = self._choose(self.sizes.admission_rows)
            requests = [self._waiting.pop(number) for number in numbers]
            requests += [requests[0]] * (self.sizes.admission_rows - len(requests))
            result = self._reader.submit(self._prefill, requests, list(self._waiting.values()))
            self._prefills.append(_Prefill(numbers, result))

    def _prefill(self, requests: Sequence[AnswerRequest], soon: Sequence[AnswerRequest]) -> tuple[Admission, Slots]:
        """The admission of some requests, and its rows once they are read. Runs in a thread of its own."""
        nowhere_GR = np.full((1, len(requests)), self.sizes.num_slots, np.int32)
        with self._pools.lock, sharding.use_mesh(self.mesh):
            admission = self._make_admission(requests, nowhere_GR, soon)
            features = None if self._pool is None else self._pool.features
            rows = programs.prefill(self.model, self.params, admission, features, self.config)
        return admission, jax.block_until_ready(rows)

    def _insert_prefilled(self, must_wait: bool) -> None:
        """Put requests that have been read into free slots, and let the next ones be read.

        `must_wait`: also for an admission that is still being read, as is done if nothing runs.
        """
        self._start_prefills()
        while self._prefills:
            first, num_slots = self._prefills[0], self.sizes.num_slots
            free = [slot for slot in range(num_slots) if slot not in self._running]
            waits = must_wait or len(self._running) < num_slots * SHARE_BESIDE_PREFILL
            if len(free) < len(first.numbers) or not (waits or first.result.done()):
                return
            self._prefills.popleft()
            self._start_prefills()
            admission, rows = first.result.result()
            slot_GR = np.full((1, self.sizes.admission_rows), num_slots, np.int32)
            for row, (number, slot) in enumerate(zip(first.numbers, free)):
                if number is not None:
                    slot_GR[0, row], self._running[slot] = slot, number
            with self._pools.lock, sharding.use_mesh(self.mesh):
                self._ensure_slots(admission)
                self._slots = programs.insert(self._slots, rows, slot_GR)

    def _make_admission(
        self, ordered: Sequence[AnswerRequest], slot_GR: np.ndarray, soon: Iterable[AnswerRequest]
    ) -> Admission:
        """The admission of a batch's requests, in the order of its rows; images of `soon` are encoded beside theirs."""
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
            next_images = ((one.image_digest, one.row) for one in soon)
            image_B = self._pool.places([(one.image_digest, one.row) for one in ordered], next_images)
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
