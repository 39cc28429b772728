"""``info``: media tables and JSON, and what is a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from clips import make_clip
from golden_data import golden
from PIL import Image
from safetensors.torch import load_file, save_file

from av_llava.answers import SCHEMA
from av_llava.checkpoints.file_names import PART_FILES
from av_llava.cli.info import is_model, table
from av_llava.errors import CheckpointError


def test_a_video_as_a_table(cli_run, clip: str) -> None:
    done = cli_run("info", clip)
    assert done.code == 0 and done.err == ""
    rows = dict(
        line.strip().split("  ", 1) for line in done.out.splitlines() if "  " in line.strip()
    )
    assert rows["kind"].strip() == "video"
    assert rows["width"].strip() == "160" and rows["frames"].strip() == "20"
    assert "h264" in done.out and "aac" in done.out and "44,100 Hz" in done.out


def test_a_video_as_json(cli_run, clip: str) -> None:
    data = cli_run("info", clip, "--json").json
    assert data["schema"] == SCHEMA and data["kind"] == "video"
    assert data["video"]["n_frames"] == 20 and data["audio"]["rate_hz"] == 44100


def test_other_media(cli_run, tmp_path: Path) -> None:
    sound = make_clip(tmp_path / "a.wav", seconds=1.0)
    assert cli_run("info", str(sound), "--json").json["kind"] == "audio"
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 24)).save(folder / f"{i}.png")
    assert cli_run("info", str(folder), "--json").json["video"]["n_frames"] == 3
    assert cli_run("info", str(folder / "0.png"), "--json").json["kind"] == "image"


@pytest.mark.parametrize("content", [b"", b"text"])
def test_what_is_not_media(cli_run, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.mp4"
    file.write_bytes(content)
    assert cli_run("info", str(file)).code == 3
    done = cli_run("info", str(file), "--json")
    assert done.code == 3 and done.json["error"]["type"] == "MediaError"


def test_missing_things(cli_run, tmp_path: Path) -> None:
    assert cli_run("info", "no-such.mp4").code == 3
    assert cli_run("info", str(tmp_path)).code == 3  # an empty folder
    assert cli_run("info").code == 2


def test_what_is_a_model(tmp_path: Path, clip: str) -> None:
    assert not is_model(clip) and not is_model(str(tmp_path)) and not is_model("a/clip.mp4")
    assert not is_model("./a/b") and not is_model("http://host/a")
    assert is_model("owner/some-model-7B")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        is_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert is_model(str(tmp_path))


@pytest.mark.parametrize("name", PART_FILES)
def test_a_folder_of_parts_is_a_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert is_model(str(tmp_path))


def test_a_model_is_described(cli_run, model, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    data = cli_run("info", str(tmp_path), "--json").json
    assert data["kind"] == "model" and data["parameters"] == 7
    assert "parameters" in cli_run("info", str(tmp_path)).out


def test_a_projector_with_and_without_its_base(cli_run) -> None:
    case = golden("llava/layout_mm_projector_only")
    folder, base = str(case / "checkpoint"), str(case / "base")
    done = cli_run("info", folder)
    assert done.code == 0 and "a projector" in done.out
    assert "\nnotes\n  The folder does not name" in done.out and "problems" not in done.out
    data = cli_run("info", folder, "--base", base, "--json").json
    assert data["base"] == base and data["missing"] == [] and data["problems"] == []
    assert data["vision_tower"]["weights"] == str(case / "vision_tower")


def test_what_stands_in_the_way_ends_with_4(cli_run, tmp_path: Path) -> None:
    case = golden("llava/v15_flat_batch3_right")
    shutil.copytree(case, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoint" / "model.safetensors"
    state = load_file(file)
    del state["model.mm_projector.0.bias"]
    save_file(state, file)
    done = cli_run("info", str(tmp_path / "checkpoint"))
    assert done.code == 4 and "\nproblems\n" in done.out and "mm_projector.0.bias" in done.out
    data = cli_run("info", str(tmp_path / "checkpoint"), "--json").json
    assert data["missing"] == ["model.mm_projector.0.bias"] and len(data["problems"]) == 1
    file.write_bytes(file.read_bytes()[:-100])
    done = cli_run("info", str(tmp_path / "checkpoint"), "--json")
    assert done.code == 4 and str(file) in done.json["error"]["message"]


def test_a_base_belongs_to_a_checkpoint(cli_run, clip: str) -> None:
    done = cli_run("info", clip, "--base", "somewhere")
    assert done.code == 2 and "--base" in done.err


def test_tables_leave_out_what_is_unknown() -> None:
    data = {
        "a_s": 1.5,
        "b": None,
        "c": {"n_d": 1000, "e": [], "h": {}},
        "f": [{"g": True}, {"g": False}],
    }
    assert table(data) == ["a  1.5 s", "c", "  d  1,000", "  e  none", "f", "  g  yes", "  g  no"]
    assert table({"missing": ["x", "y"]}) == ["missing  x, y"]
    told = {"problems": ["It is gone.", "So is that."], "notes": []}
    assert table(told) == ["problems", "  It is gone.", "  So is that."]
