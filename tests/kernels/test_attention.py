from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import DEVICE, INTERPRETED, TOLERANCE, relative_error

pytest.importorskip("triton")

from manyheads.kernels.attention import choose_splits, scratch_numel, tile_size, tile_table, tree_attention
from manyheads.kv_cache import CODES, quantize

KV_DTYPES = ["auto", *CODES]
TYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # whose tl.dot multiplies bfloat16's bits


@dataclass(frozen=True)
class Row:
    cached: int
    parents: list[int] | None  # of a tree's nodes, -1 for the root; None: a chain
    num_nodes: int

    def visible(self, i: int) -> list[int]:
        """Nodes that node i sees."""
        if self.parents is None:
            return list(range(i + 1))
        path = [i]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return sorted(path)

    def masks(self) -> list[int]:
        """One int64 a node, so bit 63 is the sign."""
        if self.parents is None:
            return [0] * self.num_nodes
        bits = [sum(1 << j for j in self.visible(i)) for i in range(self.num_nodes)]
        return [b - (1 << 64) if b >> 63 else b for b in bits]


def chain(cached: int, n: int) -> Row:
    return Row(cached, None, n)


def tree(cached: int, n: int, seed: int = 0) -> Row:
    random = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(0, i, (1,), generator=random)) for i in range(1, n)]
    return Row(cached, parents, n)


