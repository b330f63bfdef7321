# SPDX-License-Identifier: Apache-2.0
"""A loaded model as the language model of a pipeline: a converted decoder or T5, or any model that answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lionjax.core.types import UserError
from lionjax.inference.engine import Answer
from lionjax.inference.model import Model
from lionjax.inference.sampling import GenerationConfig, end_token_ids
from lionjax.pipelines.completion import ChatRequest, Completion, CompletionRequest, Request


class LoadedModel:
    """A `LanguageModel` on this machine. Samples are drawn with `seed` and the number of the sample."""

    def __init__(self, model: Model, name: str = "", seed: int = 0):
        self.model, self.name, self.seed = model, name, seed
        self.num_asked = self.num_refused = 0

    def complete(self, requests: Sequence[Request]) -> list[Completion | None]:
        """The continuation of each request in order, in batches of prompts of like length and equal settings.

        A prompt that is longer than the model's longest is refused, with the problem "refused: too long".
        """
        requests = [one.completion if isinstance(one, ChatRequest) else one for one in requests]
        completions: dict[int, Completion] = {}
        groups: dict[tuple, list[int]] = {}
        for place, request in enumerate(requests):
            if self._is_too_long(request.prompt):
                completions[place] = Completion("", problem="refused: too long")
            else:
                settings = dataclasses.replace(request, prompt="")
                groups.setdefault((settings,), []).append(place)
        for (settings,), places in groups.items():
            places.sort(key=lambda place: len(requests[place].prompt))
            config = self._config(settings)
            prompts = [requests[place].prompt for place in places]
            answers = self.model.complete(prompts, config, self.seed + settings.sample)
            completions |= {p: self._completion(a, settings, config) for p, a in zip(places, answers)}
        self.num_asked += len(requests)
        self.num_refused += sum(not c.is_readable and c.problem.startswith("refused") for c in completions.values())
        return [completions[place] for place in range(len(requests))]

    def _is_too_long(self, prompt: str) -> bool:
        try:
            self.model.processor.prompt.encode_prompt(prompt)
        except UserError:
            if not prompt.strip():
                raise
            return True
        return False

    def _config(self, request: CompletionRequest) -> GenerationConfig:
        """The settings of the model with those of a request; a stop text of one token ends a continuation too."""
        own = self.model.generation_config("image_level")
        tokenizer = self.model.processor.tokenizer
        stops = [ids[0] for ids in map(tokenizer.encode, request.stop) if len(ids) == 1]
        return dataclasses.replace(
            own,
            max_new_tokens=request.max_tokens,
            min_length=0,
            num_beams=1,
            repetition_penalty=1.0,
            do_sample=request.temperature > 0,
            temperature=request.temperature or 1.0,
            top_k=0,
            top_p=request.top_p,
            eos_token_id=tuple(dict.fromkeys((*end_token_ids(own), *stops))),
            output_logprobs=True,
        )

    def _completion(self, answer: Answer, request: CompletionRequest, config: GenerationConfig) -> Completion:
        """The continuation up to the first stop text, and the tokens that it has a part of."""
        ids, ends = list(answer.token_ids), end_token_ids(config)
        has_end = bool(ids) and ids[-1] in ends
        ids = ids[: len(ids) - has_end]
        decode = self.model.processor.tokenizer.backend.decode
        texts = [decode(ids[:count]) for count in range(len(ids) + 1)]
        places = [place for place in map(texts[-1].find, request.stop) if place >= 0]
        length = min(places, default=len(texts[-1]))
        tokens = tuple(texts[k + 1][len(texts[k]) :] for k in range(len(ids)) if len(texts[k]) < length)
        is_cut = not has_end and not places and not request.may_be_cut
        problem = "length" if is_cut else ""
        return Completion(texts[-1][:length], tokens, answer.token_log_probs[: len(tokens)], problem)

    def describe(self) -> dict[str, Any]:
        """The model's name and use, for report.json."""
        return {
            "model": self.name or type(self.model.vlm).__name__,
            "num_asked": self.num_asked,
            "num_refused": self.num_refused,
        }
