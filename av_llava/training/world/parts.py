"""What the synthetic world is made of: names that answers use, and the parts of a scene.

Contract: plain frozen data. Places and sizes are fractions of the picture's side (x to the
right, y downwards), times are seconds from the start of the clip. Whatever a question can ask is
a field here; pictures, waveforms and answers are functions of these fields alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from av_llava.errors import UsageError

SHAPES = ("circle", "square", "triangle", "cross", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 145, 20),
    "yellow": (245, 230, 60),
    "green": (40, 185, 65),
    "blue": (50, 90, 240),
    "purple": (175, 60, 215),
    "white": (245, 245, 245),
}
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
SOUNDS = ("tone", "chirp", "noise", "bell", "beeps")
NUMBERS = ("one", "two", "three", "four")

Point = tuple[float, float]

WORLD_VERSION = 1
"""Rises with every change after which the same seed gives other clips or questions."""


@dataclass(frozen=True)
class Motion:
    """A straight way at constant speed; the thing stands still before and after."""

    start: Point
    end: Point
    start_s: float
    end_s: float
    direction: str
    """A key of `DIRECTIONS`."""


@dataclass(frozen=True)
class Turn:
    """A sudden change of colour."""

    colour: str
    """The colour from then on."""
    time_s: float


@dataclass(frozen=True)
class Thing:
    """A coloured shape. Within a scene no two things share a shape or a colour."""

    shape: str
    colour: str
    """The colour at first."""
    size: float
    """Side of the bounding box, as a fraction of the picture's side."""
    place: Point
    """The centre, unless it moves."""
    motion: Motion | None = None
    appears_s: float = 0.0
    turn: Turn | None = None

    def place_at(self, time_s: float) -> Point:
        """Return where its centre is, as fractions of the side."""
        motion = self.motion
        if motion is None:
            return self.place
        way = (time_s - motion.start_s) / (motion.end_s - motion.start_s)
        way = min(1.0, max(0.0, way))
        (x0, y0), (x1, y1) = motion.start, motion.end
        return x0 + way * (x1 - x0), y0 + way * (y1 - y0)

    def colour_at(self, time_s: float) -> str:
        """Return its colour then."""
        return self.turn.colour if self.turn and time_s >= self.turn.time_s else self.colour


@dataclass(frozen=True)
class Seen:
    """A thing as it looks at one moment."""

    shape: str
    colour: str
    place: Point
    """The centre (x, y), as fractions of the side."""
    size: float
    """Side of the bounding box, as a fraction of the side."""


@dataclass(frozen=True)
class Sound:
    """One sound event."""

    kind: str
    """A member of `SOUNDS`."""
    onset_s: float
    duration_s: float
    pitch_hz: float
    """The (lowest) fundamental frequency; of noise, the middle of the band."""
    level: float
    """Peak amplitude, 0..1."""
    rising: bool = True
    """Of a chirp: whether the pitch rises or falls."""
    beeps: int = 0
    """Of beeps: how many."""
    period_s: float = 0.0
    """Of beeps: from one beginning to the next."""

    @property
    def end_s(self) -> float:
        """When it has faded."""
        return self.onset_s + self.duration_s


@dataclass(frozen=True)
class Background:
    """What is behind the things: dark, so that every colour of a thing stands out."""

    kind: str
    """plain, gradient, stripes or patches."""
    colour: tuple[int, int, int]
    other: tuple[int, int, int]
    angle: float
    """Direction of the gradient or the stripes, in radians."""


@dataclass(frozen=True)
class SceneSettings:
    """What all scenes of a data set have in common."""

    size: int = 64
    """Side of the square picture in pixels, 32..512, even."""
    duration_s: float = 4.0
    """Length of a clip, 4..30 s; things happen in the first four seconds."""
    fps: int = 8
    """Frames per second, 4..60."""

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 512 or self.size % 2:
            raise UsageError(f"size is {self.size} pixels, but must be even and within 32..512.")
        if not 4 <= self.duration_s <= 30:
            raise UsageError(f"duration_s is {self.duration_s:g}, but must be within 4..30 s.")
        if not 4 <= self.fps <= 60:
            raise UsageError(f"fps is {self.fps}, but must be within 4..60.")


@dataclass(frozen=True)
class Scene:
    """Everything about one clip."""

    seed: int
    split: str
    index: int
    settings: SceneSettings
    plot: str
    """What happens to the things: crowd, travel, sequence, change, turns; listen without things."""
    topic: str | None
    """What the question about the sound is about: sound, beeps, pitch, presence; None: silent."""
    background: Background
    things: tuple[Thing, ...]
    sounds: tuple[Sound, ...]
    noise_seed: int
    """Seed of textures and noises."""

    @property
    def key(self) -> str:
        """A name that no other scene has: split, seed and index."""
        return f"{self.split}-{self.seed}-{self.index:06d}"

    def things_at(self, time_s: float) -> list[Seen]:
        """Return what is to be seen at a moment."""
        return [
            Seen(t.shape, t.colour_at(time_s), t.place_at(time_s), t.size)
            for t in self.things
            if time_s >= t.appears_s
        ]

    @property
    def has_video(self) -> bool:
        """Whether the clip has a picture."""
        return bool(self.things)

    @property
    def has_audio(self) -> bool:
        """Whether the clip has a sound track."""
        return bool(self.sounds)

    @property
    def suffix(self) -> str:
        """The ending of the media file's name."""
        return ".mp4" if self.has_video else ".m4a"

    @property
    def duration_s(self) -> float:
        """Length of the clip in seconds."""
        return self.settings.duration_s

    @property
    def fps(self) -> int:
        """Frames per second."""
        return self.settings.fps

    @property
    def size(self) -> int:
        """Side of the square picture in pixels."""
        return self.settings.size
