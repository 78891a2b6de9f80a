"""A report says in sentences what its figures carry, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from manyheads.bench.result import Level, Result

KNEE = 0.9
"""The knee is the smallest load with this share of the best throughput."""
BUSY = 0.5
"""A machine was busy before the test if its load average was so much for each core, or more."""
FEW = 20
"""The percentiles of a load with fewer answers than these say little."""


def seconds(value: float) -> str:
    """Return a time as text with three digits and its unit."""
    if value < 0.001:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s"


def number(value: float) -> str:
    """Return a number as text with three digits, or with all that stand before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def findings(result: Result) -> list[str]:
    """Return what the figures say, a sentence each."""
    said = [_counts(result)]
    if result.attain is not None:
        said[:0] = [_highest(result, result.attain), _most(result)]
    if result.interrupted:
        said.insert(0, f"The test was interrupted {result.interrupted}; what was measured until then is here.")
    said += _busy(result) + _generator(result)
    levels = [level for level in result.levels if level.completed]
    if len(levels) > 1:
        said += _sweep(result, levels) if result.kind == "users" else _rates(result, levels)
    said += _speculation(result, levels)
    said += _engines(result, levels) + _memory(result)
    few = [level for level in result.levels if level.completed < FEW]
    if few:
        loads = ", ".join(f"{level.load:g} ({level.completed})" for level in few)
        said.append(f"Loads with fewer than {FEW} answers, whose percentiles say little: {loads} {result.unit}.")
    if result.counted_by.get("chunks"):
        said.append(
            f"The server did not tell the tokens of {result.counted_by['chunks']} answers; their chunks were counted "
            "in their place, so tokens/s and time per output token are off where chunks have several tokens."
        )
    return said


def limits(result: Result) -> str:
    """Return the objectives, in words."""
    goal = result.objectives
    return f"first token within {seconds(goal['ttft'])}, {seconds(goal['tpot'])} a token or less"


def _highest(result: Result, attain: float) -> str:
    held = result.highest
    above = [level for level in result.levels if level.load > (held.load if held else 0)]
    if held is None:
        text = f"No rate holds: {100 * attain:g}% of the requests sent must be within both limits ({limits(result)})"
    else:
        text = (
            f"Highest rate that holds: {held.load:g} requests/s. {held.attained:.1%} of the {held.sent} requests sent "
            f"were within both limits ({limits(result)}); {100 * attain:g}% are needed"
        )
    if not above:
        return f"{text}, and no higher rate was tried."
    return f"{text}. At {above[0].load:g} requests/s, {above[0].attained:.1%} were."


def _most(result: Result) -> str:
    best = max(result.levels, key=lambda level: level.output_tokens_per_s)
    full = any(level.overloaded for level in result.levels)
    how = "the server was saturated" if full else "no rate saturated the server, which could do more"
    return f"The most output tokens/s were {number(best.output_tokens_per_s)}, at {best.load:g} requests/s: {how}."


def _busy(result: Result) -> list[str]:
    cores, load = result.machine.get("cores"), result.machine.get("load_average")
    if not cores or load is None or load < BUSY * cores:
        return []
    return [
        f"The machine was busy before the test began (load average {load:g}, {cores} cores): what it measured on this "
        "machine may be too slow."
    ]


def _counts(result: Result) -> str:
    whole = result.whole
    text = f"{whole.completed} requests were answered and {whole.failed} failed in {number(whole.seconds)} s"
    if whole.failures:
        text += ": " + ", ".join(f"{count} × {reason}" for reason, count in whole.failures.items())
    if whole.unfinished:
        text += f"; {whole.unfinished} were under way when the run ended"
    if whole.e2e is not None:
        text += (
            f". Over all loads, {whole.requests_per_s:.3g} requests/s and {number(whole.output_tokens_per_s)} output "
            f"tokens/s, with a latency of {seconds(whole.e2e.p50)} (p50) and {seconds(whole.e2e.p90)} (p90)"
        )
    return text + "."


def _generator(result: Result) -> list[str]:
    bound = [(level, reason) for level in result.levels for reason in level.generator.bound]
    if bound:
        loads = ", ".join(dict.fromkeys(f"{level.load:g}" for level, _ in bound))
        return [
            f"The load generator was the bottleneck at {loads} {result.unit}: {bound[0][1]}. Those figures are limits "
            "of the generator, not of the server; more --workers or another machine for the load would help."
        ]
    shares = [level.generator.cpu for level in result.levels if level.generator.cpu is not None]
    lags = [level.generator.lag for level in result.levels if level.generator.lag is not None]
    if not shares or not lags:
        return []
    return [
        f"The load generator was not the bottleneck: its busiest process took at most {max(shares):.0%} of a core, and "
        f"its timers were late by at most {seconds(max(lags))} (p95)."
    ]


def _sweep(result: Result, levels: Sequence[Level]) -> list[str]:
    first, last = levels[0], levels[-1]
    best = max(levels, key=lambda level: level.output_tokens_per_s)
    knee = next(level for level in levels if level.output_tokens_per_s >= KNEE * best.output_tokens_per_s)
    said = []
    if first.e2e and last.e2e and first.output_tokens_per_s:
        said.append(
            f"From {first.load:g} to {last.load:g} users, output tokens/s went from "
            f"{number(first.output_tokens_per_s)} to {number(last.output_tokens_per_s)} ("
            f"{last.output_tokens_per_s / first.output_tokens_per_s:.2g} times) "
            f"and the median latency from {seconds(first.e2e.p50)} to {seconds(last.e2e.p50)} "
            f"({last.e2e.p50 / first.e2e.p50:.2g} times)."
        )
    if knee is last:
        said.append(f"Throughput still rose at {last.load:g} users, the most that were tried: no knee yet.")
    else:
        said.append(
            f"The knee is at {knee.load:g} users: with {number(knee.output_tokens_per_s)} output tokens/s, that has "
            f"{knee.output_tokens_per_s / best.output_tokens_per_s:.0%} of the best throughput (at {best.load:g})."
        )
    return said


