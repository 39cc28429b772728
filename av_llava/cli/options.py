"""The flags that commands share, and what they mean to the library.

Contract: everything that can be wrong about a flag is said here, before torch is imported. A
flag that was not given stays None, which leaves the model's own setting.
"""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from av_llava.errors import MissingExtraError, UsageError, unknown_name
from av_llava.settings import SamplingSettings

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
ATTENTION = {
    "auto": None,
    "sdpa": "sdpa",
    "eager": "eager",
    "flash": "flash_attention_2",
    "flash_attention_2": "flash_attention_2",
}
SCHEMES = {  # each with its package and the extra that installs it
    "4bit": ("bitsandbytes", "quant"),
    "8bit": ("bitsandbytes", "quant"),
    "int8": ("torchao", "torchao"),
}
DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")


def usage(*pieces: str) -> type[TyperCommand]:
    """Make a kind of command whose usage line ends in these words."""

    class Command(TyperCommand):
        def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
            return ["[OPTIONS]", *pieces]

    return Command


def parse_time(text: str | float) -> float:
    """Read a time: seconds, mm:ss or hh:mm:ss, the last with a fraction.

    Raises:
        typer.BadParameter: it is none of these.
    """
    pattern = r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?|\.\d+)"
    match = re.fullmatch(pattern, str(text).strip(), re.ASCII)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time; write 83.5, 1:23.5 or 0:01:23.5.")
    hours, minutes, seconds = match.groups()
    if minutes is not None and float(seconds) >= 60:
        raise typer.BadParameter(f"{text!r} has {seconds} seconds in a minute.")
    if hours is not None and int(minutes) >= 60:
        raise typer.BadParameter(f"{text!r} has {minutes} minutes in an hour.")
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(seconds)


Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="PATH|ID",
        envvar="AV_LLAVA_MODEL",
        help="Folder or hub id of the model. The default is av-llava-tiny, which knows only the "
        "synthetic world of docs/tiny.md.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="NAME", help="Type of the weights: auto, float32, bfloat16 or float16."
    ),
]
Attn = Annotated[
    str,
    typer.Option(
        "--attn", metavar="NAME", help="Attention: auto, sdpa, eager or flash_attention_2."
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="SCHEME",
        help="Keep the language model's layers in 4bit or 8bit (bitsandbytes) or int8 (torchao).",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="PATH|ID",
        help="What an adapter, a LoRA or a projector stands on, where its folder does not say.",
    ),
]
Frames = Annotated[
    int | None,
    typer.Option(
        "--frames", min=1, metavar="N", help="At most so many frames of each video, evenly spaced."
    ),
]
Fps = Annotated[
    float | None,
    typer.Option(
        "--fps", metavar="RATE", help="Frames per second to look at, up to --frames of them."
    ),
]
SourceFps = Annotated[
    float | None,
    typer.Option(
        "--source-fps",
        metavar="RATE",
        help="Frame rate of a folder of frame images; 1 if not given.",
    ),
]
Start = Annotated[
    float | None,
    typer.Option(
        "--start", parser=parse_time, metavar="TIME", help="Begin here: seconds, mm:ss or hh:mm:ss."
    ),
]
End = Annotated[
    float | None,
    typer.Option("--end", parser=parse_time, metavar="TIME", help="End here, written likewise."),
]
Audio = Annotated[
    str,
    typer.Option(
        "--audio",
        metavar="auto|on|off|FILE",
        help="Sound of videos: auto uses it if there is some, on insists, off leaves it out, and "
        "a file stands in for it.",
    ),
]
Aggregator = Annotated[
    str | None,
    typer.Option(
        "--aggregator",
        metavar="SPEC",
        help="How frames become tokens, such as llava_video, llava_video_slowfast or budget:2048.",
    ),
]
MaxVisualTokens = Annotated[
    int | None,
    typer.Option(
        "--max-visual-tokens",
        min=1,
        metavar="N",
        help="At most so many tokens for each video; the same as --aggregator budget:N.",
    ),
]
TimeInstruction = Annotated[
    bool | None,
    typer.Option(
        "--time-instruction/--no-time-instruction",
        help="Tell the model duration and frame times in words, or do not.",
        show_default=False,
    ),
]
Backend = Annotated[
    str | None,
    typer.Option("--backend", metavar="NAME", help="Video decoder: auto, pyav or decord."),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, metavar="N", help="Longest answer, in tokens.")
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        min=0.0,
        metavar="X",
        help="0 takes the likeliest token; above 0, tokens are drawn at random.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="Draw only from the likeliest tokens that hold this share of the probability.",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of the drawing.")]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System prompt of the conversation.")
]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="Nothing on stderr but warnings and errors.")
]
Verbose = Annotated[
    int,
    typer.Option(
        "-v",
        "--verbose",
        count=True,
        show_default=False,
        metavar="",
        help="Say what is done; -vv lets every library speak.",
    ),
]


