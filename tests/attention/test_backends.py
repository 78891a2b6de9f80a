"""Both backends, token by token against float64; the Triton one in its interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from manyheads.attention.base import AttentionBackend, Group, Heads
from manyheads.attention.native import NativeAttention
from manyheads.attention.torch import TorchAttention
from manyheads.kv_cache import CODES, KVCache, quantize
from manyheads.native.layers import library
from manyheads.speculation.tree import ROOT, Tree, grow
from tests.kernels import INTERPRETED
from tests.trees import medusa_tensors

torch.set_num_threads(1)

CPU = torch.device("cpu")
DIM, EPS, POSITIONS = 16, 1e-3, 600
backend_class: Callable[[KVCache, Heads], TorchAttention] = TorchAttention
kv_dtype = torch.float32


@pytest.fixture(autouse=True, params=["auto", *CODES])
def _kv_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test with each kind of cache."""
    monkeypatch.setattr(f"{__name__}.kv_dtype", CODES.get(request.param, torch.float32))


@pytest.fixture(autouse=True, params=["torch", "native", "triton"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _kv_dtype: None) -> None:
    """Runs every test with each backend."""
    if request.param == "native":
        layers = library()
        if layers is None:
            pytest.skip("there is no C compiler")
        if kv_dtype != torch.float32:
            pytest.skip("caches in 8 bits are torch's")
        monkeypatch.setattr(f"{__name__}.backend_class", partial(NativeAttention, layers=layers))
    if request.param == "triton":
        pytest.importorskip("triton")
        if kv_dtype == torch.float8_e4m3fn:
            pytest.skip("tests/kernels/test_attention.py has this type, and the interpreter takes its time")
        if not INTERPRETED:
            pytest.skip("with a GPU the kernels are compiled, and these tests are about CPU tensors")
        from manyheads.attention.triton import TritonAttention

        monkeypatch.setattr(f"{__name__}.backend_class", TritonAttention)


@dataclass(frozen=True)
class Rows:
    """A group: the rows' trees and the lengths of their caches."""

    trees: list[Tree]
    cached: list[int]
    is_chain: bool = False

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(tree.num_nodes for tree in self.trees)]

    @property
    def num_tokens(self) -> int:
        return self.starts[-1]

    @property
    def max_nodes(self) -> int:
        return max(tree.num_nodes for tree in self.trees)

    def group(self, start: int, table: Tensor, max_tokens: int | None = None, max_cached: int | None = None) -> Group:
        known = [] if self.is_chain else [medusa_tensors(tree, 4, CPU).bits for tree in self.trees]
        return Group(
            start=start,
            stop=start + self.num_tokens,
            row_start=torch.tensor(self.starts, dtype=torch.int32),
            bits=torch.cat(known) if known else torch.zeros(self.num_tokens, dtype=torch.int64),
            cached_len=torch.tensor(self.cached),
            page_table=table,
            max_tokens=max_tokens or self.max_nodes,
            max_cached_len=max_cached or max(self.cached),
            is_chain=self.is_chain,
        )


def same(tree: Tree, cached: list[int]) -> Rows:
    return Rows([tree] * len(cached), cached)


def chain(n: int, cached: int) -> Rows:
    """A chunk of a prompt."""
    return Rows([Tree(tuple((0,) * depth for depth in range(n)))], [cached], is_chain=True)


