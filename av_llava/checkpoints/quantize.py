"""Language models in 4 or 8 bits: which layers, in which type, where, and what it does not go with.

Contract: exactly the linear layers of ``model.language_model`` are quantised; towers, projectors,
media tokens, embeddings and head keep their type. What a quantised model saves is read again to the
same numbers, without naming the scheme. Methods: NF4 with double quantisation (QLoRA, Dettmers et
al. 2023) and LLM.int8() (Dettmers et al. 2022) of bitsandbytes; int8 weights of torchao.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.checkpoints.target import named_dtype, resolve_dtype, stored_dtype
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError, MissingExtraError, UsageError, unknown_name

logger = logging.getLogger(__name__)

# Names in memory of everything that is not the language model's.
KEPT = (
    "model.vision_tower",
    "model.mm_projector",
    "model.audio_tower",
    "model.mm_audio_projector",
    "model.media_tokens",
    "model.modalities",
    "lm_head",
)
_TYPES = (torch.bfloat16, torch.float16, torch.float32)

# What a scheme stores beside or instead of a layer's ``weight``.
_COMPANION = re.compile(
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
    r"|\.(SCB|weight_format)$|\._weight_(?!qdata$)\w+$"
)
_TORCHAO_WEIGHT = "._weight_qdata"


@dataclass(frozen=True)
class Scheme:
    """A way to quantise."""

    package: str
    extra: str
    configure: Callable[[torch.dtype], Any]
    """Makes transformers' configuration of it; takes the type to compute in."""


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(KEPT),
    )


def _llm_int8(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT))


def _weight_only_int8(dtype: torch.dtype) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    # torchao would otherwise change the compiler's settings for the whole process.
    kind = Int8WeightOnlyConfig(version=2, set_inductor_config=False)
    return TorchAoConfig(kind, modules_to_not_convert=list(KEPT))


SCHEMES = {
    "4bit": Scheme("bitsandbytes", "quant", _nf4),
    "8bit": Scheme("bitsandbytes", "quant", _llm_int8),
    "int8": Scheme("torchao", "torchao", _weight_only_int8),
}


@dataclass(frozen=True)
class WeightsPlan:
    """In which type, where and how a folder's weights are read."""

    dtype: torch.dtype
    """Of what is not quantised, and of the computation."""
    device_map: Any
    """Of accelerate; None if the model is to be moved after loading."""
    scheme: str | None = None
    """Name of the scheme, or None."""
    stored: bool = False
    """Whether the folder's weights are quantised already."""

    def prepare(self, config: AVLlavaConfig) -> Any:
        """Put the scheme of stored weights into a configuration; return that of new ones.

        A folder with parts may tell how its base was loaded in training; that is not obeyed.
        """
        for holder in (config, config.text_config):
            if hasattr(holder, "quantization_config"):
                del holder.quantization_config
        if self.scheme is None:
            return None
        made = SCHEMES[self.scheme].configure(self.dtype)
        if self.stored:
            config.quantization_config = made.to_dict()
            return None
        return made


def check_scheme(quantize: str | None) -> None:
    """Raise unless a scheme is known and its package can be imported.

    Raises:
        UsageError: no such scheme.
        MissingExtraError: its package is not installed.
    """
    if quantize is None:
        return
    if not isinstance(quantize, str) or quantize not in SCHEMES:
        raise unknown_name("quantization", quantize, SCHEMES)
    scheme = SCHEMES[quantize]
    try:
        importlib.import_module(scheme.package)
    except ModuleNotFoundError as error:
        if error.name != scheme.package:
            raise
        raise MissingExtraError(
            scheme.package, scheme.extra, f"Loading with quantize={quantize!r}"
        ) from error


