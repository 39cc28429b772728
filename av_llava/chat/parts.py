"""The parts of a turn, text and media, and the readers of every accepted spelling of them.

Contract: a part is read strictly (unknown keys are an error) and nothing is opened or
downloaded; a base64 source or data URL becomes ``bytes``. Spellings: Hugging Face
(``{"type": "video", "path": …}``) and OpenAI (``{"type": "video_url", "video_url": {"url": …}}``).
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from av_llava.errors import UsageError, unknown_name
from av_llava.settings import AUDIO_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN, check_range

MEDIA_TOKENS: dict[str, str] = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN, "audio": AUDIO_TOKEN}
"""Kind of medium → the placeholder that stands for it in rendered text; open to extension."""

PLACEHOLDER_ALIASES: dict[str, str] = {"<speech>": "audio", "<sound>": "audio"}
"""Other spellings of placeholders in a user's text → kind of medium; open to extension."""

SAMPLING_KEYS: dict[str, str] = {
    "start": "start_s",
    "start_s": "start_s",
    "video_start": "start_s",
    "end": "end_s",
    "end_s": "end_s",
    "video_end": "end_s",
    "fps": "fps",
    "frames": "frames",
    "num_frames": "frames",
    "nframes": "frames",
    "source_fps": "source_fps",
}
"""Spellings of the options that a content part may carry → field of :class:`MediaPart`."""

AUDIO_KEYS: tuple[str, ...] = ("audio", "use_audio", "use_audio_in_video", "audio_from_video")
"""Spellings of what a video part says about its sound: a mode, a sound file, true or false."""

_MOST = 1e9
"""More seconds or frames than any file has; products with much larger numbers overflow."""

AUDIO_MODES: tuple[str, ...] = ("auto", "on", "off")
"""The sound of a video: used if there is some, insisted on, left out."""


@dataclass(frozen=True)
class TextPart:
    """Text, used as it is."""

    text: str


@dataclass(frozen=True)
class MediaPart:
    """One medium at its place in the conversation."""

    kind: str
    """Key of :data:`MEDIA_TOKENS`: image, video, audio."""
    source: Any = None
    """Path, URL, bytes, decoded data, or None while the medium is only a placeholder."""
    start_s: float | None = None
    """First second that is used; None is the beginning."""
    end_s: float | None = None
    """Last second that is used; None is the end."""
    fps: float | None = None
    """Frames per second to sample; None leaves the processor's setting."""
    frames: int | None = None
    """Upper bound of the number of frames; None leaves the processor's setting."""
    audio: str | None = None
    """The sound of a video: auto, on, off, or a sound file; None leaves the request's setting."""
    source_fps: float | None = None
    """Frames per second of a folder of pictures; None leaves the processor's setting."""

    def __post_init__(self) -> None:
        if self.kind not in MEDIA_TOKENS:
            raise unknown_name("kind of medium", self.kind, MEDIA_TOKENS)
        _check_number("start of a medium in seconds", self.start_s, 0.0)
        _check_number("end of a medium in seconds", self.end_s, 0.0)
        _check_number("fps of a medium", self.fps, 1e-6)
        _check_number("source_fps of a medium", self.source_fps, 1e-6)
        _check_number("number of frames of a medium", self.frames, 1)
        if isinstance(self.frames, float):
            raise UsageError(
                f"The number of frames of a medium must be a whole number, not {self.frames!r}."
            )
        if self.end_s is not None and self.end_s <= (self.start_s or 0.0):
            raise UsageError(f"A {self.kind} cannot end at {self.end_s} s, not after its start.")
        if self.audio is not None:
            _check_audio(self.kind, self.audio)

    @property
    def token(self) -> str:
        """The placeholder that stands for this medium in text."""
        return MEDIA_TOKENS[self.kind]


Part = TextPart | MediaPart


