"""The seam for drafters: what guesses the tokens that the target model then checks.

A drafter fills a row's *candidates*: C tokens, each with a chance, in an order of its own. A tree's nodes say by
`columns` which candidate they hold. So candidates may be independent of each other (Medusa: node (0, 2) and node (1, 2)
hold the same one) or belong to the path that leads to them (then each node has a candidate of its own). The tree, its
verification and the planner know nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from manyheads.attention.base import Group
from manyheads.batch import RowState
from manyheads.kv_cache import KVCache
from manyheads.speculation.tree import Choice, Tree

if TYPE_CHECKING:
    from manyheads.models.llama import Llama

DEFAULT_ACCEPTANCE = [
    [0.56, 0.12, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
    [0.53, 0.11, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
    [0.53, 0.10, 0.05, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
    [0.50, 0.09, 0.05, 0.03, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
]
"""Acceptance by depth and rank to start from where a drafter brings no statistics. It has the shape that is published
for Vicuna-7B's heads: chains of best candidates hold for 1, 2, 3 tokens with probability 0.56, 0.30, 0.16. What is
observed replaces it."""


@dataclass(frozen=True, eq=False)
class Chain:
    """Tokens that a step's forward pass computed and that stand in their rows' texts for good, row after row; for
    drafters that read what the base's layers made of them, and keep K/V of them."""

    group: Group  # of the rows, as attention wants it, from token 0 on
    states: Tensor  # [T, k, hidden], the inputs of the layers in `DrafterShape.base_layers`
    following: Tensor  # [T] int64, the token that stands behind each of them
    position: Tensor  # [T] int64, of the tokens themselves
    slots: Tensor  # [T] int64, cache slots


@dataclass(frozen=True, eq=False)
class Kept:
    """What a step kept of R rows, as a drafter reads it to guess what comes next."""

    index: Tensor  # [R] int64, slots of the row state
    hidden: Tensor  # [R, hidden], after the base's final norm, of each row's last accepted token
    tokens: Tensor  # [R, W] int64, the tokens that each row gained
    gained: Tensor  # [R, 1] int64, how many of them hold
    chains: tuple[Chain, ...] = ()
    """All that has come to stand in texts, of rows whose prompts go on, too; () unless the drafter reads it."""
    last: Tensor | None = None
    """[R] int64, where the last token of each row stands among those of the chains."""


@dataclass(frozen=True)
class DrafterShape:
    """What a drafter takes, known before anything is loaded."""

    max_depth: int
    """Depth of its deepest candidates: tokens that it can guess beyond the root."""
    num_candidates: int
    """C, candidates that a row keeps."""
    layer_weights: int = 0
    """Numbers in its weights that count as a layer's."""
    vocabulary_weights: int = 0
    """Numbers in its projections to a vocabulary, beside the base model's."""
    row_logits: int = 0
    """Logits that it computes for a row."""
    token_scratch: int = 0
    """Bytes that it computes with for each token that a row may hold."""
    kv_layers: int = 0
    """Layers of K/V that it keeps in the base's pages, behind the base's own layers."""
    base_layers: tuple[int, ...] = ()
    """The base's layers whose inputs it reads (n, of n layers, is what the last one gives): it is told of every token
    (`Kept.chains`)."""
    scratch_tokens: int = 0
    """Tokens of a row, behind its text, of which it keeps K/V while it guesses."""
    nodes_within: tuple[int, ...] = ()
    """By depth, where each costs passes: nodes of its deepest tree that are no deeper, the root included."""
    row_state: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    """Shape and type of what it keeps for each row beside its candidates (`RowState.drafter`), by name."""


class Drafter(Protocol):
    """Guesses for every row, on the device, from what a step kept of it."""

    name: str
    """Its kind: `manyheads_drafter_info` on /metrics."""
    shape: DrafterShape
    passes_per_depth: int
    """Passes that it runs one after another for each depth of a tree; 0 where all depths come at once."""

    prior_holds: bool
    """Whether one step says little of its guesses, since they depend on the place in the text: then what `prior`
    promises fades slowly, and does not give way to the first step."""

    @property
    def offered(self) -> frozenset[Choice] | None:
        """The nodes for which it has candidates; None for any of so many ranks at each depth."""

    @property
    def prior(self) -> list[list[float]]:
        """Acceptance by depth and rank to start from: how often the candidate of a rank is right once its parent is."""

    def columns(self, tree: Tree) -> list[int]:
        """For each node, the root first, the column of a row's draft that it holds: 0 is the row's last token, 1 + c
        its candidate c."""

    def follow(self, candidates: list[int], tokens: list[int]) -> Iterator[list[int]]:
        """What was offered on the way that the text took, depth by depth: the candidates by rank.

        Args:
            candidates: the row's C.
            tokens: what came out.
        """

    def attach(self, cache: KVCache) -> None:
        """Told of the cache that its `kv_layers` are the last layers of, before anything runs."""

    def admit(self, state: RowState, row: int, tokens: list[int]) -> None:
        """A row begins, or begins again, with these known tokens."""

    def observe(self, state: RowState, kept: Kept) -> None:
        """Take in what a step kept; comes after every step, before `propose` if that comes at all.

        NOTE: a recorded step replays this and `propose`: shapes must not depend on what the tensors hold, and nothing
        may wait for the device.
        """

    def propose(self, state: RowState, kept: Kept, depth: int, nodes: float) -> tuple[Tensor, Tensor]:
        """Candidates for the next trees of rows, which are `depth` deep at most and have `nodes` nodes on average.

        Returns:
            [R, C] int64, and [R, C] float32, the chance of each, given that its parent holds; 0 is no guess. The last
            dimension of both is contiguous.
        """

    def memory_bytes(self) -> int:
        """Bytes of its own weights."""


class DrafterSource(Protocol):
    """A drafter that was found and read, and is not on the device yet."""

    shape: DrafterShape

    def build(self, model: Llama, dtype: torch.dtype, device: torch.device, quantization: str | None) -> Drafter:
        """Put it beside its base model."""
