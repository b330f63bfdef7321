# SPDX-License-Identifier: Apache-2.0
"""Wrote the files of this folder, by the code of lionjax 0.1. It runs on commit 9f840f3 alone.

    cd CLONE_AT_9f840f3
    JAX_PLATFORMS=cpu PYTHONPATH=. python THIS_FOLDER/make_artefacts.py THIS_FOLDER

Kept as documentation: later versions must read what it wrote, see tests/e2e/test_old_files.py. Beside
it lie user/*.py, configs as users of 0.1 wrote them. Everything else in the folder is made anew,
expected.json last.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import platform
import runpy
import shutil
import signal
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import tokenizers
from PIL import Image, ImageDraw

import lionjax
from lionjax import cli, config, convert, model, sharding
from lionjax import params as trees
from lionjax.adapters import AdapterConfig, CrossConfig
from lionjax.bridges.latents import AbstractorConfig, ProjectionConfig, ResamplerConfig
from lionjax.bridges.qformer import AggregatorConfig, QFormerConfig
from lionjax.config import AnswerConfig, Experiment, Stage
from lionjax.convert.systems import of_config
from lionjax.data import pipeline
from lionjax.data.annotations import Lines, RefCoco, Vqa
from lionjax.data.built import Built
from lionjax.data.coco import Coco
from lionjax.data.examples import DataConfig
from lionjax.data.processors import Processor, ProcessorConfig
from lionjax.data.scienceqa import ScienceQa
from lionjax.data.sources import EasyVqa, Scenes
from lionjax.data.tokenizer import SPECIAL
from lionjax.heads import PlaceConfig
from lionjax.language.bert import BertConfig
from lionjax.language.decoder import KOSMOS2_TEXT, DecoderConfig
from lionjax.language.t5 import T5Config
from lionjax.layers import LoraConfig
from lionjax.systems.blip2 import Blip2First
from lionjax.systems.flamingo import Flamingo
from lionjax.systems.lion import Lion
from lionjax.systems.nextchat import NextChat
from lionjax.systems.prefix import Prefix
from lionjax.training import loop
from lionjax.vision.ram import RamConfig
from lionjax.vision.sam import SamConfig
from lionjax.vision.swin import SwinConfig
from lionjax.vision.vit import ViTConfig

CONFIGS = Path(lionjax.__file__).parent.parent / "configs"
PROMPTS = ("What color is the circle?", "Where is the red star?")
BOX = (0.125, 0.25, 0.5, 0.75)
WORDS = 96  # pieces of the tokenizer
IMAGE_TOKEN, TRIGGER, LOCATION = 21, 19, 20  # <im_patch>, <at>, <boxes>
PLAIN = (
    "a an the is are of in on at to and or not no yes what where how many which there this it "
    "color shape picture box red blue green yellow star circle square ring left right one two three"
).split()
BF16 = ml_dtypes.bfloat16


# Parts that several systems share


def vit(**changes) -> ViTConfig:
    return ViTConfig(**dict(image=16, patch=8, width=8, depth=2, heads=2, hidden=12) | changes)


CLIP = vit(
    eps=1e-5,
    activation="quick_gelu",
    biases="qkvo",
    patch_bias=False,
    norm_before=True,
    norm_after=True,
)
T5 = T5Config(WORDS, 8, 4, 2, 12, 2, 2, dropout=0.0, activation="gelu")
DECODER = DecoderConfig(WORDS, 8, 2, 2, 2, 4, 12, end_token=1)
OPT = dataclasses.replace(
    DECODER,
    activation="relu",
    gated=False,
    centred=True,
    biases="qkvo",
    tied=True,
    positions=130,
    position_offset=2,
    pad_token=1,
    start_token=2,
)
READING = QFormerConfig(8, 2, 2, 12, 2, vision_width=8, vocab=WORDS, positions=40, dropout=0.0)
QUERIES = dataclasses.replace(READING, text=False)
SAM = SamConfig(
    image=32,
    patch=8,
    width=8,
    depth=2,
    heads=2,
    hidden=12,
    window=2,
    global_layers=(1,),
    channels=8,
    mask_channels=4,
    decoder_heads=2,
    decoder_hidden=8,
    iou_hidden=8,
)
PLACES = PlaceConfig(TRIGGER, LOCATION, location_hidden=16, mask_tokens=2, max_boxes=3)
LION = Lion(
    vit(),
    READING,
    AggregatorConfig(1, (0,), width=8, heads=2, hidden=12, dropout=0.0, projector=12),
    dataclasses.replace(T5, adapters=AdapterConfig(4)),
    soft_prompt_token=3,
)
LLAVA = Prefix(CLIP, DECODER, image_token=IMAGE_TOKEN)
BEHIND_EVA = {"feature_layer": -1, "class_token": True, "vision_eps": 1e-5, "projector_depth": 1}
ENCODED = {"tags": False}
IN_ONE_ROW = {
    "tags": False,
    "reader": "decoder",
    "template": "USER: {image} {question} ASSISTANT:",
    "image_token": IMAGE_TOKEN,
}
POINTING = {"padded": True, "places": "embeddings", "boxes": 4, "sam_size": SAM.image}
KOSMOS_WORDS = dataclasses.replace(
    KOSMOS2_TEXT,
    vocab=WORDS + 4 * 4,
    width=8,
    layers=2,
    heads=2,
    kv_heads=2,
    head=4,
    hidden=12,
    dropout=0.0,
    pad_token=0,
    end_token=1,
    position_offset=1,
)

# {name: (system, fields of its processor, dtype of its parameters)}
SYSTEMS = {
    "lion": (LION, {}, BF16),
    "lion_places_sam": (dataclasses.replace(LION, places=PLACES, sam=SAM), POINTING, np.float32),
    "lion_places_sam_decoder": (
        dataclasses.replace(
            LION,
            language=dataclasses.replace(DECODER, adapters=AdapterConfig(4)),
            places=PLACES,
            sam=SAM,
        ),
        POINTING | {"reader": "decoder"},
        np.float32,
    ),
    "nextchat": (
        NextChat(
            vit(),
            DECODER,
            SAM,
            -1,
            location_hidden=16,
            mask_tokens=2,
            box_scale=32.0,
            image_token=IMAGE_TOKEN,
            trigger_token=TRIGGER,
            location_token=LOCATION,
            max_boxes=3,
        ),
        POINTING
        | {"tags": False, "reader": "decoder", "template": "{image} {question}", "image_tokens": 4},
        np.float32,
    ),
    "llava15": (LLAVA, IN_ONE_ROW | {"padded": True, "padding": "mean"}, np.float16),
    "llava": (
        dataclasses.replace(LLAVA, projector_depth=1, image_token=-200, names="original"),
        IN_ONE_ROW | {"image_token": -200},
        BF16,
    ),
    "llava_pooled": (
        dataclasses.replace(LLAVA, pool=2, names="original", feature_layer=-1, vision=vit()),
        IN_ONE_ROW,
        np.float32,
    ),
    "shikra": (
        dataclasses.replace(LLAVA, projector_depth=1, names="original"),
        IN_ONE_ROW | {"next_turn": "USER: {question} ASSISTANT:"},
        np.float32,
    ),
    "blip2_decoder": (
        Prefix(vit(), OPT, QUERIES, image_token=IMAGE_TOKEN, **BEHIND_EVA),
        IN_ONE_ROW,
        np.float16,
    ),
    "blip2_t5": (Prefix(vit(), T5, QUERIES, image_token=IMAGE_TOKEN, **BEHIND_EVA), ENCODED, BF16),
    "instructblip_t5": (
        Prefix(vit(), T5, READING, image_token=IMAGE_TOKEN, **BEHIND_EVA),
        ENCODED,
        np.float32,
    ),
    "instructblip_decoder": (
        Prefix(
            vit(),
            dataclasses.replace(DECODER, vocab=WORDS + 1, pad_token=WORDS, vocab_multiple=8),
            READING,
            image_token=None,
            **BEHIND_EVA,
        ),
        {"tags": False, "reader": "decoder"},
        np.float32,
    ),
    "minigpt4": (
        Prefix(vit(), DECODER, QUERIES, image_token=IMAGE_TOKEN, names="original", **BEHIND_EVA),
        IN_ONE_ROW
        | {
            "template": "###Human: <Img>{image}</Img> {question} ###Assistant:",
            "answer_end": "star",
        },
        np.float32,
    ),
    "mplug_owl": (
        dataclasses.replace(
            LLAVA,
            vision=vit(),
            language=dataclasses.replace(DECODER, lora=LoraConfig(2, 8.0, 0.05)),
            latents=AbstractorConfig(8, 2, 2, 12, 2, dropout=0.0),
            feature_layer=-1,
            class_token=True,
            vision_eps=1e-6,
            projector_depth=1,
            closing=True,
            in_front=False,
            names="original",
        ),
        IN_ONE_ROW,
        np.float32,
    ),
    "kosmos2": (
        dataclasses.replace(
            LLAVA,
            language=KOSMOS_WORDS,
            latents=ProjectionConfig(8, 8, 2, 2),
            feature_layer=-1,
            class_token=True,
            vision_eps=1e-5,
            projector_depth=0,
            unit=True,
            image_token=-1,
        ),
        IN_ONE_ROW
        | {"template": "{image} {question}", "image_token": -1, "places": "bins", "bins": 4},
        np.float32,
    ),
    "frozen": (
        Prefix(
            vit(),
            T5,
            None,
            -1,
            projector_depth=1,
            words=2,
            image_token=IMAGE_TOKEN,
            names="original",
        ),
        ENCODED | {"template": "{image} {question}", "image_token": IMAGE_TOKEN},
        np.float32,
    ),
    "flamingo": (
        Flamingo(
            vit(),
            ResamplerConfig(8, 2, 2, 4, 12, 2),
            dataclasses.replace(DECODER, cross=CrossConfig(1, 8, 2, 4, 16), frozen_words=90),
            IMAGE_TOKEN,
            part_weights=(1.0, 0.5),
        ),
        IN_ONE_ROW | {"template": "{image} {question}", "shot_end": "</s>", "pictures": 2},
        np.float32,
    ),
    "blip2_first": (
        Blip2First(vit(), READING, shared=6, start_token=4, write_token=5),
        ENCODED,
        np.float32,
    ),
}

# Parts of systems by themselves: they have parameters and no answers.
PARTS = {
    "t5": (T5, BF16),
    "decoder": (DECODER, np.float16),
    "bert": (BertConfig(WORDS, 8, 2, 2, 12, 16), np.float32),
    "vit": (CLIP, BF16),
    "sam": (SAM, np.float32),
    "swin": (SwinConfig(32, 4, 4, (1, 2), (1, 2), 4, 2.0), np.float32),
}
RAM = RamConfig(
    SwinConfig(32, 4, 4, (1, 2), (1, 2), 4, 2.0),
    tags=5,
    label_width=6,
    image_width=8,
    width=8,
    heads=2,
    hidden=12,
    layers=2,
)


def experiment(name: str, system, processor: dict) -> Experiment:
    """What is recorded beside a model: one stage that nobody has run."""
    lengths = {"image_size": 16, "prompt_length": 48, "question_length": 32, "target_length": 12}
    names = {"tokenizer": "tokenizer", "question_tokenizer": "tokenizer"}
    return Experiment(
        name=name,
        system=system,
        data=DataConfig(
            sources=(Scenes((6, 2, 4), pixels=32),),
            processor=ProcessorConfig(**lengths | names | processor),
        ),
        stages=(Stage("only", 1, ("projector",), (("vqa", 1.0),), batch_size=2),),
        answer=AnswerConfig(),
    )


# Random parameters and what is said of a tree


def drawn(path: str, shape, rng) -> np.ndarray:
    """Numbers large enough that picture and prompt matter."""
    values = rng.normal(size=shape).astype(np.float32)
    if len(shape) < 2 or path.endswith("scale"):
        return 1 + 0.1 * values if path.endswith("scale") else 0.1 * values
    return values * (0.9 if "tokens" in path or "table" in path or "head" in path else 0.5)


def params_of(shapes, dtype, seed: int) -> dict:
    """Random parameters for a tree of shapes, drawn by numpy."""
    rng = np.random.default_rng(seed)
    flat = trees.flatten(shapes)
    return {path: drawn(path, leaf.shape, rng).astype(dtype) for path, leaf in flat.items()}


def answering_params(what: Experiment, dtype, seed: int):
    """Random parameters that say places often, with zeros in the rows that nobody can say."""
    batch = model.example(Processor(what.data.processor))
    shapes = sharding.abstract(what.system.init, jax.random.key(0), batch)
    flat = params_of(shapes, dtype, seed)
    language = getattr(what.system, "language", None)
    for path, leaf in flat.items():
        if path == "language/head/kernel":
            if what.data.processor.places == "embeddings":
                leaf[:, TRIGGER] *= 6
            leaf[:, language.vocab :] = 0
        if path == "language/embedding/table":
            leaf[language.vocab :] = 0
    return trees.unflatten(flat)


def sha256_of(params) -> str:
    """Of path, dtype, shape and bytes of every leaf, sorted by path."""
    digest = hashlib.sha256()
    for path, leaf in sorted(trees.flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def answers_of(folder) -> list[dict]:
    """What the model of a folder says of picture.png.

    The last prompt has a box where the model points at places.
    """
    loaded = lionjax.load(folder)
    boxes = None
    if loaded.processor.config.places == "embeddings":
        boxes = [[], [BOX]]
    answers = loaded.answer(["picture.png"] * len(PROMPTS), PROMPTS, boxes=boxes)
    return [
        {
            "text": one.text,
            "boxes": np.round(one.boxes, 6).tolist(),
            "masks": list(one.masks.shape),
            "covered": float(one.masks.mean()) if one.masks.size else 0.0,
        }
        for one in answers
    ]


def lionjax_says(*words) -> str:
    """What a command line prints. It must end well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main([str(word) for word in words])
    if code:
        raise SystemExit(f"lionjax {' '.join(map(str, words))} ended with {code}")
    return out.getvalue()


