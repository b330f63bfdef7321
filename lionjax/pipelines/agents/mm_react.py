# SPDX-License-Identifier: Apache-2.0
"""MM-REACT's protocol (arXiv 2303.11381): the language model addresses "Assistant, request path" and reads what it saw.

Markers, roles, routing, the three chains of a step and the text of observations are those of the released code; the
sentences of the prompts are ours. Paths are those of the work folder with a slash in front, and no other path or URL is
opened. Tools for faces and celebrities, search and photo editing are not offered. A turn ends after a bounded number
of steps, each of which asks at most seven times.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lionjax.core.errors import UserError
from lionjax.pipelines.agents.mm_react_routes import COMMAND, IMAGE_TOOL, OCR_TOOL, format_observation, parse_requests
from lionjax.pipelines.agents.turns import (
    MAX_CALLS,
    MAX_OBSERVATION,
    AgentConfig,
    EndOfTurnError,
    Step,
    Turn,
    call_tool,
    request_reply,
    require_answer,
)
from lionjax.pipelines.completion import ChatRequest, LanguageModel, Message
from lionjax.pipelines.tools.toolbox import Toolbox

START, SEPARATOR, END = "<|im_start|>", "<|im_sep|>", "<|im_end|>"
MARKER = re.compile(r"<\|im_\w*\|>")
ROLES = {"human": "user", "assistant": "user", "ai": "assistant", "system": "system"}
OBSERVATION_PREFIX, MODEL_PREFIX = f"{SEPARATOR}Assistant\nAssistant:\n", f"{SEPARATOR}AI\n"
MAX_RETHINKS = 4
THOUGHT = re.compile(r"^\s*\d+\.\s")
ENDINGS = ("thank you for letting me", "is there anything else ", "or is there something else ")
TEXT_QUESTION = "What text is written in the image?"

EXPERTS = f"""AI works with Assistant, who can look at an image and tell what is in it. AI reads text only.
To have an image looked at, AI writes one line that begins with "{COMMAND}" and ends in the path of the image:
{COMMAND} what objects do you see in this image? /image/1a2b3c4d.png
{COMMAND} do OCR to read the text in this image /image/1a2b3c4d.png
AI first writes its thoughts as a numbered list, uses only paths that stand in the conversation, and relies on what
Assistant saw. Places in an image are two numbers of 0 to 100, from its lower left corner."""
OBJECTS_PREFIX = f"{EXPERTS}\nIf the last image of Human was not looked at, AI asks Assistant for its objects."
TASK_PREFIX = f"{EXPERTS}\nAI checks whether a part of the task of Human is not done, and asks Assistant for it."


def clean_reply(text: str) -> str:
    """A reply without end markers, and without the polite questions at the end of lines; empty lines are dropped."""
    text = text.replace(f"{END}\n", "\n").replace(END, "").replace(MODEL_PREFIX, "")
    kept = []
    for line in text.split("\n"):
        places = [place for place in map(line.lower().find, ENDINGS) if place >= 0]
        kept.append(line[: places[0]] if places else line)
    return "\n".join(line for line in kept if line)


def to_messages(text: str) -> tuple[Message, ...]:
    """The messages of a marked text: experts speak as the user, text outside of messages as the system."""
    messages = []
    for number, part in enumerate(text.replace(SEPARATOR, END + START).split(START)):
        inside, _, outside = part.partition(END)
        role, _, content = inside.partition("\n")
        if number == 0:
            outside, content = part.replace(END, ""), ""
        if content.strip():
            messages.append({"role": ROLES.get(role.strip().lower(), "user"), "content": content.strip()})
        if outside.strip():
            messages.append({"role": "system", "content": outside.strip()})
    return tuple(messages)


class MmReactAgent:
    """A conversation by MM-REACT's protocol."""

    def __init__(self, model: LanguageModel, toolbox: Toolbox, config: AgentConfig):
        self.model, self.toolbox, self.config, self.history = model, toolbox, config, ""

    def respond(self, text: str, images: Sequence[str] = ()) -> Turn:
        """The answer to a text; the paths of images follow it."""
        question = MARKER.sub("", " ".join([text, *(f"/{name}" for name in images)]))
        asked = f"{START}Human\nHuman: {question}"
        steps: list[Step] = []
        try:
            answer = self._answer(asked, steps)
        except EndOfTurnError as end:
            return Turn(text, "", tuple(steps), str(end))
        self.history += f"{asked}{MODEL_PREFIX}AI: {answer}{END}\n"
        return Turn(text, answer, tuple(steps))

    def _answer(self, asked: str, steps: list[Step]) -> str:
        scratchpad = ""
        for _ in range(self.config.max_rounds):
            requests, log = self._next_requests(asked, scratchpad)
            if not requests:
                return require_answer(clean_reply(log))
            if len(steps) + len(requests) > MAX_CALLS:
                raise EndOfTurnError(f"the language model called {MAX_CALLS} tools and wants more")
            found = [self._run(*request) for request in requests]
            steps += found
            seen = "\n".join(MARKER.sub("", step.observation) for step in found)
            scratchpad += f"{MODEL_PREFIX}{MARKER.sub('', log)}{OBSERVATION_PREFIX}{seen}"
        raise EndOfTurnError(f"there is no answer after {self.config.max_rounds} rounds")

    def _next_requests(self, asked: str, scratchpad: str) -> tuple[list[tuple[str, str]], str]:
        """(requests, what was written): of the chain for objects, else the main one, else the one for missed tasks."""
        written = self._continue(OBJECTS_PREFIX, asked, scratchpad)
        if requests := self._usable(written):
            return requests, written
        thoughts = [line for line in written.split("\n") if THOUGHT.match(line)]
        log = "\n".join([*thoughts, self._continue(EXPERTS, asked, scratchpad)])
        for _ in range(MAX_RETHINKS):
            if self._usable(log) or COMMAND not in log:
                break
            log += "\n" + self._continue(EXPERTS, asked, f"{scratchpad}{MODEL_PREFIX}{MARKER.sub('', log)}")
        if requests := self._usable(log):
            return requests, log
        if COMMAND not in log:
            missed = self._continue(TASK_PREFIX, asked, f"{scratchpad}{MODEL_PREFIX}{MARKER.sub('', log)}")
            if requests := self._usable(missed):
                return requests, f"{log}\n{missed}"
        return [], "\n".join(line for line in log.split("\n") if line not in thoughts and COMMAND not in line)

    def _usable(self, text: str) -> list[tuple[str, str]]:
        """The requests of a reply that name a tool and an input, the last command first."""
        found = parse_requests(clean_reply(text), self.config.compatible) or []
        return [(tool, given) for tool, given in found if tool and given]

    def _continue(self, prefix: str, asked: str, scratchpad: str) -> str:
        text = f"{START}system\n{prefix}{END}\n{self.history}{asked}{scratchpad}{MODEL_PREFIX}"
        request = ChatRequest(
            to_messages(text), max_tokens=self.config.max_tokens, stop=(END,), may_be_cut=True, text=text
        )
        return request_reply(self.model, request).text

    def _run(self, tool: str, given: str) -> Step:
        """A request to an expert; one that is not offered, or about another path, is a step with an error."""
        experts = {IMAGE_TOOL: self._understand, OCR_TOOL: self._read_text}
        if tool not in experts:
            return Step(tool, given, f"Error: {tool} is not available; use {' or '.join(experts)}", True)
        try:
            results = experts[tool](given.removeprefix("/"))
        except EndOfTurnError as error:
            return Step(tool, given, str(error)[:MAX_OBSERVATION], True)
        return Step(tool, given, format_observation(results | {"img_url": given}, tool == OCR_TOOL)[:MAX_OBSERVATION])

    def _understand(self, image: str) -> dict[str, Any]:
        """Description, tags, and the boxes of what the tags name, by the tools that are here."""
        size, here = self._size(image), {tool.name for tool in self.toolbox.tools}
        found: dict[str, Any] = {"size": {"width": size[0], "height": size[1]}}
        for key, tool in (("description", "caption"), ("tags", "tag")):
            if tool in here:
                found[key] = self._result(tool, {"image": image})
        if found.get("description"):
            found["description"] = found["description"].rstrip(". ")
        if "detect" in here and found.get("tags"):
            things = self._result("detect", {"image": image, "words": ", ".join(map(str, found["tags"][:8]))[:2000]})
            found["objects"] = [
                (thing["label"], [round(edge * size[k % 2]) for k, edge in enumerate(thing["box"])]) for thing in things
            ]
        return found

    def _read_text(self, image: str) -> dict[str, Any]:
        self._size(image)
        return {"words": [self._result("answer", {"image": image, "question": TEXT_QUESTION})]}

    def _size(self, image: str) -> tuple[int, int]:
        try:
            return self.toolbox.workspace.open(image).size
        except UserError as error:
            raise EndOfTurnError(f"Error: {error}") from error

    def _result(self, tool: str, arguments: dict[str, Any]) -> Any:
        step, result = call_tool(self.toolbox.tools, tool, arguments)
        if step.is_error:
            raise EndOfTurnError(step.observation)
        return result
