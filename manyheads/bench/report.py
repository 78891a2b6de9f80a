"""The report of a run is an HTML file that needs no other, with the figures beside it as JSON and CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from manyheads.bench import plots, result
from manyheads.bench.findings import findings, limits, number, seconds
from manyheads.bench.mix import Lengths
from manyheads.bench.record import Record
from manyheads.bench.result import Level, Result, Summary

PAGE = Path(__file__).parent / "page" / "report.html"
TIMES = ("ttft", "tpot", "gap", "e2e")
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "gap": "gap", "e2e": "latency"}
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")


@dataclass
class Table:
    """This is a table of the page."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def write(found: Result, records: Sequence[Record], folder: Path) -> Path:
    """Write everything into a folder, and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    result.save(found, folder / result.FILE)
    write_levels(found, folder / "levels.csv")
    write_requests(records, folder / "requests.csv")
    page = folder / "report.html"
    page.write_text(render(found), encoding="utf-8")
    return page


def write_levels(found: Result, path: Path) -> None:
    """Write a row for each load; times are in seconds."""
    plain: tuple[str, ...] = (
        "load",
        "seconds",
        "sent",
        "completed",
        "failed",
        "unfinished",
        "requests_per_s",
        "output_tokens_per_s",
    )
    plain += (
        "total_tokens_per_s",
        "goodput",
        "good",
        "in_flight",
        "prompt_tokens",
        "output_tokens",
        "tokens_per_chunk",
    )
    plain += ("tokens_per_step", "overloaded", "interrupted")
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow([*plain, *(f"{t}_{s}" for t in TIMES for s in STATISTICS), "generator_cpu", "generator_bound"])
        for level in found.levels:
            times = [getattr(getattr(level, t), s, None) for t in TIMES for s in STATISTICS]
            generator = [level.generator.cpu, "; ".join(level.generator.bound)]
            out.writerow([*(getattr(level, name) for name in plain), *times, *generator])


def write_requests(records: Sequence[Record], path: Path) -> None:
    """Write a row for each request; `sent` is in seconds from the first."""
    begin = min((r.sent for r in records), default=0.0)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        head = ("sent", "seconds", "ttft", "tpot", "chunks", "prompt_tokens", "tokens", "counted_by", "steps")
        out.writerow([*head, "finish", "reason", "detail"])
        for r in sorted(records, key=lambda r: r.sent):
            counts = (len(r.chunks), r.prompt_tokens, r.tokens, r.counted_by if r.ok else None, r.steps)
            out.writerow([r.sent - begin, r.seconds, r.ttft, r.tpot, *counts, r.finish, r.reason, r.detail])


def render(found: Result) -> str:
    """Return the page, as HTML."""
    return page(
        title=f"Load test: {found.name}",
        subtitle=f"{found.created} · {work(found)}{' · interrupted' if found.interrupted else ''}",
        tiles=_tiles(found),
        findings=findings(found),
        warn=bool(found.interrupted or found.whole.failed or any(level.generator.bound for level in found.levels)),
        plots=_plots(found),
        tables=[_loads(found), *_times(found), _tokens(found), *_failures(found)],
        setups=[(found.name, setup(found))],
    )


def page(**parts: Any) -> str:
    """Fill the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(**parts)


def work(found: Result) -> str:
    """Return what every request asked for, in words."""
    settings = found.settings
    if found.kind == "mix":
        asked = [Lengths.parse(str(settings[f"{of}_tokens"]), of) for of in ("prompt", "output")]
        tokens = [str(a) if a.fixed else f"about {a.median} ({a.least} to {a.most})" for a in asked]
        return f"{tokens[0]} tokens in, {tokens[1]} out"
    given = settings.get("prompts") or f"{settings.get('prompt_tokens')} tokens in"
    most = "up to " if settings.get("natural") else ""
    return f"{given}, {most}{settings.get('output_tokens')} out"


