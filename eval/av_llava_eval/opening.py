"""Opens the media of a clip for all arms at once: frames once, each kind of sound once.

Contract: never touches the model's weights, so that it may run in other threads. An error stands in
the place of what could not be read; :func:`parts_of` raises it for the arms that need it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from av_llava.chat import MediaPart
from av_llava.errors import MediaError, UsageError
from av_llava.media import probe
from av_llava.media_inputs import LoadedVideo, MediaOptions, load_video
from av_llava.sound_inputs import LoadedSound, SoundRequest, load_sound, seconds_needed
from av_llava_eval.answerer import Clip, Lenders, MediaSettings
from av_llava_eval.experiment import Arm
from av_llava_eval.failures import CATCHABLE, MissingFileError, NoSoundError

if TYPE_CHECKING:
    from av_llava.processor import AVLlavaProcessor


@dataclass
class Opened:
    """What was read of a clip."""

    picture: LoadedVideo | tuple[MediaPart, ...] | BaseException | None = None
    """Frames without sound, or still pictures, or why they could not be read."""
    sounds: dict[str, LoadedSound | BaseException | None] = field(default_factory=dict)
    """By the arm's ``sound``; None: there is none, and none was insisted on."""
    silence: str | None = None
    """Why there is none."""
    lender: str | None = None
    """Group whose sound stands in, for ``swap``."""
    decode_s: float = 0.0


def open_clip(
    processor: AVLlavaProcessor,
    settings: MediaSettings,
    clip: Clip,
    arms: Sequence[Arm],
    lenders: Lenders,
) -> Opened:
    """Read frames and sounds that some arm needs."""
    started = time.perf_counter()
    opened = Opened()
    reader = _Reader(processor, settings, clip)
    if any(arm.sees for arm in arms):
        try:
            opened.picture = reader.picture()
        except CATCHABLE as error:
            opened.picture = error
    for sound in dict.fromkeys(arm.sound for arm in arms if arm.sound != "off"):
        try:
            if sound == "swap":
                opened.lender, opened.sounds[sound] = reader.borrowed(lenders)
            else:
                opened.sounds[sound], opened.silence = reader.own(strict=sound == "on")
        except CATCHABLE as error:
            opened.sounds[sound] = error
    opened.decode_s = time.perf_counter() - started
    return opened


def parts_of(opened: Opened, arm: Arm) -> list[MediaPart]:
    """The media that one arm shows to the model; none for text alone.

    Raises:
        AVLlavaError: what could not be read.
    """
    sound = opened.sounds.get(arm.sound)
    if isinstance(sound, BaseException):
        raise sound
    heard = [] if sound is None else [MediaPart("audio", sound)]
    if not arm.sees:
        return heard
    picture = opened.picture
    if isinstance(picture, BaseException):
        raise picture
    if isinstance(picture, LoadedVideo):
        reason = None if sound is not None else "off" if arm.sound == "off" else opened.silence
        return [MediaPart("video", replace(picture, sound=sound, no_sound=reason))]
    return [*(picture or ()), *heard]


def frame_times_of(opened: Opened, arm: Arm) -> tuple[float, ...]:
    """Seconds of the frames that one arm shows; none for pictures and for what cannot be read."""
    picture = opened.picture if arm.sees else None
    return picture.pts_s if isinstance(picture, LoadedVideo) else ()


class _Reader:
    """Reads the parts of one clip."""

    def __init__(self, processor: AVLlavaProcessor, settings: MediaSettings, clip: Clip) -> None:
        self.processor, self.settings, self.clip = processor, settings, clip
        self.span_s: tuple[float | None, float | None] = (clip.start_s, clip.end_s)
        self.ears = processor.config.audio if processor.config.audio_config is not None else None

    def picture(self) -> LoadedVideo | tuple[MediaPart, ...] | None:
        """Frames without sound, or still pictures, or None for a clip that is only heard."""
        clip = self.clip
        for image in clip.images:
            _need(image)
        if clip.video is None:
            return tuple(MediaPart("image", str(image)) for image in clip.images) or None
        _need(clip.video)
        part = MediaPart("video", str(clip.video), start_s=clip.start_s, end_s=clip.end_s)
        video = load_video(
            part,
            self.processor.pixels,
            self.processor.config.vision,
            self._options(),
            ears=None,
            decode=True,
        )
        self.span_s = video.span_s
        return video

    def own(self, strict: bool) -> tuple[LoadedSound | None, str | None]:
        """The clip's own sound, or None and why there is none.

        Raises:
            NoSoundError: there is none, but it is insisted on.
            UsageError: it is insisted on, but the model has no ears.
        """
        source = self.clip.sound_file
        if self.ears is None:
            if strict:
                raise UsageError("Sound was asked for, but the model has no audio tower.")
            return None, "the model has no audio tower"
        if source is None or source.is_dir():
            return self._silence("no sound file", strict)
        _need(source)
        found, reason = load_sound(str(source), self._request(*self.span_s))
        return (found, None) if found is not None else self._silence(reason or "no sound", strict)

    def _silence(self, reason: str, strict: bool) -> tuple[None, str]:
        if strict:
            name = self.clip.sound_file or self.clip.group
            raise NoSoundError(f"Sound was asked for, but {name} has {reason}.")
        return None, reason

    def borrowed(self, lenders: Lenders) -> tuple[str, LoadedSound]:
        """The sound of the first of other clips that has some, laid over this clip's window.

        Raises:
            NoSoundError: none has.
            UsageError: the model has no ears.
        """
        if self.ears is None:
            raise UsageError("Sounds were to be swapped, but the model has no audio tower.")
        start_s, end_s = self.span_s
        length_s = None if end_s is None else end_s - (start_s or 0.0)
        for lender in lenders():
            source = lender.sound_file
            if source is None or not _sounds(source):
                continue
            found, _ = load_sound(str(source), self._request(None, length_s))
            if found is not None:
                return lender.group, replace(found, start_s=found.start_s + (start_s or 0.0))
        raise NoSoundError(f"No other video has sound to stand in for that of {self.clip.group}.")

    def _request(self, start_s: float | None, end_s: float | None) -> SoundRequest:
        assert self.ears is not None
        return SoundRequest(
            start_s,
            end_s,
            max_seconds=seconds_needed(self.ears),
            strict=False,
            limits=self.settings.limits,
            isolate=self.settings.isolate,
        )

    def _options(self) -> MediaOptions:
        settings = self.settings
        options = self.processor.media_options(
            frames=settings.frames,
            fps=settings.fps,
            backend=settings.backend,
            source_fps=self.clip.source_fps,
            audio="off",
            limits=settings.limits,
        )
        return replace(options, isolate=settings.isolate)


def _need(path: Path) -> None:
    if not path.exists():
        raise MissingFileError(f"There is no file {path}.")


def _sounds(path: Path) -> bool:
    """Whether a file has a sound track, by its header."""
    try:
        return path.is_file() and probe(path).audio is not None
    except MediaError:
        return False
