from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from av_llava.audio.placement import AudioPlan, plan_audio
from av_llava.audio.projector import AUDIO_PROJECTORS, AudioProjector, build_audio_projector
from av_llava.errors import UsageError
from av_llava.geometry import beats_geometry, whisper_geometry
from av_llava.settings import AudioSettings

GEOMETRY = whisper_geometry(50)  # chunks of one second, 50 frames
D, H = 6, 8

VARIANTS = [
    {"projector": "linear", "pool_mode": "none"},
    {"projector": "linear", "pool_mode": "stack", "pool_stride": 7},
    {"projector": "mlp2x_gelu", "pool_mode": "average", "pool_stride": 4},
    {"projector": "mlp3x_gelu", "pool_mode": "average", "pool_stride": 1},
    {"projector": "stack_mlp", "pool_stride": 10, "projector_hidden_size": 5},
    {"projector": "stack_mlp", "projector_activation": "relu", "chunk_newline": True},
    {"projector": "stack_mlp", "token_mode": "param", "chunk_newline": True},
    {"projector": "mlp1x_gelu", "pool_mode": "average", "token_mode": "param"},
]


def make(settings: AudioSettings, seed: int = 0) -> AudioProjector:
    torch.manual_seed(seed)
    return build_audio_projector(settings, D, H)


def frames_for(plans: list[AudioPlan], seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(len(p.frames) for p in plans), 50, D, generator=generator)


def oracle(projector: AudioProjector, chunks: Tensor, plan: AudioPlan) -> Tensor:
    """One clip, token by token."""
    settings, rows = projector.settings, []
    for chunk, n_frames in zip(chunks, plan.frames, strict=True):
        for first in range(0, n_frames, plan.stride):
            if settings.pool_mode == "stack":
                m = plan.stride // settings.pool_stride
                slots = torch.zeros(settings.pool_stride, D)
                for slot in range(settings.pool_stride):
                    window = chunk[first + slot * m : first + (slot + 1) * m]
                    if len(window):
                        slots[slot] = window.mean(0)
                x = slots.flatten()
            else:
                x = chunk[first : min(first + plan.stride, n_frames)].mean(0)
            for layer in projector:
                x = layer(x)
            rows.append(x)
        if settings.chunk_newline:
            rows.append(projector.audio_newline)
    if settings.token_mode == "param":
        rows = [projector.audio_begin, *rows, projector.audio_end]
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("max_tokens", [3072, 9])
@torch.no_grad()
def test_against_oracle(variant: dict, max_tokens: int) -> None:
    settings = AudioSettings(max_tokens=max_tokens, **variant)
    projector = make(settings)
    plans = [plan_audio(n, settings, GEOMETRY) for n in (16000, 700, 40000, 17600)]
    frames = frames_for(plans)
    out = projector(frames, plans)
    assert [len(t) for t in out] == [p.n_tokens for p in plans]
    assert max(len(t) for t in out) <= max_tokens
    row = 0
    for tokens, plan in zip(out, plans):
        chunks = frames[row : row + len(plan.frames)]
        torch.testing.assert_close(tokens, oracle(projector, chunks, plan), rtol=0, atol=1e-6)
        torch.testing.assert_close(projector(chunks, [plan])[0], tokens, rtol=0, atol=1e-6)
        row += len(plan.frames)


def test_the_cap_raises_the_stride_of_long_clips_only() -> None:
    settings = AudioSettings(max_tokens=9)
    plans = [plan_audio(n, settings, GEOMETRY) for n in (16000, 48000)]
    assert [p.stride for p in plans] == [10, 20]
    assert [p.n_tokens for p in plans] == [5, 9]


@torch.no_grad()
def test_padding_does_not_reach_averages() -> None:
    settings = AudioSettings(projector="linear", pool_mode="average", pool_stride=4)
    projector = make(settings)
    plan = plan_audio(3200, settings, GEOMETRY)  # 10 frames: 4, 4, 2
    frames = frames_for([plan])
    wanted = projector(frames, [plan])[0]
    frames[:, 10:] = torch.nan
    assert torch.equal(projector(frames, [plan])[0], wanted)


@torch.no_grad()
def test_stacks_past_the_chunk_are_zero() -> None:
    settings = AudioSettings(kind="beats", projector="linear", pool_mode="stack", pool_stride=10)
    geometry = beats_geometry(16000)  # 48 frames: the fifth stack has 8
    projector, plan = make(settings), plan_audio(16000, settings, geometry)
    frames = frames_for([plan])[:, :48]
    out = projector(frames, [plan])[0]
    last = F.pad(frames[0, 40:], (0, 0, 0, 2)).flatten()
    assert len(out) == 5
    torch.testing.assert_close(out[-1], projector[0](last))


