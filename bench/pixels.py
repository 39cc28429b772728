"""Decoded frames to what a vision tower takes: resize, crop, normalise.

The reference is the usual loop: Pillow's bicubic a frame, then numpy for scale, mean and
deviation, then a stack. transformers' image processor is the fast one (torchvision) where that is
installed. Ours is measured to the same normalised float32 on the CPU, and up to the uint8 tensor
that goes to the device, where the model normalises. Ours differs from Pillow by at most one level
of 255, but for a few values in a million (torch's weights have 16 bits), which differ by two. One
thread.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, SiglipImageProcessor

from av_llava.images import frames_to_pixels, resize_frames
from av_llava.pixel_spec import PixelSpec
from av_llava.vision.pixels import normalize_pixels
from bench.measure import Contestants, Row, check, race, rows_of, single_threaded

TITLE = "Frames to pixels"
RATIO = "× as fast as Pillow"
PILLOW, OURS, OURS_PIL = "Pillow + numpy", "av_llava", "av_llava, video_preprocess=pil"
OURS_DEVICE = "av_llava, uint8 for the device"
BOUND = 6.0
CASES = {
    "1280×720 to SigLIP 384": (
        (1280, 720),
        PixelSpec((384, 384), mean=(0.5,) * 3, std=(0.5,) * 3),
        lambda: SiglipImageProcessor(size={"height": 384, "width": 384}),
    ),
    "1920×1080 to CLIP 336": (
        (1920, 1080),
        PixelSpec(336, crop=(336, 336)),
        lambda: CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336),
    ),
}


def make_frames(n: int, size: tuple[int, int]) -> np.ndarray:
    """Pictures with smooth parts, texture and hard edges. uint8 [n, H, W, 3]"""
    rng = np.random.default_rng(0)
    width, height = size
    frames = np.empty((n, height, width, 3), np.uint8)
    for frame in frames:
        small = Image.fromarray(rng.integers(0, 255, (height // 40, width // 40, 3), np.uint8))
        frame[...] = np.asarray(small.resize(size, Image.Resampling.BICUBIC))
        frame[height // 3 :: 97, :, :] = 255
        noisy = frame[: height // 3]
        noisy[...] = np.clip(noisy + rng.normal(0, 12, noisy.shape), 0, 255)
    return frames


def pillow(frames: np.ndarray, spec: PixelSpec) -> Tensor:
    """Frame by frame, as most code does. float32 [T, 3, H, W]"""
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    out = []
    for frame in frames:
        image = Image.fromarray(frame)
        size = spec.resized(*image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        if spec.crop is not None:
            image = image.crop(spec.crop_box(*size))
        pixels = np.asarray(image, np.float32) * np.float32(1 / 255)
        out.append(((pixels - mean) / std).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(out))


def ours(frames: np.ndarray, spec: PixelSpec, mode: str = "fast") -> Tensor:
    """The library, normalised on the CPU. float32 [T, 3, H, W]"""
    pixels = frames_to_pixels(resize_frames(frames, spec, mode))
    return normalize_pixels(pixels, spec.mean, spec.std, torch.float32)


@single_threaded
def run(quick: bool) -> list[Row]:
    """All rows, per frame."""
    rows = []
    for case, (size, spec, make) in CASES.items():
        frames = make_frames(2 if quick else 16, size)
        processor = make()
        library = "Pillow" if type(processor).__name__.endswith("Pil") else "torchvision"
        theirs = f"transformers ({library})"
        contestants: Contestants = {
            PILLOW: partial(pillow, frames, spec),
            theirs: partial(_transformers, processor, frames),
            OURS: partial(ours, frames, spec),
            OURS_PIL: partial(ours, frames, spec, "pil"),
            OURS_DEVICE: partial(resize_frames, frames, spec),
        }
        expected = contestants[PILLOW]()
        for name in (theirs, OURS, OURS_PIL):
            _check_levels(contestants[name](), expected, spec, f"{case}, {name}")
        timings = race(contestants, rounds=2 if quick else 15, seconds=1.5)
        each = {name: timing.divided(len(frames)) for name, timing in timings.items()}
        rows += rows_of(f"{case}, a frame", each, PILLOW, "speedup", {OURS: BOUND})
    return rows


def _transformers(processor: object, frames: np.ndarray) -> Tensor:
    return processor(list(frames), return_tensors="pt")["pixel_values"]  # type: ignore[operator]


def _check_levels(found: Tensor, expected: Tensor, spec: PixelSpec, what: str) -> None:
    """Pixels differ by at most one level of 255; one value in 100 000 may by two."""
    unit = 255 * torch.tensor(spec.std)[:, None, None]
    off = ((found - expected).abs() * unit).round()
    rare = (off > 1).float().mean().item()
    check(
        bool(off.max() <= 2) and rare <= 1e-5,
        f"{what}: up to {off.max():.0f} levels, {rare:.1e} > 1",
    )
