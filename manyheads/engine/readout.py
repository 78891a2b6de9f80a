"""What a launched step says, on its way to the host and read there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manyheads.engine.guesses import TreeGuesses
from manyheads.engine.logprobs import Columns
from manyheads.engine.prompt_logprobs import Scored
from manyheads.engine.step import Chunk, Request, RowResult, StepResult
from manyheads.request import Guess
from manyheads.speculation.drafter import Drafter


@dataclass(eq=False)
class Drawn:
    """What a step says of R rows that drew tokens."""

    requests: list[Request]
    values: Tensor  # [R, …] int64, `Outcome.values`
    width: int  # of emitted tokens and of paths
    known: set[int]  # the rows whose candidates were proposed for this step
    gains: Tensor | None = None  # [sizes] float32, `Trees.gains` at the sizes that the planner considers
    logprobs: dict[int, Columns] = field(default_factory=dict)
    """By row, for requests that want them (`logprobs.of_rows`)."""
    guesses: TreeGuesses | None = None
    """What trees held, if a request asks for its steps."""
    foreseen: Sequence[RowResult] = ()
    """As `PendingStep.foreseen`."""


@dataclass(frozen=True, eq=False)
class Computed:
    """What a step says of the known tokens of chunks."""

    chunks: list[Chunk]
    is_finite: Tensor  # [T] bool, whether what is cached of them are numbers
    scored: Sequence[Scored]

    def broken(self) -> list[Request]:
        """Who has tokens there of which not all that is cached, or was asked for, are numbers."""
        parts = torch.split(self.is_finite, [chunk.num_inflight for chunk in self.chunks])
        broken = [chunk.request for chunk, part in zip(self.chunks, parts, strict=True) if not part.all()]
        return [*broken, *(scored.request for scored in self.scored if not scored.columns.logprobs.isfinite().all())]


class PendingStep:
    """A launched step.

    Args:
        drawn: of each part of the step.
        drafter: says what candidates mean.
        computed: of its chunks, if it has some.
        copied: when all of it has reached the host; None if it was never anywhere else.
    """

    def __init__(
        self,
        drawn: list[Drawn],
        drafter: Drafter | None,
        computed: Computed | None = None,
        copied: torch.cuda.Event | None = None,
    ) -> None:
        self._drawn, self._drafter, self._computed, self._copied = drawn, drafter, computed, copied
        self.is_typical = True
        """As `StepResult.is_typical`."""

    @property
    def foreseen(self) -> Sequence[RowResult]:
        """What the step is sure to do for some rows, since their grammars leave them no choice."""
        return [row for drawn in self._drawn for row in drawn.foreseen]

    def read(self) -> StepResult:
        """Wait for the device, and say what the step did for each row."""
        if self._copied is not None:
            self._copied.synchronize()
        result = StepResult(rows=[], hits=[], trials=[], is_typical=self.is_typical)
        if self._computed is not None:
            for scored in self._computed.scored:
                scored.keep()
            result.broken.extend(self._computed.broken())
        for drawn in self._drawn:
            width = drawn.width
            values = drawn.values.tolist()
            for i, request in enumerate(drawn.requests):
                gained, brought, depth = values[i][:3]
                tokens = values[i][3 : 3 + gained]
                is_finite = tokens[-1] >= 0
                if not is_finite:
                    del tokens[-1]
                logprobs = None
                if tokens and (columns := drawn.logprobs.get(i)) is not None:
                    logprobs = columns.first(len(tokens), request.params.logprobs or 0).of(tokens)
                guesses: list[Guess] = []
                if drawn.guesses is not None and request.params.return_steps:
                    path = values[i][3 + width + 1 : 3 + width + values[i][0]]
                    guesses = drawn.guesses.of(i, values[i][3 + 2 * width :], path)
                result.rows.append(RowResult(request, tokens, logprobs, depth, brought - 1, guesses, is_finite))
                if i in drawn.known and self._drafter is not None:
                    count_hits(result, tokens, values[i][3 + 2 * width :], self._drafter)
            if drawn.gains is not None:
                result.gains[:] = [gain / len(drawn.requests) for gain in drawn.gains.tolist()]
        return result


def count_hits(result: StepResult, tokens: list[int], candidates: list[int], drafter: Drafter) -> None:
    """How good a row's candidates turned out, for the planner: what was offered on the way against what came out."""
    for depth, (token, offered) in enumerate(zip(tokens, drafter.follow(candidates, tokens), strict=False)):
        if depth == len(result.trials):
            result.hits.append([0] * len(drafter.prior[depth]))
            result.trials.append(0)
        result.trials[depth] += 1
        if token in offered:
            result.hits[depth][offered.index(token)] += 1
