"""Products of a 7B model's matrices on a GPU in every way that there is for them, by number of tokens.

    python benchmarks/gpu_products.py OUT.json [--schemes int4] [--tokens 256,512] [--parts qkv] [--seconds 55]

A line of JSON is printed for each product and way, as soon as it is known: microseconds of one, with what quantizes its
rows for `o` alone, as the kernels before the others do it; and its error against a product in float64 with what the
weight stands for. Of each matrix there are so many with the same numbers in other places that none is found in the
cache, one after another in a CUDA graph. The ways:

    half        the weight in half precision, by F.linear; with few tokens, by the kernel for those
    now         what `quantized.product` takes
    bytes       rows as bytes (`quantized.multiply`), with blocks (the weight's rows, tokens, columns, warps, stages)
    widened     the weight widened, in pieces of so many rows, then cuBLAS
    cublas      fp8 by cuBLAS

Kernels are compiled first, by as many processes as there are cores for, into Triton's cache. The
file has the time of a layer's four products, 32 times, in ms: `totals` takes of each way the fastest shape for each
product, `shapes` the fastest one for all four; and `failed`, what does not compile, does not fit or gives other
numbers. Where seconds are short, what is least told by others goes first, so that a cut run is of use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from common import gpu_machine, write_json
from torch import Tensor
from triton.errors import TritonError

from manyheads.kernels import linear, quantized, widen
from manyheads.kernels.quantized import _Blocks
from manyheads.kernels.rows import GROUP, QuantizedRows, quantize_rows
from manyheads.kernels.widen import Arranged
from manyheads.ops.kernel_products import PARTS
from manyheads.quantization.base import CodedScheme
from manyheads.quantization.fp8 import FP8
from manyheads.quantization.int4 import INT4
from manyheads.quantization.int8 import INT8

SCHEMES = {scheme.name: scheme for scheme in (INT4, INT8, FP8)}
SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
ADDED = ("o", "down")
"""What may come in parts."""
TOKENS = (512, 256, 1024, 128, 64, 16, 1)
LAYERS = 32
CACHE_BYTES = 2**27
"""More than any GPU's L2 cache."""
WRONG = {"int4": 5e-3, "int8": 5e-3, "fp8": 5e-2, "half": 5e-3}
"""A larger error, of norms, is a mistake and no rounding: a row in fp8 is rounded to 3 bits, which alone is 3e-2."""
PIECES = (4096, 2**20)
Run = Callable[[Any, Any], Tensor]


def byte_blocks(scheme: CodedScheme, tokens: int) -> list[_Blocks]:
    """Blocks that differ from those that are taken; the last number says whether a program has a processor alone."""
    if scheme is INT8:
        return [
            _Blocks(64, 64, GROUP, 4, 3, False),
            _Blocks(128, 64, GROUP, 8, 4, True),
            _Blocks(64, 128, GROUP, 4, 2, False),
            _Blocks(128, 128, GROUP, 8, 3, True),
            _Blocks(128, 128, GROUP, 8, 4, True),
        ]
    if scheme is INT4:
        return [_Blocks(64, 64, 2 * GROUP, 4, 3, False), _Blocks(128, 64, 2 * GROUP, 8, 3, True)]
    return [_Blocks(64, 128, GROUP, 4, 3, False), _Blocks(128, 128, GROUP, 8, 4, True)]


def ways(scheme: CodedScheme | None, tokens: int, padded: int, is_added: bool) -> Iterator[tuple[str, list[int], Run]]:
    """Name, shape and the product (x, weight) of each way."""
    if scheme is None:
        yield "half", [], half_added if is_added else half_whole
        return
    yield "now", [], lambda x, weight: quantized.product(x, weight, added=is_added)
    processors = quantized._processors(torch.device("cuda"))

    def splits(programs: int) -> int:
        return quantized._splits(programs, scheme.max_splits, processors) if is_added else 1

    if scheme.is_float:
        yield "cublas", [], cublas
    if tokens >= 64:
        for blocks in byte_blocks(scheme, tokens):
            yield "bytes", list(blocks[:5]), by_blocks(blocks, splits(blocks.programs(tokens, padded)))
    if tokens >= 128:
        for piece in PIECES if padded > PIECES[0] else PIECES[:1]:
            yield "widened", [piece], by_pieces(piece)


