"""The way out of av_llava: converters by name, what they take, and what they report.

Contract: importing this module costs no torch. A converter is called with source, destination and
:class:`ConvertOptions` and returns a :class:`Report`; it never changes the source, and the
destination appears whole or not at all. Whatever it cannot map raises
:class:`~av_llava.errors.CheckpointError` (with ``dry_run`` it stands in the report).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from av_llava.errors import CheckpointError, UsageError, unknown_name

SHARD_BYTES = 5_000_000_000
TOLERANCE = 1e-4
"""Largest difference of logits in float32."""

_SHOWN = 12


@dataclass(frozen=True)
class Option:
    """An option that one converter has beside the common ones."""

    kind: type
    """bool, str, float or Path."""
    default: Any
    help: str
    """One sentence, for ``--help``."""


@dataclass(frozen=True)
class ConvertOptions:
    """How a conversion is done."""

    dry_run: bool = False
    """Report what would be done, and write nothing."""
    verify: bool = False
    """Compare the logits of both sides on a fixed input before the destination appears."""
    tolerance: float = TOLERANCE
    """Largest difference of logits that ``verify`` accepts."""
    shard_bytes: int = SHARD_BYTES
    """Bound of the data in one file of weights."""
    dtype: str | None = None
    """Type to convert floating-point weights to; None keeps each tensor's own."""
    progress: Callable[[int, int], None] | None = None
    """Called with the bytes that are written and those of the whole."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The converter's own options."""


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do."""

    converter: str
    source: str
    destination: str | None
    mapped: int = 0
    """Tensors that go from the source into the destination."""
    missing: tuple[str, ...] = ()
    """Tensors that the destination needs and the source lacks."""
    unexpected: tuple[str, ...] = ()
    """Tensors of the source that nothing explains."""
    mismatched: tuple[str, ...] = ()
    """Tensors of another shape than the configuration says, with both."""
    reshaped: tuple[str, ...] = ()
    """Tensors to which rows are added or from which they are cut, with both shapes."""
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors that are left out, by the reason."""
    files: tuple[str, ...] = ()
    """Names of the files that were written."""
    n_bytes: int = 0
    """Size of the tensors in the destination."""
    notes: tuple[str, ...] = ()
    """What a user should know, in sentences."""
    difference: float | None = None
    """Largest difference of logits (or of tensors) between the sides; None if not compared."""
    dry_run: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        """What stands in the way, one line a kind."""
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of a wrong shape": self.mismatched,
        }
        return tuple(f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in kinds.items() if keys)

    def check(self) -> Report:
        """Return this report, or raise when a key is unexplained.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of a wrong shape.
        """
        if self.problems:
            raise CheckpointError(
                f"{self.source} cannot be converted ({self.converter}): {'. '.join(self.problems)}."
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self)


def listed(keys: tuple[str, ...], shown: int = _SHOWN) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more


