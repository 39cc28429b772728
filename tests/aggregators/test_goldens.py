"""Agreement with the published aggregation functions."""

from __future__ import annotations

import json

import pytest
import torch
from golden_data import golden
from safetensors.torch import load_file

from av_llava.aggregators import build, settings_for
from av_llava.aggregators.pool2d import pool2d
from av_llava.errors import UsageError
from av_llava.settings import (
    AggregatorSettings,
    PoolSettings,
    SelectSettings,
    StreamSettings,
    TemporalSettings,
)

torch.set_num_threads(1)
CASES = json.loads(golden("slowfast/meta.json").read_text())["cases"]
LLAVA = json.loads(golden("aggregators/meta.json").read_text())["cases"]


def named(prefix: str) -> list[str]:
    return sorted(name for name in CASES if name.startswith(prefix))


def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return CASES[name]["parameters"], load_file(golden(f"slowfast/{name}.safetensors"))


def agree(got: torch.Tensor, want: torch.Tensor, *, exact: bool) -> None:
    tolerance = 0 if exact else 1e-6
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", named("apple_"))
def test_apple(name: str) -> None:
    parameters, data = load(name)
    text = parameters["temporal_aggregation"]
    aggregator = build(text)
    side, frames = parameters["side"], parameters["frames"]
    plan = aggregator.plan(frames, side, side)
    assert plan.n_tokens == data["output"].shape[1]
    exact = text in ("concat", "spatial_1d_max_pool", "spatial_2d_max_pool")
    agree(aggregator(data["input"], plan).tokens, data["output"][0], exact=exact)
    if text.startswith("slowfast"):
        slow = sum(plan.streams[0].patches)
        got = aggregator(data["input"], plan).tokens[:slow]
        agree(got, data["output"][0, :slow], exact=True)


def shi_settings(parameters: dict) -> AggregatorSettings:
    least = parameters["min_fast_frames"]
    stream = StreamSettings(
        SelectSettings(
            "sample", step=parameters["fast_token_temporal_sampling_stride"], min_frames=least
        ),
        PoolSettings("average", parameters["fast_token_spatial_stride"]),
        TemporalSettings(
            "average", parameters["fast_token_temporal_stride"], tail="drop", min_frames=least
        ),
    )
    return AggregatorSettings(layout="single", slow=stream, fast=None, newline="none")


@pytest.mark.parametrize("name", named("shi_"))
def test_shi(name: str) -> None:
    parameters, data = load(name)
    aggregator = build(shi_settings(parameters))
    side = parameters["side"]
    for i, frames in enumerate(parameters["frames"]):
        plan = aggregator.plan(frames, side, side)
        assert plan.n_tokens == len(data[f"fast_{i}"])
        agree(aggregator(data[f"input_{i}"], plan).tokens, data[f"fast_{i}"], exact=False)


@pytest.mark.parametrize(("variant", "name"), [("s1t4", "shi_s1t4_64f"), ("s2t4", "shi_s2t4_128f")])
def test_shi_presets_are_the_published_settings(variant: str, name: str) -> None:
    parameters, _ = load(name)
    # The recorded function gets features that were already pooled by 2.
    assert build(f"shi_fast:{variant},stride=1").settings == shi_settings(parameters)


def next_settings(parameters: dict) -> AggregatorSettings:
    faster = parameters["faster_token_stride"] if parameters["add_faster_video"] else None
    return settings_for(
        parameters["mm_spatial_pool_mode"],
        parameters["mm_spatial_pool_stride"],
        parameters["mm_newline_position"],
        faster,
        unpad=True,
    )


NEXT = ["next_grid_avg27", "next_frame_avg24", "next_no_token_max24", "next_faster_grid_bilinear27"]


@pytest.mark.parametrize("name", NEXT)
def test_llava_next(name: str) -> None:
    parameters, data = load(name)
    aggregator = build(next_settings(parameters))
    marks = {"newline": data["image_newline"]}
    if "faster_token" in data:
        marks["frame_end"] = data["faster_token"]
    for i, frames in enumerate(parameters["frames"]):
        plan = aggregator.plan(frames, parameters["side"], parameters["side"])
        out = aggregator(data[f"input_{i}"], plan, marks).tokens
        agree(out, data[f"output_{i}"], exact=parameters["mm_spatial_pool_mode"] == "max")


