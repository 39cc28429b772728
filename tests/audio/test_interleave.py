from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.aggregators import build
from av_llava.audio.placement import AudioPlan, Piece, interleave, place, plan_audio
from av_llava.errors import UsageError
from av_llava.geometry import whisper_geometry
from av_llava.settings import AudioSettings

TINY = whisper_geometry(50)
INTERLEAVE = AudioSettings(placement="interleave")


class Rows(NamedTuple):
    t_start: float | None
    lo: int
    hi: int
    timed: bool = True
    stream: str = "single"


def frames(times: list[float], size: int = 4, timed: bool = True, first: int = 0) -> list[Rows]:
    return [Rows(t, first + i * size, first + (i + 1) * size, timed) for i, t in enumerate(times)]


def sound(seconds: float, start_s: float = 0.0, settings: AudioSettings = INTERLEAVE) -> AudioPlan:
    return plan_audio(round(seconds * 16000), settings, TINY, start_s)  # 5 tokens a second


def letters(pieces: list[Piece]) -> str:
    return " ".join(f"{p.kind[0]}{p.lo}-{p.hi}" for p in pieces)


def test_each_frame_is_followed_by_its_sound() -> None:
    order = interleave(frames([0.0, 1.0, 2.0]), sound(3), INTERLEAVE)
    assert letters(order) == "v0-4 a0-5 v4-8 a5-10 v8-12 a10-15"


def test_sound_before_the_first_frame_goes_first_and_the_rest_last() -> None:
    order = interleave(frames([1.0, 2.0]), sound(5), INTERLEAVE)
    assert letters(order) == "a0-5 v0-4 a5-10 v4-8 a10-25"


def test_sound_that_starts_late_or_stops_early() -> None:
    assert letters(interleave(frames([0, 1, 2, 3.0]), sound(1, 2.0), INTERLEAVE)) == (
        "v0-12 a0-5 v12-16"
    )
    assert letters(interleave(frames([0, 1, 2, 3.0]), sound(1, 9.0), INTERLEAVE)) == "v0-16 a0-5"
    assert letters(interleave(frames([0, 1, 2, 3.0]), sound(1, -9.0), INTERLEAVE)) == "a0-5 v0-16"


def test_uneven_frames() -> None:
    order = interleave(frames([0.0, 0.1, 0.35, 2.0]), sound(2.4), INTERLEAVE)
    # Token middles are 0.1, 0.3, 0.5, …; one at a frame's own time belongs to that frame.
    assert letters(order) == "v0-8 a0-2 v8-12 a2-10 v12-16 a10-12"


def test_groups_of_two_seconds() -> None:
    settings = INTERLEAVE.replace(group_seconds=2.0)
    order = interleave(frames([0.0, 1.0, 2.0, 3.0, 7.0]), sound(9), settings)
    assert letters(order) == "v0-8 a0-10 v8-16 a10-30 v16-20 a30-45"
    order = interleave(frames([2.5, 3.5]), sound(5), settings)
    assert letters(order) == "a0-10 v0-8 a10-25"


def test_two_blocks_put_the_sound_with_the_fast_one() -> None:
    slow, fast = frames([0.0, 2.0], 9, timed=False), frames([0.0, 1.0, 2.0], 2, first=18)
    order = interleave([*slow, *fast], sound(3), INTERLEAVE)
    assert letters(order) == "v0-20 a0-5 v20-22 a5-10 v22-24 a10-15"
    late = [*slow, *frames([1.0, 2.0], 2, first=18)]
    assert (
        letters(interleave(late, sound(3), INTERLEAVE)) == "v0-18 a0-5 v18-20 a5-10 v20-22 a10-15"
    )


def test_fast_block_first() -> None:
    fast = frames([0.0, 1.0], 2)
    slow = frames([0.0], 9, timed=False, first=4)
    assert letters(interleave([*fast, *slow], sound(3), INTERLEAVE)) == "v0-2 a0-5 v2-4 a5-15 v4-13"


def test_two_streams_frame_by_frame() -> None:
    spans = [Rows(0.0, 0, 9), Rows(0.0, 9, 11), Rows(1.0, 11, 20), Rows(1.0, 20, 22)]
    assert letters(interleave(spans, sound(2), INTERLEAVE)) == "v0-11 a0-5 v11-22 a5-10"


def test_the_newline_of_the_video_stays_with_its_last_frame() -> None:
    spans = [*frames([0.0, 1.0]), Rows(None, 8, 9, timed=False, stream="mark")]
    assert letters(interleave(spans, sound(2), INTERLEAVE)) == "v0-4 a0-5 v4-9 a5-10"


def test_learned_marks_of_the_sound_stand_first_and_last() -> None:
    settings = INTERLEAVE.replace(token_mode="param", chunk_newline=True)
    plan = sound(2, settings=settings)  # begin, 5 + newline, 5 + newline, end
    order = interleave(frames([0.0, 1.0]), plan, settings)
    assert letters(order) == "v0-4 a0-7 v4-8 a7-14"


