# SPDX-License-Identifier: Apache-2.0
"""Tools over a work folder: names, checks of arguments, schemas, and what each tool does, with a scripted model."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ROOT
from PIL import Image
from scripted_tools import SIZE, SQUARE, open_toolbox, picture, square_box

from lionjax.core.errors import UserError
from lionjax.pipelines.tools.definition import MAX_ITEMS, find_tool
from lionjax.pipelines.tools.edges import canny
from lionjax.pipelines.tools.experts import Experts
from lionjax.pipelines.tools.toolbox import Toolbox
from lionjax.pipelines.tools.workspace import Workspace, derived_name, upload_size

EXPECTED = json.loads((ROOT / "tests/golden/agents/expected.json").read_text())
BOX = [float(edge) for edge in square_box()[0]]


@pytest.fixture
def toolbox(tmp_path):
    found = open_toolbox(tmp_path / "work")
    found.workspace.add(picture())
    return found


def call(toolbox, name, **arguments):
    return find_tool(toolbox.tools, name).call(arguments)


def only(toolbox):
    return toolbox.workspace.names()[0]


def test_derived_names_are_visual_chatgpts():
    golden = EXPECTED["file_names"]
    edge = derived_name(golden["from"], "edge", golden["uuid4"][:4])
    assert f"image/{edge}" == golden["edge"]
    assert f"image/{derived_name(edge, 'canny2image', golden['uuid4'][:4])}" == golden["canny2image"]
    with pytest.raises(UserError, match="2 parts"):
        derived_name("image/a_b.png", "edge", "abcd")


@pytest.mark.parametrize(
    "size, expected",
    [((1000, 200), (512, 128)), ((4000, 100), (512, 64)), ((100, 100), (512, 512)), ((3, 3000), (64, 512))],
)
def test_uploads_are_resized_to_multiples_of_64_and_never_to_nothing(size, expected):
    assert upload_size(*size) == expected


def test_names_follow_from_the_content_so_that_a_repeated_run_writes_the_same_files(tmp_path):
    names = []
    for part in "ab":
        found = open_toolbox(tmp_path / part)
        name = found.workspace.add(picture())
        names.append((name, call(found, "edges", image=name)["file"]))
        assert call(found, "edges", image=name)["file"] == names[-1][1]  # not a second file
        assert len(found.workspace.names()) == 2
    assert names[0] == names[1]
    first, edge = names[0]
    stem = first.removeprefix("image/").removesuffix(".png")
    assert edge.endswith(f"_edge_{stem}_{stem}.png")


def test_a_name_outside_the_work_folder_is_refused_and_nothing_is_read(tmp_path, toolbox):
    picture().save(tmp_path / "secret.png")
    (toolbox.workspace.images / "link.png").symlink_to(tmp_path / "secret.png")
    for name in (
        "../secret.png", "image/../../secret.png", str(tmp_path / "secret.png"), "image/link.png", "link.png",
        "http://127.0.0.1/a.png", "image/missing.png", "", "image/a.png\n", "image/\0.png", "~/a.png", "file:///a.png",
    ):  # fmt: skip
        for tool in toolbox.tools:
            arguments = {"image": name, "words": "square", "question": "why", "box": BOX, "boxes": [BOX]}
            if "image" in tool.hints:
                with pytest.raises(UserError, match=r"no file name|there is no image"):
                    tool.call({key: value for key, value in arguments.items() if key in tool.hints})
    assert toolbox.experts.model.prompts == []


def test_a_work_folder_whose_image_folder_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "image").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        Workspace(tmp_path / "work")


def test_the_number_of_files_and_the_pixels_are_bounded(tmp_path):
    work = Workspace(tmp_path, max_files=2, max_pixels=SIZE[0] * SIZE[1])
    name = work.add(picture())
    work.write(picture(), "edge", name)
    with pytest.raises(UserError, match="2 images"):
        work.write(picture(), "crop", name)
    with pytest.raises(UserError, match="pixels"):
        work.add(Image.new("RGB", (SIZE[0] + 1, SIZE[1])))


@pytest.mark.parametrize("detector", [False, True])
def test_detection_is_by_grounding_dino_where_it_is_there_and_the_description_says_so(tmp_path, detector):
    found = open_toolbox(tmp_path, detector=detector, tagger=detector)
    name = found.workspace.add(picture())
    things = call(found, "detect", image=name, words="a red square, a disc")
    assert [thing["label"] for thing in things] == (["square"] if detector else ["a red square"])
    assert things[0]["box"] == pytest.approx(BOX, abs=1e-4) and things[0]["score"] == (0.75 if detector else 1.0)
    descriptions = {tool.name: tool.description for tool in found.tools}
    assert ("Grounding DINO of dino" if detector else "the model of tiny") in descriptions["detect"]
    assert ("RAM of ram" if detector else "the model of tiny") in descriptions["tag"]
    assert call(found, "count", image=name, words="squares") == (1 if detector else 2)
    assert call(found, "tag", image=name) == (["square", "red"] if detector else ["red", "square"])
    if detector:
        assert found.experts.detector.prompt == "squares."


def test_tools_without_their_model_are_not_offered(tmp_path):
    names = {tool.name for tool in open_toolbox(tmp_path, model=False).tools}
    assert names == {"images", "crop", "mark", "edges"}


def test_masks_are_drawn_and_cut_out_where_the_square_is(toolbox):
    name = only(toolbox)
    found = call(toolbox, "segment", image=name, words="the square")
    area = (SQUARE[2] - SQUARE[0]) * (SQUARE[3] - SQUARE[1]) / (SIZE[0] * SIZE[1])
    assert found["box"] == pytest.approx(BOX, abs=1e-4) and found["area"] == pytest.approx(area, abs=1e-4)
    drawn = np.asarray(toolbox.workspace.open(found["file"]), int)
    changed = (drawn != np.asarray(picture(), int)).any(axis=-1)
    inside = np.zeros(SIZE[::-1], bool)
    inside[SQUARE[1] : SQUARE[3], SQUARE[0] : SQUARE[2]] = True
    assert (changed & inside).sum() > 0.9 * inside.sum() and not changed[50:, 50:].any()
    cut = Image.open(toolbox.workspace.path(call(toolbox, "cut_out", image=name, words="the square")["file"]))
    assert cut.mode == "RGBA" and np.array_equal(np.asarray(cut)[..., 3] == 255, inside)


def test_crop_mark_edges_regions_caption_and_answer(toolbox):
    name = only(toolbox)
    cropped = toolbox.workspace.open(call(toolbox, "crop", image=name, box=BOX)["file"])
    assert cropped.size == (24, 24) and cropped.getpixel((0, 0)) == cropped.getpixel((23, 23)) == (208, 32, 32)
    marked = call(toolbox, "mark", image=name, boxes=[BOX], labels="square")["file"]
    assert toolbox.workspace.open(marked).size == SIZE
    edges = np.asarray(toolbox.workspace.open(call(toolbox, "edges", image=name)["file"]).convert("L")) > 0
    rows, columns = np.flatnonzero(edges.any(axis=1)), np.flatnonzero(edges.any(axis=0))
    assert abs(rows[0] - SQUARE[1]) <= 1 and abs(columns[-1] - SQUARE[2]) <= 1 and not edges[20, 20]
    assert call(toolbox, "caption", image=name) == "A red square."
    assert call(toolbox, "answer", image=name, question=" Why? ") == "re Why?"
    assert len(call(toolbox, "read_regions", image=name, boxes=[BOX, [0, 0, 1, 1]])) == 2
    assert call(toolbox, "images")[0]["width"] in (SIZE[0], 24)


def test_edges_need_a_strong_pixel_and_are_one_pixel_wide():
    gray = np.full((20, 30), 100, np.uint8)
    gray[:, 10:] = 128  # |gx| = 4 * 28: weak alone
    assert not canny(gray).any()
    gray[10:, 10:] = 160  # strong below; the weak part above is connected to it
    edges = canny(gray)
    assert edges[:9].any() and edges[12:].sum(axis=1).max() == 1


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("crop", {"image": "NAME", "box": [0.5, 0, 0.4, 1]}, "no area"),
        ("crop", {"image": "NAME", "box": [0, 0, 1]}, "four numbers"),
        ("crop", {"image": "NAME", "box": [0, 0, 2, 1]}, "leaves the image"),
        ("crop", {"image": "NAME", "box": [0, 0, math.nan, 1]}, "number"),
        ("crop", {"image": "NAME", "box": "0,0,1,1"}, "list"),
        ("crop", {"image": "NAME"}, "needs the argument box"),
        ("crop", {"image": "NAME", "box": BOX, "path": "/etc"}, "no argument 'path'"),
        ("mark", {"image": "NAME", "boxes": [BOX] * (MAX_ITEMS + 1)}, "at most"),
        ("mark", {"image": "NAME", "boxes": [BOX], "labels": "a,b"}, "2 labels"),
        ("detect", {"image": "NAME", "words": "a" * 3000}, "3000 characters"),
        ("detect", {"image": "NAME", "words": " , "}, "0 names"),
        ("segment", {"image": "NAME", "words": True}, "string"),
        ("answer", {"image": "NAME", "question": " "}, "empty"),
    ],
)
def test_arguments_that_do_not_fit_are_one_sentence(toolbox, name, arguments, message):
    arguments = {key: only(toolbox) if value == "NAME" else value for key, value in arguments.items()}
    with pytest.raises(UserError, match=message) as caught:
        find_tool(toolbox.tools, name).call(arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_an_unexpected_error_of_a_model_is_one_sentence_without_its_text(toolbox, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(toolbox.experts.model, "answer", broken)
    with pytest.raises(UserError, match="failed with an unexpected RuntimeError") as caught:
        call(toolbox, "caption", image=only(toolbox))
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_loaded_model_answers_through_the_tools(finished_model, tmp_path):
    found = Toolbox(Workspace(tmp_path), Experts(finished_model))
    name = found.workspace.add(picture())
    assert {"segment", "cut_out"}.isdisjoint(tool.name for tool in found.tools)  # it has no masks
    assert isinstance(call(found, "caption", image=name), str)
    assert all(0 <= edge <= 1 for thing in call(found, "detect", image=name, words="star") for edge in thing["box"])
    (text,) = call(found, "read_regions", image=name, boxes=[BOX])
    assert isinstance(text, str) and "the model" in find_tool(found.tools, "answer").description


def test_schemas_of_openai_are_as_recorded(toolbox):
    schemas = {tool.name: tool.openai_schema["function"]["parameters"] for tool in toolbox.tools}
    assert list(schemas) == (
        "images caption answer detect segment tag cut_out crop mark edges count read_regions".split()
    )
    number = {"type": "array", "items": {"type": "number"}}
    assert schemas["crop"]["properties"]["box"].items() >= number.items()
    assert schemas["mark"]["properties"]["boxes"]["items"] == number
    assert schemas["mark"]["required"] == ["image", "boxes"] and not schemas["mark"]["additionalProperties"]
    assert schemas["images"] == {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    assert all(part["description"] for schema in schemas.values() for part in schema["properties"].values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
HOSTILE = st.sampled_from(["../../etc/passwd", "/etc/passwd", "image/../x.png", "http://a/b.png", "$(id)", "a" * 5000])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_arguments_raise_one_sentence_and_write_nothing_elsewhere(tmp_path, toolbox, data):
    tool = data.draw(st.sampled_from(toolbox.tools))
    known = st.sampled_from([*tool.hints, "path", "__class__"])
    arguments = data.draw(st.dictionaries(known, JSON | HOSTILE | st.just(only(toolbox)), max_size=4))
    before = {path for path in tmp_path.rglob("*")} | set()
    try:
        json.dumps(tool.call(arguments))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    made = set(tmp_path.rglob("*")) - before
    assert all(path.parent == toolbox.workspace.images and path.suffix == ".png" for path in made)
