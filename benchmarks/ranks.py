"""How long two GPUs take to add up rows of hidden states: by our kernels and by NCCL, in a CUDA graph, norm included.

    python benchmarks/ranks.py OUT.json          # starts a process for each GPU

What a layer does twice: the ranks' rows are summed, the sum is added to the residual, and that is normed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import machine, table, write_json
from gpu_profile import recorded_ms

from manyheads.kernels.exchange import FEW_ROWS
from manyheads.kernels.fused import add_rms_norm
from manyheads.models.parallel import Ranks

ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
SUMS = 64
"""In a graph, as of a model of 32 layers."""


def measure(ranks: Ranks, num_rows: int, dim: int) -> float:
    """Microseconds of a sum, its addition to the residual and the norm; the median of 20 graphs."""
    x = torch.randn(num_rows, dim, device="cuda", dtype=torch.float16)
    residual, weight = torch.zeros_like(x), torch.ones_like(x[0])

    def layers() -> None:
        y: Any = x.clone()
        for _ in range(SUMS):
            y = add_rms_norm(ranks.sum(y, y.dtype), residual, weight, 1e-5)

    return recorded_ms(x.device, layers) * 1e3 / SUMS


def compare(rank: int, folder: Path, dim: int) -> list[dict[str, Any]]:
    """Both ways by number of rows, and whether they gave the same."""
    torch.cuda.set_device(rank)
    both = Ranks.join(rank, 2, folder, torch.device("cuda", rank), dim * 2)
    library = replace(both, mailbox=None)
    found = []
    for num_rows in ROWS:
        x = torch.randn(num_rows, dim, device="cuda", dtype=torch.float16)
        row: dict[str, Any] = {"rows": num_rows, "nccl_us": round(measure(library, num_rows, dim), 2)}
        box = both.mailbox
        if box is not None and box.serves(x, x.dtype):
            theirs = library.sum(x.clone(), x.dtype)
            for way, few_rows in {"words": FEW_ROWS, "flags": 0}.items():
                box.few_rows = few_rows
                if way == "flags" or num_rows <= few_rows:
                    row[f"{way}_us"] = round(measure(both, num_rows, dim), 2)
                    row[f"{way}_equal"] = torch.equal(both.sum(x.clone(), x.dtype), theirs)
        found.append(row)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        compare(1, args.folder, args.dim)
        return
    with tempfile.TemporaryDirectory() as folder:
        other = subprocess.Popen([sys.executable, __file__, str(args.out), "--dim", str(args.dim), "--folder", folder])
        rows = compare(0, Path(folder), args.dim)
        other.wait()
    settings = {"dim": args.dim, "sums": SUMS, "dtype": "float16", "gpu": torch.cuda.get_device_name(0)}
    write_json(args.out, {"machine": machine(), "settings": settings, "rows": rows})
    ways = ("words_us", "flags_us", "nccl_us")
    table(["rows", *ways], [[row["rows"], *map(row.get, ways)] for row in rows])


if __name__ == "__main__":
    main()