def half_whole(x: Tensor, weight: Tensor) -> Tensor:
    if linear.serves(x, weight, linear.MAX_ROWS_WHOLE):
        return linear.few_rows(x, weight, 1)
    return torch.nn.functional.linear(x, weight)


def half_added(x: Tensor, weight: Tensor) -> Tensor:
    return linear.few_rows(x, weight, PARTS) if linear.serves(x, weight) else torch.nn.functional.linear(x, weight)


def cublas(x: Tensor | QuantizedRows, weight: Arranged) -> Tensor:
    codes, scale, _, dtype = x if isinstance(x, QuantizedRows) else quantize_rows(x, weight.scheme)
    out_dtype = dtype if quantized._scales_rows(x.device) else torch.bfloat16
    return torch._scaled_mm(
        codes, weight.values.t(), scale[:, None], weight.scale.t(), out_dtype=out_dtype, use_fast_accum=True
    )[:, : weight.out_features]


def by_blocks(blocks: _Blocks, splits: int) -> Run:
    def run(x: Tensor, weight: Arranged) -> Tensor:
        chosen, quantized._blocks = quantized._blocks, lambda *_: blocks
        try:
            return quantized.multiply(x, weight, splits)
        finally:
            quantized._blocks = chosen

    return run


def by_pieces(piece: int) -> Run:
    def run(x: Tensor, weight: Arranged) -> Tensor:
        chosen, widen.PIECE = widen.PIECE, piece
        try:
            return widen.multiply(x, weight)
        finally:
            widen.PIECE = chosen

    return run


@lru_cache(maxsize=1)
def aside() -> torch.cuda.Stream:
    """One stream for all graphs, as cuBLAS keeps memory for each."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return stream


def microseconds(run: Run, x: Tensor | QuantizedRows, weights: Sequence[Any], repeats: int = 3) -> float:
    """Median time of one product, of graphs that hold one with each weight."""
    stream = aside()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for weight in weights:
                run(x, weight)
        finally:
            graph.capture_end()
        times: list[float] = []
        for _ in range(repeats + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(weights))
    return sorted(times[1:])[repeats // 2]


class Share:
    """Which kernels one of several processes compiles."""

    def __init__(self, which: int, count: int) -> None:
        self._which, self._count = which, count
        self._seen: dict[tuple[Any, ...], int] = {}

    def has(self, kernel: tuple[Any, ...]) -> bool:
        """Whether it is this one's; they are dealt in the order in which they are asked for."""
        return self._seen.setdefault(kernel, len(self._seen)) % self._count == self._which


