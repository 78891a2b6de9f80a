"""Table and plot of what gpu.py measured: results/gpu/*.json → results/gpu/README.md and docs/images/gpu.svg.

    python benchmarks/gpu_report.py

The limit is arithmetic, not a run: the time of a step's matrix products by in-flight tokens (measured on an H200 with
random weights, CUDA graphs), 0.22 ms for the heads, the K/V bytes at 4.2 TB/s, and of all tree sizes the one that then
gives most, with the tokens per step that these prompts give (results/tokens_per_step.json).
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
    "vllm_medusa": "vLLM, Medusa",
}


def matrix_ms(tokens: int) -> float:
    """Linear between measured points."""
    points = sorted(MATRIX_MS)
    at = max(1, min(bisect_left(points, tokens), len(points) - 1))
    low, high = points[at - 1], points[at]
    return MATRIX_MS[low] + (MATRIX_MS[high] - MATRIX_MS[low]) * (tokens - low) / (high - low)


def limit(users: int, steps: dict[str, list[int]], tokens_out: int) -> float:
    """Most tokens a second that the machine allows for the first so many prompts."""
    cache_ms = users * MEAN_CONTEXT * KV_BYTES / BYTES_PER_S * 1e3
    rates = [users / (matrix_ms(users) + cache_ms)]
    for size, counts in steps.items():
        counts = counts[:users]
        per_step = (tokens_out - 1) * len(counts) / sum(counts)
        if users * int(size) <= max(MATRIX_MS):
            rates.append(users * per_step / (matrix_ms(users * int(size)) + HEADS_MS + cache_ms))
    return max(rates) * 1e3


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
    best = [max(a, b) for a, b in zip(rate["vllm_plain"], rate["vllm_medusa"], strict=True)]

    def ratio(a: list[float], b: list[float]) -> list[str]:
        return [f"{x / y:.2f}" for x, y in zip(a, b, strict=True)]

    lines["manyheads / the better of vLLM's"] = ratio(rate["manyheads_medusa"], best)
    lines["plain / vLLM plain"] = ratio(rate["manyheads_plain"], rate["vllm_plain"])
    lines["Medusa / our own plain"] = ratio(rate["manyheads_medusa"], rate["manyheads_plain"])
    lines["limit (see gpu_report.py)"] = [f"{x:.0f}" for x in limits]
    lines["share of the limit"] = ratio(rate["manyheads_medusa"], limits)
    medusa = runs["manyheads_medusa"]
    per_step = [(medusa[n]["tokens"] - n) / medusa[n]["counters"]["row_steps"] for n in users]
    lines["tokens per step and row"] = [f"{x:.2f}" for x in per_step]
    table = ["| requests at once | " + " | ".join(map(str, users)) + " |", "|---" * (len(users) + 1) + "|"]
    table += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in lines.items()]
    text = (FOLDER / "machine.md").read_text() + "\n" + "\n".join(table) + "\n\nStart to ready: "
    text += ", ".join(f"{RUNS[name]} {seconds:.0f} s" for name, seconds in ready.items()) + ".\n"
    (FOLDER / "README.md").write_text(text)
    print(text)

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    styles = {"manyheads_medusa": ("C3", "-"), "manyheads_plain": ("C3", "--"), "vllm_plain": ("C0", "--"),
              "vllm_medusa": ("C0", "-")}  # fmt: skip
    for name, (colour, line) in styles.items():
        axes.plot(users, rate[name], line, color=colour, marker="o", markersize=4, label=RUNS[name])
    axes.plot(users, limits, ":", color="0.4", label="limit")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(users, [str(n) for n in users])
    ticks = [250, 500, 1000, 2000, 4000, 8000, 16000]
    axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("requests at once")
    axes.set_ylabel("output tokens/s while decoding")
    axes.set_title("7B shape, half precision, one H200, Spec-Bench prompts, greedy", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/images/gpu.svg")


if __name__ == "__main__":
    main()
