"""A report's plots are made here, as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from manyheads.bench.result import Level, Memory, Result, Summary

COLORS = ("#2563a8", "#c2571a", "#2f8a57", "#8a4fa3", "#b3323d", "#6f6a2a", "#3f8f9b", "#555555")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "manyheads",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10,
}
AREAS = ("#9dbfe0", "#f0b48f", "#a5d3b6", "#cdb2da", "#d5d5d5", "#e3c7c9", "#c9c59a", "#b5d6da")
KINDS = {"weights": "weights", "heads": "heads", "kv_cache": "K/V cache", "graphs": "graphs", "rest": "rest"}
"""These are kinds of memory, as servers name them and as readers do, from the bottom to the top of a plot."""
WIDTH, HEIGHT = 5.2, 3.3
APART = 0.09
"""Labels of the x axis are this share of its length apart, or more."""
Values = Sequence[float | None]
Lines = Mapping[str, Callable[[Level], float | None]]
GIB = 2**30


def shorten(label: str, most: int = 48) -> str:
    """Shorten a label so that it fits into a legend."""
    return label if len(label) <= most else label[: most - 1] + "…"


class Plot:
    """A plot is a figure with one pair of axes, which ends as SVG."""

    def __init__(self, title: str, x: str, y: str) -> None:
        with matplotlib.rc_context(STYLE):
            self.figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
            self.axes: Any = self.figure.add_subplot()
        self.title = title
        self.axes.set_xlabel(x)
        self.axes.set_ylabel(y)
        self._count = 0
        self._labels = False

    def line(self, x: Sequence[float], y: Values, label: str = "", marker: str = "o", **style: Any) -> None:
        """Draw a line through the points that are there."""
        points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
        if points:
            marker = marker if len(points) > 1 else "o"  # a line through a single point is nothing to see
            style = {"color": COLORS[self._count % len(COLORS)], "marker": marker, "markersize": 4, "lw": 1.8} | style
            self.axes.plot([p[0] for p in points], [p[1] for p in points], label=shorten(label) or None, **style)
            self._labels |= bool(label)
        self._count += 1

    def svg(self, *, zero: bool = True, whole_x: Sequence[float] = ()) -> str:
        """Return the picture; its y axis begins at 0, its x axis may have ticks at given places."""
        with matplotlib.rc_context(STYLE):
            if zero:
                self.axes.set_ylim(0, self.axes.get_ylim()[1] * 1.05 or 1)
            if whole_x:
                ticks = self._apart(whole_x)
                self.axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
                self.axes.minorticks_off()
            if self._labels:
                handles, labels = self.axes.get_legend_handles_labels()
                columns = 4 if max(map(len, labels)) < 12 else 1
                self.figure.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.2)
            out = io.StringIO()
            self.figure.savefig(out, format="svg", metadata={"Date": None})
        text = out.getvalue()
        text = text[text.index("<svg") :]
        label = self.title.replace("&", "and").replace('"', "").replace("<", "")
        return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)

    def _apart(self, places: Sequence[float]) -> list[float]:
        """Return those places on the x axis whose labels would not overlap the one before."""
        left, right = (self.axes.transAxes.transform((x, 0))[0] for x in (0, 1))
        kept: list[float] = []
        last = -math.inf
        for place in places:
            x = self.axes.transData.transform((place, 0.0))[0]
            if x - last >= APART * (right - left):
                kept.append(place)
                last = x
        return kept


def by_load(results: Sequence[Result], title: str, y: str, lines: Lines) -> Plot:
    """Plot figures over the load; with several runs, each line is named after its run."""
    plot = Plot(title, results[0].unit, y)
    loads = sorted({level.load for result in results for level in result.levels})
    for result in results:
        for label, take in lines.items():
            names = [result.name] if len(results) > 1 else []
            names += [label] if label and (len(lines) > 1 or not names) else []
            plot.line([v.load for v in result.levels], [take(v) for v in result.levels], ", ".join(names))
    if len(loads) > 1 and loads[0] > 0 and loads[-1] / loads[0] >= 8:
        plot.axes.set_xscale("log", base=2)
    return plot


def attained(results: Sequence[Result]) -> Plot:
    """Plot the share of the requests sent that was within both objectives, and the least share of a rate that holds."""
    plot = by_load(
        results, "Requests within the objectives", "% of those sent", {"": lambda level: 100 * level.attained}
    )
    for attain in {result.attain for result in results if result.attain is not None}:
        plot.axes.axhline(100 * attain, color="#888888", ls="--", lw=1)
    return plot


def frontier(results: Sequence[Result]) -> Plot:
    """Plot throughput against the latency that it costs, with a point for each load."""
    plot = Plot("Latency and throughput", "median latency, s", "output tokens/s")
    for result in results:
        levels = [v for v in result.levels if v.e2e is not None]
        plot.line(
            [v.e2e.p50 for v in levels if v.e2e],
            [v.output_tokens_per_s for v in levels],
            result.name if len(results) > 1 else "",
        )
        for level in levels:
            if level.e2e:
                at = (level.e2e.p50, level.output_tokens_per_s)
                plot.axes.annotate(f"{level.load:g}", at, xytext=(4, 4), textcoords="offset points", fontsize=9)
    plot.axes.set_xlim(left=0)
    return plot


def distribution(title: str, series: Sequence[tuple[str, Summary | None]], unit: float, x: str) -> Plot:
    """Plot which share of requests was at most how long."""
    plot = Plot(title, x, "share of requests, %")
    shares = list(range(0, 101, 2))
    for name, summary in series:
        if summary is not None:
            plot.line([q * unit for q in summary.quantiles], [float(s) for s in shares], name, marker="")
    positive = [v for _, s in series if s for v in s.quantiles if v > 0]
    if positive and max(positive) / min(positive) > 50:
        plot.axes.set_xscale("log")
    return plot


def memory(results: Sequence[Result]) -> Plot | None:
    """Plot memory over time, that of one run by what it is for if the server tells; return None if none was seen."""
    if not any(result.memory for result in results):
        return None
    plot = Plot("Memory of the server", "seconds", "GiB")
    if len(results) == 1:
        stack(plot, [m for m in results[0].memory if m.parts])
    for result in results:
        name = f"{shorten(result.name, 30)}, " if len(results) > 1 else ""
        times = [m.at for m in result.memory]
        for label, values in (
            ("host", [m.host for m in result.memory]),
            ("GPU", [m.gpu for m in result.memory]),
        ):
            if any(v is not None for v in values):
                plot.line(times, [None if v is None else v / GIB for v in values], name + label, marker="")
    return plot


def stack(plot: Plot, memory: Sequence[Memory]) -> None:
    """Draw areas on top of each other, one for each kind of memory."""
    seen = {kind for m in memory for kind in m.parts}
    kinds = [kind for kind in KINDS if kind in seen] + sorted(seen - KINDS.keys())
    if kinds:
        sizes = [[m.parts.get(kind, 0) / GIB for m in memory] for kind in kinds]
        names = [KINDS.get(kind, kind) for kind in kinds]
        plot.axes.stackplot([m.at for m in memory], sizes, labels=names, colors=AREAS, lw=0)
        plot._labels = True


def over_time(result: Result, title: str, y: str, lines: Mapping[str, Values]) -> Plot:
    """Plot figures over the time of a run."""
    plot = Plot(title, "seconds", y)
    for label, values in lines.items():
        plot.line([p.at for p in result.timeline], values, label if len(lines) > 1 else "", marker="")
    return plot


def failures(result: Result) -> Plot | None:
    """Plot failures by reason and load; return None if there are none."""
    reasons = sorted({reason for level in result.levels for reason in level.failures})
    if not reasons:
        return None
    plot = Plot("Failures", result.unit, "requests")
    names = [f"{level.load:g}" for level in result.levels]
    base = [0] * len(names)
    for i, reason in enumerate(reasons):
        counts = [level.failures.get(reason, 0) for level in result.levels]
        plot.axes.bar(names, counts, bottom=base, label=reason, color=COLORS[i % len(COLORS)])
        base = [a + b for a, b in zip(base, counts, strict=True)]
    plot._labels = True
    return plot
