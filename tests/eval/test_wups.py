"""WUPS on a dictionary of a few words, in the form of WordNet's own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from av_llava.errors import DataError
from av_llava_eval import get_task
from av_llava_eval.reading.wordnet import PARTS, WordNet
from av_llava_eval.reading.wups import beside, wups

# entity ─ thing ─ animal ─ dog ─ puppy, animal ─ cat, thing ─ kite; move ─ run, move ─ walk; red.
NOUNS = {
    "entity": (100, ()),
    "thing": (200, (100,)),
    "animal": (300, (200,)),
    "dog": (400, (300,)),
    "cat": (500, (300,)),
    "puppy": (600, (400,)),
    "kite": (700, (200,)),
}
VERBS = {"move": (110, ()), "run": (210, (110,)), "walk": (310, (110,))}
LICENCE = "  1 This software and database is being provided to you under a license.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "wordnet"
    out.mkdir()
    words = {"noun": NOUNS, "verb": VERBS, "adj": {"red": (120, ())}, "adv": {}}
    for part, letter in PARTS.items():
        index, data = LICENCE, LICENCE
        for word, (offset, above) in words[part].items():
            index += f"{word} {letter} 1 1 @ 1 0 {offset:08d}  \n"
            pointers = "".join(f" @ {a:08d} {letter} 0000" for a in above)
            data += (
                f"{offset:08d} 03 {letter} 01 {word} 0 {len(above):03d}{pointers} | a gloss | x\n"
            )
        (out / f"index.{part}").write_text(index)
        (out / f"data.{part}").write_text(data)
    (out / "noun.exc").write_text("mice mouse\npuppies puppy\n")
    (out / "verb.exc").write_text("running run\n")
    return out


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("dog", "dog", 1.0),
        ("dog", "cat", 2 * 3 / (1 + 1 + 2 * 3)),  # animal has depth 3, counted from 1
        ("dog", "puppy", 2 * 4 / (0 + 1 + 2 * 4)),
        ("cat", "kite", 2 * 2 / (2 + 1 + 2 * 2)),
        ("dogs", "cats", 2 * 3 / (1 + 1 + 2 * 3)),
        ("running", "walked", 2 * 1 / (1 + 1 + 2 * 1)),
        ("run", "dog", 2 * 1 / (2 + 4 + 2 * 1)),  # only the root above all is common
        ("dog", "unicorn", 0.0),
        ("unicorn", "unicorn", 1.0),
    ],
)
def test_wu_and_palmers_similarity(folder: Path, first: str, second: str, expected: float) -> None:
    words = WordNet(folder)
    assert words.similarity(first, second) == pytest.approx(expected)
    assert words.similarity(second, first) == pytest.approx(expected)


def test_base_forms(folder: Path) -> None:
    words = WordNet(folder)
    assert words.bases("puppies", "noun") == ["puppy"]
    assert words.bases("running", "verb") == ["run"]
    assert words.bases("walking", "verb") == ["walk"]
    assert words.senses("dogs") == [("noun", 400)]


def test_wups(folder: Path) -> None:
    words = WordNet(folder)
    assert wups("the dog", "A dog.", words) == 1.0
    assert wups("dog", "cat", words) == pytest.approx(0.75)
    assert wups("a red dog", "dog", words) == pytest.approx(1 * 2 / (1 + 4 + 2))
    assert wups("dog", "cat", words, exact=True) == 0.0
    assert wups("dogs", "dog", words, exact=True) == 1.0
    assert wups("unicorn", "dog", words) == 0.0
    assert wups("", "dog", words) == 0.0


def test_nextqa_gives_it_where_the_dictionary_is(folder: Path) -> None:
    doc = {"video": 1, "qid": 0, "question": "what is seen", "answer": "dog", "type": "DO"}
    task = get_task("nextqa_oe")
    sample = task.sample(doc, 0, folder.parent)
    assert task.score_sample(sample, "a cat")["metrics"]["wups"] == pytest.approx(0.75)
    counted = task.sample({**doc, "type": "DC"}, 0, folder.parent)
    assert task.score_sample(counted, "a cat")["metrics"]["wups"] == 0.0
    without = task.score_sample(task.sample(doc, 0, Path("nowhere")), "a cat")["metrics"]
    assert set(without) == {"containment", "word_f1"}
    assert beside(None) is None


def test_folders_that_are_no_wordnet(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no .*index.noun"):
        WordNet(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "data.noun").write_text("these are other words\n")
    with pytest.raises(DataError, match="is not WordNet's data: 'these are"):
        WordNet(tmp_path)
    (tmp_path / "index.noun").write_text("dog\n")
    with pytest.raises(DataError, match="is not WordNet's index: 'dog'"):
        WordNet(tmp_path)
