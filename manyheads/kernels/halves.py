"""Products of many rows in half precision with weights in 8 and 4 bits, for NVIDIA GPUs.

Of many rows arithmetic is what takes the time, and a row that is two rows of bytes is as much of it as one in half
precision; in 4 bits, the sums of every group turned into floating-point numbers come to that. Here rows stay as they
are. A block of the weight becomes half precision in registers, from where tensor cores take it, once for every block of
rows: it costs a program as much whatever number of rows the block has.

- int8: codes are numbers of half precision, and the scale of a row is multiplied in at the end: nothing is rounded.
- int4: a code less its zero point, times the scale of its group in half precision, rounded once more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent
from manyheads.kernels.rows import GROUP
from manyheads.kernels.widen import Arranged


def _half_byte(kind: str, one: str, above: str, shift: int) -> tl.constexpr:
    """(half of a byte, flipped, less $3 and $4) · ($5 and $6), of four bytes in $2.

    Args:
        above: a byte of few bits below this one is a number of the kind, and goes up by 1 with the byte.
    """
    return tl.constexpr(f"""{{ .reg .b32 t, one, none;
        mov.b32 one, 0x{2 * one};
        mov.b32 none, 0x80008000;
        shr.u32 t, $2, {shift};
        lop3.b32 t, t, 0x0F0F0F0F, 0x08080808, 0x6A;
        prmt.b32 $0, t, 0x{4 * above}, 0x4140;
        prmt.b32 $1, t, 0x{4 * above}, 0x4342;
        fma.rn.{kind} $0, $0, one, $3;
        fma.rn.{kind} $1, $1, one, $4;
        fma.rn.{kind} $0, $0, $5, none;
        fma.rn.{kind} $1, $1, $6, none; }}""")


_OF_HALF_LOWER, _OF_HALF_UPPER = (_half_byte("f16x2", "3C00", "64", shift) for shift in (0, 4))
"""0x6400 is 1024."""
_OF_BFLOAT_LOWER, _OF_BFLOAT_UPPER = (_half_byte("bf16x2", "3F80", "43", shift) for shift in (0, 4))
"""0x4300 is 128."""


class Tiles(NamedTuple):
    """What a program multiplies at once, and how."""

    out: int
    rows: int
    columns: int
    """Bytes of a row of the weight; in 4 bits, so many columns of each of two groups."""
    warps: int
    stages: int

    def programs(self, rows: int, padded: int) -> int:
        """Programs of one share."""
        return -(-rows // self.rows) * (padded // self.out)

    def fit(self, bits: int, memory: int) -> Tiles:
        """With fewer stages where the memory that a processor has for them holds no more."""
        held = self.columns * (self.out + 2 * self.rows * (8 // bits))
        return self._replace(stages=min(self.stages, max(1, memory // held)))


TILES = {8: Tiles(128, 128, 64, 8, 4), 4: Tiles(64, 128, 64, 4, 2)}
"""By bits of a code. A program waits for its own registers before tensor cores go on: several on a processor take
turns, and so many of these fit."""


def multiply(x: Tensor, weight: Arranged, splits: int, tiles: Tiles) -> Tensor:
    """x Wᵀ, for columns that come in groups of 128.

    Args:
        x: [T, in] in half precision, the last dimension contiguous.
        weight: [out, in], in integers.
        splits: programs that share a row of the weight.

    Returns:
        [T, out] of x's dtype for one split, else [splits, T, out] float32: parts that are to be added up.
    """
    rows, width = x.shape
    num_out, padded = weight.out_features, len(weight.values)
    if splits == 1:
        out = torch.empty((rows, num_out), dtype=x.dtype, device=x.device)
    else:
        out = torch.empty((splits, rows, num_out), dtype=torch.float32, device=x.device)
    num_steps = weight.values.shape[1] // tiles.columns
    # the weight's blocks follow each other slower than the rows': what is read twice is then in the cache
    _halves_kernel[(-(-rows // tiles.rows), padded // tiles.out, splits)](
        x,
        weight.values,
        weight.scale,
        weight.scale if weight.zero is None else weight.zero,  # without zero points it is not looked at
        out,
        rows,
        num_out,
        padded,
        width,
        x.stride(0),
        num_steps,
        -(-num_steps // splits),
        INT4=weight.scheme.bits == 4,
        HAS_ZERO=weight.zero is not None,
        IS_ODD=weight.scheme.bits == 4 and width % (2 * GROUP) != 0,
        IN_REGISTERS=x.device.type == "cuda",
        GROUP=GROUP,
        BLOCK_ROWS=tiles.rows,
        BLOCK_OUT=tiles.out,
        BLOCK_IN=tiles.columns,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        **dependent(x.device),
    )
    return out


@triton.jit(do_not_specialize=["rows", "num_steps", "share"])
def _halves_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    num_out,
    padded,
    width,
    stride_x,
    num_steps,
    share,
    INT4: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_ODD: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a block of rows, a block of the weight's rows, one share of its columns.

    The weight is the product's first factor, which may come from registers.
    """
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    at_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, num_steps)
    column = tl.arange(0, BLOCK_IN)
    inside = (at_row < rows)[:, None]
    x_at = x_ptr + at_row[:, None].to(tl.int64) * stride_x + column[None, :]
    stride_weight = num_steps * BLOCK_IN
    weight_at = weight_ptr + at_out[:, None].to(tl.int64) * stride_weight + first * BLOCK_IN + column[None, :]
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    begin(DEPENDENT)
    for step in tl.range(first, last, num_stages=STAGES):
        if INT4:
            pair = step // (GROUP // BLOCK_IN)
            at = pair * 2 * GROUP + step % (GROUP // BLOCK_IN) * BLOCK_IN
            group_at = 2 * pair * padded + at_out
            if HAS_ZERO:  # not copied ahead, as bytes are not: asked for while tensor cores still work on the last step
                zero = tl.load(zero_ptr + group_at).to(tl.float32)
                zero_upper = tl.load(zero_ptr + group_at + padded).to(tl.float32)
            else:
                zero = tl.zeros((BLOCK_OUT,), tl.float32)
                zero_upper = zero
            codes = tl.load(weight_at)
            there = inside
            if IS_ODD:
                there = inside & ((2 * pair + 1) * GROUP < width)
            x = tl.load(x_at + at, mask=inside, other=0.0)
            x_upper = tl.load(x_at + at + GROUP, mask=there, other=0.0)
            scale, scale_upper = tl.load(scale_ptr + group_at), tl.load(scale_ptr + group_at + padded)
            acc = tl.dot(_scaled(codes, scale, zero, HALF, False, IN_REGISTERS), tl.trans(x), acc)
            acc = tl.dot(_scaled(codes, scale_upper, zero_upper, HALF, True, IN_REGISTERS), tl.trans(x_upper), acc)
        else:
            codes = tl.load(weight_at)
            x = tl.load(x_at + step * BLOCK_IN, mask=inside, other=0.0)
            acc = tl.dot(_whole(codes, HALF, IN_REGISTERS), tl.trans(x), acc)
        weight_at += BLOCK_IN
    if not INT4:
        acc *= tl.load(scale_ptr + at_out)[:, None]
    out_at = out_ptr + (tl.program_id(2).to(tl.int64) * rows + at_row[None, :]) * num_out + at_out[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(at_out < num_out)[:, None] & (at_row < rows)[None, :])


@triton.jit
def _whole(codes, HALF: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """Codes from -128 to 127 as numbers of half precision, exactly."""
    if not IN_REGISTERS:
        w = codes.to(tl.float32).to(HALF)
    elif tl.float16 == HALF:
        # a byte below 0x64 is 1024 and the byte, which is here the code and 128
        w = tl.inline_asm_elementwise(
            """{ .reg .b32 t, middle;
            mov.b32 middle, 0x64806480;
            xor.b32 t, $2, 0x80808080;
            prmt.b32 $0, t, 0x64646464, 0x4140;
            prmt.b32 $1, t, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, middle;
            sub.f16x2 $1, $1, middle; }""",
            "=&r,=&r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        # seven bits below 0x43 are 128 and what they say; the eighth says whether 128 or 256 is taken off
        w = tl.inline_asm_elementwise(
            """{ .reg .b32 t, u, v, one;
            mov.b32 one, 0x3F803F80;
            and.b32 t, $2, 0x7F7F7F7F;
            and.b32 u, $2, 0x80808080;
            prmt.b32 $0, t, 0x43434343, 0x4140;
            prmt.b32 $1, t, 0x43434343, 0x4342;
            prmt.b32 v, u, 0xC3C3C3C3, 0x4140;
            fma.rn.bf16x2 $0, $0, one, v;
            prmt.b32 v, u, 0xC3C3C3C3, 0x4342;
            fma.rn.bf16x2 $1, $1, one, v; }""",
            "=&r,=&r,r",
            [codes],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return w


@triton.jit
def _scaled(packed, scale, zero, HALF: tl.constexpr, UPPER: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """(code - zero point) · scale of bytes' lower or upper halves, in half precision: the scale is rounded, and the
    product.

    As `quantized.arrange` has it, a half of a byte is the code less 8 in two's complement, and a zero point is less 8.
    """
    factor = scale.to(HALF)[:, None]
    if not IN_REGISTERS:
        code = ((packed >> 4) if UPPER else (packed & 15)) ^ 8
        w = ((code.to(tl.float32) - 8.0 - zero[:, None]) * factor.to(tl.float32)).to(HALF)
    else:
        IS_BFLOAT: tl.constexpr = tl.float16 != HALF
        less = (-((128.0 if IS_BFLOAT else 1024.0) + 8.0) - zero).to(HALF)[:, None]
        w = tl.inline_asm_elementwise(
            (_OF_BFLOAT_UPPER if UPPER else _OF_BFLOAT_LOWER)
            if IS_BFLOAT
            else (_OF_HALF_UPPER if UPPER else _OF_HALF_LOWER),
            "=&r,=&r,r,r,r,r,r",
            [packed, tl.broadcast_to(less, packed.shape), tl.broadcast_to(factor, packed.shape)],
            dtype=less.dtype,
            is_pure=True,
            pack=4,
        )
    return w
