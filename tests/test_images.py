"""Still images bit for bit, frames within a level, and the processor that LLaVA's users know."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from golden_data import COMPACT, FULL, golden
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from av_llava.errors import CheckpointError, UsageError
from av_llava.geometry import tile_grid
from av_llava.images import (
    ImageProcessor,
    PixelSpec,
    fit_on_canvas,
    frame_resizer,
    frames_to_pixels,
    image_tiles,
    normalize_levels,
    pad_to_square,
    process_images,
    resize_frames,
    resize_image,
    resize_pil,
    to_rgb,
    vertical_first,
)
from av_llava.settings import CLIP_MEAN, ImageSettings
from av_llava.vision import normalize_pixels

HALF = (0.5, 0.5, 0.5)
CLIP56 = PixelSpec(size=56, crop=(56, 56))
SIGLIP70 = PixelSpec(size=(70, 70), mean=HALF, std=HALF)
SPECS = {"clip56": CLIP56, "siglip70": SIGLIP70}
PINPOINTS = {
    "clip56": ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168)),
    "siglip70": tuple((w, h) for w in (70, 140, 210) for h in (70, 140, 210)),
}


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.open(f).copy() for f in sorted(golden("llava/preprocess").glob("img*.png"))]


@pytest.fixture(scope="module")
def digests() -> dict[str, dict]:
    return json.loads((COMPACT / "llava/preprocess/digests.json").read_text())["tensors"]


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    file = load_file(COMPACT / "llava/preprocess/video.safetensors")
    return file["siglip70.video.pixels_uint8"].numpy()


def settings_for(name: str, aspect: str) -> ImageSettings:
    pinpoints = "56,112" if aspect == "highres" else PINPOINTS[name]
    return ImageSettings(aspect_ratio=aspect, grid_pinpoints=pinpoints)


IMAGE_CASES = [
    *(f"clip56.pad.{i}" for i in range(5)),
    *(f"clip56.anyres.{i}" for i in (1, 2, 3)),
    *("clip56.square.1", "clip56.square.3", "clip56.highres.4"),
    *("siglip70.pad.1", "siglip70.pad.2", "siglip70.anyres.1"),
    *("siglip70.square.1", "siglip70.square.3"),
]


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_still_images_are_bit_for_bit_the_reference(case, pictures, digests):
    name, aspect, number = case.split(".")
    spec, chosen = SPECS[name], settings_for(name, aspect)
    picture = pictures[int(number)]
    out = process_images([picture], ImageProcessor(spec), chosen)
    assert list(out.shape) == digests[case]["shape"]
    assert out.dtype == torch.float32
    assert digest(out.numpy()) == digests[case]["sha256"]
    # The same levels, normalised on the device, are the same numbers.
    tiles = torch.from_numpy(image_tiles(picture, spec, chosen))
    device = normalize_pixels(tiles, spec.mean, spec.std, torch.float32)
    assert digest(device.numpy()) == digests[case]["sha256"]


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_digests_are_those_of_the_full_goldens(case, digests):
    full = FULL / "llava/preprocess/outputs.safetensors"
    if not full.exists():
        pytest.skip("the full goldens are not beside this clone")
    assert digest(load_file(full)[case].numpy()) == digests[case]["sha256"]


@pytest.mark.parametrize("name", SPECS)
def test_frames_by_pillow_are_bit_for_bit_the_reference(name, frames, digests):
    wanted = digests[f"{name}.video"]["sha256"]
    processor = ImageProcessor(SPECS[name])
    for video in (frames, list(frames), [Image.fromarray(f) for f in frames]):
        out = processor.preprocess(video, return_tensors="pt")["pixel_values"]
        assert digest(out.numpy()) == wanted
    pixels = frames_to_pixels(resize_frames(frames, SPECS[name], "pil"))
    device = normalize_pixels(pixels, SPECS[name].mean, SPECS[name].std, torch.float32)
    assert digest(device.numpy()) == wanted


@pytest.mark.parametrize("i", [0, 1, 2])
def test_padding_and_canvas_are_the_reference(i, pictures, digests):
    square = pad_to_square(pictures[i], CLIP56.padding_color)
    assert digest(np.asarray(square)) == digests[f"expand2square.{i}"]["sha256"]
    canvas = fit_on_canvas(pictures[i], (112, 168))
    assert digest(np.asarray(canvas)) == digests[f"resize_and_pad.{i}"]["sha256"]


def test_padding_colors_are_llavas():
    assert CLIP56.padding_color == (122, 116, 104)
    assert SIGLIP70.padding_color == (127, 127, 127)


def test_images_of_different_tiling_stay_a_list(pictures):
    processor, chosen = ImageProcessor(CLIP56), settings_for("clip56", "anyres")
    out = process_images(pictures[:3], processor, chosen)
    assert [tuple(t.shape) for t in out] == [(5, 3, 56, 56), (5, 3, 56, 56), (4, 3, 56, 56)]
    same = process_images(pictures[:2], processor, chosen)
    assert same.shape == (2, 5, 3, 56, 56)
    single = process_images(pictures[:3], processor, settings_for("clip56", "pad"))
    assert single.shape == (3, 3, 56, 56)


def test_anyres_max_cuts_like_anyres(pictures):
    anyres = image_tiles(pictures[1], CLIP56, settings_for("clip56", "anyres"))
    assert np.array_equal(
        anyres, image_tiles(pictures[1], CLIP56, settings_for("clip56", "anyres_max_9"))
    )


def test_crop_split_is_refused(pictures):
    with pytest.raises(UsageError, match="crop_split is not supported"):
        image_tiles(pictures[0], CLIP56, ImageSettings(aspect_ratio="crop_split"))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(["anyres", "pad", "square", "highres"]),
)
def test_tiles_are_as_many_as_planned_and_form_the_canvas(width, height, aspect):
    rng = np.random.default_rng(width * 1000 + height)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    chosen = settings_for("clip56", aspect)
    tiles = image_tiles(picture, CLIP56, chosen)
    grid = tile_grid((width, height), chosen, 56)
    assert tiles.dtype == np.uint8 and tiles.flags.c_contiguous
    assert len(tiles) == (1 if grid is None else 1 + grid[0] * grid[1])
    if aspect == "anyres":
        rows, columns = grid
        board = tiles[1:].reshape(rows, columns, 3, 56, 56).transpose(0, 3, 1, 4, 2)
        canvas = np.asarray(fit_on_canvas(picture, (columns * 56, rows * 56)))
        assert np.array_equal(board.reshape(rows * 56, columns * 56, 3), canvas)


def test_highres_cuts_the_middle_when_tiles_do_not_fill_the_side(pictures):
    chosen = ImageSettings(aspect_ratio="highres", grid_pinpoints="130")
    tiles = image_tiles(pictures[4], CLIP56, chosen)
    padded = pad_to_square(pictures[4], CLIP56.padding_color).resize((130, 130))
    first = np.asarray(padded.crop((9, 9, 65, 65))).transpose(2, 0, 1)
    assert len(tiles) == 5 and np.array_equal(tiles[1], first)


# ---------------------------------------------------------------- frames


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Structure at several scales, edges, and noise. [H, W, 3] uint8"""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    picture[: height // 2, : width // 3] = 255
    picture += rng.integers(-20, 21, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def off(spec: PixelSpec, frame: np.ndarray) -> np.ndarray:
    """How many levels the fast way is off Pillow, value by value."""
    fast, exact = (frame_resizer(spec, mode)(frame) for mode in ("fast", "pil"))
    assert fast.shape == exact.shape == (*spec.output_size, 3) and fast.dtype == np.uint8
    return np.abs(fast.astype(int) - exact)


@settings(deadline=None, max_examples=50)
@given(st.integers(30, 400), st.integers(30, 400), st.sampled_from(["clip56", "siglip70"]))
@example(379, 57, "siglip70")  # 10 levels off unless the columns are resized first
def test_fast_frames_are_within_a_level_of_pillow(height, width, name):
    levels = off(SPECS[name], scene(height, width, height * 401 + width))
    # Two roundings may meet: torch's weights have 15 bits, Pillow's 22.
    assert levels.max() <= 2 and (levels > 1).mean() < 1e-3


@pytest.mark.parametrize("size", [(720, 1280), (1280, 720), (480, 854), (360, 640), (640, 360)])
@pytest.mark.parametrize("spec", [PixelSpec(336, crop=(336, 336)), PixelSpec((384, 384))])
def test_fast_frames_hardly_differ_from_pillow_at_video_sizes(size, spec):
    levels = off(spec, scene(*size))
    assert levels.max() <= 2 and (levels > 1).mean() < 1e-5 and levels.mean() < 0.01


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
@example((72, 160), (56, 56))
@example((50, 100), (90, 90))
def test_the_order_of_passes_is_that_of_pillow_13(source, target):
    frame = (
        scene(source[1], source[0]) if min(source) > 8 else np.zeros((*source[::-1], 3), np.uint8)
    )
    image = Image.fromarray(frame)
    passes = [(source[0], target[1]), (target[0], source[1])]
    first = passes[0] if vertical_first(source, target) else passes[1]
    by_hand = image.resize(first, Image.Resampling.BICUBIC).resize(target, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(resize_pil(image, target)), np.asarray(by_hand))
    if int(PIL.__version__.split(".")[0]) >= 13:
        native = image.resize(target, Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(resize_pil(image, target)), np.asarray(native))


@pytest.mark.parametrize("mode", ["fast", "pil"])
def test_many_frames_are_one_frame_many_times(mode):
    frames = np.stack([scene(60, 90, seed) for seed in range(3)])
    resize = frame_resizer(CLIP56, mode)
    wanted = np.stack([resize(f) for f in frames])
    assert np.array_equal(resize_frames(frames, CLIP56, mode), wanted)
    mixed = [frames[0], scene(100, 70)]
    assert resize_frames(mixed, CLIP56, mode).shape == (2, 56, 56, 3)
    assert resize_frames([], CLIP56, mode).shape == (0, 56, 56, 3)


@pytest.mark.parametrize("mode", ["fast", "pil"])
@pytest.mark.parametrize("spec", [CLIP56, SIGLIP70, PixelSpec(size=56, crop=(40, 70))])
@pytest.mark.parametrize("shape", [(70, 70), (56, 56), (300, 41)])
def test_a_resized_frame_owns_its_memory(mode, spec, shape):
    frame = scene(*shape)
    out = frame_resizer(spec, mode)(frame)
    wanted = out.copy()
    frame[:] = 0  # a decoder reuses its buffer
    assert np.array_equal(out, wanted)
    assert out.shape == (*spec.output_size, 3)


def test_layout_of_the_array_does_not_matter():
    frame = scene(90, 120)
    resize = frame_resizer(CLIP56)
    wanted = resize(frame)
    frozen = frame.copy()
    frozen.flags.writeable = False
    strided = np.asfortranarray(frame)
    assert np.array_equal(resize(frozen), wanted)
    assert np.array_equal(resize(strided), wanted)
    assert np.array_equal(resize(frame[:, ::-1][:, ::-1]), wanted)


@pytest.mark.parametrize("shape", [(30, 90), (90, 30)])
def test_a_crop_larger_than_the_picture_is_filled_with_black(shape):
    spec = PixelSpec(size=20, crop=(33, 33))
    frame = np.full((*shape, 3), 200, np.uint8)
    fast, exact = (frame_resizer(spec, mode)(frame) for mode in ("fast", "pil"))
    assert np.array_equal(fast, exact)
    black = (exact == 0).all(2)
    assert black[0].all() == (shape == (30, 90)) and black[:, 0].all() == (shape == (90, 30))


def test_pixels_of_frames_are_a_view():
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    pixels = frames_to_pixels(frames)
    frames[1, 2, 3, 0] = 9
    assert pixels.shape == (2, 3, 4, 4) and pixels[1, 0, 2, 3] == 9


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8 array"),
        (np.zeros((4, 4), np.uint8), "shape"),
        (np.zeros((4, 4, 4), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        ("picture.png", "uint8 array"),
    ],
)
@pytest.mark.parametrize("mode", ["fast", "pil"])
def test_what_is_no_frame_is_refused(frame, words, mode):
    with pytest.raises(UsageError, match=words):
        frame_resizer(CLIP56, mode)(frame)


def test_modes_and_filters_are_checked():
    with pytest.raises(UsageError, match="Unknown video preprocessing"):
        frame_resizer(CLIP56, "quick")
    lanczos = PixelSpec(size=(70, 70), resample=1)
    with pytest.raises(UsageError, match="set video_preprocess to pil"):
        frame_resizer(lanczos)
    assert frame_resizer(lanczos, "pil")(scene(90, 90)).shape == (70, 70, 3)


def test_bilinear_towers_are_fast_too():
    spec = PixelSpec(size=(70, 70), resample=2)
    frame = scene(200, 300)
    fast, exact = (frame_resizer(spec, mode)(frame) for mode in ("fast", "pil"))
    assert np.abs(fast.astype(int) - exact).max() <= 1


# ---------------------------------------------------------------- pictures and specs


def test_pictures_of_other_modes_become_rgb():
    gray = Image.fromarray(np.full((9, 9), 77, np.uint8))
    assert np.array_equal(np.asarray(to_rgb(gray)), np.full((9, 9, 3), 77))
    assert to_rgb(Image.new("RGBA", (3, 3))).mode == to_rgb(Image.new("P", (3, 3))).mode == "RGB"
    array = scene(9, 9)
    assert np.array_equal(np.asarray(to_rgb(array)), array)
    assert np.array_equal(resize_image(array, CLIP56), resize_image(Image.fromarray(array), CLIP56))


OLD_CLIP = {
    "crop_size": 224,
    "size": 224,
    "do_center_crop": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
}
NEW_CLIP = {
    "crop_size": {"height": 224, "width": 224},
    "size": {"shortest_edge": 224},
    "image_mean": list(CLIP_MEAN),
}
SIGLIP = {"size": {"height": 384, "width": 384}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("data", "size", "crop"),
    [
        (OLD_CLIP, 224, (224, 224)),
        (NEW_CLIP, 224, (224, 224)),
        (
            {"size": {"shortest_edge": 224}, "image_processor_type": "CLIPImageProcessor"},
            224,
            (224, 224),
        ),
        (SIGLIP, (384, 384), None),
        ({"size": 384}, (384, 384), None),
        ({"size": [384, 320]}, (384, 320), None),
        (SIGLIP | {"do_center_crop": True, "crop_size": 300}, (384, 384), (300, 300)),
    ],
)
def test_preprocessor_configs_are_understood(data, size, crop):
    spec = PixelSpec.from_preprocessor_config(data)
    assert (spec.size, spec.crop) == (size, crop)
    assert PixelSpec.from_preprocessor_config(spec.to_preprocessor_config()) == spec


def test_the_processors_of_the_reference_are_understood():
    data = json.loads((golden("llava/preprocess") / "processors.json").read_text())
    assert PixelSpec.from_preprocessor_config(data["clip"]) == CLIP56


@pytest.mark.parametrize(
    "data",
    [
        {"do_resize": False, "size": 224},
        {"size": {"shortest_edge": 224, "longest_edge": 500}},
        {"size": "large"},
        {},
    ],
)
def test_processors_that_cannot_feed_a_tower_are_refused(data):
    with pytest.raises(CheckpointError):
        PixelSpec.from_preprocessor_config(data)


def test_a_shorter_side_without_crop_is_refused():
    with pytest.raises(UsageError, match="must crop"):
        PixelSpec(size=224)
    with pytest.raises(UsageError, match="square"):
        image_tiles(scene(9, 9), PixelSpec(size=(8, 9)), ImageSettings())


def test_skipped_steps_change_the_numbers_not_the_levels():
    plain = PixelSpec.from_preprocessor_config(
        SIGLIP | {"do_normalize": False, "do_rescale": False}
    )
    frame = scene(384, 384)
    out = ImageProcessor(plain).preprocess(frame, return_tensors="np")["pixel_values"]
    assert np.array_equal(out[0], frame.transpose(2, 0, 1).astype(np.float32))


def test_another_factor_is_folded_into_mean_and_deviation():
    spec = PixelSpec(size=(8, 8), mean=(1.0, 1.0, 1.0), std=(0.5, 1.0, 2.0), rescale=1 / 127.5)
    tiles = scene(8, 8).transpose(2, 0, 1)[None]
    mean, std = spec.unit_mean_std
    device = normalize_pixels(torch.from_numpy(tiles.copy()), mean, std, torch.float32)
    np.testing.assert_allclose(device.numpy(), normalize_levels(tiles, spec), atol=1e-6)
    assert CLIP56.unit_mean_std == (CLIP56.mean, CLIP56.std)


def test_another_side_keeps_the_rule():
    assert CLIP56.with_side(168) == PixelSpec(size=168, crop=(168, 168))
    assert SIGLIP70.with_side(140).size == (140, 140)


def test_the_processor_has_llavas_names(frames):
    clip, siglip = ImageProcessor(CLIP56), ImageProcessor(SIGLIP70)
    assert clip.crop_size == {"height": 56, "width": 56} and clip.size == {"shortest_edge": 56}
    assert siglip.crop_size == {"height": 70, "width": 70} and min(siglip.size) == 70
    assert (siglip.image_mean, siglip.image_std) == ([0.5] * 3, [0.5] * 3)
    one = clip(frames[0], return_tensors="np")["pixel_values"]
    assert one.shape == (1, 3, 56, 56) and one.dtype == np.float32
    many = clip.preprocess([Image.fromarray(f) for f in frames])["pixel_values"]
    assert isinstance(many, list) and np.array_equal(many[0], one[0])
    with pytest.raises(UsageError, match="Unknown return_tensors"):
        clip.preprocess(frames, return_tensors="tf")
    with pytest.raises(UsageError, match="Unknown argument of preprocess 'do_resize'"):
        clip.preprocess(frames, do_resize=False)


def test_importing_images_does_not_import_torch():
    code = "import sys, av_llava.images; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
