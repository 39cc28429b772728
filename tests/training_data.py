"""Small training data for tests: real clips, samples about them, a data set over a list."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from clips import make_clip
from PIL import Image

from av_llava.chat import MediaPart, Message, TextPart
from av_llava.training.dataset import TrainingDataset
from av_llava.training.index import build_index
from av_llava.training.readers import Reading
from av_llava.training.samples import Sample


class ListStore:
    """Samples that are given."""

    def __init__(self, samples, digest=None):
        self.samples = list(samples)
        self.sources = ("list",)
        self._digest = digest

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def reading(self, index):
        return Reading(self.samples[index])

    def where(self, index):
        return self.samples[index].source

    def digest(self):
        if self._digest is not None:
            return self._digest
        rows = json.dumps([s.to_row() for s in self.samples], sort_keys=True)
        return hashlib.sha256(rows.encode()).hexdigest()


def make_media(folder: Path) -> dict[str, str]:
    """Write one file of each kind: film with sound, silent film, sound, picture."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "film": make_clip(folder / "film.mp4", seconds=2, size=(64, 48)),
        "long": make_clip(folder / "long.mp4", seconds=5, size=(64, 48)),
        "silent": make_clip(folder / "silent.mp4", seconds=3, size=(64, 48), audio=None),
        "sound": make_clip(folder / "sound.wav", seconds=2, video=False),
    }
    Image.new("RGB", (60, 40), (200, 30, 30)).save(folder / "picture.png")
    return {k: str(p) for k, p in files.items()} | {"picture": str(folder / "picture.png")}


def sample(name, *media, question="What happens?", answer="A red ball moves.", **fields):
    """One question and answer; media are (kind, source) or parts."""
    parts = [m if isinstance(m, MediaPart) else MediaPart(*m) for m in media]
    turns = (
        Message("user", (*parts, TextPart(question))),
        Message("assistant", (TextPart(answer),)),
    )
    return Sample(str(name), turns, f"data.jsonl:{name}", **fields)


def some_samples(media, n=10):
    """Text, picture, sound, silent film, film with sound, in turns, all different."""
    kinds = [
        (),
        (("image", media["picture"]),),
        (("audio", media["sound"]),),
        (("video", media["silent"]),),
        (("video", media["film"]),),
    ]
    return [
        sample(i, *kinds[i % len(kinds)], question="Why? " * (1 + i // 5), answer=f"Answer {i}.")
        for i in range(n)
    ]


def dataset_of(samples, processor, *, frames=4, index=None, digest=None, **settings):
    """A data set over samples, measured; samples that are not JSON need a digest."""
    store = ListStore(samples, digest)
    options = processor.media_options(frames=frames, **settings.pop("media", {}))
    index = index or build_index(store, processor, options)
    return TrainingDataset(store, processor, options, index, **settings)
