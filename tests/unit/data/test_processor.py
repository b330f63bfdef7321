# SPDX-License-Identifier: Apache-2.0
"""Pictures and prompts into arrays, and what becomes of bad ones."""

import dataclasses
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import shared_data
from chat_prompts import decoder_prompts
from PIL import Image

from lionjax.core.types import IMAGE_LEVEL, REGION_LEVEL, UserError
from lionjax.data import images
from lionjax.data import processor as processors
from lionjax.data.processor import ImageTextInput, Processor, ProcessorConfig

SMALL = ProcessorConfig(image_size=32, max_prompt_tokens=64, max_question_tokens=24, max_target_tokens=24)
RED = np.full((20, 30, 3), (200, 10, 30), np.uint8)
PHOTOS = shared_data.ROOT / "coco83" / "images"


@pytest.fixture(scope="module")
def processor():
    return Processor(SMALL)


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (45, 61, 3), np.uint8)


def saved(path, array, **options) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


# ---------------------------------------------------------------------- pictures


def theirs(picture, pixels):
    """LION's evaluation transform, as Hugging Face's CLIP processor does it without cropping."""
    transformers = pytest.importorskip("transformers")
    side = {"height": pixels, "width": pixels}
    processor = transformers.CLIPImageProcessorPil(do_center_crop=False, size=side)
    return processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


def test_images_are_resized_and_normalized_as_in_the_original_code(processor, noise):
    ours = processor.preprocess_image(noise)
    assert ours.dtype == np.float32 and ours.shape == (32, 32, 3)
    np.testing.assert_allclose(ours, theirs(Image.fromarray(noise), 32), atol=1e-6)


@pytest.mark.parametrize("size", [(61, 45), (60, 45), (45, 60), (45, 45), (100, 1)], ids=str)
def test_padded_images_match_llavas_processor(size):
    """Also where the border is odd, and its larger half lies behind; resized bicubically."""
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(SMALL, pad_to_square=True, pad_color="mean")
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    side = {"height": 32, "width": 32}
    processor = transformers.LlavaImageProcessorPil(do_pad=True, size=side, crop_size=side)
    wanted = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    made = Processor(config).preprocess_image(pixels)
    np.testing.assert_allclose(made, wanted.transpose(1, 2, 0), atol=1e-6)


@shared_data.needs("coco83/images")
def test_a_photograph_is_read_as_the_original_reads_it():
    processor = Processor(ProcessorConfig())
    path = sorted(PHOTOS.glob("*.jpg"))[0]
    wanted = theirs(Image.open(path).convert("RGB"), 224)
    np.testing.assert_allclose(processor.preprocess_image(str(path)), wanted, atol=1e-6)


def test_every_image_mode_is_read_as_upright_rgb(tmp_path, noise):
    gray = noise[..., 0]
    files = {
        "plain.png": (noise, {}),
        "gray.png": (gray, {}),
        "gray16.png": (gray.astype(np.uint16) * 257, {}),
        "photo.jpg": (noise, {"quality": 100, "subsampling": 0}),
        "lossless.webp": (noise, {"lossless": True}),
    }
    for name, (array, options) in files.items():
        picture = images.open_image(saved(tmp_path / name, array, **options))
        assert picture.mode == "RGB" and picture.size == (61, 45)
        exact = np.stack([gray] * 3, -1) if array.ndim == 2 else noise
        tolerance = 6 if name.endswith("jpg") else 0
        assert np.abs(np.asarray(picture).astype(int) - exact).max() <= tolerance, name


def test_palettes_and_cmyk_become_rgb_and_transparency_becomes_white(tmp_path):
    Image.fromarray(RED).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(RED).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    clear = Image.fromarray(np.dstack([RED, np.zeros((20, 30), np.uint8)]))
    clear.save(tmp_path / "clear.png")
    means = {path.name: np.asarray(images.open_image(path)).mean((0, 1)) for path in tmp_path.iterdir()}
    np.testing.assert_allclose(means["palette.png"], (200, 10, 30), atol=20)
    np.testing.assert_allclose(means["print.jpg"], (200, 10, 30), atol=12)
    np.testing.assert_array_equal(means["clear.png"], 255)


def test_an_image_is_rotated_by_its_exif_orientation(tmp_path, noise):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    path = saved(tmp_path / "turned.png", noise, exif=exif)
    upright = np.asarray(images.open_image(path))
    np.testing.assert_array_equal(upright, np.rot90(noise, -1))


