"""Find an aggregator by name, and make it.

Contract: both registries are plain dicts, open to code outside the package. ``PRESETS`` holds
settings or functions that make them; ``AGGREGATORS`` holds classes called with settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from av_llava.aggregators.baselines import PruneAggregator
from av_llava.aggregators.budget import BudgetAggregator
from av_llava.aggregators.presets import APPLE_FORM, PRESETS, Preset, parse_apple
from av_llava.aggregators.slow_fast import Aggregator
from av_llava.errors import UsageError, unknown_name
from av_llava.settings import AggregatorSettings

AGGREGATORS: dict[str, Callable[[AggregatorSettings], Aggregator]] = {
    "streams": Aggregator,
    "budget": BudgetAggregator,
    "random": PruneAggregator,
    "uniform": PruneAggregator,
}
"""Classes by the ``kind`` of their settings. Add your own; ``build`` finds it."""


@runtime_checkable
class HasAggregator(Protocol):
    """Anything that says which aggregator it wants, like a model's configuration."""

    aggregator: AggregatorSettings | Mapping[str, Any] | str


Spec = str | AggregatorSettings | Mapping[str, Any] | HasAggregator | Aggregator
"""What :func:`build` understands."""


def build(spec: Spec, **options: Any) -> Aggregator:
    """Make an aggregator.

    Args:
        spec: a preset (``"llava_video"``, ``"budget:2048"``, ``"llava_video_slowfast:k=5"``),
            Apple's ``slowfast-...`` string, the name of a registered class (``"name:argument"``),
            settings, a mapping (of settings, or with a key ``preset``), or an object with an
            attribute ``aggregator``.
        options: of the preset; any other is a field of the settings to change.

    Raises:
        UsageError: an unknown name or option.
    """
    if isinstance(spec, Aggregator):
        if options:
            raise UsageError(f"The aggregator is made already, so it takes no {sorted(options)}.")
        return spec
    settings = settings_of(spec, options)
    if settings.kind not in AGGREGATORS:
        raise unknown_name("kind of aggregator", settings.kind, AGGREGATORS)
    return AGGREGATORS[settings.kind](settings)


def settings_of(spec: Spec, options: Mapping[str, Any] | None = None) -> AggregatorSettings:
    """Return the settings that :func:`build` would use."""
    options = dict(options or {})
    if isinstance(spec, str):
        return _from_text(spec.strip(), options)
    if isinstance(spec, AggregatorSettings):
        return _changed(spec, options)
    if isinstance(spec, Mapping):
        if "preset" in spec:
            rest = {str(key): value for key, value in spec.items() if key != "preset"}
            return settings_of(str(spec["preset"]), {**rest, **options})
        return _changed(AggregatorSettings.from_dict(dict(spec)), options)
    if isinstance(spec, Aggregator):
        return _changed(spec.settings, options)
    if isinstance(spec, HasAggregator):
        return settings_of(spec.aggregator, options)
    raise UsageError(
        f"An aggregator is a name, settings, a mapping, or an object with an attribute "
        f"'aggregator', not {type(spec).__name__}."
    )


def _from_text(text: str, options: dict[str, Any]) -> AggregatorSettings:
    apple = parse_apple(text)
    if apple is not None:
        return _changed(apple, options)
    written, _, argument = text.partition(":")
    name = next((n for n in (written, written.replace("-", "_")) if n in PRESETS), written)
    if name in PRESETS:
        return _from_preset(name, PRESETS[name], argument, options)
    if name in AGGREGATORS:
        # Only the class knows what a stream of its own is, so it gets none.
        own = AggregatorSettings(
            kind=name, layout="single", slow=None, fast=None, newline="none", argument=argument
        )
        return _changed(own, options)
    raise unknown_name("aggregator", text, {*PRESETS, *AGGREGATORS, APPLE_FORM})


def _from_preset(
    name: str, preset: Preset, argument: str, options: dict[str, Any]
) -> AggregatorSettings:
    words = [word.strip() for word in argument.split(",")] if argument else []
    if isinstance(preset, AggregatorSettings):
        if words:
            raise UsageError(f"The aggregator {name!r} takes no options, but got {argument!r}.")
        return _changed(preset, options)
    parameters = inspect.signature(preset).parameters
    positional = [_value(word) for word in words if "=" not in word]
    named = dict(word.split("=", 1) for word in words if "=" in word)
    options = {**{key.strip(): _value(value) for key, value in named.items()}, **options}
    fields = {key: options.pop(key) for key in list(options) if key not in parameters}
    try:
        bound = inspect.signature(preset).bind(*positional, **options)
    except TypeError as error:
        known = ", ".join(str(p) for p in parameters.values())
        raise UsageError(
            f"The aggregator {name!r} cannot take {argument or options!r} ({error}). "
            f"Write {name}:option=value with: {known}."
        ) from error
    return _changed(preset(*bound.args, **bound.kwargs), fields)


def _changed(settings: AggregatorSettings, options: Mapping[str, Any]) -> AggregatorSettings:
    """Replace fields of the settings by options."""
    if not options:
        return settings
    return AggregatorSettings.from_dict({**settings.to_dict(), **options})


def _value(text: str) -> int | bool | str:
    """Read an option of ``name:option=value``."""
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        return text
