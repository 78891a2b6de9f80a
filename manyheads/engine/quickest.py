"""How many tokens a pass is padded to: a few more are often computed sooner.

A library cuts a product into tiles, and chooses them by the number of rows, which does not always go well: on an H200,
the products of a 7B model take 9.0 ms for 416 tokens and 8.1 for 432 (benchmarks/results/gpu_sizes.json). So a start
measures the products of the sizes that passes may have, and of a few more tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields

import torch

from manyheads.models.linear import Linear
from manyheads.models.llama import AttentionLayer, Llama

LEAST = 128
"""Fewer tokens wait for weights to be read, as many as they may be."""
STEP, MOST_ADDED = 16, 64
"""Tokens are added in steps, and at most so many."""
WORTH, LEAST_GAIN = 0.99, 2e-6
"""What a layer's products of more tokens have to take, of the time of fewer, for them to be added, and how many seconds
less: other kernels take them as well, and events tell no shorter times apart."""
TURNS = 4
"""Of each size; the shortest counts."""
AHEAD_CYCLES = 2_000_000
"""For so long the device waits before products are timed, so that the host has launched all of them."""


def quickest(model: Llama, sizes: Collection[int]) -> dict[int, int]:
    """For each of these numbers of tokens, the one that is computed instead: itself, or a few more. Nothing is measured
    on a CPU, where a product may not be launched ahead, or of experts, who take more tokens for what they are."""
    if model.device.type != "cuda" or not model.can_be_captured or model.config.experts_per_token:
        return {}
    linears = linears_of(model.layers[len(model.layers) // 2])
    return choose(sizes, lambda measured: _seconds(model, linears, measured))


def linears_of(layer: AttentionLayer) -> list[Linear]:
    """Its products."""
    held = (getattr(layer, field.name) for field in fields(layer))
    return [part for part in held if isinstance(part, Linear)]


def choose(sizes: Collection[int], measure: Callable[[list[int]], Mapping[int, float]]) -> dict[int, int]:
    """`quickest`, by what products of these sizes take."""
    asked = sorted(size for size in set(sizes) if size >= LEAST)
    if not asked:
        return {}
    more = {size: range(size, size + MOST_ADDED + 1, STEP) for size in asked}
    seconds = measure(sorted({size for those in more.values() for size in those}))
    chosen = {}
    for size, those in more.items():
        best = min(those, key=lambda other: seconds[other])
        is_worth_it = seconds[best] < min(WORTH * seconds[size], seconds[size] - LEAST_GAIN)
        chosen[size] = best if is_worth_it else size
    return chosen


@torch.inference_mode()
def _seconds(model: Llama, linears: Sequence[Linear], sizes: Sequence[int]) -> dict[int, float]:
    """What these products take, by the number of tokens."""
    found = dict.fromkeys(sizes, float("inf"))
    widths = {linear.product.in_features for linear in linears}
    rows = {width: torch.randn(max(sizes), width, dtype=model.dtype, device=model.device) for width in widths}
    for _ in range(TURNS):  # in turns, since a device's clock wanders
        for size in sizes:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(AHEAD_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            for linear in linears:
                linear.share(rows[linear.product.in_features][:size])
            end.record()
            end.synchronize()
            found[size] = min(found[size], begin.elapsed_time(end) / 1e3)
    return found
