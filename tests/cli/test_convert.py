"""av-llava convert: commands from the registry, reports, exit codes, progress."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import program

from av_llava.checkpoints import convert as convert_module
from av_llava.checkpoints.convert import CONVERTERS, Report
from av_llava.cli import convert as command
from av_llava.cli.main import _guarded
from av_llava.cli.output import Output
from av_llava.demo_model import tiny_random


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_random(tmp_path_factory.mktemp("checkpoint") / "model"))


def test_a_conversion_with_its_report(cli_run, checkpoint: str, tmp_path: Path) -> None:
    done = cli_run("convert", "text-only", checkpoint, str(tmp_path / "out"), "--verify")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == f"text-only: {checkpoint} made {tmp_path / 'out'}"
    assert "  missing      0" in lines and "  unexpected   0" in lines
    assert any(line.startswith("  mapped       27 tensors") for line in lines)
    assert any(line.startswith("  left out     83 (towers, projectors") for line in lines)
    assert "  difference   0 (at most 0.0001 is allowed)" in lines
    assert (tmp_path / "out" / "config.json").is_file()


def test_json_is_one_object(cli_run, checkpoint: str, tmp_path: Path) -> None:
    words = ["convert", "llava", checkpoint, str(tmp_path / "out"), "--dry-run", "--json"]
    data = cli_run(*words).json
    assert data["report"]["mapped"] == 110 and data["report"]["dry_run"] is True
    assert not (tmp_path / "out").exists()


def test_a_dry_run_with_a_problem_ends_with_4(cli_run, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    broken = tiny_random(tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    save_file({**state, "model.extra": torch.ones(1)}, broken / "model.safetensors")
    done = cli_run("convert", "llava", str(broken), str(tmp_path / "out"), "--dry-run")
    assert done.code == 4 and "  unexpected   1" in done.out
    assert done.err == "warning: 1 unexpected: model.extra\n"
    as_json = cli_run("convert", "llava", str(broken), str(tmp_path / "out"), "--dry-run", "--json")
    assert as_json.code == 4 and as_json.json["report"]["unexpected"] == ["model.extra"]
    real = cli_run("convert", "llava", str(broken), str(tmp_path / "out"))
    assert real.code == 4 and "cannot be converted" in real.err and not (tmp_path / "out").exists()


def test_a_refusal_names_the_feature_and_the_flag(cli_run, checkpoint: str, tmp_path: Path) -> None:
    done = cli_run("convert", "hf", checkpoint, str(tmp_path / "out"))
    assert done.code == 4 and "the audio tower" in done.err and "--drop-audio" in done.err


def test_options_of_a_converter_are_flags(cli_run, checkpoint: str, tmp_path: Path) -> None:
    parts = str(tmp_path / "parts")
    assert cli_run("convert", "surgery", checkpoint, parts, "--parts", "projector").code == 0
    assert sorted(p.name for p in Path(parts).iterdir()) == ["mm_projector.safetensors"]
    back = str(tmp_path / "back")
    done = cli_run("convert", "surgery", checkpoint, back, "--put-back", parts, "--verify", "-q")
    assert done.code == 0 and done.err == ""


def test_a_difference_ends_with_4(cli_run, checkpoint: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("av_llava.checkpoints.llava_export.compare_ours", lambda *_: 0.5)
    done = cli_run("convert", "llava", checkpoint, str(tmp_path / "out"), "--verify")
    assert done.code == 4 and "differs from" in done.err and list(tmp_path.iterdir()) == []
    wide = ["--verify", "--tolerance", "0.6"]
    assert cli_run("convert", "llava", checkpoint, str(tmp_path / "out"), *wide).code == 0


# ------------------------------------------------------------- words


def test_the_list_names_every_converter_and_option(cli_run) -> None:
    done = cli_run("convert", "--list")
    assert done.code == 0
    for name, converter in CONVERTERS.items():
        assert f"{name} " in done.out and converter.summary in done.out
        assert all("--" + o.replace("_", "-") in done.out for o in converter.options)


@pytest.mark.parametrize("name", CONVERTERS)
def test_help_explains_every_flag(cli_run, name: str) -> None:
    done = cli_run("convert", name, "--help")
    assert done.code == 0
    flags = ["--dry-run", "--verify", "--shard-size", "--dtype", "--json"]
    flags += ["--" + o.replace("_", "-") for o in CONVERTERS[name].options]
    assert all(flag in done.out for flag in flags)


@pytest.mark.parametrize(
    ("code", "words", "said"),
    [
        (2, ["nonsense", "a", "b"], "nonsense"),
        (2, ["llava"], "SOURCE"),
        (2, ["llava", "{model}"], "needs a DESTINATION"),
        (2, ["llava", "{model}", "{out}", "--shard-size", "big"], "is not a size"),
        (2, ["llava", "{model}", "{out}", "--dtype", "int3"], "Unknown dtype 'int3'"),
        (2, ["llava", "{model}", "{out}", "--tolerance", "-1"], "at least 0"),
        (2, ["llava", "{model}", "{out}", "--parts", "all"], "--parts"),
        (2, ["upgrade", "{model}"], "either a destination or --in-place"),
        (4, ["llava", "./nowhere/at/all", "{out}"], "no folder"),
        (4, ["llava", "{model}", "{model}"], "exists"),
        (4, ["llava", "{model}", "{model}/inside"], "lies in the folder"),
        (4, ["upgrade", "{model}", "--in-place"], "not in LLaVA's layout"),
    ],
)
def test_wrong_words(cli_run, checkpoint: str, tmp_path: Path, code, words, said) -> None:
    places = {"model": checkpoint, "out": str(tmp_path / "out")}
    done = cli_run("convert", *(w.format(**places) for w in words))
    assert (done.code, said in done.err) == (code, True), done.err
    assert not (tmp_path / "out").exists()


def test_wrong_words_import_nothing_heavy(checkpoint: str, tmp_path: Path) -> None:
    code = (
        "import sys; from av_llava.cli.main import run\n"
        f"codes = [run(['convert', *w.split()]) for w in ('--list', 'hf --help', "
        f"'llava {checkpoint} {checkpoint}', 'llava x/y/z {tmp_path}/out', "
        f"'llava {checkpoint} {tmp_path}/out --dtype x')]\n"
        "heavy = {'torch', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "assert (codes, heavy) == ([0, 0, 4, 4, 2], set()), (codes, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_program_converts(checkpoint: str, tmp_path: Path) -> None:
    done = program("convert", "llava", checkpoint, str(tmp_path / "out"), "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)["report"]
    assert report["converter"] == "llava" and "model.safetensors" in report["files"]


# ------------------------------------------------------------- what is shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_for_people(monkeypatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = command._Progress(Output())
    progress(500, 1000)
    progress(1000, 1000)
    assert (progress._bar.n, progress._bar.total) == (1000, 1000)
    progress.close()
    shown = terminal.getvalue()
    assert "/1.00k" in shown and shown.split("\r")[-2].strip() == ""  # and is taken away


def test_notes_now_and_then_otherwise(monkeypatch, capsys) -> None:
    clock = iter([0.0, 5.0, 11.0, 11.0, 12.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    progress = command._Progress(Output())
    progress(10**6, 10**7)
    progress(2 * 10**6, 10**7)
    progress(3 * 10**6, 10**7)
    assert capsys.readouterr().err == "2 MB of 10 MB written\n"


def test_a_report_in_full() -> None:
    report = Report(
        "hf",
        "a",
        "b",
        mapped=2,
        reshaped=("x (1,) to (2,)",),
        dropped={"tied to the embedding": ("lm_head.weight",)},
        files=("config.json",),
        n_bytes=2_000_000,
        notes=("Mind this.",),
        difference=1.5e-7,
    )
    assert command.lines(report) == [
        "hf: a made b",
        "  mapped       2 tensors, 2 MB",
        "  missing      0",
        "  unexpected   0",
        "  wrong shape  0",
        "  reshaped     1: x (1,) to (2,)",
        "  left out     1 (tied to the embedding): lm_head.weight",
        "  files        1: config.json",
        "  difference   1.5e-07 (at most 0.0001 is allowed)",
        "  note: Mind this.",
    ]


def test_a_converter_from_outside_gets_its_command(monkeypatch, cli_run, tmp_path: Path) -> None:
    mine = convert_module.Converter(
        "mine", "nowhere:run", {"depth": convert_module.Option(int, 3, "How deep.")}
    )
    monkeypatch.setitem(CONVERTERS, "mine", mine)
    app = typer.Typer()
    app.add_typer(command.group(_guarded))
    known = typer.main.get_command(app).commands["convert"].commands  # type: ignore[attr-defined]
    flags = {o for p in known["mine"].params for o in p.opts}
    assert {"--depth", "--dry-run"} <= flags