def test_olas_projector_is_stack_mlp() -> None:
    settings = AudioSettings(
        projector="stack_mlp", pool_stride=10, projector_hidden_size=2048,
        projector_activation="relu", token_mode="param", chunk_newline=True,
    )  # fmt: skip
    with torch.device("meta"):
        projector = build_audio_projector(settings, 2048, 3584)
    assert {k: tuple(v.shape) for k, v in projector.state_dict().items()} == {
        "audio_newline": (3584,),
        "audio_begin": (3584,),
        "audio_end": (3584,),
        "0.weight": (2048, 20480),
        "0.bias": (2048,),
        "2.weight": (3584, 2048),
        "2.bias": (3584,),
    }
    assert isinstance(projector[1], torch.nn.ReLU)
    plan = plan_audio(48000, settings, whisper_geometry(1500))
    assert plan.n_tokens == 15 + 1 + 2  # where Ola itself spends 153


def test_videollama2s_projector_is_mlp2x_gelu() -> None:
    settings = AudioSettings(kind="beats", projector="mlp2x_gelu", pool_mode="none")
    with torch.device("meta"):
        projector = build_audio_projector(settings, 768, 3584)
    assert set(projector.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert sum(p.numel() for p in projector.parameters()) == 768 * 3584 + 3584**2 + 2 * 3584
    assert plan_audio(480000, settings, beats_geometry(480000)).n_tokens == 1496


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_reach_everything(variant: dict) -> None:
    settings = AudioSettings(**variant)
    projector = make(settings)
    plans = [plan_audio(n, settings, GEOMETRY) for n in (20000, 9000)]
    frames = frames_for(plans).requires_grad_()
    sum(t.square().sum() for t in projector(frames, plans)).backward()
    assert all(p.grad is not None and p.grad.any() for p in projector.parameters())
    assert frames.grad is not None and frames.grad.any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_dummy_keeps_the_graph_with_zero_rows(variant: dict) -> None:
    projector = make(AudioSettings(**variant))
    for frames in (None, torch.randn(2, 50, D, requires_grad=True)):
        projector.zero_grad()
        rows = projector.dummy(frames)
        assert rows.shape == (0, H)
        rows.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in projector.parameters())
        assert frames is None or frames.grad is not None


def test_no_clips_give_no_tokens() -> None:
    assert make(AudioSettings())(torch.zeros(0, 50, D), []) == []


@torch.no_grad()
def test_bfloat16_frames_and_weights() -> None:
    settings = AudioSettings(token_mode="param", chunk_newline=True)
    projector, plans = make(settings), [plan_audio(20000, settings, GEOMETRY)]
    frames = frames_for(plans)
    wanted = projector(frames, plans)[0]
    mixed = projector(frames.bfloat16(), plans)[0]
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, wanted, rtol=0, atol=0.02)
    half = projector.bfloat16()(frames, plans)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wanted, rtol=0, atol=0.05)


def test_wrong_number_of_chunks() -> None:
    settings = AudioSettings()
    plan = plan_audio(16000, settings, GEOMETRY)
    with pytest.raises(AssertionError, match="got 2 chunks, planned 1"):
        make(settings)(torch.zeros(2, 50, D), [plan])


@pytest.mark.parametrize(
    "name", ["mlp2x_relu", "mlp0x_gelu", "mlpNx_gelu", "mpl2x_gelu", "qformer"]
)
def test_unknown_projectors(name: str) -> None:
    with pytest.raises(UsageError, match=r"Unknown audio projector.*mlp2x_gelu, stack_mlp"):
        build_audio_projector(AudioSettings(projector=name), D, H)


def test_unknown_activation_and_pooling_that_does_not_fit() -> None:
    with pytest.raises(UsageError, match="Unknown activation 'gelo'"):
        build_audio_projector(AudioSettings(projector_activation="gelo"), D, H)
    with pytest.raises(UsageError, match="needs pool_mode 'stack', not 'average'"):
        AudioSettings(pool_mode="average")


def test_a_projector_from_elsewhere() -> None:
    AUDIO_PROJECTORS["normed"] = lambda settings, d, h: [
        torch.nn.LayerNorm(d),
        torch.nn.Linear(d, h),
    ]
    try:
        settings = AudioSettings(projector="normed")
        projector = make(settings)
        plan = plan_audio(9000, settings, GEOMETRY)
        assert projector(frames_for([plan]), [plan])[0].shape == (plan.n_tokens, H)
        assert projector[0].normalized_shape == (10 * D,)
    finally:
        del AUDIO_PROJECTORS["normed"]
