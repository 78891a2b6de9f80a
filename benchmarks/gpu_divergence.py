"""Greedy text in half precision with and without Medusa: where replies part, how near a tie were the two tokens?

    python benchmarks/gpu_divergence.py MODEL OUT.json --prompts spec_bench.jsonl

A step of many tokens multiplies matrices in another order than a step of one, so that logits differ by roundings, and
two tokens whose logits differ by less may change places. For every reply that parts, the text up to there is computed
once more, and the two tokens' log-probabilities are compared. float32 has no such ties: there the texts are equal
(tests/engine/test_exactness.py).
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from common import write_json
from gpu import spec_bench_prompts


def replies(
    model: Path, prompts: list[list[int]], num_tokens: int, logprobs: int | None = None, **settings: Any
) -> list[Any]:
    """Token ids of each reply, or with `logprobs` the likeliest tokens at its first position."""
    from manyheads.config import EngineConfig
    from manyheads.engine.build import build_engine
    from manyheads.request import EngineRequest, SamplingParams

    gc.collect()  # the engine before this one
    torch.cuda.empty_cache()
    engine = build_engine(
        EngineConfig(model=str(model), max_model_len=2048, prefix_caching=False, kv_cache_bytes=40 * 2**30, **settings)
    )
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=logprobs)
    out: list[list[Any]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    while engine.has_work():
        for delta in engine.step():
            out[int(delta.request_id)] += (delta.logprobs or []) if logprobs else delta.new_token_ids
    return [dict(reply[0].top) for reply in out] if logprobs else out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=Path, default=Path("spec_bench.jsonl"))
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=128)
    args = parser.parse_args()
    count = len(args.prompts.read_text().splitlines())
    prompts = spec_bench_prompts(args.model, args.prompts, args.tokens_in, count)
    plain = replies(args.model, prompts, args.tokens_out, speculative=False)
    medusa = replies(args.model, prompts, args.tokens_out)
    parted = []
    for i, (a, b) in enumerate(zip(plain, medusa, strict=True)):
        if a != b:
            parted.append((i, next(at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)))
    before = [prompts[i] + plain[i][:at] for i, at in parted]
    likeliest = replies(args.model, before, 1, logprobs=5, speculative=False) if before else []
    rows = []
    for (i, at), top in zip(parted, likeliest, strict=True):
        pair = plain[i][at], medusa[i][at]
        found = all(token in top for token in pair)
        gap = abs(top[pair[0]] - top[pair[1]]) if found else None
        rows.append({"prompt": i, "at": at, "tokens": pair, "gap": gap})
    write_json(args.out, {"prompts": count, "tokens_out": args.tokens_out, "parted": rows})
    gaps = [row["gap"] for row in rows]
    print(f"{count - len(rows)} of {count} replies are equal; gaps of the others: {sorted(map(str, gaps))}")


if __name__ == "__main__":
    main()
