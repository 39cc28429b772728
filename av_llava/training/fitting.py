"""Makes a sample fit a limit of tokens by taking frames from its videos.

Contract: text is never cut, so that no answer is lost; every video keeps a frame. Only headers
are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from av_llava.chat import MediaPart, Message
from av_llava.errors import DataError
from av_llava.media_inputs import MediaOptions
from av_llava.planning import MediaPlanner
from av_llava.prepared import BatchBuilder
from av_llava.processor import AVLlavaProcessor


def with_fewer_frames(
    processor: AVLlavaProcessor,
    planner: MediaPlanner,
    options: MediaOptions,
    messages: Sequence[Message],
    limit: int,
) -> tuple[Message, ...]:
    """The messages with the most frames a video with which they fit.

    Args:
        processor, planner, options: say how long a sample is.
        messages: a conversation.
        limit: tokens that it may have.

    Raises:
        DataError: it does not fit with one frame for each video, either.
        MediaError: a medium cannot be read.
    """

    def planned(messages: Sequence[Message]) -> BatchBuilder:
        builder = BatchBuilder(processor, planner, options, decode=False)
        builder.add(messages, False, False)
        return builder

    def length(frames: int) -> int:
        builder = planned([_with_frames(m, frames) for m in messages])
        return builder.finish("right", False).media.splice.lengths[0]

    most = max((len(v.pts_s) for v in planned(messages).videos), default=0)
    if length(max(most, 1)) <= limit:
        return tuple(messages)
    fits, too_many = 0, max(most, 1)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if length(middle) <= limit:
            fits = middle
        else:
            too_many = middle
    if fits == 0:
        what = "with one frame for each video" if most else "there is no video to take frames from"
        raise DataError(
            f"It has {length(1):,} tokens ({what}), more than max_length = {limit:,}, and text is "
            f"never cut. Raise max_length, or leave the sample out."
        )
    return tuple(_with_frames(m, fits) for m in messages)


def _with_frames(message: Message, frames: int) -> Message:
    """The turn with at most so many frames for each video."""
    parts = tuple(
        replace(p, frames=min(p.frames or frames, frames))
        if isinstance(p, MediaPart) and p.kind == "video"
        else p
        for p in message.parts
    )
    return replace(message, parts=parts)
