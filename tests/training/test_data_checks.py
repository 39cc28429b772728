"""What data are refused for before anything is trained on them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from train_runs import recipe
from training_data import ListStore, sample

from av_llava.errors import DataError
from av_llava.training.checking import check_run
from av_llava.training.data_checks import check_modalities
from av_llava.training.index import MODALITY_BITS, LengthIndex
from av_llava.training.prepare import Hooks
from av_llava.training.report import validate


def table(*trained):
    """A parts table of which these parts train."""
    return SimpleNamespace(of=lambda name: SimpleNamespace(n_trained=int(name in trained)))


def index(*kinds, errors=()):
    """An index of samples with these kinds of media; those in ``errors`` cannot be used."""
    codes = [MODALITY_BITS.get(kind, 0) for kind in kinds]
    lengths = np.ones(len(kinds), np.int32)
    reasons = {row: f"data.jsonl, line {row + 1}: There is no file 'x{row}'." for row in errors}
    return LengthIndex(lengths, lengths, np.array(codes, np.uint8), reasons)


def refused(parts, found):
    with pytest.raises(DataError) as error:
        check_modalities(table(*parts), found)
    return str(error.value)


def test_data_that_use_what_trains():
    check_modalities(table("mm_projector"), index("text", "video"))
    check_modalities(table("mm_projector"), index("text", "video", "video", errors=[2]))
    check_modalities(table(), index("text"))


def test_a_part_that_nothing_uses():
    said = refused(["mm_projector"], index("text", "audio", "text", errors=[2]))
    assert "none of the 3 samples has pictures or videos" in said and "freeze" in said
    said = refused(["mm_audio_projector"], index("text", "video"))
    assert "none of the 2 samples has sound" in said


def test_media_that_cannot_be_read_are_no_reason_to_freeze_anything():
    said = refused(["mm_projector"], index("text", "video", "image", errors=[1, 2]))
    assert said.startswith("2 of the 3 samples cannot be used")
    for word in ("line 2: There is no file 'x1'.", "trainable.mm_projector", "data.media_root",
                 "av-llava data validate --decode"):  # fmt: skip
        assert word in said
    assert "reeze" not in said


@pytest.mark.parametrize("parts", [["mm_projector"], ["language_model"]])
def test_no_sample_can_be_used(parts):
    said = refused(parts, index("video", "video", errors=[0, 1]))
    assert said.startswith("None of the 2 samples can be used") and "'x0'" in said
    assert "data.media_root" in said


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_an_answer_without_text_is_refused_alike(place, tmp_path, answer):
    rows = [sample(i, answer=answer if i == 2 else "A ball.") for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r.to_row()) + "\n" for r in rows))
    found = validate(ListStore(rows))
    assert found.problems == {"no answer": 1} and found.n_bad == 1
    settings = recipe(place / "base", tmp_path / "data.jsonl", tmp_path / "out")
    with pytest.raises(DataError, match=r"data.jsonl, line 3: ") as error:
        check_run(settings, Hooks())
    assert found.findings[0].text in str(error.value)
