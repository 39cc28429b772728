"""Markdown and HTML of a report: what is shown, what is escaped, what is left out."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from av_llava_eval.report import plots
from av_llava_eval.report.facts import Column, Difference, Estimate, Facts, Miss
from av_llava_eval.report.markdown import markdown
from av_llava_eval.report.page import page

VOID = {"meta", "br", "img", "input"}


def estimate(name, score, n=100):
    return Estimate(name, score, score - 0.05, score + 0.05, n)


def column(label, score):
    return Column(
        label,
        estimate("all", score),
        {"kind|s": (estimate("<colour>", score), estimate("sound", score - 0.1))},
        by_length=(estimate("under 1 min", score), estimate("1 to 3 min", score)),
        letters={"A": (0.4, 0.25), "B": (0.6, 0.75)},
        stage_s={"decode": 2.0, "generate": 5.0},
        failed={"decode_error": 3},
        chance=0.25,
        visual_tokens=100 * score,
        metrics={"macro": score},
    )


def jpeg():
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def facts():
    miss = Miss(
        "q1",
        "What is <b>bold</b>?",
        ("red", "blue & green"),
        "A",
        "B",
        "B <script>alert(1)</script>",
        "wrong",
        "clips/1.mp4",
        frames=(jpeg(), jpeg()),
        times_s=(0.0, 1.5),
    )
    return Facts(
        "Sound on and off",
        "A task",
        (column("audio=on", 0.6), column("audio=off", 0.5)),
        (Difference("audio=on", "audio=off", -0.1, -0.15, -0.05, 0.0002, 1, 11, 100, 0.004),),
        smallest_difference=0.035,
        misses=(miss,),
        n_misses=40,
        settings={"frames": "8"},
        notes=("3 videos have no sound.",),
    )


class Outline(HTMLParser):
    """Checks that tags close, and collects what the page loads and says."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def outline(text):
    found = Outline()
    found.feed(text)
    assert found.open == []
    return found


def test_the_page_is_whole_and_loads_nothing(facts):
    text = page(facts)
    found = outline(text)
    assert all(v.startswith(("data:image/jpeg", "#")) for v in found.loads)
    assert sum(v.startswith("data:") for v in found.loads) == 2
    assert "url(http" not in text
    assert text.count("<svg") == 7  # headline, dumbbells, groups, length, tokens, letters, time


def test_what_models_and_annotations_say_is_escaped(facts):
    text = page(facts)
    assert "<script>alert" not in text and "<b>bold" not in text
    said = " ".join(outline(text).words)
    assert "What is <b>bold</b>?" in said
    assert "blue & green ← answered" in said and "A. red ← right" in said


def test_more_failures_than_one_in_a_hundred_are_a_banner(facts):
    assert "3 of 100 questions failed (3 decode_error)" in page(facts)
    columns = tuple(replace(c, failed={"decode_error": 1}) for c in facts.columns)
    assert 'class="banner"' not in page(replace(facts, columns=columns))


def test_one_run_without_anything_else_is_a_page_too():
    text = page(Facts("T", "T", (Column("run", estimate("all", 0.5), {}),)))
    outline(text)
    assert text.count("<svg") == 1
    assert "Wrong answers" not in text and "What differs" not in text


def test_markdown_tables_are_rectangular_and_escape_pipes(facts):
    text = markdown(facts)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
    assert r"kind\|s" in text
    said = "| audio=on → audio=off | -10.0 (-15.0 to -5.0) | < 0.001 | 0.004 |  | 1 | 11 | 100 |"
    assert said in text
    assert "> 3 videos have no sound." in text


def test_plots_are_svg_with_their_numbers_as_text(facts):
    drawn = plots.groups(facts.columns, "kind|s")
    assert drawn is not None
    ElementTree.fromstring(drawn)
    assert "60.0" in drawn and "40.0" in drawn and "&lt;colour&gt; (100)" in drawn
    assert drawn == plots.groups(facts.columns, "kind|s")
    assert plots.groups(facts.columns, "absent") is None
    assert plots.tokens(facts.columns[:1]) is None


def test_only_columns_that_hear_the_same_are_a_sweep_of_tokens(facts):
    """Sound on and off may differ in tokens, but nobody swept them."""
    on, off = facts.columns
    assert plots.tokens((replace(on, sound="on"), replace(off, sound="off"))) is None
    many = tuple(
        replace(on, label=f"{n} tokens", visual_tokens=float(n)) for n in (512, 520, 1024, 4096)
    )
    drawn = plots.tokens(many)
    assert drawn is not None and "1,024" in drawn and "512" in drawn and "520" not in drawn


@pytest.mark.filterwarnings("error")
def test_long_names_and_many_columns_leave_room_for_the_plot(facts):
    name = "a_name_without_spaces_" * 8 + "$x_1$ "
    columns = tuple(
        replace(column(f"{name}{i}", 0.5 + i / 50), groups={name: (estimate(name * 2, 0.5),) * 3})
        for i in range(12)
    )
    told = (Difference(columns[0].label, columns[9].label, 0, -0.1, 0.1, 0.5, 1, 1, 100),)
    text = page(replace(facts, columns=columns, differences=told))
    outline(text)
    for drawn in re.findall(r"<svg.*?</svg>", text, re.S):
        lines = re.findall(r">([^<>]*)</text>", drawn)
        assert lines and max(map(len, lines)) <= 40
    assert "$x_1$ 11" in plots.headline(columns), "the end of a name often tells it from others"
    assert text.count("<li><i") >= 12 and name + "11" in text
    assert 'class="card"' not in text, "twelve cards would be a wall"


def test_groups_that_a_plot_leaves_out_are_counted(facts):
    many = {"kind": tuple(estimate(f"k{i}", 0.5) for i in range(plots.GROUPS + 3))}
    text = page(replace(facts, columns=(replace(facts.columns[0], groups=many),)))
    assert f"the first {plots.GROUPS} of {plots.GROUPS + 3}" in text and "k30 (100)" in text


def test_columns_with_the_same_failures_are_told_in_one_line(facts):
    assert page(facts).count("They count as wrong.") == 1
    assert "audio=on, audio=off: 3 of 100 questions failed" in page(facts)
