"""The small model that ships, and the scripts that made it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import av_llava
from av_llava.demo_model import SHIPPED
from av_llava.training.world import KINDS
from av_llava.training.world.scene import Scene, sample_scene

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
    rows = evaluate.evaluate(av_llava.load(device="cpu"), 60, seed=77)
    table = {str(line["kind"]): line for line in evaluate.table(rows)}
    assert set(table) == {*KINDS, "all"} and table["all"]["whole"] >= 0.95
    senses = {"muted": "audio", "blanked": "vision"}
    for kind, about in KINDS.items():
        line = table[kind]
        for condition in evaluate.CONDITIONS:
            low, high = evaluate.interval(round(line[condition] * line["n"]), line["n"])
            if senses.get(condition) in about.needs:
                assert low <= line["chance"], (kind, condition)  # as good as guessing
            else:
                # Some kinds are asked ten times: as good as 90 % of many, and no guessing.
                assert high >= evaluate.KIND_TARGET and low > line["chance"], (kind, condition)


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
    for word in ("triangle", "purple", "rising", "before"):
        assert len(tokenizer(word).input_ids) == 1
    text = "Zebra, é, 你好?"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_conversations_are_what_the_world_asks_about_the_clips(tmp_path: Path) -> None:
    data = script("make_data")
    scenes = [sample_scene(5, i, "lessons") for i in range(40)]
    data.write(tmp_path, scenes)
    rows, events, looks = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("conversations", "events", "looks")
    )
    assert [r["id"] for r in rows] == [s.key for s in scenes]
    for scene, row in zip(scenes, rows, strict=True):
        turns = row["conversations"]
        assert 2 <= len(turns) <= 2 * data.LONGEST and len(row["kind"]) == len(turns) // 2
        assert turns[0]["value"].startswith("<video>" if scene.has_video else "<audio>")
        colours = {t.shape: t.colour for t in scene.things if not t.turn}
        for kind, asked, told in zip(row["kind"], turns[::2], turns[1::2], strict=True):
            if kind == "colour":
                assert any(s in asked["value"] and told["value"] == c for s, c in colours.items())
            if kind == "count":
                assert told["value"] == ("one", "two", "three", "four")[len(scene.things) - 1]
    happens = {s.key for s in scenes if s.plot in ("travel", "sequence", "change", "turns")}
    assert {r["id"] for r in events} == happens
    assert all(r["kind"][0] in data.EVENTS and len(r["conversations"]) == 2 for r in events)
    shapes = [sum(k == "shape" for r in some for k in r["kind"]) for some in (rows, looks)]
    assert shapes[1] > 1.3 * shapes[0] > 0


@pytest.fixture(scope="module")
def targets() -> ModuleType:
    return script("clip_targets")


def scene_of(plot: str, sound: bool = True) -> Scene:
    scenes = (sample_scene(4, i, "towers") for i in range(500))
    return next(s for s in scenes if s.plot == plot and s.has_audio == sound)


def test_a_frame_says_what_moves_and_what_has_changed(targets: ModuleType) -> None:
    scene = scene_of("turns")
    clip = targets.ClipTargets(scene, 12)
    assert clip.times[0] == 0 and clip.times[-1] == 31 / 8
    for thing in scene.things:
        moving = [clip.happens(thing, i) for i in range(12)]
        assert any(flags[0] == 1 for flags, _ in moving)
        for i, (flags, way) in enumerate(moving):
            amid = thing.motion.start_s < clip.times[i - 1] and clip.times[i] < thing.motion.end_s
            if i and amid:
                assert flags[0] == 1 and list(targets.DIRECTIONS)[way] == thing.motion.direction
            if clip.times[i] < thing.motion.start_s:
                assert flags[0] in (0, targets.NOT_ASKED) and way == targets.NOT_ASKED
            assert flags[1:] == [0, 0]
    scene = scene_of("change")
    clip = targets.ClipTargets(scene, 12)
    turning = next(t for t in scene.things if t.turn)
    changed = [clip.happens(turning, i)[0][1:] for i in range(12)]
    first = next(i for i, t in enumerate(clip.times) if t >= turning.turn.time_s)
    assert changed == [[int(i >= first), int(i == first)] for i in range(12)]
    assert [clip.n_changed(t) for t in clip.times] == [int(i >= first) for i in range(12)]
    onset = scene.sounds[0].onset_s
    assert clip.heard(onset - 0.01) == [0, 0] and clip.heard(onset + 0.01) == [1, 1]
    assert clip.heard(scene.sounds[0].end_s + 0.01) == [0, 1]


def test_tokens_and_names_say_what_the_scene_holds(targets: ModuleType) -> None:
    events, build = script("pretrain_events"), script("build")
    processor = build.build()[1]
    scenes = [scene_of("turns"), scene_of("change"), scene_of("crowd", sound=False)]
    clips = events.Clips(processor, 1)
    prepared, want = clips.batch(scenes)
    plan = prepared.media.splice
    assert all(len(t) == 3 and t.shape[1] == plan.shape[1] for t in want.values())
    shown = want["look"].amax(-1) >= 0
    assert shown.sum(1).tolist() == [3 * 16 + 12 * 4] * 3  # every patch of both streams
    named = want["there"] >= 0
    assert named.sum(1).tolist() == [len(targets.NAMES)] * 3
    assert not (shown & named).any()
    for row, scene in enumerate(scenes):
        shapes = want["look"][row][shown[row]].amax(0).nonzero().flatten().tolist()
        assert {targets.SHAPES[i] for i in shapes} == {t.shape for t in scene.things}
    assert want["heard"][2].max() == -1 and want["flags"][2][..., 3].max() == 0
    first = want["relations"][0][:, 0]
    assert sorted(first[first >= 0].tolist()) == [0, 0, 1, 1]  # shape and colour of each thing
    during = want["relations"][0][:, 2]
    assert set(during[during >= 0].tolist()) == {0, 1}


def test_reading_events_teaches_all_but_the_towers_and_the_upper_layers() -> None:
    events, build, towers = script("pretrain_events"), script("build"), script("pretrain_towers")
    model, processor = build.build()
    for tower in (model.model.vision_tower, model.model.audio_tower):
        tower.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scenes = towers.Scenes(5)
    clips = events.Clips(processor, 1)
    batch = [scenes.next(lambda s: s.has_video) for _ in range(4)]
    events.learn_events(model, lambda: clips.batch(batch), 2, 1e-3)
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    depth = model.config.text_config.num_hidden_layers
    upper = [f"language_model.layers.{i}." for i in range(events.NAME_LAYERS, depth)]
    assert any("mm_projector" in k for k in changed)
    assert any("mm_audio_projector" in k for k in changed)
    assert any(f"language_model.layers.{events.NAME_LAYERS - 1}." in k for k in changed)
    assert not any("tower" in k or any(u in k for u in upper) for k in changed)


def test_the_streams_are_compared_at_about_as_many_tokens() -> None:
    streams, build = script("streams"), script("build")
    counts = {}
    for name, variant in streams.VARIANTS.items():
        model, _ = build.build(0, variant.aggregator, variant.frames)
        counts[name] = model.model.planner.video(variant.frames).n_tokens
    assert counts == {"slow": 119, "fast": 120, "both": 111}


def test_a_comparison_run_trains_on_features_and_counts_right_answers() -> None:
    streams, build = script("streams"), script("build")
    model, _ = build.build()
    scenes = streams.seen("streams", 6, seed=1)
    known = streams.Features(scenes, streams.encode(model.eval(), scenes))
    assert known.patches.shape[:4] == (6, 32, 8, 8)
    found = streams.run(streams.VARIANTS["fast"], 1, known, known, (1, 1, 1))
    assert set(found) == set(streams.SEEN) and sum(n for _, n in found.values()) > 6
    assert all(0 <= right <= n for right, n in found.values())
    runs = [{"variant": v, "seed": 1, "found": found} for v in streams.VARIANTS]
    assert "nan" in streams.markdown(runs)  # one seed has no interval
    table = streams.markdown([*runs, *runs])
    assert "nan" not in table and "± 0.0 (" in table
    assert "| all |" in table
    assert all((f"| {k.replace('_', ' ')} |" in table) == (found[k][1] > 0) for k in found)


def test_the_interval_over_seeds_is_students() -> None:
    assert script("streams").spread([70.0, 80.0, 90.0]) == pytest.approx(4.303 * 10 / 3**0.5)
