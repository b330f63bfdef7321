# SPDX-License-Identifier: Apache-2.0
"""Evaluation of dual encoders such as CLIP: for each image the caption of the benchmark that fits it best."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from lionjax.data import images
from lionjax.data.samples import Sample
from lionjax.inference import dual_encoder
from lionjax.inference.engine import Answer, InferenceEngine, extract_boxes


def retrieval_batches(
    inference_engine: InferenceEngine, samples: Iterator[Sample]
) -> Iterator[tuple[list[Sample], dict[str, list[Answer]]]]:
    """All samples in one batch, with the best caption of each image among the first ones of all ("answers").

    "blind": the best caption of a gray image. The share of captions that are an image's own is its recall at 1.
    """
    clip, batch = dual_encoder.from_engine(inference_engine), list(samples)
    if not batch:
        return
    texts = [sample.example.answers[0] for sample in batch]
    gray = Image.new("RGB", images.to_pil_image(batch[0].image).size, tuple(int(255 * m) for m in clip.images.mean))
    answers = [Answer(text, extract_boxes(text)) for text in texts]
    best = [answers[place] for place in clip.logits([s.image for s in batch], texts).argmax(axis=1)]
    blind = answers[clip.logits([gray], texts)[0].argmax()]
    yield batch, {"answers": best, "blind": [blind] * len(batch)}
