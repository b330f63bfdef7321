# SPDX-License-Identifier: Apache-2.0
"""Training batches a second against a torch DataLoader with Hugging Face's processors: same files, same arrays.

python -m benchmarks.pipeline [--folder COCO_FOLDER] [--tokenizer T5_FOLDER --question-tokenizer BERT_FOLDER]

Both read captioned JPEGs, shrink them to a square, normalise them, and tokenize a prompt, a question and a caption, on
one core: our one reading thread and the loop that takes batches are held to it, and the DataLoader works in the process
itself. Its texts are chosen beforehand, ours are worded anew each time. Seconds of the processor are counted as well as
of the clock: on a busy machine only the first say something. "From memory" is every pass but the first: our pipeline
keeps shrunk pictures, a DataLoader does not. Without `--folder`, pictures of drawn scenes are made, 640 x 480, which
are flatter than photographs and decode faster.
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
from lionjax.data import processor as processors
from lionjax.data.config import DataConfig
from lionjax.data.datasets.coco import Coco
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes import tasks, world

CACHE_MIB = 8192
CLOSE = 1e-5
PEER = "torch DataLoader"


@dataclasses.dataclass(frozen=True)
class Run:
    """What is read, as what, and how often."""

    folder: str = ""  # with captions.json and images/; empty: made for the occasion
    images: int = 256  # made when there is no folder
    size: int = 224
    length: int = 64  # of each text, in tokens
    batch: int = 32
    tokenizer: str = "tiny"
    question_tokenizer: str = "tiny"
    repeats: int = 5


def make_folder(folder: Path, images: int) -> None:
    """Scenes as JPEGs of 640 x 480 with captions in COCO's format."""
    (folder / "images").mkdir()
    photos, notes = [], []
    for number in range(images):
        scene, name = world.sample_scene("train", number), f"{number:06d}.jpg"
        Image.fromarray(scene.render(640)[80:560]).save(folder / "images" / name, quality=90)
        photos.append({"id": number, "file_name": name, "width": 640, "height": 480})
        notes += [{"image_id": number, "caption": text} for text in tasks.scene_captions(scene)]
    (folder / "captions.json").write_text(json.dumps({"images": photos, "annotations": notes}))


def config_of(run: Run, folder: Path, cache_mib: int) -> DataConfig:
    texts = dict.fromkeys(("prompt_length", "question_length", "target_length"), run.length)
    processor = ProcessorConfig(
        run.size, tokenizer=run.tokenizer, question_tokenizer=run.question_tokenizer, use_tags=False, **texts
    )
    # No instances: captions alone make one example of each picture.
    source = Coco(str(folder), instances_file="", heldout_fraction=0.0)
    return DataConfig((source,), processor, image_cache_mib=cache_mib, num_threads=1)


def our_batches(run: Run, data: DataConfig) -> pipeline.BatchIterator:
    stage = Stage("benchmark", 1, (".*",), (("caption", 1.0),), run.batch)
    return pipeline.batches(data, stage, 0, run.batch)


def our_pass(run: Run, data: DataConfig, number: int) -> Callable[[], None]:
    """One pass over `number` batches, from a standing start."""

    def once() -> None:
        batches = our_batches(run, data)
        for _ in range(number):
            next(batches)
        batches.close()

    return once


