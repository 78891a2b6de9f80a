"""Products with quantized weights on a GPU: how long other blocks take than those that are chosen, and cuBLAS.

    python benchmarks/gpu_products.py OUT.json [--schemes int8] [--tokens 16,64]

Of every matrix of a 7B model, so many with other numbers that none is found in the cache, one after another in a CUDA
graph; microseconds of one. Each is compared with a product in float64. `tried`: blocks (the weight's rows, tokens,
columns, warps, stages), shares of the columns, microseconds, error.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import write_json

from manyheads.kernels import quantized
from manyheads.kernels.quantized import _Blocks
from manyheads.kernels.rows import GROUP, QuantizedRows, quantize_rows
from manyheads.kernels.widen import Arranged
from manyheads.quantization.base import CodedScheme
from manyheads.quantization.fp8 import FP8
from manyheads.quantization.int4 import INT4
from manyheads.quantization.int8 import INT8

SCHEMES = {scheme.name: scheme for scheme in (FP8, INT8, INT4)}
SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
ADDED = ("o", "down")
"""What may come in parts."""
CACHE_BYTES = 2**27
"""More than any GPU's L2 cache."""


def candidates(scheme: CodedScheme, tokens: int, added: bool) -> Iterator[tuple[_Blocks, int]]:
    """Blocks that fit into shared memory, and into how many shares the columns are split."""
    codes = min(128, scheme.parts * max(16, 2 ** (tokens - 1).bit_length()))
    columns = (2 * GROUP,) if scheme.bits == 4 else (GROUP, 2 * GROUP)
    for out, column, warps, stages, splits in itertools.product((64, 128), columns, (4, 8), (3, 4, 6), (1, 2, 4)):
        weight_bytes = column * out * scheme.bits // 8
        if (added or splits == 1) and (weight_bytes + column * codes) * stages < 220_000:
            yield _Blocks(out, codes // scheme.parts, column, warps, stages, True), splits


def microseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median time of a graph."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        times: list[float] = []
        for _ in range(repeats + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 2 * 1e3)
    return sorted(times[1:])[repeats // 2]


def measure(
    scheme: CodedScheme, tokens: int, name: str, weights: list[Arranged], wanted: torch.Tensor
) -> dict[str, Any]:
    """One matrix, one number of tokens.

    Args:
        wanted: [out, in] float64, what the first weight stands for.
    """
    x = torch.randn(tokens, weights[0].in_features, device="cuda").half()
    rows = quantize_rows(x, scheme)
    known = rows.codes.double() * rows.scale[:, None] if scheme.is_float else x.double()
    wanted = known @ wanted.T
    chosen = quantized._blocks

    def time(run: Callable[[QuantizedRows, Arranged], torch.Tensor]) -> float:
        return microseconds(lambda: [run(rows, weight) for weight in weights]) / len(weights)

    now = time(lambda x, weight: quantized.product(x, weight, added=name in ADDED))
    result: dict[str, Any] = {"chosen": now, "weight_mb": weights[0].nbytes / 1e6, "tried": []}
    if scheme.is_float:
        result["cublas"] = time(
            lambda x, weight: torch._scaled_mm(
                x.codes, weight.values.t(), x.scale[:, None], weight.scale.t(), out_dtype=torch.float16
            )
        )
    for blocks, splits in candidates(scheme, tokens, name in ADDED):
        quantized._blocks = lambda *_, blocks=blocks: blocks
        try:
            y = quantized.multiply(rows, weights[0], splits)
            y = (y if splits == 1 else y.sum(0)).double()
            error = ((y - wanted).norm() / wanted.norm()).item()
            us = time(functools.partial(quantized.multiply, splits=splits))
            result["tried"].append([list(blocks)[:5], splits, round(us, 2), error])
        finally:
            quantized._blocks = chosen
    result["tried"].sort(key=lambda tried: tried[2])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(SCHEMES))
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[16, 32, 64, 128])
    args = parser.parse_args()
    record: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "products": {}}
    for scheme, (name, shape) in itertools.product([SCHEMES[given] for given in args.schemes], SHAPES.items()):
        first = scheme.quantize(torch.randn(shape, device="cuda"))
        weights = [quantized.arrange(first)]
        while sum(weight.nbytes for weight in weights) < CACHE_BYTES:
            weights.append(quantized.arrange(scheme.quantize(torch.randn(shape, device="cuda"))))
        for tokens in args.tokens:
            found = measure(scheme, tokens, name, weights, first.dequantize(torch.float64))
            record["products"][f"{scheme} {tokens} {name}"] = found
            write_json(args.out, record)
            best = found["tried"][0]
            print(f"{scheme} {tokens:4d} {name:8s} {found['chosen']:6.1f} us, best {best}", flush=True)


if __name__ == "__main__":
    main()
