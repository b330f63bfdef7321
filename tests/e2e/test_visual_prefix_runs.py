# SPDX-License-Identifier: Apache-2.0
"""A LLaVA and an InstructBLIP through everything that a LION goes through: stages, answers, folders, transformers."""

import dataclasses
import random

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_prefix as tiny
from chat_prompts import lengths
from leafwise import runs_have_one_device  # noqa: F401
from paths import CONFIGS

import lionjax
from lionjax import convert
from lionjax.convert.formats.detect import format_of_config
from lionjax.core import config, sharding
from lionjax.core import params as trees
from lionjax.core.experiment import Experiment, RunConfig, Stage
from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.config import DataConfig
from lionjax.data.processor import CLIP_MEAN, CLIP_STD, ImageTextInput, Processor, ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.inference.loading import dummy_batch
from lionjax.inference.model import Model
from lionjax.inference.sampling import GenerationConfig
from lionjax.models.connectors.qformer import QFormerConfig
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision.vit import CLIP_VIT_L, ViTConfig
from lionjax.models.vlm.visual_prefix import VisualPrefixLM
from lionjax.training import loop
from lionjax.training.init import init_params
from lionjax.training.init import make_param_specs as init_layout
from lionjax.training.validate import check_prompt_format, check_token_ids

BF16 = ml_dtypes.bfloat16
SIDE, PATCH_TOKEN = 28, 21  # <im_patch> of the tiny tokenizer
CLIP = dataclasses.replace(CLIP_VIT_L, image_size=SIDE, patch_size=14, width=16, depth=3, num_heads=2, mlp_dim=24)
TEMPLATE = "USER: {image} {question} ASSISTANT:"
LLAVA = VisualPrefixLM(
    CLIP,
    DecoderConfig(1024, 32, 2, 2, 2, 16, 48, pad_token_id=0, bos_token_id=1, eos_token_id=1),
    image_token_id=PATCH_TOKEN,
)
INSTRUCTBLIP = VisualPrefixLM(
    ViTConfig(SIDE, 14, 16, 2, 2, 24),
    T5Config(1024, 32, 8, 2, 48, 2, 2, dropout=0.0, activation="gelu"),
    QFormerConfig(16, 2, 2, 24, 4, 2, 16, 1024, 64, dropout=0.0),
    -1,
    True,
    1e-5,
    1,
    PATCH_TOKEN,
)


def experiment(system: VisualPrefixLM) -> Experiment:
    """Two stages: two steps of what lies between, then twenty of the language model too, at a rate that shows."""
    decoder = (
        {} if system.is_encoder_decoder else {"reader": "decoder", "template": TEMPLATE, "image_token": PATCH_TOKEN}
    )
    between = ("projector",) if system.qformer is None else ("projector", "qformer", "vision_norm")
    fields = {"batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1}
    mixture = (("vqa", 1.0), ("caption", 1.0))
    return Experiment(
        name="small",
        model=system,
        data=DataConfig(
            sources=(Scenes((12, 4, 12), image_size=56),),
            processor=ProcessorConfig(image_size=SIDE, **lengths(48, 48, 24), use_tags=False, **decoder),
        ),
        stages=(
            Stage("align", 2, between, mixture, **fields),
            Stage("instruct", 20, (*between, "language"), mixture, **fields | {"learning_rate": 1e-2}),
        ),
        run=RunConfig(log_every=1, save_every=10, frozen_dtype="float32", evaluate_limit=2, cache_features=True),
    )


@pytest.fixture(scope="module", params=["llava", "instructblip"])
def trained(request, tmp_path_factory):
    what = experiment({"llava": LLAVA, "instructblip": INSTRUCTBLIP}[request.param])
    folder = tmp_path_factory.mktemp("runs") / "run"
    params, report = loop.train(what, folder, pipeline.batches)
    return what, folder, params, report


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (30 + 10 * k, 50, 3), dtype=np.uint8) for k in range(count)]


PROMPTS = ["What is in the picture?", "How many are there?", "Is there a red star?"]


@pytest.mark.slow
def test_a_run_changes_what_its_stages_train_and_nothing_else(trained):
    what, _, params, report = trained
    assert all(stage["frozen_unchanged"] for stage in report["stages"])
    align, instruct = (stage["loss_last"] for stage in report["stages"])
    # Twenty steps teach a language model of random weights which words are frequent.
    assert instruct < 0.7 * align
    counts = [stage["trainable_parameters"] for stage in report["stages"]]
    whole = trees.flatten(params)
    between = sum(np.size(w) for path, w in whole.items() if not path.startswith(("language", "vision/")))
    assert counts[0] == between
    assert counts[1] == between + sum(np.size(w) for path, w in whole.items() if path.startswith("language"))


