"""The small model that ships, and the scripts that made it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import av_llava
from av_llava.demo_model import SHIPPED
from av_llava.training.world.scene import sample_scene

SCRIPTS = Path(__file__).parents[2] / "scripts" / "tiny"


def script(name: str) -> ModuleType:
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))  # make_data imports build
    spec = importlib.util.spec_from_file_location(f"tiny_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    return script("evaluate")


def test_the_shipped_folder_is_small_and_has_every_part() -> None:
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 20e6
    model = av_llava.load(device="cpu").model.model
    for part in ("vision_tower", "mm_projector", "audio_tower", "mm_audio_projector"):
        assert sum(p.numel() for p in getattr(model, part).parameters()) > 10_000
    assert {stream.name for stream in model.planner.video(12).streams} == {"slow", "fast"}
    assert model.config.audio.use_start_end and model.config.has_image_newline


@pytest.mark.slow
def test_the_shipped_model_hears_and_sees_clips_that_it_never_met(evaluate: ModuleType) -> None:
    rows = evaluate.evaluate(av_llava.load(device="cpu"), 40, seed=77)
    right = {line["kind"]: line for line in evaluate.table(rows)}
    for kind in ("sound", "colour", "shape", "direction"):
        assert right[kind]["whole"] >= 0.75 > 0.6 >= right[kind]["chance"]
    # What is heard needs the sound, what is seen the frames.
    assert right["sound"]["muted"] < right["sound"]["whole"] - 0.3
    assert right["sound"]["blanked"] >= 0.75 > right["colour"]["blanked"]
    assert right["colour"]["muted"] >= 0.75


def test_an_answer_counts_when_it_is_the_right_word(evaluate: ModuleType) -> None:
    def row(said: str) -> bool:
        return evaluate.Row("c", "whole", "colour", "What?", "red", said, 1 / 7).right

    assert row("red") and row(" Red.\n")
    assert not row("redder") and not row("") and not row("it is red")


def test_the_table_counts_each_condition_on_its_own(evaluate: ModuleType) -> None:
    def row(condition: str, kind: str, said: str) -> object:
        return evaluate.Row("c", condition, kind, "?", "yes", said, 0.5)

    rows = [
        *(row("whole", "order", "yes") for _ in range(9)),
        row("whole", "order", "no"),
        row("whole", "sound", "yes"),
        row("muted", "order", "no"),
    ]
    lines = {line["kind"]: line for line in evaluate.table(rows)}
    assert set(lines) == {"order", "sound", "all"}
    assert lines["order"]["whole"] == 0.9 and lines["order"]["muted"] == 0
    assert lines["order"]["met"] and not lines["all"]["met"]  # 10 of 11 is below 95 %
    assert lines["order"]["low"] < 0.9 < lines["order"]["high"]
    assert "| order |" in evaluate.markdown(list(lines.values()))


def test_muted_and_blanked_clips_lack_only_that(evaluate: ModuleType) -> None:
    from av_llava.training.world.picture import frames
    from av_llava.training.world.sound import waveform

    scene = next(
        s for s in (sample_scene(1, i, "heldout") for i in range(50)) if s.has_video and s.has_audio
    )
    muted, blanked = (evaluate.without(scene, c) for c in ("muted", "blanked"))
    assert np.array_equal(frames(muted), frames(scene))
    assert np.abs(waveform(muted)).max() < 0.02 < np.abs(waveform(scene)).max()
    assert np.array_equal(waveform(blanked), waveform(scene))
    pictures = frames(blanked)
    assert (pictures == pictures[:1]).all() and not np.array_equal(pictures, frames(scene))


def test_tokens_tell_only_of_their_own_part_of_the_picture() -> None:
    towers = script("pretrain_towers")
    held = towers.overlaps((0.25, 0.75), 0.2, 2)
    assert held == pytest.approx([0, 0, 1, 0])
    assert towers.overlaps((0.5, 0.5), 0.2, 2) == pytest.approx([0.25] * 4)
    assert towers.overlaps((0.95, 0.5), 0.3, 4).sum() == pytest.approx(1)  # cut at the edge


def test_a_training_step_of_the_towers_teaches_both() -> None:
    towers, build = script("pretrain_towers"), script("build")
    model, _ = build.build()
    scenes = towers.Scenes(3)
    sight = model.model.vision_tower
    heads = towers.FrameHeads(sight.hidden_size)
    pixels, want = scenes.frame_batch(6)
    loss, seen = heads(sight(pixels).float(), want)
    loss.backward()
    assert pixels.shape == (6, 3, 64, 64) and torch.isfinite(loss)
    assert all(p.grad is not None for p in sight.vision_tower.encoder.parameters())
    assert 0 <= seen["shape 2x2"] <= 1
    waves, heard = scenes.sound_batch(3, 25, 0.16)
    assert len(waves) == 3 and heard["started"].shape == (3, 25)
    assert (heard["sounds"] <= heard["started"]).all()


def test_the_tokenizer_knows_the_worlds_words_and_any_other_text() -> None:
    tokenizer = script("build").make_tokenizer()
    for word in ("triangle", "purple", "rising", "early"):
        assert len(tokenizer(word).input_ids) == 1
    text = "Zebra, é, 你好?"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_lessons_are_answered_by_the_scene() -> None:
    data = script("make_data")
    for index in range(40):
        scene = sample_scene(5, index, "lessons")
        row = data.row(scene, 0)
        turns = row["conversations"]
        assert 2 <= len(turns) <= 2 * data.LONGEST and len(row["kind"]) == len(turns) // 2
        assert turns[0]["value"].startswith("<video>" if scene.has_video else "<audio>")
        for kind, asked, told in zip(row["kind"], turns[::2], turns[1::2], strict=True):
            if kind == "where" and "at the end" in asked["value"]:
                thing = next(t for t in scene.things if t.shape in asked["value"])
                x, y = thing.place_at(scene.duration_s)
                assert told["value"] in {
                    "left" if x < 0.5 else "right",
                    "up" if y < 0.5 else "down",
                }
        assert row == data.row(scene, 0) != data.row(scene, 1) or len(turns) < 4
