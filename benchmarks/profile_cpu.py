"""Where the time of a step goes, by operation; writes results/profile_cpu.json.

    python benchmarks/profile_cpu.py

Decodes Spec-Bench prompts offline with a set tree size under torch's profiler. Times are the operations' own, per
step; "python and the rest" is the wall clock without the profiler less their sum.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from common import BUILTIN, ROOT, SPEC_BENCH, machine, save, spec_bench, table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer

from manyheads import LLM, SamplingParams

KINDS = {
    "linear layers": ("fbgemm", "linear", "addmm", "mm", "mkldnn"),
    "attention": ("scaled_dot_product", "_flash_attention", "softmax", "bmm"),
    "cache pages in and out": ("index", "gather", "scatter"),
    "norms, rotary embedding, activations": (
        "mul",
        "add",
        "addcmul",
        "rms_norm",
        "silu",
        "roll",
        "rsqrt",
        "mean",
        "pow",
    ),
    "draws and candidates": ("argmax", "topk", "sort", "cumsum"),
}


def kind_of(name: str) -> str:
    plain = name.split("::")[-1]
    for kind, words in KINDS.items():
        if any(word in plain for word in words):
            return kind
    return "other operations (views, copies, masks)"


def measure(args: argparse.Namespace, users: int, tree_size: int, prompts: list[list[int]]) -> dict[str, Any]:
    llm = LLM(str(args.model), dtype="float32", max_num_seqs=users, tree_size=tree_size)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    llm.generate(prompts[:users], params)

    def steps() -> tuple[int, float]:
        """Decoding steps and their seconds: the prompts are in the prefix cache by now."""
        before, start = llm.engine.stats().steps, time.perf_counter()
        llm.generate(prompts[:users], params)
        return llm.engine.stats().steps - before, time.perf_counter() - start

    count, seconds = steps()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        profiled, _ = steps()
    times: dict[str, float] = {}
    calls = 0
    for event in profiler.key_averages():
        times[kind_of(event.key)] = times.get(kind_of(event.key), 0.0) + event.self_cpu_time_total / 1e3 / profiled
        calls += event.count
    step = seconds / count * 1e3
    times["python and the rest"] = max(0.0, step - sum(times.values()))
    return {"ms_per_step": step, "operations_per_step": calls / profiled, "ms": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/profile_cpu.json")
    parser.add_argument("--spec-bench", type=Path, default=SPEC_BENCH)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [p.token_ids for p in spec_bench(tokenizer, max_prompt_tokens=400, path=args.spec_bench)]
    result: dict[str, Any] = {"machine": machine()}
    rows = []
    for users, tree_size in ((1, 1), (1, 8), (16, 1)):
        name = f"{users} users, trees of {tree_size}"
        result[name] = measure(args, users, tree_size, prompts)
        share = {kind: f"{ms:.2f}" for kind, ms in sorted(result[name]["ms"].items(), key=lambda item: -item[1])}
        rows += [[name, kind, ms] for kind, ms in share.items()]
    table(["case", "operations", "ms a step"], rows)
    save(args.out, "profile", result)


if __name__ == "__main__":
    main()
