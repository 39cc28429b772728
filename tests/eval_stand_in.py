"""A task and an answerer that need neither media nor torch, for tests of everything around them.

Run as a program it is one process of a run: ``python eval_stand_in.py DATA FOLDER [DELAY_S]``, with the
place from RANK and WORLD_SIZE, which may be killed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from av_llava.errors import BudgetError
from av_llava.media import TookTooLongError
from av_llava_eval.annotations import read_rows
from av_llava_eval.answerer import Reply
from av_llava_eval.experiment import Arm
from av_llava_eval.failures import MissingFileError, NoSoundError
from av_llava_eval.runner import RunSettings, run
from av_llava_eval.sample import LETTERS, Prediction, Sample
from av_llava_eval.sharding import place_of
from av_llava_eval.task import Task


class Toy(Task):
    """Rows of toy.json: {id, video, question, options, answer, kind}."""

    name = "toy"
    title = "Toy"
    needs = ("toy.json", "videos/<video>.mp4")
    splits = ("test", "val")
    groupings = ("kind", "tags")

    def docs(self, root, split):
        return read_rows(Path(root) / "toy.json")

    def sample(self, doc, index, root):
        return Sample(
            id=str(doc["id"]),
            group=doc["video"],
            question=doc["question"],
            options=tuple(doc["options"]),
            answer=doc.get("answer"),
            video=root / "videos" / f"{doc['video']}.mp4",
            duration_s=doc.get("duration_s"),
            meta={"kind": doc["kind"], "tags": doc.get("tags", [])},
        )

    def extract(self, text, sample, compat=None):
        said = text.strip()
        if said and said[0] in sample.letters:
            return Prediction(said[0], "letter")
        return Prediction(None, "unparsed" if said else "empty")


def toy_rows(n_videos=12, per_video=3, seed=0):
    """Rows whose right answers are spread over the letters."""
    rows = []
    for v in range(n_videos):
        for q in range(per_video):
            letter = LETTERS[(v * 7 + q * 3 + seed) % 4]
            rows.append(
                {
                    "id": f"v{v}-{q}",
                    "video": f"v{v}",
                    "question": f"What is number {q} of video {v}?",
                    "options": ["red", "green", "blue", "white"],
                    "answer": letter,
                    "kind": "short" if v % 3 else "long",
                    "tags": ["odd" if q % 2 else "even", "all"],
                    "duration_s": 10.0 * (v + 1),
                }
            )
    return rows


def write_toy(folder, rows=None):
    """Write the annotations; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.json").write_text(json.dumps(toy_rows() if rows is None else rows))
    return folder


ERRORS = {
    "missing": MissingFileError("There is no file x.mp4."),
    "no_audio": NoSoundError("no sound track"),
    "timeout": TookTooLongError("took too long"),
    "oom": MemoryError("out of memory"),
    "context": BudgetError("The context holds 10 tokens."),
    "error": RuntimeError("a strange shape"),
}


class StandIn:
    """Answers by a hash of arm and question; the same for everyone who asks.

    Args:
        fail: video → kind of failure when it is opened.
        fail_question: prompt → kind of failure when it is asked.
        delay_s: of each clip.
        version: of the "weights".
    """

    def __init__(self, fail=(), fail_question=(), delay_s=0.0, version=1):
        self.fail, self.fail_question = dict(fail), dict(fail_question)
        self.delay_s, self.version = delay_s, version
        self.opened, self.asked = [], []

    def fingerprint(self):
        return {"model": {"weights": str(self.version)}}

    def open(self, clip, arms, lenders):
        self.opened.append((clip.group, tuple(a.name for a in arms)))
        if clip.group in self.fail:
            raise ERRORS[self.fail[clip.group]]
        return clip

    def frame_times(self, opened, arm):
        return (1.0, 5.0) if arm.sees else ()

    def answer(self, opened, arm, prompts, n_new):
        time.sleep(self.delay_s)
        for prompt in prompts:
            if prompt in self.fail_question:
                raise ERRORS[self.fail_question[prompt]]
        self.asked += [(arm.name, p) for p in prompts]
        return [Reply(said(arm, p), {"frames": 8}, {"generate": 0.001}) for p in prompts]


def said(arm, prompt):
    """Something like an answer: mostly a letter, sometimes nothing that can be read."""
    number = hashlib.sha256(f"{arm.name} {prompt}".encode()).digest()[0]
    return "no idea" if number < 20 else f"{LETTERS[number % 4]}."


ARMS = (Arm("audio on", sound="on"), Arm("audio off", sound="off"))


def main(data, folder, delay_s="0"):
    answerer = StandIn(delay_s=float(delay_s))
    settings = RunSettings(arms=ARMS, workers=1)
    done = run(Toy(), data, folder, lambda: answerer, settings, place=place_of(os.environ))
    print(json.dumps({"asked": len(answerer.asked), "complete": done.complete}))
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