def plan_weights(
    folder: CheckpointFolder,
    quantize: str | None,
    *,
    dtype: str | torch.dtype | None,
    own_dtype: Any,
    device: torch.device,
    device_map: Any,
) -> WeightsPlan:
    """Decide how the weights of a folder are read.

    Args:
        folder: that holds the weights.
        quantize: name of a scheme, or None for what the folder holds.
        dtype: as asked for; auto is bfloat16 if weights are quantised now, else the folder's own.
        own_dtype: the folder's, as its config gives it.
        device: where the model goes without a ``device_map``.
        device_map: of accelerate.

    Raises:
        UsageError: the scheme, the type and the placement do not go together.
        MissingExtraError: the scheme's package is not installed.
        CheckpointError: the folder is quantised in a way that is not read.
    """
    check_scheme(quantize)
    stored = stored_scheme(folder)
    if stored is not None and quantize not in (None, stored):
        raise UsageError(
            f"{folder.path} is stored in {stored}, so it cannot be loaded with "
            f"quantize={quantize!r}. Leave quantize out, or load the checkpoint that it was made "
            f"from."
        )
    scheme = stored or quantize
    if scheme is None:
        return WeightsPlan(resolve_dtype(dtype, own_dtype, device), device_map)
    check_scheme(scheme)
    if dtype is None or str(dtype).strip().lower() == "auto":
        dtype = torch.bfloat16 if stored is None else stored_dtype(own_dtype)
    wanted = resolve_dtype(dtype, own_dtype, device)
    _check_type(scheme, wanted)
    if stored is not None and wanted is not named_dtype(own_dtype):
        raise UsageError(
            f"{folder.path} is stored in {stored} for computing in {_short(own_dtype)}, so it "
            f"cannot be loaded as {_short(wanted)}. Leave dtype out, or load the checkpoint that "
            f"it was made from."
        )
    check_placement(scheme, device_map)
    # Layers are quantised where they are put, and must not be moved afterwards.
    place = {"": device} if device_map is None else device_map
    return WeightsPlan(wanted, place, scheme, stored is not None)


def _check_type(scheme: str, dtype: torch.dtype) -> None:
    if dtype not in _TYPES:
        raise UsageError(
            f"{scheme} layers compute in one of {', '.join(map(_short, _TYPES))}, not in "
            f"{_short(dtype)}. Leave dtype out for bfloat16."
        )


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def check_placement(scheme: str, device_map: Any) -> None:
    """Raise if a placement keeps a part of a quantised model on disk, or some parts on the CPU.

    Args:
        scheme: of the model.
        device_map: as asked for, or as accelerate chose it.

    Raises:
        UsageError: it does.
    """
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    names = {str(place) for place in places}
    if "disk" in names:
        where = "on disk"
    elif "cpu" in names and len(names) > 1:
        where = "on the CPU while others are on an accelerator"
    else:
        return
    raise UsageError(
        f"A model in {scheme} cannot keep parts {where} (device_map puts it on "
        f"{', '.join(sorted(names))}). Put it on accelerators or on the CPU as a whole, or leave "
        f"out quantize, to offload it in full precision."
    )


def stored_scheme(folder: CheckpointFolder) -> str | None:
    """The scheme in which a folder's weights are stored; None for full precision.

    Raises:
        CheckpointError: they are quantised in a way that ``save_pretrained`` of this package does
            not write.
    """
    data = folder.config.get("quantization_config")
    if data is None:
        return None
    file = folder.path / "config.json"
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{file}: quantization_config must be an object, not {data!r}.")
    method = data.get("quant_method")
    packed = any(_COMPANION.search(key) for key in folder.keys)
    if method in ("bitsandbytes", "torchao") and not packed:
        # LLaVA's training in 4 bits leaves this in the configuration of what it saves in full.
        logger.info("%s speaks of %s, but its weights are not quantised.", file, method)
        return None
    found = _named(data)
    if found is None or folder.config.get("model_type") != AVLlavaConfig.model_type:
        raise CheckpointError(
            f"{folder.path} holds weights that were quantised by other software (quant_method "
            f"{method!r} in config.json), which are not read. Load the full-precision checkpoint "
            f"with quantize={_listed(SCHEMES)}."
        )
    return found


