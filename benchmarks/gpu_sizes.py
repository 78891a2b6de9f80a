"""Products of a 7B model's layers in half precision on a GPU, by the number of tokens: why passes are padded to some.

    python benchmarks/gpu_sizes.py OUT.json

Microseconds of each of a layer's four products (`gpu_products.SHAPES`) by torch's library, for 16, 32, … tokens, and
milliseconds of all of them, 32 times. Of each matrix there are so many with the same numbers in other places that none
is found in the cache, one after another in a CUDA graph; the shorter of two runs counts, which are as far apart as can
be. `engine/quickest.py` measures the same when an engine starts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import gpu_machine, write_json
from gpu_products import CACHE_BYTES, LAYERS, SHAPES
from torch import Tensor

TOKENS = (*range(16, 1153, 16), 1280, 1536, 2048)
REPLAYS = 4


def microseconds(tokens: int, weights: list[Tensor]) -> float:
    """Of one product."""
    x = torch.randn(tokens, weights[0].shape[1], dtype=torch.float16, device="cuda")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        F.linear(x, weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            F.linear(x, weight)
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / REPLAYS / len(weights)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    weights = {}
    for name, shape in SHAPES.items():
        one = torch.randn(shape, dtype=torch.float16, device="cuda") * 0.02
        weights[name] = [one.clone() for _ in range(max(3, CACHE_BYTES // one.nbytes + 1))]
    times = {tokens: dict.fromkeys(SHAPES, float("inf")) for tokens in TOKENS}
    for _ in range(2):
        for tokens, found in times.items():
            for name, those in weights.items():
                found[name] = min(found[name], microseconds(tokens, those))
    rows: list[dict[str, Any]] = [
        {
            "tokens": tokens,
            **{name: round(time, 2) for name, time in found.items()},
            "layers_ms": round(LAYERS * sum(found.values()) / 1e3, 3),
        }
        for tokens, found in times.items()
    ]
    for row in rows:
        print(row, flush=True)
    write_json(args.out, {"machine": gpu_machine("cuda"), "rows": rows})


if __name__ == "__main__":
    main()