def _flag(name: str) -> str:
    return name.removesuffix("_s").replace("_", "-")


ABOUT_MEDIA = (
    "frames",
    "fps",
    "source_fps",
    "start_s",
    "end_s",
    "audio",
    "time_instruction",
    "backend",
    "aggregator",
    "max_visual_tokens",
)
"""Fields of :class:`Request` that mean nothing without media."""


@dataclass(frozen=True)
class Request:
    """How media are read and how an answer is made: the options of ``av_llava.inference``."""

    frames: int | None = None
    fps: float | None = None
    source_fps: float | None = None
    start_s: float | None = None
    end_s: float | None = None
    audio: str = "auto"
    time_instruction: bool | None = None
    backend: str | None = None
    aggregator: str | None = None
    max_visual_tokens: int | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    system: str | None = None

    def given(self) -> dict[str, Any]:
        """Those that differ from the defaults, as keywords of the library."""
        defaults = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if v != defaults[k]}

    def check(self, has_media: bool) -> None:
        """Say what is wrong with these values, without opening anything.

        Args:
            has_media: whether there is anything to look at or listen to.

        Raises:
            UsageError: values that are out of range or do not go together.
        """
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{_flag(name)} must be a number, not {value}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, not {self.top_p:g}.")
        if self.top_p is not None and self.temperature == 0:
            raise UsageError("--top-p has no effect at --temperature 0; raise the temperature.")
        if None not in (self.start_s, self.end_s) and not self.end_s > self.start_s:  # type: ignore[operator]
            raise UsageError(
                f"--end ({self.end_s:g} s) must be later than --start ({self.start_s:g} s)."
            )
        if self.aggregator is not None and self.max_visual_tokens is not None:
            raise UsageError("Give --aggregator or --max-visual-tokens, not both.")
        SamplingSettings(
            frames=self.frames,
            fps=self.fps,
            source_fps=self.source_fps,
            backend=self.backend or "auto",
        )
        if self.aggregator is not None:
            from av_llava.aggregators import build

            build(self.aggregator)
        if not has_media:
            self._check_text_only()

    def _check_text_only(self) -> None:
        for name in self.given():
            if name in ABOUT_MEDIA:
                raise UsageError(
                    f"--{_flag(name)} needs a video, a sound or a picture before the prompt."
                )


@dataclass(frozen=True)
class Loading:
    """Which model, where, and in which numbers."""

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    attn: str = "auto"
    quantize: str | None = None
    base: str | None = None

    def check(self) -> None:
        """Say what is wrong with these names, before anything is loaded.

        Raises:
            UsageError: an unknown device, dtype, attention or scheme, or one without a model.
            MissingExtraError: the package of a scheme is not installed.
        """
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise unknown_name("device", self.device, DEVICES)
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        if self.attn not in ATTENTION:
            raise unknown_name("attention", self.attn, ATTENTION)
        for flag, value in (("--quantize", self.quantize), ("--base", self.base)):
            if value is not None and self.model is None:
                raise UsageError(f"{flag} goes with --model; the built-in model takes none.")
        if self.quantize is not None:
            _check_scheme(self.quantize)


def _check_scheme(name: str) -> None:
    """Whether a scheme is known and its package there, without importing it."""
    if name not in SCHEMES:
        raise unknown_name("quantization", name, SCHEMES)
    package, extra = SCHEMES[name]
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra, f"--quantize {name}")
