"""What a drafter expects rows to gain, and what comes of it: for the base, and for each adapter on top of it.

A step's rows share a tree, of which each brings its own most probable nodes. So what is expected is known of a step as
a whole; what is gained is known of each row. Guesses that were made for the base may be worth less, or more, where an
adapter answers, which the drafter does not know: hence the outcome is measured by adapter.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import log

from manyheads.speculation.draft import SIZES

WINDOW = 0.02
"""Share of a new step in the running means of what a drafter expects and of what came of it."""
FORGOTTEN = 0.0005
"""Of those means, by a step without trees: text that a drafter did badly on is followed by other text."""
ALIKE = 1.1
"""Rows of which so many times as much comes true as of others are told apart."""
TINY = 1e-12
"""What a gain is divided by at least: guesses that never hold promise nothing."""


class Gains:
    """Running means over steps.

    Args:
        hoped: by `SIZES`, what rows gain beside their own token by what is known before any step.
        holds: as `Drafter.prior_holds`.
    """

    def __init__(self, hoped: list[float], holds: bool) -> None:
        self._hoped = hoped
        self._expected = hoped if holds else None  # by SIZES
        self._num_steps = 0
        # by adapter: gained, and what was expected of the same steps
        self._outcomes: defaultdict[int, list[float]] = defaultdict(lambda: [1.0, 1.0])
        self._shares = {0: 1.0}  # of the next step's rows, by adapter

    def rows_are(self, adapters: Sequence[int]) -> None:
        """The next steps' rows have these adapters."""
        if not any(adapters):
            self._shares = {0: 1.0}
        else:
            self._shares = {adapter: count / len(adapters) for adapter, count in Counter(adapters).items()}

    @property
    def level(self) -> int | None:
        """Tells rows apart by how much of what is expected comes true; None for rows of the base alone."""
        return None if self._shares == {0: 1.0} else round(log(max(self._trust, TINY), ALIKE))

    @property
    def _trust(self) -> float:
        """How much of what is expected comes true for the next steps' rows."""
        outcomes = {adapter: self._outcomes[adapter] for adapter in self._shares}
        return sum(
            self._shares[adapter] * gained / max(expected, TINY) for adapter, (gained, expected) in outcomes.items()
        )

    def promised(self, nodes: float) -> float | None:
        """What a row gains beside its own token if rows bring so many nodes; None where no step has said so."""
        return None if self._expected is None else self._expected[size_at(nodes)] * self._trust

    def observe(
        self, nodes: float, share: float, expected: list[float], gained: Sequence[int], adapters: Sequence[int] = ()
    ) -> None:
        """Take in a step.

        Args:
            nodes: that its rows brought.
            share: of what so many nodes promise at any depth, what they do at the step's.
            expected: as `StepResult.gains`.
            gained: tokens beside its own of each row.
            adapters: of each row; none are the base's.
        """
        expected = [gain / max(share, TINY) for gain in expected]
        if self._expected is None:
            self._expected = list(expected)
        # a text's first steps say little of it: their mean counts
        self._num_steps += 1
        weight = max(WINDOW, 1 / (2 + self._num_steps))
        self._expected = [old + weight * (new - old) for old, new in zip(self._expected, expected, strict=True)]
        by_adapter: dict[int, list[int]] = defaultdict(list)
        for tokens, adapter in zip(gained, adapters or [0] * len(gained), strict=True):
            by_adapter[adapter].append(tokens)
        for adapter, tokens_of in by_adapter.items():
            means = (sum(tokens_of) / len(tokens_of), expected[size_at(nodes)] * share)
            old = self._outcomes[adapter]
            self._outcomes[adapter] = [was + WINDOW * (new - was) for was, new in zip(old, means, strict=True)]

    def observe_plain(self) -> None:
        """Take in a step without trees: what they were last seen to gain counts a little less, so that a drafter that
        was given up is tried again."""
        if self._expected is None:
            return
        self._expected = [old + FORGOTTEN * (new - old) for old, new in zip(self._expected, self._hoped, strict=True)]
        for adapter in self._shares:
            gained, expected = self._outcomes[adapter]
            self._outcomes[adapter] = [gained + FORGOTTEN * (expected - gained), expected]


def size_at(nodes: float) -> int:
    """Where the largest size that so many nodes fill stands among `SIZES`."""
    return max(i for i, size in enumerate(SIZES) if size <= nodes)
