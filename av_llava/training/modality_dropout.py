"""Modality dropout: videos with sound that are, for one epoch, only watched or only heard.

Contract: a choice is a hash of (seed, epoch, sample), so every process knows it; the form that
remains is an ordinary sample, and lengths are planned for that form. A sample whose video has no
sound that would be used is never changed, and one with a muted video keeps its frames: without them
nothing would be left of that video, whose sound is not to be heard. This is also how unimodal data
are replayed: the same clips, one modality at a time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from av_llava.chat import MediaPart, Message
from av_llava.media_inputs import MediaOptions
from av_llava.processor import AVLlavaProcessor
from av_llava.training.choices import fractions
from av_llava.training.index import MODALITY_BITS, LengthIndex, Progress, build_index
from av_llava.training.readers import Reading
from av_llava.training.samples import Sample, sound_file
from av_llava.training.settings import DropoutSettings
from av_llava.training.store import ChosenStore, SampleStore

WHOLE, NO_SOUND, NO_FRAMES = 0, 1, 2
"""The forms of a sample."""


class FormStore:
    """The samples of a store, all in one form.

    Args:
        store: the samples.
        form: one of the three.
        options: how media are read.
    """

    def __init__(self, store: SampleStore, form: int, options: MediaOptions) -> None:
        self.store, self.form, self.options = store, form, options

    @property
    def sources(self) -> tuple[str, ...]:
        """The files of the store."""
        return self.store.sources

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Sample:
        return in_form(self.store[index], self.form, self.options)

    def reading(self, index: int) -> Reading:
        """One sample and the notes about its row."""
        reading = self.store.reading(index)
        return replace(reading, sample=in_form(reading.sample, self.form, self.options))

    def where(self, index: int) -> str:
        """File and line of a sample."""
        return self.store.where(index)

    def digest(self) -> str:
        """SHA-256 of the store's digest and of the form."""
        # The number at the end changes with what a form is, so that no older index is used.
        return hashlib.sha256(f"{self.store.digest()} form {self.form} 2".encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class ModalityDropout:
    """What is dropped, and how long samples are then. Made by :func:`plan_dropout`."""

    settings: DropoutSettings
    lengths: np.ndarray
    """int32 [3, n], tokens of each form of each sample; 0 where a form does not exist."""

    def forms(self, seed: int, epoch: int, samples: np.ndarray | int) -> np.ndarray:
        """The form of some samples in one epoch. uint8 [k]"""
        samples = np.atleast_1d(samples)
        drawn = fractions(seed, epoch, samples, "modality dropout")
        silent, unseen = self.lengths[NO_SOUND, samples], self.lengths[NO_FRAMES, samples]
        heard = (drawn < self.settings.frames) & (unseen > 0)
        both = self.settings.frames + self.settings.sound
        watched = (drawn >= self.settings.frames) & (drawn < both) & (silent > 0)
        forms = np.full(len(samples), WHOLE, np.uint8)
        forms[heard], forms[watched] = NO_FRAMES, NO_SOUND
        return forms


def plan_dropout(
    settings: DropoutSettings,
    store: SampleStore,
    processor: AVLlavaProcessor,
    options: MediaOptions,
    index: LengthIndex,
    *,
    folder: str | Path | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> ModalityDropout | None:
    """Measure the forms of all videos with sound, from headers alone.

    Args:
        settings: what is dropped.
        store, processor, options, index: what the index was made with.
        folder: keeps what was measured; None measures everything.
        workers, progress: as for :func:`build_index`.

    Returns:
        None where nothing is dropped.
    """
    if not settings.sound and not settings.frames:
        return None
    both = MODALITY_BITS["video"] | MODALITY_BITS["audio"]
    rows = np.flatnonzero((index.modality & both == both) & index.usable)
    lengths = np.zeros((3, len(index)), np.int32)
    lengths[WHOLE] = index.lengths
    shares = {NO_SOUND: settings.sound, NO_FRAMES: settings.frames}
    for form, name in ((NO_SOUND, "no_sound"), (NO_FRAMES, "no_frames")):
        if not shares[form] or not len(rows):
            continue
        chosen = FormStore(ChosenStore(store, rows), form, options)
        file = None if folder is None else Path(folder) / f"{name}.index"
        found = build_index(
            chosen, processor, options, file=file, workers=workers, progress=progress
        )
        # A sample that still shows videos was left as it is.
        exists = (form == NO_SOUND) | (found.modality & MODALITY_BITS["video"] == 0)
        lengths[form, rows] = np.where(exists, found.lengths, 0)
    return ModalityDropout(settings, lengths)


def modality_in_form(modality: np.ndarray, forms: np.ndarray) -> np.ndarray:
    """Codes of the modalities that are left. uint8 [n]"""
    gone = np.array([0, MODALITY_BITS["audio"], MODALITY_BITS["video"]], np.uint8)
    return modality & ~gone[forms]


def in_form(sample: Sample, form: int, options: MediaOptions) -> Sample:
    """The sample without the sound, or without the frames, of its videos.

    Args:
        sample: the whole one.
        form: one of the three.
        options: how media are read, which may turn off the sound of every video.

    Returns:
        The same sample where it has no such form.
    """
    if form == WHOLE:
        return sample
    modes = [options.for_part(p).audio for p in sample.media if p.kind == "video"]
    if form == NO_FRAMES and "off" in modes:
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
