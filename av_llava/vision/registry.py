"""The towers by name. Code outside the package may add its own.

Contract: a builder takes the inner model's configuration and the typed settings, and returns a
module with the attributes and the ``forward`` of :class:`av_llava.vision.VisionTower`, made from
configuration alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from av_llava.errors import unknown_name
from av_llava.settings import VisionSettings
from av_llava.vision.s2 import ClipS2Tower
from av_llava.vision.towers import ClipTower, SiglipTower

VISION_TOWERS: dict[str, Callable[[PreTrainedConfig, VisionSettings], Any]] = {
    "clip": ClipTower.from_config,
    "clip_s2": ClipS2Tower.from_config,
    "siglip": SiglipTower.from_config,
}
"""Value of ``VisionSettings.kind`` to builder."""


def build_vision_tower(vision_config: PreTrainedConfig, settings: VisionSettings) -> Any:
    """Build the tower that ``settings.kind`` names.

    Weights are fresh; under the meta device there are none. The attention implementation is the
    configuration's (SDPA unless it says otherwise).

    Raises:
        UsageError: unknown kind, or a configuration that does not fit it.
    """
    if settings.kind not in VISION_TOWERS:
        raise unknown_name("vision tower", settings.kind, VISION_TOWERS)
    return VISION_TOWERS[settings.kind](vision_config, settings)
