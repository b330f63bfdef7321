# SPDX-License-Identifier: Apache-2.0
"""Questions of many clients, answered together while they arrive: `LiveModel`, behind the server and the web page.

One thread owns the sessions of a model (`inference.session`) and is the only one that runs it. Other threads submit
questions, are told of new text and of the answer by a function of theirs, and cancel. Questions with an error, over
their time, or of clients that have left cost the others nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import queue
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from PIL import Image

from lionjax.core.errors import RetryError, check_ranges
from lionjax.core.types import CATEGORIES, UserError
from lionjax.data.boxes import BOX_PATTERN, MASK_TEXT
from lionjax.data.processor import ImageTextInput
from lionjax.data.regions import ImageRegions
from lionjax.inference import answer_mesh
from lionjax.inference.answer_request import AnswerRequest, Finished, SessionSizes
from lionjax.inference.engine import Answer, EncodedExample, require_finite_output
from lionjax.inference.live_question import (
    BusyError,
    Event,
    Listener,
    LiveAnswer,
    LiveConfig,
    LiveQuestion,
    TimeLimitError,
)
from lionjax.inference.model import Model
from lionjax.inference.sampling import GenerateOutput, GenerationConfig, end_token_ids
from lionjax.inference.session import AnswerSession
from lionjax.inference.text_stream import cut_at_stops, settled_text

log = logging.getLogger(__name__)

SHORT_PROMPTS = (64, 256, 1024)  # padded prompt lengths besides the longest
SECONDS_BETWEEN_PIECES = 0.05  # of text; so long a new question waits at most before it is admitted
MAX_STEPS = 16  # tokens of each row between two looks at what has arrived
KEPT_REGIONS = 32  # images whose refined regions are kept
KEPT_OUTPUTS = 64  # of the newest questions, for identical ones
STREAMED_OUTPUTS = ("box", "count")  # of a model besides tokens, that the text needs


@dataclasses.dataclass(eq=False)
class _Ticket:
    """A question on its way, without its image. `image_size`: of it, None without one. `streamed`: what is told."""

    question: LiveQuestion
    image_size: tuple[int, int] | None
    row: EncodedExample
    config: GenerationConfig
    regions: ImageRegions | None
    listener: Listener
    deadline: float
    request: AnswerRequest
    streamed: str = ""
    number: int = -1  # of the session


class LiveModel:
    """A model that answers questions as they come. Close it, or use it in `with`.

    Beam search is not possible in slots; a model whose settings have beams is asked greedily.
    """

    def __init__(self, model: Model, config: LiveConfig | None = None):
        config = config or LiveConfig()
        if not model.vlm.info.generates:
            raise UserError(f"{type(model.vlm).__name__} generates no text; give a model that answers")
        self.model, self.config = model, config
        own = model.generation_config("image_level")
        self.max_new_tokens = config.max_new_tokens or own.max_new_tokens
        self._changed = threading.Condition()
        self._incoming: list[_Ticket] = []
        self._canceled: list[_Ticket] = []
        self._num_open = 0  # questions from their submission to their end
        self._is_closed, self._steps = False, 1
        self._sessions: dict[GenerationConfig, AnswerSession] = {}
        self._tickets: dict[GenerationConfig, dict[int, _Ticket]] = {}
        self._regions: OrderedDict[bytes, ImageRegions] = OrderedDict()
        self._refining = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ for other threads

    @property
    def num_open(self) -> int:
        """Questions that wait or are answered."""
        return self._num_open

    @property
    def is_alive(self) -> bool:
        """Whether questions are answered."""
        return self._thread.is_alive() and not self._is_closed

    def settings(self, category: str) -> GenerationConfig:
        """The settings of the session that answers prompts of a category."""
        own = self.model.generation_config(category)
        return dataclasses.replace(
            own, num_beams=1, do_sample=False, row_sampling=True, max_new_tokens=self.max_new_tokens
        )

    def submit(self, question: LiveQuestion, listener: Listener) -> _Ticket:
        """Queue a question; `listener` is called with each `Event` of it, from another thread, until it ends.

        Prepares image and prompt in the calling thread. Raises BusyError where too many wait, and UserError for what
        cannot be asked.
        """
        with self._changed:
            limit = self.config.num_slots + self.config.max_waiting
            if self._is_closed or not self._thread.is_alive():
                raise RetryError("the model has stopped; start the server again")
            if self._num_open >= limit:
                raise BusyError(f"{self._num_open} questions are open, and at most {limit} may be; ask again later")
            self._num_open += 1
        try:
            ticket = self._prepare(question, listener)
        except BaseException:
            self._release()
            raise
        self._enqueue(ticket)
        return ticket

    def cancel(self, ticket: _Ticket) -> None:
        """Stop answering a question; its listener is called no more."""
        with self._changed:
            self._canceled.append(ticket)
            self._changed.notify()

    def stream(self, question: LiveQuestion) -> Iterator[str | LiveAnswer]:
        """Yields pieces of text and at last the answer. Raises what `submit` and the answering raise."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket, event = self.submit(question, events.put), None
        try:
            while not isinstance(event, LiveAnswer):
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.cancel(ticket)

    def warm_up(self) -> None:
        """Compile all programs, so that no client waits for them."""
        done: queue.SimpleQueue[Event] = queue.SimpleQueue()
        for config, category in {self.settings(one): one for one in CATEGORIES}.items():
            sample = ImageTextInput(Image.new("RGB", (64, 64)), "?", category=category)
            lengths = self._sizes(self._prepare(LiveQuestion(sample), done.put)).prompt_lengths
            for seed, length in enumerate((*lengths, lengths[0])):  # used slots may be sharded otherwise
                ticket = self._prepare(LiveQuestion(sample), done.put)
                mask = (np.arange(len(ticket.row["prompt_mask"])) < length).astype(np.int32)
                row = dict(ticket.row) | {"prompt_mask": mask}
                request = dataclasses.replace(ticket.request, row=row, seed=seed, max_new_tokens=2)
                self._num_open += 1
                self._enqueue(dataclasses.replace(ticket, request=request, config=config))
                while isinstance(event := done.get(), str):
                    pass
                if isinstance(event, Exception):
                    raise event

    def close(self) -> None:
        """Stop answering; open questions get a RetryError."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> LiveModel:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def refined(self, image: Image.Image) -> ImageRegions | None:
        """What the model's refiner finds in an image, kept for the next questions; None for a model without regions."""
        if not self.model.processor.config.region_width:
            return None
        with self._refining:
            digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
            if digest not in self._regions:
                (self._regions[digest],) = self.model.find_regions([image])
            while len(self._regions) > KEPT_REGIONS:
                self._regions.popitem(last=False)
            return self._regions[digest]

    # ------------------------------------------------------------------ preparing a question

    def _prepare(self, question: LiveQuestion, listener: Listener) -> _Ticket:
        sample, info = question.sample, self.model.vlm.info
        if sample.image is not None and not info.reads_images:
            raise UserError("this model reads no images; ask it in text only")
        if sample.tags and not self.model.processor.config.use_tags:
            raise UserError("this model was trained without tags; leave them out")
        size, image = (None, Image.new("RGB", (1, 1))) if sample.image is None else (sample.image.size, sample.image)
        regions = self.refined(image) if sample.regions is None else sample.regions
        row = self.model.processor.encode_input(dataclasses.replace(sample, image=image, regions=regions))
        request = self._request(question, row)
        question = dataclasses.replace(question, sample=dataclasses.replace(sample, image=None))  # it may be large
        deadline = time.monotonic() + self.config.timeout_seconds
        return _Ticket(question, size, row, self.settings(sample.category), regions, listener, deadline, request)

    def _request(self, question: LiveQuestion, row: EncodedExample) -> AnswerRequest:
        """The session's request. Raises UserError for settings out of range."""
        own = self.model.generation_config(question.sample.category)
        temperature, top_p = (own.temperature, own.top_p) if own.do_sample else (0.0, 1.0)
        temperature = temperature if question.temperature is None else question.temperature
        top_p = top_p if question.top_p is None else question.top_p
        asked = dataclasses.replace(question, temperature=temperature, top_p=top_p)
        check_ranges(asked, temperature=">= 0 and <= 2", top_p="> 0 and <= 1")
        limit = question.max_new_tokens
        if limit is not None and not 1 <= limit <= self.max_new_tokens:
            raise UserError(f"max_tokens is {limit}; give 1 to {self.max_new_tokens}, as many as are generated here")
        seed = random.getrandbits(31) if question.seed is None else question.seed
        if not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed}; give 0 to {2**32 - 1}")
        is_blind = question.sample.image is None and self.model.vlm.info.reads_images
        return AnswerRequest(row, seed if temperature else 0, is_blind, limit, float(temperature), float(top_p))

    def _sizes(self, ticket: _Ticket) -> SessionSizes:
        """Fixed shapes that hold every prompt, so that nothing is compiled while others wait."""
        engine, row = self.model.engine, ticket.row
        lengths = len(row["prompt"]), len(row["question"])
        by_memory = engine.open_session(ticket.config, row, lengths).sizes
        return answer_mesh.limit_slots(engine.mesh, by_memory, self.config.num_slots, SHORT_PROMPTS)

    def _enqueue(self, ticket: _Ticket) -> None:
        with self._changed:
            self._incoming.append(ticket)
            self._changed.notify()

    def _release(self) -> None:
        with self._changed:
            self._num_open -= 1

    # ------------------------------------------------------------------ the thread that runs the model

    def _work(self) -> None:
        while not self._is_closed:
            try:
                self._take_turn()
            except Exception:  # of the device, which cannot be told from one question's; the thread must go on
                log.exception("the model failed; open questions are refused, and it starts anew")
                self._end_all(RetryError("the model failed; ask again"))
                self._sessions.clear()
        self._end_all(RetryError("the server is stopping; ask again later"))

    def _take_turn(self) -> None:
        """Wait for something to do, take what has arrived, and generate some tokens in each session."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            incoming, self._incoming = self._incoming, []
            canceled, self._canceled = self._canceled, []
        for ticket in incoming:
            self._start(ticket)
        for ticket in canceled:
            self._drop(ticket)
        self._drop_late()
        for config in [config for config, tickets in self._tickets.items() if tickets]:
            self._advance(config)

    def _end_all(self, error: Exception) -> None:
        with self._changed:
            incoming, self._incoming = self._incoming, []
        for ticket in [*incoming, *self._open_tickets()]:
            self._end(ticket, error)

    def _has_work(self) -> bool:
        return bool(self._incoming or self._canceled or self._is_closed or any(self._tickets.values()))

    def _open_tickets(self) -> list[_Ticket]:
        return [ticket for tickets in self._tickets.values() for ticket in tickets.values()]

    def _start(self, ticket: _Ticket) -> None:
        """Give a question to its session, which is opened if there is none."""
        try:
            if ticket.config not in self._sessions:
                sizes = self._sizes(ticket)
                lengths = sizes.prompt_length, sizes.question_length
                session = self.model.engine.open_session(ticket.config, ticket.row, lengths, sizes)
                session.num_kept = KEPT_OUTPUTS
                self._sessions[ticket.config], self._tickets[ticket.config] = session, {}
            ticket.number = self._sessions[ticket.config].add(ticket.request)
            self._tickets[ticket.config][ticket.number] = ticket
        except Exception as error:
            self._end(ticket, error)

    def _drop(self, ticket: _Ticket) -> bool:
        """Take a question out of its session; False if it has ended."""
        if self._tickets.get(ticket.config, {}).get(ticket.number) is not ticket:
            return False
        self._sessions[ticket.config].cancel(ticket.number)
        self._remove(ticket)
        return True

    def _remove(self, ticket: _Ticket) -> None:
        if self._tickets.get(ticket.config, {}).pop(ticket.number, None) is not None:
            self._release()

    def _end(self, ticket: _Ticket, event: LiveAnswer | Exception) -> None:
        """Tell a question's listener its last event."""
        if ticket.number < 0:  # no session has it
            self._release()
        self._remove(ticket)
        self._notify(ticket, event)

    def _notify(self, ticket: _Ticket, event: Event) -> None:
        try:
            ticket.listener(event)
        except Exception:  # a listener whose loop is closed
            log.warning("a client could not be told of its answer")

    def _drop_late(self) -> None:
        now = time.monotonic()
        for ticket in self._open_tickets():
            if now > ticket.deadline and self._drop(ticket):
                seconds = f"{self.config.timeout_seconds:g} s"
                self._notify(ticket, TimeLimitError(f"the answer took longer than the {seconds} allowed; ask for less"))

    def _advance(self, config: GenerationConfig) -> None:
        """Generate some tokens in a session, and tell its listeners of text and answers."""
        session, tickets = self._sessions[config], self._tickets[config]
        num_waiting, began = session.num_waiting, time.perf_counter()
        try:
            finished = session.advance(self._steps)
            partial = session.partial_outputs(STREAMED_OUTPUTS)
        except Exception as error:  # of one program, in which the questions cannot be told apart
            log.exception("a batch failed; its questions are refused, and the session starts anew")
            del self._sessions[config], self._tickets[config]
            for ticket in tickets.values():
                self._release()
                self._notify(ticket, RetryError(f"the batch failed ({type(error).__name__}); ask again"))
            return
        if session.num_waiting == num_waiting:  # without the time of reading prompts
            seconds = time.perf_counter() - began
            if seconds > SECONDS_BETWEEN_PIECES:
                self._steps = max(1, self._steps // 2)
            elif seconds < SECONDS_BETWEEN_PIECES / 2:
                self._steps = min(MAX_STEPS, 2 * self._steps)
        for one in finished:
            if (ticket := tickets.get(one.request_id)) is not None:
                self._finish(ticket, one.output)
        for number, output in partial.items():
            if (ticket := tickets.get(number)) is not None:
                self._stream(ticket, output)

    def _stream(self, ticket: _Ticket, output: GenerateOutput) -> None:
        """Tell the new text of a running answer; end it at a stop text."""
        try:
            text = self.model.engine.decode_output(output, 0, ticket.row, None, ticket.config).text
            text, is_over = cut_at_stops(text, ticket.question.stops)
            if is_over or self._has_stop_text(output):
                whole = self._sessions[ticket.config].partial_outputs()[ticket.number]
                self._sessions[ticket.config].cancel(ticket.number)
                self._finish(ticket, whole)
                return
            settled = settled_text(text, ticket.question.stops)
        except Exception as error:
            self._sessions[ticket.config].cancel(ticket.number)
            self._end(ticket, error)
            return
        if settled.startswith(ticket.streamed) and len(settled) > len(ticket.streamed):
            piece, ticket.streamed = settled[len(ticket.streamed) :], settled
            self._notify(ticket, piece)

    def _has_stop_text(self, output: GenerateOutput) -> bool:
        """Whether an answer has the text that ends it in the model's prompt format."""
        processor = self.model.processor
        stop = processor.prompt.stop_text
        return bool(stop) and stop in processor.tokenizer.decode(output.ids_BM[0, : output.length_B[0]].tolist())

    def _finish(self, ticket: _Ticket, output: GenerateOutput) -> None:
        """Tell the whole answer, with boxes and masks."""
        try:
            require_finite_output(output, 1)
            answer, has_stop = self._answer(ticket, output)
        except Exception as error:
            self._end(ticket, error)
            return
        text, number = answer.text, int(output.length_B[0])
        has_end = has_stop or bool(set(answer.token_ids) & {*end_token_ids(ticket.config)})
        rest = text[len(ticket.streamed) :] if text.startswith(ticket.streamed) else ""
        prompt = ticket.request.length
        self._end(ticket, LiveAnswer(answer, "stop" if has_end else "length", rest, prompt, number))

    def _answer(self, ticket: _Ticket, output: GenerateOutput) -> tuple[Answer, bool]:
        """(the answer, whether a stop text ended it)."""
        engine, size = self.model.engine, ticket.image_size
        has_masks = size is not None and self.model.processor.config.sam_image_size > 0
        finished = Finished(0, ticket.request, output)
        if not has_masks or not engine.has_places(finished):
            masks = np.zeros((0, *size[::-1]), bool) if has_masks else None
            answer = engine.decode_output(output, 0, ticket.row, masks, ticket.config)
        else:
            shape = (1, len(ticket.row["prompt"]), len(ticket.row["question"]))
            ((_, answer),) = engine.answers_with_masks([finished], {0: size}, ticket.config, shape)
        has_stop = self._has_stop_text(output)
        text, is_cut = cut_at_stops(answer.text, ticket.question.stops)
        if is_cut:
            num_places = len(BOX_PATTERN.findall(text)) + text.count(MASK_TEXT)
            masks = None if answer.masks is None else answer.masks[:num_places]
            answer = dataclasses.replace(answer, text=text.rstrip(), boxes=answer.boxes[:num_places], masks=masks)
        return dataclasses.replace(answer, regions=ticket.regions), is_cut or has_stop
