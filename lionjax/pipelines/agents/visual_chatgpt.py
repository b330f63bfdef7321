# SPDX-License-Identifier: Apache-2.0
"""Visual ChatGPT's protocol (arXiv 2303.04671): tools by exact names, called in two lines, with file names as memory.

Order of the prompt, names of tools, action lines, the cut of the history and the memory of an image are those of the
released code; the sentences are ours. Ours differs in three ways, which `AgentConfig.compatible` takes back: a reply
that is neither an action nor an answer is asked again with the format, where the released code stops; words with
commas are read as several names, where its detection and segmentation raise; and words are counted in one way where
the history is cut. Inputs that do not fit are observations that begin `Error:`, never exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lionjax.pipelines.agents.turns import (
    AgentConfig,
    EndOfTurnError,
    Step,
    Turn,
    call_tool,
    request_reply,
    require_answer,
    run_tool,
)
from lionjax.pipelines.completion import ChatRequest, LanguageModel
from lionjax.pipelines.tools.toolbox import Toolbox
from lionjax.pipelines.tools.workspace import FOLDER

STOP = ("\nObservation: ",)
HISTORY_WORDS = 500
ACTION = re.compile(r"Action: (.{0,200}?)[\n]*Action Input: (.*)")
IMAGE = re.compile(rf"{FOLDER}/[-\w]*\.png")

PREFIX = f"""You help with tasks about text and images. You read and write text only: images you reach through tools.
Each image has a file name of the form {FOLDER}/xxx.png. Use only file names that were given to you; invent none.
When a new image is given with a description, still look at it with tools. Say what tools return, not what you imagine.
Several tools may be used one after the other, the file that one makes being the input of the next.

TOOLS:
------

You have access to these tools:"""
FORMAT = """To use a tool, write exactly these lines:

```
Thought: Do I need to use a tool? Yes
Action: the tool, one of [{names}]
Action Input: the input of the tool
Observation: the result of the tool
```

When you have an answer for the human, or need no tool, write exactly these lines:

```
Thought: Do I need to use a tool? No
AI: [your answer]
```"""
SUFFIX = f"""You are strict about file names and never give one that does not exist.
If a tool made an image, repeat its file name at the end of the answer.

Begin!

Previous conversation:
{{history}}

New input: {{question}}
You are a text model: use tools to look at images, {FOLDER}/xxx.png.
The human does not see your thoughts and observations; say all that matters in the answer.
Thought: Do I need to use a tool? {{scratchpad}} Let me think step by step.
"""
FORMAT_ERROR = "Error: this is neither an action nor an answer; write 'Action:' and 'Action Input:', or 'AI:'"


@dataclass(frozen=True)
class NamedTool:
    """A tool under its name in the protocol. `run` takes file name and rest of the input and gives the steps."""

    name: str
    says: str
    needs: str  # the toolbox's tool without which it is not offered
    run: Callable[[Toolbox, str, str], list[Step]]


def _one(tool: str, **fields: str) -> Callable[[Toolbox, str, str], list[Step]]:
    """A run of one tool with the file name, and the rest of the input as the argument `rest`."""

    def run(toolbox: Toolbox, image: str, rest: str) -> list[Step]:
        arguments = {"image": image} | ({fields["rest"]: rest} if fields else {})
        return [run_tool(toolbox.tools, tool, arguments)]

    return run


def _detect(toolbox: Toolbox, image: str, rest: str) -> list[Step]:
    """Boxes, then the image with them; only the error if nothing can be found."""
    step, things = call_tool(toolbox.tools, "detect", {"image": image, "words": rest})
    if not things:
        return [step]
    boxes, labels = [thing["box"] for thing in things], ", ".join(thing["label"] for thing in things)
    return [step, run_tool(toolbox.tools, "mark", {"image": image, "boxes": boxes[:64], "labels": labels[:2000]})]


def _remove_background(toolbox: Toolbox, image: str, rest: str) -> list[Step]:
    """The first tag of the image, cut out."""
    step, tags = call_tool(toolbox.tools, "tag", {"image": image})
    if not tags:
        return [step]
    return [step, run_tool(toolbox.tools, "cut_out", {"image": image, "words": str(tags[0])[:200]})]


_PATH = "The input is the file name of the image, such as image/1a2b3c4d.png."
_WORDS = "The input is two parts between a comma: the file name of the image, and the names of things."
TOOLS = (
    NamedTool("Get Photo Description", f"useful to know what an image shows. {_PATH}", "caption", _one("caption")),
    NamedTool(
        "Answer Question About The Image",
        "useful for a question about an image. The input is two parts between a comma: the file name, the question.",
        "answer",
        _one("answer", rest="question"),
    ),
    NamedTool("Detect the Give Object", f"useful to find things and their boxes. {_WORDS}", "detect", _detect),
    NamedTool(
        "Segment the given object", f"useful to mark a thing. {_WORDS}", "segment", _one("segment", rest="words")
    ),
    NamedTool("Remove the background", f"useful to cut the main thing out. {_PATH}", "cut_out", _remove_background),
    NamedTool("Edge Detection On Image", f"useful to draw the edges of an image. {_PATH}", "edges", _one("edges")),
    NamedTool("Count The Given Object", f"useful to count things. {_WORDS}", "count", _one("count", rest="words")),
)
BARE_SPLIT = ("Detect the Give Object", "Segment the given object")  # tools whose released code raises at a comma


def offered_tools(toolbox: Toolbox) -> list[NamedTool]:
    """The protocol's tools that the toolbox has models for."""
    here = {tool.name for tool in toolbox.tools}
    return [tool for tool in TOOLS if tool.needs in here]


