# SPDX-License-Identifier: Apache-2.0
"""The data of the full-size configs, in the formats that they name: a few rows of each file, with its pictures."""

import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from lionjax.core.experiment import Experiment
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.datasets.easy_vqa import EasyVqa
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.datasets.karpathy import KarpathyCaptions
from lionjax.data.datasets.lion import LionRecords
from lionjax.data.datasets.shikra import ShikraJsonl
from lionjax.data.datasets.vqa import Vqa
from lionjax.data.regions import ImageRegions
from lionjax.data.tabletop.dataset import Tabletop

ROWS = 12
SIZE = (64, 48)
COLORS = ("red", "green", "blue")
BOX, OTHER = [8, 6, 40, 30], [20, 10, 60, 44]  # in pixels
CAPTIONS = [f"a {color} disc beside a {other} square" for color in COLORS for other in COLORS]
QUESTIONS = ["What color is the disc?", "What is beside the disc?", "Why is it here?", "Which one is it?"]
TEXTS = [*CAPTIONS, *QUESTIONS, "Describe the picture.", "The answer is red.", "So the answer is"]
TEXTS += [
    "Candidates: answer in box format.",
    "Answer: [0.123,0.456,0.789,0.012]",
    "QUESTION: he waits because of it .",
]
PLAIN_CONVERSATIONS = ("captions", "cc3m", "lcs")  # an image and its caption, in one round
ONE_ROUND = (*PLAIN_CONVERSATIONS, "llava_detail", "llava_reasoning")
TEXT_ONLY = ("vicuna", "baize", "alpaca")


def caption(number: int) -> str:
    return CAPTIONS[number % len(CAPTIONS)]


