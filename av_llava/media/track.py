"""Mono samples placed on the media time line.

Contract: numpy only. Blocks of samples come with time stamps; where these step by more than a
coarse clock's rounding, gaps become silence and repeated stretches are dropped.
"""

from __future__ import annotations

import numpy as np

# Time stamps of coarse clocks wander by a millisecond or two; larger steps are real gaps.
_STEP_S = 0.03
# A step back by more than this is a clock that was reset, not overlapping sound.
_RESET_S = 10.0
# A jump ahead by more than this is a clock that was reset, not silence.
_LONGEST_GAP_S = 1800.0
_FIRST_ROOM_S = 60.0


class Track:
    """Mono samples placed on the media time line, cut to a window."""

    def __init__(self, begin_s: float, stop_s: float, end_s: float) -> None:
        self.begin_s, self.stop_s, self.end_s = begin_s, stop_s, end_s
        self.rate = 0
        self.peak = 0.0
        self.next: int | None = None  # sample number on the time line that comes next
        self.gaps_s: list[float] = []
        self.resets = 0
        self.bad_samples = 0
        self.full = False
        """The sound reached the window's end."""
        self._shift = 0  # added to time stamps after the clock was reset
        self._filled = 0
        self._room = np.empty(0, np.float32)

    def add(self, at_s: float | None, samples: np.ndarray, peak: float, rate: int) -> None:
        """Place samples at a time, or right after the last ones.

        Time stamps are believed only where they are off by more than a coarse clock's rounding.
        """
        if not self.rate:
            self.rate = rate
            self._begin = round(self.begin_s * rate)
            self._capacity = round((self.stop_s - self.begin_s) * rate)
        at = self.next if at_s is None else round(at_s * rate) + self._shift
        if self.next is None:
            self.next = at or 0
        elif at is not None and abs(at - self.next) > _STEP_S * rate:
            samples = self._stepped(at - self.next, samples)
        assert self.next is not None
        self._write(self.next - self._begin, samples)
        self.next += len(samples)
        self.peak = max(self.peak, peak)

    def finished(self) -> np.ndarray:
        """Return the samples from the window's beginning on, finite."""
        self._room.resize(self._filled, refcheck=False)
        bad = ~np.isfinite(self._room)
        self.bad_samples = int(bad.sum())
        if self.bad_samples:
            self._room[bad] = 0
        return self._room

    def notes(self) -> list[str]:
        """Return what was mended as sentences."""
        notes = []
        if self.gaps_s:
            notes.append(
                f"{len(self.gaps_s)} gaps in the sound ({sum(self.gaps_s):.2f} s) are silent"
            )
        if self.resets:
            notes.append(f"the sound's clock jumps {self.resets} times; the jumps are left out")
        if self.bad_samples:
            notes.append(f"{self.bad_samples} samples were not finite numbers and are set to 0")
        return notes

    def _stepped(self, step: int, samples: np.ndarray) -> np.ndarray:
        """Follow a step of the clock, in samples; return what of the samples is still new."""
        assert self.next is not None
        if not -_RESET_S * self.rate < step < _LONGEST_GAP_S * self.rate:
            self._shift -= step
            self.resets += 1
            return samples
        if step < 0:  # the same stretch of time again
            return samples[-step:]
        if self.next + step > self._begin:
            self.gaps_s.append(step / self.rate)
        self.next += step
        return samples

    def _write(self, at: int, samples: np.ndarray) -> None:
        """Write samples at a place in the window; what lies outside is dropped."""
        stop = min(at + len(samples), self._capacity)
        self.full = at + len(samples) >= self._capacity
        if stop <= 0 or (at >= stop and not self._filled):
            return
        if stop > len(self._room):
            room = max(stop, 2 * len(self._room), round(_FIRST_ROOM_S * self.rate))
            self._room.resize(min(room, self._capacity), refcheck=False)  # new samples are 0
        if at < stop:
            self._room[max(at, 0) : stop] = samples[max(-at, 0) : stop - at]
        self._filled = max(self._filled, stop)
