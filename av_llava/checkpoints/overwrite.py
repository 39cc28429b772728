"""Changes to a folder's ``config.json`` before it is read (``overwrite_config``).

Contract: a name that would change nothing is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from av_llava.aggregators import settings_of
from av_llava.config import (
    LLAVA_FIELDS,
    PARTS,
    AVLlavaConfig,
    is_llava_config,
    language_model_type,
)
from av_llava.errors import UsageError, unknown_name
from av_llava.settings import Settings


def overwritten(data: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """The data of a ``config.json`` with some values changed (``overwrite_config``).

    In LLaVA's layout the names are LLaVA's or the language model's. In our own, they are those of
    our parts: a dict changes only the fields that it names, and ``aggregator`` may be a spec such
    as ``"llava_video"`` or ``"budget:2048"``.

    Raises:
        UsageError: a name that the layout does not know, which would change nothing.
    """
    changes = changes or {}
    if data.get("model_type") == AVLlavaConfig.model_type:
        return _overwritten_parts(data, changes)
    if changes and is_llava_config(data):
        merged = {**data, **changes}
        text = CONFIG_MAPPING[language_model_type(merged)]().to_dict()
        known = {*LLAVA_FIELDS, *data, *text, "rope_theta", "rope_scaling", "torch_dtype"}
        for key in changes:
            if key not in known:
                raise unknown_name("value of overwrite_config", key, LLAVA_FIELDS)
        return merged
    return _overwritten_networks(data, changes)


def _overwritten_networks(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """In transformers' layout, whose dicts are changed field by field, too."""
    known = _fields_of(data)
    for key, value in changes.items():
        if known and key not in known:
            raise unknown_name("value of overwrite_config", key, known)
        if isinstance(value, Mapping):
            _check_fields(key, value, data.get(key))
    return {**data, **{k: _merged(data.get(k), v) for k, v in changes.items()}}


def _fields_of(network: Any) -> set[str]:
    """Names that the configuration of a network knows; none for an unknown network."""
    kind = network.get("model_type") if isinstance(network, Mapping) else None
    if kind not in CONFIG_MAPPING:
        return set()
    return {*network, *CONFIG_MAPPING[kind]().to_dict(), "rope_theta", "rope_scaling"}


def _check_fields(name: str, changes: Mapping[str, Any], network: Any) -> None:
    known = _fields_of(network) | _fields_of(changes)
    for key in changes:
        if known and key not in known:
            raise unknown_name(f"field of {name} in overwrite_config", key, known)


_NETWORKS = ("text_config", "vision_config", "audio_config")
_OWN_FIELDS = (
    *PARTS,
    *_NETWORKS,
    "image_token_id",
    "video_token_id",
    "audio_token_id",
    "au_token_ids",
    "extra_modalities",
    "tie_word_embeddings",
    "dtype",
)


def _overwritten_parts(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(data)
    for key, value in changes.items():
        if key in LLAVA_FIELDS:
            part = LLAVA_FIELDS[key]
            raise UsageError(
                f"overwrite_config names {key!r}, which is LLaVA's; this folder has av_llava's own "
                f"layout, where {part!r} holds it: overwrite_config={{{part!r}: {{...}}}}."
            )
        if key not in _OWN_FIELDS:
            raise unknown_name("value of overwrite_config", key, _OWN_FIELDS)
        if key == "aggregator" and isinstance(value, str):
            value = settings_of(value)
        if key in _NETWORKS and isinstance(value, Mapping):
            _check_fields(key, value, data.get(key))
        if isinstance(value, Settings):
            out[key] = value.to_dict()
        elif key == "text_config" and isinstance(value, Mapping):
            out[key] = _merged(data.get(key), _with_rope_theta(value, data.get(key)))
        else:
            out[key] = _merged(data.get(key), value)
    return out


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {**old, **{k: _merged(old.get(k), v) for k, v in new.items()}}


def _with_rope_theta(changes: Mapping[str, Any], text: Any) -> dict[str, Any]:
    """Keep the base of the rotary embedding, which saved files hold with the scaling."""
    scaling = changes.get("rope_scaling")
    held = (text or {}).get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or "rope_theta" not in held:
        return dict(changes)
    left = {k: v for k, v in changes.items() if k != "rope_scaling"}
    return {**left, "rope_parameters": {"rope_theta": held["rope_theta"], **scaling}}
