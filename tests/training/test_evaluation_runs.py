"""Evaluation inside runs: what it reads, what it leaves out, and that it never ends a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_runs import losses, recipe, trainer_of
from training_data import make_media, sample

from av_llava import prepared as prepared_module
from av_llava.errors import DataError, UsageError
from av_llava.training.run import train

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
NO_SOUND = {"audio_tower": "freeze", "mm_audio_projector": "freeze", "audio_token_rows": "freeze"}


@pytest.fixture(scope="module")
def media(place: Path) -> dict[str, str]:
    """Files of each kind, a film whose header is whole and whose frames are not, and pictures."""
    files = make_media(place / "media")
    raw = bytearray(Path(files["film"]).read_bytes())
    start = raw.find(b"mdat")
    size = int.from_bytes(raw[start - 4 : start], "big")
    raw[start + 4 : start - 4 + size] = bytes(size - 8)
    (place / "broken.mp4").write_bytes(raw)
    folder = place / "pictures"
    folder.mkdir()
    for i in range(16):
        Image.new("RGB", (64, 48), (i * 15, 0, 0)).save(folder / f"{i:02}.png")
    return {**files, "broken": str(place / "broken.mp4"), "pictures": str(folder)}


@pytest.fixture
def settings_of(place: Path, tmp_path: Path):
    """Settings of a run that is measured on some samples, or rows, after every step."""

    def make(held_out, training=None, **changes):
        def written(name, samples):
            rows = [s if isinstance(s, dict) else s.to_row() for s in samples]
            file = tmp_path / name
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return file

        file = place / "data.jsonl" if training is None else written("train.jsonl", training)
        data = {"eval": str(written("held_out.jsonl", held_out)), **changes.pop("data", {})}
        own = {**EVERY_STEP, **changes.pop("arguments", {})}
        changes = {"evaluation": {"max_new_tokens": 2}, **changes}
        return recipe(place / "base", file, tmp_path / "out", data=data, training=own, **changes)

    return make


@pytest.fixture
def read(monkeypatch) -> list[tuple]:
    """How each video was read that was decoded: file, settings, times."""
    seen: list[tuple] = []
    load = prepared_module.load_video

    def spy(part, spec, vision, options, **rest):
        video = load(part, spec, vision, options, **rest)
        if rest["decode"]:
            own = options.for_part(part)
            rate = own.sampling.source_fps
            seen.append((part.source, rate, own.isolate, own.limits, video.pts_s))
        return video

    monkeypatch.setattr(prepared_module, "load_video", spy)
    return seen


# ---------------------------------------------------------------- what is left out


@pytest.mark.parametrize(("samples", "workers"), [(3, 0), (0, 2)])
def test_held_out_media_that_cannot_be_decoded_are_told_and_left_out(
    settings_of, media, caplog, samples, workers
) -> None:
    good = [
        sample(0, ("video", media["film"]), answer="One."),
        sample(2, ("video", media["film"]), question="And then?", answer="Two balls."),
    ]
    bad = sample("gone bad", ("video", media["broken"]), answer="A very long answer about it.")
    evaluation = {"samples": samples, "max_new_tokens": 2, "scorer": "operator:le"}
    wanted = trainer_of(settings_of(good, evaluation=evaluation))[0].evaluate()
    assert wanted.pop("eval_bad_media") == 0
    settings = settings_of(
        [good[0], bad, good[1]], evaluation=evaluation, batch={"workers": workers}
    )
    trainer, _ = trainer_of(settings)
    caplog.set_level(logging.WARNING, "av_llava")
    found = trainer.evaluate()
    assert found.pop("eval_bad_media") == 1
    assert found == pytest.approx(wanted, rel=1e-5)
    (line,) = [r.getMessage() for r in caplog.records if "held-out" in r.getMessage()]
    assert "1 of 3" in line and media["broken"] in line
    (row,) = (Path(settings.output) / "bad_media.jsonl").read_text().splitlines()
    assert json.loads(row)["sample"] == "gone bad" and json.loads(row)["replacement"] == ""
    caplog.clear()
    assert trainer.evaluate()["eval_bad_media"] == 1
    assert not [r for r in caplog.records if "held-out" in r.getMessage()]  # it is known


def test_nothing_need_be_alike_to_a_held_out_sample_that_cannot_be_read(settings_of, media) -> None:
    gone = str(Path(media["film"]).with_name("gone.mp4"))
    held_out = [
        sample(0),
        sample(1, ("video", media["broken"])),
        sample(2, ("image", gone)),
    ]
    settings = settings_of(held_out)
    train(settings)
    (row,) = evaluations(settings)
    assert row["eval_bad_media"] == 2 and np.isfinite(row["eval_loss"])
    assert [k for k in row if k.startswith("eval_loss/")] == ["eval_loss/text"]
    listed = (Path(settings.output) / "bad_media.jsonl").read_text().splitlines()
    assert len(listed) == 2


def test_a_measurement_of_nothing_is_no_number(settings_of, media) -> None:
    settings = settings_of([sample(0, ("video", media["broken"]))])
    train(settings)
    (row,) = evaluations(settings)
    assert row["eval_loss"] is None and row["eval_score"] is None and row["eval_bad_media"] == 1


def test_a_policy_of_errors_holds_for_held_out_media(settings_of, media) -> None:
    settings = settings_of(
        [sample(0), sample(1, ("video", media["broken"]))],
        data={"bad_media": {"policy": "error"}},
        evaluation={"loss": False, "max_new_tokens": 2},
    )
    with pytest.raises(DataError, match=r"sample '1' cannot be read.*broken\.mp4"):
        trainer_of(settings)[0].evaluate()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "x", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                          {"from": "gpt", "value": "A."}]},
            r"\.jsonl, line 2: .*<image>",
        ),
        ({"id": "x", "conversations": [{"from": "human", "value": "What?"}]}, "nothing of the"),
    ],
)  # fmt: skip
def test_wrong_held_out_rows_are_refused_as_training_rows_are(settings_of, row, message) -> None:
    rows = [
        {"id": "a", "conversations": [{"from": "human", "value": "What?"},
                                      {"from": "gpt", "value": "This."}]},
        row,
    ]  # fmt: skip
    with pytest.raises(DataError, match=message) as trained:
        trainer_of(settings_of([sample(0)], training=rows, trainable=NO_SOUND))
    with pytest.raises(DataError, match=message) as held_out:
        trainer_of(settings_of(rows))
    assert str(held_out.value) == str(trained.value).replace("train.jsonl", "held_out.jsonl")


def test_held_out_media_of_which_none_can_be_read_are_refused(settings_of, media) -> None:
    gone = str(Path(media["film"]).with_name("gone.mp4"))
    with pytest.raises(DataError, match=r"None of the 2 held-out samples.*gone\.mp4"):
        trainer_of(settings_of([sample(i, ("video", gone)) for i in range(2)]))


def test_a_question_that_leaves_no_room_for_an_answer_is_refused(settings_of) -> None:
    held_out = [sample(0), sample("endless", question="Why? " * 2000)]
    with pytest.raises(DataError, match="'endless'.*context"):
        trainer_of(settings_of(held_out))
    trainer_of(settings_of(held_out, evaluation={"samples": 0}))  # it is not asked


# ---------------------------------------------------------------- how samples are read


def test_text_is_scored_whatever_is_said_of_sound(settings_of, media) -> None:
    rows = [
        sample(0, ("video", media["film"]), meta={"kind": "film"}),
        sample(1, meta={"kind": "text"}),
    ]
    settings = settings_of(
        rows, rows, data={"audio": "on"}, evaluation={"by": "kind", "max_new_tokens": 2}
    )
    train(settings)
    (row,) = evaluations(settings)
    assert {"eval_score/film", "eval_score/text"} < row.keys() and row["eval_bad_media"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_mixed_precision_does_not_reach_the_reading_of_media(settings_of, media, workers) -> None:
    """Sound is resampled, which knows no bfloat16; the log-mel would have its rounding."""
    rows = [sample(0, ("audio", media["sound"])), sample(1, ("video", media["film"]))]
    settings = settings_of(rows, rows, batch={"workers": workers}, arguments={"bf16": True})
    train(settings)
    (row,) = evaluations(settings)
    assert np.isfinite(row["eval_loss"]) and row["eval_bad_media"] == 0


def test_the_model_is_measured_in_mixed_precision(settings_of) -> None:
    trainer, prepared = trainer_of(settings_of([sample(0)], arguments={"bf16": True}))
    types = []
    prepared.model.model.lm_head.register_forward_hook(lambda *given: types.append(given[2].dtype))
    trainer.evaluate()
    assert len(types) > 1 and set(types) == {torch.bfloat16}  # of the loss and of the answer


def test_scores_see_what_training_sees(settings_of, media, read) -> None:
    rows = [sample(0, ("video", media["pictures"]))]
    data = {"source_fps": 4.0, "fps": 1.0, "frames": 8, "max_decode_s": 7.0}
    settings = settings_of(rows, rows, data=data, trainable=NO_SOUND)
    train(settings)
    assert len(read) == 3  # a step, the loss, the answer
    assert read[0] == read[1] == read[2]
    assert read[0][-1] == (0.0, 1.0, 2.0, 3.0) and read[0][3].max_decode_s == 7.0


def test_scores_see_as_many_frames_as_fit_in_training(settings_of, media, read) -> None:
    rows = [
        sample(0, ("video", media["long"])),
        sample(1, ("video", media["silent"])),
    ]
    data = {"frames": 12, "max_length": 110, "too_long": "trim"}
    settings = settings_of(rows, rows, data=data, batch={"max_tokens": 110})
    trainer, prepared = trainer_of(settings)
    for row in range(2):
        prepared.dataset[row]
    trained, read[:] = sorted(read), []
    trainer.evaluate()
    assert len({len(r[-1]) for r in trained}) == 2 and max(len(r[-1]) for r in trained) < 12
    assert sorted(read) == sorted([*trained, *trained])


def evaluations(settings) -> list[dict]:
    """The rows of a log that evaluation wrote; the run took all its steps."""
    folder = Path(settings.output)
    assert len(losses(folder)) == settings.training["max_steps"]
    lines = (folder / "train_log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "eval_loss" in r]


@pytest.mark.parametrize("scorer", ["os.path:exists", "os.path:join"])
def test_a_function_that_is_no_scorer_is_named(settings_of, scorer) -> None:
    settings = settings_of([sample(0)], evaluation={"samples": 1, "scorer": scorer})
    with pytest.raises(UsageError, match=f"scorer={scorer} failed on the answer .*: .*Error: "):
        trainer_of(settings)[0].evaluate()
