"""Reports of several runs are laid side by side here: `manyheads bench --compare A B …`."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from manyheads.bench import plots
from manyheads.bench.findings import comparison, limits, number, seconds
from manyheads.bench.plan import BenchInputError
from manyheads.bench.report import Table, optional, page, quantile, setup
from manyheads.bench.result import Level, Result, load


def compare(paths: Sequence[Path], folder: Path) -> Path:
    """Write a page and a CSV file that lay runs side by side, and return the page's path.

    Raises:
        BenchInputError: there are fewer than two, or one is no report.
    """
    if len(paths) < 2:
        raise BenchInputError("--compare needs two reports or more")
    results = distinct([load(path) for path in paths])
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(results, folder / "compare.csv")
    target = folder / "compare.html"
    target.write_text(render(results), encoding="utf-8")
    return target


def distinct(results: Sequence[Result]) -> list[Result]:
    """Return the same results, with numbers behind names that they share."""
    names = Counter(result.name for result in results)
    seen: Counter[str] = Counter()
    renamed = []
    for result in results:
        seen[result.name] += 1
        new = f"{result.name} ({seen[result.name]})" if names[result.name] > 1 else result.name
        renamed.append(msgspec.structs.replace(result, name=new))
    return renamed


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Write a row for each run and load; times are in seconds."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        head = (
            "run",
            "load",
            "requests_per_s",
            "output_tokens_per_s",
            "goodput",
            "attained",
            "failed",
            "tokens_per_step",
        )
        out.writerow([*head, "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "e2e_p50", "e2e_p99"])
        for result in results:
            for v in result.levels:
                speed = (v.requests_per_s, v.output_tokens_per_s, v.goodput, v.attained, v.failed, v.tokens_per_step)
                times = [getattr(s, p, None) for s in (v.ttft, v.tpot, v.e2e) for p in ("p50", "p99")]
                out.writerow([result.name, v.load, *speed, *times])


def render(results: Sequence[Result]) -> str:
    """Return the page that lays the runs side by side, as HTML."""
    return page(
        title="Load tests side by side",
        subtitle=" · ".join(f"{result.name}, {result.created}" for result in results),
        tiles=[],
        findings=comparison(results),
        warn=any(result.whole.failed for result in results),
        plots=_plots(results),
        tables=_tables(results),
        setups=[(result.name, setup(result)) for result in results],
    )


def _plots(results: Sequence[Result]) -> list[tuple[str, str, str]]:
    made: list[tuple[str, str, str]] = []
    loads = sorted({level.load for result in results for level in result.levels})

    def add(plot: plots.Plot | None, note: str = "", **how: Any) -> None:
        if plot is not None:
            made.append((plot.title, note, plot.svg(**how)))

    if len({result.kind for result in results}) == 1:
        if results[0].attain is not None:
            goodput = plots.by_load(results, "Goodput", "requests/s", {"": lambda level: level.goodput})
            add(goodput, limits(results[0]), whole_x=loads)
            add(plots.attained(results), "a rate holds above the dashed line", whole_x=loads)
        speed = {"": lambda level: level.output_tokens_per_s}
        add(plots.by_load(results, "Throughput by load", "output tokens/s", speed), whole_x=loads)
        for key, short in (("e2e", "latency"), ("ttft", "TTFT"), ("tpot", "TPOT")):
            plot = plots.by_load(results, f"Median {short} by load", "seconds", {"": quantile(key, "p50")})
            add(plot, whole_x=loads)
        if any(level.tokens_per_step for result in results for level in result.levels):
            steps = {"": lambda level: level.tokens_per_step}
            add(plots.by_load(results, "Tokens per step by load", "tokens per row and step", steps), whole_x=loads)
    add(plots.frontier(results), "each point is a load; up and to the left is better")
    add(plots.memory(results), "resident size of all processes; GPU: all that is in use")
    for key, title in (("ttft", "Time to first token"), ("tpot", "Time per output token")):
        series = [(r.name, getattr(r.whole, key)) for r in results]
        add(plots.distribution(title, series, 1e3, "ms"), "all loads of a run together")
    return made


def _tables(results: Sequence[Result]) -> list[Table]:
    rows = []
    for at in sorted({level.load for result in results for level in result.levels}):
        here = [(r, v) for r in results for v in r.levels if v.load == at]
        rows += [_row(result, level, here[0][1]) for result, level in here]
    head = ["load", "run", "output tok/s", "×", "latency p50 · p99", "×", "TTFT p50 · p99", "TPOT p50 · p99"]
    head += ["requests/s", "goodput /s", "tok/step", "failed"]
    tables = [Table("Load by load", head, rows, "×: times the first run at this load.")]
    return [_highest(results), *tables] if results[0].attain is not None else tables


def _highest(results: Sequence[Result]) -> Table:
    """Return the highest rate that holds of each run, and what it did at most."""
    base, rows = results[0].highest, []
    most = [max(level.output_tokens_per_s for level in result.levels) for result in results]
    for result, tokens in zip(results, most, strict=True):
        held = result.highest
        row = [plots.shorten(result.name, 40), f"{held.load:g}" if held else "none"]
        row += [optional(held.load / base.load if held and base else None)]
        row += [f"{max(level.goodput for level in result.levels):.3g}"]
        rows.append([*row, number(tokens), optional(tokens / most[0] if most[0] else None)])
    head = ["run", "highest rate that holds, /s", "×", "best goodput /s", "most output tok/s", "×"]
    return Table(
        "Highest rates", head, rows, f"×: times the first run. A rate holds by its share of {limits(results[0])}."
    )


def _row(result: Result, level: Level, base: Level) -> list[str]:
    speed = level.output_tokens_per_s / base.output_tokens_per_s if base.output_tokens_per_s else None
    slower = level.e2e.p50 / base.e2e.p50 if level.e2e and base.e2e else None
    times = [f"{seconds(s.p50)} · {seconds(s.p99)}" if s else "–" for s in (level.e2e, level.ttft, level.tpot)]
    row = [f"{level.load:g}", plots.shorten(result.name, 40), number(level.output_tokens_per_s), optional(speed)]
    row += [times[0], optional(slower), *times[1:], f"{level.requests_per_s:.3g}", f"{level.goodput:.3g}"]
    return [*row, optional(level.tokens_per_step), str(level.failed)]
