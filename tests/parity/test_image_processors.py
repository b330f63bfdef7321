# SPDX-License-Identifier: Apache-2.0
"""The picture settings of a folder decide: pixels equal those of transformers' image processor of that folder."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from lionjax.convert.formats.image_settings import read_image_settings
from lionjax.convert.processor_files import preprocessor_config
from lionjax.core.types import UserError
from lionjax.data.image_fit import ImageFit
from lionjax.data.processor import Processor, ProcessorConfig

transformers = pytest.importorskip("transformers")

LEVEL = 1.01 / 255
SHAPES = [(40, 40), (61, 45), (30, 47), (9, 200), (150, 8), (33, 1), (24, 25)]
CLASSES = ("CLIPImageProcessor", "LlavaImageProcessor", "BlipImageProcessor", "SiglipImageProcessor")


def processor_of(folder, image_size, **defaults):
    """Our processor with the settings of a folder."""
    fields, fit = read_image_settings(folder, image_size)
    settings = {"image_size": image_size, "use_tags": False} | defaults | fields
    return Processor(ProcessorConfig(**settings, image_fit=ImageFit(**fit)))


def theirs(processor, picture):
    return processor(picture, return_tensors="np", do_convert_rgb=True)["pixel_values"][0]


def levels(processor, picture, wanted) -> float:
    """The largest difference from `wanted` (3, S, S), in pixel values of 0..1."""
    made = processor.preprocess_image(picture)
    return float((np.abs(made - np.moveaxis(wanted, 0, -1)) * np.array(processor.config.image_std)).max())


def noise(shape, channels=3):
    width, height = shape
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, channels), np.uint8)
    return pixels.squeeze(-1) if channels == 1 else pixels


def random_settings(draw: random.Random, side: int) -> tuple[str, dict]:
    edge = draw.choice([side, side, side + 7, side - 5, 2 * side])
    other = draw.choice([side, side + 3])
    size = draw.choice(
        [side, {"height": side, "width": side}, {"height": edge, "width": other}, {"shortest_edge": edge}]
        + [{"shortest_edge": edge, "longest_edge": edge + 11}]
    )
    settings = {
        "size": size,
        "do_resize": draw.random() < 0.85,
        "resample": draw.choice([0, 1, 2, 3, 5]),
        "do_center_crop": draw.random() < 0.7,
        "crop_size": draw.choice([side, {"height": side, "width": side}] * 3 + [side + 2]),
        "do_rescale": draw.random() < 0.8,
        "rescale_factor": draw.choice([1 / 255, 1 / 127.5, 0.01]),
        "do_normalize": draw.random() < 0.8,
        "image_mean": draw.choice([[0.48, 0.46, 0.41], [0.5] * 3, [0.0, 0.1, 0.9]]),
        "image_std": draw.choice([[0.27, 0.26, 0.28], [0.5] * 3, [1.0, 2.0, 0.1]]),
        "do_pad": draw.random() < 0.5,
    }
    dropped = draw.sample(sorted(settings), draw.randint(0, 4))
    kind = draw.choice(CLASSES)
    if "crop_size" in dropped or kind != "LlavaImageProcessor":
        settings.pop("do_pad", None)
    return kind, {name: value for name, value in settings.items() if name not in dropped}


@pytest.mark.slow
def test_pixels_are_those_of_the_folders_processor_or_the_setting_is_refused(tmp_path):
    """60 random settings; refused exactly where transformers gives another size than the tower's for some picture."""
    draw, refused, largest = random.Random(0), 0, 0.0
    for number in range(60):
        side = draw.choice([16, 23])
        kind, settings = random_settings(draw, side)
        folder = tmp_path / str(number)
        original = getattr(transformers, f"{kind}Pil")(**settings)
        if number % 2:
            original.save_pretrained(folder)
        else:  # as written by hand: the class's own defaults are left out
            folder.mkdir()
            said = settings | {"image_processor_type": draw.choice([kind, f"{kind}Fast"])}
            (folder / "preprocessor_config.json").write_text(json.dumps(said))
        pictures = [Image.fromarray(noise(shape)) for shape in draw.sample(SHAPES, 3) + [(9, 200), (150, 8)]]
        try:
            wanted = [theirs(original, picture) for picture in pictures]
        except ValueError:  # a crop without a size
            wanted = []
        fits = bool(wanted) and all(picture.shape == (3, side, side) for picture in wanted)
        try:
            processor = processor_of(folder, side)
        except UserError:
            refused += 1
            assert not fits, (kind, settings)
            continue
        assert fits, (kind, settings)
        for picture, pixels in zip(pictures, wanted):
            difference = levels(processor, picture, pixels)
            assert difference <= LEVEL, (kind, settings, picture.size, difference)
            largest = max(largest, difference)
    assert 10 < refused < 50 and largest > 0