def build_prompt(tools: Sequence[NamedTool], history: str, question: str, scratchpad: str) -> str:
    """The prompt: principles, one line a tool, format, and history, question and what was thought in this turn."""
    listed = "\n".join(f"> {tool.name}: {tool.says}" for tool in tools)
    names = ", ".join(tool.name for tool in tools)
    fields = {"{history}": history, "{question}": question, "{scratchpad}": scratchpad}
    suffix = re.sub(r"\{\w+\}", lambda match: fields[match[0]], SUFFIX)
    return "\n\n".join([PREFIX, listed, FORMAT.replace("{names}", names), suffix])


def cut_history(history: str, keep_words: int = HISTORY_WORDS, compatible: bool = False) -> str:
    """The history if it has fewer than `keep_words` words, else its last lines with fewer, after a line break.

    `compatible`: words of a dropped line are counted between single spaces, as in the released code, where an empty
    line counts as one and the lines that are left may have too many words.
    """
    count = len(history.split())
    if count < keep_words:
        return history
    lines = history.split("\n")
    while lines and count >= keep_words:
        count -= len(lines.pop(0).split(" " if compatible else None))
    return "\n" + "\n".join(lines)


def parse_reply(text: str) -> tuple[str, str] | str | None:
    """(action, input) of a reply, its answer (the text after the last "AI:"), or None for neither."""
    if "AI:" in text:
        return text.rpartition("AI:")[2].strip()
    match = ACTION.search(text)
    return (match[1].strip(), match[2].strip(" ").strip('"')) if match else None


def split_input(text: str) -> tuple[str, str]:
    """(file name, what follows the first comma) of an action's input."""
    name, _, rest = text.partition(",")
    return name.strip(), rest.strip()


def render_answer(text: str, names: Sequence[str]) -> str:
    """The answer with each file name of the work folder as an image in Markdown with its name; others stay text."""
    text = text.replace("\\", "/")
    return IMAGE.sub(lambda match: f"![](file={match[0]})*{match[0]}*" if match[0] in names else match[0], text)


class VisualChatGptAgent:
    """A conversation by Visual ChatGPT's protocol."""

    def __init__(self, model: LanguageModel, toolbox: Toolbox, config: AgentConfig):
        self.model, self.toolbox, self.config = model, toolbox, config
        self.tools, self.history = offered_tools(toolbox), ""

    def respond(self, text: str, images: Sequence[str] = ()) -> Turn:
        """The answer to a text; images are described first and stand in the memory."""
        steps: list[Step] = []
        for name in images:
            self.history += self._memory(name, steps)
        self.history = cut_history(self.history, compatible=self.config.compatible)
        try:
            answer = self._answer(text, steps)
        except EndOfTurnError as end:
            return Turn(text, "", tuple(steps), str(end))
        self.history += f"\nHuman: {text}\nAI: {answer}"
        return Turn(text, render_answer(answer, self.toolbox.workspace.names()), tuple(steps))

    def _memory(self, name: str, steps: list[Step]) -> str:
        """The turn of the memory that gives an image, with the caption of the model if there is one."""
        caption = None
        if any(tool.name == "caption" for tool in self.toolbox.tools):
            step, caption = call_tool(self.toolbox.tools, "caption", {"image": name})
            steps.append(step)
        told = (
            f"provide a figure named {name}. The description is: {caption or 'unknown'}. Look at it with tools in the "
        )
        return f"\nHuman: {told}tasks that follow. Answer Received if this is clear.\nAI: Received.  "

    def _answer(self, text: str, steps: list[Step]) -> str:
        scratchpad = ""
        for _ in range(self.config.max_rounds):
            prompt = build_prompt(self.tools, self.history, text, scratchpad)
            messages = ({"role": "user", "content": prompt},)
            request = ChatRequest(messages, max_tokens=self.config.max_tokens, stop=STOP, may_be_cut=True, text=prompt)
            reply = request_reply(self.model, request).text
            parsed = parse_reply(reply)
            if isinstance(parsed, str):
                return require_answer(parsed)
            if parsed is None and self.config.compatible:
                raise EndOfTurnError("the reply is neither an action nor an answer")
            found = [Step("", reply, FORMAT_ERROR, True)] if parsed is None else self._act(*parsed)
            steps += found
            scratchpad += f"{reply}\nObservation: {_observation(found)}\nThought:"
        raise EndOfTurnError(f"there is no answer after {self.config.max_rounds} rounds")

    def _act(self, action: str, text: str) -> list[Step]:
        """The steps of an action; an unknown tool or a wrong input is one step with an error."""
        tool = next((tool for tool in self.tools if tool.name == action), None)
        if tool is None:
            names = ", ".join(tool.name for tool in self.tools)
            return [Step(action[:80], text, f"Error: there is no tool of this name; use one of {names}", True)]
        name, rest = split_input(text)
        if self.config.compatible and action in BARE_SPLIT and "," in rest:
            return [Step(action, text, "Error: too many values to unpack (expected 2)", True)]
        return tool.run(self.toolbox, name, rest)


def _observation(steps: Sequence[Step]) -> str:
    """What the language model reads of steps: the last result, and the boxes before a marked image."""
    return " ".join(step.observation for step in steps)