class Captioned:
    """(file, question, caption) rows as a torch data set."""

    def __init__(self, rows: list[tuple[str, str, str]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str, str]:
        file, question, caption = self.rows[index]
        with Image.open(file) as picture:
            return picture.convert("RGB"), question, caption


class Collate:
    """A list of rows through Hugging Face's processors."""

    def __init__(self, run: Run):
        import transformers

        side = {"height": run.size, "width": run.size}
        torchvision = transformers.utils.is_torchvision_available()
        kind = "BlipImageProcessor" if torchvision else "BlipImageProcessorPil"
        self.pictures = getattr(transformers, kind)(size=side)
        self.words = hugging_face_tokenizer(run.tokenizer)
        self.question_words = hugging_face_tokenizer(run.question_tokenizer)
        self.length = run.length

    def __call__(self, rows) -> dict:
        images, questions, captions = zip(*rows)
        padded = dict(padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        return {
            "image": self.pictures(list(images), return_tensors="pt")["pixel_values"],
            "prompt": self.words(list(questions), **padded),
            "question": self.question_words(list(questions), **padded),
            "target": self.words(list(captions), **padded),
        }


def hugging_face_tokenizer(name: str):
    """The same vocabulary as one of transformers' fast tokenizers, which puts start and end pieces itself."""
    import transformers
    from tokenizers import Tokenizer, processors

    ours = tokenizer.load(name)
    backend = Tokenizer.from_str(ours.backend.to_str())
    pieces = {"start": ours.bos_ids, "end": [ours.eos_id]}
    words = {which: [backend.id_to_token(number) for number in ids] for which, ids in pieces.items()}
    backend.post_processor = processors.TemplateProcessing(
        single=[*words["start"], "$A", *words["end"]],
        special_tokens=[(word, backend.token_to_id(word)) for group in words.values() for word in group],
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token_id=backend.id_to_token(ours.pad_id))


def check_same(run: Run, data: DataConfig, folder: Path) -> None:
    """AssertionError unless one of our batches, put together anew from its files and words, is the same."""
    batches = our_batches(run, data)
    batch = next(batches)
    processor = batches.dataset.processor
    names = [batches.name(record).partition("/")[2] for record in batch.record_B.tolist()]
    texts = ([processor.prompt.decode(ids) for ids in ids_BL] for ids_BL in (batch.prompt_BL, batch.target_BM))
    rows = [(str(folder / "images" / name), *words) for name, *words in zip(names, *texts)]
    theirs = Collate(run)([Captioned(rows)[row] for row in range(len(rows))])
    batches.close()
    pictures = np.asarray(theirs["image"]).transpose(0, 2, 3, 1)
    # torchvision's resize rounds some pixels the other way: one step of 255, divided by the deviation.
    step = 1.01 / 255 / min(processors.CLIP_STD)
    np.testing.assert_allclose(batch.image_BHWC, pictures, atol=step, err_msg="pictures")
    differ = (np.abs(pictures - batch.image_BHWC) > CLOSE).mean()
    print(f"numbers of the pictures that differ by one step of 255: {differ:.2%}")
    for name, ids, mask in (
        ("prompt", batch.prompt_BL, batch.prompt_mask_BL),
        ("question", batch.question_BL, batch.question_mask_BL),
        ("target", batch.target_BM, batch.target_mask_BM),
    ):
        np.testing.assert_array_equal(ids, theirs[name]["input_ids"], err_msg=name)
        np.testing.assert_array_equal(mask, theirs[name]["attention_mask"], err_msg=name)


def torch_pass(run: Run, rows: list[tuple[str, str, str]]) -> Callable[[], None]:
    from torch.utils.data import DataLoader

    loader = DataLoader(Captioned(rows), run.batch, shuffle=True, collate_fn=Collate(run), drop_last=True)

    def once() -> None:
        for _ in loader:
            pass

    return once


def main() -> None:
    import torch

    run = tyro.cli(Run, description=__doc__)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(run.folder or made)
        if not run.folder:
            make_folder(folder, run.images)
        compare(run, folder)


def compare(run: Run, folder: Path) -> None:
    """All in turn, medians, after one pass of each that is not counted."""
    cold, kept = (config_of(run, folder, mib) for mib in (0, CACHE_MIB))
    check_same(run, cold, folder)
    rows = [
        (str(folder / "images" / sample.name.partition("/")[2]), sample.example.question, sample.example.answer)
        for sample in pipeline.examples(cold, "caption", "train")
    ]
    number = len(rows) // run.batch
    passes = {
        PEER: torch_pass(run, rows),
        "lionjax, cold": our_pass(run, cold, number),
        "lionjax, from memory": our_pass(run, kept, number),
    }
    clock, processor = ({name: [] for name in passes} for _ in range(2))
    for repeat in range(run.repeats + 1):
        for name, once in passes.items():
            begun = time.perf_counter(), time.process_time()
            once()
            if repeat:
                clock[name].append(time.perf_counter() - begun[0])
                processor[name].append(time.process_time() - begun[1])
    print(f"{run}\n{len(rows)} pictures, the same arrays from both\n")
    print("| input pipeline | images/s per core | against torch | by the clock | against torch |")
    print("|---|---|---|---|---|")
    speeds = [
        {name: number * run.batch / statistics.median(taken) for name, taken in seconds.items()}
        for seconds in (processor, clock)
    ]
    for name in passes:
        columns = (f"{speed[name]:.1f} | {speed[name] / speed[PEER]:.2f}x" for speed in speeds)
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