@pytest.mark.parametrize("shape", [*SHAPES, (320, 240), (111, 500)])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_pixels_are_within_a_level_of_the_fast_processors(resample, shape):
    """The fast image processors resize by torchvision, which calls torch's antialiased `interpolate` on 8 bits.

    With torchvision 0.28 itself: at most one level for CLIP, LLaVA, BLIP, SigLIP and ViT, bilinear, bicubic, lanczos.
    """
    torch = pytest.importorskip("torch")
    picture = noise(shape)
    tensor = torch.tensor(picture).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(tensor, (23, 23), mode=resample, antialias=True, align_corners=False)[0]
    fit = ImageFit("stretch", (23, 23), resample)
    mine = Processor(ProcessorConfig(23, use_tags=False, image_fit=fit)).load_pixels(picture)
    assert np.abs(mine.astype(int) - wanted.permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "PA", "CMYK", "exif", "transparent palette"])
def test_pictures_of_every_mode_are_read_as_the_folders_processor_reads_them(mode, tmp_path):
    transformers.CLIPImageProcessorPil(size=20, crop_size=16).save_pretrained(tmp_path)
    original = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    processor = processor_of(tmp_path, 16)
    picture = Image.fromarray(noise((31, 45)))
    if mode == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        picture.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
        ours, other = str(tmp_path / "turned.jpg"), transformers.image_utils.load_image(str(tmp_path / "turned.jpg"))
        assert other.size == (45, 31)
    elif mode == "transparent palette":
        picture = picture.convert("P")
        picture.info["transparency"] = 3
        ours = other = picture
    else:
        alpha = Image.fromarray(noise((31, 45), 1))
        picture = picture.convert({"PA": "P"}.get(mode, mode))
        if mode in ("LA", "RGBA"):
            picture.putalpha(alpha)
        ours = other = picture.convert("PA") if mode == "PA" else picture
    assert levels(processor, ours, theirs(original, other)) <= LEVEL


def test_nested_settings_come_before_those_of_the_older_file(tmp_path):
    nested = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": 16, "crop_size": 16}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    older = {"image_processor_type": "BlipImageProcessor", "size": 16}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    original = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(original).__name__ == "LlavaImageProcessorPil"
    picture = noise((61, 45))
    assert levels(processor_of(tmp_path, 16), picture, theirs(original, picture)) <= LEVEL


def test_kosmos2_stretches_to_a_square(tmp_path):
    transformers.CLIPImageProcessorPil(use_square_size=True).save_pretrained(tmp_path)
    original = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    picture = noise((61, 45))
    assert levels(processor_of(tmp_path, 224), picture, theirs(original, picture)) <= LEVEL


