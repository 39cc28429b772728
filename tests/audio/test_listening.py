"""The whole way of sound: samples, plan, features, tower, projector, for every tower."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as run
from hypothesis import strategies as st
from torch import Tensor

from av_llava.audio.placement import AudioPlan, plan_audio
from av_llava.audio.projector import AudioProjector, build_audio_projector
from av_llava.audio.towers import AudioTower, build_audio_tower
from av_llava.settings import AudioSettings

from .tiny import KINDS, config, noise

WIDTH = 8


def ears(settings: AudioSettings) -> tuple[AudioTower, AudioProjector]:
    torch.manual_seed(0)
    tower = build_audio_tower(config(settings.kind), settings).eval()
    return tower, build_audio_projector(settings, tower.hidden_size, WIDTH)


def hear(
    tower: AudioTower, projector: AudioProjector, clips: Sequence[np.ndarray]
) -> tuple[list[Tensor], list[AudioPlan]]:
    plans = [plan_audio(len(clip), tower.settings, tower.geometry) for clip in clips]
    features, lengths, chunks = tower.features(clips, plans)
    assert chunks == tuple(len(plan.chunks) for plan in plans)
    frames, _ = tower(features, lengths)
    return projector(frames, plans), plans


@pytest.mark.parametrize("kind", KINDS)
@given(
    lengths=st.lists(st.integers(1, 60_000), min_size=1, max_size=3),
    stride=st.integers(1, 12),
    mode=st.sampled_from(["none", "average", "stack"]),
    mean=st.booleans(),
    masked=st.booleans(),
    marks=st.booleans(),
    cap=st.sampled_from([14, 40, 3072]),
    long_audio=st.sampled_from(["keep", "uniform"]),
)
@run(max_examples=15, deadline=None)
def test_planned_is_emitted(
    kind: str,
    lengths: list[int],
    stride: int,
    mode: str,
    mean: bool,
    masked: bool,
    marks: bool,
    cap: int,
    long_audio: str,
) -> None:
    settings = AudioSettings(
        kind=kind,
        projector="linear",
        pool_mode=mode,
        pool_stride=stride,
        freq_pool="mean" if mean and kind == "beats" else "flatten",
        mask_padding=masked,
        chunk_newline=marks,
        token_mode="param" if marks else "tokens",
        max_tokens=cap,
        max_seconds=3.0,
        long_audio=long_audio,
    )
    with torch.no_grad():
        tokens, plans = hear(*ears(settings), [noise(n) for n in lengths])
    assert [tuple(t.shape) for t in tokens] == [(p.n_tokens, WIDTH) for p in plans]
    assert all(len(t) <= cap and t.isfinite().all() for t in tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_batch_is_single(kind: str, masked: bool) -> None:
    settings = AudioSettings(kind=kind, mask_padding=masked)
    tower, projector = ears(settings)
    clips = [noise(n, seed=n) for n in (16000, 500, 37_000, 9000)]
    together, _ = hear(tower, projector, clips)
    for clip, tokens in zip(clips, together):
        alone, _ = hear(tower, projector, [clip])
        torch.testing.assert_close(alone[0], tokens, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_projector_trains_on_a_frozen_tower(kind: str) -> None:
    tower, projector = ears(AudioSettings(kind=kind, token_mode="param"))
    tower.requires_grad_(False)
    tokens, _ = hear(tower, projector, [noise(20_000)])
    tokens[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in projector.parameters())
    assert all(p.grad is None for p in tower.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_both_train(kind: str) -> None:
    tower, projector = ears(AudioSettings(kind=kind))
    tokens, _ = hear(tower.train(), projector, [noise(20_000)])
    tokens[0].square().sum().backward()
    for part in (tower, projector):
        missing = [n for n, p in part.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bfloat16(kind: str) -> None:
    tower, projector = ears(AudioSettings(kind=kind))
    clips = [noise(20_000), noise(3000)]
    wanted, _ = hear(tower, projector, clips)
    tokens, _ = hear(tower.bfloat16(), projector.bfloat16(), clips)
    for token, want in zip(tokens, wanted):
        assert token.dtype == torch.bfloat16
        torch.testing.assert_close(token.float(), want, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_awkward_sound(kind: str) -> None:
    """Silence, NaN, a single sample: at least one token each, all finite."""
    tower, projector = ears(AudioSettings(kind=kind))
    silence, broken = np.zeros(8000, np.float32), noise(8000)
    broken[100:200] = np.nan
    tokens, plans = hear(tower, projector, [silence, broken, noise(1)])
    assert [len(t) for t in tokens] == [p.n_tokens for p in plans]
    assert min(len(t) for t in tokens) >= 1 and all(t.isfinite().all() for t in tokens)
    loud, _ = hear(tower, projector, [silence + 3.0])
    assert loud[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_sound_has_the_same_graph(kind: str) -> None:
    settings = AudioSettings(kind=kind)
    tower, projector = ears(settings)
    features, lengths, _ = tower.features([np.zeros(settings.min_samples, np.float32)])
    frames, _ = tower(features, lengths)
    projector.dummy(frames).sum().backward()
    for part in (tower, projector):
        grads = [p.grad for p in part.parameters() if p.requires_grad]
        assert all(g is not None and not g.any() for g in grads)
