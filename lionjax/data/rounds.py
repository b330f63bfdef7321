# SPDX-License-Identifier: Apache-2.0
"""Conversations whose images stand where the texts have `<image>`: in any question, several in one, or none.

As in LLaVA's code (`preprocess_multimodal`), the only image of a question moves to the question's front, in the form
that the prompt template gives it. Several images of one question stay where they are in its text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lionjax.core.types import UserError
from lionjax.data.boxes import Box
from lionjax.data.chat import PromptFormat, flatten_turns, render_history, strip_prompt

IMAGE_PLACEHOLDER = "{image}"
IMAGE_MARK = "<image>"


def text_only_template(prompt_template: str, followup_template: str) -> str:
    """The prompt template without an image: its first sentences, then the template of later questions."""
    header = followup_template.partition("{question}")[0].strip()
    before = prompt_template.partition(IMAGE_PLACEHOLDER)[0]
    if header and header in before:
        return before[: before.index(header)] + followup_template.lstrip()
    return re.sub(r"(<\w+>)?\{image\}(</\w+>)?\s?", "", prompt_template)


def round_template(prompt_template: str, followup_template: str, is_first: bool, with_image: bool) -> str:
    """The template of one round: the prompt template for the first and the followup template for later ones.

    `with_image`: {image} is in it, also in a later round; else it is in none.
    """
    if is_first:
        return prompt_template if with_image else text_only_template(prompt_template, followup_template)
    if not with_image:
        return followup_template
    before = prompt_template.partition("{question}")[0]
    header = followup_template.partition("{question}")[0].strip()
    image_part = before[before.index(header) + len(header) :].lstrip(" ") if header and header in before else ""
    if IMAGE_PLACEHOLDER not in image_part:
        image_part = before[before.index(IMAGE_PLACEHOLDER) :] if not header else f"{IMAGE_PLACEHOLDER}\n"
    return followup_template.replace("{question}", image_part + "{question}")


def split_round(
    question: str, prompt_template: str, followup_template: str, is_first: bool
) -> tuple[str, str, list[str]]:
    """(template before the question, template after it, texts of the question between its images) of one round."""
    texts = question.split(IMAGE_MARK)
    if IMAGE_PLACEHOLDER not in prompt_template:
        texts = [" ".join(text.strip() for text in texts if text.strip())]
    is_single = len(texts) == 2
    if is_single:
        texts = [" ".join(text.strip() for text in texts if text.strip())]
    template = round_template(prompt_template, followup_template, is_first, is_single)
    before, after = template.split("{question}")
    if not any(text.strip() for text in texts):
        if not is_single:
            raise UserError("a round of the conversation has no question; add one")
        return before.rstrip(), after, [""]  # an image without a question
    return before, after, texts


def without_marks(question: str, prompt_format: PromptFormat) -> str:
    """The question without `<image>` marks, for a Q-Former; unchanged in other formats."""
    return question.replace(IMAGE_MARK, " ").strip() or question if prompt_format.image_marks else question


def merge_rounds(question: str, prompt_format: PromptFormat, followup_template: str) -> tuple[str, PromptFormat]:
    """(question, format): all rounds in one question, for a model without a template of later questions."""
    if followup_template or not prompt_format.turns:
        return question, prompt_format
    return render_history(prompt_format.turns, question), PromptFormat(prompt_format.kind, (), False, True)


def encode_parts(
    rounds: Sequence[tuple[str, str | None]],
    templates: tuple[str, str],
    encode_template: Callable[[str], list[int]],
    encode_text: Callable[[str], tuple[list[int], list[Box]]],
    image_ids: Sequence[int],
    end_ids: Sequence[int],
    is_decoder: bool,
) -> tuple[list[int], list[int], list[int], list[Box]]:
    """(prompt ids, target ids, loss mask, boxes of all texts in order) of rounds; each part is tokenized alone.

    `templates`: prompt template and followup template. `end_ids` end each answer.
    """
    questions, answers, boxes = [], [], []
    for index, (question, answer) in enumerate(rounds):
        before, after, texts = split_round(strip_prompt(question), *templates, not index)
        ids = list(encode_template(before))
        for number, text in enumerate(texts):
            ids += image_ids if number else ()
            if text.strip():
                text_ids, text_boxes = encode_text(text.strip())
                ids, boxes = [*ids, *text_ids], [*boxes, *text_boxes]
        questions.append([*ids, *encode_template(after)])
        if answer is not None:
            text_ids, text_boxes = encode_text(answer.strip())
            boxes += text_boxes
            answers.append([*text_ids, *end_ids])
    return *join_parts(questions, answers, is_decoder), boxes


def join_parts(
    questions: list[list[int]], answers: list[list[int]], is_decoder: bool
) -> tuple[list[int], list[int], list[int]]:
    """(prompt ids, target ids, loss mask): a decoder learns every answer, an encoder-decoder the last one."""
    if is_decoder and len(answers) == len(questions):
        return flatten_turns(questions, answers)
    history = [token for pair in zip(questions, answers) for part in pair for token in part]
    if len(answers) == len(questions):
        return history[: len(history) - len(answers[-1])], answers[-1], [1] * len(answers[-1])
    return [*history, *questions[-1]], [], []
