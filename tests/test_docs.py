"""README and docs are true: their code runs, their tables, links, commands and names are right.

Python blocks of a page run in order in one namespace, in a folder with the files that they name; a
``text`` block right after one is what it prints. ``av-llava`` lines of ``sh`` blocks run as well.
docs/extending.md and docs/cli.md have tests of their own. ``python tests/test_docs.py`` brings tables
and printed text up to date; look at what changed before committing it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import docs_tables
import numpy as np
import pytest
import torch
import typer
from clips import make_clip
from docs_data import write_examples
from docs_tables import FAMILIES, PAGES, ROOT, TABLES
from golden_data import FULL, golden
from PIL import Image
from transformers import WhisperModel

import av_llava
from av_llava import errors
from av_llava.aggregators import PRESETS
from av_llava.answers import Answer, Usage
from av_llava.cli import main as cli
from av_llava.demo_model import tiny_config, tiny_tokenizer

torch.set_num_threads(1)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EVERY_PAGE = sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    line: int
    printed: str | None
    """What the text block right after it says."""


def whole(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    text = whole(page)
    found = list(FENCE.finditer(text))
    out = []
    for i, match in enumerate(found):
        after = next(iter(found[i + 1 :]), None)
        follows = after is not None and not text[match.end() : after.start()].strip()
        printed = after[2] if after is not None and follows and after[1] == "text" else None
        out.append(Block(match[1], match[2], text[: match.start()].count("\n") + 2, printed))
    return out


def prose(page: str) -> str:
    return FENCE.sub("", whole(page))


def names_in(page: str) -> list[str]:
    """Everything written as inline code."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_files(tmp_path_factory.mktemp("newcomer"))


def with_files(folder: Path) -> Path:
    """Fill a folder with the files that the pages speak of."""
    make_clip(folder / "clip.mp4", seconds=6, fps=10)
    demo().write(folder / "demo" / "clip.mp4")
    make_clip(folder / "silent.mp4", seconds=2, audio=None)
    make_clip(folder / "sound.wav", seconds=2, video=False)
    photo().save(folder / "photo.jpg")
    write_examples(folder)
    case = golden("llava/sf_odd_stride3_average")
    shutil.copytree(case / "checkpoint", folder / "checkpoints" / "my-llava-video")
    shutil.copytree(case / "vision_tower_siglip", folder / "checkpoints" / "vision_tower_siglip")
    WhisperModel(tiny_config(tiny_tokenizer()).audio_config).save_pretrained(
        folder / "checkpoints" / "whisper"
    )
    return folder


def demo() -> ModuleType:
    """The script behind `make demo`, which leaves the clip that the README asks about."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "demo") == module.FOLDER
    return module


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages show what a machine without a GPU prints."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)


def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ------------------------------------------------------------------ code


def printed_by(page: str) -> list[tuple[Block, str]]:
    """Run a page's Python; must be called in the folder with its files."""
    names: dict[str, object] = {"photo": photo()}
    out = []
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.body, page, "exec")
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                exec(code, names)
            out.append((block, text.getvalue()))
    return out


@pytest.mark.parametrize("page", PAGES)
def test_python_runs_and_prints_what_the_page_says(
    page: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in set(re.findall(r'^PRESETS\["(\w+)"\]', whole(page), re.MULTILINE)):
        monkeypatch.setitem(PRESETS, name, PRESETS["default"])  # taken out again afterwards
    for block, text in printed_by(page):
        if block.printed is not None:
            assert text == block.printed, f"{page}:{block.line}; run: python tests/test_docs.py"


def commands(page: str) -> list[str]:
    lines = [b.body.replace("\\\n", " ") for b in blocks(page) if b.language == "sh"]
    return [line for body in lines for line in body.splitlines() if line.strip()]


INTERACTIVE_OR_SLOW = ("chat", "doctor")
"""Only their help is tried here; tests/cli runs them."""


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)])
def test_every_command_works(
    page: str,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the order of the page, since one may read what another wrote."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AV_LLAVA_MODEL", raising=False)
    for line in commands(page):
        program, *words = shlex.split(line, comments=True)
        if program == "make":
            assert set(words) <= targets()
        elif program == "source":
            assert words == [".venv/bin/activate"]
        else:
            assert program == "av-llava"
            if words[0] in INTERACTIVE_OR_SLOW:
                words = [words[0], "--help"]
            assert cli.run(words) == 0, f"{line}: {capsys.readouterr().err}"


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))