def _named(data: Mapping[str, Any]) -> str | None:
    """The scheme of a stored configuration, if it is one of ours."""
    method = data.get("quant_method")
    kept = data.get("modules_to_not_convert" if method == "torchao" else "llm_int8_skip_modules")
    if not isinstance(kept, list) or set(map(str, kept)) != set(KEPT):
        return None
    if method == "torchao":
        kind = data.get("quant_type")
        return "int8" if "Int8WeightOnlyConfig" in str(kind) else None
    if method != "bitsandbytes":
        return None
    if data.get("load_in_4bit"):
        return "4bit" if data.get("bnb_4bit_quant_type") == "nf4" else None
    return "8bit" if data.get("load_in_8bit") else None


def plain_keys(keys: Iterable[str]) -> set[str]:
    """Names that the tensors of a quantised folder would have in full precision."""
    return {k.replace(_TORCHAO_WEIGHT, ".weight") for k in keys if not _COMPANION.search(k)}


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The quantised layers of a model by name, without PEFT's wrapper around a layer."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _is_quantized(module.weight)
    }


def _is_quantized(weight: Tensor) -> bool:
    # By name, so that asking costs no import of packages that may not be there.
    kind = type(weight)
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def settle(
    model: nn.Module, plan: WeightsPlan
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Finish a quantised model after loading.

    Returns:
        Name of the weight, its shape in the file, and the shape that the model needs, for every
        layer where they differ: transformers compares the shapes of plain tensors only.

    Raises:
        UsageError: accelerate found no room for it on one kind of device.
    """
    assert plan.scheme is not None
    check_placement(plan.scheme, getattr(model, "hf_device_map", None))
    layers = quantized_layers(model)
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for name, layer in layers.items():
        # On processors with AVX512-BF16, bitsandbytes would repack a layer's weights in its first
        # forward without gradients: rounded once more, for some widths only, in bfloat16 whatever
        # the type, and with no gradient from then on.
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        state = getattr(layer.weight, "quant_state", None)
        found = tuple(layer.weight.shape if state is None else state.shape)
        wanted = (layer.out_features, layer.in_features)
        if found != wanted:
            wrong.append((f"{name}.weight", found, wanted))
    if plan.scheme == "8bit":
        _hush_casts()
    _tell(model, layers, plan.scheme)
    return wrong


def _hush_casts() -> None:
    """Drop the warning that bitsandbytes gives for each layer in each forward."""
    log = logging.getLogger("bitsandbytes.autograd._functions")
    if _not_a_cast not in log.filters:
        log.addFilter(_not_a_cast)


def _not_a_cast(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _tell(model: Any, layers: Mapping[str, nn.Linear], scheme: str) -> None:
    """Log what was quantised, and warn when most of the language model was not."""
    part = model.model.language_model
    inside = sum(layer.out_features * layer.in_features for layer in layers.values())
    table = part.get_input_embeddings().weight
    plain = [p for p in part.parameters() if not _is_quantized(p) and p is not table]
    left = sum(p.numel() for p in plain if p.ndim > 1)
    logger.info(
        "%s: %d linear layers with %d weights; the language model takes %.1f MB.",
        scheme,
        len(layers),
        inside,
        stored_bytes(part) / 1e6,
    )
    if left > inside:
        logger.warning(
            "%s covers linear layers only: %d weights of the language model's experts or other "
            "parts stay in full precision, %d are quantised.",
            scheme,
            left,
            inside,
        )


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors, with all that quantised weights consist of."""
    return sum(_bytes(value) for value in module.state_dict().values())


def _bytes(value: Any) -> int:
    if _is_quantized(value) and hasattr(value, "__tensor_flatten__"):
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes if isinstance(value, Tensor) else 0


def _listed(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)
