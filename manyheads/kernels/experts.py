"""Products of tokens with the weights of their experts: many products of a few rows each, in one launch.

A program multiplies a block of pairs of a token and an expert (routing.py) with a block of the expert's weight. So few
tokens read the weights of the experts that they have, and no others. (MegaBlocks: Gale et al. 2022; the form is that of
vLLM's fused experts.)

A row's result depends on the row alone: nothing is added up by atomics, and K results of a token are left as K parts,
which whoever reads them next adds up in the order of their chances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels import quantized
from manyheads.kernels.dependent import begin, dependent
from manyheads.kernels.quantized import added_up, group_sums, lower, serves, shared_memory, upper
from manyheads.kernels.routing import Groups
from manyheads.kernels.rows import GROUP, MAX_DIM, QuantizedRows, quantize_rows
from manyheads.kernels.widen import Arranged
from manyheads.quantization.base import CodedScheme

_ALIGNED = 16
"""Bytes that are copied at once: so many columns of codes."""


def multiplies(weight: Arranged, dtype: torch.dtype) -> bool:
    """Whether `product` takes a quantized weight for activations of a dtype."""
    if weight.scheme.bits == 4:
        return serves(weight.values.new_empty((0, weight.in_features), dtype=dtype), weight)
    is_half, is_known = (
        dtype in (torch.float16, torch.bfloat16),
        quantized.multiplies(weight.scheme, weight.values.device),
    )
    return is_half and is_known and weight.in_features % _ALIGNED == 0


def takes(weight: Arranged) -> bool:
    """Whether `product` may have its rows quantized by the kernel that computes them."""
    return weight.in_features <= MAX_DIM


def product(
    x: Tensor | QuantizedRows,
    weight: Tensor | Arranged,
    bias: Tensor | None,
    count: int,
    groups: Groups,
    chances: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b for each pair, with the weight and bias of its expert.

    Args:
        x: [T, in], contiguous; with chances [T · K, in], of the pairs by their experts.
        weight: [experts · out, in], contiguous, the experts' one below the other; a quantized one that `multiplies`.
        bias: [experts · out] or None.
        count: experts that there are.
        groups: of the tokens.
        chances: [T, K] float32, of the tokens' experts.

    Returns:
        [T · K, out] of x's dtype, of the pairs by their experts; or, with chances, each times its own, [K, T, out]
        float32: parts of the tokens' results that are to be added up.
    """
    if isinstance(weight, Arranged) and not isinstance(x, QuantizedRows):
        x = quantize_rows(x, weight.scheme)
    num_pairs, num_blocks, top = groups.order.shape[0], groups.table.shape[1], groups.top
    rows, width = x.shape
    num_out = (weight.out_features if isinstance(weight, Arranged) else len(weight)) // count
    if chances is None:
        out = torch.empty((num_pairs, num_out), dtype=x.dtype, device=x.device)
    else:
        out = torch.empty((top, num_pairs // top, num_out), dtype=torch.float32, device=x.device)
    scheme = weight.scheme if isinstance(weight, Arranged) else None
    tiles = _tiles(scheme, groups.size, width, x.dtype, x.device)
    grid = (-(-num_out // tiles.out), num_blocks, groups.size // tiles.rows)
    where = {"order_ptr": groups.order, "table_ptr": groups.table, "num_blocks": num_blocks, "num_pairs": num_pairs}
    result = {"bias_ptr": out if bias is None else bias, "chances_ptr": out if chances is None else chances}
    sizes = {"num_out": num_out, "width": width}
    constants = {"TOP": top, "ADDED": chances is not None, "HAS_BIAS": bias is not None, "ROWS": tiles.rows,
                 "OUT": tiles.out, "EVEN_OUT": num_out % tiles.out == 0}  # fmt: skip
    launch = {"num_warps": tiles.warps, **dependent(x.device)}
    if isinstance(x, QuantizedRows):
        assert isinstance(weight, Arranged)
        codes, x_scale, sums, _ = x
        if weight.scheme.bits == 4:
            _int4_kernel[grid](
                codes,
                weight.values,
                x_scale,
                weight.scale,
                sums,
                weight.scale if weight.zero is None else weight.zero,  # without zero points it is not looked at
                out,
                **where,
                **result,
                **sizes,
                rows=rows,
                padded=len(weight.values),
                **constants,
                HAS_ZERO=weight.zero is not None,
                IN_REGISTERS=x.device.type == "cuda",
                GROUP=GROUP,
                PAIRS=-(-width // (2 * GROUP)),
                GROUPS=max(16, triton.next_power_of_2(2 * -(-width // (2 * GROUP)))),
                STAGES=tiles.stages,
                **launch,
            )
            return out
        values, scale, parts = weight.values, weight.scale, weight.scheme.parts
    else:
        assert isinstance(weight, Tensor)
        codes, values, parts = x, weight, 1
        x_scale = scale = out  # never read
    _kernel[grid](
        codes,
        values,
        x_scale,
        scale,
        out,
        **where,
        **result,
        **sizes,
        **constants,
        SCALED=scheme is not None,
        PARTS=parts,
        COLUMNS=tiles.columns,
        EVEN_IN=width % tiles.columns == 0,
        num_stages=tiles.stages,
        **launch,
    )
    return out


class _Tiles(NamedTuple):
    """What a program multiplies at once, and how."""

    rows: int
    out: int
    columns: int
    warps: int
    stages: int


def _tiles(scheme: CodedScheme | None, size: int, width: int, dtype: torch.dtype, device: torch.device) -> _Tiles:
    """For blocks of so many pairs: of few, bytes of the weight that are under way count, of many, arithmetic.

    Args:
        scheme: of the weight; None is one in floating point.
        dtype: of activations.
    """
    if scheme is None:
        columns = (128 if size <= 32 else 64) * 2 // dtype.itemsize
        out, warps = (64, 4) if size <= 32 else (128, 4 if size <= 64 else 8)
        rows, bits, row_bytes = size, 8 * dtype.itemsize, columns * dtype.itemsize
    else:
        out, warps, rows = 64, 4, min(size, 64 if scheme.parts == 2 else 128)
        is_wide = scheme.bits == 4 or (width % (2 * GROUP) == 0 and scheme.parts * rows <= 32)
        columns = 2 * GROUP if is_wide else GROUP
        bits, row_bytes = scheme.bits, columns * scheme.parts
    if columns > 64 and width % columns and width % 64 == 0 and (scheme is None or scheme.bits == 8):
        columns, row_bytes = 64, row_bytes * 64 // columns  # whole blocks need no masks
    stage = rows * row_bytes + out * columns * bits // 8
    return _Tiles(rows, out, columns, warps, max(2, min(4, shared_memory(device) // 2 // stage)))


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    scale_ptr,
    out_ptr,
    order_ptr,
    table_ptr,
    num_blocks,
    num_pairs,
    bias_ptr,
    chances_ptr,
    num_out,
    width,
    TOP: tl.constexpr,
    ADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_IN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: pairs of a block, outputs of their expert. Weights in floating point, or codes of 8 bits, of which
    quantized.py says how they are multiplied; a weight's rows are the product's M, as in linear.py."""
    begin(DEPENDENT)
    block = tl.program_id(1)
    expert = tl.load(table_ptr + block)
    low = tl.load(table_ptr + num_blocks + block) + tl.program_id(2) * ROWS
    high = tl.load(table_ptr + 2 * num_blocks + block)
    if (expert >= 0) & (low < high):
        part = tl.arange(0, PARTS * ROWS)
        row = _rows(low + part // PARTS, high, order_ptr, TOP, ADDED).to(tl.int64)
        at_out = tl.program_id(0) * OUT + tl.arange(0, OUT)
        column = tl.arange(0, COLUMNS)
        is_row, is_out = (low + part // PARTS < high)[:, None], (at_out < num_out)[:, None]
        x_at = x_ptr + (row * PARTS + part % PARTS)[:, None] * width + column[None, :]
        weight_at = weight_ptr + (expert.to(tl.int64) * num_out + at_out)[:, None] * width + column[None, :]
        sums: tl.constexpr = tl.float32 if PARTS == 1 else tl.int32
        none: tl.constexpr = 0.0 if PARTS == 1 else 0
        acc = tl.zeros((OUT, PARTS * ROWS), sums)
        for start in range(0, width, COLUMNS):
            if EVEN_IN:
                x = tl.load(x_at, mask=is_row, other=none)
                weight = tl.load(weight_at) if EVEN_OUT else tl.load(weight_at, mask=is_out, other=none)
            else:
                is_column = (start + column < width)[None, :]
                x = tl.load(x_at, mask=is_row & is_column, other=none)
                weight = tl.load(weight_at, mask=is_out & is_column, other=none)
            acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee", out_dtype=sums)
            x_at += COLUMNS
            weight_at += COLUMNS
        y = added_up(acc, OUT, ROWS) if PARTS == 2 else acc
        if SCALED:
            scale_at = scale_ptr + expert.to(tl.int64) * num_out + at_out
            y *= tl.load(scale_at, mask=at_out < num_out, other=0.0)[:, None]
        _store(y, x_scale_ptr, out_ptr, order_ptr, num_pairs, bias_ptr, chances_ptr, expert, low, high, num_out, TOP,
               ADDED, HAS_BIAS, SCALED, ROWS, OUT)  # fmt: skip


@triton.jit
def _rows(at, high, order_ptr, TOP: tl.constexpr, ADDED: tl.constexpr):
    """Which rows of x stand at these places of the order."""
    if ADDED:
        return tl.where(at < high, at, 0)
    return tl.load(order_ptr + at, mask=at < high, other=0) // TOP


@triton.jit
def _store(
    y,
    x_scale_ptr,
    out_ptr,
    order_ptr,
    num_pairs,
    bias_ptr,
    chances_ptr,
    expert,
    low,
    high,
    num_out,
    TOP: tl.constexpr,
    ADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
):
    """A block [OUT, ROWS] of results, times the scales of rows, with the bias, times the chances."""
    at = low + tl.arange(0, ROWS)
    at_out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    is_row, is_out = at < high, at_out < num_out
    place = at.to(tl.int64)
    if SCALED:
        y *= tl.load(x_scale_ptr + _rows(at, high, order_ptr, TOP, ADDED), mask=is_row, other=0.0)[None, :]
    if HAS_BIAS:
        bias_at = bias_ptr + expert.to(tl.int64) * num_out + at_out
        y += tl.load(bias_at, mask=is_out, other=0.0).to(tl.float32)[:, None]
    if ADDED:
        pair = tl.load(order_ptr + at, mask=is_row, other=0)
        y *= tl.load(chances_ptr + pair, mask=is_row, other=0.0)[None, :]
        place = (pair % TOP).to(tl.int64) * (num_pairs // TOP) + pair // TOP
    out_at = out_ptr + place[None, :] * num_out + at_out[:, None]
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=is_out[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "rows"])
def _int4_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    scale_ptr,
    sums_ptr,
    zero_ptr,
    out_ptr,
    order_ptr,
    table_ptr,
    num_blocks,
    num_pairs,
    bias_ptr,
    chances_ptr,
    num_out,
    width,
    rows,
    padded,
    TOP: tl.constexpr,
    ADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """As `_kernel`, by pairs of groups of columns as `quantized._int4_kernel` has them."""
    begin(DEPENDENT)
    block = tl.program_id(1)
    expert = tl.load(table_ptr + block)
    low = tl.load(table_ptr + num_blocks + block) + tl.program_id(2) * ROWS
    high = tl.load(table_ptr + 2 * num_blocks + block)
    if (expert >= 0) & (low < high):
        part = tl.arange(0, 2 * ROWS)
        row = _rows(low + part // 2, high, order_ptr, TOP, ADDED).to(tl.int64)
        at_out = tl.program_id(0) * OUT + tl.arange(0, OUT)
        column = tl.arange(0, GROUP)
        is_row = (low + part // 2 < high)[:, None]
        # behind an expert's last row, that one again: what comes of it is not stored
        weight_row = expert.to(tl.int64) * num_out + (at_out if EVEN_OUT else tl.minimum(at_out, num_out - 1))
        x_at = x_ptr + (row * 2 + part % 2)[:, None] * width + column[None, :]
        weight_at = weight_ptr + weight_row[:, None] * (PAIRS * GROUP) + column[None, :]
        scale_at = scale_ptr + weight_row
        acc = tl.zeros((OUT, ROWS), tl.float32)
        for pair in tl.range(0, PAIRS, num_stages=STAGES):
            packed = tl.load(weight_at)
            x = tl.load(x_at, mask=is_row, other=0)
            x_upper = tl.load(x_at + GROUP, mask=is_row & ((2 * pair + 1) * GROUP < width), other=0)
            scale, scale_upper = tl.load(scale_at), tl.load(scale_at + padded)
            acc += group_sums(lower(packed, IN_REGISTERS), x, OUT, ROWS) * scale[:, None]
            acc += group_sums(upper(packed, IN_REGISTERS), x_upper, OUT, ROWS) * scale_upper[:, None]
            weight_at += GROUP
            x_at += 2 * GROUP
            scale_at += 2 * padded
        acc *= 0.0625
        if HAS_ZERO:
            group = tl.arange(0, GROUPS)
            is_group = group < width // GROUP
            zero_at = group[None, :].to(tl.int64) * padded + weight_row[:, None]
            zero = tl.load(zero_ptr + zero_at, mask=is_group[None, :], other=0).to(tl.float32)
            zero *= tl.load(scale_ptr + zero_at, mask=is_group[None, :], other=0.0)
            at = low + tl.arange(0, ROWS)
            sums_at = sums_ptr + group[:, None] * rows + _rows(at, high, order_ptr, TOP, ADDED)[None, :]
            sums = tl.load(sums_at, mask=is_group[:, None] & (at < high)[None, :], other=0.0)
            acc -= tl.dot(zero, sums, input_precision="tf32x3")
        _store(acc, x_scale_ptr, out_ptr, order_ptr, num_pairs, bias_ptr, chances_ptr, expert, low, high, num_out, TOP,
               ADDED, HAS_BIAS, True, ROWS, OUT)  # fmt: skip
