"""Where the media of a data set lie: relative names become paths.

Contract: HTTP addresses, absolute paths and data that is no path stay as they are; a ``file://``
address becomes the path that it names. Nothing is opened; only names without an extension
(VideoInstruct's) are looked for on the disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from av_llava.chat import MediaPart
from av_llava.errors import DataError, MediaError
from av_llava.media import is_remote
from av_llava.media.source import address_scheme, local_path
from av_llava.training.samples import sound_file

EXTENSIONS: tuple[str, ...] = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".m4v", ".flv")
"""Tried in this order behind a video's name that has none; open to extension."""


@dataclass(frozen=True)
class MediaRoots:
    """Folders that relative names are relative to."""

    root: Path = Path()
    image_root: Path | None = None
    video_root: Path | None = None
    audio_root: Path | None = None

    def folder(self, kind: str) -> Path:
        """The folder of one kind of medium."""
        own = {"image": self.image_root, "video": self.video_root, "audio": self.audio_root}
        return own.get(kind) or self.root

    def path(self, kind: str, source: Any) -> Any:
        """A source with its folder in front, if it is a relative name.

        Raises:
            DataError: an address that is neither of this machine nor HTTP.
        """
        if not isinstance(source, str) or is_remote(source):
            return source
        if address_scheme(source) is not None:
            try:
                return str(local_path(source))
            except MediaError as error:
                raise DataError(str(error)) from error
        return str(self.folder(kind) / Path(source).expanduser())

    def part(self, part: MediaPart) -> MediaPart:
        """A medium with its files found, the sound file of a video included."""
        sound = sound_file(part)
        audio = part.audio if sound is None else self.path("audio", sound)
        return replace(part, source=self.path(part.kind, part.source), audio=audio)

    def find_video(self, name: str) -> str:
        """The path of a video whose extension may be missing; as given if none is there."""
        path = str(self.folder("video") / name)
        return next((path + e for e in ("", *EXTENSIONS) if os.path.exists(path + e)), path)
