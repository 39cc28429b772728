"""Modality dropout: videos with sound that are, for one epoch, only watched or only heard.

Contract: a choice is a hash of (seed, epoch, sample), so every process knows it; the form that
remains is an ordinary sample, and lengths are planned for that form. A sample whose video has no
sound that would be used is never changed. This is also how unimodal data are replayed: the same
clips, one modality at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from av_llava.chat import MediaPart, Message
from av_llava.training.choices import fractions
from av_llava.training.samples import Sample, sound_file
from av_llava.training.settings import DropoutSettings

WHOLE, NO_SOUND, NO_FRAMES = 0, 1, 2
"""The forms of a sample."""


@dataclass(frozen=True, eq=False)
class FormLengths:
    """Tokens of the forms of each sample; 0 where a form does not exist."""

    whole: np.ndarray
    """int32 [n]"""
    no_sound: np.ndarray
    """int32 [n]"""
    no_frames: np.ndarray
    """int32 [n]"""

    def chosen(self, forms: np.ndarray) -> np.ndarray:
        """Lengths of the given forms. int64 [n]"""
        return np.choose(forms, (self.whole, self.no_sound, self.no_frames)).astype(np.int64)


def forms_of(settings: DropoutSettings, lengths: FormLengths, seed: int, epoch: int) -> np.ndarray:
    """Choose the form of every sample for one epoch. uint8 [n]"""
    n = len(lengths.whole)
    drawn = fractions(seed, epoch, np.arange(n), "modality dropout")
    forms = np.zeros(n, np.uint8)
    heard = (drawn < settings.frames) & (lengths.no_frames > 0)
    watched = ~heard & (drawn < settings.frames + settings.sound) & (lengths.no_sound > 0)
    forms[heard], forms[watched] = NO_FRAMES, NO_SOUND
    return forms


def in_form(sample: Sample, form: int) -> Sample:
    """The sample without the sound, or without the frames, of its videos."""
    if form == WHOLE:
        return sample
    change = _muted if form == NO_SOUND else _heard
    messages = tuple(
        Message(m.role, tuple(change(p) if isinstance(p, MediaPart) else p for p in m.parts))
        for m in sample.messages
    )
    return replace(sample, messages=messages)


def _muted(part: MediaPart) -> MediaPart:
    return replace(part, audio="off") if part.kind == "video" else part


def _heard(part: MediaPart) -> MediaPart:
    if part.kind != "video":
        return part
    return MediaPart(
        "audio", sound_file(part) or part.source, start_s=part.start_s, end_s=part.end_s
    )