def test_block_and_media_without_rows() -> None:
    plan = sound(2)
    assert letters(place(frames([0.0, 1.0]), plan, AudioSettings())) == "v0-8 a0-10"
    assert letters(place(frames([0.0, 1.0]), plan, INTERLEAVE)) == "v0-4 a0-5 v4-8 a5-10"
    assert letters(place([], plan, AudioSettings())) == "a0-10"
    assert letters(place([], plan, INTERLEAVE)) == "a0-10"
    untimed = frames([0.0], timed=False)
    assert letters(interleave(untimed, plan, INTERLEAVE)) == "v0-4 a0-10"


def test_wrong_spans_are_named() -> None:
    with pytest.raises(UsageError, match="times of the video's tokens go back"):
        interleave(frames([1.0, 0.5]), sound(1), INTERLEAVE)
    with pytest.raises(UsageError, match="rows 5 to 9 come where row 4 was expected"):
        interleave([Rows(0.0, 0, 4), Rows(1.0, 5, 9)], sound(1), INTERLEAVE)
    for time in (None, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"time of every frame.*block"):
            interleave([Rows(time, 0, 4)], sound(1), INTERLEAVE)


@st.composite
def videos(draw: st.DrawFn) -> list[Rows]:
    """One stream, or two blocks, with rows of any number and times in order."""
    spans: list[Rows] = []
    layout = draw(st.sampled_from(["single", "slow_then_fast", "fast_then_slow"]))
    blocks = {"single": [True], "slow_then_fast": [False, True], "fast_then_slow": [True, False]}
    for timed in blocks[layout]:
        for time in sorted(draw(st.lists(st.floats(-5, 30), max_size=12))):
            lo = spans[-1].hi if spans else 0
            spans.append(Rows(time, lo, lo + draw(st.integers(0, 5)), timed))
    if draw(st.booleans()):
        lo = spans[-1].hi if spans else 0
        spans.append(Rows(None, lo, lo + 1, timed=False, stream="mark"))
    return spans


@given(
    spans=videos(),
    seconds=st.floats(0.01, 25),
    start=st.floats(-5, 20),
    group=st.sampled_from([None, 0.5, 2.0, 7.3]),
    marks=st.booleans(),
)
def test_every_row_once_in_order_of_time(
    spans: list[Rows], seconds: float, start: float, group: float | None, marks: bool
) -> None:
    settings = INTERLEAVE.replace(
        group_seconds=group, chunk_newline=marks, token_mode="param" if marks else "tokens"
    )
    plan = sound(seconds, start, settings)
    order = interleave(spans, plan, settings)
    flat = [(piece.kind, row) for piece in order for row in range(piece.lo, piece.hi)]
    assert flat == oracle(spans, plan, group)
    assert all(a.kind != b.kind and a.lo < a.hi for a, b in itertools.pairwise(order))


def oracle(spans: list[Rows], plan: AudioPlan, group: float | None) -> list[tuple[str, int]]:
    """Give every sound its frame, then write all frames down with their sounds."""
    timed = [i for i, span in enumerate(spans) if span.timed]
    begins = {i: spans[i].t_start for i in timed}
    if group is not None:
        begins = {i: math.floor(t / group) * group for i, t in begins.items()}
    sounds: dict[int | None, list[int]] = {}
    for row, centre in enumerate(plan.centres_s):
        begun = [i for i in timed if begins[i] <= centre]
        sounds.setdefault(begun[-1] if begun else None, []).append(row)
    body = [span for span in spans if span.stream != "mark"]
    mark = [("video", row) for span in spans[len(body) :] for row in range(span.lo, span.hi)]
    out: list[tuple[str, int]] = [] if body else mark
    for i, span in enumerate(body):
        if timed and i == timed[0]:
            out += [("audio", row) for row in sounds.get(None, [])]
        out += [("video", row) for row in range(span.lo, span.hi)]
        out += mark if i == len(body) - 1 else []
        out += [("audio", row) for row in sounds.get(i, [])]
    if not timed:
        out += [("audio", row) for row in sounds.get(None, [])]
    return out


@pytest.mark.parametrize(
    "preset", ["llava_video_slowfast", "sf_llava", "llava_onevision", "pllava"]
)
def test_plans_of_aggregators_are_taken_as_they_are(preset: str) -> None:
    plan = build(preset).plan(6, 24, 24, tuple(float(i) for i in range(6)))
    spans = plan.spans()
    order = interleave(spans, sound(6), INTERLEAVE)
    rows = [row for p in order for row in range(p.lo, p.hi) if p.kind == "video"]
    assert rows == list(range(plan.n_tokens))
    starts = sorted({span.t_start for span in spans if span.timed})
    counts = [p.hi - p.lo for p in order if p.kind == "audio"]
    assert counts == [5 * round(b - a) for a, b in itertools.pairwise([*starts, 6.0])]
    assert order[0].kind == "video" and order[-1].kind == "audio"
