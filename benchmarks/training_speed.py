"""How fast heads learn, and at what share of the machine's arithmetic peak, by the code of `manyheads train`.

    python benchmarks/training_speed.py OUT.json                                # Vicuna-7B's shape, on a GPU
    python benchmarks/training_speed.py OUT.json --heads 5 --chunk 1024 8192    # every combination is measured

The base has random weights, made where they are used: no figure here depends on their values. Text is packed as
training packs it: conversations of `--prompt-tokens` and `--answer-tokens`, those of the answers count.

What is counted, in floating-point operations of products alone (a multiplication and an addition are two):

| part | operations |
|---|---|
| base, forward | 2 · weights of its layers · tokens |
| attention, forward | 4 · hidden size · layers · pairs of tokens that see each other |
| heads, forward | 2 · weights of a head · tokens that count for it, its vocabulary projection included |
| heads, backward | the same once more for the weights, and once more for what goes in; not for what the base gave |

Nothing is computed twice: a chunk's logits live until its own backward pass is done. The peak is the best of large
products of two matrices on the same device, measured by this script.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import machine, table, write_json

from manyheads.train import medusa
from manyheads.train import trainer as training
from manyheads.train.attention import register
from manyheads.train.base import Base, find_device
from manyheads.train.dataset import Batch, pack
from manyheads.train.medusa import TrainedHeads
from manyheads.train.prompts import Answer
from manyheads.train.settings import TrainSettings

WARM_STEPS = 2


def make_base(args: argparse.Namespace, device: torch.device) -> Base:
    """A Llama with random weights, in bfloat16 on a GPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_kv_heads,
        max_position_embeddings=args.length,
        tie_word_embeddings=False,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=register())  # type: ignore[no-untyped-call]
    return Base(model, device)


