"""CLIP on several scales of one image (S2, "Scaling on Scales", arXiv 2403.13043).

Contract: each scale is a bicubic resize of the normalised pixels, cut like a chess board into
squares of the tower's own size, encoded square by square, put together again, and averaged down
to the grid of the smallest scale; the scales' channels stand side by side, small to large. The
tokens are as many as without S2. Follows LLaVA's ``CLIPVisionTowerS2``.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from av_llava.errors import UsageError
from av_llava.settings import VisionSettings
from av_llava.vision.towers import ClipTower


class ClipS2Tower(ClipTower):
    """CLIP with features of several scales. Takes images of the largest scale."""

    def __init__(self, vision_tower: nn.Module, settings: VisionSettings) -> None:
        super().__init__(vision_tower, settings)
        self.scales = tuple(sorted(settings.s2_scales))
        side = self.image_size
        if not self.scales or self.scales[0] != side or any(s % side for s in self.scales):
            raise UsageError(
                f"The S2 scales must be multiples of the tower's own size and begin with it, like "
                f"({side}, {2 * side}); got {tuple(settings.s2_scales)}."
            )
        if self.selection.keep_cls:
            raise UsageError(
                "An S2 tower merges patch grids, so it cannot keep the class token: use "
                f"select_feature 'patch' instead of {settings.select_feature!r}."
            )

    @property
    def hidden_size(self) -> int:
        """Channels of a feature: those of all scales."""
        return super().hidden_size * len(self.scales)

    @property
    def input_size(self) -> int:
        """Side of the images that ``forward`` takes: the largest scale, in pixels."""
        return self.scales[-1]

    def _chunk_size(self, max_batch: int) -> int:
        squares = (self.scales[-1] // self.image_size) ** 2
        return max(1, max_batch // squares)

    def normalize(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise levels in float32, in which the scales are made; floats stay as they are."""
        if pixels.is_floating_point():
            return pixels
        return super().normalize(pixels, torch.float32)

    def encode(self, pixels: Tensor) -> Tensor:
        """Features of images of the largest scale. [n, 3, S, S] to [n, P, D]"""
        maps = [self._encode_scale(pixels, scale) for scale in self.scales]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)

    def _encode_scale(self, pixels: Tensor, scale: int) -> Tensor:
        """Feature map of one scale, on the grid of the smallest. [n, D, h, w]"""
        n, split = len(pixels), scale // self.image_size
        if scale != self.input_size:
            resized = F.interpolate(pixels.float(), (scale, scale), mode="bicubic")
            pixels = resized.to(pixels.dtype)
        squares = rearrange(pixels, "n c (i h) (j w) -> (i j n) c h w", i=split, j=split)
        features = super().encode(squares.to(self.dtype))
        side = self.num_patches_per_side
        board = rearrange(
            features, "(i j n) (h w) d -> n d (i h) (j w)", i=split, j=split, n=n, h=side
        )
        if split == 1:
            return board
        return F.interpolate(board.float(), self.grid, mode="area").to(board.dtype)
