"""Both backends, token by token against float64; the Triton one in its interpreter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from manyheads.attention.base import AttentionBackend, Group
from manyheads.attention.torch import TorchAttention
from manyheads.medusa import tree as trees
from manyheads.medusa.tree import Tree, TreeTensors, chain_tensors, grow, tree_tensors
from manyheads.models.config import ModelConfig
from tests.kernels import INTERPRETED

torch.set_num_threads(1)

CPU = torch.device("cpu")
DIM, EPS, POSITIONS = 16, 1e-3, 200
backend_class: type[TorchAttention] = TorchAttention


@pytest.fixture(autouse=True, params=["torch", "triton"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test with each backend."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if not INTERPRETED:
            pytest.skip("with a GPU the kernels are compiled, and these tests are about CPU tensors")
        from manyheads.attention.triton import TritonAttention

        monkeypatch.setattr(f"{__name__}.backend_class", TritonAttention)


@dataclass(frozen=True)
class Rows:
    """Rows with one tree and the lengths of their caches."""

    tree: TreeTensors
    cached: list[int]


@dataclass(frozen=True)
class Step:
    backend: AttentionBackend
    groups: list[Group]
    positions: Tensor
    slots: Tensor
    cache: Tensor  # before the step
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
        return rotated(q, self.positions, self.backend.rope), rotated(k, self.positions, self.backend.rope)

    def expected(self, layer: int = 1) -> Tensor:
        """Token by token in float64, over the tokens that it may see and nothing else."""
        keys, values = self.cache[layer].double().flatten(1, 2)  # [slots, kv_heads, d]
        block_size, per_kv = self.cache.shape[3], self.q.shape[1] // self.k.shape[1]
        queries, new = self.prepared()
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        for group in self.groups:
            for r, length in enumerate(group.cached_len.tolist()):
                first = group.start + r * group.num_nodes
                prefix = [
                    int(group.block_table[r, i // block_size]) * block_size + i % block_size for i in range(length)
                ]
                for i in range(group.num_nodes):
                    seen, node = [first + i], i
                    while node:
                        node = int(group.tree.parent[node])
                        seen.append(first + node)
                    for h in range(self.q.shape[1]):
                        k = torch.cat((keys[prefix, h // per_kv], new[seen, h // per_kv]))
                        v = torch.cat((values[prefix, h // per_kv], self.v[seen, h // per_kv].double()))
                        scores = k @ queries[first + i, h] / math.sqrt(self.q.shape[2])
                        out[first + i, h] = torch.softmax(scores, 0) @ v
        return out


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


def model_config(heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=16,
        hidden_size=heads * DIM,
        intermediate_size=16,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=DIM,
        rms_norm_eps=EPS,
        rope_theta=10.0,
        rope_scaling=None,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        eos_token_ids=(),
        dtype=torch.float32,
    )


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
    num_pages = 1 + sum(-(-(c + r.tree.num_nodes) // block_size) for r in rows for c in r.cached) + 3
    cache = torch.randn(2, 2, num_pages, block_size, kv_heads, DIM, generator=random) * 3
    free = (1 + torch.randperm(num_pages - 1, generator=random)).tolist()
    width = max(-(-(max(r.cached) + r.tree.num_nodes) // block_size) for r in rows) + slack
    groups, positions, slots, start = [], [], [], 0
    for part in rows:
        n, longest = part.tree.num_nodes, max(part.cached)
        table = torch.zeros(len(part.cached), width, dtype=torch.int64)
        for r, cached in enumerate(part.cached):
            for page in range(-(-(cached + n) // block_size)):
                table[r, page] = free.pop()
            slots += [int(table[r, i // block_size]) * block_size + i % block_size for i in range(cached, cached + n)]
            positions += [cached + d for d in part.tree.depth.tolist()]
        groups.append(Group(start, len(part.cached), part.tree, torch.tensor(part.cached), table, longest))
        start += n * len(part.cached)
    q, k, v = (torch.randn(start, h, DIM, generator=random) for h in (heads, kv_heads, kv_heads))
    weights = (torch.randn(DIM, generator=random) + 1, torch.randn(DIM, generator=random) + 1) if norms else None
    backend = backend_class(cache, model_config(heads, kv_heads), rope or no_rotation())
    return Step(backend, groups, torch.tensor(positions), torch.tensor(slots), cache.clone(), q, k, v, weights)


def random_tree(seed: int) -> TreeTensors:
    acceptance = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
    return tree_tensors(grow(acceptance.tolist(), 2 + seed)[0], 4, CPU)


def chain(n: int) -> TreeTensors:
    return chain_tensors(n, CPU)


ROOT = tree_tensors(trees.ROOT, 3, CPU)
BRANCHES = tree_tensors(Tree(((), (1,), (0,), (0, 0), (1, 0), (0, 0, 2))), 3, CPU)


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


@pytest.mark.parametrize("norms", [False, True], ids=["no norms", "norms"])
@pytest.mark.parametrize("case", ["plain rows, ragged", "branches, ragged, unsorted", "everything at once"])
def test_queries_and_keys_are_normed_and_rotated_by_their_position(case: str, norms: bool) -> None:
    made = step(CASES[case], rope=rotation(), norms=norms)
    before = made.q.clone(), made.k.clone()
    close(made.run(), made.expected())
    assert torch.equal(made.q, before[0])
    keys = made.backend.cache[1, 0].flatten(0, 1)[made.slots]
    close(keys, made.prepared()[1])
    assert not torch.allclose(keys, made.k)


def test_keys_and_values_are_written_to_their_slots_of_their_layer_only() -> None:
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
    alone = Group(0, 1, BRANCHES, group.cached_len[:1], group.block_table[:1], 3)
    close(part(made, alone, 0, 6).run(), together[:6])


def part(made: Step, group: Group, first: int, end: int) -> Step:
    """Some of its tokens, as a step of their own."""
    tokens = (x[first:end] for x in (made.positions, made.slots))
    qkv = (x[first:end] for x in (made.q, made.k, made.v))
    return Step(made.backend, [group], *tokens, made.cache, *qkv)


def test_a_bound_above_the_longest_row_changes_nothing() -> None:
    made = step([Rows(BRANCHES, [3, 5])], slack=4)
    group = made.groups[0]
    wide = Group(0, 2, BRANCHES, group.cached_len, group.block_table, max_cached_len=20)
    close(part(made, wide, 0, 12).run(), made.expected())


def test_a_bound_above_a_single_row_changes_nothing() -> None:
    """Its pages may lie side by side; what is past its last token is not seen."""
    for tree in (ROOT, BRANCHES, chain(3)):
        made = step([Rows(tree, [5])], block_size=16)
        group = made.groups[0]
        group.block_table[:] = 1 + torch.arange(group.block_table.shape[1])
        slots = 16 + torch.arange(5, 5 + tree.num_nodes)
        bounded = Group(0, 1, tree, group.cached_len, group.block_table, max_cached_len=30)
        wide = Step(made.backend, [bounded], made.positions, slots, made.cache, made.q, made.k, made.v)
        close(wide.run(), wide.expected())


def test_steps_build_on_one_another() -> None:
    """A prompt in two chunks and a token after it: the same as all of it in one."""
    whole = step([Rows(chain(10), [0])], rope=rotation())
    wanted = whole.run()
    parts = step([Rows(chain(10), [0])], rope=rotation())
    table, done = parts.groups[0].block_table, []
    for first, end in ((0, 6), (6, 9), (9, 10)):
        group = Group(0, 1, chain(end - first), torch.tensor([first]), table, first)
        done.append(part(parts, group, first, end).run(layer=0))
    close(torch.cat(done), wanted)
