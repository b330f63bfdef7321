# SPDX-License-Identifier: Apache-2.0
"""System messages and solved examples of LLaVA's data (arXiv 2304.08485) and of Shikra's chains, invented here.

A folder in the form of LLaVA's repository replaces them: system_message.txt, and pairs NNN_caps.txt and NNN_conv.txt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lionjax.core.errors import UserError
from lionjax.pipelines.completion import Message

SYSTEM_FILE, MAX_EXAMPLES = "system_message.txt", 16


@dataclass(frozen=True)
class FewShot:
    """A system message and (context, reply) pairs."""

    system: str
    examples: tuple[tuple[str, str], ...]

    def messages(self, context: str) -> tuple[Message, ...]:
        """The conversation whose next message is the reply to a context."""
        turns = [(role, text) for pair in self.examples for role, text in zip(("user", "assistant"), pair)]
        turns = [("system", self.system), *turns, ("user", context)]
        return tuple({"role": role, "content": text} for role, text in turns)


def read_few_shot(folder: Path) -> FewShot:
    """The system message and examples of a folder. Raises UserError for missing files."""
    try:
        system = (folder / SYSTEM_FILE).read_text().strip()
        contexts = sorted(folder.glob("*_caps.txt"))[:MAX_EXAMPLES]
        replies = [path.with_name(path.name.replace("_caps.txt", "_conv.txt")) for path in contexts]
        texts = [(context.read_text().strip(), reply.read_text().strip()) for context, reply in zip(contexts, replies)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder} lacks a file ({error}); give {SYSTEM_FILE}, and NNN_caps.txt with NNN_conv.txt"
        ) from error
    return FewShot(system, tuple(texts))


_CONTEXT = """A dog runs over wet sand.
A brown dog on a beach plays near the water.
The dog carries a red ball.
A dog at the sea on a cloudy day.
A wet dog with a ball in its mouth."""
_BOXES = """

dog: [0.31, 0.402, 0.668, 0.871]
sports ball: [0.352, 0.455, 0.41, 0.522]
bird: [0.81, 0.12, 0.86, 0.17]
bird: [0.88, 0.1, 0.93, 0.16]"""
_RULES = (
    "Write as if you looked at the image. Say only what can be known for certain. Never mention captions, sentences, "
    "boxes, coordinates or numbers of places, nor that you were given a description."
)

CONVERSATION = FewShot(
    "You see an image, which five sentences describe. Write a conversation between you and a person who asks about "
    "it: about kinds of things, how many there are, what they do, where they are and how they lie to each other, and "
    "at last one question that needs knowledge beyond the image, with a longer answer. Ask only what has a certain "
    "answer. Each "
    f"question follows a line Question:, each answer a line Answer:, and a line === lies between. {_RULES}",
    (
        (
            _CONTEXT,
            "Question:\nWhat animal is in the image?\n===\nAnswer:\nA brown dog is in the image.\n===\n"
            "Question:\nWhat does it carry?\n===\nAnswer:\nIt carries a red ball in its mouth.\n===\n"
            "Question:\nWhy may people let their dogs run at such a place?\n===\nAnswer:\nA beach has much open space, "
            "soft ground and water to cool down in.\n\nOn a cloudy day there are fewer visitors, so a dog disturbs "
            "nobody.",
        ),
    ),
)
DETAIL = FewShot(
    "You see an image, which five sentences describe, followed by things in it with their places: left, top, right and "
    "bottom edge as fractions of the image. Describe the scene in detail. Use the places to tell how many things there "
    f"are and how they lie to each other. {_RULES}",
    (
        (
            _CONTEXT + _BOXES,
            "A brown, wet dog runs over the sand of a beach in the middle of the image. It holds a red ball in its "
            "mouth. Behind it is the sea under a cloudy sky, and two birds fly close to each other in the upper "
            "right.",
        ),
    ),
)
REASONING = FewShot(
    "You see an image, which five sentences describe, followed by things in it with their places: left, top, right and "
    "bottom edge as fractions of the image. Invent one difficult question about the scene that needs reasoning or "
    "background knowledge, and that does not give away what is to be seen; answer it in detail. The question follows a "
    f"line Question:, the answer a line Answer:, and a line === lies between. {_RULES}",
    (
        (
            _CONTEXT + _BOXES,
            "Question:\nWhat should the owner do after this outing?\n===\nAnswer:\nThe dog is wet from the sea and "
            "has run over sand, so it should be rinsed with fresh water, as salt and sand irritate the skin, and "
            "then dried. It also needs water to drink, since it carried a ball and may have swallowed seawater.",
        ),
    ),
)
CHAIN = FewShot(
    "You see an image, which sentences describe, followed by numbered things with their places: left, top, right and "
    "bottom edge as fractions of the image. Invent a question about things of the list, reason step by step, and "
    "answer. Write each mention of a thing of the list as [words](number), or [words](number, number) for several. "
    "Three blocks follow the lines Question:, Thought: and Answer:, with a line === between. Write no coordinates.",
    (
        (
            "A dog with a ball on a beach.\n\n0 dog: [0.31, 0.402, 0.668, 0.871]\n1 ball: [0.352, 0.455, 0.41, 0.522]\n"
            "2 bird: [0.81, 0.12, 0.86, 0.17]\n3 bird: [0.88, 0.1, 0.93, 0.16]",
            "Question:\nHow many animals are not holding [the ball](1)?\n===\nThought:\n[The ball](1) is held by "
            "[the dog](0). The other animals are [two birds](2, 3) in the sky.\n===\nAnswer:\n2",
        ),
    ),
)
