# SPDX-License-Identifier: Apache-2.0
"""Input pipeline throughput against a torch DataLoader with Hugging Face's processors: same files, same arrays.

python -m benchmarks.pipeline [--folder COCO_FOLDER] [--tokenizer T5_FOLDER --question-tokenizer BERT_FOLDER]

Both read captioned JPEGs, resize them to a square, normalize them, and tokenize a prompt, a question and a caption, on
one core: lionjax with one reader thread, the DataLoader in the main process. The DataLoader's texts are fixed, those of
lionjax are rendered from templates in every pass. CPU time and wall time are reported; on a busy machine, only CPU time
is meaningful. "From memory" are all passes after the first: lionjax caches resized images, a DataLoader does not.
Without `--folder`, images of synthetic scenes of 640 x 480 pixels are written, which decode faster than photographs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from lionjax.core.experiment import Stage
from lionjax.data import pipeline, tokenizer
from lionjax.data.config import DataConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.processor import CLIP_STD, ProcessorConfig
from lionjax.data.scenes import tasks, world

CACHE_MIB = 8192
CLOSE = 1e-5
PEER = "torch DataLoader"


@dataclasses.dataclass(frozen=True)
class Run:
    """The data, the sizes of a batch, and the number of timed passes."""

    folder: str = ""  # with captions.json and images/; empty: synthetic images
    images: int = 256  # number of synthetic images
    size: int = 224
    length: int = 64  # tokens of each text
    batch: int = 32
    tokenizer: str = "tiny"
    question_tokenizer: str = "tiny"
    repeats: int = 5


def make_folder(folder: Path, images: int) -> None:
    """Write scenes as JPEGs of 640 x 480 pixels with captions in COCO's format."""
    (folder / "images").mkdir()
    images_json, annotations = [], []
    for index in range(images):
        scene, name = world.sample_scene("train", index), f"{index:06d}.jpg"
        Image.fromarray(scene.render(640)[80:560]).save(folder / "images" / name, quality=90)
        images_json.append({"id": index, "file_name": name, "width": 640, "height": 480})
        annotations += [{"image_id": index, "caption": text} for text in tasks.scene_captions(scene)]
    (folder / "captions.json").write_text(json.dumps({"images": images_json, "annotations": annotations}))


def config_of(run: Run, folder: Path, cache_mib: int) -> DataConfig:
    """The data config with an image cache of `cache_mib` MiB."""
    texts = dict.fromkeys(("max_prompt_tokens", "max_question_tokens", "max_target_tokens"), run.length)
    processor = ProcessorConfig(
        run.size, tokenizer=run.tokenizer, question_tokenizer=run.question_tokenizer, use_tags=False, **texts
    )
    # No instances: captions give one example per image.
    source = Coco(str(folder), instances_file="", heldout_fraction=0.0)
    return DataConfig((source,), processor, image_cache_mib=cache_mib, num_threads=1)


def our_batches(run: Run, data: DataConfig) -> pipeline.BatchIterator:
    """lionjax's batches of captions."""
    stage = Stage("benchmark", 1, (".*",), (("caption", 1.0),), run.batch)
    return pipeline.batches(data, stage, 0, run.batch)


def our_pass(run: Run, data: DataConfig, number: int) -> Callable[[], None]:
    """A function that reads `number` batches from a new iterator."""

    def run_pass() -> None:
        batches = our_batches(run, data)
        for _ in range(number):
            next(batches)
        batches.close()

    return run_pass


