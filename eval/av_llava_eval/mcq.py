"""Reading the letter of a multiple-choice answer.

Contract: the default rule never guesses. It returns a letter of the options that exist, or says
why there is none: ``empty``, ``several`` (more than one option is named and none is preferred) or
``unparsed``. There is no default letter and no draw; what stands in ``<think>`` does not count.
What is looked for, the surest first:

1. the last ``<answer>…</answer>`` or ``\\boxed{…}``,
2. nothing but a letter, in either case, with or without brackets,
3. the exact text of an option, with or without its letter,
4. "B is correct"; the last "the answer is …", "Answer: …", "I choose …" with a letter or a text,
5. a letter at the beginning that is marked as a label (``B.``, ``(B)``, ``B:``) or is a line,
6. a letter at the end,
7. the only letter in brackets,
8. an option's text at the beginning or the end of the answer; one of several words anywhere,
9. the only capital letter that stands alone (not the words "A" and "I").

A list that only repeats the options names several, and so does "A or B". Rules of other harnesses,
for comparable numbers, are in ``reading``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from av_llava.errors import unknown_name
from av_llava_eval.reading import harnesses, lmms
from av_llava_eval.sample import LETTERS, Prediction

_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_UNFINISHED_THOUGHT = re.compile(r"<think(?:ing)?>.*", re.DOTALL | re.IGNORECASE)
_END_OF_THOUGHT = re.compile(r".*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>|</?s>|<eos>|<end_of_turn>|\[/?INST\]")
_CONTAINER = re.compile(
    r"<answer>(?P<tag>.*?)(?:</answer>|$)|\\boxed\s*\{(?:\\text\s*\{)?(?P<box>[^{}]*)\}",
    re.DOTALL | re.IGNORECASE,
)
_DECLARED = re.compile(
    r"\b(?:answers?|options?|choices?)\b[ \t]*(?:\b(?:is|(?:would|must|should) be)\b[ \t]*:?|[:=])"
    r"|\bi(?:'d| would)? (?:choose|select|pick|go with)\b|答案(?:是|为|:)|選|选|答えは|정답은",
    re.IGNORECASE,
)
_CALLED_RIGHT = re.compile(
    r"(?<![\w'’])[(\[]?([A-Z])[)\]]?\**\s+(?:is|seems|must be)\s+(?:the\s+)?"
    r"(?:correct|right|best|(?:only )?answer)\b"
)
_AFTER_A_LETTER = (
    "because|since|as|for|due|based|given|which|when|where|and|but|is|in|from|with|at|on|by|seems|must"
    "|matches|fits|describes"
)
_ARTICLE = re.compile(rf"A[ \t]+(?!(?:{_AFTER_A_LETTER})\b)[a-z]")
_DECORATION = " \t\r\n*_`~\"'“”‘’$#>.,;:!?-–—()[]{}\\/|"
_BEFORE = r"[\s*_`\"'“‘$(\[{:,-]*"
_LABEL = re.compile(
    rf"^{_BEFORE}(?:option|choice|answer)?\s*(?:"
    r"[(\[{]\s*(?P<bracketed>[A-Za-z])\s*[)\]}]|(?P<plain>[A-Z])(?=\s*[.):\]}*_`]|\s*$|\s*\n|\s*,\s))"
)
_LAST = re.compile(r"(?:^|[\s(\[{*_`\"'“:,])(?P<letter>[A-Z])[\s*_`\"'”’)\]}.!$]*$")
_IN_BRACKETS = re.compile(r"[(\[{]\s*([A-Za-z])\s*[)\]}]")
_ALONE = re.compile(r"(?<![\w'’])([A-Z])(?![\w'’])")
_ALTERNATIVE = re.compile(
    r"^[\s(\[]*[A-Z][)\].:]?(?:\s*(?:,|/|&|\+|\bor\b|\band\b)+\s*[(\[]*[A-Z][)\].]?)+[\s.!?)\]]*$"
)
_NEGATION = re.compile(r"\b(?:not|isn't|wasn't|never|neither|nor|cannot|can't)\b")

Rule = Callable[[str, Sequence[str]], Prediction]


def extract(text: str, options: Sequence[str], rule: str = "default") -> Prediction:
    """Read the letter of an answer.

    Args:
        text: what the model said.
        options: texts of the options without their letters; the first is A.
        rule: name in :data:`RULES`.

    Returns:
        The letter and the rule that found it; without a letter, the reason.
    """
    if rule not in RULES:
        raise unknown_name("extraction rule", rule, RULES)
    return RULES[rule](text, options)


def default_rule(text: str, options: Sequence[str]) -> Prediction:
    """The rule of this project; see the module."""
    said = clean(text)
    if not said.strip(_DECORATION):
        return Prediction(None, "empty")
    letters = LETTERS[: len(options)]
    inside = [m.group("tag") or m.group("box") or "" for m in _CONTAINER.finditer(said)]
    if inside:
        found = _plain(inside[-1], options) or _labelled(inside[-1], letters)
        return _named(found, "container") or Prediction(None, "unparsed")
    if found := _plain(said, options):
        return found
    if _ALTERNATIVE.match(said):
        return Prediction(None, "several")
    for step in (_declared, _start_or_end, _bracketed, _text_in_the_answer, _only_capital):
        if found := step(said, options):
            return found
    return Prediction(None, "several" if len(_capitals(said, letters)) > 1 else "unparsed")


def clean(text: str) -> str:
    """Remove thoughts and special tokens, and make full-width characters plain."""
    text = _THOUGHT.sub(" ", text)
    # Some chat templates open the thought in the prompt; some answers end inside one.
    text = _UNFINISHED_THOUGHT.sub(" ", _END_OF_THOUGHT.sub(" ", text))
    return unicodedata.normalize("NFKC", _SPECIAL_TOKEN.sub(" ", text)).strip()


def plain_words(text: str) -> str:
    """Lower case, single spaces, nothing at the ends that is not part of a word."""
    return " ".join(text.casefold().split()).strip(_DECORATION)


def strip_letter(option: str, index: int) -> str:
    """The text of an option that the annotations spell with its letter: ``"B. a cat"``."""
    letter = LETTERS[index]
    match = re.match(rf"\s*(?:\(\s*{letter}\s*\)|{letter}\s*[.):])\s*", option)
    return option[match.end() :] if match else option.strip()


def strip_letters(options: Sequence[str]) -> tuple[str, ...]:
    """:func:`strip_letter` of each option."""
    return tuple(strip_letter(text, i) for i, text in enumerate(options))


def _named(found: Prediction | None, how: str) -> Prediction | None:
    return found and Prediction(found.extracted, how)


def _letter(candidate: str, letters: str, how: str) -> Prediction | None:
    upper = candidate.upper()
    return Prediction(upper, how) if upper in letters else None


def _plain(said: str, options: Sequence[str]) -> Prediction | None:
    """A letter and nothing else, or an option's text and nothing else."""
    bare = said.strip(_DECORATION)
    if len(bare) == 1 and bare.isalpha() and bare.upper() in LETTERS:
        # An option may itself be such a letter; then the letter of the label is meant.
        return _letter(bare, LETTERS[: len(options)], "letter")
    words = plain_words(said)
    same = [i for i, option in enumerate(options) if words and plain_words(option) == words]
    if len(same) == 1:
        return Prediction(LETTERS[same[0]], "option text")
    with_letter = [
        i
        for i, option in enumerate(options)
        if plain_words(strip_letter(said.lstrip(_DECORATION), i)) == plain_words(option)
        and said.lstrip(_DECORATION)[:1] == LETTERS[i]
    ]
    return Prediction(LETTERS[with_letter[0]], "letter and text") if with_letter else None