@dataclass(frozen=True)
class Step:
    backend: AttentionBackend
    rows: list[Rows]
    groups: list[Group]  # of these rows
    positions: Tensor
    slots: Tensor
    cache: KVCache  # before the step
    q: Tensor
    k: Tensor
    v: Tensor
    norms: tuple[Tensor, Tensor] | None = None

    def run(self, layer: int = 1) -> Tensor:
        """[T, heads, dim]"""
        self.backend.plan(self.groups, self.positions, self.slots)
        q_norm, k_norm = self.norms or (None, None)
        qkv = torch.cat((self.q, self.k, self.v), dim=1).flatten(1)
        return self.backend(layer, qkv, q_norm, k_norm).view(self.q.shape)

    def prepared(self) -> tuple[Tensor, Tensor]:
        """Queries and keys in float64 with norms and rotation, from their definitions."""
        q, k = self.q.double(), self.k.double()
        if self.norms is not None:
            q, k = (
                x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w.double()
                for x, w in zip((q, k), self.norms, strict=True)
            )
        return rotated(q, self.positions, self.backend.heads.ropes[0]), rotated(
            k, self.positions, self.backend.heads.ropes[0]
        )

    def expected(self, layer: int = 1) -> Tensor:
        """Token by token in float64, over the tokens that it may see and nothing else.

        To be called after the step: a cache in 8 bits says what its K/V have become.
        """
        keys, values = wide(self.cache)[layer].flatten(1, 2)  # [slots, kv_heads, d]
        block_size, per_kv = self.cache.data.shape[3], self.q.shape[1] // self.k.shape[1]
        queries, new = self.prepared()
        new_values = self.v.double()
        if self.cache.scale is not None:
            new, new_values = wide(self.backend.cache)[layer].flatten(1, 2)[:, self.slots]
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        first = 0
        for part, group in zip(self.rows, self.groups, strict=True):
            for r, (tree, length) in enumerate(zip(part.trees, part.cached, strict=True)):
                prefix = [
                    int(group.page_table[r, i // block_size]) * block_size + i % block_size for i in range(length)
                ]
                for i, choice in enumerate(tree.choices):
                    above = [j for j, other in enumerate(tree.choices) if choice[: len(other)] == other]
                    seen = [first + j for j in above]
                    for h in range(self.q.shape[1]):
                        k = torch.cat((keys[prefix, h // per_kv], new[seen, h // per_kv]))
                        v = torch.cat((values[prefix, h // per_kv], new_values[seen, h // per_kv]))
                        scores = k @ queries[first + i, h] / math.sqrt(self.q.shape[2])
                        out[first + i, h] = torch.softmax(scores, 0) @ v
                first += tree.num_nodes
        return out


def wide(cache: KVCache) -> Tensor:
    """[layers, 2, pages, page size, kv_heads, d] float64, what a cache stands for."""
    return cache.data.double() * (1 if cache.scale is None else cache.scale.double()[..., None])


def rotated(x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Each pair (i, i + DIM / 2) turned by its angle: [T, heads, DIM]."""
    cos, sin = (
        table[positions, :, DIM // 2 :].double() for table in rope
    )  # of the second half, where sin has its sign
    a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def no_rotation() -> tuple[Tensor, Tensor]:
    return torch.ones(POSITIONS, 1, DIM), torch.zeros(POSITIONS, 1, DIM)


def rotation() -> tuple[Tensor, Tensor]:
    angle = torch.arange(POSITIONS)[:, None] / 10.0 ** torch.arange(DIM // 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def step(
    rows: list[Rows],
    heads: int = 4,
    kv_heads: int = 2,
    block_size: int = 4,
    slack: int = 2,
    seed: int = 0,
    rope: tuple[Tensor, Tensor] | None = None,
    norms: bool = False,
) -> Step:
    """Pages scattered over a cache that is full of garbage; tables end in page 0, the dummy."""
    random = torch.Generator().manual_seed(seed)
    lengths = [c + tree.num_nodes for part in rows for tree, c in zip(part.trees, part.cached, strict=True)]
    num_pages = 1 + sum(-(-length // block_size) for length in lengths) + 3
    garbage = torch.randn(2, 2, num_pages, block_size, kv_heads, DIM, generator=random) * 3
    data, scale = (garbage, None) if kv_dtype == torch.float32 else quantize(garbage, kv_dtype)
    cache, before = KVCache(data, scale), KVCache(data.clone(), None if scale is None else scale.clone())
    free = (1 + torch.randperm(num_pages - 1, generator=random)).tolist()
    width = -(-max(lengths) // block_size) + slack
    groups, positions, slots, start = [], [], [], 0
    for part in rows:
        table = torch.zeros(len(part.cached), width, dtype=torch.int64)
        for r, (tree, cached) in enumerate(zip(part.trees, part.cached, strict=True)):
            end = cached + tree.num_nodes
            for page in range(-(-end // block_size)):
                table[r, page] = free.pop()
            slots += [int(table[r, i // block_size]) * block_size + i % block_size for i in range(cached, end)]
            positions += [cached + len(choice) for choice in tree.choices]
        groups.append(part.group(start, table))
        start = groups[-1].stop
    q, k, v = (torch.randn(start, h, DIM, generator=random) for h in (heads, kv_heads, kv_heads))
    weights = (torch.randn(DIM, generator=random) + 1, torch.randn(DIM, generator=random) + 1) if norms else None
    backend = backend_class(
        cache, Heads(num_heads=heads, eps=EPS, ropes=dict.fromkeys(range(len(cache.data)), rope or no_rotation()))
    )
    return Step(backend, rows, groups, torch.tensor(positions), torch.tensor(slots), before, q, k, v, weights)


def random_tree(seed: int) -> Tree:
    acceptance = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
    return grow(acceptance.tolist(), 2 + seed)[0]


BRANCHES = Tree(((), (1,), (0,), (0, 0), (1, 0), (0, 0, 2)))
THREE = Tree(((), (0,), (1,)))
NINE = Tree(((), (0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0)))


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), atol=1e-5, rtol=1e-5)


def as_kept(found: Tensor, wanted: Tensor) -> None:
    """Entries of the cache [..., d] are those that were to be written, as near as its type holds them."""
    most = wanted.abs().amax(-1, keepdim=True)
    step = {torch.float32: 1e-6 * most, torch.int8: most / 127, torch.float8_e4m3fn: wanted.abs() / 8 + most / 2**18}
    assert bool(((found - wanted).abs() <= 0.501 * step[kv_dtype]).all())


CASES = {
    "one token": [same(ROOT, [5])],
    "nothing cached": [same(ROOT, [0])],
    "plain rows, ragged": [same(ROOT, [0, 1, 3, 4, 17])],
    "prompt from its start": [chain(9, 0)],
    "prompt goes on in the middle of a page": [chain(6, 7)],
    "branches": [same(BRANCHES, [10])],
    "branches, ragged, unsorted": [same(BRANCHES, [13, 0, 4, 6])],
    "a tree of rows to a page's end": [same(BRANCHES, [2, 6])],
    "everything at once": [chain(5, 3), chain(9, 0), same(BRANCHES, [2, 11]), same(ROOT, [1, 30])],
    "1, 3 and 9 nodes": [Rows([ROOT, THREE, NINE], [4, 6, 9])],
    "9, 1, 3 and 1 nodes": [Rows([NINE, ROOT, THREE, ROOT], [0, 7, 7, 8])],
    "few nodes on a long cache": [Rows([NINE, NINE, ROOT], [1, 3, 12])],
    "many nodes on a long cache": [Rows([ROOT, THREE, ROOT, NINE], [0, 5, 2, 31])],
    "1, 3 and 9 nodes beside prompts": [chain(7, 2), Rows([THREE, NINE, ROOT], [3, 4, 5]), Rows([NINE, ROOT], [8, 9])],
    "caches of very different lengths": [Rows([NINE, ROOT, THREE, ROOT, NINE], [0, 3, 130, 270, 290])],
    "caches of very different lengths, unsorted": [Rows([ROOT, NINE, THREE, NINE], [300, 0, 280, 10])],
    "caches of very different lengths, one token each": [same(ROOT, [1, 140, 300])],
    "a long row alone": [Rows([THREE, NINE], [2, 300])],
}


@pytest.mark.parametrize("case", CASES)
def test_a_token_sees_its_prefix_and_its_ancestors(case: str) -> None:
    made = step(CASES[case])
    close(made.run(), made.expected())


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (6, 3), (5, 1)])
def test_query_heads_share_key_heads(heads: int, kv_heads: int) -> None:
    made = step([same(BRANCHES, [3, 8]), chain(3, 5), Rows([ROOT, NINE], [2, 4])], heads, kv_heads)
    close(made.run(), made.expected())


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_pages_of_any_size(block_size: int) -> None:
    made = step([Rows([BRANCHES, ROOT, NINE], [0, 3, 17]), chain(4, 16)], block_size=block_size, slack=0)
    close(made.run(), made.expected())


@pytest.mark.parametrize(
    ("_kv_dtype", "seed"),
    [("auto", seed) for seed in range(12)] + [(name, seed) for name in CODES for seed in range(3)],
    indirect=["_kv_dtype"],
)
def test_random_mixtures(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def lengths(n: int) -> list[int]:
        return torch.randint(0, 20, (n,), generator=random).tolist()

    def some_trees(n: int) -> list[Tree]:
        return [random_tree(i) for i in torch.randint(0, 14, (n,), generator=random).tolist()]

    rows = [
        Rows(some_trees(3), lengths(3)),
        Rows(some_trees(1), lengths(1)),
        Rows(some_trees(5), lengths(5)),
        chain(seed + 1, *lengths(1)),
    ]
    made = step(rows, heads=4, kv_heads=1 + seed % 2, block_size=2 + seed % 4, seed=seed)
    close(made.run(), made.expected())


@pytest.mark.parametrize("norms", [False, True], ids=["no norms", "norms"])
@pytest.mark.parametrize("case", ["plain rows, ragged", "1, 3 and 9 nodes", "everything at once"])
def test_queries_and_keys_are_normed_and_rotated_by_their_position(case: str, norms: bool) -> None:
    made = step(CASES[case], rope=rotation(), norms=norms)
    before = made.q.clone(), made.k.clone()
    close(made.run(), made.expected())
    assert torch.equal(made.q, before[0])
    keys = wide(made.backend.cache)[1, 0].flatten(0, 1)[made.slots]
    as_kept(keys, made.prepared()[1])
    assert not torch.allclose(keys, made.k.double(), rtol=0.1, atol=0.1)


def test_keys_and_values_are_written_to_their_slots_of_their_layer_only() -> None:
    made = step([*CASES["everything at once"], *CASES["9, 1, 3 and 1 nodes"]])
    made.run(layer=1)
    old, new = wide(made.cache).flatten(2, 3), wide(made.backend.cache).flatten(2, 3)
    as_kept(new[1, :, made.slots], torch.stack((made.k, made.v)))
    new[1, :, made.slots] = old[1, :, made.slots]
    assert torch.equal(new, old)


def test_a_row_does_not_depend_on_the_others() -> None:
    """What a row gets alone, padded to itself, it gets beside longer rows, and rows of more nodes."""
    made = step([Rows([BRANCHES, NINE, ROOT, THREE], [3, 4, 40, 9])])
    together = made.run()
    starts = made.rows[0].starts
    for r, (tree, cached) in enumerate(zip(made.rows[0].trees, made.rows[0].cached, strict=True)):
        table = made.groups[0].page_table[r : r + 1]
        alone = part(made, Rows([tree], [cached]), table, starts[r], starts[r + 1])
        close(alone.run(), together[starts[r] : starts[r + 1]])


def part(made: Step, rows: Rows, table: Tensor, first: int, end: int, **bounds: int) -> Step:
    """Some of its tokens, as a step of their own."""
    tokens = (x[first:end] for x in (made.positions, made.slots))
    qkv = (x[first:end] for x in (made.q, made.k, made.v))
    return Step(made.backend, [rows], [rows.group(0, table, **bounds)], *tokens, made.cache, *qkv)


def test_bounds_above_the_longest_row_change_nothing() -> None:
    made = step([Rows([BRANCHES, ROOT], [3, 5])], slack=12)
    wide = part(made, made.rows[0], made.groups[0].page_table, 0, 7, max_cached=20, max_tokens=32)
    close(wide.run(), made.expected())


def test_bounds_above_a_single_row_change_nothing() -> None:
    """Its pages may lie side by side; what is past its last token is not seen."""
    for rows in (same(ROOT, [5]), same(BRANCHES, [5]), same(NINE, [0]), chain(3, 5)):
        made = step([rows], block_size=16)
        table, cached = made.groups[0].page_table, rows.cached[0]
        table[:] = 1 + torch.arange(table.shape[1])
        slots = 16 + torch.arange(cached, cached + rows.num_tokens)
        bounded = rows.group(0, table, max_tokens=9, max_cached=30)
        wide = Step(made.backend, [rows], [bounded], made.positions, slots, made.cache, made.q, made.k, made.v)
        close(wide.run(), wide.expected())


def test_steps_build_on_one_another() -> None:
    """A prompt in two chunks and a token after it: the same as all of it in one."""
    whole = step([chain(10, 0)], rope=rotation())
    wanted = whole.run()
    parts = step([chain(10, 0)], rope=rotation())
    table, done = parts.groups[0].page_table, []
    for first, end in ((0, 6), (6, 9), (9, 10)):
        done.append(part(parts, chain(end - first, first), table, first, end).run(layer=0))
    close(torch.cat(done), wanted)
