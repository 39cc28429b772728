"""From waveform to tower input: Whisper's log-mel and BEATs' Kaldi filterbank.

Contract: each chunk is padded with silence in the waveform, never in the features, and computed on
its own; features are float32 whatever the autocast state, on the waveform's device. ``LogMel`` is
equal bit by bit to transformers' ``WhisperFeatureExtractor`` in the same process.

The constants (window, filters) are made on first use per device instead of being buffers: a buffer
would be cast with the model to bfloat16, and loading from a meta device leaves buffers that are not
saved without values.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torchaudio.compliance.kaldi
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from av_llava.audio.waveform import Waveform, check_waveform
from av_llava.geometry import (
    HOP_SAMPLES,
    SAMPLE_RATE_HZ,
    audio_chunks,
    fbank_frames,
    mel_frames,
)

N_FFT = 400
MEL_FLOOR = 1e-10
DYNAMIC_RANGE = 8.0  # decades below the loudest value of a chunk

# Mean and half the spread of AudioSet's filterbanks, as BEATs was trained with.
FBANK_MEAN = 15.41663
FBANK_STD = 6.55582

Span = tuple[int, int]


class AudioFeatures(NamedTuple):
    """Tower input for some clips, their chunks one after another."""

    features: Tensor
    """[n_chunks, n_features, n_frames] float32."""
    lengths: Tensor
    """[n_chunks] int64 on the CPU: frames that hold sound."""
    chunks_per_clip: tuple[int, ...]
    """How many chunks belong to each clip, in order."""


class FeatureExtractor(ABC):
    """Cuts clips into chunks of one length and turns each into features."""

    def __init__(
        self, n_features: int, n_frames: int, chunk_samples: int, min_samples: int
    ) -> None:
        self.n_features, self.n_frames = n_features, n_frames
        self.chunk_samples, self.min_samples = chunk_samples, min_samples

    @abstractmethod
    def compute(self, chunk: Tensor, out: Tensor) -> None:
        """Write the features of one padded chunk [chunk_samples] to ``out`` [F, T]."""

    @abstractmethod
    def length(self, n_samples: int) -> int:
        """Frames that hold sound when a chunk begins with ``n_samples`` samples of it."""

    def __call__(
        self,
        waveforms: Waveform | Sequence[Waveform],
        spans: Sequence[Sequence[Span]] | None = None,
    ) -> AudioFeatures:
        """Compute the features of one clip or of several.

        Chunks are computed one by one: a batch would not fit the cache and takes three times as
        long (measured on a CPU).

        Args:
            waveforms: float samples [S] at 16 kHz, one clip or a list of clips.
            spans: for each clip the chunks as (first, stop) sample numbers, as
                ``AudioPlan.chunks`` holds them; by default consecutive chunks.
        """
        if isinstance(waveforms, (Tensor, np.ndarray)):
            waveforms = [waveforms]
        clips = [check_waveform(waveform) for waveform in waveforms]
        if spans is None:
            spans = [self._spans(clip.shape[0]) for clip in clips]
        n_chunks = sum(len(s) for s in spans)
        device = clips[0].device if clips else None
        out = torch.empty((n_chunks, self.n_features, self.n_frames), device=device)
        lengths: list[int] = []
        for clip, clip_spans in zip(clips, spans, strict=True):
            for first, stop in clip_spans:
                self._compute_span(clip[first:stop], out[len(lengths)])
                lengths.append(self.length(stop - first))
        return AudioFeatures(
            out, torch.tensor(lengths, dtype=torch.int64), tuple(len(s) for s in spans)
        )

    def _spans(self, n_samples: int) -> Sequence[Span]:
        return audio_chunks(max(n_samples, self.min_samples), self.chunk_samples, self.min_samples)

    def _compute_span(self, samples: Tensor, out: Tensor) -> None:
        """Pad with silence to a whole chunk and compute, in float32."""
        missing = self.chunk_samples - samples.shape[0]
        chunk = F.pad(samples, (0, missing)) if missing else samples
        with torch.no_grad(), torch.autocast(samples.device.type, enabled=False):
            self.compute(chunk, out)


class LogMel(FeatureExtractor):
    """Whisper's log-mel spectrogram: Hann window of 25 ms, hop of 10 ms, Slaney mel scale.

    Args:
        n_mels: mel bins, 80 or 128 in published models.
        n_frames: mel frames of a chunk, twice the encoder's ``max_source_positions``.
        min_samples: a rest below this after the last whole chunk is left out.

    Example:
        >>> mel, lengths, chunks_per_clip = LogMel(80)(waveform)  # [n, 80, 3000], [n], (n,)
    """

    def __init__(self, n_mels: int, n_frames: int = 3000, min_samples: int = 1) -> None:
        super().__init__(n_mels, n_frames, n_frames * HOP_SAMPLES, min_samples)

    def length(self, n_samples: int) -> int:
        """Mel frames that hold sound, as the extractor's attention mask counts them."""
        return mel_frames(n_samples)

    def compute(self, chunk: Tensor, out: Tensor) -> None:
        """Write log10 power, limited to eight decades and scaled as Whisper does."""
        filters, window = _mel_constants(self.n_features, chunk.device)
        # Centred frames, reflected at the ends; the right end is only needed for the last frame
        # that Whisper keeps. Doing it here is faster than torch.stft's own padding.
        half, rest = N_FFT // 2, N_FFT // 2 - HOP_SAMPLES
        left, right = chunk[1 : half + 1].flip(0), chunk[-rest - 1 : -1].flip(0)
        spectrum = torch.stft(
            torch.cat((left, chunk, right)),
            N_FFT,
            HOP_SAMPLES,
            window=window,
            center=False,
            return_complex=True,
        )
        power = spectrum.abs().square_().contiguous()  # [201, T]
        torch.matmul(filters, power, out=out)
        out.clamp_(min=MEL_FLOOR).log10_()
        torch.maximum(out, out.max() - DYNAMIC_RANGE, out=out)
        out.add_(4.0).div_(4.0)


