# SPDX-License-Identifier: Apache-2.0
"""The model classes of lmms-eval, which imports this module itself; see docs/harnesses.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from lionjax.core.types import UserError
from lionjax.pipelines.serving.harness import HarnessModel, Request


class LionJaxSimple(lmms):
    """Requests as a text and a function from a row of the data to its images.

    `--model_args` are `pretrained` (a run or a folder of weights) and those of `HarnessModel`.
    """

    is_simple = True

    def __init__(self, pretrained: str = "", batch_size=1, max_batch_size=None, device=None, **options):
        super().__init__()
        if not pretrained:
            raise UserError("lionjax needs --model_args pretrained=DIR, a run or a folder of weights")
        try:
            self.harness = HarnessModel(str(pretrained), batch_size, **options)
        except TypeError as error:
            raise UserError(f"--model_args of lionjax: {error}") from error

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to requests (text, settings, images of a row, row, task, split), in their order."""
        return self.harness.answer([self._request(*request.args) for request in requests])

    def _request(self, text, settings, doc_to_visual, doc_id, task, split) -> Request:
        return Request(text, doc_to_visual(self._doc(task, split, doc_id)) or (), settings)

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds of each request; the task makes each next question from the answers before."""
        return [self._all_rounds(*request.args) for request in requests]

    def _all_rounds(self, text, settings, doc_to_visual, doc_to_text, doc_id, task, split) -> list[str]:
        doc = self._doc(task, split, doc_id)
        images, answers, info, ended = doc_to_visual(doc) or (), [], None, False
        while not ended:
            answers = [*answers, *self.harness.answer([Request(text, images, settings)])]
            found = doc_to_text(doc, previous_output=answers, round_idx=len(answers), previous_round_info=info)
            new_images, text, ended, answers, info = found
            images = images if new_images is None else new_images
        return list(answers)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(mean token loss, whether the greedy answer is this text) of the continuation of each request.

        lmms-eval's `multiple_choice` takes the smallest number, so it is a loss and no log-probability.
        """
        continuations, asked = [], []
        for request in requests:
            text, continuation, doc_to_visual, doc_id, task, split = request.args
            doc = self._doc(task, split, doc_id)
            continuations.append(continuation(doc) if callable(continuation) else continuation)
            asked.append(Request(text, doc_to_visual(doc) or ()))
        greedy = self.harness.answer(asked)
        losses = self.harness.losses(asked, continuations)
        return [(loss, answer.strip() == text.strip()) for loss, answer, text in zip(losses, greedy, continuations)]


class LionJaxChat(LionJaxSimple):
    """Requests as chat messages with their images in place."""

    is_simple = False

    def _request(self, text, doc_to_messages, settings, doc_id, task, split) -> Request:
        return chat_request(ChatMessages(messages=doc_to_messages(self._doc(task, split, doc_id))), settings)


def chat_request(chat: ChatMessages, settings: Mapping[str, Any]) -> Request:
    """Messages as a request: the last question, the rounds before it as history, and all images.

    A system message stands before the first question. Raises UserError for videos and sound, and for messages that do
    not end with a question.
    """
    images, videos, audios = chat.extract_media()
    if videos or audios:
        raise UserError(f"a request has {'videos' if videos else 'sound'}; lionjax reads text and images")
    texts = [(message.role, _text(message)) for message in chat.messages]
    system = [text for role, text in texts if role == "system"]
    turns, question = [], "\n".join(system)
    for role, text in texts:
        if role == "user":
            question = f"{question}\n{text}" if question else text
        elif role == "assistant":
            turns.append((question, text))
            question = ""
    if not question or texts[-1][0] != "user":
        raise UserError("a request does not end with a question; its last message must be the user's")
    return Request(question, images, settings, tuple(turns))


def _text(message: Any) -> str:
    return "\n".join(content.text for content in message.content if content.type == "text")
