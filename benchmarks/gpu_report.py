"""Table and plot of what gpu.py measured: results/gpu/*.json → results/gpu/README.md and docs/images/gpu.svg.

    python benchmarks/gpu_report.py

The limit is arithmetic, not a run: the time of a step's matrix products by in-flight tokens (measured on an H200 with
random weights, CUDA graphs), 0.22 ms for the heads, the K/V bytes at 4.2 TB/s, and in every step, of all tree sizes the
one that gives most, with the steps that these prompts take (results/tokens_per_step.json). Requests that need fewer
steps end sooner, so that a run's last steps have few rows; in `limit, all rows to the end` they do not.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from typing import Any

import matplotlib
from common import ROOT

matplotlib.use("Agg")
from matplotlib import pyplot

FOLDER = ROOT / "benchmarks/results/gpu"
MATRIX_MS = {1: 3.70, 8: 3.74, 16: 3.77, 32: 3.83, 64: 3.82, 96: 4.07, 128: 4.22, 192: 5.49, 256: 6.19, 384: 9.24,
             512: 12.0, 768: 16.0, 1024: 22.7}  # fmt: skip
HEADS_MS, BYTES_PER_S = 0.22, 4.2e12
KV_BYTES = 2 * 32 * 4096 * 2  # of a token: keys and values, layers, channels, half precision
MEAN_CONTEXT = 128 + 128
RUNS = {
    "manyheads_medusa": "manyheads, Medusa",
    "manyheads_plain": "manyheads, plain",
    "vllm_plain": "vLLM, plain",
}


def matrix_ms(tokens: int) -> float:
    """Linear between measured points."""
    points = sorted(MATRIX_MS)
    at = max(1, min(bisect_left(points, tokens), len(points) - 1))
    low, high = points[at - 1], points[at]
    return MATRIX_MS[low] + (MATRIX_MS[high] - MATRIX_MS[low]) * (tokens - low) / (high - low)


def limit(users: int, steps: dict[str, list[int]], tokens_out: int, *, full: bool = False) -> float:
    """Most tokens a second that the machine allows for so many prompts.

    Args:
        steps: by tree size, how many steps each prompt takes; of more users, some have the same prompts.
        full: no row ends before the others.
    """
    counts: dict[int, list[float]] = {1: [tokens_out - 1] * users}
    for size, taken in steps.items():
        counts[int(size)] = [taken[i % len(taken)] for i in range(users)]
    if full:
        counts = {size: [sum(taken) / users] * users for size, taken in counts.items()}
    left = [1.0] * users  # of each request, what share of it is to come
    total_ms = 0.0
    while any(share > 0 for share in left):
        rows = [i for i, share in enumerate(left) if share > 0]
        sizes = [size for size in counts if len(rows) * size <= max(MATRIX_MS)]
        cost = {
            size: matrix_ms(len(rows) * size)
            + (HEADS_MS if size > 1 else 0)
            + len(rows) * MEAN_CONTEXT * KV_BYTES / BYTES_PER_S * 1e3
            for size in sizes
        }
        best = max(sizes, key=lambda size: sum(1 / counts[size][i] for i in rows) / cost[size])
        total_ms += cost[best]
        for i in rows:
            left[i] -= 1 / counts[best][i]
            if left[i] < 1e-9:
                left[i] = 0.0
    return users * (tokens_out - 1) / total_ms * 1e3


def load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return record


def latency() -> str:
    """What is not decoding at full speed."""
    ours, plain, vllm = load("manyheads_medusa"), load("manyheads_plain"), load("vllm_plain")
    long, chance = load("manyheads_long"), load("manyheads_chance")

    def ms(*values: float) -> list[str]:
        return [f"{value * 1e3:.1f}" for value in values]

    rows = [
        ["first token of 128 tokens alone, ms", *ms(*(r["first"]["128"] for r in (ours, plain, vllm)))],
        ["first token of 2,000 tokens alone, ms", *ms(*(r["first"]["2000"] for r in (ours, plain, vllm)))],
    ]
    for name, key in (("median", "gap_p50_s"), ("p99", "gap_p99_s"), ("longest", "gap_max_s")):
        cells = ms(*(r["gaps"][key] for r in (long, plain, vllm)))
        rows.append([f"gap of 32 streams while prompts of 4,000 tokens arrive, {name}, ms", *cells])
    cells = ms(*(r["gaps"]["first_token_of_4000_s"] for r in (long, plain, vllm)))
    rows.append(["first token of these prompts, ms", *cells])
    # of plain decoding by the median step of 16 rows: its run also counted steps in which prompts were computed
    alone = 16 / plain["long"]["step_times"]["16x1"][1] * 1e3
    speed = [f"{s:.0f}" for s in (long["long"]["decode_tokens_per_s"], alone, vllm["long"]["decode_tokens_per_s"])]
    rows.append(["16 requests of 8,000 tokens, tokens/s", *speed])
    rows.append(["… accepted by chance", f"{chance['long']['decode_tokens_per_s']:.0f}", "", ""])
    head = "| | manyheads, Medusa | manyheads, plain | vLLM, plain |\n|---|---|---|---|\n"
    return head + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def profile() -> str:
    """A step's time against that of its matrix products."""
    found = load("profile")
    rows = []
    for shape, step in found.items():
        rows_, nodes = shape.split("x")
        tokens = int(int(rows_) * float(nodes))
        products = matrix_ms(tokens) + (HEADS_MS if tokens > int(rows_) else 0)
        gap = step["step_ms"] - step["graphs_ms"]
        cells = (step["step_ms"], products, step["step_ms"] / products, gap)
        rows.append(f"| {rows_} × {nodes} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    head = (
        "| rows × nodes | step, ms | matrix products alone, ms | ratio | between a step's graphs and the next's, ms |\n"
    )
    return head + "|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def divergence() -> str:
    found = load("divergence")
    count, parted = found["prompts"], found["parted"]
    gaps = ", ".join(f"{row['gap']:.4f}" for row in parted)
    return (
        f"Greedy in float16, Medusa against plain: {count - len(parted)} of {count} replies of {found['tokens_out']} "
        f"tokens are equal; where the others part, the two tokens' log-probabilities differ by {gaps}.\n"
    )