class KaldiFbank(FeatureExtractor):
    """BEATs' input: Kaldi's 128 log filterbanks of 25 ms each 10 ms, normalised over AudioSet.

    Args:
        chunk_samples: samples of a chunk.
        n_mels: filterbank channels.
        min_samples: a rest below this after the last whole chunk is left out.
        n_frames: frames to give; those beyond the filterbank's own are zero.
    """

    def __init__(
        self,
        chunk_samples: int = 480_000,
        n_mels: int = 128,
        min_samples: int = 1,
        n_frames: int | None = None,
    ) -> None:
        frames = fbank_frames(chunk_samples)
        super().__init__(n_mels, n_frames or frames, chunk_samples, min_samples)

    def length(self, n_samples: int) -> int:
        """Filterbank frames that hold sound; at least one, the chunk's padding fills it."""
        return max(fbank_frames(n_samples), 1)

    def compute(self, chunk: Tensor, out: Tensor) -> None:
        """Write normalised log energies; the samples are scaled to 16-bit range first."""
        energies = torchaudio.compliance.kaldi.fbank(
            chunk[None] * 2**15,
            num_mel_bins=self.n_features,
            sample_frequency=float(SAMPLE_RATE_HZ),
            frame_length=25.0,
            frame_shift=10.0,
        )  # [T, F]
        energies = (energies - FBANK_MEAN) / (2 * FBANK_STD)
        out[:, energies.shape[0] :] = 0
        out[:, : energies.shape[0]] = energies.T


class DualFeatures(FeatureExtractor):
    """Log-mel above filterbank, [n_mels + 128, T]; the filterbank's missing frames are zero."""

    def __init__(self, mel: LogMel, fbank: KaldiFbank) -> None:
        self.mel, self.fbank = mel, fbank
        n_features = mel.n_features + fbank.n_features
        super().__init__(n_features, mel.n_frames, mel.chunk_samples, mel.min_samples)

    def length(self, n_samples: int) -> int:
        """Mel frames that hold sound; the filterbank's follow from them."""
        return self.mel.length(n_samples)

    def compute(self, chunk: Tensor, out: Tensor) -> None:
        """Write both."""
        self.mel.compute(chunk, out[: self.mel.n_features])
        self.fbank.compute(chunk, out[self.mel.n_features :])


@functools.lru_cache(maxsize=16)
def _mel_constants(n_mels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mel filters [n_mels, 201] and Hann window [400] on ``device``, in float32."""
    filters = torch.from_numpy(mel_filters(n_mels).astype(np.float32)).to(device).T
    return filters, torch.hann_window(N_FFT, device=device)


def mel_filters(n_mels: int) -> np.ndarray:
    """Whisper's triangular filters [201, n_mels] on Slaney's mel scale, in float64.

    From transformers itself: with other versions of NumPy, the same formula written here differs
    from it in a last bit.
    """
    return mel_filter_bank(
        num_frequency_bins=N_FFT // 2 + 1,
        num_mel_filters=n_mels,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE_HZ / 2,
        sampling_rate=SAMPLE_RATE_HZ,
        norm="slaney",
        mel_scale="slaney",
    )
