"""The default rule for letters: it reads what is there, and never invents."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from av_llava.errors import UsageError
from av_llava_eval import mcq
from av_llava_eval.sample import LETTERS, Prediction

FOUR = ("a red kite", "both of them", "It speeds up", "violin")
NUMBERS = ("3", "12", "twelve", "none")

FORMS = (
    *(
        "{L}",
        "{L}.",
        "{L})",
        "({L})",
        "[{L}]",
        "**{L}**",
        "*{L}*",
        "`{L}`",
        '"{L}"',
        "  {L} \n",
        "\n{L}\n",
    ),
    *("{l}", "({l})", "{l}.", "$\\boxed{{{L}}}$", "\\boxed{{{L}}}", "\\boxed{{\\text{{{L}}}}}"),
    *("{L}: {t}", "{L}. {t}", "({L}) {t}", "{L}) {t}", "**{L}. {t}**", "{t}", "{t}."),
    *("The answer is {L}.", "The correct answer is {L}. {t}", "The best option is: ({L})"),
    *(
        "Answer: {L}",
        "answer: {l}",
        "**Answer:** {L}",
        "Final answer: **{L}**",
        "the answer is {l}",
    ),
    *("The correct option is ({L}).", "I choose {L}", "I'd go with ({L})", "My answer is {L}!"),
    *("Option {L}", "option ({l})", "答案是{L}", "（{L}）", "{L}</s>", "{L}<|im_end|>"),
    *("<think>A, or B? maybe C, D</think>{L}", "<think>\nA\n</think>\n\nThe answer is {L}."),
    *("so it was A</think>{L}", "<answer>{L}</answer>", "<answer> {L}. {t} </answer>"),
    *("We see it at the end.\nSo the final answer is {L}.", "Look closely.\n\n{L}"),
    *("{L}\nThe clip shows this while B would mean that.", "The answer is {t}."),
    *(
        "The answer is {L} because the film shows it.",
        "{L} is correct.",
        "({L}) is the best answer",
    ),
    *(
        "Option {L} is correct, as it shows.",
        "The answer is {L}, not E.",
        "Answer: {L} since it rings",
    ),
    *("A. a red kite\nB. both of them\nC. It speeds up\nD. violin\nAnswer: {L}",),
    *("First I thought the answer is A. Then B. But no: the answer is {L}.",),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index", range(4))
def test_common_forms_of_an_answer(form: str, index: int) -> None:
    letter = LETTERS[index]
    said = form.format(L=letter, l=letter.lower(), t=FOUR[index])
    assert mcq.extract(said, FOUR).extracted == letter, mcq.extract(said, FOUR)


@pytest.mark.parametrize(
    ("said", "how"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("...", "empty"),
        ("<think>The answer is B.</think>", "empty"),
        ("<think>The answer is B, because", "empty"),
        ("I am sorry, but I cannot tell from the video.", "unparsed"),
        ("Yes, definitely.", "unparsed"),
        ("Based on the video, it is hard to say.", "unparsed"),
        ("E", "unparsed"),
        ("The answer is F.", "unparsed"),
        ("<answer>G</answer>", "unparsed"),
        ("<answer></answer> B", "unparsed"),
        ("A or B", "several"),
        ("A, B", "several"),
        ("(A) and (C)", "several"),
        ("A/B/C", "several"),
        ("The answer is A or B.", "several"),
        ("A. a red kite\nB. both of them\nC. It speeds up\nD. violin", "several"),
        ("It is not a violin", "unparsed"),
        ("It is not B", "unparsed"),
        ("The answer is not B.", "unparsed"),
        ("A is correct, but B is correct too", "several"),
        ("The answer is A dog", "unparsed"),
        ("This is not a red kite at all", "unparsed"),
        ("We hear a violin there", "unparsed"),
        ("Either a red kite or both of them move", "unparsed"),
        ("A man walks and a dog runs", "unparsed"),
        ("I think so", "unparsed"),
    ],
)
def test_what_holds_no_answer_gives_none_and_says_why(said: str, how: str) -> None:
    assert mcq.extract(said, FOUR) == Prediction(None, how)


@pytest.mark.parametrize(
    ("said", "options", "letter"),
    [
        ("12", NUMBERS, "B"),
        ("There are 12", NUMBERS, "B"),
        ("It is a red kite", FOUR, "A"),
        ("What happens here is both of them and nothing else", FOUR, "B"),
        ("Not a red kite. At the end of the film, both of them are seen", FOUR, "B"),
        ("Based on the video, both of them.", FOUR, "B"),
        ("It is not A; it must be D", FOUR, "D"),
        ("red car", ("red", "red car"), "B"),
        ("the red car", ("red", "red car", "blue"), "B"),
        ("VIOLIN!", FOUR, "D"),
        ("b", ("x", "y"), "B"),
        ("j", tuple("0123456789"), "J"),
        ("(J) 9", tuple("0123456789"), "J"),
        ("A", ("B", "A"), "A"),
        ("B's answer is C", FOUR, "C"),
    ],
)
def test_texts_of_options_and_odd_options(said: str, options: tuple[str, ...], letter: str) -> None:
    assert mcq.extract(said, options).extracted == letter


def test_the_same_text_twice_is_no_answer() -> None:
    assert mcq.extract("a cat", ("a cat", "A cat.")).extracted is None


@given(st.text(max_size=200), st.integers(2, 10))
def test_only_letters_of_the_options_are_ever_read(said: str, n: int) -> None:
    options = [f"text number {i}" for i in range(n)]
    found = mcq.extract(said, options)
    assert found.extracted is None or found.extracted in LETTERS[:n]
    assert (found.extracted is None) == (found.how in ("empty", "several", "unparsed"))


@given(st.text(alphabet="bcdefghjklmnopqrstuvwxyz ,.!?\n", max_size=200))
def test_words_without_a_letter_of_their_own_are_never_read(said: str) -> None:
    """No capital, no option's text: nothing that could be an answer, but for a lone letter."""
    found = mcq.extract(said, ("0001", "0002", "0003", "0004")).extracted
    if len(said.strip(" ,.!?\n")) != 1:
        assert found is None


@given(st.sampled_from("ABCDE"), st.sampled_from("FGHIJKLMNOP"))
def test_a_letter_beyond_the_options_is_no_answer(inside: str, beyond: str) -> None:
    five = [f"text {i}" for i in range(5)]
    for form in ("{}", "({})", "The answer is {}.", "Answer: {}", "{}. something"):
        assert mcq.extract(form.format(inside), five).extracted == inside
        assert mcq.extract(form.format(beyond), five).extracted is None


@given(st.text(max_size=80), st.sampled_from(sorted(mcq.RULES)))
def test_no_rule_fails_on_any_text(said: str, rule: str) -> None:
    found = mcq.extract(said, FOUR, rule)
    assert found.extracted in (None, "", "none", *"ABCDE")


def test_an_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="extraction rule 'lmsm'.*Did you mean 'lmms'"):
        mcq.extract("A", FOUR, "lmsm")


@pytest.mark.parametrize(
    ("option", "index", "text"),
    [
        ("B. a cat", 1, "a cat"),
        ("B.a cat", 1, "a cat"),
        ("(B) a cat", 1, "a cat"),
        ("B) a cat", 1, "a cat"),
        ("B: a cat", 1, "a cat"),
        ("a cat", 1, "a cat"),
        ("A cat", 0, "A cat"),
        ("C. a cat", 1, "C. a cat"),
        ("Before it", 1, "Before it"),
    ],
)
def test_letters_of_annotated_options_are_removed(option: str, index: int, text: str) -> None:
    assert mcq.strip_letter(option, index) == text