class Captioned:
    """(file, question, caption) rows as a torch dataset."""

    def __init__(self, rows: list[tuple[str, str, str]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str, str]:
        file, question, caption = self.rows[index]
        with Image.open(file) as image:
            return image.convert("RGB"), question, caption


class Collate:
    """A collate function with Hugging Face's image processor and tokenizers."""

    def __init__(self, run: Run):
        import transformers

        size = {"height": run.size, "width": run.size}
        torchvision = transformers.utils.is_torchvision_available()
        class_name = "BlipImageProcessor" if torchvision else "BlipImageProcessorPil"
        self.image_processor = getattr(transformers, class_name)(size=size)
        self.tokenizer = hugging_face_tokenizer(run.tokenizer)
        self.question_tokenizer = hugging_face_tokenizer(run.question_tokenizer)
        self.length = run.length

    def __call__(self, rows) -> dict:
        images, questions, captions = zip(*rows)
        padded = dict(padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        return {
            "image": self.image_processor(list(images), return_tensors="pt")["pixel_values"],
            "prompt": self.tokenizer(list(questions), **padded),
            "question": self.question_tokenizer(list(questions), **padded),
            "target": self.tokenizer(list(captions), **padded),
        }


def hugging_face_tokenizer(name: str):
    """The tokenizer as one of transformers' fast tokenizers, which adds start and end tokens."""
    import transformers
    from tokenizers import Tokenizer, processors

    source = tokenizer.load(name)
    backend = Tokenizer.from_str(source.backend.to_str())
    special_ids = {"start": source.bos_ids, "end": [source.eos_id]}
    special_tokens = {
        position: [backend.id_to_token(token_id) for token_id in ids] for position, ids in special_ids.items()
    }
    backend.post_processor = processors.TemplateProcessing(
        single=[*special_tokens["start"], "$A", *special_tokens["end"]],
        special_tokens=[(token, backend.token_to_id(token)) for group in special_tokens.values() for token in group],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token_id=backend.id_to_token(source.pad_id)
    )


def check_same(run: Run, data: DataConfig, folder: Path) -> None:
    """Raise AssertionError unless one lionjax batch equals the batch that Hugging Face's processors make of it."""
    batches = our_batches(run, data)
    batch = next(batches)
    processor = batches.dataset.processor
    names = [batches.name(record).partition("/")[2] for record in batch.record_B.tolist()]
    texts = ([processor.prompt.decode(ids) for ids in ids_BL] for ids_BL in (batch.prompt_BL, batch.target_BM))
    rows = [(str(folder / "images" / name), *row_texts) for name, *row_texts in zip(names, *texts)]
    peer_batch = Collate(run)([Captioned(rows)[row] for row in range(len(rows))])
    batches.close()
    peer_images = np.asarray(peer_batch["image"]).transpose(0, 2, 3, 1)
    # torchvision's resize rounds some pixels differently: one step of 1/255, divided by the standard deviation.
    tolerance = 1.01 / 255 / min(CLIP_STD)
    np.testing.assert_allclose(batch.image_BHWC, peer_images, atol=tolerance, err_msg="images")
    differing_fraction = (np.abs(peer_images - batch.image_BHWC) > CLOSE).mean()
    print(f"image values that differ by one step of 1/255: {differing_fraction:.2%}")
    for name, ids, mask in (
        ("prompt", batch.prompt_BL, batch.prompt_mask_BL),
        ("question", batch.question_BL, batch.question_mask_BL),
        ("target", batch.target_BM, batch.target_mask_BM),
    ):
        np.testing.assert_array_equal(ids, peer_batch[name]["input_ids"], err_msg=name)
        np.testing.assert_array_equal(mask, peer_batch[name]["attention_mask"], err_msg=name)


def torch_pass(run: Run, rows: list[tuple[str, str, str]]) -> Callable[[], None]:
    """A function that reads all batches of a DataLoader."""
    from torch.utils.data import DataLoader

    loader = DataLoader(Captioned(rows), run.batch, shuffle=True, collate_fn=Collate(run), drop_last=True)

    def run_pass() -> None:
        for _ in loader:
            pass

    return run_pass


def main() -> None:
    """Pin the process to one core and compare the pipelines."""
    import torch

    run = tyro.cli(Run, description=__doc__)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = Path(run.folder or temporary_folder)
        if not run.folder:
            make_folder(folder, run.images)
        compare(run, folder)


def compare(run: Run, folder: Path) -> None:
    """Run all pipelines alternately after a warm-up pass, and print the medians."""
    cold, cached = (config_of(run, folder, mib) for mib in (0, CACHE_MIB))
    check_same(run, cold, folder)
    rows = [
        (str(folder / "images" / sample.name.partition("/")[2]), sample.example.question, sample.example.answer)
        for sample in pipeline.examples(cold, "caption", "train")
    ]
    number = len(rows) // run.batch
    passes = {
        PEER: torch_pass(run, rows),
        "lionjax, cold": our_pass(run, cold, number),
        "lionjax, from memory": our_pass(run, cached, number),
    }
    clock, processor = ({name: [] for name in passes} for _ in range(2))
    for repeat in range(run.repeats + 1):
        for name, run_pass in passes.items():
            start = time.perf_counter(), time.process_time()
            run_pass()
            if repeat:
                clock[name].append(time.perf_counter() - start[0])
                processor[name].append(time.process_time() - start[1])
    print(f"{run}\n{len(rows)} images, the same arrays from both\n")
    print("| input pipeline | images/s per core | vs. torch | images/s wall time | vs. torch |")
    print("|---|---|---|---|---|")
    speeds = [
        {name: number * run.batch / statistics.median(times) for name, times in seconds.items()}
        for seconds in (processor, clock)
    ]
    for name in passes:
        columns = (f"{speed[name]:.1f} | {speed[name] / speed[PEER]:.2f}x" for speed in speeds)
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
