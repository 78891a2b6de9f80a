"""Tables of what gpu.py, gpu_memory.py and quantization_quality.py measured of quantization on a GPU:
results/gpu_quantized/*.json → results/gpu_quantized/README.md.

    python benchmarks/gpu_quantized_report.py
"""

from __future__ import annotations

import json
from typing import Any

from common import ROOT

FOLDER = ROOT / "benchmarks/results/gpu_quantized"
SCHEMES = ("half", "fp8", "int8", "int4")
GIB = 2**30


def load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return record


def rows(name: str) -> dict[int, dict[str, Any]]:
    return {row["users"]: row for row in load(name)["rows"]}


def tokens_per_step(row: dict[str, Any]) -> str:
    """Of a request, its first token aside, which comes with the prompt."""
    return f"{(row['tokens'] - row['users'] * row['rounds']) / row['counters']['row_steps']:.2f}"


def usual_step(row: dict[str, Any]) -> str:
    """The most frequent kind with all rows: nodes a row, and milliseconds."""
    kinds = {key: value for key, value in row["step_times"].items() if key.startswith(f"{row['users']}x")}
    key = max(kinds, key=lambda kind: kinds[kind][0])
    return f"{kinds[key][1]:.2f} ({key.split('x')[1]})"


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)])


def speeds() -> str:
    found = {scheme: rows(scheme) for scheme in SCHEMES}
    vllm, users = rows("vllm_fp8"), list(found["half"])

    def cells(name: str, value: Any, scheme: str) -> list[str]:
        return [name, *(value(found[scheme][n]) if n in found[scheme] else "" for n in users)]

    def speed(row: dict[str, Any]) -> float:
        return float(row["decode_tokens_per_s"])

    lines = [cells(f"{scheme}, tokens/s", lambda row: f"{speed(row):.0f}", scheme) for scheme in SCHEMES]
    lines.append(["vLLM, fp8, plain", *(f"{speed(vllm[n]):.0f}" for n in users)])
    half = found["half"]
    for scheme in SCHEMES[1:]:
        lines.append(cells(f"{scheme} / half", lambda row: f"{speed(row) / speed(half[row['users']]):.2f}", scheme))
    lines.append(cells("fp8 / vLLM's fp8", lambda row: f"{speed(row) / speed(vllm[row['users']]):.2f}", "fp8"))
    lines += [cells(f"{scheme}, tokens a step", tokens_per_step, scheme) for scheme in SCHEMES]
    lines += [cells(f"{scheme}, usual step, ms (nodes)", usual_step, scheme) for scheme in SCHEMES]
    return table(["requests at once", *map(str, users)], lines)


def cache() -> str:
    pairs = {"half": ("half", "half", "half_kv_fp8"), "fp8": ("fp8", "fp8_long", "fp8_kv_fp8")}
    lines = []
    for weights, (at_256, long, other) in pairs.items():
        plain = rows(at_256)[256]["decode_tokens_per_s"], load(long)["long"]["decode_tokens_per_s"]
        codes = rows(other)[256]["decode_tokens_per_s"], load(other)["long"]["decode_tokens_per_s"]
        for what, a, b in zip(("256 at once", "16 × 8,000 tokens"), plain, codes, strict=True):
            lines.append([weights, what, f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}"])
    return table(["weights", "", "K/V in half precision, tokens/s", "in fp8", "ratio"], lines)


def quality() -> str:
    (found,) = load("perplexity").values()
    lines = [
        [scheme, f"{m['weights_mb'] / 1e3:.2f}", f"{m['perplexity']:.2f}", f"{100 * m['same_choice']:.1f} %"]
        for scheme, m in found.items()
    ]
    return table(["", "weights, GB", "perplexity", "same most likely token"], lines)


def memory() -> str:
    found = load("memory")
    inside = found["int8"]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in inside["memory"].items())
    return (
        f"- half precision: “{found['none']['error']}”\n"
        f"- int8: serves; {inside['tokens']} tokens in {inside['seconds']:.2f} s with the prompts' time, "
        f"{inside['preemptions']} preemptions; GiB: {parts}; taken of the GPU {inside['taken'] / GIB:.2f}."
    )


def main() -> None:
    parts = {
        "Speed": speeds(),
        "K/V cache": cache(),
        "Quality": quality(),
        "Inside 15 GiB, five heads, five users of 2,048 tokens": memory(),
    }
    text = (FOLDER / "machine.md").read_text()
    for title, part in parts.items():
        text += f"\n## {title}\n\n{part}\n"
    (FOLDER / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
