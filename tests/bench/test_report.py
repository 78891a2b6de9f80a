"""Reports of known results: page, CSV, JSON, comparison, and what is said about them."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from manyheads.bench import plots
from manyheads.bench import result as results
from manyheads.bench.compare import compare
from manyheads.bench.findings import comparison, findings
from manyheads.bench.plan import BenchInputError
from manyheads.bench.record import CUT
from manyheads.bench.report import render, write
from manyheads.bench.result import Generator, Memory, Point
from tests.bench.samples import level, record, result


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", page)


def test_everything_is_written(tmp_path: Path) -> None:
    records = [record(1.0, [0.1, 0.2]), record(0.5, [], tokens=None, reason=CUT, detail="gone", seconds=0.3)]
    page = write(result(), records, tmp_path / "r")
    assert page.name == "report.html"
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "levels.csv",
        "report.html",
        "report.json",
        "requests.csv",
    ]
    assert results.load(tmp_path / "r") == results.load(page) == result()
    with open(tmp_path / "r" / "levels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["load"] for row in rows] == ["1.0", "2.0", "4.0"]
    assert float(rows[0]["ttft_p50"]) == pytest.approx(0.1)
    with open(tmp_path / "r" / "requests.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sent"], row["reason"], row["tokens"]) for row in rows] == [("0.0", CUT, ""), ("0.5", "", "4")]


def test_the_page_needs_no_other() -> None:
    page = render(result())
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == page.count("<figure>") == 10
    assert not re.search(r'(src|href)="(?!#)|@import|url\((?!#)', page)
    for word in ("Latency by load", "Memory of the server", "Tokens per step", "0.40 · 0.10", "a processor"):
        assert word in page


def test_what_servers_say_is_text_in_the_page() -> None:
    bad = result(name="<b>x</b>", details={"HTTP 500": ["<script>alert(1)</script>"]})
    bad.whole.failures = {"HTTP 500": 3}
    page = render(bad)
    assert "<script>" not in page
    assert "<b>x</b>" not in page
    assert "&lt;script&gt;" in page


def test_findings() -> None:
    said = " ".join(findings(result()))
    assert "80 requests were answered and 0 failed" in said
    assert "From 1 to 4 users" in said
    assert "The knee is at 2 users" in said
    assert "1.00 GiB at the start, 2.00 GiB at most" in said
    assert "bottleneck" not in said  # nothing is known of the generator


def test_findings_of_few_figures() -> None:
    alone = result(levels=[level(3.0, n=5)], memory=[], timeline=[], counted_by={"chunks": 5})
    said = " ".join(findings(alone))
    assert "knee" not in said
    assert "fewer than 20 answers" in said
    assert "did not tell the tokens of 5 answers" in said
    nothing = result(levels=[level(3.0, n=0)], whole=level(3.0, n=0), memory=[], timeline=[])
    assert "0 requests were answered" in " ".join(findings(nothing))
    assert "<html" in render(nothing)


def test_a_generator_at_its_limit_is_told() -> None:
    slow = result()
    slow.levels[2].generator = Generator(0.97, 0.001, None, ["a process of the generator was busy 97% of the time"])
    assert "The load generator was the bottleneck at 4 users" in " ".join(findings(slow))
    slow.levels[2].generator = Generator(0.2, 0.003)
    assert "The load generator was not the bottleneck" in " ".join(findings(slow))
    assert "late by at most 3 ms" in " ".join(findings(slow))


def test_no_empty_pictures() -> None:
    """A single point is drawn as one; without an answer there is no picture of latencies."""
    one = plots.over_time(result(), "Latency over time", "seconds", {"median latency": [0.1, None]})
    assert [line.get_marker() for line in one.axes.lines] == ["o"]
    silent = result(timeline=[Point(0.5, 1.0, 0.0, 0.0, 1.0), Point(1.5, 1.0, 0.0, 0.0, 1.0)])
    assert "Latency over time" not in render(silent)


def test_interrupted() -> None:
    cut = result(interrupted="at 4 users, which were held for 1 of 9 s")
    cut.levels[2].interrupted = True
    assert findings(cut)[0].startswith("The test was interrupted at 4 users, which were held for 1 of 9 s;")
    assert "4 (interrupted)" in render(cut)
    assert "one was interrupted at 4 users" in " ".join(comparison([cut, result("two")]))


def test_memory_by_part() -> None:
    """Areas in a fixed order, whatever order the server has, and the totals above them."""
    parts = {"rest": 2**28, "graphs": 2**27, "kv_cache": 2**30, "heads": 2**26, "weights": 2**29}
    known = result(memory=[Memory(float(i), 2**31, None, parts) for i in range(3)])
    plot = plots.memory([known])
    assert plot is not None
    _, labels = plot.axes.get_legend_handles_labels()
    assert sorted(labels) == sorted(["weights", "heads", "K/V cache", "graphs", "rest", "host"])
    assert [label for label in labels if label != "host"] == ["weights", "heads", "K/V cache", "graphs", "rest"]
    tops = [area.get_paths()[0].get_extents().y1 for area in plot.axes.collections]
    assert tops == pytest.approx([sum(list(parts.values())[-i:]) / 2**30 for i in range(1, 6)])
    assert ">K/V cache</text>" in plot.svg()
    both = plots.memory([known, result("two")])
    assert both is not None
    assert not both.axes.collections  # several runs are lines


def test_findings_of_rates() -> None:
    rates = result(kind="rate")
    rates.levels[2].overloaded = True
    said = " ".join(findings(rates))
    assert "kept up with 2 and not with 4 requests/s" in said
    assert "Goodput (first token within 500 ms, 50 ms a token or less) was best at 4" in said
    assert "Goodput" in render(rates)


def test_compare(tmp_path: Path) -> None:
    faster = result("two")
    faster.levels = faster.levels[1:]
    faster.levels[0].output_tokens_per_s *= 2
    for folder, found in (("a", result("one")), ("b", faster), ("c", result("one"))):
        (tmp_path / folder).mkdir()
        results.save(found, tmp_path / folder / results.FILE)
    page = compare([tmp_path / "a", tmp_path / "b" / "report.json", tmp_path / "c"], tmp_path / "out").read_text()
    assert "At 2 users, two had 2.00 times the output tokens/s of one (1)" in text_of(page)
    assert "one (2)" in page
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["one (1)"] * 3 + ["two"] * 2 + ["one (2)"] * 3


def test_comparisons_that_mix_things() -> None:
    other = result("two", machine={"cpu": "another"}, settings={"prompt_tokens": 9, "output_tokens": 6})
    said = " ".join(comparison([result(), other]))
    assert "do not ask for the same work (prompt tokens)" in said
    assert "different machines" in said
    assert "different kinds" in " ".join(comparison([result(), result("two", kind="rate")]))
    assert "no answered load in common" in " ".join(comparison([result(), result("two", levels=[level(99.0)])]))


def test_what_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(BenchInputError, match="cannot read"):
        results.load(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(BenchInputError, match="is no report of manyheads bench"):
        results.load(tmp_path)
    with pytest.raises(BenchInputError, match="two reports or more"):
        compare([tmp_path], tmp_path)
