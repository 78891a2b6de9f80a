"""A request that an engine has not ended yet, with all that another engine needs to go on with it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec

from manyheads.request import EngineRequest, RequestDelta

DeltaQueue = asyncio.Queue[RequestDelta]
"""Holds at most what its requests may gain: a reader that is behind costs no more than the context's tokens."""


@dataclass(eq=False)
class OpenRequest:
    """A request that has not ended, and what came of it."""

    request: EngineRequest
    queue: DeltaQueue
    tokens: list[int] = field(default_factory=list)
    num_steps: int = 0
    sent: bool = False
    """Whether an engine has got it."""
    runs: bool = False
    """Whether the engine that is there now has begun with it."""
    deaths: int = 0
    """Of engines in a row, at which it ran."""
    aborted: bool = False

    def to_send(self) -> EngineRequest:
        """What an engine that knows nothing of it needs."""
        if not self.sent:
            return self.request
        return msgspec.structs.replace(
            self.request, output_token_ids=list(self.tokens), num_steps=self.num_steps, resumes=True
        )
