"""Data sets of the synthetic world: media files and questions in LLaVA's format.

Contract: what a folder holds depends only on its setting (seed, split, size, form, ...), not on the
number of workers or interruptions. A run that was stopped, however rudely, is taken up where it
stopped: clips appear whole, and `<split>.json` is written last. A folder of another setting is
refused. ::

    out/clips/train-0-000000.mp4 ...    media
    out/train.json                      rows, as LLaVA's trainers read them
    out/train.world.json                the setting
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from av_llava.errors import DataError, UsageError, unknown_name
from av_llava.training.world.parts import WORLD_VERSION, Scene, SceneSettings
from av_llava.training.world.questions import Question, questions
from av_llava.training.world.scene import generator, sample_scene

Progress = Callable[[int, int], None]
"""(clips that are there, clips wanted)"""

CLIPS = "clips"
_CHUNK = 32


def synthesize(
    out: str | Path,
    n: int,
    seed: int = 0,
    split: str = "train",
    workers: int = 1,
    progress: Progress | None = None,
    *,
    settings: SceneSettings | None = None,
    form: str = "conversation",
) -> Path:
    """Write clips and their questions, or what is missing of them.

    Args:
        out: folder; made if absent. Several splits may share one.
        n: number of clips. A finished data set can be made longer, not shorter.
        seed: seed of the data set. Splits never share a scene, whatever their seeds.
        split: name of the split and of the JSON file; letters, digits, "-" and "_".
        workers: processes that encode; 1 works in this one.
        progress: called with (clips there, clips wanted).
        settings: size, length and frame rate of the clips.
        form: "conversation": one row per clip with all its questions; "question": one row each.

    Returns:
        The JSON file.

    Raises:
        UsageError: a number or a name is out of range.
        DataError: the folder holds something else, or another setting.
    """
    settings = settings or SceneSettings()
    _check(n, seed, split, workers, form)
    out = Path(out)
    _claim(out, n, seed, split, settings, form)
    _write_clips(out, n, seed, split, settings, workers, progress)
    rows = [
        row for index in range(n) for row in FORMS[form](sample_scene(seed, index, split, settings))
    ]
    return _write_json(out / f"{split}.json", rows)


def ask(scene: Scene) -> list[Question]:
    """Return the questions that a data set asks about a scene."""
    return questions(scene, generator(scene.seed, scene.index, scene.split, "questions"))


def conversation_rows(scene: Scene) -> list[dict[str, Any]]:
    """Return one row with all the questions as turns; `kind` and `needs` are lists by turn."""
    asked = ask(scene)
    turns = []
    for i, question in enumerate(asked):
        turns += _turn(scene, question, first=i == 0)
    return [
        _row(scene, scene.key, turns)
        | {
            "kind": [q.kind for q in asked],
            "needs": [sorted(q.needs) for q in asked],
        }
    ]


def question_rows(scene: Scene) -> list[dict[str, Any]]:
    """Return a row for each question, with its answer and choices, as an evaluation reads it."""
    return [
        _row(scene, f"{scene.key}-{question.kind}", _turn(scene, question, first=True))
        | {
            "kind": question.kind,
            "needs": sorted(question.needs),
            "question": question.question,
            "answer": question.answer,
            "choices": list(question.choices),
        }
        for question in ask(scene)
    ]


FORMS: dict[str, Callable[[Scene], list[dict[str, Any]]]] = {
    "conversation": conversation_rows,
    "question": question_rows,
}


def _row(scene: Scene, name: str, turns: list[dict[str, str]]) -> dict[str, Any]:
    medium = "video" if scene.has_video else "audio"
    return {"id": name, medium: f"{CLIPS}/{clip_name(scene)}", "conversations": turns}


def _turn(scene: Scene, question: Question, first: bool) -> list[dict[str, str]]:
    mark = ("<video>\n" if scene.has_video else "<audio>\n") if first else ""
    return [
        {"from": "human", "value": mark + question.question},
        {"from": "gpt", "value": question.answer},
    ]


def clip_name(scene: Scene) -> str:
    """Return the name of a scene's media file."""
    return scene.key + (".mp4" if scene.has_video else ".m4a")


# ------------------------------------------------------------------ clips


def _write_clips(
    out: Path,
    n: int,
    seed: int,
    split: str,
    settings: SceneSettings,
    workers: int,
    progress: Progress | None,
) -> None:
    clips = out / CLIPS
    clips.mkdir(exist_ok=True)
    for left in clips.glob(f".{split}-{seed}-*.part*"):  # of a run that was killed
        left.unlink()
    there = {entry.name for entry in os.scandir(clips)}
    missing = [
        i
        for i in range(n)
        if not {f"{split}-{seed}-{i:06d}.mp4", f"{split}-{seed}-{i:06d}.m4a"} & there
    ]
    chunks = [missing[i : i + _CHUNK] for i in range(0, len(missing), _CHUNK)]
    done = n - len(missing)
    if progress:
        progress(done, n)
    jobs = ((str(clips), seed, split, settings, chunk) for chunk in chunks)
    for count in _run(jobs, min(workers, len(chunks))):
        done += count
        if progress:
            progress(done, n)


def _run(jobs: Iterator[tuple[Any, ...]], workers: int) -> Iterator[int]:
    if workers <= 1:
        yield from (_write_chunk(*job) for job in jobs)
        return
    # Fresh processes: the caller may hold threads (of a model, of a decoder) that a fork breaks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_write_chunk, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _write_chunk(
    clips: str, seed: int, split: str, settings: SceneSettings, indices: list[int]
) -> int:
    from av_llava.training.world.write import write_clip

    for index in indices:
        scene = sample_scene(seed, index, split, settings)
        write_clip(scene, Path(clips) / clip_name(scene))
    return len(indices)


# ------------------------------------------------------------------ the folder


def _check(n: int, seed: int, split: str, workers: int, form: str) -> None:
    for name, value, least in (("n", n, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if value < least:
            raise UsageError(f"{name} is {value}, but must be at least {least}.")
    if not split or not all(c.isascii() and (c.isalnum() or c in "-_") for c in split):
        raise UsageError(
            f"The split {split!r} names files; use letters, digits, '-' and '_', as in 'train'."
        )
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)


def _claim(out: Path, n: int, seed: int, split: str, settings: SceneSettings, form: str) -> None:
    """Make the folder this setting's, or find that it is."""
    wanted = {
        "world": WORLD_VERSION,
        "seed": seed,
        "split": split,
        "form": form,
        **asdict(settings),
    }
    file = out / f"{split}.world.json"
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file, not a folder. Choose another folder.")
    if out.is_dir() and any(out.iterdir()) and not any(out.glob("*.world.json")):
        raise DataError(
            f"The folder {out} holds files that are not of a synthetic data set. Choose an empty "
            f"or new folder."
        )
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        _write_json(file, wanted)
        return
    held = json.loads(file.read_text(encoding="utf-8"))
    other = {k: (held.get(k), v) for k, v in wanted.items() if held.get(k) != v}
    if other:
        differences = ", ".join(f"{k} {a!r} (now {b!r})" for k, (a, b) in other.items())
        raise DataError(
            f"The folder {out} holds the split {split!r} of another setting: {differences}. "
            f"Use the same setting, another split, or another folder."
        )


def _write_json(path: Path, value: Any) -> Path:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.write("\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