def header_only_png(width: int, height: int) -> bytes:
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [20_000, 9_000, 8_001])
def test_a_huge_png_is_refused_by_its_header(tmp_path, side):
    path = tmp_path / "huge.png"
    path.write_bytes(header_only_png(side, side))
    with pytest.raises(UserError) as error:
        images.open_image(path)
    assert "huge.png" in sentence(error) and "64 million" in sentence(error)


def test_a_real_png_of_20000_by_20000_is_refused_without_decoding_it(tmp_path):
    import tracemalloc

    packed, line = zlib.compressobj(9), bytes(1 + 20_000 // 8)
    rows = b"".join(packed.compress(line) for _ in range(20_000)) + packed.flush()
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb\.png"):
        images.open_image(tmp_path / "bomb.png")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_missing_damaged_and_foreign_files_are_one_sentence_that_names_the_file(tmp_path, noise):
    good = saved(tmp_path / "good.jpg", noise).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    saved(tmp_path / "foreign.tiff", noise)
    saved(tmp_path / "really_a_bitmap.png", noise, format="BMP")
    png = saved(tmp_path / "whole.png", noise).read_bytes()
    (tmp_path / "flipped.png").write_bytes(png[:200] + bytes(byte ^ 255 for byte in png[200:220]) + png[220:])
    bad = "cut.jpg text.jpg empty.png folder.png foreign.tiff really_a_bitmap.png flipped.png gone.png"
    for name in bad.split():
        with pytest.raises(UserError) as error:
            images.open_image(tmp_path / name)
        assert name in sentence(error)


@pytest.mark.parametrize("cut", range(0, 700, 9))
def test_no_truncation_of_a_file_raises_anything_but_a_user_error(noise, cut):
    for kind in ("JPEG", "PNG", "WEBP"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, kind)
        data = bytearray(file.getvalue()[: len(file.getvalue()) - 1 - cut])
        data[cut % len(data)] ^= 0x5A
        try:
            images.open_image(bytes(data), "damaged")
        except UserError as error:
            assert "damaged" in str(error)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png", "a/../../x.png", "bad\0name"])
def test_a_path_that_leaves_its_folder_is_refused(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    saved(tmp_path / "secret.png", RED)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError) as error:
        images.safe_path(root, name)
    sentence(error)


def test_links_out_of_the_folder_are_followed_where_they_are_allowed(tmp_path, monkeypatch):
    root, store = tmp_path / "root", tmp_path / "store"
    (root / "images").mkdir(parents=True), store.mkdir()
    outside = saved(store / "a.png", RED)
    (root / "images" / "a.png").symlink_to(outside)
    (root / "all").symlink_to(store, target_is_directory=True)
    for name in ("images/a.png", "all/a.png"):
        with pytest.raises(UserError, match=f"symbolic link.*{images.LINK_ROOTS_ENV}={store}"):
            images.safe_path(root, name)
    monkeypatch.setenv(images.LINK_ROOTS_ENV, f"/elsewhere:{store}")
    for name in ("images/a.png", "all/a.png"):
        assert images.safe_path(root, name) == outside.resolve()
    for name in ("../store/a.png", str(outside)):  # only links are allowed to leave
        with pytest.raises(UserError, match="leaves the data folder"):
            images.safe_path(root, name)


def test_paths_inside_the_folder_are_followed(tmp_path):
    inside = saved(tmp_path / "inside.png", RED)
    (tmp_path / "link.png").symlink_to(inside)
    assert images.safe_path(tmp_path, "link.png") == inside.resolve()
    assert images.safe_path(tmp_path, str(inside)) == inside.resolve()


@pytest.mark.parametrize("array", [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3))])
def test_an_array_that_is_no_picture_raises_a_one_sentence_error(processor, array):
    with pytest.raises(UserError) as error:
        processor.preprocess_image(array)
    assert str(array.shape) in sentence(error)


# ---------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    "box",
    [
        (0.1, 0.1, 1.2, 0.5),
        (-0.1, 0, 0.5, 0.5),
        (0.5, 0.1, 0.5, 0.4),
        (0.6, 0.1, 0.5, 0.4),
        (0, 0, 1),
        (0, 0, float("nan"), 1),
        "abcd",
        None,
    ],
)
def test_a_box_outside_or_without_area_raises_a_one_sentence_error(box):
    with pytest.raises(UserError) as error:
        images.normalize_box(box)
    assert "box" in sentence(error)


def test_pixel_boxes_become_fractions_clipped_to_the_image():
    assert images.normalize_box((10, 20, 50.4, 80), size=(50, 80), tolerance=1) == (0.2, 0.25, 1.0, 1.0)


