"""Still images: one file to an upright RGB picture.

Contract: Pillow, known formats only (no PostScript, no plugins that start programs); EXIF
orientation applied; a truncated file or a picture above ``max_pixels`` raises `MediaError`.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from av_llava.errors import MediaError
from av_llava.media.limits import DEFAULT_LIMITS, Limits
from av_llava.media.source import LocalFile, Source, local_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
ANIMATED = ("GIF", "WEBP", "PNG")

# What Pillow's readers raise on damaged files; they parse with plain indexing.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError,
    ArithmeticError, MemoryError, struct.error, zlib.error,
)  # fmt: skip

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P4", b"P5", b"P6")


def read_image(source: Source, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Read a still image (the first picture of an animation) as RGB, upright.

    Raises:
        MediaError: missing, not an image, truncated, or more than ``limits.max_pixels``.
    """
    with local_file(source, limits) as file:
        if file.path.is_dir():
            raise MediaError(f"{file.name!r} is a folder, not an image.")
        return load_picture(file, limits)


def read_image_size(source: Source, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Return (width, height) of a still image as `read_image` gives it, from its header.

    Raises:
        MediaError: missing, not an image, or more than ``limits.max_pixels``.
    """
    with local_file(source, limits) as file:
        if file.path.is_dir():
            raise MediaError(f"{file.name!r} is a folder, not an image.")
        with open_picture(file, limits) as picture:
            if picture.format == "TIFF":  # which Pillow turns by itself, but when differs
                return load_picture(file, limits).size
            try:
                sideways = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            except _DAMAGED as error:
                raise damaged(file, picture, error) from error
            width, height = picture.size
            return (height, width) if sideways else (width, height)


def load_picture(file: LocalFile, limits: Limits) -> Image.Image:
    """Read a local image file as RGB, upright; see `read_image`."""
    with open_picture(file, limits) as picture:
        try:
            upright = ImageOps.exif_transpose(picture)
            return to_rgb(upright)
        except _DAMAGED as error:
            raise damaged(file, picture, error) from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return the picture in RGB; 16-bit grey is scaled, not clipped, to 8 bits."""
    if picture.mode.startswith("I;16"):
        picture = picture.point(lambda value: value / 256).convert("L")
    return picture.convert("RGB")


def open_picture(file: LocalFile, limits: Limits) -> Image.Image:
    """Open an image lazily (header only), checked for format and size."""
    Image.init()  # the formats beyond the commonest are registered only now
    with warnings.catch_warnings():
        # our own limit replaces Pillow's, which only warns at first
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            picture = Image.open(file.path, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise MediaError(f"{file.name!r} is too large a picture: {error}.") from error
        except _DAMAGED as error:
            raise MediaError(
                f"{file.name!r} is not an image that can be read ({', '.join(FORMATS)})."
            ) from error
    try:
        limits.check(
            "max_pixels", picture.width * picture.height, repr(file.name), "its pixel count"
        )
    except MediaError:
        picture.close()
        raise
    return picture


def looks_like_image(path: Path) -> bool:
    """Return whether a file begins as a picture format does (animations included)."""
    with path.open("rb") as handle:
        head = handle.read(16)
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def animation_frames(file: LocalFile, picture: Image.Image) -> int:
    """Return the number of frames of an animation, 1 for a still image."""
    if picture.format not in ANIMATED:
        return 1  # pages of a TIFF and the second eye of an MPO are no film
    try:
        return int(getattr(picture, "n_frames", 1))
    except _DAMAGED as error:
        raise damaged(file, picture, error) from error


def show(file: LocalFile, picture: Image.Image, index: int) -> None:
    """Bring a frame of an animation up, decoded."""
    try:
        picture.seek(index)
        picture.load()
    except _DAMAGED as error:
        raise damaged(file, picture, error) from error


def damaged(file: LocalFile, picture: Image.Image, error: BaseException) -> MediaError:
    """Make the error for an image whose header could be read but not its contents."""
    return MediaError(
        f"{file.name!r} is a damaged or truncated {picture.format} image: "
        f"{error or type(error).__name__}."
    )
