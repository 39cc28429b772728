"""From a recipe's YAML and dotted overrides to :class:`TrainSettings`, strictly.

Contract: an unknown key is an error that names its whole path and the nearest known key; a value
of the wrong type names what was wanted. YAML is read as version 1.2 reads it: ``1e-3`` is a number,
``on`` and ``off`` are words. Relative paths stay as they are written (they start from the working
directory). What is resolved can be written out and read back to the same settings.
"""

from __future__ import annotations

import copy
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from av_llava.errors import UsageError, did_you_mean
from av_llava.settings import Settings
from av_llava.training.settings import PartSettings, StageSettings, TrainSettings, field_names

S = TypeVar("S", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: only true and false are flags, and 1e-3 is a number.

    A key that stands twice is an error, since the first value would be lost.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping without any key twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_RESOLVERS = {
    key: [(tag, pattern) for tag, pattern in found if not tag.endswith((":bool", ":float"))]
    for key, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_implicit_resolvers = _RESOLVERS
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """Read one YAML value: a number, a word, a list."""
    return yaml.load(text, Loader=_Loader)


def read_recipe(file: str | Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Read a recipe and lay ``dotted.key=value`` words over it.

    Raises:
        UsageError: the file or an override cannot be read, or names what does not exist.
    """
    data = read_yaml(file)
    for word in overrides:
        override(data, word)
    return settings_from(data, str(file))


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UsageError: it does not.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {path} cannot be read: {error}.") from error
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"The recipe {path} is not YAML: {_flat(str(error))}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"The recipe {path} must hold keys and values, not a {_kind(data)}.")
    return data


def override(data: dict[str, Any], word: str) -> None:
    """Set one ``dotted.key=value`` in a recipe's data.

    Raises:
        UsageError: the word has no ``=``, or the key goes through a value.
    """
    key, equals, text = word.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"An override is written as section.key=value, not {word!r}.")
    try:
        value = parse_value(text)
    except yaml.YAMLError as error:
        raise UsageError(f"The value of {key} is not YAML: {_flat(str(error))}.") from error
    at = data
    for i, name in enumerate(keys[:-1]):
        inner = at.get(name)
        if inner is None or isinstance(inner, str):
            # A part may be written as one word: {vision_tower: full} is {vision_tower: {train: …}}.
            inner = {} if inner is None else {"train": inner}
        if not isinstance(inner, dict):
            raise UsageError(
                f"The override {word!r} goes into {'.'.join(keys[: i + 1])}, which is a "
                f"{_kind(inner)}."
            )
        at[name] = at = inner
    at[keys[-1]] = value


def settings_from(data: Mapping[str, Any], source: str = "the recipe") -> TrainSettings:
    """Make settings of a recipe's data.

    Raises:
        UsageError: see the module.
    """
    data = dict(data)
    stages = data.pop("stages", None) or []
    if not isinstance(stages, list) or not all(isinstance(s, dict) for s in stages):
        raise UsageError(f"{source}: stages must be a list of mappings, each with a name.")
    settings = _build(TrainSettings, data, "", source)
    if not stages:
        return settings
    made = []
    for stage in stages:
        changes = {k: v for k, v in stage.items() if k != "name"}
        made.append(StageSettings(str(stage.get("name", "")), changes))
        for key in ("stages", "output"):
            if key in changes:
                raise UsageError(f"{source}: a stage takes no {key} of its own.")
        settings_from(merged(data, changes), f"{source}, stage {made[-1].name}")
    return settings.replace(stages=tuple(made))


def stage_settings(settings: TrainSettings, name: str) -> TrainSettings:
    """The recipe of one stage: the recipe's own keys with the stage's laid over them.

    Raises:
        UsageError: no such stage.
    """
    found = {stage.name: stage for stage in settings.stages}
    if name not in found:
        raise _unknown("stage", name, found, "")
    data = to_data(settings.replace(stages=()))
    return settings_from(merged(data, found[name].changes), f"stage {name}")


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one tree over another; a word over a mapping with ``train`` replaces that word only."""
    out = copy.deepcopy(dict(below))
    for key, value in above.items():
        inner = out.get(key)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            out[key] = merged(inner, value)
        elif isinstance(inner, dict) and "train" in inner and isinstance(value, str):
            out[key] = {**inner, "train": value}
        else:
            out[key] = copy.deepcopy(value)
    return out


def to_data(settings: TrainSettings) -> dict[str, Any]:
    """The settings as data that :func:`settings_from` reads to the same settings."""
    data = settings.to_dict()
    data["stages"] = [{"name": s.name, **_plain(s.changes)} for s in settings.stages]
    return {k: v for k, v in _plain(data).items() if k != "stages" or v}


def to_yaml(settings: TrainSettings) -> str:
    """The resolved recipe as a file."""
    return yaml.safe_dump(to_data(settings), sort_keys=False, allow_unicode=True, width=100)


# ---------------------------------------------------------------- typed values


def _build(cls: type[S], data: Any, path: str, source: str) -> S:
    """Make settings of a mapping; ``path`` is the dotted way to it."""
    if cls is PartSettings and isinstance(data, str):
        data = {"train": data}
    if not isinstance(data, Mapping):
        raise UsageError(
            f"{source}: {path or 'the recipe'} must hold keys and values, not {data!r}."
        )
    hints = typing.get_type_hints(cls)
    known = field_names(cls)
    given = {}
    for key, value in data.items():
        here = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise _unknown("key", here, [f"{path}.{k}" if path else k for k in known], source)
        given[str(key)] = typed(hints[key], value, here, source)
    try:
        return cls(**given)
    except UsageError as error:
        raise UsageError(f"{source}: {path + ': ' if path else ''}{error}") from error


def typed(wanted: Any, value: Any, path: str, source: str) -> Any:
    """A value of YAML as the type of its field.

    Args:
        wanted: the field's annotation.
        value: of the file.
        path: the dotted way to it, for errors.
        source: the file, for errors.

    Raises:
        UsageError: it is of another type.
    """
    options = _options(wanted)
    if value is None:
        if type(None) in options:
            return None
        inner = next((o for o in options if _is_settings(o)), None)
        if inner is not None:  # "lora:" without anything below it
            return _build(inner, {}, path, source)
        if any(typing.get_origin(o) is Mapping or o is Mapping for o in options):
            return {}
    for option in options:
        if _is_settings(option):
            return _build(option, value, path, source)
        found = _fitting(option, value, path, source)
        if found is not _NO:
            return found
    names = " or ".join(_name(o) for o in options if o is not type(None))
    raise UsageError(f"{source}: {path} must be {names}, not {value!r}.")


_NO = object()


def _fitting(option: Any, value: Any, path: str, source: str) -> Any:
    """The value as one of the types that it may have, or ``_NO``."""
    origin = typing.get_origin(option) or option
    if option is Any:
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return _NO
        (kind, *_) = typing.get_args(option) or (Any,)
        return tuple(typed(kind, v, f"{path}[{i}]", source) for i, v in enumerate(value))
    if origin is Mapping:
        return dict(value) if isinstance(value, Mapping) else _NO
    if option is bool:
        return value if isinstance(value, bool) else _NO
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not math.isfinite(value) and option is not str:
        return _NO
    if option is int:
        return int(value) if number and value == int(value) else _NO
    if option is float:
        return float(value) if number else _NO
    if option is str:
        # Names that look like numbers, such as a folder called 2024.
        return str(value) if isinstance(value, str) or number else _NO
    return _NO


def _options(wanted: Any) -> list[Any]:
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return list(typing.get_args(wanted))
    return [wanted]


def _is_settings(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, Settings)


def _name(option: Any) -> str:
    origin = typing.get_origin(option) or option
    words: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word",
        tuple: "a list",
        Mapping: "keys and values",
    }
    return words.get(origin, str(getattr(origin, "__name__", origin)))


def _plain(value: Any) -> Any:
    """Data that YAML writes without tags."""
    if isinstance(value, Settings):
        return _plain(value.to_dict())
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _unknown(kind: str, name: str, known: Iterable[str], source: str) -> UsageError:
    names = sorted(known)
    hint = did_you_mean(name, names)
    where = f"{source}: " if source else ""
    return UsageError(f"{where}unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def _kind(value: Any) -> str:
    words: dict[type, str] = {list: "list", str: "word", dict: "mapping"}
    return words.get(type(value), type(value).__name__)


def _flat(text: str) -> str:
    return " ".join(text.split())
