"""Scenes of the synthetic world: sampled by number, each a pure function of (seed, index, split).

Contract: no state, no global random numbers. The generator of a scene is seeded with the whole
name of its split, so that no two splits share a scene, whatever the seeds. What happens is in
`plots`, what is heard is chosen here; the two are independent but for the one plot that places the
sound (`change`, `turns`).
"""

from __future__ import annotations

import numpy as np

from av_llava.errors import UsageError
from av_llava.training.world.parts import (
    COLOURS,
    DIRECTIONS,
    NUMBERS,
    SHAPES,
    SOUNDS,
    Background,
    Motion,
    Scene,
    SceneSettings,
    Sound,
    Thing,
    Turn,
)
from av_llava.training.world.plots import NEED_SOUND, ORDER_SOUND_S, PLOTS, Staging

__all__ = [
    "COLOURS",
    "DIRECTIONS",
    "NUMBERS",
    "SHAPES",
    "SOUNDS",
    "Background",
    "Motion",
    "Scene",
    "SceneSettings",
    "Sound",
    "Thing",
    "Turn",
    "generator",
    "sample_scene",
]

SILENT_SHARE, UNSEEN_SHARE = 0.1, 0.1
"""Shares of clips without sound and without picture."""
TOPICS = {"sound": 0.3, "beeps": 0.25, "pitch": 0.2, "presence": 0.25}
"""What the question about the sound is about, and how often."""
LISTEN = "listen"
"""The plot of clips without a picture."""
_BACKGROUNDS = ("plain", "gradient", "stripes", "patches")


def generator(seed: int, index: int, split: str, purpose: str = "scene") -> np.random.Generator:
    """Return the random numbers of one clip for one purpose.

    Raises:
        UsageError: the seed or the index is negative, or the split has no name.
    """
    if seed < 0 or index < 0 or not split:
        raise UsageError(
            f"A scene needs a seed and an index of 0 or more and the name of a split, not "
            f"seed={seed}, index={index}, split={split!r}."
        )
    words = f"{purpose}/{split}".encode()
    return np.random.default_rng([seed, index, len(words), *words])


def sample_scene(seed: int, index: int, split: str, settings: SceneSettings | None = None) -> Scene:
    """Return the scene of that number.

    Args:
        seed: seed of the data set, 0 or more.
        index: number of the clip in its split, 0 or more.
        split: name of the split: "train", "test", ...
        settings: size, length and frame rate; the scene itself does not depend on the size.
    """
    rng = generator(seed, index, split)
    settings = settings or SceneSettings()
    which = rng.random()
    silent, unseen = which < SILENT_SHARE, which >= 1 - UNSEEN_SHARE
    if unseen:
        plot, staging = LISTEN, Staging((), 0.1, settings.duration_s - 0.1)
    else:
        names = [n for n in PLOTS if not (silent and n in NEED_SOUND)]
        plot = names[int(rng.integers(len(names)))]
        staging = PLOTS[plot](rng, settings.duration_s)
    topic = None if silent else _topic(rng, plot)
    return Scene(
        seed=seed,
        split=split,
        index=index,
        settings=settings,
        plot=plot,
        topic=topic,
        background=_background(rng),
        things=staging.things,
        sounds=() if topic is None else (_sound(rng, topic, staging),),
        noise_seed=int(rng.integers(2**31)),
    )


def _topic(rng: np.random.Generator, plot: str) -> str:
    """A topic at random; four beeps do not fit between a sound and a change."""
    names = [n for n in TOPICS if not (plot == "change" and n == "beeps")]
    weights = np.array([TOPICS[n] for n in names])
    return names[int(rng.choice(len(names), p=weights / weights.sum()))]


def _sound(rng: np.random.Generator, topic: str, staging: Staging) -> Sound:
    """A sound on that topic, somewhere in the time that the plot leaves for it."""
    kind = {"beeps": "beeps", "pitch": "chirp"}.get(topic, SOUNDS[int(rng.integers(len(SOUNDS)))])
    span_s = staging.sound_until_s - staging.sound_from_s
    short = span_s <= ORDER_SOUND_S + 1e-9
    level = float(rng.uniform(0.35, 0.8))
    rising = bool(rng.random() < 0.5)
    beeps, period_s = 0, 0.0
    if kind == "beeps":
        # One beep is a right answer to "how many", but as a sound it could be taken for a tone.
        beeps = int(rng.integers(1, 5)) if topic == "beeps" else 2 if short else 3
        period_s = 0.2 if short else float(rng.uniform(0.26, 0.3 if span_s < 1.5 else 0.4))
        length_s = (beeps - 1) * period_s + 0.45 * period_s
    elif short:
        length_s = float(rng.uniform(0.3, ORDER_SOUND_S))
    else:
        length_s = float(rng.uniform(0.6, 0.9))
    low, high = {"tone": (300, 900), "chirp": (300, 500), "noise": (2000, 4000)}.get(
        kind, (500, 900) if kind == "bell" else (900, 1600)
    )
    onset_s = staging.onset_s
    if onset_s is None:
        onset_s = float(rng.uniform(staging.sound_from_s, staging.sound_until_s - length_s))
    return Sound(
        kind=kind,
        onset_s=onset_s,
        duration_s=length_s,
        pitch_hz=float(rng.uniform(low, high)),
        level=level,
        rising=rising,
        beeps=beeps,
        period_s=period_s,
    )


def _background(rng: np.random.Generator) -> Background:
    base = rng.integers(25, 75)
    first, second = (
        tuple(int(c) for c in np.clip(base + rng.integers(-18, 19, 3), 8, 90)) for _ in range(2)
    )
    kind = _BACKGROUNDS[int(rng.integers(len(_BACKGROUNDS)))]
    return Background(kind, first, second, float(rng.uniform(0, np.pi)))  # type: ignore[arg-type]
