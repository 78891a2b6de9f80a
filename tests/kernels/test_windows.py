"""Attention through windows, with capped scores, sinks and another scale, in float64 and by both backends' kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels import DEVICE, TOLERANCE, relative_error
from tests.kernels.test_attention import Batch, batch, chain, tree

pytest.importorskip("triton")

from manyheads.attention.base import Group, Heads
from manyheads.attention.torch import TorchAttention
from manyheads.attention.triton import TritonAttention
from manyheads.kv_cache import KVCache
from manyheads.models.rope import NO_ROPE


def positions(rows: Batch) -> Tensor:
    """Where tokens stand: at their depths behind the caches."""
    found = [row.cached + len(row.visible(i)) - 1 for row in rows.rows for i in range(row.num_nodes)]
    return torch.tensor(found, dtype=torch.int64, device=DEVICE)


def expected(rows: Batch, scale: float, softcap: float | None, window: int, sinks: Tensor | None = None) -> Tensor:
    """Row by row in float64; with a window, what nobody sees becomes NaN in the cache."""
    _, heads, _ = rows.q.shape
    page_size, per_kv = rows.k_pages.shape[1], heads // rows.k_pages.shape[2]
    out, start, at = torch.zeros(rows.q.shape, dtype=torch.float64, device=DEVICE), 0, positions(rows)
    for r, row in enumerate(rows.rows):
        slots = torch.arange(row.cached + row.num_nodes, device=DEVICE)
        pages = rows.page_table[r, slots // page_size]
        keys, values = (
            p.double()[pages, slots % page_size].repeat_interleave(per_kv, 1) for p in (rows.k_pages, rows.v_pages)
        )
        own = at[start : start + row.num_nodes]
        stands = torch.cat((torch.arange(row.cached, device=DEVICE), own))
        seen = torch.zeros(row.num_nodes, len(slots), dtype=torch.bool, device=DEVICE)
        seen[:, : row.cached] = True
        for i in range(row.num_nodes):
            seen[i, [row.cached + j for j in row.visible(i)]] = True
        seen &= own[:, None] - stands < window
        scores = torch.einsum("nhd,lhd->hnl", rows.q[start : start + row.num_nodes].double(), keys) * scale
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(~seen, -math.inf)
        beside = scores.new_empty(heads, row.num_nodes, 0)
        if sinks is not None:
            beside = sinks.double()[:, None, None].expand(-1, row.num_nodes, 1)
        weights = torch.cat((scores, beside), 2).softmax(2)[..., : len(slots)]
        out[start : start + row.num_nodes] = torch.einsum("hnl,lhd->nhd", weights, values)
        start += row.num_nodes
        behind = slots[~seen.any(0)]
        behind = behind[behind < row.cached]
        for cache in (rows.k_pages, rows.v_pages):
            cache[pages[behind], behind % page_size] = math.nan
    return out


ROWS = {
    "plain rows": [chain(c, 1) for c in (0, 65, 300)],
    "chunks": [chain(77, 20), chain(3, 5)],
    "trees": [tree(c, n, n) for c, n in ((31, 5), (150, 20))],
}


@pytest.mark.parametrize(
    ("rows", "window", "num_splits"),
    [
        ("plain rows", 1, 1),
        ("plain rows", 70, 3),
        ("chunks", 7, 1),
        ("chunks", 64, 2),
        ("trees", 3, 2),
        ("trees", 70, 1),
        ("trees", 1000, 1),
    ],
)
def test_a_window(rows: str, window: int, num_splits: int) -> None:
    made = batch(ROWS[rows])
    wanted = expected(made, 0.25, None, window)
    found = made.run(num_splits, window=window, positions=positions(made))
    assert relative_error(found, wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("scale", "softcap", "kv_dtype"),
    [(0.1, None, "auto"), (None, 0.5, "auto"), (3.0, 50.0, "auto"), (0.1, 2.0, "int8")],
)
def test_scale_and_cap(scale: float | None, softcap: float | None, kv_dtype: str) -> None:
    made = batch([chain(70, 3), tree(33, 9)], kv_dtype=kv_dtype)
    found = made.run(2, scale=scale, softcap=softcap)
    if made.k_scale is not None and made.v_scale is not None:
        plain = (made.k_pages.double() * made.k_scale[..., None], made.v_pages.double() * made.v_scale[..., None])
        made = Batch(made.rows, made.q, *plain, made.row_start, made.cached_len, made.page_table, made.mask)
    wanted = expected(made, made.q.shape[-1] ** -0.5 if scale is None else scale, softcap, 1000)
    assert relative_error(found, wanted) < (TOLERANCE[torch.float32] if kv_dtype == "auto" else 2e-3)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("name", ROWS)
def test_sinks_take_their_share_of_the_weights(name: str, num_splits: int) -> None:
    """One that is nearly all of it, one that is nothing, and of all splits it counts once; also where all else is 0."""
    made = batch(ROWS[name])
    sinks = torch.tensor([8.0, -50.0, 0.0, 1.5], device=DEVICE)
    for window in (0, 5):
        found = made.run(num_splits, sinks=sinks, window=window, positions=positions(made))
        wanted = expected(made, 0.25, None, window or 1000, sinks)
        assert relative_error(found, wanted) < TOLERANCE[torch.float32]
        assert float(wanted[:, 0].norm()) < 0.3 * float(wanted[:, 1].norm())


@pytest.mark.parametrize("backend", [TorchAttention, TritonAttention])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_backends_choose_by_layer(backend: type[TorchAttention] | type[TritonAttention], softcap: float | None) -> None:
    """Layers of three windows, two of them with sinks; rows of several lengths, in trees and in chunks, side by side in
    memory or not."""
    torch.manual_seed(0)
    heads, kv_heads, dim, page_size = 4, 2, 16, 4
    windows, sinks = {1: 3, 2: 9}, {0: torch.randn(heads, device=DEVICE), 2: torch.randn(heads, device=DEVICE) + 2}
    rope = NO_ROPE.table(400, dim, DEVICE, torch.float32)
    for rows in ([tree(30, 6), tree(33, 3)], [chain(20, 7), chain(0, 3)], [tree(50, 8)], [chain(41, 1)]):
        made = batch(rows, page_size=page_size, heads=heads, kv_heads=kv_heads)
        num_pages = made.k_pages.shape[0]
        cache = KVCache(torch.zeros(3, 2, num_pages, page_size, kv_heads, dim, device=DEVICE))
        cache.data[:, 0], cache.data[:, 1] = made.k_pages.nan_to_num(), made.v_pages.nan_to_num()
        attention = backend(
            cache,
            Heads(
                num_heads=heads,
                eps=1e-6,
                ropes=dict.fromkeys(range(3), rope),
                windows=windows,
                softcap=softcap,
                sinks=sinks,
            ),
        )
        at, slots, qkv, start = positions(made), [], [], 0
        for r, row in enumerate(rows):
            own = torch.arange(row.cached, row.cached + row.num_nodes)
            slots.append(made.page_table.cpu()[r, own // page_size] * page_size + own % page_size)
            planes = [plane.flatten(0, 1)[slots[-1].to(DEVICE)] for plane in (made.k_pages, made.v_pages)]
            qkv.append(torch.cat((made.q[start : start + row.num_nodes], *planes), dim=1))
            start += row.num_nodes
        group = Group(
            start=0,
            stop=start,
            row_start=made.row_start,
            bits=made.mask,
            cached_len=made.cached_len,
            page_table=made.page_table,
            max_tokens=made.max_nodes,
            max_cached_len=max(row.cached for row in rows),
            is_chain=rows[0].parents is None,
        )
        attention.plan([group], at, torch.cat(slots).to(DEVICE))
        for layer in range(3):
            found = attention(layer, torch.cat(qkv).flatten(1), None, None)
            copy = Batch(
                rows=rows,
                q=made.q,
                k_pages=cache.data[layer, 0].clone(),
                v_pages=cache.data[layer, 1].clone(),
                row_start=made.row_start,
                cached_len=made.cached_len,
                page_table=made.page_table,
                mask=made.mask,
            )
            wanted = expected(copy, dim**-0.5, softcap, windows.get(layer, 1000), sinks.get(layer))
            assert relative_error(found, wanted.flatten(1)) < 1e-5


@pytest.mark.parametrize("backend", [TorchAttention, TritonAttention])
def test_companions_are_where_the_others_look(backend: type[TorchAttention] | type[TritonAttention]) -> None:
    """Layers on pages of one group, and the same ones on companions of these: what they write and what they see."""
    torch.manual_seed(0)
    heads, kv_heads, dim, page_size = 4, 2, 16, 4
    settings = Heads(
        num_heads=heads,
        eps=1e-6,
        windows={0: 6, 2: 6},
        ropes=dict.fromkeys(range(3), NO_ROPE.table(400, dim, DEVICE, torch.float32)),
    )
    place = {0: 1, 1: 0, 2: 2}
    for rows in ([tree(30, 6), tree(33, 3)], [chain(20, 7), chain(0, 3)], [tree(50, 8)], [chain(41, 1)]):
        made = batch(rows, page_size=page_size, heads=heads, kv_heads=kv_heads)
        table, count, device = made.page_table, made.k_pages.shape[0], DEVICE
        companions = torch.zeros(2, 3 * count, dtype=torch.int64, device=device)
        companions[:, 1:count] = (count + torch.randperm(2 * count - 2, device=device)).view(2, -1)
        plain = KVCache(torch.randn(3, 2, count, page_size, kv_heads, dim, device=device))
        grouped = KVCache(
            torch.randn(1, 2, 3 * count, page_size, kv_heads, dim, device=device), None, ((1,), (0,), (2,)), companions
        )
        everywhere = torch.arange(count, device=device)
        where = [grouped.pages_in(place[layer], everywhere) for layer in range(3)]
        for layer in range(3):
            grouped.data[0, :, where[layer]] = plain.data[layer]
        own = [torch.arange(row.cached, row.cached + row.num_nodes, device=device) for row in rows]
        slots = torch.cat([table[r, at // page_size] * page_size + at % page_size for r, at in enumerate(own)])
        group = Group(
            start=0,
            stop=len(slots),
            row_start=made.row_start,
            bits=made.mask,
            cached_len=made.cached_len,
            page_table=table,
            max_tokens=made.max_nodes,
            max_cached_len=max(row.cached for row in rows),
            is_chain=rows[0].parents is None,
        )
        qkv = torch.randn(len(slots), (heads + 2 * kv_heads) * dim, device=device)
        backends = backend(plain, settings), backend(grouped, settings)
        for attention in backends:
            attention.plan([group], positions(made), slots)
        for layer in range(3):
            wanted, found = (attention(layer, qkv.clone(), None, None) for attention in backends)
            assert relative_error(found, wanted) < 1e-6
            torch.testing.assert_close(grouped.data[0, :, where[layer][1:]], plain.data[layer][:, 1:])
