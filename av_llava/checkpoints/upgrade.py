"""Brings an old ``config.json`` of the LLaVA family up to date (``consolidate``, ``auto_upgrade``).

Contract: the first versions called themselves ``llama``; LLaVA's later code wants ``llava_llama``
and its class. Only what is wrong is changed, nothing is asked. Into a new folder, weights are
copied bit for bit into safetensors and every other file as it is; in place, the weights are not
touched and the old file stays beside the new one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from av_llava.checkpoints.compare import check_memory, compare_ours
from av_llava.checkpoints.convert import ConvertOptions, Report
from av_llava.checkpoints.destination import Weights, make_folder, small_files, target_dtype
from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.load import locate
from av_llava.checkpoints.shards import Transfer
from av_llava.checkpoints.source import UNUSED, Source, open_source
from av_llava.checkpoints.staging import replace_file
from av_llava.checkpoints.towers import candidates
from av_llava.config import is_llava_config, language_model_type, tower_name
from av_llava.errors import CheckpointError, UsageError

# LLaVA's spelling of a language model in model_type and class names.
_FAMILIES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "mixtral": ("llava_mixtral", "LlavaMixtralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
    "qwen2_moe": ("llava_qwen_moe", "LlavaQwenMoeForCausalLM"),
    "qwen3": ("llava_qwen3", "LlavaQwen3ForCausalLM"),
    "gemma": ("llava_gemma", "LlavaGemmaForCausalLM"),
    "mpt": ("llava_mpt", "LlavaMptForCausalLM"),
}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")


def upgraded(data: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Bring the data of a LLaVA ``config.json`` up to date.

    Returns:
        The new data, and a sentence for each change.

    Raises:
        CheckpointError: it is not LLaVA's, or of an unknown language model.
    """
    if not is_llava_config(data):
        raise CheckpointError(
            f"The config.json (model_type {data.get('model_type')!r}) is not in LLaVA's layout: it "
            f"names no vision tower (mm_vision_tower), so there is nothing to upgrade."
        )
    wanted: dict[str, Any] = {}
    family = language_model_type(data)
    if family in _FAMILIES:
        kind, architecture = _FAMILIES[family]
        wanted = {"model_type": kind, "architectures": [architecture]}
    if "mm_vision_tower" not in data and tower_name(data) is not None:
        wanted["mm_vision_tower"] = tower_name(data)
    if data.get("mm_projector_type") is None:
        wanted["mm_projector_type"] = "linear"
    if data.get("mm_vision_select_feature") is None:
        wanted["mm_vision_select_feature"] = "patch"
    if (data.get("pad_token_id") or 0) < 0:
        wanted["pad_token_id"] = None
    changes = [
        f"{key}: {json.dumps(data[key]) if key in data else 'absent'} becomes {json.dumps(value)}"
        for key, value in wanted.items()
        if key not in data or data[key] != value
    ]
    return {**data, **wanted}, tuple(changes)


def upgrade(source: str | Path, destination: str | Path | None, options: ConvertOptions) -> Report:
    """Upgrade a folder, in place or into a new one.

    Raises:
        UsageError: both, or neither, of a destination and in-place.
        CheckpointError: the folder is not LLaVA's, or cannot be written.
    """
    in_place = options.extra["in_place"]
    if in_place == (destination is not None):
        raise UsageError("Give either a destination or --in-place (in_place=True).")
    if in_place:
        _check_in_place(source, options)
        return _in_place(locate(source), options)
    opened = open_source(source)
    data, changes = upgraded(opened.folder.config)
    dtype = target_dtype(options)
    if dtype is not None:
        data["torch_dtype"] = str(dtype).removeprefix("torch.")
    transfers = [Transfer(stored, stored.name) for stored in opened.tensors.values()]
    if options.verify:
        check_memory(sum(t.stored.n_bytes for t in transfers))
    report = Report(
        converter="upgrade",
        source=str(opened.path),
        destination=None,
        mapped=len(transfers),
        dropped={UNUSED: opened.unused} if opened.unused else {},
        notes=changes or ("The config.json is up to date.",),
    )
    with small_files() as prepared:
        (prepared / "config.json").write_text(dumped(data), encoding="utf-8")
        return make_folder(
            report,
            opened.path,
            destination,
            [Weights(transfers)],
            options,
            prepared=prepared,
            finish=lambda folder: copy_rest(opened, folder),
            compare=lambda made: compare_ours(source, made, dtype),
        )


def _check_in_place(source: str | Path, options: ConvertOptions) -> None:
    """Refuse what in-place cannot do."""
    if not Path(source).expanduser().is_dir():
        raise UsageError(
            f"{str(source)!r} is no folder here: only a local one is changed in place."
        )
    if options.verify or options.dtype is not None:
        raise UsageError(
            "In place only config.json changes, so there are no weights to compare or to convert: "
            "leave --verify and --dtype out, or name a destination."
        )


def _in_place(folder: CheckpointFolder, options: ConvertOptions) -> Report:
    """Change ``config.json`` and keep the old one beside it."""
    data, changes = upgraded(folder.config)
    file = folder.path / "config.json"
    report = Report(
        converter="upgrade",
        source=str(folder.path),
        destination=str(folder.path),
        notes=changes or ("The config.json is up to date.",),
        dry_run=options.dry_run,
    )
    if options.dry_run or not changes:
        return report
    backup = _free_name(file)
    try:
        shutil.copy2(file, backup)
    except OSError as error:
        raise CheckpointError(f"{backup} cannot be written: {error.strerror or error}.") from error
    replace_file(file, dumped(data))
    return replace(report, files=(file.name, backup.name))


def _free_name(file: Path) -> Path:
    """A name for the backup that no file has."""
    name = file.with_name(f"{file.name}.bak")
    n = 1
    while name.exists():
        n += 1
        name = file.with_name(f"{file.name}.bak{n}")
    return name


def dumped(data: Mapping[str, Any]) -> str:
    """JSON as transformers writes it."""
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def copy_rest(opened: Source, folder: Path) -> None:
    """Copy everything but weights and ``config.json``, and a tower that lies beside the source.

    A tower that is named relatively would not be found from another place.
    """
    weights = {file for pattern in WEIGHTS for file in opened.path.glob(pattern)}
    weights |= set(opened.folder.weight_files)
    for path in opened.path.iterdir():
        if path not in weights and path.name != "config.json":
            _copy(path, folder / path.name)
    tower = tower_beside(opened)
    if tower is not None and not (folder / tower.name).exists():
        _copy(tower, folder / tower.name)


def tower_beside(opened: Source) -> Path | None:
    """The folder of a vision tower that lies beside the checkpoint, if it is looked for there."""
    name = tower_name(opened.folder.config)
    if name is None or Path(name).is_absolute():
        return None
    places = candidates(name, opened.path)
    found = next((p for p in places if (p / "config.json").is_file()), None)
    beside = found is not None and found.parent.resolve() == opened.path.parent.resolve()
    return found if beside else None


def _copy(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copyfile(path, target)