@pytest.mark.parametrize("aspect", ["pad", "square", None])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_original_llava_pads_or_crops_as_its_config_says(aspect, shape, tmp_path):
    """As `process_images` of LLaVA's code: `expand2square` with the mean color, then CLIP's processor."""
    said = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14"}
    (tmp_path / "config.json").write_text(json.dumps(said | ({"image_aspect_ratio": aspect} if aspect else {})))
    original = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)
    picture = Image.fromarray(noise(shape))
    expected = picture
    if aspect == "pad":
        color = tuple(int(x * 255) for x in original.image_mean)
        width, height = picture.size
        expected = Image.new("RGB", (max(shape),) * 2, color)
        expected.paste(picture, (max(0, (height - width) // 2), max(0, (width - height) // 2)))
    processor = processor_of(tmp_path, 24, pad_to_square=True, pad_color="mean")
    assert levels(processor, picture, theirs(original, expected)) <= LEVEL


REFUSED = {
    "anyres": ({}, {"mm_vision_tower": "x", "image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
    "class": ({"image_processor_type": "FuyuImageProcessor"}, {}, "image_processor_type is 'FuyuImageProcessor'"),
    "flag": ({"do_crop_margin": True}, {}, "do_crop_margin is True"),
    "filter": ({"resample": 4}, {}, "resample is 4"),
    "crop": ({"crop_size": 20}, {}, "crop_size is 20; it must be 16"),
    "shape": ({"do_center_crop": False}, {}, "do_center_crop is false"),
    "size": ({"size": {"longest_edge": 16}}, {}, "size is {'longest_edge': 16}"),
    "no resize": ({"do_resize": False, "do_center_crop": False}, {}, "do_resize and do_center_crop are false"),
    "mean": ({"image_mean": [0.5, 0.5]}, {}, "image_mean is"),
    "std": ({"image_std": [0.5, 0, 0.5]}, {}, "image_std is"),
    "factor": ({"rescale_factor": 0}, {}, "rescale_factor is 0"),
    "pad size": ({"do_pad": True, "pad_size": 20}, {}, "pad_size is 20"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_is_not_supported_is_refused_by_name(case, tmp_path):
    settings, config, message = REFUSED[case]
    said = {"image_processor_type": "CLIPImageProcessor", "size": 16, "crop_size": 16} | settings
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"} | config))
    with pytest.raises(UserError) as error:
        read_image_settings(tmp_path, 16)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        ({"model_type": "llava", "vision_config": {"patch_size": 14}}, "patch_size", 7),
        ({"model_type": "llava", "vision_config": {"patch_size": 14}}, "vision_feature_select_strategy", "full"),
        ({"model_type": "llava", "vision_config": {"patch_size": 14}}, "num_additional_image_tokens", 0),
        ({"model_type": "blip-2", "num_query_tokens": 32}, "num_query_tokens", 16),
    ],
)
def test_a_processor_that_counts_other_image_tokens_than_the_model_is_refused(model, field, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(model | {"text_config": {}}))
    fitting = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(fitting | {"num_query_tokens": 32}))
    assert read_image_settings(tmp_path, 16) == ({}, {})
    file.write_text(json.dumps(fitting | {"num_query_tokens": 32} | {field: value}))
    with pytest.raises(UserError, match=f"{field} is {value!r}, but the model of config.json needs"):
        read_image_settings(tmp_path, 16)


@pytest.mark.parametrize(
    "fit",
    [
        ImageFit(),
        ImageFit("stretch", (20, 31), "bilinear"),
        ImageFit("shortest_edge", (0, 0), "nearest"),
        ImageFit("shortest_edge", (20, 29), "lanczos"),
        ImageFit("none"),
    ],
    ids=lambda fit: f"{fit.mode}-{fit.resample}",
)
def test_exported_settings_are_read_back_and_give_the_same_pixels_in_transformers(fit, tmp_path):
    mine = Processor(ProcessorConfig(16, use_tags=False, image_fit=fit, image_mean=(0.1, 0.5, 0.9)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(mine.config)))
    original = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    picture = Image.fromarray(noise((61, 45)))
    assert levels(mine, picture, theirs(original, picture)) <= LEVEL
    np.testing.assert_array_equal(processor_of(tmp_path, 16).load_pixels(picture), mine.load_pixels(picture))


def test_settings_without_files_leave_the_processor_as_it_is(tmp_path):
    assert read_image_settings(tmp_path, 16) == ({}, {})


def test_a_system_whose_code_pads_with_white_keeps_its_padding(tmp_path):
    transformers.CLIPImageProcessorPil(size=24, crop_size=24).save_pretrained(tmp_path)
    fields, fit = read_image_settings(tmp_path, 24, code_pads=True)
    assert fields["pad_to_square"] and "pad_rgb" not in fit
