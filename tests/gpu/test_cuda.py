"""Every CUDA path agrees with the CPU: to rounding in float32, within 3 % in bfloat16.

``make gpu-check`` runs these; without a GPU they are skipped. ``test_no_wait.py`` shows on any
machine that nothing waits; here CUDA itself is asked.
"""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny
from transformers import CLIPVisionConfig, SiglipVisionConfig, WhisperConfig

from av_llava.aggregators import build
from av_llava.audio.configs import BeatsConfig, DualAudioConfig
from av_llava.audio.features import KaldiFbank, LogMel
from av_llava.audio.projector import build_audio_projector
from av_llava.audio.resample import resample
from av_llava.audio.towers import build_audio_tower
from av_llava.chat import MediaPart, normalize_messages
from av_llava.inference import AVLlava
from av_llava.projectors import build_projector
from av_llava.settings import AudioSettings, VisionSettings
from av_llava.splice import Segment, SplicePlan, splice
from av_llava.vision import build_vision_tower
from av_llava.vision.pixels import normalize_pixels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
torch.set_num_threads(1)

DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16]
RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 255, (6, 40, 60, 3), dtype=np.uint8)
SOUND = (RNG.normal(size=40_000) * 0.1).astype(np.float32)


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32 in convolutions, which has the precision of neither type compared here."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def no_waiting():
    """CUDA raises where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_close(found, wanted, dtype, what=""):
    """The difference is small beside the whole (single values near zero may differ more)."""
    assert found.shape == wanted.shape, what
    wanted = wanted.float()
    error = (found.float().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-6)
    assert error < (1e-4 if dtype is torch.float32 else 0.03), f"{what}: {error:.2e}"


def clip_config(**changes):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return CLIPVisionConfig(
        **{**shape, "image_size": 56, "patch_size": 14, "num_hidden_layers": 3, **changes}
    )


VISION = {
    "clip": (clip_config(), VisionSettings(kind="clip")),
    "clip_s2": (
        clip_config(),
        VisionSettings(kind="clip_s2", s2_scales=(56, 112), resize="exact"),
    ),
    "siglip": (
        SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_attention_heads=2, image_size=56,
            patch_size=14, num_hidden_layers=3, vision_use_head=False,
        ),
        VisionSettings(kind="siglip"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VISION)
def test_vision_tower(kind, dtype):
    torch.manual_seed(0)
    tower = build_vision_tower(*VISION[kind]).eval()
    side = tower.input_size
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        wanted = tower(pixels)
        on_device = copy.deepcopy(tower).to(DEVICE, dtype)
        given = pixels.to(DEVICE)
        with no_waiting():
            found = on_device(given)
    assert_close(found, wanted, dtype)


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.48, 0.46, 0.41)])
def test_normalisation_of_pixels(mean):
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[None, :, None]
    wanted = normalize_pixels(pixels, mean, (0.3, 0.2, 0.25), torch.float32)
    found = normalize_pixels(pixels.to(DEVICE), mean, (0.3, 0.2, 0.25), torch.float32)
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", ["linear", "mlp2x_gelu", "mlp2x_res2x_gelu", "pooler", "identity", "ldpnet", "ldpnetv2"]
)
def test_projector(kind, dtype):
    torch.manual_seed(0)
    width = 16 if kind == "identity" else 24
    projector = build_projector(kind, 16, width, (8, 8)).eval()
    features = torch.randn(3, 64, 16)
    with torch.no_grad():
        wanted = projector(features)
        found = copy.deepcopy(projector).to(DEVICE, dtype)(features.to(DEVICE, dtype))
    assert_close(found, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spec",
    ["llava_video", "llava_video_bilinear", "llava_video_slowfast", "llava_onevision", "sf_llava",
     "pllava", "shi_fast", "frame_newline", "av_llava", "budget:300", "random:99", "uniform:99"],
)  # fmt: skip
def test_aggregator_and_its_gradients(spec, dtype):
    torch.manual_seed(0)
    aggregator = build(spec)
    plan = aggregator.plan(9, 12, 12)
    inputs = [torch.randn(9, 12, 12, 8), torch.randn(8), torch.randn(8)]
    names = ("newline", "frame_end")

    def run(device, dtype, guard):
        given = [x.to(device, dtype).requires_grad_() for x in inputs]
        with guard:
            out = aggregator(given[0], plan, dict(zip(names, given[1:], strict=True))).tokens
            weights = torch.linspace(0.5, 1, out.numel(), device=device, dtype=dtype)
            grads = torch.autograd.grad(out, given, weights.view_as(out), allow_unused=True)
        return out, grads

    wanted, wanted_grads = run("cpu", torch.float32, contextlib.nullcontext())
    found, grads = run(DEVICE, dtype, no_waiting())
    assert_close(found, wanted, dtype)
    for name, g, w in zip(("features", *names), grads, wanted_grads, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            assert_close(g, w, dtype, name)


@pytest.mark.parametrize("extractor", [LogMel(80), LogMel(128), KaldiFbank()])
def test_audio_features(extractor):
    sound = torch.from_numpy(SOUND)
    wanted = extractor(sound)
    found = extractor(sound.to(DEVICE))
    assert found.features.device.type == DEVICE.type
    assert torch.equal(found.lengths, wanted.lengths)
    # Logarithms of what is nearly nothing amplify rounding.
    torch.testing.assert_close(found.features.cpu(), wanted.features, atol=5e-3, rtol=0)


def test_resampling():
    for rate_hz in (44_100, 48_000, 44_099):
        wanted = resample(torch.from_numpy(SOUND), rate_hz)
        found = resample(torch.from_numpy(SOUND).to(DEVICE), rate_hz)
        torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=0)


def audio_config(kind):
    whisper = WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
        num_mel_bins=80, max_source_positions=50,
    )  # fmt: skip
    beats = BeatsConfig(
        embed_dim=12, encoder_layers=2, encoder_embed_dim=24, encoder_ffn_embed_dim=32,
        encoder_attention_heads=2, conv_pos=8, conv_pos_groups=4, num_buckets=16, max_distance=32,
        chunk_seconds=1.0,
    )  # fmt: skip
    return {"whisper": whisper, "beats": beats, "dual": DualAudioConfig(whisper, beats)}[kind]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("kind", ["whisper", "beats", "dual"])
def test_audio_tower(kind, mask_padding, dtype):
    torch.manual_seed(0)
    settings = AudioSettings(kind=kind, mask_padding=mask_padding)
    tower = build_audio_tower(audio_config(kind), settings).eval()
    inputs = tower.features([SOUND, SOUND[:20_000]])
    with torch.no_grad():
        wanted, wanted_lengths = tower(inputs.features, inputs.lengths)
        on_device = copy.deepcopy(tower).to(DEVICE, dtype)
        given = inputs.features.to(DEVICE)
        with no_waiting():
            found, lengths = on_device(given, inputs.lengths)
    assert torch.equal(lengths.cpu(), wanted_lengths)
    for row, (f, w, n) in enumerate(zip(found, wanted, wanted_lengths.tolist(), strict=True)):
        assert_close(f[:n], w[:n], dtype, f"chunk {row}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_audio_projector(dtype):
    torch.manual_seed(0)
    model, _ = tiny()
    plans = [model.model.planner.audio(n) for n in (40_000, 500_000)]
    settings, width = model.config.audio, model.model.audio_tower.hidden_size
    projector = build_audio_projector(settings, width, 48).eval()
    frames = torch.randn(sum(len(p.frames) for p in plans), 1500, width)
    with torch.no_grad():
        wanted = projector(frames, plans)
        on_device, given = copy.deepcopy(projector).to(DEVICE, dtype), frames.to(DEVICE, dtype)
        with no_waiting():
            found = on_device(given, plans)
    for f, w in zip(found, wanted, strict=True):
        assert_close(f, w, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_frames", [3, 40])
def test_splice_is_exact_in_values_and_gradients(n_frames, dtype):
    """With few pieces slices are copied, with many one index; both are the CPU's copies."""
    width, sizes = 16, [4 + i % 3 for i in range(n_frames)]
    starts = np.cumsum([0, *sizes]).tolist()
    parts = [[(np.arange(1, 30), None)], [(np.arange(3), None), Segment("image", 0, 0, 7)]]
    for i, n in enumerate(sizes):
        parts[0] += [Segment("video", 0, starts[i], starts[i] + n), (np.array([5]), None)]
    plan = SplicePlan.build(parts, {"video": [starts[-1]], "image": [7]}, padding_side="left")
    torch.manual_seed(0)
    embed = torch.nn.Embedding(50, width).to(dtype)
    values = {"video": torch.randn(starts[-1], width), "image": torch.randn(7, width)}

    def run(embed, device, guard):
        items = {k: [v.to(device, dtype).requires_grad_()] for k, v in values.items()}
        weight = torch.linspace(-1, 1, width, device=device, dtype=dtype)
        with guard:
            out = splice(embed, plan, items)
            inputs = [items["video"][0], items["image"][0]]
            grads = torch.autograd.grad(out, inputs, weight.expand_as(out))
        return [t.cpu() for t in (out, *grads)]

    wanted = run(embed, "cpu", contextlib.nullcontext())
    found = run(copy.deepcopy(embed).to(DEVICE), DEVICE, no_waiting())
    for f, w in zip(found, wanted, strict=True):
        assert torch.equal(f, w)


