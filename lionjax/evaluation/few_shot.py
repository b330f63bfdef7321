# SPDX-License-Identifier: Apache-2.0
"""Examples of training data to show before a question: drawn at random, or those that look most like its picture.

As OpenFlamingo's evaluation does it (arXiv 2308.01390): the most similar example stands last, and a question without
examples has two in words alone before it, so that the form of an answer is known.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.chat import Form
from lionjax.data.config import DataConfig
from lionjax.data.mixture import Sample
from lionjax.data.processor import Input
from lionjax.inference.engine import Answerer

HOW = ("random", "alike")
IN_WORDS = 2  # examples without pictures before a question that has no others


@dataclasses.dataclass
class Shown:
    """`shots` examples of a task for each question. `how`: "random", or "alike" (RICES: by the cosine of what the
    system's own tower sees, mean over patches). `pool`: training examples to choose from."""

    answerer: Answerer
    data: DataConfig
    task: str
    shots: int
    how: str = "random"
    pool: int = 256
    seed: int = 0
    in_words: bool = False

    def __post_init__(self):
        if self.how not in HOW:
            raise UserError(f"examples are chosen {self.how!r}; it can be {' or '.join(HOW)}")
        samples = pipeline.examples(self.data, self.task, "train", self.pool, self.seed)
        kept = [(self.answerer.processor.pixels(s.picture), s.example) for s in samples]
        self.pixels = [pixels for pixels, _ in kept]
        self.turns = [(example.question, example.answer) for _, example in kept]
        if self.shots > len(kept):
            raise UserError(f"{self.shots} examples are wanted of {len(kept)}; give more data")
        self.seen_SD = self.look(self.pixels) if self.how == "alike" else None

    def look(self, pixels: list[np.ndarray]) -> np.ndarray:
        """What the tower sees of pictures, the mean of their patches, of length 1: (S, D)."""
        system, params = self.answerer.system, self.answerer.params
        see = jax.jit(lambda params, batch: system.extract_features(params, batch).mean(axis=1))
        seen = []
        for start in range(0, len(pixels), 32):
            part = pixels[start : start + 32]
            rows = [*part, *[part[-1]] * (32 - len(part))]
            batch = self.answerer.processor.batch([Input(image, "?") for image in rows])
            batch = dataclasses.replace(batch, image_BHWC=batch.image_BHWC.reshape(32, -1, *part[0].shape)[:, 0])
            seen.append(np.asarray(see(params, batch))[: len(part)])
        seen_SD = np.concatenate(seen)
        return seen_SD / np.linalg.norm(seen_SD, axis=1, keepdims=True)

    def chosen(self, sample: Sample, pixels: np.ndarray) -> list[int]:
        """Which examples stand before a question, the most similar last."""
        if self.seen_SD is None:
            rng = np.random.default_rng([self.seed, sample.record, len(sample.example.question)])
            return rng.choice(len(self.turns), max(self.shots, IN_WORDS), replace=False).tolist()
        nearest = np.argsort(self.seen_SD @ self.look([pixels])[0], kind="stable")
        return nearest[len(nearest) - self.shots :].tolist()

    def before(self, sample: Sample, pixels: np.ndarray) -> tuple[np.ndarray, Form]:
        """Pixels of a question's row with those of its examples before them, and how it is written."""
        filled = self.answerer.processor.filled
        which = self.chosen(sample, pixels)
        if not self.shots:
            turns = tuple(self.turns[k] for k in which[:IN_WORDS]) if self.in_words else ()
            return filled([pixels]), Form("told", turns, True) if turns else Form()
        which = which[: self.shots]
        turns = tuple(self.turns[k] for k in which)
        return filled([*(self.pixels[k] for k in which), pixels]), Form("", turns, True)
