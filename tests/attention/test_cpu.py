from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.attention.cpu import CpuAttention
from manyheads.medusa.tree import Tree, chain_tensors, grow, tree_tensors

torch.set_num_threads(1)

CPU = torch.device("cpu")
ROOT = torch.ones(1, 1, dtype=torch.bool)


@dataclass(frozen=True)
class Rows:
    """Rows with one tree and the lengths of their caches."""

    ancestors: Tensor
    cached: list[int]


@dataclass(frozen=True)
class Step:
    backend: CpuAttention
    groups: list[Group]
    slots: Tensor
    cache: Tensor  # before the step
    q: Tensor
    k: Tensor
    v: Tensor

    def run(self, layer: int = 1) -> Tensor:
        self.backend.plan(self.groups, self.slots)
        return self.backend(layer, self.q, self.k, self.v)

    def expected(self, layer: int = 1) -> Tensor:
        """Token by token in float64, over the tokens that it may see and nothing else."""
        keys, values = self.cache[layer].double().flatten(1, 2)  # [slots, kv_heads, d]
        block_size, per_kv = self.cache.shape[3], self.q.shape[1] // self.k.shape[1]
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        for group in self.groups:
            for r, length in enumerate(group.cached_len.tolist()):
                first = group.start + r * group.num_nodes
                prefix = [
                    int(group.block_table[r, i // block_size]) * block_size + i % block_size for i in range(length)
                ]
                for i in range(group.num_nodes):
                    seen = [first + j for j in range(group.num_nodes) if group.ancestors[i, j]]
                    for h in range(self.q.shape[1]):
                        k = torch.cat((keys[prefix, h // per_kv], self.k[seen, h // per_kv].double()))
                        v = torch.cat((values[prefix, h // per_kv], self.v[seen, h // per_kv].double()))
                        scores = k @ self.q[first + i, h].double() / math.sqrt(self.q.shape[2])
                        out[first + i, h] = torch.softmax(scores, 0) @ v
        return out


def step(
    rows: list[Rows], heads: int = 4, kv_heads: int = 2, block_size: int = 4, slack: int = 2, seed: int = 0
) -> Step:
    """Pages scattered over a cache that is full of garbage; tables end in page 0, the dummy."""
    random = torch.Generator().manual_seed(seed)
    dim, num_pages = 8, 1 + sum(-(-(c + len(r.ancestors)) // block_size) for r in rows for c in r.cached) + 3
    cache = torch.randn(2, 2, num_pages, block_size, kv_heads, dim, generator=random) * 3
    free = (1 + torch.randperm(num_pages - 1, generator=random)).tolist()
    groups, slots, start = [], [], 0
    for part in rows:
        n, longest = len(part.ancestors), max(part.cached)
        table = torch.zeros(len(part.cached), -(-(longest + n) // block_size) + slack, dtype=torch.int64)
        for r, cached in enumerate(part.cached):
            for page in range(-(-(cached + n) // block_size)):
                table[r, page] = free.pop()
            slots += [int(table[r, i // block_size]) * block_size + i % block_size for i in range(cached, cached + n)]
        groups.append(Group(start, len(part.cached), n, part.ancestors, torch.tensor(part.cached), table, longest))
        start += n * len(part.cached)
    q, k, v = (torch.randn(start, h, dim, generator=random) for h in (heads, kv_heads, kv_heads))
    return Step(CpuAttention(cache, heads), groups, torch.tensor(slots), cache.clone(), q, k, v)


def random_tree(seed: int) -> Tensor:
    acceptance = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
    return tree_tensors(grow(acceptance.tolist(), 2 + seed)[0], 4, CPU).ancestors


def chain(n: int) -> Tensor:
    return chain_tensors(n, CPU).ancestors


BRANCHES = tree_tensors(Tree(((), (1,), (0,), (0, 0), (1, 0), (0, 0, 2))), 3, CPU).ancestors


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), atol=1e-5, rtol=1e-5)


CASES = {
    "one token": [Rows(ROOT, [5])],
    "nothing cached": [Rows(ROOT, [0])],
    "plain rows, ragged": [Rows(ROOT, [0, 1, 3, 4, 17])],
    "prompt from its start": [Rows(chain(9), [0])],
    "prompt goes on in the middle of a page": [Rows(chain(6), [7])],
    "branches": [Rows(BRANCHES, [10])],
    "branches, ragged, unsorted": [Rows(BRANCHES, [13, 0, 4, 6])],
    "a tree of rows to a page's end": [Rows(BRANCHES, [2, 6])],
    "everything at once": [Rows(chain(5), [3]), Rows(chain(9), [0]), Rows(BRANCHES, [2, 11]), Rows(ROOT, [1, 30])],
}


@pytest.mark.parametrize("case", CASES)
def test_a_token_sees_its_prefix_and_its_ancestors(case: str) -> None:
    made = step(CASES[case])
    close(made.run(), made.expected())


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (6, 3), (5, 1)])
def test_query_heads_share_key_heads(heads: int, kv_heads: int) -> None:
    made = step([Rows(BRANCHES, [3, 8]), Rows(chain(3), [5])], heads, kv_heads)
    close(made.run(), made.expected())


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_pages_of_any_size(block_size: int) -> None:
    made = step([Rows(BRANCHES, [0, 3, 17]), Rows(chain(4), [16])], block_size=block_size, slack=0)
    close(made.run(), made.expected())


@pytest.mark.parametrize("seed", range(12))
def test_random_mixtures(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def lengths(n: int) -> list[int]:
        return torch.randint(0, 20, (n,), generator=random).tolist()

    rows = [
        Rows(random_tree(seed), lengths(3)),
        Rows(random_tree(seed + 3), lengths(1)),
        Rows(chain(seed + 1), lengths(1)),
    ]
    made = step(rows, heads=4, kv_heads=1 + seed % 2, block_size=2 + seed % 4, seed=seed)
    close(made.run(), made.expected())


def test_the_result_is_written_to_its_slots_of_its_layer_only() -> None:
    made = step(CASES["everything at once"])
    made.run(layer=1)
    wanted = made.cache.clone()
    flat = wanted.flatten(2, 3)
    flat[1, 0, made.slots], flat[1, 1, made.slots] = made.k, made.v
    assert torch.equal(made.backend.cache, wanted)


def test_a_row_does_not_depend_on_the_others() -> None:
    """What a row gets alone, padded to itself, it gets beside longer rows."""
    made = step([Rows(BRANCHES, [3, 40, 9])])
    together = made.run()
    group = made.groups[0]
    alone = Group(0, 1, 6, BRANCHES, group.cached_len[:1], group.block_table[:1], 3)
    made.backend.plan([alone], made.slots[:6])
    close(made.backend(1, made.q[:6], made.k[:6], made.v[:6]), together[:6])


def test_a_bound_above_the_longest_row_changes_nothing() -> None:
    made = step([Rows(BRANCHES, [3, 5])], slack=4)
    group = made.groups[0]
    wide = Group(0, 2, 6, BRANCHES, group.cached_len, group.block_table, max_cached_len=20)
    made.backend.plan([wide], made.slots)
    close(made.backend(1, made.q, made.k, made.v), made.expected())


def test_steps_build_on_one_another() -> None:
    """A prompt in two chunks and a token after it: the same as all of it in one."""
    whole = step([Rows(chain(10), [0])])
    wanted = whole.run()
    parts = step([Rows(chain(10), [0])])
    table, done = parts.groups[0].block_table, []
    for first, end in ((0, 6), (6, 9), (9, 10)):
        n = end - first
        parts.backend.plan([Group(0, 1, n, chain(n), torch.tensor([first]), table, first)], parts.slots[first:end])
        done.append(parts.backend(0, parts.q[first:end], parts.k[first:end], parts.v[first:end]))
    close(torch.cat(done), wanted)
