"""Integer geometry of pooling, tiling and unpadding."""

from __future__ import annotations

import itertools
import json

import pytest
from golden_data import golden
from hypothesis import example, given
from hypothesis import strategies as st

from av_llava.errors import UsageError
from av_llava.geometry import (
    anyres_grid_shape,
    anyres_max_tiles,
    fit_inside,
    highres_side,
    parse_pinpoints,
    pooled_side,
    select_best_resolution,
    shortest_edge_size,
    shrunk_grid,
    tile_grid,
    unpad_box,
)
from av_llava.settings import ImageSettings

SIDES = st.integers(1, 4000)
SIZES = st.tuples(SIDES, SIDES)
CANVASES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@pytest.fixture(scope="module")
def resolution() -> dict:
    return json.loads(golden("llava/resolution.json").read_text())


def test_best_resolution_agrees_with_the_reference(resolution):
    tiles = {"v16_336": 336, "ov_384": 384, "tiny56": 56}
    assert len(resolution["rows"]) == 210
    for row in resolution["rows"]:
        canvases = resolution["sets"][row["set"]]
        tile = tiles[row["set"]]
        assert (
            list(select_best_resolution(row["size"], [tuple(c) for c in canvases])) == row["best"]
        )
        assert list(anyres_grid_shape(row["size"], canvases, tile)) == row["grid_wh"]
        assert list(anyres_grid_shape(row["size"], str(canvases), tile)) == row["grid_wh_from_str"]


def test_range_strings_agree_with_the_reference(resolution):
    for row in resolution["range_strings"]:
        assert list(anyres_grid_shape(row["size"], row["spec"], row["patch"])) == row["grid_wh"]


def test_unpadding_agrees_with_the_reference(resolution):
    for row in resolution["unpad_image"]:
        columns = row["grid_hw"][1]
        top, bottom, left, right = unpad_box(row["grid_hw"], row["original_wh"])
        assert [bottom - top, right - left] == row["out_hw"]
        numbers = [r * columns + c for r in range(top, bottom) for c in range(left, right)]
        ends = (numbers[0], numbers[-1]) if numbers else (None, None)
        assert ends == (row["first"], row["last"])


