"""Pure integer arithmetic of token counts: patches, pooled sides, audio frames to tokens.

Contract: no torch, no state; every other part that needs a count asks here, so that the number
of tokens is known before anything is decoded and is the same number everywhere.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from av_llava.errors import UsageError
from av_llava.settings import ImageSettings

POOL_MODES = ("average", "max", "bilinear")


def pooled_side(side: int, stride: int, mode: str, tail: str = "drop") -> int:
    """Length of one side of a patch grid after 2-D pooling.

    Average and max pooling drop the remainder (LLaVA-NeXT ``get_2dPool``) unless ``tail`` is
    ``"partial"``; bilinear keeps it.
    """
    if mode not in POOL_MODES:
        raise UsageError(f"Unknown pooling mode {mode!r}. Known: {', '.join(POOL_MODES)}.")
    if stride <= 1:
        return side
    if mode == "bilinear" or tail == "partial":
        return ceil_div(side, stride)
    if side < stride:
        raise UsageError(f"A grid side of {side} cannot be pooled with stride {stride}.")
    return side // stride


def ceil_div(number: int, divisor: int) -> int:
    """Quotient of non-negative integers, rounded up."""
    return -(-number // divisor)


def window_bins(side: int, stride: int, n_bins: int) -> tuple[tuple[int, int], ...]:
    """Half-open source range of each of ``n_bins`` windows; the last one may be cut short."""
    return tuple((i * stride, min((i + 1) * stride, side)) for i in range(n_bins))


def adaptive_bins(side: int, n_bins: int) -> tuple[tuple[int, int], ...]:
    """Half-open source range of each bin of adaptive pooling.

    Bins overlap when ``side`` is no multiple of ``n_bins``, and repeat when it is smaller.
    """
    return tuple((i * side // n_bins, ceil_div((i + 1) * side, n_bins)) for i in range(n_bins))


def bilinear_bins(side: int, n_bins: int) -> tuple[tuple[int, int], ...]:
    """Half-open source range that each output of bilinear resizing reads (pixel centres, no
    antialiasing): one sample, or the two around the output's centre.
    """
    bins = []
    for i in range(n_bins):
        # The centre is ((2 i + 1) side - n_bins) / (2 n_bins), clamped at the first sample.
        below, between = divmod(max((2 * i + 1) * side - n_bins, 0), 2 * n_bins)
        bins.append((below, min(below + 1 + (between > 0), side)))
    return tuple(bins)


def even_indices(count: int, n: int) -> tuple[int, ...]:
    """``n`` of ``count`` indices, evenly spaced from the first: ``floor(i * count / n)``."""
    return tuple(i * count // n for i in range(n))


SAMPLE_RATE_HZ = 16_000
HOP_SAMPLES = 160  # one mel or filterbank frame each 10 ms, in Whisper and in BEATs
FBANK_WINDOW_SAMPLES = 400  # Kaldi's 25 ms window, which must be filled


@dataclass(frozen=True)
class AudioGeometry:
    """How an audio tower turns the samples of a chunk into output frames, as integers.

    Samples become input frames (mel or filterbank), one each 10 ms; ``inputs_per_hop`` of them
    make one output position with ``frames_per_hop`` frames. Towers from elsewhere describe
    themselves so too.
    """

    chunk_samples: int
    """Samples of one chunk: the tower's own input length."""
    inputs_per_hop: int
    """Input frames from one output position to the next."""
    frames_per_hop: int = 1
    """Output frames at one position (BEATs: one per frequency band)."""
    overlap_samples: int = 0
    """Samples that an input frame needs beyond its hop."""
    partial: bool = True
    """Whether a hop counts that is only partly filled with sound."""
    input_hop_samples: int = HOP_SAMPLES
    """Samples from one input frame to the next."""
    sample_rate_hz: int = SAMPLE_RATE_HZ

    def input_frames(self, n_samples: int) -> int:
        """Input frames that hold sound when a chunk begins with ``n_samples`` samples of it."""
        return self._hops(n_samples - self.overlap_samples, self.input_hop_samples)

    def frames(self, input_frames: int) -> int:
        """Output frames that hold sound, of so many input frames; at least one position."""
        return self._hops(input_frames, self.inputs_per_hop) * self.frames_per_hop

    def _hops(self, length: int, hop: int) -> int:
        return max((length + (hop - 1 if self.partial else 0)) // hop, 1)

    @property
    def frames_per_chunk(self) -> int:
        """Output frames of a whole chunk."""
        return self.frames(self.input_frames(self.chunk_samples))

    @property
    def frame_rate_hz(self) -> float:
        """Output frames per second of sound."""
        hop = self.inputs_per_hop * self.input_hop_samples
        return self.frames_per_hop * self.sample_rate_hz / hop

    @property
    def chunk_seconds(self) -> float:
        """Length of a chunk, in seconds."""
        return self.chunk_samples / self.sample_rate_hz


def mel_frames(n_samples: int) -> int:
    """Log-mel frames that hold sound: Whisper's attention mask, ``ceil(n / 160)``."""
    return -(-n_samples // HOP_SAMPLES)


def fbank_frames(n_samples: int) -> int:
    """Kaldi filterbank frames of ``n_samples`` samples; only filled windows count."""
    return max(0, 1 + (n_samples - FBANK_WINDOW_SAMPLES) // HOP_SAMPLES)


def whisper_geometry(max_source_positions: int) -> AudioGeometry:
    """Return the geometry of a Whisper encoder: two mel frames per output frame."""
    return AudioGeometry(2 * max_source_positions * HOP_SAMPLES, inputs_per_hop=2)


def beats_geometry(
    chunk_samples: int, patch_size: int = 16, n_mels: int = 128, freq_pool: str = "flatten"
) -> AudioGeometry:
    """Return the geometry of BEATs: square patches of filterbank frames, time-major."""
    return AudioGeometry(
        chunk_samples,
        inputs_per_hop=patch_size,
        frames_per_hop=n_mels // patch_size if freq_pool == "flatten" else 1,
        overlap_samples=FBANK_WINDOW_SAMPLES - HOP_SAMPLES,
        partial=False,
    )


def audio_chunks(
    n_samples: int, chunk_samples: int, min_samples: int
) -> tuple[tuple[int, int], ...]:
    """Cut ``n_samples`` into consecutive chunks, as ``(first, stop)`` sample numbers.

    A rest shorter than ``min_samples`` after the last whole chunk is left out: it would cost a
    whole chunk of the tower for a tenth of a second.
    """
    starts = range(0, n_samples, chunk_samples)
    chunks = [(lo, min(lo + chunk_samples, n_samples)) for lo in starts]
    if len(chunks) > 1 and chunks[-1][1] - chunks[-1][0] < min_samples:
        chunks.pop()
    return tuple(chunks)


def audio_tokens(n_frames: int, stride: int) -> int:
    """Tokens of ``n_frames`` tower frames, ``stride`` frames to a token; a rest counts as one."""
    return -(-n_frames // stride)


def parse_pinpoints(
    pinpoints: str | Sequence[Sequence[int]], tile: int
) -> tuple[tuple[int, int], ...]:
    """Read the canvas sizes of anyres tiling.

    Args:
        pinpoints: (width, height) pairs in pixels, their Python literal as a string, or LLaVA's
            range string ``"(1x1),...,(6x6)"``, which counts tiles and includes both ends.
        tile: side of one tile, in pixels.

    Returns:
        (width, height) of every canvas in pixels, in the order that breaks ties.
    """
    pairs: object = pinpoints
    if isinstance(pinpoints, str) and "x" in pinpoints:
        pairs = _pinpoint_range(pinpoints, tile)
    elif isinstance(pinpoints, str):
        try:
            pairs = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError) as error:
            raise UsageError(
                f"The grid pinpoints {pinpoints!r} are neither a list of [width, height] pairs "
                'nor a range like "(1x1),...,(6x6)".'
            ) from error
    if not isinstance(pairs, (list, tuple)) or not pairs:
        raise UsageError("anyres tiling needs grid pinpoints: a list of [width, height] in pixels.")
    return tuple(_checked_canvas(pair, tile) for pair in pairs)


def _pinpoint_range(text: str, tile: int) -> list[tuple[int, int]]:
    """All canvases from the first to the last pair of ``"(1x1),...,(6x6)"``, in pixels."""
    ends = [(int(i), int(j)) for i, j in re.findall(r"\((\d+)x(\d+)\)", text)]
    if not ends:
        raise UsageError(
            f'The range of grid pinpoints {text!r} names no pair; write it like "(1x1),...,(6x6)".'
        )
    (i0, j0), (i1, j1) = ends[0], ends[-1]
    return [(i * tile, j * tile) for i in range(i0, i1 + 1) for j in range(j0, j1 + 1)]


def _checked_canvas(pair: object, tile: int) -> tuple[int, int]:
    """Raise unless ``pair`` is a width and a height of whole tiles."""
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise UsageError(f"A grid pinpoint must be [width, height] in pixels, not {pair!r}.")
    if any(not isinstance(n, int) or n < tile or n % tile for n in pair):
        raise UsageError(
            f"The grid pinpoint {list(pair)} must consist of positive multiples of the tile "
            f"side, which is {tile} pixels."
        )
    return pair[0], pair[1]


def check_image_size(size_wh: Sequence[int]) -> tuple[int, int]:
    """Return (width, height), or raise when a side is not a positive number of pixels."""
    width, height = size_wh
    if width < 1 or height < 1:
        raise UsageError(f"An image of {width}x{height} pixels has no content.")
    return int(width), int(height)


def select_best_resolution(
    size_wh: Sequence[int], canvases: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Choose the canvas (width, height) that keeps most of an image and wastes least.

    Kept are the pixels of the image after it is scaled into the canvas, never counting more than
    the image has; of equals the smaller canvas wins, then the first (LLaVA-NeXT ``mm_utils``).
    """
    if not canvases:
        raise UsageError("No canvas to choose from: the list of grid pinpoints is empty.")
    width, height = check_image_size(size_wh)

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)  # max() keeps the first of equals


def anyres_grid_shape(
    size_wh: Sequence[int], pinpoints: str | Sequence[Sequence[int]], tile: int
) -> tuple[int, int]:
    """Columns and rows of tiles that anyres cuts an image into (the base view not counted)."""
    width, height = select_best_resolution(size_wh, parse_pinpoints(pinpoints, tile))
    return width // tile, height // tile


def highres_side(pinpoints: str | Sequence[Sequence[int]], tile: int) -> int:
    """Side in pixels of the square that highres cuts: the largest of ``"448,672,..."``."""
    try:
        sides = [int(part) for part in pinpoints.split(",")] if isinstance(pinpoints, str) else []
    except ValueError:
        sides = []
    if not sides or max(sides) < tile:
        raise UsageError(
            "highres tiling needs grid pinpoints as a string of sides in pixels, at least one of "
            f'them {tile} or more, like "448,672"; got {pinpoints!r}.'
        )
    return max(sides)


def tile_grid(
    size_wh: Sequence[int] | None, settings: ImageSettings, tile: int
) -> tuple[int, int] | None:
    """Rows and columns of tiles beside the base view, or None where an image is one view.

    Args:
        size_wh: (width, height) of the image in pixels; only anyres looks at it.
        settings: how images are cut.
        tile: side of one tile, in pixels.
    """
    aspect = settings.aspect_ratio
    if aspect == "highres":
        side = highres_side(settings.grid_pinpoints, tile) // tile
        return side, side
    if aspect.startswith("anyres"):
        if size_wh is None:
            raise UsageError(f"{aspect} tiling needs the width and height of every image.")
        columns, rows = anyres_grid_shape(size_wh, settings.grid_pinpoints, tile)
        return rows, columns
    if aspect == "crop_split":
        raise UsageError(
            "image_aspect_ratio crop_split is not supported: the reference implementation of it "
            "cannot run with Pillow 10 or newer, so there is nothing to agree with. "
            "Use anyres, highres, pad or square."
        )
    return None


def anyres_max_tiles(aspect_ratio: str) -> int | None:
    """Return the N of ``anyres_max_N``: the tiles' worth of tokens an image may have, or None."""
    match = re.fullmatch(r"anyres_max_(\d+)", aspect_ratio)
    return int(match.group(1)) if match else None


def fit_inside(size_wh: Sequence[int], canvas_wh: Sequence[int]) -> tuple[int, int]:
    """Width and height of an image scaled to touch a canvas from inside (rounded up)."""
    width, height = check_image_size(size_wh)
    scale_w, scale_h = canvas_wh[0] / width, canvas_wh[1] / height
    if scale_w < scale_h:
        return canvas_wh[0], min(math.ceil(height * scale_w), canvas_wh[1])
    return min(math.ceil(width * scale_h), canvas_wh[0]), canvas_wh[1]


def unpad_box(
    grid_hw: Sequence[int], size_wh: Sequence[int], rounding: str = "llava"
) -> tuple[int, int, int, int]:
    """Rows and columns of a padded patch grid that hold the image.

    Args:
        grid_hw: rows and columns of the grid.
        size_wh: (width, height) of the image before it was scaled into the canvas, in pixels.
        rounding: ``llava`` cuts the fraction off; ``hf`` first rounds to seven digits, as the
            transformers library does. They differ where the product is just under an integer.

    Returns:
        ``(top, bottom, left, right)``, ends not included.
    """
    rows, columns = grid_hw
    width, height = check_image_size(size_wh)
    wide = width / height > columns / rows
    scale = columns / width if wide else rows / height
    exact = (height if wide else width) * scale
    kept = int(round(exact, 7) if rounding == "hf" else exact)
    margin = ((rows if wide else columns) - kept) // 2
    if wide:
        return margin, rows - margin, 0, columns
    return 0, rows, margin, columns - margin


def shrunk_grid(grid_hw: Sequence[int], tile_tokens: int, max_tiles: int) -> tuple[int, int] | None:
    """Rows and columns after anyres_max_N's shrink, or None where a grid is small enough.

    A grid shrinks when its side is more than 1.1 times what ``max_tiles`` tiles would give.
    """
    rows, columns = grid_hw
    times = math.sqrt(rows * columns / (max_tiles * tile_tokens))
    if times <= 1.1:
        return None
    # The reference fails on a side that shrinks below one token (a very long strip); keep one.
    return max(1, int(rows // times)), max(1, int(columns // times))


def shortest_edge_size(size_wh: Sequence[int], shortest: int) -> tuple[int, int]:
    """Width and height of an image resized so that its shorter side is ``shortest``."""
    width, height = check_image_size(size_wh)
    longest = int(shortest * max(width, height) / min(width, height))
    return (shortest, longest) if width <= height else (longest, shortest)
