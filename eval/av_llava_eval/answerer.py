"""What answers questions: the protocol that the runner needs, and av_llava's own model.

Contract: media are opened in other threads (:meth:`Answerer.open`), which never touch the model,
and answered in the main one (:meth:`Answerer.answer`). What is wrong with a file is kept in what
``open`` returns and raised for the arms that need it only: a damaged picture does not keep the
question from being asked without one. A video is encoded and prefilled once for all its questions;
in float32 the answers equal those of asking singly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from av_llava.errors import is_out_of_memory
from av_llava.media import Limits
from av_llava_eval.experiment import Arm
from av_llava_eval.sample import Sample

if TYPE_CHECKING:
    from av_llava.answers import Answer
    from av_llava.inference import AVLlava
    from av_llava_eval.opening import Opened


@dataclass(frozen=True)
class Clip:
    """The media of one or several samples: encoded once for all their questions."""

    group: str
    video: Path | None = None
    audio: Path | None = None
    images: tuple[Path, ...] = ()
    start_s: float | None = None
    end_s: float | None = None
    source_fps: float | None = None

    @classmethod
    def of(cls, sample: Sample) -> Clip:
        """The media of a sample."""
        return cls(
            sample.group,
            sample.video,
            sample.audio,
            sample.images,
            sample.start_s,
            sample.end_s,
            sample.source_fps,
        )

    @property
    def sound_file(self) -> Path | None:
        """Where the clip's own sound is."""
        return self.audio or self.video


@dataclass(frozen=True)
class Reply:
    """One answer and its account, which is JSON-ready."""

    text: str
    used: Mapping[str, Any] = field(default_factory=dict)
    """Frames, their times, seconds of sound or why there is none, tokens."""
    timing_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of this question by stage: decode, encode, generate; shares of what was done once."""


Lenders = Callable[[], Iterable[Clip]]
"""Clips whose sound may stand in for another's; the first that has some lends it."""


class Answerer(Protocol):
    """Something that answers questions about clips."""

    def fingerprint(self) -> dict[str, Any]:
        """What identifies model and settings: two that differ are never mixed in one run."""

    def open(self, clip: Clip, arms: Sequence[Arm], lenders: Lenders) -> Any:
        """Read what the arms need of a clip; called in other threads."""

    def answer(self, opened: Any, arm: Arm, prompts: Sequence[str], n_new: int) -> list[Reply]:
        """Answer all questions about an opened clip, each with at most ``n_new`` tokens."""


@runtime_checkable
class KnowsFrames(Protocol):
    """An answerer that can be asked for the frames, which the prompts of some styles need."""

    def frame_times(self, opened: Any, arm: Arm) -> Sequence[float]:
        """Seconds of the frames that an arm shows of an opened clip; none where it sees none."""


@dataclass(frozen=True)
class MediaSettings:
    """How media are read. None is the model's own setting."""

    frames: int | None = None
    """Upper bound of the number of frames."""
    fps: float | None = None
    """Frames per second, up to ``frames``."""
    backend: str | None = None
    """Decoder: auto, pyav, decord."""
    time_instruction: bool | None = None
    """Tell the model duration and frame times in words."""
    system: str | None = None
    """System prompt."""
    questions_at_once: int = 8
    """Questions of one video that are answered as a batch; fewer when memory runs out."""
    limits: Limits = field(default_factory=lambda: Limits(max_decode_s=120))
    """What a file may cost."""
    isolate: bool = True
    """Decode in processes that can be killed."""

    def identity(self) -> dict[str, Any]:
        """What changes answers."""
        keys = ("frames", "fps", "backend", "time_instruction", "system")
        return {k: v for k, v in asdict(self).items() if k in keys}


