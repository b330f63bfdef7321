# SPDX-License-Identifier: Apache-2.0
"""Boxes, masks, grids and curves as pictures."""

import itertools

import numpy as np
import pytest
from PIL import Image

from lionjax.evaluation.report import plots
from lionjax.evaluation.report.plots import Overlay

GRAY = np.full((40, 60, 3), 128, np.uint8)


def at(picture: Image.Image, x: float, y: float) -> tuple[int, ...]:
    """The pixel at a place in 0..1."""
    return picture.getpixel((round(x * (picture.width - 1)), round(y * (picture.height - 1))))


def test_small_images_are_enlarged_with_their_aspect_ratio_and_large_ones_kept():
    assert plots.draw_overlays(GRAY, [], min_side=480).size == (480, 320)
    assert plots.draw_overlays(np.zeros((500, 600, 3), np.uint8), [], min_side=480).size == (600, 500)


def test_a_box_is_drawn_in_its_color_where_it_is_and_nowhere_else():
    drawn = plots.draw_overlays(GRAY, [Overlay((0.25, 0.25, 0.75, 0.75), color="#e69f00")])
    for x, y in ((0.252, 0.5), (0.748, 0.5), (0.5, 0.253), (0.5, 0.747)):
        assert at(drawn, x, y) == plots.hex_to_rgb("#e69f00")
    for x, y in ((0.5, 0.5), (0.1, 0.5), (0.9, 0.9)):
        assert at(drawn, x, y) == (128, 128, 128)


def test_a_box_is_edged_in_black_or_white_so_that_it_shows_on_its_own_color():
    ground = np.full((480, 480, 3), plots.hex_to_rgb("#e69f00"), np.uint8)
    drawn = np.asarray(plots.draw_overlays(ground, [Overlay((0.2, 0.2, 0.8, 0.8), color="#e69f00")]))
    assert (drawn == plots.hex_to_rgb(plots.contrast_color("#e69f00"))).all(-1).sum() > 1000


def test_a_dashed_box_has_gaps():
    line = Overlay((0.1, 0.5, 0.9, 0.9), color="#e69f00")
    rows = []
    for dashed in (False, True):
        drawn = np.asarray(plots.draw_overlays(GRAY, [Overlay(line.box, color=line.color, dashed=dashed)]))
        y = round(0.5 * (drawn.shape[0] - 1)) + 1
        rows.append((drawn[y] == plots.hex_to_rgb("#e69f00")).all(-1).sum())
    assert 0.4 * rows[0] < rows[1] < 0.8 * rows[0]


def test_a_mask_colors_only_its_area():
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:40] = True
    drawn = plots.draw_overlays(GRAY, [Overlay(mask=mask, color="#0072b2")])
    inside, outside = at(drawn, 0.5, 0.5), at(drawn, 0.1, 0.1)
    wanted = np.round(0.55 * 128 + 0.45 * np.array(plots.hex_to_rgb("#0072b2")))
    assert np.abs(np.array(inside) - wanted).max() <= 1
    assert outside == (128, 128, 128)


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.97, 0.97, 1, 1), (-1, 2, 5, 7), (0.5, 0.5, 0.5, 0.5)])
def test_a_box_at_or_past_the_edge_is_drawn_with_its_words_inside_the_picture(box):
    drawn = np.asarray(plots.draw_overlays(GRAY, [Overlay(box, "some words", color="#e69f00")]))
    plate = (drawn == plots.hex_to_rgb("#e69f00")).all(-1).sum()
    assert plate > 1000  # the plate of the words is there, not cut away


def test_boxes_of_an_answer_have_the_colors_of_their_masks_and_masks_their_phrases():
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    boxes = [(0.0, 0.0, 1.0, 1.0), (0.5, 0.5, 1.0, 1.0)]
    alone = plots.answer_overlays(boxes, [], [])
    assert [overlay.color for overlay in alone] == [plots.PREDICTION_COLOR] * 2
    # Of three masks one is empty and has no box.
    found = plots.answer_overlays(boxes, [full, empty, full], ["a", "b", "c"])
    assert [overlay.color for overlay in found[:2]] == [plots.ANSWER_COLORS[k] for k in (0, 2)]
    drawn = [(overlay.label, overlay.color) for overlay in found[2:]]
    assert drawn == [("a", plots.ANSWER_COLORS[0]), ("c", plots.ANSWER_COLORS[2])]
    # A box for each mask, empty or not (NExT-Chat), and fewer phrases than masks.
    found = plots.answer_overlays(boxes, [empty, full], ["a"])
    assert [overlay.color for overlay in found] == [plots.ANSWER_COLORS[k] for k in (0, 1, 1)]
    assert found[-1].label == "" and plots.QUERY_COLOR not in plots.ANSWER_COLORS


