"""Spellings of devices, types and placements."""

from __future__ import annotations

import logging

import pytest
import torch

from av_llava.checkpoints.target import check_device_map, resolve_device, resolve_dtype
from av_llava.errors import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize("spelling", ["cpu", "CPU", " cpu ", "cpu:0", CPU])
def test_the_cpu_by_every_spelling(spelling):
    assert resolve_device(spelling).type == "cpu"


@pytest.mark.parametrize("spelling", ["auto", "AUTO", None])
@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch, spelling, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device(spelling) == torch.device(chosen)


@pytest.mark.parametrize(
    ("spelling", "chosen"),
    [("cuda", "cuda"), ("CUDA:1", "cuda:1"), (1, "cuda:1"), ("0", "cuda:0")],
)
def test_cuda_by_every_spelling(monkeypatch, spelling, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device(spelling) == torch.device(chosen)


def test_a_device_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="'cuda:2' is not there: this machine has 2"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("spelling", ["cuda", "cuda:3", 0, "mps"])
def test_an_absent_device_is_refused_before_loading(monkeypatch, spelling):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match="is not available to this PyTorch"):
        resolve_device(spelling)


@pytest.mark.parametrize("spelling", ["gpu", "", "cuda:x", "opengl", "meta", "cpu cuda"])
def test_other_devices_are_refused(spelling):
    with pytest.raises(UsageError, match="device"):
        resolve_device(spelling)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["float32", "fp32", "f32", "float", "FP32", "torch.float32"], torch.float32),
        (["bfloat16", "bf16", "BF16", "torch.bfloat16"], torch.bfloat16),
        (["float16", "fp16", "f16", "half", "torch.float16"], torch.float16),
        (["float64", "fp64", "double"], torch.float64),
    ],
)
def test_every_spelling_of_a_type(names, chosen):
    for name in [*names, chosen]:
        assert resolve_dtype(name, "float32", torch.device("cuda")) is chosen
    for name in names:  # as a checkpoint's own
        assert resolve_dtype("auto", name, torch.device("cuda")) is chosen


@pytest.mark.parametrize("name", ["", "int8", "float8_e4m3fn", "zork", 16, torch.int8, torch.bool])
def test_other_types_are_refused(name):
    with pytest.raises(UsageError, match="Unknown dtype"):
        resolve_dtype(name, "float32", CPU)
    with pytest.raises(UsageError, match="Unknown dtype of a checkpoint"):
        resolve_dtype("auto", name, CPU)


@pytest.mark.parametrize("asked", ["auto", "AUTO", None])
def test_auto_keeps_the_checkpoints_type(asked):
    assert resolve_dtype(asked, "bfloat16", CPU) is torch.bfloat16
    assert resolve_dtype(asked, torch.float16, torch.device("cuda")) is torch.float16
    assert resolve_dtype(asked, None, CPU) is torch.float32


def test_float16_becomes_bfloat16_on_a_cpu_and_says_so(caplog):
    with caplog.at_level(logging.INFO, "av_llava"):
        assert resolve_dtype("auto", "float16", CPU) is torch.bfloat16
    assert "using bfloat16" in caplog.text


def test_float16_by_name_is_heeded_on_a_cpu_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "av_llava"):
        assert resolve_dtype("fp16", "float32", CPU) is torch.float16
    assert "overflows" in caplog.text


@pytest.mark.parametrize(
    "device_map", [None, "auto", "balanced", "sequential", "cpu", {"": "cpu"}, {"lm_head": "disk"}]
)
def test_placements_that_accelerate_reads(device_map):
    check_device_map(device_map)


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ("everywhere", "a strategy: auto, balanced"),
        ({"lm_head": "gpu"}, r"device_map\['lm_head'\] is 'gpu'"),
        ({"lm_head": "meta"}, "holds no data"),
    ],
)
def test_other_placements_are_refused(device_map, words):
    with pytest.raises(UsageError, match=words):
        check_device_map(device_map)
