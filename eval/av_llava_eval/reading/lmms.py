"""The letters that lmms-eval reads (75571cfe), rule by rule, quirks included.

Contract: the same text gives the same letter as there. Where lmms-eval draws a random letter, the
answer is ``Prediction(None, "random")``, whose score is the expectation of the draw. Where it says
that it found nothing, the prediction holds its own word for that (``""``, ``-1``), so that records
can be compared. Which task uses which rule is in the task's file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from av_llava_eval.sample import LETTERS, Prediction

RANDOM = Prediction(None, "random")
"""lmms-eval draws a letter here."""

_EDGE = ",.!?;:'"
_SAID = {
    "answer": ("", "correct ", "best "),
    "option": ("correct ", "best "),
    "choice": ("", "correct "),
}
_PHRASES = (
    *(f"{the}{a}{noun} is" for the in ("", "the ") for noun, many in _SAID.items() for a in many),
    *(f"i {verb}" for verb in ("choose", "select", "pick")),
    *(f"my {noun} is" for noun in ("answer", "choice")),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)  # fmt: skip


def ranked_rule(text: str, options: Sequence[str]) -> Prediction:
    """:func:`ranked` for as many letters as there are options."""
    return ranked(text, LETTERS[: len(options)])


def ranked(text: str, letters: Iterable[str] = "ABCD") -> Prediction:
    """The shared rule of Video-MME, MLVU, LVBench, VideoMMMU: the best-placed letter.

    Candidates are ranked by their form (a letter at the start, at the end, after a phrase such as
    "the answer is", in brackets, before a full stop, colon, bracket, space; any letter as the last
    resort), then by position, the last winning.
    """
    if not text.strip():
        return Prediction("", "empty")
    core = _strip_each(text.strip(), _EDGE + '"')
    padded, bare = f" {core} ", core.strip()
    best: tuple[int, int, str] | None = None
    for candidate in _placed(padded, bare, tuple(letters)):
        # The first of equals stays, as with the stable sort of the original.
        if best is None or candidate[:2] > best[:2]:
            best = candidate
    return Prediction(best[2], "ranked") if best else Prediction("", "unparsed")


def _placed(padded: str, bare: str, letters: Sequence[str]) -> Iterable[tuple[int, int, str]]:
    """All candidates as (rank, position, letter)."""
    found = []
    for rank, form in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
        found += [
            (rank, padded.rfind(form.format(a)), a) for a in letters if form.format(a) in padded
        ]
    lower = padded.lower()
    for phrase in _PHRASES:
        if (start := lower.find(phrase)) >= 0:
            places = [(padded.find(a, start + len(phrase)), a) for a in letters]
            found += [(7, place, a) for place, a in places if place >= 0]
    for a in letters:
        if bare.startswith(a) and not bare[1:2].isalpha():
            found.append((10, 0, a))
        if bare.endswith(a) and not bare[-2:-1].isalpha():
            found.append((9, len(padded) - 1, a))
    return found or [(0, padded.rfind(a), a) for a in letters if a in padded]


def _strip_each(text: str, characters: str) -> str:
    """Strip each character in turn, once: not the same as stripping them all together."""
    for character in characters:
        text = text.strip(character)
    return text


def _last(padded: str, places: Mapping[str, int]) -> str:
    """The key with the largest place; the first of equals, so -1 everywhere means the first."""
    return max(places, key=lambda key: places[key])


def _by_text(padded: str, texts: Mapping[str, str]) -> str | None:
    """MMMU's last resort: in answers of more than five words, the option whose text comes last."""
    if len(padded.split()) <= 5:
        return None
    lower = padded.lower()
    places = {a: lower.rfind(t.lower()) for a, t in texts.items() if t.lower() in lower}
    return _last(padded, places) if places else None


def mmmu(text: str, texts: Mapping[str, str]) -> Prediction:
    """NExT-QA's rule, after MMMU: ``(X)``, else ``X `` , else ``X.``, else an option's text."""
    padded = f" {_strip_each(text, _EDGE)} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [a for a in texts if form.format(a) in padded]
        if named:
            return Prediction(
                _last(padded, {a: padded.rfind(place.format(a)) for a in named})
                if len(named) > 1
                else named[0],
                "mmmu",
            )
    by_text = _by_text(padded, texts)
    return Prediction(by_text, "option text") if by_text else RANDOM


