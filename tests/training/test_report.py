"""What is wrong with training data: every kind, where it stands, how often."""

from __future__ import annotations

import base64
import json
import shutil

import pytest
from clips import make_clip
from PIL import Image

from av_llava.chat import TEMPLATES
from av_llava.errors import UsageError
from av_llava.training import report
from av_llava.training.report import PROBLEMS, WARNINGS, validate
from av_llava.training.store import ChosenStore, open_store


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    make_clip(folder / "film.mp4", seconds=1, size=(64, 48))
    make_clip(folder / "mute.mp4", seconds=1, size=(64, 48), audio=None)
    make_clip(folder / "sound.wav", seconds=1, video=False)
    Image.new("RGB", (60, 40)).save(folder / "picture.png")
    (folder / "text.mp4").write_text("no film at all\n" * 50)
    whole = (folder / "picture.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture
def folder(media, tmp_path):
    shutil.copytree(media, tmp_path, dirs_exist_ok=True)
    return tmp_path


def row(question="What?", answer="Red.", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


def write(folder, rows):
    file = folder / "train.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return open_store(file)


BAD = [
    (row(id="a"), None),
    ("{broken", "malformed row"),
    ({"text": "x"}, "malformed row"),
    (row("<image>"), "placeholders"),
    (row(image=["picture.png"] * 2, question="<image>"), "placeholders"),
    (row(answer="  "), "no answer"),
    ({"conversations": row()["conversations"][:1]}, "no answer"),
    ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "train": False}]}, "no answer"),
    (row(video="none.mp4"), "missing media"),
    (row(video="film.mp4", audio="none.wav"), "missing media"),
    (row(id="a"), "duplicate id"),
    ({"conversations": [row()["conversations"][0], *row()["conversations"]]}, "turn order"),
    ({"conversations": [row()["conversations"][1], *row()["conversations"]]}, "turn order"),
    (row(vdeo="film.mp4"), "unknown key"),
    ({"q": "x QA_GT_caption_based_noisy", "a": "y", "video_id": "film"}, "cleaned text"),
    ({"conversations": [*row()["conversations"], {"from": "reject_gpt", "value": "x"}]}, "preference turns"),
]  # fmt: skip


def test_every_kind_is_found_where_it_stands(folder):
    store = write(folder, [r for r, _ in BAD])
    calls = []
    found = validate(store, progress=lambda *x: calls.append(x))
    expected = [k for _, k in BAD if k]
    assert {**found.problems, **found.warnings} == {k: expected.count(k) for k in expected}
    assert set(found.problems) <= set(PROBLEMS) and set(found.warnings) <= set(WARNINGS)
    assert {(f.kind, f.where) for f in found.findings} == {
        (kind, store.where(i)) for i, (_, kind) in enumerate(BAD) if kind
    }
    assert found.n_bad == sum(k in PROBLEMS for k in expected)
    assert all(not f.text.startswith(f.where) for f in found.findings)
    assert calls[-1] == (len(BAD), len(BAD))
    assert json.loads(json.dumps(found.to_dict()))["bad_rows"] == found.n_bad


def test_all_kinds_are_tried_here():
    kinds = {k for _, k in BAD if k}
    assert kinds == (set(PROBLEMS) | set(WARNINGS)) - {"unreadable media"}


def test_only_the_first_are_kept(folder):
    store = write(folder, ["{"] * 7 + [row("<image>")] * 3)
    found = validate(store, first=2)
    assert found.problems == {"malformed row": 7, "placeholders": 3} and len(found.findings) == 4
    assert validate(store, first=0).findings == []


def test_good_data(folder):
    rows = [row(), row(video="film.mp4"), row(image="picture.png"), row(audio="sound.wav"),
            row(video="mute.mp4", audio="sound.wav"), row(image="https://x.org/p.png")]  # fmt: skip
    found = validate(write(folder, rows), decode=True, workers=2)
    assert (found.n_bad, found.n_media, found.n_decoded) == (0, 6, 4)
    assert not found.problems and not found.warnings


DAMAGED = [
    (row(video="text.mp4"), "text.mp4"),
    (row(image="cut.png"), "cut.png"),
    (row(video="sound.wav"), "sound.wav"),
    (row(image="film.mp4"), "film.mp4"),
    (row(audio="mute.mp4"), "mute.mp4"),
    (row(video="film.mp4", audio="text.mp4"), "text.mp4"),
    (row(video="mute.mp4", use_audio="on"), "mute.mp4"),
    (row(video={"path": "film.mp4", "start": 50}), "film.mp4"),
]


def test_decoding_finds_what_headers_hide(folder):
    store = write(folder, [r for r, _ in DAMAGED])
    assert not validate(store).problems
    found = validate(store, decode=True, workers=2)
    assert found.problems == {"unreadable media": len(DAMAGED)} and found.n_bad == len(DAMAGED)
    for (_, name), finding in zip(DAMAGED, found.findings, strict=True):
        assert name in finding.text


def test_a_file_is_decoded_once(folder, monkeypatch):
    tried = []
    real = report.try_medium
    monkeypatch.setattr(
        report, "try_medium", lambda p, limits: tried.append(p.source) or real(p, limits)
    )
    found = validate(write(folder, [row(video="text.mp4")] * 200), decode=True)
    assert len(tried) == found.n_decoded == 1 and found.problems["unreadable media"] == 200


def test_a_missing_file_is_said_once(folder):
    found = validate(write(folder, [row(video="none.mp4")]), decode=True)
    assert found.problems == {"missing media": 1} and found.n_bad == 1


def test_rows_that_a_mixture_repeats_are_no_duplicates(folder):
    store = write(folder, [row(id="a"), row(id="b"), row(id="a")])
    assert not validate(ChosenStore(store, [0, 1, 0, 1])).warnings
    assert validate(ChosenStore(store, [0, 2, 0])).warnings == {"duplicate id": 1}


def test_the_order_of_turns_is_said_as_templates_say_it(folder):
    twice = {"conversations": [row()["conversations"][0], *row()["conversations"]]}
    store = write(folder, [twice])
    (finding,) = validate(store).findings
    with pytest.raises(UsageError) as refused:
        TEMPLATES["plain"].render(store[0].messages)
    assert finding.text.startswith(str(refused.value)) and "jinja" in finding.text


def test_media_that_stand_in_the_row_itself(folder):
    picture = base64.b64encode((folder / "picture.png").read_bytes()).decode()
    good = row("<image>", image=f"data:image/png;base64,{picture}")
    store = write(folder, [good, row("<video>", video="data:video/mp4;base64,AAAA")])
    found = validate(store)
    assert (found.n_media, found.n_bad) == (2, 0)
    found = validate(store, decode=True)
    assert (found.n_media, found.n_decoded, found.n_bad) == (2, 2, 1)
    (finding,) = found.findings
    assert finding.kind == "unreadable media" and finding.where == store.where(1)
    assert "<3 bytes>" in finding.text and "b'" not in finding.text


def test_a_file_address_is_looked_for_and_decoded(folder):
    rows = [row(video=(folder / name).as_uri()) for name in ("film.mp4", "none.mp4", "text.mp4")]
    found = validate(write(folder, rows), decode=True)
    assert found.problems == {"missing media": 1, "unreadable media": 1} and found.n_decoded == 3


def test_a_key_that_stands_twice(folder):
    text = json.dumps(row(video="film.mp4"))
    found = validate(write(folder, [text[:-1] + ', "video": "mute.mp4"}']))
    (finding,) = found.findings
    assert finding.kind == "malformed row"
    assert finding.text == "the key 'video' stands twice in one object; leave one out."