@pytest.mark.slow
def test_a_trained_model_answers_is_exported_and_comes_back_to_the_bit(trained, tmp_path):
    _, folder, _, _ = trained
    model = lionjax.load(folder)
    said = [answer.text for answer in model.answer(pictures(3), PROMPTS)]
    for kind in ("torch", "jax"):
        model.export(tmp_path / kind, kind)
        again: Model = lionjax.load(tmp_path / kind)
        assert again.equals_bitwise(model)
        assert [answer.text for answer in again.answer(pictures(3), PROMPTS)] == said


@pytest.mark.slow
def test_a_trained_model_gives_the_same_answers_in_transformers(trained, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    what, folder, _, _ = trained
    model = lionjax.load(folder)
    model.export(tmp_path / "torch")
    name = "LlavaForConditionalGeneration" if what.system.qformer is None else "InstructBlipForConditionalGeneration"
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "torch", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    batch = tiny.batch_of(what.system, random.Random(1), token=PATCH_TOKEN)
    out = theirs.eval()(**tiny.inputs(what.system, batch))
    mine = jax.jit(what.system.logits)(model.params, batch)
    for row, wanted in zip(mine, tiny.answer_logits(what.system, batch, out.logits.detach().numpy())):
        np.testing.assert_allclose(row[: len(wanted)], wanted, atol=1e-4 * max(1, np.abs(wanted).max()))
    assert torch.isfinite(out.loss)


@pytest.mark.slow
def test_a_run_starts_from_separately_converted_parts(tmp_path):
    """A tower and a language model in folders of their own, one of them in shards, its vocabulary to be padded."""
    system = dataclasses.replace(LLAVA, language=dataclasses.replace(LLAVA.language, vocab=1001))
    wide = dataclasses.replace(system, language=dataclasses.replace(system.language, pad_vocab_to_multiple_of=64))
    rng, made = np.random.default_rng(0), {}
    for name in ("vision", "language"):
        part = getattr(system, name)
        shapes = trees.flatten(format_of_config(part).abstract_params(part))
        made[name] = {path: rng.standard_normal(leaf.shape).astype(BF16) for path, leaf in shapes.items()}
        convert.to_torch(part, trees.unflatten(made[name]), tmp_path / f"{name}_torch")
        convert.convert(tmp_path / f"{name}_torch", tmp_path / name, "jax", shard_bytes=50_000)
    assert not (tmp_path / "language" / "params.safetensors").exists()
    weights = tuple((name, str(tmp_path / name / "params.safetensors")) for name in made)
    what = dataclasses.replace(experiment(wide), weights=weights)
    batch = dummy_batch(Processor(what.data.processor))
    layout = init_layout(what, batch, sharding.make_mesh(devices=jax.devices()[:1]))
    parts = init_params(what, batch, layout)
    flat = trees.flatten(trees.merge(*parts))
    for name, leaves in made.items():
        for path, leaf in leaves.items():
            whole = np.asarray(flat[f"{name}/{path}"]).astype(BF16)
            np.testing.assert_array_equal(whole[tuple(map(slice, leaf.shape))], leaf, path)
    assert flat["language/embedding/table"].shape == (1024, 32)
    assert not np.asarray(flat["language/embedding/table"])[1001:].any()
    assert flat["projector/up/kernel"].any()


def test_the_image_token_may_lie_outside_of_the_vocabulary():
    token = LLAVA.language.vocab_size
    what = experiment(dataclasses.replace(LLAVA, image_token=token))
    processor = Processor(dataclasses.replace(what.data.processor, image_token=token))
    batch = processor.batch([ImageTextInput(pictures(1)[0], "What?")])
    assert (batch.prompt_BL == token).any()
    check_token_ids(what, batch)
    with pytest.raises(UserError, match=f"contain token id {token}, but the .* vocabulary has {token}"):
        check_token_ids(experiment(LLAVA), batch)


def test_images_of_llava_15_are_padded_to_a_square_with_the_mean_color():
    wide = np.full((10, 40, 3), 255, np.uint8)
    batches = [
        Processor(ProcessorConfig(image_size=16, use_tags=False, pad_to_square=True, pad_color=color)).batch(
            [ImageTextInput(wide, "What?")]
        )
        for color in ("mean", "white")
    ]
    mean, white = (batch.image_BHWC[0] for batch in batches)
    mu, sigma = np.array(CLIP_MEAN), np.array(CLIP_STD)
    border = (np.floor(255 * mu) / 255 - mu) / sigma  # in whole steps, as LLaVA's code has it
    np.testing.assert_allclose(mean[:3], np.broadcast_to(border, (3, 16, 3)), atol=1e-6)
    np.testing.assert_allclose(white[0], np.broadcast_to((1 - mu) / sigma, (16, 3)), atol=1e-6)
    np.testing.assert_allclose(mean[7:9], white[7:9], atol=1e-6)  # the picture itself


def word_tokenizer(words: list[str], first: list[str]):
    """A tokenizer of whole words, with LLaMA's special pieces in front as a `tokenizer.json` would have them."""
    import tokenizers

    vocabulary = {word: place for place, word in enumerate([*first, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(first)
    return backend


@pytest.mark.slow
def test_a_llava_folder_of_transformers_loads_and_gives_the_same_answers(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    seed = tiny.seed()
    theirs = tiny.theirs("llava", random.Random(seed))
    theirs.save_pretrained(tmp_path)
    said = "A chat between curious user and an artificial intelligence assistant . The gives helpful , detailed polite "
    said += "answers to the ' s questions USER : ASSISTANT What is this ?"
    words = list(dict.fromkeys(said.split()))
    first = ["<pad>", "<s>", "</s>", "<unk>", "<extra_id_0>"]
    rest = [f"w{n}" for n in range(tiny.IMAGE_TOKEN - len(words) - len(first))]
    assert len(words) + len(first) <= tiny.IMAGE_TOKEN
    word_tokenizer([*words, *rest, "<image>"], first).save(str(tmp_path / "tokenizer.json"))
    model = lionjax.load(tmp_path)
    c = model.processor.config
    assert (c.reader, c.image_token, c.padded) == ("decoder", tiny.IMAGE_TOKEN, True)
    # An answer that ends at once, as some random weights give it, would show nothing.
    how = GenerationConfig(6, min_length=2, eos_token_id=2, pad_token_id=0, decoder_start_token_id=None)
    picture = pictures(1)[0]
    answer = model.answer([picture], ["What is this ?"], generation_config=how)[0]
    batch = model.processor.batch([ImageTextInput(picture, "What is this ?")])
    assert batch.prompt_BL[0, 0] == 1 and (batch.prompt_BL == tiny.IMAGE_TOKEN).sum() == 1
    asked = tiny.inputs(model.vlm, batch, answers=False, left=True)
    with torch.no_grad():
        told = theirs.generate(
            **asked, max_new_tokens=6, min_new_tokens=2, do_sample=False, eos_token_id=2, pad_token_id=0
        )
    wanted = told[0, asked["input_ids"].shape[1] :].numpy()
    assert answer.text == model.processor.prompt.decode(wanted) and answer.text, f"seed {seed}"


FROZEN = CONFIGS / "tiny_frozen.py"


@pytest.mark.parametrize("processor", [{"reader": "decoder"}, {"image_token": 22}, {"image_token": None}])
def test_reader_and_image_token_follow_from_the_model(processor):
    experiment = config.load(FROZEN)
    wrong = dataclasses.replace(experiment.data.processor, **processor)
    again = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, processor=wrong))
    assert again == experiment and again.data.processor.reader == "encoder"
    assert again.data.processor.image_token == experiment.model.image_token == 21
    assert config.apply_overrides(experiment, ["--model.image_token_id", "22"]).data.processor.image_token == 22


def test_a_template_without_image_placeholder_has_no_image_token():
    experiment = config.load(FROZEN)
    bare = dataclasses.replace(experiment.data.processor, template="{question}")
    data = dataclasses.replace(experiment.data, processor=bare)
    assert dataclasses.replace(experiment, data=data).data.processor.image_token is None


def test_a_template_with_an_image_that_nothing_fills_is_refused():
    experiment = config.load(FROZEN)
    check_prompt_format(experiment)
    system = dataclasses.replace(experiment.model, image_token=None)
    with pytest.raises(UserError, match="this model has no image token"):
        check_prompt_format(dataclasses.replace(experiment, system=system))


@pytest.mark.slow
def test_weights_of_an_unknown_part_are_refused_and_random_frozen_parts_are_reported(caplog):
    experiment = config.load(FROZEN)
    batch = dummy_batch(Processor(experiment.data.processor))
    layout = init_layout(experiment, batch, sharding.make_mesh(devices=jax.devices()[:1]))
    eyes, (_, words) = experiment.weights
    with pytest.raises(UserError, match="the part 'langage'; this model has language, projector, vision"):
        init_params(dataclasses.replace(experiment, weights=(eyes, ("langage", words))), batch, layout)
    init_params(experiment, batch, layout)
    assert "random" not in caplog.text
    init_params(dataclasses.replace(experiment, weights=(eyes,)), batch, layout)
    assert "the parameters of language are random and no stage trains them" in caplog.text
