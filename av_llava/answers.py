"""What an answer is: the text, and an account of what was used to make it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = "av-llava/1"


@dataclass(frozen=True)
class MediumUse:
    """How one medium of the prompt was used."""

    kind: str
    """image, video or audio."""
    source: str
    """Path, URL, or a description of data given directly."""
    n_tokens: int
    """Tokens that it became, marks included; of a video without its sound."""
    pts_s: tuple[float, ...] = ()
    """Times of the frames that were used, in seconds."""
    n_source_frames: int | None = None
    """Frames that the used span holds."""
    duration_s: float | None = None
    """Duration of the source, in seconds."""
    backend: str | None = None
    """Decoder of the frames."""
    size: tuple[int, int] | None = None
    """(width, height) of an image in pixels."""
    audio_s: float = 0.0
    """Seconds of sound that were used."""
    audio_tokens: int = 0
    """Tokens that the sound became."""
    audio_source: str | None = None
    """File of a video's sound, if that is not the video itself."""
    audio_reason: str | None = None
    """Why no sound was used; None when it was."""
    warnings: tuple[str, ...] = ()
    """What was wrong with the file and did not stop the answer."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; what concerns sound is under ``audio``."""
        out = asdict(self)
        out["audio"] = {
            "used": out.pop("audio_reason") is None and self.audio_tokens > 0,
            "seconds": out.pop("audio_s"),
            "tokens": out.pop("audio_tokens"),
            "source": out.pop("audio_source"),
            "reason": self.audio_reason,
        }
        return out

    def line(self) -> str:
        """One short clause for people."""
        if self.kind == "image":
            size = f" {self.size[0]}x{self.size[1]}" if self.size else ""
            return f"image{size} ({self.n_tokens} tokens)"
        if self.kind == "audio":
            return f"audio {self.audio_s:.1f} s ({self.audio_tokens} tokens)"
        of = "" if self.n_source_frames is None else f"/{self.n_source_frames}"
        span = f" {self.pts_s[0]:.2f}-{self.pts_s[-1]:.2f} s" if self.pts_s else ""
        sound = (
            f"audio {self.audio_s:.1f} s ({self.audio_tokens} tokens)"
            + (f" of {self.audio_source}" if self.audio_source else "")
            if self.audio_reason is None
            else f"no audio ({self.audio_reason})"
        )
        return f"video {len(self.pts_s)}{of} frames{span} ({self.n_tokens} tokens), {sound}"


@dataclass(frozen=True)
class Usage:
    """Tokens by modality."""

    text_tokens: int = 0
    image_tokens: int = 0
    video_tokens: int = 0
    audio_tokens: int = 0
    completion_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """All tokens before the answer."""
        return self.text_tokens + self.image_tokens + self.video_tokens + self.audio_tokens


@dataclass(frozen=True)
class Answer:
    """An answer; ``str(answer)`` is its text."""

    text: str
    finish_reason: str
    """stop (the model ended its turn), length (the limit was reached), interrupted."""
    usage: Usage
    media: tuple[MediumUse, ...] = ()
    device: str = ""
    dtype: str = ""
    model: str = ""
    timing_s: dict[str, float] = field(default_factory=dict)
    """Seconds by stage: media (decode and preprocess), encode (towers), generate; streams and
    sessions encode within generate or when they start."""
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text

    def used(self) -> str:
        """One line that says what was used."""
        parts = [m.line() for m in self.media]
        u = self.usage
        counts = f"{u.prompt_tokens} prompt tokens ({u.text_tokens} text"
        for name in ("image", "video", "audio"):
            n = getattr(u, f"{name}_tokens")
            counts += f", {n} {name}" if n else ""
        return " · ".join([*parts, counts + ")", f"{self.device} {self.dtype}"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data with the version of its schema."""
        out = asdict(self)
        out["usage"]["prompt_tokens"] = self.usage.prompt_tokens
        out["media"] = [m.to_dict() for m in self.media]
        return {"schema": SCHEMA, **{("answer" if k == "text" else k): v for k, v in out.items()}}