def prepare(processor, prompts, **options):
    kinds = {1: "audio", 3: "image", 4: "video"}
    talks = []
    for media, prompt in prompts:
        parts = [MediaPart(kinds[m.ndim], Image.fromarray(m) if m.ndim == 3 else m) for m in media]
        talks.append(normalize_messages(prompt, parts))
    return processor.prepare(talks, processor.media_options(**options))


BATCHES = {
    "text": ([([], "Hi"), ([], "Who are you?")], {}),
    "audio": ([([SOUND], "Hear"), ([], "Hi")], {}),
    "video": ([([FRAMES], "See"), ([FRAMES[:2]], "And?")], {}),
    "all": ([([FRAMES], "See"), ([FRAMES[:3], SOUND, FRAMES[0]], "And?")], {"audio": SOUND}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("placement", ["block", "interleave"])
@pytest.mark.parametrize("name", BATCHES)
def test_prepare_inputs_agrees_and_waits_for_nothing(name, placement, dtype):
    model, processor = tiny(placement=placement)
    prompts, options = BATCHES[name]
    prepared = prepare(processor, prompts, **options)
    on_device = copy.deepcopy(model).to(DEVICE, dtype)
    tensors = {k: v.to(DEVICE) for k, v in prepared.tensors.items()}
    with torch.no_grad():
        wanted = model.prepare_inputs(prepared.media, **prepared.tensors)
        on_device.prepare_inputs(prepared.media, **tensors)  # constants are made once
        with no_waiting():
            found = on_device.prepare_inputs(prepared.media, **tensors)
    assert found.dtype == dtype
    assert_close(found, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients(dtype):
    model, processor = tiny()
    content = [{"type": "video", "video": FRAMES}, {"type": "text", "text": "What?"}]
    talk = normalize_messages(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "A ball."}]
    )
    prepared = processor.prepare(
        [talk], processor.media_options(audio=SOUND), supervised=True,
        add_generation_prompt=False, padding_side="right",
    )  # fmt: skip
    on_device = copy.deepcopy(model).to(DEVICE, dtype)
    tensors = {k: v.to(DEVICE) for k, v in prepared.tensors.items()}
    wanted = model.train()(media=prepared.media, **prepared.tensors).loss
    found = on_device.train()(media=prepared.media, **tensors).loss
    assert_close(found, wanted, dtype)
    wanted.backward()
    found.backward()
    for part in ("mm_projector", "mm_audio_projector", "media_tokens"):
        pairs = zip(
            getattr(on_device.model, part).named_parameters(),
            getattr(model.model, part).named_parameters(),
            strict=True,
        )
        for (name, p), (_, q) in pairs:
            if dtype is torch.float32:
                assert_close(p.grad, q.grad, dtype, f"{part}.{name}")
            else:  # rounding adds up over a whole backward pass
                assert torch.isfinite(p.grad).all(), f"{part}.{name}"


def answers(m):
    session = m.session(FRAMES, max_new_tokens=8)
    questions = ["What is it?", "How many of them are there, and where?", "Who?"]
    return (
        [m.ask(FRAMES, q, max_new_tokens=8).text for q in questions],
        [session.ask(q).text for q in questions],
        [a.text for a in session.ask_many(questions)],
        [session.chat(q).text for q in questions[:2]],
        "".join(session.stream(questions[0])).strip(),
    )


def test_answers_and_sessions_are_those_of_the_cpu():
    model, processor = tiny()
    on_device = copy.deepcopy(model).to(DEVICE)
    wanted = answers(AVLlava(model, processor, "tiny"))
    found = answers(AVLlava(on_device, processor, "tiny"))
    assert found == wanted
    assert wanted[0] == wanted[1] == wanted[2] and wanted[4] == wanted[1][0]


def test_a_bfloat16_session_answers():
    model, processor = tiny()
    m = AVLlava(model.to(DEVICE, torch.bfloat16), processor, "tiny")
    session = m.session([FRAMES, SOUND], max_new_tokens=8)
    assert session.ask("What?").usage.completion_tokens > 0
    assert len(session.ask_many(["What?", "Who is it?"])) == 2
