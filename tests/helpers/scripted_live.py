# SPDX-License-Identifier: Apache-2.0
"""A `LiveModel` for the page's tests, which answers what a script says, word by word, and runs no model."""

import threading
import time
import types

import numpy as np

from lionjax.core.experiment import GenerationDefaults
from lionjax.inference.engine import Answer
from lionjax.inference.live_question import LiveAnswer
from lionjax.inference.sampling import GenerationConfig

TEXT = "There is a red star [0.100,0.200,0.400,0.600] above a blue ring [0.500,0.500,0.900,0.900]."
PROCESSOR = types.SimpleNamespace(
    max_pixels=64_000_000, followup_template="{question}", box_format="digits", use_tags=False
)


class ScriptedLive:
    """`asked`: all questions; `seconds`: between two words; `stopped`: questions that were canceled while answered."""

    max_new_tokens, is_alive = 128, True

    def __init__(self, seconds=0.02, text=TEXT):
        self.asked, self.stopped, self.num_open, self.seconds, self.text = [], [], 0, seconds, text
        self.model = types.SimpleNamespace(
            processor=types.SimpleNamespace(config=PROCESSOR),
            vlm=types.SimpleNamespace(info=types.SimpleNamespace(reads_images=True)),
            generation_config=lambda category: GenerationConfig(max_new_tokens=128),
            experiment=types.SimpleNamespace(generation=GenerationDefaults()),
        )

    def submit(self, question, listener):
        self.asked.append(question)
        ticket = types.SimpleNamespace(is_canceled=False, question=question, is_over=False)
        size = question.sample.image.size
        threading.Thread(target=self._answer, args=(ticket, listener, size), daemon=True).start()
        return ticket

    def _answer(self, ticket, listener, size):
        self.num_open += 1
        words = [f"{word} " for word in self.text.split(" ")]
        for word in words[:-1]:
            time.sleep(self.seconds)
            if ticket.is_canceled:
                break
            listener(word)
        else:
            masks = np.zeros((2, size[1], size[0]), bool)
            masks[0, size[1] // 4 : size[1] // 2, size[0] // 8 : size[0] // 3] = True
            boxes = np.array([[0.1, 0.2, 0.4, 0.6], [0.5, 0.5, 0.9, 0.9]])
            ticket.is_over = True
            listener(LiveAnswer(Answer(self.text, boxes, masks), "stop", words[-1].strip(), 5, len(words)))
        self.num_open -= 1

    def cancel(self, ticket):
        if not (ticket.is_canceled or ticket.is_over):
            self.stopped.append(ticket.question)
        ticket.is_canceled = True
