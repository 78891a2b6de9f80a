"""How long a step may be: how many prompt tokens it computes beside rows that decode, and how many rows."""

from __future__ import annotations

from manyheads.engine.record_sizes import CHUNKS
from manyheads.speculation.costs import PLAIN
from manyheads.speculation.planner import Planner

PROMPT_SHARE = 3.0
"""Without a target, the prompts of a step may take so many times as long as its decoding rows do by themselves. With
less, first tokens wait where a machine is nearly full of prompts; with more, so do those who decode."""
TIMES_ONE = 2.0
"""And such a step may take so many times as long as one with a single token of a prompt. Of a small model, that is most
of what it takes with any: prompts that were held to less would take many steps, beside few rows."""
SIZES = tuple(tokens for tokens, _ in CHUNKS[1:])
"""Prompt tokens of a step that are considered, and multiples of the last."""


class StepTarget:
    """Holds steps to a length that those who decode can expect, by what steps turn out to cost.

    Args:
        planner: knows the costs, and what rows bring beside prompts.
        max_num_batched_tokens: most prompt tokens in a step; half of it beside rows where costs are not known.
        seconds: what a step should take at most; None goes by what its decoding rows take.
        sizes: numbers of prompt tokens that a step rounds up to, as far as they go; none where nothing is rounded.
    """

    def __init__(
        self,
        planner: Planner,
        max_num_batched_tokens: int,
        seconds: float | None = None,
        sizes: tuple[int, ...] = (),
    ) -> None:
        self.planner, self.seconds = planner, seconds
        self.max_num_batched_tokens = max_num_batched_tokens
        self._rounds_to = sizes
        most = max_num_batched_tokens
        multiples = range(2 * SIZES[-1], most, SIZES[-1])
        self._sizes = [*(size for size in (*SIZES, *multiples) if size < most), most]

    def most_rows(self, most: int) -> int:
        """How many of so many rows may run, so that a step of roots alone is within the target; 1 at least."""
        if self.seconds is None or self.planner.costs is None:
            return most
        costs, target = self.planner.costs, self.seconds
        low, high = 1, most  # costs rise with rows
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if costs.seconds(middle, PLAIN) <= target else (low, middle - 1)
        return low

    def most_prompt_tokens(self, rows: int) -> int:
        """How many prompt tokens a step may compute beside so many decoding rows; the smallest size at least."""
        costs = self.planner.costs
        if rows == 0:
            return self.max_num_batched_tokens
        if costs is None:
            return max(1, self.max_num_batched_tokens // 2)
        kind = self.planner.best(rows).kind
        target = self.seconds or max(
            (1 + PROMPT_SHARE) * costs.seconds(rows, kind), TIMES_ONE * costs.seconds(rows, kind, prompt_tokens=1)
        )
        within = (size for size in reversed(self._sizes) if costs.seconds(rows, kind, size) <= target)
        return int(next(within, self._sizes[0]))

    def prompt_tokens(self, rows: int, wanted: int) -> int:
        """How many of so many prompt tokens a step computes beside so many decoding rows.

        Where it rounds them up, it computes fewer if that is quicker than what it would compute in vain: the rest comes
        with the next step.
        """
        tokens = min(wanted, self.most_prompt_tokens(rows))
        less = max((size for size in self._rounds_to if size <= tokens), default=0)
        costs = self.planner.costs
        if less in (0, tokens) or tokens > self._rounds_to[-1] or costs is None or rows == 0:
            return tokens
        kind = self.planner.best(rows).kind
        rest = costs.seconds(rows, kind, tokens - less) - costs.seconds(rows, kind)
        return less if costs.seconds(rows, kind, less) + rest < costs.seconds(rows, kind, tokens) else tokens
