"""What is so in a clip of the world: frame by frame in each part of the picture, for every token of
a batch, and for every name that is written after the clip.

Contract: pure functions of scenes; what the readers of `pretrain_events` are to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from pretrain_towers import CELLS, GRID, overlaps
from torch import Tensor

from av_llava.aggregators.tokens import PATCH, TokenMeta, token_meta
from av_llava.prepared import Prepared
from av_llava.training.world import Scene
from av_llava.training.world.parts import COLOURS, DIRECTIONS, SHAPES, SOUNDS, Thing

NAMES = (*SHAPES, *COLOURS, "sound")
"""The words that stand after a clip."""
FLAGS = ("moves", "changed", "just changed", "sounds", "has sounded")
"""What a token says with yes or no; the first three of the thing in its part of the picture."""
RELATIONS = ("comes first", "comes before the sound", "moves during the sound")
"""What a name says with yes or no."""
STIRS, STILL = 0.05, 0.015
"""Between two frames, so much of the picture's side or more is motion, and so much or less is none;
nothing is asked about what lies between."""
NOT_ASKED = -1
_COLOURS, _WAYS = list(COLOURS), list(DIRECTIONS)


def frame_times(scene: Scene, n_frames: int) -> np.ndarray:
    """When the frames are taken that the model sees of a clip, in seconds. [n_frames]"""
    last = round(scene.duration_s * scene.fps) - 1
    return np.round(np.linspace(0, last, n_frames)) / scene.fps


def change_time(thing: Thing) -> float:
    """When a thing appears or changes its colour; 0: never, or it was there from the start."""
    return thing.turn.time_s if thing.turn else thing.appears_s


def event_time(thing: Thing) -> float | None:
    """The middle of what happens to a thing."""
    if thing.motion:
        return (thing.motion.start_s + thing.motion.end_s) / 2
    return change_time(thing) or None


class ClipTargets:
    """What is so in one clip, frame by frame."""

    def __init__(self, scene: Scene, n_frames: int) -> None:
        self.scene, self.times = scene, frame_times(scene, n_frames)
        self.look = {c: np.zeros((n_frames, c * c, len(SHAPES)), np.int64) for c in CELLS}
        """Colour of the thing of each shape that lies in each part, from 1; 0: none lies there."""
        self.own: dict[int, list[list[Thing | None]]] = {c: [] for c in CELLS}
        """The thing that fills most of each part."""
        for i, time_s in enumerate(self.times):
            for cells, least in CELLS.items():
                self.own[cells].append(self._parts(i, float(time_s), cells, least))

    def _parts(self, i: int, time_s: float, cells: int, least: float) -> list[Thing | None]:
        most = np.zeros(cells * cells)
        own: list[Thing | None] = [None] * (cells * cells)
        for thing in self.scene.things:
            if time_s < thing.appears_s:
                continue
            share = overlaps(thing.place_at(time_s), thing.size, cells)
            colour = _COLOURS.index(thing.colour_at(time_s))
            self.look[cells][i, share >= least, SHAPES.index(thing.shape)] = colour + 1
            for cell in np.flatnonzero((share >= least) & (share > most)):
                most[cell], own[cell] = share[cell], thing
        return own

    def happens(self, thing: Thing, i: int) -> tuple[list[int], int]:
        """Of a thing at a frame: the first three flags, and its way, from 0."""
        now = float(self.times[i])
        before = float(self.times[i - 1]) if i else None
        changed = 0 < change_time(thing) <= now
        just = changed and before is not None and change_time(thing) > before
        if before is None:
            return [NOT_ASKED, int(changed), int(just)], NOT_ASKED
        far = np.abs(np.subtract(thing.place_at(now), thing.place_at(before))).max()
        if far > STIRS and thing.motion:
            return [1, int(changed), int(just)], _WAYS.index(thing.motion.direction)
        return [0 if far < STILL else NOT_ASKED, int(changed), int(just)], NOT_ASKED

    def n_changed(self, time_s: float) -> int:
        """How many things are not as they were at the start, as the frames show it: 0, 1 or 2."""
        seen = self.times[self.times <= time_s].max(initial=0.0)
        return sum(0 < change_time(t) <= seen for t in self.scene.things)

    def heard(self, time_s: float) -> list[int]:
        """The last two flags."""
        sounds = self.scene.sounds
        now = any(s.onset_s <= time_s < s.end_s for s in sounds)
        return [int(now), int(any(s.onset_s <= time_s for s in sounds))]


class TokenTargets:
    """What every token of a padded batch is to say; where nothing is asked, -1."""

    def __init__(self, size: tuple[int, int]) -> None:
        def classes(*more: int) -> np.ndarray:
            return np.full((*size, *more), NOT_ASKED, np.int64)

        def numbers(*more: int) -> np.ndarray:
            return np.full((*size, *more), NOT_ASKED, np.float32)

        # Of tokens of media:
        self.look, self.place = classes(len(SHAPES)), numbers(2)
        self.flags, self.way, self.changes = classes(len(FLAGS)), classes(), classes()
        # Of names:
        self.there, self.shape, self.colours = classes(), classes(), classes(2)
        self.ends, self.when, self.course = numbers(4), numbers(), classes()
        self.relations = classes(len(RELATIONS))
        self.heard, self.beeps = classes(), classes()

    def fill(self, prepared: Prepared, clips: list[ClipTargets]) -> None:
        """Go through all tokens of media."""
        media = prepared.media
        for row, clip in enumerate(clips):
            meta = token_meta(media.videos[row])
            for kind, item, at, j in _media_tokens(prepared, row):
                if kind == "audio":
                    self._time((row, at), clip, media.audios[item].centres_s[j])
                else:
                    self._frame((row, at), clip, meta, j)

    def _time(self, at: tuple[int, int], clip: ClipTargets, time_s: float) -> None:
        self.flags[at][3:] = clip.heard(time_s)
        self.changes[at] = clip.n_changed(time_s)

    def _frame(self, at: tuple[int, int], clip: ClipTargets, meta: TokenMeta, j: int) -> None:
        i, slow = int(meta.frame[j]), int(meta.stream[j]) == 0
        if not slow:  # a slow stream stands before all sound and most frames: it cannot know
            self._time(at, clip, float(clip.times[i]))
        if meta.kind[j] != PATCH:
            return
        side = int(meta.y1[j] - meta.y0[j])
        cells = GRID // side
        cell = int(meta.y0[j]) // side * cells + int(meta.x0[j]) // side
        self.look[at] = clip.look[cells][i, cell]
        thing = clip.own[cells][i][cell]
        if thing is None:
            return
        self.place[at] = thing.place_at(float(clip.times[i]))
        if not slow:
            self.flags[at][:3], self.way[at] = clip.happens(thing, i)

    def fill_names(self, ids: Tensor, clips: list[ClipTargets], names: Mapping[int, str]) -> None:
        """Go through the names that stand after each clip; ``ids`` [B, L]."""
        for row, at in torch.isin(ids, torch.tensor(list(names))).nonzero().tolist():
            name, scene = names[int(ids[row, at])], clips[row].scene
            if name == "sound":
                self._sound((row, at), scene)
            else:
                self._name((row, at), scene, name)

    def _sound(self, at: tuple[int, int], scene: Scene) -> None:
        self.there[at] = scene.has_audio
        for sound in scene.sounds:
            self.heard[at] = SOUNDS.index(sound.kind)
            self.when[at] = sound.onset_s / scene.duration_s
            if sound.beeps:
                self.beeps[at] = sound.beeps - 1

    def _name(self, at: tuple[int, int], scene: Scene, name: str) -> None:
        later = {t.turn.colour for t in scene.things if t.turn}
        named = [t for t in scene.things if name in (t.shape, t.colour)]
        self.there[at] = bool(named) or name in later
        for thing in named:
            ends = (0.0, scene.duration_s)
            self.colours[at] = [_COLOURS.index(thing.colour_at(t)) for t in ends]
            self.shape[at] = SHAPES.index(thing.shape)
            self.ends[at] = [x for t in ends for x in thing.place_at(t)]
            self.course[at] = _WAYS.index(thing.motion.direction) + 1 if thing.motion else 0
            time_s = event_time(thing)
            if time_s is not None:
                self.when[at] = time_s / scene.duration_s
                self.relations[at] = _relations(scene, thing, time_s)

    def tensors(self) -> dict[str, Tensor]:
        """All by name."""
        return {name: torch.from_numpy(array) for name, array in vars(self).items()}


def _relations(scene: Scene, thing: Thing, time_s: float) -> list[int]:
    others = [event_time(t) for t in scene.things if t is not thing]
    rivals = [t for t in others if t is not None]
    found = [int(time_s < min(rivals)) if rivals else NOT_ASKED, NOT_ASKED, NOT_ASKED]
    for sound in scene.sounds:
        if thing.motion:
            both = min(sound.end_s, thing.motion.end_s) - max(sound.onset_s, thing.motion.start_s)
            found[2] = int(both > 0.2) if abs(both - 0.1) > 0.1 else NOT_ASKED
        elif abs(time_s - sound.onset_s) > 0.3:
            found[1] = int(time_s < sound.onset_s)
    return found


def _media_tokens(prepared: Prepared, row: int) -> Iterator[tuple[str, int, int, int]]:
    """Medium, item, column of the batch and number within the item, of each token of media."""
    plan = prepared.media.splice
    at = plan.offset(row)
    for segment in plan.samples[row]:
        if segment.kind != "text":
            for j in range(segment.lo, segment.hi):
                yield segment.kind, segment.item, at + j - segment.lo, j
        at += segment.n_rows
