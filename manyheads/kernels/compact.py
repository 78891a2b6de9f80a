"""After verification: the K/V of the accepted nodes go to the end of their row's prefix."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent
from manyheads.kv_cache import KVCache, as_bytes

_BLOCK = 1024


def compact(cache: KVCache, slots: Tensor, path: Tensor, num_accepted: Tensor) -> None:
    """Copy the K/V at slots[r, path[r, d]] to slots[r, d] for every accepted depth d, in all layers.

    A node's index is never smaller than its depth, so going down the path never overwrites what is still to be moved.

    Args:
        slots: [R, n] int64.
        path: [R, D + 1] int64, nodes by depth.
        num_accepted: [R] int64.
    """
    rows, width = path.shape
    data, scale = as_bytes(cache.data), cache.scale
    num_heads, head_dim = data.shape[4:]
    entry = num_heads * head_dim  # elements of one slot
    planes = data.shape[0] * 2
    grid = (rows, planes * max(1, len(cache.groups)), -(-entry // _BLOCK))
    _compact_kernel[grid](
        data,
        data if scale is None else scale,  # without scales it is never read
        slots,
        path,
        num_accepted,
        slots if cache.companions is None else cache.companions,  # without any they are never read
        data.stride(1),
        0 if scale is None else scale.stride(1),
        slots.stride(0),
        path.stride(0),
        0 if cache.companions is None else cache.companions.stride(0),
        entry,
        num_heads,
        PLANES=planes,
        PAGE_SIZE=0 if cache.companions is None else data.shape[3],
        WIDTH=width,
        BLOCK=_BLOCK,
        BLOCK_HEADS=0 if scale is None else triton.next_power_of_2(num_heads),
        num_warps=4,
        **dependent(cache.device),
    )


@triton.jit
def _compact_kernel(
    data,
    scale,
    slots,
    path,
    num_accepted,
    companions,
    stride_data,
    stride_scale,
    stride_slots,
    stride_path,
    stride_companions,
    entry,
    num_heads,
    PLANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row, a layer's keys or values, a part of each slot; the first part's moves the scales too.

    PAGE_SIZE: where pages have companions; else 0.
    """
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) % PLANES
    group = tl.program_id(1) // PLANES
    plane = data + place.to(tl.int64) * stride_data
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = element < entry
    if BLOCK_HEADS > 0:
        scale += place.to(tl.int64) * stride_scale
        head = tl.arange(0, BLOCK_HEADS)
        has_scale = (head < num_heads) & (tl.program_id(2) == 0)
    accepted = tl.load(num_accepted + row)
    for depth in range(1, WIDTH):
        node = tl.load(path + row * stride_path + depth)
        if (depth < accepted) & (node != depth):
            source = tl.load(slots + row * stride_slots + node)
            destination = tl.load(slots + row * stride_slots + depth)
            if PAGE_SIZE > 0:
                source = _slot_in(companions, group, source, stride_companions, PAGE_SIZE)
                destination = _slot_in(companions, group, destination, stride_companions, PAGE_SIZE)
            value = tl.load(plane + source * entry + element, mask=inside)
            tl.store(plane + destination * entry + element, value, mask=inside)
            if BLOCK_HEADS > 0:
                moved = tl.load(scale + source * num_heads + head, mask=has_scale)
                tl.store(scale + destination * num_heads + head, moved, mask=has_scale)


@triton.jit
def _slot_in(companions, group, slot, stride_companions, PAGE_SIZE: tl.constexpr):
    """Where a group of layers has what a slot holds in the first."""
    if group > 0:
        page = tl.load(companions + (group - 1).to(tl.int64) * stride_companions + slot // PAGE_SIZE)
        slot = page * PAGE_SIZE + slot % PAGE_SIZE
    return slot
