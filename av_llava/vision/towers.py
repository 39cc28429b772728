"""CLIP and SigLIP towers: any chosen hidden states as patch features.

Contract: the parameters are those of the transformers library's vision model, held as the
attribute ``vision_tower``, so that on disk they have LLaVA's names. Layers after the last chosen
state keep their parameters and are never run. Follows LLaVA-NeXT ``multimodal_encoder``.
Letters: N images, P patches, D channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedConfig, SiglipVisionModel

from av_llava.errors import UsageError
from av_llava.settings import VisionSettings
from av_llava.vision.features import select_states
from av_llava.vision.pixels import normalize_pixels


class VisionTower(nn.Module):
    """A vision transformer that gives features of patches.

    Args:
        vision_tower: the inner model, with ``embeddings`` and ``encoder.layers``.
        settings: which features; how many images at once; how to normalise levels.
    """

    has_cls: ClassVar[bool]
    """Whether the inner model puts a class token before the patches."""
    model_class: ClassVar[type[nn.Module]]
    """Class of the inner model."""
    model_type: ClassVar[str]
    """``model_type`` of its configuration."""
    vision_tower: Any
    image_size: int
    patch_size: int

    def __init__(self, vision_tower: nn.Module, settings: VisionSettings) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.settings = settings
        config: Any = vision_tower.config
        self.image_size, self.patch_size = config.image_size, config.patch_size
        if not isinstance(self.image_size, int) or not isinstance(self.patch_size, int):
            raise UsageError(
                "Vision towers need square images and patches: image_size and patch_size must be "
                f"whole numbers, not {self.image_size!r} and {self.patch_size!r}."
            )
        self.num_patches_per_side = self.image_size // self.patch_size
        self.selection = select_states(
            settings.select_feature, settings.select_layer, config.num_hidden_layers + 1
        )
        self._width: int = config.hidden_size

    @classmethod
    def from_config(cls, config: PreTrainedConfig, settings: VisionSettings) -> Self:
        """Build with fresh weights (or none, under the meta device)."""
        if config.model_type != cls.model_type:
            raise UsageError(
                f"The vision tower kind {settings.kind!r} needs a configuration of model_type "
                f"{cls.model_type!r}, not {config.model_type!r}."
            )
        return cls(cls.model_class(config), settings)

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the inner model."""
        return self.vision_tower.config

    @property
    def hidden_size(self) -> int:
        """Channels of a feature."""
        return self._width * len(self.selection.states)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.num_patches_per_side, self.num_patches_per_side

    @property
    def extra_tokens(self) -> int:
        """Features before the patches: 1 where CLS is kept."""
        return int(self.has_cls and self.selection.keep_cls)

    @property
    def num_patches(self) -> int:
        """Features of one image, CLS included where it is kept."""
        return self.num_patches_per_side**2 + self.extra_tokens

    @property
    def input_size(self) -> int:
        """Side of the images that ``forward`` takes, in pixels."""
        return self.image_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.vision_tower.embeddings.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights that the pixels meet first."""
        return self.vision_tower.embeddings.patch_embedding.weight.device

    def idle_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name the parameters that no output depends on, which can never get a gradient."""
        layers = range(max(self.selection.states), self.config.num_hidden_layers)
        idle = [f"vision_tower.encoder.layers.{i}." for i in layers]
        idle += ["vision_tower.post_layernorm.", "vision_tower.head."]
        for name, parameter in self.named_parameters():
            if name.startswith(tuple(idle)):
                yield name, parameter

    def forward(self, pixels: Tensor, max_batch: int | None = None) -> Tensor:
        """Encode images or frames, ``max_batch`` at a time.

        Nothing is recorded for gradients when no parameter is trained.

        Args:
            pixels: [N, 3, H, W] uint8 levels, which are normalised here, or normalised floats;
                on any device.
            max_batch: images that are encoded together; the setting's when None.

        Returns:
            [N, P, D] in the floating dtype of ``pixels``, or the tower's for uint8.
        """
        self._check(pixels)
        dtype = pixels.dtype if pixels.is_floating_point() else self.dtype
        if not len(pixels):  # attention cannot reshape nothing
            return pixels.new_empty((0, self.num_patches, self.hidden_size), dtype=dtype)
        batch = self._chunk_size(max_batch or self.settings.max_batch)
        trained = pixels.requires_grad or any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            chunks = (self._encode_raw(chunk).to(dtype) for chunk in pixels.split(batch))
            if torch.is_grad_enabled():
                return torch.cat(list(chunks))
            return _filled(chunks, len(pixels))

    def _check(self, pixels: Tensor) -> None:
        side = self.input_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side):
            raise UsageError(
                f"The vision tower takes pixels of shape [images, 3, {side}, {side}], "
                f"not {list(pixels.shape)}."
            )

    def _chunk_size(self, max_batch: int) -> int:
        """Input images of one round when ``max_batch`` images fit the inner model at once."""
        return max_batch

    def _encode_raw(self, pixels: Tensor) -> Tensor:
        """Move, normalise, encode. [n, 3, H, W] to [n, P, D]."""
        device = self.device
        if device.type != "meta":  # weights that are offloaded come to the pixels instead
            pixels = pixels.to(device, non_blocking=True)
        return self.encode(self.normalize(pixels, self.dtype))

    def normalize(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise levels with this tower's mean and deviation."""
        return normalize_pixels(pixels, self.settings.image_mean, self.settings.image_std, dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        """Features of normalised pixels of the inner model's own size. [n, P, D]"""
        states = self.selection.states
        hidden = self.embed(pixels)  # [n, tokens, width]
        kept = {0: hidden}
        layers = itertools.islice(self.vision_tower.encoder.layers, max(states))
        for state, layer in enumerate(layers, start=1):
            hidden = layer(hidden, None)
            if state in states:
                kept[state] = hidden
        chosen = [kept[state] for state in states]
        features = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
        return features[:, 1:] if self.has_cls and not self.selection.keep_cls else features

    def embed(self, pixels: Tensor) -> Tensor:
        """Hidden state 0. [n, 3, H, W] to [n, tokens, width]"""
        return self.vision_tower.embeddings(pixels)

    def extra_repr(self) -> str:
        """Say what ``print(model)`` cannot see."""
        return (
            f"input={self.input_size}, grid={self.grid}, hidden_size={self.hidden_size}, "
            f"states={self.selection.states} of {self.config.num_hidden_layers + 1}"
        )


def _filled(chunks: Iterator[Tensor], n: int) -> Tensor:
    """Concatenate ``n`` rows of chunks into one buffer; ``torch.cat`` would hold them twice."""
    first = next(chunks)
    if len(first) == n:
        return first
    out = first.new_empty((n, *first.shape[1:]))
    done = 0
    for chunk in itertools.chain((first,), chunks):
        out[done : done + len(chunk)] = chunk
        done += len(chunk)
    return out


class ClipTower(VisionTower):
    """CLIP, with its normalisation before the first layer."""

    has_cls = True
    model_class = CLIPVisionModel
    model_type = "clip_vision_model"

    def embed(self, pixels: Tensor) -> Tensor:
        """Hidden state 0, after CLIP's first normalisation."""
        return self.vision_tower.pre_layrnorm(self.vision_tower.embeddings(pixels))


class SiglipTower(VisionTower):
    """SigLIP, which has no class token. Which layers and head it holds is up to its config."""

    has_cls = False
    model_class = SiglipVisionModel
    model_type = "siglip_vision_model"
