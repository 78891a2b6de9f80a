"""What an engine tells of itself: where memory goes, and counts."""

from __future__ import annotations

import msgspec


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """The engine tells where the memory of its device goes, in bytes."""

    weights: int = 0
    heads: int = 0
    kv_cache: int = 0
    graphs: int = 0
    """CUDA graphs take this, with what their steps compute in."""
    rest: int = 0
    """Row state and scratch take this, with the process itself: CUDA's context or, on a CPU, Python's libraries."""
    kv_cache_tokens: int = 0
    """The K/V cache holds so many tokens of context."""

    @property
    def total(self) -> int:
        """Sum all parts, in bytes."""
        return self.weights + self.heads + self.kv_cache + self.graphs + self.rest


class AdapterStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine counts these for each adapter, with the meanings of `EngineStats`."""

    generation_tokens: int = 0
    row_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine sends this snapshot for /metrics. Its counters count from the start of the engine."""

    num_running: int = 0
    num_waiting: int = 0
    queue_wait: float = 0.0
    """A request that a new client sent now would wait so many seconds."""
    drafter: str | None = None
    num_pages: int = 0
    num_free_pages: int = 0
    """Free or only kept by the prefix cache."""
    prefix_queries: int = 0
    """Counts the prompt tokens that were looked up in the prefix cache."""
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    """Sums the decoding rows over the steps: generation_tokens / row_steps is tokens per step."""
    drafted_tokens: int = 0
    """Counts the tree nodes that were verified, roots left out."""
    accepted_tokens: int = 0
    """Counts the tree nodes that were accepted, roots left out."""
    drafted_by_depth: list[int] = []
    """Counts, by depth from 1, the rows whose tree reached it."""
    accepted_by_depth: list[int] = []
    """Counts, by depth from 1, the rows that accepted a node there."""
    tree_size: int = 1
    """A speculating row brought so many nodes to the latest step."""
    num_compiled: int = 0
    """Counts kernels that were compiled, and graphs that were captured, after the engine was ready."""
    adapters: dict[str, AdapterStats] = {}
    """Of the counts above, the part of each adapter, by name."""
    memory: MemoryUse = MemoryUse()
