"""Medusa heads as a drafter: each head guesses one depth, all of them from the same hidden state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from manyheads.batch import RowState
from manyheads.kv_cache import KVCache
from manyheads.models.config import ModelConfig
from manyheads.models.llama import Llama
from manyheads.models.parallel import shared_rows
from manyheads.speculation.drafter import DEFAULT_ACCEPTANCE, DrafterShape, Kept
from manyheads.speculation.medusa.checkpoint import read_heads
from manyheads.speculation.medusa.heads import MedusaHeads
from manyheads.speculation.tree import Tree

NUM_RANKS = 10
"""Candidates kept of each head."""


class MedusaDrafter:
    """H heads with K candidates each: C = H · K, head by head, the best first.

    What a head guesses does not depend on the path: a node of depth d and rank r holds candidate (d − 1) · K + r
    wherever it stands.
    """

    name = "medusa"
    passes_per_depth = 0
    offered = None
    prior_holds = False

    def __init__(self, heads: MedusaHeads, shape: DrafterShape, accuracy: list[list[float]] | None) -> None:
        """accuracy: by head and rank, as the heads' checkpoint has it."""
        self.heads, self.shape = heads, shape
        self._num_ranks = shape.num_candidates // shape.max_depth
        self._accuracy = accuracy

    @property
    def prior(self) -> list[list[float]]:
        table = self._accuracy or DEFAULT_ACCEPTANCE
        table = [*table, *[table[-1]] * self.shape.max_depth][: self.shape.max_depth]
        return [[*row, *[0.0] * self._num_ranks][: self._num_ranks] for row in table]

    def columns(self, tree: Tree) -> list[int]:
        return [0, *(1 + (len(choice) - 1) * self._num_ranks + choice[-1] for choice in tree.choices[1:])]

    def follow(self, candidates: list[int], tokens: list[int]) -> Iterator[list[int]]:
        for start in range(0, len(candidates), self._num_ranks):
            yield candidates[start : start + self._num_ranks]

    def attach(self, cache: KVCache) -> None:
        """The heads keep no K/V."""

    def admit(self, state: RowState, row: int, tokens: list[int]) -> None:
        """The heads read hidden states alone."""

    def observe(self, state: RowState, kept: Kept) -> None:
        """The heads keep nothing."""

    def propose(self, state: RowState, kept: Kept, depth: int, nodes: float) -> tuple[Tensor, Tensor]:
        candidates, chances = self.heads.candidates(kept.hidden, self._num_ranks)
        return candidates.flatten(1), chances.flatten(1)

    def memory_bytes(self) -> int:
        return self.heads.memory_bytes()


class MedusaSource:
    """Heads as read from a checkpoint."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Raises CheckpointError or ConfigError: the folder holds no heads, or none for this model."""
        self._weights = weights = read_heads(folder, model)
        depth, projections = len(weights.blocks), {id(p): p for p in weights.projections or []}
        num_tokens = model.vocab_size if weights.token_map is None else weights.token_map.numel()
        first, *later = (sum(w.numel() + b.numel() for w, b in layer) for layer in zip(*weights.blocks, strict=True))
        self.shape = DrafterShape(
            max_depth=depth,
            num_candidates=depth * min(NUM_RANKS, num_tokens),
            layer_weights=shared_rows(first, model.num_ranks) + sum(later),  # those are every rank's
            vocabulary_weights=sum(shared_rows(p.numel(), model.num_ranks) for p in projections.values()),
            row_logits=depth * num_tokens,
        )

    def build(self, model: Llama, dtype: torch.dtype, device: torch.device, quantization: str | None) -> MedusaDrafter:
        heads = MedusaHeads(self._weights, model, dtype, device, quantization)
        return MedusaDrafter(heads, self.shape, self._weights.accuracy)
