"""What stands between a model's matrix products, each in one kernel: float32 inside, rounded once at the end.

The wrappers check nothing and never wait for the device, as they run once a layer. Tensors are contiguous unless a
docstring says otherwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent
from manyheads.kernels.rows import QuantizedRows, empty_rows, store_row, where_to
from manyheads.kv_cache import LARGEST, SMALLEST
from manyheads.quantization.base import CodedScheme

_HEADS_A_PROGRAM = 8
_BLOCK = 1024
"""Elements a program of the elementwise kernels."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x / rms(x) · weight, as F.rms_norm rounds it.

    Args:
        x: [T, D], D up to 16384.
        weight: [D]
        out: [T, D], written to and returned.

    Returns:
        [T, D]
    """
    if out is None:
        out = torch.empty_like(x)
    _launch_norm(x, x, weight, None, eps, out)
    return out


def norm_pairs(
    first: Tensor,
    first_at: Tensor | None,
    first_weight: Tensor,
    second: Tensor,
    second_at: Tensor | None,
    second_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `Ops.norm_pairs`, D up to 16384."""
    rows, dim = len(second) if second_at is None else len(second_at), second.shape[1]
    out, taken = second.new_empty(rows, 2 * dim), second if second_at is None else second.new_empty(rows, dim)
    block = triton.next_power_of_2(dim)
    _norm_pairs_kernel[(rows, 2)](
        first,
        second if first_at is None else first_at,  # an index that is not there is never read
        first_weight,
        second,
        second if second_at is None else second_at,
        second_weight,
        out,
        taken,
        eps,
        dim,
        BLOCK=block,
        FIRST_AT=first_at is not None,
        SECOND_AT=second_at is not None,
        num_warps=_warps(block),
        **dependent(out.device),
    )
    return out, taken


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    scheme: CodedScheme | None = None,
    multiplier: float = 1.0,
) -> Tensor | QuantizedRows:
    """Adds x to the residual in place, rounded to its dtype, and norms the sum.

    Args:
        x: [T, D], or parts of it that are added up first, [splits, T, D] float32; D up to 16384.
        residual: [T, D]
        weight: [D]
        scheme: that of the weight that is multiplied next, if it takes `QuantizedRows`.
        multiplier: of x.

    Returns:
        [T, D], the norm of the new residual.
    """
    out = torch.empty_like(residual) if scheme is None else empty_rows(residual, residual.shape[1], scheme)
    _launch_norm(x, residual, weight, None, eps, out, add=True, multiplier=multiplier)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / deviation · weight + bias, of [T, D] and [D], D up to 16384."""
    out = torch.empty_like(x)
    _launch_norm(x, x, weight, bias, eps, out, centered=True)
    return out


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    scheme: CodedScheme | None = None,
    multiplier: float = 1.0,
) -> Tensor | QuantizedRows:
    """`add_rms_norm` by a layer norm, with or without a bias [D]."""
    out = torch.empty_like(residual) if scheme is None else empty_rows(residual, residual.shape[1], scheme)
    _launch_norm(x, residual, weight, bias, eps, out, add=True, centered=True, multiplier=multiplier)
    return out


def _launch_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor | QuantizedRows,
    *,
    add: bool = False,
    centered: bool = False,
    multiplier: float = 1.0,
) -> None:
    rows, dim = residual.shape
    block = triton.next_power_of_2(dim)
    pointers, constants = where_to(out)
    _norm_kernel[(rows,)](
        x,
        residual,
        weight,
        weight if bias is None else bias,  # without one it is never read
        **pointers,
        eps=eps,
        multiplier=multiplier,
        dim=dim,
        stride_part=x.stride(0),
        BLOCK=block,
        PARTS=x.shape[0] if x.ndim == 3 else 1,
        ADD=add,
        MULTIPLY=multiplier != 1.0,
        CENTERED=centered,
        HAS_BIAS=bias is not None,
        **constants,
        num_warps=_warps(block),
        **dependent(x.device),
    )


def rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Norms (if there are weights) and rotates q and k, and writes k and v to the cache.

    Args:
        qkv: [T, (H + 2 · KV) · d]; rows may be strided.
        cos, sin: [positions, d] or [positions, 1, d]; the first half of sin is negated.
        positions: [T] int64, into cos and sin.
        slots: [T] int64, page · page size + offset; no two alike, or which of them is kept is chance.
        k_pages, v_pages: [pages, page size, KV, d], one layer of the cache; any strides, the last dimension contiguous.
        num_heads: H.
        q_weight, k_weight: [d], both or neither: per-head RMS norms before the rotation (Qwen3).
        k_scale, v_scale: [pages, page size, KV] float32, the last dimension contiguous; both or neither: the cache is
            of codes (`kv_cache`), and these are written beside them.

    Returns:
        [T, H, d], the rotated q.
    """
    num_tokens = qkv.shape[0]
    page_size, num_kv_heads, head_dim = k_pages.shape[1:]
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    has_norm = q_weight is not None
    num_all_heads = num_heads + 2 * num_kv_heads
    _rope_store_kernel[(num_tokens, -(-num_all_heads // _HEADS_A_PROGRAM))](
        qkv,
        out,
        cos,
        sin,
        positions,
        slots,
        k_pages,
        v_pages,
        q_weight if has_norm else cos,  # without norms they are never read
        k_weight if has_norm else cos,
        cos if k_scale is None else k_scale,  # nor these without codes
        cos if v_scale is None else v_scale,
        eps,
        qkv.stride(0),
        cos.stride(0),
        k_pages.stride(0),
        k_pages.stride(1),
        k_pages.stride(2),
        v_pages.stride(0),
        v_pages.stride(1),
        v_pages.stride(2),
        0 if k_scale is None else k_scale.stride(0),
        0 if k_scale is None else k_scale.stride(1),
        0 if v_scale is None else v_scale.stride(0),
        0 if v_scale is None else v_scale.stride(1),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_HEADS=_HEADS_A_PROGRAM,
        PAGE_SIZE=page_size,
        HAS_NORM=has_norm,
        MOST=LARGEST.get(k_pages.dtype, 0.0),
        IS_INT8=k_pages.dtype == torch.int8,
        SMALLEST=SMALLEST,
        FINITE=torch.finfo(qkv.dtype).max,
        num_warps=4,
        **dependent(qkv.device),
    )
    return out


def silu_mul(gate_up: Tensor, scheme: CodedScheme | None = None) -> Tensor | QuantizedRows:
    """silu(gate) · up.

    Args:
        gate_up: [T, 2 · I], gate before up.
        scheme: as `add_rms_norm` has it; with one, I is at most 16384.

    Returns:
        [T, I]
    """
    return _activated(gate_up, scheme, gated=True, gelu=False)


def gelu_mul(gate_up: Tensor, scheme: CodedScheme | None = None) -> Tensor | QuantizedRows:
    """gelu(gate) · up, by its approximation with tanh; arguments as `silu_mul`'s."""
    return _activated(gate_up, scheme, gated=True, gelu=True)


def clamped_swiglu(
    gate_up: Tensor, scheme: CodedScheme | None = None, *, alpha: float, limit: float
) -> Tensor | QuantizedRows:
    """gate · sigmoid(alpha · gate) · (up + 1), of gate up to a limit and up within it; arguments as `silu_mul`'s."""
    return _activated(gate_up, scheme, gated=True, gelu=False, alpha=alpha, limit=limit)


def gelu(x: Tensor, scheme: CodedScheme | None = None) -> Tensor | QuantizedRows:
    """gelu(x) of [T, I], by its approximation with tanh; the scheme as `silu_mul` has it."""
    return _activated(x, scheme, gated=False, gelu=True)


def _activated(
    x: Tensor, scheme: CodedScheme | None, *, gated: bool, gelu: bool, alpha: float = 1.0, limit: float | None = None
) -> Tensor | QuantizedRows:
    rows, width = x.shape
    dim = width // 2 if gated else width
    if scheme is None:
        out: Tensor | QuantizedRows = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
        block, warps = _BLOCK, 4
    else:  # whole rows, for their largest values
        out = empty_rows(x, dim, scheme)
        block = triton.next_power_of_2(dim)
        warps = _warps(block)
    pointers, constants = where_to(out)
    _activate_kernel[(rows, -(-dim // block))](
        x,
        **pointers,
        dim=dim,
        alpha=alpha,
        limit=0.0 if limit is None else limit,
        BLOCK=block,
        GATED=gated,
        GELU=gelu,
        CLAMPED=limit is not None,
        **constants,
        num_warps=warps,
        **dependent(x.device),
    )
    return out


def head_input(hidden: Tensor, block_out: Tensor) -> Tensor:
    """The residual block of all Medusa heads: hidden + silu(block_out).

    Args:
        hidden: [R, D]
        block_out: [R, H, D]

    Returns:
        [R, H, D]
    """
    out = torch.empty_like(block_out)
    rows, heads, dim = block_out.shape
    _head_input_kernel[(rows * heads, -(-dim // _BLOCK))](
        hidden, block_out, out, dim, HEADS=heads, BLOCK=_BLOCK, num_warps=4, **dependent(out.device)
    )
    return out


def _warps(block: int) -> int:
    """A thread has 16 elements, and a program no fewer than 4 warps."""
    return min(32, max(4, block // 512))


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    scale_ptr,
    sums_ptr,
    eps,
    multiplier,
    dim,
    stride_part,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ADD: tl.constexpr,
    MULTIPLY: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    FP8: tl.constexpr,
    SUMS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one row, all of it in registers, so that x is read once."""
    begin(DEPENDENT)
    index = tl.program_id(0).to(tl.int64)
    row = index * dim
    column = tl.arange(0, BLOCK)
    inside = column < dim
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0)
    if ADD:
        for part in tl.static_range(1, PARTS):
            x += tl.load(x_ptr + part * stride_part + row + column, mask=inside, other=0.0)
        residual = tl.load(residual_ptr + row + column, mask=inside, other=0.0)
        x = x.to(residual.dtype)  # what a product that is not in parts would have given
        wide = x.to(tl.float32)
        if MULTIPLY:
            wide *= multiplier
        # rounded before the norm, which must see what the next layer will add to
        x = (residual.to(tl.float32) + wide).to(x.dtype)
        tl.store(residual_ptr + row + column, x, mask=inside)
    wide = x.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / dim, 0.0)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
    normed = wide * scale * weight
    if HAS_BIAS:
        normed += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out = normed.to(x.dtype)
    store_row(out, out_ptr, scale_ptr, sums_ptr, index, dim, QUANTIZE, FP8, SUMS, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["first_at_ptr", "second_at_ptr"])
def _norm_pairs_kernel(
    first_ptr,
    first_at_ptr,
    first_weight_ptr,
    second_ptr,
    second_at_ptr,
    second_weight_ptr,
    out_ptr,
    taken_ptr,
    eps,
    dim,
    BLOCK: tl.constexpr,
    FIRST_AT: tl.constexpr,
    SECOND_AT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a row of one of the two."""
    begin(DEPENDENT)
    index = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    at = index
    if side == 0:
        if FIRST_AT:
            at = tl.load(first_at_ptr + index)
        x = tl.load(first_ptr + at * dim + column, mask=inside, other=0.0)
        weight = tl.load(first_weight_ptr + column, mask=inside, other=0.0)
    else:
        if SECOND_AT:
            at = tl.load(second_at_ptr + index)
        x = tl.load(second_ptr + at * dim + column, mask=inside, other=0.0)
        weight = tl.load(second_weight_ptr + column, mask=inside, other=0.0)
        if SECOND_AT:
            tl.store(taken_ptr + index * dim + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
    normed = wide * scale * weight.to(tl.float32)
    tl.store(out_ptr + (index * 2 + side) * dim + column, normed.to(x.dtype), mask=inside)


@triton.jit
def _rope_store_kernel(
    qkv_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    positions,
    slots,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    k_scale_ptr,
    v_scale_ptr,
    eps,
    stride_qkv,
    stride_cos,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    stride_k_scale_page,
    stride_k_scale_slot,
    stride_v_scale_page,
    stride_v_scale_slot,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    MOST: tl.constexpr,  # largest code; 0: the cache is not of codes
    IS_INT8: tl.constexpr,
    SMALLEST: tl.constexpr,
    FINITE: tl.constexpr,  # largest number of the model's type
    DEPENDENT: tl.constexpr,
):
    """One program: one token, a block of its heads; q, k and v heads may meet in one block."""
    begin(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    # each element's partner half a head away is loaded too (from the L1 cache), which spares an exchange of registers
    partner = (dim + HEAD_DIM // 2) % HEAD_DIM
    source = qkv_ptr + token * stride_qkv + head[:, None] * HEAD_DIM
    rotated = (is_q | is_k)[:, None] & in_dim[None, :]
    raw = tl.load(source + dim[None, :], mask=(is_q | is_k | is_v)[:, None] & in_dim[None, :], other=0.0)
    x = raw.to(tl.float32)
    y = tl.load(source + partner[None, :], mask=rotated, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)
        q_weight = tl.load(q_weight_ptr + dim, mask=in_dim, other=0.0).to(tl.float32)
        k_weight = tl.load(k_weight_ptr + dim, mask=in_dim, other=0.0).to(tl.float32)
        q_weight_y = tl.load(q_weight_ptr + partner, mask=in_dim, other=0.0).to(tl.float32)
        k_weight_y = tl.load(k_weight_ptr + partner, mask=in_dim, other=0.0).to(tl.float32)
        x = x * scale[:, None] * tl.where(is_q[:, None], q_weight[None, :], k_weight[None, :])
        y = y * scale[:, None] * tl.where(is_q[:, None], q_weight_y[None, :], k_weight_y[None, :])
    position = tl.load(positions + token)
    cos = tl.load(cos_ptr + position * stride_cos + dim, mask=in_dim, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * stride_cos + dim, mask=in_dim, other=0.0).to(tl.float32)
    result = (x * cos[None, :] + y * sin[None, :]).to(raw.dtype)

    out_at = out_ptr + (token * NUM_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_at, result, mask=is_q[:, None] & in_dim[None, :])
    slot = tl.load(slots + token)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE  # 64 bits: a cache has more than 2^31 elements
    k_at = k_ptr + page * stride_k_page + offset * stride_k_slot + (head - NUM_HEADS)[:, None] * stride_k_head
    v_head = head - NUM_HEADS - NUM_KV_HEADS
    v_at = v_ptr + page * stride_v_page + offset * stride_v_slot + v_head[:, None] * stride_v_head
    # a mask multiplies by 0, which makes NaN of NaN: no token may put one where others look. A token that has some is
    # found by what its own residual makes of it.
    wide = tl.where(is_v[:, None], raw, result).to(tl.float32)
    wide = tl.where(wide == wide, tl.minimum(tl.maximum(wide, -FINITE), FINITE), 0.0)
    if MOST > 0:
        scale = tl.maximum(tl.max(tl.abs(wide), 1), SMALLEST) / MOST
        codes = wide / scale[:, None]
        # a division may round up, and not every conversion saturates
        codes = tl.minimum(tl.maximum(tl.floor(codes + 0.5) if IS_INT8 else codes, -MOST), MOST)
        k_new = codes.to(k_ptr.dtype.element_ty)
        v_new = k_new
        k_scale_at = k_scale_ptr + page * stride_k_scale_page + offset * stride_k_scale_slot + head - NUM_HEADS
        v_scale_at = v_scale_ptr + page * stride_v_scale_page + offset * stride_v_scale_slot + v_head
        tl.store(k_scale_at, scale, mask=is_k)
        tl.store(v_scale_at, scale, mask=is_v)
    else:
        k_new = wide.to(k_ptr.dtype.element_ty)
        v_new = k_new
    tl.store(k_at + dim[None, :], k_new, mask=is_k[:, None] & in_dim[None, :])
    tl.store(v_at + dim[None, :], v_new, mask=is_v[:, None] & in_dim[None, :])


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _gelu(x):
    """0.5 x (1 + tanh(u)) = x · sigmoid(2 u)."""
    twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 · sqrt(2 / pi)
    return x / (1.0 + tl.exp(-twice))


@triton.jit
def _activate_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    sums_ptr,
    dim,
    alpha,
    limit,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    CLAMPED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    FP8: tl.constexpr,
    SUMS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a part of a row, or where it becomes codes all of it."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    width = 2 * dim if GATED else dim
    gate = tl.load(x_ptr + row * width + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    if CLAMPED:
        every: tl.constexpr = tl.PropagateNan.ALL  # a row that is not a number has to stay so
        wide = tl.minimum(wide, limit, propagate_nan=every)
        active = wide * tl.sigmoid(alpha * wide)
    else:
        active = _gelu(wide) if GELU else _silu(wide)
    if GATED:
        up = tl.load(x_ptr + row * width + dim + column, mask=inside, other=0.0).to(tl.float32)
        if CLAMPED:
            up = tl.maximum(tl.minimum(up, limit, propagate_nan=every), -limit, propagate_nan=every) + 1
        active *= up
    result = active.to(gate.dtype)
    if QUANTIZE:
        store_row(result, out_ptr, scale_ptr, sums_ptr, row, dim, QUANTIZE, FP8, SUMS, BLOCK)
    else:
        tl.store(out_ptr + row * dim + column, result, mask=inside)


@triton.jit
def _head_input_kernel(
    hidden_ptr, block_out_ptr, out_ptr, dim, HEADS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)  # of R · H
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    hidden = tl.load(hidden_ptr + row // HEADS * dim + column, mask=inside, other=0.0)
    block_out = tl.load(block_out_ptr + row * dim + column, mask=inside, other=0.0)
    result = hidden.to(tl.float32) + _silu(block_out.to(tl.float32))
    tl.store(out_ptr + row * dim + column, result.to(hidden.dtype), mask=inside)
