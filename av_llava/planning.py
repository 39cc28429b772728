"""How many tokens every medium becomes, and where they go: the host-side half of the model.

Contract: pure integers, made from headers and settings before anything is decoded or encoded.
The processor, the LLaVA-compatible door, ``--show-plan`` and batching by length all ask the one
:class:`MediaPlanner`; the model executes the :class:`MediaPlan` that it made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from av_llava.aggregators import Aggregator, TokenPlan, build, settings_of
from av_llava.aggregators.image_layout import ImagePlan, plan_image
from av_llava.audio import placement
from av_llava.audio.placement import AudioPlan
from av_llava.audio.towers import audio_geometry
from av_llava.config import AVLlavaConfig
from av_llava.errors import UsageError
from av_llava.projectors import projected_grid
from av_llava.settings import IGNORE_INDEX
from av_llava.splice import Segment, SplicePlan


class TextChunk(NamedTuple):
    """Ids between two media, with labels when supervised."""

    ids: np.ndarray
    labels: np.ndarray | None = None


class MediumRef(NamedTuple):
    """A place in the prompt: ``item`` counts the media of this ``kind`` in the batch.

    ``sound`` is the audio item that is the video's own sound, if it is used. ``marked`` says
    that the text around it already holds the start and end tokens.
    """

    kind: str
    item: int
    sound: int | None = None
    marked: bool = False


@dataclass(frozen=True, eq=False)
class MediaPlan:
    """Everything that the model needs to know about a batch, except the pixels and samples."""

    splice: SplicePlan
    aggregator: Aggregator
    images: tuple[ImagePlan, ...] = ()
    videos: tuple[TokenPlan, ...] = ()
    audios: tuple[AudioPlan, ...] = ()

    @property
    def branch(self) -> str:
        """Which of the three ways the batch takes: none, audio, or vision."""
        if self.images or self.videos:
            return "vision"
        return "audio" if self.audios else "none"


def check_token_ids(ids: np.ndarray | Sequence[int], config: AVLlavaConfig) -> None:
    """Raise unless the embedding matrix has a row for each of some host ids.

    Tokenizers may hold more tokens than the model was made for.
    """
    rows, largest = config.text_config.vocab_size, int(np.max(ids, initial=0))
    if largest >= rows:
        raise UsageError(
            f"The prompt holds the token {largest}, but the embedding matrix has {rows} rows: the "
            f"tokenizer has tokens that the model does not know. Leave that token out."
        )


class MediaPlanner:
    """Plans media for one configuration.

    Args:
        config: the model's configuration.
        aggregator: spec of another aggregator than the configuration's.
    """

    def __init__(self, config: AVLlavaConfig, aggregator: Any = None) -> None:
        self.config = config
        self.au_token_ids = config.au_token_ids
        self.aggregator: Aggregator = build(config.aggregator if aggregator is None else aggregator)
        self.aggregator.check_marks(config.owned_marks)

    def with_budget(self, tokens: int) -> MediaPlanner:
        """A planner that gives a video at most so many tokens, in the manner of this one."""
        own = self.aggregator.settings
        layout = "by_frame" if own.layout == "single" else own.layout
        spec = settings_of(
            "budget",
            {
                "tokens": tokens,
                "layout": layout,
                "newline": own.newline,
                "frame_end": own.frame_end,
                "stage": own.stage,
            },
        )
        return MediaPlanner(self.config, spec)

    @property
    def tower_grid(self) -> tuple[int, int]:
        """Patch grid (height, width) that the vision tower gives for one frame or tile."""
        if self.config.vision_config is None:
            raise UsageError("This model has no vision tower: it cannot take images or videos.")
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return side, side

    @property
    def pooling_grid(self) -> tuple[int, int]:
        """Patch grid where the aggregator pools: before or after the projector."""
        if self.aggregator.settings.stage == "pre":
            return self.tower_grid
        return projected_grid(self.config.projector.kind, *self.tower_grid)

    def image(
        self,
        size: tuple[int, int] | None,
        n_tiles: int | None = None,
        *,
        single_tensor: bool = False,
        n_images: int = 1,
    ) -> ImagePlan:
        """Plan one still image.

        Args:
            size: (width, height) of the original in pixels.
            n_tiles: tiles that were really made; checked against the layout.
            single_tensor: features are used as they are, unmerged (LLaVA's 4-D tensor).
            n_images: images in the same prompt, which may change how each is cut.
        """
        vision = self.config.vision
        keeps_cls = vision.kind.startswith("clip") and "cls" in vision.select_feature
        return plan_image(
            size,
            self.config.image.for_count(n_images),
            grid=projected_grid(self.config.projector.kind, *self.tower_grid),
            tile_size=max((self.config.vision_config.image_size, *vision.s2_scales)),
            n_tiles=n_tiles,
            extra_tokens=int(keeps_cls),
            single_tensor=single_tensor,
        )

    def video(self, n_frames: int, times_s: Sequence[float] | None = None) -> TokenPlan:
        """Plan one video of ``n_frames`` sampled frames."""
        height, width = self.pooling_grid
        times = None if times_s is None else tuple(float(t) for t in times_s)
        return self.aggregator.plan(n_frames, height, width, times)

    def audio(self, n_samples: int, start_s: float = 0.0) -> AudioPlan:
        """Plan one clip of 16 kHz mono samples; it begins at ``start_s`` on the media time line."""
        if self.config.audio_config is None:
            raise UsageError("This model has no audio tower: it cannot take sound.")
        geometry = audio_geometry(self.config.audio_config, self.config.audio)
        return placement.plan_audio(n_samples, self.config.audio, geometry, start_s)

    def batch(
        self,
        samples: Sequence[Sequence[TextChunk | MediumRef]],
        *,
        images: Sequence[ImagePlan] = (),
        videos: Sequence[TokenPlan] = (),
        audios: Sequence[AudioPlan] = (),
        extras: Mapping[str, Sequence[int]] | None = None,
        padding_side: str = "right",
        supervised: bool = False,
        max_length: int | None = None,
    ) -> MediaPlan:
        """Lay out a batch.

        Args:
            samples: for each sample its text chunks and media in prompt order.
            images, videos, audios: the plans of all media of the batch.
            extras: tokens of each item of registered modalities, by name.
            padding_side: of the batch.
            supervised: whether the text chunks carry labels.
            max_length: see :meth:`SplicePlan.truncated`.
        """
        plans: dict[str, Sequence[Any]] = {"image": images, "video": videos, "audio": audios}
        counts = {name: list(n) for name, n in (extras or {}).items()}
        rows = [
            [segment for part in parts for segment in self._segments(part, plans, counts)]
            for parts in samples
        ]
        splice = SplicePlan.build(
            rows,
            {**{k: [p.n_tokens for p in items] for k, items in plans.items() if items}, **counts},
            supervised=supervised,
            padding_side=padding_side,
        )
        check_token_ids(splice.text_ids, self.config)
        if max_length is not None:
            splice = splice.truncated(max_length)
        return MediaPlan(splice, self.aggregator, tuple(images), tuple(videos), tuple(audios))

    def _segments(
        self,
        part: TextChunk | MediumRef,
        plans: dict[str, Sequence[Any]],
        extras: dict[str, list[int]],
    ) -> list[Segment | tuple[np.ndarray, np.ndarray | None]]:
        """The rows of one part of a prompt, with start and end tokens around sound."""
        if isinstance(part, TextChunk):
            return [part]
        if part.kind in extras:
            return [Segment(part.kind, part.item, 0, extras[part.kind][part.item])]
        n_rows = plans[part.kind][part.item].n_tokens
        own = Segment(part.kind, part.item, 0, n_rows)
        if part.kind == "audio":
            return [own] if part.marked else self._with_marks([own])
        if part.sound is None:
            return [own]
        sound: AudioPlan = plans["audio"][part.sound]
        order = placement.place(plans["video"][part.item].spans(), sound, self.config.audio)
        items = {"video": part.item, "audio": part.sound}
        return self._with_marks([Segment(kind, items[kind], lo, hi) for kind, lo, hi in order])

    def is_marked(self, ids: np.ndarray, at: int) -> bool:
        """Whether the sentinel at ``ids[at]`` already stands between start and end token."""
        if self.au_token_ids is None or not 0 < at < len(ids) - 1:
            return False
        return (int(ids[at - 1]), int(ids[at + 1])) == self.au_token_ids

    def _with_marks(self, segments: list[Segment]) -> list[Any]:
        """Stand one start token before the first and one end token after the last sound."""
        if self.au_token_ids is None:
            return list(segments)
        sounds = [i for i, s in enumerate(segments) if s.kind == "audio" and s.n_rows]
        if not sounds:
            return list(segments)
        start, end = ((np.array([i]), np.array([IGNORE_INDEX])) for i in self.au_token_ids)
        first, last = sounds[0], sounds[-1]
        return [
            *segments[:first],
            start,
            *segments[first : last + 1],
            end,
            *segments[last + 1 :],
        ]
