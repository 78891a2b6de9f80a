"""What an engine has done since its start, in numbers."""

from __future__ import annotations

from manyheads.engine.scheduler import Scheduler
from manyheads.engine.step import RowResult
from manyheads.request import EngineReady
from manyheads.say import say
from manyheads.stats import AdapterStats, EngineStats, MemoryUse


class Counts:
    """Counters of one engine; they only grow.

    Args:
        ready: what is served.
    """

    def __init__(self, ready: EngineReady) -> None:
        self.ready = ready
        self.steps = self.row_steps = 0
        self.num_compiled = 0
        self.prompt_tokens = self.generation_tokens = 0
        self._drafted = self._accepted = 0
        self._of_adapters = [dict.fromkeys(AdapterStats.__struct_fields__, 0) for _ in ready.loras]
        self._drafted_by_depth = [0] * ready.draft_depth
        self._accepted_by_depth = [0] * ready.draft_depth
        self._tree_size = 1

    def add_row(self, row: RowResult, num_tokens: int) -> None:
        """Count what a step did for a row.

        Args:
            num_tokens: of those that it gained, those that its text takes.
        """
        request, accepted = row.request, max(len(row.tokens) - 1, 0) if row.drafted_depth else 0
        is_decoding = request.num_output > 0
        self.row_steps += is_decoding
        self.generation_tokens += num_tokens
        if row.drafted_depth:
            self._add_tree(row, accepted)
        if request.adapter:
            of_adapter = self._of_adapters[request.adapter - 1]
            of_adapter["row_steps"] += is_decoding
            of_adapter["generation_tokens"] += num_tokens
            of_adapter["drafted_tokens"] += row.num_drafted
            of_adapter["accepted_tokens"] += accepted

    def _add_tree(self, row: RowResult, gained: int) -> None:
        """Count what a row's tree brought and what of it was accepted."""
        self._tree_size = row.num_drafted + 1
        self._drafted += row.num_drafted
        self._accepted += gained
        for depth in range(row.drafted_depth):
            self._drafted_by_depth[depth] += 1
            self._accepted_by_depth[depth] += depth < gained

    def compiled(self, what: str) -> None:
        """Count what was compiled or captured while requests waited for it, and say so."""
        self.num_compiled += 1
        say(f"engine: compiled or captured while serving: {what}")

    def stats(self, scheduler: Scheduler, memory: MemoryUse) -> EngineStats:
        """A snapshot, with what the scheduler has now."""
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            queue_wait=scheduler.expected_wait(),
            drafter=self.ready.drafter,
            num_pages=scheduler.pages.num_usable,
            num_free_pages=scheduler.pages.num_available,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            steps=self.steps,
            row_steps=self.row_steps,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            drafted_by_depth=list(self._drafted_by_depth),
            accepted_by_depth=list(self._accepted_by_depth),
            tree_size=self._tree_size,
            num_compiled=self.num_compiled,
            adapters={
                name: AdapterStats(**counts) for name, counts in zip(self.ready.loras, self._of_adapters, strict=True)
            },
            memory=memory,
        )
