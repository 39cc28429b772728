"""How the tile features of one still image become its tokens (LLaVA's ``mm_patch_merge_type``).

Contract: ``plan_image`` is pure integers and exact, newlines included; ``merge_tiles`` executes a
plan and emits just as many rows. Letters: n tiles, P tokens of a tile, D width; a grid is (rows,
columns). Follows LLaVA-NeXT ``prepare_inputs_labels_for_multimodal`` for images; a tile grid that
does not fit raises, where the reference silently takes 2x2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from av_llava.errors import UsageError
from av_llava.geometry import anyres_max_tiles, shrunk_grid, tile_grid, unpad_box
from av_llava.settings import ImageSettings

Grid = tuple[int, int]


@dataclass(frozen=True)
class ImagePlan:
    """What becomes of the tiles of one image. Made by :func:`plan_image`."""

    n_tiles: int
    """Views of the image that the tower encodes, the base view included."""
    grid: Grid
    """Rows and columns of tokens of one tile."""
    extra_tokens: int = 0
    """Tokens of a tile before its grid (a kept class token)."""
    tiles: Grid | None = None
    """Rows and columns of tiles that are put together; None leaves the views side by side."""
    box: tuple[int, int, int, int] | None = None
    """(top, bottom, left, right) of the map that stays, in tokens; None keeps all of it."""
    resized: Grid | None = None
    """Rows and columns that the map is then shrunk to, bilinearly."""
    max_pool: bool = False
    """Halve each side of the map by its maximum."""
    base: bool = True
    """The base view stands before the map."""
    newline: str = "none"
    """row: the newline ends each row of the map; end: it ends the image; none."""

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of one view before merging."""
        return self.extra_tokens + self.grid[0] * self.grid[1]

    @property
    def map_grid(self) -> Grid | None:
        """Rows and columns of the merged map, without newlines; None where nothing is merged."""
        if self.tiles is None:
            return None
        rows, columns = self.tiles[0] * self.grid[0], self.tiles[1] * self.grid[1]
        if self.box is not None:
            rows, columns = self.box[1] - self.box[0], self.box[3] - self.box[2]
        if self.resized is not None:
            return self.resized
        return (rows // 2, columns // 2) if self.max_pool else (rows, columns)

    @property
    def n_tokens(self) -> int:
        """Rows that the image takes in the sequence."""
        if self.map_grid is None:
            return self.n_tiles * self.tokens_per_tile + (self.newline == "end")
        rows, columns = self.map_grid
        n_map = rows * (columns + (self.newline == "row"))
        return n_map + (self.tokens_per_tile if self.base else 0)

    @property
    def needs_newline(self) -> bool:
        """Whether the learned newline stands anywhere."""
        return self.newline != "none"


def plan_image(
    size_wh: Sequence[int] | None,
    settings: ImageSettings,
    *,
    grid: Grid,
    tile_size: int,
    n_tiles: int | None = None,
    extra_tokens: int = 0,
    single_tensor: bool = False,
) -> ImagePlan:
    """Plan one still image.

    Args:
        size_wh: (width, height) of the original in pixels; None where the layout does not ask.
        settings: how images are cut and merged; ``settings.for_count(n)`` for one of several.
        grid: rows and columns of tokens that one tile becomes, after the projector.
        tile_size: side of a tile, in pixels.
        n_tiles: views that were really made (LLaVA's door); None for those that
            :func:`av_llava.images.image_tiles` makes. One view is never merged.
        extra_tokens: tokens of a view before its grid (towers that keep the class token).
        single_tensor: the pixels came as one 4-D tensor, which LLaVA never merges: flat, without
            any newline.

    Raises:
        UsageError: the views do not fit the tile grid, or the layout needs square patches only.
    """
    if n_tiles is None:
        tiles = tile_grid(size_wh, settings, tile_size)
        n_tiles = 1 if tiles is None else 1 + tiles[0] * tiles[1]
    if n_tiles < 1:
        raise UsageError("An image needs at least one view, got none.")
    merge = settings.patch_merge_type
    plan = ImagePlan(n_tiles, grid, extra_tokens)
    if single_tensor or merge == "flat":
        return plan
    parts = merge.split("_")
    if n_tiles == 1:
        return replace(plan, newline="end" if "unpad" in parts else "none")
    return _plan_merge(plan, size_wh, settings, tile_size, parts)


def _plan_merge(
    plan: ImagePlan,
    size_wh: Sequence[int] | None,
    settings: ImageSettings,
    tile_size: int,
    parts: Sequence[str],
) -> ImagePlan:
    """Plan a base view and tiles that form one map."""
    if plan.extra_tokens:
        raise UsageError(
            f"Tiles can only be merged as {settings.patch_merge_type!r} without the class token; "
            "use select_feature 'patch' or patch_merge_type 'flat'."
        )
    tiles = _fitting_tiles(plan.n_tiles, size_wh, settings, tile_size)
    rows, columns = tiles[0] * plan.grid[0], tiles[1] * plan.grid[1]
    plan = replace(plan, tiles=tiles, base="nobase" not in parts)
    if "maxpool2x2" in parts:
        if min(rows, columns) < 2:
            raise UsageError(f"A map of {rows}x{columns} tokens is too small for maxpool2x2.")
        return replace(plan, max_pool=True)
    if "unpad" not in parts:
        return plan
    if size_wh is None:
        raise UsageError("Unpadding an image needs its width and height: give image_sizes.")
    box = unpad_box((rows, columns), size_wh, settings.unpad_rounding)
    max_tiles = anyres_max_tiles(settings.aspect_ratio)
    resized = None
    if max_tiles is not None:
        kept = box[1] - box[0], box[3] - box[2]
        resized = shrunk_grid(kept, plan.grid[0] * plan.grid[1], max_tiles)
    return replace(plan, box=box, resized=resized, newline="row")


def _fitting_tiles(
    n_tiles: int, size_wh: Sequence[int] | None, settings: ImageSettings, tile_size: int
) -> Grid:
    """Return the tile grid, checked against the views there are."""
    if n_tiles == 5 and not settings.aspect_ratio.startswith("anyres"):
        return 2, 2  # the reference's only grid where the shape of an image does not choose one
    tiles = tile_grid(size_wh, settings, tile_size) or (2, 2)
    if n_tiles != 1 + tiles[0] * tiles[1]:
        what = f"of {size_wh[0]}x{size_wh[1]} pixels " if size_wh is not None else ""
        raise UsageError(
            f"An image {what}came as {n_tiles} views, but {settings.aspect_ratio} tiling gives a "
            f"base view and {tiles[0]}x{tiles[1]} tiles, {1 + tiles[0] * tiles[1]} in all; check "
            "image_sizes and image_grid_pinpoints."
        )
    return tiles


def merge_tiles(features: Tensor, plan: ImagePlan, newline: Tensor | None = None) -> Tensor:
    """Execute a plan.

    Args:
        features: of the views of one image, the base view first. [n, P, D]
        plan: of this image.
        newline: the learned newline, where the plan has one. [D]

    Returns:
        [plan.n_tokens, D]

    Raises:
        UsageError: features that are not what was planned, or no newline where one stands.
    """
    if features.shape[:2] != (plan.n_tiles, plan.tokens_per_tile):
        raise UsageError(
            f"The image was planned as {plan.n_tiles} views of {plan.tokens_per_tile} tokens, but "
            f"its features are {features.shape[0]} views of {features.shape[1]}."
        )
    if plan.needs_newline:
        if newline is None:
            raise UsageError(
                "This image layout ends rows with the learned newline (image_newline), which the "
                "model does not have; use a patch_merge_type without unpad."
            )
        newline = newline.to(features)
    if plan.tiles is None:
        parts = [features.flatten(0, 1)]
        if plan.newline == "end" and newline is not None:
            parts.append(newline[None])
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    merged = _merged_map(features[1:], plan)  # [rows, columns, D]
    if plan.newline == "row" and newline is not None:
        merged = torch.cat((merged, newline.expand(merged.shape[0], 1, -1)), dim=1)
    tokens = merged.flatten(0, 1)
    return torch.cat((features[0], tokens)) if plan.base else tokens


def _merged_map(tiles: Tensor, plan: ImagePlan) -> Tensor:
    """Put tiles together, cut the padding off, shrink. [n - 1, h*w, D] to [rows, columns, D]"""
    assert plan.tiles is not None
    board = tiles.unflatten(0, plan.tiles).unflatten(2, plan.grid)  # [R, C, h, w, D]
    merged = board.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [R*h, C*w, D]
    if plan.box is not None:
        top, bottom, left, right = plan.box
        merged = merged[top:bottom, left:right]
    if plan.resized is not None:
        channels = merged.permute(2, 0, 1)[None]
        shrunk = F.interpolate(channels, plan.resized, mode="bilinear", align_corners=False)
        merged = shrunk[0].permute(1, 2, 0)
    if plan.max_pool:
        channels = merged.permute(2, 0, 1)[None]
        merged = F.max_pool2d(channels, 2)[0].permute(1, 2, 0)
    return merged