def compile_all() -> None:
    """Run every way once, in several processes, with all the arguments that this one has. What fails here is told when
    it fails again."""
    count = max(1, min(12, (os.cpu_count() or 1) - 2))
    command = [sys.executable, *sys.argv, "--compiler"]
    running = [
        subprocess.Popen([*command, f"{which}/{count}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for which in range(count)
    ]
    for process in running:
        process.wait()


def copies(weight: Tensor | Arranged) -> list[Any]:
    """The weight, and so many more in other places that together they are larger than the cache."""
    count = 1 + CACHE_BYTES // weight.nbytes
    if isinstance(weight, Tensor):
        return [weight, *(weight.clone() for _ in range(count))]

    def groups(of: Tensor) -> Tensor:
        # with its strides, behind which there are zeros (`quantized.arrange`)
        if of.shape[1] == 1:
            return of.clone()
        filled = torch.cat([of.t(), of.new_zeros(of.shape[1] % 2, len(of))])
        return filled.contiguous()[: of.shape[1]].t()

    def same() -> Arranged:
        values = weight.values.view(torch.uint8).clone().view(weight.values.dtype)
        zero = None if weight.zero is None else groups(weight.zero)
        return Arranged(weight.scheme, weight.out_features, weight.in_features, values, groups(weight.scale), zero)

    return [weight, *(same() for _ in range(count))]


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What the file has of all lines."""
    times: dict[tuple[str, int, str], dict[tuple[int, ...], dict[str, float]]] = {}
    for line in lines:
        if "us" in line:
            shapes = times.setdefault((line["scheme"], line["tokens"], line["way"]), {})
            shapes.setdefault(tuple(line["shape"]), {})[line["part"]] = line["us"]

    def total(products: Iterable[float]) -> float:
        return round(sum(products) * LAYERS / 1e3, 3)

    totals: dict[tuple[str, int], dict[str, float]] = {}
    fastest: list[dict[str, Any]] = []
    for (scheme, tokens, way), shapes in sorted(times.items()):
        parts = [[by_part[part] for by_part in shapes.values() if part in by_part] for part in SHAPES]
        if not all(parts):
            continue
        totals.setdefault((scheme, tokens), {})[way] = total(map(min, parts))
        whole = [(total(by_part.values()), shape) for shape, by_part in shapes.items() if len(by_part) == len(SHAPES)]
        if whole and len(shapes) > 1:
            ms, shape = min(whole)
            fastest.append({"scheme": scheme, "tokens": tokens, "way": way, "shape": shape, "ms": ms})
    return {
        "totals": [{"scheme": scheme, "tokens": tokens, "ms": ms} for (scheme, tokens), ms in totals.items()],
        "shapes": fastest,
        "failed": [line for line in lines if "failed" in line],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=["half", *SCHEMES])
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=list(TOKENS))
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--seconds", type=float, default=55.0, help="no further product begins after so many")
    parser.add_argument("--compiler", type=lambda text: tuple(int(n) for n in text.split("/")), help=argparse.SUPPRESS)
    args = parser.parse_args()
    began, dtype = time.monotonic(), getattr(torch, args.dtype)
    if args.compiler is None:
        compile_all()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    lines: list[dict[str, Any]] = []

    def say(**record: Any) -> None:
        lines.append(record)
        print(json.dumps(record), flush=True)

    held: dict[tuple[str, str], tuple[list[Any], Tensor]] = {}
    repeat = copies if args.compiler is None else lambda weight: [weight]
    for name, part in itertools.product(args.schemes, args.parts):
        plain = torch.randn(SHAPES[part], device="cuda").mul_(SHAPES[part][1] ** -0.5)
        if name == "half":
            held[name, part] = repeat(plain.to(dtype)), plain.to(dtype)
        else:
            weight = SCHEMES[name].quantize(plain)
            held[name, part] = repeat(quantized.arrange(weight)), weight.dequantize(torch.float32)
    torch.cuda.synchronize()
    say(seconds=round(time.monotonic() - began, 1), ready=len(held))
    mine = Share(*args.compiler) if args.compiler is not None else None
    for tokens, name, part in itertools.product(args.tokens, args.schemes, args.parts):
        weights, stands_for = held[name, part]
        x = torch.randn(tokens, SHAPES[part][1], device="cuda").to(dtype)
        known = min(tokens, 32)  # rows that are compared: the first and the last, as blocks begin and end there
        some = torch.cat([x[: known // 2], x[-(known - known // 2) :]])
        wanted = some.double() @ stands_for.double().t()
        for way, shape, run in ways(SCHEMES.get(name), tokens, SHAPES[part][0], part in ADDED):
            if time.monotonic() - began > args.seconds:
                break
            if mine is not None and not mine.has((name, way, *shape, *([tokens] if way == "now" else []))):
                continue
            what = {"scheme": name, "tokens": tokens, "part": part, "way": way, "shape": shape}
            given: Tensor | QuantizedRows = x
            takes = way in ("bytes", "cublas") or (way == "now" and quantized.takes(x, weights[0]))
            if takes and part != "o":
                given = quantize_rows(x, SCHEMES[name])
            try:
                y = run(given, weights[0])
                y = y.sum(0) if y.dim() == 3 else y
                found = torch.cat([y[: known // 2], y[-(known - known // 2) :]]).double()
                error = float((found - wanted).norm() / wanted.norm())
                if not error < WRONG[name]:
                    raise ValueError(f"an error of {error:.3g}")
                if mine is not None:
                    continue
                took = microseconds(run, given, weights)
            except (RuntimeError, ValueError, AssertionError, TritonError) as failure:
                say(**what, failed=f"{type(failure).__name__}: {failure}"[:300])
                continue
            rate = 2 * tokens * SHAPES[part][0] * SHAPES[part][1] / took / 1e6
            say(**what, us=round(took, 2), tflops=round(rate, 1), error=float(f"{error:.3g}"))
    if mine is None:
        settings = {"dtype": args.dtype, "layers": LAYERS, "shapes": SHAPES}
        write_json(args.out, {"machine": gpu_machine("cuda"), "settings": settings, **summary(lines)})


if __name__ == "__main__":
    main()
