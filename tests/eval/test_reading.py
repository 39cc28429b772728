"""Yes and no, spans of time, short texts, open numbers, subtitles: what is read, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import DataError
from av_llava_eval import subtitles
from av_llava_eval.reading import open_mmmu, short_text, spans, verdicts, yes_no


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("yes", "yes"),
        ("Yes.", "yes"),
        ("NO", "no"),
        ("No, it does not.", "no"),
        ("**Yes**", "yes"),
        ("<think>no</think>Yes", "yes"),
        ("The answer is no.", "no"),
        ("Answer: Yes", "yes"),
        ("The dog barks, so yes", "yes"),
        ("I think no.", "no"),
        ("Nothing moves", None),
        ("not sure", None),
        ("No-one is there", None),
        ("yes or no", None),
        ("It could be yes, it could be no", None),
        ("There is no car", None),
        ("", None),
        ("now", None),
        ("yesterday", None),
    ],
)
def test_yes_and_no(said: str, word: str | None) -> None:
    assert yes_no.read(said).extracted == word


def test_the_beginning_decides_in_lmms_eval() -> None:
    assert yes_no.lmms("Nothing moves").extracted == "no"
    assert yes_no.lmms("The answer is yes").how == "judge"


@pytest.mark.parametrize(
    ("said", "span"),
    [
        ("The event happens in 24.3 - 30.4 seconds.", [24.3, 30.4]),
        ("24.3-30.4", [24.3, 30.4]),
        ("24.3s – 30.4s", [24.3, 30.4]),
        ("from 3 to 9", [3.0, 9.0]),
        ("From 3 seconds until 9 seconds", [3.0, 9.0]),
        ("between 2.5 and 4 s", [2.5, 4.0]),
        ("The start time is 2.1 seconds and the end time is 8.1 seconds.", [2.1, 8.1]),
        ("Start time: 0.0 seconds\nEnd time: 3.0 seconds", [0.0, 3.0]),
        ("starts at 00:00:18 and ends at 00:01:23", [18.0, 83.0]),
        ("0:27 - 1:34", [27.0, 94.0]),
        ("9 - 3", [3.0, 9.0]),
        ("<answer>12.54 to 17.83</answer>", [12.54, 17.83]),
        ("<think>2 to 4</think> 5 to 6", [5.0, 6.0]),
        ("It starts at 1.4", None),
        ("happens in 0.0 - 1.0 and 1.4 - 6.4", None),
        ("3 - 3", None),
        ("I do not know.", None),
        ("", None),
        ("At 1, 2 and 3", None),
    ],
)
def test_spans_of_seconds(said: str, span: list[float] | None) -> None:
    assert spans.read(said).extracted == span


@given(st.floats(0, 5000), st.floats(0, 5000), st.floats(0, 5000), st.floats(0, 5000))
def test_overlap_against_counting_milliseconds(a: float, b: float, c: float, d: float) -> None:
    first, second = sorted((int(a), int(b))), sorted((int(c), int(d)))
    both = set(range(*first)) & set(range(*second))
    either = max(first[1], second[1]) - min(first[0], second[0])
    expected = len(both) / either if either else 0.0
    assert spans.overlap(first, second) == pytest.approx(expected)
    assert spans.overlap(first, second) == spans.overlap(second, first)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("A Red  Kite.", "red kite"),
        ("the   answer", "answer"),
        ("2", "two"),
        ("12.5 metres", "12.5 metres"),
        ("11", "11"),
        ("it's", "it s"),
        ("well-known", "well-known"),
        ("-5!", "five"),
    ],
)
def test_normal_forms(text: str, form: str) -> None:
    assert short_text.normal(text) == form


def test_short_answers() -> None:
    assert short_text.read("The answer is: a red kite.").extracted == "red kite"
    assert short_text.read("<think>x</think>").how == "empty"
    assert short_text.exact("red kite", ["Red kite!", "bird"]) == 1.0
    assert short_text.exact("red kites", ["Red kite!"]) == 0.0
    assert short_text.contains("It is a red kite in the sky", ["red kite"]) == 1.0
    assert short_text.contains("It is hired", ["red"]) == 0.0
    assert short_text.contains("anything", [""]) == 0.0
    assert short_text.word_f1("a red kite", ["red bird"]) == pytest.approx(0.5)
    assert short_text.word_f1("red", ["blue", "red"]) == 1.0
    assert short_text.word_f1("", ["blue"]) == 0.0


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("violin", "violin"),
        ("The answer is right.", "right"),
        ("It is an acoustic guitar", "acoustic_guitar"),
        ("2", "two"),
        ("more than ten", "more than ten"),
        ("left and right", None),
        ("the harp", None),
        ("", None),
    ],
)
def test_answers_of_a_closed_vocabulary(said: str, found: str | None) -> None:
    known = ("violin", "left", "right", "two", "ten", "more than ten", "acoustic_guitar")
    assert short_text.one_of(said, known).extracted == found


@pytest.mark.parametrize(
    ("said", "expected", "score"),
    [
        ("Therefore, the final value is 3,200.", "3200", 1.0),
        ("x = 12.50", "12.5", 1.0),
        ("about 12", "12.5", 0.0),
        ("The result is steel.", "Steel", 1.0),
        ("The result is iron.", "Steel", 0.0),
        ("so it is B", "b", 1.0),
        ("abc", "b", 0.0),
    ],
)
def test_open_answers_of_videommmu(said: str, expected: str, score: float) -> None:
    found = open_mmmu.read(said)
    assert found.extracted is not None
    assert open_mmmu.score(found.extracted, expected) == score


def test_an_empty_open_answer_is_unparsed_by_default_and_an_api_error_there() -> None:
    assert open_mmmu.read("").extracted is None
    assert open_mmmu.read("", "lmms").extracted == "API Error"


def test_a_judges_words_that_are_no_verdict() -> None:
    for said in ("", "yes", "{'pred': yes}", "{[1]}", "{'score': 'five', 'pred': 'no'}"):
        assert verdicts.yes_and_score(said) is None


SRT = """\ufeff1
00:00:01,000 --> 00:00:02,500
<font color="white" size=".72c">Hello</font>
there