class AVLlavaAnswerer:
    """Answers with a loaded model.

    Args:
        model: as :func:`av_llava.load` gives it.
        settings: of media and batches.
    """

    def __init__(self, model: AVLlava, settings: MediaSettings | None = None) -> None:
        self.model, self.settings = model, settings or MediaSettings()

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of weights, configuration and tokenizer, and what else changes answers."""
        from av_llava_eval.fingerprint import model_fingerprint

        return {"model": model_fingerprint(self.model), "media": self.settings.identity()}

    def open(self, clip: Clip, arms: Sequence[Arm], lenders: Lenders) -> Opened:
        """Decode what the arms need, in processes that can be killed."""
        from av_llava_eval.opening import open_clip

        return open_clip(self.model.processor, self.settings, clip, arms, lenders)

    def frame_times(self, opened: Opened, arm: Arm) -> Sequence[float]:
        """Seconds of the frames; none where the arm sees none or they could not be read."""
        from av_llava_eval.opening import frame_times_of

        return frame_times_of(opened, arm)

    def answer(self, opened: Opened, arm: Arm, prompts: Sequence[str], n_new: int) -> list[Reply]:
        """Encode once, prefill once, ask all questions.

        Raises:
            AVLlavaError: something could not be read, or does not fit.
            RuntimeError: memory ran out for a single question, too.
        """
        from av_llava_eval.opening import parts_of

        media = parts_of(opened, arm)
        seen = any(part.kind == "video" for part in media)
        options: dict[str, Any] = {
            "max_new_tokens": n_new,
            "system": self.settings.system,
            "time_instruction": self.settings.time_instruction if seen else None,
            "aggregator": arm.aggregator if seen else None,
            "max_visual_tokens": arm.max_visual_tokens if seen else None,
        }
        encode_s = 0.0
        if media:
            session = self.model.session(media, **options)
            encode_s = session.timing_s["media"] + session.timing_s["prefill"]
            ask = session.ask_many
        else:

            def ask(some: Sequence[str]) -> list[Answer]:
                rows = [{"prompt": p} for p in some]
                return self.model.ask_batch(rows, batch_size=len(rows), **options)

        answers = _in_batches(ask, prompts, self.settings.questions_at_once)
        decode_s = opened.decode_s if arm.media else 0.0
        shared = {"decode": decode_s / len(prompts), "encode": encode_s / len(prompts)}
        lender = opened.lender if arm.sound == "swap" else None
        return [_reply(answer, n, shared, lender) for answer, n in answers]


def _in_batches(
    ask: Callable[[Sequence[str]], list[Answer]], prompts: Sequence[str], size: int
) -> list[tuple[Answer, int]]:
    """Answers, each with the size of its batch; batches are halved when memory runs out."""
    answers: list[tuple[Answer, int]] = []
    while len(answers) < len(prompts):
        some = prompts[len(answers) : len(answers) + size]
        try:
            answers += [(a, len(some)) for a in ask(some)]
            continue
        except (RuntimeError, MemoryError) as error:
            if len(some) == 1 or not is_out_of_memory(error):
                raise
        _forget_unused()
        size = len(some) // 2
    return answers


def _forget_unused() -> None:
    """Give back what an exhausted memory holds for later use."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reply(answer: Answer, batch: int, shared: Mapping[str, float], lender: str | None) -> Reply:
    """The account of one answer out of a batch of that size."""
    usage, media = answer.usage, answer.media
    frames = [t for m in media for t in m.pts_s]
    used: dict[str, Any] = {
        "frames": len(frames),
        "frame_times_s": [round(t, 3) for t in frames],
        "visual_tokens": usage.video_tokens + usage.image_tokens,
        "audio_tokens": usage.audio_tokens,
        "text_tokens": usage.text_tokens,
        "new_tokens": usage.completion_tokens,
        "audio_s": round(sum(m.audio_s for m in media), 3),
        "no_audio": next((m.audio_reason for m in media if m.audio_reason), None),
        "finish": answer.finish_reason,
    }
    if lender is not None:
        used["audio_of"] = lender
    if answer.warnings:
        used["warnings"] = list(dict.fromkeys(answer.warnings))
    timing = {**shared, "generate": answer.timing_s["generate"] / batch}
    return Reply(answer.text, used, {k: round(v, 5) for k, v in timing.items()})
