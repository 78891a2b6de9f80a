"""Trials: a few steps of another kind than the planner would choose, so that no wrong cost is believed for ever."""

from __future__ import annotations

from math import inf, sqrt

from manyheads.speculation.costs import FRESH_STEPS, Kind, RunningCosts

SHARE = 0.02
"""Of the time, what looking again at kinds of steps may lose."""
HOPE = 1.1
"""A kind that was never seen is tried if it may be so many times as good as the best one known."""
MOST_LOOKS, MOST_STEPS = 4, 9
"""A trial looks so many times at what surprises, and is given up after so many steps if it does not come about."""
SURPRISE = 1.15
"""Times as long, or as short, as was thought."""
STEPS_AFTER = 2
"""Steps that a trial costs when it is over: rows need new candidates, and one step may be under way."""


class Trials:
    """Decides which kind of step is tried, and when; by counted steps and their times, never by a clock.

    Kinds that may be better than the best one known are tried: soon if they were never seen, the likeliest first; later
    again and again, in turns, as long as that loses no more than `SHARE` of the time.

    Args:
        costs: what is known of the kinds.
    """

    def __init__(self, costs: RunningCosts) -> None:
        self.kind: Kind | None = None
        """What is being tried."""
        self._costs = costs
        self._is_new = False
        self._looks = self._steps = self._steps_after = 0
        self._owed = 0.0  # seconds that trials lost more than their share
        self._token_seconds = 0.0  # of what would have been chosen
        self._tokens = self._best_tokens = 1.0  # of a step of what is tried, and of what would have been chosen

    def begin(self, rows: int, tokens: dict[Kind, float]) -> None:
        """Begin a trial if one is due.

        Args:
            tokens: what a row is expected to gain in a step of each kind that can be chosen.
        """
        costs = self._costs
        seconds = {kind: costs.seconds(rows, kind) for kind in tokens}
        best = max(tokens, key=lambda kind: tokens[kind] / seconds[kind])
        turn: dict[Kind, tuple[float, float]] = {}  # the lowest comes first
        for kind in tokens:
            age = costs.age(rows, kind)
            if kind == best or (age is not None and (age <= FRESH_STEPS or self._owed > 0)):
                continue
            least = costs.least(rows, kind)
            if tokens[kind] * seconds[best] > (HOPE if age is None else 1.0) * tokens[best] * least:
                likely = sqrt(least * seconds[kind]) / tokens[kind]  # seconds for a token, between hope and belief
                turn[kind] = (-inf, likely) if age is None else (-age, likely)
        if not turn:
            return
        self.kind = min(turn, key=turn.__getitem__)
        self._is_new = costs.age(rows, self.kind) is None
        self._looks = self._steps = 0
        self._token_seconds = seconds[best] / tokens[best]
        self._tokens, self._best_tokens = tokens[self.kind], tokens[best]

    def observe(self, seconds: float, told: float | None) -> bool:
        """Take in a step, of a trial or not.

        Args:
            told: times as long as was thought, if the step was one of what is tried.

        Returns:
            whether a trial has ended.
        """
        if self.kind is None and self._steps_after == 0:
            self._owed = max(0.0, self._owed - SHARE * seconds)
            return False
        if self.kind is None:
            self._steps_after -= 1
            self._owe(seconds - seconds / self._best_tokens)  # without candidates a row gains a token
            return False
        self._owe(seconds - self._token_seconds * (self._tokens if told is not None else 1.0))
        self._steps += 1
        self._looks += told is not None
        clear = told is not None and 1 / SURPRISE < told < SURPRISE
        if not clear and self._looks < MOST_LOOKS and self._steps < MOST_STEPS:
            return False
        self.kind, self._steps_after = None, STEPS_AFTER
        return True

    def _owe(self, lost: float) -> None:
        """Pay for what a trial lost, unless it was the first of its kind."""
        self._owed += 0.0 if self._is_new else max(0.0, lost)