def plot(name: str, users: list[int], curves: dict[str, tuple[str, list[float]]], title: str) -> str:
    """Draws tokens a second by number of requests into docs/images; the Markdown that shows it.

    Args:
        curves: by label, colour and line as matplotlib writes them, and the values.
    """
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for label, (style, values) in curves.items():
        marker = "" if style.endswith(":") else "o"
        axes.plot(users, values, style, marker=marker, markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(users, [str(n) for n in users])
    ticks = [250, 500, 1000, 2000, 4000, 8000, 16000]
    axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("requests at once")
    axes.set_ylabel("output tokens/s while decoding")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same picture from the same figures
        figure.savefig(ROOT / f"docs/images/{name}.svg", metadata={"Date": None})
    return f"![tokens per second by number of requests](../../../docs/images/{name}.svg)\n"


def main() -> None:
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    ready = {}
    for name in RUNS:
        record = json.loads((FOLDER / f"{name}.json").read_text())
        runs[name] = {row["users"]: row for row in record["rows"]}
        ready[name] = record["ready_s"]
    acceptance = json.loads((ROOT / "benchmarks/results/tokens_per_step.json").read_text())["greedy"]
    users = sorted(runs["manyheads_medusa"])
    rate = {name: [runs[name][n]["decode_tokens_per_s"] for n in users] for name in RUNS}
    limits = [limit(n, acceptance["steps"], acceptance["tokens_out"]) for n in users]
    lines = {RUNS[name]: [f"{r:.0f}" for r in rate[name]] for name in RUNS}

    def ratio(a: list[float], b: list[float]) -> list[str]:
        return [f"{x / y:.2f}" for x, y in zip(a, b, strict=True)]

    lines["Medusa / vLLM plain"] = ratio(rate["manyheads_medusa"], rate["vllm_plain"])
    lines["plain / vLLM plain"] = ratio(rate["manyheads_plain"], rate["vllm_plain"])
    lines["Medusa / our own plain"] = ratio(rate["manyheads_medusa"], rate["manyheads_plain"])
    lines["limit (see gpu_report.py)"] = [f"{x:.0f}" for x in limits]
    lines["share of the limit"] = ratio(rate["manyheads_medusa"], limits)
    full = [limit(n, acceptance["steps"], acceptance["tokens_out"], full=True) for n in users]
    lines["share of the limit, all rows to the end"] = ratio(rate["manyheads_medusa"], full)
    medusa = runs["manyheads_medusa"]
    per_step = [(medusa[n]["tokens"] - n) / medusa[n]["counters"]["row_steps"] for n in users]
    lines["tokens per step and row"] = [f"{x:.2f}" for x in per_step]
    chance = {row["users"]: row for row in load("manyheads_chance")["rows"]}
    lines["Medusa, accepted by chance as published for Vicuna-7B"] = [
        f"{chance[n]['decode_tokens_per_s']:.0f}" for n in users
    ]
    plain = rate["manyheads_plain"]
    lines["… / our own plain"] = ratio([chance[n]["decode_tokens_per_s"] for n in users], plain)
    table = ["| requests at once | " + " | ".join(map(str, users)) + " |", "|---" * (len(users) + 1) + "|"]
    table += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in lines.items()]
    text = (FOLDER / "machine.md").read_text() + "\n" + "\n".join(table) + "\n\nStart to ready: "
    text += ", ".join(f"{RUNS[name]} {seconds:.0f} s" for name, seconds in ready.items())
    text += f"; manyheads, Medusa, once Triton's kernels are compiled, {load('manyheads_chance')['ready_s']:.0f} s.\n"
    text += "\n" + latency() + "\n" + profile() + "\n" + divergence()
    styles = {"manyheads_medusa": "C3-", "manyheads_plain": "C3--", "vllm_plain": "C0--"}
    curves = {RUNS[name]: (style, rate[name]) for name, style in styles.items()}
    curves["limit"] = ("k:", limits)
    text += "\n" + plot("gpu", users, curves, "7B shape, half precision, one H200, Spec-Bench prompts, greedy")
    (FOLDER / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