def placeholder_pattern() -> re.Pattern[str]:
    """Return the expression that finds every placeholder and alias, one group."""
    names = sorted([*MEDIA_TOKENS.values(), *PLACEHOLDER_ALIASES], key=len, reverse=True)
    return re.compile("(" + "|".join(re.escape(n) for n in names) + ")")


def placeholder_kind(placeholder: str) -> str:
    """Return the kind of medium that a placeholder or alias stands for."""
    kinds = {token: kind for kind, token in MEDIA_TOKENS.items()} | PLACEHOLDER_ALIASES
    return kinds[placeholder]


def read_part(part: Any) -> Part:
    """Read one content part."""
    if isinstance(part, (TextPart, MediaPart)):
        return part
    if isinstance(part, str):
        return TextPart(part)
    if not isinstance(part, Mapping):
        raise UsageError(f"A content part is a {type(part).__name__}, not a mapping or a string.")
    part = {k: v for k, v in part.items() if v is not None}
    kind = part.pop("type", None)
    if not isinstance(kind, str):
        raise unknown_name("type of content part", kind, [*PART_READERS, *MEDIA_TOKENS])
    if kind in MEDIA_TOKENS:  # also kinds that were registered from outside
        return _media_part(kind, part)
    if kind not in PART_READERS:
        raise unknown_name("type of content part", kind, [*PART_READERS, *MEDIA_TOKENS])
    return PART_READERS[kind](part)


def _text_part(part: dict[str, Any]) -> TextPart:
    """Read ``{"type": "text", "text": …}``."""
    _only_keys("text part", part, ("text",))
    if not isinstance(part.get("text"), str):
        raise UsageError("A text part needs a string under 'text'.")
    return TextPart(part["text"])


def _media_part(kind: str, part: dict[str, Any]) -> MediaPart:
    """Read Hugging Face's ``{"type": "video", "video" | "url" | "path" | "base64": …}``."""
    sources = (kind, "url", "path", "base64")
    _only_keys(f"{kind} part", part, (*sources, *_option_keys(kind)))
    found = [k for k in sources if k in part]
    if len(found) > 1:
        raise UsageError(f"A {kind} part has {' and '.join(found)}; give one of them.")
    source = part[found[0]] if found else None
    if found == ["base64"]:
        source = _decode_base64(kind, source)
    return MediaPart(kind, _from_data_url(kind, source), **_options(kind, part))


def _url_part(kind: str) -> Callable[[dict[str, Any]], MediaPart]:
    """Make the reader of OpenAI's ``{"type": "image_url", "image_url": {"url": …}}``."""
    key = f"{kind}_url"

    def read(part: dict[str, Any]) -> MediaPart:
        # "detail" only chooses among the resolutions of OpenAI's own models.
        _only_keys(f"{key} part", part, (key, "detail", *_option_keys(kind)))
        value = part.get(key)
        if isinstance(value, Mapping):
            _only_keys(key, value, ("url", "detail"))
            value = value.get("url")
        if not isinstance(value, str):
            raise UsageError(f'A {key} part needs {{"url": …}} or a string under {key!r}.')
        return MediaPart(kind, _from_data_url(kind, value), **_options(kind, part))

    return read


def _input_image_part(part: dict[str, Any]) -> MediaPart:
    """Read the OpenAI Responses spelling ``{"type": "input_image", "image_url": …}``."""
    return _url_part("image")(part)


def _input_audio_part(part: dict[str, Any]) -> MediaPart:
    """Read OpenAI's ``{"type": "input_audio", "input_audio": {"data": …, "format": …}}``."""
    _only_keys("input_audio part", part, ("input_audio", *SAMPLING_KEYS))
    value = part.get("input_audio")
    if not isinstance(value, Mapping) or not isinstance(value.get("data"), str):
        raise UsageError('An input_audio part needs {"data": base64, "format": …}.')
    # The decoder recognises the container by its bytes, so the format needs no keeping.
    _only_keys("input_audio", value, ("data", "format"))
    data = value["data"]
    source = _from_data_url("audio", data)
    return MediaPart(
        "audio",
        source if isinstance(source, bytes) else _decode_base64("audio", data),
        **_options("audio", part),
    )


