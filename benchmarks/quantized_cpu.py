"""What a product with a quantized weight takes on this machine's CPU; writes results/quantized_cpu.json.

    python benchmarks/quantized_cpu.py

For shapes of the built-in model and of a 7B one, 1 to 64 rows: a half-precision weight in its packed form against int8
in both of its forms (ops/products.py, ops/integer.py), in turns; microseconds, of the best turn, which other work on
the machine disturbed least, and the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, machine, save, table

from manyheads.ops import integer
from manyheads.ops.base import Product
from manyheads.ops.products import CodesProduct
from manyheads.ops.torch import TorchOps
from manyheads.quantization.int8 import INT8, Int8Weight

SHAPES = ((640, 384), (2048, 384), (384, 1024), (4096, 384), (2048, 2048), (4096, 2048), (4096, 4096), (11008, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64)


def forms(out: int, into: int) -> dict[str, Product]:
    """The same random weight in each form."""
    if not integer.is_exact():
        raise SystemExit("this machine has no exact products of integers")
    weight = torch.randn(out, into).half().float()
    quantized = INT8.quantize(weight)
    assert isinstance(quantized, Int8Weight)
    return {
        "half": TorchOps().product(weight, None, torch.float32),
        "codes": CodesProduct(quantized, None),
        "integer": integer.IntegerProduct(quantized, None),
    }


def measure(product: Product, x: torch.Tensor, seconds: float) -> float:
    """Seconds a call."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or count < 2:
        product(x)
        count += 1
    return passed / count


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.01, help="of one turn")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quantized_cpu.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    result: list[dict[str, Any]] = []
    for out, into in SHAPES:
        products = forms(out, into)
        for rows in ROWS:
            x = torch.randn(rows, into)
            turns: dict[str, list[float]] = {name: [] for name in products}
            for turn in range(args.turns + 1):
                for name, product in products.items():
                    seconds = measure(product, x, args.seconds)
                    if turn:  # the first warms up
                        turns[name].append(seconds * 1e6)
            best = {name: min(values) for name, values in turns.items()}
            medians = {name: statistics.median(values) for name, values in turns.items()}
            result.append({"out": out, "in": into, "rows": rows, "microseconds": best, "medians": medians})
            print(result[-1], flush=True)
    lines: list[list[Any]] = []
    for r in result:
        times = r["microseconds"]
        ratio = f"{times['half'] / times['integer']:.2f}"
        lines.append([f"{r['out']} × {r['in']}", r["rows"], *(f"{t:.0f}" for t in times.values()), ratio])
    table(["weight", "rows", "half", "int8, codes", "int8, integer", "half / integer"], lines)
    save(args.out, "products", {"machine": machine(), "integer_from": integer.LEAST_SIZE, "products": result})


if __name__ == "__main__":
    main()
