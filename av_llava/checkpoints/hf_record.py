"""What a folder for transformers' LLaVA classes remembers of the model that it was made from.

Contract: transformers' classes cannot say everything that our configuration holds (how many frames
to sample, a prompt format, ids outside the vocabulary). Each such value stands under ``av_llava``
in the folder's ``config.json``, with what the folder itself says in its place, and survives
transformers' own loading and saving. On the way back it is taken up only where the folder still
says the same, so that changes made in between win. Loading such a folder directly heeds none of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from av_llava.aggregators import build
from av_llava.config import PARTS, AVLlavaConfig
from av_llava.errors import CheckpointError
from av_llava.settings import AggregatorSettings, Settings

KEY = "av_llava"
VOCABULARY = "text_config.vocab_size"
_IDS = ("image_token_id", "video_token_id", "audio_token_id")


def flattened(config: AVLlavaConfig) -> dict[str, Any]:
    """The configuration's own values by dotted name, JSON-ready.

    Of the networks only the size of the vocabulary is among them. An aggregator is one value.
    """
    out: dict[str, Any] = {name: getattr(config, name) for name in _IDS}
    out[VOCABULARY] = config.text_config.vocab_size
    out["aggregator"] = config.aggregator.to_dict()
    for part in PARTS:
        if part != "aggregator":
            settings: Settings = getattr(config, part)
            out |= {f"{part}.{name}": value for name, value in settings.to_dict().items()}
    return out


def differences(original: AVLlavaConfig, made: AVLlavaConfig) -> dict[str, list[Any]]:
    """Values that differ, as ``[original, made]``."""
    first, second = flattened(original), flattened(made)
    return {k: [v, second[k]] for k, v in first.items() if v != second[k]}


def of_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What an export changes about a tokenizer beside its tokens."""
    return {
        "chat_template": tokenizer.chat_template,
        "padding_side": tokenizer.init_kwargs.get("padding_side"),
    }


def record(
    found: Mapping[str, list[Any]], tokens: list[str], tokenizer: Mapping[str, Any]
) -> dict[str, Any]:
    """What to put into the config.json of a folder.

    Args:
        found: the differences.
        tokens: that were added to the tokenizer.
        tokenizer: as :func:`of_tokenizer` gave it before.
    """
    return {"settings": dict(found), "added_tokens": tokens, "tokenizer": dict(tokenizer)}


@dataclass(frozen=True)
class Restored:
    """A configuration as it was before the export."""

    config: AVLlavaConfig
    rows: int | None = None
    """Rows of embedding and head to keep; None keeps all."""
    tokens: tuple[str, ...] = ()
    """Tokens to take out of the tokenizer."""
    tokenizer: Mapping[str, Any] | None = None
    """What else the tokenizer was like; None when the folder remembers nothing."""
    notes: tuple[str, ...] = ()


def restore(config: AVLlavaConfig, data: Mapping[str, Any]) -> Restored:
    """Give a configuration back what its folder remembers.

    Args:
        config: as the folder says.
        data: the JSON data of its ``config.json``.

    Raises:
        CheckpointError: the record is broken.
    """
    kept = data.get(KEY)
    if not isinstance(kept, Mapping):
        return Restored(config)
    try:
        settings = {k: (v[0], v[1]) for k, v in kept["settings"].items()}
        tokens = tuple(str(t) for t in kept["added_tokens"])
        tokenizer = {k: kept["tokenizer"][k] for k in ("chat_template", "padding_side")}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"config.json: the entry {KEY!r} is broken: {error!r}.") from error
    now = flattened(config)
    changed = sorted(k for k, (_, made) in settings.items() if now.get(k) != made)
    back = {k: old for k, (old, _) in settings.items() if k not in changed}
    notes = [
        f"The folder was made by av_llava and now says another {name}: its own value is taken."
        for name in changed
    ]
    marks = _marks_gone(back.get("aggregator"), config)
    if marks:
        del back["aggregator"]
        notes.append(
            f"The export left the learned mark(s) {', '.join(marks)} out, so that videos cannot "
            f"be treated as they were: they are treated as the folder says."
        )
    return Restored(
        _with(config, back),
        rows=back.get(VOCABULARY),
        tokens=tokens if "image_token_id" in back else (),
        tokenizer=tokenizer,
        notes=tuple(notes),
    )


def _marks_gone(aggregator: Mapping[str, Any] | None, config: AVLlavaConfig) -> list[str]:
    """Learned marks that an aggregator inserts and the model no longer has."""
    if aggregator is None:
        return []
    needed = build(AggregatorSettings.from_dict(dict(aggregator))).marks_needed
    return sorted(set(needed) - set(config.sequence.media_tokens))


def _with(config: AVLlavaConfig, values: Mapping[str, Any]) -> AVLlavaConfig:
    """A copy with values by their dotted names."""
    out = copy.deepcopy(config)
    parts: dict[str, dict[str, Any]] = {name: getattr(out, name).to_dict() for name in PARTS}
    for name, value in values.items():
        part, _, field = name.partition(".")
        if part == "aggregator":
            parts[part] = value
        elif part in parts:
            parts[part][field] = value
        elif name == VOCABULARY:
            out.text_config.vocab_size = value
        elif name in _IDS:
            setattr(out, name, value)
    for part, fields in parts.items():
        setattr(out, part, PARTS[part].from_dict(fields))
    return out


def restore_tokenizer(tokenizer: Any, before: Mapping[str, Any] | None) -> None:
    """Give a loaded tokenizer back what :func:`of_tokenizer` found, in place."""
    if before is None:
        return
    tokenizer.chat_template = before["chat_template"]
    tokenizer.init_kwargs.pop("chat_template", None)
    tokenizer.init_kwargs.pop("padding_side", None)
    if before["padding_side"] is not None:
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = before["padding_side"]


def remove_tokens(folder: Path, tokens: tuple[str, ...]) -> None:
    """Take added tokens out of the tokenizer's files in a folder."""
    if not tokens:
        return
    for name, edit in (("tokenizer.json", _without), ("tokenizer_config.json", _unlisted)):
        file = folder / name
        if file.is_file():
            data = json.loads(file.read_text(encoding="utf-8"))
            edit(data, tokens)
            text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
            file.write_text(text, encoding="utf-8")


def _without(data: dict[str, Any], tokens: tuple[str, ...]) -> None:
    """Of tokenizer.json."""
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in tokens]


def _unlisted(data: dict[str, Any], tokens: tuple[str, ...]) -> None:
    """Of tokenizer_config.json."""
    decoder = data.get("added_tokens_decoder", {})
    for key in [k for k, t in decoder.items() if t["content"] in tokens]:
        del decoder[key]
    for name in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(data.get(name), list):
            data[name] = [t for t in data[name] if t not in tokens]