PART_READERS: dict[str, Callable[[dict[str, Any]], Part]] = {
    "text": _text_part,
    "input_text": _text_part,
    "output_text": _text_part,
    "image_url": _url_part("image"),
    "video_url": _url_part("video"),
    "audio_url": _url_part("audio"),
    "input_image": _input_image_part,
    "input_audio": _input_audio_part,
}
"""Type of content part (beside the kinds of media) → its reader; open to extension."""


def _only_keys(what: str, data: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in data:
        if key not in known:
            raise unknown_name(f"key of the {what}", key, known)


def _option_keys(kind: str) -> tuple[str, ...]:
    """Keys of the options that a part of some kind may carry."""
    return (*SAMPLING_KEYS, *(AUDIO_KEYS if kind == "video" else ()))


def _options(kind: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """Read the sampling options of a content part, and what a video says about its sound."""
    options: dict[str, Any] = {}
    for key, field in SAMPLING_KEYS.items():
        if key in part:
            if field in options:
                raise UsageError(f"A {kind} part gives {field} twice, the second time as {key!r}.")
            options[field] = part[key]
    for key in AUDIO_KEYS if kind == "video" else ():
        if key in part:
            if "audio" in options:
                raise UsageError(f"A {kind} part gives audio twice, the second time as {key!r}.")
            options["audio"] = read_audio_mode(part[key])
    return options


def read_audio_mode(value: Any) -> Any:
    """Read what is said about a video's sound: true is used if there is some, false is not."""
    return {True: "auto", False: "off"}[value] if isinstance(value, bool) else value


def _check_audio(kind: str, audio: Any) -> None:
    """Raise unless ``audio`` may be said of a medium of this kind."""
    if kind != "video":
        raise UsageError(f"Only a video has sound of its own; a part of kind {kind!r} has none.")
    if not isinstance(audio, str) or not audio.strip():
        raise UsageError(
            f"The audio of a video must be {', '.join(AUDIO_MODES)} or a sound file, not {audio!r}."
        )


def _check_number(name: str, value: Any, low: float) -> None:
    """Raise unless ``value`` is None or a number from ``low`` on that clocks of files can hold."""
    if value is None:
        return
    if not is_number(value):
        raise UsageError(f"The {name} must be a number, not {value!r:.60}.")
    check_range(f"The {name}", value, low, _MOST)


def is_number(value: Any) -> bool:
    """Whether a value can be counted with; JSON's whole numbers may be too large for that."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _from_data_url(kind: str, source: Any) -> Any:
    """Turn a base64 data URL into bytes; return every other source unchanged."""
    if not isinstance(source, str) or source[:5].lower() != "data:":
        return source
    head, comma, payload = source[5:].partition(",")
    mime, *parameters = head.split(";")
    if not comma or "base64" not in parameters:
        raise UsageError(f"The data URL {source[:40]!r}… of the {kind} is not base64.")
    family = mime.partition("/")[0].lower()
    if family in MEDIA_TOKENS and family != kind:
        raise UsageError(f"A part of kind {kind!r} holds a data URL of type {mime!r}.")
    return _decode_base64(kind, payload)


def _decode_base64(kind: str, payload: Any) -> bytes:
    """Decode strictly; white space, as line breaks in long payloads, is allowed."""
    if not isinstance(payload, str):
        raise UsageError(f"The base64 data of the {kind} is a {type(payload).__name__}.")
    try:
        data = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"The base64 data of the {kind} cannot be decoded: {error}.") from error
    if not data:
        raise UsageError(f"The base64 data of the {kind} is empty.")
    return data


def read_medium(medium: MediaPart | Mapping[str, Any]) -> MediaPart:
    """Read one of the media that are given separately."""
    part = read_part(medium)
    if not isinstance(part, MediaPart) or part.source is None:
        raise UsageError(f"A medium given beside the text has no source: {medium!r}.")
    return part