2
00:00:03,000 --> 00:00:04,000

3
01:02:03,004 --> 01:02:04,000
<i>bye</i>
"""


def test_subrip_files(tmp_path: Path) -> None:
    file = tmp_path / "a.srt"
    for text in (SRT, SRT.replace("\n", "\r\n")):
        file.write_bytes(text.encode())
        lines = subtitles.read_srt(file)
        assert [x.text for x in lines] == ["Hello there", "", "bye"]
        assert [(x.start_s, x.end_s) for x in lines] == [(1, 2.5), (3, 4), (3723.004, 3724)]
    file.write_text("")
    assert subtitles.read_srt(file) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xff\xfe\x00", "cannot be read"),
        (b"1\n00:00:01 -> 00:00:02\nx\n", "holds no subtitles"),
        (b"1\n\n2\n00:00:xx,000 --> 00:00:02,000\nx\n", "line 4.*no span of time"),
    ],
)
def test_damaged_subrip_files_name_the_line(tmp_path: Path, text: bytes, said: str) -> None:
    file = tmp_path / "a.srt"
    file.write_bytes(text)
    with pytest.raises(DataError, match=f"a.srt.*{said}"):
        subtitles.read_srt(file)


def test_longvideobench_subtitles(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(
        '[{"start": "00:01:00.500", "end": "00:01:02.000", "line": "one"},'
        ' {"timestamp": [70.0, null], "text": "two"}]'
    )
    first, second = subtitles.read_longvideobench(file, 60.0, 90.0)
    assert (first.start_s, first.end_s, first.text) == (0.5, 2.0, "one")
    assert (second.start_s, second.end_s) == (10.0, 30.0)
    for damaged in ('[{"start": "1", "end": "2", "line": "x"}]', '[{"text": "x"}]', "[3]"):
        file.write_text(damaged)
        with pytest.raises(DataError, match=r"a.json\[0\] is no subtitle"):
            subtitles.read_longvideobench(file, 0.0, 10.0)
    file.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        subtitles.read_longvideobench(file, 0.0, 10.0)


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 5)), max_size=8),
    st.integers(1, 40),
)
def test_every_frame_stands_once_and_in_order_among_the_subtitles(
    spans_s: list[tuple[float, float]], duration: int
) -> None:
    lines = [subtitles.Line(a, a + d, f"line {i}") for i, (a, d) in enumerate(spans_s)]
    times = subtitles.frame_times(float(duration))
    rows = subtitles.interleave(lines, times).split("\n") if times or lines else []
    assert rows.count("<image>") == len(times)
    assert [r for r in rows if r != "<image>" and r] == [
        x.text for x in subtitles.seen_lines(lines, times)
    ]


@given(st.integers(1, 400), st.sampled_from([-1, 1, 2, 8, 32, 120]))
def test_sampled_frames_are_numpys(n_frames: int, frame_num: int) -> None:
    """A line per frame: the lines that are shown are the frames of numpy.linspace."""
    import numpy as np

    lines = [subtitles.Line(float(f), f + 1.0, str(f), str(f)) for f in range(n_frames)]
    shown = subtitles.lmms_plain_lines(lines, 1.0, n_frames, frame_num).split("\n")
    count = n_frames if frame_num == -1 else frame_num
    wanted = sorted(set(np.linspace(0, n_frames - 1, count, dtype=int).tolist()))
    assert [int(x) for x in shown] == wanted
