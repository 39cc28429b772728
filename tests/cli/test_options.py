"""Values of flags."""

from __future__ import annotations

import contextlib

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from av_llava.checkpoints import quantize
from av_llava.cli.options import ATTENTION, DTYPES, SCHEMES, Loading, Request, parse_time
from av_llava.errors import MissingExtraError, UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("83.5", 83.5),
        (".5", 0.5),
        ("1:23.5", 83.5),
        ("01:02:03", 3723.0),
        ("90", 90.0),
        ("100:00", 6000.0),
        ("0:0:0.25", 0.25),
    ],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "-1", "1:60", "1:60:00", "a", "1:2:3:4", "1,5", "nan", "inf", "1e3", "١", "5s"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_time(text)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_times_agree_with_their_parts(h: int, m: int, s: int, ms: int) -> None:
    assert parse_time(f"{h}:{m:02}:{s:02}.{ms:03}") == pytest.approx(
        h * 3600 + m * 60 + s + ms / 1e3
    )


@given(st.text())
def test_no_text_breaks_the_reading_of_times(text: str) -> None:
    with contextlib.suppress(typer.BadParameter):
        assert parse_time(text) >= 0


def test_only_what_was_given_reaches_the_library() -> None:
    assert Request().given() == {}
    assert Request(frames=8, audio="off").given() == {"frames": 8, "audio": "off"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 0.5}, "no effect"),
        ({"top_p": 0.0, "temperature": 1.0}, "--top-p"),
        ({"top_p": 1.5, "temperature": 1.0}, "--top-p"),
        ({"start_s": 5.0, "end_s": 5.0}, "--end"),
        ({"aggregator": "llava_video", "max_visual_tokens": 5}, "not both"),
        ({"aggregator": "llava_vido"}, "llava_video"),
        ({"fps": 0.0}, "fps"),
        ({"fps": float("inf")}, "--fps"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_p": float("nan"), "temperature": 1.0}, "--top-p"),
        ({"backend": "opencv"}, "pyav"),
    ],
)
def test_values_that_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request(**values).check(has_media=True)


@pytest.mark.parametrize(
    "values",
    [
        {"frames": 4},
        {"fps": 1.0},
        {"start_s": 1.0},
        {"audio": "off"},
        {"aggregator": "llava_video"},
        {"max_visual_tokens": 9},
        {"time_instruction": False},
        {"backend": "pyav"},
    ],
)
def test_options_of_media_need_media(values: dict) -> None:
    Request(**values).check(has_media=True)
    with pytest.raises(
        UsageError, match="--" + next(iter(values)).removesuffix("_s").split("_")[0]
    ):
        Request(**values).check(has_media=False)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3", "mps"])
def test_devices(device: str) -> None:
    Loading(device=device).check()


@pytest.mark.parametrize(
    "values",
    [
        {"device": "gpu"},
        {"device": "cuda:x"},
        {"dtype": "int8"},
        {"attn": "flash3"},
        {"model": "m", "quantize": "nf4"},
    ],
)
def test_unknown_names(values: dict) -> None:
    with pytest.raises(UsageError, match="Unknown"):
        Loading(**values).check()


def test_schemes_are_those_of_the_library() -> None:
    library = quantize.SCHEMES.items()
    assert {name: (s.package, s.extra) for name, s in library} == SCHEMES


def test_a_missing_package_comes_with_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for scheme, (package, extra) in SCHEMES.items():
        with pytest.raises(MissingExtraError) as caught:
            Loading("model", quantize=scheme).check()
        assert caught.value.exit_code == 6 and package in str(caught.value)
        assert f'pip install "av-llava[{extra}]"' in str(caught.value)


@pytest.mark.parametrize("values", [{"quantize": "4bit"}, {"base": "somewhere"}])
def test_what_needs_a_model(values: dict) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(values))} goes with --model"):
        Loading(**values).check()


def test_every_name_is_accepted() -> None:
    for dtype in DTYPES:
        Loading(dtype=dtype).check()
    for attn in ATTENTION:
        Loading(attn=attn).check()
