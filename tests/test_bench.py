"""The benchmarks run, check their contestants, and write their tables. No times are asserted."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import __main__ as command  # noqa: E402
from bench import gpu, measure, report, splice  # noqa: E402
from bench.measure import Row, Timing, check, race, rows_of  # noqa: E402

torch.set_num_threads(1)
KEYS = {"case", "contestant", "best", "median", "unit", "ratio", "meaning", "bound", "cpu_s"}
OURS = {
    "pixels": "av_llava",
    "decode": "av_llava, decode + resize",
    "session": "second question",
    "logmel": "av_llava",
    "aggregators": "av_llava",
    "batching": "av_llava, token budget",
    "eval": "av-llava eval",
}
WITHOUT_TARGET = {"aggregators"}


def check_rows(rows: list[Row], ours: str, has_target: bool) -> None:
    assert rows
    for row in rows:
        data = json.loads(json.dumps(dataclasses.asdict(row)))
        assert set(data) == KEYS and Row(**data) == row
        assert row.unit in ("s", "MB", "M tokens") and row.meaning in ("cost", "speedup")
        assert row.best > 0 and row.median >= row.best and math.isfinite(row.ratio)
    for case in {row.case for row in rows}:
        own = [row for row in rows if row.case == case]
        assert len({row.contestant for row in own}) == len(own) >= 2
        (mine,) = (row for row in own if row.contestant == ours)
        assert (mine.met is not None) == has_target
        if mine.unit == "s":
            assert own[0].ratio == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_a_benchmark_runs(name):
    module = importlib.import_module(f"bench.{name}")
    before = torch.get_num_threads()
    rows = module.run(quick=True)
    assert torch.get_num_threads() == before
    check_rows(rows, OURS[name], name not in WITHOUT_TARGET)
    assert module.TITLE and module.RATIO in report.tables(rows, module.RATIO)


def test_all_benchmarks_are_known_to_the_command():
    assert set(command.NAMES) == {*OURS, "splice"}


def test_splice_compares_all_methods():
    rows = splice.time_rows("pages kept", quick=True)
    check_rows(rows, splice.OURS, has_target=False)  # tiny widths have no target
    assert {row.contestant for row in rows} == {splice.COPY, *splice.METHODS}
    assert {row.case.split(",")[0] for row in rows} == {"forward", "forward+backward"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_of_the_splice_is_measured_in_a_process_of_its_own():
    shape = ("896", "2", "4096")
    size, peak = measure.in_child("bench.splice", ["memory", splice.OURS, *shape])
    assert size == 2 * 4096 * 896 * 2
    assert 1 <= peak / size < 1.5
    _, loop = measure.in_child("bench.splice", ["memory", splice.LOOP, *shape])
    assert loop / size > 2, "a loop that concatenates needs more than its result"


def test_contestants_that_do_not_agree_are_not_compared(monkeypatch):
    batch = splice.make_batch(8, 2, 64)

    def wrong(batch, embed):
        return splice.ours(batch, embed) + 1

    monkeypatch.setitem(splice.METHODS, splice.OURS, wrong)
    with pytest.raises(AssertionError, match="do not agree.*splice, av_llava"):
        splice.agree(batch, gradients=False)
    with pytest.raises(AssertionError, match="do not agree.*colours"):
        check(False, "colours")


def test_contestants_take_turns_and_slow_ones_drop_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    seen = []

    def take(name, seconds):
        seen.append(name)
        clock[0] += seconds

    found = race(
        {"quick": lambda: take("quick", 0.1), "slow": lambda: take("slow", 3.0)},
        rounds=4,
        seconds=1.0,
        min_rounds=2,
    )
    assert seen[:4] == ["quick", "slow"] * 2
    assert seen.count("quick") == 5 and seen.count("slow") == 2  # its warm-up counted
    assert found["quick"].best_s == pytest.approx(0.1)


def test_ratios_and_targets():
    timings = {"old": Timing(2.0, 3.0, 2.0), "new": Timing(0.5, 0.6, 0.5)}
    cost = rows_of("c", timings, "old", bounds={"new": 0.3})
    assert [row.ratio for row in cost] == [1, 0.25] and [row.met for row in cost] == [None, True]
    speedup = rows_of("c", timings, "old", "speedup", {"new": 5})
    assert [row.ratio for row in speedup] == [1, 4] and speedup[1].met is False
    assert "1 of 2 targets met. Missed: c: new 4.00" in report.verdict(cost + speedup)
    text = report.tables(cost, "× old")
    assert "**0.25 · 500 ms** (≤ 0.3 ✓)" in text and "1.00 · 2.00 s" in text
    assert "✗ MISSED" in report.tables(speedup, "× old")


def test_tables_are_written_between_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n")
    report.write(page, "x", "new\n")
    assert page.read_text() == "a\n<!-- begin x -->\nnew\n<!-- end x -->\nb\n"
    with pytest.raises(ValueError, match="no markers .*begin y"):
        report.write(page, "y", "new\n")


def test_the_page_has_a_place_for_every_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    for name in (*command.NAMES, *gpu.TITLES):
        report.write(page, name, f"table of {name}\n")
        assert f"table of {name}\n" in page.read_text()


@pytest.mark.slow
def test_the_command_shows_and_writes_tables(tmp_path, capsys):
    page, rows = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text("<!-- begin aggregators -->\n<!-- end aggregators -->\n")
    arguments = ["aggregators", "--quick", "--write", str(page), "--json", str(rows)]
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "## Aggregation" in shown and "Measured on" in shown and "Load average" in shown
    assert "Measured on" in page.read_text() and "llava_video" in page.read_text()
    assert set(json.loads(rows.read_text())["aggregators"][0]) == KEYS


def test_the_command_refuses_unknown_names(capsys):
    with pytest.raises(SystemExit):
        command.main(["splices"])
    assert "no benchmark 'splices'; there are: splice, pixels" in capsys.readouterr().err


@pytest.mark.slow
def test_the_gpu_benchmark_runs_with_tiny_sizes():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = gpu.run(gpu.TINY, device, quick=True)
    assert set(found) == set(gpu.TITLES)
    for rows in found.values():
        assert rows and all(math.isfinite(row.ratio) and row.ratio for row in rows)
    contestants = {row.contestant for row in found["gpu_decode"]}
    assert {gpu.LIMIT, "growing cache", "static cache", "static cache, compiled"} <= contestants


def test_without_a_gpu_nothing_is_claimed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
