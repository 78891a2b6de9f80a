"""Rows with random drafts, and what an operation's result says of them in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from manyheads.batch import RowState, Trees
from manyheads.kv_cache import CODES, KVCache
from manyheads.ops.torch import TorchOps
from manyheads.speculation.tree import Choice, Tree
from tests.trees import medusa_tensors

CPU = torch.device("cpu")
HEADS, RANKS, ROWS, MAX_LEN = 4, 3, 5, 40
OPS = TorchOps()


@dataclass(frozen=True)
class Case:
    """Rows that share a tree, and how many tokens they bring in all."""

    tree: Tree
    rows: list[int]
    share: float
    """Of the nodes below the roots, as many are brought."""
    page_size: int
    padding: int
    """Dummy rows beside them."""
    seed: int
    levels: int = 0
    """So many different chances there are, 0 among them; 0 is any."""
    vocab: int = 50
    kv_dtype: torch.dtype | None = None
    """Of a cache in 8 bits."""

    def state(self) -> RowState:
        """Every row filled, each with pages of its own, scattered; page 0 is the dummy's."""
        random = torch.Generator().manual_seed(self.seed)
        state = RowState(ROWS, MAX_LEN, self.page_size, HEADS * RANKS, self.vocab, CPU)
        state.cached_len[:] = torch.randint(0, MAX_LEN, (ROWS + 1,), generator=random)
        state.cached_len[-1] = 0
        state.drafts[:] = torch.randint(0, self.vocab, state.drafts.shape, generator=random)
        pages = state.page_table[:-1]
        pages[:] = 1 + torch.randperm(pages.numel(), generator=random).view(pages.shape)
        chances = state.chances[:-1, 1:]
        chances[:] = torch.rand(chances.shape, generator=random)
        if self.levels:
            chances[:] = (chances * self.levels).floor() / max(self.levels - 1, 1)
        return state

    def cache(self, state: RowState, kv_heads: int = 2, dim: int = 3) -> KVCache:
        """No two entries alike, nor two scales; in 8 bits, two neighbours."""
        shape = torch.Size((2, 2, state.page_table[:-1].numel() + 1, self.page_size, kv_heads))
        data = torch.arange(shape.numel() * dim, dtype=torch.float32).view(*shape, dim)
        if self.kv_dtype is None:
            return KVCache(data)
        return KVCache((data % 119).to(self.kv_dtype), torch.arange(shape.numel(), dtype=torch.float32).view(shape))

    def expand(self, state: RowState) -> Trees:
        tree = medusa_tensors(self.tree, RANKS, CPU)
        sizes = torch.arange(len(self.index), len(self.index) * tree.num_nodes + 1)
        return OPS.expand(state, torch.tensor(self.index), tree, self.num_tokens, sizes)

    @property
    def index(self) -> list[int]:
        return self.rows + [ROWS] * self.padding

    @property
    def num_tokens(self) -> int:
        return len(self.index) + int(self.share * len(self.index) * (self.tree.num_nodes - 1))

    def value(self, state: RowState, r: int, choice: Choice) -> float:
        """The probability of a node."""
        chances = state.chances[self.index[r], 1:].view(HEADS, RANKS)
        return math.prod(float(chances[depth, rank]) for depth, rank in enumerate(choice))

    def token(self, state: RowState, r: int, choice: Choice) -> int:
        draft = state.drafts[self.index[r]].tolist()
        return draft[0] if choice == () else draft[1 + RANKS * (len(choice) - 1) + choice[-1]]

    def slot(self, state: RowState, r: int, place: int) -> int:
        row, size = self.index[r], self.page_size
        position = int(state.cached_len[row]) + place
        return int(state.page_table[row, position // size]) * size + position % size


def brought(case: Case, trees: Trees) -> list[list[Choice]]:
    """The nodes of each row's tokens, in order."""
    found: list[list[Choice]] = [[] for _ in case.index]
    for row, node in zip(trees.row.tolist(), trees.node.tolist(), strict=True):
        found[row].append(case.tree.choices[node])
    return found


def taken(case: Case, trees: Trees) -> list[list[Choice]]:
    """The nodes that each row may accept."""
    return [[c for c, t in zip(case.tree.choices, row, strict=True) if t] for row in trees.taken.tolist()]


@st.composite
def cases(draw: st.DrawFn, vocab: int = 50) -> Case:
    choices: list[Choice] = [()]
    for _ in range(draw(st.integers(0, 63))):
        parent = draw(st.sampled_from([c for c in choices if len(c) < HEADS]))
        choice = (*parent, draw(st.integers(0, RANKS - 1)))
        if choice not in choices:
            choices.append(choice)
    return Case(
        Tree(tuple(choices)),
        draw(st.permutations(range(ROWS)))[: draw(st.integers(1, ROWS))],
        draw(st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1))),
        draw(st.integers(1, 5)),
        draw(st.integers(0, 2)),
        draw(st.integers(0, 99)),
        draw(st.integers(0, 4)),
        vocab,
        draw(st.sampled_from([None, *CODES.values()])),
    )