@dataclass(frozen=True)
class Batch:
    rows: list[Row]
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    row_start: Tensor
    cached_len: Tensor
    page_table: Tensor
    mask: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def max_nodes(self) -> int:
        return max(row.num_nodes for row in self.rows)

    def run(self, num_splits: int = 1, max_nodes: int | None = None, **more: Any) -> Tensor:
        """What the kernel makes of it; `more` are arguments of `tree_attention`."""
        return tree_attention(
            self.q,
            self.k_pages,
            self.v_pages,
            self.row_start,
            self.cached_len,
            self.page_table,
            self.mask,
            max_nodes=max_nodes or self.max_nodes,
            num_splits=num_splits,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
            **more,
        )

    def expected(self) -> Tensor:
        """Row by row in float64, over the positions that each token may see and nothing else."""
        _, num_heads, dim = self.q.shape
        page_size, per_kv = self.k_pages.shape[1], num_heads // self.k_pages.shape[2]
        k_pages, v_pages = self.k_pages.double(), self.v_pages.double()
        if self.k_scale is not None and self.v_scale is not None:
            k_pages, v_pages = k_pages * self.k_scale[..., None], v_pages * self.v_scale[..., None]
        out = torch.zeros(self.q.shape, dtype=torch.float64, device=self.q.device)
        start = 0
        for r, row in enumerate(self.rows):
            positions = torch.arange(row.cached + row.num_nodes, device=self.q.device)
            pages = self.page_table[r, positions // page_size]
            keys = k_pages[pages, positions % page_size].repeat_interleave(per_kv, dim=1)  # [L, H, d]
            values = v_pages[pages, positions % page_size].repeat_interleave(per_kv, dim=1)
            unseen = torch.ones(row.num_nodes, row.cached + row.num_nodes, dtype=torch.bool)
            unseen[:, : row.cached] = False
            for i in range(row.num_nodes):
                unseen[i, [row.cached + j for j in row.visible(i)]] = False
            q = self.q[start : start + row.num_nodes].double()
            scores = torch.einsum("nhd,lhd->hnl", q, keys) / math.sqrt(dim)
            weights = scores.masked_fill(unseen.to(q.device), -math.inf).softmax(2)
            out[start : start + row.num_nodes] = torch.einsum("hnl,lhd->nhd", weights, values)
            start += row.num_nodes
        return out

    def check(self, num_splits: int = 1, max_nodes: int | None = None) -> None:
        assert relative_error(self.run(num_splits, max_nodes), self.expected()) < TOLERANCE[self.q.dtype]


def batch(
    rows: list[Row],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    kv_dtype: str = "auto",
) -> Batch:
    """Pages scattered over a cache in which everything that no row owns is NaN; tables end in page 0, the dummy.

    The cache is a slice of one with layers, and q a slice of a fused projection: both are strided.
    """
    random = torch.Generator().manual_seed(seed)
    needed = [-(-(row.cached + row.num_nodes) // page_size) for row in rows]
    free = (1 + torch.randperm(sum(needed) + 3, generator=random)).tolist()
    cache = torch.full((2, len(free) + 1, page_size, kv_heads, dim), float("nan"))
    table = torch.zeros(len(rows), max(needed) + 2, dtype=torch.int64)
    for r, row in enumerate(rows):
        for page in range(needed[r]):
            table[r, page] = free.pop()
        positions = torch.arange(row.cached + row.num_nodes)
        content = torch.randn(2, len(positions), kv_heads, dim, generator=random)
        cache[:, table[r, positions // page_size], positions % page_size] = content
    lengths = [row.num_nodes for row in rows]
    row_start = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, dim, generator=random)
    layers = torch.stack((torch.full_like(cache, float("nan")), cache))
    scale: tuple[Tensor | None, Tensor | None] = (None, None)
    if kv_dtype == "auto":
        layers = layers.to(DEVICE, dtype)
    else:
        layers, scales = (x.to(DEVICE) for x in quantize(layers, CODES[kv_dtype]))  # the scales of what is NaN are NaN
        scale = (scales[1, 0], scales[1, 1])
    return Batch(
        rows=rows,
        q=qkv.to(DEVICE, dtype)[:, :heads],
        k_pages=layers[1, 0],
        v_pages=layers[1, 1],
        row_start=row_start.to(DEVICE),
        cached_len=torch.tensor([row.cached for row in rows]).to(DEVICE),
        page_table=table.to(DEVICE),
        mask=torch.tensor([m for row in rows for m in row.masks()], dtype=torch.int64).to(DEVICE),
        k_scale=scale[0],
        v_scale=scale[1],
    )


CASES = {
    "one token": [chain(5, 1)],
    "nothing cached": [chain(0, 1)],
    "a tree and nothing else": [tree(0, 16)],
    "plain rows, page borders": [chain(c, 1) for c in (0, 1, 15, 16, 17, 63, 64, 65, 300)],
    "prompt from its start": [chain(0, 200)],
    "prompt goes on in the middle of a page": [chain(77, 100)],
    "prompts around a block's border": [chain(c, 3) for c in range(60, 67)],
    "64 nodes": [tree(130, 64)],
    "trees, ragged": [tree(c, n, n) for c, n in ((0, 2), (31, 5), (32, 16), (250, 5), (64, 1))],
    "empty rows": [chain(20, 0), tree(9, 5), chain(0, 0), chain(30, 2), chain(3, 0)],
    "everything at once": [chain(40, 50), chain(0, 3), tree(113, 33), tree(48, 5), tree(500, 2), chain(12, 1)],
}


@pytest.mark.parametrize("num_splits", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_a_token_sees_its_prefix_and_its_ancestors(case: str, num_splits: int) -> None:
    batch(CASES[case], heads=2, kv_heads=1).check(num_splits)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (3, 1), (6, 2), (4, 1), (8, 2)])
def test_query_heads_share_key_heads(heads: int, kv_heads: int, num_splits: int) -> None:
    batch([tree(37, 7), chain(20, 12), chain(90, 1)], heads, kv_heads).check(num_splits)


PAIRS = [
    ("auto", torch.float32, 64, 1),
    ("auto", torch.float16, 128, 5),
    ("int8", torch.float32, 128, 5),
    ("int8", torch.float16, 64, 1),
    ("fp8", torch.float32, 64, 5),
    ("fp8", torch.float16, 128, 1),
]
"""Any two of a cache's type, a query's type, a dimension and a number of splits; a GPU tries all of them together."""


@pytest.mark.parametrize(
    ("kv_dtype", "dtype", "dim", "num_splits"), PAIRS if INTERPRETED else product(KV_DTYPES, TYPES, (64, 128), (1, 5))
)
def test_types_and_dimensions(kv_dtype: str, dtype: torch.dtype, dim: int, num_splits: int) -> None:
    batch([tree(150, 16), chain(3, 20), chain(200, 1)], dim=dim, dtype=dtype, kv_dtype=kv_dtype).check(num_splits)


@pytest.mark.parametrize("kv_dtype", CODES)
def test_values_of_any_magnitude(kv_dtype: str) -> None:
    """Weights times scales stay where halves have bits, and below their largest number."""
    for factor in (1e-3, 1e4):
        made = batch([tree(150, 16), chain(200, 1)], dtype=torch.float16, kv_dtype=kv_dtype)
        assert made.v_scale is not None
        made.v_scale.mul_(factor)
        made.check(2)


@pytest.mark.parametrize("page_size", [1, 8, 48, 256])
def test_pages_of_any_size(page_size: int) -> None:
    batch([tree(100, 5), chain(7, 40)], page_size=page_size).check(2)
    batch([tree(100, 5), chain(7, 40)], page_size=page_size, kv_dtype="int8").check(2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_random_mixtures(kv_dtype: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=random))

    rows = [tree(draw(200), (1, 2, 5, 16, 64)[draw(5)], seed) for _ in range(2)]
    rows += [chain(draw(100), 1 + draw(30)) for _ in range(2)]
    order = torch.randperm(4, generator=random).tolist()
    kv_heads = 1 + seed % 2
    made = batch([rows[i] for i in order], kv_heads * (1 + seed % 4), kv_heads, seed=seed, kv_dtype=kv_dtype)
    made.check((1, 2, 5)[seed % 3])


def test_a_chain_as_a_tree_is_the_same() -> None:
    """All 64 bits of a mask count, the sign too."""
    chained = batch([chain(50, 64)])
    row = Row(50, list(range(-1, 63)), 64)
    masked = batch([row])
    assert masked.mask[-1].item() == -1
    torch.testing.assert_close(masked.run(), chained.run())


def test_a_share_whose_first_block_a_node_does_not_see() -> None:
    """The second split starts at node 4, and node 50, child of the root, sees itself in the block after that one."""
    batch([Row(60, [-1] + [0] * 63, 64)], heads=1, kv_heads=1, dim=128).check(2)


def test_a_bound_above_the_longest_row_changes_nothing() -> None:
    made = batch([tree(70, 5), chain(3, 1)])
    made.check(1, max_nodes=64)
    made.check(2, max_nodes=64)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_dummy_rows_are_finite(num_splits: int) -> None:
    """Rows that pad a captured graph: nothing cached, all on the dummy page."""
    made = batch([tree(40, 5), chain(0, 5)])
    made.k_pages[0], made.v_pages[0] = 0, 0
    made.page_table[1] = 0
    out = made.run(num_splits)
    assert out.isfinite().all()
    assert not out[5:].any()


@pytest.mark.parametrize("num_splits", [1, 3])
def test_given_buffers_are_used(num_splits: int) -> None:
    made = batch([tree(140, 5), chain(30, 3)])
    wide = torch.full((8, 6, 16), float("nan"), device=DEVICE)
    scratch = torch.full((scratch_numel(8, 4, 16, num_splits) + 7,), float("nan"), device=DEVICE)
    out = made.run(num_splits, out=wide[:, 1:5], scratch=scratch)
    assert out.data_ptr() == wide[:, 1:5].data_ptr()
    assert relative_error(out, made.expected()) < 1e-5
    assert wide[:, 0].isnan().all()
    assert wide[:, 5].isnan().all()
    assert scratch[-7:].isnan().all()


def test_large_scores() -> None:
    made = batch([tree(100, 16), chain(30, 3)])
    made.q.mul_(300)
    for num_splits in (1, 2):
        assert relative_error(made.run(num_splits), made.expected()) < 1e-3


def test_no_tokens() -> None:
    made = batch([chain(5, 0)])
    assert made.run(max_nodes=1).shape == (0, 4, 16)


@pytest.mark.parametrize("per_kv", [1, 3])
def test_tiles_cover_all_queries_once_and_nothing_else(per_kv: int) -> None:
    lengths, block_m = [5, 0, 70, 16, 0, 1, 17, 0], 16
    row_start = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    table = tile_table(row_start, 120, 90, per_kv, block_m).tolist()  # bounds, as a recorded pass has them
    of_row = [-(-length * per_kv // block_m) for length in lengths]
    wanted = [row | tile << 16 for row, count in enumerate(of_row) for tile in reversed(range(count))]
    assert table[: len(wanted)] == wanted
    assert set(table[len(wanted) :]) == {-1}
    assert len(table) == min(8 * -(-90 * per_kv // block_m), 120 * per_kv // block_m + 8)


def test_a_row_that_pads_a_pass_has_no_more_tiles_than_others() -> None:
    """It holds the tokens that are left over, which may be more than a row brings."""
    row_start = torch.tensor([0, 3, 3, 300], dtype=torch.int32, device=DEVICE)
    assert tile_table(row_start, 300, 64, 1, 16).tolist() == [0, *(2 | tile << 16 for tile in (3, 2, 1, 0))] + [-1] * 7


def test_what_a_table_of_tiles_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"65537 rows of up to 1 tokens are too many"):
        tile_table(torch.zeros(65_538, dtype=torch.int32, device=DEVICE), 65_537, 1, 1, 16)
    with pytest.raises(ValueError, match=r"1 rows of up to 131073 tokens are too many"):
        tile_table(torch.zeros(2, dtype=torch.int32, device=DEVICE), 131_073, 131_073, 4, 16)


def test_tiles_are_as_large_as_what_rows_usually_bring() -> None:
    assert tile_size(64, 12, 1) == 16
    assert tile_size(32, 17, 1) == 32
    assert tile_size(16, 4, 4) == 16
    assert tile_size(64, 64, 8) == 128
    assert tile_size(512, 3, 1) == 128  # chains, of which one may be alone with all tokens
    assert tile_size(512, 3, 1, largest=64) == 64


def test_rows_of_more_nodes_than_usual() -> None:
    """64 nodes in tiles of 16."""
    made = batch([tree(70, 64), tree(9, 33), *(tree(20 + i, 2) for i in range(12))], heads=1, kv_heads=1)
    made.check(1)
    made.check(2)


def test_splits_fill_the_processors() -> None:
    assert choose_splits(8, 16, 100_000, 132) == 32
    assert choose_splits(8, 16, 1024, 132) == 8
    assert choose_splits(8, 16, 100, 132) == 1
    assert [choose_splits(rows * 32, 16, 8192, 132) for rows in (1, 4, 5, 8, 16)] == [8, 4, 3, 2, 1]
    assert [choose_splits(rows * 32, 16, 8192, 132, True) for rows in (1, 4, 8, 16, 64)] == [8, 8, 4, 2, 1]
    assert choose_splits(5 * 32, 64, 8192, 132) == 3  # two waves of thirds, and not one of wholes
    assert choose_splits(12 * 32, 16, 8192, 132) == 4  # three waves of quarters
    assert choose_splits(64 * 32, 16, 100_000, 132) == 1


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
class TestOnGpu:
    @pytest.mark.parametrize("num_splits", [1, 7, 32])
    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (32, 32, 128), (14, 2, 64), (6, 2, 128)])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("kv_dtype", KV_DTYPES)
    def test_large_mixtures(
        self, kv_dtype: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, num_splits: int
    ) -> None:
        rows = [tree(3000, 64), tree(1777, 33), chain(5000, 1), chain(0, 600), chain(900, 129), tree(0, 5)]
        batch(rows, heads, kv_heads, dim, dtype=dtype, kv_dtype=kv_dtype).check(num_splits)

    @pytest.mark.parametrize("num_splits", [1, 4])
    def test_a_captured_graph_reads_new_lengths(self, num_splits: int) -> None:
        shape = [tree(900, 16, 1), tree(1000, 16, 2)]
        first = batch(shape, 8, 2, 128, dtype=torch.float16)
        second = batch([tree(1000, 16, 3), tree(33, 16, 4)], 8, 2, 128, dtype=torch.float16, seed=1)
        out = first.run(num_splits)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = first.run(num_splits)
        used = second.page_table.shape[1]
        first.q.copy_(second.q)
        first.k_pages.fill_(float("nan"))[: len(second.k_pages)] = second.k_pages[: len(first.k_pages)]
        first.v_pages.fill_(float("nan"))[: len(second.v_pages)] = second.v_pages[: len(first.v_pages)]
        first.page_table[:, :used] = second.page_table[:, : first.page_table.shape[1]]
        first.mask.copy_(second.mask)
        first.cached_len.copy_(second.cached_len)
        graph.replay()
        assert relative_error(out, second.expected()) < TOLERANCE[torch.float16]

    def test_caches_beyond_32_bits(self) -> None:
        """The last page of 2^31 elements and more."""
        small = batch([tree(100, 16)], 8, 8, 128, dtype=torch.float16)
        page = small.k_pages[0].numel()
        num_pages = 2**31 // page + 200
        k_pages = torch.zeros((num_pages, *small.k_pages.shape[1:]), dtype=torch.float16, device=DEVICE)
        v_pages = torch.zeros_like(k_pages)
        k_pages[-len(small.k_pages) :], v_pages[-len(small.k_pages) :] = small.k_pages, small.v_pages
        table = small.page_table + num_pages - len(small.k_pages)
        out = tree_attention(
            small.q,
            k_pages,
            v_pages,
            small.row_start,
            small.cached_len,
            table,
            small.mask,
            max_nodes=16,
            num_splits=2,
        )
        assert relative_error(out, small.expected()) < TOLERANCE[torch.float16]