def color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def write_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (*SIZE[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_rows(path: Path, rows: list) -> None:
    """As JSON Lines or a JSON list, by the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text)


def conversation(source: Conversations, number: int) -> dict:
    """A row of LLaVA's JSON, or of its relatives: one round, several, text only, or a page of several images."""

    def turns(*texts: str) -> list[dict]:
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    key, name = {"id": str(number)}, f"{number:012d}.jpg"
    if source.name == "mmc4":
        texts = ("<image>", f"{caption(number)} .") * (1 + number % 2)
        images = [f"{number:012d}.jpg", f"{(number + 1) % ROWS:012d}.jpg"][: len(texts) // 2]
        return key | {"images": images, "conversations": turns(*texts)}
    if source.name in TEXT_ONLY or (source.name == "instructions" and number % 4 == 0):
        return key | {
            "conversations": turns(QUESTIONS[2], "he waits because of it .", QUESTIONS[3], "The answer is red.")
        }
    if source.name in ONE_ROUND:
        return key | {"image": name, "conversations": turns("Describe the picture.\n<image>", caption(number))}
    first = turns(
        "<image>\nWhat color is the disc?", color(number), "What is beside the disc?", f"a {color(number)} square"
    )
    return key | {"image": name, "conversations": first}


def write_conversations(source: Conversations) -> None:
    rows = [conversation(source, number) for number in range(ROWS)]
    write_rows(Path(source.file), rows)
    for number in range(ROWS) if source.name not in TEXT_ONLY else ():
        # LLaVA-Instruct has COCO's names without their folder; the mixture has the folder.
        folder = "train2017" if source.image_dir.endswith("coco") else ""
        write_picture(Path(source.image_dir) / folder / f"{number:012d}.jpg", number)


def write_captions(source: KarpathyCaptions) -> None:
    """LAVIS's list, TextCaps' file or MiniGPT-4's, by the file's name."""
    file, root = Path(source.file), Path(source.image_dir)
    if file.name.startswith("TextCaps"):
        rows = {"data": [{"image_id": f"k{n}", "image_name": f"k{n}", "caption_str": caption(n)} for n in range(ROWS)]}
        names = [f"k{n}.jpg" for n in range(ROWS)]
    elif file.name == "filter_cap.json":
        rows = {"annotations": [{"image_id": str(n), "caption": caption(n)} for n in range(ROWS)]}
        names = [f"{n}.jpg" for n in range(ROWS)]
    else:
        folder = "val2014/COCO_val2014_" if "karpathy" in file.name else "a/"
        names = [f"{folder}{n:012d}.jpg" for n in range(ROWS)]
        rows = [{"image": name, "caption": caption(n), "image_id": f"{n}"} for n, name in enumerate(names)]
    write_rows(file, rows)
    for number, name in enumerate(names):
        write_picture(root / name, number)


def write_vqa(source: Vqa) -> None:
    numbers = range(ROWS)
    questions = [{"image_id": n, "question": QUESTIONS[0], "question_id": 10 * n} for n in numbers]
    answers = [
        {"question_id": 10 * n, "image_id": n, "answers": [{"answer": color(n), "answer_id": k} for k in range(10)]}
        for n in numbers
    ]
    for path, tree in ((source.questions, {"questions": questions}), (source.answers, {"annotations": answers})):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(tree))
    for number in numbers:
        write_picture(Path(source.image_dir) / source.file_name_pattern.format(number), number)


def json_line(source: JsonLines, number: int, tasks: set[str]) -> dict:
    task = sorted(tasks)[number % len(tasks)]
    box = [edge / size for edge, size in zip(BOX, SIZE * 2)]
    digits = "[" + ",".join(f"{edge:.3f}" for edge in box) + "]"
    if source.name in TEXT_ONLY:
        return {"question": QUESTIONS[2], "answer": caption(number)}
    image = {"image": f"{number:012d}.jpg", "task": task}
    return {
        "vqa": image | {"question": QUESTIONS[0], "answers": [color(number)]},
        "rec": image | {"expression": "the disc", "boxes": [box]},
        "reg": image | {"answer": "the disc", "question_boxes": [box]},
        "grounded": image | {"answer": f"a {color(number)} disc {digits}", "boxes": [box]},
    }[task]


def write_json_lines(source: JsonLines, tasks: set[str]) -> None:
    write_rows(Path(source.file), [json_line(source, number, tasks) for number in range(ROWS)])
    for number in range(ROWS) if source.name not in TEXT_ONLY else ():
        write_picture(Path(source.image_dir) / f"{number:012d}.jpg", number)


def shikra_row(name: str, number: int) -> dict:
    """A row of the file that has this name as a source."""
    image, question = f"{number}.jpg", QUESTIONS[number % len(QUESTIONS)]
    size = {"width": SIZE[0], "height": SIZE[1]}
    chain = {
        "question": "What is the <ph_st>disc<ph_ed>?",
        "cot_with_ans": "The <ph_st>disc<ph_ed> is red. The answer is red.",
        "answer": "red",
        "boxes": [BOX, OTHER],
        "question_boxes_seq": [[1]],
        "answer_boxes_seq": [[0]],
    }
    scored = [[*BOX, 0.9], [*OTHER, 0.8]]
    vcr = {"question": ["Why", "is", [0], "here", "?"], "answer_choices": [["it", "waits"], [[1], "waits"]]}
    vcr |= {"rationale_choices": [["because", "of", [1]]], "answer_label": 1, "rationale_label": 0, "boxes": scored}
    sentence = f"A <ph_st>{color(number)} disc<ph_ed> beside <ph_st>a square<ph_ed> ."
    outline = [[8, 6, 40, 6, 40, 30, 8, 30]]
    return {
        "refcoco": {"img_path": image, "expression": "the disc", "bbox": BOX, **size},
        "genome": {"img_path": image, "expression": "the square", "bbox": OTHER, **size},
        "flickr": {"image_id": str(number), "sentence": sentence, "boxes": [BOX, OTHER], "boxes_seq": [[0], [1]]},
        "captions": {"img_path": image, "caption": caption(number)},
        "vqav2": {"image_path": image, "question": question, "annotation": {"multiple_choice_answer": color(number)}},
        "vqa_e": {
            **{"file_path": image, "question": question},
            **{"explanation": ["It is here.", 0.9][:1], "multiple_answers": color(number)},
        },
        "vqa_x": {
            **{"file_path": image, "question": question},
            **{"justification": ["it waits"], "multiple_choice_answer": color(number)},
        },
        "vcr": {"img_fn": image, **vcr},
        "point_local": {
            "file_path": image,
            "question": "What color is it?",
            "answer": "red",
            "bbox": BOX,
            "point": [9, 9],
        },
        "visual7w": {"file_path": image, "question": "Which one is it?", "candidates": [BOX, OTHER], "answer": OTHER},
        **dict.fromkeys(("shikra_rd", "shikra_rd_more"), {"img_path": image, **chain}),
        "masks": {"img_path": image, "expressions": ["the disc"], "bbox": BOX, "mask": outline, **size},
    }[name]


def write_shikra(source: ShikraJsonl) -> None:
    write_rows(Path(source.file), [shikra_row(source.name, number) for number in range(ROWS)])
    for number in range(ROWS):
        write_picture(Path(source.image_dir) / f"{number}.jpg", number)


def write_lion(source: LionRecords) -> None:
    digits = "[0.125,0.125,0.625,0.625]"
    image_level = {"question": QUESTIONS[0], "answer": [color(0)], "category": "norm", "tags": ["red", "disc"]}
    region_level = {
        "question": "Where is the disc?",
        "answer": f"Answer: {digits}",
        "category": "ref",
        "tags": "red|disc",
    }
    fields = region_level if "region" in source.name else image_level
    write_rows(Path(source.file), [{"image": f"{n:012d}.jpg"} | fields for n in range(ROWS)])
    for number in range(ROWS):
        write_picture(Path(source.image_dir) / f"{number:012d}.jpg", number)


def write_coco(source: Coco) -> None:
    folder, count = Path(source.folder), 4 * ROWS  # some of them are held out
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": SIZE[0], "height": SIZE[1]} for n in range(count)]
    captions = [{"id": n, "image_id": n, "caption": caption(n)} for n in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / source.captions_file).write_text(json.dumps({"images": images, "annotations": captions}))
    for number, image in enumerate(images):
        write_picture(folder / source.image_dir / image["file_name"], number)


def regions_of(image) -> ImageRegions:
    """What a refiner of the release's width finds: a box for the image and a second query."""
    features = np.random.default_rng(np.asarray(image).sum()).standard_normal((2, 260)).astype(np.float32)
    return ImageRegions(("disc",), ("盘",), ((0.125, 0.125, 0.625, 0.625),), (0.5,), ("disc",), ("disc",), features)


def write_records(source: ArrayRecordDataset, refined: bool) -> None:
    """Captions, questions or conversations in their own format, built into records, with `refined` by a refiner."""
    from lionjax.data.prepare import array_record_writer

    name, folder = source.name, f"data/{source.name}"
    if "captions" in name or "pairs" in name:
        raw = KarpathyCaptions(f"{folder}/captions.json", folder)
        write_captions(raw)
    elif "vqa" in name:
        raw = Vqa(f"{folder}/questions.json", f"{folder}/answers.json", folder, "{:012d}.jpg")
        write_vqa(raw)
    else:
        raw = Conversations(f"{folder}/chat.json", folder, name=name)
        write_conversations(raw)
    refiner = (lambda: lambda images: [*map(regions_of, images)]) if refined else None
    built = array_record_writer.build(raw, source.folder, make_refiner=refiner)
    assert built.is_dir()


def write_all(experiment: Experiment, segmentation) -> None:
    """Write the files of all sources where the config names them, from the working directory on.

    `segmentation`: the module `full_size_segmentation`, which imports this one.
    """
    mixes = list(itertools.chain.from_iterable(stage.mixture for stage in experiment.stages))
    writers = {
        Conversations: write_conversations,
        KarpathyCaptions: write_captions,
        Vqa: write_vqa,
        ShikraJsonl: write_shikra,
        Coco: write_coco,
        LionRecords: write_lion,
        ArrayRecordDataset: lambda source: write_records(source, not experiment.model.info.is_dual_encoder),
        EasyVqa: lambda source: None,  # its package has them
        Tabletop: lambda source: None,  # drawn as it is read
        **segmentation.WRITERS,
    }
    for source in experiment.data.sources:
        if type(source) is JsonLines:
            write_json_lines(source, {mix.task for mix in mixes if mix.source == source.name})
        elif type(source) is Coco and not source.captions_file:
            segmentation.write_instances(source)
        else:
            writers[type(source)](source)
