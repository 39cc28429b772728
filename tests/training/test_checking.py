"""``--check``: evaluation is tried out, too, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from train_runs import recipe
from training_data import make_media, sample

from av_llava.errors import DataError, UsageError
from av_llava.training.checking import check_run
from av_llava.training.prepare import Hooks


@pytest.fixture
def checked(place: Path, tmp_path: Path):
    """What checking a run finds that is measured on some samples."""

    def check(held_out, **changes):
        file = tmp_path / "held_out.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in held_out))
        data = {"eval": str(file), **changes.pop("data", {})}
        training = {"eval_strategy": "steps", "eval_steps": 50, **changes.pop("training", {})}
        settings = recipe(
            place / "base", place / "data.jsonl", tmp_path / "out",
            data=data, training=training, **changes,
        )  # fmt: skip
        said: list[str] = []
        figures = check_run(settings, Hooks(say=said.append))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["held_out.jsonl"]
        return figures, said

    return check


def test_evaluation_is_tried_out_on_a_few_samples(checked, place: Path, monkeypatch) -> None:
    media = make_media(place / "media")
    rows = [sample(i, question="Why? " * i).to_row() for i in range(1, 5)]
    rows += [sample("film", ("video", media["film"])).to_row()]
    rows += [sample("gone", ("image", "gone.png")).to_row()]
    asked: list[str] = []
    monkeypatch.setattr(
        "av_llava.training.evaluation.exact", lambda *words: asked.append(words) or 1.0
    )
    figures, said = checked(
        rows,
        data={"bad_media": {"quarantine": str(place / "quarantine.jsonl")}},
        evaluation={"max_new_tokens": 2, "scorer": "av_llava.training.evaluation:exact"},
    )
    assert len(asked) == 1
    found = figures["evaluation"]
    assert found["eval_score"] == 1 and np.isfinite(found["eval_loss"])
    assert {"eval_loss/text", "eval_loss/video+audio"} < found.keys()
    assert found["eval_bad_media"] == 1 and figures["evaluation_seconds"] > 0
    (line,) = [s for s in said if "held-out" in s]
    assert "2 of the 5" in line
    assert not (place / "quarantine.jsonl").exists()


@pytest.mark.parametrize("samples", [0, 3])
def test_checking_without_answers_or_loss(checked, samples: int) -> None:
    evaluation = {"samples": samples, "loss": not samples, "max_new_tokens": 2}
    figures, _ = checked([sample(0).to_row()], evaluation=evaluation)
    assert ("eval_loss" in figures["evaluation"]) == (not samples)
    assert ("eval_score" in figures["evaluation"]) == bool(samples)


def test_nothing_is_measured_where_no_evaluation_is_asked_for(checked) -> None:
    figures, said = checked([sample(0).to_row()], training={"eval_strategy": "no"})
    assert "evaluation" not in figures and not [s for s in said if "held-out" in s]


def test_an_evaluation_that_cannot_work_is_seen(checked) -> None:
    with pytest.raises(UsageError, match="scorer=operator:neg failed"):
        checked([sample(0).to_row()], evaluation={"scorer": "operator:neg", "max_new_tokens": 2})
    row = {"id": "x", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                        {"from": "gpt", "value": "A."}]}  # fmt: skip
    with pytest.raises(DataError, match=r"line 1: .*<image>"):
        checked([row])
