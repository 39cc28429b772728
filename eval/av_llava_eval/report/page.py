"""A report as one HTML page that needs nothing beside it: plots inline, pictures as data.

Contract: every text from annotations and models is escaped; the page has no scripts from outside
and opens from disk. The only script of its own filters the wrong answers.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from av_llava_eval.report import plots, tables
from av_llava_eval.report.facts import Column, Facts, Miss
from av_llava_eval.report.tables import Table

_STYLE = """
:root{--ink:#333a45;--soft:#6b7380;--line:#e3e6eb;--paper:#fff;--wash:#f6f7f9;--bad:#b3392f;
--good:#2f7d4f}
*{box-sizing:border-box}
body{font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);
background:var(--paper);margin:0}
main{max-width:960px;margin:0 auto;padding:32px 20px 80px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:44px 0 10px}
p.lead{color:var(--soft);margin:0 0 24px}
.banner{background:#fdf0ee;border-left:4px solid var(--bad);padding:10px 14px;margin:12px 0}
.note{background:var(--wash);border-left:4px solid #9aa3b2;padding:10px 14px;margin:12px 0}
.cards{display:flex;flex-wrap:wrap;gap:14px;margin:20px 0}
.card{background:var(--wash);border-radius:10px;padding:14px 18px;min-width:170px;flex:1}
.card b{display:block;font-size:30px;line-height:1.2;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:13px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--line);
vertical-align:top;overflow-wrap:anywhere}
td:first-child{min-width:130px}td:not(:first-child){white-space:nowrap}
table.wide td{white-space:normal}
th{font-weight:600;color:var(--soft);white-space:nowrap}
figure{margin:16px 0}figure svg{width:100%;min-width:560px;height:auto;display:block}
.key{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;margin:0 0 6px;padding:0;
list-style:none}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
figure svg text{font-family:inherit}
figcaption{color:var(--soft);font-size:13px}
details.miss{border-bottom:1px solid var(--line);padding:10px 0}
details.miss summary{cursor:pointer;overflow-wrap:anywhere}
.tag{display:inline-block;background:var(--wash);border-radius:6px;padding:0 8px;
font-size:12px;color:var(--soft);margin-right:6px}
.frames{display:flex;gap:6px;overflow-x:auto;margin:10px 0}
.frames figure{margin:0;flex:none}.frames img{height:120px;border-radius:6px;display:block}
.options{list-style:none;padding:0;margin:8px 0}
.right{color:var(--good);font-weight:600}.wrong{color:var(--bad);font-weight:600}
pre{white-space:pre-wrap;background:var(--wash);padding:8px 12px;border-radius:6px;margin:8px 0;
font-size:13px}
input[type=search]{width:100%;padding:9px 12px;border:1px solid var(--line);border-radius:8px;
font:inherit}
@media print{details.miss{break-inside:avoid}}
"""

_FILTER = """
const box=document.getElementById('find'),rows=[...document.querySelectorAll('details.miss')],
said=document.getElementById('found');
function show(){const q=box.value.toLowerCase();let n=0;
for(const r of rows){const hit=r.textContent.toLowerCase().includes(q);r.hidden=!hit;n+=hit}
said.textContent=n+' of '+rows.length+' shown'}
box.addEventListener('input',show);show();
"""


def page(facts: Facts) -> str:
    """The whole page."""
    body = [
        f"<h1>{_text(facts.title)}</h1>",
        f'<p class="lead">{_text(_lead(facts))}</p>',
        _banner(facts.columns),
        *(f'<div class="note">{_text(n)}</div>' for n in facts.notes),
        _cards(facts.columns),
        _figure(plots.headline(facts.columns), "Score with its 95 % interval."),
        _table(tables.scores(facts.columns)),
        _differences(facts),
        _groups(facts.columns),
        _more_plots(facts.columns),
        _titled("Other metrics", tables.metrics(facts.columns)),
        _misses(facts),
        _titled("How it was made", tables.settings(facts), "wide"),
    ]
    script = f"<script>{_FILTER}</script>" if facts.misses else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(facts.title)}</title><style>{_STYLE}</style></head><body><main>"
        + "\n".join(part for part in body if part)
        + f"</main>{script}</body></html>\n"
    )


def _lead(facts: Facts) -> str:
    n, side = facts.columns[0].headline.n, len(facts.columns)
    beside = "" if side == 1 else f" in {side} columns"
    return f"{facts.task}: {n:,} questions{beside}. Intervals are 95 %."


def _banner(columns: Sequence[Column]) -> str:
    """A warning for runs with more failures than one in a hundred."""
    bad = [c for c in columns if c.n_failed > 0.01 * c.headline.n]
    same: dict[str, list[str]] = {}
    for c in bad:
        said = f"{c.n_failed} of {c.headline.n} questions failed ({tables.failures(c)})"
        same.setdefault(said, []).append(c.label)
    lines = [f"{', '.join(labels)}: {said}. They count as wrong." for said, labels in same.items()]
    return f'<div class="banner">{"<br>".join(map(_text, lines))}</div>' if lines else ""


_CARDS = 4


def _cards(columns: Sequence[Column]) -> str:
    """The scores in large; more than a few are easier to read in the plot below."""
    if len(columns) > _CARDS:
        return ""
    cards = "".join(
        f'<div class="card"><span>{_text(c.label)}</span><b>{100 * c.headline.score:.1f} %</b>'
        f"<span>{100 * c.headline.low:.1f} to {100 * c.headline.high:.1f}"
        + (f" · chance {100 * c.chance:.0f}" if c.chance is not None else "")
        + "</span></div>"
        for c in columns
    )
    return f'<div class="cards">{cards}</div>'


def _differences(facts: Facts) -> str:
    if not facts.differences:
        return ""
    columns = facts.columns
    others = [i for i, c in enumerate(columns) if c.label in {d.second for d in facts.differences}]
    dumbbells = "".join(
        _figure(
            plots.dumbbells(columns, i, grouping),
            f"{columns[0].label} (ring) and {columns[i].label} (point), by {grouping}.",
            [plots.key(columns)[0], plots.key(columns)[i]],
        )
        for i in others[:_DUMBBELLS]
        for grouping in list(columns[0].groups)[:1]
    )
    limit = tables.smallest_difference(facts)
    told = f"<p>{_text(limit)}</p>" if limit else ""
    found = _table(tables.differences(facts.differences))
    return f"<h2>What differs</h2>{found}{told}{dumbbells}"


_DUMBBELLS = 3


def _groups(columns: Sequence[Column]) -> str:
    parts = []
    for grouping in columns[0].groups:
        drawn = plots.groups(columns, grouping)
        if drawn is not None:
            n = len(columns[0].groups[grouping])
            some = f"; the first {plots.GROUPS} of {n}" if n > plots.GROUPS else ""
            said = f"By {grouping}{some}; in brackets the number of questions."
            shown = _figure(drawn, said, plots.key(columns))
            parts.append(f"<h2>By {_text(grouping)}</h2>{shown}")
    return "".join(parts)


def _more_plots(columns: Sequence[Column]) -> str:
    key = plots.key(columns)
    drawn = (
        ("Length", plots.length(columns), key, "Score by the length of the video."),
        (
            "Tokens",
            plots.tokens(columns),
            key,
            "Score against the tokens that the pictures of a video become.",
        ),
        (
            "Letters",
            plots.letters(columns),
            plots.letters_key(columns),
            "How often each letter is answered; grey: how often it is right. A letter that towers "
            "over its grey bar is a habit of the model.",
        ),
        (
            "Time",
            plots.stages(columns),
            plots.stages_key(columns),
            "Where the time went, summed over processes. What was decoded once for several "
            "columns stands in each.",
        ),
    )
    return "".join(
        f"<h2>{title}</h2>{_figure(svg, said, some)}" for title, svg, some, said in drawn if svg
    )


def _misses(facts: Facts) -> str:
    if not facts.n_misses:
        return ""
    shown = f"the first {len(facts.misses)} of " if len(facts.misses) < facts.n_misses else ""
    head = (
        f"<h2>Wrong answers</h2><p>{_text(facts.columns[0].label)}: {shown}{facts.n_misses}. "
        f'<span id="found"></span></p><p><input type="search" id="find" '
        f'placeholder="Filter by any word: a kind, a letter, a file …" '
        f'aria-label="Filter the wrong answers"></p>'
    )
    return head + "".join(_miss(m) for m in facts.misses)


def _miss(miss: Miss) -> str:
    tags = [miss.why, *miss.groups.values()]
    marks = "".join(f'<span class="tag">{_text(t)}</span>' for t in tags)
    options = "".join(_option(o, chr(65 + i), miss) for i, o in enumerate(miss.options))
    answer = (
        f'<ul class="options">{options}</ul>'
        if options
        else f'<p>Right: <span class="right">{_text(miss.answer)}</span> · read: '
        f'<span class="wrong">{_text(miss.said or "nothing")}</span></p>'
    )
    return (
        f'<details class="miss"><summary>{marks}{_text(miss.question)}</summary>{_frames(miss)}'
        f"{answer}<pre>{_text(miss.raw) or '(empty)'}</pre>"
        f'<span class="tag">{_text(miss.id)}</span><span class="tag">{_text(miss.source)}</span>'
        f"</details>"
    )


def _option(text: str, letter: str, miss: Miss) -> str:
    kind, said = "", ""
    if letter == miss.answer:
        kind, said = "right", " ← right"
    elif letter == miss.said:
        kind, said = "wrong", " ← answered"
    return f'<li class="{kind}">{letter}. {_text(text)}{said}</li>'


def _frames(miss: Miss) -> str:
    if not miss.frames:
        return ""
    pictures = "".join(
        f'<figure><img loading="lazy" alt="{time:.1f} s" '
        f'src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{time:.1f} s</figcaption></figure>"
        for data, time in zip(miss.frames, miss.times_s, strict=True)
    )
    return f'<div class="frames">{pictures}</div>'


def _figure(svg: str | None, caption: str, key: plots.Key | None = None) -> str:
    """A plot with its caption and what its colours mean; one colour needs no words."""
    if svg is None:
        return ""
    names = "".join(
        f'<li><i style="background:{color}"></i>{_text(name)}</li>' for name, color in key or ()
    )
    list_ = f'<ul class="key">{names}</ul>' if key and len(key) > 1 else ""
    said = f"<figcaption>{_text(caption)}</figcaption>"
    return f'<figure>{list_}<div class="scroll">{svg}</div>{said}</figure>'


def _table(table: Table, title: str = "", kind: str = "") -> str:
    top = "".join(f"<th>{_text(h)}</th>" for h in table.head)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(v)}</td>" for v in row) + "</tr>" for row in table.rows
    )
    head = f"<h2>{_text(title)}</h2>" if title else ""
    start = f'<table class="{kind}">' if kind else "<table>"
    return f'{head}<div class="scroll">{start}<thead><tr>{top}</tr></thead>{body}</table></div>'


def _titled(title: str, table: Table | None, kind: str = "") -> str:
    return "" if table is None else _table(table, title, kind)


def _text(value: object) -> str:
    return html.escape(str(value))