def test_labels_of_boxes_do_not_overlap():
    taken = []
    pen = __import__("PIL.ImageDraw").ImageDraw.Draw(Image.new("RGB", (480, 480)))
    for index in range(8):
        box = (100, 100, 300, 300 + index)
        taken.append(plots.draw_label(pen, f"thing {index}", box, "#e69f00", (480, 480), taken))
    for (l, t, r, b), (x, y, u, v) in itertools.combinations(taken, 2):
        assert r <= x or u <= l or b <= y or v <= t


def test_labels_are_black_or_white_with_a_contrast_of_at_least_4_5():
    def light(color):
        parts = [c / 255 for c in plots.hex_to_rgb(color)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return np.dot((0.2126, 0.7152, 0.0722), linear)

    assert plots.contrast_color("#ffffff") == "#000000" and plots.contrast_color("#000000") == "#ffffff"
    for color in plots.PALETTE:
        low, high = sorted((light(color), light(plots.contrast_color(color))))
        assert (high + 0.05) / (low + 0.05) >= 4.5, color


def test_a_grid_wraps_its_rows_and_keeps_every_picture_whole():
    cells = [(Image.new("RGB", (100, 50), color), [("words", "#000000")]) for color in plots.PALETTE]
    sheet = plots.image_grid(cells, columns=4)
    seen = {color for _, color in sheet.getcolors(1 << 20)}
    assert {plots.hex_to_rgb(color) for color in plots.PALETTE} <= seen
    assert sheet.width == 4 * (320 + 16) + 16 and sheet.height > 2 * 320


def test_long_words_and_texts_are_wrapped_to_the_width():
    face = plots.load_font(16)
    lines = plots.wrap_text("several words and " + "x" * 200 + " and then many more words " * 20, face, 200)
    assert len(lines) == 6 and lines[-1].endswith("…")
    assert all(face.getlength(line) <= 201 for line in lines)


def test_smoothing_keeps_a_line_straight_and_a_mean_the_same():
    assert np.allclose(plots.running_mean(np.full(50, 3.0)), 3)
    values = np.random.default_rng(0).normal(size=200)
    smoothed = plots.running_mean(values, 0.1)
    assert smoothed.std() < 0.5 * values.std()
    assert np.isclose(smoothed[100], values[90:111].mean())


def curve_points(figure) -> dict:
    return {axis.get_title(loc="left"): axis.lines[0].get_xydata().tolist() for axis in figure.axes}


def test_loss_curves_have_a_panel_for_each_stage_with_its_own_points():
    rows = [dict(stage=s, step=i, loss=loss) for s, loss in (("a", 2.0), ("b", 1.0)) for i in (1, 2)]
    figure = plots.plot_loss_curves([*rows, {"stage": "b", "step": 3, "vqa": 0.5}])
    assert curve_points(figure) == {"a": [[1, 2], [2, 2]], "b": [[1, 1], [2, 1]]}


def test_router_ratios_are_shown_layer_by_layer_with_their_numbers():
    ratio_LTA = np.arange(12).reshape(3, 2, 2) / 10
    figure = plots.plot_router_ratios({"encoder": ratio_LTA, "decoder": ratio_LTA[:2]}, ("one", "two"))
    encoder, decoder = figure.axes
    assert np.array_equal(encoder.images[0].get_array(), ratio_LTA.reshape(3, 4))
    assert [text.get_text() for text in decoder.texts] == [f"{i / 10:.2f}" for i in range(8)]
    names = [text.get_text() for text in encoder.get_xticklabels()]
    assert names == ["one\nadapter 0", "one\nadapter 1", "two\nadapter 0", "two\nadapter 1"]


@pytest.mark.parametrize("dark", [False, True])
def test_figures_have_the_color_of_their_page(dark, tmp_path):
    figure = plots.plot_loss_curves([dict(stage="a", step=1, loss=1.0)], dark)
    figure.savefig(tmp_path / "loss.png")
    corner = Image.open(tmp_path / "loss.png").convert("RGB").getpixel((1, 1))
    assert corner == plots.hex_to_rgb((plots.DARK_THEME if dark else plots.LIGHT_THEME)["page"])


def test_the_true_mask_is_visible_where_the_prediction_covers_it():
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    truth = plots.Overlay(color=plots.TRUTH_COLOR, dashed=True, mask=mask)
    predicted = plots.Overlay(color=plots.PREDICTION_COLOR, mask=np.ones((64, 64), bool))
    pixels = np.asarray(plots.draw_overlays(np.full((64, 64, 3), 128, np.uint8), [truth, predicted], 64)).astype(int)
    like_truth = np.abs(pixels - plots.hex_to_rgb(plots.TRUTH_COLOR)).sum(-1) < 40
    assert like_truth[17, 20:44].all() and like_truth[20:44, 46].all()  # its outline
    assert not like_truth[24:40, 24:40].any()  # and not its inside