def _labelled(said: str, letters: str) -> Prediction | None:
    match = _LABEL.match(said)
    return match and _letter(match["bracketed"] or match["plain"], letters, "label at the start")


def _declared(said: str, options: Sequence[str]) -> Prediction | None:
    """The last declaration that names something; one that names an unknown letter names nothing."""
    letters = LETTERS[: len(options)]
    called = {name for name in _CALLED_RIGHT.findall(said)}
    if len(called) == 1:
        return _letter(called.pop(), letters, "called right") or Prediction(None, "unparsed")
    for match in reversed(list(_DECLARED.finditer(said))):
        rest = said[match.end() :].lstrip(_DECORATION.replace("(", "").replace("[", ""))
        line = rest.split("\n", 1)[0]
        if not line:
            continue
        if _ALTERNATIVE.match(line):
            return Prediction(None, "several")
        marked = re.match(r"(?:option\s+)?(?:[(\[{]\s*([A-Za-z])\s*[)\]}]|([A-Z])(?![\w'’]))", line)
        if marked:
            name = marked[1] or marked[2]
            if not _ARTICLE.match(line):
                return _letter(name, letters, "declared") or Prediction(None, "unparsed")
        lone = line.strip(_DECORATION)
        if len(lone) == 1 and lone.isalpha():
            return _letter(lone, letters, "declared") or Prediction(None, "unparsed")
        if found := _text_in_the_answer(line, options):
            return _named(found, "declared text")
    return None