def test_llava_next_stride_is_honoured() -> None:
    parameters, data = load("next_stride_ignored24")
    aggregator = build(next_settings(parameters))
    plan = aggregator.plan(2, 24, 24)
    assert plan.n_tokens == 2 * 6 * 6 < len(data["output_0"])
    pooled = pool2d(data["input_0"], "average", 4).flatten(0, 2)
    assert torch.equal(aggregator(data["input_0"], plan).tokens, pooled)


def test_llava_next_second_video_keeps_its_stride() -> None:
    """The published helper doubles its stride with every video; the first one is right."""
    parameters, data = load("next_faster_two_videos_bug")
    aggregator = build(next_settings(parameters))
    marks = {"newline": data["image_newline"], "frame_end": data["faster_token"]}
    plan = aggregator.plan(3, 24, 24)
    agree(aggregator(data["input_0"], plan, marks).tokens, data["output_0"], exact=False)
    assert len(aggregator(data["input_1"], plan, marks)) == len(data["output_0"])


@pytest.mark.parametrize("name", named("next_pool_"))
def test_llava_next_pooling(name: str) -> None:
    parameters, data = load(name)
    side = parameters["side"]
    grid = data["input"].unflatten(1, (side, side))
    out = pool2d(grid, parameters["mm_spatial_pool_mode"], parameters["stride"])
    agree(out.flatten(1, 2), data["output"], exact=False)


@pytest.fixture(scope="module")
def llava() -> dict[str, torch.Tensor]:
    return load_file(golden("aggregators/llava_video.safetensors"))


@pytest.mark.parametrize("name", ["lv_helpers_even", "lv_helpers_odd"])
def test_llava_helpers(name: str, llava: dict[str, torch.Tensor]) -> None:
    case = LLAVA[name]
    features = llava[case["features"]].float()  # stored as float16
    side = int(features.shape[1] ** 0.5)
    grid = features.unflatten(1, (side, side))
    for key, result in case["results"].items():
        want = llava[result]
        if key.startswith("get_2dPool"):
            _, mode, stride = key.split(".")
            out = pool2d(grid, mode, int(stride)).flatten(1, 2)
            agree(out, want, exact=mode == "max")
            continue
        newline = "frame" if "per_frame" in key else "row"
        aggregator = build("llava_video", stride=1, newline=newline)
        plan = aggregator.plan(len(grid), side, side)
        out = aggregator(grid, plan, {"newline": llava[case["newline"]]}).tokens
        assert torch.equal(out, want.reshape(-1, want.shape[-1]))
    for key in case["errors"]:
        _, mode, *stride = key.split(".")
        with pytest.raises(UsageError, match=r"Unknown|cannot be pooled"):
            pool2d(grid, mode, int(stride[0]) if stride else 2)


@pytest.mark.parametrize("name", sorted(n for n in LLAVA if "helpers" not in n))
def test_llava_videos(name: str, llava: dict[str, torch.Tensor]) -> None:
    case = LLAVA[name]
    config = case["config"]
    unpad = "unpad" in config["mm_patch_merge_type"]
    settings = settings_for(
        config["mm_spatial_pool_mode"],
        config["mm_spatial_pool_stride"],
        config["mm_newline_position"] or "one_token",
        config["faster_token_stride"] if config["add_faster_video"] else None,
        unpad=unpad,
        flat=config["mm_patch_merge_type"] == "flat",
    )
    aggregator = build(settings)
    marks = {mark: llava[case[mark]] for mark in ("newline", "frame_end") if mark in case}
    features = llava[case["features"]].split(case["frames"])
    side = int(features[0].shape[1] ** 0.5)
    for video, result in zip(features, case["results"], strict=True):
        if result is None:
            continue
        plan = aggregator.plan(len(video), side, side)
        out = aggregator(video, plan, marks).tokens
        if name == "lv_odd_grid_stride4_ignored":
            # The reference pools by 2 whatever the config says; the config is honoured here.
            assert plan.n_tokens == len(video) * 2 < len(llava[result])
            continue
        agree(out, llava[result], exact=config["mm_spatial_pool_mode"] == "max")
