"""What a tower's image processor does to a picture, as plain numbers.

Contract: no torch, no Pillow. Read from the ``preprocessor_config.json`` of CLIP, SigLIP and
their likes, old and new; what cannot feed a tower is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from av_llava.errors import CheckpointError, UsageError
from av_llava.geometry import shortest_edge_size
from av_llava.settings import CLIP_MEAN, CLIP_STD


@dataclass(frozen=True)
class PixelSpec:
    """What a tower's image processor does to a picture."""

    size: int | tuple[int, int]
    """Pixels: a number is the length of the shorter side, (height, width) distorts to that."""
    crop: tuple[int, int] | None = None
    """(height, width) of the centre crop after resizing; black fills what is missing."""
    resample: int = 3
    """Pillow's number of the filter: 3 bicubic, 2 bilinear."""
    mean: tuple[float, ...] = CLIP_MEAN
    """Of each channel, for pixels that were multiplied by ``rescale``."""
    std: tuple[float, ...] = CLIP_STD
    """Of each channel, for pixels that were multiplied by ``rescale``."""
    rescale: float = 1 / 255
    """Factor from levels to the unit of mean and deviation."""

    def __post_init__(self) -> None:
        if isinstance(self.size, int) and self.crop is None:
            raise UsageError(
                "An image processor that resizes the shorter side must crop afterwards, or images "
                "would differ in size: give crop=(height, width)."
            )
        if len(self.mean) != 3 or len(self.std) != 3:
            raise UsageError("The mean and deviation of pixels must hold three numbers each.")

    @classmethod
    def from_preprocessor_config(cls, data: Mapping[str, Any]) -> PixelSpec:
        """Read the JSON data of a ``preprocessor_config.json`` (CLIP, SigLIP and their likes).

        Raises:
            CheckpointError: a size that is not understood, or steps left out that towers need.
        """
        if not data.get("do_resize", True):
            raise CheckpointError(
                "The image processor says do_resize: false, so its images have no common size."
            )
        kind = str(data.get("image_processor_type") or data.get("feature_extractor_type") or "")
        crops = data.get("do_center_crop", "crop_size" in data or kind.startswith("CLIP"))
        rescale = float(data.get("rescale_factor", 1 / 255)) if data.get("do_rescale", True) else 1
        normal = data.get("do_normalize", True)
        return cls(
            size=_resize_rule(data.get("size"), bool(crops)),
            crop=_height_width(data.get("crop_size", data.get("size"))) if crops else None,
            resample=int(data.get("resample", 3)),
            mean=tuple(data.get("image_mean", CLIP_MEAN)) if normal else (0.0, 0.0, 0.0),
            std=tuple(data.get("image_std", CLIP_STD)) if normal else (1.0, 1.0, 1.0),
            rescale=rescale,
        )

    def to_preprocessor_config(self) -> dict[str, Any]:
        """Return JSON data that :meth:`from_preprocessor_config` and transformers read."""
        clip = isinstance(self.size, int)
        size = {"shortest_edge": self.size} if clip else height_width_names(self.size)
        return {
            "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            "resample": self.resample,
            **(
                {"do_center_crop": True, "crop_size": height_width_names(self.crop)}
                if self.crop
                else {}
            ),
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def with_side(self, side: int) -> PixelSpec:
        """Return the same processing to another side (S2: that of the largest scale)."""
        size = side if isinstance(self.size, int) else (side, side)
        return replace(self, size=size, crop=self.crop and (side, side))

    @property
    def unit_mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation for pixels scaled to 0..1, as ``VisionSettings`` has them."""
        if self.rescale == 1 / 255:
            return self.mean, self.std
        unit = 255 * self.rescale
        return tuple(m / unit for m in self.mean), tuple(s / unit for s in self.std)

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the result, in pixels."""
        if self.crop is not None:
            return self.crop
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @property
    def side(self) -> int:
        """Side of the result, which tiling needs to be square."""
        height, width = self.output_size
        if height != width:
            raise UsageError(f"Tiles must be square, but the processor makes {height}x{width}.")
        return height

    @property
    def base_side(self) -> int:
        """Side that LLaVA squeezes the whole image to before it makes the base view."""
        return self.size if isinstance(self.size, int) else min(self.size)

    @property
    def padding_color(self) -> tuple[int, ...]:
        """Levels that come out of normalisation as zero, rounded down."""
        return tuple(int(m * 255) for m in self.mean)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing, before the crop."""
        if isinstance(self.size, int):
            return shortest_edge_size((width, height), self.size)
        return self.size[1], self.size[0]

    def crop_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the crop of a resized picture."""
        crop_h, crop_w = self.crop or (height, width)
        left, top = (width - crop_w) // 2, (height - crop_h) // 2
        return left, top, left + crop_w, top + crop_h


def _height_width(size: Any) -> tuple[int, int]:
    """(height, width) of a ``crop_size`` or an exact ``size``."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise CheckpointError(
        f"The image processor's size {size!r} is not understood: it must be a number, "
        '{"height": h, "width": w} or {"shortest_edge": n}.'
    )


def _resize_rule(size: Any, crops: bool) -> int | tuple[int, int]:
    """``PixelSpec.size``: old files give one number, which means the shorter side if they crop."""
    shortest = isinstance(size, Mapping) and "shortest_edge" in size
    if shortest and "longest_edge" in size:
        raise CheckpointError(
            f"The image processor's size {size!r} bounds both edges, which gives images of "
            "different shapes; towers need one."
        )
    if shortest or (isinstance(size, int) and crops):
        return _height_width(size)[0]
    return _height_width(size)


def height_width_names(size: Any) -> dict[str, int]:
    """Write (height, width) as image processors spell it."""
    return {"height": size[0], "width": size[1]}
