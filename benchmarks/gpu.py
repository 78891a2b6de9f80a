"""Decoding speed on a GPU by number of users, of manyheads or of vLLM, from the same checkpoint.

    python benchmarks/enlarge.py MODEL                            # the built-in model in Vicuna-7B's shape
    python benchmarks/gpu.py MODEL OUT.json --mode medusa         # or plain
    python benchmarks/gpu.py MODEL OUT.json --system vllm --mode plain

All requests come at once, 128 tokens in, 256 out; what counts is the time after the last prompt: a run that asks for
one token is timed first and taken off. Prompts are Spec-Bench's first turns, cut or repeated to 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class System(Protocol):
    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Greedy continuations of exactly so many tokens."""

    def counters(self) -> dict[str, int]:
        """Whatever it counts."""

    def step_times(self) -> dict[str, Any]:
        """What it knows of its steps since the last call."""


class Manyheads:
    def __init__(self, args: argparse.Namespace) -> None:
        from manyheads.config import EngineConfig
        from manyheads.engine.build import build_engine

        self.engine = build_engine(
            EngineConfig(
                model=str(args.model),
                speculative=args.mode == "medusa",
                tree_size=args.tree_size,
                max_model_len=args.max_model_len,
                prefix_caching=False,
                max_num_seqs=args.max_num_seqs,
            ),
            lambda line: print(f"{time.perf_counter() - args.start:6.1f} s  {line}", flush=True),
        )
        self._count = 0
        self.steps: dict[str, list[float]] = {}
        observe = self.engine.planner.observe_cost

        def record(rows: int, draft: Any, seconds: float) -> None:
            self.steps.setdefault(f"{rows}x{draft.num_tokens(rows) / rows:g}", []).append(seconds)
            observe(rows, draft, seconds)

        self.engine.planner.observe_cost = record  # type: ignore[method-assign]

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        from manyheads.request import EngineRequest, SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        replies: dict[str, list[int]] = {}
        for prompt in prompts:
            self._count += 1
            replies[str(self._count)] = []
            self.engine.add_request(EngineRequest(request_id=str(self._count), prompt_token_ids=prompt, params=params))
        while self.engine.has_work():
            for delta in self.engine.step():
                replies[delta.request_id] += delta.new_token_ids
        return list(replies.values())

    def counters(self) -> dict[str, int]:
        stats = self.engine.stats()
        return {"steps": stats.steps, "row_steps": stats.row_steps}

    def step_times(self) -> dict[str, Any]:
        """By rows and nodes, since the last call: how many steps, and their median in milliseconds."""
        steps, self.steps = self.steps, {}
        return {key: [len(times), round(sorted(times)[len(times) // 2] * 1e3, 3)] for key, times in steps.items()}


class Vllm:
    def __init__(self, args: argparse.Namespace) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM, SamplingParams

        speculative: dict[str, Any] = {}
        if args.mode == "medusa":
            config = {"method": "medusa", "model": str(args.model / "heads"), "num_speculative_tokens": 4}
            speculative["speculative_config"] = config
        self.llm = LLM(
            model=str(args.model),
            skip_tokenizer_init=True,
            dtype="float16",
            max_model_len=args.max_model_len,
            gpu_memory_utilization=0.9,
            max_num_seqs=args.max_num_seqs or 256,
            enable_prefix_caching=False,
            disable_log_stats=False,
            **speculative,
        )
        self._params = SamplingParams

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = self._params(
            temperature=0.0, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(o.outputs[0].token_ids) for o in self.llm.generate(asked, params, use_tqdm=False)]

    def counters(self) -> dict[str, int]:
        found = {m.name: m for m in self.llm.get_metrics() if "spec_decode" in m.name}
        return {name: int(metric.value) for name, metric in found.items() if hasattr(metric, "value")}

    def step_times(self) -> dict[str, Any]:
        return {}


def spec_bench_prompts(model: Path, file: Path, length: int, count: int) -> list[list[int]]:
    """Token ids of chat prompts, each of exactly `length` tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    user, assistant, end = (tokenizer.token_to_id(f"<|{name}|>") for name in ("user", "assistant", "end"))
    turns = [json.loads(line)["turns"][0] for line in file.read_text().splitlines()]
    prompts = []
    for i in range(count):
        turn = turns[(i * 37) % len(turns)]  # all categories, from few prompts on
        ids = tokenizer.encode(turn).ids
        ids = (ids * (length // len(ids) + 1))[: length - 3]
        prompts.append([user, *ids, end, assistant])
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--system", choices=("manyheads", "vllm"), default="manyheads")
    parser.add_argument("--mode", choices=("plain", "medusa"), default="medusa")
    parser.add_argument("--users", type=lambda text: [int(n) for n in text.split(",")], default=list(USERS))
    parser.add_argument("--prompts", type=Path, default=Path("spec_bench.jsonl"))
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--tree-size", type=int)
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    args.start = time.perf_counter()
    system: System = Manyheads(args) if args.system == "manyheads" else Vllm(args)
    ready = time.perf_counter() - args.start
    print(f"ready after {ready:.1f} s", flush=True)
    prompts = spec_bench_prompts(args.model, args.prompts, args.tokens_in, max(args.users))
    rows = []
    for users in args.users:
        asked = prompts[:users]
        system.generate(asked, 16)  # whatever is compiled or captured on the way
        for _ in range(args.repeat):
            start = time.perf_counter()
            system.generate(asked, 1)
            prefill = time.perf_counter() - start
            before = system.counters()
            system.step_times()
            start = time.perf_counter()
            replies = system.generate(asked, args.tokens_out)
            wall = time.perf_counter() - start
            counted = {name: n - before.get(name, 0) for name, n in system.counters().items()}
            tokens = sum(map(len, replies))
            row = {
                "system": args.system,
                "mode": args.mode,
                "users": users,
                "decode_tokens_per_s": (tokens - users) / (wall - prefill),
                "prefill_s": prefill,
                "wall_s": wall,
                "tokens": tokens,
                "counters": counted,
            }
            print(row, flush=True)
            row["step_times"] = system.step_times()
            rows.append(row)
    args.out.write_text(json.dumps({"ready_s": ready, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
