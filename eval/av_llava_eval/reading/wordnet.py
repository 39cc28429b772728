"""WordNet's own files: which senses a word has, and how far apart two senses are.

Contract: reads ``index.*``, ``data.*`` and ``*.exc`` of WordNet 3 as its authors distribute them
(Debian's wordnet-base, for one), needs no package, and compares senses as Wu and Palmer do: twice
the depth of the deepest common ancestor over the depths of both by way of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from av_llava.errors import DataError

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
"""Part of speech in file names → its letter in the data; in the order of looking up."""
_ENDINGS = {
    "noun": (
        *(("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z")),
        *(("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")),
    ),
    "verb": (
        *(("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", "")),
        *(("ing", "e"), ("ing", "")),
    ),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}
Sense = tuple[str, int]
"""Part of speech and offset in its data file."""
ROOT: Sense = ("", 0)
"""Stands above everything when a verb, an adjective or an adverb is compared."""


@dataclass
class WordNet:
    """The dictionary in a folder.

    Args:
        folder: with ``index.noun``, ``data.noun`` and so on.

    Raises:
        DataError: a file is missing or is not WordNet's.
    """

    folder: Path
    _index: dict[str, dict[str, list[int]]] = field(default_factory=dict, repr=False)
    _above: dict[Sense, tuple[Sense, ...]] = field(default_factory=dict, repr=False)
    _odd: dict[str, dict[str, list[str]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for part in PARTS:
            self._read_index(part)
            self._read_data(part)
            self._odd[part] = {w[0]: w[1:] for w in _words(self.folder / f"{part}.exc", False)}

    def senses(self, word: str) -> list[Sense]:
        """The senses of a word or of its base forms, the most frequent of each part first."""
        lower = word.lower().replace(" ", "_")
        return [
            (p, o) for p in PARTS for base in self.bases(lower, p) for o in self._index[p][base]
        ]

    def bases(self, word: str, part: str) -> list[str]:
        """The base forms of a word that the dictionary has: ``running`` → ``run``."""
        known = self._index[part]
        regular = [word[: -len(a)] + b for a, b in _ENDINGS[part] if word.endswith(a)]
        forms = [word, *self._odd[part].get(word, regular)]
        return list(dict.fromkeys(form for form in forms if form in known))

    def similarity(self, first: str, second: str) -> float:
        """Wu and Palmer's similarity of the first senses, 0 to 1; 0 for unknown words."""
        if first == second:
            return 1.0
        one, two = self.senses(first)[:1], self.senses(second)[:1]
        if not one or not two:
            return 0.0
        rooted = "noun" not in (one[0][0], two[0][0]) or one[0][0] != two[0][0]
        above, also = self._distances(one[0], rooted), self._distances(two[0], rooted)
        common = set(above) & set(also)
        if not common:
            return 0.0
        nearest = max(common, key=lambda s: (self._depth(s, False), s != ROOT, -above[s]))
        depth = self._depth(nearest, True) + 1
        return 2 * depth / (above[nearest] + also[nearest] + 2 * depth)

    def _distances(self, sense: Sense, rooted: bool) -> dict[Sense, int]:
        """Steps up to each ancestor, the sense itself included."""
        found, row, steps = {sense: 0}, [sense], 0
        while row:
            steps += 1
            row = [a for s in row for a in self._above.get(s, ()) if a not in found]
            found.update(dict.fromkeys(row, steps))
        if rooted:
            found[ROOT] = max(found.values()) + 1
        return found

    def _depth(self, sense: Sense, longest: bool) -> int:
        """Steps from the top, by the longest or the shortest way."""
        depths = [self._depth(a, longest) + 1 for a in self._above.get(sense, ())]
        return (max if longest else min)(depths, default=0)

    def _read_index(self, part: str) -> None:
        found: dict[str, list[int]] = {}
        file = self.folder / f"index.{part}"
        for words in _words(file):
            try:
                n_senses, n_pointers = int(words[2]), int(words[3])
                offsets = [int(o) for o in words[6 + n_pointers :]]
            except (IndexError, ValueError) as error:
                raise DataError(f"{file} is not WordNet's index: {' '.join(words)!r}.") from error
            found[words[0]] = offsets[:n_senses]
        self._index[part] = found

    def _read_data(self, part: str) -> None:
        file = self.folder / f"data.{part}"
        letters = {letter: name for name, letter in PARTS.items()} | {"s": "adj"}
        for words in _words(file):
            try:
                after = 4 + 2 * int(words[3], 16)
                pointers = [words[after + 1 + 4 * i :][:4] for i in range(int(words[after]))]
                above = [(letters[p[2]], int(p[1])) for p in pointers if p[0] in ("@", "@i")]
            except (IndexError, ValueError, KeyError) as error:
                raise DataError(
                    f"{file} is not WordNet's data: {' '.join(words)[:60]!r}."
                ) from error
            self._above[part, int(words[0])] = tuple(above)


def _words(file: Path, needed: bool = True) -> Iterator[list[str]]:
    """The words of each line without its gloss; the licence at the top is left out."""
    if not file.is_file():
        if needed:
            raise DataError(
                f"There is no {file}; WordNet has index.noun, data.noun and so on in one folder."
            )
        return
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line and not line.startswith("  "):
            yield line.split(" | ", 1)[0].split()
