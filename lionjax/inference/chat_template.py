# SPDX-License-Identifier: Apache-2.0
"""Hugging Face chat templates (Jinja) as prompt templates of lionjax.

The template is rendered for one and for two questions, and the text around them becomes `prompt_template` and
`followup_template`. It needs Jinja2, which transformers installs for the same purpose.
"""

from __future__ import annotations

import importlib
import logging
import re
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import read_hf_config
from lionjax.core.types import UserError

log = logging.getLogger(__name__)

CHAT_TEMPLATE_FILES = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
QUESTIONS, ANSWER = ("QUESTION-ONE", "QUESTION-TWO"), "ANSWER-ONE"
IMAGE_PLACEHOLDER = "{image}"


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a folder, None where it has none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in CHAT_TEMPLATE_FILES:
        template = read_hf_config(folder / name).get("chat_template")
        if isinstance(template, list):  # several templates by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def prompt_fields(folder: Path, image_token: str = "<image>") -> dict[str, str]:
    """Fields of `ProcessorConfig` for the folder's chat template; {} without a template or without Jinja2.

    Raises UserError for a template that cannot be rendered.
    """
    template = read_chat_template(folder)
    if template is None:
        return {}
    try:
        sandbox = importlib.import_module("jinja2.sandbox")
    except ImportError:
        log.warning("%s has a chat template; install jinja2 to use it instead of the built-in prompt format", folder)
        return {}
    tokens = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in read_hf_config(folder / "tokenizer_config.json").items()
        if name.endswith("_token")
    }
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    # A marker of transformers around answers, for loss masks.
    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)

    def render(num_questions: int, is_open: bool) -> str:
        """The conversation with so many questions; `is_open`: the last one waits for its answer."""
        messages: list[dict[str, Any]] = []
        for number, question in enumerate(QUESTIONS[:num_questions]):
            image = [{"type": "image"}] if number == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            if number + 1 < num_questions or not is_open:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": ANSWER}]})
        text = environment.from_string(template).render(messages=messages, add_generation_prompt=is_open, **tokens)
        return text.removeprefix(tokens.get("bos_token") or "")

    try:
        first, second, closed = render(1, True), render(2, True), render(1, False)
    except Exception as error:  # templates raise any exception, also their own
        raise UserError(f"the chat template of {folder} fails: {type(error).__name__} {error}") from error
    if first.count(QUESTIONS[0]) != 1 or first.count(image_token) != 1:
        raise UserError(f"the chat template of {folder} does not write one question and one {image_token}")
    fields = {"prompt_template": first.replace(QUESTIONS[0], "{question}").replace(image_token, IMAGE_PLACEHOLDER)}
    end = closed.partition(ANSWER)[2]
    later = second.partition(ANSWER)[2]
    if later.startswith(end) and later.count(QUESTIONS[1]) == 1:
        fields |= {"answer_end": end, "followup_template": later.removeprefix(end).replace(QUESTIONS[1], "{question}")}
    return fields