def earliest(text: str, texts: Mapping[str, str]) -> Prediction:
    """EgoSchema's rule: of ``(X)``, ``X `` and ``X.`` pooled, the one that comes first."""
    padded = f" {_strip_each(text, _EDGE)} "
    named = [
        (form.format(a), a)
        for form in ("({})", "{} ", "{}.")
        for a in texts
        if form.format(a) in padded
    ]
    if named:
        return Prediction(min(named, key=lambda pair: padded.rfind(pair[0]))[1], "earliest")
    if len(padded.split()) > 5:
        lower = padded.lower()
        places = {a: lower.rfind(t.lower()) for a, t in texts.items() if t.lower() in lower}
        if places:
            return Prediction(min(places, key=lambda key: places[key]), "option text")
    return RANDOM


def any_letter(text: str, texts: Mapping[str, str], letters: str = "ABCD") -> Prediction:
    """WorldSense's rule: any capital of the letters anywhere, and "A" where there is none."""
    padded = f" {_strip_each(text, _EDGE)} "
    named = [a for a in letters if a in padded]
    if named:
        return Prediction(_last(padded, {a: padded.rfind(f"({a})") for a in named}), "any letter")
    by_text = _by_text(padded, texts)
    return Prediction(by_text, "option text") if by_text else Prediction("A", "default letter")


def bracket_space_stop(text: str, letters: str = "ABCD") -> Prediction:
    """OmniBench's rule: ``(X)``, else ``X ``, else ``X.``; nothing at the ends is removed."""
    padded = f" {text.strip()} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [a for a in letters if form.format(a) in padded]
        if len(named) > 1:
            places = {a: padded.rfind(place.format(a)) for a in named}
            return Prediction(_last(padded, places), "mmmu")
        if named:
            return Prediction(named[0], "mmmu")
    return Prediction(None, "unparsed")


def first_capital(text: str, letters: str, prefixes: Sequence[str]) -> Prediction | None:
    """The first of the letters anywhere, after some phrases are removed; None without one."""
    said = text.strip()
    for prefix in prefixes:
        said = said.replace(prefix, "")
    match = re.search(f"[{letters}]", said)
    return Prediction(match[0], "first capital") if match else None


def isolated_letter(text: str, letters: str = "A-D") -> Prediction:
    """PerceptionTest's rule: the first capital that is a word of its own."""
    match = re.search(rf"\b([{letters}])\b", text)
    return Prediction(match[1], "isolated") if match else Prediction(None, "unparsed")


_LABELLED = re.compile(r"^([A-E])\.\s*(.+)$", re.IGNORECASE)
_MVBENCH_MARKS = ';/[]"{}()=+\\_->' + "<@`,?!"


def mvbench_word(text: str) -> str:
    """What MVBench's rule makes of an answer or a letter: a letter, or lower-case words.

    The article "a" counts as the letter A. Marks become spaces, or nothing where one stands beside
    a space or a digit group has a comma; only the first 32 full stops go.
    """
    labelled = _LABELLED.match(text.strip())
    if labelled:
        return labelled[1].upper()
    said = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = re.search(r"\d,\d", said) is not None
    out = said
    for mark in _MVBENCH_MARKS:
        beside = f"{mark} " in said or f" {mark}" in said
        out = out.replace(mark, "" if beside or grouped else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    for edge in ("'", '"', ")", "("):
        out = out.strip(edge)
    out = out.strip().lower()
    letter = re.search(r"\b([A-E])\b", out, re.IGNORECASE)
    return letter[1].upper() if letter else out


SPEAKER_PREFIXES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option is", "The correct option is", "Best answer:", "Best option:"),
    *("Answer:", "Option:", "The correct answer", "The correct option", "Based"),
    *("Correct answer", "\u261e", "<|im_end|>"),
)


def first_token(text: str, letters: str) -> Prediction:
    """AV-SpeakerBench's rule: the first word that is a letter, in either case; else the first."""
    for prefix in SPEAKER_PREFIXES:
        text = text.replace(prefix, "")
    words = re.sub(r"[.,:!\"'`;\\/?~@#$%^&*()\[\]{}|<>\n]", " ", text.strip()).split()
    for word in words:
        if word.upper() in letters and len(word) == 1:
            return Prediction(word.upper(), "first word")
    return Prediction(letters[0], "default letter")
