"""After verification: the K/V of the accepted nodes go to the end of their row's prefix."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.launch import begin, dependent

_BLOCK = 1024


def compact(cache: Tensor, slots: Tensor, path: Tensor, num_accepted: Tensor) -> None:
    """Copy the K/V at slots[r, path[r, d]] to slots[r, d] for every accepted depth d, in all layers.

    A node's index is never smaller than its depth, so going down the path never overwrites what is still to be moved.

    Args:
        cache: [layers, 2, pages, page size, kv_heads, head_dim], contiguous.
        slots: [R, n] int64.
        path: [R, D + 1] int64, nodes by depth.
        num_accepted: [R] int64.
    """
    rows, width = path.shape
    entry = cache.shape[4] * cache.shape[5]  # elements of one slot
    grid = (rows, cache.shape[0] * 2, -(-entry // _BLOCK))
    _compact_kernel[grid](
        cache,
        slots,
        path,
        num_accepted,
        cache.stride(1),
        slots.stride(0),
        path.stride(0),
        entry,
        WIDTH=width,
        BLOCK=_BLOCK,
        num_warps=4,
        **dependent(cache.device),
    )


@triton.jit
def _compact_kernel(
    cache,
    slots,
    path,
    num_accepted,
    stride_plane,
    stride_slots,
    stride_path,
    entry,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row, a layer's keys or values, a part of each slot."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    plane = cache + tl.program_id(1).to(tl.int64) * stride_plane
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = element < entry
    accepted = tl.load(num_accepted + row)
    for depth in range(1, WIDTH):
        node = tl.load(path + row * stride_path + depth)
        if (depth < accepted) & (node != depth):
            source = tl.load(slots + row * stride_slots + node)
            destination = tl.load(slots + row * stride_slots + depth)
            value = tl.load(plane + source * entry + element, mask=inside)
            tl.store(plane + destination * entry + element, value, mask=inside)