@dataclass(frozen=True)
class Converter:
    """A converter whose module is imported when it is called."""

    summary: str
    """One sentence."""
    where: str
    """``module:function``; called with source, destination and options."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """Its own options."""
    needs_destination: bool = True
    """Whether there must be a destination."""

    def __call__(
        self, source: str | Path, destination: str | Path | None, options: ConvertOptions
    ) -> Report:
        """Convert."""
        module, name = self.where.split(":")
        function = getattr(importlib.import_module(module), name)
        report: Report = function(source, destination, options)
        return report


_UPGRADE = Converter(
    "bring an old config.json of the LLaVA family up to date, with the weights as safetensors",
    "av_llava.checkpoints.upgrade:upgrade",
    {
        "in_place": Option(
            bool, False, "Change config.json where it is; the old one is kept beside it."
        )
    },
    needs_destination=False,
)

CONVERTERS: dict[str, Converter] = {
    "llava": Converter(
        "any checkpoint that loads, as one self-contained folder in LLaVA's tensor names",
        "av_llava.checkpoints.llava_export:to_llava",
    ),
    "hf": Converter(
        "to transformers' own classes: llava, llava_next, llava_next_video, llava_onevision",
        "av_llava.checkpoints.hf_export:to_hf",
        {
            "model_class": Option(
                str,
                "auto",
                "Model type to make; llava and llava_next take still images only.",
            ),
            "drop_audio": Option(
                bool, False, "Leave the audio tower and its projector out instead of refusing."
            ),
        },
    ),
    "text-only": Converter(
        "the language model alone, as a plain checkpoint of transformers",
        "av_llava.checkpoints.text_only:to_text_only",
    ),
    "surgery": Converter(
        "take projector and tower out into files of their own, or put them back",
        "av_llava.checkpoints.surgery:operate",
        {
            "parts": Option(str, "all", "What to take out: all, projector or tower."),
            "put_back": Option(
                Path, None, "Folder or file with parts to put into a copy of the checkpoint."
            ),
        },
    ),
    "gguf": Converter(
        "two files for llama.cpp: the language model, and the projector with its tower (mmproj)",
        "av_llava.checkpoints.gguf:to_gguf",
        {
            "type": Option(str, "f16", "Type of the matrices: f32, f16 or q8_0."),
            "parts": Option(str, "all", "What to write: all, text or mmproj."),
            "class_token": Option(
                str, "first", "Place of CLIP's class token: first, or last where llama.cpp has it."
            ),
        },
    ),
    "upgrade": _UPGRADE,
    "consolidate": _UPGRADE,
    "merge-lora": Converter(
        "an adapter, a LoRA or a projector put onto its base, as one whole checkpoint",
        "av_llava.checkpoints.merge:merge_lora",
        {"base": Option(str, None, "Folder or hub id of the base, if SOURCE does not name it.")},
    ),
    "apply-delta": Converter(
        "the checkpoint that a delta (SOURCE) makes of its base, by LLaVA's arithmetic",
        "av_llava.checkpoints.delta:apply",
        {"base": Option(str, None, "Folder or hub id of the language model below.")},
    ),
    "make-delta": Converter(
        "the difference of a LLaVA checkpoint (SOURCE) from its language model",
        "av_llava.checkpoints.delta:make",
        {"base": Option(str, None, "Folder or hub id of the language model below.")},
    ),
}
"""Converters by name; add your own. The command line offers what stands here."""


def convert(
    name: str,
    source: str | Path,
    destination: str | Path | None = None,
    *,
    dry_run: bool = False,
    verify: bool = False,
    tolerance: float = TOLERANCE,
    shard_size: str | int = SHARD_BYTES,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **extra: Any,
) -> Report:
    """Convert a checkpoint.

    Args:
        name: key of ``CONVERTERS``.
        source: folder or hub id; only read.
        destination: what to make; must not exist.
        dry_run: report what would be done, and write nothing.
        verify: compare both sides before the destination appears.
        tolerance: largest difference that ``verify`` accepts.
        shard_size: bound of one file of weights: a number of bytes, or text like ``"5GB"``.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own type.
        progress: called with bytes written and bytes in all.
        extra: the converter's own options.

    Raises:
        UsageError: unknown converter or option.
        CheckpointError: the source cannot be read or expressed, the destination not be written,
            or the sides differ.
    """
    if name not in CONVERTERS:
        raise unknown_name("converter", name, CONVERTERS)
    converter = CONVERTERS[name]
    for key in extra:
        if key not in converter.options:
            raise unknown_name(f"option of {name}", key, converter.options)
    if destination is None and converter.needs_destination:
        raise UsageError(f"The converter {name} needs a destination.")
    options = ConvertOptions(
        dry_run=dry_run,
        verify=verify,
        tolerance=tolerance,
        shard_bytes=parse_size(shard_size),
        dtype=None if dtype in (None, "auto") else dtype,
        progress=progress,
        extra={k: o.default for k, o in converter.options.items()} | extra,
    )
    return replace(converter(source, destination, options), converter=name)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str | int) -> int:
    """Read a size in bytes: ``5GB``, ``500MB``, ``2GiB``, or a number.

    Raises:
        UsageError: it is none of these, or not above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", str(text).strip().lower())
    n_bytes = int(float(match[1]) * {**_UNITS, **_BINARY}[match[2]]) if match else 0
    if n_bytes < 1:
        raise UsageError(f"{text!r} is not a size; write 5GB, 500MB, 2GiB or a number of bytes.")
    return n_bytes
