"""Every benchmark from its files to its scores with the small model that comes with the project."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from eval_mini import MINIS, Media, Mini

import av_llava
from av_llava.inference import AVLlava
from av_llava.media.worker import close_workers
from av_llava_eval import get_task
from av_llava_eval.answerer import AVLlavaAnswerer, MediaSettings
from av_llava_eval.experiment import Arm
from av_llava_eval.runner import RunSettings, run
from av_llava_eval.scoring import score_folder, summarise

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

FIRST = {m.task: m for m in reversed(MINIS)}
"""One layout of each task."""
FILMS = {"audio on": Arm("audio on", sound="on"), "audio off": Arm("audio off", sound="off")}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return Media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def model() -> Iterator[AVLlava]:
    yield av_llava.load(device="cpu")
    close_workers()


@pytest.mark.parametrize("mini", FIRST.values(), ids=FIRST)
def test_it_runs_and_scores(mini: Mini, media: Media, model: AVLlava, tmp_path: Path) -> None:
    data = mini.build(tmp_path / "data", media)
    task = get_task(mini.task)
    answerer = AVLlavaAnswerer(model, MediaSettings(frames=2, isolate=False))
    settings = RunSettings(split=mini.split, max_new_tokens=3, limit=3, workers=0)
    done = run(task, data, tmp_path / "run", lambda: answerer, settings)
    assert done.complete and done.failed == 0 and done.answers == min(3, mini.n)
    scored = score_folder(tmp_path / "run")
    arm = summarise(scored, "lmms")["arms"]["main"]
    assert arm["n"] + arm["unlabelled"] == done.answers and arm["failed"] == 0
    for record in scored.arms["main"]:
        used = record["used"]
        sample = next(s for s in scored.samples if s.id == record["id"])
        assert used["new_tokens"] >= 1
        assert (used["visual_tokens"] > 0) == (sample.video is not None or bool(sample.images))
        if sample.video is not None:
            assert 1 <= used["frames"] <= 2
        heard = sample.audio is not None or (
            sample.video is not None
            and sample.video.is_file()
            and "silent" not in sample.video.name
        )
        assert (used["audio_tokens"] > 0) == heard, used


def test_sound_on_and_off_are_two_columns_of_one_run(
    media: Media, model: AVLlava, tmp_path: Path
) -> None:
    data = FIRST["videomme_w_audio"].build(tmp_path / "data", media)
    answerer = AVLlavaAnswerer(model, MediaSettings(frames=2, isolate=False))
    settings = RunSettings(arms=tuple(FILMS.values()), max_new_tokens=2, workers=0)
    run(get_task("videomme_w_audio"), data, tmp_path / "run", lambda: answerer, settings)
    arms = score_folder(tmp_path / "run").arms
    assert all(r["used"]["audio_tokens"] > 0 for r in arms["audio on"])
    assert all(r["used"]["audio_tokens"] == 0 for r in arms["audio off"])
    assert [r["id"] for r in arms["audio on"]] == [r["id"] for r in arms["audio off"]]
