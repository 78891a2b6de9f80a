"""The matrix product of a few rows with a weight, for GPUs from Hopper on.

It reads the weight once and is bound by that. Where the weight has few rows, cuBLAS's kernels for such shapes stay well
below what an H200's memory gives, and add up their parts in a kernel of its own; here the parts are left to whoever
reads the result next.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent

MAX_ROWS = 128
"""Beyond so many rows arithmetic begins to count, and cuBLAS is faster."""
MAX_ROWS_WHOLE = 32
"""The same holds from here on for products that are not split."""
_BLOCK_OUT, _BLOCK_IN = 64, 128
_STAGES = 4


@lru_cache(maxsize=16)
def _is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def serves(x: Tensor, weight: Tensor, most: int = MAX_ROWS) -> bool:
    """Whether `few_rows` takes this product, and is the faster one.

    Args:
        x: [T, in]
        weight: [out, in]
        most: rows.
    """
    return (
        x.shape[0] <= most
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.shape[0] % _BLOCK_OUT == 0
        and weight.shape[1] % _BLOCK_IN == 0
        and _is_hopper(x.device)
    )


def few_rows(x: Tensor, weight: Tensor, splits: int) -> Tensor:
    """x Wᵀ.

    Args:
        x: [T, in], at most 128 rows, the last dimension contiguous.
        weight: [out, in], contiguous; `out` a multiple of 64, `in` of 128.
        splits: programs that share a row of the weight.

    Returns:
        [T, out] of x's dtype for one split, else [splits, T, out] float32: parts that are to be added up.
    """
    rows, width = x.shape
    num_out = weight.shape[0]
    share = -(-width // (splits * _BLOCK_IN)) * _BLOCK_IN
    if splits == 1:
        out = torch.empty((rows, num_out), dtype=x.dtype, device=x.device)
    else:
        out = torch.empty((splits, rows, num_out), dtype=torch.float32, device=x.device)
    _few_rows_kernel[(num_out // _BLOCK_OUT, splits)](
        x,
        weight,
        out,
        rows,
        num_out,
        width,
        share,
        x.stride(0),
        BLOCK_ROWS=max(16, triton.next_power_of_2(rows)),
        BLOCK_OUT=_BLOCK_OUT,
        BLOCK_IN=_BLOCK_IN,
        num_warps=4,
        num_stages=_STAGES,
        **dependent(x.device),
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _few_rows_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    num_out,
    width,
    share,
    stride_x,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a block of the weight's rows, one share of its columns.

    The weight's rows are the product's M: tensor cores want 64 of them, and of x there are few.
    """
    part = tl.program_id(1)
    at_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    at_row = tl.arange(0, BLOCK_ROWS)
    inside = at_row < rows
    column = tl.arange(0, BLOCK_IN)
    low = part * share
    high = tl.minimum(low + share, width)
    weight_at = weight_ptr + at_out[:, None].to(tl.int64) * width + low + column[None, :]
    x_at = x_ptr + at_row[:, None].to(tl.int64) * stride_x + low + column[None, :]
    begin(DEPENDENT)
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for _ in range(low, high, BLOCK_IN):
        weight = tl.load(weight_at)
        x = tl.load(x_at, mask=inside[:, None], other=0.0)
        acc = tl.dot(weight, tl.trans(x), acc)
        weight_at += BLOCK_IN
        x_at += BLOCK_IN
    out_at = out_ptr + (part.to(tl.int64) * rows + at_row[None, :]) * num_out + at_out[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside[None, :])
