"""Inside 15 GiB: Vicuna-7B's shape with five Medusa heads and five users of 2,048 tokens each, by quantization.

    python benchmarks/enlarge.py /tmp/big
    python benchmarks/gpu_memory.py /tmp/big results/gpu/memory.json

What does not fit says what to change; of what does, where memory goes, what the GPU says is taken, and how fast it is.
The fifth head is the fourth once more: memory and time are those of five.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import write_json
from gpu import spec_bench_prompts
from safetensors.torch import load_file, save_file

from manyheads.config import ConfigError, EngineConfig
from manyheads.engine.build import build_engine
from manyheads.request import EngineRequest, SamplingParams

GIB = 2**30
USERS, CONTEXT, TOKENS_OUT = 5, 2048, 256


def five_heads(source: Path, target: Path) -> None:
    """Heads in vLLM's format with the last one twice."""
    config = json.loads((source / "config.json").read_text())
    last = config["num_heads"] - 1
    tensors = {key: t for path in sorted(source.glob("*.safetensors")) for key, t in load_file(path).items()}
    again = {}
    for key, tensor in tensors.items():
        for name in ("blocks", "lm_heads"):
            if key.startswith(f"{name}.{last}."):
                again[key.replace(f"{name}.{last}.", f"{name}.{last + 1}.", 1)] = tensor.clone()
    save_file(tensors | again, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config | {"num_heads": last + 2}))


def run(model: Path, heads: Path, prompts: list[list[int]], scheme: str | None, memory: int) -> dict[str, Any]:
    taken = torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    try:
        engine = build_engine(
            EngineConfig(
                model=str(model),
                heads=str(heads),
                quantization=scheme,
                memory_bytes=memory,
                max_model_len=CONTEXT,
                max_num_seqs=USERS,
            )
        )
    except ConfigError as error:
        return {"error": str(error)}
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS_OUT, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    start, tokens = time.perf_counter(), 0
    least = torch.cuda.mem_get_info()[0]
    while engine.has_work():
        tokens += sum(len(delta.new_token_ids) for delta in engine.step())
        least = min(least, torch.cuda.mem_get_info()[0])
    seconds = time.perf_counter() - start
    use = engine.ready.memory
    parts = ("weights", "heads", "kv_cache", "graphs", "rest")
    return {
        "memory": {name: getattr(use, name) for name in parts},
        "taken": taken - least,
        "torch_peak": torch.cuda.max_memory_reserved(),
        "tokens": tokens,
        "seconds": seconds,
        "preemptions": engine.stats().preemptions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quantization", default="none", help="one a process: what one frees, the next would find")
    parser.add_argument("--prompts", type=Path, default=Path("spec_bench.jsonl"))
    parser.add_argument("--memory-gib", type=float, default=15)
    args = parser.parse_args()
    prompts = spec_bench_prompts(args.model, args.prompts, CONTEXT - TOKENS_OUT, USERS)
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    heads = Path(tempfile.mkdtemp())
    try:
        five_heads(args.model / "heads", heads)
        scheme = None if args.quantization == "none" else args.quantization
        record[args.quantization] = run(args.model, heads, prompts, scheme, int(args.memory_gib * GIB))
    finally:
        shutil.rmtree(heads)
    print(args.quantization, record[args.quantization], flush=True)
    write_json(args.out, record)


if __name__ == "__main__":
    main()