def make_data(args: argparse.Namespace, rows: int) -> Batch:
    """Packed conversations of random tokens."""
    generator = torch.Generator().manual_seed(0)
    size = args.prompt_tokens + args.answer_tokens
    count = rows * max(1, args.length // size)
    ids = torch.randint(0, args.vocab_size, (count, size), generator=generator).tolist()
    return pack([Answer(row[: args.prompt_tokens], row[args.prompt_tokens :]) for row in ids], args.length)


def count_operations(base: Base, heads: TrainedHeads, batch: Batch) -> dict[str, float]:
    """Of one step's rows, padding left out."""
    config = base.model.config
    layers = sum(p.numel() for p in base.model.model.layers.parameters() if p.ndim == 2)
    sizes = [int(n) for row in batch.part for n in torch.bincount(row)[1:]]
    pairs = sum(n * (n + 1) / 2 for n in sizes)
    counted = (batch.ahead(heads.num_heads)[..., 1:] >= 0).sum().item()
    block, projection = config.hidden_size**2, config.hidden_size * heads.vocab_size
    first = 1 if heads.num_blocks else 0
    learnt = heads.kind != "base"
    return {
        "base": 2.0 * layers * sum(sizes),
        "attention": 4.0 * config.hidden_size * config.num_hidden_layers * pairs,
        "heads_forward": 2.0 * counted * (heads.num_blocks * block + projection),
        "heads_backward": 2.0 * counted * ((2 * heads.num_blocks - first) * block + (1 + learnt) * projection),
    }


def measure_peak(device: torch.device, size: int) -> float:
    """Operations a second of a product of two square matrices of random numbers."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        wait(device)
        times.append((time.perf_counter() - start) / 4)
    return 2.0 * size**3 / statistics.median(times[2:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def split(trainer: training.Trainer) -> Iterator[dict[str, float]]:
    """Seconds of each part of the steps inside the block, which waiting for each part slows a little."""
    seconds: dict[str, float] = defaultdict(float)
    device = trainer.base.device

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            wait(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait(device)
            seconds[part] += time.perf_counter() - start
            return result

        return run

    places: list[tuple[Any, str, str]] = [
        (trainer.base, "hidden", "base"),
        (trainer.drafter, "logits", "heads_forward"),
        (medusa, "cross_entropy", "heads_forward"),
        (torch.Tensor, "backward", "heads_backward"),
        (torch.nn.utils, "clip_grad_norm_", "optimizer"),
        (trainer.optimizer, "step", "optimizer"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, timed(part, getattr(owner, name)))
    try:
        yield seconds
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def measure(base: Base, settings: TrainSettings, data: Batch, steps: int, peak: float) -> dict[str, Any]:
    """One combination of settings."""
    device = base.device
    heads = TrainedHeads(settings.heads, settings.blocks, base.projection.detach(), settings.projection).to(device)
    trainer = training.Trainer(settings, base, None, heads, data, Path())
    for step in range(WARM_STEPS):
        trainer.step(step)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rows = [data.take(trainer.order.rows(WARM_STEPS + step)) for step in range(steps)]
    wait(device)
    start = time.perf_counter()
    for step in range(steps):
        trainer.step(WARM_STEPS + step)
    wait(device)
    seconds = time.perf_counter() - start
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    operations: dict[str, float] = defaultdict(float)
    for batch in rows:
        for part, count in count_operations(base, heads, batch).items():
            operations[part] += count
    with split(trainer) as parts:
        for step in range(steps):
            trainer.step(WARM_STEPS + steps + step)
    tokens = sum(int((batch.part > 0).sum()) for batch in rows)
    weights = {
        "base": sum(p.nbytes for p in base.model.parameters()),
        "heads": sum(p.nbytes for p in heads.parameters()),
    }
    return {
        "settings": {
            name: getattr(settings, name)
            for name in ("heads", "blocks", "projection", "rows", "accumulate", "length", "chunk")
        },
        "steps": steps,
        "tokens_per_step": tokens / steps,
        "step_s": seconds / steps,
        "tokens_per_s": tokens / seconds,
        "operations_per_step": {part: count / steps for part, count in operations.items()},
        "operations_per_s": sum(operations.values()) / seconds,
        "share_of_peak": sum(operations.values()) / seconds / peak,
        "split_s": {part: value / steps for part, value in parts.items()},
        "peak_memory_bytes": memory,
        "weight_bytes": weights,
        "all_logits_bytes": tokens // steps * settings.heads * heads.vocab_size * 4,
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32}
    for name, value in (shape | {"vocab_size": 32000}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--projection", nargs="+", choices=("own", "shared", "base"), default=["own", "shared"])
    parser.add_argument("--chunk", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=448)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--gemm", type=int, nargs="+", default=[4096, 8192], help="sizes of the products for the peak")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device = find_device(args.device)
    peaks = {size: measure_peak(device, size) for size in args.gemm}
    peak = max(peaks.values())
    base = make_base(args, device)
    data = make_data(args, 4 * args.rows * args.accumulate)
    results = []
    for projection, chunk in itertools.product(args.projection, args.chunk):
        settings = TrainSettings(
            heads=args.heads,
            blocks=args.blocks,
            projection=projection,
            length=args.length,
            rows=args.rows,
            accumulate=args.accumulate,
            chunk=chunk,
            max_steps=1000,
        )
        results.append(measure(base, settings, data, args.steps, peak))
        print(json.dumps(results[-1]), flush=True)
        # what `split` put back refers to its owners: heads and optimizer would count in the next peak of memory
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    whole = {"machine": machine() | {"device": name}, "gemm_operations_per_s": peaks, "results": results}
    write_json(args.out, whole)
    print(f"{name}: {peak / 1e12:.4g} Tflop/s in a product of matrices")
    header = ["projection", "chunk", "tokens/s", "of the peak", "ms a step"]
    parts = ("base", "heads_forward", "heads_backward", "optimizer")
    rows = [
        [
            result["settings"]["projection"],
            result["settings"]["chunk"],
            f"{result['tokens_per_s']:,.0f}",
            f"{result['share_of_peak']:.1%}",
            f"{result['step_s'] * 1e3:.1f}",
            *(f"{result['split_s'].get(part, 0) * 1e3:.1f}" for part in parts),
            "" if result["peak_memory_bytes"] is None else f"{result['peak_memory_bytes'] / 2**30:.1f}",
            f"{result['all_logits_bytes'] / 2**30:.1f}",
        ]
        for result in results
    ]
    table([*header, *(part.replace("_", " ") for part in parts), "peak GiB", "all logits GiB"], rows)


if __name__ == "__main__":
    main()