def literal_best(size, canvases):
    """The reference's rule, literally: strictly more pixels kept, or as many and fewer wasted."""
    best, most, least = None, 0, float("inf")
    for width, height in canvases:
        scale = min(width / size[0], height / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        wasted = width * height - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (width, height), kept, wasted
    return best


@given(SIZES, st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
@example((1, 4000), [(1, 1), (1, 2)])
def test_best_resolution_is_the_literal_rule(size, grids):
    canvases = [(w * 56, h * 56) for w, h in grids]
    assert select_best_resolution(size, canvases) == literal_best(size, canvases)


def test_range_counts_tiles_from_the_first_to_the_last_pair():
    wanted = tuple((i * 56, j * 56) for i, j in itertools.product((1, 2), (1, 2, 3)))
    assert parse_pinpoints("(1x1),...,(2x3)", 56) == wanted
    assert parse_pinpoints("( 1x1 ),(2x3)".replace(" ", ""), 56) == wanted


def test_pinpoints_may_be_a_literal():
    assert parse_pinpoints("[[336, 672], (672, 336)]", 336) == ((336, 672), (672, 336))


@pytest.mark.parametrize(
    ("pinpoints", "words"),
    [
        ((), "needs grid pinpoints"),
        ("[]", "needs grid pinpoints"),
        ("[[336, 672", "neither a list"),
        ("336x672", "names no pair"),
        (((336, 672, 1),), "must be"),
        (((336, 600),), "multiples of the tile side, which is 336"),
        (((336, 0),), "multiples"),
    ],
)
def test_unusable_pinpoints_are_named(pinpoints, words):
    with pytest.raises(UsageError, match=words):
        parse_pinpoints(pinpoints, 336)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_an_image_without_content_is_an_error(size):
    with pytest.raises(UsageError, match="no content"):
        select_best_resolution(size, CANVASES)


def test_no_canvas_is_an_error():
    with pytest.raises(UsageError, match="empty"):
        select_best_resolution((5, 5), ())


@given(SIZES, st.sampled_from(CANVASES))
def test_a_fitted_image_touches_the_canvas_and_keeps_its_shape(size, canvas):
    width, height = fit_inside(size, canvas)
    assert (width, height)[0] == canvas[0] or (width, height)[1] == canvas[1]
    assert 1 <= width <= canvas[0] and 1 <= height <= canvas[1]
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    assert width - size[0] * scale < 1 + 1e-6 and height - size[1] * scale < 1 + 1e-6


@given(st.tuples(st.integers(1, 60), st.integers(1, 60)), SIZES, st.sampled_from(["llava", "hf"]))
def test_an_unpadded_box_lies_in_the_grid_and_cuts_one_direction(grid, size, rounding):
    top, bottom, left, right = unpad_box(grid, size, rounding)
    assert 0 <= top <= bottom <= grid[0] and 0 <= left <= right <= grid[1]
    assert (top, bottom) == (0, grid[0]) or (left, right) == (0, grid[1])


def test_roundings_differ_where_the_product_is_just_under_an_integer():
    found = {
        (size, unpad_box((24, 24), size), unpad_box((24, 24), size, "hf"))
        for size in itertools.product(range(1, 120), repeat=2)
        if unpad_box((24, 24), size) != unpad_box((24, 24), size, "hf")
    }
    assert found
    for _, (top, bottom, left, right), (hf_top, hf_bottom, hf_left, hf_right) in found:
        # Cutting the fraction off keeps one less, which can only widen the margin.
        assert top >= hf_top and bottom <= hf_bottom
        assert left >= hf_left and right <= hf_right


@given(st.tuples(st.integers(0, 200), st.integers(0, 200)), st.integers(1, 40), st.integers(1, 12))
def test_shrinking_only_makes_smaller_and_ends_near_the_bound(grid, side, max_tiles):
    shrunk = shrunk_grid(grid, side * side, max_tiles)
    area = max_tiles * side * side
    if shrunk is None:
        assert grid[0] * grid[1] <= 1.21 * area * (1 + 1e-9)
    else:
        assert 1 <= shrunk[0] <= grid[0] and 1 <= shrunk[1] <= grid[1]
        assert shrunk[0] * shrunk[1] <= area or 1 in shrunk


def test_onevision_large_image_shrinks_as_published():
    # 4x4 tiles of 5x5 tokens for 300x260: goldens ov70_single_large_interp, 249 tokens.
    box = unpad_box((20, 20), (300, 260))
    kept = box[1] - box[0], box[3] - box[2]
    rows, columns = shrunk_grid(kept, 25, 9)
    assert 25 + rows * (columns + 1) == 249


@pytest.mark.parametrize(
    ("aspect", "wanted"),
    [("anyres_max_9", 9), ("anyres_max_16", 16), ("anyres", None), ("pad", None)],
)
def test_anyres_max_number(aspect, wanted):
    assert anyres_max_tiles(aspect) == wanted


@given(SIZES, st.sampled_from([224, 336]))
def test_shorter_edge(size, shortest):
    width, height = shortest_edge_size(size, shortest)
    assert min(width, height) == shortest
    assert max(width, height) == int(shortest * max(size) / min(size))
    assert (width <= height) == (size[0] <= size[1]) or width == height


def test_tile_grid_of_every_aspect():
    def grid(aspect, pinpoints=(), size=(90, 160)):
        return tile_grid(size, ImageSettings(aspect_ratio=aspect, grid_pinpoints=pinpoints), 56)

    tiny = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
    assert grid("square") is None and grid("pad") is None
    assert grid("anyres", tiny) == grid("anyres_max_9", tiny) == (2, 2)
    assert grid("anyres", tiny, (40, 170)) == (3, 1)  # rows, columns
    assert grid("highres", "112,168,56") == (3, 3)
    assert grid("highres", "130") == (2, 2)
    with pytest.raises(UsageError, match="crop_split is not supported"):
        grid("crop_split")
    with pytest.raises(UsageError, match="width and height"):
        grid("anyres", tiny, None)


@pytest.mark.parametrize("pinpoints", ["", "a,b", "20,55", ((56, 112),)])
def test_highres_needs_a_string_of_sides(pinpoints):
    with pytest.raises(UsageError, match="highres"):
        highres_side(pinpoints, 56)


@pytest.mark.parametrize(
    ("mode", "side", "stride", "wanted"),
    [
        ("average", 27, 2, 13),
        ("max", 27, 2, 13),
        ("bilinear", 27, 2, 14),
        ("bilinear", 24, 2, 12),
        ("average", 24, 1, 24),
        ("bilinear", 3, 7, 1),
    ],
)
def test_pooled_side(mode, side, stride, wanted):
    assert pooled_side(side, stride, mode) == wanted


def test_pooling_errors():
    with pytest.raises(UsageError, match="cannot be pooled with stride 8"):
        pooled_side(6, 8, "average")
    with pytest.raises(UsageError, match="Unknown pooling mode"):
        pooled_side(6, 2, "median")


@pytest.mark.parametrize("aspect", ["anyres_max_", "anyres_max_0", "anyres-9", "Square", ""])
def test_unknown_aspects_are_refused(aspect):
    with pytest.raises(UsageError, match="Unknown image aspect ratio"):
        ImageSettings(aspect_ratio=aspect)


@pytest.mark.parametrize("merge", ["spatial_unpadded", "unpad", "flat_unpad", "spatial_"])
def test_unknown_merges_are_refused(merge):
    with pytest.raises(UsageError, match="Unknown patch merge type"):
        ImageSettings(patch_merge_type=merge)


def test_merge_parts_come_in_any_order():
    for merge in ("flat", "spatial", "spatial_unpad_nobase", "spatial_nobase_maxpool2x2"):
        assert ImageSettings(patch_merge_type=merge).patch_merge_type == merge


def test_several_images_are_not_tiled_unless_asked():
    one = ImageSettings(aspect_ratio="anyres_max_9", grid_pinpoints=((56, 56),))
    assert one.for_count(1) is one
    assert one.for_count(2).aspect_ratio == "pad"
    assert one.replace(several="square").for_count(3).aspect_ratio == "square"
    assert one.replace(several="same").for_count(3).aspect_ratio == "anyres_max_9"
    assert ImageSettings(aspect_ratio="square").for_count(5).aspect_ratio == "square"