def test_a_crop_keeps_all_boxes_whole_and_moves_them_with_the_pixels():
    rng = np.random.default_rng(0)
    canvas = np.zeros((100, 100, 3), np.uint8)
    canvas[30:50, 20:60] = 255
    box, windows = (0.2, 0.3, 0.6, 0.5), set()
    for _ in range(30):
        window = images.bbox_safe_random_crop([box], rng, (0.5, 1.0))
        windows.add(window)
        for mirrored in (False, True):
            seen = images.resize(Image.fromarray(canvas), 64, window)
            seen = seen[:, ::-1] if mirrored else seen
            x0, y0, x1, y1 = images.crop_and_flip_box(box, window, mirrored)
            rows, columns = np.nonzero(seen[..., 0] > 127)
            edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
            np.testing.assert_allclose(edges, (x0, y0, x1, y1), atol=1 / 64)
    assert len(windows) > 20


# ---------------------------------------------------------------------- prompts


def test_the_prompt_is_lions_tag_prompt_and_the_question(processor):
    tokenizer = processor.tokenizer
    words = (
        "According to <extra_id_0>, you are allowed to use or partially use the following tags: "
        "[red ring, star]. What color is it?"
    )
    ids = processor.prompt.encode_prompt("What color is it?", ("red ring", "star"))
    assert ids == [*tokenizer.encode(words, parse_special=True), tokenizer.eos_id]
    assert ids.count(tokenizer.soft_prompt_id) == 1


def test_without_tags_the_prompt_is_the_question(processor):
    bare = [*processor.tokenizer.encode("What is it?"), processor.tokenizer.eos_id]
    assert processor.prompt.encode_prompt("What is it?") == bare
    without = Processor(ProcessorConfig(use_tags=False))
    assert without.prompt.encode_prompt("What is it?", ("red",)) == bare
    assert processor.prompt.encode_question(" What is it? ") == bare


def test_the_q_former_does_not_get_the_tags(processor):
    batch = processor.batch([ImageTextInput(RED, "What is it?", ("red", "ring"))])
    said = processor.tokenizer.decode(batch.question_BL[0])
    assert said == "What is it?" and "ring" in processor.tokenizer.decode(batch.prompt_BL[0])


def test_too_many_tags_are_cut_from_the_end_and_the_question_is_kept(processor):
    tags = tuple(f"tag{i}" for i in range(60))
    question = "How many large red circles are there in the picture?"
    ids = processor.prompt.encode_prompt(question, tags)
    text = processor.tokenizer.decode(ids, keep_special=True)
    assert len(ids) <= 64 and len(ids) > 58
    assert ids.count(processor.tokenizer.soft_prompt_id) == 1
    assert "[tag0, tag1" in text and "tag59" not in text and text.endswith(f"]. {question}</s>")


def test_a_question_that_leaves_no_room_for_tags_keeps_the_soft_prompt(processor):
    question = "what " * 40 + "is it?"
    text = processor.tokenizer.decode(processor.prompt.encode_prompt(question, ("red", "ring")), keep_special=True)
    assert "<extra_id_0>" in text and "[]." in text and text.count("what") == 40


@pytest.mark.parametrize("tags", [(), ("red",)])
def test_a_prompt_longer_than_the_model_takes_raises_a_one_sentence_error(processor, tags):
    with pytest.raises(UserError) as error:
        processor.prompt.encode_prompt("what " * 80, tags)
    assert "64" in sentence(error) and "max_prompt_tokens" in sentence(error)


@pytest.mark.parametrize("question", ["", "  \n "])
def test_an_empty_prompt_raises_a_one_sentence_error(processor, question):
    with pytest.raises(UserError, match="empty"):
        processor.batch([ImageTextInput(RED, question)])


def test_a_question_that_spells_the_soft_prompt_does_not_get_one(processor):
    ids = processor.prompt.encode_prompt("what is <extra_id_0>?", ("<extra_id_0>", "red"))
    assert ids.count(processor.tokenizer.soft_prompt_id) == 1


def test_long_q_former_questions_are_cut_at_the_front_and_long_answers_at_the_end(processor):
    words = [*"abcdefghijklmnopqrstuvwxyz"]
    question = processor.prompt.encode_question(" ".join(words))
    answer = processor.prompt.encode_target(" ".join(words))
    assert len(question) == len(answer) == 24 and question[-1] == 1 and 1 not in answer
    assert processor.prompt.decode(question).endswith("x y z")
    assert processor.prompt.decode(answer).startswith("a b c")


