"""Still images: upright, RGB, and errors that name the file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from av_llava.errors import MediaError
from av_llava.media import Limits, read_image, read_image_size


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    columns, rows = np.meshgrid(np.arange(width) * 6, np.arange(height) * 8)
    return Image.fromarray(np.stack([columns, rows, columns // 2], -1).astype(np.uint8))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm"])
def test_lossless_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    gradient().save(path, **({"lossless": True} if suffix == "webp" else {}))
    picture = read_image(path)
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(gradient()))
    np.testing.assert_array_equal(np.asarray(read_image(path.read_bytes())), np.asarray(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    # what a camera held in that way stores, for the same upright picture
    stored = {
        1: lambda p: p,
        2: lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda p: p.transpose(Image.Transpose.ROTATE_180),
        4: lambda p: p.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda p: p.transpose(Image.Transpose.TRANSPOSE),
        6: lambda p: p.transpose(Image.Transpose.ROTATE_90),
        7: lambda p: p.transpose(Image.Transpose.TRANSVERSE),
        8: lambda p: p.transpose(Image.Transpose.ROTATE_270),
    }[orientation](gradient())
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(buffer)), np.asarray(gradient()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.full((30, 40), 200 * 256, np.uint16))
    elif mode in ("I", "F"):
        picture = Image.new(mode, (40, 30), 200)
    else:
        picture = gradient().convert(mode)
    picture.save(tmp_path / "a.tif")
    result = read_image(tmp_path / "a.tif")
    assert (result.mode, result.size) == ("RGB", (40, 30))
    if mode in ("I;16", "I", "F"):
        assert np.asarray(result)[0, 0].tolist() == [200, 200, 200]


def test_first_picture_of_an_animation(tmp_path: Path) -> None:
    gradient().save(
        tmp_path / "a.webp",
        save_all=True,
        append_images=[Image.new("RGB", (40, 30))],
        lossless=True,
    )
    np.testing.assert_array_equal(
        np.asarray(read_image(tmp_path / "a.webp")), np.asarray(gradient())
    )


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8))
    path = tmp_path / f"a.{suffix}"
    noise.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=rf"a\.{suffix}"):
        read_image(path)


def test_not_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("words")
    (tmp_path / "b.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("a.png", "b.eps"):
        with pytest.raises(MediaError, match="not an image that can be read"):
            read_image(tmp_path / name)
    with pytest.raises(MediaError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(MediaError, match="There is no file"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_the_size_is_known_from_the_header(tmp_path, suffix, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (6, 4)).save(path, exif=exif)
    assert read_image_size(path) == read_image(path).size


def test_the_size_of_a_jpeg_needs_no_pixels(tmp_path):
    path = tmp_path / "a.jpg"
    Image.effect_noise((400, 300), 90).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    assert read_image_size(path) == (400, 300)
    with pytest.raises(MediaError):
        read_image(path)


def test_a_size_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    for path in (tmp_path, tmp_path / "a.jpg", tmp_path / "none.jpg"):
        with pytest.raises(MediaError):
            read_image_size(path)
    Image.new("RGB", (30, 30)).save(tmp_path / "b.png")
    with pytest.raises(MediaError, match="max_pixels"):
        read_image_size(tmp_path / "b.png", Limits(max_pixels=99))
