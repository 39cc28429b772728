"""Vision towers: pixels in, patch features out.

``build_vision_tower(config, settings)`` makes a tower from configuration alone; the registry
``VISION_TOWERS`` can be added to from outside.
"""

from av_llava.vision.configs import (
    PUBLISHED_TOWERS,
    as_llava_stores_it,
    find_published,
    tower_kind,
    vision_config_from,
)
from av_llava.vision.features import SELECT_FEATURES, Selection, select_states
from av_llava.vision.pixels import normalize_pixels
from av_llava.vision.registry import VISION_TOWERS, build_vision_tower
from av_llava.vision.s2 import ClipS2Tower
from av_llava.vision.towers import ClipTower, SiglipTower, VisionTower
from av_llava.vision.weights import tower_weights

__all__ = [
    "PUBLISHED_TOWERS",
    "SELECT_FEATURES",
    "VISION_TOWERS",
    "ClipS2Tower",
    "ClipTower",
    "Selection",
    "SiglipTower",
    "VisionTower",
    "as_llava_stores_it",
    "build_vision_tower",
    "find_published",
    "normalize_pixels",
    "select_states",
    "tower_kind",
    "tower_weights",
    "vision_config_from",
]
