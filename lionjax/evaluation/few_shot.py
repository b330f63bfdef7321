# SPDX-License-Identifier: Apache-2.0
"""Few-shot (in-context) examples for evaluation, chosen at random or by image similarity (RICES).

As in OpenFlamingo's evaluation (arXiv 2308.01390): the most similar example comes last, and a zero-shot question is
preceded by two text-only examples that show the answer format.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.chat import PromptFormat
from lionjax.data.config import DataConfig
from lionjax.data.mixture import padded_turn
from lionjax.data.processor import ImageTextInput
from lionjax.data.samples import Sample
from lionjax.inference.engine import InferenceEngine

SELECTION_METHODS = ("random", "alike")
NUM_TEXT_EXAMPLES = 2  # text-only examples before a zero-shot question


@dataclasses.dataclass
class FewShot:
    """Chooses `num_shots` training examples of a task for each question. Raises UserError for invalid settings."""

    engine: InferenceEngine
    data: DataConfig
    task: str
    num_shots: int
    selection: str = "random"  # or "alike": RICES, by cosine similarity of the model's mean image features
    pool_size: int = 256  # training examples to choose from
    seed: int = 0
    use_text_examples: bool = False  # put NUM_TEXT_EXAMPLES text-only examples before questions if num_shots is 0

    def __post_init__(self):
        if self.selection not in SELECTION_METHODS:
            raise UserError(f"selection is {self.selection!r}; choose {' or '.join(SELECTION_METHODS)}")
        samples = pipeline.examples(self.data, self.task, "train", self.pool_size, self.seed)
        processor = self.engine.processor
        pool = [
            (processor.load_pixels(s.image), padded_turn(s.example, processor.get_letterbox(s.image))) for s in samples
        ]
        self.pool_pixels = [pixels for pixels, _ in pool]
        self.pool_turns = [turn for _, turn in pool]
        if self.num_shots > len(pool):
            raise UserError(f"num_shots is {self.num_shots} but the pool has {len(pool)} examples; give more data")
        self.pool_features_SD = self.image_features(self.pool_pixels) if self.selection == "alike" else None

    def image_features(self, pixels: list[np.ndarray]) -> np.ndarray:
        """L2-normalized image features, averaged over patches: (S, D) for S images."""
        model, params = self.engine.model, self.engine.params
        features_fn = jax.jit(lambda params, batch: model.extract_features(params, batch).mean(axis=1))
        features = []
        for start in range(0, len(pixels), 32):
            chunk = pixels[start : start + 32]
            padded = [*chunk, *[chunk[-1]] * (32 - len(chunk))]
            batch = self.engine.processor.batch([ImageTextInput(image, "?") for image in padded])
            batch = dataclasses.replace(batch, image_BHWC=batch.image_BHWC.reshape(32, -1, *chunk[0].shape)[:, 0])
            features.append(np.asarray(features_fn(params, batch))[: len(chunk)])
        features_SD = np.concatenate(features)
        return features_SD / np.linalg.norm(features_SD, axis=1, keepdims=True)

    def select(self, sample: Sample, pixels: np.ndarray) -> list[int]:
        """Indices into the pool of the examples for a question, the most similar last."""
        if self.pool_features_SD is None:
            rng = np.random.default_rng([self.seed, sample.record_id, len(sample.example.question)])
            return rng.choice(len(self.pool_turns), max(self.num_shots, NUM_TEXT_EXAMPLES), replace=False).tolist()
        nearest = np.argsort(self.pool_features_SD @ self.image_features([pixels])[0], kind="stable")
        return nearest[len(nearest) - self.num_shots :].tolist()

    def prepend_examples(self, sample: Sample, pixels: np.ndarray) -> tuple[np.ndarray, PromptFormat]:
        """The pixels of the examples followed by the question's, and the PromptFormat with the examples' turns."""
        stack_images = self.engine.processor.stack_images
        indices = self.select(sample, pixels)
        if not self.num_shots:
            turns = tuple(self.pool_turns[k] for k in indices[:NUM_TEXT_EXAMPLES]) if self.use_text_examples else ()
            return stack_images([pixels]), PromptFormat("told", turns, True) if turns else PromptFormat()
        indices = indices[: self.num_shots]
        turns = tuple(self.pool_turns[k] for k in indices)
        return stack_images([*(self.pool_pixels[k] for k in indices), pixels]), PromptFormat("", turns, True)