def _rates(result: Result, levels: Sequence[Level]) -> list[str]:
    well = [level for level in levels if not level.overloaded]
    over = [level for level in levels if level.overloaded]
    said = []
    if well and over:
        said.append(
            f"The server kept up with {well[-1].load:g} and not with {over[0].load:g} {result.unit}, where "
            f"{over[0].requests_per_s:.3g} requests/s were answered."
        )
    elif well:
        said.append(f"The server kept up with all loads, up to {well[-1].load:g} {result.unit}: no overload was seen.")
    else:
        said.append("The server kept up with none of these loads.")
    best = max(levels, key=lambda level: level.goodput)
    said.append(
        f"Goodput ({limits(result)}) was best at {best.load:g} {result.unit}: {best.goodput:.3g} requests/s, "
        f"{best.good} of {best.sent} requests sent."
    )
    return said


def _speculation(result: Result, levels: Sequence[Level]) -> list[str]:
    steps = [(level.load, level.tokens_per_step) for level in levels if level.tokens_per_step is not None]
    if not steps:
        return []
    low, high = min(steps, key=lambda s: s[1]), max(steps, key=lambda s: s[1])
    if len(steps) == 1 or f"{low[1]:.2f}" == f"{high[1]:.2f}":
        return [f"The server gave {high[1]:.2f} tokens per row and step."]
    return [
        f"The server gave between {low[1]:.2f} (at {low[0]:g} {result.unit}) and {high[1]:.2f} (at {high[0]:g}) "
        "tokens per row and step."
    ]


def _engines(result: Result, levels: Sequence[Level]) -> list[str]:
    total: dict[str, float] = {}
    for level in levels:
        for name, tokens in level.tokens_by_engine.items():
            total[name] = total.get(name, 0.0) + tokens
    mean = sum(total.values()) / max(1, len(total))
    if mean == 0:
        return []
    name, most = max(total.items(), key=lambda engine: engine[1])
    return [f"{len(total)} engines made the tokens; the busiest, {name}, {most / mean:.2f} times as many as the mean."]


def _memory(result: Result) -> list[str]:
    said = []
    for name, values in (
        ("The server's processes", [m.host for m in result.memory if m.host is not None]),
        ("The GPUs", [m.gpu for m in result.memory if m.gpu is not None]),
    ):
        if len(values) > 1:
            said.append(
                f"{name} held {values[0] / 2**30:.2f} GiB at the start, {max(values) / 2**30:.2f} GiB at most and "
                f"{values[-1] / 2**30:.2f} GiB at the end."
            )
    return said


def comparison(results: Sequence[Result]) -> list[str]:
    """Return what the figures of several runs say against the first of them, where loads are the same."""
    base = results[0]
    said = []
    for other in results[1:]:
        if other.kind != base.kind:
            said.append(f"{base.name} and {other.name} had loads of different kinds; they are not compared by load.")
            continue
        pairs = [(a, b) for a in base.levels for b in other.levels if a.load == b.load]
        pairs = [(a, b) for a, b in pairs if a.completed and b.completed]
        if not pairs:
            said.append(f"{base.name} and {other.name} have no answered load in common.")
            continue
        for a, b in pairs:
            if a.e2e and b.e2e and a.output_tokens_per_s:
                said.append(
                    f"At {a.load:g} {base.unit}, {other.name} had {b.output_tokens_per_s / a.output_tokens_per_s:.2f} "
                    f"times the output tokens/s of {base.name} ({number(b.output_tokens_per_s)} against "
                    f"{number(a.output_tokens_per_s)}) and {b.e2e.p50 / a.e2e.p50:.2f} times its median latency."
                )
    if base.attain is not None:
        rates = ", ".join(f"{r.name} {r.highest.load:g}" if r.highest else f"{r.name} none" for r in results)
        said.insert(0, f"The highest rates that hold, in requests/s: {rates}.")
        if len({(limits(r), r.attain) for r in results}) > 1:
            said.insert(1, "The runs have other limits from each other: these rates are not to be compared.")
    asked = ["prompt_tokens", "prompts", "output_tokens", "natural", "endpoint", "temperature"]
    asked += ["text", "system_tokens", "system_prompts"]
    same = {key: {str(r.settings.get(key)) for r in results} for key in asked}
    differ = [key.replace("_", " ") for key, values in same.items() if len(values) > 1]
    machines = {(r.machine.get("cpu"), tuple(r.machine.get("gpus", ()))) for r in results}
    if differ:
        said.append(f"The runs do not ask for the same work ({', '.join(differ)}): ratios mix that with speed.")
    if len(machines) > 1:
        said.append("The runs were made on different machines: ratios mix that with the servers' speed.")
    said.append("Each run was made once, at its own time: differences of a few per cent may be chance.")
    said += [f"{r.name} was interrupted {r.interrupted}." for r in results if r.interrupted]
    failed = [r for r in results if r.whole.failed]
    said += [f"{r.name}: {r.whole.failed} requests failed." for r in failed]
    bound = [r for r in results if any(v.generator.bound for v in r.levels)]
    return said + [f"{r.name}: the load generator was the bottleneck at some loads." for r in bound]