# ---------------------------------------------------------------------- batches


def test_a_batch_holds_padded_ids_masks_and_router_rows(processor):
    inputs = [ImageTextInput(RED, "What is it?"), ImageTextInput(RED, "Where is the ring?", ("ring",), "region_level")]
    batch = processor.batch(inputs, ["red", "Answer: [0.100,0.200,0.300,0.400]"])
    assert batch.image_BHWC.shape == (2, 32, 32, 3) and batch.image_BHWC.dtype == np.float32
    assert batch.prompt_BL.shape == (2, 64) and batch.target_BM.shape == (2, 24)
    assert batch.task_B.tolist() == [IMAGE_LEVEL, REGION_LEVEL]
    assert batch.target_mask_BM.sum(1).tolist() == [2, 20] == batch.loss_mask_BM.sum(1).tolist()
    assert processor.prompt.decode(batch.target_BM[1]) == "Answer: [0.100,0.200,0.300,0.400]"
    assert (batch.target_BM[0, :2] == [*processor.tokenizer.encode("red"), 1]).all()
    assert (batch.prompt_BL[batch.prompt_mask_BL == 0] == processor.tokenizer.pad_id).all()
    assert all(a.dtype == np.int32 for a in (batch.prompt_BL, batch.target_BM, batch.task_B, batch.record_B))


def test_buckets_choose_the_shortest_length_that_holds_every_row(processor):
    inputs = [ImageTextInput(RED, "What is it?"), ImageTextInput(RED, "Where is the ring?", ("ring",))]
    batch = processor.batch(inputs, length_buckets=(8, 32, 48))
    assert batch.prompt_BL.shape == (2, 32) and batch.question_BL.shape == (2, 8)
    assert batch.prompt_mask_BL.sum() == sum(len(processor.prompt.encode_prompt(i.question, i.tags)) for i in inputs)


def test_a_batch_without_answers_has_an_empty_loss_mask(processor):
    batch = processor.batch([ImageTextInput(RED, "What is it?")])
    assert batch.loss_mask_BM.sum() == 0


@pytest.mark.parametrize(
    ("inputs", "answers"),
    [([], None), ([ImageTextInput(RED, "a?")], ["x", "y"]), ([ImageTextInput(RED, "a?", (), "both")], None)],
)
def test_an_invalid_batch_raises_a_one_sentence_error(processor, inputs, answers):
    with pytest.raises(UserError) as error:
        processor.batch(inputs, answers)
    sentence(error)


def test_sizes_below_one_are_refused_when_the_config_is_made():
    with pytest.raises(UserError, match="max_prompt_tokens"):
        ProcessorConfig(max_prompt_tokens=0)
    for field in ("prompt_template", "followup_template"):
        with pytest.raises(UserError, match=r"contains \{picture\}; only \{question\} and \{image\} are allowed"):
            ProcessorConfig(**{field: "{picture} {question}"})


def test_clip_statistics_are_those_of_the_original():
    assert processors.CLIP_MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert processors.CLIP_STD == (0.26862954, 0.26130258, 0.27577711)


def test_in_context_examples_add_their_images_and_texts_in_order():
    c = decoder_prompts(max_prompt_tokens=64, shot_end="</s>")
    processor, grays = Processor(c), [np.full((9, 9, 3), shade, np.uint8) for shade in (0, 100, 255)]
    asked = ImageTextInput(
        grays[2], "How many?", shots=((grays[0], "Which color?", "red"), (grays[1], "Which shape?", "ring"))
    )
    batch = processor.batch([asked, asked])
    assert batch.image_BHWC.shape == (2, 3, 28, 28, 3)
    assert (np.diff(batch.image_BHWC[0].mean((1, 2, 3))) > 0).all()
    end, words = processor.tokenizer.eos_id, processor.tokenizer.encode
    wanted = [*processor.tokenizer.bos_ids, 21, *words("Which color?"), *words("red"), end]
    wanted += [21, *words("Which shape?"), *words("ring"), end, 21, *words("How many?")]
    assert batch.prompt_BL[0, : batch.prompt_mask_BL[0].sum()].tolist() == wanted
    with pytest.raises(UserError, match=r"have \[0, 2\] shots; give all the same number"):
        processor.batch([asked, dataclasses.replace(asked, shots=())])
    with pytest.raises(UserError, match="need {image} in processor.prompt_template"):
        Processor(dataclasses.replace(c, prompt_template="{question}")).batch([asked])
