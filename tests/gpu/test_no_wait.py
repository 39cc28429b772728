"""Nothing in ``prepare_inputs`` waits for the device: shown on the CPU, with pretended CUDA tensors.

Fake tensors have a device and a shape but no values: whatever would read a value back raises. Two
things that wait do not need values, and are caught on their way: copies to the host, and copies
from the host without ``non_blocking``. ``test_cuda.py`` asks CUDA itself, where there is one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from av_llava.aggregators import build
from av_llava.chat import MediaPart, normalize_messages
from av_llava.modeling import AVLlavaForConditionalGeneration

torch.set_num_threads(1)
RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 255, (6, 40, 60, 3), dtype=np.uint8)
SOUND = (RNG.normal(size=40_000) * 0.1).astype(np.float32)


class WaitError(AssertionError):
    """Something waited for the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses copies between host and device that wait; counts those that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.n_copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if name in ("aten::_to_copy", "aten::copy_", "aten::copy"):
            source = args[0] if name == "aten::_to_copy" else args[1]
            position = 99 if name == "aten::_to_copy" else 2
            free = kwargs.get("non_blocking", args[position] if len(args) > position else False)
            if source.device.type != out.device.type:
                self.n_copies += 1
                if out.device.type == "cpu" or not free:
                    raise WaitError(
                        f"{name}: {list(source.shape)}, {source.device} to {out.device}"
                    )
        return out


@pytest.fixture
def fake(monkeypatch):
    # Pinning needs a driver; whether a copy waits is decided by its arguments here.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def prepare(processor, prompts, **options):
    talks = []
    for media, prompt in prompts:
        kinds = {1: "audio", 3: "image", 4: "video"}
        parts = [MediaPart(kinds[m.ndim], Image.fromarray(m) if m.ndim == 3 else m) for m in media]
        talks.append(normalize_messages(prompt, parts))
    aggregator = options.pop("aggregator", None)
    return processor.prepare(talks, processor.media_options(**options), aggregator=aggregator)


BATCHES = {
    "text": ([([], "Hi"), ([], "Who are you?")], {}),
    "audio": ([([SOUND], "Hear"), ([], "Hi")], {}),
    "image": ([([FRAMES[0], FRAMES[1]], "See"), ([FRAMES[2]], "And?")], {}),
    "video": ([([FRAMES], "See"), ([FRAMES[:2]], "And?")], {}),
    "all": ([([FRAMES], "See"), ([FRAMES[:3], SOUND, FRAMES[0]], "And?")], {"audio": SOUND}),
}


# Encoders that a batch leaves idle read a second of silence on the host in training.
CASES = [(name, False) for name in BATCHES] + [("all", True)]


@pytest.mark.parametrize("placement", ["block", "interleave"])
@pytest.mark.parametrize(("name", "training"), CASES)
def test_prepare_inputs_waits_for_nothing(name, training, placement, fake):
    prompts, options = BATCHES[name]
    media, tensors, config = _on_the_host(prompts, placement, options)
    with torch.device("cuda"):
        model = AVLlavaForConditionalGeneration(config).train(training)
    # In training, Whisper of older transformers draws a number on the host, which is read there.
    model.model.audio_tower.eval()
    on_device = {k: v.to("cuda", non_blocking=True) for k, v in tensors.items()}
    with NoWaiting() as guard:
        out = model.prepare_inputs(media, **on_device)
    assert out.device.type == "cuda" and tuple(out.shape[:2]) == media.splice.shape
    assert 1 <= guard.n_copies <= 6, "ids, and some indices"


def _on_the_host(prompts, placement, options):
    """What the processor gives, made with real tensors."""
    with unset_fake_temporarily():
        model, processor = tiny(placement=placement)
        prepared = prepare(processor, prompts, **options)
        return prepared.media, prepared.tensors, model.config


@pytest.mark.parametrize(
    "spec",
    ["llava_video", "llava_onevision", "sf_llava", "pllava", "shi_fast", "budget:60", "random:40"],
)
def test_aggregators_wait_for_nothing(spec, fake):
    aggregator = build(spec)
    plan = aggregator.plan(9, 12, 12)
    features = torch.empty(9, 12, 12, 4, device="cuda")
    marks = {name: torch.empty(4, device="cuda") for name in ("newline", "frame_end")}
    with NoWaiting():
        out = aggregator(features, plan, marks)
    assert tuple(out.tokens.shape) == (plan.n_tokens, 4)


def test_the_guard_sees_what_waits(fake):
    x = torch.empty(4, device="cuda")
    with NoWaiting(), pytest.raises(WaitError, match="cuda:0 to cpu"):
        x.cpu()
    with NoWaiting(), pytest.raises(WaitError, match="cpu to cuda"):
        torch.empty(4).to("cuda")
    with NoWaiting(), pytest.raises(WaitError, match="cpu to cuda"):
        x.copy_(torch.empty(4))
    with NoWaiting(), pytest.raises(DataDependentOutputException):
        x.sum().item()
    with NoWaiting() as guard:
        torch.empty(4).to("cuda", non_blocking=True)
    assert guard.n_copies == 1
