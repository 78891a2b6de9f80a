"""Reports of several runs are laid side by side here: `manyheads bench --compare A B …`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path

from manyheads.bench import plots
from manyheads.bench.findings import comparison, number, seconds
from manyheads.bench.plan import BenchInputError
from manyheads.bench.report import Table, optional, page, quantile, setup, write_csv
from manyheads.bench.result import Level, Result, load


def compare(paths: Sequence[Path], folder: Path) -> Path:
    """Write a page and a CSV file (times in seconds) of several reports; BenchInputError says that one is none."""
    if len(paths) < 2:
        raise BenchInputError("--compare needs two reports or more")
    results = [load(path) for path in paths]
    _number(results)
    folder.mkdir(parents=True, exist_ok=True)
    plain = ("load", "requests_per_s", "output_tokens_per_s", "goodput", "failed", "tokens_per_step")
    times = [(key, statistic) for key in ("ttft", "tpot", "e2e") for statistic in ("p50", "p99")]
    figures = [*map(attrgetter, plain), *(quantile(*time) for time in times)]
    rows = [[r.name, *(take(level) for take in figures)] for r in results for level in r.levels]
    write_csv(folder / "compare.csv", ["run", *plain, *map("_".join, times)], rows)
    target = folder / "compare.html"
    target.write_text(_render(results), encoding="utf-8")
    return target


def _number(results: Sequence[Result]) -> None:
    """Put numbers behind names that several results share."""
    for name, count in Counter(result.name for result in results).items():
        if count > 1:
            for i, result in enumerate([result for result in results if result.name == name], 1):
                result.name = f"{name} ({i})"


def _render(results: Sequence[Result]) -> str:
    return page(
        title="Load tests side by side",
        subtitle=" · ".join(f"{result.name}, {result.created}" for result in results),
        tiles=[],
        findings=comparison(results),
        warn=any(result.whole.failed for result in results),
        pictures=_plots(results),
        tables=_tables(results),
        setups=[(result.name, setup(result)) for result in results],
    )


def _plots(results: Sequence[Result]) -> Iterator[plots.Plot | None]:
    if len({result.kind for result in results}) == 1:
        yield plots.by_load(results, "Throughput by load", "output tokens/s", {"": attrgetter("output_tokens_per_s")})
        for key, short in (("e2e", "latency"), ("ttft", "TTFT"), ("tpot", "TPOT")):
            yield plots.by_load(results, f"Median {short} by load", "seconds", {"": quantile(key, "p50")})
        yield plots.tokens_per_step(results)
    yield plots.frontier(results, "a load")
    yield plots.memory(results)
    for key, title in (("ttft", "Time to first token"), ("tpot", "Time per output token")):
        series = [(r.name, getattr(r.whole, key)) for r in results]
        yield plots.distribution(title, series, "all loads of a run together")


def _tables(results: Sequence[Result]) -> list[Table]:
    rows = []
    for at in sorted({level.load for result in results for level in result.levels}):
        here = [(r, v) for r in results for v in r.levels if v.load == at]
        rows += [_row(result, level, here[0][1]) for result, level in here]
    head = ["load", "run", "output tok/s", "×", "latency p50 · p99", "×", "TTFT p50 · p99", "TPOT p50 · p99"]
    head += ["requests/s", "goodput /s", "tok/step", "failed"]
    return [Table("Load by load", head, rows, "×: times the first run at this load.")]


def _row(result: Result, level: Level, base: Level) -> list[str]:
    speed = level.output_tokens_per_s / base.output_tokens_per_s if base.output_tokens_per_s else None
    slower = level.e2e.p50 / base.e2e.p50 if level.e2e and base.e2e else None
    times = [f"{seconds(s.p50)} · {seconds(s.p99)}" if s else "–" for s in (level.e2e, level.ttft, level.tpot)]
    row = [f"{level.load:g}", plots.shorten(result.name, 40), number(level.output_tokens_per_s), optional(speed)]
    row += [times[0], optional(slower), *times[1:], f"{level.requests_per_s:.3g}", f"{level.goodput:.3g}"]
    return [*row, optional(level.tokens_per_step), str(level.failed)]
