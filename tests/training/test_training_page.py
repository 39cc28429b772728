"""docs/training.md is true: its commands parse, its example trains, its table is computed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import training_page
import yaml
from clips import make_clip
from train_runs import CPU, make_base
from transformers import TrainingArguments

import av_llava
from av_llava.cli import main as cli
from av_llava.training import run_folder
from av_llava.training.evaluation import SCORERS
from av_llava.training.recipe import merged, parse_value, read_recipe, settings_from
from av_llava.training.run import train
from av_llava.training.settings import PARTS, TrainSettings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
RECIPES = sorted(p.name for p in (ROOT / "scripts" / "recipes").glob("*.yaml"))


def fenced(*languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def commands() -> list[list[str]]:
    lines = "".join(fenced("console", "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def test_the_table_of_memory_is_computed() -> None:
    assert training_page.updated(TEXT) == TEXT, "run: python tests/training_page.py"


def test_every_training_command_parses() -> None:
    seen = 0
    for words in commands():
        if "train" not in words:
            continue
        own = [w for w in words[words.index("train") + 1 :] if w != "..."]
        recipe, *rest = own
        read_recipe(ROOT / recipe, [w for w in rest if not w.startswith("--")])
        seen += 1
    assert seen >= 4


def test_every_recipe_is_named_with_what_it_trains() -> None:
    section = TEXT.split("## Which recipe")[1].split("\n## ")[0]
    assert sorted(re.findall(r"scripts/recipes/(\w+\.yaml)", section)) == RECIPES


def test_every_piece_of_a_recipe_is_read() -> None:
    pieces = [b for b in fenced("yaml") if "datasets:" not in b]
    assert len(pieces) >= 3
    for piece in pieces:
        settings_from(merged({"output": "x"}, parse_value(piece)))


def test_keys_in_the_text_exist() -> None:
    recipe = TrainSettings()
    names = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", TEXT)
    names = [n for n in names if not n.endswith((".md", ".json", ".jsonl", ".yaml"))]
    assert len(names) > 8
    for name in names:
        first, second, *_ = name.split(".")
        if first == "training":
            assert second in TrainingArguments.__dataclass_fields__, name
        elif first in TrainSettings.__dataclass_fields__:
            assert second in vars(getattr(recipe, first)), name
    for part in PARTS:
        assert part in TEXT or part == "modalities"


def test_files_of_a_run_are_those_that_are_written() -> None:
    section = TEXT.split("## What a run leaves")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
    names = (run_folder.RECIPE, run_folder.RECORD, run_folder.LOG, run_folder.FINAL)
    assert {*names, run_folder.QUARANTINE, run_folder.LENGTHS} <= listed
    assert set(SCORERS) <= set(re.findall(r"`(\w+)`", TEXT))


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the page speaks of."""
    folder = tmp_path_factory.mktemp("newcomer")
    make_base(folder)
    make_clip(folder / "clip.mp4", seconds=2, size=(64, 48))
    make_clip(folder / "silent.mp4", seconds=2, size=(64, 48), audio=None)
    make_clip(folder / "sound.wav", seconds=2, video=False)
    (example,) = fenced("json")
    (folder / "data.jsonl").write_text(example)
    shutil.copytree(ROOT / "scripts" / "recipes", folder / "scripts" / "recipes")
    return folder


def test_a_newcomer_gets_from_files_to_an_answer(newcomer, monkeypatch, capsys) -> None:
    monkeypatch.chdir(newcomer)
    for words in commands():
        if words[0] != "av-llava" or words[1] == "ask":
            continue
        if words[1] == "train":
            words = [w.replace("CHECKPOINT", "base") for w in words]
            short = {**CPU, "max_steps": 2, "gradient_accumulation_steps": 1}
            words += [f"training.{k}={json.dumps(v)}" for k, v in short.items()]
            words += ["batch.workers=0", "lora.rank=4"]
        assert cli.run(words[1:]) == 0, capsys.readouterr().err
    answer = av_llava.load("runs/first/final", device="cpu").ask(
        "clip.mp4", "What happens?", max_new_tokens=3
    )
    assert answer.usage.completion_tokens >= 1


def test_the_python_of_the_page_runs(newcomer: Path, tmp_path: Path) -> None:
    (code,) = fenced("py")
    recipe = tmp_path / "recipe.yaml"
    data = {
        "model": {"path": str(newcomer / "base")},
        "data": {"train": str(newcomer / "data.jsonl")},
        "batch": {"workers": 0},
        "training": {**CPU, "max_steps": 1},
    }
    recipe.write_text(yaml.safe_dump(data))
    code = code.replace('"recipe.yaml"', repr(str(recipe))).replace("runs/one", str(tmp_path / "r"))
    names: dict = {}
    exec(compile(code, "docs/training.md", "exec"), names)
    assert names["final"] == tmp_path / "r" / "final" and names["train"] is train
