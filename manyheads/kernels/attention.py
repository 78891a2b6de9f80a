"""Attention of rows that are trees or chains over a paged K/V cache, for NVIDIA GPUs from Turing on.

One kernel serves prompt chunks, plain decoding and speculating rows. Its grid depends on shapes that the host knows,
and lengths are read on the device, so that a CUDA graph may capture it and replay it with other lengths.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.kernels.dependent import begin, dependent

# A register's four codes to two registers of float16: of two pairs, the lower codes and the upper ones; else in order.
# In float16, 0x6400 is 1024, and what its last byte holds is added: codes of int8 plus 128 are put there.
_FP8_HALVES = tl.constexpr(
    """{
    .reg .b32 t, u;
    .reg .b16 lower, upper, none;
    prmt.b32 t, $2, 0, 0x4420;
    prmt.b32 u, $2, 0, 0x4431;
    mov.b32 {lower, none}, t;
    mov.b32 {upper, none}, u;
    cvt.rn.f16x2.e4m3x2 $0, lower;
    cvt.rn.f16x2.e4m3x2 $1, upper;
    }"""
)
_INT8 = """{
    .reg .b32 t, base;
    xor.b32 t, $2, 0x80808080;
    mov.b32 base, 0x64806480;
    prmt.b32 $0, t, 0x64646464, FIRST;
    prmt.b32 $1, t, 0x64646464, SECOND;
    sub.rn.f16x2 $0, $0, base;
    sub.rn.f16x2 $1, $1, base;
    }"""
_INT8_HALVES = tl.constexpr(_INT8.replace("FIRST", "0x4240").replace("SECOND", "0x4341"))
_INT8_WIDENED = tl.constexpr(_INT8.replace("FIRST", "0x4140").replace("SECOND", "0x4342"))

MAX_TREE_NODES = 64
"""One bit of a mask each."""

MAX_SPLITS = 32
MIN_SPLIT_LEN = 128
"""Positions; below this, the combining costs more than the splitting gains."""
MIN_SHARE = tl.constexpr(64)
"""Positions of a split; the host knows a bound for lengths, and rows may be far shorter."""
_PER_SM = {16: 4, 32: 2, 64: 2, 128: 1}
"""Programs that an SM holds, by queries in a tile; of a cache of codes, with blocks half as large, twice as many."""
_FEW_QUERIES = (64, 2)
"""Positions in a block and warps of tiles of 16 queries. They are bound by memory: small programs, of which others work
while one waits for what it copies, so that they need two stages. Those that widen codes have the longer arithmetic, and
copy the next ones meanwhile: three."""
_FEW_SPLITS = 8
"""More take longer to combine; they are for rows that leave SMs without a program."""

_USUAL_ROWS = 512
"""Tables for up to so many rows need one variant of their kernel."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_UNIT = tl.constexpr(64.0)
"""Weights times the scales of codes are far below 1, where halves have few bits left: so many times as large, they are
almost as large as values are, and never larger."""