def name(found: Result, level: Level) -> str:
    """Return a load's name in legends."""
    if found.kind == "users":
        return "1 user" if level.load == 1 else f"{level.load:g} users"
    return f"{level.load:g} ×" if found.kind == "trace" else f"{level.load:g}/s"


def _tiles(found: Result) -> list[tuple[str, str]]:
    best = max(found.levels, key=lambda level: level.output_tokens_per_s)
    at = f"at {name(found, best)}"
    tiles = []
    if found.attain is not None:
        tiles.append(
            (f"{found.highest.load:g}" if found.highest else "none", "requests/s, the highest rate that holds")
        )
    tiles += [
        (number(best.output_tokens_per_s), f"output tokens/s, the most ({at})"),
        (f"{best.requests_per_s:.3g}", f"requests/s {at}"),
    ]
    for label, summary in (("latency", best.e2e), ("TTFT", best.ttft), ("TPOT", best.tpot)):
        if summary is not None:
            tiles.append((seconds(summary.p50), f"median {label} {at}"))
    tiles.append((str(found.whole.failed), f"failures of {found.whole.failed + found.whole.completed} requests"))
    return tiles


def _plots(found: Result) -> list[tuple[str, str, str]]:
    made: list[tuple[str, str, str]] = []
    loads = [level.load for level in found.levels]

    def add(plot: plots.Plot | None, note: str = "", **how: Any) -> None:
        if plot is not None:
            made.append((plot.title, note, plot.svg(**how)))

    if len(loads) > 1 and found.kind != "users":
        lines = {"answered": lambda level: level.requests_per_s, "within the objectives": lambda v: v.goodput}
        add(plots.by_load([found], "Goodput", "requests/s", lines), limits(found), whole_x=loads)
        if found.attain is not None:
            add(plots.attained([found]), "a rate holds above the dashed line", whole_x=loads)
    if len(loads) > 1:
        lines = {q: quantile("e2e", q) for q in ("p50", "p90", "p99")}
        add(plots.by_load([found], "Latency by load", "seconds", lines), whole_x=loads)
        lines = {"": lambda level: level.output_tokens_per_s}
        add(plots.by_load([found], "Throughput by load", "output tokens/s", lines), whole_x=loads)
        add(plots.frontier([found]), f"each point is a load in {found.unit}; up and to the left is better")
    picked = found.levels if len(found.levels) <= 8 else found.levels[:: len(found.levels) // 6]
    for key, title in (("ttft", "Time to first token"), ("tpot", "Time per output token")):
        series = [(name(found, level), getattr(level, key)) for level in picked]
        if any(summary for _, summary in series):
            add(plots.distribution(title, series, 1e3, "ms"), "share of requests that took at most so long")
    if found.timeline:
        points = found.timeline
        lines_t: dict[str, plots.Values] = {"tokens/s": [p.tokens_per_s for p in points]}
        add(plots.over_time(found, "Output tokens per second over time", "tokens/s", lines_t))
        lines_t = {"under way": [p.in_flight for p in points]}
        add(plots.over_time(found, "Requests under way over time", "requests", lines_t))
        lines_t = {"median latency": [p.p50 for p in points]}
        if any(p.p50 is not None for p in points):
            plot = plots.over_time(found, "Latency over time", "seconds, median", lines_t)
            add(plot, "of the requests that ended then")
    add(plots.memory([found]), "resident size of all its processes; GPU: all that is in use")
    if any(level.tokens_per_step for level in found.levels) and len(loads) > 1:
        lines = {"": lambda level: level.tokens_per_step}
        plot = plots.by_load([found], "Tokens per step by load", "tokens per row and step", lines)
        add(plot, "1 is plain decoding; more is what speculation gives", whole_x=loads)
    add(plots.failures(found))
    return made


def quantile(key: str, statistic: str) -> Any:
    """Return a function that takes a figure of a load."""
    return lambda level: getattr(getattr(level, key), statistic, None)


def optional(value: float | None, form: str = "{:.2f}") -> str:
    """Return a figure as text, or a dash."""
    return "–" if value is None else form.format(value)


def _loads(found: Result) -> Table:
    head = [found.unit, "requests/s", "output tokens/s", "total tokens/s", "goodput /s", "under way"]
    mixed = found.attain is not None
    rows = []
    for v in found.levels:
        mark = " (overload)" if v.overloaded else " (interrupted)" if v.interrupted else ""
        row = [f"{v.load:g}{mark}", f"{v.requests_per_s:.3g}"]
        row += [number(v.output_tokens_per_s), number(v.total_tokens_per_s), f"{v.goodput:.3g}", f"{v.in_flight:.1f}"]
        row += [f"{v.attained:.1%}"] if mixed else []
        rows.append([*row, str(v.completed), str(v.failed), str(v.unfinished)])
    head += ["within objectives"] if mixed else []
    return Table("Loads", [*head, "answered", "failed", "unfinished"], rows, f"objectives: {limits(found)}")


def _tokens(found: Result) -> Table:
    head = [found.unit, "tokens in", "tokens out", "per chunk", "per step", "accepted by depth", "generator", "late"]
    rows = []
    for v in found.levels:
        row = [f"{v.load:g}", optional(v.prompt_tokens, "{:.4g}"), optional(v.output_tokens, "{:.4g}")]
        row += [optional(v.tokens_per_chunk), optional(v.tokens_per_step)]
        row += [" · ".join(f"{share:.2f}" for share in v.acceptance) or "–", optional(v.generator.cpu, "{:.0%}")]
        late = v.generator.late if v.generator.late is not None else v.generator.lag
        rows.append([*row, seconds(late) if late is not None else "–"])
    note = (
        "Tokens are means of a request. Generator: share of a core that its busiest process took. Late: its own delay."
    )
    return Table("Tokens and generator", head, rows, note)


def _times(found: Result) -> list[Table]:
    rows = []
    for level in found.levels:
        for key in TIMES:
            summary: Summary | None = getattr(level, key)
            if summary is not None:
                values = [seconds(getattr(summary, statistic)) for statistic in STATISTICS]
                rows.append([name(found, level), NAMES[key], str(summary.n), *values])
    return [Table("Times", ["load", "what", "n", *STATISTICS], rows)] if rows else []


def _failures(found: Result) -> list[Table]:
    whole = found.whole.failures
    if not whole:
        return []
    rows = [[reason, str(count), " | ".join(found.details.get(reason, ())) or "–"] for reason, count in whole.items()]
    return [Table("Failures", ["reason", "requests", "for example"], rows)]


def setup(found: Result) -> list[tuple[str, str]]:
    """Tell the reader how it was measured."""
    target, where, limit = found.target, found.machine, found.limit
    server = str(target.get("server") or "unknown server")
    if target.get("started_here"):
        server += ", started for this test: " + (" ".join(target.get("options") or ()) or "with its defaults")
    elif target.get("url"):
        server += f" at {target['url']}"
    facts = [
        ("server", server),
        ("model", f"{target.get('model')}" + (f", {target['heads']} Medusa heads" if target.get("heads") else "")),
        ("load", ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in found.settings.items())),
        ("machine", f"{where.get('cpu')}, {where.get('cores')} cores, {where.get('memory_gib')} GiB"),
        ("GPUs", ", ".join(where.get("gpus") or ()) or "none seen"),
        ("versions", ", ".join(f"{key} {where.get(key)}" for key in ("manyheads", "locust", "python"))),
        ("load average before", str(where.get("load_average"))),
    ]
    if limit:
        facts.append(
            (
                "the generator's limit",
                f"about {number(limit['chunks_per_s'])} chunks/s ({limit.get('processes', 1):.0f} process(es), each "
                "with a core to itself; from the time that a chunk took with a server that computes nothing)",
            )
        )
    return facts + [("note", note) for note in found.notes]
