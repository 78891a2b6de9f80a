"""Tables of what gpu.py, gpu_memory.py and quantization_quality.py measured of quantization on a GPU, or of manyheads
and vLLM on one machine: FOLDER/*.json → FOLDER/README.md, behind what FOLDER/machine.md says. What is not there has no
table.

    python benchmarks/gpu_quantized_report.py benchmarks/results/gpu_quantized
    python benchmarks/gpu_quantized_report.py benchmarks/results/gpu_vllm           # and docs/images/gpu-vllm.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_report import plot

SCHEMES = ("half", "fp8", "int8", "int4")
SYSTEMS = {
    "manyheads_half": ("manyheads, half precision, Medusa", "C3-"),
    "manyheads_fp8": ("manyheads, fp8, Medusa", "C1-"),
    "vllm_plain": ("vLLM, half precision, plain", "C0--"),
    "vllm_medusa": ("vLLM, half precision, Medusa", "C0-"),
    "vllm_fp8": ("vLLM, fp8, plain", "C9--"),
}
GIB = 2**30

Load = Callable[[str], dict[str, Any]]
"""A record by the name of its file; empty where there is none."""


def load(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def rows(record: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {row["users"]: row for row in record.get("rows", [])}


def tokens_per_step(row: dict[str, Any]) -> str:
    """Of a request, its first token aside, which comes with the prompt; of vLLM, what it kept of each draft and one."""
    counters = row["counters"]
    if drafts := counters.get("vllm:spec_decode_num_drafts"):
        return f"{1 + counters['vllm:spec_decode_num_accepted_tokens'] / drafts:.2f}"
    return f"{(row['tokens'] - row['users'] * row['rounds']) / counters['row_steps']:.2f}"


def usual_step(row: dict[str, Any]) -> str:
    """The most frequent kind with all rows: nodes a row, and milliseconds."""
    kinds = {key: value for key, value in row["step_times"].items() if key.startswith(f"{row['users']}x")}
    key = max(kinds, key=lambda kind: kinds[kind][0])
    return f"{kinds[key][1]:.2f} ({key.split('x')[1]})"


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)])


def speed(row: dict[str, Any]) -> float:
    return float(row["decode_tokens_per_s"])


def speed_cell(row: dict[str, Any]) -> str:
    return f"{speed(row):.0f}"


def ratio(others: dict[int, dict[str, Any]], row: dict[str, Any]) -> str:
    return f"{speed(row) / speed(others[row['users']]):.2f}"


def cells(
    users: Iterable[int], name: str, value: Callable[[dict[str, Any]], str], measured: dict[int, dict[str, Any]]
) -> list[str]:
    """A line of a table by number of requests."""
    return [name, *(value(measured[n]) if n in measured else "" for n in users)]


def speeds(get: Load) -> str:
    found = {scheme: rows(get(scheme)) for scheme in SCHEMES}
    vllm, bits, half = rows(get("vllm_fp8")), rows(get("bitsandbytes-8bit")), found["half"]
    if not half:
        return ""
    line = partial(cells, half)
    lines = [line(f"{scheme}, tokens/s", speed_cell, found[scheme]) for scheme in SCHEMES]
    for name, measured in (("bitsandbytes in 8 bits", bits), ("vLLM, fp8, plain", vllm)):
        lines += [line(name, speed_cell, measured)] if measured else []
    lines += [line(f"{scheme} / half", partial(ratio, half), found[scheme]) for scheme in SCHEMES[1:]]
    if bits:
        lines.append(line("bitsandbytes / half", partial(ratio, half), bits))
    if vllm:
        lines.append(line("fp8 / vLLM's fp8", partial(ratio, vllm), found["fp8"]))
    lines += [line(f"{scheme}, tokens a step", tokens_per_step, found[scheme]) for scheme in SCHEMES]
    lines += [line(f"{scheme}, usual step, ms (nodes)", usual_step, found[scheme]) for scheme in SCHEMES]
    return table(["requests at once", *map(str, half)], lines)


def against_vllm(get: Load) -> str:
    """Of one machine; draws the plot too."""
    found = {name: rows(get(name)) for name in SYSTEMS}
    half, fp8, plain, medusa, vllm_fp8 = found.values()
    if not half:
        return ""
    line = partial(cells, half)
    better = {n: max(plain[n], medusa[n], key=speed) for n in half}
    lines = [line(f"{SYSTEMS[name][0]}, tokens/s", speed_cell, measured) for name, measured in found.items()]
    lines += [
        line("manyheads / the better of vLLM's, half precision", partial(ratio, better), half),
        line("manyheads / vLLM, fp8", partial(ratio, vllm_fp8), fp8),
        line("manyheads, fp8 / half precision", partial(ratio, half), fp8),
        line("vLLM, Medusa / plain", partial(ratio, plain), medusa),
    ]
    for name in ("manyheads_half", "manyheads_fp8", "vllm_medusa"):
        lines.append(line(f"{SYSTEMS[name][0]}, tokens a step", tokens_per_step, found[name]))
    for name in ("manyheads_half", "manyheads_fp8"):
        lines.append(line(f"{SYSTEMS[name][0]}, usual step, ms (nodes)", usual_step, found[name]))
    ready = "; ".join(f"{title}: {get(name)['ready_s']:.0f} s" for name, (title, _) in SYSTEMS.items())
    curves = {title: (style, [speed(found[name][n]) for n in half]) for name, (title, style) in SYSTEMS.items()}
    image = plot("gpu-vllm", list(half), curves, "7B shape, one H200 each, Spec-Bench prompts, greedy")
    return f"{image}\n{table(['requests at once', *map(str, half)], lines)}\n\nStart to ready: {ready}."


def cache(get: Load) -> str:
    pairs = {"half": ("half", "half", "half_kv_fp8"), "fp8": ("fp8", "fp8_long", "fp8_kv_fp8")}
    if get("long_half"):  # measured alone
        pairs = {"half": ("long_half", "long_half", "long_half_kv_fp8")}
    lines = []
    for weights, (at_256, long, other) in pairs.items():
        for what, plain, codes in (
            ("256 at once", rows(get(at_256)).get(256), rows(get(other)).get(256)),
            ("16 × 8,000 tokens", get(long).get("long"), get(other).get("long")),
        ):
            if plain and codes:
                a, b = plain["decode_tokens_per_s"], codes["decode_tokens_per_s"]
                lines.append([weights, what, f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}"])
    return (lines and table(["weights", "", "K/V in half precision, tokens/s", "in fp8", "ratio"], lines)) or ""


def quality(get: Load) -> str:
    lines = [
        [scheme, f"{m['weights_mb'] / 1e3:.2f}", f"{m['perplexity']:.2f}", f"{100 * m['same_choice']:.1f} %"]
        for found in get("perplexity").values()
        for scheme, m in found.items()
    ]
    return (lines and table(["", "weights, GB", "perplexity", "same most likely token"], lines)) or ""


def agreement(get: Load) -> str:
    lines = [
        [scheme, f"{100 * found['same_replies']:.0f} %", f"{100 * found['same_tokens']:.0f} %"]
        for scheme in SCHEMES[1:]
        if (found := get(scheme).get("replies"))
    ]
    return (lines and table(["", "the same 128 tokens", "tokens before the first other one"], lines)) or ""


def steps(get: Load) -> str:
    """Of the profile: a step's time, and how much of it the kernels of products and of attention take."""
    lines = []
    for scheme in SCHEMES:
        for shape, found in get(scheme).get("profile", {}).items():
            kernels = found["kernels"]
            products = [k["us"] for n, k in kernels.items() if n.startswith(("_bytes", "_int4", "_few_rows", "nvjet"))]
            attention = sum(k["us"] for n, k in kernels.items() if n.startswith("_attend"))
            parts = (found["step_ms"], sum(products) / 1e3, attention / 1e3)
            lines.append([scheme, shape.replace("x", " × "), *(f"{part:.2f}" for part in parts)])
    head = ["", "rows × nodes", "step, ms", "products, with their wait for inputs, ms", "attention, likewise, ms"]
    return (lines and table(head, lines)) or ""


def memory(get: Load) -> str:
    if not get("memory"):
        return ""
    found = get("memory")
    inside = found["int8"]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in inside["memory"].items())
    return (
        f"- half precision: “{found['none']['error']}”\n"
        f"- int8: serves; {inside['tokens']} tokens in {inside['seconds']:.2f} s with the prompts' time, "
        f"{inside['preemptions']} preemptions; GiB: {parts}; taken of the GPU {inside['taken'] / GIB:.2f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    get = partial(load, folder)
    parts = {
        "Speed": speeds(get) or against_vllm(get),
        "K/V cache": cache(get),
        "Quality": quality(get),
        "Greedy replies to 480 prompts, against half precision": agreement(get),
        "Where a step's time goes": steps(get),
        "Inside 15 GiB, five heads, five users of 2,048 tokens": memory(get),
    }
    text = (folder / "machine.md").read_text()
    for title, part in parts.items():
        text += f"\n## {title}\n\n{part}\n" if part else ""
    (folder / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