def test_the_first_screen_is_what_it_is_and_two_commands() -> None:
    first = whole("README.md").split("\n## ")[0]
    assert len(first.splitlines()) <= 20
    assert [c.split()[:2] for c in commands("README.md")[:2]] == [
        ["make", "demo"],
        ["make", "test"],
    ]


# ------------------------------------------------------------------ tables


@pytest.mark.parametrize("page", PAGES)
def test_tables_agree_with_the_code(page: str) -> None:
    text = whole(page)
    assert docs_tables.updated(text) == text, "run: python tests/docs_tables.py"


def test_every_table_is_used_once_and_a_stale_one_is_noticed() -> None:
    texts = [whole(p) for p in PAGES]
    used = [m["name"] for t in texts for m in docs_tables.BLOCK.finditer(t)]
    assert sorted(used) == sorted(TABLES)
    stale = texts[0].replace("| 4608 |", "| 4607 |").replace(": 4608 ", ": 4607 ")
    assert stale != texts[0] and docs_tables.updated(stale) == texts[0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_cases_that_the_readme_names_exist(family: docs_tables.Family) -> None:
    root = FULL if FULL.is_dir() else Path(__file__).parent / "goldens"
    patterns = re.findall(r"`(\w+_)\*`", family.checked)
    assert patterns or "as Vicuna" in family.checked
    for pattern in patterns:
        if root is FULL:
            assert list(root.glob(f"llava/{pattern}*/checkpoint"))


DAMAGED = {
    "missing": "there-is-none.mp4",
    "empty": "empty.mp4",
    "a text file named": "text.mp4",
    "an mp4 without its index": "no_index.mp4",
    "an mp4 whose end is missing": "half.mp4",
    "a folder without pictures": "folder",
    "a playlist": "list.m3u8",
    "a picture that is cut short": "cut.jpg",
    "a sound file where": av_llava.chat.MediaPart("video", "sound.wav"),
    "a video without sound": "silent.mp4",
    "one frame": "one.mp4",
    "a window after the end": av_llava.chat.MediaPart("video", "clip.mp4", start_s=100),
}


@pytest.fixture(scope="module")
def damaged(files: Path) -> Path:
    (files / "empty.mp4").touch()
    (files / "text.mp4").write_text("no film at all\n" * 50)
    make_clip(files / "whole.mp4", seconds=6, faststart=True)
    whole = (files / "whole.mp4").read_bytes()
    (files / "half.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    make_clip(files / "late.mp4", seconds=2, faststart=False)
    late = (files / "late.mp4").read_bytes()
    (files / "no_index.mp4").write_bytes(late[: late.rindex(b"moov") - 4])
    (files / "folder").mkdir()
    (files / "list.m3u8").write_text("#EXTM3U\nclip.mp4\n")
    (files / "cut.jpg").write_bytes((files / "photo.jpg").read_bytes()[:2000])
    make_clip(files / "one.mp4", seconds=0.1, fps=10, audio=None)
    return files


def damage_rows() -> list[tuple[str, str]]:
    """The rows of the table in docs/media.md: a file, and what comes of it."""
    section = whole("docs/media.md").split("## Files that")[1]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section.split("\n## ")[0], re.MULTILINE)
    return [row for row in rows if row[0] not in ("file", "---")]


@pytest.mark.parametrize(("file", "result"), damage_rows(), ids=lambda c: c.split(",")[0])
def test_damaged_files_do_what_the_table_says(
    file: str, result: str, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(damaged)
    source = next(v for k, v in DAMAGED.items() if file.startswith(k))
    model = av_llava.load(device="cpu")
    if result.startswith("`"):
        kind = getattr(errors, re.match(r"`(\w+)`", result)[1])  # type: ignore[index]
        with pytest.raises(kind):
            model.ask(source, "What?", max_new_tokens=1)
        return
    answer = model.ask(source, "What?", max_new_tokens=1)
    assert answer.media[0].pts_s
    assert bool(answer.warnings) == ("warnings" in result)
    if "audio=" in result:
        with pytest.raises(errors.MediaError):
            model.ask(source, "What?", max_new_tokens=1, audio="on")


# ------------------------------------------------------------------ links and names


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        assert "://" not in target, f"{page}: {target} names a host"
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_names_in_the_text_exist(page: str) -> None:
    known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    groups = [known[name] for name in ("convert", "data")]
    inner = [g.get_command(None, name) for g in groups for name in g.list_commands(None)]
    flags = {flag for c in (*known.values(), *inner) for p in c.params for flag in p.opts}
    for name in names_in(page):
        words = name.split()
        if words[0] == "make":
            assert set(words[1:]) <= targets(), f"{page}: {name}"
        elif words[0] == "av-llava" and len(words) > 1:
            assert words[1] in known, f"{page}: {name}"
        assert {w for w in words if w.startswith("--")} <= flags, f"{page}: {name}"
        if re.fullmatch(r"(av_llava|tests|docs|scripts|eval|bench)/[\w/.-]+", name):
            assert (ROOT / name).exists(), f"{page}: {name}"
        dotted = re.match(r"av_llava(?:\.\w+)+", name)
        if dotted:
            assert resolves(dotted[0]), f"{page}: {name}"


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    found: object = av_llava
    path = "av_llava"
    for part in dotted.split(".")[1:]:
        path += f".{part}"
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(path)
            continue
        return False
    return True


def test_letters_mean_the_same_on_every_page() -> None:
    row = re.compile(r"^\| ((?:[A-Za-z], )?[A-Za-z]) \| ([^|]+) \|$", re.MULTILINE)
    letters = dict(row.findall(whole("docs/glossary.md")))
    assert len(letters) > 5
    for page in EVERY_PAGE:
        for section in re.findall(r"^## Letters.*?(?=^## |\Z)", whole(page), re.M | re.DOTALL):
            for letter, meaning in row.findall(section):
                assert letters[letter] == meaning, f"{page}: {letter}"


def test_the_page_names_every_field_of_an_answer() -> None:
    section = whole("docs/python_api.md").split("## What an answer knows")[1].split("\n## ")[0]
    written = re.findall(r"^\| `(\w+)` \|", section.split("<!-- table")[0], re.MULTILINE)
    assert written == [f.name for f in dataclasses.fields(Answer)]
    usage = {f.name for f in dataclasses.fields(Usage)} | {"prompt_tokens"}
    assert usage <= set(re.findall(r"`(\w+_tokens)`", section))


def test_error_classes_and_codes_of_the_page_are_all_there_are() -> None:
    page = whole("docs/python_api.md")
    written = {(n, int(c)) for n, c in re.findall(r"^\| `(\w+Error)` \| (\d+) \|", page, re.M)}
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and hasattr(k, "exit_code")]
    assert written == {(k.__name__, k.exit_code) for k in kinds}


def rewrite(page: str) -> None:
    """Put into a page what its code prints now."""
    lines = whole(page).splitlines()
    for block, text in reversed(printed_by(page)):
        if block.printed is not None:
            start = lines.index("```text", block.line) + 1
            lines[start : lines.index("```", start)] = text.splitlines()
    (ROOT / page).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    docs_tables.main()
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(with_files(Path(place))):
        for name in PAGES:
            rewrite(name)
