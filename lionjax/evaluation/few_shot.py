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
from lionjax.data.chat import PromptFormat
from lionjax.data.config import DataConfig
from lionjax.data.mixture import Sample
from lionjax.data.processor import ImageTextInput
from lionjax.inference.engine import InferenceEngine

SELECTION_METHODS = ("random", "alike")
NUM_TEXT_EXAMPLES = 2  # examples without pictures before a question that has no others


@dataclasses.dataclass
class FewShot:
    """`shots` examples of a task for each question. `how`: "random", or "alike" (RICES: by the cosine of what the
    system's own tower sees, mean over patches). `pool`: training examples to choose from."""

    engine: InferenceEngine
    data: DataConfig
    task: str
    num_shots: int
    selection: str = "random"
    pool_size: int = 256
    seed: int = 0
    use_text_examples: bool = False

    def __post_init__(self):
        if self.selection not in SELECTION_METHODS:
            raise UserError(f"examples are chosen {self.selection!r}; it can be {' or '.join(SELECTION_METHODS)}")
        samples = pipeline.examples(self.data, self.task, "train", self.pool_size, self.seed)
        kept = [(self.engine.processor.load_pixels(s.image), s.example) for s in samples]
        self.pool_pixels = [pixels for pixels, _ in kept]
        self.pool_turns = [(example.question, example.answer) for _, example in kept]
        if self.num_shots > len(kept):
            raise UserError(f"{self.num_shots} examples are wanted of {len(kept)}; give more data")
        self.pool_features_SD = self.image_features(self.pool_pixels) if self.selection == "alike" else None

    def image_features(self, pixels: list[np.ndarray]) -> np.ndarray:
        """What the tower sees of pictures, the mean of their patches, of length 1: (S, D)."""
        system, params = self.engine.model, self.engine.params
        see = jax.jit(lambda params, batch: system.extract_features(params, batch).mean(axis=1))
        seen = []
        for start in range(0, len(pixels), 32):
            part = pixels[start : start + 32]
            rows = [*part, *[part[-1]] * (32 - len(part))]
            batch = self.engine.processor.batch([ImageTextInput(image, "?") for image in rows])
            batch = dataclasses.replace(batch, image_BHWC=batch.image_BHWC.reshape(32, -1, *part[0].shape)[:, 0])
            seen.append(np.asarray(see(params, batch))[: len(part)])
        seen_SD = np.concatenate(seen)
        return seen_SD / np.linalg.norm(seen_SD, axis=1, keepdims=True)

    def select(self, sample: Sample, pixels: np.ndarray) -> list[int]:
        """Which examples stand before a question, the most similar last."""
        if self.pool_features_SD is None:
            rng = np.random.default_rng([self.seed, sample.record_id, len(sample.example.question)])
            return rng.choice(len(self.pool_turns), max(self.num_shots, NUM_TEXT_EXAMPLES), replace=False).tolist()
        nearest = np.argsort(self.pool_features_SD @ self.image_features([pixels])[0], kind="stable")
        return nearest[len(nearest) - self.num_shots :].tolist()

    def prepend_examples(self, sample: Sample, pixels: np.ndarray) -> tuple[np.ndarray, PromptFormat]:
        """Pixels of a question's row with those of its examples before them, and how it is written."""
        filled = self.engine.processor.stack_images
        which = self.select(sample, pixels)
        if not self.num_shots:
            turns = tuple(self.pool_turns[k] for k in which[:NUM_TEXT_EXAMPLES]) if self.use_text_examples else ()
            return filled([pixels]), PromptFormat("told", turns, True) if turns else PromptFormat()
        which = which[: self.num_shots]
        turns = tuple(self.pool_turns[k] for k in which)
        return filled([*(self.pool_pixels[k] for k in which), pixels]), PromptFormat("", turns, True)
