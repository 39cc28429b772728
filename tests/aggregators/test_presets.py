"""Presets, Apple's strings, LLaVA's configuration keys, and the registries."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from av_llava.aggregators import AGGREGATORS, PRESETS, Aggregator, build, settings_for, settings_of
from av_llava.errors import UsageError
from av_llava.settings import AggregatorSettings, PoolSettings, SelectSettings, StreamSettings

torch.set_num_threads(1)
FRAMES = (8, 16, 32, 64, 128)

# Tokens at 8, 16, 32, 64 and 128 frames of 24x24 and of 27x27 patches (research table).
TABLE = {
    "sf_llava:legacy=true": ((3008, 3136, 3392, 3904, 4928), (3768, 3896, 4152, 4664, 5688)),
    "sf_llava": ((2432, 3136, 3392, 3904, 4928), (3040, 3896, 4152, 4664, 5688)),
    "llava_video": ((1248, 2496, 4992, 9984, 19968), (1456, 2912, 5824, 11648, 23296)),
    "llava_video_bilinear": ((1248, 2496, 4992, 9984, 19968), (1680, 3360, 6720, 13440, 26880)),
    "llava_video_slowfast": ((686, 1372, 2630, 5260, 10406), (764, 1528, 2916, 5832, 11524)),
    "llava_video_slowfast:k=5": ((572, 1144, 2174, 4234, 8468), (624, 1248, 2356, 4572, 9144)),
    "llava_video_slowfast:10": ((458, 916, 1832, 3550, 6986), (484, 968, 1936, 3732, 7324)),
    "llava_onevision": ((1153, 2305, 4609, 9217, 18433), (1569, 3137, 6273, 12545, 25089)),
    "llava_next_video": ((1152, 2304, 4608, 9216, 18432), (1352, 2704, 5408, 10816, 21632)),
    "llava_next_video:post": ((1152, 2304, 4608, 9216, 18432), (1352, 2704, 5408, 10816, 21632)),
    "frame_newline": ((1160, 2320, 4640, 9280, 18560), (1360, 2720, 5440, 10880, 21760)),
    "pllava": ((2304,) * 5, (2304,) * 5),
    "shi_fast": ((1152, 2304, 2304, 2304, 4608), (1352, 2704, 2704, 2704, 5408)),
    "sf15_like": ((416, 832, 1664, 3328, 6656), (466, 932, 1864, 3728, 7456)),
}


@pytest.mark.parametrize("name", TABLE)
def test_token_counts(name: str) -> None:
    aggregator = build(name)
    for side, counts in zip((24, 27), TABLE[name], strict=True):
        assert tuple(aggregator.plan(t, side, side).n_tokens for t in FRAMES) == counts


@pytest.mark.parametrize(("frames", "variant"), [(64, "s1t4"), (96, "s1t6"), (128, "s2t4")])
def test_shi_counts_of_the_published_models(frames: int, variant: str) -> None:
    plan = build(f"shi_fast:{variant}").plan(frames, 18, 18)
    assert plan.n_tokens == 1296


@pytest.mark.parametrize(("side", "count"), [(24, 3680), (27, 4440)])
def test_published_sf_llava_count(side: int, count: int) -> None:
    text = "slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4"
    assert build(text).plan(50, side, side).n_tokens == count
    assert build(text).settings == build("sf_llava", legacy=True).settings
    assert build("sf_llava").plan(50, side, side).n_tokens == count


def test_pairs_within_rows_lose_no_patch() -> None:
    plan = build("sf_llava:pool=pair_max").plan(50, 27, 27)
    assert plan.streams[0].rows, plan.streams[0].cols == (27, 14)
    seen = [
        (y, x)
        for (y0, y1, x0, x1), _ in plan.streams[0].boxes(27, 27)
        for y in range(y0, y1)
        for x in range(x0, x1)
    ]
    assert sorted(seen) == [(y, x) for y in range(27) for x in range(27)]


def test_own_default_loses_no_patch_and_repeats_none() -> None:
    aggregator = build("av_llava")
    assert aggregator.settings == AggregatorSettings() == build("default").settings
    plan = aggregator.plan(10, 27, 27)
    slow, fast = plan.streams
    assert slow.frames == (0, 4, 8)
    assert (slow.rows, fast.rows) == (14, 7)
    assert plan.n_tokens == 3 * (14 * 14 + 1) + 7 * (7 * 7 + 1)
    for stream in plan.streams:
        assert sum(weight for _, weight in stream.boxes(27, 27)) == 27 * 27


def test_apple_fast_only() -> None:
    plan = build("slowfast-slow_0frms_spatial_1d_max_pool-fast_4x4").plan(7, 24, 24)
    assert plan.n_tokens == 7 * 16
    assert plan.streams[0].n_items == 0


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_round_trips_and_describes_itself(name: str) -> None:
    aggregator = build(f"{name}:512" if name in ("budget", "random", "uniform") else name)
    data = json.loads(json.dumps(aggregator.settings.to_dict()))
    assert AggregatorSettings.from_dict(data) == aggregator.settings
    assert build(data).settings == aggregator.settings
    plan = aggregator.plan(12, 24, 24)
    assert f"{plan.n_tokens} tokens" in plan.describe()
    features = torch.randn(12, 24, 24, 2)
    marks = {"newline": torch.ones(2), "frame_end": torch.ones(2)}
    assert aggregator(features, plan, marks).tokens.shape == (plan.n_tokens, 2)


def test_options_reach_the_preset_or_the_settings() -> None:
    wanted = build("llava_video_slowfast", k=5, pool="bilinear", newline="frame").settings
    assert build("llava_video_slowfast:5,bilinear,newline=frame").settings == wanted
    assert build("llava-video-slowfast: k=5, pool=bilinear, newline=frame").settings == wanted
    assert (
        build(
            {"preset": "llava_video_slowfast", "k": 5, "pool": "bilinear"}, newline="frame"
        ).settings
        == wanted
    )
    assert build("sf_llava", newline="video").settings.newline == "video"
    assert build("llava_video:layout=single,stage=pre").settings.stage == "pre"
    assert build("sf_llava", fast={"pool": {"kind": "identity"}}).settings.fast == StreamSettings(
        pool=PoolSettings("identity")
    )


def test_specs_of_every_kind() -> None:
    settings = build("llava_onevision").settings
    assert build(settings).settings == settings
    assert build(settings.to_dict()).settings == settings
    assert build(SimpleNamespace(aggregator=settings)).settings == settings
    assert build(SimpleNamespace(aggregator="llava_onevision")).settings == settings
    made = build("llava_onevision")
    assert build(made) is made
    assert settings_of(made, {"newline": "none"}).newline == "none"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("llava_vidio", "Did you mean 'llava_video'"),
        ("llava_vidio", "sf_llava"),
        ("slowfast-slow_10frms_best_pool-fast_4x4", "spatial_1d_max_pool"),
        ("slowfast-slow_10frms_concat", "slowfast-slow_<S>frms"),
        ("budget", "budget:option=value with: tokens"),
        ("budget:many", "budget tokens must be a whole number"),
        ("budget:0", "at least 1, not 0"),
        ("random:9,newline=row", "use newline 'frame'"),
        ("default:3", "takes no options"),
        ("llava_video:stride=0", "at least 1"),
        ("llava_video:pool=conv", "Unknown pooling mode 'conv'"),
        ("llava_video:colour=red", "colour"),
        ("llava_video_slowfast:1,average,2,row,post,6", "too many"),
        ("shi_fast:t4", "must look like 's1t4'"),
        ("sf_llava:newline=row", "leaves no rows"),
        ("sf_llava:legacy=maybe", "true or false"),
        ({"layuot": "single"}, "Did you mean 'layout'"),
        ({"kind": "magic"}, "Unknown kind of aggregator 'magic'"),
        ({"layout": "single"}, "takes no 'fast'"),
        ({"fast": None}, "needs 'fast'"),
        ({"kind": "budget"}, "takes no 'slow'"),
        ({"kind": "random", "slow": None, "fast": None}, "needs 'prune'"),
        (7, "not int"),
    ],
)  # fmt: skip
def test_wrong_specs(spec: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(spec)


def test_a_made_aggregator_takes_no_options() -> None:
    with pytest.raises(UsageError, match="made already"):
        build(build("pllava"), frames=3)


def test_by_frame_takes_no_temporal_reducer() -> None:
    settings = AggregatorSettings().to_dict()
    settings["fast"]["temporal"]["kind"] = "mean"
    with pytest.raises(UsageError, match="no temporal reducer"):
        build(settings)


def test_registries_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    class EveryOther(Aggregator):
        """Registered from outside: ``every_other:3`` shows every third frame unpooled."""

        def streams(self, frames, height, width, given):
            step = SelectSettings("every", step=int(self.settings.argument))
            own = StreamSettings(step, PoolSettings("identity"))
            from av_llava.aggregators.streams import stream_plan

            return (stream_plan("single", own, frames, height, width),), "mine"

    monkeypatch.setitem(AGGREGATORS, "every_other", EveryOther)
    monkeypatch.setitem(PRESETS, "third", lambda step=3: settings_of(f"every_other:{step}"))
    monkeypatch.setitem(PRESETS, "quarter", settings_of("every_other:4"))
    for spec, frames in (("every_other:3", 4), ("third", 4), ("third:5", 2), ("quarter", 3)):
        aggregator = build(spec)
        plan = aggregator.plan(10, 2, 3)
        assert plan.n_tokens == frames * 6
        assert build(aggregator.settings.to_dict()).plan(10, 2, 3) == plan
        features = torch.randn(10, 2, 3, 4)
        step = plan.streams[0].frames[1]
        assert torch.equal(aggregator(features, plan).tokens, features[::step].flatten(0, 2))
    assert build("every_other:3", newline="frame").plan(10, 2, 3).n_tokens == 4 * 7


@pytest.mark.parametrize(
    ("position", "unpad", "newline"),
    [
        ("grid", True, "row"),
        ("frame", True, "frame"),
        ("one_token", True, "video"),
        ("one_token", False, "none"),
        ("no_token", True, "none"),
        ("no_token", False, "none"),
    ],
)
def test_llava_newline_positions(position: str, unpad: bool, newline: str) -> None:
    settings = settings_for("average", 2, position, None, unpad, "post")
    assert settings == build("llava_video", newline=newline).settings
    flat = settings_for("average", 2, position, None, unpad, "post", flat=True)
    assert flat.newline == "none"


def test_llava_settings_of_slow_and_fast(caplog: pytest.LogCaptureFixture) -> None:
    both = settings_for("bilinear", 2, "grid", 10, True)
    assert both == build("llava_video_slowfast:10,pool=bilinear").settings
    assert settings_for("max", 4, "no_token", None, False, "pre").stage == "pre"
    with caplog.at_level(logging.WARNING):
        only = settings_for("bilinear", 2, "frame", 10, True)
    assert only == build("llava_video:bilinear,newline=frame").settings
    assert "add_faster_video" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("average", 2, "middle", None, True), "Unknown newline position 'middle'"),
        (("conv", 2, "grid", None, True), "Unknown pooling mode 'conv'"),
        (("average", 2, "grid", None, False), "unpad"),
        (("average", 2, "frame", None, False), "unpad"),
        (("average", 2, "grid", 0, True), "at least 1"),
        (("average", 2, "grid", None, True, "middle"), "Unknown pooling stage"),
    ],
)
def test_wrong_llava_settings(arguments: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_for(*arguments)


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from av_llava.aggregators import build; "
        "print(build('budget:2048').plan(64, 27, 27).n_tokens, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2004", "False"]