# What is made, in this order


def picture() -> None:
    image = Image.new("RGB", (30, 20), "#203040")
    draw = ImageDraw.Draw(image)
    draw.ellipse((3, 4, 13, 14), fill="#d04030")
    draw.rectangle((17, 6, 27, 18), fill="#40b060")
    image.save("picture.png")


def tokenizer() -> None:
    """Whole words, digits and marks, behind the special pieces of the tokenizer of lionjax."""
    pieces = list(dict.fromkeys([*SPECIAL, *"0123456789.,[]?:#<>/", *PLAIN, "USER", "ASSISTANT"]))
    pieces += [f"w{n}" for n in range(WORDS - len(pieces))]
    if len(pieces) != WORDS:
        raise SystemExit(f"{len(pieces)} pieces where {WORDS} are wanted")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    parts = tokenizers.Regex(r"\d|[^\W\d]+|[^\w\s]")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(parts, "removed", invert=True)
    made.add_special_tokens(list(SPECIAL))
    Path("tokenizer").mkdir()
    made.save("tokenizer/tokenizer.json", pretty=False)


def data() -> None:
    """Lines of JSON with their pictures, one of them broken, and both kinds of ArrayRecord data."""
    Path("lines").mkdir()
    rng, lines = np.random.default_rng(0), []
    for number in range(12):
        color, shape = rng.choice(["red", "blue", "green"]), rng.choice(["star", "circle", "ring"])
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).save(f"lines/{name}")
        asked = {"image": name, "question": f"What color is the {shape}?", "answer": str(color)}
        lines.append(asked | {"task": "vqa", "tags": [str(shape), str(color)]})
    lines.append(
        {
            "image": "0.png",
            "expression": "the red star",
            "boxes": [[0.1, 0.2, 0.5, 0.6]],
            "task": "rec",
        }
    )
    Path("lines/lines.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    sizes = ("--sizes", 6, 1, 4, "--pixels", 32)
    lionjax_says("data", "build", "scenes", "--out", "built/scenes", *sizes)
    lionjax_says("data", "build", "lines/lines.jsonl", "--out", "built/lines", "--share", 0.25)
    for name in ("0.png", "4.png"):  # only now, so that the built data are whole
        Path(f"lines/{name}").write_bytes(Path(f"lines/{name}").read_bytes()[:40])


def models() -> dict:
    """One exported folder for each system and each part, and what is expected of it."""
    found = {}
    for seed, (name, (system, processor, dtype)) in enumerate(SYSTEMS.items()):
        what, folder = experiment(name, system, processor), f"models/{name}"
        model.of_params(what, answering_params(what, dtype, seed)).export(folder, to="jax")
        found[folder] = {
            "params": sha256_of(convert.load_params(folder)[1]),
            "answers": answers_of(folder),
        }
        print(folder, [answer["text"] for answer in found[folder]["answers"]], flush=True)
    for seed, (name, (part, dtype)) in enumerate(PARTS.items()):
        params = trees.unflatten(params_of(of_config(part).abstract(part), dtype, 100 + seed))
        convert.save(part, params, f"parts/{name}")
        found[f"parts/{name}"] = {"params": sha256_of(params)}
    return found


def tagger() -> dict:
    """RAM with a list of tags."""
    params = trees.unflatten(params_of(of_config(RAM).abstract(RAM), np.float32, 200))
    Path("tags").mkdir()
    texts = {
        "": "dog\ncat\ngrass\nsky\nstar\n",
        "_chinese": "狗\n猫\n草\n天空\n星\n",
        "_threshold": "0.4\n" * 5,
    }
    files = {}
    for end, text in texts.items():
        files[f"ram_tag_list{end}.txt"] = Path(f"tags/ram_tag_list{end}.txt")
        files[f"ram_tag_list{end}.txt"].write_text(text)
    convert.save(RAM, params, "parts/ram", companions=files)
    shutil.rmtree("tags")
    said = json.loads(lionjax_says("tag", "parts/ram", "--image", "picture.png", "--json"))[0]
    return {"parts/ram": {"params": sha256_of(params), "tags": said}}


def other_forms() -> dict:
    """Four systems under torch's names, the Owl with its LoRA apart; one in Orbax's form."""
    found = {}
    for name in ("lion", "llava15", "mplug_owl", "instructblip_t5"):
        lionjax_says("convert", f"models/{name}", f"torch/{name}", "--to", "torch")
        params = lionjax.load(f"torch/{name}").params
        found[f"torch/{name}"] = {"params": sha256_of(params), "like": f"models/{name}"}
    lionjax_says("convert", "models/llava15", "orbax/llava15", "--to", "orbax")
    params = convert.load_params("orbax/llava15")[1]
    found["orbax/llava15"] = {"params": sha256_of(params), "like": "models/llava15"}
    return found


def resized() -> dict:
    """A decoder of torch's names with two more words, in rows up to a multiple of 16."""
    decoder = dataclasses.replace(DECODER, kv_heads=1)
    params = trees.unflatten(params_of(of_config(decoder).abstract(decoder), np.float16, 300))
    files = {"tokenizer.json": Path("tokenizer/tokenizer.json")}
    convert.to_torch(decoder, params, "torch/decoder", companions=files)
    words = ("--add-words", "<look>,<point>", "--vocab-multiple", 16)
    lionjax_says("convert", "torch/decoder", "resized", "--to", "jax", *words)
    return {
        "torch/decoder": {"params": sha256_of(params)},
        "resized": {"params": sha256_of(convert.load_params("resized")[1])},
    }


def stopping(number: int):
    """The pipeline's batches, which ask the run to stop when the `number`-th is taken."""
    taken = []

    def batches(*given):
        stream = pipeline.batches(*given)
        following = stream.__class__.__next__

        class Stopping(stream.__class__):
            def __next__(self):
                batch = following(self)
                taken.append(None)
                if len(taken) == number + 1:  # one was the example
                    os.kill(os.getpid(), signal.SIGTERM)
                return batch

        stream.__class__ = Stopping
        return stream

    return batches


def stop(file: str, workdir: str, number: int) -> None:
    """Train until a number of updates were begun, and let the run save where it stands."""
    with contextlib.suppress(SystemExit):
        loop.train(config.load(file), workdir, stopping(number))
    if Path(workdir, "report.json").is_file() and "final" in str(
        list(Path(workdir, "base").iterdir())
    ):
        raise SystemExit(f"{workdir} did not stop")


def losses(workdir: str) -> list[dict]:
    """The lines of metrics.jsonl without what the clock decides."""
    clocks = ("seconds", "images_per_second", "tokens_per_second")
    lines = [json.loads(line) for line in Path(workdir, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


def run_entry(workdir: str, **more) -> dict:
    return {
        "params": sha256_of(lionjax.load(workdir).params),
        "answers": answers_of(workdir),
        **more,
    }


def runs() -> dict:
    """A finished run with a LoRA, one that met trouble, and one that was stopped."""
    found = {}
    lionjax_says("train", "user/lora.py", "--workdir", "trained/lora")
    evaluation = json.loads(Path("trained/lora/report.json").read_text())["evaluation"]
    figures = {name: entry["metrics"] for name, entry in evaluation.items()}
    found["trained/lora"] = run_entry(
        "trained/lora", metrics=losses("trained/lora"), evaluation=figures
    )

    stop("user/resized.py", "trained/resized", 18)
    newest = max(Path("trained/resized/checkpoints").iterdir(), key=lambda path: int(path.name))
    for file in Path(newest, "trainable").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    lionjax_says("train", "user/resized.py", "--workdir", "trained/resized")
    refused = [
        json.loads(line) for line in Path("trained/resized/refused.jsonl").read_text().splitlines()
    ]
    found["trained/resized"] = run_entry(
        "trained/resized", metrics=losses("trained/resized"), refused=refused
    )

    lionjax_says("train", "user/lion.py", "--workdir", "whole")
    whole = run_entry("whole", metrics=losses("whole"))
    shutil.rmtree("whole")
    stop("user/lion.py", "trained/stopped", 4)
    found["trained/stopped"] = run_entry(
        "trained/stopped", metrics=losses("trained/stopped"), finished=whole
    )
    return found


def configs() -> dict:
    """config.json of every config that 0.1 shipped, and one with every source of data."""
    found = {}
    for file in sorted(CONFIGS.glob("*.py")):
        try:
            whole = config.load(file)
        except Exception:  # tiny_backbones.py makes several
            continue
        found[file.stem] = whole
    sources = (
        Scenes(),
        EasyVqa(),
        Coco("coco"),
        RefCoco("refs.json", "images"),
        Vqa("q.json", "a.json", "images"),
        Lines("lines.jsonl", "images"),
        Built("built"),
        ScienceQa("scienceqa"),
    )
    base = experiment("every_source", LION, {})
    found["every_source"] = dataclasses.replace(
        base, data=dataclasses.replace(base.data, sources=sources)
    )
    for name, whole in found.items():
        Path("configs", name).mkdir(parents=True)
        Path("configs", name, "config.json").write_text(config.to_json(whole))
    return {
        f"configs/{name}": {"fields": len(list(config.leaves(whole)))}
        for name, whole in found.items()
    }


# Commands with the options and field names of 0.1, and what comes of them. OUT is a new path.
COMMANDS = [
    {"words": ["show", "user/lion.py", "--stages.0.accumulate", "4"], "shows": "4"},
    {"words": ["show", "user/lion.py", "--system.language.vocab", "128"], "shows": "128"},
    {"words": ["show", "user/lion.py", "--stages.1.learning-rate=0.25"], "shows": "0.25"},
    {"words": ["show", "user/lion.py", "--data.processor.padding", "mean"], "shows": "'mean'"},
    {"words": ["show", "user/lora.py", "--system.language.lora.rank", "3"], "shows": "3"},
    {
        "words": ["show", "user/lora.py", "--stages.0.mixture", "vqa", "1", "caption", "2"],
        "shows": "(('vqa', 1.0), ('caption', 2.0))",
    },
    {"words": ["show", "trained/lora", "--run.evaluate-limit", "7"], "shows": "7"},
    {
        "words": ["show", "user/lion.py", "--weights"],
        "prints": "Qformer.bert.embeddings.word_embeddings.weight",
    },
    {"words": ["show", "torch/llava15", "--weights"], "prints": "embed_tokens.weight"},
    {
        "words": ["show", "user/lion.py", "--stages.0.stepz", "2"],
        "code": 2,
        "error": "stages.0.steps",
    },
    {
        "words": ["convert", "trained/lora", "OUT", "--to", "torch"],
        "prints": "every bit is the same",
    },
    {
        "words": ["convert", "trained/lora", "OUT", "--to", "torch", "--merge-lora"],
        "prints": "LoRA merged",
    },
    {
        "words": [
            "convert",
            "torch/decoder",
            "OUT",
            "--to",
            "jax",
            "--add-words",
            "<look>,<point>",
            "--vocab-multiple",
            "16",
        ],
        "same": "resized",
    },
    {"words": ["convert", "torch/lion", "OUT", "--to", "jax"], "same": "models/lion"},
    {"words": ["convert", "torch/mplug_owl", "OUT", "--to", "jax"], "same": "models/mplug_owl"},
    {
        "words": ["convert", "torch/instructblip_t5", "OUT", "--to", "jax"],
        "same": "models/instructblip_t5",
    },
    {"words": ["convert", "orbax/llava15", "OUT", "--to", "jax"], "same": "models/llava15"},
    {
        "words": ["convert", "models/llava15", "OUT", "--to", "orbax", "--mesh", "data=-1"],
        "same": "models/llava15",
    },
    {
        "words": [
            "evaluate",
            "trained/lora",
            "--benchmark",
            "vqa",
            "--limit",
            "2",
            "--split",
            "heldout",
            "--json",
        ],
        "figures": "vqa",
    },
    {
        "words": [
            "generate",
            "trained/lora",
            "--image",
            "picture.png",
            "--prompt",
            PROMPTS[0],
            "--prompt-length",
            "40",
            "--json",
        ],
        "answer": 0,
    },
    {
        "words": ["data", "inspect", "built/lines", "--split", "train", "--limit", "1"],
        "prints": "vqa",
    },
    {
        "words": ["data", "inspect", "lines/lines.jsonl", "--images", "lines", "--share", "0.25"],
        "prints": "vqa",
    },
    {"words": ["report", "trained/lora"], "prints": "report.html"},
]


def built() -> dict:
    """What `data inspect` prints of the built data, by which their records are known again."""
    os.environ["COLUMNS"] = "200"
    found = {}
    for folder in ("built/scenes", "built/lines"):
        said = lionjax_says("data", "inspect", folder, "--split", "train", "--limit", 2)
        found[folder] = {"inspected": [line.rstrip() for line in said.splitlines()]}
    return found


def machine() -> str:
    """What decides the last bits of a sum: the version of XLA and what the processor can do."""
    import jaxlib

    text = (
        Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else platform.machine()
    )
    flags = next(
        (line for line in text.splitlines() if line.startswith("flags")), platform.machine()
    )
    return hashlib.sha256(f"{jaxlib.__version__} {sorted(flags.split())}".encode()).hexdigest()[:16]


def tidy() -> None:
    """Without what nobody reads again, and without the place where all this was made.

    Orbax writes it into commit_success.txt, of which it reads no more than that it is there, and a
    run into the note on what it put aside.
    """
    here = f"{Path.cwd()}/"
    for path in (path for path in Path(".").rglob("*") if path.is_file()):
        content = path.read_bytes()
        if here.encode() in content and path.suffix in (".txt", ".json", ".jsonl"):
            path.write_bytes(content.replace(here.encode(), b""))
    for path in (*Path(".").rglob("lock"), *Path(".").rglob("*.part")):
        path.unlink()
    for path in Path("trained").glob("*/tensorboard"):
        shutil.rmtree(path)


def main() -> None:
    os.chdir(sys.argv[1])
    for path in Path(".").iterdir():
        if path.is_dir() and path.name != "user":
            shutil.rmtree(path)
    for file in Path("user").glob("*.py"):
        runpy.run_path(str(file))
    picture()
    tokenizer()
    data()
    found = {"models": models() | tagger(), "forms": other_forms() | resized()}
    found |= {"runs": runs(), "configs": configs(), "built": built()}
    kept = [path for path in sorted(Path("features").rglob("*")) if path.is_file()]
    expected = {
        "written_by": {"lionjax": lionjax.__version__, "commit": "9f840f3", "jax": jax.__version__},
        "machine": machine(),
        "prompts": PROMPTS,
        "box": BOX,
        **found,
        "features": [str(path.parent) for path in kept],
        "commands": COMMANDS,
    }
    tidy()
    Path("expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