def choose_splits(num_programs: int, block_m: int, max_len: int, num_sms: int, quantized: bool = False) -> int:
    """How many programs share a row's length, so that they are done soonest: few waves, each of short programs.

    Args:
        num_programs: tiles that hold queries, times kv heads.
        block_m: see `tile_size`.
        max_len: positions (cached and in flight) of the longest row; a bound will do.
        quantized: whether the cache is of codes.
    """
    slots = num_sms * _PER_SM[block_m] * (2 if quantized and block_m == 16 else 1)
    best, shortest = 1, float(-(-num_programs // slots))
    for splits in range(2, min(max_len // MIN_SPLIT_LEN, MAX_SPLITS) + 1):
        if splits > _FEW_SPLITS and num_programs * _FEW_SPLITS >= num_sms:
            break
        time = -(-num_programs * splits // slots) / splits
        if time < 0.9 * shortest:  # more to combine is not worth less
            best, shortest = splits, time
    return best


def tile_size(max_nodes: int, mean_nodes: int, queries_per_kv: int, largest: int = 128) -> int:
    """Queries in a tile: nodes times the query heads that share a kv head.

    tl.dot wants at least 16. A long prompt wants 128, so that K and V are read half as often. Trees want what a row
    brings on average, or most tiles would be mostly empty; the few rows that bring more take several.
    """
    usual = (max_nodes if max_nodes > MAX_TREE_NODES else mean_nodes) * queries_per_kv
    block_m = 128 if usual >= 512 else min(64, max(16, triton.next_power_of_2(usual)))
    return min(block_m, largest)


def largest_tile(device: torch.device, head_dim: int, element_size: int, quantized: bool) -> int:
    """The most queries in a tile that the device has room for; `quantized`: of a cache of codes."""
    largest, _, _ = _tuning(device, head_dim, element_size)
    # with tiles of 64, Triton 3.6 multiplies halves of narrower values wrongly
    return min(largest, 32) if quantized and head_dim < 128 else largest


def variants(queries_per_kv: int) -> list[tuple[int, int]]:
    """Tokens of a row, and splits, that need every variant of the kernels between them."""
    tokens = [max(1, block_m // queries_per_kv) for block_m in _PER_SM if block_m < 128] + [-(-512 // queries_per_kv)]
    return [(count, splits) for count in tokens for splits in (1, 2)] + [(1, 2**i) for i in range(2, 6)]


def tile_table(row_start: Tensor, num_tokens: int, max_nodes: int, queries_per_kv: int, block_m: int) -> Tensor:
    """The tiles that hold queries, one behind the other, so that no program is started for a tile without any.

    Args:
        row_start, num_tokens, max_nodes: as `tree_attention`'s, which takes the table in every layer.
        block_m: queries in a tile, as `tile_size` says.

    Returns:
        [tiles] int32, of each its row and, from bit 16 on, its number; a row's last ones first. -1 fills it up.

    Raises:
        ValueError: more rows, or tiles of a row, than its entries hold.
    """
    num_rows = row_start.shape[0] - 1
    of_row = -(-max_nodes * queries_per_kv // block_m)
    if num_rows > 1 << 16 or of_row > 1 << 15:
        raise ValueError(f"{num_rows} rows of up to {max_nodes} tokens are too many for one call")
    most = min(num_rows * of_row, num_tokens * queries_per_kv // block_m + num_rows)
    table = torch.empty(most, dtype=torch.int32, device=row_start.device)
    _tile_kernel[(1,)](
        row_start,
        table,
        num_rows,
        of_row,
        most,
        QUERIES_PER_KV=queries_per_kv,
        BLOCK_M=block_m,
        BLOCK=max(_USUAL_ROWS, triton.next_power_of_2(num_rows)),
        num_warps=4,
        **dependent(row_start.device),
    )
    return table


def scratch_numel(num_tokens: int, num_heads: int, head_dim: int, num_splits: int) -> int:
    """float32 elements of scratch that `tree_attention` needs."""
    return 0 if num_splits == 1 else num_splits * num_tokens * num_heads * (head_dim + 2)


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    row_start: Tensor,
    cached_len: Tensor,
    page_table: Tensor,
    mask: Tensor,
    *,
    max_nodes: int,
    num_splits: int,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int = 0,
    positions: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tiles: Tensor | None = None,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Every token attends to its row's cached prefix and to the in-flight nodes that it may see.

    The K/V of the in-flight tokens must be in the cache already: node i of row r at position cached_len[r] + i.

    Args:
        q: [T, H, d], rotated; d is a power of two from 16 on; any strides, but the last dimension contiguous.
        k_pages, v_pages: [pages, page size, KV, d], one layer of the cache; any strides, the last dimension contiguous.
        row_start: [R + 1] int32; tokens row_start[r] … row_start[r + 1] - 1 are row r's. Rows may be empty.
        cached_len: [R] int64, positions.
        page_table: [R, B] int64, page ids; covers cached_len + nodes positions.
        mask: [T] int64; bit j: node j of the row is visible (itself included, at most 64 nodes). 0 in all of a row's
            tokens: the row is a chain of any length.
        max_nodes: tokens of the longest row, or more.
        num_splits: programs that share a row's positions; above 1, their results meet in scratch.
        scale: of the products of queries and keys; None is d ** -0.5.
        softcap: scores s become softcap · tanh(s / softcap).
        sinks: [H] float32, of every head a score that takes its share of the weights, and gives no value.
        window: so many positions back a token sees, its own included; 0: to the beginning. Pages that nobody sees are
            not read, whatever the table says.
        positions: [T] int64, only needed with a window: where tokens stand in their texts, at cached_len and behind.
        k_scale, v_scale: [pages, page size, KV] float32, any strides; both or neither: the cache is of codes, to be
            multiplied with these (`kv_cache`).
        tiles: `tile_table` of these rows; None makes it.
        out: [T, H, d], written to and returned.
        scratch: float32, contiguous, at least `scratch_numel` elements.

    Returns:
        [T, H, d] of q's dtype. Tokens that belong to no row are undefined.
    """
    num_tokens, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_pages.shape[1], k_pages.shape[2]
    num_rows = cached_len.shape[0]
    if out is None:
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if num_tokens == 0 or num_rows == 0:
        return out
    queries_per_kv, log2_e = num_heads // num_kv_heads, _LOG2_E.value
    _, block_n, num_stages = _tuning(q.device, head_dim, q.element_size())
    largest = largest_tile(q.device, head_dim, q.element_size(), k_scale is not None)
    block_m = tile_size(max_nodes, -(-num_tokens // num_rows), queries_per_kv, largest)
    if tiles is None:
        tiles = tile_table(row_start, num_tokens, max_nodes, queries_per_kv, block_m)
    split = num_splits > 1
    num_warps = 8 if block_m == 128 else 4
    if block_m == 16 and num_stages == 3:
        (block_n, num_warps), num_stages = _FEW_QUERIES, 2 if k_scale is None else 3
    partial = out  # without splits it is never touched, but its type is part of what gets compiled
    if split:
        numel = scratch_numel(num_tokens, num_heads, head_dim, num_splits)
        partial = torch.empty(numel, dtype=torch.float32, device=q.device) if scratch is None else scratch
    _attend_kernel[(num_kv_heads, tiles.shape[0], num_splits)](
        q,
        k_pages,
        v_pages,
        out,
        partial,
        tiles,
        row_start,
        cached_len,
        page_table,
        mask,
        q if k_scale is None else k_scale,  # without codes they are never read
        q if v_scale is None else v_scale,
        row_start if positions is None else positions,  # nor this without a window
        q if sinks is None else sinks,
        num_tokens,
        num_splits,
        # scores are powers of 2; of those that are capped, the kernel takes what tanh is of, and gives the power
        (head_dim**-0.5 if scale is None else scale) * (log2_e if softcap is None else 2 * log2_e / softcap),
        0.0 if softcap is None else softcap * log2_e,
        window,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        k_pages.stride(0),
        k_pages.stride(1),
        k_pages.stride(2),
        v_pages.stride(0),
        v_pages.stride(1),
        v_pages.stride(2),
        *(k_scale.stride() if k_scale is not None else (0, 0, 0)),
        *(v_scale.stride() if v_scale is not None else (0, 0, 0)),
        page_table.stride(0),
        NUM_HEADS=num_heads,
        QUERIES_PER_KV=queries_per_kv,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SPLIT=split,
        QUANTIZED=k_scale is not None,
        CAPPED=softcap is not None,
        HAS_SINKS=sinks is not None,
        WINDOWED=window > 0,
        IN_REGISTERS=q.device.type == "cuda",
        num_warps=num_warps,
        num_stages=num_stages,
        **dependent(q.device),
    )
    if split:
        _combine_kernel[(num_tokens, num_heads)](
            partial,
            out,
            num_tokens,
            num_splits,
            out.stride(0),
            out.stride(1),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            SPLITS=triton.next_power_of_2(num_splits),
            num_warps=4 if num_splits > 8 else 1,
            **dependent(q.device),
        )
    return out


@lru_cache(maxsize=64)
def _tuning(device: torch.device, head_dim: int, element_size: int) -> tuple[int, int, int]:
    """(largest BLOCK_M, BLOCK_N, num_stages) that fit into registers and shared memory, found by compiling."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    row_bytes = head_dim * element_size
    if capability < (8, 0):
        # Triton leaves Turing's tensor cores alone: the products are plain FMAs, and hold their operands in registers
        return max(16, 4096 // row_bytes), 32, 2
    if row_bytes > 256:
        return 64, 32, 2  # float32, for tests
    # of 3 stages, one block's K and V are copied while another's are multiplied; of 2 they are not
    return 128, 64 if capability >= (9, 0) or row_bytes <= 128 else 32, 3


@triton.jit
def _attend_block(
    q,
    k_base,
    v_base,
    page,
    pos,
    node,
    mask,
    cached,
    end,
    m,
    denom,
    acc,
    acc_odd,
    scale,
    cap,
    at,
    at_base,
    window,
    lowest,
    stride_k_page,
    stride_k_slot,
    stride_v_page,
    stride_v_slot,
    k_scale_base,
    v_scale_base,
    stride_k_scale_page,
    stride_k_scale_slot,
    stride_v_scale_page,
    stride_v_scale_slot,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUANTIZED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """Online softmax over one block of positions; all of them are visible unless MASKED.

    q [M, d]; page, pos [N]; node, at, mask, m, denom [M]; acc [M, d], or of codes acc and acc_odd [M, d / 2].
    """
    dim = tl.arange(0, HEAD_DIM)
    value = tl.arange(0, HEAD_DIM // 2) if QUANTIZED else dim
    slot = pos.to(tl.uint32) % PAGE_SIZE
    page = page.to(tl.int64)  # page id · stride passes 2^31 elements in a cache of a few gigabytes
    if MASKED:
        # slots past the end are some other step's leftovers, perhaps NaN, and 0 · NaN is NaN: they must not be loaded
        inside = pos < end
        if WINDOWED:
            inside &= pos >= lowest
        k_at = k_base + (page * stride_k_page + slot * stride_k_slot)[:, None] + dim[None, :]
        v_at = v_base + (page * stride_v_page + slot * stride_v_slot)[:, None] + value[None, :]
        k = tl.load(k_at, mask=inside[:, None], other=0.0)
        v = tl.load(v_at, mask=inside[:, None], other=0)
    else:
        k = tl.load(k_base + (page * stride_k_page + slot * stride_k_slot)[:, None] + dim[None, :])
        v = tl.load(v_base + (page * stride_v_page + slot * stride_v_slot)[:, None] + value[None, :])
    if QUANTIZED:
        # codes are multiplied as they are, the scales of positions go to the scores and to the weights
        k = _widened(k, IN_REGISTERS).to(q.dtype)
        k_scale_at = k_scale_base + page * stride_k_scale_page + slot * stride_k_scale_slot
        v_scale_at = v_scale_base + page * stride_v_scale_page + slot * stride_v_scale_slot
        if MASKED:
            k_scale = tl.load(k_scale_at, mask=inside, other=0.0)
            v_scale = tl.load(v_scale_at, mask=inside, other=0.0)
        else:
            k_scale, v_scale = tl.load(k_scale_at), tl.load(v_scale_at)
    # ieee: says nothing to halves, and keeps float32 from being rounded to tf32
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if QUANTIZED:
        scores *= k_scale[None, :]
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right at both ends; the scale holds 2 / softcap and log2(e)
        scores = cap - 2 * cap / (tl.exp2(scores) + 1)
    if MASKED:
        other = pos - cached  # node at this position; negative in the prefix
        # a shift by less than 0 or more than 63 is undefined; an arithmetic shift of bit 63 copies it, so keep one bit
        bit = tl.minimum(tl.maximum(other, 0), 63).to(tl.int64)
        branch = ((mask[:, None] >> bit[None, :]) & 1) != 0
        chain = (mask == 0)[:, None] & (other[None, :] <= node[:, None])
        visible = ((other < 0)[None, :] | branch | chain) & inside[None, :]
        if WINDOWED:
            # a node of a tree stands where its depth says, and its slot behind those of other branches
            place = tl.load(at_base + tl.maximum(other, 0), mask=inside & (other >= 0), other=0).to(tl.int32)
            place = tl.where(other < 0, pos, place)
            visible &= at[:, None] - place[None, :] < window
        scores = tl.where(visible, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    # a query that has seen nothing yet has the maximum -inf, and -inf - -inf is NaN
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(scores - shift[:, None])
    alpha = tl.exp2(m - shift)
    denom = denom * alpha + tl.sum(p, 1)
    if QUANTIZED:
        even, odd = _halves(v, k_base.dtype.element_ty, IN_REGISTERS)
        p = (p * (v_scale[None, :] * _UNIT)).to(q.dtype)
        acc = tl.dot(p, even.to(q.dtype), acc * alpha[:, None], input_precision="ieee")
        acc_odd = tl.dot(p, odd.to(q.dtype), acc_odd * alpha[:, None], input_precision="ieee")
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, denom, acc, acc_odd


@triton.jit
def _widened(code, IN_REGISTERS: tl.constexpr):
    """Codes as float16. Left to itself, the compiler takes int8 one by one."""
    if IN_REGISTERS and code.dtype == tl.int8:
        return tl.inline_asm_elementwise(_INT8_WIDENED, "=r,=r,r", [code], dtype=tl.float16, is_pure=True, pack=4)
    return code.to(tl.float16)


@triton.jit
def _halves(pair, dtype: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """The lower and the upper byte of int16, each a code of a dtype, as float16."""
    if IN_REGISTERS:
        return tl.inline_asm_elementwise(
            _INT8_HALVES if dtype == tl.int8 else _FP8_HALVES,
            "=r,=r,r",
            [pair],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    lower, upper = (pair & 255).to(tl.uint8), ((pair >> 8) & 255).to(tl.uint8)
    return lower.to(dtype, bitcast=True).to(tl.float16), upper.to(dtype, bitcast=True).to(tl.float16)


# Values that change from step to step must not be specialized on, or serving would stop to compile.
@triton.jit(
    do_not_specialize=["num_tokens", "num_splits", "stride_table"],
    do_not_specialize_on_alignment=["tiles", "row_start", "cached_len", "page_table", "token_mask", "position_ptr"],
)
def _attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    tiles,
    row_start,
    cached_len,
    page_table,
    token_mask,
    k_scale_ptr,
    v_scale_ptr,
    position_ptr,
    sink_ptr,
    num_tokens,
    num_splits,
    scale,
    cap,
    window,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    stride_k_scale_page,
    stride_k_scale_slot,
    stride_k_scale_head,
    stride_v_scale_page,
    stride_v_scale_slot,
    stride_v_scale_head,
    stride_table,
    NUM_HEADS: tl.constexpr,
    QUERIES_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    QUANTIZED: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WINDOWED: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: a tile of a row's queries, one kv head, one share of the positions."""
    begin(DEPENDENT)
    kv_head = tl.program_id(0)
    split = tl.program_id(2)
    entry = tl.load(tiles + tl.program_id(1))
    if entry < 0:
        return
    row = (entry & 0xFFFF).to(tl.int64)
    tile = entry >> 16
    first_token = tl.load(row_start + row).to(tl.int64)
    num_nodes = (tl.load(row_start + row + 1).to(tl.int64) - first_token).to(tl.int32)

    # query heads that share a kv head stand side by side in the tile, so that K and V are read once for all of them
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    node = query // QUERIES_PER_KV
    head = kv_head * QUERIES_PER_KV + query % QUERIES_PER_KV
    real = node < num_nodes
    token = first_token + node
    mask = tl.load(token_mask + token, mask=real, other=0)
    dim = tl.arange(0, HEAD_DIM)
    q_at = q_ptr + (token * stride_q_token + head * stride_q_head)[:, None] + dim[None, :]
    q = tl.load(q_at, mask=real[:, None], other=0.0)

    # what all queries of the tile see, and what at least one sees: a chain's nodes see no later ones
    cached = tl.load(cached_len + row).to(tl.int32)
    is_chain = tl.load(token_mask + first_token) == 0
    first_node = tile * BLOCK_M // QUERIES_PER_KV
    last_node = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // QUERIES_PER_KV, num_nodes - 1)
    seen_by_all = cached + tl.where(is_chain, first_node + 1, 0)
    end = cached + tl.where(is_chain, last_node + 1, num_nodes)

    # of a window, what nobody sees any more, and what all see still; a chain's later nodes see less of the beginning
    unit: tl.constexpr = max(BLOCK_N, MIN_SHARE)
    lowest = 0
    seen_from = 0
    all_from = 0
    at = node
    at_base = position_ptr + first_token
    if WINDOWED:
        at = tl.load(position_ptr + token, mask=real, other=0).to(tl.int32)
        lowest = tl.maximum(tl.min(tl.where(real, at, end), 0) + 1 - window, 0)
        seen_from = lowest // unit * unit
        all_from = tl.maximum(tl.max(at, 0) + 1 - window, 0)

    # Shares are whole blocks, so that blocks of one split never overlap the next one's. A late share may be empty.
    share = tl.cdiv(tl.cdiv(end - seen_from, num_splits), unit) * unit
    low = tl.minimum(seen_from + split * share, end)
    high = tl.minimum(low + share, end)
    # whole blocks that need no mask; the few before and behind them do
    begun = low
    if WINDOWED:
        begun = tl.minimum(tl.maximum(tl.cdiv(all_from, BLOCK_N) * BLOCK_N, low), high)
    unmasked = tl.maximum(tl.minimum(seen_by_all, high) // BLOCK_N * BLOCK_N, begun)

    k_base = k_ptr + kv_head * stride_k_head
    v_base = v_ptr + kv_head * stride_v_head
    k_scale_base = k_scale_ptr + kv_head * stride_k_scale_head
    v_scale_base = v_scale_ptr + kv_head * stride_v_scale_head
    table = page_table + row * stride_table
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    denom = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SINKS:  # of all shares, the first one begins with what takes a weight and gives nothing
        sink = tl.load(sink_ptr + head) * _LOG2_E
        m = tl.where(split == 0, sink, m)
        denom = tl.where(split == 0, 1.0, denom)
    # Tensor cores want a value's positions side by side. What turns V's rows on the way to them turns 16 bits at least,
    # and so codes are read in pairs.
    width: tl.constexpr = HEAD_DIM // 2 if QUANTIZED else HEAD_DIM
    acc = tl.zeros((BLOCK_M, width), tl.float32)
    acc_odd = acc
    if QUANTIZED:
        v_base = v_base.to(tl.pointer_type(tl.int16))
        stride_v_page //= 2
        stride_v_slot //= 2
    offset = tl.arange(0, BLOCK_N)
    # A block's pages are looked up a block ahead: K and V whose addresses come from the same iteration would be copied
    # after its arithmetic, and overlap none.
    page = tl.load(table + tl.minimum(low + offset, end - 1).to(tl.uint32) // PAGE_SIZE)
    if WINDOWED:
        for start in range(low, begun, BLOCK_N):
            next_page = tl.load(table + tl.minimum(start + BLOCK_N + offset, end - 1).to(tl.uint32) // PAGE_SIZE)
            m, denom, acc, acc_odd = _attend_block(
                q, k_base, v_base, page, start + offset, node, mask, cached, end, m, denom, acc, acc_odd, scale, cap,
                at, at_base, window, lowest, stride_k_page, stride_k_slot, stride_v_page, stride_v_slot,
                k_scale_base, v_scale_base, stride_k_scale_page, stride_k_scale_slot,
                stride_v_scale_page, stride_v_scale_slot,
                PAGE_SIZE, HEAD_DIM, QUANTIZED, CAPPED, True, True, IN_REGISTERS,
            )  # fmt: skip
            page = next_page
    for start in range(begun, unmasked, BLOCK_N):
        next_page = tl.load(table + tl.minimum(start + BLOCK_N + offset, end - 1).to(tl.uint32) // PAGE_SIZE)
        m, denom, acc, acc_odd = _attend_block(
            q, k_base, v_base, page, start + offset, node, mask, cached, end, m, denom, acc, acc_odd, scale, cap,
            at, at_base, window, lowest, stride_k_page, stride_k_slot, stride_v_page, stride_v_slot,
            k_scale_base, v_scale_base, stride_k_scale_page, stride_k_scale_slot,
            stride_v_scale_page, stride_v_scale_slot,
            PAGE_SIZE, HEAD_DIM, QUANTIZED, CAPPED, False, False, IN_REGISTERS,
        )  # fmt: skip
        page = next_page
    for start in range(unmasked, high, BLOCK_N):
        next_page = tl.load(table + tl.minimum(start + BLOCK_N + offset, end - 1).to(tl.uint32) // PAGE_SIZE)
        m, denom, acc, acc_odd = _attend_block(
            q, k_base, v_base, page, start + offset, node, mask, cached, end, m, denom, acc, acc_odd, scale, cap,
            at, at_base, window, lowest, stride_k_page, stride_k_slot, stride_v_page, stride_v_slot,
            k_scale_base, v_scale_base, stride_k_scale_page, stride_k_scale_slot,
            stride_v_scale_page, stride_v_scale_slot,
            PAGE_SIZE, HEAD_DIM, QUANTIZED, CAPPED, True, WINDOWED, IN_REGISTERS,
        )  # fmt: skip
        page = next_page

    if QUANTIZED:
        acc = tl.reshape(tl.join(acc, acc_odd), (BLOCK_M, HEAD_DIM)) * (1 / _UNIT)
    if SPLIT:
        # partial: acc [splits, T, H, d], then m [splits, T, H], then denom [splits, T, H]
        index = (split * num_tokens.to(tl.int64) + token) * NUM_HEADS + head
        stats = partial_ptr + num_splits * num_tokens.to(tl.int64) * NUM_HEADS * HEAD_DIM
        tl.store(stats + index, m, mask=real)
        tl.store(stats + num_splits * num_tokens.to(tl.int64) * NUM_HEADS + index, denom, mask=real)
        # where nothing was seen, the combining does not look
        tl.store(partial_ptr + index[:, None] * HEAD_DIM + dim[None, :], acc, mask=(real & (denom > 0))[:, None])
    else:
        acc = acc / tl.where(denom == 0, 1.0, denom)[:, None]
        out_at = out_ptr + (token * stride_out_token + head * stride_out_head)[:, None] + dim[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["num_rows", "of_row", "most"], do_not_specialize_on_alignment=["row_start"])
def _tile_kernel(
    row_start,
    table,
    num_rows,
    of_row,
    most,
    QUERIES_PER_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: all rows."""
    begin(DEPENDENT)
    row = tl.arange(0, BLOCK)
    inside = row < num_rows
    first = tl.load(row_start + row, mask=inside, other=0)
    num_nodes = tl.load(row_start + row + 1, mask=inside, other=0) - first
    # NOTE: a row that pads a recorded pass may hold more tokens than max_nodes, and nobody wants what they see
    count = tl.minimum(tl.cdiv(num_nodes * QUERIES_PER_KV, BLOCK_M), of_row)
    stop = tl.cumsum(count, 0)
    for tile in range(of_row):
        # a prompt's last tiles see the most: they start first, so that no long program is left over at the end
        tl.store(table + stop - 1 - tile, row | (tile << 16), mask=tile < count)
    total = tl.sum(count, 0)
    for start in range(0, most, BLOCK):
        at = start + row
        tl.store(table + at, tl.full((BLOCK,), -1, tl.int32), mask=(at >= total) & (at < most))


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def _combine_kernel(
    partial_ptr,
    out_ptr,
    num_tokens,
    num_splits,
    stride_out_token,
    stride_out_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: one head of one token; softmax over the splits' partial results."""
    begin(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, HEAD_DIM)
    split = tl.arange(0, SPLITS)  # a power of two
    size = num_tokens.to(tl.int64) * NUM_HEADS  # of one split
    index = split * size + token * NUM_HEADS + head
    stats = partial_ptr + num_splits * size * HEAD_DIM
    m = tl.load(stats + index, mask=split < num_splits, other=float("-inf"))
    # a split that saw nothing has written neither acc nor a finite maximum
    seen = m > float("-inf")
    denom = tl.load(stats + num_splits * size + index, mask=seen, other=0.0)
    acc = tl.load(partial_ptr + index[:, None] * HEAD_DIM + dim[None, :], mask=seen[:, None], other=0.0)
    largest = tl.max(m, 0)
    weight = tl.where(seen, tl.exp2(m - tl.where(largest == float("-inf"), 0.0, largest)), 0.0)
    total = tl.sum(weight * denom, 0)
    result = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    out_at = out_ptr + token * stride_out_token + head * stride_out_head + dim
    tl.store(out_at, result.to(out_ptr.dtype.element_ty))