def _start_or_end(said: str, options: Sequence[str]) -> Prediction | None:
    letters = LETTERS[: len(options)]
    lines = [line for line in said.splitlines() if line.strip(_DECORATION)]
    labels = [_labelled(line, letters) for line in lines]
    named = {label.extracted for label in labels if label}
    if len(named) == 1 and labels[0]:
        return labels[0]
    if len(named) > 1:
        # A list of options says nothing, unless a letter of its own ends or begins it.
        for line, how in ((lines[-1], "letter at the end"), (lines[0], "label at the start")):
            if len(line.strip(_DECORATION)) == 1:
                return _letter(line.strip(_DECORATION), letters, how)
        return Prediction(None, "several") if all(labels) else None
    match = _LAST.search(said)
    if match is None or _denied(said, match.start("letter")):
        return None
    return _letter(match["letter"], letters, "letter at the end")


def _bracketed(said: str, options: Sequence[str]) -> Prediction | None:
    letters = LETTERS[: len(options)]
    found = {m.upper() for m in _IN_BRACKETS.findall(said)}
    only = next(iter(found)) if len(found) == 1 else ""
    return _letter(only, letters, "letter in brackets") if only else None


def _text_in_the_answer(said: str, options: Sequence[str]) -> Prediction | None:
    """An option's text in the answer; the longest, where one holds another.

    A single word must begin or end the answer: inside, it may be about something else.
    """
    words = plain_words(said)
    found: list[tuple[int, int]] = []
    for index, option in enumerate(options):
        text = plain_words(option)
        places = list(re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", words)) if text else []
        if " " not in text:
            places = [m for m in places if m.start() == 0 or m.end() == len(words)]
        if any(not _denied(words, m.start()) for m in places):
            found.append((len(text), index))
    longest = max(found, default=(0, 0))[0]
    best = [i for size, i in found if size == longest]
    if len(best) != 1 or any(
        plain_words(options[i]) not in plain_words(options[best[0]]) for _, i in found
    ):
        return None
    return Prediction(LETTERS[best[0]], "option text in the answer")


def _only_capital(said: str, options: Sequence[str]) -> Prediction | None:
    found = _capitals(said, LETTERS)
    only = next(iter(found)) if len(found) == 1 else ""
    return _letter(only, LETTERS[: len(options)], "only letter") if only else None


def _capitals(said: str, letters: str) -> set[str]:
    """Capital letters that stand alone, without the words "A" and "I", and none that is denied."""
    found = set()
    for match in _ALONE.finditer(said):
        rest = said[match.start() :]
        word = _ARTICLE.match(rest) or re.match(r"I[ \t]+[a-z]", rest)
        if match[1] in letters and not word and not _denied(said, match.start()):
            found.add(match[1])
    return found


def _denied(said: str, at: int) -> bool:
    """Whether a negation stands before this place in the same clause."""
    clause = re.split(r"[.,;:!?\n]", said[:at])[-1]
    return _NEGATION.search(clause[-24:].lower()) is not None


RULES: dict[str, Rule] = {
    "default": default_rule,
    "lmms": lmms.ranked_rule,
    "vlmevalkit": harnesses.vlmevalkit_rule,
    "videollama2": harnesses.videollama2_rule,
    "sfllava": harnesses.sfllava_rule,
}
"""Name → rule for four options and more. ``lmms`` is the one that most tasks there share."""
