"""Still images and video frames to the square uint8 pixels that a tower takes.

Contract: still images agree bit for bit with LLaVA's processing (Pillow resizes them);
normalisation comes later, from the same levels and in the same order of operations. Video frames
are resized by torch's antialiased bicubic on uint8 (``fast``, within one level of Pillow; of ten
million values about one is two off) or by Pillow (``pil``). Follows LLaVA-NeXT ``mm_utils`` and
the CLIP and SigLIP image processors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from av_llava.errors import UsageError, unknown_name
from av_llava.geometry import (
    fit_inside,
    highres_side,
    parse_pinpoints,
    select_best_resolution,
    tile_grid,
)
from av_llava.pixel_spec import PixelSpec, height_width_names
from av_llava.settings import ImageSettings

if TYPE_CHECKING:
    from torch import Tensor

Frame = np.ndarray
"""One picture: [H, W, 3] uint8."""

_TORCH_MODES = {2: "bilinear", 3: "bicubic"}


def to_rgb(picture: Image.Image | Frame) -> Image.Image:
    """Return a picture as a Pillow RGB image.

    Raises:
        UsageError: an array that is not [H, W, 3] uint8.
    """
    if isinstance(picture, Image.Image):
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    return Image.fromarray(_checked_frame(picture))


def _checked_frame(frame: Any) -> Frame:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        got = f"{type(frame).__name__} of {getattr(frame, 'dtype', 'no dtype')}"
        raise UsageError(f"A frame must be a uint8 array [height, width, 3], not {got}.")
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise UsageError(f"A frame must have the shape [height, width, 3], not {frame.shape}.")
    return frame


def vertical_first(source_wh: Sequence[int], target_wh: Sequence[int]) -> bool:
    """Whether the columns are resized before the rows.

    The order matters because levels are clipped to 0..255 between the passes: sharp content
    differs by up to 20 levels. Pillow up to 12 and torch always begin with the rows; Pillow 13
    begins with the columns where the height shrinks by more than twice as many pixels as the
    width. This rule is followed here with every version, so that pixels do not depend on it.
    """
    less_w, less_h = (a - b for a, b in zip(source_wh, target_wh, strict=True))
    return less_h > 0 and less_h > 2 * less_w


def resize_pil(image: Image.Image, size_wh: tuple[int, int], resample: int = 3) -> Image.Image:
    """Resize with Pillow, with the same result for every version of it."""
    filter_ = Image.Resampling(resample)
    if vertical_first(image.size, size_wh):
        image = image.resize((image.width, size_wh[1]), filter_)
    return image.resize(size_wh, filter_)


def resize_image(picture: Image.Image | Frame, spec: PixelSpec) -> Frame:
    """Resize and crop with Pillow. [H, W, 3] uint8"""
    image = to_rgb(picture)
    size = spec.resized(*image.size)
    image = resize_pil(image, size, spec.resample)
    return np.asarray(image.crop(spec.crop_box(*size)) if spec.crop else image)


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Centre an image on a square of one colour (LLaVA's ``expand2square``)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def fit_on_canvas(image: Image.Image, canvas_wh: tuple[int, int]) -> Image.Image:
    """Scale an image to touch a black canvas from inside and centre it there."""
    width, height = fit_inside(image.size, canvas_wh)
    canvas = Image.new("RGB", canvas_wh, (0, 0, 0))
    corner = (canvas_wh[0] - width) // 2, (canvas_wh[1] - height) // 2
    canvas.paste(resize_pil(image, (width, height)), corner)
    return canvas


def image_tiles(
    picture: Image.Image | Frame, spec: PixelSpec, settings: ImageSettings
) -> np.ndarray:
    """Cut a picture into the tiles that the tower sees.

    Args:
        picture: the image.
        spec: of the tower.
        settings: how images are cut.

    Returns:
        [n, 3, side, side] uint8: the whole picture first, then the tiles row by row.
    """
    image = to_rgb(picture)
    grid = tile_grid(image.size, settings, spec.side)
    if grid is None:
        padded = settings.aspect_ratio == "pad"
        views = [pad_to_square(image, spec.padding_color) if padded else image]
    else:
        views = [resize_pil(image, (spec.base_side, spec.base_side))]
        views += _cut(_canvas(image, spec, settings), spec.side, *grid)
    tiles = [resize_image(view, spec) for view in views]
    return np.ascontiguousarray(np.stack(tiles).transpose(0, 3, 1, 2))


def _canvas(image: Image.Image, spec: PixelSpec, settings: ImageSettings) -> Image.Image:
    """The picture that is cut into tiles."""
    if settings.aspect_ratio == "highres":
        side = highres_side(settings.grid_pinpoints, spec.side)
        return resize_pil(pad_to_square(image, spec.padding_color), (side, side))
    canvases = parse_pinpoints(settings.grid_pinpoints, spec.side)
    return fit_on_canvas(image, select_best_resolution(image.size, canvases))


def _cut(canvas: Image.Image, side: int, rows: int, columns: int) -> list[Image.Image]:
    """Tiles row by row, from the middle when the canvas is larger than the tiles."""
    left = (canvas.width - columns * side) // 2
    top = (canvas.height - rows * side) // 2
    corners = [(left + x * side, top + y * side) for y in range(rows) for x in range(columns)]
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


def normalize_levels(pixels: np.ndarray, spec: PixelSpec) -> np.ndarray:
    """Normalise on the host, as LLaVA's image processors do, bit for bit.

    Args:
        pixels: [..., 3, H, W] uint8.
        spec: factor, mean and deviation.

    Returns:
        float32 of the same shape.
    """
    levels = (np.arange(256, dtype=np.uint8) * spec.rescale).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    table = (levels - mean[:, None]) / std[:, None]  # [3, 256]: once a level, not once a pixel
    out = np.empty(pixels.shape, np.float32)
    for channel in range(3):
        np.take(table[channel], pixels[..., channel, :, :], out=out[..., channel, :, :])
    return out


def frame_resizer(spec: PixelSpec, mode: str = "fast") -> Callable[[Frame], Frame]:
    """Make the function that resizes and crops one frame while a video is decoded.

    Args:
        spec: of the tower.
        mode: ``fast`` (torch, within one level of Pillow) or ``pil`` (Pillow).

    Returns:
        A function from [H, W, 3] uint8 to a new [height, width, 3] uint8 array.
    """
    if mode == "pil":
        return lambda frame: resize_image(frame, spec)
    if mode != "fast":
        raise unknown_name("video preprocessing", mode, ("fast", "pil"))
    if spec.resample not in _TORCH_MODES:
        raise UsageError(
            f"The tower's images are resized with Pillow's filter number {spec.resample}, which "
            "fast video preprocessing does not have; set video_preprocess to pil."
        )
    return lambda frame: _resize_fast(_checked_frame(frame), spec)


def _resize_fast(frame: Frame, spec: PixelSpec) -> Frame:
    """Resize and crop uint8 on the channels-last view, where torch has a vectorised kernel.

    [H, W, 3] to a new [height, width, 3].
    """
    import torch
    from torch.nn import functional as F

    if not frame.flags.writeable or not frame.flags.c_contiguous:
        frame = frame.copy()  # torch warns of arrays that it must not write to
    # The axis of frames is added by torch: numpy gives it stride 0, and torch then takes the
    # view for channels-first, which costs half of the speed.
    pixels = torch.from_numpy(frame)[None].permute(0, 3, 1, 2)
    height, width = frame.shape[:2]
    new_w, new_h = spec.resized(width, height)
    if (new_w, new_h) != (width, height):
        sizes = [(new_h, new_w)]
        if vertical_first((width, height), (new_w, new_h)):
            sizes.insert(0, (new_h, width))
        for size in sizes:
            filter_ = _TORCH_MODES[spec.resample]
            pixels = F.interpolate(pixels, size, mode=filter_, antialias=True)
    elif spec.crop is None:
        return frame.copy()
    resized = pixels[0].permute(1, 2, 0).numpy()
    return _crop(resized, spec) if spec.crop else resized


def _crop(frame: Frame, spec: PixelSpec) -> Frame:
    """Copy the middle of [H, W, 3]; black stands where a frame is smaller."""
    left, top, right, bottom = spec.crop_box(frame.shape[1], frame.shape[0])
    inside = frame[max(top, 0) : bottom, max(left, 0) : right]
    if inside.shape[:2] == (bottom - top, right - left):
        return inside.copy()
    out = np.zeros((bottom - top, right - left, 3), np.uint8)
    row, column = max(-top, 0), max(-left, 0)
    out[row : row + inside.shape[0], column : column + inside.shape[1]] = inside
    return out


def resize_frames(
    frames: np.ndarray | Sequence[Frame], spec: PixelSpec, mode: str = "fast"
) -> np.ndarray:
    """Resize and crop the frames of a video.

    Args:
        frames: [T, H, W, 3] uint8, or a list of [H, W, 3], which may differ in size.
        spec: of the tower.
        mode: ``fast`` or ``pil``, see :func:`frame_resizer`.

    Returns:
        [T, height, width, 3] uint8.
    """
    resize = frame_resizer(spec, mode)
    out = np.empty((len(frames), *spec.output_size, 3), np.uint8)
    for i, frame in enumerate(frames):
        out[i] = resize(frame)
    return out


def frames_to_pixels(frames: np.ndarray) -> Tensor:
    """View frames [T, H, W, 3] as what towers take: uint8 [T, 3, H, W]. Nothing is copied."""
    import torch

    return torch.from_numpy(frames).permute(0, 3, 1, 2)


class ImageProcessor:
    """The image processor that LLaVA's users know: ``preprocess`` and the names around it."""

    def __init__(self, spec: PixelSpec) -> None:
        self.spec = spec
        self.image_mean, self.image_std = list(spec.mean), list(spec.std)
        self.resample = Image.Resampling(spec.resample)
        self.rescale_factor = spec.rescale
        self.crop_size = height_width_names(spec.output_size)
        clip = isinstance(spec.size, int)
        self.size = {"shortest_edge": spec.size} if clip else spec.size  # as LLaVA-NeXT has it

    def preprocess(
        self, images: Any, return_tensors: str | None = None, **unused: Any
    ) -> dict[str, Any]:
        """Resize with Pillow, crop and normalise.

        Args:
            images: one picture, a list of them, or the frames of a video [T, H, W, 3].
            return_tensors: ``pt`` or ``np`` for one [N, 3, H, W] array, None for a list.

        Returns:
            ``{"pixel_values": ...}`` in float32.
        """
        if unused:
            raise unknown_name("argument of preprocess", min(unused), ("images", "return_tensors"))
        if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
            images = [images]
        levels = [resize_image(image, self.spec).transpose(2, 0, 1) for image in images]
        values = [normalize_levels(pixels, self.spec) for pixels in levels]
        if return_tensors is None:
            return {"pixel_values": values}
        stacked = np.stack(values)
        if return_tensors == "np":
            return {"pixel_values": stacked}
        if return_tensors != "pt":
            raise unknown_name("return_tensors", return_tensors, ("pt", "np"))
        import torch

        return {"pixel_values": torch.from_numpy(stacked)}

    __call__ = preprocess


def process_images(
    images: Sequence[Image.Image | Frame], processor: ImageProcessor, settings: ImageSettings
) -> Tensor | list[Tensor]:
    """LLaVA's function of this name: tiles of every image, normalised.

    Returns:
        [N, 3, H, W] where images are single views; else [N, n, 3, H, W], or a list of
        [n_i, 3, H, W] where images differ in tiles. float32
    """
    import torch

    spec = processor.spec
    tiles = [normalize_levels(image_tiles(image, spec, settings), spec) for image in images]
    tensors = [torch.from_numpy(t) for t in tiles]
    if settings.aspect_ratio in ("square", "pad"):
        return torch.cat(tensors)
    if len({len(t) for t in tensors}) == 1:
        return torch.stack(tensors)
    return tensors
